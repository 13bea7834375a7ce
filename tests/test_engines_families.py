"""The graph engine on many kinds of decoder: the eager engine's tokens, by a captured step or by falling back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import ALL
from knob_contract import NEW_TOKENS, prompts
from recorded import Recording

from knobs.blocks import active_blocks
from workers.models.engines import EagerEngine, Engine, EngineUse
from workers.models.graph_engine import GraphEngine
from workers.models.requirements import stack_of_blocks

PLAIN = "the model has blocks without plain full attention"
# Families whose step cannot be captured, and the beginning of the reason. All others are captured.
FALL_BACK = {
    **dict.fromkeys(("qwen2", "gemma3_text", "gpt_oss", "gemma3n_text", "gemma3", "gemma4"), PLAIN),
    **dict.fromkeys(("lfm2", "lfm2_vl", "qwen3_next", "nemotron_h", "qwen3_5_moe"), PLAIN),
    **dict.fromkeys(("llama4", "mistral_large4", "glm5_next", "dots3_note"), PLAIN),
    "jetmoe": "the decode step cannot be captured",
}


@torch.inference_mode()
def decoded(engine: Engine, model: Any) -> tuple[list[list[int]], EngineUse]:
    """Greedy tokens of two prompts, one of them padded on the left, without any vision."""
    ids, mask = prompts()
    state = engine.new_state(len(ids), ids.shape[1] + NEW_TOKENS)
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": state.cache}
    positions = model._prepare_position_ids_for_generation(ids, dict(given))
    output = model(**given, position_ids=positions, use_cache=True, return_dict=True)
    state.begin(mask, positions[..., -1:])
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
    while len(tokens) < NEW_TOKENS:
        tokens.append(state.step(tokens[-1]))
    return torch.cat(tokens, dim=-1).tolist(), state.use


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_those_of_the_eager_engine(name: str) -> None:
    model = ALL[name].build()
    decoder = stack_of_blocks(model)
    if decoder._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    recording = Recording()
    graph = GraphEngine(model, decoder, lambda: recording)
    for keep in (None, ALL[name].keeps[0]):
        with active_blocks(decoder, keep), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, _ = decoded(EagerEngine(model), model)
            for _ in range(2):
                found, used = decoded(graph, model)
                assert found == expected
                assert used.engine == ("eager" if name in FALL_BACK else "graph"), used.note
                assert str(used.note).startswith(FALL_BACK.get(name, "None"))
    assert recording.captured == (0 if name in FALL_BACK else 2)

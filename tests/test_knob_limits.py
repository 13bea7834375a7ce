"""What a configuration alone says about both knobs: limits, reasons, renormalization; in plans and for all families."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ALL, BLOCKS
from knob_contract import routing_in
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from knobs.blocks import active_blocks, refuse_blocks
from knobs.configuration import entries_of
from knobs.errors import KnobError
from knobs.experts import experts_per_token
from knobs.routing import NOT_RENORMALIZED, RENORMALIZED, RENORMALIZED_WITH_SHARED, refuse_top_k, routing_of
from knobs.stack import BlockStack, stack_of
from orchestrator.plan import expand
from orchestrator.spec import parse_sweep
from workers.models import ModelCard, describe
from workers.models.registry import PLAIN_LANGUAGE_MODELS
from workers.models.requirements import stack_of_blocks

VISION_LANGUAGE = [name for name, family in ALL.items() if {"vision_config", "vq_config"} & family.entries.keys()]
PROJECT = Path(__file__).resolve().parents[1]
# Whole models whose language model has a type of its own.
PARENTS = ("gemma3", "glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
RULES = (RENORMALIZED, NOT_RENORMALIZED, RENORMALIZED_WITH_SHARED)


def described(folder: Path, model_type: str, entries: dict[str, Any]) -> ModelCard:
    """What a plan knows of a checkpoint that has only its config.json."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **entries}))
    return describe(str(folder), random_weights=True)


def planned(card: ModelCard, knobs: str) -> tuple[list[str], list[str], list[tuple[int | None, tuple[int, ...]]]]:
    """Reasons of what is skipped, of what is dropped, and the points that are left."""
    points = expand(parse_sweep(f"name: example\nmodels: [a/b]\ndatasets: [demo]\nknobs: {knobs}\n"), card)
    left = [(point.moe_top_k, point.active_blocks) for point in points.knobs]
    return [skip.reason for skip in points.skips], [drop.reason for drop in points.dropped], left


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "knobs", "skipped", "left"),
    [
        ("glm4v_moe", "{moe_top_k: [2, 4, 5, 9]}", ["come from 2 of 4 groups", "has 8 experts"], [2, 4]),
        ("llama4", "{moe_top_k: [1, 2]}", ["llama4 runs every expert for every token"], [1]),
        ("gemma4", "{moe_top_k: [1, 8, 9]}", ["the model has 8 experts, so moe_top_k must be 1 to 8"], [1, 8]),
        ("ernie4_5_vl_moe", "{moe_top_k: [3, 9]}", ["has 8 experts"], [3]),
    ],
)
def test_a_top_k_that_routers_cannot_choose_is_skipped_with_the_reason(
    tmp_path: Path, name: str, knobs: str, skipped: list[str], left: list[int]
) -> None:
    reasons, dropped, points = planned(described(tmp_path, name, ALL[name].entries), knobs)
    assert len(reasons) == len(skipped)
    assert all(words in reason for words, reason in zip(skipped, reasons, strict=True)), reasons
    assert not dropped
    assert [k for k, _ in points] == left


def test_a_dense_model_drops_the_axis(tmp_path: Path) -> None:
    card = described(tmp_path, "paligemma", ALL["paligemma"].entries)
    assert planned(card, "{moe_top_k: [1, 2]}") == ([], ["the model is dense"], [(None, tuple(range(BLOCKS)))])


def test_a_fixed_router_runs_as_it_is_when_nothing_is_asked_of_it(tmp_path: Path) -> None:
    card = described(tmp_path, "llama4", ALL["llama4"].entries)
    assert planned(card, "{}") == ([], [], [(1, tuple(range(BLOCKS)))])


def test_blocks_that_others_need_are_skipped_with_the_reason(tmp_path: Path) -> None:
    card = described(tmp_path, "gemma4", ALL["gemma4"].entries)
    reasons, _, left = planned(card, "{active_blocks: [2, 4, 5, [0, 1, 4, 5], [2, 4]]}")
    assert reasons == ["block 4 reads the keys and values of block 2, so it cannot run without it"]
    assert {blocks for _, blocks in left} == {(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4), (2, 4)}


def test_a_hybrid_keeps_an_attention_block(tmp_path: Path) -> None:
    card = described(tmp_path, "qwen3_5_moe", ALL["qwen3_5_moe"].entries)
    reasons, _, left = planned(card, "{active_blocks: [1, 2, [0, 2, 4]]}")
    assert reasons == ["at least one attention block must run (blocks 1, 3, 5)"] * 2
    assert [blocks for _, blocks in left] == [(0, 1)]


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_a_plan_says_of_every_value_what_the_loaded_model_says(tmp_path: Path, name: str) -> None:
    family = ALL[name]
    card = described(tmp_path, name, family.entries)
    with torch.device("meta"):
        model = family.build()
    stack = stack_of_blocks(model)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(BLOCKS), n) for n in range(1, BLOCKS + 1))
    for keep in (*range(1, BLOCKS + 1), *map(list, subsets)):
        expected = refuse_blocks(keep, card.num_blocks, card.stack)
        assert refused(active_blocks(stack, keep)) == (expected and f"active_blocks {keep}: {expected}")
    assert (None if card.routing is None else routing_in(model)) == card.routing
    for k in range(1, 10) if card.routing else ():
        expected = refuse_top_k(k, card.routing)
        assert refused(experts_per_token(model, k)) == (expected and f"moe_top_k {k}: {expected}")


def refused(switch: Any) -> str | None:
    """The reason of a knob that cannot be switched."""
    try:
        with switch:
            return None
    except KnobError as error:
        return str(error)


# -- what config.json leaves to transformers --------------------------------------------------------------------------


def test_kinds_of_blocks_that_a_class_works_out(tmp_path: Path) -> None:
    """Every fourth block of Qwen3.5 is attention, and its config.json need not list them."""
    entries = {"text_config": {"model_type": "qwen3_5_text", "num_hidden_layers": 12}, "vision_config": {}}
    assert described(tmp_path, "qwen3_5", entries).stack.attention == (3, 7, 11)


def test_shared_keys_and_values_by_default(tmp_path: Path) -> None:
    """Gemma 3n: the last 15 of 35 blocks read what blocks 18 and 19 keep."""
    entries = {"text_config": {"model_type": "gemma3n_text"}, "vision_config": {}, "audio_config": {}}
    stack = described(tmp_path, "gemma3n", entries).stack
    assert {needed.source for needed in stack.dependencies} == {18, 19}
    assert [needed.block for needed in stack.dependencies] == list(range(20, 35))
    assert stack.refuse(range(20)) is None
    assert stack.refuse(range(19)) is None
    without_18 = [block for block in range(35) if block != 18]
    assert stack.refuse(without_18) == "block 20 reads the keys and values of block 18, so it cannot run without it"


@pytest.mark.parametrize("name", PLAIN_LANGUAGE_MODELS)
def test_plain_language_models_are_plain(name: str) -> None:
    """So that a plan of them needs no torch: neither blocks nor experts hang on what config.json leaves out."""
    model_type = name if name in CONFIG_MAPPING_NAMES and name not in PARENTS else f"{name}_text"
    entries = entries_of(AutoConfig.for_model(model_type))
    assert stack_of(entries, entries["num_hidden_layers"]) == BlockStack(entries["num_hidden_layers"])
    assert routing_of(entries) is None


def test_a_plan_of_a_plain_stranger_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", **ALL["gemma3"].entries}))
    program = (
        "import sys\n"
        "from workers.models import describe\n"
        f"card = describe({str(tmp_path)!r}, random_weights=True)\n"
        "assert card.num_blocks == 6\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_type_that_transformers_does_not_know_is_taken_at_its_word(tmp_path: Path) -> None:
    entries = {"text_config": {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2}, "vision_config": {}}
    card = described(tmp_path, "never_heard_of", entries)
    assert card.num_blocks == 3
    assert card.routing is not None
    assert (card.num_experts, card.moe_top_k, card.routing.renormalization) == (8, 2, None)


# -- all families of transformers -------------------------------------------------------------------------------------

# Encoders, and experts outside a language model.
NOT_LANGUAGE_MODELS = ("nllb-moe", "vitpose_backbone", "openai_privacy_filter", "dots3_note_vision_encoder")


def test_every_mixture_of_experts_of_transformers_is_understood() -> None:
    """How many experts, how many fire, what becomes of their weights, and whether there is a back-end to choose."""
    models = Path(transformers.__file__).parent / "models"
    named = {
        model_type
        for file in models.glob("*/configuration_*.py")
        if re.search(r"\w*expert\w*:", source := file.read_text(encoding="utf-8"))
        for model_type in re.findall(r'model_type = "([^"]+)"', source)
        if model_type in CONFIG_MAPPING_NAMES
    }
    understood = {}
    for model_type in sorted(named - set(NOT_LANGUAGE_MODELS)):
        config = AutoConfig.for_model(model_type)
        entries = entries_of(config)
        if any(
            isinstance(value, int) and value > 1
            for key, value in entries.items()
            if re.search("^(num|n_routed|moe_num).*experts$", key)
        ):
            routing = routing_of(entries)
            assert routing is not None, model_type
            assert routing.renormalization in RULES, model_type
            assert routing.moe_top_k is not None or routing.fixed is not None, model_type
            understood[model_type] = routing.one_back_end
            if type(config) in AutoModel._model_mapping:
                has_choice = AutoModel._model_mapping[type(config)]._can_set_experts_implementation()
                assert routing.one_back_end == (not has_choice), model_type
    assert len(understood) >= 50
    assert {"llama4_text", "step3p5"} <= {model_type for model_type, one in understood.items() if one}


def test_every_form_in_which_a_block_hands_on_what_it_made_is_known() -> None:
    """Blocks return the residual stream; `knobs.blocks` knows the families of which they return more, and no others."""
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        config = AutoConfig.for_model(model_type)
        text = config.get_text_config(decoder=True)
        if config.is_encoder_decoder or text.is_encoder_decoder:
            continue
        for folder in {type(part).__module__.split(".")[2] for part in (config, text)}:
            for file in (models / folder).glob("modeling_*.py"):
                for name, returned in returned_tuples(file.read_text(encoding="utf-8")):
                    found[name] = returned
    assert found == {
        "ChameleonDecoderLayer": "(hidden_states,)",
        "ChameleonSwinDecoderLayer": "(hidden_states,)",
        "Glm5NextTextDecoderLayer": "(hidden_states, topk_indices)",
        "MistralLarge4TextDecoderLayer": "(hidden_states, topk_indices)",
    }


def returned_tuples(source: str) -> Iterator[tuple[str, str]]:
    """Classes of blocks with a cache whose `forward` returns a tuple, and that tuple as it is written."""
    for made in ast.parse(source).body:
        if not isinstance(made, ast.ClassDef) or not re.search(r"(DecoderLayer|Block)$", made.name):
            continue
        for forward in made.body:
            if not isinstance(forward, ast.FunctionDef) or forward.name != "forward":
                continue
            if "past_key_values" not in {argument.arg for argument in forward.args.args}:
                continue
            tuples = {
                node.targets[0].id: node.value
                for node in ast.walk(forward)
                if isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Tuple)
                and isinstance(node.targets[0], ast.Name)
            }
            for node in ast.walk(forward):
                value = node.value if isinstance(node, ast.Return) else None
                value = tuples.get(value.id) if isinstance(value, ast.Name) else value
                if isinstance(value, ast.Tuple):
                    yield made.name, ast.unparse(value)


DBRX = {"moe_num_experts": 16, "moe_top_k": 4}
COHERE = {"model_type": "cohere2_moe", "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False}
KIMI = {"model_type": "kimi_linear", "num_experts": 8, "num_experts_per_token": 2}


@pytest.mark.parametrize(
    ("entries", "experts", "top_k", "rule"),
    [
        ({"model_type": "dbrx", "ffn_config": {**DBRX, "moe_normalize_expert_weights": 1}}, 16, 4, RENORMALIZED),
        ({"model_type": "dbrx", "ffn_config": {**DBRX, "moe_normalize_expert_weights": 2}}, 16, 4, NOT_RENORMALIZED),
        ({"model_type": "hunyuan_v1_moe", "num_experts": [16, 8], "moe_topk": [2, 2]}, 8, 2, RENORMALIZED),
        ({"model_type": "hunyuan_v1_moe", "num_experts": 16, "moe_topk": [2, 4]}, 16, None, RENORMALIZED),
        (COHERE, 8, 2, RENORMALIZED),
        ({**COHERE, "expert_selection_fn": "sigmoid"}, 8, 2, NOT_RENORMALIZED),
        ({**KIMI, "moe_renormalize": False}, 8, 2, NOT_RENORMALIZED),
        ({**KIMI, "moe_renormalize": True}, 8, 2, RENORMALIZED),
        ({**KIMI, "model_type": "inkling_text"}, 8, 2, RENORMALIZED_WITH_SHARED),
    ],
)
def test_spellings_of_configurations(entries: dict[str, Any], experts: int, top_k: int | None, rule: str) -> None:
    routing = routing_of(entries)
    assert routing is not None
    assert (routing.num_experts, routing.moe_top_k, routing.renormalization) == (experts, top_k, rule)


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "llama"},
        {"model_type": "jamba", "num_experts": 1, "num_experts_per_tok": 1},
        {"model_type": "gemma4_text", "num_experts": 8, "top_k_experts": 2, "enable_moe_block": False},
        {
            "model_type": "deepseek_v3",
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"] * 4,
        },
        {"model_type": "nemotron_h", "n_routed_experts": 8, "num_experts_per_tok": 2, "layer_types": ["mlp"]},
    ],
    ids=lambda entries: entries["model_type"],
)
def test_dense_models_whose_configurations_may_name_experts(entries: dict[str, Any]) -> None:
    assert routing_of(entries) is None


def test_a_router_that_does_not_say_how_many_it_chooses_is_fixed() -> None:
    routing = routing_of({"model_type": "another", "num_experts": 8})
    assert refuse_top_k(2, routing) == "its configuration does not name the number of experts per token"
    assert refuse_top_k(2, None) == "the model has no experts"


INKLING = {"model_type": "inkling2_text", "n_layers_per_attn_res_block": 3}
QWEN4 = {"model_type": "qwen4_exp_text", "layer_types": ["linear_attention", "indexed_attention"] * 3}


@pytest.mark.parametrize(
    ("entries", "kept", "reason"),
    [
        (INKLING, [0, 1], "block 3 begins a new residual stream, so it cannot be skipped"),
        (INKLING, [0, 3, 5], None),
        (QWEN4, [0, 3], "block 1 keeps the positions for all indexed attention, so it cannot be skipped"),
        (QWEN4, [1, 4], None),
        ({"model_type": "mllama_text_model"}, [0, 1, 2, 3, 4], "no block of mllama can be skipped: "),
        ({"model_type": "mllama_text_model"}, range(6), None),
        ({"model_type": "llama"}, [5], None),
    ],
)
def test_stacks_of_configurations(entries: dict[str, Any], kept: Sequence[int], reason: str | None) -> None:
    found = stack_of(entries, 6).refuse(kept)
    assert found == reason or (reason is not None and str(found).startswith(reason))

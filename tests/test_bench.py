"""What the benches compare is the same work: equal answers, and FLOPs and bytes that are what was counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import encoded, logits, picture, tiny_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import molmoe

QUESTION = "What is it?"
aten = torch.ops.aten
# Two operators that torch's counter does not know: attention on a CPU, and the grouped product.
UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._grouped_mm: lambda a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[-1],
}


@pytest.mark.parametrize("k", [1, 4])
def test_the_plain_loop_answers_as_the_experts_do(k: int) -> None:
    vlm = tiny_model("tiny-molmoe")
    inputs, _ = encoded(vlm, [picture(300, 420)], QUESTION)
    loops = [molmoe.PlainLoop(block.mlp.experts) for block in vlm.decoder.layers]
    with vlm.knobs(moe_top_k=k):
        expected = logits(vlm, inputs)
        restore = molmoe.replaced(vlm, loops)
        looped = logits(vlm, inputs)
        restore()
        assert torch.equal(logits(vlm, inputs), expected)
    assert float((looped - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_flops_of_prefill_are_those_that_torch_counts(k: int) -> None:
    vlm = tiny_model("tiny-molmoe")
    inputs, features = encoded(vlm, [picture(300, 420)], QUESTION)
    with vlm.knobs(moe_top_k=k), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        vlm.prefill(inputs.prompt, inputs.vision, features)
    # The table of rotary frequencies is not counted in the closed form.
    assert counter.get_total_flops() == pytest.approx(molmoe.prefill_flops(vlm, inputs, k), rel=1e-4)


def test_the_bytes_of_a_decode_step_are_the_weights_without_the_experts_not_chosen() -> None:
    vlm = tiny_model("tiny-molmoe")
    text = vlm.model.config.get_text_config(decoder=True)
    expert = 3 * text.hidden_size * text.intermediate_size * 4
    every = sum(p.numel() * 4 for p in (*vlm.decoder.layers.parameters(), *vlm.model.lm_head.parameters()))
    assert molmoe.active_bytes(vlm, text.num_experts) == every
    assert molmoe.active_bytes(vlm, 1) == every - text.num_hidden_layers * (text.num_experts - 1) * expert

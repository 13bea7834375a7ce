"""What the benches compare is the same work: equal answers, and FLOPs and bytes that are what was counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import Recording
from tiny import encoded, logits, picture, tiny_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import molmoe

from workers.models.adapter import VisionLanguageModel

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


class Refusing(Recording):
    def __call__(self, *_: Any) -> Any:
        raise RuntimeError("no")


@pytest.fixture
def vlm() -> Iterator[VisionLanguageModel]:
    shared = tiny_model("tiny-molmoe")
    engine, experts = shared.engine, shared.decoder.config._experts_implementation
    yield shared
    shared.engine = engine
    shared.model.set_experts_implementation(experts)


def times_of(vlm: VisionLanguageModel, make_capture: Any, repeats: int = 2) -> dict[str, list[tuple[float, float]]]:
    inputs, features = encoded(vlm, [picture(300, 420)], QUESTION)
    loops = [molmoe.PlainLoop(block.mlp.experts) for block in vlm.decoder.layers]
    return molmoe.measured(vlm, molmoe.variants(vlm, make_capture), loops, inputs, features, repeats)


def test_every_variant_is_timed_as_often_and_the_graphs_are_captured_once(vlm: VisionLanguageModel) -> None:
    recordings: list[Recording] = []

    def make_capture() -> Recording:
        recordings.append(Recording())
        return recordings[-1]

    times = times_of(vlm, make_capture)
    assert list(times) == ["grouped_mm", "eager", "loop", "grouped_mm graph", "batched_mm graph"]
    assert {len(values) for values in times.values()} == {2}
    assert min(min(both) for values in times.values() for both in values) > 0
    # Two rounds that warm up, the first of which captures.
    assert [(one.captured, one.replayed) for one in recordings] == [(1, 4 * molmoe.DECODE_STEPS)] * 2


def test_without_something_to_capture_with_there_are_no_graphs(vlm: VisionLanguageModel) -> None:
    assert list(times_of(vlm, None, 1)) == ["grouped_mm", "eager", "loop"]


def test_a_graph_that_could_not_be_captured_has_no_times(vlm: VisionLanguageModel) -> None:
    with pytest.warns(UserWarning, match="cannot be captured"):
        times = times_of(vlm, Refusing, 1)
    assert [name for name, values in times.items() if not values] == ["grouped_mm graph", "batched_mm graph"]
    decode = {name: [both[1] for both in values] for name, values in times.items()}
    line = molmoe.cells(2, decode, 1e9, 1e9, 1e6, 1)
    columns = molmoe.head(list(times), "MB", "GB/s").splitlines()[0].split(" | ")
    assert [columns[i] for i, cell in enumerate(line.split(" | ")) if cell.strip("| ") == "-"] == [
        *("grouped_mm graph", "batched_mm graph"),
        *("loop / grouped_mm graph", "loop / batched_mm graph"),
        *("grouped_mm graph / floor", "batched_mm graph / floor |"),
    ]

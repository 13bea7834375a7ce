"""The timed region: stages land in their columns, none comes from subtraction, an answer is exactly n tokens."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import NATIVE, generated, picture, tiny_model
from transformers.cache_utils import DynamicCache

from knobs.vision import VisionSetting
from workers.errors import SampleError
from workers.measure import Clock, Timing, time_answer
from workers.models.adapter import Features, VisionLanguageModel
from workers.models.engines import DecodeState, EagerEngine, EngineUse
from workers.models.processing import Inputs, Tensors
from workers.schema import STAGES

QUESTION = "What is in the picture?"


def timed(vlm: Any, output_tokens: int = 4) -> Timing:
    return time_answer(vlm, [picture(60, 90)], QUESTION, NATIVE, output_tokens)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_n_tokens_have_n_minus_one_decode_steps(vlm: VisionLanguageModel, count: int) -> None:
    timing = timed(vlm, count)
    assert timing.output_tokens == count
    assert len(timing.decode_step_ms) == count - 1
    assert timing.decode_ms == sum(timing.decode_step_ms)
    if count == 1:
        assert timing.tpot_ms is None
    else:
        assert timing.tpot_ms == timing.decode_ms / (count - 1)


def test_the_stages_are_adjacent_and_inside_the_total(vlm: VisionLanguageModel) -> None:
    timing = timed(vlm)
    stages = [getattr(timing, name) for name in STAGES]
    assert min(stages) > 0
    # Its two ends are marks of their own right, so this fails where a stage begins late or ends early.
    assert timing.ttft_ms == pytest.approx(sum(stages[:-1]), rel=1e-9)
    assert timing.residual_ms >= 0, "on a CPU both clocks are one, and total begins first and ends last"
    assert min(timing.decode_step_ms) > 0


@pytest.mark.parametrize("count", [0, -1])
def test_an_answer_without_a_token_is_refused(vlm: VisionLanguageModel, count: int) -> None:
    with pytest.raises(ValueError, match=rf"^output_tokens is {count}; prefill makes the first token"):
        timed(vlm, count)


def test_the_cache_grows_by_every_token_but_the_last(vlm: VisionLanguageModel) -> None:
    short, long = timed(vlm, 2), timed(vlm, 12)
    per_token = (long.kv_cache_bytes - short.kv_cache_bytes) / 10
    assert per_token > 0
    assert short.kv_cache_bytes == per_token * (short.inputs[0].num_prompt_tokens + 1)


def test_the_device_has_no_memory_peak_on_a_cpu(vlm: VisionLanguageModel) -> None:
    assert timed(vlm).peak_memory_bytes is None


def test_the_end_of_an_answer_does_not_end_the_timing(vlm: VisionLanguageModel) -> None:
    inputs = vlm.transfer(vlm.preprocess([picture(60, 90)], QUESTION, NATIVE))
    first = generated(vlm, inputs, 1)
    vlm.model.generation_config.eos_token_id = first[0]
    assert generated(vlm, inputs, 8) == first, "the answer itself would end here"
    assert len(timed(vlm, 8).decode_step_ms) == 7


def test_the_inputs_of_the_timed_answer_are_kept(vlm: VisionLanguageModel) -> None:
    expected = vlm.preprocess([picture(60, 90)], QUESTION, NATIVE)
    (inputs,) = timed(vlm).inputs
    assert inputs.num_vision_tokens == expected.num_vision_tokens > 0
    assert inputs.num_prompt_tokens == expected.num_prompt_tokens


# -- a model whose stages take a known time ---------------------------------------------------------------------------


class Planted:
    """Has the stages of a `VisionLanguageModel`; each takes the milliseconds that are planted in it."""

    device = torch.device("cpu")
    engine = EagerEngine(None)

    def __init__(self, **planted_ms: float) -> None:
        self.planted_ms = planted_ms
        self.collecting: list[bool] = []
        self.steps = 0

    def _spend(self, stage: str) -> None:
        self.collecting.append(gc.isenabled())
        time.sleep(self.planted_ms.get(stage, 0) / 1e3)

    def preprocess(self, images: Sequence[Image.Image], question: str, setting: VisionSetting) -> Inputs:
        self._spend("preprocess_ms")
        return Inputs({}, {}, 1, 1)

    def collate(self, samples: Sequence[Inputs]) -> Inputs:
        return samples[0]

    def transfer(self, inputs: Inputs) -> Inputs:
        self._spend("transfer_ms")
        return inputs

    def encode_images(self, vision: Tensors, on_tower_end: Callable[[], None]) -> Features:
        self._spend("vision_ms")
        on_tower_end()
        self._spend("projector_ms")
        return {}

    def prefill(
        self, prompt: Tensors, vision: Tensors, features: Features, max_new_tokens: int
    ) -> tuple[torch.Tensor, DecodeState]:
        self._spend("prefill_ms")
        return torch.tensor([[1]]), _NoState()

    def decode_step(self, token: torch.Tensor, state: DecodeState) -> torch.Tensor:
        self.steps += 1
        self._spend("decode_ms")
        if "fail" in self.planted_ms:
            raise RuntimeError("planted")
        return token


class _NoState(DecodeState):
    cache = DynamicCache()
    use = EngineUse("eager")

    def begin(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> None: ...

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return token


@pytest.mark.parametrize("stage", STAGES)
def test_time_planted_in_one_stage_is_found_in_its_column(stage: str) -> None:
    planted_ms = 20.0
    timings = [timed(Planted(**{stage: planted_ms}), output_tokens=2) for _ in range(4)]
    # The quickest of several runs, so that a busy machine cannot make an empty stage look planted.
    found = {name: min(getattr(timing, name) for timing in timings) for name in STAGES}
    assert found[stage] >= planted_ms
    assert max(found, key=found.__getitem__) == stage
    assert min(timing.total_ms for timing in timings) >= planted_ms
    assert stage == "decode_ms" or min(timing.ttft_ms for timing in timings) >= planted_ms


@pytest.mark.parametrize("where", ["before the first mark", "after the last mark"])
def test_time_outside_of_all_stages_is_found_in_the_residual_only(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Total is taken on its own: summing the stages would lose both."""
    planted_ms = 50.0

    class Slow(Clock):
        """Starts late, or is waited for at the end, as a GPU that is still busy."""

        marks = 0

        def mark(self) -> Any:
            if self.marks == 0 and where == "before the first mark":
                time.sleep(planted_ms / 1e3)
            self.marks += 1
            return super().mark()

        def synchronize(self) -> None:
            if self.marks > 0 and where == "after the last mark":
                time.sleep(planted_ms / 1e3)

    monkeypatch.setattr("workers.measure.Clock", Slow)
    timings = [timed(Planted(), output_tokens=2) for _ in range(3)]
    assert min(timing.residual_ms for timing in timings) >= planted_ms
    assert min(timing.total_ms for timing in timings) >= planted_ms
    for name in (*STAGES, "ttft_ms"):
        assert min(getattr(timing, name) for timing in timings) < planted_ms / 2, name


def test_time_inside_the_stages_is_not_in_the_residual() -> None:
    everywhere = dict.fromkeys(STAGES, 10.0)
    residuals = [timed(Planted(**everywhere), output_tokens=3).residual_ms for _ in range(4)]
    assert 0 <= min(residuals) < 5


def test_every_decode_step_has_its_own_time() -> None:
    model = Planted(decode_ms=10, prefill_ms=30)
    timing = timed(model, output_tokens=5)
    assert model.steps == 4
    assert min(timing.decode_step_ms) >= 10
    assert timing.tpot_ms is not None
    assert timing.tpot_ms >= 10
    assert timing.ttft_ms >= 30
    assert timing.total_ms >= 70


def test_a_constant_step_gives_a_flat_time_per_token() -> None:
    """Dividing by n instead of n - 1 would fall below the planted step, most for the shortest answer."""
    for count in (2, 3, 9):
        tpot = timed(Planted(decode_ms=10), output_tokens=count).tpot_ms
        assert tpot is not None
        assert tpot >= 10


def test_counted_work_is_recovered_exactly_in_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the model moves, so that nothing but the place of the marks decides."""
    now_ms = [0.0]
    monkeypatch.setattr("workers.measure.time", SimpleNamespace(perf_counter=lambda: now_ms[0] / 1e3))

    class Counted(Planted):
        def _spend(self, stage: str) -> None:
            now_ms[0] += self.planted_ms[stage]

    planted = {name: 3.0 + 7.0 * number for number, name in enumerate(STAGES)}
    for count in (1, 2, 3, 9):
        timing = timed(Counted(**planted), output_tokens=count)
        for name in STAGES[:-1]:
            assert getattr(timing, name) == pytest.approx(planted[name]), name
        assert timing.decode_step_ms == pytest.approx([planted["decode_ms"]] * (count - 1))
        assert timing.tpot_ms == (None if count == 1 else pytest.approx(planted["decode_ms"])), "flat, however long"
        assert timing.ttft_ms == pytest.approx(sum(planted[name] for name in STAGES[:-1]))
        assert timing.total_ms == pytest.approx(timing.ttft_ms + (count - 1) * planted["decode_ms"])
        assert timing.residual_ms == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_as_it_was(collecting: bool) -> None:
    def run(model: Planted) -> bool:
        timed(model)
        return gc.isenabled()

    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        model = Planted()
        assert run(model) is collecting
        assert set(model.collecting) == {False}, "it does not run in the timed region"
        with pytest.raises(RuntimeError, match="planted"):
            run(Planted(fail=1))
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


def test_an_image_that_the_model_refuses_leaves_no_trace() -> None:
    qwen = tiny_model("tiny-qwen3-vl-moe")
    with pytest.raises(SampleError):
        time_answer(qwen, [picture(1, 3000)], QUESTION, NATIVE, 2)
    assert gc.isenabled()
    assert timed(qwen).vision_ms > 0

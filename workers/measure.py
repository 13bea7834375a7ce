"""The timed region: a batch of answers from image to last token, a mark at every stage boundary and nothing else."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from knobs.vision import VisionSetting
from workers.models.adapter import VisionLanguageModel, kv_cache_bytes
from workers.models.engines import DecodeState, EngineUse
from workers.models.processing import Inputs


@dataclass(frozen=True)
class Prompt:
    """A question about images: decoded, RGB, in host memory."""

    images: Sequence[Image.Image]
    question: str


class Clock:
    """Marks on the device's own time line: events on a GPU, read after one synchronise; `perf_counter` on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self._cuda else (end - begin) * 1e3


class BareClock(Clock):
    """Only waits for the device: what an answer takes when nobody looks at its stages."""

    def mark(self) -> Any:
        return None


@dataclass(frozen=True)
class Timing:
    """One timed batch of answers; every duration in milliseconds and of the whole batch, stages adjacent and disjoint.

    Attributes:
        call_ms: total of the first answer of the call, which is another one where that had to capture.
        inputs: of every answer, as they were before they became a batch.
        kv_cache_bytes: what keys and values take at the end: as much as there are tokens, padding included, with the
            eager engine, as much as there is room for with the graph engine.
        peak_memory_bytes, peak_reserved_bytes: device memory in use by tensors, and held by torch; None on a CPU.
    """

    preprocess_ms: float
    transfer_ms: float
    vision_ms: float
    projector_ms: float
    prefill_ms: float
    decode_step_ms: tuple[float, ...]
    ttft_ms: float
    total_ms: float
    call_ms: float
    inputs: tuple[Inputs, ...]
    output_tokens: int
    kv_cache_bytes: int
    peak_memory_bytes: int | None
    peak_reserved_bytes: int | None
    engine_used: EngineUse

    @property
    def decode_ms(self) -> float:
        return sum(self.decode_step_ms)

    @property
    def tpot_ms(self) -> float | None:
        """n tokens have n - 1 decode steps, for the first comes from prefill; None for one token."""
        return self.decode_ms / len(self.decode_step_ms) if self.decode_step_ms else None

    @property
    def residual_ms(self) -> float:
        """What no stage accounts for: what the host does before the first mark and after the last.

        On a GPU that includes whatever the two clocks disagree on, which is what makes it a check. On a CPU both are
        the same clock and the marks are adjacent, so it is near zero and says only that total encloses the stages.
        """
        stages = self.preprocess_ms + self.transfer_ms + self.vision_ms + self.projector_ms + self.prefill_ms
        return self.total_ms - stages - self.decode_ms


def time_answer(
    vlm: VisionLanguageModel,
    images: Sequence[Image.Image],
    question: str,
    setting: VisionSetting,
    output_tokens: int,
) -> Timing:
    """Time one greedy answer; see `time_batch`."""
    return time_batch(vlm, [Prompt(images, question)], setting, output_tokens)


def time_batch(vlm: VisionLanguageModel, batch: Sequence[Prompt], setting: VisionSetting, output_tokens: int) -> Timing:
    """Time the greedy answers to a batch of prompts, each of exactly `output_tokens` tokens, end-of-sequence or not.

    The knobs are set by the caller, the images are decoded. Total is taken by the host's clock and the stages by the
    device's, so that on a GPU their difference (`residual_ms`) is a check. On a CPU there is one clock, and the
    difference is near zero.

    Answers that had to capture their decode step are thrown away, and so are those after them, which fill the
    allocator's cache again that a capture empties.

    Raises:
        ValueError: an empty batch, or fewer than one output token, for prefill always makes the first.
    """
    clock = Clock(vlm.device)
    return _timing(clock, _without_capture(vlm, batch, setting, output_tokens, clock), vlm.device)


def time_bare(vlm: VisionLanguageModel, batch: Sequence[Prompt], setting: VisionSetting, output_tokens: int) -> float:
    """Milliseconds of the same answers without a mark between begin and end: what `time_batch` is compared with.

    Raises:
        ValueError: as `time_batch`.
    """
    return _without_capture(vlm, batch, setting, output_tokens, BareClock(vlm.device)).total_ms


@dataclass(frozen=True)
class _Answered:
    """A batch that was answered: what it took by the host's clock, and the marks on the way."""

    total_ms: float
    call_ms: float
    start: Any
    preprocessed: Any
    transferred: Any
    tower_ends: list[Any]
    projected: Any
    chosen: list[Any]
    samples: tuple[Inputs, ...]
    state: DecodeState


def _without_capture(
    vlm: VisionLanguageModel, batch: Sequence[Prompt], setting: VisionSetting, output_tokens: int, clock: Clock
) -> _Answered:
    if not batch:
        raise ValueError("the batch is empty")
    if output_tokens < 1:
        raise ValueError(f"output_tokens is {output_tokens}; prefill makes the first token, so at least 1 is timed")
    captures = vlm.engine.captures
    answered = _answer(vlm, batch, setting, output_tokens, clock)
    call_ms = answered.total_ms
    while vlm.engine.captures != captures:
        captures = vlm.engine.captures
        _answer(vlm, batch, setting, output_tokens, clock)
        answered = replace(_answer(vlm, batch, setting, output_tokens, clock), call_ms=call_ms)
    return answered


@torch.inference_mode()
def _answer(
    vlm: VisionLanguageModel, batch: Sequence[Prompt], setting: VisionSetting, output_tokens: int, clock: Clock
) -> _Answered:
    tower_ends: list[Any] = []
    with _undisturbed(vlm.device):
        clock.synchronize()
        host_start = time.perf_counter()
        start = clock.mark()
        samples = [vlm.preprocess(prompt.images, prompt.question, setting) for prompt in batch]
        host_inputs = vlm.collate(samples)
        preprocessed = clock.mark()
        inputs = vlm.transfer(host_inputs)
        transferred = clock.mark()
        features = vlm.encode_images(inputs.vision, lambda: tower_ends.append(clock.mark()))
        projected = clock.mark()
        token, state = vlm.prefill(inputs.prompt, inputs.vision, features, output_tokens)
        chosen = [clock.mark()]
        for _ in range(output_tokens - 1):
            token = vlm.decode_step(token, state)
            chosen.append(clock.mark())
        clock.synchronize()
        total_ms = (time.perf_counter() - host_start) * 1e3
    return _Answered(
        total_ms, total_ms, start, preprocessed, transferred, tower_ends, projected, chosen, tuple(samples), state
    )


def _timing(clock: Clock, answered: _Answered, device: torch.device) -> Timing:
    at, on_gpu = answered, device.type == "cuda"
    return Timing(
        preprocess_ms=clock.ms(at.start, at.preprocessed),
        transfer_ms=clock.ms(at.preprocessed, at.transferred),
        vision_ms=clock.ms(at.transferred, at.tower_ends[-1]),
        projector_ms=clock.ms(at.tower_ends[-1], at.projected),
        prefill_ms=clock.ms(at.projected, at.chosen[0]),
        decode_step_ms=tuple(clock.ms(a, b) for a, b in itertools.pairwise(at.chosen)),
        ttft_ms=clock.ms(at.start, at.chosen[0]),
        total_ms=at.total_ms,
        call_ms=at.call_ms,
        inputs=at.samples,
        output_tokens=len(at.chosen),
        kv_cache_bytes=kv_cache_bytes(at.state),
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
        engine_used=at.state.use,
    )


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep Python's garbage collector out of the timed region, and start the memory peak from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()

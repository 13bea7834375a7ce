"""The timed region: one answer from image to last token, with a mark at every stage boundary and nothing else."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from knobs.vision import VisionSetting
from workers.models.adapter import VisionLanguageModel, kv_cache_bytes
from workers.models.engines import EngineUse
from workers.models.processing import Inputs


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


@dataclass(frozen=True)
class Timing:
    """One timed answer; every duration in milliseconds, stages adjacent and disjoint.

    `kv_cache_bytes` is what keys and values take at the end: as much as there are tokens with the eager engine, as much
    as there is room for with the graph engine.
    """

    preprocess_ms: float
    transfer_ms: float
    vision_ms: float
    projector_ms: float
    prefill_ms: float
    decode_step_ms: tuple[float, ...]
    ttft_ms: float
    total_ms: float
    inputs: Inputs
    output_tokens: int
    kv_cache_bytes: int
    peak_memory_bytes: int | None
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
    """Time one greedy answer of exactly `output_tokens` tokens, end-of-sequence or not.

    The knobs are set by the caller, the images are decoded. Total is taken by the host's clock and the stages by the
    device's, so that on a GPU their difference (`residual_ms`) is a check. On a CPU there is one clock, and the
    difference is near zero.

    An answer that had to capture its decode step is thrown away, and so is the one after it, which fills the
    allocator's cache again that a capture empties.

    Raises:
        ValueError: fewer than one output token, for prefill always makes the first.
    """
    if output_tokens < 1:
        raise ValueError(f"output_tokens is {output_tokens}; prefill makes the first token, so at least 1 is timed")
    captures = vlm.engine.captures
    timing = _timed(vlm, images, question, setting, output_tokens)
    while vlm.engine.captures != captures:
        captures = vlm.engine.captures
        _timed(vlm, images, question, setting, output_tokens)
        timing = _timed(vlm, images, question, setting, output_tokens)
    return timing


@torch.inference_mode()
def _timed(
    vlm: VisionLanguageModel,
    images: Sequence[Image.Image],
    question: str,
    setting: VisionSetting,
    output_tokens: int,
) -> Timing:
    clock = Clock(vlm.device)
    tower_ends: list[Any] = []
    with _undisturbed(vlm.device):
        clock.synchronize()
        host_start = time.perf_counter()
        start = clock.mark()
        host_inputs = vlm.preprocess(images, question, setting)
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

    return Timing(
        preprocess_ms=clock.ms(start, preprocessed),
        transfer_ms=clock.ms(preprocessed, transferred),
        vision_ms=clock.ms(transferred, tower_ends[-1]),
        projector_ms=clock.ms(tower_ends[-1], projected),
        prefill_ms=clock.ms(projected, chosen[0]),
        decode_step_ms=tuple(clock.ms(a, b) for a, b in itertools.pairwise(chosen)),
        ttft_ms=clock.ms(start, chosen[0]),
        total_ms=total_ms,
        inputs=host_inputs,
        output_tokens=output_tokens,
        kv_cache_bytes=kv_cache_bytes(state),
        peak_memory_bytes=torch.cuda.max_memory_allocated(vlm.device) if vlm.device.type == "cuda" else None,
        engine_used=state.use,
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

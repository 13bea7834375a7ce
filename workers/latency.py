"""A latency task: batches of samples are warmed up and then timed round by round until enough is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from PIL import Image

from workers.conditions import Conditions, Observer, condition_columns
from workers.datasets import Sample, SampleRef
from workers.energy import energy_of
from workers.errors import SampleError
from workers.flops import count_flops
from workers.measure import Prompt, Timing, time_bare, time_batch
from workers.models.adapter import VisionLanguageModel
from workers.nvml import Gpu
from workers.rows import RowMaker, Size, engine_columns
from workers.schema import STAGES
from workers.stopping import WATCHED, Repeats
from workers.tasks import Task
from workers.validity import Reason, reasons, slow_first_round

# Counting takes as long as several answers. Where a setting leaves the number of crops to the image, two samples are a
# rough estimate of the mean; each row that is counted is exact.
FLOPS_COUNTED_ON = 2

# Energy is measured on as many batches as take this long: more would cost a sweep as much as its timings.
ENERGY_ROUND_S = 0.5
# Ticks of the counter that those are repeated over: some three seconds of 100 ms, so that one more or less is 3 %.
ENERGY_TICKS = 30


@dataclass(frozen=True)
class TimedSample:
    """A sample that can be timed: its images decoded, and how long its prompt is under the knobs of the task.

    The tensors that it becomes are not kept: under the largest settings they are many times its images.
    """

    sample: Sample
    images: tuple[Image.Image, ...]
    prompt_tokens: int

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.images, self.sample.prompt)

    @property
    def sizes(self) -> list[Size]:
        return [(image.height, image.width) for image in self.images]


@dataclass(frozen=True)
class Batch:
    """Samples that are timed together; those behind the first `own` fill it up, and have rows in their own batch."""

    samples: Sequence[TimedSample]
    own: int

    @property
    def prompts(self) -> list[Prompt]:
        return [timed.prompt for timed in self.samples]


# Opens a sample, or says with a SampleError why it cannot be timed.
OpenSample = Callable[[SampleRef], TimedSample]


def latency_rows(
    task: Task, vlm: VisionLanguageModel, open_sample: OpenSample, rows: RowMaker, observer: Observer, gpu: Gpu
) -> list[dict[str, Any]]:
    """Rows of the table latency: one per sample and repeat, and one per sample that cannot be timed.

    Rounds go over all batches, so that a drift meets every batch alike. The knobs are set by the caller.
    """
    protocol = task.protocol
    usable, failed = usable_samples(task, vlm, open_sample, rows)
    batches, cannot_share = usable_batches(task, vlm, usable, rows)
    failed += cannot_share
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()  # or what earlier tasks left there would be in the memory that torch holds
    first_calls = _warm_up(task, vlm, batches)
    wanted = protocol.max_relative_error
    repeats = Repeats(
        protocol.first_repeat(task.visit + 1) - protocol.first_repeat(task.visit),
        # Visits are independent, so that each may be known less well than all of them together.
        None if wanted is None else wanted * protocol.visits**0.5,
        None if protocol.max_seconds is None else protocol.max_seconds / protocol.visits,
    )
    rounds: list[list[_Answer]] = []
    begin, stopped = time.monotonic(), None
    while batches and stopped is None:
        rounds.append([_timed(task, vlm, batch, observer) for batch in batches])
        columns = [_timing_columns(answer.timing) for answer in rounds[-1]]
        repeats.add({name: np.array([c[name] for c in columns]) for name in WATCHED if columns[0][name] is not None})
        stopped = repeats.stopped_by(time.monotonic() - begin)
    of_the_visit = {
        "batch_size": protocol.batch_size,
        "anchor_id": None if task.anchor is None else task.anchor.anchor_id,
        "visit": task.visit,
        "weights_bytes": weights_bytes(vlm),
        "stopped_by": stopped and stopped.value,
        "relative_error": repeats.relative_error,
    }
    totals_ms = np.array([[answer.timing.total_ms for answer in made] for made in rounds])
    first_was_slow = slow_first_round(totals_ms)
    energy: dict[int, dict[str, Any]] = {}
    flops: dict[str, dict[str, Any]] = {}
    if rounds and task.visit == 0:  # once is enough
        energy = _energy_columns(task, vlm, batches, np.median(totals_ms, axis=0), gpu)
        flops = {timed.sample.ref.uid: _flops_columns(task, vlm, timed) for timed in usable[:FLOPS_COUNTED_ON]}
    made_rows = list(failed)
    for number, answers in enumerate(rounds):
        for batch, answer in enumerate(answers):
            of_the_batch = {
                "batch": batch,
                "repeat": protocol.first_repeat(task.visit) + number,
                "first_call_ms": first_calls[batch],
                **energy.get(batch, {}),
            }
            why_not = [
                *reasons(*answer.around),
                *([Reason.SLOW_FIRST_ROUND.value] if first_was_slow and number == 0 else []),
            ]
            for row in _answer_rows(task, vlm, answer, rows, why_not):
                made_rows.append(row | of_the_visit | of_the_batch | flops.get(row["sample_id"], {}))
    return made_rows


def usable_samples(
    task: Task, vlm: VisionLanguageModel, open_sample: OpenSample, rows: RowMaker
) -> tuple[list[TimedSample], list[dict[str, Any]]]:
    """The samples of a task that can be timed, and rows of the others: what is refused is found before any timing."""
    usable: list[TimedSample] = []
    failed: list[dict[str, Any]] = []
    for ref in task.samples:
        try:
            usable.append(open_sample(ref))
        except SampleError as error:
            failed.append(rows.failed(task, vlm, ref, error))
    return usable, failed


def in_batches(samples: Sequence[TimedSample], size: int) -> list[Batch]:
    """Batches of exactly `size`, in order; the last one is filled up from the beginning, over and over if need be.

    A smaller last batch would be another batch size under the same name.
    """
    return [
        Batch([samples[(start + i) % len(samples)] for i in range(size)], min(size, len(samples) - start))
        for start in range(0, len(samples), size)
    ]


def usable_batches(
    task: Task, vlm: VisionLanguageModel, samples: Sequence[TimedSample], rows: RowMaker
) -> tuple[list[Batch], list[dict[str, Any]]]:
    """The batches that can be timed, and rows of the samples whose images cannot be in one."""
    batches = in_batches(samples, task.protocol.batch_size)
    if task.protocol.batch_size == 1:
        return batches, []
    usable: list[Batch] = []
    failed: list[dict[str, Any]] = []
    for batch in batches:
        try:
            vlm.collate([vlm.preprocess(p.images, p.question, task.knobs.vision) for p in batch.prompts])
            usable.append(batch)
        except SampleError as error:
            failed += [rows.failed(task, vlm, timed.sample.ref, error) for timed in batch.samples[: batch.own]]
    return usable, failed


def weights_bytes(vlm: VisionLanguageModel) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*vlm.model.parameters(), *vlm.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class _Answer:
    """A timed batch, when it began and what held around it."""

    batch: Batch
    timing: Timing
    begun: datetime
    around: tuple[Conditions, Conditions]


def _warm_up(task: Task, vlm: VisionLanguageModel, batches: Sequence[Batch]) -> list[float | None]:
    """Answer every batch as often as needed before its times settle; what the first call to each took in ms."""
    protocol = task.protocol
    longest = max((timed.prompt_tokens for batch in batches for timed in batch.samples), default=0)
    vlm.engine.reserve(protocol.batch_size, longest + protocol.max_new_tokens)
    first_calls: list[float | None] = [None] * len(batches)
    # Round by round, because a capture for one batch undoes part of the warm-up of those before it.
    for _ in range(vlm.engine.warm_up_rounds + protocol.warmup):
        for number, batch in enumerate(batches):
            timing = time_batch(vlm, batch.prompts, task.knobs.vision, protocol.max_new_tokens)
            if first_calls[number] is None:
                first_calls[number] = timing.call_ms
    return first_calls


def _timed(task: Task, vlm: VisionLanguageModel, batch: Batch, observer: Observer) -> _Answer:
    begun, before = datetime.now(UTC), observer.snapshot()
    timing = time_batch(vlm, batch.prompts, task.knobs.vision, task.protocol.max_new_tokens)
    return _Answer(batch, timing, begun, (before, observer.snapshot()))


def _energy_columns(
    task: Task, vlm: VisionLanguageModel, batches: Sequence[Batch], typical_ms: np.ndarray, gpu: Gpu
) -> dict[int, dict[str, Any]]:
    """Energy of one answer, by number of batch: the mean over the first ones, as many as take about half a second.

    They are answered without marks, over and over, for nobody may ask the driver anything in between.
    """
    measured = batches[: 1 + int((np.cumsum(typical_ms) < ENERGY_ROUND_S * 1e3).sum())]

    def one_round() -> None:
        for batch in measured:
            time_bare(vlm, batch.prompts, task.knobs.vision, task.protocol.max_new_tokens)

    energy = energy_of(gpu, one_round, ENERGY_TICKS)
    if energy is None:
        return {}
    answers = len(measured) * task.protocol.batch_size
    columns = {"energy_j": energy.joules / answers, "energy_relative_error": energy.relative_error}
    return dict.fromkeys(range(len(measured)), columns)


# -- rows -------------------------------------------------------------------------------------------------------------


def _answer_rows(
    task: Task, vlm: VisionLanguageModel, answer: _Answer, rows: RowMaker, why_not: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per sample of a batch, each with the times of the whole batch."""
    made = [
        rows.sample(task, vlm, timed.sample, timed.sizes, inputs, answer.begun)
        for timed, inputs in zip(answer.batch.samples, answer.timing.inputs, strict=True)
    ]
    # What is wrong with one prompt of a batch is wrong with its time.
    every_reason = list(dict.fromkeys([reason for row in made for reason in row["invalid_reasons"]] + list(why_not)))
    shared = timing_columns(answer.timing, answer.around) | {
        "invalid_reasons": every_reason,
        "valid": not every_reason,
    }
    return [row | shared for row in made[: answer.batch.own]]


def timing_columns(timing: Timing, around: tuple[Conditions, Conditions]) -> dict[str, Any]:
    """The columns that a timed batch fills."""
    return _timing_columns(timing) | condition_columns(*around) | engine_columns(timing.engine_used)


def _timing_columns(timing: Timing) -> dict[str, Any]:
    return {name: getattr(timing, name) for name in STAGES} | {
        "decode_step_ms": list(timing.decode_step_ms),
        "ttft_ms": timing.ttft_ms,
        "tpot_ms": timing.tpot_ms,
        "total_ms": timing.total_ms,
        "residual_ms": timing.residual_ms,
        "output_tokens": timing.output_tokens,
        "peak_memory_bytes": timing.peak_memory_bytes,
        "peak_reserved_bytes": timing.peak_reserved_bytes,
        "kv_cache_bytes": timing.kv_cache_bytes,
    }


def _flops_columns(task: Task, vlm: VisionLanguageModel, timed: TimedSample) -> dict[str, Any]:
    """Of the sample alone, without the padding of a batch."""
    inputs = vlm.preprocess(timed.images, timed.sample.prompt, task.knobs.vision)
    flops = count_flops(vlm, vlm.transfer(inputs), task.protocol.max_new_tokens)
    return {
        "vision_flops": flops.vision,
        "projector_flops": flops.projector,
        "prefill_flops": flops.prefill,
        "decode_flops": flops.decode,
        "flops": flops.total,
    }

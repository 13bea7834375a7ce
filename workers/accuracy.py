"""An accuracy task: samples are answered in batches of similar length until each ends by itself, and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import torch

from workers.datasets import Dataset
from workers.errors import SampleError
from workers.models.adapter import VisionLanguageModel
from workers.prepared import PreparedSample, PreparedSamples, prepared_samples
from workers.rows import RowMaker, engine_columns
from workers.scorers import Scorer, scorer
from workers.tasks import Task

# Batches whose samples are prepared, and then dealt out by length. More pad less, and hold more features at a time.
BATCHES_PER_WINDOW = 4


@dataclass(frozen=True)
class _Ready:
    """A sample that can be answered, and its place in the task."""

    place: int
    prepared: PreparedSample
    begun: datetime

    @property
    def length(self) -> int:
        return int(self.prepared.inputs.prompt["input_ids"].shape[1])


def accuracy_rows(
    task: Task, vlm: VisionLanguageModel, dataset: Dataset, rows: RowMaker, kept: PreparedSamples
) -> list[dict[str, Any]]:
    """Rows of the table accuracy, one per sample, in the order of the task. The knobs are set by the caller.

    Which samples share a batch follows from the task alone, for it may decide how their answers are rounded.

    Args:
        kept: what earlier tasks have prepared; what this one prepares is added.
    """
    assert task.protocol.metric is not None
    score, size = scorer(task.protocol.metric), task.protocol.batch_size
    made: dict[int, dict[str, Any]] = {}
    with prepared_samples(task, vlm, dataset, kept) as samples:
        for begin in range(0, len(task.samples), BATCHES_PER_WINDOW * size):
            ready: list[_Ready] = []
            for place in range(begin, min(begin + BATCHES_PER_WINDOW * size, len(task.samples))):
                begun = datetime.now(UTC)
                prepared = next(samples)
                if isinstance(prepared, SampleError):
                    failed = rows.failed(task, vlm, task.samples[place], prepared)
                    made[place] = failed | {"metric": score.name}
                else:
                    ready.append(_Ready(place, prepared, begun))
            for batch in by_length(ready, size):
                for one, row in zip(batch, _scored(task, vlm, batch, rows, score, kept), strict=True):
                    made[one.place] = row
    return [made[place] for place in range(len(task.samples))]


def by_length(ready: Sequence[_Ready], size: int) -> Iterator[list[_Ready]]:
    """Batches of at most `size` in which prompts are alike in length, the longest first: they need the most memory."""
    ordered = iter(sorted(ready, key=lambda one: (-one.length, one.place)))
    while batch := list(islice(ordered, size)):
        yield batch


def _scored(
    task: Task,
    vlm: VisionLanguageModel,
    batch: Sequence[_Ready],
    rows: RowMaker,
    score: Scorer,
    kept: PreparedSamples,
) -> Iterator[dict[str, Any]]:
    answers = _answers(vlm, [one.prepared for one in batch], task.protocol.max_new_tokens, kept)
    engine_used, ends = engine_columns(vlm.engine_used), vlm.end_token_ids
    for one, tokens in zip(batch, answers, strict=True):
        prepared, prediction = one.prepared, vlm.text(tokens)
        row = rows.sample(task, vlm, prepared.sample, prepared.sizes, prepared.inputs, one.begun)
        yield (
            row
            | engine_used
            | {
                "output_tokens": len(tokens),
                "stop_reason": "eos" if tokens and tokens[-1] in ends else "length",
                "question_type": prepared.sample.question_type,
                "prediction": prediction,
                "answers": list(prepared.sample.answers),
                "metric": score.name,
                "score": score.row_score(prediction, prepared.sample.answers, prepared.sample.options),
            }
        )


def _answers(
    vlm: VisionLanguageModel, batch: Sequence[PreparedSample], max_new_tokens: int, kept: PreparedSamples
) -> list[list[int]]:
    given = [(one.inputs, one.features) for one in batch]
    try:
        return vlm.answer(given, max_new_tokens)
    except torch.OutOfMemoryError:
        if not kept.leave_device():
            raise
    # What was kept for later took the room. Not in the handler, where the traceback holds what the first try had made.
    return vlm.answer(given, max_new_tokens)

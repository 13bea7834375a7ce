"""The anchor: one combination that every worker times again and again, so that workers and hours can be compared."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from workers.conditions import Observer, condition_columns
from workers.errors import SampleError
from workers.latency import OpenSample, TimedSample, timing_columns, weights_bytes
from workers.measure import time_batch
from workers.models.adapter import VisionLanguageModel
from workers.models.loading import is_out_of_memory
from workers.pairs import time_pairs
from workers.rows import RowMaker
from workers.tasks import Knobs, Task
from workers.validity import reasons

# Each a marked and a bare answer, whose order alternates; an even number, so that neither comes first more often.
PAIRS = 4

# The anchor is timed again after this many times as long as it took: it takes a tenth of the time at most.
PAUSE = 10


@dataclass
class _Anchor:
    """One anchor on one worker; `sample` is None if none of the task's can be timed, or none fits into memory."""

    sample: TimedSample | None
    calls: int = 0
    took_s: float = 0.0
    ended_s: float = 0.0

    def is_due(self, now_s: float) -> bool:
        return self.sample is not None and (self.calls == 0 or now_s - self.ended_s >= PAUSE * self.took_s)


class Anchors:
    """The anchors of one worker: when each is due, and the rows of the table anchors."""

    def __init__(self) -> None:
        self._anchors: dict[Hashable, _Anchor] = {}

    def rows_if_due(
        self,
        task: Task,
        knobs: Knobs,
        vlm: VisionLanguageModel,
        open_sample: OpenSample,
        rows: RowMaker,
        observer: Observer,
    ) -> list[dict[str, Any]]:
        """Time an anchor on the first sample of a task that can be timed, unless that was done a moment ago.

        Knobs are set here and restored. What does not fit into memory, or fails for its image, is not tried again.
        """
        key = task.model, task.dataset, knobs, task.protocol.max_new_tokens, task.samples[0]
        if key not in self._anchors:
            self._anchors[key] = _Anchor(_first_that_works(task, open_sample))
        anchor = self._anchors[key]
        begin = time.monotonic()
        if anchor.sample is None or not anchor.is_due(begin):
            return []
        try:
            with vlm.knobs(moe_top_k=knobs.moe_top_k, active_blocks=knobs.active_blocks):
                made = _timed(task, knobs, anchor.sample, vlm, rows, observer)
        except Exception as error:
            if not (isinstance(error, SampleError) or is_out_of_memory(error)):
                raise
            anchor.sample = None
            return []
        made = [row | {"visit": anchor.calls} for row in made]
        anchor.calls += 1
        anchor.ended_s = time.monotonic()
        anchor.took_s = anchor.ended_s - begin
        return made


def _timed(
    task: Task,
    knobs: Knobs,
    timed: TimedSample,
    vlm: VisionLanguageModel,
    rows: RowMaker,
    observer: Observer,
) -> list[dict[str, Any]]:
    tokens, image = task.protocol.max_new_tokens, timed.image
    for _ in range(vlm.engine.warm_up_rounds + 1):
        time_batch(vlm, [timed.prompt], knobs.vision, tokens)
    of_the_call = {"combination_id": None, "batch_size": 1, "batch": 0, "weights_bytes": weights_bytes(vlm)}
    made = []
    for number, pair in enumerate(time_pairs(vlm, timed.prompt, knobs.vision, tokens, PAIRS, observer)):
        inputs = pair.marked.inputs[0]
        for is_marked, begun, around in (
            (True, pair.marked_at, pair.around_marked),
            (False, pair.bare_at, pair.around_bare),
        ):
            row = rows.sample(task, vlm, timed.sample, image.height, image.width, inputs, begun, knobs)
            why_not = [*row["invalid_reasons"], *reasons(*around)]
            bare = {"total_ms": pair.bare_ms, "output_tokens": tokens} | condition_columns(*around)
            made.append(
                row
                | of_the_call
                | (timing_columns(pair.marked, around) if is_marked else bare)
                | {"marked": is_marked, "pair": number, "repeat": number}
                | {"valid": not why_not, "invalid_reasons": why_not}
            )
    return made


def _first_that_works(task: Task, open_sample: OpenSample) -> TimedSample | None:
    for ref in task.samples:
        try:
            return open_sample(ref)
        except SampleError:
            continue
    return None

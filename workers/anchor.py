"""The anchor: one combination that every worker times again and again, so that workers and hours can be compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from workers.conditions import Observer, condition_columns
from workers.errors import SampleError
from workers.latency import OpenSample, TimedSample, timing_columns, weights_bytes
from workers.measure import time_batch
from workers.models.adapter import VisionLanguageModel
from workers.pairs import time_pairs
from workers.rows import RowMaker, engine_columns
from workers.tasks import Anchor, Task
from workers.validity import reasons

# Each a marked and a bare answer, whose order alternates; an even number, so that neither comes first more often.
PAIRS = 4

# An anchor is timed again after this many times as long as it took, and all anchors of a worker take no more than that
# share of its time, but for the first call of each: a tenth of the time.
PAUSE = 10

# Untimed answers before the first call to an anchor, and before each later one.
FIRST_WARM_UP, WARM_UP = 3, 1


@dataclass
class _State:
    """One anchor on one worker; `sample` is None if it cannot be timed."""

    sample: TimedSample | None
    calls: int = 0
    took_s: float = 0.0
    ended_s: float = 0.0


class Anchors:
    """The anchors of one worker: when each is due, and the rows of the table anchors."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}
        self._began_s: float | None = None
        self._spent_s = 0.0

    def rows_if_due(
        self,
        task: Task,
        anchor: Anchor,
        vlm: VisionLanguageModel,
        open_sample: OpenSample,
        rows: RowMaker,
        observer: Observer,
    ) -> list[dict[str, Any]]:
        """Time an anchor on the first sample of a task that can be timed, unless that was done a moment ago.

        Knobs are set here and restored. An anchor is a yardstick and no result, so that whatever is wrong with it costs
        no task: one that cannot be timed leaves a row with the reason, and is not tried again.

        Args:
            open_sample: opens a sample as the anchor sees it, not as the task does.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        begin = time.monotonic()
        self._began_s = begin if self._began_s is None else self._began_s
        try:
            if anchor.anchor_id not in self._states:
                self._states[anchor.anchor_id] = _State(None)
                self._states[anchor.anchor_id].sample = _first_that_works(task, open_sample)
            state = self._states[anchor.anchor_id]
            if state.sample is None or not self._is_due(state, begin):
                return []
            with vlm.knobs(moe_top_k=anchor.knobs.moe_top_k, active_blocks=anchor.knobs.active_blocks):
                made = _timed(task, anchor, state, vlm, rows, observer)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._states[anchor.anchor_id].sample = None
            reason = SampleError(f"{type(error).__name__}: {error}")
            return [rows.failed(task, vlm, task.samples[0], reason) | _of_the_anchor(anchor, 0)]
        state.calls += 1
        state.ended_s = time.monotonic()
        state.took_s = state.ended_s - begin
        self._spent_s += state.took_s
        return made

    def _is_due(self, state: _State, now_s: float) -> bool:
        if state.calls == 0:
            return True
        assert self._began_s is not None
        return now_s - state.ended_s >= PAUSE * state.took_s and now_s - self._began_s >= PAUSE * self._spent_s


def _of_the_anchor(anchor: Anchor, call: int) -> dict[str, Any]:
    return {"combination_id": None, "anchor_id": anchor.anchor_id, "visit": call}


def _timed(
    task: Task, anchor: Anchor, state: _State, vlm: VisionLanguageModel, rows: RowMaker, observer: Observer
) -> list[dict[str, Any]]:
    assert state.sample is not None
    timed, knobs, tokens = state.sample, anchor.knobs, task.protocol.max_new_tokens
    for _ in range(vlm.engine.warm_up_rounds + (WARM_UP if state.calls else FIRST_WARM_UP)):
        time_batch(vlm, [timed.prompt], knobs.vision, tokens)
    of_the_call = _of_the_anchor(anchor, state.calls) | {
        "batch_size": 1,
        "batch": 0,
        "weights_bytes": weights_bytes(vlm),
    }
    made = []
    for number, pair in enumerate(time_pairs(vlm, timed.prompt, knobs.vision, tokens, PAIRS, observer)):
        inputs = pair.marked.inputs[0]
        bare = {"total_ms": pair.bare_ms, "output_tokens": tokens} | engine_columns(pair.marked.engine_used)
        for is_marked, begun, around, times in (
            (True, pair.marked_at, pair.around_marked, timing_columns(pair.marked, pair.around_marked)),
            (False, pair.bare_at, pair.around_bare, bare | condition_columns(*pair.around_bare)),
        ):
            row = rows.sample(task, vlm, timed.sample, timed.sizes, inputs, begun, knobs)
            why_not = [*row["invalid_reasons"], *reasons(*around)]
            of_the_answer = {"marked": is_marked, "pair": number, "repeat": number}
            validity = {"valid": not why_not, "invalid_reasons": why_not}
            made.append(row | of_the_call | times | of_the_answer | validity)
    return made


def _first_that_works(task: Task, open_sample: OpenSample) -> TimedSample | None:
    for ref in task.samples:
        try:
            return open_sample(ref)
        except SampleError:
            continue
    return None

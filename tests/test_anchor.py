"""The anchor: when a worker comes back to it, what its rows say, and that it never costs a task its result."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sessions import assert_no_knob_is_switched, rows_of, task_for

from workers.anchor import PAIRS, Anchors
from workers.datasets import DatasetSource
from workers.schema import STAGES
from workers.session import Session
from workers.tasks import Kind, ModelSource, Task

pytestmark = pytest.mark.usefixtures("quiet_machine")


def anchored(source: ModelSource, **changes: Any) -> Task:
    task = task_for(source, Kind.LATENCY, samples=1, active_blocks=(0,))
    whole = replace(task.knobs, active_blocks=tuple(range(6)))
    return replace(task, anchor=whole, **changes)


def anchors_of(session: Session, task: Task) -> list[dict[str, Any]]:
    result = session.run(task)
    assert result.rows is not None, result.traceback
    return [] if result.anchors is None else result.anchors.to_pylist()


def test_an_anchor_is_timed_in_pairs_under_its_own_knobs(sources: dict[str, ModelSource]) -> None:
    session = Session("worker-1", accelerator="cpu")
    task = anchored(sources["tiny-smolvlm"])
    made = anchors_of(session, task)
    first = [row for row in made if row["visit"] == 0]
    assert [(row["pair"], row["marked"]) for row in first] == [(p, m) for p in range(PAIRS) for m in (True, False)]
    for row in made:
        assert (row["num_active_blocks"], row["batch_size"], row["combination_id"]) == (6, 1, None)
        assert row["total_ms"] > 0
        assert row["session_started_at"] is not None
        for column in (*STAGES, "decode_step_ms", "tpot_ms"):
            assert (row[column] is not None) == row["marked"], column
    begun = [(row["started_at"], row["marked"]) for row in first]
    order = [marked for _, marked in sorted(begun)]
    assert order == [True, False, False, True] * (PAIRS // 2), "what came before has an effect, so the order alternates"
    assert_no_knob_is_switched(session)
    assert_same_answer = rows_of(session, replace(task, anchor=None))
    assert {row["num_active_blocks"] for row in assert_same_answer} == {1}


def test_an_anchor_takes_a_tenth_of_the_time_at_most(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("workers.anchor.time", SimpleNamespace(monotonic=lambda: now[0]))

    def timed(*arguments: Any) -> list[dict[str, Any]]:
        now[0] += 1.0
        return [{"pair": 0}]

    monkeypatch.setattr("workers.anchor._timed", timed)
    anchors, task = Anchors(), anchored(sources["tiny-smolvlm"])
    assert task.anchor is not None
    arguments: Any = (task, task.anchor, model_like(), lambda ref: object(), None, None)
    ended = []
    for second in range(60):
        now[0] = max(now[0], float(second))
        if anchors.rows_if_due(*arguments):
            ended.append(now[0])
    assert ended == [1, 12, 23, 34, 45, 56]


def model_like() -> Any:
    return SimpleNamespace(knobs=lambda **_: nullcontext())


def test_an_anchor_that_cannot_be_timed_costs_the_task_nothing(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fails(*_: Any) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("workers.anchor.time_batch", fails)
    session = Session("worker-1", accelerator="cpu")
    for _ in range(2):
        assert anchors_of(session, anchored(sources["tiny-smolvlm"])) == []
    assert tried == [1], "what does not fit now will not fit later"
    assert_no_knob_is_switched(session)


def test_the_anchor_skips_samples_that_are_broken(sources: dict[str, ModelSource], awkward: DatasetSource) -> None:
    session = Session("worker-1", accelerator="cpu")
    task = task_for(sources["tiny-smolvlm"], Kind.LATENCY, data=awkward, samples=4)
    failed = {row["sample_id"] for row in rows_of(session, task) if row["status"] == "failed"}
    assert failed
    broken_first = sorted(task.samples, key=lambda ref: ref.uid not in failed)
    made = anchors_of(session, replace(task, samples=tuple(broken_first), anchor=task.knobs))
    assert {row["sample_id"] for row in made} == {next(r.uid for r in broken_first if r.uid not in failed)}

"""The anchor: when a worker comes back to it, what its rows say, and that it never costs a task its result."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sessions import assert_no_knob_is_switched, rows_of, task_for

from orchestrator.analysis import findings_in_words, worker_trends
from workers.anchor import PAIRS, Anchors
from workers.datasets import DatasetSource
from workers.measure import Timing, time_batch
from workers.schema import STAGES, to_table
from workers.session import Session
from workers.tasks import Kind, ModelSource, Task

pytestmark = pytest.mark.usefixtures("quiet_machine")

EPOCH = datetime(2026, 1, 2, tzinfo=UTC)


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
    assert {row["num_active_blocks"] for row in rows_of(session, replace(task, anchor=None))} == {1}


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


def test_a_slow_worker_a_drift_and_dear_marks_are_found_in_what_sessions_say(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions on a real model with planted durations: one is a tenth slower than others, one slower by the hour."""
    noise = np.random.default_rng(0)
    state = {"slower": 1.0, "hours": 0.0}

    def planted_ms() -> float:
        return float(100 * state["slower"] * np.exp(noise.normal(0, 0.002)))

    def marked(*arguments: Any) -> Timing:
        total = 1.01 * planted_ms()
        return replace(time_batch(*arguments), total_ms=total, prefill_ms=total / 2, ttft_ms=total * 0.7)

    monkeypatch.setattr("workers.pairs.time_batch", marked)
    monkeypatch.setattr("workers.pairs.time_bare", lambda *_: planted_ms())
    monkeypatch.setattr(
        "workers.pairs.datetime", SimpleNamespace(now=lambda _: EPOCH + timedelta(hours=state["hours"]))
    )
    monkeypatch.setattr("workers.anchor.PAUSE", 0)  # due before and after every task
    task = anchored(sources["tiny-smolvlm"])
    rows: list[dict[str, Any]] = []
    for worker, slower, per_hour in [
        ("cpu-0", 1.0, 0.0),
        ("cpu-1", 1.1, 0.0),
        ("cpu-2", 0.97, 0.03),
        ("cpu-3", 1.0, 0),
    ]:
        session = Session(worker, accelerator="cpu")
        for hour in range(4):
            state |= {"hours": float(hour), "slower": slower * (1 + per_hour) ** hour}
            rows += anchors_of(session, task)
    assert len(rows) == 4 * 4 * 2 * PAIRS * 2
    place = {"model": "tiny", "accelerator": "cpu", "dataset": "demo"}
    trends = worker_trends(to_table("anchors", rows).to_pandas().assign(**place))
    total = trends[trends["timing"] == "total_ms"].set_index("worker")
    assert total["findings"].map(lambda found: "slow" in found).to_dict() == {
        **dict.fromkeys(("cpu-0", "cpu-2", "cpu-3"), False),
        "cpu-1": True,
    }
    assert total["findings"].map(lambda found: "drift" in found).to_dict() == {
        **dict.fromkeys(("cpu-0", "cpu-1", "cpu-3"), False),
        "cpu-2": True,
    }
    assert total["overhead"].to_numpy() == pytest.approx(0.01, abs=0.003)
    words = findings_in_words(trends)
    assert any("cpu-1 is 9.2 %" in line and "slower" in line for line in words), words
    assert any("cpu-2 became 3.0 %" in line for line in words), words
    assert any("marking the stages costs 1.0 %" in line for line in words), words

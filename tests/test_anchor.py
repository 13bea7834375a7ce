"""The anchor: when a worker comes back to it, what its rows say, and that it never costs a task its result."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sessions import assert_no_knob_is_switched, rows_of, task_for

from knobs.vision import VisionSetting
from orchestrator.analysis import findings_in_words, worker_trends
from workers.anchor import PAIRS, Anchors
from workers.datasets import DatasetSource
from workers.errors import SampleError
from workers.measure import Timing, time_batch
from workers.schema import STAGES, to_table
from workers.session import Session
from workers.tasks import Anchor, FailureKind, Kind, ModelSource, Task

pytestmark = pytest.mark.usefixtures("quiet_machine")

EPOCH = datetime(2026, 1, 2, tzinfo=UTC)


def anchored(source: ModelSource, **changes: Any) -> Task:
    task = task_for(source, Kind.LATENCY, samples=1, active_blocks=(0,))
    whole = replace(task.knobs, active_blocks=tuple(range(6)))
    return replace(task, anchor=Anchor("anchor", whole), **changes)


def anchors_of(session: Session, task: Task) -> list[dict[str, Any]]:
    result = session.run(task)
    assert result.rows is not None, result.traceback
    return [] if result.anchors is None else result.anchors.to_pylist()


def test_an_anchor_is_timed_in_pairs_under_its_own_knobs(sources: dict[str, ModelSource]) -> None:
    session = Session("worker-1", accelerator="cpu")
    task = anchored(sources["tiny-smolvlm"])
    made = anchors_of(session, task)
    first = [row for row in made if row["visit"] == 0]
    assert {row["anchor_id"] for row in made} == {"anchor"}
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


def test_anchors_take_a_tenth_of_the_time_at_most(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("workers.anchor.time", SimpleNamespace(monotonic=lambda: now[0]))

    def timed(*arguments: Any) -> list[dict[str, Any]]:
        now[0] += 1.0
        return [{"pair": 0}]

    monkeypatch.setattr("workers.anchor._timed", timed)

    def ended(names: list[str]) -> dict[str, list[float]]:
        now[0] = 0.0
        anchors, task = Anchors(), anchored(sources["tiny-smolvlm"])
        found: dict[str, list[float]] = {name: [] for name in names}
        for second in range(95):
            now[0] = max(now[0], float(second))
            for name in names:
                arguments: Any = (task, Anchor(name, task.knobs), model_like(), lambda ref: object(), None, None)
                if anchors.rows_if_due(*arguments):
                    found[name].append(now[0])
        return found

    assert ended(["a"]) == {"a": [1, 12, 23, 34, 45, 56, 67, 78, 89]}
    both = ended(["a", "b"])
    assert (both["a"][0], both["b"][0]) == (1, 2), "each at once"
    assert len(both["a"]) + len(both["b"]) <= 11, "and then no more of the time than one alone"


def model_like() -> Any:
    return SimpleNamespace(knobs=lambda **_: nullcontext())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), RuntimeError("planted"), SampleError("planted")])
def test_an_anchor_that_cannot_be_timed_costs_the_task_nothing_and_says_why(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = []

    def fails(*_: Any) -> None:
        tried.append(1)
        raise error

    monkeypatch.setattr("workers.anchor.time_batch", fails)
    session = Session("worker-1", accelerator="cpu")
    (row,) = anchors_of(session, anchored(sources["tiny-smolvlm"]))
    assert (row["status"], row["valid"], row["anchor_id"]) == ("failed", False, "anchor")
    assert row["error"] == f"{type(error).__name__}: planted"
    assert anchors_of(session, anchored(sources["tiny-smolvlm"])) == []
    assert tried == [1], "what does not work now will not work later"
    assert_no_knob_is_switched(session)


def test_a_device_that_is_lost_behind_a_task_costs_it_no_rows(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, calls = Session("worker-1", accelerator="cpu"), [0]

    def lost(*_: Any) -> list[dict[str, Any]]:
        calls[0] += 1
        if calls[0] % 2 == 0:
            raise torch.AcceleratorError("planted", 700)
        return []

    monkeypatch.setattr(session._anchors, "rows_if_due", lost)
    assert rows_of(session, anchored(sources["tiny-smolvlm"]))
    calls[0] = 1
    assert session.run(anchored(sources["tiny-smolvlm"])).failure is FailureKind.DEVICE_LOST, "before it, it does"


def test_what_the_setting_of_a_task_refuses_gives_no_other_yardstick(sources: dict[str, ModelSource]) -> None:
    session = Session("worker-1", accelerator="cpu")
    task = anchored(sources["tiny-smolvlm"])
    assert task.anchor is not None
    refused = replace(task, knobs=replace(task.knobs, vision=VisionSetting("longest_edge", 1)))
    result = session.run(refused)
    assert result.failure is FailureKind.KNOB
    assert result.anchors is not None
    assert {row["sample_id"] for row in result.anchors.to_pylist()} == {task.samples[0].uid}


def test_the_anchor_skips_samples_that_are_broken(sources: dict[str, ModelSource], awkward: DatasetSource) -> None:
    session = Session("worker-1", accelerator="cpu")
    task = task_for(sources["tiny-smolvlm"], Kind.LATENCY, data=awkward, samples=4)
    failed = {row["sample_id"] for row in rows_of(session, task) if row["status"] == "failed"}
    assert failed
    broken_first = sorted(task.samples, key=lambda ref: ref.uid not in failed)
    made = anchors_of(session, replace(task, samples=tuple(broken_first), anchor=Anchor("anchor", task.knobs)))
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
    words = "\n".join(findings_in_words(trends))
    assert re.search(r"cpu-1 is 9\.\d % ± 0\.\d slower than the median of 4 workers in total_ms of tiny", words), words
    assert re.search(r"cpu-2 became (2\.[89]|3\.[012]) % ± 0\.\d slower per hour, over 3\.0 hours", words), words
    assert re.search(r"marking the stages costs (0\.9|1\.[01]) % ± 0\.\d of a \d+ ms answer of tiny", words), words

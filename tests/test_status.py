"""How a sweep stands, told from its folder alone: while it runs, after it, and where there is none."""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Timer

import pytest
from handmade import planned_dataset, rows_of

from orchestrator.plan import make_plan
from orchestrator.record import Recorder
from orchestrator.resolve import planned_models, resolve_models
from orchestrator.schedule import Outcome
from orchestrator.spec import parse_sweep
from orchestrator.status import FINE, WRONG, main, status_lines
from orchestrator.store import ResultStore
from workers.tasks import FailureKind, Status, TaskResult

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
SWEEP = """\
name: example
models: [tiny-smolvlm]
datasets: [{name: questions}]
knobs: {active_blocks: [3, 6, 99]}
latency: {samples: 2, repeats: 2, visits: 1}
"""


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    """Of a run that plans four tasks: one is done, one failed, one was not tried, one is left; a value was skipped."""
    sweep = parse_sweep(SWEEP)
    models = planned_models(sweep, resolve_models(sweep, offline=True), ["H100"])
    plan = make_plan(sweep, models, [planned_dataset(4)], ["H100"])
    store = ResultStore.open(tmp_path / "example", "example")
    recorder = Recorder(store, sweep, plan)
    recorder.note_run()
    recorder.catch_up()
    first, second, third, _ = plan.tasks
    ended = {"worker": {"worker": "h100-0", "host": "node-a"}, "started_at": (NOW - timedelta(minutes=3)).timestamp()}
    ended["finished_at"] = (NOW - timedelta(minutes=2)).timestamp()
    for task, result in (
        (first, TaskResult(first.task_id, Status.DONE, rows_of(first, 60.0), **ended)),
        (second, TaskResult(second.task_id, Status.FAILED, failure=FailureKind.TIMEOUT, reason="too long", **ended)),
        (third, TaskResult(third.task_id, Status.SKIPPED, failure=FailureKind.DOMINATED, reason="too large", **ended)),
    ):
        recorder.commit(Outcome(task, result, "H100", attempts=1))
    return store


def test_while_it_runs(store: ResultStore) -> None:
    state, tasks, pace, workers, *wrong = status_lines(store.root, NOW)
    assert state.startswith(f"{store.root}: running (driver {os.getpid()} on ")
    assert tasks == "  tasks    1 of 4 done, 1 failed, 1 skipped, 1 left"
    assert pace == "  pace     1.5 tasks a minute over the last 2:00, about 0:40 left"
    assert workers == "  workers  h100-0 on node-a (3)"
    assert sorted(wrong) == ["       1 x dominated: too large", "       1 x timeout: too long"]
    store.close()


def test_after_it_and_from_the_folder_above(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.close()
    assert main([str(store.root.parent)]) == FINE
    state, tasks, last, *_ = capsys.readouterr().out.splitlines()
    assert state.startswith(f"{store.root}: not running (last driver {os.getpid()} on ")
    assert tasks == "  tasks    1 of 4 done, 1 failed, 1 skipped, 1 left"
    assert last == "  last     2026-01-02 11:58:00 UTC"


def test_a_folder_of_an_earlier_release_has_no_note_of_its_run(store: ResultStore) -> None:
    store.close()
    (store.root / "run.json").unlink()
    state, tasks, *_ = status_lines(store.root, NOW)
    assert state == f"{store.root}: no run in progress"
    assert tasks == "  tasks    1 done, 1 failed, 1 skipped"


def test_where_there_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == WRONG
    assert capsys.readouterr().err == f"{tmp_path}: holds no results of this tool (no sweep.json in it or below)\n"


def test_asking_for_a_moment_keeps_no_run_from_starting(store: ResultStore) -> None:
    store.close()
    asking = os.open(store.root / ".lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    timer = Timer(0.1, os.close, [asking])
    timer.start()
    ResultStore.open(store.root, "example").close()
    timer.join()

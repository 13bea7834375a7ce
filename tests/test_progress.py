"""What a log says while a sweep runs: what has ended, what is left, and that somebody is still there."""

from __future__ import annotations

import pytest
from handmade import task

from orchestrator import progress
from orchestrator.progress import ProgressReport
from orchestrator.schedule import Outcome
from workers.tasks import Status, TaskResult


def outcome(status: Status) -> Outcome:
    return Outcome(task(), TaskResult("t", status), "cpu", 1)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every event, however soon after the last."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_SIGNS_OF_LIFE", 0)


def test_lines_count_what_ended_before_and_what_ends_now(always: None, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(6, done_before=2, failed_before=1) as report:
        report.ended(outcome(Status.DONE))
        report.ended(outcome(Status.FAILED))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("3 of 6 tasks done, 1 failed, 0:00 elapsed, about 0:00 left")
    assert lines[1].startswith("3 of 6 tasks done, 2 failed")
    assert len(lines) == 3, "and once more at the end"


def test_silence_is_broken_by_what_the_workers_do(always: None, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(6) as report:
        report.heartbeat("0 of 8 workers busy, h100-0 starting or waiting for a place")
    assert "0 failed, 0:00 elapsed; 0 of 8 workers busy, h100-0 starting" in capsys.readouterr().err


def test_a_sign_of_life_is_not_given_all_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(6) as report:
        for _ in range(100):
            report.heartbeat("busy")
    assert "busy" not in capsys.readouterr().err

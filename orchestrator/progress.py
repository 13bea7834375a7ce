"""What a person sees while a sweep runs: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator.schedule import Outcome

# In a log, one line now and then says as much as ten a second.
SECONDS_BETWEEN_LINES = 10.0
# Without news, a sign of life comes as often as this.
SECONDS_BETWEEN_SIGNS_OF_LIFE = 30.0


class ProgressReport:
    """Counts tasks as they end and shows it; a context manager."""

    def __init__(self, total: int, done_before: int = 0, failed_before: int = 0) -> None:
        """
        Args:
            total: tasks of the plan.
            done_before, failed_before: how many of them have ended in earlier runs.
        """
        self._total = total
        self._counts: Counter[str] = Counter(done=done_before, failed=failed_before)
        self._ended_before = done_before + failed_before
        self._begun = time.monotonic()
        self._last_line = self._begun
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._row = self._bar.add_task("tasks", total=total, completed=self._ended_before, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._line()

    def ended(self, outcome: Outcome) -> None:
        """One task ended."""
        task = outcome.task
        what = f"{task.model.name} {task.kind} {task.knobs.vision}"
        self._counts[outcome.result.status.value] += 1
        if self._bar is not None:
            failed = self._counts["failed"]
            note = f"[red]{failed} failed[/red] " if failed else ""
            self._bar.update(self._row, advance=1, note=note + what)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def heartbeat(self, state: str) -> None:
        """Called often with what the workers are doing; shown when nothing else has been for a while."""
        if self._bar is not None:
            if self._counts.total() == self._ended_before:
                self._bar.update(self._row, note=state)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_SIGNS_OF_LIFE:
            self._line(f"; {state}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self, more: str = "") -> None:
        self._last_line = time.monotonic()
        done, failed, skipped = (self._counts[status] for status in ("done", "failed", "skipped"))
        elapsed = self._last_line - self._begun
        left = self._total - self._counts.total()
        here = self._counts.total() - self._ended_before
        rest = f", about {duration(elapsed / here * left)} left" if here and left else ""
        not_tried = f", {skipped} skipped" if skipped else ""
        line = (
            f"{done} of {self._total} tasks done, {failed} failed{not_tried}, {duration(elapsed)} elapsed{rest}{more}"
        )
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:09, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

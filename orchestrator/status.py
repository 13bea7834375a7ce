"""How a sweep stands: `python -m orchestrator.status RESULTS`, wherever its folder is seen, while it runs or after."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from knobs.printing import print_lines
from orchestrator.progress import duration
from orchestrator.store import MARKER, StoreError, is_written_to, read_run, read_table

FINE, WRONG = 0, 2

# What ended within so long says how fast it goes now.
RECENT = timedelta(minutes=10)
MOST_REASONS = 5
_COLUMNS = ["task_id", "kind", "status", "failure", "reason", "worker", "host", "finished_at", "duration_s"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0, or 2 where there is no result folder."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.status", description="How a sweep stands.")
    parser.add_argument("results", type=Path, help="folder of a sweep's results, or one that holds such folders")
    root: Path = parser.parse_args(arguments).results
    try:
        folders = [root] if (root / MARKER).is_file() else sorted(path.parent for path in root.glob(f"*/{MARKER}"))
        if not folders:
            raise StoreError(f"{root}: holds no results of this tool (no {MARKER} in it or below)")
        lines = [line for folder in folders for line in status_lines(folder, datetime.now(UTC))]
    except (StoreError, OSError) as error:
        print(error, file=sys.stderr)
        return WRONG
    return print_lines(lines)


def status_lines(root: Path, now: datetime) -> Iterator[str]:
    """What is done, failed, skipped and left, how fast it goes, who works, and what went wrong.

    Raises:
        StoreError: the folder is not a result folder, or a part of it cannot be read.
    """
    run, tasks = read_run(root), read_table(root, "tasks", _COLUMNS)
    running = is_written_to(root)
    yield f"{root}: {_state(run, running)}"
    planned = set(run.get("task_ids") or ())
    # A skipped value of a knob has a row as well, and is no task.
    ended = tasks[tasks["kind"].notna()]
    ended = ended[ended["task_id"].isin(planned)] if planned else ended
    counts = ended["status"].value_counts()
    done, failed, skipped = (int(counts.get(name, 0)) for name in ("done", "failed", "skipped"))
    left = max(len(planned) - len(ended), 0)
    of_all = f" of {len(planned)}" if planned else ""
    yield f"  tasks    {done}{of_all} done, {failed} failed, {skipped} skipped" + (f", {left} left" if planned else "")
    recent = ended[ended["finished_at"] > pd.Timestamp(now - RECENT)]
    if running and len(recent):
        yield from _pace(recent, left, now)
    elif len(ended) and ended["finished_at"].notna().any():
        yield f"  last     {ended['finished_at'].max():%Y-%m-%d %H:%M:%S} UTC"
    wrong = ended[ended["status"] != "done"]
    reasons = Counter(zip(wrong["failure"], wrong["reason"], strict=True))
    for (failure, reason), count in reasons.most_common(MOST_REASONS):
        yield f"  {count:6} x {failure}: {reason}"
    if len(reasons) > MOST_REASONS:
        yield f"         ... and {len(reasons) - MOST_REASONS} more reasons, in the table tasks"


def _pace(recent: pd.DataFrame, left: int, now: datetime) -> Iterator[str]:
    seconds = min(RECENT.total_seconds(), max((now - recent["finished_at"].min()).total_seconds(), 1.0))
    rate = len(recent) / seconds
    remaining = f", about {duration(left / rate)} left" if left else ""
    yield f"  pace     {60 * rate:.1f} tasks a minute over the last {duration(seconds)}{remaining}"
    workers = recent.groupby("worker").agg(tasks=("task_id", "size"), host=("host", "last"))
    yield f"  workers  {', '.join(f'{name} on {row.host} ({row.tasks})' for name, row in workers.iterrows())}"


def _state(run: dict[str, Any], running: bool) -> str:
    if not run:
        return "being written to" if running else "no run in progress"
    where = f"driver {run.get('pid')} on {run.get('host')}, since {run.get('started_at')}"
    return f"running ({where})" if running else f"not running (last {where})"


if __name__ == "__main__":
    sys.exit(main())

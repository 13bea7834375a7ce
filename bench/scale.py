"""What the driver itself costs: a sweep of a hundred thousand tasks whose body is empty.

    python bench/scale.py              # 100,000 tasks, twenty minutes, 7 GB on the disk meanwhile
    python bench/scale.py --quick      # 200 tasks, to see that it runs
    python bench/scale.py --one-by-one # each outcome is flushed before the next one is looked at

Planned from a sweep of the usual form: levels of two knobs, data sets, nine visits and the scores, ten tasks to a
combination. Scheduler, recorder and store are the real ones, on a local Ray cluster of two workers. Not real are the
workers: they run nothing and return two rows with every column filled, and they say when each task began and ended.
A tenth of the tasks goes through Ray; the others are committed as fast as the store takes them. Then a fresh process
finds the finished folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# No statistics leave the machine, and no token is written into the home folder.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")

import pyarrow as pa
import ray

from orchestrator import schedule
from orchestrator.cluster import Pool
from orchestrator.plan import Plan, PlannedDataset, make_plan
from orchestrator.record import Recorder
from orchestrator.resolve import planned_models, resolve_models
from orchestrator.schedule import Outcome, Scheduler
from orchestrator.spec import Sweep, parse_sweep
from orchestrator.store import STAMPS, ResultStore, read_finished
from workers.datasets import Columns, DatasetSource, SampleRef
from workers.probes import cpu_name
from workers.schema import TABLES, to_table
from workers.tasks import Kind, Status, Task, TaskResult

WORKERS = 2
VISITS = 9
BLOCKS = (2, 3, 4, 5, 6)
ROWS = 2
SHORT_SECONDS = 0.02
SHARE_THROUGH_RAY = 10  # one in so many
GOALS = {
    "plan": "< 10 s",
    "commit": ">= 300 tasks/s",
    "memory": "< 1 GB",
    "resume": "< 10 s",
    "gap": "p50 < 5 ms",
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.found_in is not None:
        print(json.dumps(found_again(options.found_in, options.tasks, dry=options.dry)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder) / "scale"
        say(f"plan of {options.tasks} tasks")
        sweep, plan, seconds = planned(options.tasks)
        table = Table()
        table.add(f"plan of {len(plan.tasks):,} tasks, {len(plan.combinations):,} combinations", GOALS["plan"], seconds)
        measured(sweep, plan, root, options, table)
        table.say("driver, most memory (RSS)", GOALS["memory"], f"{memory_gb():.2f} GB")
        files = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
        table.say("result folder", "", f"{len(files):,} files, {sum(files) / 1e9:.2f} GB")
        for name, goal, flags in (
            ("resume: open, see what is done, catch up", GOALS["resume"], []),
            ("dry run: plan, and see what is done", "", ["--dry"]),
        ):
            say(name)
            found = fresh_process(root, options.tasks, flags)
            table.add(f"{name}, a fresh process", goal, found["seconds"])
            if not flags:
                table.say("its memory", "", f"{found['memory_gb']:.2f} GB")
        (root / STAMPS).unlink(missing_ok=True)
        say("resume without the file of stamps")
        found = fresh_process(root, options.tasks, [])
        table.add(f"resume without `{STAMPS}`", "", found["seconds"])
    print(header(options))
    print(table)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000, help="tasks of the sweep, in hundreds (default: 100000)")
    parser.add_argument("--quick", action="store_true", help="200 tasks; what it prints means nothing")
    parser.add_argument("--one-by-one", action="store_true", help="flush each outcome by itself, combinations included")
    parser.add_argument("--folder", help="where the results go meanwhile (default: the system's temporary folder)")
    parser.add_argument("--address", default="local", help="Ray cluster (default: a private local one)")
    parser.add_argument("--found-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.tasks = 200
    return options


def say(what: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {what}", file=sys.stderr, flush=True)


def memory_gb() -> float:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# -- the sweep --------------------------------------------------------------------------------------------------------


def planned(tasks: int) -> tuple[Sweep, Plan, float]:
    """A sweep of so many tasks, rounded up to whole levels, and how long its plan took."""
    num_datasets = 20 if tasks >= 10_000 else 2
    per_level = num_datasets * len(BLOCKS) * (VISITS + 1)
    edges = [32 + 8 * i for i in range(-(-tasks // per_level))]
    sweep = parse_sweep(
        "name: scale\n"
        "models: [tiny-smolvlm]\n"
        f"datasets: [{', '.join(f'{{name: data-{i}, path: data-{i}.jsonl}}' for i in range(num_datasets))}]\n"
        f"knobs: {{longest_edge: {edges}, active_blocks: {list(BLOCKS)}}}\n"
        f"latency: {{samples: 1, repeats: {ROWS * VISITS}, visits: {VISITS}}}\n"
    )
    datasets = [dataset(f"data-{i}") for i in range(num_datasets)]
    models = planned_models(sweep, resolve_models(sweep, offline=True), ["cpu"])
    begun = time.perf_counter()
    plan = make_plan(sweep, models, datasets, ["cpu"])
    return sweep, plan, time.perf_counter() - begun


def dataset(name: str) -> PlannedDataset:
    source = DatasetSource(
        name=name,
        split="test",
        path=f"/data/{name}.jsonl",
        hub_id=None,
        config=None,
        revision=None,
        columns=Columns(),
        metric="exact_match",
        prompt="{question}",
    )
    return PlannedDataset(source, tuple(SampleRef(f"{name}:test:{i}", f"{i:064x}") for i in range(ROWS)), 16)


# -- workers that run nothing -----------------------------------------------------------------------------------------


class Empty:
    """A worker whose tasks take no time."""

    seconds = 0.0

    def __init__(self, name: str, accelerator: str) -> None:
        self.name = name
        self.rows = Rows()

    def ready(self) -> dict[str, Any]:
        return {"memory_bytes": 8e9, "name": "empty", "accelerator": "cpu"}

    def run(self, task: Task) -> TaskResult:
        begun = time.time()
        if self.seconds:
            time.sleep(self.seconds)
        result = self.rows.result(task, self.name)
        return TaskResult(**vars(result) | {"started_at": begun, "finished_at": time.time()})


class Short(Empty):
    """A worker whose tasks take as long as the shortest real ones."""

    seconds = SHORT_SECONDS


class Rows:
    """The same two rows for every task, but for who they belong to."""

    def __init__(self) -> None:
        self._of_kind = {kind: to_table(kind, [filled(kind, i) for i in range(ROWS)]) for kind in Kind}

    def result(self, task: Task, worker: str) -> TaskResult:
        rows = self._of_kind[task.kind]
        own: dict[str, list[Any]] = {"task_id": [task.task_id] * ROWS, "combination_id": [task.combination_id] * ROWS}
        own["sample_id"] = [ref.uid for ref in (task.samples * ROWS)[:ROWS]]
        if task.kind is Kind.LATENCY:
            own |= {"visit": [task.visit] * ROWS, "repeat": [ROWS * task.visit + i for i in range(ROWS)]}
        for name, values in own.items():
            index = rows.schema.get_field_index(name)
            rows = rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))
        now = time.time()
        found = {"worker": worker, "host": "node", "device_name": "no device"}
        return TaskResult(task.task_id, Status.DONE, rows, worker=found, started_at=now, finished_at=now)


def filled(kind: Kind, row: int) -> dict[str, Any]:
    """A row with something in every column."""
    values: dict[str, Any] = {}
    for column in TABLES[kind]:
        if pa.types.is_list(column.type):
            item = column.type.value_type
            values[column.name] = list[Any]() if pa.types.is_string(item) else [1, 2, 3]
        elif pa.types.is_timestamp(column.type):
            values[column.name] = datetime.now(UTC)
        elif pa.types.is_string(column.type):
            values[column.name] = f"some {column.name}"
        elif pa.types.is_boolean(column.type):
            values[column.name] = True
        else:
            values[column.name] = 1 + row
    return values | {"status": "done", "error": None} | ({"batch": 0} if kind is Kind.LATENCY else {})


# -- what is measured -------------------------------------------------------------------------------------------------


class Table:
    """Figures beside their goals."""

    def __init__(self) -> None:
        self._lines = ["| what | goal | measured |", "|---|--:|--:|"]

    def add(self, what: str, goal: str, seconds: float) -> None:
        self.say(what, goal, f"{seconds:.1f} s")

    def say(self, what: str, goal: str, measured: str) -> None:
        self._lines.append(f"| {what} | {goal} | {measured} |")
        say(f"{what}: {measured}")

    def __str__(self) -> str:
        return "\n".join(self._lines)


def measured(sweep: Sweep, plan: Plan, root: Path, options: argparse.Namespace, table: Table) -> None:
    """Run the plan on a new folder: first gaps without commits, then a tenth through Ray, the rest without."""
    store = ResultStore.open(root, sweep.name)
    recorder = Recorder(store, sweep, plan)
    recorder.note_run()
    recorder.catch_up()
    tasks = recorder.todo()
    through_ray = max(len(tasks) // SHARE_THROUGH_RAY, 80)
    brief = max(through_ray // 10, 20)
    # In the order of the plan visits come first, so the last combinations are complete only at the end.
    short, empty, rest = tasks[:brief], tasks[brief:through_ray], tasks[through_ray:]
    own: dict[str, Any] = {"num_cpus": WORKERS, "include_dashboard": False} if options.address == "local" else {}
    ray.init(options.address, log_to_driver=False, logging_level="ERROR", **own)
    try:
        with by_value():
            say("scheduler alone")
            alone = driven(Empty, empty, thrown_away)
            table.say("scheduler alone, outcomes thrown away", "", f"{alone.rate:,.0f} tasks/s")
            table.say("gap on a worker, the same", GOALS["gap"], alone.gaps)
            commit = partial(one_by_one, recorder) if options.one_by_one else recorder.commit_all
            say("through Ray into the store")
            whole = driven(Empty, empty, commit)
            table.say("through Ray into the store", GOALS["commit"], f"{whole.rate:,.0f} tasks/s")
            table.say("gap on a worker, the same", GOALS["gap"], whole.gaps)
            slower = driven(Short, short, commit)
            table.say(f"gap with tasks of {1000 * SHORT_SECONDS:.0f} ms, the same", GOALS["gap"], slower.gaps)
    finally:
        ray.shutdown()
    say("into the store")
    only = stored(rest, commit)
    table.say("into the store alone", GOALS["commit"], f"{only.rate:,.0f} tasks/s")
    left = max(only.end - only.last, 1e-9)
    if not options.one_by_one:
        table.say("rows of combinations, after that", "", f"{len(plan.combinations) / left:,.0f} rows/s, {left:.0f} s")
    assert not recorder.todo()
    store.close()


Commit = Callable[[Iterable[Outcome], Callable[[Outcome], None]], None]


def thrown_away(outcomes: Iterable[Outcome], ended: Callable[[Outcome], None]) -> None:
    for outcome in outcomes:
        ended(outcome)


def one_by_one(recorder: Recorder, outcomes: Iterable[Outcome], ended: Callable[[Outcome], None]) -> None:
    for outcome in outcomes:
        recorder.commit(outcome)
        ended(outcome)


@dataclass
class Timed:
    """Outcomes that came through: when the first was asked for, the last was there, and everything had ended."""

    outcomes: list[Outcome]
    begun: float
    last: float
    end: float

    @property
    def rate(self) -> float:
        return len(self.outcomes) / (self.last - self.begun)

    @property
    def gaps(self) -> str:
        """How long a worker waits between two tasks."""
        of_worker: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for outcome in self.outcomes:
            result = outcome.result
            of_worker[result.worker["worker"]].append((result.started_at, result.finished_at))
        gaps = [
            1000 * (after[0] - before[1])
            for times in of_worker.values()
            for before, after in zip(sorted(times), sorted(times)[1:], strict=False)
        ]
        cuts = statistics.quantiles(gaps, n=20)
        return f"p50 {statistics.median(gaps):.1f} ms, p95 {cuts[-1]:.1f} ms"


def driven(worker: type[Empty], tasks: Sequence[Task], commit: Commit) -> Timed:
    """Tasks through the real scheduler, from the moment in which both workers are up."""
    pools = [Pool("cpu", WORKERS, 1)]
    with patch.object(schedule, "Worker", worker), Scheduler(pools, lambda: False) as scheduler:
        for _ in scheduler.run(tasks[: 4 * WORKERS]):
            pass
        return committed(scheduler.run(tasks), commit)


def stored(tasks: Sequence[Task], commit: Commit) -> Timed:
    """Tasks into the store, without workers."""
    rows = Rows()
    return committed((Outcome(task, rows.result(task, "cpu-0"), "cpu", 1) for task in tasks), commit)


def committed(outcomes: Iterable[Outcome], commit: Commit) -> Timed:
    begun = last = time.perf_counter()
    all_ended: list[Outcome] = []

    def ended(outcome: Outcome) -> None:
        nonlocal last
        last = time.perf_counter()
        all_ended.append(slim(outcome))
        if len(all_ended) % 10_000 == 0:
            say(f"{len(all_ended):,} after {last - begun:.0f} s")

    commit(outcomes, ended)
    return Timed(all_ended, begun, last, time.perf_counter())


def slim(outcome: Outcome) -> Outcome:
    """Without its rows, which a driver does not keep either."""
    return Outcome(outcome.task, TaskResult(**vars(outcome.result) | {"rows": None}), outcome.accelerator, 1)


@contextmanager
def by_value() -> Iterator[None]:
    """Processes of workers cannot import this file by its name."""
    module = sys.modules[__name__]
    if __name__ != "__main__":
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        if __name__ != "__main__":
            ray.cloudpickle.unregister_pickle_by_value(module)


# -- a finished folder, found again -----------------------------------------------------------------------------------


def fresh_process(root: Path, tasks: int, flags: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--tasks", str(tasks), "--found-in", str(root), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def found_again(root: Path, tasks: int, *, dry: bool) -> dict[str, float]:
    """What the same command does on a finished folder, short of what it prints.

    Raises:
        AssertionError: it would run something.
    """
    sweep, plan, of_plan = planned(tasks)
    begun = time.perf_counter()
    if dry:
        done, failed = read_finished(root, [task.task_id for task in plan.tasks])
        assert (len(done), len(failed)) == (len(plan.tasks), 0)
        return {"seconds": of_plan + time.perf_counter() - begun, "memory_gb": memory_gb()}
    store = ResultStore.open(root, sweep.name)
    recorder = Recorder(store, sweep, plan)
    recorder.note_run()
    recorder.catch_up()
    assert recorder.todo() == []
    store.close()
    return {"seconds": time.perf_counter() - begun, "memory_gb": memory_gb()}


# -- what is printed --------------------------------------------------------------------------------------------------


def header(options: argparse.Namespace) -> str:
    command = "python bench/scale.py"
    command += " --quick" if options.quick else "" if options.tasks == 100_000 else f" --tasks {options.tasks}"
    command += " --one-by-one" if options.one_by_one else ""
    return (
        f"`{command}` on {cpu_name()}, {os.cpu_count()} cores that others use as well; Ray {ray.__version__}, pyarrow "
        f"{pa.__version__}, {platform.python_implementation()} {platform.python_version()}.\n"
    )


if __name__ == "__main__":
    main()

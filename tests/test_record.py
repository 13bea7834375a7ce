"""What outcomes become in a real result folder: rows of combinations and tasks, after failures, deaths and reruns."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from handmade import OF_COMBINATIONS, STARTED, planned_dataset, rows_of, timed_row

from orchestrator.plan import SAMPLES_PER_ACCURACY_TASK, Plan, make_plan
from orchestrator.record import MOST_WAITING, Recorder
from orchestrator.resolve import planned_models, resolve_models
from orchestrator.schedule import Outcome
from orchestrator.spec import Sweep, parse_sweep
from orchestrator.store import ResultStore, StoreError
from orchestrator.summary import print_failures
from workers.datasets import fingerprint
from workers.schema import COMBINATION_COLUMNS, to_table
from workers.tasks import FailureKind, Kind, Status, Task, TaskResult

BEGIN = STARTED.timestamp()


def sweep(**sections: str) -> Sweep:
    text = "name: example\nmodels: [tiny-smolvlm]\ndatasets: [{name: written/as/a/path}]\n"
    sections = {"knobs": "{active_blocks: [3, 6]}", "latency": "{samples: 2, repeats: 2, visits: 1}"} | sections
    return parse_sweep(text + "".join(f"{key}: {value}\n" for key, value in sections.items()))


def plan_of(spec: Sweep, count: int = 4, accelerators: Sequence[str] = ("H100",)) -> Plan:
    models = planned_models(spec, resolve_models(spec, offline=True), accelerators)
    return make_plan(spec, models, [planned_dataset(count)], accelerators)


class Run:
    """One run of a sweep on a result folder, with outcomes that the test decides instead of workers."""

    def __init__(self, root: Path, spec: Sweep, plan: Plan, *, retry_failed: bool = False) -> None:
        self.root, self.plan = root, plan
        self.store = ResultStore.open(root, spec.name)
        self.recorder = Recorder(self.store, spec, plan, retry_failed=retry_failed)
        self.recorder.catch_up()

    def task(self, kind: Kind, blocks: int = 6, accelerator: str = "H100", chunk: int = 0) -> Task:
        found = [
            t
            for t in self.plan.tasks
            if t.kind is kind and len(t.knobs.active_blocks) == blocks and t.accelerator in (None, accelerator)
        ]
        return found[chunk]

    def done(self, task: Task, value: float = 1.0, broken: Sequence[str] = (), on: str = "H100") -> None:
        found = {"worker": f"{on}-0", "host": "node", "device_name": "Some GPU 80GB"}
        rows = rows_of(task, value, broken)
        result = TaskResult(
            task.task_id, Status.DONE, rows, worker=found, started_at=BEGIN + value, finished_at=BEGIN + value + 2
        )
        self.recorder.commit(Outcome(task, result, on, attempts=1))

    def fail(self, task: Task, on: str = "H100", attempts: int = 1) -> None:
        result = TaskResult(
            task.task_id,
            Status.FAILED,
            failure=FailureKind.OUT_OF_MEMORY,
            reason="CUDA out of memory",
            traceback="Traceback ...",
            worker={"worker": f"{on}-0"},
            started_at=BEGIN,
            finished_at=BEGIN + 1,
        )
        self.recorder.commit(Outcome(task, result, on, attempts))

    def all_done(self) -> None:
        for task in self.recorder.todo():
            self.done(task, 60.0 if task.kind is Kind.LATENCY else 1.0, on=task.accelerator or "H100")

    def combinations(self) -> pd.DataFrame:
        return stored(self.root, "combinations")


def stored(root: Path, table: str) -> pd.DataFrame:
    """A table as anyone reads it, without this project."""
    if not list((root / table).rglob("*.parquet")):
        return pd.DataFrame()
    rows: pd.DataFrame = pd.read_parquet(root / table)
    return rows


def written(root: Path) -> dict[Path, int]:
    """When each file of the folder was written."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts runs on one folder, each after giving up the one before, as a killed process would."""
    open_runs: list[Run] = []

    def start_run(spec: Sweep | None = None, *, retry_failed: bool = False, **of_plan: Any) -> Run:
        for run in open_runs:
            run.store.close()
        open_runs.clear()
        spec = spec or sweep()
        open_runs.append(Run(tmp_path / "example", spec, plan_of(spec, **of_plan), retry_failed=retry_failed))
        return open_runs[-1]

    yield start_run
    for run in open_runs:
        run.store.close()


# -- combinations -----------------------------------------------------------------------------------------------------


def test_a_row_appears_when_the_last_task_of_its_combination_ends(start: Any) -> None:
    run: Run = start()
    assert len(run.recorder.todo()) == 4
    run.done(run.task(Kind.LATENCY), 60.0)
    assert run.combinations().empty
    run.done(run.task(Kind.ACCURACY, 3), 0.5)
    assert run.combinations().empty
    run.done(run.task(Kind.ACCURACY), 0.25)
    (row,) = run.combinations().to_dict("records")
    assert row["num_active_blocks"] == 6
    assert (row["accuracy"], row["num_samples"], row["num_failed"]) == (0.25, 4, 0)
    assert (row["total_ms_mean"], row["num_timed"], row["num_invalid"]) == (60.5, 4, 0)
    run.done(run.task(Kind.LATENCY, 3), 30.0)
    assert sorted(run.combinations()["num_active_blocks"]) == [3, 6]
    assert run.recorder.todo() == []


def test_a_row_says_what_it_is_the_row_of(start: Any) -> None:
    run: Run = start(sweep(knobs="{longest_edge: [32], active_blocks: [[0, 2]]}"))
    run.all_done()
    (row,) = run.combinations().to_dict("records")
    assert list(row)[: len(COMBINATION_COLUMNS)] == [column.name for column in COMBINATION_COLUMNS]
    expected = {
        "sweep": "example",
        "combination_id": run.plan.combinations[0].combination_id,
        "model": "tiny-smolvlm",
        "accelerator": "H100",
        "dataset": "questions",
        "split": "test",
        "device_name": "Some GPU 80GB",
        "dtype": "bfloat16",
        "attention": "sdpa",
        "engine": "eager",
        "vision_knob": "longest_edge",
        "vision_value": "32",
        "num_active_blocks": 2,
        "theoretical_num_crops": 1,
        "theoretical_tiling": "1x1",
        "theoretical_vision_tokens": 16,
        "metric": "exact_match",
    }
    assert {name: row[name] for name in expected} == expected
    assert list(row["active_blocks"]) == [0, 2]
    null = ["revision", "experts", "moe_top_k", "force_full_tokens", "peak_memory_bytes", "energy_j"]
    assert all(pd.isna(row[name]) for name in null)


def test_a_row_says_how_it_was_measured_and_on_which_samples(start: Any) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [6]}", latency="{samples: 2, repeats: 2, output_tokens: 9}"))
    run.all_done()
    (row,) = run.combinations().to_dict("records")
    scored = run.task(Kind.ACCURACY)
    expected = {
        "prompt": "{question}",
        "timed_output_tokens": 9,
        "timed_repeats": 2,
        "timed_max_relative_error": 0.02,
        "timed_warmup": 1,
        "timed_batch_size": 1,
        "scored_max_new_tokens": 8,
        "scored_batch_size": 16,
        "samples_digest": fingerprint(scored.samples)[:16],
    }
    assert {name: row[name] for name in expected} == expected
    assert set(row["task_ids"]) == {task.task_id for task in run.plan.tasks}


@pytest.mark.parametrize("off", ["latency", "accuracy"])
def test_what_is_off_has_no_protocol_and_what_is_on_says_where_and_on_what(start: Any, off: str) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [6]}", **{off: "off"}))
    run.all_done()
    (row,) = run.combinations().to_dict("records")
    (task,) = run.plan.tasks
    null = {name for name in row if name.startswith(("timed_", "scored_")) and pd.isna(row[name])}
    timed = {name for name in row if name.startswith("timed_")}
    # A limit in seconds is there only where a sweep sets one.
    assert null == (timed if off == "latency" else {"scored_max_new_tokens", "scored_batch_size", "timed_limit_s"})
    assert row["samples_digest"] == fingerprint(task.samples)[:16]
    assert row["device_name"] == "Some GPU 80GB"


def test_only_samples_with_a_score_are_in_the_digest(start: Any) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [6]}", latency="off"))
    scored = run.task(Kind.ACCURACY)
    run.done(scored, broken=[scored.samples[1].uid])
    kept = [ref for ref in scored.samples if ref is not scored.samples[1]]
    assert run.combinations()["samples_digest"].tolist() == [fingerprint(kept)[:16]]


def test_rows_that_were_measured_in_two_ways_stand_side_by_side_and_can_be_told_apart(start: Any) -> None:
    first: Run = start(sweep(knobs="{longest_edge: [32, 64, 96]}", latency="{samples: 2, visits: 1, output_tokens: 4}"))
    first.all_done()
    longer: Run = start(sweep(knobs="{longest_edge: [32]}", latency="{samples: 2, visits: 1, output_tokens: 16}"))
    (missing,) = longer.recorder.todo()
    assert missing.kind is Kind.LATENCY  # the scores are the same ones
    longer.all_done()
    rows = longer.combinations()
    assert rows["combination_id"].is_unique
    assert sorted(zip(rows["timed_output_tokens"], rows["vision_value"], strict=True)) == [
        (4, "32"),
        (4, "64"),
        (4, "96"),
        (16, "32"),
    ]
    # A row finds the rows behind it, shared ones included.
    row = rows[rows["timed_output_tokens"] == 16].iloc[0]
    scores = stored(longer.root, "accuracy")
    assert len(scores[scores["task_id"].isin(row["task_ids"])]) == row["num_samples"] == 4
    assert longer.recorder.results()["timed_output_tokens"].tolist() == [16]


def test_two_kinds_of_device_share_what_was_scored_and_have_a_row_each(start: Any) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [6]}"), accelerators=["H100", "A100"])
    run.done(run.task(Kind.ACCURACY), 0.5, on="A100")
    assert run.combinations().empty
    run.done(run.task(Kind.LATENCY, accelerator="A100"), 90.0, on="A100")
    assert run.combinations()["accelerator"].tolist() == ["A100"]
    run.done(run.task(Kind.LATENCY, accelerator="H100"), 30.0, on="H100")
    rows = run.combinations().set_index("accelerator")
    assert rows["accuracy"].to_dict() == {"A100": 0.5, "H100": 0.5}
    assert rows["total_ms_mean"].to_dict() == {"A100": 90.5, "H100": 30.5}
    assert len(stored(run.root, "accuracy")) == 4
    assert len(run.recorder.results()) == 2
    # A later run on one of them shows that one only.
    later: Run = start(sweep(knobs="{active_blocks: [6]}"), accelerators=["A100"])
    assert later.recorder.results()["accelerator"].tolist() == ["A100"]
    assert later.recorder.todo() == []


# -- as they arrive ---------------------------------------------------------------------------------------------------


def outcome(of: Task, value: float = 1.0, **changes: Any) -> Outcome:
    rows = rows_of(of, value)
    return Outcome(of, TaskResult(of.task_id, Status.DONE, rows, started_at=BEGIN, **changes), "H100", attempts=1)


def in_place(run: Run, task: Task) -> bool:
    return any(list((run.root / table).rglob(f"{task.task_id}.parquet")) for table in Kind)


def test_what_is_committed_as_it_arrives_counts_as_ended_when_it_is_in_place(start: Any) -> None:
    run: Run = start()
    tasks = run.recorder.todo()
    ended: list[tuple[Task, bool]] = []
    run.recorder.commit_all(map(outcome, tasks), lambda done: ended.append((done.task, in_place(run, done.task))))
    assert ended == [(task, True) for task in tasks]
    assert run.recorder.todo() == []
    assert sorted(run.combinations()["num_active_blocks"]) == [3, 6]
    assert set(stored(run.root, "tasks")["status"]) == {"done"}
    files = written(run.root)
    start()
    assert written(run.root) == files, "nothing was left out"


def test_rows_of_combinations_wait_for_outcomes_but_not_for_the_end(start: Any) -> None:
    run: Run = start()
    tasks = [task for task in run.recorder.todo() if len(task.knobs.active_blocks) == 6]
    tasks += [task for task in run.recorder.todo() if task not in tasks]

    def arriving() -> Iterator[Outcome]:
        yield from map(outcome, tasks[:2])
        for _ in range(200):
            if not run.combinations().empty:
                break
            time.sleep(0.02)
        assert run.combinations()["num_active_blocks"].tolist() == [6]
        yield from map(outcome, tasks[2:])

    run.recorder.commit_all(arriving())
    assert run.recorder.todo() == []
    assert len(run.combinations()) == 2


def test_a_folder_that_cannot_be_written_ends_the_run_however_much_arrives(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = start()
    first, *others = run.recorder.todo()
    commit_all = run.store.commit_all

    def full(parts: Sequence[Any]) -> None:
        if any(part.name == others[0].task_id for part in parts):
            raise StoreError("no space; nothing committed is lost")
        commit_all(parts)

    monkeypatch.setattr(run.store, "commit_all", full)
    monkeypatch.setattr("orchestrator.record.MOST_AT_ONCE", 1)
    arriving = [outcome(first), *(outcome(others[0]) for _ in range(3 * MOST_WAITING))]
    ended: list[Outcome] = []
    with pytest.raises(StoreError, match="no space"):
        run.recorder.commit_all(arriving, ended.append)
    assert [one.task for one in ended] == [first]
    assert run.recorder.done == {first.task_id}


def test_who_is_interrupted_loses_nothing_that_had_arrived(start: Any) -> None:
    run: Run = start()
    tasks = run.recorder.todo()

    def interrupted() -> Iterator[Outcome]:
        yield from map(outcome, tasks[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.recorder.commit_all(interrupted())
    assert run.recorder.done == {task.task_id for task in tasks[:3]}
    after: Run = start()
    assert after.recorder.todo() == tasks[3:]
    after.all_done()
    assert len(after.combinations()) == 2


def test_an_environment_that_two_outcomes_bring_at_once_is_one_row(start: Any) -> None:
    run: Run = start()
    run.recorder._commit([outcome(task, environment={"environment_id": "e"}) for task in run.recorder.todo()])
    assert stored(run.root, "environments")["environment_id"].tolist() == ["e"]
    assert run.recorder.todo() == []


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_task_that_failed_leaves_the_combination_with_what_there_is(start: Any) -> None:
    run: Run = start()
    run.done(run.task(Kind.ACCURACY), 0.5)
    run.fail(run.task(Kind.LATENCY))
    (row,) = run.combinations().to_dict("records")
    assert row["accuracy"] == 0.5
    assert pd.isna(row["total_ms_mean"])
    assert row["num_failed"] == 2  # the samples that the lost task would have timed
    assert len(stored(run.root, "latency")) == 0


def test_samples_of_a_failed_task_are_counted_not_averaged_away(start: Any) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [6]}", latency="off"), count=SAMPLES_PER_ACCURACY_TASK + 3)
    run.done(run.task(Kind.ACCURACY, chunk=0), 1.0, broken=["questions:test:1"])
    run.fail(run.task(Kind.ACCURACY, chunk=1))
    (row,) = run.combinations().to_dict("records")
    assert (row["accuracy"], row["num_samples"], row["num_failed"]) == (1.0, SAMPLES_PER_ACCURACY_TASK - 1, 4)


def test_a_combination_of_which_nothing_is_left_has_no_row_but_its_tasks_have(start: Any) -> None:
    run: Run = start()
    for kind in OF_COMBINATIONS:
        run.fail(run.task(kind), attempts=3)
    assert run.combinations().empty
    failures = run.recorder.failures()
    assert sorted(failures["kind"]) == ["accuracy", "latency"]
    assert set(failures["failure"]) == {"out_of_memory"}
    assert set(failures["reason"]) == {"CUDA out of memory"}
    assert set(failures["attempts"]) == {3}


def test_a_task_row_tells_how_it_ended(start: Any) -> None:
    run: Run = start()
    timed = run.task(Kind.LATENCY)
    run.done(timed, 5.0, broken=[timed.samples[1].uid])
    (row,) = stored(run.root, "tasks").to_dict("records")
    assert row["task_id"] == timed.task_id
    assert (row["status"], row["num_samples"], row["num_failed_rows"], row["attempts"]) == ("done", 2, 1, 1)
    assert (row["worker"], row["host"], row["device_name"]) == ("H100-0", "node", "Some GPU 80GB")
    assert (row["duration_s"], row["started_at"].timestamp()) == (2.0, BEGIN + 5)
    assert all(pd.isna(row[name]) for name in ("failure", "reason", "traceback"))


def test_failed_rows_are_counted_without_opening_a_single_part(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = start()
    for task in run.recorder.todo():
        run.done(task, broken=[task.samples[1].uid, task.samples[0].uid] if task.kind is Kind.ACCURACY else [])
    again: Run = start()
    with monkeypatch.context() as patch:
        patch.setattr(again.store, "rows", lambda *_: pytest.fail("a part was opened"))
        assert run.recorder.failed_rows() == again.recorder.failed_rows() == 4
    # A run that died before the rows of tasks loses none of it.
    shutil.rmtree(run.root / "tasks")
    assert start().recorder.failed_rows() == 4


def test_samples_that_failed_are_named_once_and_whole_tasks_are_not_opened_for_it(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = start()
    scored, other, whole = run.task(Kind.ACCURACY, 3), run.task(Kind.ACCURACY, 6), run.task(Kind.LATENCY)
    run.done(scored, broken=["questions:test:2"])
    run.done(other, broken=["questions:test:2", "questions:test:0"])
    run.done(whole)
    opened: list[str] = []
    rows = run.store.rows

    def watched(table: str, names: Sequence[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
        opened.extend(names)
        return rows(table, names, columns)

    monkeypatch.setattr(run.store, "rows", watched)
    found = run.recorder.failed_samples()
    assert found.to_dict("records") == [
        {"sample_id": "questions:test:2", "error": "questions:test:2: broken image"},
        {"sample_id": "questions:test:0", "error": "questions:test:0: broken image"},
    ]
    assert sorted(opened) == sorted([scored.task_id, other.task_id])


def test_no_failed_samples_is_a_table_without_rows(start: Any) -> None:
    run: Run = start()
    run.all_done()
    assert run.recorder.failed_samples().columns.tolist() == ["sample_id", "error"]
    assert run.recorder.failed_samples().empty


def test_the_summary_names_some_of_the_samples_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    none = pd.DataFrame()
    two = pd.DataFrame({"sample_id": ["a:test:1", "a:test:2"], "error": ["a:test:1: broken\nat byte 7", "no question"]})
    print_failures(none, 6, two)
    assert capsys.readouterr().out.splitlines() == [
        "failed   2 samples in 6 rows:",
        "         a:test:1: broken",
        "         a:test:2: no question",
    ]
    many = pd.DataFrame({"sample_id": [f"a:test:{i}" for i in range(7)], "error": [None] * 7})
    print_failures(none, 7, many)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[1] == "         a:test:0: no reason given"
    assert lines[-1] == "         ... and 2 more, in the column error of the sample tables"
    print_failures(none, 1, two.head(1))
    assert capsys.readouterr().out.splitlines()[0] == "failed   1 sample in 1 row:"
    print_failures(none, 0, two.head(0))
    assert capsys.readouterr().out == ""


def test_failed_tasks_are_left_alone_until_they_are_asked_for(start: Any) -> None:
    first: Run = start()
    failed = first.task(Kind.ACCURACY)
    first.fail(failed)
    for task in first.recorder.todo():
        first.done(task, 60.0)
    again: Run = start()
    assert again.recorder.todo() == []
    assert again.recorder.failed == {failed.task_id}
    assert again.recorder.failures()["task_id"].tolist() == [failed.task_id]
    retried: Run = start(retry_failed=True)
    assert retried.recorder.todo() == [failed]
    # On another kind of device this time, which may run it as well.
    retried.done(failed, 0.75, on="A100")
    row = retried.combinations().set_index("num_active_blocks").loc[6]
    assert (row["accuracy"], row["num_failed"]) == (0.75, 0)
    tasks = stored(retried.root, "tasks")
    assert tasks[tasks["task_id"] == failed.task_id]["status"].tolist() == ["done"]
    assert start().recorder.failed == set()


def test_a_task_that_fails_twice_in_different_places_is_one_failure(start: Any) -> None:
    run: Run = start()
    run.fail(run.task(Kind.ACCURACY), on="H100")
    again: Run = start(retry_failed=True)
    again.fail(again.task(Kind.ACCURACY), on="A100")
    assert again.recorder.failures()["accelerator"].tolist() == ["A100"]


# -- after a death ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["tasks", "combinations"])
def test_what_a_killed_run_left_out_is_made_up_for(start: Any, lost: str) -> None:
    run: Run = start()
    run.all_done()
    before = stored(run.root, lost).sort_values("combination_id").reset_index(drop=True)
    shutil.rmtree(run.root / lost)
    after: Run = start()
    assert after.recorder.todo() == []
    found = stored(after.root, lost).sort_values("combination_id").reset_index(drop=True)
    if lost == "combinations":
        pd.testing.assert_frame_equal(found, before)
    else:
        # How long it took and how often it was tried is gone; what the rows themselves say is not.
        known = ["task_id", "combination_id", "kind", "status", "num_samples", "num_failed_rows", "device_name"]
        key = ["combination_id", "kind"]
        pd.testing.assert_frame_equal(
            found.sort_values(key)[known].reset_index(drop=True),
            before.sort_values(key)[known].reset_index(drop=True),
        )
        assert set(found["started_at"]) == {pd.Timestamp(STARTED)}


def test_a_run_that_died_between_the_rows_of_a_retry_and_its_task_row_is_put_right(start: Any) -> None:
    run: Run = start()
    scored = run.task(Kind.ACCURACY)
    run.fail(scored)
    (row_of_failure,) = (run.root / "tasks").rglob(f"{scored.task_id}.parquet")
    kept = row_of_failure.read_bytes()
    retried: Run = start(retry_failed=True)
    retried.done(scored)
    row_of_failure.write_bytes(kept)
    after: Run = start()
    assert scored.task_id in after.recorder.done
    tasks = stored(after.root, "tasks").set_index("task_id")
    assert tasks.loc[scored.task_id, "status"] == "done"


def test_a_damaged_part_is_run_again_and_its_combination_made_of_the_new_numbers(start: Any) -> None:
    run: Run = start()
    run.all_done()
    timed = run.task(Kind.LATENCY)
    (part,) = (run.root / "latency").rglob(f"{timed.task_id}.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    again: Run = start()
    assert again.recorder.todo() == [timed]
    assert len(again.store.warnings) == 1
    again.done(timed, 10.0)
    row = again.combinations().set_index("num_active_blocks").loc[6]
    assert row["total_ms_mean"] == 10.5


def spoil(root: Path, table: str, name: str) -> None:
    """Damage in the middle of a part: its end, which is what is looked at first, stays whole."""
    (part,) = (root / table).rglob(f"{name}.parquet")
    content = bytearray(part.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = b"\xff" * (len(content) - footer - 4)
    part.write_bytes(content)


@pytest.mark.parametrize("lost", ["tasks", "combinations"])
@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_a_part_that_is_damaged_in_the_middle_is_run_again(start: Any, lost: str, kind: Kind) -> None:
    run: Run = start()
    run.all_done()
    spoiled = run.task(kind)
    spoil(run.root, kind, spoiled.task_id)
    # What makes the next run read it: one that was killed left rows out.
    shutil.rmtree(run.root / lost)
    again: Run = start()
    assert again.recorder.todo() == [spoiled]
    assert spoiled.task_id not in again.recorder.done
    assert len(again.store.warnings) == 1
    assert "is damaged (" in again.store.warnings[0]
    before = again.combinations()
    assert sorted(before["num_active_blocks"]) == ([3] if lost == "combinations" else [3, 6])
    again.done(spoiled, 10.0 if kind is Kind.LATENCY else 0.5)
    row = again.combinations().set_index("num_active_blocks").loc[6]
    assert (row["total_ms_mean"], row["accuracy"]) == ((10.5, 1.0) if kind is Kind.LATENCY else (60.5, 0.5))
    assert again.recorder.todo() == []


def test_damage_that_shows_in_the_middle_of_a_run_costs_that_combination_only(start: Any) -> None:
    run: Run = start()
    timed, scored = run.task(Kind.LATENCY), run.task(Kind.ACCURACY)
    run.done(timed, 60.0)
    spoil(run.root, "latency", timed.task_id)
    run.done(scored)
    assert run.combinations().empty
    assert run.recorder.todo() == [t for t in run.plan.tasks if t.task_id == timed.task_id or t.knobs != timed.knobs]
    (warning,) = run.store.warnings
    assert "the same command makes again what it held" in warning
    for task in run.recorder.todo():
        if task.task_id != timed.task_id:
            run.done(task, 30.0)
    assert run.combinations()["num_active_blocks"].tolist() == [3]
    next_run: Run = start()
    assert next_run.recorder.todo() == [timed]
    next_run.all_done()
    assert sorted(next_run.combinations()["num_active_blocks"]) == [3, 6]
    assert next_run.store.warnings == []


def test_a_damaged_row_of_a_combination_is_made_again_from_its_parts(start: Any) -> None:
    run: Run = start()
    run.all_done()
    before = run.recorder.results()
    spoil(run.root, "combinations", run.plan.combinations[0].combination_id)
    again: Run = start()
    pd.testing.assert_frame_equal(again.recorder.results(), before)
    assert again.recorder.todo() == []
    assert len(again.store.warnings) == 1
    assert len(again.combinations()) == 2


def test_a_damaged_row_of_a_failed_task_leaves_the_task_to_be_run_again(start: Any) -> None:
    run: Run = start()
    failed = run.task(Kind.LATENCY)
    run.fail(failed)
    run.fail(run.task(Kind.LATENCY, 3))
    spoil(run.root, "tasks", failed.task_id)
    assert run.recorder.failures()["num_active_blocks"].tolist() == [3]
    assert failed in run.recorder.todo()
    assert failed in start().recorder.todo()


def test_a_run_that_died_before_the_row_of_new_numbers_has_them_after_the_next_start(start: Any) -> None:
    run: Run = start()
    run.all_done()
    rows = {path: path.read_bytes() for path in (run.root / "combinations").rglob("*.parquet")}
    timed = run.task(Kind.LATENCY)
    run.done(timed, 10.0)
    for path, content in rows.items():
        path.write_bytes(content)
    after: Run = start()
    assert after.combinations().set_index("num_active_blocks").loc[6, "total_ms_mean"] == 10.5


# -- reruns -----------------------------------------------------------------------------------------------------------


def test_a_rerun_of_what_is_complete_writes_nothing(start: Any) -> None:
    spec = sweep(knobs="{active_blocks: [3, 6, 8]}")
    run: Run = start(spec)
    run.all_done()
    before = written(run.root)
    again: Run = start(spec)
    assert again.recorder.todo() == []
    assert written(again.root) == before
    assert len(again.recorder.results()) == 2


def test_more_samples_run_the_difference_and_make_the_rows_anew(start: Any) -> None:
    spec = sweep(knobs="{active_blocks: [6]}")
    first: Run = start(spec, count=SAMPLES_PER_ACCURACY_TASK)
    first.all_done()
    more: Run = start(spec, count=SAMPLES_PER_ACCURACY_TASK + 44)
    (missing,) = more.recorder.todo()
    assert (missing.kind, len(missing.samples)) == (Kind.ACCURACY, 44)
    # Until then the row of the smaller sweep stays.
    assert more.combinations()["num_samples"].tolist() == [SAMPLES_PER_ACCURACY_TASK]
    more.done(missing, 0.0)
    (row,) = more.combinations().to_dict("records")
    assert row["num_samples"] == SAMPLES_PER_ACCURACY_TASK + 44
    assert row["accuracy"] == pytest.approx(SAMPLES_PER_ACCURACY_TASK / (SAMPLES_PER_ACCURACY_TASK + 44))


def test_more_levels_leave_the_rows_that_are_there(start: Any) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [6]}"))
    run.all_done()
    before = written(run.root)
    more: Run = start(sweep(knobs="{active_blocks: [6, 4]}"))
    assert {len(task.knobs.active_blocks) for task in more.recorder.todo()} == {4}
    more.all_done()
    assert written(more.root).items() > before.items()
    assert sorted(more.combinations()["num_active_blocks"]) == [4, 6]


# -- skips ------------------------------------------------------------------------------------------------------------


def test_a_skip_is_a_row_with_a_reason_beside_the_tasks(start: Any) -> None:
    spec = sweep(knobs="{longest_edge: [16, 32], active_blocks: [6, [0, 9]]}")
    run: Run = start(spec, accelerators=["H100", "A100"])
    rows = stored(run.root, "tasks")
    assert set(rows["status"]) == {"skipped"}
    assert len(rows) == 3 * 2
    assert rows["task_id"].is_unique
    assert set(rows["model"]) == {"tiny-smolvlm"}
    assert set(rows["dataset"]) == {"questions"}
    first = rows[(rows["accelerator"] == "A100") & (rows["vision_value"] == "32")].iloc[0]
    assert first["reason"] == "the model has blocks 0 to 5, not 9"
    assert (first["vision_knob"], first["num_active_blocks"], list(first["active_blocks"])) == (
        "longest_edge",
        2,
        [0, 9],
    )
    run.all_done()
    assert len(run.recorder.results()) == 2
    assert run.recorder.failures().empty


def test_a_skip_that_a_later_plan_has_no_longer_is_gone(start: Any) -> None:
    """What could not be run then and can now, or is not asked for any more, must not stand beside its results."""
    start(sweep(knobs="{active_blocks: [6, 7, 8]}"))
    run: Run = start(sweep(knobs="{active_blocks: [6, 8]}"))
    run.all_done()
    rows = stored(run.root, "tasks")
    assert list(rows.loc[rows["status"] == "skipped", "num_active_blocks"]) == [8]
    assert (rows["status"] == "done").sum() == 2
    # Tasks without combinations, such as those that choose blocks, know nothing of skips and leave them.
    Recorder(run.store, sweep(), Plan.of_tasks([])).catch_up()
    assert (stored(run.root, "tasks")["status"] == "skipped").sum() == 1


def test_a_sweep_of_nothing_but_skips_says_why(start: Any) -> None:
    run: Run = start(sweep(knobs="{active_blocks: [7]}"))
    assert run.recorder.todo() == []
    (row,) = stored(run.root, "tasks").to_dict("records")
    assert row["reason"] == "the model has 6 blocks, so active_blocks must be 1 to 6"
    assert (row["accelerator"], row["dataset"], row["num_active_blocks"]) == ("H100", "questions", 7)
    assert run.recorder.results().empty


# -- trouble ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_can_no_longer_be_written_stops_the_run_and_loses_nothing(start: Any) -> None:
    run: Run = start()
    run.done(run.task(Kind.ACCURACY))
    (run.root / "latency").write_text("a file in the way")
    with pytest.raises(StoreError, match="nothing committed is lost"):
        run.done(run.task(Kind.LATENCY))
    (run.root / "latency").unlink()
    after: Run = start()
    assert run.task(Kind.ACCURACY).task_id in after.recorder.done
    assert run.task(Kind.LATENCY) in after.recorder.todo()


def test_recording_warns_of_nothing(start: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run: Run = start(count=1)
        scored = run.task(Kind.ACCURACY)
        run.done(scored, broken=[scored.samples[0].uid])
        run.done(run.task(Kind.LATENCY))
        run.recorder.results()
        run.recorder.failures()
    assert len(run.combinations()) == 1


# -- workers ----------------------------------------------------------------------------------------------------------


def anchor_rows(of: Task, worker: str, calls: Sequence[int], slower: float, total_ms: float = 60.0) -> pa.Table:
    """Pairs of the anchor, ten minutes from call to call; `slower` is how much slower this worker is."""
    assert of.anchor is not None
    of_anchor = {"anchor_id": of.anchor.anchor_id}
    of = replace(of, knobs=of.anchor.knobs)
    rows = []
    for call in calls:
        for pair in range(2):
            wobble = 1 + 0.001 * ((3 * call + pair) % 5 - 2)
            of_row = of_anchor | {"visit": call, "pair": pair, "worker": worker, "session_started_at": STARTED}
            when = {"started_at": STARTED + timedelta(minutes=10 * call)}
            marked = timed_row(of, of.samples[0], pair, total_ms * slower * wobble)
            rows.append(marked | of_row | when | {"marked": True})
            bare = {name: value for name, value in marked.items() if not name.endswith("_ms")}
            rows.append(bare | of_row | when | {"marked": False, "total_ms": marked["total_ms"]})
    return to_table("anchors", rows)


def run_with_a_slow_worker(start: Any) -> Run:
    """Six combinations on three workers of two visits each, one of which is a tenth slower than it seems."""
    run: Run = start(sweep(knobs="{active_blocks: [1, 2, 3, 4, 5, 6]}", latency="{samples: 2, repeats: 2}"))
    timed = [task for task in run.plan.tasks if task.kind is Kind.LATENCY]
    for number, task in enumerate(timed):
        worker, slower = (("h100-0", 1.0), ("h100-1", 1.0), ("h100-2", 1.1))[number % 3]
        about: dict[str, Any] = {"worker": worker, "session_started_at": STARTED}
        about["started_at"] = STARTED + timedelta(minutes=5 * number)
        assert task.anchor is not None
        about["anchor_id"] = task.anchor.anchor_id
        rows = [timed_row(task, ref, task.visit, 60.0 * slower) | about for ref in task.samples]
        result = TaskResult(
            task.task_id,
            Status.DONE,
            to_table("latency", rows),
            anchors=anchor_rows(task, worker, [2 * number, 2 * number + 1], slower),
            started_at=BEGIN + number,
            finished_at=BEGIN + number + 1,
        )
        run.recorder.commit(Outcome(task, result, "H100", attempts=1))
    run.all_done()
    return run


def test_a_slow_worker_is_named_and_what_it_timed_is_corrected_beside_what_it_measured(start: Any) -> None:
    run = run_with_a_slow_worker(start)
    before = run.combinations()
    assert before["total_ms_corrected_p50"].isna().all()
    workers = run.recorder.compare_workers(correct=True)
    total = workers[workers["timing"] == "total_ms"].set_index("worker")
    assert total["findings"].map(list).to_dict() == {"h100-0": [], "h100-1": [], "h100-2": ["slow"]}
    assert total.loc["h100-2", "bias"] == pytest.approx(0.1, abs=0.005)
    after = run.combinations()
    assert sorted(after["total_ms_mean"]) == sorted(before["total_ms_mean"])
    assert after["total_ms_mean"].max() > 62
    assert after["total_ms_corrected_mean"].to_numpy() == pytest.approx(60, rel=0.005)
    kept = stored(run.root, "workers")
    assert len(kept) == len(workers)
    assert set(kept["worker"]) == {"h100-0", "h100-1", "h100-2"}
    assert len(stored(run.root, "anchors")) == 12 * 2 * 2 * 2


def test_what_was_corrected_stays_as_it_is_in_the_next_run(start: Any) -> None:
    run = run_with_a_slow_worker(start)
    run.recorder.compare_workers(correct=True)
    files = written(run.root)
    again: Run = start(sweep(knobs="{active_blocks: [1, 2, 3, 4, 5, 6]}", latency="{samples: 2, repeats: 2}"))
    assert written(run.root) == files, "not even catching up writes anything"
    again.recorder.compare_workers(correct=True)
    assert written(run.root) == files


def test_an_interrupted_run_compares_workers_and_corrects_later(start: Any) -> None:
    run = run_with_a_slow_worker(start)
    assert len(run.recorder.compare_workers(correct=False))
    assert len(stored(run.root, "workers"))
    assert run.combinations()["total_ms_corrected_p50"].isna().all()


def test_without_anchors_there_is_nothing_to_compare(start: Any) -> None:
    run: Run = start()
    run.all_done()
    files = written(run.root)
    assert run.recorder.compare_workers(correct=True).empty
    assert written(run.root) == files


def test_a_task_that_failed_leaves_the_anchors_that_were_timed_before_it(start: Any) -> None:
    run: Run = start()
    task = run.task(Kind.LATENCY)
    failed = TaskResult(task.task_id, Status.FAILED, anchors=anchor_rows(task, "h100-0", [0], 1.0), reason="planted")
    run.recorder.commit(Outcome(task, failed, "H100", attempts=1))
    assert len(stored(run.root, "anchors")) == 4


def test_what_was_not_tried_is_not_tried_again_unless_failures_are(start: Any) -> None:
    run: Run = start()
    task = run.task(Kind.LATENCY)
    skipped = TaskResult(task.task_id, Status.SKIPPED, failure=FailureKind.DOMINATED, reason="not tried: planted")
    run.recorder.commit(Outcome(task, skipped, "H100", attempts=1))
    again: Run = start()
    assert task not in again.recorder.todo()
    assert again.recorder.failures()[["status", "failure"]].values.tolist() == [["skipped", "dominated"]]
    assert task in start(retry_failed=True).recorder.todo()

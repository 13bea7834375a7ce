"""The result folder: whole parts or none, resume by name, what is not to be trusted, and folders it must not touch."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import rows_of, samples, task, timed_row

from orchestrator import store as store_module
from orchestrator.store import (
    STAMPS,
    DamagedParts,
    Part,
    Place,
    ResultStore,
    StoreError,
    read_finished,
    read_table,
    results_folder,
)
from workers.schema import SCHEMA_VERSION, TABLES, arrow_schema, to_table
from workers.tasks import Kind

REPOSITORY = Path(__file__).parents[1]
PLACE = Place("small", "H100", "questions")
PART = "latency/model=small/accelerator=H100/dataset=questions/one.parquet"
ONE_ROW = to_table("latency", [{"sample_id": "a", "total_ms": 1.5, "status": "done"}])
TWO_ROWS = to_table("latency", [{"sample_id": name, "total_ms": 2.5, "status": "done"} for name in "ab"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results" / "example"


@pytest.fixture
def store(root: Path) -> Iterator[ResultStore]:
    opened = ResultStore.open(root, "example")
    yield opened
    opened.close()


def reopened(root: Path) -> ResultStore:
    """As the next run finds the folder, its lock given up again."""
    opened = ResultStore.open(root, "example")
    opened.close()
    return opened


def refused(root: Path, sweep: str = "example") -> str:
    with pytest.raises(StoreError) as refusal:
        ResultStore.open(root, sweep)
    message = str(refusal.value)
    assert "\n" not in message
    return message


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.name.endswith(".tmp")]


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_part_is_read_back_with_its_place_and_its_stamp(root: Path, store: ResultStore) -> None:
    store.commit("latency", PLACE, "one", ONE_ROW, stamp="from these")
    assert (root / PART).is_file()
    for opened in (store, ResultStore(root, -1)):
        assert opened.finished("latency") == {"one"}
        assert opened.stamp("latency", "one") == opened.stamp("latency", "one", PLACE) == "from these"
        rows = opened.rows("latency", ["one", "missing"])
        assert rows[["model", "accelerator", "dataset", "sample_id", "total_ms"]].to_numpy().tolist() == [
            ["small", "H100", "questions", "a", 1.5]
        ]
    assert store.stamp("latency", "missing") is None
    assert store.stamp("latency", "one", Place("small", "A100", "questions")) is None
    assert leftovers(root) == []


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from orchestrator.store import Place, ResultStore
from workers.schema import to_table

def half(table, sink, **_):
    sink.write(b"PAR1 and then the power went")
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)

store = ResultStore.open(Path(sys.argv[1]), "example")
rows = to_table("latency", [{"sample_id": "a", "total_ms": 9.5}])
store.commit("latency", Place("small", "H100", "questions"), "before", rows)
pq.write_table = half
store.commit("latency", Place("small", "H100", "questions"), sys.argv[2], rows)
"""


@pytest.mark.parametrize("name", ["new", "one"])
def test_a_run_that_is_killed_while_it_writes_leaves_what_was_there(root: Path, name: str) -> None:
    store = ResultStore.open(root, "example")
    store.commit("latency", PLACE, "one", ONE_ROW)
    store.close()
    done = run_python(KILLED_WHILE_WRITING, str(root), name)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(leftovers(root)) == 1
    # Invisible to anyone who reads the folder in the meantime.
    assert sorted(pd.read_parquet(root / "latency")["total_ms"]) == [1.5, 9.5]
    assert sorted(read_table(root, "latency")["total_ms"]) == [1.5, 9.5]
    after = reopened(root)
    assert leftovers(root) == []
    assert after.finished("latency") == {"one", "before"}
    assert after.warnings == []


KILLED_WHILE_CREATING = """
import os, signal, sys
from pathlib import Path
from orchestrator.store import ResultStore
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ResultStore.open(Path(sys.argv[1]), "example")
"""


def test_a_run_that_is_killed_while_it_creates_the_folder_does_not_lock_the_next_one_out(root: Path) -> None:
    done = run_python(KILLED_WHILE_CREATING, str(root))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(leftovers(root)) == 1
    assert reopened(root).finished("latency") == set()
    assert leftovers(root) == []
    assert (root / "sweep.json").is_file()


def test_a_part_of_the_same_name_replaces_the_earlier_one(root: Path, store: ResultStore) -> None:
    store.commit("latency", PLACE, "one", ONE_ROW)
    store.commit("latency", PLACE, "one", TWO_ROWS)
    for opened in (store, ResultStore(root, -1)):
        assert opened.rows("latency", ["one"])["total_ms"].tolist() == [2.5, 2.5]


def test_a_retry_on_another_kind_of_device_replaces_the_earlier_part_too(root: Path, store: ResultStore) -> None:
    failed, done = (to_table("tasks", [{"task_id": "t", "status": status}]) for status in ("failed", "done"))
    store.commit("tasks", PLACE, "t", failed, stamp="failed")
    store.commit("tasks", Place("small", "A100", "questions"), "t", done, stamp="done")
    assert store.rows("tasks", ["t"])[["accelerator", "status"]].to_numpy().tolist() == [["A100", "done"]]
    assert pd.read_parquet(root / "tasks")["status"].tolist() == ["done"]
    assert store.stamp("tasks", "t") == "done"


def test_a_combination_has_a_row_on_every_kind_of_device(root: Path, store: ResultStore) -> None:
    for accelerator in ("H100", "A100"):
        rows = to_table("combinations", [{"combination_id": "c", "total_ms_mean": 1.0}])
        store.commit("combinations", Place("small", accelerator, "questions"), "c", rows, stamp=accelerator)
    assert sorted(store.rows("combinations", ["c"])["accelerator"]) == ["A100", "H100"]
    assert sorted(ResultStore(root, -1).rows("combinations", ["c"])["accelerator"]) == ["A100", "H100"]
    assert store.stamp("combinations", "c", Place("small", "A100", "questions")) == "A100"


def test_of_two_copies_of_a_part_the_newer_one_counts(root: Path) -> None:
    """A run that dies between writing a retried part and removing the earlier one leaves both."""
    store = ResultStore.open(root, "example")
    store.commit("latency", PLACE, "one", ONE_ROW)
    old = root / PART
    copy = old.read_bytes()
    store.commit("latency", Place("small", "A100", "questions"), "one", TWO_ROWS)
    store.close()
    old.write_bytes(copy)
    os.utime(old, (1, 1))
    after = reopened(root)
    assert after.rows("latency", ["one"])["total_ms"].tolist() == [2.5, 2.5]
    assert [str(old) in warning and "is an earlier copy of" in warning for warning in after.warnings] == [True]
    assert not old.exists()


def test_parts_that_are_written_together_are_flushed_then_renamed_in_order_then_their_folders_flushed(
    root: Path, store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit("tasks", PLACE, "before", to_table("tasks", [{"task_id": "before"}]))
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(number: int) -> None:
        seen.append("flush " + Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        seen.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    one_row = to_table("tasks", [{"task_id": "t"}])
    store.commit_all(
        [
            Part("latency", PLACE, "a", ONE_ROW),
            Part("tasks", PLACE, "a", one_row, "done"),
            Part("latency", PLACE, "b", TWO_ROWS),
        ]
    )
    temporary = f".{os.getpid()}.tmp"
    assert sorted(seen[:3]) == sorted(f"flush .{name}.parquet{temporary}" for name in ("a", "a", "b"))
    assert seen[3:6] == ["rename a.parquet", "rename a.parquet", "rename b.parquet"]
    assert seen[6:] == ["flush dataset=questions"] * 2
    assert store.finished("latency") == {"a", "b"}
    assert store.stamp("tasks", "a") == "done"
    assert len(store.rows("latency", ["a", "b"])) == 3


def test_of_parts_that_are_written_together_none_is_there_if_one_cannot_be_written(root: Path) -> None:
    store = ResultStore.open(root, "example")
    (root / "tasks").write_text("a file in the way")
    parts = [Part("latency", PLACE, "a", ONE_ROW), Part("tasks", PLACE, "a", to_table("tasks", [{"task_id": "a"}]))]
    with pytest.raises(StoreError, match="cannot be written"):
        store.commit_all(parts)
    assert leftovers(root) == []
    store.close()
    assert reopened(root).finished("latency") == set()


def test_of_two_parts_of_one_name_that_are_written_together_the_later_one_counts(
    root: Path, store: ResultStore
) -> None:
    store.commit_all([Part("latency", PLACE, "one", ONE_ROW), Part("latency", PLACE, "one", TWO_ROWS)])
    assert store.rows("latency", ["one"])["total_ms"].tolist() == [2.5, 2.5]
    store.commit_all([])


# -- the file of stamps -----------------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts count as settled as soon as they are written."""
    monkeypatch.setattr(store_module, "SETTLED_SECONDS", -1.0)


def two_parts(root: Path) -> None:
    store = ResultStore.open(root, "example")
    store.commit("latency", PLACE, "one", ONE_ROW, stamp="größe\n1")
    store.commit("latency", PLACE, "two", TWO_ROWS, stamp="2")
    store.close()


def ends_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts whose ends are read from now on."""
    names: list[str] = []
    read = pq.read_metadata

    def watched(path: Path) -> Any:
        names.append(path.stem)
        return read(path)

    monkeypatch.setattr(pq, "read_metadata", watched)
    return names


def test_a_folder_is_opened_again_without_a_look_into_its_parts(
    root: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_parts(root)
    read = ends_read(monkeypatch)
    after = reopened(root)
    assert after.finished("latency") == {"one", "two"}
    assert [after.stamp("latency", name) for name in ("one", "two")] == ["größe\n1", "2"]
    assert read_finished(root, ["one", "two", "three"]) == ({"one", "two"}, set())
    assert read == []


def test_without_that_file_the_parts_are_read_once_and_it_is_made_anew(
    root: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_parts(root)
    (root / STAMPS).unlink()
    read = ends_read(monkeypatch)
    assert read_finished(root, ["one", "two"]) == ({"one", "two"}, set())
    assert not (root / STAMPS).exists(), "who only reads writes nothing"
    read.clear()
    opened = ResultStore.open(root, "example")
    assert opened.stamp("latency", "one") == "größe\n1"
    opened.close()
    assert read == ["one", "two"]
    assert reopened(root).stamp("latency", "two") == "2"
    assert read == ["one", "two"]


@pytest.mark.parametrize("damage", ["same size", "other size", "same time"])
def test_what_was_changed_since_is_looked_at_whatever_that_file_says(root: Path, settled: None, damage: str) -> None:
    two_parts(root)
    part = root / PART
    whole, found = part.read_bytes(), part.stat()
    part.write_bytes(bytes(len(whole)) if damage == "same size" else whole[:-1])
    os.utime(part, ns=(found.st_atime_ns, found.st_mtime_ns + (0 if damage == "same time" else 1)))
    after = reopened(root)
    assert after.finished("latency") == {"two"}
    assert len(after.warnings) == 1


def test_what_was_written_a_moment_ago_is_not_in_that_file_yet(root: Path) -> None:
    """It could be changed once more without a new time of change."""
    two_parts(root)
    assert not (root / STAMPS).exists()
    for path in (root / "latency").rglob("*.parquet"):
        os.utime(path, (1, 1))
    opened = ResultStore.open(root, "example")
    opened.finished("latency")
    opened.close()
    assert len((root / STAMPS).read_text().strip().splitlines()) == 2


def test_parts_that_are_gone_are_gone_whatever_that_file_says(root: Path, settled: None) -> None:
    two_parts(root)
    (root / PART).unlink()
    assert reopened(root).finished("latency") == {"two"}
    assert read_finished(root, ["one", "two"])[0] == {"two"}


@pytest.mark.parametrize("content", ["", "\x00", "{}", "[1]\n[1, 2, 3, 4, 5]\nnull", '["latency", "one", 1, 2, "x'])
def test_whatever_that_file_holds_does_no_harm(root: Path, settled: None, content: str) -> None:
    two_parts(root)
    (root / STAMPS).write_text(content)
    opened = ResultStore.open(root, "example")
    assert [opened.stamp("latency", name) for name in ("one", "two")] == ["größe\n1", "2"]
    opened.close()
    assert reopened(root).stamp("latency", "one") == "größe\n1"
    (root / STAMPS).unlink()
    (root / STAMPS).mkdir()
    assert reopened(root).stamp("latency", "one") == "größe\n1"


def test_that_file_does_not_grow_with_every_part_that_is_replaced(
    root: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_parts(root)
    lines = (root / STAMPS).read_text()
    (root / STAMPS).write_text(lines * 600)
    opened = ResultStore.open(root, "example")
    assert opened.stamp("latency", "one") == "größe\n1"
    opened.close()
    assert len((root / STAMPS).read_text().strip().splitlines()) == 2
    assert reopened(root).stamp("latency", "two") == "2"


def test_a_part_of_an_earlier_release_lacks_columns_and_is_read_with_nulls(root: Path, store: ResultStore) -> None:
    rows = ONE_ROW.drop_columns(["total_ms", "flops"])
    store.commit("latency", PLACE, "old", rows)
    store.commit("latency", PLACE, "new", TWO_ROWS)
    found = store.rows("latency", ["old", "new"])
    assert found.columns.tolist() == ["model", "accelerator", "dataset", *arrow_schema("latency").names]
    assert found["total_ms"].tolist()[1:] == [2.5, 2.5]
    assert pd.isna(found["total_ms"][0])
    assert store.rows("latency", ["old"], ["sample_id", "flops"])["sample_id"].tolist() == ["a"]


# -- what is not to be trusted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "one byte short", "empty", "zeros", "text", "foreign", "renamed"])
def test_what_cannot_be_trusted_is_set_aside_with_a_warning_and_is_missing(root: Path, damage: str) -> None:
    store = ResultStore.open(root, "example")
    store.commit("latency", PLACE, "one", ONE_ROW)
    store.commit("latency", PLACE, "two", TWO_ROWS)
    store.close()
    part = root / PART
    whole = part.read_bytes()
    if damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), part)
    elif damage == "renamed":
        part = part.rename(part.with_name("three.parquet"))
    else:
        content = {
            "truncated": whole[: len(whole) // 2],
            "one byte short": whole[:-1],
            "empty": b"",
            "zeros": bytes(len(whole)),
            "text": b"not Parquet at all, but long enough to look for a footer",
        }
        part.write_bytes(content[damage])
    assert read_finished(root, ["one", "two", "three"])[0] == {"two"}
    after = reopened(root)
    assert after.finished("latency") == {"two"}
    assert after.rows("latency", ["one", "two", "three"])["total_ms"].tolist() == [2.5, 2.5]
    aside = root / "set-aside" / part.relative_to(root)
    assert aside.is_file()
    assert not part.exists()
    why = "was not written by a sweep under this name" if damage in ("foreign", "renamed") else "is damaged ("
    (warning,) = after.warnings
    assert warning.startswith(f"{part} {why}")
    assert warning.endswith(f"what it held is made again (moved to {aside})")
    assert "\n" not in warning
    # Nobody who reads the folder with other tools meets it either.
    assert pd.read_parquet(root / "latency")["total_ms"].tolist() == [2.5, 2.5]
    assert reopened(root).warnings == []


def long_part(root: Path, table: str = "latency") -> bytearray:
    """Commits a part of one long column, so that most of the file is data, and gives its content."""
    store = ResultStore.open(root, "example")
    name = {"latency": "sample_id", "tasks": "task_id"}[table]
    store.commit(table, PLACE, "one", to_table(table, [{name: f"sample {i * 7919 % 10007}"} for i in range(2000)]))
    store.commit(table, PLACE, "two", to_table(table, [{name: "a", "status": "failed"}]))
    store.close()
    return bytearray((root / PART.replace("latency", table)).read_bytes())


def test_damage_that_only_shows_when_the_rows_are_read_is_set_aside_then(root: Path) -> None:
    content = long_part(root)
    content[10:4000] = b"\xff" * 3990
    part = root / PART
    part.write_bytes(content)
    with pytest.raises(StoreError, match=r"one\.parquet is damaged \(.*\); remove it and run the sweep again") as e:
        read_table(root, "latency")
    assert "\n" not in str(e.value)
    assert part.exists()  # whoever only reads moves nothing
    after = reopened(root)
    assert after.finished("latency") == {"one", "two"}
    with pytest.raises(DamagedParts) as damage:
        after.rows("latency", ["two", "one"])
    assert damage.value.names == {"one"}
    aside = root / "set-aside" / part.relative_to(root)
    assert aside.read_bytes() == content
    assert not part.exists()
    (warning,) = after.warnings
    assert warning.startswith(f"{part} is damaged (")
    assert warning.endswith(f"; the same command makes again what it held (moved to {aside})")
    assert "\n" not in warning
    # Asked again, it gives what is left.
    assert after.finished("latency") == {"two"}
    assert after.rows("latency", ["two", "one"])["sample_id"].tolist() == ["a"]
    assert reopened(root).warnings == []


def test_a_single_bit_that_flipped_is_never_read_as_another_number(root: Path) -> None:
    store = ResultStore.open(root, "example")
    timed = task(Kind.LATENCY, samples=samples(20))
    store.commit("latency", PLACE, "one", rows_of(timed, 60))
    truth = store.rows("latency", ["one"])
    store.close()
    part = root / PART
    whole = part.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    generator = random.Random(0)
    noticed = 0
    for _ in range(100):
        content = bytearray(whole)
        content[generator.randrange(4, len(whole) - footer)] ^= 1 << generator.randrange(8)
        part.write_bytes(content)
        opened = reopened(root)
        try:
            pd.testing.assert_frame_equal(opened.rows("latency", ["one"]), truth)  # the bit meant nothing
        except DamagedParts:
            noticed += 1
    assert noticed > 50


def test_a_part_that_the_system_does_not_hand_over_is_not_taken_for_damaged(root: Path) -> None:
    long_part(root)
    opened = reopened(root)
    assert opened.finished("latency") == {"one", "two"}
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(StoreError) as unreadable:
            opened.rows("latency", ["one"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    why = "cannot be read (Too many open files); see to it and run the sweep again"
    assert str(unreadable.value) == f"{root / PART}: {why}"
    (root / PART).unlink()
    with pytest.raises(StoreError) as gone:
        opened.rows("latency", ["one"])
    assert str(gone.value) == f"{root / PART}: was removed while it was needed; run the sweep again"
    assert not isinstance(unreadable.value, DamagedParts)
    assert not isinstance(gone.value, DamagedParts)
    assert opened.finished("latency") == {"one", "two"}
    assert opened.warnings == []


def test_some_columns_alone_can_be_read(root: Path, store: ResultStore) -> None:
    store.commit("latency", PLACE, "one", ONE_ROW)
    for names in (["one"], []):
        rows = store.rows("latency", names, ["sample_id", "status"])
        assert rows.columns.tolist() == ["model", "accelerator", "dataset", "sample_id", "status"]
        assert len(rows) == len(names)


def test_a_dry_run_takes_a_damaged_row_of_a_task_for_none(root: Path) -> None:
    content = long_part(root, "tasks")
    content[10:4000] = b"\xff" * 3990
    (root / PART.replace("latency", "tasks")).write_bytes(content)
    assert read_finished(root, ["one", "two"]) == (set(), {"two"})


def test_a_dry_run_sees_what_is_done_and_what_failed_and_changes_nothing(root: Path) -> None:
    store = ResultStore.open(root, "example")
    store.commit("latency", PLACE, "a", ONE_ROW)
    store.commit("accuracy", PLACE, "b", to_table("accuracy", [{"sample_id": "a"}]))
    for name, status in (("a", "done"), ("b", "failed"), ("c", "failed"), ("d", "failed"), ("e", "failed")):
        store.commit("tasks", PLACE, name, to_table("tasks", [{"task_id": name, "status": status}]))
    store.close()
    (root / "tasks" / PLACE.folder() / "e.parquet").write_bytes(b"damaged")
    before = sorted(root.rglob("*"))
    # b failed once and was done later; d is of another plan; e cannot be read.
    assert read_finished(root, ["a", "b", "c", "e", "f"]) == ({"a", "b"}, {"c"})
    assert sorted(root.rglob("*")) == before
    assert read_finished(root / "nowhere", ["a"]) == (set(), set())


# -- readable by anyone -----------------------------------------------------------------------------------------------

NAMES = ["org/model", "a b", "größe-模型", "a=b", "50%", "007", "..", "dots.and-dashes_1", "a?b*c#d&e"]


def test_names_come_back_as_they_were_through_plain_pandas(root: Path, store: ResultStore) -> None:
    for name in NAMES:
        rows = to_table("combinations", [{"combination_id": "c", "vision_value": name}])
        store.commit("combinations", Place(name, "H100", f"data {name}"), "c", rows)
    plain = pd.read_parquet(root / "combinations").astype(str)
    assert sorted(plain["model"]) == sorted(NAMES)
    assert plain["model"].tolist() == plain["vision_value"].tolist()
    assert plain["dataset"].tolist() == [f"data {name}" for name in plain["model"]]
    ours = read_table(root, "combinations")
    assert ours["model"].tolist() == ours["vision_value"].tolist()
    assert ours["dataset"].tolist() == [f"data {name}" for name in ours["model"]]
    assert not list(root.parent.glob("*.parquet"))


def test_a_name_of_digits_alone_stays_text_for_our_own_readers(root: Path, store: ResultStore) -> None:
    """Plain pandas takes a column of nothing but such names for numbers, which is why a sweep may not use them."""
    store.commit("combinations", Place("007", "H100", "2017"), "c", to_table("combinations", [{"combination_id": "c"}]))
    assert read_table(root, "combinations")[["model", "dataset"]].to_numpy().tolist() == [["007", "2017"]]


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_has_its_columns(root: Path, store: ResultStore, table: str) -> None:
    for rows in (store.rows(table, []), read_table(root, table)):
        assert len(rows) == 0
        assert rows.columns.tolist() == ["model", "accelerator", "dataset", *arrow_schema(table).names]


def test_columns_keep_type_unit_and_meaning_through_parquet(root: Path, store: ResultStore) -> None:
    timed = task(Kind.LATENCY, samples=samples(2))
    store.commit("latency", PLACE, timed.task_id, rows_of(timed, 60))
    (part,) = (root / "latency").rglob("*.parquet")
    schema = pq.read_schema(part)
    assert schema.equals(arrow_schema("latency"))
    assert schema.field("total_ms").metadata[b"unit"] == b"ms"
    assert schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
    row = store.rows("latency", [timed.task_id]).iloc[0]
    expected = timed_row(timed, timed.samples[0], 0, 60)
    assert row["decode_step_ms"].tolist() == expected["decode_step_ms"]
    assert row["active_blocks"].tolist() == [0, 1, 2, 3]
    assert row["started_at"] == expected["started_at"]


# -- folders it must not touch ----------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert refused(tmp_path) == (
        f"{tmp_path}: is not a result folder of this tool (no sweep.json; it holds thesis.tex); "
        "choose another with --results"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_a_folder_of_another_sweep_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert refused(file) == f"{file}: is a file, not a folder; choose another with --results"
    root = tmp_path / "example"
    reopened(root)
    assert refused(root, "other") == f"{root}: belongs to sweep 'example', not 'other'; choose another folder"
    marker = root / "sweep.json"
    content = json.loads(marker.read_text())
    assert content == {"format": "vlm-knobs results", "sweep": "example", "schema_version": SCHEMA_VERSION}
    marker.write_text(json.dumps(content | {"schema_version": 99}))
    assert refused(root) == (
        f"{root}: holds results of schema version 99, this release writes {SCHEMA_VERSION}; "
        "choose another folder with --results"
    )
    marker.write_text(json.dumps(content | {"format": "something"}))
    assert refused(root) == f"{root}: is not a result folder of this tool (sweep.json says 'something')"
    for broken in ("{", "[]", "null", "\x00"):
        marker.write_text(broken)
        assert refused(root) == f"{marker}: cannot be read; restore it or choose another folder with --results"


@pytest.mark.parametrize("below", ["a regular file", "a folder that nothing can be made in", "a name too long"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    places = {
        "a regular file": (tmp_path / "file" / "results", "Not a directory"),
        "a folder that nothing can be made in": (Path("/proc/results"), "No such file or directory"),
        "a name too long": (tmp_path / ("x" * 300), "File name too long"),
    }
    root, why = places[below]
    assert refused(root) == f"{root}: cannot be written ({why}); choose another with --results"


def test_one_run_writes_at_a_time_even_from_another_process(root: Path) -> None:
    store = ResultStore.open(root, "example")
    message = f"{root}: another run is writing here; wait for it or choose another folder"
    assert refused(root) == message
    code = "import sys; from pathlib import Path; from orchestrator.store import ResultStore as R\n"
    other = run_python(code + "R.open(Path(sys.argv[1]), 'example')", str(root))
    assert other.stderr.splitlines()[-1].endswith(message)
    store.close()
    assert reopened(root).finished("latency") == set()


def test_a_killed_run_leaves_no_lock_behind(root: Path) -> None:
    done = run_python(KILLED_WHILE_WRITING, str(root), "new")
    assert done.returncode == -signal.SIGKILL
    assert reopened(root).finished("latency") == {"before"}


# -- a full disk ------------------------------------------------------------------------------------------------------


def big_rows(count: int) -> pa.Table:
    return to_table("latency", [{"sample_id": f"{i * 2654435761 % 2**32:032x}"} for i in range(count)])


def check_full(root: Path, store: ResultStore, why: str, remedy: str) -> None:
    store.commit("latency", PLACE, "small", ONE_ROW)
    with pytest.raises(StoreError) as error:
        store.commit("latency", PLACE, "big", big_rows(20_000))
    folder = root / "latency" / PLACE.folder()
    assert str(error.value) == f"{folder}: cannot be written ({why}); nothing committed is lost; {remedy}"
    assert leftovers(root) == []
    assert store.finished("latency") == {"small"}
    store.close()
    assert reopened(root).rows("latency", ["small", "big"])["total_ms"].tolist() == [1.5]


def test_a_file_that_grows_too_large_leaves_what_was_committed(root: Path) -> None:
    store = ResultStore.open(root, "example")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        check_full(root, store, "File too large", "choose another folder with --results")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


FULL_DISK = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_store import ONE_ROW, PLACE, Place, ResultStore, StoreError, check_full
root = Path(sys.argv[1])
mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=20", "tmpfs", root], capture_output=True)
if mounted.returncode:
    sys.exit(77)
remedy = "free some space or choose another folder with --results"
check_full(root / "example", ResultStore.open(root / "example", "example"), "No space left on device", remedy)
# No room for another folder either.
store = ResultStore.open(root / "example", "example")
try:
    for i in range(20):
        store.commit("latency", Place(f"model {i}", "H100", "questions"), f"part {i}", ONE_ROW)
except StoreError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_committed(tmp_path: Path) -> None:
    """On a real small disk, mounted where only this process sees it; systems that forbid it have the test above."""
    command = ["unshare", "--mount", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    forbidden = done.returncode == 77 or "unshare" in done.stderr
    assert forbidden or done.returncode == 0, done.stderr
    if not forbidden:
        assert done.stdout.strip().endswith(
            "cannot be written (No space left on device); nothing committed is lost; "
            "free some space or choose another folder with --results"
        )
        assert len(done.stdout.splitlines()) == 1
        assert not (tmp_path / "example").exists()  # it was another disk


# -- where results go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "root", "in_job", "variable", "expected"),
    [
        ("results/", None, False, None, "here/results/example"),
        ("results/", "elsewhere", False, None, "here/elsewhere/results/example"),
        ("results/", "~/elsewhere", False, None, "home/elsewhere/results/example"),
        ("results/", None, False, "/variable", "here/results/example"),
        ("~/results", None, False, None, "home/results/example"),
        ("/absolute", None, False, None, "/absolute/example"),
        ("/absolute", "/root", True, "/variable", "/absolute/example"),
        # Inside a job the current folder is thrown away afterwards: nothing may end up below it.
        ("results/", "/root", True, "/variable", "/root/results/example"),
        ("results/", None, True, "/variable", "/variable/results/example"),
        ("results/", None, True, "~/variable", "home/variable/results/example"),
        ("results/", None, True, None, "home/results/example"),
        ("results/", None, True, "", "home/results/example"),
        ("results/", "relative", True, None, "home/relative/results/example"),
        ("results/", None, True, "relative", "home/relative/results/example"),
        ("~/results", "/root", True, None, "home/results/example"),
    ],
)
def test_where_results_go(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: str,
    root: str | None,
    in_job: bool,
    variable: str | None,
    expected: str,
) -> None:
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if variable is None:
        monkeypatch.delenv("SWEEP_RESULTS_ROOT", raising=False)
    else:
        monkeypatch.setenv("SWEEP_RESULTS_ROOT", variable)
    assert results_folder(results, "example", root=root, in_job=in_job) == tmp_path / expected


def test_an_object_store_is_refused_rather_than_taken_for_a_folder() -> None:
    with pytest.raises(StoreError, match=r"^s3://bucket/x: only local folders are available yet; choose another with"):
        results_folder("s3://bucket/x", "demo", root=None, in_job=False)

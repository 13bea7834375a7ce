"""The result folder: one atomic part file per task, resume from what is there, a row per combination.

results/<sweep>/
    sweep.json                                             what this folder is: name and versions
    run.json                                               the last run: its tasks, and where it is driven from
    latency|accuracy|importance/model=/accelerator=/dataset=/<task_id>.parquet
    combinations/model=/accelerator=/dataset=/<combination_id>.parquet
    anchors/model=/accelerator=/dataset=/...parquet        timings of the anchor before and after an attempt of a task
    workers/model=/accelerator=/dataset=/...parquet        what the anchors say of each worker
    environments/...parquet                                what workers ran in
    tasks/model=/accelerator=/dataset=/<task_id>.parquet   how each task ended
    set-aside/                                             files that could not be trusted
    .stamps.jsonl                                          what the ends of parts say, for a fast start; can be removed

A task is done when its part file, named by its id, has been renamed into place; a reader never sees half a file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workers.schema import PARTITIONS, SCHEMA_VERSION, TABLES, arrow_schema
from workers.tasks import Kind

T = TypeVar("T")

# What a results folder is resolved against inside a Ray job, whose own folder is a throw-away copy.
ROOT_VARIABLE = "SWEEP_RESULTS_ROOT"

FORMAT = "vlm-knobs results"
MARKER = "sweep.json"
RUN = "run.json"
SET_ASIDE = "set-aside"
STAMPS = ".stamps.jsonl"

# A file that was changed this recently may change once more without a new time: clocks of file systems are that coarse.
SETTLED_SECONDS = 2.0
# A run keeps the lock, a reader that asks whether there is one has it for some microseconds.
LOCK_SECONDS = 0.5
# Lines that are added to the file of stamps together.
STAMPS_AT_ONCE = 256
# Up to so many rows the columns of a part are written plainly.
FEW_ROWS = 64
# Flushes under way at a time. The disk takes many at once in little more than the time of one.
FLUSHES = 8

# The one table whose parts bear the same name in several places: a combination has a row per kind of device. In every
# other table a name has one part, wherever it was measured.
PART_PER_PLACE = "combinations"


def results_folder(results: str, sweep: str, *, root: str | None, in_job: bool) -> Path:
    """The absolute folder of a sweep's results.

    Args:
        results: folder as the sweep or the command line has it.
        root: --results-root; what a relative folder is resolved against, by default the current folder.
        in_job: whether this is the entry point of a Ray job.

    Inside a job the current folder is a copy that Ray throws away, so a relative folder is resolved against `root`,
    else the variable SWEEP_RESULTS_ROOT, else the home folder of the head; a root that is relative itself is resolved
    against the home folder.

    Raises:
        StoreError: an address of something else than a folder.
    """
    if "://" in results:
        raise StoreError(f"{results}: only local folders are available yet; choose another with --results")
    start = Path.home() if in_job else Path.cwd()
    named = root or (os.environ.get(ROOT_VARIABLE) if in_job else None)
    base = start / Path(named or "").expanduser()
    return base / Path(results).expanduser() / sweep


class StoreError(Exception):
    """A result folder that cannot be used; one line with the place and the remedy."""


class DamagedParts(StoreError):
    """Parts turned out to be damaged when they were read; they are set aside, and `names` are missing from now on."""

    def __init__(self, message: str, names: set[str]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Place:
    """The partition of a row."""

    model: str
    accelerator: str
    dataset: str

    def folder(self) -> Path:
        # Percent-encoding is how Arrow reads values with a slash in them back.
        values = (self.model, self.accelerator, self.dataset)
        return Path(*(f"{c.name}={quote(v, safe='')}" for c, v in zip(PARTITIONS, values, strict=True)))


@dataclass(frozen=True)
class Part:
    """Rows to commit.

    Attributes:
        place: the partition; None for a table that has none.
        name: of the part in its table.
        stamp: kept with the part and given back by `stamp`: how a task ended, or what a row was made from.
    """

    table: str
    place: Place | None
    name: str
    rows: pa.Table
    stamp: str = ""


class ResultStore:
    """The only writer of a result folder, for as long as it is open."""

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self._lock = lock
        # By table and name of the part: the folders that it is in, and its stamp in each.
        self._indexes: dict[str, dict[str, dict[Path, str]]] = {}
        self._folders: dict[tuple[str, Place | None], Path] = {}
        self._stamps = _Stamps(root)
        self.warnings: list[str] = []

    @classmethod
    def open(cls, root: Path, sweep: str) -> ResultStore:
        """Open or create the folder of a sweep and take its lock.

        Raises:
            StoreError: the folder is something else, cannot be written, or another run is writing to it.
        """
        try:
            _check_is_ours(root, sweep)
            root.mkdir(parents=True, exist_ok=True)
            lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"{root}: cannot be written ({error.strerror}); choose another with --results") from None
        if not _taken(lock):
            os.close(lock)
            raise StoreError(f"{root}: another run is writing here; wait for it or choose another folder")
        store = cls(root, lock)
        try:
            store._sweep_leftovers()
            store._stamps.open_for_writing()
            if not (root / MARKER).exists():
                content = {"format": FORMAT, "sweep": sweep, "schema_version": SCHEMA_VERSION}
                _replace({root / MARKER: partial(_json, content)})
        except StoreError:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give up the lock."""
        self._stamps.close()
        os.close(self._lock)

    # -- writing ----------------------------------------------------------------------------------------------------

    def commit(self, table: str, place: Place | None, name: str, rows: pa.Table, stamp: str = "") -> None:
        """Write one part, see `commit_all`."""
        self.commit_all([Part(table, place, name, rows, stamp)])

    def commit_all(self, parts: Iterable[Part]) -> None:
        """Write parts, each whole or not at all, and in their order; all are on disk when this returns.

        Several at once cost the disk little more than one. An earlier part of the same name is replaced, wherever it
        is, because a retry may land on another kind of device; only `combinations` keeps one per place.

        Raises:
            StoreError: the folder cannot be written; what was committed before stays.
        """
        of_path = {self._path(part.table, part.place, part.name): part for part in parts}
        indexes = {part.table: self._index(part.table) for part in of_path.values()}
        contents = {path: partial(_parquet, part) for path, part in of_path.items()}
        for path, state in _replace(contents).items():
            part, folder = of_path[path], path.parent
            folders = indexes[part.table].setdefault(part.name, {})
            if part.table != PART_PER_PLACE:
                for earlier in folders.keys() - {folder}:
                    (earlier / path.name).unlink(missing_ok=True)
                    del folders[earlier]
            folders[folder] = part.stamp
            self._stamps.add(_File(folder, part.name, state), part.stamp)
        self._stamps.write()

    def note_run(self, content: Mapping[str, Any]) -> None:
        """Write what the present run is; readers find it with `read_run`.

        Raises:
            StoreError: the folder cannot be written.
        """
        _replace({self.root / RUN: partial(_json, content)})

    def discard(self, table: str, name: str) -> None:
        """Remove a part wherever it is; nothing happens if there is none.

        Raises:
            StoreError: it cannot be removed.
        """
        for folder in self._index(table).pop(name, {}):
            path = folder / f"{name}.parquet"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"{path}: cannot be removed ({_cause(error)})") from None

    # -- reading ----------------------------------------------------------------------------------------------------

    def finished(self, table: str) -> set[str]:
        """Names of the parts of a table that are whole; a damaged or foreign file is set aside and is missing."""
        return {name for name, parts in self._index(table).items() if parts}

    def stamp(self, table: str, name: str, place: Place | None = None) -> str | None:
        """The stamp of a part, or None if there is no such part; `place` is needed where a name has several."""
        parts = self._index(table).get(name, {})
        return next(iter(parts.values()), None) if place is None else parts.get(self._folder(table, place))

    def rows(self, table: str, names: Iterable[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of some parts, wherever they are, with the partition columns; missing parts are left out.

        Args:
            columns: of the rows; all by default.

        Raises:
            DamagedParts: some parts are damaged before their end, which is all that is read to find them. They are set
                aside; asked again, the others are given.
            StoreError: a part is there and cannot be read.
        """
        index = self._index(table)
        parts: list[pa.Table] = []
        damaged: set[str] = set()
        for name in names:
            for folder in list(index.get(name, {})):
                path = folder / f"{name}.parquet"
                try:
                    parts.append(_part(path, table, columns))
                except _Untrusted as error:
                    self._set_aside(path, f"{error}; the same command makes again what it held")
                    del index[name][folder]
                    damaged.add(name)
        if damaged:
            raise DamagedParts(f"{len(damaged)} parts of {self.root / table} are damaged; see the warnings", damaged)
        return _frame(parts, table, columns)

    # -- files ------------------------------------------------------------------------------------------------------

    def _folder(self, table: str, place: Place | None) -> Path:
        key = table, place
        if key not in self._folders:
            self._folders[key] = self.root / table / (place.folder() if place else "")
        return self._folders[key]

    def _path(self, table: str, place: Place | None, name: str) -> Path:
        return self._folder(table, place) / f"{name}.parquet"

    def _index(self, table: str) -> dict[str, dict[Path, str]]:
        """Parts by name, with their stamps; read from the folder once, then kept up by `commit_all`."""
        if table not in self._indexes:
            index: dict[str, dict[Path, str]] = {}
            for file in _files(self.root, table):
                try:
                    stamp = self._stamps.of(file)
                except _Untrusted as error:
                    self._set_aside(file.path, f"{error}; what it held is made again")
                    continue
                index.setdefault(file.name, {})[file.folder] = stamp
            self._stamps.write()
            if table != PART_PER_PLACE:
                self._keep_newest(index)
            self._indexes[table] = index
        return self._indexes[table]

    def _keep_newest(self, index: dict[str, dict[Path, str]]) -> None:
        """A run that died between writing a retried part and removing the earlier one left both."""
        for name, parts in index.items():
            if len(parts) > 1:
                paths = [folder / f"{name}.parquet" for folder in parts]
                newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
                for path in paths:
                    if path != newest:
                        self._set_aside(path, f"is an earlier copy of {newest}")
                        del parts[path.parent]

    def _set_aside(self, path: Path, why: str) -> None:
        target = self.root / SET_ASIDE / path.relative_to(self.root)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        except OSError as error:
            raise StoreError(f"{path} {why}, but it cannot be moved away ({_cause(error)}); remove it") from None
        self.warnings.append(f"{path} {why} (moved to {target})")

    def _sweep_leftovers(self) -> None:
        """Remove half-written files of a run that was killed; only the holder of the lock writes, so none is in use."""
        for folder in (self.root, *(self.root / table for table in TABLES)):
            for entry in _entries(folder, below=folder != self.root):
                if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                    Path(entry.path).unlink(missing_ok=True)


class _Untrusted(Exception):
    """A file in a table that is no part of it; says why."""


class _File(NamedTuple):
    """A file that may be a part: `name` without its ending; `state` is its size and when it was changed."""

    folder: Path
    name: str
    state: tuple[int, int]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.parquet"


class _Stamps:
    """The stamps of parts, with one file that says them all.

    To read a stamp is to read the end of a part, a third of a millisecond; a folder of hundred thousand parts would
    take minutes to start in. The file is nothing but a saving: a line in it counts for a part of the very size and time
    of change that it names, and any other part is read itself. It holds no line of a part that changed a moment ago,
    which could change once more without a new time.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / STAMPS
        self._keys: dict[Path, str] = {}
        self._known: dict[str, dict[str, tuple[int, int, str]]] | None = None
        self._waiting: deque[tuple[_File, str]] = deque()
        self._writable = False

    def open_for_writing(self) -> None:
        """From now on new stamps are added to the file."""
        self._writable = True

    def close(self) -> None:
        """No more."""
        self.write(few=True)
        self._writable = False

    def of(self, file: _File) -> str:
        """The stamp of a part.

        Raises:
            _Untrusted: it is damaged, or the store did not write it as such.
        """
        if self._known is None:
            self._known = self._read()
        *state, stamp = self._known.get(self._key(file), {}).pop(file.name, (None, None, ""))
        if tuple(state) != file.state:
            stamp = _stamp(file.path)
            self.add(file, stamp)
        return stamp

    def add(self, file: _File, stamp: str) -> None:
        """Note the stamp of a part as it is now."""
        if self._writable:
            self._waiting.append((file, stamp))

    def write(self, *, few: bool = False) -> None:
        """Add the lines that wait, as soon as they are worth it or if `few` will do; nothing is lost if it fails."""
        if not self._writable or len(self._waiting) < (1 if few else STAMPS_AT_ONCE):
            return
        settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        lines = []
        while self._waiting and self._waiting[0][0].state[1] < settled:
            file, stamp = self._waiting.popleft()
            lines.append(json.dumps([self._key(file), file.name, *file.state, stamp]) + "\n")
        if lines:
            # What was cut off by a full disk or a death ends with the line break in front.
            with suppress(OSError), self._path.open("a") as out:
                out.write("\n" + "".join(lines))

    def _read(self) -> dict[str, dict[str, tuple[int, int, str]]]:
        known: dict[str, dict[str, tuple[int, int, str]]] = {}
        lines: list[str] = []
        with suppress(OSError):
            lines = self._path.read_text(errors="replace").splitlines()
        for line in lines:
            try:
                folder, name, size, changed, stamp = json.loads(line)
                known.setdefault(folder, {})[name] = size, changed, str(stamp)
            except (ValueError, TypeError):
                continue  # an empty line, or one that was cut off
        if self._writable and len(lines) > 1000 + 2 * sum(map(len, known.values())):
            # Most lines are of parts that have been replaced since.
            kept = [json.dumps([folder, name, *line]) for folder in known for name, line in known[folder].items()]
            with suppress(StoreError):
                _replace({self._path: "\n".join(kept).encode})
        return known

    def _key(self, file: _File) -> str:
        if file.folder not in self._keys:
            self._keys[file.folder] = file.folder.relative_to(self._root).as_posix()
        return self._keys[file.folder]


def _stamp(path: Path) -> str:
    """The stamp of a part, from its end.

    Raises:
        _Untrusted: it is damaged, or the store did not write it as such.
    """
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _Untrusted(f"is damaged ({_cause(error)})") from None
    if metadata.get(b"name") != path.stem.encode():
        raise _Untrusted("was not written by a sweep under this name")
    return str(metadata.get(b"stamp", b"").decode())


def _files(root: Path, table: str) -> list[_File]:
    """The files of a table, in order of their names."""
    found = []
    folders: dict[str, Path] = {}
    for entry in sorted(_entries(root / table), key=lambda entry: entry.path):
        # Names with a dot or underscore in front are invisible to every reader of Parquet folders, so to this one too.
        if not entry.name.endswith(".parquet") or entry.name[0] in "._":
            continue
        try:
            state = entry.stat()
        except OSError:
            continue  # removed in this moment, or a link to nowhere
        place = entry.path[: -len(entry.name) - 1]
        folder = folders.setdefault(place, Path(place))
        found.append(_File(folder, entry.name.removesuffix(".parquet"), (state.st_size, state.st_mtime_ns)))
    return found


def _entries(folder: str | Path, *, below: bool = True) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, and below it; nothing if it is not there. Several times faster than `Path.rglob`."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if below:
                    yield from _entries(entry.path)
            else:
                yield entry


def read_table(root: Path, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A table of any result folder, without opening it for writing.

    Args:
        columns: of the rows; all by default.

    Raises:
        StoreError: a part cannot be read.
    """
    parts: list[pa.Table] = []
    for file in _files(root, table):
        try:
            parts.append(_part(file.path, table, columns))
        except _Untrusted as error:
            raise StoreError(f"{file.path} {error}; remove it and run the sweep again") from None
    return _frame(parts, table, columns)


def read_run(root: Path) -> dict[str, Any]:
    """What the last run in a result folder noted of itself; empty if it was none, or of an earlier release.

    Raises:
        StoreError: the folder is not a result folder.
    """
    if not (root / MARKER).is_file():
        raise StoreError(f"{root}: is not a result folder of this tool (no {MARKER})")
    try:
        content = json.loads((root / RUN).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _taken(lock: int) -> bool:
    """Whether the lock of a result folder could be taken; whoever only asks for it (`is_written_to`) is waited for."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(LOCK_SECONDS / 10)


def is_written_to(root: Path) -> bool:
    """Whether a run holds the lock of a result folder; on another host's disk only as far as that shares its locks."""
    try:
        lock = os.open(root / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def read_finished(root: Path, task_ids: Iterable[str]) -> tuple[set[str], set[str]]:
    """Which tasks are done and which failed, as the folder says, without opening it for writing."""
    wanted = set(task_ids)
    stamps = _Stamps(root)
    done = {file.name for table in Kind for file in _trusted(root, table, wanted, stamps)}
    rest = _trusted(root, "tasks", wanted - done, stamps)
    return done, {file.name for file in rest if _failed(file.path)}


def _failed(path: Path) -> bool:
    try:
        status: list[str] = _part(path, "tasks", ["status"])["status"].to_pylist()
    except _Untrusted:
        return False
    return status == ["failed"]


def _trusted(root: Path, table: str, names: Collection[str], stamps: _Stamps) -> Iterator[_File]:
    """The whole parts of these names."""
    for file in _files(root, table):
        if file.name in names:
            with suppress(_Untrusted):
                stamps.of(file)
                yield file


def _check_is_ours(root: Path, sweep: str) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise StoreError(f"{root}: is a file, not a folder; choose another with --results")
    marker = root / MARKER
    if not marker.exists():
        # The lock, and what a run leaves that is killed while it writes the marker.
        strangers = sorted(p.name for p in root.iterdir() if p.name != ".lock" and not p.match(f".{MARKER}.*.tmp"))
        if strangers:
            raise StoreError(
                f"{root}: is not a result folder of this tool (no {MARKER}; it holds {', '.join(strangers[:3])}); "
                "choose another with --results"
            )
        return
    try:
        content: Mapping[str, Any] = json.loads(marker.read_text())
        found, version = content.get("format"), content.get("schema_version")
    except (OSError, ValueError, AttributeError):
        raise StoreError(f"{marker}: cannot be read; restore it or choose another folder with --results") from None
    if found != FORMAT:
        raise StoreError(f"{root}: is not a result folder of this tool ({MARKER} says {found!r})")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{root}: holds results of schema version {version}, this release writes {SCHEMA_VERSION}; "
            "choose another folder with --results"
        )
    if content.get("sweep") != sweep:
        raise StoreError(f"{root}: belongs to sweep {content.get('sweep')!r}, not {sweep!r}; choose another folder")


@cache
def _schema(table: str) -> pa.Schema:
    return arrow_schema(table)


def _part(path: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part, with the partition columns.

    Raises:
        _Untrusted: it is damaged.
        StoreError: the system does not let it be read.
    """
    schema = _schema(table)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.equals(schema):
                part = file.read(columns=None if columns is None else list(columns), use_threads=False)
            else:
                # Of an earlier release: columns that it did not know are null. Twice the time, so not for every part.
                part = pq.read_table(
                    path,
                    columns=None if columns is None else list(columns),
                    schema=schema,
                    partitioning=None,
                    page_checksum_verification=True,
                )
    except FileNotFoundError:
        raise StoreError(f"{path}: was removed while it was needed; run the sweep again") from None
    except (pa.ArrowException, OSError) as error:
        # The system's own refusals (permissions, too many open files) say nothing about what is in the file.
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise StoreError(f"{path}: cannot be read ({_cause(error)}); see to it and run the sweep again") from None
        raise _Untrusted(f"is damaged ({_cause(error)})") from None
    partitioned = path.parent.name != table
    for column, folder in zip(reversed(PARTITIONS) if partitioned else (), path.parents, strict=False):
        value = unquote(folder.name.removeprefix(f"{column.name}="))
        part = part.add_column(0, column.name, pa.array([value] * len(part), pa.string()))
    return part


def _frame(parts: list[pa.Table], table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    if not parts:
        declared = [c for c in TABLES[table] if columns is None or c.name in columns]
        parts = [pa.schema([(c.name, c.type) for c in (*PARTITIONS, *declared)]).empty_table()]
    frame: pd.DataFrame = pa.concat_tables(parts).to_pandas()
    return frame


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _parquet(part: Part) -> memoryview:
    """The file of a part. Made in memory: written piece by piece it takes half as long again."""
    metadata = {"name": part.name, "stamp": part.stamp, "schema_version": str(SCHEMA_VERSION)}
    stamped = part.rows.replace_schema_metadata({**(part.rows.schema.metadata or {}), **metadata})
    sink = pa.BufferOutputStream()
    # A hundred columns of two rows gain nothing from dictionaries and ranges, which are a fifth of the work.
    many = len(part.rows) > FEW_ROWS
    # Without checksums a flipped bit may well be read back as another number.
    pq.write_table(stamped, sink, write_page_checksum=True, use_dictionary=many, write_statistics=many)
    return memoryview(sink.getvalue())


def _replace(contents: Mapping[Path, Callable[[], bytes | memoryview]]) -> dict[Path, tuple[int, int]]:
    """Write beside the targets, flush to disk, and rename: a reader sees the old file, or the new one whole.

    No file is renamed before all are flushed; then each is, in order; the folders are flushed last.

    Args:
        contents: what makes the content of each file; called beside each other, while others are flushed.

    Returns:
        The size of each file and when it was changed.

    Raises:
        StoreError: a file cannot be written. The targets are what they were, or new and whole.
    """
    temporaries = {path: path.parent / f".{path.name}.{os.getpid()}.tmp" for path in contents}

    def write(path: Path) -> tuple[int, int]:
        rest = memoryview(contents[path]())
        with _refusals(path.parent):
            try:
                file = temporaries[path].open("wb", buffering=0)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = temporaries[path].open("wb", buffering=0)
            with file:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                state = os.fstat(file.fileno())
        return state.st_size, state.st_mtime_ns

    def flush(folder: Path) -> None:
        with _refusals(folder):
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)

    try:
        states = _side_by_side(write, list(contents))
        for path, temporary in temporaries.items():
            with _refusals(path.parent):
                os.replace(temporary, path)
        _side_by_side(flush, list(dict.fromkeys(path.parent for path in contents)))
    except StoreError:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()
        raise
    return dict(zip(contents, states, strict=True))


def _side_by_side(work: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """What becomes of each path; several at a time, because all but a little of it is waiting for the disk."""
    if len(paths) == 1:
        return [work(paths[0])]
    started = [_threads().submit(work, path) for path in paths]
    wait(started)  # whatever fails, nothing is left under way
    return [one.result() for one in started]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(FLUSHES, thread_name_prefix="flush")


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """What the system refuses becomes one line with the place and the remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreError(
            f"{folder}: cannot be written ({_cause(error)}); nothing committed is lost; "
            f"{'free some space or ' if full else ''}choose another folder with --results"
        ) from error


def _cause(error: Exception) -> str:
    """The first line of what went wrong; pyarrow's own errors carry a number, but no words, of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""The result folder: one atomic part file per task, resume from what is there, a row per combination.

results/<sweep>/
    sweep.json                                             what this folder is: name and versions
    latency|accuracy|importance/model=/accelerator=/dataset=/<task_id>.parquet
    combinations/model=/accelerator=/dataset=/<combination_id>.parquet
    anchors/model=/accelerator=/dataset=/<task_id>.parquet timings of the anchor before and after a task
    workers/model=/accelerator=/dataset=/...parquet        what the anchors say of each worker
    environments/...parquet                                what workers ran in
    tasks/model=/accelerator=/dataset=/<task_id>.parquet   how each task ended
    set-aside/                                             files that could not be trusted

A task is done when its part file, named by its id, has been renamed into place; a reader never sees half a file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workers.schema import PARTITIONS, SCHEMA_VERSION, TABLES, arrow_schema
from workers.tasks import Kind

# What a results folder is resolved against inside a Ray job, whose own folder is a throw-away copy.
ROOT_VARIABLE = "SWEEP_RESULTS_ROOT"

FORMAT = "vlm-knobs results"
MARKER = "sweep.json"
SET_ASIDE = "set-aside"

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


class ResultStore:
    """The only writer of a result folder, for as long as it is open."""

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self._lock = lock
        self._indexes: dict[str, dict[str, dict[Path, str]]] = {}
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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StoreError(f"{root}: another run is writing here; wait for it or choose another folder") from None
        store = cls(root, lock)
        try:
            store._sweep_leftovers()
            if not (root / MARKER).exists():
                content = {"format": FORMAT, "sweep": sweep, "schema_version": SCHEMA_VERSION}
                _replace(root / MARKER, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
        except StoreError:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._lock)

    # -- writing ----------------------------------------------------------------------------------------------------

    def commit(self, table: str, place: Place | None, name: str, rows: pa.Table, stamp: str = "") -> None:
        """Write `rows` as the part `name` of a table, whole or not at all; an earlier part of that name is replaced.

        An earlier part is replaced wherever it is, because a retry may land on another kind of device; only
        `combinations` keeps one per place.

        Args:
            place: the partition; None for a table that has none.
            stamp: kept with the part and given back by `stamp`: how a task ended, or what a row was made from.

        Raises:
            StoreError: the folder cannot be written; what was committed before stays.
        """
        metadata = {"name": name, "stamp": stamp, "schema_version": str(SCHEMA_VERSION)}
        stamped = rows.replace_schema_metadata({**(rows.schema.metadata or {}), **metadata})
        path = self._path(table, place, name)
        parts = self._index(table).setdefault(name, {})
        # Without checksums a flipped bit may well be read back as another number.
        _replace(path, lambda temporary: pq.write_table(stamped, temporary, write_page_checksum=True))
        if table != PART_PER_PLACE:
            for earlier in parts.keys() - {path}:
                earlier.unlink(missing_ok=True)
                del parts[earlier]
        parts[path] = stamp

    def discard(self, table: str, name: str) -> None:
        """Remove a part wherever it is; nothing happens if there is none.

        Raises:
            StoreError: it cannot be removed.
        """
        for path in self._index(table).pop(name, {}):
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
        return next(iter(parts.values()), None) if place is None else parts.get(self._path(table, place, name))

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
            for path in list(index.get(name, {})):
                try:
                    parts.append(_part(path, table, columns))
                except _Untrusted as error:
                    self._set_aside(path, f"{error}; the same command makes again what it held")
                    del index[name][path]
                    damaged.add(name)
        if damaged:
            raise DamagedParts(f"{len(damaged)} parts of {self.root / table} are damaged; see the warnings", damaged)
        return _frame(parts, table, columns)

    # -- files ------------------------------------------------------------------------------------------------------

    def _path(self, table: str, place: Place | None, name: str) -> Path:
        return self.root / table / (place.folder() if place else "") / f"{name}.parquet"

    def _index(self, table: str) -> dict[str, dict[Path, str]]:
        """Parts by name, with their stamps; read from the folder once, then kept up by `commit`."""
        if table not in self._indexes:
            index: dict[str, dict[Path, str]] = {}
            for path in _parts(self.root, table):
                try:
                    stamp = _stamp(path)
                except _Untrusted as error:
                    self._set_aside(path, f"{error}; what it held is made again")
                    continue
                index.setdefault(path.stem, {})[path] = stamp
            if table != PART_PER_PLACE:
                self._keep_newest(index)
            self._indexes[table] = index
        return self._indexes[table]

    def _keep_newest(self, index: dict[str, dict[Path, str]]) -> None:
        """A run that died between writing a retried part and removing the earlier one left both."""
        for parts in index.values():
            newest = max(parts, key=lambda path: path.stat().st_mtime_ns)
            for path in parts.keys() - {newest}:
                self._set_aside(path, f"is an earlier copy of {newest}")
                del parts[path]

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
        for folder in (self.root.glob, *((self.root / table).rglob for table in TABLES)):
            for path in folder(".*.tmp"):
                path.unlink(missing_ok=True)


class _Untrusted(Exception):
    """A file in a table that is no part of it; says why."""


def _stamp(path: Path) -> str:
    """The stamp of a part. Raises _Untrusted for a file that is damaged, or that the store did not write as such."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _Untrusted(f"is damaged ({_cause(error)})") from None
    if metadata.get(b"name") != path.stem.encode():
        raise _Untrusted("was not written by a sweep under this name")
    return str(metadata.get(b"stamp", b"").decode())


def _parts(root: Path, table: str) -> list[Path]:
    # Names with a dot or underscore in front are invisible to every reader of Parquet folders, so to this one too.
    return sorted((root / table).rglob("[!._]*.parquet"))


def read_table(root: Path, table: str) -> pd.DataFrame:
    """A table of any result folder, without opening it for writing.

    Raises:
        StoreError: a part cannot be read.
    """
    parts: list[pa.Table] = []
    for path in _parts(root, table):
        try:
            parts.append(_part(path, table))
        except _Untrusted as error:
            raise StoreError(f"{path} {error}; remove it and run the sweep again") from None
    return _frame(parts, table)


def read_finished(root: Path, task_ids: Iterable[str]) -> tuple[set[str], set[str]]:
    """Which tasks are done and which failed, as the folder says, without opening it for writing."""
    wanted = set(task_ids)
    done = wanted & {path.stem for table in Kind for path in _trusted(root, table)}
    rest = [path for path in _trusted(root, "tasks") if path.stem in wanted - done]
    return done, {path.stem for path in rest if _failed(path)}


def _failed(path: Path) -> bool:
    try:
        status: list[str] = _part(path, "tasks", ["status"])["status"].to_pylist()
    except _Untrusted:
        return False
    return status == ["failed"]


def _trusted(root: Path, table: str) -> Iterator[Path]:
    for path in _parts(root, table):
        try:
            _stamp(path)
        except _Untrusted:
            continue
        yield path


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


def _part(path: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part, with the partition columns.

    Raises:
        _Untrusted: it is damaged.
        StoreError: the system does not let it be read.
    """
    try:
        part = pq.read_table(
            path,
            columns=None if columns is None else list(columns),
            schema=arrow_schema(table),
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


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, flush to disk, and rename: a reader sees the old file, or the new one whole."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreError(
            f"{path.parent}: cannot be written ({_cause(error)}); nothing committed is lost; "
            f"{'free some space or ' if full else ''}choose another folder with --results"
        ) from error


def _cause(error: Exception) -> str:
    """The first line of what went wrong; pyarrow's own errors carry a number, but no words, of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

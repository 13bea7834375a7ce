"""Open a data set as a table of undecoded rows, from local files, an image folder or the hub."""

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from workers.errors import DatasetError, NotDownloaded
from workers.sources import DatasetSource, nearest

# Which reader of `datasets` takes which file.
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "testdev", "test")
_SHARD = re.compile(r"^(?P<stem>.*-)\d{5}-of-(?P<total>\d{5})")


@dataclass(frozen=True)
class Table:
    """The needed columns of a data set, images undecoded, and the folder that relative image paths start from."""

    rows: Any  # datasets.Dataset
    folder: Path | None


@dataclass(frozen=True)
class _Files:
    reader: str
    patterns: list[str]
    folder: Path | None


def open_table(
    source: DatasetSource, needed: Sequence[tuple[str, str]] | None = None, *, offline: bool = False
) -> Table:
    """Index a data set without decoding an image.

    Args:
        needed: columns that it must have, each with the key of a sweep that names it; default: all that the source
            names.

    Raises:
        NotDownloaded: `offline`, and it is on the hub and not in the local cache.
        DatasetError: it cannot be read; with place and remedy.
    """
    if source.path is not None:
        files = _local_files(source, source.path)
        table = Table(_read_files(source, files), files.folder)
    else:
        table = _open_hub(source, offline)
    return _with_columns(source, table, source.needed_columns if needed is None else needed)


# --- Which files ---


def _local_files(source: DatasetSource, path: str) -> _Files:
    place = Path(path)
    if place.is_dir():
        return _folder_files(source, place)
    if place.is_file():
        return _data_files(path, [place])
    found = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if Path(match).is_file()]
    if not found:
        raise DatasetError(f"{path}: no such file or folder; check `path` of data set {source.name!r}")
    return _data_files(path, found)


def _data_files(place: str, files: list[Path]) -> _Files:
    readers = {READERS.get(file.suffix.lower()) for file in files}
    if len(readers) != 1 or None in readers:
        endings = ", ".join(sorted({file.suffix or file.name for file in files}))
        raise DatasetError(f"{place}: cannot read {endings} files; give files of one kind of {', '.join(READERS)}")
    _check_shards(place, files)
    folders = {file.parent for file in files}
    folder = folders.pop() if len(folders) == 1 else None
    # `datasets` takes a Parquet file without rows for a broken one.
    if readers == {"parquet"} and not any(_parquet_rows(place, file) for file in files):
        raise DatasetError(f"{place}: the file has no rows; give a file that has")
    # The reader takes patterns, so brackets in a name need escaping.
    return _Files(str(readers.pop()), [glob.escape(str(file)) for file in files], folder)


def _parquet_rows(place: str, file: Path) -> int:
    try:
        return int(parquet.read_metadata(file).num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DatasetError(f"{place}: {file.name} is not a Parquet file that can be read ({error})") from None


def _check_shards(place: str, files: list[Path]) -> None:
    """An interrupted download must not pass for a smaller data set."""
    present: dict[tuple[Path, str, int], int] = {}
    for file in files:
        if shard := _SHARD.match(file.name):
            key = (file.parent, shard["stem"], int(shard["total"]))
            present[key] = present.get(key, 0) + 1
    for (folder, stem, total), count in present.items():
        if count < total:
            raise DatasetError(f"{place}: only {count} of {total} files {folder / stem}* are there; download the rest")


def _folder_files(source: DatasetSource, folder: Path) -> _Files:
    for base in (folder / source.split, folder):
        if any((base / name).is_file() for name in METADATA_NAMES):
            return _Files("imagefolder", [glob.escape(str(base)) + "/**"], base)
    with_metadata = [
        child.name for child in sorted(folder.iterdir()) if any((child / n).is_file() for n in METADATA_NAMES)
    ]
    if with_metadata:
        raise _unknown_split(source, str(folder), with_metadata)
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in READERS and file.is_file()]
    if not files:
        raise DatasetError(
            f"{folder}: neither {' or '.join(METADATA_NAMES)} (an image folder) nor data files "
            f"({', '.join(READERS)}) in this folder"
        )
    of_split = {file: _split_of(file.relative_to(folder)) for file in files}
    wanted = [file for file in files if source.split in _words(file.relative_to(folder))]
    if not wanted and any(of_split.values()):
        raise _unknown_split(source, str(folder), sorted({split for split in of_split.values() if split}))
    return _data_files(str(folder), wanted or files)


def _words(path: Path) -> list[str]:
    """The folder names of a relative path, and the parts of its file name."""
    return [*path.parts[:-1], *re.split(r"[-.]", path.name), *re.split(r"[-._]", path.name)]


def _split_of(path: Path) -> str | None:
    return next((word for word in _words(path) if word in SPLIT_NAMES), None)


def _unknown_split(source: DatasetSource, place: str, splits: list[str]) -> DatasetError:
    return DatasetError(f"{place}: no split {source.split!r}{nearest(source.split, splits)}")


# --- Reading them ---


def _read_files(source: DatasetSource, files: _Files) -> Any:
    import datasets  # costs a second, which commands that only read results need not pay

    # Naming the files keeps `datasets` from converting every split. It allows fewer split names than data sets have.
    arguments: dict[str, Any] = {"data_files": {"rows": files.patterns}, "split": "rows"}
    if files.reader == "imagefolder":
        arguments["drop_labels"] = True
    with _offline_and_quiet(datasets), _explained(source, f"check that it is valid {files.reader}"):
        return datasets.load_dataset(files.reader, **arguments)


def _open_hub(source: DatasetSource, offline: bool) -> Table:
    """Download the files of one split, all the same bytes for every worker, and read them as local files."""
    import datasets
    import huggingface_hub

    assert source.hub_id is not None
    prefixes = [f"{source.config}/", f"data/{source.config}/"] if source.config else ["", "data/"]
    patterns = [f"{prefix}{source.split}{end}" for prefix in prefixes for end in ("-*", ".*", "/*")]
    remedy = "check the id, revision and network, or download it elsewhere and give `path`"
    try:
        with _explained(source, remedy):
            snapshot = huggingface_hub.snapshot_download(
                source.hub_id,
                repo_type="dataset",
                revision=source.revision,
                allow_patterns=patterns,
                local_files_only=offline,
            )
    except DatasetError as error:
        if offline:
            raise NotDownloaded(f"{source.place} is not on this machine yet") from error
        raise
    found = [file for pattern in patterns for file in sorted(Path(snapshot).glob(pattern)) if file.is_file()]
    files = [file for file in found if file.suffix.lower() in READERS]
    if files:
        chosen = _data_files(source.place, files)
        return Table(_read_files(source, chosen), chosen.folder)
    if offline:
        raise NotDownloaded(f"{source.place}: split {source.split!r} is not on this machine yet")
    # Not laid out by split: let the hub's own rules find the files, which downloads every split.
    with _without_log_lines(datasets), _explained(source, remedy):
        rows = datasets.load_dataset(source.hub_id, source.config, split=source.split, revision=source.revision)
    return Table(rows, None)


@contextmanager
def _offline_and_quiet(datasets: Any) -> Iterator[None]:
    """Indexing a local file needs no progress bar, and must not wait for the network to report a download."""
    shown, reported = not datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with _without_log_lines(datasets):
            yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = reported
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _without_log_lines(datasets: Any) -> Iterator[None]:
    """What the library logs before it raises would stand above our own line and say less."""
    logged = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(logged)


@contextmanager
def _explained(source: DatasetSource, remedy: str) -> Iterator[None]:
    """Whatever a reader raises becomes one line with the place and the remedy."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first_line = next(iter(str(cause).strip().splitlines()), "") or f"empty, or {type(cause).__name__}"
        raise DatasetError(
            f"{source.place}: split {source.split!r} cannot be read ({first_line[:300]}); {remedy}"
        ) from error


# --- The columns ---


def _with_columns(source: DatasetSource, table: Table, needed: Sequence[tuple[str, str]]) -> Table:
    """Only the columns that are needed, images as they are stored."""
    rows, records = table.rows, source.columns.records
    within = _record_keys(source, rows, records) if records in rows.column_names else set()
    for key, column in needed:
        known = [*rows.column_names, *sorted((within or set()) - set(rows.column_names))]
        # What records of no fixed form hold is seen when one is read.
        if column not in known and (within is not None or column == records):
            raise DatasetError(f"{source.place}: no column {column!r}{nearest(column, known)}; set {key}")
    if len(rows) == 0:
        raise DatasetError(f"{source.place}: split {source.split!r} has no rows; give one that has")
    names = dict.fromkeys(column for _, column in needed if column in rows.column_names)
    rows = rows.select_columns(list(names))
    for column in names:
        # A table of questions whose images are elsewhere has no such column.
        if column in source.columns.images:
            rows = _undecoded(source, rows, column, table.folder)
    return Table(rows, table.folder)


def _record_keys(source: DatasetSource, rows: Any, column: str | None) -> set[str] | None:
    """What the records of a column hold; None if that differs from row to row."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    elif isinstance(feature, list):
        feature = feature[0]
    elif isinstance(feature, datasets.Value):
        raise DatasetError(f"{source.place}: column {column!r} holds no lists of records; set columns.records")
    return set(feature) if isinstance(feature, dict) else None


def _undecoded(source: DatasetSource, rows: Any, column: str, folder: Path | None) -> Any:
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image):
        return rows.cast_column(column, type(feature)(datasets.Image(decode=False)))
    first = rows.select_columns([column])[0][column]
    first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, str) and folder is None and not Path(first).is_absolute():
        raise DatasetError(
            f"{source.place}: relative image paths in files of several folders are ambiguous; make them absolute"
        )
    return rows

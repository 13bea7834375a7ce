"""Where each sample of a table is: its row, and its record where a row holds several questions."""

from collections.abc import Iterable, Mapping
from typing import Any

from workers.errors import DatasetError
from workers.sources import Columns, DatasetSource

# Row, and position in its records if rows hold those.
Place = tuple[int, int | None]


def places_of(source: DatasetSource, rows: Any) -> dict[str, Place]:
    """Row index, and position in its records if there are, by uid. Raises DatasetError on a missing or repeated id."""
    place_of: dict[str, Place] = {}
    for row_id, place in _ids(source.columns, rows):
        if row_id is None:
            raise DatasetError(
                f"{source.place}: {_words(place)} has no id (column {source.columns.id!r}); set columns.id"
            )
        first = place_of.setdefault(f"{source.name}:{source.split}:{row_id}", place)
        if first != place:
            raise DatasetError(
                f"{source.place}: rows {_words(first)[4:]} and {_words(place)[4:]} have the same id {row_id!r} (column "
                f"{source.columns.id!r}); ids must be unique, set columns.id to a unique column or leave it out"
            )
    return place_of


def _ids(columns: Columns, rows: Any) -> Iterable[tuple[object, Place]]:
    """Every sample's id with its place."""
    of_rows = columns.id in rows.column_names
    ids = rows.select_columns([columns.id])[:][columns.id] if of_rows else range(len(rows))
    if columns.records is None:
        yield from ((row_id, (row, None)) for row, row_id in enumerate(ids))
        return
    of_records = rows.select_columns([columns.records])[:][columns.records]
    for row, (row_id, value) in enumerate(zip(ids, of_records, strict=True)):
        for position, record in enumerate(records_of(value)):
            if isinstance(record, Mapping) and columns.id in record:
                yield record[columns.id], (row, position)
            else:
                yield None if row_id is None else f"{row_id}.{position}", (row, position)


def _words(place: Place) -> str:
    row, position = place
    return f"row {row}" if position is None else f"row {row} (record {position})"


def records_of(value: object) -> list[object]:
    """The records of a row; older files hold a record of lists in place of a list of records."""
    if isinstance(value, Mapping):
        lists = [column for column in value.values() if isinstance(column, list)]
        length = max(map(len, lists), default=0)
        if lists and len(lists) == len(value) and all(len(column) == length for column in lists):
            return [dict(zip(value, of_one, strict=True)) for of_one in zip(*lists, strict=True)]
    # What is no list is one question that cannot be read.
    return value if isinstance(value, list) else [None]


def image_rows_of(source: DatasetSource, rows: Any) -> dict[str, int]:
    """Row of the table of images by id. Raises DatasetError if two have the same."""
    assert source.images is not None
    column = source.images.id
    row_of: dict[str, int] = {}
    for row, image_id in enumerate(rows.select_columns([column])[:][column]):
        if row_of.setdefault(str(image_id), row) != row:
            raise DatasetError(
                f"{source.place}: two images have the same id {image_id!r} (column {column!r}); set images.id"
            )
    return row_of

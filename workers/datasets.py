"""Give every sample of a data set a stable identity, choose samples reproducibly, and read one at a time."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from workers.errors import DatasetError, SampleError
from workers.images import decode_rgb
from workers.scorers import scorer
from workers.sources import Columns, DatasetSource, Preset, presets, resolve_source
from workers.tables import Table, open_table

__all__ = [
    "Columns",
    "Dataset",
    "DatasetSource",
    "Preset",
    "Sample",
    "SampleRef",
    "fingerprint",
    "presets",
    "resolve_source",
    "sample_order",
]


@dataclass(frozen=True)
class SampleRef:
    """Which sample, and what it contained when it was chosen.

    Attributes:
        uid: `name:split:id`, with the row index where the data set has no id column.
        digest: SHA-256 over uid, question, answers and the image file's bytes.
    """

    uid: str
    digest: str


@dataclass(frozen=True)
class Sample:
    """One question about one image; the image stays encoded until it is asked for.

    Attributes:
        image_id: the same for all questions about one image.
        image_bytes: the encoded image file.
    """

    ref: SampleRef
    question: str
    answers: tuple[str, ...]
    image_id: str
    image_bytes: bytes = field(repr=False)
    question_type: str | None

    def image(self) -> Image.Image:
        """The decoded RGB image, see `workers.images.decode_rgb`. Raises SampleError if it cannot be decoded."""
        return decode_rgb(self.image_bytes, self.ref.uid)


class Dataset:
    """An opened data set."""

    def __init__(self, source: DatasetSource, table: Table) -> None:
        self.source = source
        self._rows = table.rows
        self._folder = table.folder
        self._minimum_answers = scorer(source.metric).minimum_answers
        self._row_of = _index(source, table.rows)
        self._check_answer_counts()

    @classmethod
    def open(cls, source: DatasetSource, *, offline: bool = False) -> "Dataset":
        """Index a data set, decoding no image and, if `offline`, asking no network.

        Raises:
            NotDownloaded: `offline`, and it is on the hub and not in the local cache.
            DatasetError: it cannot be read; in one line with the remedy.
        """
        return cls(source, open_table(source, offline=offline))

    def __len__(self) -> int:
        return len(self._row_of)

    def select(self, n: int | None, seed: int) -> list[SampleRef]:
        """Choose `n` samples, all if None or more than there are; fewer samples of a seed are a prefix of more.

        Reads the chosen rows only. A row that cannot be used is chosen like any other: reading it fails, and says why.
        Raises ValueError if `n` is negative.
        """
        if n is not None and n < 0:
            raise ValueError(f"cannot choose {n} samples")
        return [self._ref(uid) for uid in sample_order(self._row_of, seed)[:n]]

    def select_last(self, n: int, seed: int) -> list[SampleRef]:
        """The last `n` samples in the order of `select`, the last one first: as far as possible none of the first ones.

        They stay what they are however many are chosen from the front. Reads the chosen rows only.
        """
        return [self._ref(uid) for uid in sample_order(self._row_of, seed)[::-1][:n]]

    def sample(self, uid: str) -> Sample:
        """Read one sample. Raises SampleError if this row is unusable; other rows are unaffected."""
        row_index = self._row_of.get(uid)
        if row_index is None:
            raise SampleError(f"{uid}: no such sample in {self.source.place}; the data changed since it was chosen")
        columns = self.source.columns
        row: dict[str, Any] = self._rows[row_index]
        question = row[columns.question]
        if not isinstance(question, str) or not question.strip():
            raise SampleError(f"{uid}: the question is missing (column {columns.question!r})")
        answers = _answers(row[columns.answers])
        if len(answers) < self._minimum_answers:
            raise SampleError(
                f"{uid}: {len(answers)} answers in column {columns.answers!r}, but {self.source.metric} needs at least "
                f"{self._minimum_answers}"
            )
        image_bytes = self._image_bytes(uid, row[columns.image])
        image_digest = hashlib.sha256(image_bytes).hexdigest()
        image_id = row[columns.image_id] if columns.image_id else None
        question_type = row[columns.question_type] if columns.question_type else None
        return Sample(
            ref=SampleRef(uid, _digest([uid, question, answers, image_digest])),
            question=question,
            answers=answers,
            image_id=image_digest[:16] if image_id is None else str(image_id),
            image_bytes=image_bytes,
            question_type=None if question_type is None else str(question_type),
        )

    def _check_answer_counts(self) -> None:
        """One answer per question is usual, but not for every metric: say so once instead of once per sample."""
        column = self.source.columns.answers
        first_rows = self._rows.select_columns([column])[:20][column]
        counts = [len(_answers(value)) for value in first_rows]
        if 0 < max(counts) < self._minimum_answers:
            raise DatasetError(
                f"{self.source.place}: {self.source.metric} needs at least {self._minimum_answers} answers per sample, "
                f"but column {column!r} holds {max(counts)}; use metric: exact_match"
            )

    def _ref(self, uid: str) -> SampleRef:
        try:
            return self.sample(uid).ref
        except SampleError:
            # The message may hold a path, which would differ between machines.
            return SampleRef(uid, _digest([uid, "unusable"]))

    def _image_bytes(self, uid: str, value: object) -> bytes:
        """The encoded image of a row: bytes in the table, or a path next to it."""
        path: object = value
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            path = value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(path, str) or not path:
            raise SampleError(f"{uid}: no image (column {self.source.columns.image!r})")
        # Not against the current folder: the sweep may be started, or a worker placed, anywhere.
        file = (self._folder or Path()) / path
        try:
            return file.read_bytes()
        except OSError as error:
            raise SampleError(f"{uid}: cannot read image {file} ({error.strerror or error})") from None


def sample_order(uids: Iterable[str], seed: int) -> list[str]:
    """All uids in the order in which `seed` chooses them: by SHA-256, independent of row order and library versions."""
    return sorted(uids, key=lambda uid: hashlib.sha256(f"{seed}:{uid}".encode()).digest())


def fingerprint(refs: Sequence[SampleRef]) -> str:
    """One digest for a set of samples and their content, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ref.digest for ref in refs)).encode()).hexdigest()


def _index(source: DatasetSource, rows: Any) -> dict[str, int]:
    """Row index by uid. Raises DatasetError on a missing or repeated id."""
    column = source.columns.id
    ids = range(len(rows)) if column is None else rows.select_columns([column])[:][column]
    row_of: dict[str, int] = {}
    for row_index, row_id in enumerate(ids):
        if row_id is None:
            raise DatasetError(f"{source.place}: row {row_index} has no id (column {column!r}); set columns.id")
        first = row_of.setdefault(f"{source.name}:{source.split}:{row_id}", row_index)
        if first != row_index:
            raise DatasetError(
                f"{source.place}: rows {first} and {row_index} have the same id {row_id!r} (column {column!r}); "
                f"ids must be unique, set columns.id to a unique column or leave it out"
            )
    return row_of


def _answers(value: object) -> tuple[str, ...]:
    """Answers as text from what data sets hold: text, a number, a list of these, or a list of {answer: ...}."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return _answers(value.get("answer"))
    if isinstance(value, (list, tuple)):
        return tuple(answer for item in value for answer in _answers(item))
    return (str(value),)


def _digest(content: Sequence[object]) -> str:
    canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()

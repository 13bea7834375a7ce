"""Give every sample of a data set a stable identity, choose samples reproducibly, and read one at a time."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from workers.errors import DatasetError, SampleError
from workers.images import decode_rgb
from workers.options import letter_of, listed, options_of, options_text
from workers.places import image_rows_of, places_of, records_of
from workers.presets import Preset, presets, resolve_source
from workers.scorers import scorer
from workers.sources import Columns, DatasetSource, ImageTable
from workers.tables import Table, open_table

__all__ = [
    "Columns",
    "Dataset",
    "DatasetSource",
    "ImageTable",
    "Preset",
    "Sample",
    "SampleRef",
    "fingerprint",
    "presets",
    "resolve_source",
    "sample_order",
]

Row = Mapping[str, Any]

# How MMMU and others say in a text where which image belongs.
_IMAGE_MARK = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class SampleRef:
    """Which sample, and what it contained when it was chosen.

    Attributes:
        uid: `name:split:id`, with the row index where the data set has no id column; a question of a row of several
            has its position behind it, `name:split:7.2`, unless the questions have ids of their own.
        digest: SHA-256 over uid, question, options, what else the prompt names, answers and the image files' bytes.
    """

    uid: str
    digest: str


@dataclass(frozen=True)
class Sample:
    """One question about one image or several; images stay encoded until they are asked for.

    Attributes:
        answers: references; of a multiple-choice metric the letter of each.
        image_id: the same for all questions about one image.
        image_bytes: the encoded file of the first image.
        prompt: the text sent to the model, before its chat template.
        options: texts in the order of their letters.
        further_images: the encoded files of the images behind the first.
    """

    ref: SampleRef
    question: str
    answers: tuple[str, ...]
    image_id: str
    image_bytes: bytes = field(repr=False)
    question_type: str | None
    prompt: str = ""
    options: tuple[str, ...] = ()
    further_images: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def image_files(self) -> tuple[bytes, ...]:
        """The encoded files of all images."""
        return (self.image_bytes, *self.further_images)

    def images(self) -> list[Image.Image]:
        """All images as RGB, see `workers.images.decode_rgb`. Raises SampleError if one cannot be decoded."""
        return [decode_rgb(content, self.ref.uid) for content in self.image_files]


class Dataset:
    """An opened data set."""

    def __init__(self, source: DatasetSource, table: Table, image_table: Table | None = None) -> None:
        """
        Args:
            image_table: of a source whose images are not with the questions.
        """
        self.source = source
        self._rows = table.rows
        self._folder = table.folder
        self._scorer = scorer(source.metric)
        self._row_of = places_of(source, table.rows)
        self._images = image_table
        self._image_row_of = {} if image_table is None else image_rows_of(source, image_table.rows)
        self._check_answer_counts()

    @classmethod
    def open(cls, source: DatasetSource, *, offline: bool = False) -> "Dataset":
        """Index a data set, decoding no image and, if `offline`, asking no network.

        Raises:
            NotDownloaded: `offline`, and it is on the hub and not in the local cache.
            DatasetError: it cannot be read; in one line with the remedy.
        """
        of_images = source.image_source
        if of_images is None:
            return cls(source, open_table(source, offline=offline))
        needed = [("columns.image", of_images.columns.images[0]), ("images.id", str(of_images.columns.id))]
        return cls(source, open_table(source, offline=offline), open_table(of_images, needed, offline=offline))

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
        place = self._row_of.get(uid)
        if place is None:
            raise SampleError(f"{uid}: no such sample in {self.source.place}; the data changed since it was chosen")
        columns = self.source.columns
        row = self._row(uid, *place)
        question = "" if columns.question is None else row.get(columns.question)
        if not isinstance(question, str) or (columns.question is not None and not question.strip()):
            raise SampleError(f"{uid}: the question is missing (column {columns.question!r})")
        options = options_of(uid, row, columns.options)
        answers = self._answers(uid, row, options)
        if len(answers) < self._scorer.minimum_answers:
            raise SampleError(
                f"{uid}: {len(answers)} answers in column {columns.answers!r}, but {self.source.metric} needs at least "
                f"{self._scorer.minimum_answers}"
            )
        others = {name: _text(row.get(name)) for name in self.source.prompt_columns}
        prompt = self.source.prompt_for(question, {**others, "options": options_text(options)})
        images = self._image_files(uid, row, prompt)
        digests = [hashlib.sha256(content).hexdigest() for content in images]
        image_id = row.get(columns.image_id) if columns.image_id else None
        question_type = row.get(columns.question_type) if columns.question_type else None
        # A sample that has none of these has the digest that it had before there were any.
        more = {"options": options, "others": others, "images": digests[1:]}
        further = {name: value for name, value in more.items() if value}
        return Sample(
            ref=SampleRef(uid, _digest([uid, question, answers, digests[0], *([further] if further else [])])),
            question=question,
            answers=answers,
            image_id=_image_id(digests) if image_id is None else str(image_id),
            image_bytes=images[0],
            question_type=None if question_type is None else str(question_type),
            prompt=prompt,
            options=options,
            further_images=tuple(images[1:]),
        )

    def _row(self, uid: str, row_index: int, position: int | None) -> Row:
        """A row, with what its record of that number holds in place of columns of the same names."""
        row: Row = self._rows[row_index]
        if position is None:
            return row
        record = records_of(row[str(self.source.columns.records)])[position]
        if not isinstance(record, Mapping):
            raise SampleError(f"{uid}: no record of a question (column {self.source.columns.records!r})")
        return {**row, **record}

    def _answers(self, uid: str, row: Row, options: Sequence[str]) -> tuple[str, ...]:
        """The answers; for multiple choice their letters."""
        answers = _answers(row.get(self.source.columns.answers))
        if self._scorer.choices == "none":
            return answers
        if not options and self._scorer.choices == "optional":
            return tuple(answer for text in answers for answer in listed(text))
        if not options and self.source.columns.options is not None:
            raise SampleError(f"{uid}: no options (column {self.source.columns.options!r})")
        return tuple(letter_of(uid, answer, options, self.source.columns.answers) for answer in answers)

    def _check_answer_counts(self) -> None:
        """One answer per question is usual, but not for every metric: say so once instead of once per sample."""
        minimum = self._scorer.minimum_answers
        if minimum < 2:
            return
        column = self.source.columns.answers
        counts = []
        for uid, place in list(self._row_of.items())[:20]:
            with suppress(SampleError):
                counts.append(len(_answers(self._row(uid, *place).get(column))))
        if 0 < max(counts, default=0) < minimum:
            raise DatasetError(
                f"{self.source.place}: {self.source.metric} needs at least {minimum} answers per sample, "
                f"but column {column!r} holds {max(counts)}; use metric: exact_match"
            )

    def _ref(self, uid: str) -> SampleRef:
        try:
            return self.sample(uid).ref
        except SampleError:
            # The message may hold a path, which would differ between machines.
            return SampleRef(uid, _digest([uid, "unusable"]))

    def _image_files(self, uid: str, row: Row, prompt: str) -> list[bytes]:
        """The encoded images of a row, at least one, in the order in which the prompt names them."""
        columns, folder = self.source.columns, self._folder
        if self._images is not None:
            key = row.get(str(columns.image_id))
            found = self._image_row_of.get(str(key))
            if found is None:
                raise SampleError(f"{uid}: no image with {self.source.images.id} {key!r} in the table of images")  # type: ignore[union-attr]
            row, folder = self._images.rows[found], self._images.folder
        stored = [
            (column, value)
            for column in columns.images
            for value in (row[column] if isinstance(row[column], list) else [row[column]])
        ]
        present = [(column, value) for column, value in stored if value is not None]
        if not present:
            raise SampleError(f"{uid}: no image (column {' or '.join(map(repr, columns.images))})")
        marks = {int(mark) for mark in _IMAGE_MARK.findall(prompt)} if len(stored) > 1 else set()
        if marks and ([pair[1] for pair in stored[: len(present)]].count(None) or max(marks) > len(present)):
            raise SampleError(f"{uid}: the prompt names <image {max(marks)}>, but the row has {len(present)} images")
        return [_image_bytes(uid, value, folder, column) for column, value in present]


def sample_order(uids: Iterable[str], seed: int) -> list[str]:
    """All uids in the order in which `seed` chooses them: by SHA-256, independent of row order and library versions."""
    return sorted(uids, key=lambda uid: hashlib.sha256(f"{seed}:{uid}".encode()).digest())


def fingerprint(refs: Sequence[SampleRef]) -> str:
    """One digest for a set of samples and their content, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ref.digest for ref in refs)).encode()).hexdigest()


def _image_bytes(uid: str, value: object, folder: Path | None, column: str) -> bytes:
    """An encoded image: bytes in the table, or a path next to it."""
    path: object = value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        path = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(path, str) or not path:
        raise SampleError(f"{uid}: no image (column {column!r})")
    # Not against the current folder: the sweep may be started, or a worker placed, anywhere.
    file = (folder or Path()) / path
    try:
        return file.read_bytes()
    except OSError as error:
        raise SampleError(f"{uid}: cannot read image {file} ({error.strerror or error})") from None


def _image_id(digests: Sequence[str]) -> str:
    """By content, for images without a name."""
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


def _text(value: object) -> str:
    """What a prompt shows of a column."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    # Missing, as tables with a gap in a numeric column, and MMBench with a gap in a text, write it.
    if value is None or value != value or value == "nan":
        return ""
    return str(value).strip()


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

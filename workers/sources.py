"""Where a data set is and what its columns are called, as values, with the checks of what a sweep or preset says."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from workers.errors import DatasetError
from workers.prompts import fill, names_in
from workers.scorers import scorer


@dataclass(frozen=True)
class Columns:
    """What the data set calls its columns; those that are None are absent.

    Attributes:
        image: one column, of an image or a list of images, or several columns, of which a row may leave some empty.
        question: None where all rows ask the same, which the prompt then says, as for captions.
        id: unique per row; without it the row index is used, so that reordering the file changes the samples.
        image_id: shared by the questions about one image; without it the image's content is used.
        options: of multiple choice: one column of lists (or of lists written as text), or a column for each option.
        records: a column of lists of records, each a question of its own about the row's image; the keys of a record
            are then columns like the others. An id that is not among them gets the record's position behind a dot.
    """

    image: str | tuple[str, ...] = "image"
    question: str | None = "question"
    answers: str = "answers"
    id: str | None = None
    image_id: str | None = None
    question_type: str | None = None
    options: str | tuple[str, ...] | None = None
    records: str | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """The image columns."""
        return (self.image,) if isinstance(self.image, str) else self.image

    def named(self) -> list[tuple[str, str]]:
        """Role and name of every column that the data set must have; a role of several columns stands there often."""
        pairs: list[tuple[str, str]] = []
        for field in fields(self):
            value = getattr(self, field.name)
            columns = () if value is None else (value,) if isinstance(value, str) else value
            pairs += [(field.name, column) for column in columns]
        return pairs


# Roles that may be several columns, and those that may not be None.
_SEVERAL_COLUMNS = ("image", "options")
_REQUIRED_ROLES = ("image", "answers")


@dataclass(frozen=True)
class ImageTable:
    """A second table that holds the images, found by the question table's column `image_id`.

    Attributes:
        path: absolute local file, folder or glob; None for another configuration of the same hub data set.
        split: of that table; None: the same as the questions'.
        id: its column with the values of `image_id`.
    """

    path: str | None = None
    config: str | None = None
    split: str | None = None
    id: str = "id"


@dataclass(frozen=True)
class DatasetSource:
    """Where a data set is, how to read and how to score it; small enough to travel with every task.

    Attributes:
        name: shown in results: preset name, hub id or file stem.
        path: absolute local file, folder or glob; None for the hub.
        metric: a key of `workers.scorers.SCORERS`.
        prompt: template, see `workers.prompts`.
        images: where the images are, if not in the table of the questions.
    """

    name: str
    split: str
    path: str | None
    hub_id: str | None
    config: str | None
    revision: str | None
    columns: Columns
    metric: str
    prompt: str
    images: ImageTable | None = None

    def prompt_for(self, question: str, others: Mapping[str, str] | None = None) -> str:
        """The text sent to the model, before its chat template.

        Args:
            others: what else the prompt names; `Sample.prompt` has them all.

        Raises:
            ValueError: the prompt names something that is not there.
        """
        return fill(self.prompt, {"question": question, **(others or {})})

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Columns that the prompt names beside the question and the options."""
        return tuple(name for name in names_in(self.prompt) if name not in ("question", "options"))

    @property
    def needed_columns(self) -> list[tuple[str, str]]:
        """Columns that the table of the questions must have, each with the key of a sweep that names it."""
        roles = [(role, column) for role, column in self.columns.named() if role != "image" or self.images is None]
        of_prompt = [("prompt", column) for column in self.prompt_columns]
        return [(f"columns.{role}", column) for role, column in roles] + of_prompt

    @property
    def image_source(self) -> "DatasetSource | None":
        """The table of the images as a source of its own, or None if they are with the questions."""
        if self.images is None:
            return None
        return replace(
            self,
            path=self.images.path,
            config=self.images.config,
            split=self.images.split or self.split,
            columns=Columns(image=self.columns.image, id=self.images.id),
            images=None,
        )

    @property
    def place(self) -> str:
        """Where the data set is, for messages."""
        if self.path is not None:
            return self.path
        config = f" ({self.config})" if self.config else ""
        return f"hub data set {self.hub_id}{config}"


def columns_of(where: str, given: object, defaults: Columns) -> Columns:
    """The columns that an entry gives, on top of the preset's. Raises DatasetError naming `where` and the role."""
    if given is None:
        return defaults
    if not isinstance(given, Mapping):
        raise DatasetError(f"{where}.columns: must map roles to column names")
    roles = [field.name for field in fields(Columns)]
    chosen: dict[str, Any] = {}
    for role, name in given.items():
        if role not in roles:
            raise DatasetError(f"{where}.columns.{role}: unknown role{nearest(str(role), roles)}")
        if isinstance(name, (list, tuple)) and len(name) == 1 and role in _SEVERAL_COLUMNS:
            name = name[0]
        several = isinstance(name, (list, tuple)) and len(name) > 1 and role in _SEVERAL_COLUMNS
        for one in name if several else [name]:
            if not (isinstance(one, str) and one) and (several or role in _REQUIRED_ROLES or one is not None):
                raise DatasetError(f"{where}.columns.{role}: must be a column name, not {one!r}")
        chosen[role] = tuple(name) if several else name
    return replace(defaults, **chosen)


def image_table_of(where: str, given: object, defaults: ImageTable | None, columns: Columns) -> ImageTable | None:
    """The table of images that an entry gives, on top of the preset's. Raises DatasetError naming `where` and key."""
    if given is None:
        return defaults
    if not isinstance(given, Mapping):
        raise DatasetError(f"{where}.images: must map path or config, split and id to names")
    keys = [field.name for field in fields(ImageTable)]
    for key, value in given.items():
        if key not in keys:
            raise DatasetError(f"{where}.images.{key}: unknown key{nearest(str(key), keys)}")
        if not (isinstance(value, str) and value):
            raise DatasetError(f"{where}.images.{key}: must be text, not {value!r}")
    table = replace(defaults or ImageTable(), **given)
    if table.path is not None:
        if "config" in given:
            raise DatasetError(f"{where}.images: give either path or config, not both")
        table = replace(table, config=None)
    if columns.image_id is None or not isinstance(columns.image, str) or columns.records is not None:
        raise DatasetError(
            f"{where}.images: needs columns.image_id, the column that says which image a question is about, and one "
            f"columns.image, without columns.records"
        )
    return table


def check_metric(where: str, metric: str) -> None:
    """Raise DatasetError, naming `where`, if there is no such metric."""
    try:
        scorer(metric)
    except ValueError as error:
        raise DatasetError(f"{where}.metric: {error}") from None


def check_prompt(where: str, prompt: str, columns: Columns) -> None:
    """Raise DatasetError, naming `where`, if a prompt leaves out what a sample holds, or names what it does not."""
    if columns.question is not None and "{question}" not in prompt:
        raise DatasetError(
            f"{where}.prompt: must contain {{question}}, else every sample asks the same; if that is meant, "
            f"as for captions, set columns.question to null"
        )
    if columns.question is None and "question" in names_in(prompt):
        raise DatasetError(f"{where}.prompt: contains {{question}}, but columns.question is null; name the column")
    if columns.options is not None and "{options}" not in prompt:
        raise DatasetError(f"{where}.prompt: must contain {{options}}, else the model does not see columns.options")
    if columns.options is None and "options" in names_in(prompt):
        raise DatasetError(f"{where}.prompt: names {{options}}, but there is no column for them; set columns.options")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    choices = list(allowed)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{hint} (there is: {', '.join(choices)})"

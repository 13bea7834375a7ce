"""Read the options of a multiple-choice question, and the letter of its answer, from what data sets hold."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from workers.errors import SampleError
from workers.scoring.choices import LETTERS

_INDEX = re.compile(r"(\d+)(?:\.0)?")


def options_of(uid: str, row: Mapping[str, Any], columns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The options of a row in the order of their letters; empty if it has none.

    Args:
        columns: one column of lists, which may be written as text as in MMMU; or a column for each option, of which the
            last ones may be missing (null, empty, or "nan" as in MMBench).

    Raises:
        SampleError: what is there is no list of options, or a letter would have none.
    """
    if columns is None:
        return ()
    if isinstance(columns, tuple):
        values = [None if _is_missing(row.get(column)) else row.get(column) for column in columns]
        while values and values[-1] is None:
            values.pop()
    else:
        found = row.get(columns)
        parsed = _literal_list(found) if isinstance(found, str) and found.strip() else found
        values = [] if _is_missing(found) else parsed  # type: ignore[assignment]
        if not isinstance(values, list):
            raise SampleError(f"{uid}: the options are no list: {str(found)[:80]!r} (column {columns!r})")
    for letter, value in zip(LETTERS, values, strict=False):
        if value is None or not str(value).strip():
            raise SampleError(f"{uid}: option {letter} is missing (column {_words(columns)})")
    if len(values) > len(LETTERS):
        raise SampleError(f"{uid}: {len(values)} options, more than there are letters (column {_words(columns)})")
    return tuple(str(value).strip() for value in values)


def options_text(options: Sequence[str]) -> str:
    """The options as the model reads them: `A. text`, a line each."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def letter_of(uid: str, answer: str, options: Sequence[str], column: str) -> str:
    """The letter of an answer that is a letter, or an index from 0 as a number or text.

    Args:
        options: of the sample; empty if they are part of the question, so that their number is not known.

    Raises:
        SampleError: it is neither, or there is no such option.
    """
    letters = LETTERS[: len(options)] if options else LETTERS
    text = answer.strip()
    index = _INDEX.fullmatch(text)
    if index is not None and int(index[1]) < len(letters):
        return letters[int(index[1])]
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    raise SampleError(
        f"{uid}: the answer {answer[:80]!r} is neither a letter nor an index from 0 of {len(letters)} options (column "
        f"{column!r})"
    )


def listed(text: str) -> list[str]:
    """Several answers that are written as one list, or the text itself."""
    found = _literal_list(text)
    return [text] if found is None else [str(item) for item in found if item is not None]


def _literal_list(text: str) -> list[Any] | None:
    """What a list written in Python holds; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _is_missing(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan"))


def _words(columns: str | tuple[str, ...]) -> str:
    return repr(columns) if isinstance(columns, str) else ", ".join(columns)

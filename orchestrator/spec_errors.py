"""Mistakes in a sweep as values: where each is, what is wrong, what is allowed; and the error that carries them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""The way from the top of a sweep to a value: ("models", 0, "dtype")."""


def dotted(path: Iterable[str | int]) -> str:
    """A key path the way people read it: `models[0].dtype`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Problem:
    """One mistake; `str()` of it is the line a person reads."""

    file: str
    line: int | None
    key: str
    what: str
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        line = f"{place}: {self.key}: {self.what}" if self.key else f"{place}: {self.what}"
        # Line breaks, control characters and lone surrogates of a quoted value would break the line or the terminal.
        return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


class SpecError(Exception):
    """A sweep that cannot be run; `problems` holds every mistake found, in the order of the file."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed name a misspelt word most likely means, or None when nothing is close."""
    by_lower_case = {name.lower(): name for name in allowed}
    matches = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None

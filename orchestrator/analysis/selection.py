"""Which combinations are meant by an id or by values of columns, and which two of them can be compared."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from knobs.vision import VISION_AXES, VISION_OPTIONS

# A combination_id, or enough of it, or values of columns.
Selection: TypeAlias = "str | Mapping[str, Any]"

FEWEST_DIGITS = 6

# Shown in every comparison; what else combinations differ in only where they do.
CORE = ["model", "accelerator", "dataset", "vision_knob", "vision_value", "moe_top_k", "num_active_blocks"]
# What must be alike in two combinations for them to be compared, unless both selections say what it is to be.
ALIKE = [
    *CORE,
    *("revision", "split", "dtype", "attention", "experts", "moe_renormalization", "engine"),
    *("image_size", "tier", "tier_definition", "aspect_distance", *VISION_OPTIONS, "active_blocks"),
    *("prompt", "metric", "scored_max_new_tokens", "scored_batch_size"),
    *("timed_output_tokens", "timed_batch_size", "timed_repeats", "timed_visits"),
    *("timed_max_relative_error", "timed_limit_s", "timed_warmup"),
]
# Columns that say the same thing in several ways: whoever sets one of them sets all.
_TOGETHER = [
    {"vision_knob", "vision_value", "image_size", "tier", "tier_definition"},
    {"num_active_blocks", "active_blocks"},
    {"model", "revision", "moe_renormalization"},
]
# What one of two models or vision settings may lack: null is then like anything.
_MAY_LACK = {"model": {"moe_top_k", "experts"}, "vision_knob": {"aspect_distance", *VISION_OPTIONS}}


def selected(
    combinations: pd.DataFrame, cells: Mapping[str, list[Hashable]], selection: Selection
) -> tuple[list[int], set[str]]:
    """Positions of the combinations that a selection fits, and the columns that it sets."""
    if isinstance(selection, str):
        selection = {"combination_id": selection}
    chosen, sets = set(range(len(combinations))), set[str]()
    for column, allowed in _conditions(selection).items():
        if column == "combination_id":
            ids = combinations[column].astype(str).tolist()
            whole = {_whole_id(ids, str(begin)) for begin in allowed or ids}
            fits = {at for at, name in enumerate(ids) if name in whole}
            sets |= set(ALIKE) - {"accelerator"}
        else:
            of_all = cells.get(column, [None] * len(combinations))
            fits = {at for at, cell in enumerate(of_all) if allowed is None or cell in allowed}
            sets |= {column}.union(*(group for group in _TOGETHER if column in group))
            if not fits:
                there = ", ".join(map(str, sorted(set(of_all), key=rank_of)[:9]))
                raise ValueError(f"no combination has {_in_words(column, allowed)}; there are {there}")
        chosen &= fits
    if not chosen:
        at_once = " and ".join(_in_words(*condition) for condition in _conditions(selection).items())
        raise ValueError(f"no combination has {at_once} at once")
    return sorted(chosen), sets


def _conditions(selection: Mapping[str, Any]) -> dict[str, tuple[Hashable, ...] | None]:
    """The values that each column may have; None for any."""
    conditions: dict[str, tuple[Hashable, ...] | None] = {}
    for name, value in selection.items():
        if name in VISION_AXES:
            conditions["vision_knob"] = (name,)
            values = value if isinstance(value, list | tuple) else [value]
            conditions["vision_value"] = None if value is ... else tuple(map(str, values))
            continue
        if name not in (*ALIKE, "combination_id"):
            near = difflib.get_close_matches(name, [*ALIKE, *VISION_AXES, "combination_id"], 1)
            meant = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"combinations cannot be selected by {name}{meant}")
        if name == "active_blocks" and isinstance(value, int):
            name = "num_active_blocks"
        several = isinstance(value, list | tuple | set | np.ndarray)
        if name == "active_blocks" and several and not any(isinstance(part, list | tuple) for part in value):
            several = False
        if value is ...:
            conditions[name] = None
        else:
            conditions[name] = tuple(plain(part) for part in value) if several else (plain(value),)
    return conditions


def _in_words(column: str, allowed: tuple[Hashable, ...] | None) -> str:
    return f"{column}={'...' if allowed is None else ' or '.join(map(str, allowed))}"


def _whole_id(ids: Iterable[str], begin: str) -> str:
    fitting = sorted({name for name in ids if name.startswith(begin)})
    if begin in fitting:
        return begin
    if len(begin) < FEWEST_DIGITS:
        raise ValueError(f"{begin!r} is too short for the beginning of a combination_id; give {FEWEST_DIGITS} or more")
    if not fitting:
        raise ValueError(f"no combination_id begins with {begin!r}")
    if len(fitting) > 1:
        raise ValueError(f"{begin!r} is the beginning of {len(fitting)} combination ids: {', '.join(fitting[:3])}")
    return fitting[0]


def pairs_of(cells: Mapping[str, list[Hashable]], a: list[int], b: list[int], free: set[str]) -> list[tuple[int, int]]:
    """Each of a with each of b that is alike in all columns but the free ones."""
    may_lack = set().union(*(names for column, names in _MAY_LACK.items() if column in free)) - free
    strict = [name for name in cells if name not in free | may_lack]
    partners: dict[tuple[Hashable, ...], list[int]] = {}
    for at in b:
        partners.setdefault(tuple(cells[name][at] for name in strict), []).append(at)
    pairs = [
        (x, y)
        for x in a
        for y in partners.get(tuple(cells[name][x] for name in strict), [])
        if x != y and all(_like_or_null(cells[name][x], cells[name][y]) for name in may_lack & cells.keys())
    ]
    if pairs:
        return pairs
    if set(a) == set(b):
        raise ValueError("a and b select the same combinations, and no two of them are alike otherwise")
    apart = [name for name in strict if {cells[name][at] for at in a}.isdisjoint(cells[name][at] for at in b)]
    what = f"they differ in {', '.join(apart)}" if apart else "all differ in more than what a and b both set"
    raise ValueError(f"no combination of a can be compared with one of b: {what}; set what may differ in both")


def _like_or_null(x: Hashable, y: Hashable) -> bool:
    return x is None or y is None or x == y


def shown(cells: Mapping[str, list[Hashable]], ids: list[str], pairs: list[tuple[int, int]]) -> pd.DataFrame:
    """Which two are compared: the columns that tell."""
    columns: dict[str, list[Any]] = {
        "combination_a": [ids[x] for x, _ in pairs],
        "combination_b": [ids[y] for _, y in pairs],
    }
    for name in (name for name in ALIKE if name in cells):
        of_a, of_b = [cells[name][x] for x, _ in pairs], [cells[name][y] for _, y in pairs]
        if of_a != of_b:
            columns |= {f"{name}_a": of_a, f"{name}_b": of_b}
        elif name in CORE or len(set(of_a)) > 1:
            columns[name] = of_a
    return pd.DataFrame(columns)


def plain(cell: Any) -> Hashable:
    """A cell that can be compared: None for every kind of null, a tuple for every kind of list."""
    if isinstance(cell, list | tuple | np.ndarray):
        return tuple(plain(part) for part in cell)
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or pd.isna(cell):
        return None
    # Whole numbers become floats in a column that has nulls.
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def rank_of(cell: Hashable) -> tuple[int, float, str]:
    """Sorts cells of any kind: numbers by size, also those that are text, other text, null."""
    if cell is None:
        return 2, 0.0, ""
    try:
        return 0, float(cell), ""  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 1, 0.0, str(cell)

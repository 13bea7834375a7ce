"""Chooses which combinations of the knob levels are run: all of them, a few levels per axis, or a Latin hypercube."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

IMAGE_SIZE = re.compile(r"[0-9]+x[0-9]+")
TIER_ORDER = ("low", "medium", "high")
LEVEL_STRATEGIES = ("full", "balanced", "stratified", "boundary")
STRATEGIES = (*LEVEL_STRATEGIES, "lhs")


def levels(strategy: str, n_levels: int) -> list[int]:
    """The indices of the levels that a strategy keeps of an axis with `n_levels` sorted levels, ascending, each once.

    Raises:
        ValueError: the strategy does not choose levels axis by axis, or there are no levels.
    """
    if n_levels < 1:
        raise ValueError("an axis needs at least one level")
    n, last = n_levels, n_levels - 1
    match strategy:
        case "full":
            indices = list(range(n))
        case "balanced" if n >= 4:
            indices = [0, n // 3, 2 * n // 3, last]
        case "balanced" | "stratified":
            indices = [0, n // 2, last]
        case "boundary":
            indices = [0, n // 4, n // 2, 3 * n // 4, last]
        case _:
            raise ValueError(f"{strategy!r} is not one of {', '.join(LEVEL_STRATEGIES)}")
    return sorted(set(indices))


def sample(axes: Mapping[str, Sequence[T]], strategy: str, n: int | None = None, seed: int = 0) -> list[dict[str, T]]:
    """The combinations to run, in the order of the product of the sorted levels (the first axis varies slowest).

    `lhs` draws `n` points; points that fall on the same combination of levels are returned once, so that there may be
    fewer than `n`. Without axes there is one combination, the empty one: every knob at the model's own setting.

    Raises:
        ValueError: unknown strategy, an axis without levels, `lhs` without a positive `n`, or `n` with another one.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}")
    if empty := [name for name, axis_levels in axes.items() if not axis_levels]:
        raise ValueError(f"axis {empty[0]} has no levels")
    if (strategy == "lhs") != (n is not None):
        raise ValueError("lhs needs n" if strategy == "lhs" else f"n belongs to lhs, not to {strategy}")
    ordered = {name: in_order(axis_levels) for name, axis_levels in axes.items()}
    if n is not None:
        points = latin_hypercube({name: len(axis_levels) for name, axis_levels in ordered.items()}, n, seed)
    else:
        points = list(itertools.product(*(levels(strategy, len(axis_levels)) for axis_levels in ordered.values())))
    return [{name: ordered[name][index] for name, index in zip(ordered, point, strict=True)} for point in points]


def latin_hypercube(n_levels: Mapping[str, int], n: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Level indices of the distinct points of a Latin hypercube of `n` points, sorted.

    Raises:
        ValueError: `n` is below one.
    """
    if n < 1:
        raise ValueError("lhs needs n >= 1")
    columns = [stratum_levels(name, count, n, seed) for name, count in n_levels.items()]
    return sorted(set(zip(*columns, strict=True))) or [()]


def stratum_levels(axis: str, n_levels: int, n: int, seed: int) -> list[int]:
    """One axis of a Latin hypercube: each of `n` equal strata once, in random order, as the level its centre falls on.

    The centre of stratum s lies at (2s + 1) / 2n of the axis, so that the use of any two levels differs by at most one.
    """
    # Seeded by text: the same on every platform and in every process, and an axis that is added moves no other axis.
    # Only random() is promised to give the same numbers in every version of Python, so the shuffle is built on it.
    generator = random.Random(f"{seed}:{axis}")
    order = [generator.random() for _ in range(n)]
    return [(2 * stratum + 1) * n_levels // (2 * n) for stratum in sorted(range(n), key=order.__getitem__)]


def in_order(axis_levels: Sequence[T]) -> list[T]:
    """Levels from little to much: numbers ascending, false before true, image sizes by area, tiers from low to high.

    A number of blocks comes before a list of as many, shorter lists before longer ones, then by index. Anything else
    (names that are not all tiers) keeps the order it was written in.
    """
    names = [level for level in axis_levels if isinstance(level, str)]
    if not names:
        return sorted(axis_levels, key=_amount)
    if len(names) == len(axis_levels) and all(IMAGE_SIZE.fullmatch(name) for name in names):
        return sorted(axis_levels, key=lambda size: _pixel_area(str(size)))
    if len(names) == len(axis_levels) and all(name in TIER_ORDER for name in names):
        return sorted(axis_levels, key=lambda tier: TIER_ORDER.index(str(tier)))
    return list(axis_levels)


def _pixel_area(image_size: str) -> int:
    height, width = image_size.split("x")
    return int(height) * int(width)


def _amount(level: Any) -> tuple[float, tuple[int, ...]]:
    return (len(level), tuple(level)) if isinstance(level, list | tuple) else (level, ())

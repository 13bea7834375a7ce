"""Which grid of crops suits an image: exact crop counts, tiers, and the distance between two aspects; no pixels yet."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# Rows and columns.
Tiling = tuple[int, int]
AspectDistance = Literal["linear", "log"]
ASPECT_DISTANCES: tuple[AspectDistance, ...] = ("linear", "log")

# Of the preferred crop counts the best is taken if its aspect differs from the image's by less than this.
MISMATCH_THRESHOLD = 0.3


@dataclass(frozen=True)
class Tier:
    """A range of crop counts within which every image gets the count that suits its shape.

    Attributes:
        min_crops, max_crops: the range, both included; the global view is not counted.
        preferred_crops: tried first; another count is taken only if none of these suits.
        mismatch_threshold: a preferred count suits if its mismatch of aspect is below this.

    Raises:
        ValueError: preferred crops outside the range, or a range that holds no count.
    """

    name: str
    min_crops: int
    max_crops: int
    preferred_crops: tuple[int, ...]
    mismatch_threshold: float = MISMATCH_THRESHOLD

    def __post_init__(self) -> None:
        # Compared, not listed: a range may be as long as somebody likes to write it.
        within = all(self.min_crops <= crops <= self.max_crops for crops in self.preferred_crops)
        if self.min_crops < 1 or not self.preferred_crops or not within:
            raise ValueError(
                f"tier {self.name}: preferred_crops must be some of {self.min_crops} to {self.max_crops}, all of them "
                "above 0"
            )


TIERS = {
    tier.name: tier
    for tier in (
        Tier("low", 1, 3, (2, 3)),
        Tier("medium", 4, 8, (4, 6, 8)),
        Tier("high", 9, 15, (9, 12, 15)),
    )
}


def grids(crops: int, most_per_side: int | None = None) -> list[Tiling]:
    """Every tiling of exactly `crops` crops with at most `most_per_side` rows and columns, fewer rows first."""
    most = crops if most_per_side is None else most_per_side
    return [(r, crops // r) for r in range(1, min(crops, most) + 1) if crops % r == 0 and crops // r <= most]


def exact_tiling(
    image_h: int,
    image_w: int,
    crops: int,
    aspect_distance: AspectDistance = "linear",
    *,
    most_per_side: int | None = None,
) -> Tiling:
    """Rows and columns with exactly `crops` crops whose aspect is nearest to that of the image.

    linear: |columns/rows - width/height| in float32, fewer rows first among equals; it sees a portrait and its
    landscape mirror differently (3 crops for a square are 3 x 1). log: |log| of the quotient of the two aspects,
    squarer grids first, so that mirrored images get mirrored grids.

    Args:
        image_h, image_w: pixels, after the margins of the canvas have been taken off; may be 0 or less.
        most_per_side: bound on rows and on columns.

    Raises:
        ValueError: no grid of so many crops keeps to that bound.
    """
    possible = grids(crops, most_per_side)
    if not possible:
        raise ValueError(f"no grid of {crops} crops has at most {most_per_side} rows and columns")
    if aspect_distance == "log":
        possible.sort(key=lambda grid: abs(grid[0] - grid[1]))
        return min(possible, key=lambda grid: tiling_mismatch(image_h, image_w, grid, "log"))
    aspect = float32(_aspect(image_h, image_w))
    return min(possible, key=lambda grid: float32(abs(float32(grid[1] / grid[0]) - aspect)))


def select_crops_for_tier(
    tier: Tier,
    image_h: int,
    image_w: int,
    *,
    aspect_distance: AspectDistance = "linear",
    most_per_side: int | None = None,
) -> tuple[int, Tiling, float]:
    """The crop count of a tier that suits an image.

    Preferred counts first: the one of least mismatch is taken if that is below the tier's threshold. Otherwise every
    count of the tier competes, and a preferred one keeps its place unless another is strictly better. Counts that no
    grid within `most_per_side` has are passed over.

    Args:
        image_h, image_w: pixels, after the margins of the canvas have been taken off; may be 0 or less.

    Returns:
        crops (without the global view), tiling, and mismatch of aspect in the units of `aspect_distance`.

    Raises:
        ValueError: no count of the tier has a grid within `most_per_side`.
    """

    # Beyond this no count has a grid.
    most = tier.max_crops if most_per_side is None else min(tier.max_crops, most_per_side**2)

    def candidates(counts: Iterable[int]) -> list[tuple[int, Tiling, float]]:
        found = []
        for crops in counts:
            if grids(crops, most_per_side):
                tiling = exact_tiling(image_h, image_w, crops, aspect_distance, most_per_side=most_per_side)
                found.append((crops, tiling, tiling_mismatch(image_h, image_w, tiling, aspect_distance)))
        return found

    preferred = candidates(tier.preferred_crops)
    best = min(preferred, key=lambda c: c[2], default=None)
    if best is not None and best[2] < tier.mismatch_threshold:
        return best
    others = candidates(n for n in range(tier.min_crops, most + 1) if n not in tier.preferred_crops)
    competing = ([] if best is None else [best]) + others
    if not competing:
        raise ValueError(f"tier {tier.name}: none of its crop counts has a grid of at most {most_per_side} a side")
    return min(competing, key=lambda c: c[2])


def tiling_mismatch(image_h: int, image_w: int, tiling: Tiling, aspect_distance: AspectDistance = "linear") -> float:
    """Distance between the aspect of a tiling and that of an image (pixels, margins taken off); 0 is undistorted.

    linear: difference of width/height. log: absolute logarithm of the quotient of the two, for positive sides only.
    """
    rows, columns = tiling
    if aspect_distance == "linear":
        return abs(columns / rows - _aspect(image_h, image_w))
    # Whole numbers until one division: an image and its mirror must give the same float.
    ours, theirs = columns * image_h, rows * image_w
    return math.log(max(ours, theirs) / min(ours, theirs))


def float32(value: float) -> float:
    """`value` rounded to single precision, in which the published preprocessing of Molmo does this arithmetic."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _aspect(image_h: int, image_w: int) -> float:
    """Width/height; 1 for an image of which the margins leave no height, negative if they leave no width."""
    return image_w / image_h if image_h > 0 else 1.0

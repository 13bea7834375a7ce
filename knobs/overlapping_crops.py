"""The grid of overlapping crops that Molmo cuts an image into, and what it costs in tokens; plain arithmetic."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

from knobs.vision import VisionLayout, VisionSetting

# Pixels. A crop is 24 x 24 patches of 14; neighbours overlap by half a margin on either side of their common edge.
CROP, STRIDE = 336, 224
MARGIN = CROP - STRIDE
PATCH = 14
PATCHES_PER_SIDE = CROP // PATCH

# Pooling joins 2 x 2 patches, so a crop is 12 x 12 vision tokens.
CELL = 2 * PATCH
CELLS_PER_SIDE = CROP // CELL
CELLS_PER_STRIDE = STRIDE // CELL
TOKENS_PER_CROP = CELLS_PER_SIDE**2

Tiling = tuple[int, int]
AspectDistance = Literal["linear", "log"]


@dataclass(frozen=True)
class Tier:
    """A range of crop counts within which every image gets the count that suits its shape.

    Attributes:
        min_crops, max_crops: the range, both included; the global view is not counted.
        preferred_crops: tried first; another count is taken only if none of these suits.
    """

    name: str
    min_crops: int
    max_crops: int
    preferred_crops: tuple[int, ...]

    def __post_init__(self) -> None:
        allowed = range(self.min_crops, self.max_crops + 1)
        if self.min_crops < 1 or not self.preferred_crops or not set(self.preferred_crops) <= set(allowed):
            raise ValueError(f"tier {self.name}: preferred_crops must be some of {list(allowed)}, all of them above 0")


TIERS = {
    tier.name: tier
    for tier in (
        Tier("low", 1, 3, (2, 3)),
        Tier("medium", 4, 8, (4, 6, 8)),
        Tier("high", 9, 15, (9, 12, 15)),
    )
}
# Of the preferred crop counts the best is taken if its aspect differs from the image's by less than this.
MISMATCH_THRESHOLD = 0.3


def adaptive_tiling(height: int, width: int, max_crops: int) -> Tiling:
    """Rows and columns that the model's own preprocessing chooses for an image of `height` x `width` pixels.

    The grid of at most `max_crops` crops that needs the least enlargement to hold the image without its margins, or,
    where every grid is too small, the one that shrinks it least. Of equal grids the one with fewer crops, then fewer
    rows wins. Evaluated in float32, because ties are decided by rounding.
    """
    inner_height, inner_width = height - MARGIN, width - MARGIN
    grids = sorted(
        [(r, c) for r in range(1, max_crops + 1) for c in range(1, max_crops // r + 1)],
        key=lambda grid: (grid[0] * grid[1], grid[0]),
    )
    # An image no larger than the margin has a negative scale for every grid, hence the mildest: 1 x 1.
    scales = [min(_scale(STRIDE * r, inner_height), _scale(STRIDE * c, inner_width)) for r, c in grids]
    enough = [scale for scale in scales if scale >= 1]
    return grids[scales.index(min(enough) if enough else max(scales))]


def exact_tiling(height: int, width: int, crops: int, aspect_distance: AspectDistance = "linear") -> Tiling:
    """Rows and columns with exactly `crops` crops whose aspect is nearest to that of the image without its margins.

    linear: |columns/rows - width/height| in float32, fewer rows first among equals; it sees a portrait and its
    landscape mirror differently (3 crops for a square are 3 x 1). log: |log| of the quotient of the two aspects,
    squarer grids first, so that mirrored images get mirrored grids.
    """
    grids = [(r, crops // r) for r in range(1, crops + 1) if crops % r == 0]
    if aspect_distance == "log":
        grids.sort(key=lambda grid: abs(grid[0] - grid[1]))
        return min(grids, key=lambda grid: tiling_mismatch(height, width, grid, "log"))
    aspect = float32(_inner_aspect(height, width))
    return min(grids, key=lambda grid: float32(abs(float32(grid[1] / grid[0]) - aspect)))


def canvas_tiling(height: int, width: int) -> Tiling:
    """Rows and columns of the canvas nearest to a requested size in pixels; a half rounds to the even count."""
    return max(1, round((height - MARGIN) / STRIDE)), max(1, round((width - MARGIN) / STRIDE))


def select_crops_for_tier(
    tier: Tier,
    image_h: int,
    image_w: int,
    *,
    mismatch_threshold: float = MISMATCH_THRESHOLD,
    aspect_distance: AspectDistance = "linear",
) -> tuple[int, Tiling, float]:
    """The crop count of a tier that suits an image of `image_h` x `image_w` pixels, margins included.

    Preferred counts first: the one of least mismatch is taken if that is below the threshold. Otherwise every count
    of the tier competes, and a preferred one keeps its place unless another is strictly better.

    Returns:
        crops (without the global view), tiling, and mismatch of aspect in the units of `aspect_distance`.
    """

    def candidate(crops: int) -> tuple[int, Tiling, float]:
        tiling = exact_tiling(image_h, image_w, crops, aspect_distance)
        return crops, tiling, tiling_mismatch(image_h, image_w, tiling, aspect_distance)

    preferred = [candidate(crops) for crops in tier.preferred_crops]
    best = min(preferred, key=lambda c: c[2])
    if best[2] < mismatch_threshold:
        return best
    others = [candidate(n) for n in range(tier.min_crops, tier.max_crops + 1) if n not in tier.preferred_crops]
    return min([best, *others], key=lambda c: c[2])


def tiling_for(
    setting: VisionSetting, height: int, width: int, max_crops: int, aspect_distance: AspectDistance = "linear"
) -> Tiling:
    """Rows and columns for an image of `height` x `width` pixels under one level of any vision axis, or native.

    Args:
        max_crops: the checkpoint's own limit, which native preprocessing keeps.

    Raises:
        ValueError, KeyError: a setting that `refuse` of the model's geometry should have stopped.
    """
    value = setting.value
    if setting.knob == "native":
        return adaptive_tiling(height, width, max_crops)
    if setting.knob == "tier":
        return select_crops_for_tier(TIERS[str(value)], height, width, aspect_distance=aspect_distance)[1]
    if setting.knob == "image_size":
        canvas_height, canvas_width = str(value).split("x")
        return canvas_tiling(int(canvas_height), int(canvas_width))
    if setting.knob == "crops":
        return exact_tiling(height, width, int(value or 0), aspect_distance)
    if setting.knob == "vision_tokens":
        return exact_tiling(height, width, crops_for_tokens(int(value or 0)), aspect_distance)
    raise ValueError(f"overlapping crops have no vision axis {setting.knob}")


def tiling_mismatch(height: int, width: int, tiling: Tiling, aspect_distance: AspectDistance = "linear") -> float:
    """Distance between the aspects of a tiling and of an image without its margins; 0 is undistorted.

    linear: difference of width/height. log: absolute logarithm of the quotient of the two. The margins are not
    subtracted for the logarithm where that would leave nothing of the image.
    """
    rows, columns = tiling
    if aspect_distance == "linear":
        return abs(columns / rows - _inner_aspect(height, width))
    if min(height, width) > MARGIN:
        height, width = height - MARGIN, width - MARGIN
    # Whole numbers until one division: an image and its mirror must give the same float.
    ours, theirs = columns * height, rows * width
    return math.log(max(ours, theirs) / min(ours, theirs))


def canvas_size(rows: int, columns: int) -> tuple[int, int]:
    """Height and width in pixels of the canvas that is cut into rows x columns overlapping crops."""
    return rows * STRIDE + MARGIN, columns * STRIDE + MARGIN


def tower_tokens(crops: int) -> int:
    """Vision tokens that the tower and projector emit for `crops` crops and the global view."""
    return (crops + 1) * TOKENS_PER_CROP


def crops_for_tokens(vision_tokens: int) -> int:
    """Crops that come nearest to `vision_tokens` from below, counted as the tower emits them; at least one."""
    return max(1, vision_tokens // TOKENS_PER_CROP - 1)


def prompt_grid(rows: int, columns: int, force_full_tokens: bool = False) -> tuple[int, int]:
    """Rows and columns of vision tokens that stand for the crops in the prompt.

    A cell that neighbouring crops share has one position, so the grid is that of the canvas; with full tokens every
    crop keeps its 12 x 12.
    """
    if force_full_tokens:
        return rows * CELLS_PER_SIDE, columns * CELLS_PER_SIDE
    height, width = canvas_size(rows, columns)
    return height // CELL, width // CELL


def prompt_vision_tokens(rows: int, columns: int, force_full_tokens: bool = False) -> int:
    """Vision tokens that the language model gets: 144 + (8r+4)(8c+4), or 144 (rc+1) with full tokens."""
    grid_rows, grid_columns = prompt_grid(rows, columns, force_full_tokens)
    return TOKENS_PER_CROP + grid_rows * grid_columns


def prompt_image_length(rows: int, columns: int, force_full_tokens: bool = False) -> int:
    """Prompt positions of one image: its vision tokens, one token after every row of them, start and end of each part.

    160 + (8r+4)(8c+5), or 160 + 12r(12c+1) with full tokens; the 160 are the global view and the four marks.
    """
    grid_rows, grid_columns = prompt_grid(rows, columns, force_full_tokens)
    return CELLS_PER_SIDE * (CELLS_PER_SIDE + 1) + grid_rows * (grid_columns + 1) + 4


def crop_layout(rows: int, columns: int, force_full_tokens: bool = False) -> VisionLayout:
    """What a tiling promises; its `vision_tokens` are the tower's, of which the prompt may hold fewer."""
    crops = rows * columns
    in_prompt = prompt_vision_tokens(rows, columns, force_full_tokens)
    return VisionLayout((rows, columns), crops, crops + 1, tower_tokens(crops), *canvas_size(rows, columns), in_prompt)


def float32(value: float) -> float:
    """`value` rounded to single precision, in which the published preprocessing does this arithmetic."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _scale(target: int, size: int) -> float:
    return float32(target / size) if size else math.inf


def _inner_aspect(height: int, width: int) -> float:
    """Width/height without the margins: 1 for an image no higher than the margin, negative for one no wider."""
    return (width - MARGIN) / (height - MARGIN) if height > MARGIN else 1.0

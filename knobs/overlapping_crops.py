"""The grid of overlapping crops that Molmo cuts an image into, and what it costs in tokens; plain arithmetic."""

from __future__ import annotations

import math

from knobs.crop_grid import CropGrid
from knobs.tiling import Tiling, float32

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

# The most that a setting may ask for; the canvas is then 8 x 8 crops, 1904 pixels a side.
MOST_CROPS = 64

GRID = CropGrid(
    stride=STRIDE,
    margin=MARGIN,
    tokens_per_crop=TOKENS_PER_CROP,
    always_overview=True,
    most_crops=MOST_CROPS,
    most_per_side=MOST_CROPS,
)


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


def prompt_grid(rows: int, columns: int, force_full_tokens: bool = False) -> tuple[int, int]:
    """Rows and columns of vision tokens that stand for the crops in the prompt.

    A cell that neighbouring crops share has one position, so the grid is that of the canvas; with full tokens every
    crop keeps its 12 x 12.
    """
    if force_full_tokens:
        return rows * CELLS_PER_SIDE, columns * CELLS_PER_SIDE
    height, width = GRID.canvas_size(rows, columns)
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


def _scale(target: int, size: int) -> float:
    return float32(target / size) if size else math.inf

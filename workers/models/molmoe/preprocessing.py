"""An RGB image becomes what Molmo's vision tower and prompt need: patches, padding masks, positions, image tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from knobs.overlapping_crops import (
    CELLS_PER_SIDE,
    CELLS_PER_STRIDE,
    CROP,
    GRID,
    PATCH,
    PATCHES_PER_SIDE,
    STRIDE,
    TOKENS_PER_CROP,
    prompt_grid,
)
from knobs.placement import Fit, Placement, place
from knobs.tiling import Tiling
from workers.models.molmoe.published import MEAN, STD

# Position of a vision token that the prompt has no place for.
NO_POSITION = -100

# Pixels of a resized image beyond which its rows are resized and cut before its columns, to bound memory.
LARGE = 2**24


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that an image is written with: start and end of a part, one vision token, end of a row."""

    start: int
    end: int
    patch: int
    column: int


@dataclass(frozen=True)
class CutImage:
    """One image for the model; n = crops + 1.

    Attributes:
        images: (n, 576, 588) float32, normalised; the global view, then the crops row by row. Patches and the pixels
            in a patch run row by row too, colour last.
        image_masks: (n, 576) float32, how much of a patch is image and not padding: the crops, then a row of -1.
            The rows are one off against `images`, the published weights were trained so.
        image_input_idx: (n, 144) int64, position in `token_ids` of every pooled cell, or NO_POSITION.
        token_ids: (tokens,) int64, `START (12*PATCH COL)*12 END START (w*PATCH COL)*h END`.
    """

    images: torch.Tensor
    image_masks: torch.Tensor
    image_input_idx: torch.Tensor
    token_ids: torch.Tensor


def preprocess(
    image: Image.Image, tiling: Tiling, special: SpecialTokens, *, fit: Fit = "pad", force_full_tokens: bool = False
) -> CutImage:
    """Cut an RGB image into a global view and a grid of overlapping crops.

    Args:
        tiling: rows and columns of crops.
        fit: how the image is laid on the canvas and on the global view.
        force_full_tokens: give a position to the cells that neighbouring crops share in every crop that has them.
    """
    rows, columns = tiling
    height, width = GRID.canvas_size(rows, columns)
    placement = place(image.height, image.width, height, width, fit)
    pixels = _to_float(image)
    overview = _lay(pixels, place(image.height, image.width, CROP, CROP, fit), CROP, CROP)
    canvas = _lay(pixels, placement, height, width)
    return CutImage(
        _patches(overview, canvas, rows, columns),
        _masks(placement, rows, columns),
        positions(rows, columns, force_full_tokens),
        token_ids(rows, columns, special, force_full_tokens),
    )


def positions(rows: int, columns: int, force_full_tokens: bool = False) -> torch.Tensor:
    """Position among the image tokens of every pooled cell, (crops + 1, 144), or NO_POSITION.

    Of the 4 cells that neighbouring crops share, each crop keeps the 2 on its own side. With full tokens nothing is
    dropped, and cell (y, x) of crop (i, j) is at row 12i + y, column 12j + x of the grid in the prompt.
    """
    grid_rows, grid_columns = prompt_grid(rows, columns, force_full_tokens)
    overview = _grid_positions(CELLS_PER_SIDE, CELLS_PER_SIDE, first=1)
    after_overview = CELLS_PER_SIDE * (CELLS_PER_SIDE + 1) + 2
    grid = _grid_positions(grid_rows, grid_columns, first=after_overview + 1)
    step = CELLS_PER_SIDE if force_full_tokens else CELLS_PER_STRIDE
    crops = grid.unfold(0, CELLS_PER_SIDE, step).unfold(1, CELLS_PER_SIDE, step)
    if not force_full_tokens:
        kept = _kept(rows)[:, None, :, None] & _kept(columns)[None, :, None, :]
        crops = torch.where(kept, crops, NO_POSITION)
    return torch.cat([overview.reshape(1, TOKENS_PER_CROP), crops.reshape(rows * columns, TOKENS_PER_CROP)])


def token_ids(rows: int, columns: int, special: SpecialTokens, force_full_tokens: bool = False) -> torch.Tensor:
    """The image tokens of the prompt: the global view, then the grid of all crops."""
    parts = []
    for height, width in ((CELLS_PER_SIDE, CELLS_PER_SIDE), prompt_grid(rows, columns, force_full_tokens)):
        lines = torch.full((height, width + 1), special.patch)
        lines[:, -1] = special.column
        parts += [torch.tensor([special.start]), lines.flatten(), torch.tensor([special.end])]
    return torch.cat(parts)


def _grid_positions(rows: int, columns: int, first: int) -> torch.Tensor:
    """(rows, columns) consecutive positions from `first`, one left out after each row for its end-of-row token."""
    return torch.arange(first, first + rows * (columns + 1)).view(rows, columns + 1)[:, :columns]


def _kept(crops: int) -> torch.Tensor:
    """Along one axis of the tiling, which of a crop's 12 cells the prompt has a place for; (crops, 12)."""
    shared = (CELLS_PER_SIDE - CELLS_PER_STRIDE) // 2
    kept = torch.ones(crops, CELLS_PER_SIDE, dtype=torch.bool)
    kept[1:, :shared] = False
    kept[:-1, CELLS_PER_SIDE - shared :] = False
    return kept


def _to_float(image: Image.Image) -> torch.Tensor:
    """(1, 3, height, width) float32 in 0 to 1."""
    # A copy: the array is a read-only view where Pillow lends its memory.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(255)[None]


def _lay(pixels: torch.Tensor, placement: Placement, height: int, width: int) -> torch.Tensor:
    """The image resized, laid on black and normalised: (height, width, 3) float32."""
    resized = _resized(pixels, placement, height, width)[0].clamp_(0, 1).permute(1, 2, 0)
    top, left = max(0, placement.top), max(0, placement.left)
    if resized.shape[:2] != (height, width):
        # Black, not the mean: the border is laid before the normalisation.
        canvas = torch.zeros(height, width, 3)
        canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        resized = canvas
    return ((resized - torch.tensor(MEAN)) / torch.tensor(STD)).contiguous()


def _resized(pixels: torch.Tensor, placement: Placement, height: int, width: int) -> torch.Tensor:
    """The part of the resized image that lies on a canvas of `height` x `width`; bilinear, antialiased.

    Each axis on its own, so that what hangs over is cut off before the other axis makes it larger. Width first is
    what one call over both axes does, to the bit.
    """

    def along_width(source: torch.Tensor) -> torch.Tensor:
        return _interpolate(source, source.shape[2], placement.width).narrow(
            3, max(0, -placement.left), min(width, placement.width)
        )

    def along_height(source: torch.Tensor) -> torch.Tensor:
        return _interpolate(source, placement.height, source.shape[3]).narrow(
            2, max(0, -placement.top), min(height, placement.height)
        )

    if placement.height * min(width, placement.width) > LARGE:
        return along_width(along_height(pixels))
    return along_height(along_width(pixels))


def _interpolate(source: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        source, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )


def _patches(overview: torch.Tensor, canvas: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Global view (336, 336, 3) and canvas as patches (crops + 1, 576, 588)."""
    side, run = PATCHES_PER_SIDE, PATCH * 3
    # Runs of 14 pixels with their colours stay together, which makes the copies fast.
    images = torch.empty(rows * columns + 1, side, side, PATCH, run)
    images[0] = overview.view(side, PATCH, side, run).transpose(1, 2)
    windows = canvas.flatten(1).unfold(0, CROP, STRIDE).unfold(1, CROP * 3, STRIDE * 3)
    cut = windows.view(rows, columns, side, PATCH, side, run).transpose(3, 4)
    images[1:].view(rows, columns, side, side, PATCH, run).copy_(cut)
    return images.view(-1, side * side, PATCH * run)


def _masks(placement: Placement, rows: int, columns: int) -> torch.Tensor:
    """Share of image in every patch of the crops, then a row of -1: (crops + 1, 576)."""
    down = _covered(placement.top, placement.height, rows)
    across = _covered(placement.left, placement.width, columns)
    shares = down[:, None, :, None] * across[None, :, None, :] / PATCH**2
    rest = torch.full((1, PATCHES_PER_SIDE**2), -1.0)
    return torch.cat([shares.reshape(rows * columns, PATCHES_PER_SIDE**2), rest])


def _covered(start: int, length: int, crops: int) -> torch.Tensor:
    """Along one axis, pixels of the image in each patch of each crop: (crops, 24) float32."""
    at = torch.arange(GRID.canvas_size(crops, crops)[0])
    inside = ((at >= start) & (at < start + length)).float()
    return inside.unfold(0, CROP, STRIDE).view(crops, PATCHES_PER_SIDE, PATCH).sum(-1)

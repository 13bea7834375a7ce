"""Where the parts of a canvas lie: the image, the crops, what neighbours share, what is padding and what is cut off."""

from __future__ import annotations

from dataclasses import dataclass

from knobs.placement import Fit, place
from knobs.vision import VisionLayout


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of a canvas, whose corner is (0, 0); right and bottom are the first pixels outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        return self.width * self.height

    def within(self, other: Box) -> Box:
        """The part of it that lies in another box; no wider or no higher than nothing where the two do not meet."""
        return Box(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    def without(self, hole: Box) -> tuple[Box, ...]:
        """What a hole inside it leaves: above, below, left and right of the hole, where there is something."""
        around = (
            Box(self.left, self.top, self.right, hole.top),
            Box(self.left, hole.bottom, self.right, self.bottom),
            Box(self.left, hole.top, hole.left, hole.bottom),
            Box(hole.right, hole.top, self.right, hole.bottom),
        )
        return tuple(box for box in around if box.width > 0 and box.height > 0)


@dataclass(frozen=True)
class CanvasParts:
    """One image on one canvas.

    Attributes:
        canvas: what is cut into crops.
        image: the whole resized image; reaches over the canvas where it is cut off.
        crops: row by row, as the vision tower gets them.
        shared: bands that lie in two neighbouring crops, or in four where two bands cross.
        padding: parts of the canvas that no image covers.
        cut_off: parts of the image that are not on the canvas.
    """

    canvas: Box
    image: Box
    crops: tuple[Box, ...]
    shared: tuple[Box, ...]
    padding: tuple[Box, ...]
    cut_off: tuple[Box, ...]


def canvas_parts(height: int, width: int, layout: VisionLayout, fit: Fit, margin: int = 0) -> CanvasParts:
    """The parts of the canvas of an image of `height` x `width` pixels.

    Args:
        fit: how the image is laid on the canvas.
        margin: pixels that neighbouring crops share.
    """
    canvas = Box(0, 0, layout.target_width, layout.target_height)
    (rows, columns), (down, across) = layout.tiling, _strides(layout, margin)
    crops = tuple(
        Box(across * j, down * i, across * (j + 1) + margin, down * (i + 1) + margin)
        for i in range(rows)
        for j in range(columns)
    )
    shared = () if margin == 0 else (
        *(Box(across * j, 0, across * j + margin, canvas.bottom) for j in range(1, columns)),
        *(Box(0, down * i, canvas.right, down * i + margin) for i in range(1, rows)),
    )  # fmt: skip
    return _parts(canvas, _placed(height, width, canvas, fit), crops, shared)


def view_parts(height: int, width: int, layout: VisionLayout, fit: Fit, margin: int = 0) -> CanvasParts | None:
    """The same of the global view, which is as large as a crop; None where there is none.

    Families whose crops overlap lay the image anew on a canvas of one crop; the others squeeze the canvas into it.
    """
    if layout.tower_passes == layout.num_crops:
        return None
    down, across = _strides(layout, margin)
    view = Box(0, 0, across + margin, down + margin)
    if margin:
        return _parts(view, _placed(height, width, view, fit), (view,), ())
    image = _placed(height, width, Box(0, 0, layout.target_width, layout.target_height), fit)
    squeezed = Box(
        round(image.left * view.right / layout.target_width),
        round(image.top * view.bottom / layout.target_height),
        round(image.right * view.right / layout.target_width),
        round(image.bottom * view.bottom / layout.target_height),
    )
    return _parts(view, squeezed, (view,), ())


def _strides(layout: VisionLayout, margin: int) -> tuple[int, int]:
    """Pixels from one crop to the next, down and across."""
    rows, columns = layout.tiling
    return (layout.target_height - margin) // rows, (layout.target_width - margin) // columns


def _placed(height: int, width: int, canvas: Box, fit: Fit) -> Box:
    at = place(height, width, canvas.height, canvas.width, fit)
    return Box(at.left, at.top, at.left + at.width, at.top + at.height)


def _parts(canvas: Box, image: Box, crops: tuple[Box, ...], shared: tuple[Box, ...]) -> CanvasParts:
    seen = image.within(canvas)
    return CanvasParts(canvas, image, crops, shared, canvas.without(seen), image.without(seen))

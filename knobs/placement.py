"""How an image is laid on the canvas that is cut into crops: letterboxed, filling it, or stretched over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from knobs.tiling import float32
from knobs.vision import VisionSetting

# pad: the whole image, centred, black around it. fill: the canvas is covered, the overhang cut off. Both keep the
# aspect. stretch: both sides scaled to the canvas.
Fit = Literal["pad", "fill", "stretch"]


@dataclass(frozen=True)
class Placement:
    """A resized image on a canvas, in pixels.

    Attributes:
        height, width: size after the resize.
        top, left: where its corner lies on the canvas; negative where the image is cut off.
    """

    height: int
    width: int
    top: int
    left: int


def fit_of(setting: VisionSetting) -> Fit:
    """How a completed setting lays an image on its canvas."""
    if setting.resize_to_fill is None:
        return "stretch"
    return "fill" if setting.resize_to_fill else "pad"


def place(height: int, width: int, canvas_height: int, canvas_width: int, fit: Fit) -> Placement:
    """Size and place of a `height` x `width` image on a canvas, centred.

    pad rounds down and fill rounds up; the factors are float32, as in the published preprocessing of Molmo.
    """
    if fit == "stretch":
        return Placement(canvas_height, canvas_width, 0, 0)
    if fit == "pad":
        scale = min(float32(canvas_height / height), float32(canvas_width / width))
        # At least a pixel, for images hundreds of times longer than wide.
        new_height, new_width = (max(1, int(float32(side * scale))) for side in (height, width))
    else:
        scale = max(float32(canvas_height / height), float32(canvas_width / width))
        new_height = max(canvas_height, math.ceil(float32(height * scale)))
        new_width = max(canvas_width, math.ceil(float32(width * scale)))
    # int() rounds toward zero: of an odd border or overhang the smaller half is above and on the left.
    return Placement(new_height, new_width, int((canvas_height - new_height) / 2), int((canvas_width - new_width) / 2))

"""The vision knob: what a setting promises for an image, as plain arithmetic that each model family supplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

NATIVE = "native"

# Every vision axis a sweep may name; a sweep uses one of them, or none (native).
VISION_AXES = ("image_size", "vision_tokens", "tier", "crops", "longest_edge", "tiles")


@dataclass(frozen=True)
class VisionSetting:
    """One level of one vision axis. `native` leaves the model's own preprocessing as its checkpoint has it."""

    knob: str = NATIVE
    value: int | str | None = None

    def __str__(self) -> str:
        return self.knob if self.value is None else f"{self.knob}={self.value}"


@dataclass(frozen=True)
class VisionLayout:
    """What a family's closed form says of one image under one setting.

    Attributes:
        tiling: rows, columns of the crops; (1, 1) is an image that is not split.
        num_crops: crops without the global view (thumbnail).
        tower_passes: images that go through the vision tower: the crops and, where there is one, the global view.
        vision_tokens: tokens that the tower and projector emit.
        target_height, target_width: pixels of the canvas that is cut into crops.
        prompt_vision_tokens: those of them that get a place in the prompt; crops that overlap share places.
    """

    tiling: tuple[int, int]
    num_crops: int
    tower_passes: int
    vision_tokens: int
    target_height: int
    target_width: int
    prompt_vision_tokens: int


def aspect_mismatch(height: int, width: int, layout: VisionLayout) -> float:
    """Absolute difference of width/height between the image and the canvas it is laid on; 0 is undistorted."""
    return abs(layout.target_width / layout.target_height - width / height)


class VisionGeometry(Protocol):
    """What the vision knob needs of a model family; pure arithmetic, no weights and no images."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The vision axes this family has, beside native."""

    def refuse(self, setting: VisionSetting) -> str | None:
        """Why this family cannot take `setting`, or None if it can."""

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout | None:
        """The closed form for an image of `height` x `width` pixels; None if the family has none."""

    def pinned(self, setting: VisionSetting) -> VisionLayout | None:
        """The layout where it is the same for every image, else None; its tiling and target mean nothing."""

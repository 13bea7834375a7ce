"""The vision knob: what a setting promises for an image, as plain arithmetic that each model family supplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from knobs.tiling import AspectDistance, Tier, Tiling

NATIVE = "native"

# Every vision axis a sweep may name; a sweep uses one of them, or none (native).
VISION_AXES = ("image_size", "vision_tokens", "tier", "crops", "longest_edge", "tiles")

# Those under which the tiling of an image is chosen by its aspect.
BY_ASPECT = ("vision_tokens", "crops", "tier")

# Axes of their own beside it, where a family has them.
VISION_OPTIONS = ("force_full_tokens", "resize_to_fill")


@dataclass(frozen=True)
class VisionSetting:
    """One level of one vision axis. `native` leaves the model's own preprocessing as its checkpoint has it.

    Whatever is None is left to the family; `VisionGeometry.complete` says what that comes to.

    Attributes:
        knob, value: the axis and its level; `native` has no level.
        tier: definition of the tier, where the axis is `tier`; the built-in one of that name if None.
        aspect_distance: how the tiling of an image is chosen, where the axis leaves a choice.
        force_full_tokens: every crop keeps all of its vision tokens, also those that neighbouring crops share.
        resize_to_fill: True covers the canvas and cuts off what hangs over, False lays the whole image on it with
            black around. None is the family's own way, which may be to stretch.
    """

    knob: str = NATIVE
    value: int | str | None = None
    tier: Tier | None = None
    aspect_distance: AspectDistance | None = None
    force_full_tokens: bool | None = None
    resize_to_fill: bool | None = None

    def __str__(self) -> str:
        words = [self.knob if self.value is None else f"{self.knob}={self.value}"]
        if self.aspect_distance == "log" and self.knob in BY_ASPECT:
            words.append("aspect_distance=log")
        if self.force_full_tokens:
            words.append("force_full_tokens=true")
        if self.resize_to_fill is not None:
            words.append(f"resize_to_fill={str(self.resize_to_fill).lower()}")
        return ", ".join(words)


@dataclass(frozen=True)
class VisionLayout:
    """What a family's closed form says of one image under one setting.

    Attributes:
        tiling: rows, columns of the crops; (1, 1) is an image that is not split.
        num_crops: crops without the global view (thumbnail).
        tower_passes: images that go through the vision tower: the crops and, where there is one, the global view.
        vision_tokens: tokens that the tower and projector emit; `theoretical_vision_tokens` in results.
        target_height, target_width: pixels of the canvas that is cut into crops.
        prompt_vision_tokens: those of them that get a place in the prompt; crops that overlap share places.
        special_tokens: other tokens of the prompt that belong to the image: starts, ends, rows, names of crops.
        aspect_mismatch: |columns/rows - width/height of the image, margins of the canvas taken off|; 0 is undistorted.
    """

    tiling: Tiling
    num_crops: int
    tower_passes: int
    vision_tokens: int
    target_height: int
    target_width: int
    prompt_vision_tokens: int
    special_tokens: int
    aspect_mismatch: float


class VisionGeometry(Protocol):
    """What the vision knob needs of a model family; pure arithmetic, no weights and no images."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The vision axes this family has, beside native."""

    @property
    def options(self) -> tuple[str, ...]:
        """The axes of VISION_OPTIONS that this family has."""

    @property
    def unknown(self) -> str | None:
        """Why nothing is known of how this model cuts images, and the remedy; None where that is known."""

    def refuse(self, setting: VisionSetting) -> str | None:
        """Why this family cannot take `setting`, or None if it can."""

    def complete(self, setting: VisionSetting) -> VisionSetting:
        """The setting with nothing left to a default, so that equal settings are equal objects."""

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout | None:
        """The closed form for an image of `height` x `width` pixels; None if the family has none."""

    def levels(self) -> list[VisionSetting]:
        """Settings worth knowing, native first, then level by level of every axis."""

    def pinned(self, setting: VisionSetting) -> VisionLayout | None:
        """The layout where it is the same for every image, else None; tiling, target and mismatch mean nothing."""


class NativeGeometry:
    """A family without a vision knob: it takes images as its own processor makes them, and promises nothing."""

    axes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    unknown: str | None = None

    def refuse(self, setting: VisionSetting) -> str | None:
        if setting.knob != NATIVE:
            return f"this family has no vision knob {setting.knob}"
        return refuse_options(setting, self.options)

    def complete(self, setting: VisionSetting) -> VisionSetting:
        return setting

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout | None:
        return None

    def levels(self) -> list[VisionSetting]:
        return [VisionSetting()]

    def pinned(self, setting: VisionSetting) -> VisionLayout | None:
        return None


class UnknownGeometry(NativeGeometry):
    """Of a model whose files do not say how it cuts images: native as for any other, whatever its family has."""

    def __init__(self, reason: str) -> None:
        self.unknown = reason

    def refuse(self, setting: VisionSetting) -> str | None:
        lacking = setting.knob != NATIVE or refuse_options(setting, self.options) is not None
        return self.unknown if lacking else None


def refuse_options(setting: VisionSetting, options: tuple[str, ...]) -> str | None:
    """Why a family with these options cannot take those of `setting`, or None."""
    lacking = [name for name in VISION_OPTIONS if getattr(setting, name) is not None and name not in options]
    return f"this family has no {lacking[0]}" if lacking else None


def as_int(value: int | str | None) -> int | None:
    """A knob value as a whole number, or None if it is something else."""
    return value if type(value) is int else None

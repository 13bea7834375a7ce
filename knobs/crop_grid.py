"""The vision axes that every family of crops has, from one description of its grid: image_size, tokens, crops, tier."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from knobs.tiling import (
    TIERS,
    AspectDistance,
    Tier,
    Tiling,
    exact_tiling,
    grids,
    select_crops_for_tier,
    tiling_mismatch,
)
from knobs.vision import BY_ASPECT, NATIVE, VisionLayout, VisionSetting, as_int, refuse_options

# Grids and crop counts that a table of settings shows.
_SHOWN_TILINGS: tuple[Tiling, ...] = ((1, 1), (2, 1), (2, 2), (2, 3), (3, 3), (3, 4))
_SHOWN_CROPS = (1, 2, 4, 6, 9, 12)
GRID_AXES = ("image_size", "vision_tokens", "crops", "tier")


@dataclass(frozen=True)
class CropGrid:
    """A canvas cut into equal square crops, as a family's preprocessing does it.

    Attributes:
        stride: pixels from one crop to the next.
        margin: pixels that a crop is larger than its stride, so that neighbours overlap.
        tokens_per_crop: vision tokens that the tower and projector make of one crop.
        always_overview: whether there is a global view beside a single crop too.
        most_crops: bound on the crops of a grid.
        most_per_side: bound on its rows and on its columns.
    """

    stride: int
    margin: int
    tokens_per_crop: int
    always_overview: bool
    most_crops: int
    most_per_side: int

    def tower_passes(self, crops: int) -> int:
        """Images that go through the vision tower for so many crops."""
        return crops + 1 if self.always_overview or crops > 1 else crops

    def tower_tokens(self, crops: int) -> int:
        """Vision tokens that the tower and projector emit for so many crops and the global view."""
        return self.tower_passes(crops) * self.tokens_per_crop

    def crops_for_tokens(self, vision_tokens: int) -> int:
        """Crops that come nearest to `vision_tokens` from below and have a grid; at least one."""
        fitting = (n for n in range(self.most_crops, 0, -1) if self.tower_tokens(n) <= vision_tokens)
        return next((n for n in fitting if grids(n, self.most_per_side)), 1)

    def canvas_tiling(self, height: int, width: int) -> Tiling:
        """Rows and columns of the canvas nearest to a requested size in pixels; a half rounds to the even count."""
        return (
            max(1, round((height - self.margin) / self.stride)),
            max(1, round((width - self.margin) / self.stride)),
        )

    def canvas_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width in pixels of the canvas that is cut into rows x columns crops."""
        return rows * self.stride + self.margin, columns * self.stride + self.margin

    def inner_size(self, height: int, width: int, aspect_distance: AspectDistance = "linear") -> tuple[int, int]:
        """Sides of an image without the margins of the canvas, by whose aspect a tiling is chosen.

        For the logarithm the margins stay where taking them off would leave nothing of the image.
        """
        if aspect_distance == "log" and min(height, width) <= self.margin:
            return height, width
        return height - self.margin, width - self.margin


class CropGridGeometry(ABC):
    """`VisionGeometry` of a family that cuts images into crops; it supplies its grid, its own dial and its prompt.

    Attributes:
        dial: the family's own axis (`longest_edge`, `tiles`), or None.
        options: axes of `VISION_OPTIONS` that it has.
    """

    dial: str | None = None
    options: tuple[str, ...] = ("resize_to_fill",)
    unknown: str | None = None

    @property
    @abstractmethod
    def grid(self) -> CropGrid:
        """The grid that the family cuts its canvas into."""

    @property
    def axes(self) -> tuple[str, ...]:
        return GRID_AXES if self.dial is None else (self.dial, *GRID_AXES)

    @abstractmethod
    def own_tiling(self, height: int, width: int, setting: VisionSetting) -> Tiling:
        """Rows and columns that the model's own preprocessing chooses, native or under the family's dial."""

    @abstractmethod
    def prompt_tokens(self, tiling: Tiling, setting: VisionSetting) -> tuple[int, int]:
        """Vision tokens and special tokens that stand for an image of this tiling in the prompt."""

    def refuse_dial(self, value: int | str | None) -> str | None:
        """Why the family's own dial has no such level, or None."""
        return f"this family has no vision knob {self.dial}"

    def dial_levels(self) -> Sequence[int]:
        """Levels of the family's own dial that are worth knowing."""
        return ()

    def takes_whole_image(self, setting: VisionSetting) -> bool:
        """Whether a completed setting leaves the image to the family's own preprocessing, from the first resize on."""
        return setting.knob in (NATIVE, self.dial) and setting.resize_to_fill is None

    def own_pinned(self, setting: VisionSetting) -> int | None:
        """Crops, where native preprocessing or the dial gives every image the same number; else None."""
        return None

    # -- the protocol -----------------------------------------------------------------------------------------------

    def refuse(self, setting: VisionSetting) -> str | None:
        value, grid = setting.value, self.grid
        if reason := refuse_options(setting, self.options):
            return reason
        match setting.knob:
            case "native":
                return None
            case "tier":
                return self._refuse_tier(setting)
            case "image_size":
                size = canvas_of(value)
                if size is None:
                    return "image_size must be HEIGHTxWIDTH in pixels"
                rows, columns = grid.canvas_tiling(*size)
                if rows * columns > grid.most_crops:
                    return f"image_size must need at most {grid.most_crops} crops, this one needs {rows * columns}"
                if max(rows, columns) > grid.most_per_side:
                    return f"image_size must need at most {grid.most_per_side} rows and columns of crops"
                return None
            case "crops":
                crops = as_int(value)
                if crops is None or not 1 <= crops <= grid.most_crops:
                    return f"crops must be 1 to {grid.most_crops}"
                return None if grids(crops, grid.most_per_side) else self._no_grid(crops)
            case "vision_tokens":
                tokens = as_int(value)
                least, most = grid.tower_tokens(1), grid.tower_tokens(grid.most_crops)
                if tokens is None or not least <= tokens <= most:
                    return f"vision_tokens must be {least} (one crop) to {most}"
                return None
            case self.dial:
                return self.refuse_dial(value)
            case _:
                return f"this family has no vision knob {setting.knob}"

    def _refuse_tier(self, setting: VisionSetting) -> str | None:
        tier = self._tier(setting)
        if tier is None:
            return f"tier must be one of {', '.join(TIERS)}"
        if tier.max_crops > self.grid.most_crops:
            return (
                f"tier {tier.name} has up to {tier.max_crops} crops, this family takes at most {self.grid.most_crops}"
            )
        if not any(grids(n, self.grid.most_per_side) for n in range(tier.min_crops, tier.max_crops + 1)):
            return f"tier {tier.name}: {self._no_grid(tier.min_crops)}"
        return None

    def _no_grid(self, crops: int) -> str:
        return f"no grid of {crops} crops has at most {self.grid.most_per_side} rows and columns"

    def complete(self, setting: VisionSetting) -> VisionSetting:
        by_aspect = setting.knob in BY_ASPECT
        full = setting.force_full_tokens
        return replace(
            setting,
            tier=self._tier(setting) if setting.knob == "tier" else None,
            aspect_distance=(setting.aspect_distance or "linear") if by_aspect else None,
            force_full_tokens=(full or False) if "force_full_tokens" in self.options else None,
            resize_to_fill=self.default_fill(setting) if setting.resize_to_fill is None else setting.resize_to_fill,
        )

    def default_fill(self, setting: VisionSetting) -> bool | None:
        """What leaving `resize_to_fill` out means; None is to stretch the image over the canvas."""
        return None

    def tiling(self, height: int, width: int, setting: VisionSetting) -> Tiling:
        """Rows and columns for an image of `height` x `width` pixels.

        Raises:
            ValueError: a setting that `refuse` should have stopped.
        """
        value, grid = setting.value, self.grid
        if setting.knob in (NATIVE, self.dial):
            return self.own_tiling(height, width, setting)
        if setting.knob == "image_size":
            size = canvas_of(value)
            if size is None:
                raise ValueError(f"image_size {value} is not HEIGHTxWIDTH")
            return grid.canvas_tiling(*size)
        distance = setting.aspect_distance or "linear"
        inner = grid.inner_size(height, width, distance)
        if setting.knob == "tier":
            tier = self._tier(setting)
            if tier is None:
                raise ValueError(f"there is no tier {value}")
            return select_crops_for_tier(tier, *inner, aspect_distance=distance, most_per_side=grid.most_per_side)[1]
        if setting.knob == "crops":
            return exact_tiling(*inner, as_int(value) or 0, distance, most_per_side=grid.most_per_side)
        if setting.knob == "vision_tokens":
            crops = grid.crops_for_tokens(as_int(value) or 0)
            return exact_tiling(*inner, crops, distance, most_per_side=grid.most_per_side)
        raise ValueError(f"this family has no vision knob {setting.knob}")

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout:
        tiling = self.tiling(height, width, setting)
        # Where the margins leave nothing of an image, its own aspect is what is distorted.
        mismatch = tiling_mismatch(*self.grid.inner_size(height, width, "log"), tiling)
        return self._layout(tiling, setting, mismatch)

    def pinned(self, setting: VisionSetting) -> VisionLayout | None:
        # What a grid costs in the prompt may depend on its shape, but only image_size pins that too.
        match setting.knob:
            case "image_size":
                return self.layout(1, 1, setting)
            case "crops":
                crops = as_int(setting.value)
            case "vision_tokens":
                crops = self.grid.crops_for_tokens(as_int(setting.value) or 0)
            case _:
                crops = self.own_pinned(setting) if setting.knob in (NATIVE, self.dial) else None
        if crops is None:
            return None
        return self._layout(grids(crops, self.grid.most_per_side)[0], setting, 0.0)

    def levels(self) -> list[VisionSetting]:
        grid = self.grid
        sizes = [grid.canvas_size(*tiling) for tiling in _SHOWN_TILINGS]
        offered: list[tuple[str, Sequence[int | str]]] = [
            ("image_size", [f"{height}x{width}" for height, width in sizes]),
            ("vision_tokens", [grid.tower_tokens(crops) for crops in _SHOWN_CROPS]),
            ("crops", _SHOWN_CROPS),
            ("tier", list(TIERS)),
        ]
        if self.dial is not None:
            offered.insert(0, (self.dial, self.dial_levels()))
        settings = [VisionSetting(axis, level) for axis, levels in offered for level in levels]
        return [VisionSetting(), *(setting for setting in settings if self.refuse(setting) is None)]

    def _layout(self, tiling: Tiling, setting: VisionSetting, mismatch: float) -> VisionLayout:
        crops = tiling[0] * tiling[1]
        return VisionLayout(
            tiling,
            crops,
            self.grid.tower_passes(crops),
            self.grid.tower_tokens(crops),
            *self.grid.canvas_size(*tiling),
            *self.prompt_tokens(tiling, setting),
            aspect_mismatch=mismatch,
        )

    def _tier(self, setting: VisionSetting) -> Tier | None:
        return setting.tier or TIERS.get(str(setting.value))


def canvas_of(value: int | str | None) -> tuple[int, int] | None:
    """Height and width in pixels of an image_size such as `560x336`, or None if it is not one."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", str(value))
    return None if found is None else (int(found[1]), int(found[2]))

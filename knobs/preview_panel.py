"""What a preview says of one setting on one image: where the parts of its canvas lie, and the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from knobs.canvas_parts import CanvasParts, canvas_parts, view_parts
from knobs.card import DescribedModel, layout_of
from knobs.crop_grid import CropGridGeometry
from knobs.placement import Fit, fit_of
from knobs.vision import VisionLayout, VisionSetting


@dataclass(frozen=True)
class Number:
    """A line below the drawing; a cost is drawn as a bar too, against that of the other panels."""

    label: str
    value: str
    cost: int = 0


@dataclass(frozen=True)
class Panel:
    """One setting on one image, ready to be drawn.

    Attributes:
        title, options: the setting in the user's words, its axis and level apart from the options beside it.
        numbers: what stands below the drawing.
    """

    title: str
    options: str
    layout: VisionLayout
    parts: CanvasParts
    view: CanvasParts | None
    numbers: tuple[Number, ...]


def panel_of(model: DescribedModel, setting: VisionSetting, height: int, width: int) -> Panel:
    """What a setting makes of an image of `height` x `width` pixels.

    Raises:
        KnobError: see `knobs.card.layout_of`.
    """
    geometry = model.geometry
    complete = geometry.complete(setting)
    layout = layout_of(model, height, width, complete)
    margin = geometry.grid.margin if isinstance(geometry, CropGridGeometry) else 0
    fit = fit_of(complete)
    parts = canvas_parts(height, width, layout, fit, margin)
    title, _, options = str(setting).partition(", ")
    return Panel(
        title,
        options,
        layout,
        parts,
        view_parts(height, width, layout, fit, margin),
        tuple(_numbers(layout, parts, _fate(parts, fit, width / height))),
    )


def _numbers(layout: VisionLayout, parts: CanvasParts, fate: str) -> list[Number]:
    passes, crops, (rows, columns) = layout.tower_passes, layout.num_crops, layout.tiling
    each = f"{crops} {'crop' if crops == 1 else 'crops'}"
    prompt = layout.prompt_vision_tokens + layout.special_tokens
    return [
        Number("canvas", f"{layout.target_height} x {layout.target_width} px"),
        Number("image", fate),
        Number("aspect mismatch", f"{layout.aspect_mismatch:.2f}"),
        Number("tiling", f"{rows} x {columns} crops" if crops > 1 else "1 x 1, not split"),
        Number(
            "tower passes", f"{passes} ({each} + global)" if passes > crops else f"{passes} (no global view)", passes
        ),
        Number("vision tokens", f"{layout.vision_tokens} theoretical"),
        Number("", f"{layout.prompt_vision_tokens} actual"),
        Number("special tokens", f"{layout.special_tokens}"),
        Number("prompt tokens", f"{prompt}", prompt),
    ]


def _fate(parts: CanvasParts, fit: Fit, aspect: float) -> str:
    """What the resize does to an image of this width/height."""
    if fit == "pad":
        padding = sum(box.area for box in parts.padding) / parts.canvas.area
        return f"whole, {_percent(padding)} padding" if padding else "whole, no padding"
    if fit == "fill":
        cut_off = sum(box.area for box in parts.cut_off) / parts.image.area
        return f"{_percent(cut_off)} of it cut off" if cut_off else "whole, nothing cut off"
    stretch = parts.canvas.width / parts.canvas.height / aspect
    if abs(stretch - 1) < 0.005:
        return "whole, in its own shape"
    return f"stretched, {max(stretch, 1 / stretch):.2f} x {'wider' if stretch > 1 else 'taller'}"


def _percent(share: float) -> str:
    if share < 0.01 or share > 0.99:
        return "under 1 %" if share < 0.01 else "over 99 %"
    return f"{100 * share:.0f} %"

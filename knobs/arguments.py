"""The flags that name a model and one setting of its vision knob, shared by the commands of this package."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from knobs.crop_grid import canvas_of
from knobs.errors import KnobError
from knobs.tiling import ASPECT_DISTANCES
from knobs.vision import VISION_AXES, VisionGeometry, VisionSetting

# `--image-size` is the image that a setting is applied to, so the axis of that name has another flag.
FLAGS = {axis: "--resize-to" if axis == "image_size" else f"--{axis.replace('_', '-')}" for axis in VISION_AXES}

_MEANINGS = {
    "image_size": "canvas, height x width in pixels, the same for every image",
    "vision_tokens": "target number of vision tokens; the grid follows the image's aspect",
    "tier": "low, medium or high; the number of crops follows the image's aspect",
    "crops": "exact number of crops; the grid follows the image's aspect",
    "longest_edge": "longest side in pixels before the image is cut (SmolVLM2)",
    "tiles": "number of tiles without the thumbnail (InternVL3)",
}


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a setting: at most one axis, and the options beside it."""
    parser.add_argument("--model", required=True, metavar="NAME", help="registered name, checkpoint folder or hub id")
    setting = parser.add_argument_group("setting of the vision knob (at most one; none is the model's own)")
    axes = setting.add_mutually_exclusive_group()
    for axis, flag in FLAGS.items():
        kind = int if axis in ("vision_tokens", "crops", "longest_edge", "tiles") else str
        metavar = {"image_size": "HxW", "tier": "TIER"}.get(axis, "N")
        axes.add_argument(flag, dest=_destination(axis), type=kind, metavar=metavar, help=_MEANINGS[axis])
    options = parser.add_argument_group("options of the setting")
    options.add_argument(
        "--force-full-tokens", action="store_true", default=None, help="crops keep the vision tokens they share"
    )
    options.add_argument(
        "--aspect-distance", choices=ASPECT_DISTANCES, help="how the grid nearest to the image's aspect is found"
    )
    fit = options.add_mutually_exclusive_group()
    fit.add_argument(
        "--resize-to-fill",
        dest="resize_to_fill",
        action="store_true",
        default=None,
        help="cover the canvas, cut off the rest",
    )
    fit.add_argument(
        "--letterbox", dest="resize_to_fill", action="store_false", help="lay the whole image on the canvas"
    )


def setting_of(arguments: argparse.Namespace) -> VisionSetting:
    """The setting that the flags name; native where they name no axis."""
    levels = {axis: getattr(arguments, _destination(axis)) for axis in VISION_AXES}
    named = next(((axis, level) for axis, level in levels.items() if level is not None), None)
    return with_options(VisionSetting() if named is None else VisionSetting(*named), arguments)


def with_options(setting: VisionSetting, arguments: argparse.Namespace) -> VisionSetting:
    """A setting under the options that the flags name."""
    return replace(
        setting,
        aspect_distance=arguments.aspect_distance,
        force_full_tokens=arguments.force_full_tokens,
        resize_to_fill=arguments.resize_to_fill,
    )


def check(geometry: VisionGeometry, setting: VisionSetting) -> None:
    """Raises:
    KnobError: the family cannot take the setting; the message says what it can.
    """
    if reason := geometry.refuse(setting):
        has = ", ".join((*geometry.axes, *geometry.options)) or "none"
        raise KnobError(f"{setting}: {reason} (vision knobs of this family: {has})")


def _destination(axis: str) -> str:
    return f"knob_{axis}"


def height_and_width(text: str) -> tuple[int, int]:
    """Pixels from `HEIGHTxWIDTH`, for argparse."""
    size = canvas_of(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels such as 480x640, got {text!r}")
    return size


def count(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)

"""`python -m knobs.preview`: draw an image as a model sees it under one setting of the vision knob, or several."""

from __future__ import annotations

import argparse
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from knobs.arguments import add_setting, check, setting_of, with_options
from knobs.card import DescribedModel, described, refuse_unknown
from knobs.crop_grid import canvas_of
from knobs.errors import KnobError, UnusableModel
from knobs.preview_page import page
from knobs.preview_panel import panel_of
from knobs.printing import print_lines
from knobs.vision import NATIVE, VisionSetting, as_int

# As for the images of a sweep: Pillow warns above this many pixels.
MAX_PIXELS = 89_478_485

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture; 0, or 2 where the image, the model, the setting or the place is no good; see `print_lines`."""
    arguments = _parser().parse_args(argv)
    try:
        _check_out(arguments.out, arguments.image)
        model = described(arguments.model)
        refuse_unknown(model)
        settings = settings_of(model, arguments)
        image = read_picture(arguments.image)
        panels = [panel_of(model, setting, image.height, image.width) for setting in settings]
        _save(page(image, model.name, arguments.image.name, panels), arguments.out)
    except (KnobError, UnusableModel) as error:
        print(f"knobs.preview: {error}", file=sys.stderr)
        return 2
    return print_lines([str(arguments.out)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m knobs.preview",
        description="Draw an image as a model sees it under a setting of the vision knob: its canvas with the crops, "
        "what they share, padding and cut-off parts, and what it costs in tokens. Loads no weights.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    add_setting(parser)
    parser.add_argument("--out", type=Path, default=Path("preview.png"), metavar="FILE", help="PNG (preview.png)")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="side by side, drawn to one scale: the tiers, or where an axis is set, the levels of it that "
        "knobs.explain lists and the one that is set",
    )
    return parser


def settings_of(model: DescribedModel, arguments: argparse.Namespace) -> list[VisionSetting]:
    """The settings to draw: the one that the flags name, or the levels it is compared with, in their order.

    Raises:
        KnobError: the family cannot take the setting, or has nothing to compare.
    """
    geometry, asked = model.geometry, setting_of(arguments)
    if not arguments.compare or asked.knob != NATIVE:
        check(geometry, asked)
    if not arguments.compare:
        return [asked]
    axis = "tier" if asked.knob == NATIVE else asked.knob
    levels = [with_options(level, arguments) for level in geometry.levels() if level.knob == axis]
    if not levels:
        raise KnobError(f"--compare: {model.name} has no {axis} to compare")
    if asked.knob == axis and asked not in levels:
        levels = sorted([*levels, asked], key=_size)
    possible = [level for level in levels if geometry.refuse(level) is None]
    if not possible:
        check(geometry, levels[0])
    return possible


def _size(level: VisionSetting) -> int:
    """What the levels of an axis other than `tier` ascend by."""
    height, width = canvas_of(level.value) or (1, as_int(level.value) or 0)
    return height * width


def read_picture(path: Path) -> Image.Image:
    """An image file as the models see it: RGB, upright as its EXIF tag says, transparent pixels on white.

    Raises:
        KnobError: there is no such file, or Pillow cannot read it, or it is larger than MAX_PIXELS.
    """
    if not os.path.isfile(path):
        raise KnobError(f"there is no image {path}")
    try:
        # Pillow's own limit warns where this one raises.
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path) as file,
        ):
            width, height = file.size
            if width * height > MAX_PIXELS:
                raise KnobError(f"{path} is too large ({height}x{width}, limit {MAX_PIXELS} pixels)")
            file.load()
            return _as_rgb(ImageOps.exif_transpose(file), path)
    except Image.DecompressionBombError:
        raise KnobError(f"{path} is too large (limit {MAX_PIXELS} pixels)") from None
    except KnobError:
        raise
    except UnidentifiedImageError:
        raise KnobError(f"{path} is not an image that Pillow can read") from None
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise KnobError(f"{path} cannot be read as an image ({reason})") from None


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.has_transparency_data:
        # Without this, whatever colour lies under the transparent pixels would show.
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    if image.mode == "F":
        raise KnobError(f"{path} is a floating-point image, which has no agreed range; store it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits to 8, rounded; to convert alone would clip at 255, which makes almost everything white.
        wide = image.convert("I")
        least, most = wide.getextrema()
        if not (isinstance(least, int) and isinstance(most, int) and least >= 0 and most <= 65535):
            raise KnobError(f"{path} is 32-bit greyscale, which has no agreed range; store it with 8 or 16 bits")
        return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    return image.convert("RGB")


def _check_out(out: Path, image: Path) -> None:
    """Before anything is computed: whether the picture can have this name."""
    if out.suffix.lower() != ".png":
        raise KnobError(f"--out {out}: the picture is a PNG, so its name must end in .png")
    # Not the methods of Path, which raise for a name that is too long.
    if not os.path.isdir(out.parent):
        raise KnobError(f"--out {out}: there is no folder {out.parent}")
    if os.path.isdir(out):
        raise KnobError(f"--out {out} is a folder")
    if os.path.exists(out) and os.path.exists(image) and out.samefile(image):
        raise KnobError(f"--out {out} is the image itself; name another file")


def _save(picture: Image.Image, out: Path) -> None:
    try:
        picture.save(out, "PNG", optimize=True)
    except OSError as error:
        raise KnobError(f"--out {out}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    sys.exit(main())

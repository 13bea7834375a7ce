"""A canvas with its crops as a picture, in colours that colour-blind readers tell apart, and text that fits."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from knobs.canvas_parts import Box, CanvasParts

Colour = tuple[int, int, int]

# Of Okabe and Ito's palette; marks differ in pattern too, so that none rests on its colour alone.
CROP: Colour = (0, 114, 178)
OTHER_CROP: Colour = (213, 94, 0)
SHARED: Colour = (240, 228, 66)
PADDING: Colour = (86, 180, 233)
CUT_OFF: Colour = (204, 121, 167)
VIEW: Colour = (0, 158, 115)
BAR: Colour = (204, 228, 245)
INK: Colour = (26, 28, 32)
PALE: Colour = (104, 108, 116)
PAPER: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

# How far the cut-off part is shown beyond the canvas, against the canvas' longer side: a thin image may reach far.
_OVERHANG_SHOWN = 0.35
# Edges that are not straight are drawn so many times larger and reduced.
_SMOOTH = 4
# How much of the colour lies over shared bands, and of black over what is cut off.
SHARED_TINT, CUT_OFF_TINT = 0.32, 0.62


# -- text -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has hardly a letter beyond ASCII; without the optional shaping library, so that text
    is as wide on every machine."""
    bundled = ImageFont.load_default(size=size)
    assert isinstance(bundled, ImageFont.FreeTypeFont)
    return ImageFont.truetype(io.BytesIO(bundled.font_bytes), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1024)
def text_width(text: str, size: int, bold: bool = False) -> int:
    return int(font(size).getlength(text)) + (2 if bold else 0) + 1


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = INK,
    *,
    bold: bool = False,
    anchor: str = "la",
) -> None:
    """One line of text; `anchor` as in Pillow."""
    # Twice beside itself: a stroke all round would close the dot of an i.
    for shift in (0, 0.8) if bold else (0,):
        draw.text((at[0] + shift, at[1]), text, fill=colour, font=font(size), anchor=anchor)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer alone is shortened."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(shortened(word, size, width))
    return lines


def shortened(text: str, size: int, width: int) -> str:
    """The text, its middle left out where it is wider than `width` pixels."""
    keep = len(text)
    short = text
    while keep > 2 and text_width(short, size) > width:
        keep -= 1
        short = f"{text[: keep - keep // 2]}...{text[len(text) - keep // 2 :]}"
    return short


# -- a canvas ---------------------------------------------------------------------------------------------------------


def shown_box(parts: CanvasParts) -> Box:
    """What is drawn of a canvas: all of it, and of the image as much beyond it as leaves the canvas large."""
    canvas, image = parts.canvas, parts.image
    most = round(max(canvas.width, canvas.height) * _OVERHANG_SHOWN)
    return Box(
        max(min(0, image.left), -most),
        max(min(0, image.top), -most),
        min(max(canvas.right, image.right), canvas.right + most),
        min(max(canvas.bottom, image.bottom), canvas.bottom + most),
    )


def laid(image: Image.Image, parts: CanvasParts, shown: Box) -> Image.Image:
    """The image resized and laid on its canvas, a part of it in the canvas' own pixels; black where it ends."""
    picture = Image.new("RGB", (shown.width, shown.height))
    seen = parts.image.within(shown)
    if seen.width < 1 or seen.height < 1:
        return picture  # nothing but padding
    across, down = image.width / parts.image.width, image.height / parts.image.height
    # Only the part that is shown is resized: the whole may be enormous.
    source = (
        (seen.left - parts.image.left) * across,
        (seen.top - parts.image.top) * down,
        min(image.width, (seen.right - parts.image.left) * across),
        min(image.height, (seen.bottom - parts.image.top) * down),
    )
    resized = image.resize((seen.width, seen.height), Image.Resampling.BICUBIC, box=source, reducing_gap=3)
    picture.paste(resized, (seen.left - shown.left, seen.top - shown.top))
    return picture


def draw_canvas(image: Image.Image, parts: CanvasParts, scale: float) -> Image.Image:
    """The canvas with everything marked on it, `scale` pixels for each of its own."""
    shown = shown_box(parts)
    picture = _scaled(laid(image, parts, shown), scale)

    def at(box: Box) -> Box:
        return _to_scale(box, shown, scale)

    for box in parts.shared:
        tint(picture, at(box), SHARED, SHARED_TINT)
    for box in parts.padding:
        hatch(picture, at(box), PADDING, 0.0)
    for box in (part.within(shown) for part in parts.cut_off):
        hatch(picture, at(box), CUT_OFF, CUT_OFF_TINT)
    _tear(picture, parts.image, shown)
    outline_crops(picture, [at(crop) for crop in parts.crops], overlapping=bool(parts.shared))
    return picture


def draw_view(image: Image.Image, parts: CanvasParts, scale: float) -> Image.Image:
    """The global view, framed."""
    picture = _scaled(laid(image, parts, parts.canvas), scale)
    for box in parts.padding:
        hatch(picture, _to_scale(box, parts.canvas, scale), PADDING, 0.0)
    frame(picture, Box(0, 0, picture.width, picture.height), VIEW)
    return picture


def hatch(picture: Image.Image, box: Box, colour: Colour, darkened: float) -> None:
    """Darken a part of a picture by so much and draw diagonal lines over it."""
    if box.width < 1 or box.height < 1:
        return
    tint(picture, box, BLACK, darkened)
    size = (box.width * _SMOOTH, box.height * _SMOOTH)
    lines = Image.new("L", size)
    draw = ImageDraw.Draw(lines)
    # Counted from the picture's corner, so that the lines of neighbouring parts meet.
    first = (box.left + box.top) % 14
    for x in range(-first, box.width + box.height, 14):
        start, end = (x * _SMOOTH, 0), ((x - box.height) * _SMOOTH, size[1])
        draw.line((*start, *end), fill=235, width=2 * _SMOOTH)
    picture.paste(colour, (box.left, box.top), lines.reduce(_SMOOTH))


def badge(picture: Image.Image, centre: tuple[int, int], number: str, colour: Colour, radius: int) -> None:
    """A disc with a number."""
    side = 2 * radius + 3
    disc = Image.new("L", (side * _SMOOTH, side * _SMOOTH))
    ring = Image.new("L", disc.size)
    ImageDraw.Draw(ring).ellipse((0, 0, side * _SMOOTH - 1, side * _SMOOTH - 1), fill=255)
    edge = 2 * _SMOOTH
    ImageDraw.Draw(disc).ellipse((edge, edge, side * _SMOOTH - 1 - edge, side * _SMOOTH - 1 - edge), fill=255)
    corner = (centre[0] - side // 2, centre[1] - side // 2)
    picture.paste(PAPER, corner, ring.reduce(_SMOOTH))
    picture.paste(colour, corner, disc.reduce(_SMOOTH))
    size = round(radius * (1.25 if len(number) == 1 else 1.05))
    write(ImageDraw.Draw(picture), centre, number, size, PAPER, bold=True, anchor="mm")


def draw_crop(image: Image.Image, parts: CanvasParts, index: int, scale: float) -> Image.Image:
    """One crop by itself, framed as on the canvas."""
    crop = parts.crops[index]
    picture = _scaled(laid(image, parts, crop), scale)
    for box in parts.padding:
        inside = box.within(crop)
        if inside.width > 0 and inside.height > 0:
            hatch(picture, _to_scale(inside, crop, scale), PADDING, 0.0)
    colour = _crop_colours(parts.crops, bool(parts.shared))[index]
    frame(picture, Box(0, 0, picture.width, picture.height), colour, dashed=colour == OTHER_CROP)
    if min(picture.size) >= 60:
        badge(picture, (20, 20), str(index + 1), colour, 12)
    return picture


def outline_crops(picture: Image.Image, crops: Sequence[Box], overlapping: bool) -> None:
    """Frames, and numbers where there are several."""
    colours = _crop_colours(crops, overlapping)
    inset = 3 if overlapping else 0
    # The dashed ones last: where two edges lie on one line, the solid one shows through the gaps.
    for colour, crop in sorted(zip(colours, crops, strict=True), key=lambda pair: pair[0] == OTHER_CROP):
        inner = Box(crop.left + inset, crop.top + inset, crop.right - inset, crop.bottom - inset)
        frame(picture, inner, colour, dashed=colour == OTHER_CROP, width=3 if overlapping else 2)
    if len(crops) == 1:
        return
    side = min(min(crop.width, crop.height) for crop in crops)
    radius = max(9, min(20, round(side * 0.1)))
    for i, (colour, crop) in enumerate(zip(colours, crops, strict=True)):
        centre = ((crop.left + crop.right) // 2, (crop.top + crop.bottom) // 2)
        badge(picture, centre, str(i + 1), colour, radius)


def _crop_colours(crops: Sequence[Box], overlapping: bool) -> list[Colour]:
    """Of crops that overlap, neighbours alternate, so that one sees whose edge is whose."""
    columns = sum(1 for crop in crops if crop.top == crops[0].top)
    return [OTHER_CROP if overlapping and (i // columns + i % columns) % 2 else CROP for i in range(len(crops))]


def frame(picture: Image.Image, box: Box, colour: Colour, *, dashed: bool = False, width: int = 3) -> None:
    """A coloured line with a thin white one inside, which stands out from any image."""
    draw = ImageDraw.Draw(picture)
    right, bottom = box.right - 1, box.bottom - 1
    if min(box.width, box.height) > 12:
        inside = (box.left + width, box.top + width, right - width, bottom - width)
        draw.rectangle(inside, outline=PAPER, width=1)
    if not dashed:
        draw.rectangle((box.left, box.top, right, bottom), outline=colour, width=width)
        return
    for x in range(box.left, box.right, 15):
        for y in (box.top, bottom - width + 1):
            draw.rectangle((x, y, min(x + 9, right), y + width - 1), fill=colour)
    for y in range(box.top, box.bottom, 15):
        for x in (box.left, right - width + 1):
            draw.rectangle((x, y, x + width - 1, min(y + 9, bottom)), fill=colour)


def _tear(picture: Image.Image, image: Box, shown: Box) -> None:
    """Teeth along the edges beyond which the image goes on."""
    width, height = picture.size
    edges: Iterable[tuple[bool, bool, int]] = (
        (image.left < shown.left, True, 0),
        (image.right > shown.right, True, width),
        (image.top < shown.top, False, 0),
        (image.bottom > shown.bottom, False, height),
    )
    draw = ImageDraw.Draw(picture)
    for torn, upright, edge in edges:
        if not torn:
            continue
        length, inward = (height, 9 if edge == 0 else -9) if upright else (width, 9 if edge == 0 else -9)
        teeth = [(edge + (inward if i % 2 else 0), 9 * i) for i in range(length // 9 + 3)]
        line = [(edge, 0), *teeth, (edge, length)]
        draw.polygon(line if upright else [(y, x) for x, y in line], fill=PAPER)


def tint(picture: Image.Image, box: Box, colour: Colour, share: float) -> None:
    area = (box.left, box.top, box.right, box.bottom)
    part = picture.crop(area)
    picture.paste(Image.blend(part, Image.new("RGB", part.size, colour), share), area)


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarged, the pixels that the model sees stay visible.
    return picture.resize(size, Image.Resampling.BOX if scale > 1.5 else Image.Resampling.LANCZOS)


def _to_scale(box: Box, shown: Box, scale: float) -> Box:
    return Box(
        round((box.left - shown.left) * scale),
        round((box.top - shown.top) * scale),
        round((box.right - shown.left) * scale),
        round((box.bottom - shown.top) * scale),
    )

"""Fonts, colours and the smooth canvas that the painters of the demo data set share."""

import io
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# Everything is drawn this many times larger and reduced, which gives smooth edges.
OVERSAMPLING = 2

INK: Colour = (40, 44, 52)
ANNOTATORS = 10


@dataclass(frozen=True)
class Question:
    """One question about a picture with what ten annotators answered."""

    text: str
    answers: list[str]
    type: str  # colour, count, yes/no, text, number or chart


def annotators(seed: random.Random, answer: str, *synonyms: str) -> list[str]:
    """Ten answers: mostly the same, each synonym given by four (one synonym) or two (several) of the ten."""
    given = {0: 0, 1: 4}.get(len(synonyms), 2)
    answers = [synonym for synonym in synonyms for _ in range(given)]
    answers += [answer] * (ANNOTATORS - len(answers))
    seed.shuffle(answers)
    return answers


def blank(size: tuple[int, int], colour: Colour) -> Image.Image:
    """An empty picture, oversampled."""
    return Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), colour)


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    """A vertical gradient, oversampled."""
    column = Image.new("RGB", (1, 2))
    column.putpixel((0, 0), top)
    column.putpixel((0, 1), bottom)
    height = size[1] * OVERSAMPLING
    strip = Image.new("RGB", (1, height))
    for y in range(height):
        share = y / max(1, height - 1)
        strip.putpixel((0, y), mix(top, bottom, share))
    return strip.resize((size[0] * OVERSAMPLING, height), Image.Resampling.NEAREST)


def finished(image: Image.Image) -> Image.Image:
    """The picture at its final size."""
    return image.reduce(OVERSAMPLING)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with a `share` (0..1) of `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's bundled font, without the optional shaping library, so that text looks alike everywhere."""
    bundled = ImageFont.load_default(size=size)
    assert isinstance(bundled, ImageFont.FreeTypeFont)
    return ImageFont.truetype(io.BytesIO(bundled.font_bytes), size, layout_engine=ImageFont.Layout.BASIC)


def fitting_font(text: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """The largest font in which `text` fits a box."""
    size = max(8, int(height))
    while size > 8:
        left, top, right, bottom = font(size).getbbox(text)
        if right - left <= width and bottom - top <= height:
            break
        size -= 1
    return font(size)


def write(draw: ImageDraw.ImageDraw, text: str, box: Box, colour: Colour = INK, align: str = "centre") -> None:
    """Write one line as large as its box allows, vertically centred on the letters."""
    left, top, right, bottom = box
    chosen = fitting_font(text, right - left, bottom - top)
    anchor, x = {"left": ("lm", left), "right": ("rm", right), "centre": ("mm", (left + right) / 2)}[align]
    draw.text((x, (top + bottom) / 2), text, fill=colour, font=chosen, anchor=anchor)

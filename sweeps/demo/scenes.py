"""Scenes of coloured shapes with questions about colours, counts and presence."""

import math
import random

from drawing import OVERSAMPLING, Colour, Question, annotators, blank, finished, gradient, mix
from PIL import Image, ImageDraw, ImageFilter

SIZES = [
    (120, 90), (160, 160), (240, 180), (320, 240), (400, 300), (640, 480), (800, 600), (1280, 960),
    (480, 640), (300, 400), (600, 900), (256, 256), (512, 512), (768, 768), (900, 300), (1000, 250),
    (1280, 256), (256, 1024), (200, 800), (336, 560), (560, 336), (1024, 768), (720, 960), (384, 216),
]  # fmt: skip

COLOURS: dict[str, Colour] = {
    "red": (211, 47, 47),
    "blue": (33, 97, 209),
    "green": (35, 145, 70),
    "yellow": (249, 205, 35),
    "orange": (243, 124, 22),
    "purple": (125, 58, 168),
    "black": (34, 34, 38),
    "grey": (128, 132, 138),
    "brown": (124, 77, 44),
    "pink": (244, 132, 178),
}
SYNONYMS = {"grey": ("gray",), "purple": ("violet",), "pink": ("light pink",)}
SHAPES = ("circle", "square", "triangle", "star", "hexagon")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")

Thing = tuple[str, str]  # shape, colour


def scene(index: int) -> tuple[Image.Image, list[Question]]:
    """Picture number `index` and its questions."""
    seed = random.Random(1000 + index)
    size = SIZES[index]
    once, counted, other = seed.sample(SHAPES, 3)
    copies = 1 + (2 * index + index // 5) % (3 if min(size) < 150 else 5)
    shapes = [once] + [counted] * copies + [other] * (0 if min(size) < 150 else 1 + index % 2)
    # Neighbours of nearly the same colour would make a question debatable.
    palette = seed.sample(sorted(COLOURS), min(len(shapes), 6))
    things = [(shape, palette[position % len(palette)]) for position, shape in enumerate(shapes)]
    shown = things.copy()
    seed.shuffle(shown)
    picture = _background(index, size, seed)
    _place(picture, shown, seed)
    return finished(picture), _questions(index, seed, things, counted, copies)


def _questions(index: int, seed: random.Random, things: list[Thing], counted: str, copies: int) -> list[Question]:
    shape, colour = things[0]
    about_colour = Question(
        f"What colour is the {shape}?", annotators(seed, colour, *SYNONYMS.get(colour, ())), "colour"
    )
    asked = f"How many {counted}s are there?" if index % 2 else f"How many {counted}s can you see?"
    about_count = Question(asked, annotators(seed, str(copies), NUMBER_WORDS[copies]), "count")
    if index % 2:
        shape, colour = seed.choice(things)
        answer = "yes"
    else:
        # Both the shape and the colour are there, but not together.
        pairs = [(s, c) for s, _ in things for _, c in things if (s, c) not in things]
        shape, colour = seed.choice(pairs)
        answer = "no"
    article = "an" if colour[0] in "aeiou" else "a"
    about_presence = Question(f"Is there {article} {colour} {shape}?", annotators(seed, answer), "yes/no")
    return [
        [about_colour, about_count],
        [about_count, about_presence],
        [about_presence, about_colour],
        [about_presence],
        [about_colour],
    ][index % 5]


def _background(index: int, size: tuple[int, int], seed: random.Random) -> Image.Image:
    painters = (_wall, _hills, _tiles, _notebook)
    return painters[index % len(painters)](size, seed)


def _wall(size: tuple[int, int], seed: random.Random) -> Image.Image:
    """A wall above a light wooden floor."""
    wall = seed.choice([(232, 226, 214), (222, 232, 238), (236, 226, 232)])
    picture = gradient(size, mix(wall, (255, 255, 255), 0.5), wall)
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    floor_top = int(height * 0.72)
    draw.rectangle((0, floor_top, width, height), fill=(222, 202, 176))
    plank = max(14, (height - floor_top) // 4)
    for row, y in enumerate(range(floor_top, height, plank)):
        draw.line((0, y, width, y), fill=(206, 184, 156), width=max(1, plank // 16))
        for x in range((row % 2) * plank * 2, width, plank * 4):
            draw.line((x, y, x, y + plank), fill=(206, 184, 156), width=max(1, plank // 16))
    draw.rectangle((0, floor_top - plank // 4, width, floor_top), fill=(246, 243, 238))
    return picture


def _hills(size: tuple[int, int], seed: random.Random) -> Image.Image:
    """Pale hills under a pale sky."""
    picture = gradient(size, (206, 228, 244), (246, 248, 244))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for level, colour in ((0.62, (214, 229, 208)), (0.76, (198, 219, 190))):
        phase = seed.uniform(0, 6)
        ridge = [
            (x, height * (level + 0.06 * math.sin(phase + 5 * x / max(width, height)))) for x in range(0, width + 8, 8)
        ]
        draw.polygon([*ridge, (width + 8, height), (0, height)], fill=colour)
    return picture


def _tiles(size: tuple[int, int], seed: random.Random) -> Image.Image:
    """A pale tiled floor seen from above."""
    light = seed.choice([(240, 240, 234), (238, 240, 246), (246, 240, 234)])
    picture = blank(size, light)
    draw = ImageDraw.Draw(picture)
    side = max(24, min(picture.size) // 5)
    for row, y in enumerate(range(0, picture.height, side)):
        for column, x in enumerate(range(0, picture.width, side)):
            if (row + column) % 2:
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill=mix(light, (0, 0, 0), 0.06))
    return picture


def _notebook(size: tuple[int, int], seed: random.Random) -> Image.Image:
    """Squared paper with a margin line."""
    picture = blank(size, (252, 251, 246))
    draw = ImageDraw.Draw(picture)
    side = max(16, min(picture.size) // 14)
    offset = seed.randrange(side)
    line = max(1, side // 18)
    for x in range(offset, picture.width, side):
        draw.line((x, 0, x, picture.height), fill=(214, 226, 238), width=line)
    for y in range(offset, picture.height, side):
        draw.line((0, y, picture.width, y), fill=(214, 226, 238), width=line)
    return picture


def _place(picture: Image.Image, things: list[Thing], seed: random.Random) -> None:
    """Put every shape into its own cell of a grid, so that none overlaps another or leaves the picture."""
    width, height = picture.size
    columns = min(len(things), max(1, round(math.sqrt(len(things) * width / height))))
    rows = math.ceil(len(things) / columns)
    cell_width, cell_height = width / columns, height / rows
    shadows = Image.new("L", picture.size, 0)
    outlines = []
    for position, (shape, colour) in enumerate(things):
        cell = min(cell_width, cell_height)
        radius = cell * seed.uniform(0.30, 0.40)
        row, column = divmod(position, columns)
        in_row = min(columns, len(things) - row * columns)
        left = (width - in_row * cell_width) / 2 + column * cell_width  # a last row that is not full is centred
        slack_x, slack_y = cell_width / 2 - radius * 1.15, cell_height / 2 - radius * 1.15
        x = left + cell_width / 2 + seed.uniform(-1, 1) * min(slack_x, radius * 0.5)
        y = (row + 0.5) * cell_height + seed.uniform(-1, 1) * min(slack_y, radius * 0.5)
        outline = _outline(shape, x, y, radius, seed.uniform(-0.15, 0.15))
        drop = radius * 0.10
        ImageDraw.Draw(shadows).polygon([(px + drop, py + drop) for px, py in outline], fill=90)
        outlines.append((outline, COLOURS[colour], radius))
    soft = shadows.filter(ImageFilter.GaussianBlur(2 * OVERSAMPLING))
    picture.paste((60, 60, 70), (0, 0), soft)
    draw = ImageDraw.Draw(picture)
    for outline, fill, radius in outlines:
        draw.polygon(outline, fill=fill)
        edge = max(OVERSAMPLING, round(radius * 0.05))
        draw.line([*outline, *outline[:2]], fill=mix(fill, (0, 0, 0), 0.25), width=edge, joint="curve")


def _outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape that fits a circle of `radius` round (x, y)."""
    if shape == "star":
        spokes = [(radius if corner % 2 == 0 else radius * 0.45, corner / 10) for corner in range(10)]
    else:
        corners = {"circle": 120, "triangle": 3, "square": 4, "hexagon": 6}[shape]
        shift = 0.125 if shape == "square" else 0.0
        spokes = [(radius, corner / corners + shift) for corner in range(corners)]
    return [
        (x + length * math.sin(2 * math.pi * share + turn), y - length * math.cos(2 * math.pi * share + turn))
        for length, share in spokes
    ]

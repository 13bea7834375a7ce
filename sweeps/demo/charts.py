"""Bar, line and pie charts with questions about their values."""

import math
import random

from drawing import INK, Box, Colour, Question, annotators, blank, finished, font, mix, write
from PIL import Image, ImageDraw

SERIES: list[Colour] = [(52, 101, 164), (226, 125, 46), (76, 150, 80), (190, 62, 66), (128, 96, 166), (140, 104, 88)]
GRID: Colour = (222, 226, 230)
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug"]

CHARTS = [
    ("bars", (320, 240), "Cups sold", ["A", "B", "C", "D"]),
    ("bars", (640, 480), "Books read per year", ["Ann", "Ben", "Cleo", "Dan", "Eve"]),
    ("bars", (1200, 675), "Visitors per day", ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]),
    ("bars", (480, 480), "Rainy days", ["A", "B", "C", "D", "E"]),
    ("bars", (400, 600), "Points", ["Lions", "Bears", "Owls"]),
    ("bars", (900, 400), "Trees planted", ["Oak", "Pine", "Birch", "Maple", "Elm"]),
    ("rows", (300, 700), "Pets in town", ["Cats", "Dogs", "Birds", "Fish", "Mice", "Frogs"]),
    ("rows", (240, 800), "Lunch orders", ["Soup", "Rice", "Pasta", "Salad", "Pizza"]),
    ("rows", (640, 400), "Hours of sun", ["North", "South", "East", "West"]),
    ("line", (640, 360), "Parcels per month", MONTHS[:6]),
    ("line", (1200, 300), "Temperature", MONTHS),
    ("line", (1280, 320), "Bicycles rented", MONTHS),
    ("line", (480, 360), "Letters sent", MONTHS[:5]),
    ("line", (800, 600), "New members", MONTHS[:7]),
    ("pie", (400, 400), "Fruit sold", ["Apples", "Pears", "Plums"]),
    ("pie", (640, 480), "Ways to work", ["Bus", "Car", "Bike", "Walk"]),
    ("pie", (500, 700), "Drinks", ["Tea", "Coffee", "Juice", "Water"]),
    ("pie", (900, 600), "Languages", ["English", "Spanish", "French", "Hindi", "Arabic"]),
]
# A share that is the largest by a clear margin, whatever the number of slices.
SHARES = {3: [50, 30, 20], 4: [40, 25, 20, 15], 5: [35, 25, 18, 12, 10]}

Values = dict[str, int]


def chart(index: int) -> tuple[Image.Image, list[Question]]:
    """Picture number `index` and its questions."""
    seed = random.Random(3000 + index)
    kind, size, title, names = CHARTS[index]
    if kind == "pie":
        shares = SHARES[len(names)].copy()
        seed.shuffle(shares)
        values = dict(zip(names, shares, strict=True))
    else:
        # Distinct values at least four apart, so that "the tallest" can be seen as well as read; a line stays high
        # enough for a number below each valley.
        lowest = 32 if kind == "line" else 12
        values = dict(zip(names, seed.sample(range(lowest, 97, 4), len(names)), strict=True))
    picture = blank(size, (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    margin = min(width, height) * 0.05
    title_height = min(height * 0.075, width * 0.09)
    write(draw, title, (margin, margin, width - margin, margin + title_height))
    area = (margin, margin * 1.6 + title_height, width - margin, height - margin)
    {"bars": _bars, "rows": _rows, "line": _line, "pie": _pie}[kind](draw, area, values, index)
    questions = _questions(seed, kind, values)
    # Every second chart asks one question, of the two kinds in turn.
    return finished(picture), questions if index % 2 == 0 else [questions[index // 2 % 2]]


def _questions(seed: random.Random, kind: str, values: Values) -> list[Question]:
    largest, smallest = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    wanted = seed.choice(sorted(values))
    value = str(values[wanted])
    extreme = {
        "bars": ("Which bar is the tallest?", largest),
        "rows": ("Which bar is the longest?", largest),
        "line": ("In which month is the value the lowest?", smallest),
        "pie": ("Which slice is the largest?", largest),
    }[kind]
    chart_question = Question(extreme[0], annotators(seed, extreme[1].lower(), extreme[1]), "chart")
    if kind == "pie":
        number = Question(f"What is the percentage of {wanted}?", annotators(seed, f"{value}%", value), "number")
    else:
        number = Question(f"What is the value of {wanted}?", annotators(seed, value), "number")
    return [chart_question, number]


def _letter_height(area: Box) -> float:
    """Height of a label in oversampled pixels; readable in the smallest chart."""
    left, top, right, bottom = area
    return max(22.0, min((right - left) * 0.036, (bottom - top) * 0.065))


def _vertical_axis(draw: ImageDraw.ImageDraw, area: Box) -> Box:
    """Draw grid lines from 0 to 100 with their numbers; returns the plotting box."""
    left, top, right, bottom = area
    letter = _letter_height(area)
    box = (left + letter * 2.6, top + letter * 1.4, right, bottom - letter * 2.0)
    for tick in range(0, 101, 25):
        y = box[3] - (box[3] - box[1]) * tick / 100
        draw.line((box[0], y, box[2], y), fill=INK if tick == 0 else GRID, width=2)
        draw.text((box[0] - letter * 0.5, y), str(tick), fill=(110, 116, 122), font=font(int(letter)), anchor="rm")
    return box


def _bars(draw: ImageDraw.ImageDraw, area: Box, values: Values, index: int) -> None:
    left, top, right, bottom = _vertical_axis(draw, area)
    letter = _letter_height(area)
    slot = (right - left) / len(values)
    for position, (name, value) in enumerate(values.items()):
        x = left + slot * (position + 0.5)
        y = bottom - (bottom - top) * value / 100
        colour = SERIES[position % len(SERIES)] if index % 2 else SERIES[index // 2 % len(SERIES)]
        draw.rectangle((x - slot * 0.32, y, x + slot * 0.32, bottom - 1), fill=colour)
        draw.text((x, y - letter * 0.3), str(value), fill=INK, font=font(int(letter)), anchor="mb")
        draw.text((x, bottom + letter * 0.5), name, fill=INK, font=font(int(letter * 1.1)), anchor="mt")


def _rows(draw: ImageDraw.ImageDraw, area: Box, values: Values, index: int) -> None:
    left, top, right, bottom = area
    slot = (bottom - top) / len(values)
    letter = min(slot * 0.3, (right - left) * 0.085)
    text_width = max(font(int(letter)).getlength(name) for name in values)
    start, end = left + text_width + letter * 0.7, right - letter * 1.9
    draw.line((start, top, start, bottom), fill=INK, width=3)
    for position, (name, value) in enumerate(values.items()):
        y = top + slot * (position + 0.5)
        tip = start + (end - start) * value / 100
        draw.rectangle((start + 2, y - slot * 0.3, tip, y + slot * 0.3), fill=SERIES[(position + index) % len(SERIES)])
        draw.text((start - letter * 0.4, y), name, fill=INK, font=font(int(letter)), anchor="rm")
        draw.text((tip + letter * 0.35, y), str(value), fill=INK, font=font(int(letter)), anchor="lm")


def _line(draw: ImageDraw.ImageDraw, area: Box, values: Values, index: int) -> None:
    left, top, right, bottom = _vertical_axis(draw, area)
    letter = _letter_height(area)
    slot = (right - left) / len(values)
    colour = SERIES[index % len(SERIES)]
    points = [
        (left + slot * (position + 0.5), bottom - (bottom - top) * value / 100)
        for position, value in enumerate(values.values())
    ]
    draw.polygon(
        [(points[0][0], bottom - 1), *points, (points[-1][0], bottom - 1)], fill=mix(colour, (255, 255, 255), 0.85)
    )
    draw.line(points, fill=colour, width=max(4, int(letter * 0.22)), joint="curve")
    dot = letter * 0.34
    heights = list(values.values())
    for position, ((x, y), (name, value)) in enumerate(zip(points, values.items(), strict=True)):
        draw.ellipse(
            (x - dot, y - dot, x + dot, y + dot), fill=(255, 255, 255), outline=colour, width=max(3, int(dot * 0.5))
        )
        before, after = heights[max(0, position - 1)], heights[min(position + 1, len(heights) - 1)]
        # The number goes where the line does not: below a valley, above a peak, to the outer side of a slope.
        valley = before >= value and after >= value
        slope = 0 if valley or (before <= value and after <= value) else (1 if before > after else -1)
        place, anchor = (y + dot * 1.9, "mt") if valley else (y - dot * 1.7, "mb")
        draw.text((x + slope * letter * 0.8, place), str(value), fill=INK, font=font(int(letter)), anchor=anchor)
        draw.text((x, bottom + letter * 0.5), name, fill=INK, font=font(int(letter * 1.1)), anchor="mt")


def _pie(draw: ImageDraw.ImageDraw, area: Box, values: Values, index: int) -> None:
    left, top, right, bottom = area
    beside = (right - left) > (bottom - top) * 1.15
    legend = (right - left) * 0.32 if beside else (bottom - top) * 0.30
    radius = min(right - left - (legend if beside else 0), bottom - top - (0 if beside else legend)) / 2
    x = left + (right - left - (legend if beside else 0)) / 2
    y = top + radius if not beside else (top + bottom) / 2
    angle = -90.0
    letter = max(20.0, radius * 0.14)
    for position, value in enumerate(values.values()):
        colour = SERIES[(position + index) % len(SERIES)]
        sweep = 3.6 * value
        draw.pieslice(
            (x - radius, y - radius, x + radius, y + radius),
            angle,
            angle + sweep,
            fill=colour,
            outline=(255, 255, 255),
            width=4,
        )
        middle = math.radians(angle + sweep / 2)
        at = (x + radius * 0.68 * math.cos(middle), y + radius * 0.68 * math.sin(middle))
        draw.text(at, f"{value}%", fill=(255, 255, 255), font=font(int(letter)), anchor="mm")
        angle += sweep
    step = min(letter * 1.9, (bottom - top) * 0.9 / len(values) if beside else legend * 0.9 / len(values))
    first_x = right - legend * 0.92 if beside else x - letter * 3
    first_y = (top + bottom) / 2 - step * len(values) / 2 if beside else bottom - step * len(values)
    letter = min(letter, step * 0.7)
    for position, name in enumerate(values):
        centre = first_y + step * (position + 0.5)
        square = letter * 0.45
        colour = SERIES[(position + index) % len(SERIES)]
        draw.rectangle((first_x, centre - square, first_x + square * 2, centre + square), fill=colour)
        draw.text((first_x + square * 3, centre), name, fill=INK, font=font(int(letter)), anchor="lm")

"""Signs, labels, receipts and tickets with questions about what is written on them."""

import random

from drawing import INK, OVERSAMPLING, Colour, Question, annotators, blank, finished, fitting_font, gradient, mix, write
from PIL import Image, ImageDraw

WHITE: Colour = (255, 255, 255)
BOARDS: dict[str, Colour] = {
    "blue": (28, 78, 160),
    "green": (24, 110, 66),
    "red": (176, 32, 38),
    "black": (38, 38, 42),
    "brown": (110, 68, 40),
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")

Painted = tuple[Image.Image, list[Question]]

SIGNS = [
    ((150, 120), "STOP", "red"), ((320, 320), "BAKERY", "brown"), ((500, 375), "LIBRARY", "blue"),
    ((640, 360), "AIRPORT", "green"), ((420, 560), "MUSEUM", "black"), ((1024, 640), "HARBOUR", "blue"),
]  # fmt: skip
BANNERS = [((1000, 200), "FRESH BREAD DAILY"), ((900, 260), "SUMMER MUSIC FESTIVAL")]
LABELS = [
    ((300, 420), "HONEY", "250 g", "$4.50", (226, 160, 36)), ((400, 400), "COFFEE", "500 g", "$8.20", (104, 66, 42)),
    ((480, 360), "GREEN TEA", "80 g", "$3.95", (66, 132, 84)),
]  # fmt: skip
RECEIPTS = [
    ((240, 560), "CORNER SHOP", [("Bread", 240), ("Milk", 115), ("Apples", 320)]),
    ((300, 900), "GREEN MARKET", [("Tomatoes", 275), ("Cheese", 540), ("Rice", 199), ("Eggs", 310), ("Butter", 265)]),
    ((220, 600), "BOOK CAFE", [("Coffee", 350), ("Cake", 425), ("Notebook", 600), ("Pen", 125)]),
    ((480, 640), "TOOL HOUSE", [("Hammer", 1490), ("Nails", 385), ("Tape", 260), ("Brush", 545)]),
]  # fmt: skip
TICKETS = [
    ((800, 300), "OSLO", "BERGEN", 14, 3),
    ((960, 240), "PARIS", "LYON", 27, 8),
    ((700, 350), "ROME", "MILAN", 52, 6),
]

COUNT = len(SIGNS) + len(BANNERS) + len(LABELS) + len(RECEIPTS) + len(TICKETS)


def text(index: int) -> Painted:
    """Picture number `index` and its questions."""
    seed = random.Random(2000 + index)
    wanted = 1 if index % 3 == 2 else 2
    for entries, painter in (
        (SIGNS, _sign),
        (BANNERS, _banner),
        (LABELS, _label),
        (RECEIPTS, _receipt),
        (TICKETS, _ticket),
    ):
        if index < len(entries):
            picture, questions = painter(seed, *entries[index])  # type: ignore[operator]
            return finished(picture), questions[:wanted]
        index -= len(entries)
    raise IndexError(index)


def _sign(seed: random.Random, size: tuple[int, int], word: str, colour: str) -> Painted:
    picture = gradient(size, (188, 214, 236), (240, 244, 246))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    draw.rectangle((0, height * 0.84, width, height), fill=(176, 180, 178))
    draw.rectangle((0, height * 0.84, width, height * 0.86), fill=(150, 154, 152))
    edge = min(width, height) * 0.03
    for x in (0.28, 0.72):
        draw.rectangle((width * x - edge, height * 0.3, width * x + edge, height * 0.88), fill=(118, 122, 126))
    board = (width * 0.08, height * 0.16, width * 0.92, height * 0.60)
    draw.rounded_rectangle(board, radius=edge * 2, fill=BOARDS[colour])
    inner = (board[0] + edge, board[1] + edge, board[2] - edge, board[3] - edge)
    draw.rounded_rectangle(inner, radius=edge * 1.4, outline=WHITE, width=max(2, int(edge * 0.4)))
    write(draw, word, (inner[0] + edge * 2, inner[1] + edge * 2, inner[2] - edge * 2, inner[3] - edge * 2), WHITE)
    return picture, [
        Question("What word is written on the sign?", annotators(seed, word.lower(), word), "text"),
        Question("What colour is the sign?", annotators(seed, colour), "colour"),
    ]


def _banner(seed: random.Random, size: tuple[int, int], words: str) -> Painted:
    picture = blank(size, (250, 240, 220))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    flag = height * 0.22
    colours = ((214, 84, 70), (240, 176, 60), (70, 140, 160))
    for position in range(int(width / flag) + 1):
        left = position * flag
        fill = colours[position % len(colours)]
        draw.polygon([(left, 0), (left + flag, 0), (left + flag / 2, flag)], fill=fill)
    draw.rectangle((0, height * 0.90, width, height), fill=colours[2])
    write(draw, words, (width * 0.05, height * 0.34, width * 0.95, height * 0.80), (120, 46, 40))
    first, *_, last = words.split()
    return picture, [
        Question("What is the first word on the banner?", annotators(seed, first.lower(), first), "text"),
        Question("What is the last word on the banner?", annotators(seed, last.lower(), last), "text"),
    ]


def _label(seed: random.Random, size: tuple[int, int], name: str, weight: str, price: str, colour: Colour) -> Painted:
    # A sticker with a transparent surrounding; on another background it still reads.
    picture = Image.new("RGBA", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), (255, 255, 255, 0))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    edge = min(width, height) * 0.04
    draw.rounded_rectangle((edge, edge, width - edge, height - edge), radius=edge * 2.5, fill=colour)
    draw.rounded_rectangle(
        (edge * 2, edge * 2, width - edge * 2, height - edge * 2), radius=edge * 1.8, fill=(255, 250, 238)
    )
    middle = width / 2
    draw.ellipse((middle - edge * 2, height * 0.14, middle + edge * 2, height * 0.14 + edge * 4), fill=colour)
    write(draw, name, (width * 0.14, height * 0.36, width * 0.86, height * 0.56), mix(colour, (0, 0, 0), 0.45))
    draw.line((width * 0.2, height * 0.62, width * 0.8, height * 0.62), fill=colour, width=max(2, int(edge * 0.3)))
    write(draw, weight, (width * 0.14, height * 0.68, width * 0.42, height * 0.78))
    write(draw, price, (width * 0.52, height * 0.68, width * 0.86, height * 0.78), (170, 30, 34))
    return picture, [
        Question("What is the name of the product?", annotators(seed, name.lower(), name), "text"),
        Question("What is the price?", annotators(seed, price, price.strip("$")), "number"),
    ]


def _receipt(seed: random.Random, size: tuple[int, int], shop: str, items: list[tuple[str, int]]) -> Painted:
    picture = blank(size, (206, 204, 200))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    left, right = width * 0.06, width * 0.94
    draw.rectangle((left, height * 0.03, right, height * 0.97), fill=(252, 252, 250))
    tooth = (right - left) / 16
    for position in range(16):  # the torn lower edge
        x = left + position * tooth
        draw.polygon(
            [(x, height * 0.971), (x + tooth, height * 0.971), (x + tooth / 2, height * 0.971 - tooth)],
            fill=(206, 204, 200),
        )
    inner_left, inner_right = width * 0.13, width * 0.87
    write(draw, shop, (inner_left, height * 0.06, inner_right, height * 0.13))
    row = min(height * 0.09, width * 0.14)
    top = height * 0.20
    lines = [*items, ("TOTAL", sum(cents for _, cents in items))]
    step = (height * 0.86 - top) / len(lines)
    for position, (name, cents) in enumerate(lines):
        centre = top + step * (position + 0.5)
        if name == "TOTAL":
            draw.line((inner_left, centre - step / 2, inner_right, centre - step / 2), fill=(90, 90, 90), width=3)
        size_of_row = row * (0.74 if name == "TOTAL" else 0.6)
        box = (
            inner_left,
            centre - size_of_row / 2,
            inner_left + (inner_right - inner_left) * 0.58,
            centre + size_of_row / 2,
        )
        write(draw, name, box, align="left")
        draw_price = (inner_left + (inner_right - inner_left) * 0.64, box[1], inner_right, box[3])
        price = f"${_dollars(cents)}" if name == "TOTAL" else _dollars(cents)
        write(draw, price, draw_price, align="right")
    total = lines[-1][1]
    dearest = max(items, key=lambda item: item[1])[0]
    return picture, [
        Question("What is the total?", annotators(seed, f"${_dollars(total)}", _dollars(total)), "number"),
        Question(
            "How many items are listed above the total?",
            annotators(seed, str(len(items)), NUMBER_WORDS[len(items)]),
            "count",
        )
        if len(items) % 2
        else Question("Which item is the most expensive?", annotators(seed, dearest.lower(), dearest), "text"),
    ]


def _dollars(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _ticket(
    seed: random.Random, size: tuple[int, int], origin: str, destination: str, seat: int, platform: int
) -> Painted:
    picture = blank(size, (232, 236, 240))
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    edge = height * 0.08
    draw.rounded_rectangle((edge, edge, width - edge, height - edge), radius=edge, fill=(255, 252, 240))
    draw.rounded_rectangle(
        (edge, edge, width - edge, height * 0.32), radius=edge, fill=(36, 92, 120), corners=(True, True, False, False)
    )
    write(draw, "TRAIN TICKET", (edge * 2, height * 0.13, width * 0.55, height * 0.28), WHITE, "left")
    grey = (112, 118, 126)
    columns = (
        ("FROM", origin, 0.06, 0.30),
        ("TO", destination, 0.36, 0.62),
        ("SEAT", str(seat), 0.70, 0.79),
        ("PLATFORM", str(platform), 0.83, 0.94),
    )
    value_font = min(
        (fitting_font(value, width * (right - left), height * 0.20) for _, value, left, right in columns),
        key=lambda fitted: fitted.size,
    )
    for title, value, left, right in columns:
        write(draw, title, (width * left, height * 0.42, width * right, height * 0.48), grey, "left")
        draw.text((width * left, height * 0.66), value, fill=INK, font=value_font, anchor="lm")
    for y in range(int(height * 0.36), int(height * 0.90), int(height * 0.06)):
        draw.ellipse((width * 0.665, y, width * 0.665 + height * 0.02, y + height * 0.02), fill=(200, 204, 208))
    return picture, [
        Question("What is the seat number?", annotators(seed, str(seat)), "number"),
        Question("Which city does the train go to?", annotators(seed, destination.lower(), destination), "text"),
    ]

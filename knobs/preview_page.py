"""The page of a preview: a panel per setting, drawn to one scale with its numbers below, a title and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from knobs import drawing
from knobs.canvas_parts import Box
from knobs.drawing import text_width, write
from knobs.preview_panel import Panel

# Pixels. The page is made to be read where it is shown 900 pixels wide, too.
PAGE_WIDTH = 1600
_LEAST_INNER = 900
_MARGIN, _GAP, _VIEW_GAP = 36, 52, 20
_TITLE, _PANEL_TITLE, _TEXT = 36, 32, 23
_LINE = 32
# Height of a drawing, usual and largest.
_HEIGHT, _MOST_HEIGHT = 820, 1500
# Crops smaller than this explain little: rather another row of panels is begun, or a drawing becomes higher than usual.
# Larger than that they are a blur.
_LEAST_CROP, _MOST_CROP = 100, 480
# Length of the longest bar; height that the crops one by one may take, and the least side of one of them.
_BAR, _APART_HEIGHT, _LEAST_APART = 180, 420, 48


# -- where everything goes --------------------------------------------------------------------------------------------


def arranged(panels: Sequence[Panel]) -> tuple[float, list[list[Panel]]]:
    """The scale that all panels are drawn at, page pixels per canvas pixel, and the panels of each row.

    One scale, so that a larger canvas looks larger. As few rows as leave the crops large enough to be looked at.
    """
    crop = _shortest_side(panels)
    best = [(_largest_scale(panels, rows), rows) for rows in range(1, len(panels) + 1)]
    enough = min(_LEAST_CROP / crop, 0.95 * best[-1][0])
    scale = next(scale for scale, _ in best if scale >= enough)
    return scale, _packed(panels, scale)


def _largest_scale(panels: Sequence[Panel], rows: int) -> float:
    """The largest scale at which the panels fit into so many rows."""

    def fits(scale: float) -> bool:
        return (
            all(_drawing_size(p, scale)[1] <= high and _width(p, scale) <= inner for p in panels)
            and len(_packed(panels, scale)) <= rows
        )

    inner = PAGE_WIDTH - 2 * _MARGIN
    high = max(_drawing_size(panel, _LEAST_CROP / _shortest_side(panels))[1] for panel in panels)
    high = min(max(_HEIGHT, high), _MOST_HEIGHT)
    least, most = 0.0, max(1.5, _MOST_CROP / max(panel.parts.crops[0].width for panel in panels))
    for _ in range(30):
        middle = (least + most) / 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _shortest_side(panels: Sequence[Panel]) -> int:
    """Pixels of the shortest side of any crop."""
    return min(min(panel.parts.crops[0].width, panel.parts.crops[0].height) for panel in panels)


def _packed(panels: Sequence[Panel], scale: float) -> list[list[Panel]]:
    rows: list[list[Panel]] = []
    left = PAGE_WIDTH
    for panel in panels:
        width = _width(panel, scale)
        left -= _GAP + width
        if left < 0 or not rows:
            rows.append([])
            left = PAGE_WIDTH - 2 * _MARGIN - width
        rows[-1].append(panel)
    return rows


def _width(panel: Panel, scale: float) -> int:
    return max(_drawing_size(panel, scale)[0], _text_width(panel))


def _drawing_size(panel: Panel, scale: float) -> tuple[int, int]:
    """Width and height of the canvas and, beside it, the global view."""
    shown = drawing.shown_box(panel.parts)
    width, height = round(shown.width * scale), round(shown.height * scale)
    if panel.view is None:
        return width, height
    side, down = round(panel.view.canvas.width * scale), round(panel.view.canvas.height * scale)
    return width + _VIEW_GAP + max(side, text_width("global view", _TEXT)), max(height, down + _LINE)


def _text_width(panel: Panel) -> int:
    """What the title and the numbers take, as wide as they are."""
    widths = [
        _label_width(panel) + _BAR,
        text_width(panel.title, _PANEL_TITLE, bold=True),
        *(_label_width(panel) + text_width(number.value, _TEXT) for number in panel.numbers),
    ]
    return max(widths)


def _label_width(panel: Panel) -> int:
    return max(text_width(number.label, _TEXT) for number in panel.numbers) + 16


# -- what is drawn ----------------------------------------------------------------------------------------------------


def page(image: Image.Image, model: str, file_name: str, panels: Sequence[Panel]) -> Image.Image:
    """All panels of one model on one image, in rows at one scale, below a title and above a legend."""
    scale, rows = arranged(panels)
    inner = max(sum(_width(panel, scale) for panel in row) + _GAP * (len(row) - 1) for row in rows)
    inner = max(inner, _LEAST_INNER)
    costs = [max(panel.numbers[i].cost for panel in panels) for i in range(len(panels[0].numbers))]
    strips = [
        _head(image, model, file_name, panels, scale, inner),
        *(_row(row, image, scale, inner, costs if len(panels) > 1 else []) for row in rows),
        _legend(panels, inner),
    ]
    height = sum(strip.height for strip in strips) + _MARGIN * (len(strips) + 1)
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, height), drawing.PAPER)
    top = _MARGIN
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height + _MARGIN
    return sheet


def _row(panels: Sequence[Panel], image: Image.Image, scale: float, width: int, costs: Sequence[int]) -> Image.Image:
    """Panels beside each other, their drawings and their numbers each beginning at one height."""
    drawn_at = _PANEL_TITLE + 14
    numbers_at = drawn_at + max(_drawing_size(panel, scale)[1] for panel in panels) + 18
    # Compared panels have no room for it: the crops one by one, beside the numbers.
    beside = _text_width(panels[0]) + _GAP
    apart = None if costs else _apart(panels[0], image, width - beside)
    below = max(_LINE * len(panels[0].numbers), apart.height if apart else 0)
    strip = Image.new("RGB", (width, numbers_at + below), drawing.PAPER)
    if apart:
        strip.paste(apart, (beside, numbers_at))
    draw = ImageDraw.Draw(strip)
    left = 0
    for panel in panels:
        write(draw, (left, 0), panel.title, _PANEL_TITLE, bold=True)
        _paste_drawing(strip, panel, image, scale, (left, drawn_at))
        _write_numbers(draw, panel, (left, numbers_at), costs)
        left += _width(panel, scale) + _GAP
    return strip


def _paste_drawing(strip: Image.Image, panel: Panel, image: Image.Image, scale: float, at: tuple[int, int]) -> None:
    """The canvas and, beside it, the global view."""
    canvas = drawing.draw_canvas(image, panel.parts, scale)
    strip.paste(canvas, at)
    if panel.view is not None:
        view = drawing.draw_view(image, panel.view, scale)
        left = at[0] + canvas.width + _VIEW_GAP
        strip.paste(view, (left, at[1]))
        write(ImageDraw.Draw(strip), (left, at[1] + view.height + 4), "global view", _TEXT, drawing.VIEW)


def _write_numbers(draw: ImageDraw.ImageDraw, panel: Panel, at: tuple[int, int], costs: Sequence[int]) -> None:
    left, value_left = at[0], at[0] + _label_width(panel)
    for i, number in enumerate(panel.numbers):
        top = at[1] + _LINE * i
        if costs and number.cost:
            length = max(3, round(_BAR * number.cost / costs[i]))
            draw.rectangle((value_left - 5, top - 1, value_left - 5 + length, top + _LINE - 6), fill=drawing.BAR)
        write(draw, (left, top), number.label, _TEXT, drawing.PALE)
        write(draw, (value_left, top), number.value, _TEXT)


def _apart(panel: Panel, image: Image.Image, width: int) -> Image.Image | None:
    """The crops pulled apart, as the vision tower gets them; what two of them share is seen in both.

    None where there is one crop, or so many that nothing could be seen on them.
    """
    (rows, columns), crops, gap = panel.layout.tiling, panel.parts.crops, 10
    scale = min(
        1.0 if crops[0].width > 200 else 200 / crops[0].width,
        (width - gap * (columns - 1)) / columns / crops[0].width,
        (_APART_HEIGHT - gap * (rows - 1)) / rows / crops[0].height,
    )
    if len(crops) == 1 or scale * crops[0].width < _LEAST_APART:
        return None
    apart = [drawing.draw_crop(image, panel.parts, i, scale) for i in range(len(crops))]
    across, down = apart[0].width + gap, apart[0].height + gap
    strip = Image.new("RGB", (width, _LINE + rows * down - gap), drawing.PAPER)
    write(ImageDraw.Draw(strip), (0, 0), "crops one by one", _TEXT, drawing.PALE)
    for i, crop in enumerate(apart):
        strip.paste(crop, (i % columns * across, _LINE + i // columns * down))
    return strip


def _head(
    image: Image.Image, model: str, file_name: str, panels: Sequence[Panel], scale: float, width: int
) -> Image.Image:
    """The image as it is, small, and beside it what the page shows."""
    reduced = min(260 / image.width, 150 / image.height, 1)
    small = image.resize((max(1, round(image.width * reduced)), max(1, round(image.height * reduced))), reducing_gap=3)
    left = small.width + 24
    name = "".join(c if c.isascii() and c.isprintable() else "?" for c in file_name)
    size = f", {image.height} x {image.width} px"
    room = width - left - text_width(f"{model}: {size}", _TITLE, bold=True)
    title = f"{model}: {drawing.shortened(name, _TITLE, room)}{size}"
    said = f"{_meaning(panels)} Sizes are height x width; all is drawn at {100 * scale:.0f} %."
    # What is compared differs in its axis only.
    lines = [(line, drawing.INK) for line in drawing.wrapped(panels[0].options, _TEXT, width - left)]
    lines += [(line, drawing.PALE) for line in drawing.wrapped(said, _TEXT, width - left)]
    head = Image.new("RGB", (width, max(small.height, _TITLE + 18 + _LINE * len(lines))), drawing.PAPER)
    head.paste(small, (0, 0))
    draw = ImageDraw.Draw(head)
    write(draw, (left, 0), title, _TITLE, bold=True)
    for i, (line, colour) in enumerate(lines):
        write(draw, (left, _TITLE + 16 + _LINE * i), line, _TEXT, colour)
    return head


def _meaning(panels: Sequence[Panel]) -> str:
    """What happens to the image, for a reader who has never heard of crops."""
    views = [panel.view is not None for panel in panels]
    if not _is_split(panels):
        return "The image is resized and passes through the vision tower in one piece."
    said = "The image is resized onto a canvas of whole crops. "
    if all(views):
        said += "Every crop and the global view pass through the vision tower"
    else:
        said += "Every crop passes through the vision tower, beside several crops a global view too"
    said += "; the vision tokens that come out (theoretical) stand in the prompt (actual)"
    if any(panel.parts.shared for panel in panels):
        once = any(panel.layout.prompt_vision_tokens < panel.layout.vision_tokens for panel in panels)
        said += f", where shared parts count {'once' if once else 'each time'}"
    return said + (". More crops show finer detail and cost more tokens." if len(panels) > 1 else ".")


def _legend(panels: Sequence[Panel], width: int) -> Image.Image:
    """The marks that occur, each with what it means."""
    first = panels[0].parts.crops[0]
    alike = all(panel.parts.crops[0] == first for panel in panels)
    size = f", {first.height} x {first.width} px" if alike else ""
    bands = [band for panel in panels for band in panel.parts.shared]
    marks = []
    if bands:
        shared = min(min(band.width, band.height) for band in bands)
        marks.append((_overlap_mark, 104, f"crops{size}; neighbours share {shared} px"))
    else:
        marks.append((_crop_mark, 46, f"crop{size}" if _is_split(panels) else "one pass through the vision tower"))
    if any(panel.parts.cut_off for panel in panels):
        marks.append((_cut_off_mark, 46, "cut off"))
    if any(panel.parts.padding for panel in panels):
        marks.append((_padding_mark, 46, "padding (black)"))
    if any(panel.view is not None for panel in panels):
        marks.append((_view_mark, 46, f"global view{size}"))
    places, left, top = [], 0, 0
    for _, swatch, text in marks:
        long = swatch + 12 + text_width(text, _TEXT)
        if left and left + long > width:
            left, top = 0, top + 46
        places.append((left, top))
        left += long + 40
    legend = Image.new("RGB", (width, top + 36), drawing.PAPER)
    for (mark, swatch, text), (x, y) in zip(marks, places, strict=True):
        mark(legend, Box(x, y, x + swatch, y + 36))
        write(ImageDraw.Draw(legend), (x + swatch + 12, y + 18), text, _TEXT, anchor="lm")
    return legend


def _is_split(panels: Sequence[Panel]) -> bool:
    return any(panel.layout.num_crops > 1 or panel.view is not None for panel in panels)


def _crop_mark(legend: Image.Image, box: Box) -> None:
    drawing.outline_crops(legend, [box], overlapping=False)


def _overlap_mark(legend: Image.Image, box: Box) -> None:
    first, second = replace(box, right=box.right - 38), replace(box, left=box.left + 38)
    drawing.tint(legend, first.within(second), drawing.SHARED, 2 * drawing.SHARED_TINT)
    drawing.outline_crops(legend, [first, second], overlapping=True)


def _cut_off_mark(legend: Image.Image, box: Box) -> None:
    drawing.tint(legend, box, drawing.PALE, 0.6)
    drawing.hatch(legend, box, drawing.CUT_OFF, drawing.CUT_OFF_TINT)


def _padding_mark(legend: Image.Image, box: Box) -> None:
    drawing.tint(legend, box, drawing.BLACK, 1)
    drawing.hatch(legend, box, drawing.PADDING, 0)


def _view_mark(legend: Image.Image, box: Box) -> None:
    drawing.frame(legend, box, drawing.VIEW)

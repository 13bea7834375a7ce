"""`python -m knobs.explain`: what a setting of the vision knob makes of an image, or what there is to set."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knobs.arguments import add_setting, check, count, height_and_width, setting_of, with_options
from knobs.card import DescribedModel, described, layout_of, padded_images, refuse_unknown
from knobs.errors import KnobError, UnusableModel
from knobs.picture_files import picture_sizes
from knobs.placement import fit_of
from knobs.printing import print_lines
from knobs.vision import NATIVE, VisionSetting

Size = tuple[int, int]

# Shown where no image is named: landscape, portrait, square, and a thin one; height x width.
REFERENCE_SIZES: tuple[Size, ...] = ((480, 640), (640, 480), (384, 384), (300, 1500))

_FITS = {
    "pad": "the whole image on it, black around",
    "fill": "covered by the image, the overhang cut off",
    "stretch": "the image stretched over it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was asked for; 0, or 2 where there is no such model or setting of it; see `print_lines`."""
    arguments = _parser().parse_args(argv)
    try:
        lines = list(_answer(arguments))  # all of them first: a mistake is one line, with no header above it
    except (KnobError, UnusableModel) as error:
        print(f"knobs.explain: {error}", file=sys.stderr)
        return 2
    return print_lines(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m knobs.explain",
        description="What a setting of the vision knob makes of an image: crops, passes through the vision tower, "
        "tokens. Without a setting: every setting worth knowing. Loads no weights.",
    )
    add_setting(parser)
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--image-size", type=height_and_width, metavar="HxW", help="the image, height x width in pixels")
    image.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of images: means over all of them")
    parser.add_argument("--text-tokens", type=count, default=0, metavar="N", help="tokens of the question, added up")
    parser.add_argument("--card", action="store_true", help="describe the model instead")
    parser.add_argument("--json", action="store_true", help="a JSON object per setting (and image size), one per line")
    return parser


def _answer(arguments: argparse.Namespace) -> Iterable[str]:
    model = described(arguments.model)
    if arguments.card:
        return [json.dumps(_card_fields(model))] if arguments.json else _card_lines(model)
    refuse_unknown(model)
    settings, one = _settings(model, arguments)
    if arguments.images is not None:
        return _folder(model, settings, arguments)
    sizes = [arguments.image_size] if arguments.image_size else list(REFERENCE_SIZES)
    if arguments.json:
        every = ((setting, size) for setting in settings for size in sizes)
        return [json.dumps(fields(model, *item, arguments.text_tokens)) for item in every]
    if arguments.image_size is None:
        return _overview(model, settings)
    if one:
        return _in_words(model, settings[0], arguments.image_size, arguments.text_tokens)
    return _table(model, settings, arguments.image_size, arguments.text_tokens)


def _settings(model: DescribedModel, arguments: argparse.Namespace) -> tuple[list[VisionSetting], bool]:
    """The one setting that the flags name, or all that are worth knowing; and whether it is one."""
    geometry = model.geometry
    asked = setting_of(arguments)
    if asked.knob != NATIVE:
        check(geometry, asked)
        return [asked], True
    levels = [with_options(level, arguments) for level in geometry.levels()]
    possible = [level for level in levels if geometry.refuse(level) is None]
    if not possible:
        check(geometry, asked)  # options that no level can take are a mistake to report, not an empty table
    return possible, False


# -- one image --------------------------------------------------------------------------------------------------------


def fields(model: DescribedModel, setting: VisionSetting, size: Size, text_tokens: int = 0) -> dict[str, Any]:
    """What one setting makes of one image size (height, width in pixels), under the names of the JSON output.

    Raises:
        KnobError: the family of the model has no closed form.
    """
    layout = layout_of(model, *size, setting)
    image_tokens = layout.prompt_vision_tokens + layout.special_tokens
    return {
        "model": model.name,
        "setting": str(setting),
        "image_size": f"{size[0]}x{size[1]}",
        "tiling": list(layout.tiling),
        "num_crops": layout.num_crops,
        "tower_passes": layout.tower_passes,
        "theoretical_vision_tokens": layout.vision_tokens,
        "actual_vision_tokens": layout.prompt_vision_tokens,
        "special_tokens": layout.special_tokens,
        "prompt_tokens": image_tokens + text_tokens,
        "target_resolution": f"{layout.target_height}x{layout.target_width}",
        "aspect_mismatch": round(layout.aspect_mismatch, 6),
    }


def _in_words(model: DescribedModel, setting: VisionSetting, size: Size, text_tokens: int) -> Iterable[str]:
    layout = layout_of(model, *size, setting)
    rows, columns = layout.tiling
    passes, crops = layout.tower_passes, layout.num_crops
    view = ", and a global view" if passes > crops else ""
    image_tokens = layout.prompt_vision_tokens + layout.special_tokens
    shared = layout.vision_tokens - layout.prompt_vision_tokens
    fit = _FITS[fit_of(model.geometry.complete(setting))]
    yield f"{model.name}: an image of {size[0]}x{size[1]} pixels (height x width) under {setting}"
    yield f"  tiling            {rows}x{columns} (rows x columns)"
    yield f"  canvas            {layout.target_height}x{layout.target_width}, {fit}"
    yield f"  crops             {crops}{view}: {passes} {'pass' if passes == 1 else 'passes'} through the vision tower"
    yield f"  vision tokens     {layout.vision_tokens} leave the tower (theoretical)"
    yield f"                    {layout.prompt_vision_tokens} stand in the prompt (actual)" + (
        f", for {shared} are shared by neighbouring crops" if shared else ""
    )
    yield f"  special tokens    {layout.special_tokens} mark the image and its parts"
    yield f"  prompt            {image_tokens} tokens for the image" + (
        f", {image_tokens + text_tokens} with {text_tokens} of text" if text_tokens else ""
    )
    yield f"  aspect mismatch   {layout.aspect_mismatch:.2f} (width/height, 0 is undistorted)"


def _table(model: DescribedModel, settings: Sequence[VisionSetting], size: Size, text_tokens: int) -> Iterable[str]:
    with_text = f" + {text_tokens} of text" if text_tokens else ""
    yield f"{model.name}: an image of {size[0]}x{size[1]} pixels (height x width) under every setting worth knowing"
    yield f"theoretical: vision tokens of the tower; actual: in the prompt; prompt: with special tokens{with_text}"
    header = ["setting", "tiling", "passes", "theoretical", "actual", "prompt", "mismatch"]
    rows = []
    for setting in settings:
        values = fields(model, setting, size, text_tokens)
        numbers = ("tower_passes", "theoretical_vision_tokens", "actual_vision_tokens", "prompt_tokens")
        tiling = "x".join(map(str, values["tiling"]))
        mismatch = f"{values['aspect_mismatch']:.2f}"
        rows.append([str(setting), tiling, *(str(values[name]) for name in numbers), mismatch])
    yield from _aligned(header, rows)


def _overview(model: DescribedModel, settings: Sequence[VisionSetting]) -> Iterable[str]:
    """A line per setting, a column per reference size."""
    layouts = [[layout_of(model, *size, setting) for size in REFERENCE_SIZES] for setting in settings]
    both = any(found.vision_tokens != found.prompt_vision_tokens for line in layouts for found in line)
    counts = "vision tokens of the tower (theoretical) / in the prompt (actual)" if both else "vision tokens"
    yield f"{model.name}: rows x columns of crops and {counts}, by image size (height x width)"
    rows = []
    for setting, line in zip(settings, layouts, strict=True):
        cells = []
        for found in line:
            tokens = f"{found.vision_tokens}/{found.prompt_vision_tokens}" if both else str(found.vision_tokens)
            cells.append(f"{found.tiling[0]}x{found.tiling[1]} {tokens:>{9 if both else 4}}")
        rows.append([str(setting), *cells])
    yield from _aligned(["setting", *(f"{height}x{width}" for height, width in REFERENCE_SIZES)], rows)


# -- a folder ---------------------------------------------------------------------------------------------------------


def _folder(model: DescribedModel, settings: Sequence[VisionSetting], arguments: argparse.Namespace) -> Iterable[str]:
    folder = arguments.images
    if not folder.is_dir():
        raise KnobError(f"--images: there is no folder {folder}")
    sizes, others = picture_sizes(folder)
    if not sizes:
        raise KnobError(f"--images: no file in {folder} can be read as an image")
    summaries = [_over_images(model, setting, sizes, arguments.text_tokens) for setting in settings]
    if arguments.json:
        yield from (json.dumps(summary) for summary in summaries)
        return
    skipped = f", {others} other files left out" if others else ""
    yield f"{model.name}: means over {len(sizes)} images in {folder}{skipped}"
    header = ["setting", "crops", "passes", "theoretical", "actual", "prompt", "mismatch", "p95", "crops: images"]
    rows = [
        [
            summary["setting"],
            *(f"{summary[name]:.1f}" for name in ("num_crops_mean", "tower_passes_mean")),
            *(f"{summary[f'{name}_vision_tokens_mean']:.0f}" for name in ("theoretical", "actual")),
            f"{summary['prompt_tokens_mean']:.0f}",
            f"{summary['aspect_mismatch_mean']:.2f}",
            f"{summary['aspect_mismatch_p95']:.2f}",
            " ".join(f"{crops}:{count}" for crops, count in summary["num_crops_distribution"].items()),
        ]
        for summary in summaries
    ]
    yield from _aligned(header, rows)


def _over_images(
    model: DescribedModel, setting: VisionSetting, sizes: Sequence[Size], text_tokens: int
) -> dict[str, Any]:
    every = [fields(model, setting, size, text_tokens) for size in sizes]
    counted = Counter(row["num_crops"] for row in every)
    averaged = (
        "num_crops",
        "tower_passes",
        "theoretical_vision_tokens",
        "actual_vision_tokens",
        "special_tokens",
        "prompt_tokens",
        "aspect_mismatch",
    )
    return {
        "model": model.name,
        "setting": str(setting),
        "num_images": len(every),
        **{f"{name}_mean": statistics.fmean(row[name] for row in every) for name in averaged},
        "aspect_mismatch_p95": _quantile([row["aspect_mismatch"] for row in every], 0.95),
        "num_crops_distribution": {str(crops): counted[crops] for crops in sorted(counted)},
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation, as the validation of a run has it."""
    ascending, place = sorted(values), share * (len(values) - 1)
    below, above = ascending[math.floor(place)], ascending[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """A table in columns, text on the left and numbers on the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if i == 0 or ":" in header[i] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


# -- a model ----------------------------------------------------------------------------------------------------------

# Images of three samples, to show what a batch of them costs.
_EXAMPLE_BATCH = [3, 2, 5]


def _card_fields(model: DescribedModel) -> dict[str, Any]:
    card = model.card()
    counts = None if card.parameters is None else asdict(card.parameters) | {"total": card.parameters.total}
    real, padded = padded_images(_EXAMPLE_BATCH)
    return {
        "model": model.name,
        **asdict(card),
        "parameters": counts,
        "num_blocks": model.num_blocks,
        "num_experts": model.num_experts,
        "moe_top_k": model.moe_top_k,
        "vision_axes": [*model.geometry.axes, *model.geometry.options],
        "example_batch": {"images": _EXAMPLE_BATCH, "held": padded if card.padded else real, "real": real},
    }


def _card_lines(model: DescribedModel) -> Iterable[str]:
    card = model.card()
    experts = f", {model.num_experts} experts, {model.moe_top_k} per token" if model.num_experts else ""
    yield f"{model.name}"
    yield ""
    yield "1. Architecture"
    yield from _wrapped(card.vision_tower, "   vision tower     ")
    yield from _wrapped(card.projector, "   projector        ")
    yield from _wrapped(card.language_model, "   language model   ")
    yield f"   blocks           {model.num_blocks}{experts}"
    yield from _wrapped(card.target_size, "   tower image      ")
    if card.parameters is None:
        yield "   parameters       not known without the weights"
    else:
        parts = card.parameters
        yield (
            f"   parameters       {_count(parts.total)}: vision {_count(parts.vision)}, projector "
            f"{_count(parts.projector)}, language {_count(parts.language)}"
        )
        if parts.active_language != parts.language:
            yield f"                    of the language model, a token passes through {_count(parts.active_language)}"
    yield ""
    yield "2. Image preprocessing"
    for number, step in enumerate(card.preprocessing, start=1):
        yield from _wrapped(step, f"   {number}. ")
    yield ""
    yield "3. One crop only"
    yield from _wrapped(card.splitting_off)
    yield ""
    yield "4. Several images"
    yield from _wrapped(card.batching)
    real, padded = padded_images(_EXAMPLE_BATCH)
    batch = f"   samples of {', '.join(map(str, _EXAMPLE_BATCH[:-1]))} and {_EXAMPLE_BATCH[-1]} images"
    if card.padded is None:
        yield "   what a batch of them costs is not known: its own processor decides"
    elif card.padded:
        through = {True: "go", False: "do not go", None: "may go"}[card.padding_in_tower]
        yield f"{batch} take the pixels of {padded} for {real} ({padded / real:.1f}x);"
        yield f"   the empty ones {through} through the vision tower"
    else:
        yield f"{batch} take the pixels of {real}: nothing is padded"
    yield ""
    yield "5. An image in the prompt"
    for line in card.image_tokens:
        yield from _wrapped(line)
    yield ""
    yield f"Vision knobs: {', '.join((*model.geometry.axes, *model.geometry.options)) or 'none, native only'}"


def _wrapped(text: str, label: str = "   ") -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


if __name__ == "__main__":
    sys.exit(main())

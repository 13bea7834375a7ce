"""Reads a YAML sweep into a typed `Sweep`, or says in plain words everything that is wrong with it, line by line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from knobs.tiling import TIERS
from knobs.vision import VISION_AXES
from orchestrator.spec_errors import KeyPath, Problem, SpecError, dotted, nearest
from orchestrator.spec_models import (
    MODEL_AXES,
    Accuracy,
    BlockSelection,
    Columns,
    CropSelection,
    DatasetEntry,
    HardwareEntry,
    Knobs,
    Latency,
    ModelEntry,
    ModelVariant,
    Sampling,
    SelectionMethod,
    Sweep,
)
from orchestrator.spec_values import OR_A_LIST
from orchestrator.yaml_lines import Document, parse, read_text

__all__ = [
    "Accuracy",
    "BlockSelection",
    "Columns",
    "CropSelection",
    "DatasetEntry",
    "HardwareEntry",
    "Knobs",
    "Latency",
    "ModelEntry",
    "ModelVariant",
    "Problem",
    "Sampling",
    "SpecError",
    "Sweep",
    "load_sweep",
    "parse_sweep",
]


# Axes that people look for among the knobs, and where they stand instead.
_AXES_ELSEWHERE = {"batch_size": "latency.batch_size"} | {axis: f"{axis} in an entry of models" for axis in MODEL_AXES}


def load_sweep(path: str | Path) -> Sweep:
    """Reads and checks a sweep file. Models, datasets and score files are named, not looked for.

    Raises:
        SpecError: the file cannot be read, or holds mistakes; all of them are reported at once.
    """
    return parse_sweep(read_text(path), str(path))


def parse_sweep(text: str, file: str = "sweep.yaml") -> Sweep:
    """Checks the text of a sweep; `file` is the name to use in messages.

    Raises:
        SpecError: as `load_sweep`.
    """
    document = parse(text, file)
    if not isinstance(document.data, dict):
        what = f"a sweep must be a mapping of keys ({_names(Sweep)}), got {_shown(document, '', document.data)}"
        raise SpecError([*document.problems, document.problem("", what)])
    # Rules that span several keys read the raw values, so that one mistyped key does not hide the others.
    problems = [*document.problems, *(document.problem(dotted(path), what) for path, what in _broken_rules(document))]
    try:
        sweep = Sweep.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [
            _problem(detail, document) for detail in details if dotted(detail["loc"]) not in document.unreadable
        ]
        raise SpecError(problems) from None
    if problems:
        raise SpecError(problems)
    sweep._document = document
    return sweep


# --- one wrong key or value -------------------------------------------------------------------------------------------


def _problem(error: ErrorDetails, document: Document) -> Problem:
    """A pydantic error in plain words, at its line."""
    path = error["loc"]
    key = dotted(path)
    got = _shown(document, key, error["input"])
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            what = "required key is missing"
        case "extra_forbidden":
            what = _unknown_key(path)
        case "expected":
            what = f"must be {context['words']}, got {got}" + _hint(context, error["input"], document.scalars.get(key))
        case "refused":
            what = context["words"]
        case "not_a_list":
            spelling = document.scalars.get(key)
            what = "must be a list, " + (f"write [{spelling}]" if spelling else f"got {got}")
        case "model_type":
            what = f"must be a mapping of keys ({_names(_section(path))}), got {got}"
        case _:
            what = f"is not allowed here, got {got}"
    return document.problem(key, what)


def _unknown_key(path: KeyPath) -> str:
    section, name = _section(path[:-1]), str(path[-1])
    meant = nearest(name, section.model_fields)
    if section is Sweep and name in Knobs.model_fields:
        meant = f"knobs.{name}"
    if section is Knobs:
        meant = _AXES_ELSEWHERE.get(name, meant)
    return "unknown key" + (f", did you mean {meant}?" if meant else "") + f" (allowed: {_names(section)})"


def _section(path: KeyPath) -> type[BaseModel]:
    """The part of the sweep whose keys stand at a path."""
    section: type[BaseModel] = Sweep
    for name in path:
        if isinstance(name, str):
            section = next(_models_in(section.model_fields[name].annotation))
    return section


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _names(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _shown(document: Document, key: str, value: object) -> str:
    """A value as the user spelt it; text is in quotes, so that '8' and 8 differ."""
    if isinstance(value, dict):
        return "a mapping"
    spelling = document.scalars.get(key)
    if isinstance(value, str):
        text = repr(value)
    elif value is None and not spelling:
        return "nothing"
    else:
        text = spelling if spelling is not None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(context: dict[str, Any], value: object, spelling: str | None) -> str:
    """What to write instead, where a misread scalar or a misspelt name explains the mistake."""
    words: str = context["words"]
    if isinstance(value, str):
        if words.endswith(OR_A_LIST) and "," in value and len(value) <= 60:
            return f", write [{value}]"
        meant = nearest(value, context["choices"])
        if meant:
            return f", did you mean {meant}?"
        number = _as_number(value, whole="whole" in words) if "number" in words else None
        return f" (YAML reads this as text, write {number})" if number is not None else ""
    if words == "text" and spelling and value is not None:
        return f' (write "{spelling}", in quotes)'
    return ""


def _as_number(text: str, whole: bool) -> str | None:
    """A number in the notation that YAML knows: 2e-2 and '8' are text to it."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or (whole and not number.is_integer()):
        return None
    return str(int(number)) if number.is_integer() else repr(number)


# --- rules that span several keys -------------------------------------------------------------------------------------


def _broken_rules(document: Document) -> Iterator[tuple[KeyPath, str]]:
    data = document.data
    assert isinstance(data, dict)
    knobs = _mapping(data.get("knobs"))
    yield from _vision_axes(knobs, document)
    for axis, levels in knobs.items():
        if axis in Knobs.model_fields:
            yield from _repeated(("knobs", axis), _list(levels), "{value} is listed twice", document)
    batch_sizes = _list(_mapping(data.get("latency")).get("batch_size"))
    yield from _repeated(("latency", "batch_size"), batch_sizes, "{value} is listed twice", document)
    yield from _models([_completed(entry, ModelEntry) for entry in _list(data.get("models"))], document)
    names = [_completed(entry, DatasetEntry).get("name") for entry in _list(data.get("datasets"))]
    yield from _repeated(("datasets",), names, "the dataset {value} is listed twice", document)
    hardware = [_completed(entry, HardwareEntry) for entry in _list(data.get("hardware"))]
    devices = [(entry["accelerator"], entry["min_memory_gb"]) if "accelerator" in entry else None for entry in hardware]
    yield from _repeated(("hardware",), devices, "the same accelerator is listed twice", document)
    yield from _tiers(_mapping(data.get("crop_selection")), _list(knobs.get("tier")), document)
    yield from _block_selection(_mapping(data.get("block_selection")))
    yield from _sampling(_mapping(data.get("sampling")))
    if all(key in data and (data[key] is False or data[key] == "off") for key in ("latency", "accuracy")):
        yield ("accuracy",), "latency and accuracy are both off, nothing is left to measure"


def _models(entries: list[dict[str, Any]], document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Levels that an entry lists twice, and entries of which some combination of levels is that of an earlier one."""
    first: dict[object, int] = {}
    for index, entry in enumerate(entries):
        for axis in MODEL_AXES:
            yield from _repeated(("models", index, axis), _list(entry.get(axis)), "{value} is listed twice", document)
        variants = list(_variants(entry))
        earlier = [first[variant] for variant in variants if variant in first]
        if earlier:
            line = document.line_of(dotted(("models", min(earlier))))
            yield ("models", index), f"the same model is listed twice, first on line {line}"
        for variant in variants:
            first.setdefault(variant, index)


def _variants(entry: dict[str, Any]) -> Iterator[object]:
    """What tells the combinations of an entry apart, without those of levels that there are not."""
    if not entry:
        return
    rest = repr({key: value for key, value in entry.items() if key not in MODEL_AXES})
    levels: list[list[str | None]] = []
    for axis, known in MODEL_AXES.items():
        written = entry[axis] if isinstance(entry[axis], list) else [entry[axis]]
        levels.append([level for level in (None, *known) if level in written])
    yield from ((rest, *of_each_axis) for of_each_axis in product(*levels))


def _vision_axes(knobs: dict[str, Any], document: Document) -> Iterator[tuple[KeyPath, str]]:
    used = [axis for axis in knobs if axis in VISION_AXES]
    if len(used) > 1:
        lines = ", ".join(f"{axis} (line {document.line_of(f'knobs.{axis}')})" for axis in used)
        yield ("knobs", used[1]), f"a sweep has at most one vision axis, found {lines}"


def _repeated(path: KeyPath, values: list[Any], what: str, document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Entries equal to an earlier one; None stands for an entry that is wrong for another reason."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        # repr tells 1 from true and from '1', which compare equal or are no longer told apart once hashed.
        index_of_first = first.setdefault(repr(value), index)
        if index_of_first != index and value not in (None, {}):
            line = document.line_of(dotted((*path, index_of_first)))
            spelling = document.scalars.get(dotted((*path, index)), value)
            yield (*path, index), f"{what.format(value=spelling)}, first on line {line}"


def _tiers(crop_selection: dict[str, Any], levels: list[Any], document: Document) -> Iterator[tuple[KeyPath, str]]:
    defined = [_mapping(entry) for entry in _list(crop_selection.get("tiers"))]
    names = [entry.get("name") for entry in defined]
    yield from _repeated(("crop_selection", "tiers"), names, "the tier {value} is defined twice", document)
    for index, entry in enumerate(defined):
        least, most = entry.get("min_crops"), entry.get("max_crops")
        if not (type(least) is int and type(most) is int):
            continue
        path: KeyPath = ("crop_selection", "tiers", index)
        if least > most:
            yield (*path, "max_crops"), f"must be at least min_crops, {least}, got {most}"
            continue
        for position, crops in enumerate(_list(entry.get("preferred_crops"))):
            if type(crops) is int and not least <= crops <= most:
                yield (*path, "preferred_crops", position), f"must be {least} to {most}, got {crops}"
    known = [*TIERS, *(name for name in names if isinstance(name, str) and name not in TIERS)]
    for index, level in enumerate(levels):
        if isinstance(level, str) and level not in known:
            meant = nearest(level, known)
            hint = f", did you mean {meant}?" if meant else ", or define it under crop_selection.tiers"
            yield ("knobs", "tier", index), f"must be one of {', '.join(known)}, got {level!r}{hint}"


def _block_selection(block_selection: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    method = block_selection.get("method", "prefix")
    if method == "importance" and block_selection.get("scores") is None:
        yield ("block_selection", "method"), "importance reads block scores from a file, add scores: FILE"
    if method not in get_args(SelectionMethod):
        return
    measures = method not in ("prefix", "importance")
    used_by = {
        "scores": method == "importance",
        "dataset": measures,
        "samples": measures,
        "keep": method != "prefix",
        "width": method == "beam",
        "objective": method == "beam",
    }
    for key, used in used_by.items():
        if block_selection.get(key) is not None and not used:
            yield ("block_selection", key), f"is not used by method {method}; leave it out"


def _sampling(sampling: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    strategy = sampling.get("strategy", "full")
    if strategy == "lhs" and sampling.get("n") is None:
        yield ("sampling", "strategy"), "lhs draws a number of combinations, add n: NUMBER"
    if strategy in ("full", "balanced", "stratified", "boundary") and sampling.get("n") is not None:
        yield ("sampling", "n"), f"belongs to strategy lhs, {strategy} decides the number of combinations itself"


def _completed(entry: object, section: type[BaseModel]) -> dict[str, Any]:
    """An entry with the defaults filled in, so that leaving a key out equals writing its default."""
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, dict):
        return {}
    defaults = {name: field.default for name, field in section.model_fields.items() if not field.is_required()}
    return dict(sorted({**defaults, **entry}.items()))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []

"""From the names in a sweep to models, samples and devices; every name that leads nowhere is an error with its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.plan import PlannedDataset, PlannedModel
from orchestrator.spec import DatasetEntry, ModelEntry, ModelVariant, Problem, SpecError, Sweep
from workers.datasets import Dataset, Preset, SampleRef, presets, resolve_source
from workers.errors import DatasetError, ModelError, NotDownloaded
from workers.models import ModelCard, describe
from workers.probes import CPU
from workers.tasks import ModelSource

# Cap on answers of a data set that has no preset; short answers are what its metrics score.
DEFAULT_MAX_NEW_TOKENS = 16


def refuse_unavailable(sweep: Sweep) -> None:
    """Refuse what a sweep file may say but this release cannot do yet, rather than ignore it.

    Raises:
        SpecError: with one line per such key.
    """
    problems: list[Problem] = []
    kinds: list[str] = []
    for i, entry in enumerate(sweep.hardware or ()):
        if entry.accelerator.lower() in kinds:
            problems.append(
                sweep.problem(f"hardware[{i}]", f"{entry.accelerator} of another memory size is not available yet")
            )
        kinds.append(entry.accelerator.lower())
    if "://" in sweep.results:
        problems.append(sweep.problem("results", "only local folders are available yet"))
    if problems:
        raise SpecError(problems)


def resolve(sweep: Sweep, *, offline: bool) -> tuple[list[ModelCard], list[PlannedDataset]]:
    """The models and the data sets of a sweep; see the two functions below.

    Raises:
        SpecError: with everything that cannot be found, of both.
    """
    problems: list[Problem] = []
    cards: list[ModelCard] = []
    datasets: list[PlannedDataset] = []
    try:
        cards = resolve_models(sweep, offline=offline)
    except SpecError as error:
        problems += error.problems
    try:
        datasets = resolve_datasets(sweep, offline=offline)
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(problems)
    return cards, datasets


def resolve_models(sweep: Sweep, *, offline: bool) -> list[ModelCard]:
    """What is known of the models of a sweep: a card for each entry, whatever number of variants it has, in its order.

    Args:
        offline: never ask the network, as a dry run should not.

    Raises:
        SpecError: a model that cannot be found or described.
    """
    cards: dict[ModelEntry, ModelCard] = {}
    problems: list[Problem] = []
    for i, entry in enumerate(sweep.models):
        try:
            card = describe(
                entry.name,
                checkpoint=entry.checkpoint,
                revision=entry.revision,
                random_weights=entry.weights == "random",
                base_folder=_folder_of(sweep),
                offline=offline,
            )
        except ModelError as error:
            problems.append(sweep.problem(f"models[{i}]", str(error)))
            continue
        if "weights" in entry.model_fields_set and entry.weights == "checkpoint" and card.fingerprint[:6] == "random":
            what = f"{entry.name} has no checkpoint, it exists with random weights only"
            problems.append(sweep.problem(f"models[{i}].weights", what))
        card = replace(card, name=_label(entry, card))
        if reason := _refuse_name(card.name, "checkpoint") or _refuse_shared_label(card, entry, cards.items()):
            problems.append(sweep.problem(f"models[{i}]", reason))
        cards[entry] = card
    if problems:
        raise SpecError(problems)
    return list(cards.values())


def planned_models(sweep: Sweep, cards: Sequence[ModelCard], accelerators: Sequence[str]) -> list[PlannedModel]:
    """What workers are told of each variant of each model, in the order of the sweep.

    Variants that come to the same, such as back ends for the experts of a dense model, are there as often as the sweep
    has them; `plan.distinct` takes each once. A GPU among the kinds of device makes bfloat16 the default.

    Args:
        cards: one for each entry, from `resolve_models`.
    """
    card_of = dict(zip(range(len(sweep.models)), cards, strict=True))
    pairs = [(variant, card_of[variant.index]) for variant in sweep.model_variants]
    return [PlannedModel(card, _source(variant, card, accelerators)) for variant, card in pairs]


def resolve_datasets(sweep: Sweep, *, offline: bool = False) -> list[PlannedDataset]:
    """The data sets of a sweep with the samples that are drawn from them.

    Args:
        offline: never ask the network; a hub data set that is not here gets stand-ins for its samples, so that the
            plan has the right size but nothing of it can be recognised as done.

    Raises:
        SpecError: a data set that cannot be found or read.
    """
    found: list[PlannedDataset] = []
    problems: list[Problem] = []
    known = presets()
    for i, entry in enumerate(sweep.datasets):
        try:
            chosen_on = sweep.block_selection.dataset or sweep.datasets[0].name
            to_choose = sweep.block_selection.num_samples if entry.name == chosen_on else 0
            dataset = _dataset(entry, _folder_of(sweep), known, offline, to_choose)
        except DatasetError as error:
            problems.append(sweep.problem(f"datasets[{i}]", str(error)))
            continue
        name = dataset.source.name
        if reason := _refuse_name(name, "path"):
            problems.append(sweep.problem(f"datasets[{i}]", reason))
        elif any(other.source.name == name for other in found):
            what = (
                f"would be called {name} in the results, like an earlier one; write {{name: another name, path: ...}}"
            )
            problems.append(sweep.problem(f"datasets[{i}]", what))
        found.append(dataset)
    if problems:
        raise SpecError(problems)
    return found


def accelerators_wanted(sweep: Sweep, present: Sequence[str]) -> list[str]:
    """Kinds of device to time on: those the sweep names, else all that are there, else the CPU."""
    if sweep.hardware is not None:
        return list(dict.fromkeys(_kind(entry.accelerator, present) for entry in sweep.hardware))
    return list(dict.fromkeys(present)) or [CPU]


def _kind(written: str, present: Sequence[str]) -> str:
    """A kind of device in the one spelling that ids are made of: the cluster's, or capitals for h100 and the like."""
    if written.lower() == CPU:
        return CPU
    there = next((kind for kind in present if kind.lower() == written.lower()), None)
    return there or (written.upper() if written.islower() else written)


def _label(entry: ModelEntry, card: ModelCard) -> str:
    """What a model is called in results: a folder that serves as its name by its own name, wherever it lies."""
    folder = card.checkpoint.folder
    return folder.name or entry.name if folder is not None and entry.checkpoint is None else entry.name


def _refuse_shared_label(
    card: ModelCard, entry: ModelEntry, earlier: Iterable[tuple[ModelEntry, ModelCard]]
) -> str | None:
    """Two folders of one name would be mixed up in results; a name that the sweep itself gives to both is meant."""
    for other_entry, other in earlier:
        shortened = card.name != entry.name or other.name != other_entry.name
        if card.name == other.name and shortened and card.checkpoint.folder != other.checkpoint.folder:
            return (
                f"would be called {card.name} in the results, like {other_entry.name}; "
                f"write {{name: another name, checkpoint: {entry.checkpoint or entry.name}}}"
            )
    return None


def _refuse_name(name: str, key: str) -> str | None:
    if re.fullmatch(r"[-+]?[0-9]+", name):
        return (
            f"{name} would be the name of a folder of the results that readers of Parquet take for a number; "
            f"write {{name: another name, {key}: ...}}"
        )
    return None


def _source(variant: ModelVariant, card: ModelCard, accelerators: Sequence[str]) -> ModelSource:
    # One data type for the whole sweep, so that its combinations can be compared across devices.
    on_gpu = any(kind != CPU for kind in accelerators)
    located, entry = card.checkpoint, variant.entry
    return ModelSource(
        name=card.name,
        family=card.family.name,
        place=str(located.folder or located.hub_id or entry.checkpoint or entry.name),
        revision=located.revision or (card.fingerprint if located.folder and entry.weights != "random" else None),
        weights="random" if card.fingerprint.startswith("random:") else "checkpoint",
        fingerprint=card.fingerprint,
        dtype=variant.dtype or ("bfloat16" if on_gpu else "float32"),
        attention=variant.attention or "sdpa",
        experts=_experts(variant, card),
        engine=variant.engine,
        moe_renormalization=None if card.routing is None else card.routing.renormalization,
    )


def _experts(variant: ModelVariant, card: ModelCard) -> str | None:
    if card.routing is None:
        return None
    return variant.experts or (None if card.routing.one_back_end else "grouped_mm")


def _dataset(
    entry: DatasetEntry, folder: Path, known: Mapping[str, Preset], offline: bool, to_choose: int
) -> PlannedDataset:
    """A data set with its samples, and `to_choose` more to choose blocks on.

    Those come from the other end of the draw, so that what is chosen is not judged by what chose it; where the data set
    is too small for both, some are scored too.
    """
    source = resolve_source(
        name=entry.name,
        split=entry.split,
        path=entry.path,
        hub_id=entry.hub_id,
        config=entry.config,
        revision=entry.revision,
        # A role that is set to null is taken from the preset's columns; one that is not set is left to them.
        columns=entry.columns.model_dump(exclude_unset=True) if entry.columns else None,
        images=entry.images.model_dump(exclude_none=True) if entry.images else None,
        metric=entry.metric,
        prompt=entry.prompt,
        base_folder=folder,
    )
    preset = known.get(entry.name)
    cap = entry.max_new_tokens or (preset.max_new_tokens if preset else DEFAULT_MAX_NEW_TOKENS)
    try:
        opened = Dataset.open(source, offline=offline)
        samples = tuple(opened.select(entry.samples, entry.seed))
        choosing = tuple(opened.select_last(to_choose, entry.seed))
    except NotDownloaded as error:
        stand_ins = tuple(SampleRef(f"{source.name}:{source.split}:?{i}", "?") for i in range(entry.samples or 1))
        return PlannedDataset(source, stand_ins, cap, stand_ins[:to_choose], not_here=str(error))
    return PlannedDataset(source, samples, cap, choosing)


def _folder_of(sweep: Sweep) -> Path:
    return Path(sweep.file).resolve().parent

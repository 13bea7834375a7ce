"""From the names in a sweep to models, samples and devices; every name that leads nowhere is an error with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.plan import PlannedDataset, PlannedModel
from orchestrator.spec import DatasetEntry, ModelEntry, Problem, SpecError, Sweep
from workers.datasets import Dataset, Preset, presets, resolve_source
from workers.errors import DatasetError, ModelError
from workers.models import ModelCard, describe
from workers.probes import CPU
from workers.schema import ModelSource

# Cap on answers of a data set that has no preset; short answers are what its metrics score.
DEFAULT_MAX_NEW_TOKENS = 16


def refuse_unavailable(sweep: Sweep) -> None:
    """Refuse what a sweep file may say but this release cannot do yet, rather than ignore it.

    Raises:
        SpecError: with one line per such key.
    """
    problems: list[Problem] = []
    if sweep.block_selection.method != "prefix":
        problems.append(
            sweep.problem(
                "block_selection.method", f"{sweep.block_selection.method} is not available yet (available: prefix)"
            )
        )
    for i, model in enumerate(sweep.models):
        if model.engine != "eager":
            problems.append(
                sweep.problem(f"models[{i}].engine", f"{model.engine} is not available yet (available: eager)")
            )
    if sweep.latency is not None:
        if sweep.latency.batch_size != 1:
            problems.append(sweep.problem("latency.batch_size", "only 1 is available yet"))
        if sweep.latency.max_relative_error is not None:
            problems.append(
                sweep.problem("latency.max_relative_error", "is not available yet, every sample gets all repeats")
            )
    if "://" in sweep.results:
        problems.append(sweep.problem("results", "only local folders are available yet"))
    if problems:
        raise SpecError(problems)


def resolve_models(sweep: Sweep, *, offline: bool) -> list[ModelCard]:
    """What is known of the models of a sweep, in its order.

    Args:
        offline: never ask the network, as a dry run should not.

    Raises:
        SpecError: a model that cannot be found or described.
    """
    cards: list[ModelCard] = []
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
        cards.append(card)
    if problems:
        raise SpecError(problems)
    return cards


def planned_models(sweep: Sweep, cards: Sequence[ModelCard], accelerators: Sequence[str]) -> list[PlannedModel]:
    """What workers are told of each model; a GPU among the kinds of device makes bfloat16 the default."""
    pairs = zip(sweep.models, cards, strict=True)
    return [PlannedModel(card, _source(entry, card, accelerators)) for entry, card in pairs]


def resolve_datasets(sweep: Sweep) -> list[PlannedDataset]:
    """The data sets of a sweep with the samples that are drawn from them.

    Raises:
        SpecError: a data set that cannot be found or read.
    """
    found: list[PlannedDataset] = []
    problems: list[Problem] = []
    known = presets()
    for i, entry in enumerate(sweep.datasets):
        try:
            found.append(_dataset(entry, _folder_of(sweep), known))
        except DatasetError as error:
            problems.append(sweep.problem(f"datasets[{i}]", str(error)))
    if problems:
        raise SpecError(problems)
    return found


def accelerators_wanted(sweep: Sweep, present: Sequence[str]) -> list[str]:
    """Kinds of device to time on: those the sweep names, else all that are there, else the CPU."""
    if sweep.hardware is not None:
        named = [CPU if entry.accelerator.lower() == CPU else entry.accelerator for entry in sweep.hardware]
        return list(dict.fromkeys(named))
    return list(dict.fromkeys(present)) or [CPU]


def _source(entry: ModelEntry, card: ModelCard, accelerators: Sequence[str]) -> ModelSource:
    # One data type for the whole sweep, so that its combinations can be compared across devices.
    on_gpu = any(kind != CPU for kind in accelerators)
    located = card.checkpoint
    return ModelSource(
        name=entry.name,
        family=card.family.name,
        place=str(located.folder or located.hub_id or entry.checkpoint or entry.name),
        revision=located.revision or (card.fingerprint if located.folder and entry.weights != "random" else None),
        weights="random" if card.fingerprint.startswith("random:") else "checkpoint",
        fingerprint=card.fingerprint,
        dtype=entry.dtype or ("bfloat16" if on_gpu else "float32"),
        attention=entry.attention or "sdpa",
        experts=None if card.num_experts is None else entry.experts or "grouped_mm",
        engine=entry.engine,
    )


def _dataset(entry: DatasetEntry, folder: Path, known: Mapping[str, Preset]) -> PlannedDataset:
    source = resolve_source(
        name=entry.name,
        split=entry.split,
        path=entry.path,
        hub_id=entry.hub_id,
        config=entry.config,
        revision=entry.revision,
        columns=entry.columns.model_dump(exclude_none=True) if entry.columns else None,
        metric=entry.metric,
        prompt=entry.prompt,
        base_folder=folder,
    )
    samples = tuple(Dataset.open(source).select(entry.samples, entry.seed))
    preset = known.get(entry.name)
    cap = entry.max_new_tokens or (preset.max_new_tokens if preset else DEFAULT_MAX_NEW_TOKENS)
    return PlannedDataset(source, samples, cap)


def _folder_of(sweep: Sweep) -> Path:
    return Path(sweep.file).resolve().parent

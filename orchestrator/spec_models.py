"""The typed, frozen form of a sweep: every key that a sweep file may hold, with its meaning and unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from knobs.tiling import MISMATCH_THRESHOLD, TIERS, AspectDistance, Tier
from knobs.vision import VISION_AXES
from orchestrator.spec_errors import Problem
from orchestrator.spec_values import (
    AlsoAllowed,
    BlockPositions,
    BlockSetting,
    CountInt,
    Entries,
    Flag,
    Fraction,
    ImageSize,
    Levels,
    NaturalInt,
    OneOrMore,
    PositiveNumber,
    SafeName,
    SeedInt,
    Text,
    WorkerCount,
    named,
    one_of,
    unless_off,
)
from orchestrator.yaml_lines import Document

Weights = Literal["checkpoint", "random"]
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]
ExpertsImplementation = Literal["eager", "grouped_mm", "batched_mm"]
Engine = Literal["eager", "graph"]
SelectionMethod = Literal["prefix", "importance", "accuracy_drop", "nll", "activation", "similarity", "beam"]
Objective = Literal["accuracy", "nll"]
Strategy = Literal["full", "balanced", "stratified", "boundary", "lhs"]

# What an entry of models may hold several of, in the order of declaration, with the levels that there are.
MODEL_AXES: dict[str, tuple[str, ...]] = {
    "dtype": get_args(Dtype),
    "attention": get_args(Attention),
    "experts": get_args(ExpertsImplementation),
    "engine": get_args(Engine),
}

# Samples that blocks are chosen on, where a sweep does not say.
DEFAULT_SELECTION_SAMPLES = 100


class Section(BaseModel):
    """One mapping of a sweep file: no key beyond those declared, no value silently converted, nothing changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelEntry(Section):
    """A model to profile; every combination of the levels of dtype, attention, experts and engine is one of its own."""

    name: Text = Field(description="Registry name, Hugging Face hub id, or local folder of the model.")
    checkpoint: Text | None = Field(None, description="Hub id or folder of other weights for the same architecture.")
    revision: Text | None = Field(None, description="Branch, tag or commit of the hub repository.")
    weights: Annotated[Weights, one_of(Weights)] = Field(
        "checkpoint", description="Trained weights, or random ones of the same shapes: enough for latency, no download."
    )
    dtype: OneOrMore[Annotated[Dtype, one_of(Dtype)]] | None = Field(
        None, description="Number format of the weights, or several; default: the usual one of the family and device."
    )
    attention: OneOrMore[Annotated[Attention, one_of(Attention)]] | None = Field(
        None, description="Attention kernel, or several; default: the one transformers picks."
    )
    experts: OneOrMore[Annotated[ExpertsImplementation, one_of(ExpertsImplementation)]] | None = Field(
        None, description="How mixture-of-experts layers are computed, or several; default: the one transformers picks."
    )
    engine: OneOrMore[Annotated[Engine, one_of(Engine)]] = Field(
        "eager",
        validate_default=True,
        description="Plain PyTorch, or decoding replayed from a captured CUDA graph, or both.",
    )


@dataclass(frozen=True)
class ModelVariant:
    """A model entry with one level of each axis; None leaves it to the default.

    Attributes:
        index: position of the entry in `Sweep.models`: what is wrong with the variant is reported at `models[index]`.
    """

    index: int
    entry: ModelEntry
    dtype: Dtype | None
    attention: Attention | None
    experts: ExpertsImplementation | None
    engine: Engine


class HardwareEntry(Section):
    """A kind of accelerator to measure on."""

    accelerator: Text = Field(description="Accelerator name as Ray reports it, such as H100 or A100.")
    min_memory_gb: PositiveNumber | None = Field(
        None, description="Only devices with at least this much memory, in GB; tells a 40 GB A100 from an 80 GB one."
    )
    workers: WorkerCount = Field("all", description="Number of devices to use, or all that the cluster has.")


class Columns(Section):
    """Which columns of the dataset's own files hold what."""

    image: OneOrMore[Text] | None = Field(
        None,
        description="Column of the image (bytes, a path, an image feature, or a list of these), or several columns.",
    )
    question: Text | None = Field(
        None, description="Column of the question; null if all samples are asked what the prompt says."
    )
    answers: Text | None = Field(None, description="Column of the accepted answers: one text or a list of them.")
    id: Text | None = Field(None, description="Column of the sample's identity.")
    image_id: Text | None = Field(None, description="Column that tells which samples share an image.")
    question_type: Text | None = Field(None, description="Column to break the accuracy down by.")
    options: OneOrMore[Text] | None = Field(
        None, description="Multiple choice: column of the list of options, or the columns of option A, B and so on."
    )
    records: Text | None = Field(
        None,
        description="Column of a list of records, each a question about the row's image; what they hold is named like "
        "columns.",
    )


class ImageTable(Section):
    """A second table, of the images, where the questions only name them by columns.image_id."""

    path: Text | None = Field(None, description="Local file or folder of the images' table.")
    config: Text | None = Field(None, description="Configuration (subset) of the hub dataset that holds the images.")
    split: Text | None = Field(None, description="Split of that table; default: the same as the questions'.")
    id: Text | None = Field(None, description="Its column that columns.image_id refers to; default: id.")


class DatasetEntry(Section):
    """Questions about images to time and to score on."""

    name: Text = Field(description="Name of a dataset preset, or a new name for the files given by path or hub_id.")
    split: Text | None = Field(None, description="Split to read, such as validation.")
    samples: CountInt | None = Field(None, description="Number of samples, drawn with seed; default: all of them.")
    max_new_tokens: CountInt | None = Field(
        None, description="Longest answer in tokens when scoring; default: the preset's."
    )
    seed: SeedInt = Field(0, description="Seed of the draw of the samples.")
    path: Text | None = Field(None, description="Local file or folder of the samples.")
    hub_id: Text | None = Field(None, description="Hugging Face dataset id.")
    config: Text | None = Field(None, description="Configuration (subset) of the hub dataset.")
    revision: Text | None = Field(None, description="Branch, tag or commit of the hub dataset.")
    columns: Columns | None = Field(None, description="Column names, where they differ from the preset's.")
    images: ImageTable | None = Field(None, description="Table of the images, if they are not beside the questions.")
    metric: Text | None = Field(None, description="Scorer of the answers; default: the preset's.")
    prompt: Text | None = Field(
        None,
        description="Prompt template with {question}, {options} and other columns by name; a line whose column is "
        "empty is left out. Default: the preset's.",
    )


class Knobs(Section):
    """The axes of the grid; one that is left out keeps each model's own setting."""

    image_size: Levels[ImageSize] = Field((), description="Vision axis: image HEIGHTxWIDTH in pixels, e.g. 560x336.")
    vision_tokens: Levels[CountInt] = Field((), description="Vision axis: target number of vision tokens per image.")
    tier: Levels[Text] = Field((), description="Vision axis: low, medium, high, or a tier that crop_selection defines.")
    crops: Levels[CountInt] = Field((), description="Vision axis: number of crops per image, without the global view.")
    longest_edge: Levels[CountInt] = Field(
        (), description="Vision axis: longest image side in pixels before it is split into crops (SmolVLM2)."
    )
    tiles: Levels[CountInt] = Field(
        (), description="Vision axis: number of tiles an image is cut into, without the thumbnail (InternVL)."
    )
    force_full_tokens: Levels[Flag] = Field(
        (), description="Whether crops keep also those vision tokens that neighbouring crops share (MolmoE)."
    )
    resize_to_fill: Levels[Flag] = Field(
        (),
        description="true: the image covers its canvas, the overhang is cut off; false: all of it, black around. "
        "Default: the family's own way.",
    )
    moe_top_k: Levels[CountInt] = Field((), description="Number of experts that each token is sent to, per MoE layer.")
    active_blocks: Levels[BlockSetting] = Field(
        (),
        description="Blocks of the language model that run: a number (chosen by block_selection) or a list of indices.",
    )

    @property
    def axes(self) -> dict[str, tuple[object, ...]]:
        """The axes that the sweep moves, in the order of declaration, with their levels as written."""
        every_axis = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: levels for name, levels in every_axis.items() if levels}

    @property
    def vision_axis(self) -> str | None:
        """The one vision axis of the sweep, or None when images keep their native size."""
        return next((name for name in VISION_AXES if getattr(self, name)), None)


class TierEntry(Section):
    """A range of crop counts within which every image gets the count that suits its shape."""

    name: SafeName = Field(description="Name, as knobs.tier uses it; low, medium and high may be defined anew.")
    min_crops: CountInt = Field(description="Fewest crops, without the global view.")
    max_crops: CountInt = Field(description="Most crops, without the global view.")
    preferred_crops: Entries[CountInt] = Field(description="Crop counts that are tried first.")
    mismatch_threshold: PositiveNumber = Field(
        MISMATCH_THRESHOLD, description="A preferred count is taken if its mismatch of aspect is below this."
    )


class CropSelection(Section):
    """How vision_tokens, crops and tier become rows and columns of crops for each image."""

    aspect_distance: Annotated[AspectDistance, one_of(AspectDistance)] = Field(
        "linear",
        description="linear: difference of width/height; log: of its logarithm, which gives mirrored images mirrored "
        "grids.",
    )
    tiers: Entries[TierEntry] | None = Field(None, description="Tiers beside low, medium and high, or instead.")

    def tier(self, name: str) -> Tier | None:
        """The definition of a tier: this sweep's own, else the built-in one, else None."""
        own = next((entry for entry in self.tiers or () if entry.name == name), None)
        if own is None:
            return TIERS.get(name)
        return Tier(own.name, own.min_crops, own.max_crops, own.preferred_crops, own.mismatch_threshold)


class BlockSelection(Section):
    """How a number of active blocks becomes a list of blocks."""

    method: Annotated[SelectionMethod, one_of(SelectionMethod)] = Field(
        "prefix",
        description="prefix: the first ones; importance: by the scores in a file; accuracy_drop, nll, activation, "
        "similarity: by scores that the sweep measures first; beam: the best set of a beam search.",
    )
    scores: Text | None = Field(
        None, description="File of block scores (Parquet or JSON) for method importance; {model} stands for the model."
    )
    dataset: Text | None = Field(None, description="Data set of this sweep to measure on; default: the first.")
    samples: CountInt | None = Field(None, description="Number of its samples, the first ones drawn; default 100.")
    keep: BlockPositions | None = Field(
        None, description="Blocks that always run; -1 is the last. Default: the first and the last; []: none."
    )
    width: CountInt | None = Field(None, description="Block lists that each round of a beam search keeps; default 3.")
    objective: Annotated[Objective | None, one_of(Objective)] = Field(
        None, description="What a beam search maximises; default nll, the likelihood of the reference answers."
    )

    @property
    def num_samples(self) -> int:
        """Samples to measure on; 0 where nothing is measured."""
        measures = self.method not in ("prefix", "importance")
        return (self.samples or DEFAULT_SELECTION_SAMPLES) if measures else 0


class Sampling(Section):
    """Which combinations of the grid are run."""

    strategy: Annotated[Strategy, one_of(Strategy)] = Field(
        "full", description="full: all; balanced, stratified, boundary: few levels per axis; lhs: Latin hypercube."
    )
    n: CountInt | None = Field(None, description="Number of combinations that lhs draws.")
    seed: SeedInt = Field(0, description="Seed of the draw of lhs.")


class Latency(Section):
    """How time is measured."""

    samples: CountInt = Field(64, description="Number of samples that are timed per combination.")
    repeats: CountInt = Field(
        10, description="Most timed repeats per sample, over all visits; three per visit at least."
    )
    visits: CountInt = Field(
        2,
        description="How many times each combination is come back to: its repeats are split over as many visits, each "
        "visit takes all combinations in a new random order.",
    )
    output_tokens: CountInt = Field(16, description="Fixed length of each timed answer, in tokens.")
    batch_size: OneOrMore[CountInt] = Field(
        1, validate_default=True, description="Samples per timed batch, or several such numbers: levels of an axis."
    )
    warmup: NaturalInt = Field(1, description="Untimed runs per input shape before the timed ones.")
    max_relative_error: Fraction | None = Field(
        0.02,
        description="Stop repeating once the 95 % intervals of the medians of total, prefill and TPOT are this narrow: "
        "half-width over median; null: always all repeats.",
    )
    max_seconds: PositiveNumber | None = Field(
        None, description="Start no further round of repeats of a combination after this many seconds."
    )
    seed: SeedInt = Field(0, description="Seed of the random order in which combinations are timed.")


class Accuracy(Section):
    """How answers are scored."""

    batch_size: CountInt = Field(16, description="Samples per batch; changes the speed of scoring, not the timing.")


class Sweep(Section):
    """A sweep: models x datasets x knob combinations, and what is measured on each."""

    name: SafeName = Field(description="Name of the sweep and of its folder of results.")
    models: Entries[Annotated[ModelEntry, BeforeValidator(named), AlsoAllowed({"type": "string"})]] = Field(
        description="Models to profile: names, or mappings with a name."
    )
    hardware: Entries[HardwareEntry] | None = Field(
        None, description="Accelerators to measure on; default: whatever this machine or cluster has, CPU included."
    )
    datasets: Entries[Annotated[DatasetEntry, BeforeValidator(named), AlsoAllowed({"type": "string"})]] = Field(
        description="Datasets to time and score on: names, or mappings with a name."
    )
    knobs: Annotated[Knobs, BeforeValidator(lambda value: {} if value is None else value)] = Field(
        Knobs(), description="The axes of the grid, each with the list of its levels."
    )
    crop_selection: CropSelection = Field(
        CropSelection(), description="How vision_tokens, crops and tier become a grid of crops for each image."
    )
    block_selection: BlockSelection = Field(
        BlockSelection(), description="How a number of active blocks becomes a list of blocks."
    )
    sampling: Sampling = Field(Sampling(), description="Which combinations of the grid are run.")
    latency: Annotated[Latency | None, BeforeValidator(unless_off), AlsoAllowed({"enum": ["off", False]})] = Field(
        Latency(), description="How time is measured, or off."
    )
    accuracy: Annotated[Accuracy | None, BeforeValidator(unless_off), AlsoAllowed({"enum": ["off", False]})] = Field(
        Accuracy(), description="How answers are scored, or off."
    )
    task_timeout_minutes: PositiveNumber = Field(
        240.0,
        description="A task that takes longer is stopped with its worker, tried once more, then recorded as failed.",
    )
    results: Text = Field("results/", description="Folder or URI (s3://, gs://) of the results.")

    _document: Document | None = PrivateAttr(None)

    @property
    def model_variants(self) -> tuple[ModelVariant, ...]:
        """Every combination of the levels of each model entry, in the order of the file; the engine moves fastest."""
        return tuple(self._variants())

    def _variants(self) -> Iterator[ModelVariant]:
        for index, entry in enumerate(self.models):
            levels = product(entry.dtype or (None,), entry.attention or (None,), entry.experts or (None,), entry.engine)
            yield from (ModelVariant(index, entry, *of_each_axis) for of_each_axis in levels)

    @property
    def file(self) -> str:
        """The sweep file as the user wrote it."""
        return self._document.file if self._document else "sweep"

    def where(self, key: str) -> str:
        """`file.yaml:12` for a key such as `models[1]` or `knobs.moe_top_k[2]`; an absent key is at its parent."""
        return f"{self.file}:{self._document.line_of(key)}" if self._document else self.file

    def problem(self, key: str, what: str) -> Problem:
        """A mistake at a dotted key of this sweep, for modules that know more than the file: `SpecError([...])`."""
        return self._document.problem(key, what) if self._document else Problem(self.file, None, key, what)

"""From a sweep to tasks: which combinations exist on which model, which are skipped and why, and who is who.

Everything here is a pure function of the sweep, the models' configurations and the chosen samples: the same file gives
the same ids in any process, order or machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from typing import Protocol as Interface

from knobs.blocks import prefix_blocks, refuse_blocks
from knobs.errors import KnobError
from knobs.routing import refuse_top_k
from knobs.vision import VISION_AXES, VISION_OPTIONS, VisionLayout, VisionSetting
from orchestrator.sampling import sample
from orchestrator.spec import Sweep
from workers.datasets import DatasetSource, SampleRef
from workers.models import ModelCard
from workers.tasks import (
    PROTOCOL_VERSION,
    Anchor,
    Kind,
    Knobs,
    ModelSource,
    Protocol,
    Task,
)

# Accuracy is cut into tasks of this many samples: small enough to spread over workers and to lose little, and a fixed
# number, so that asking for more samples later leaves the first tasks what they were.
SAMPLES_PER_ACCURACY_TASK = 256


@dataclass(frozen=True)
class PlannedModel:
    """A model of the sweep: what is known of it, and what workers are told."""

    card: ModelCard
    source: ModelSource

    @property
    def key(self) -> str:
        """The same for entries that differ only in what they leave to a default, or in where the same files are."""
        return digest(_model_identity(self.source))

    @property
    def network(self) -> str:
        """The same for entries that differ only in data type and back-ends: what blocks are chosen for.

        Engines are compared on the same blocks, and rounding is no reason to choose others.
        """
        how = ("dtype", "attention", "experts", "engine")
        return digest({name: value for name, value in _model_identity(self.source).items() if name not in how})


@dataclass(frozen=True)
class PlannedDataset:
    """A data set of the sweep.

    Attributes:
        samples: those drawn, in the order of the draw.
        max_new_tokens: cap on answers.
        choosing: samples that blocks are chosen on, as far as possible none of `samples`.
        not_here: why the samples are stand-ins, in a dry run of a data set that is not downloaded yet.
    """

    source: DatasetSource
    samples: tuple[SampleRef, ...]
    max_new_tokens: int
    choosing: tuple[SampleRef, ...] = ()
    not_here: str | None = None


@dataclass(frozen=True)
class Combination:
    """A row of the product: one point of the knob grid on one model, kind of device and data set, measured one way.

    Attributes:
        pinned: what the knobs promise where every image gets the same.
        timed, scored: how it is measured; None for what is off.
    """

    combination_id: str
    model: ModelSource
    knobs: Knobs
    pinned: VisionLayout | None
    accelerator: str
    dataset: DatasetSource
    timed: Protocol | None
    scored: Protocol | None
    latency_tasks: tuple[str, ...] = ()
    accuracy_tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A point of the grid that a model cannot take, as the sweep asked for it."""

    model: str
    point: Mapping[str, Any]
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: {describe_point(self.point)}: {self.reason}"


@dataclass(frozen=True)
class Dropped:
    """An axis that a model lacks."""

    model: str
    axis: str
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: {self.axis} dropped, {self.reason}"


@dataclass(frozen=True)
class Plan:
    """Everything a run does."""

    combinations: tuple[Combination, ...]
    tasks: tuple[Task, ...]
    skips: tuple[Skip, ...]
    dropped: tuple[Dropped, ...]
    accelerators: tuple[str, ...]
    datasets: tuple[str, ...]

    @classmethod
    def of_tasks(cls, tasks: Sequence[Task]) -> Plan:
        """Tasks alone, such as those that say which blocks to choose."""
        return cls((), tuple(tasks), (), (), (), tuple(dict.fromkeys(task.dataset.name for task in tasks)))


class BlockChoice(Interface):
    """Which blocks run for a number of them on one model."""

    def blocks(self, count: int) -> tuple[int, ...]:
        """The blocks, ascending.

        Raises:
            KnobError: there is no choice of so many.
        """


@dataclass(frozen=True)
class FirstBlocks:
    """The first blocks: a choice that needs no scores."""

    num_blocks: int

    def blocks(self, count: int) -> tuple[int, ...]:
        return prefix_blocks(count, self.num_blocks)


@dataclass
class _Points:
    knobs: list[Knobs] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


def make_plan(
    sweep: Sweep,
    models: Sequence[PlannedModel],
    datasets: Sequence[PlannedDataset],
    accelerators: Sequence[str],
    choices: Mapping[str, BlockChoice] | None = None,
) -> Plan:
    """Expand a sweep.

    Args:
        models, datasets: of the sweep, resolved, in its order.
        accelerators: kinds of device to time on.
        choices: which blocks run for a number of them, by `PlannedModel.network`; the first ones for what is not there.
    """
    combinations: list[Combination] = []
    tasks: dict[str, Task] = {}
    skips: list[Skip] = []
    dropped: list[Dropped] = []
    for model in distinct(models).values():
        points = expand(sweep, model.card, (choices or {}).get(model.network))
        skips += points.skips
        dropped += points.dropped
        anchor = anchor_of(points.knobs)
        for knobs in points.knobs:
            pinned = model.card.geometry.pinned(knobs.vision)
            for dataset in datasets:
                for accelerator in accelerators:
                    for timed in timed_protocols(sweep):
                        scored = _scored_protocol(sweep, dataset)
                        combination, its_tasks = _combine(
                            sweep, model.source, knobs, pinned, dataset, accelerator, timed, scored, anchor
                        )
                        combinations.append(combination)
                        tasks |= {task.task_id: task for task in its_tasks}
    seed = 0 if sweep.latency is None else sweep.latency.seed
    return Plan(
        tuple(combinations),
        tuple(in_random_order(tuple(tasks.values()), seed)),
        tuple(skips),
        tuple(dropped),
        tuple(accelerators),
        tuple(dataset.source.name for dataset in datasets),
    )


# -- expansion --------------------------------------------------------------------------------------------------------


def distinct(models: Sequence[PlannedModel]) -> dict[str, PlannedModel]:
    """The models by `PlannedModel.key`, each once."""
    found: dict[str, PlannedModel] = {}
    for model in models:
        found.setdefault(model.key, model)
    return found


def expand(sweep: Sweep, card: ModelCard, choice: BlockChoice | None = None) -> _Points:
    """The effective points of the grid on one model; axes it lacks are dropped, values it cannot take are skipped.

    Args:
        choice: which blocks run for a number of them; the first ones if None.
    """
    points = _Points()
    axes: dict[str, tuple[object, ...]] = {}
    for axis, levels in sweep.knobs.axes.items():
        if reason := _lacks(card, axis):
            points.dropped.append(Dropped(card.name, axis, reason))
        else:
            axes[axis] = levels
    seen: set[Knobs] = set()
    for point in sample(axes, sweep.sampling.strategy, sweep.sampling.n, sweep.sampling.seed):
        if reason := _refusal(sweep, card, point):
            points.skips.append(Skip(card.name, point, reason))
            continue
        try:
            knobs = effective_knobs(sweep, card, point, choice or FirstBlocks(card.num_blocks))
        except KnobError as error:
            points.skips.append(Skip(card.name, point, str(error)))
            continue
        if knobs in seen:
            # 16 blocks of 16 and the list of all sixteen are one combination, measured once.
            continue
        seen.add(knobs)
        points.knobs.append(knobs)
    return points


def effective_knobs(sweep: Sweep, card: ModelCard, point: Mapping[str, Any], choice: BlockChoice) -> Knobs:
    """A point of the grid with nothing left to a default: the model's own top-k, every block by index.

    Raises:
        KnobError: no blocks can be chosen for the number that the point asks for, or the model cannot run them.
    """
    vision = card.geometry.complete(_vision(sweep, point))
    blocks = point.get("active_blocks", card.num_blocks)
    if not isinstance(blocks, int):
        kept = tuple(blocks)
    else:
        kept = prefix_blocks(blocks, blocks) if blocks == card.num_blocks else choice.blocks(blocks)
        if reason := refuse_blocks(kept, card.num_blocks, card.stack):
            raise KnobError(f"blocks {', '.join(map(str, kept))} are chosen, and {reason}")
    return Knobs(vision, point.get("moe_top_k", card.moe_top_k), kept)


def _vision(sweep: Sweep, point: Mapping[str, Any]) -> VisionSetting:
    """The vision part of a point, as the sweep asked for it."""
    options = {name: point[name] for name in VISION_OPTIONS if name in point}
    axis = next((name for name in VISION_AXES if name in point), None)
    if axis is None:
        return VisionSetting(**options)
    selection = sweep.crop_selection
    tier = selection.tier(point[axis]) if axis == "tier" else None
    return VisionSetting(axis, point[axis], tier, selection.aspect_distance, **options)


def _lacks(card: ModelCard, axis: str) -> str | None:
    if axis == "moe_top_k":
        return None if card.num_experts is not None else "the model is dense"
    if axis == "active_blocks":
        return None
    if axis in card.geometry.axes or axis in card.geometry.options:
        return None
    has = ", ".join((*card.geometry.axes, *card.geometry.options)) or "none"
    return f"family {card.family.name} has no such vision knob (it has: {has})"


def _refusal(sweep: Sweep, card: ModelCard, point: Mapping[str, Any]) -> str | None:
    if reason := card.geometry.refuse(_vision(sweep, point)):
        return reason
    if "moe_top_k" in point and (reason := refuse_top_k(point["moe_top_k"], card.routing)):
        return reason
    if "active_blocks" in point:
        return refuse_blocks(point["active_blocks"], card.num_blocks, card.stack)
    return None


def describe_point(point: Mapping[str, Any]) -> str:
    """A point of the grid in one line."""
    return ", ".join(f"{axis}={value}" for axis, value in point.items()) or "native"


# -- tasks ------------------------------------------------------------------------------------------------------------


def _combine(
    sweep: Sweep,
    model: ModelSource,
    knobs: Knobs,
    pinned: VisionLayout | None,
    dataset: PlannedDataset,
    accelerator: str,
    timed: Protocol | None,
    scored: Protocol | None,
    anchor: Knobs | None,
) -> tuple[Combination, list[Task]]:
    # Much the largest part of all identities here, so it is made once.
    point = _point_identity(model, knobs, dataset.source)
    combination_id = digest(_combination_identity(point, dataset.source, timed, scored))

    def task(kind: Kind, samples: tuple[SampleRef, ...], protocol: Protocol, kind_of_device: str | None) -> Task:
        return Task(
            "", combination_id, kind, sweep.name, kind_of_device, model, knobs, dataset.source, samples, protocol
        )

    latency: list[Task] = []
    if sweep.latency is not None and timed is not None:
        whole = task(Kind.LATENCY, dataset.samples[: sweep.latency.samples], timed, accelerator)
        yardstick = None if anchor is None else _anchor(whole, anchor)
        visits = [replace(whole, visit=visit, anchor=yardstick) for visit in range(timed.visits)]
        latency = [_identified(task, point) for task in visits]
    accuracy: list[Task] = []
    if scored is not None:
        starts = range(0, len(dataset.samples), SAMPLES_PER_ACCURACY_TASK)
        parts = [dataset.samples[begin : begin + SAMPLES_PER_ACCURACY_TASK] for begin in starts]
        accuracy = [_identified(task(Kind.ACCURACY, part, scored, None), point) for part in parts]
    combination = Combination(
        combination_id,
        model,
        knobs,
        pinned,
        accelerator,
        dataset.source,
        timed,
        scored,
        tuple(task.task_id for task in latency),
        tuple(task.task_id for task in accuracy),
    )
    return combination, latency + accuracy


def timed_protocols(sweep: Sweep) -> list[Protocol | None]:
    """The ways to time: one per batch size, or none at all (None) where latency is off."""
    settings = sweep.latency
    if settings is None:
        return [None]
    return [
        Protocol(
            max_new_tokens=settings.output_tokens,
            batch_size=batch_size,
            repeats=settings.repeats,
            visits=min(settings.visits, settings.repeats),
            warmup=settings.warmup,
            max_relative_error=settings.max_relative_error,
            max_seconds=settings.max_seconds,
        )
        for batch_size in settings.batch_size
    ]


def _scored_protocol(sweep: Sweep, dataset: PlannedDataset) -> Protocol | None:
    if sweep.accuracy is None:
        return None
    return Protocol(
        max_new_tokens=dataset.max_new_tokens,
        batch_size=sweep.accuracy.batch_size,
        metric=dataset.source.metric,
    )


def _anchor(task: Task, knobs: Knobs) -> Anchor:
    about = {
        "point": _point_identity(task.model, knobs, task.dataset),
        "output_tokens": task.protocol.max_new_tokens,
        "samples": [[ref.uid, ref.digest] for ref in task.samples],
    }
    return Anchor(digest(about), knobs)


def anchor_of(points: Sequence[Knobs]) -> Knobs | None:
    """The point that workers time again and again: the most blocks and experts of the grid, at its first vision level.

    All weights take part in it, and a grid that is extended upwards in vision keeps its anchor.
    """
    return max(points, key=lambda knobs: (len(knobs.active_blocks), knobs.moe_top_k or 0), default=None)


def in_random_order(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Latency tasks first, visit by visit and each visit in a random order of its own; then the others as they are.

    So what changes on a machine in the course of hours meets the levels of every knob alike. The place of a task in its
    visit follows from seed and id alone: what is left of a sweep comes in the order in which it would have come.
    """

    def place(task: Task) -> tuple[int, str]:
        return task.visit, digest([seed, task.task_id])

    timed = sorted((task for task in tasks if task.kind is Kind.LATENCY), key=place)
    return timed + [task for task in tasks if task.kind is not Kind.LATENCY]


def _identified(task: Task, point: Mapping[str, Any]) -> Task:
    return replace(task, task_id=digest(_task_identity(task, point)))


# -- identity ---------------------------------------------------------------------------------------------------------


def task_identity(task: Task) -> dict[str, Any]:
    """Everything that decides the result of a task, and nothing else.

    Not the place of a file, host, time or name of the sweep, nor the anchor that is timed besides. Of the accelerator
    only what is timed depends. The order
    of the samples does count: it decides which of them share a batch, and with that the rounding of their answers.
    """
    return _task_identity(task, _point_identity(task.model, task.knobs, task.dataset))


def _task_identity(task: Task, point: Mapping[str, Any]) -> dict[str, Any]:
    columns = task.dataset.columns
    return {
        "protocol_version": PROTOCOL_VERSION,
        "kind": task.kind.value,
        "accelerator": task.accelerator,
        "samples": [[ref.uid, ref.digest] for ref in task.samples],
        # What a sample contains is in its digest; which samples count as one cluster is not.
        "groups": [columns.image_id, columns.question_type] if task.kind is Kind.ACCURACY else None,
        "prompt": task.dataset.prompt,
        "protocol": asdict(task.protocol),
        "visit": task.visit,
        **({"method": task.method, "candidates": task.candidates} if task.kind is Kind.IMPORTANCE else {}),
        **point,
    }


def combination_identity(
    model: ModelSource, knobs: Knobs, dataset: DatasetSource, timed: Protocol | None, scored: Protocol | None
) -> dict[str, Any]:
    """Everything that decides what the numbers of a combination mean, so that two ways to measure are two rows.

    Not the samples: more of them are a better estimate of the same, and replace its row. Not the kind of device either:
    the same combination on two of them is compared by this id.
    """
    return _combination_identity(_point_identity(model, knobs, dataset), dataset, timed, scored)


def _combination_identity(
    point: Mapping[str, Any], dataset: DatasetSource, timed: Protocol | None, scored: Protocol | None
) -> dict[str, Any]:
    return {
        "protocol_version": PROTOCOL_VERSION,
        "prompt": dataset.prompt,
        "latency": None if timed is None else asdict(timed),
        "accuracy": None if scored is None else asdict(scored),
        **point,
    }


def _point_identity(model: ModelSource, knobs: Knobs, dataset: DatasetSource) -> dict[str, Any]:
    return {"model": _model_identity(model), "knobs": asdict(knobs), "dataset": [dataset.name, dataset.split]}


def _model_identity(model: ModelSource) -> dict[str, Any]:
    description = asdict(model)
    del description["place"]  # the same files elsewhere are the same model
    del description["moe_renormalization"]  # the configuration says it, and the fingerprint knows the configuration
    return description


def digest(value: Any) -> str:
    """128 bits of the SHA-256 of canonical JSON, in hexadecimal: short enough for a file name."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]

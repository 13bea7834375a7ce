"""What goes down to a worker and what comes up: a task with everything that decides its result, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from knobs.vision import VisionSetting
from workers.datasets import DatasetSource, SampleRef

# Raised when the way a number is obtained changes, so that old and new rows get different task ids.
PROTOCOL_VERSION = 2


class Kind(StrEnum):
    """What a task does; the value is also the name of the table its rows go to.

    Latency and accuracy belong to a combination; importance says what block lists are worth, before there are any.
    """

    LATENCY = "latency"
    ACCURACY = "accuracy"
    IMPORTANCE = "importance"


class Status(StrEnum):
    """How a task, or one row of it, ended."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


class FailureKind(StrEnum):
    """Why something failed, by what follows from it rather than by the words of the message."""

    BAD_SAMPLE = "bad_sample"
    BAD_DATASET = "bad_dataset"
    MODEL_LOAD = "model_load"
    KNOB = "knob"
    OUT_OF_MEMORY = "out_of_memory"
    DOMINATED = "dominated"
    TIMEOUT = "timeout"
    DEVICE_LOST = "device_lost"
    WORKER_LOST = "worker_lost"
    ERROR = "error"


@dataclass(frozen=True)
class ModelSource:
    """Everything that decides which network a worker builds; small, hashable and the same in every process.

    Attributes:
        name: as it is shown in results.
        family: the module of `workers.models` that knows this kind, or `generic`.
        place: where a worker finds it: absolute folder, hub id, or registered name. Not part of the identity.
        revision: hub commit; None for local files (see `fingerprint`) and random weights.
        weights: `checkpoint` or `random`.
        fingerprint: digest of the weights and every file that decides what the model computes.
        dtype, attention, experts, engine: how it runs; `experts` is None for a dense model, and where it has no choice.
        moe_renormalization: what its routers do with the weights of the experts they choose (see `knobs.routing`); None
            for a dense model. Follows from the configuration, so it is not part of the identity.
    """

    name: str
    family: str
    place: str
    revision: str | None
    weights: str
    fingerprint: str
    dtype: str
    attention: str
    experts: str | None
    engine: str
    moe_renormalization: str | None = None


@dataclass(frozen=True)
class Knobs:
    """One effective point of the knob grid: nothing is left to a default, so that equal points are equal objects."""

    vision: VisionSetting
    moe_top_k: int | None
    active_blocks: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """How the samples of a task are run.

    Attributes:
        max_new_tokens: accuracy: the cap on the answer, which ends at end-of-sequence; latency: the exact length.
        batch_size: samples per forward pass.
        repeats: timed repeats per batch over all visits, at most (latency only).
        visits: tasks that the repeats are split over, so that time has passed between them (latency only).
        warmup: untimed runs of every batch at the beginning of a visit (latency only).
        max_relative_error: repeats end when the medians are known this well, see `workers.stopping`; None: never early
            (latency only).
        max_seconds: no further round of repeats after this much time, over all visits; None: no limit (latency only).
        metric: scorer by name (accuracy only).
    """

    max_new_tokens: int
    batch_size: int
    repeats: int = 1
    visits: int = 1
    warmup: int = 0
    max_relative_error: float | None = None
    max_seconds: float | None = None
    metric: str | None = None

    def first_repeat(self, visit: int) -> int:
        """Number of the first repeat of a visit; of the visit behind the last one, the number of repeats."""
        return visit * (self.repeats // self.visits) + min(visit, self.repeats % self.visits)


@dataclass(frozen=True)
class Anchor:
    """What a worker times again and again between its tasks.

    Attributes:
        anchor_id: the same for the same model, back-ends, knobs and length of the answer, on the same samples.
        knobs: under which it is timed.
    """

    anchor_id: str
    knobs: Knobs


@dataclass(frozen=True)
class Task:
    """The unit of scheduling: one combination, one data set, one way to run it, a batch of samples.

    Attributes:
        accelerator: the kind of device whose time is wanted; None is any, for what does not depend on the device.
        visit: which share of the repeats this is, from 0 (latency only).
        anchor: what the worker times again and again in between, so that times of different workers and hours can be
            compared; it decides nothing about the rows and is not part of the identity (latency only).
        method: what is measured, a value of `knobs.importance.Method` (importance only).
        candidates: block lists whose worth is measured (importance only).
    """

    task_id: str
    combination_id: str
    kind: Kind
    sweep: str
    accelerator: str | None
    model: ModelSource
    knobs: Knobs
    dataset: DatasetSource
    samples: tuple[SampleRef, ...]
    protocol: Protocol
    visit: int = 0
    anchor: Anchor | None = None
    method: str | None = None
    candidates: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """What comes up from a worker: rows, or the reason why there are none. Never an exception.

    `environment` is the row of the table environments that the rows name; `anchors` are rows of that table, from the
    timings that were due before or after the task.
    """

    task_id: str
    status: Status
    rows: pa.Table | None = None
    anchors: pa.Table | None = None
    failure: FailureKind | None = None
    reason: str | None = None
    traceback: str | None = None
    worker: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] | None = None
    started_at: float = 0.0
    finished_at: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        # Column by column, as Ray sends Arrow tables, a table of a hundred columns takes milliseconds on either side.
        values = {name: _packed(value) if isinstance(value, pa.Table) else value for name, value in vars(self).items()}
        return _unpacked, (values,)


class _Packed(bytes):
    """A table as an Arrow stream."""


def _packed(table: pa.Table) -> _Packed:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return _Packed(sink.getvalue())


def _unpacked(values: dict[str, Any]) -> TaskResult:
    tables = {name: pa.ipc.open_stream(value).read_all() for name, value in values.items() if type(value) is _Packed}
    return TaskResult(**values | tables)

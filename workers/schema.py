"""The one place that says what a task is and what every column of every table means, with its unit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from knobs.vision import VisionSetting
from workers.columns import Column
from workers.conditions import CONDITION_COLUMNS
from workers.datasets import DatasetSource, SampleRef
from workers.environment import ENVIRONMENT_COLUMNS

# Raised when a column changes meaning. Old result folders stay readable; a new one is never mixed into them.
SCHEMA_VERSION = 1

# Raised when the way a number is obtained changes, so that old and new rows get different task ids.
PROTOCOL_VERSION = 1


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
        repeats: timed repeats per sample, at most (latency only).
        warmup: untimed runs before the first repeat of every sample (latency only).
        max_relative_error: repeats end when the medians are known this well, see `workers.stopping`; None: never early
            (latency only).
        max_seconds: no further round of repeats after this much time; None: no limit (latency only).
        metric: scorer by name (accuracy only).
    """

    max_new_tokens: int
    batch_size: int
    repeats: int = 1
    warmup: int = 0
    max_relative_error: float | None = None
    max_seconds: float | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Task:
    """The unit of scheduling: one combination, one data set, one way to run it, a batch of samples.

    Attributes:
        accelerator: the kind of device whose time is wanted; None is any, for what does not depend on the device.
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
    method: str | None = None
    candidates: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """What comes up from a worker: rows, or the reason why there are none. Never an exception.

    `environment` is the row of the table environments that the rows name.
    """

    task_id: str
    status: Status
    rows: pa.Table | None = None
    failure: FailureKind | None = None
    reason: str | None = None
    traceback: str | None = None
    worker: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] | None = None
    started_at: float = 0.0
    finished_at: float = 0.0


_STRING, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")

# Partition columns come from the folder names; they are never written into the files as well.
PARTITIONS = (
    Column("model", _STRING, "", "model name as the sweep wrote it"),
    Column("accelerator", _STRING, "", "accelerator kind, e.g. H100, or cpu"),
    Column("dataset", _STRING, "", "data set name"),
)

_IDENTITY = (
    Column("sweep", _STRING, "", "name of the sweep that ran it"),
    Column(
        "combination_id",
        _STRING,
        "",
        "digest of the knob combination, model, data set and way to measure; the same on every kind of device",
    ),
    Column("revision", _STRING, "", "hub commit, or digest of the local files; null for random weights"),
    Column("device_name", _STRING, "", "device as its driver names it: the one that timed, else the one that scored"),
    Column("split", _STRING, "", "split of the data set"),
    Column("dtype", _STRING, "", "data type of the weights"),
    Column("attention", _STRING, "", "attention back-end"),
    Column("experts", _STRING, "", "expert back-end; null for a dense model, and for a family that has but one"),
    Column(
        "moe_renormalization",
        _STRING,
        "",
        "renormalized: the weights of the chosen experts add up to 1 for every moe_top_k; not renormalized: each keeps "
        "the router's own score, so that fewer experts weigh less in sum; renormalized with shared experts: those add "
        "up to 1 together with the shared ones; a constant factor may follow; null for a dense model",
    ),
    Column(
        "engine",
        _STRING,
        "",
        "what decoded: eager, or graph for a captured step that is replayed; of a failed row, what was to",
    ),
    Column("engine_note", _STRING, "", "why engine is not what the sweep asked for; null if it is"),
    Column("schema_version", pa.int32(), "", "version of these columns"),
)

KNOB_COLUMNS = (
    Column("vision_knob", _STRING, "", "the vision axis in use, or native"),
    Column("vision_value", _STRING, "", "its level as the sweep wrote it; null for native"),
    Column("image_size", _STRING, "pixel", "requested canvas, height x width; null for other vision axes"),
    Column("tier", _STRING, "", "requested tier; null for other vision axes"),
    Column("tier_definition", _STRING, "", "JSON object of the tier: its range of crops and how one is chosen"),
    Column(
        "aspect_distance", _STRING, "", "linear or log: how a tiling is chosen; null where the axis leaves no choice"
    ),
    Column("force_full_tokens", _BOOL, "", "crops keep the vision tokens that they share; null where none are shared"),
    Column(
        "resize_to_fill",
        _BOOL,
        "",
        "true: the image covers its canvas; false: all of it, black around; null: stretched, or as the model does it",
    ),
    Column("moe_top_k", _INT, "", "experts per token in effect; null for a dense model"),
    Column("num_active_blocks", _INT, "", "transformer blocks of the language model that run"),
    Column("active_blocks", pa.list_(_INT), "", "their indices"),
)

_SAMPLE = (
    Column("task_id", _STRING, "", "the task that made this row"),
    Column("sample_id", _STRING, "", "stable id of the sample"),
    Column("image_id", _STRING, "", "image of the sample: questions that share it are not independent"),
    Column("image_height", _INT, "pixel", "original image"),
    Column("image_width", _INT, "pixel", "original image"),
    Column("image_aspect", _FLOAT, "", "original width / height"),
    Column("selected_crops", _INT, "", "crops that the knob comes to for this image, without the global view"),
    Column("selected_tiling", _STRING, "", "rows x columns of those crops"),
    Column("tower_passes", _INT, "", "images that go through the vision tower: the crops and any global view"),
    Column("theoretical_vision_tokens", _INT, "token", "vision tokens that the tower emits for this image"),
    Column("predicted_vision_tokens", _INT, "token", "those that have a place in the prompt, by the closed form"),
    Column("special_tokens", _INT, "token", "other prompt tokens that belong to the image, by the closed form"),
    Column(
        "aspect_mismatch",
        _FLOAT,
        "",
        "|columns/rows - width/height of the image|, the margins of the canvas taken off the image",
    ),
    Column("target_resolution", _STRING, "pixel", "canvas that is cut into crops, height x width"),
    Column("target_aspect", _FLOAT, "", "its width / height"),
    Column("actual_num_crops", _INT, "", "crops counted in the tensors, without the global view"),
    Column("actual_vision_tokens", _INT, "token", "vision tokens counted in the prompt"),
    Column("prompt_tokens", _INT, "token", "whole prompt, vision and text"),
    Column("output_tokens", _INT, "token", "tokens generated"),
    Column("status", _STRING, "", "done or failed"),
    Column("error", _STRING, "", "why a failed row failed"),
    Column("worker", _STRING, "", "worker that ran it"),
    Column("environment_id", _STRING, "", "what it ran in: versions, code, device, flags; see the table environments"),
    Column("device_uuid", _STRING, "", "tells two GPUs of a kind apart; null on a CPU"),
    Column(
        "threads", _INT, "", "threads that torch computes with on the host: they decide preprocessing and CPU times"
    ),
    Column(
        "niceness", _INT, "", "scheduling priority of the worker, 0 for normal and 19 for last, which decides the same"
    ),
    Column("started_at", _TIME, "", "wall clock at the start of this row"),
)

# Adjacent and disjoint, in the order in which they happen.
STAGES = ("preprocess_ms", "transfer_ms", "vision_ms", "projector_ms", "prefill_ms", "decode_ms")

LATENCY_COLUMNS = (
    *_IDENTITY,
    *KNOB_COLUMNS,
    *_SAMPLE,
    Column("batch_size", _INT, "", "samples in the forward pass"),
    Column("repeat", _INT, "", "timed repeat of this sample, from 0; warm-up runs are not stored"),
    Column("preprocess_ms", _FLOAT, "ms", "image and text in host memory -> tensors in host memory"),
    Column("transfer_ms", _FLOAT, "ms", "tensors on the host -> tensors on the device"),
    Column("vision_ms", _FLOAT, "ms", "vision tower: first kernel -> last hidden state"),
    Column("projector_ms", _FLOAT, "ms", "end of the tower -> embeddings ready to be merged"),
    Column("prefill_ms", _FLOAT, "ms", "end of projector -> first token chosen: every block, final norm, LM head"),
    Column("decode_ms", _FLOAT, "ms", "sum of the decode steps"),
    Column("decode_step_ms", pa.list_(_FLOAT), "ms", "each decode step: previous token chosen -> next token chosen"),
    Column("ttft_ms", _FLOAT, "ms", "start of preprocess -> first token chosen; no queue, no network"),
    Column("tpot_ms", _FLOAT, "ms", "decode_ms / (output_tokens - 1); null for one token"),
    Column("total_ms", _FLOAT, "ms", "start of preprocess -> last token chosen"),
    Column("residual_ms", _FLOAT, "ms", "total_ms minus all stages"),
    Column(
        "stopped_by",
        _STRING,
        "",
        "why the repeats ended: precise, levelled_off (the noise is steady and too large), repeats or seconds",
    ),
    Column(
        "relative_error",
        _FLOAT,
        "",
        "half-width of the 95 % interval of the median over the median, over all repeats; the largest of total, "
        "prefill and TPOT; counts noise between repeats, not differences between samples; null for one repeat",
    ),
    Column("peak_memory_bytes", _INT, "byte", "peak device memory allocated while the row ran; null on a CPU"),
    Column(
        "kv_cache_bytes",
        _INT,
        "byte",
        "keys and values at the end of decoding: of all tokens with engine eager; with graph the room made for them, "
        "a multiple of 128 tokens",
    ),
    *(
        Column(
            f"{part}flops",
            _INT,
            "FLOP",
            f"{meaning}: matrix products, convolutions and attention, 2 per multiply-add, causal attention as full; "
            "of the first samples of a task only, null for the others and where an operator cannot be counted",
        )
        for part, meaning in (
            ("vision_", "floating-point operations of the vision tower"),
            ("projector_", "of the projector"),
            ("prefill_", "of prefill"),
            ("decode_", "of all decode steps"),
            ("", "of the whole answer"),
        )
    ),
    Column("valid", _BOOL, "", "false if something disturbed the measurement"),
    Column(
        "invalid_reasons",
        pa.list_(_STRING),
        "",
        "what disturbed it, see workers/validity.py; token_mismatch: force_full_tokens is on, and the prompt does not "
        "hold all of them",
    ),
    *CONDITION_COLUMNS,
)

ACCURACY_COLUMNS = (
    *_IDENTITY,
    *KNOB_COLUMNS,
    *_SAMPLE,
    Column("question_type", _STRING, "", "kind of question, where the data set says"),
    Column("stop_reason", _STRING, "", "eos, or length if the cap ended the answer"),
    Column("prediction", _STRING, "", "decoded answer"),
    Column("metric", _STRING, "", "scorer and variant"),
    Column("score", _FLOAT, "", "0 to 1; null where the row failed"),
    Column("valid", _BOOL, "", "false if the row does not count"),
    Column("invalid_reasons", pa.list_(_STRING), "", "why it does not: failed, or token_mismatch"),
)

IMPORTANCE_COLUMNS = (
    Column("task_id", _STRING, "", "the task that made this row"),
    Column("sweep", _STRING, "", "name of the sweep that ran it"),
    Column("method", _STRING, "", "accuracy_drop, nll, activation or similarity"),
    Column("sample_id", _STRING, "", "stable id of the sample"),
    Column("image_id", _STRING, "", "image of the sample"),
    Column("blocks", pa.list_(_INT), "", "blocks that ran; for activation and similarity the one that is measured"),
    Column(
        "value",
        _FLOAT,
        "",
        "accuracy_drop: score of the answer, 0 to 1; nll: log-likelihood of the reference answer in nats; activation: "
        "|out - in| / |out|, similarity: 1 - cosine, means over the tokens of the prompt",
    ),
    Column("status", _STRING, "", "done or failed"),
    Column("error", _STRING, "", "why a failed row failed"),
    Column("worker", _STRING, "", "worker that ran it"),
    Column("device_name", _STRING, "", "device as its driver names it"),
    Column("environment_id", _STRING, "", "what it ran in, see the table environments"),
    Column("started_at", _TIME, "", "wall clock at the start of its batch"),
)

TASK_COLUMNS = (
    Column("task_id", _STRING, "", "digest of everything that decides the result"),
    Column("combination_id", _STRING, "", "combination the task belongs to"),
    Column("sweep", _STRING, "", "name of the sweep that ran it"),
    Column("kind", _STRING, "", "latency, accuracy or importance; null for a combination that was skipped as a whole"),
    *KNOB_COLUMNS,
    Column("status", _STRING, "", "done, failed or skipped"),
    Column("failure", _STRING, "", "kind of failure"),
    Column("reason", _STRING, "", "one line: what happened"),
    Column("traceback", _STRING, "", "traceback on the worker, where there was one"),
    Column("num_samples", _INT, "", "samples asked for"),
    Column("num_failed_rows", _INT, "", "rows of the task that failed"),
    Column("attempts", _INT, "", "how often it was started"),
    Column("worker", _STRING, "", "worker that ran it"),
    Column("host", _STRING, "", "machine that ran it"),
    Column("device_name", _STRING, "", "device as its driver names it"),
    Column("started_at", _TIME, "", "start on the worker"),
    Column("finished_at", _TIME, "", "end on the worker"),
    Column("duration_s", _FLOAT, "s", "time on the worker"),
)

# The timings that combinations summarise, each as the statistics below.
SUMMARISED = (*STAGES, "tpot_ms", "ttft_ms", "total_ms")
STATISTICS = {
    "mean": "mean over valid rows",
    "std": "sample standard deviation over valid rows",
    "p50": "median over valid rows",
    "p90": "90th percentile over valid rows; null below the sample floor",
    "p95": "95th percentile over valid rows; null below the sample floor",
    "p99": "99th percentile over valid rows; null below the sample floor",
    "ci95": "half-width of the 95 % confidence interval of the mean, clustered by sample (Student's t)",
}

# How a combination was measured. Rows that differ here answer different questions.
_MEASURED = (
    Column("prompt", _STRING, "", "template of the question"),
    Column("timed_output_tokens", _INT, "token", "fixed length of each timed answer; null if latency is off"),
    Column("timed_repeats", _INT, "", "timed repeats per sample, at most; null if latency is off"),
    Column("timed_max_relative_error", _FLOAT, "", "asked for relative_error; null if all repeats are made"),
    Column("timed_limit_s", _FLOAT, "s", "no further round of repeats after this; null without a limit"),
    Column("timed_warmup", _INT, "", "untimed runs before them; null if latency is off"),
    Column("timed_batch_size", _INT, "", "samples per timed forward pass; null if latency is off"),
    Column("scored_max_new_tokens", _INT, "token", "cap on each scored answer; null if accuracy is off"),
    Column("scored_batch_size", _INT, "", "samples per scored forward pass; null if accuracy is off"),
    Column(
        "samples_digest",
        _STRING,
        "",
        "digest of the samples that were scored, or timed where none was; rows of the same samples have the same",
    ),
    Column(
        "task_ids",
        pa.list_(_STRING),
        "",
        "tasks whose rows are behind this one; rows of a task that several combinations share name the first of them",
    ),
)

COMBINATION_COLUMNS = (
    *_IDENTITY,
    *KNOB_COLUMNS,
    *_MEASURED,
    Column("theoretical_num_crops", _INT, "", "crops promised; null where it depends on the image"),
    Column("theoretical_tiling", _STRING, "", "rows x columns promised; null where it depends on the image"),
    Column("theoretical_vision_tokens", _INT, "token", "vision tokens promised; null where it depends on the image"),
    Column("selected_crops_distribution", _STRING, "", 'JSON object: crops -> samples, e.g. {"4": 15, "6": 28}'),
    Column("selected_crops_mean", _FLOAT, "", "mean of the crops selected per sample"),
    Column("selected_crops_std", _FLOAT, "", "standard deviation of the same"),
    Column("actual_num_crops_mean", _FLOAT, "", "mean of the crops counted in the tensors"),
    Column("actual_vision_tokens_mean", _FLOAT, "token", "mean of the vision tokens counted in the prompt"),
    Column("actual_vision_tokens_std", _FLOAT, "token", "standard deviation of the same"),
    Column("token_utilization_mean", _FLOAT, "", "mean of actual / theoretical vision tokens"),
    Column("aspect_mismatch_mean", _FLOAT, "", "mean over samples"),
    Column("aspect_mismatch_p95", _FLOAT, "", "95th percentile over samples"),
    Column("aspect_mismatch_p99", _FLOAT, "", "99th percentile over samples"),
    Column("prompt_tokens_mean", _FLOAT, "token", "mean length of the prompt"),
    Column("accuracy", _FLOAT, "", "mean score, 0 to 1; null if accuracy is off"),
    Column("accuracy_se", _FLOAT, "", "standard error of accuracy, clustered by image"),
    Column("metric", _STRING, "", "scorer and variant"),
    Column("num_samples", _INT, "", "samples scored, valid ones"),
    Column("num_failed", _INT, "", "samples that failed, in either table"),
    Column("output_tokens_mean", _FLOAT, "token", "mean length of the answers at natural length"),
    *(
        Column(f"{name}_{statistic}", _FLOAT, "ms", f"{name}: {meaning}")
        for name in SUMMARISED
        for statistic, meaning in STATISTICS.items()
    ),
    Column("num_timed", _INT, "", "valid timed rows behind the latency columns"),
    Column("stopped_by", _STRING, "", "why the repeats ended; several tasks joined by commas"),
    Column("relative_error", _FLOAT, "", "what the repeats have come to, see the latency table; the largest of tasks"),
    Column("num_invalid", _INT, "", "rows, timed or scored, left out as invalid"),
    Column("residual_fraction", _FLOAT, "", "mean of residual_ms / total_ms"),
    Column("peak_memory_bytes", _INT, "byte", "largest peak over rows; null on a CPU"),
    Column(
        "flops",
        _FLOAT,
        "FLOP",
        "mean floating-point operations of an answer over samples counted; null if none",
    ),
    Column("kv_cache_bytes", _INT, "byte", "largest over rows"),
    Column("energy_j", _FLOAT, "J", "energy of an answer; null where the device has no counter"),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "latency": LATENCY_COLUMNS,
    "accuracy": ACCURACY_COLUMNS,
    "importance": IMPORTANCE_COLUMNS,
    "combinations": COMBINATION_COLUMNS,
    "tasks": TASK_COLUMNS,
    "environments": ENVIRONMENT_COLUMNS,
}


def arrow_schema(table: str) -> pa.Schema:
    """The Arrow schema of a table; each field carries its unit and meaning as metadata."""
    return pa.schema(
        [pa.field(c.name, c.type, metadata={"unit": c.unit, "meaning": c.meaning}) for c in TABLES[table]],
        metadata={"schema_version": str(SCHEMA_VERSION)},
    )


def knob_columns(knobs: Knobs) -> dict[str, Any]:
    """The knob columns of a row."""
    vision = knobs.vision
    return {
        "vision_knob": vision.knob,
        "vision_value": None if vision.value is None else str(vision.value),
        "image_size": vision.value if vision.knob == "image_size" else None,
        "tier": vision.value if vision.knob == "tier" else None,
        "tier_definition": None if vision.tier is None else json.dumps(asdict(vision.tier)),
        "aspect_distance": vision.aspect_distance,
        "force_full_tokens": vision.force_full_tokens,
        "resize_to_fill": vision.resize_to_fill,
        "moe_top_k": knobs.moe_top_k,
        "num_active_blocks": len(knobs.active_blocks),
        "active_blocks": list(knobs.active_blocks),
    }


def to_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table in the declared columns; a column that a row lacks is null.

    Raises:
        KeyError: a row has a column that the table does not declare.
    """
    schema = arrow_schema(table)
    known = set(schema.names)
    for row in rows:
        if unknown := row.keys() - known:
            raise KeyError(f"{table} has no column {', '.join(sorted(unknown))}")
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)

"""The one place that says what every column of every table means, with its unit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from workers.columns import Column
from workers.conditions import CONDITION_COLUMNS
from workers.environment import ENVIRONMENT_COLUMNS
from workers.tasks import Knobs

# Raised when a column changes meaning. Old result folders stay readable; a new one is never mixed into them.
SCHEMA_VERSION = 2

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
    Column("num_images", _INT, "", "images of the sample; crops and tokens are sums over them"),
    Column("image_height", _INT, "pixel", "original image, the first of several"),
    Column("image_width", _INT, "pixel", "original image, the first of several"),
    Column("image_aspect", _FLOAT, "", "original width / height"),
    Column("selected_crops", _INT, "", "crops that the knob comes to for this image, without the global view"),
    Column(
        "selected_tiling",
        _STRING,
        "",
        "rows x columns of those crops; null for several images, like what follows of it",
    ),
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
    Column(
        "session_started_at", _TIME, "", "when the process of the worker began: tells one worker's runs apart in time"
    ),
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
    Column("batch_size", _INT, "", "samples in the forward pass; its times stand in the row of each"),
    Column("batch", _INT, "", "number of its batch, from 0; the last one is filled up with the first samples"),
    Column("anchor_id", _STRING, "", "the anchor whose worker trends its times are corrected by; null for none"),
    Column("visit", _INT, "", "which share of the repeats, from 0; other combinations are timed between two visits"),
    Column("repeat", _INT, "", "timed repeat of this batch over all visits, from 0; warm-up runs are not stored"),
    Column(
        "first_call_ms",
        _FLOAT,
        "ms",
        "total of the very first, untimed answer to this batch in this visit: with what is done once, such as a "
        "capture; null without warm-up",
    ),
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
        "peak_reserved_bytes",
        _INT,
        "byte",
        "peak device memory that torch held while the row ran, in use or not; null on a CPU",
    ),
    Column("weights_bytes", _INT, "byte", "parameters and buffers of the model, of all blocks and experts"),
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
    Column(
        "energy_j",
        _FLOAT,
        "J",
        "energy of the device for one answer, of n in a batch of n: mean over the first batches, as many as take half "
        "a second, run for it behind the timed rounds; null for the others and where the device has no counter",
    ),
    Column("energy_relative_error", _FLOAT, "", "how far the counter's ticks leave it open, as a ratio"),
    Column("valid", _BOOL, "", "false if something disturbed the measurement"),
    Column(
        "invalid_reasons",
        pa.list_(_STRING),
        "",
        "what disturbed it, see workers/validity.py; token_mismatch: force_full_tokens is on, and the prompt does not "
        "hold all of them; slow_first_round: it took longer than the later rounds, in spite of the warm-up",
    ),
    *CONDITION_COLUMNS,
)

ANCHOR_COLUMNS = (
    Column(
        "marked",
        _BOOL,
        "",
        "true: with a mark at every stage boundary, as combinations are timed; false: bare, with the total only",
    ),
    Column("pair", _INT, "", "one marked and one bare answer, right after each other; from 0 in every call"),
    *LATENCY_COLUMNS,
)

ACCURACY_COLUMNS = (
    *_IDENTITY,
    *KNOB_COLUMNS,
    *_SAMPLE,
    Column("question_type", _STRING, "", "kind of question, where the data set says"),
    Column("stop_reason", _STRING, "", "eos, or length if the cap ended the answer"),
    Column("prediction", _STRING, "", "decoded answer"),
    Column("answers", pa.list_(_STRING), "", "reference answers; of multiple choice their letters"),
    Column("metric", _STRING, "", "scorer and variant"),
    Column("score", _FLOAT, "", "0 to 1; null where the row failed, and for cider, which scores no single answer"),
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

# The timings that combinations summarise, each as the statistics below, and that workers are compared by.
SUMMARISED = (*STAGES, "tpot_ms", "ttft_ms", "total_ms")

WORKER_COLUMNS = (
    Column("worker", _STRING, "", "worker by name"),
    Column("session_started_at", _TIME, "", "when its process began"),
    Column("host", _STRING, "", "machine, as it calls itself; null if its environment is not recorded"),
    Column("device_name", _STRING, "", "device as its driver names it"),
    Column("device_uuid", _STRING, "", "tells two GPUs of a kind apart; null on a CPU"),
    Column("anchor_id", _STRING, "", "the combination that it timed again and again; rows of latency name theirs"),
    Column("anchor", _STRING, "", "the same in words"),
    Column("timing", _STRING, "", f"what this row is about: {', '.join(SUMMARISED)}"),
    Column("num_anchors", _INT, "", "how often the anchor was timed, each time several answers"),
    Column("first_at", _TIME, "", "first of them"),
    Column("last_at", _TIME, "", "last of them"),
    Column("mean_at", _TIME, "", "mean of their times, where bias and drift meet"),
    Column("anchor_ms", _FLOAT, "ms", "what the anchor takes on this worker: geometric mean"),
    Column(
        "bias",
        _FLOAT,
        "",
        "anchor_ms over the median of all workers of this kind, minus 1: 0.05 is 5 % slower; null for a single worker",
    ),
    Column("bias_ci95", _FLOAT, "", "half-width of its 95 % interval; null for a worker with a single anchor"),
    Column("drift_per_hour", _FLOAT, "", "relative change per hour: 0.05 is 5 % slower after an hour; null under 3"),
    Column("drift_per_hour_ci95", _FLOAT, "", "half-width of its 95 % interval"),
    Column("spread", _FLOAT, "", "relative standard deviation of the anchors around that line; null under 3"),
    Column(
        "overhead",
        _FLOAT,
        "",
        "what marking the stages costs: median of marked over bare in pairs, minus 1; null except for total_ms",
    ),
    Column("overhead_ci95", _FLOAT, "", "half-width of its 95 % interval; null under six independent pairs"),
    Column("findings", pa.list_(_STRING), "", "what is out of bounds: slow, fast, drift, spread, overhead"),
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

STATISTICS = {
    "mean": "mean over valid rows",
    "std": "sample standard deviation over valid rows",
    "p50": "median over valid rows",
    "p90": "90th percentile over valid rows; null below the sample floor",
    "p95": "95th percentile over valid rows; null below the sample floor",
    "p99": "99th percentile over valid rows; null below the sample floor",
    "ci95": "half-width of the 95 % confidence interval of the mean, clustered by sample (Student's t)",
}

CORRECTED_STATISTICS = {
    "corrected_mean": "mean over valid rows, each divided by how much slower its worker was at that time than the "
    "median worker, as the anchors say (see the table workers); null until a sweep has ended",
    "corrected_p50": "median of the same",
}

# How a combination was measured. Rows that differ here answer different questions.
_MEASURED = (
    Column("prompt", _STRING, "", "template of the question"),
    Column("engine_asked", _STRING, "", "engine that the sweep asks for; the column engine says what decoded"),
    Column("timed_output_tokens", _INT, "token", "fixed length of each timed answer; null if latency is off"),
    Column("timed_repeats", _INT, "", "timed repeats per batch, at most; null if latency is off"),
    Column("timed_visits", _INT, "", "tasks that the repeats are split over; null if latency is off"),
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
    Column(
        "accuracy",
        _FLOAT,
        "",
        "mean score, 0 to 1; for yes_no/f1 the F1; for cider CIDEr-D, 0 to 10, of which papers print a hundred times "
        "as much; null if accuracy is off",
    ),
    Column("accuracy_se", _FLOAT, "", "standard error of accuracy, clustered by image"),
    Column(
        "accuracy_low",
        _FLOAT,
        "",
        "lower end of the 95 % interval of accuracy, clustered by image: Wilson's with the effective sample size for "
        "scores of 0 and 1, else by Student's t; null for a single image and for metrics of the corpus",
    ),
    Column("accuracy_high", _FLOAT, "", "upper end of the same"),
    Column("metric", _STRING, "", "scorer and variant"),
    Column("num_samples", _INT, "", "samples scored, valid ones"),
    Column("num_failed", _INT, "", "samples that failed, in either table"),
    Column("output_tokens_mean", _FLOAT, "token", "mean length of the answers at natural length"),
    *(
        Column(f"{name}_{statistic}", _FLOAT, "ms", f"{name}: {meaning}")
        for name in SUMMARISED
        for statistic, meaning in (STATISTICS | CORRECTED_STATISTICS).items()
    ),
    Column("num_timed", _INT, "", "valid timed answers behind the latency columns; a batch is one"),
    Column(
        "visit_spread",
        _FLOAT,
        "",
        "how far the medians of total_ms of the visits are apart: largest over smallest, minus 1; null for one visit",
    ),
    Column("stopped_by", _STRING, "", "why the repeats ended; several tasks joined by commas"),
    Column(
        "relative_error",
        _FLOAT,
        "",
        "as in the latency table, but over the rounds of all visits; those with an invalid row are left out, and it is "
        "null for fewer than two",
    ),
    Column("num_invalid", _INT, "", "rows, timed or scored, left out as invalid"),
    Column("residual_fraction", _FLOAT, "", "mean of residual_ms / total_ms"),
    Column("peak_memory_bytes", _INT, "byte", "largest peak over rows; null on a CPU"),
    Column("peak_reserved_bytes", _INT, "byte", "largest over rows of what torch held; null on a CPU"),
    Column("weights_bytes", _INT, "byte", "parameters and buffers of the model, of all blocks and experts"),
    Column(
        "flops",
        _FLOAT,
        "FLOP",
        "mean floating-point operations of an answer over samples counted; null if none",
    ),
    Column("kv_cache_bytes", _INT, "byte", "largest over rows"),
    Column("energy_j", _FLOAT, "J", "energy of an answer, mean over batches measured; null without a counter"),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "latency": LATENCY_COLUMNS,
    "accuracy": ACCURACY_COLUMNS,
    "importance": IMPORTANCE_COLUMNS,
    "anchors": ANCHOR_COLUMNS,
    "workers": WORKER_COLUMNS,
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

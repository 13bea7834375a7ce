"""Small hand-made values of every kind that travels through a sweep: sources, tasks, and rows of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import pyarrow as pa

from knobs.vision import VisionSetting
from orchestrator.plan import PlannedDataset, digest, task_identity
from workers.datasets import Columns, DatasetSource, SampleRef
from workers.schema import SCHEMA_VERSION, STAGES, knob_columns, to_table
from workers.tasks import Kind, Knobs, ModelSource, Protocol, Task

MODEL = ModelSource(
    name="small",
    family="smolvlm",
    place="/models/small",
    revision=None,
    weights="checkpoint",
    fingerprint="files:0123456789abcdef",
    dtype="float32",
    attention="sdpa",
    experts="grouped_mm",
    engine="eager",
)
# What a combination is made of; importance comes before there are any.
OF_COMBINATIONS = (Kind.LATENCY, Kind.ACCURACY)

KNOBS = Knobs(VisionSetting("longest_edge", 64), 2, (0, 1, 2, 3))
DATASET = DatasetSource(
    name="questions",
    split="test",
    path="/data/questions.jsonl",
    hub_id=None,
    config=None,
    revision=None,
    columns=Columns(),
    metric="exact_match",
    prompt="{question}",
)
TIMED = Protocol(max_new_tokens=4, batch_size=1, repeats=2, warmup=1)
SCORED = Protocol(max_new_tokens=8, batch_size=4, metric="exact_match")
STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def samples(count: int, name: str = "questions", split: str = "test") -> tuple[SampleRef, ...]:
    """References to samples whose content is their name."""
    uids = [f"{name}:{split}:{i}" for i in range(count)]
    return tuple(SampleRef(uid, hashlib.sha256(uid.encode()).hexdigest()) for uid in uids)


def planned_dataset(count: int, name: str = "questions", max_new_tokens: int = 8) -> PlannedDataset:
    """A data set of so many samples."""
    return PlannedDataset(replace(DATASET, name=name), samples(count, name), max_new_tokens)


def task(kind: Kind = Kind.ACCURACY, **changes: Any) -> Task:
    """A task with the id that its content gives it."""
    timed = kind is Kind.LATENCY
    values: dict[str, Any] = {
        "task_id": "",
        "combination_id": "combination",
        "kind": kind,
        "sweep": "example",
        "accelerator": "H100" if timed else None,
        "model": MODEL,
        "knobs": KNOBS,
        "dataset": DATASET,
        "samples": samples(3),
        "protocol": TIMED if timed else SCORED,
    }
    made = Task(**values | changes)
    return replace(made, task_id=digest(task_identity(made)))


def row(of: Task, ref: SampleRef, **changes: Any) -> dict[str, Any]:
    """What a worker says of one sample, whatever the kind of task."""
    return {
        "sweep": of.sweep,
        "combination_id": of.combination_id,
        "task_id": of.task_id,
        "device_name": "Some GPU 80GB",
        "split": of.dataset.split,
        "dtype": of.model.dtype,
        "attention": of.model.attention,
        "experts": of.model.experts,
        "engine": of.model.engine,
        "engine_note": None,
        "schema_version": SCHEMA_VERSION,
        **knob_columns(of.knobs),
        "sample_id": ref.uid,
        "image_id": f"image of {ref.uid}",
        "image_height": 48,
        "image_width": 64,
        "image_aspect": 4 / 3,
        "selected_crops": 4,
        "selected_tiling": "2x2",
        "theoretical_vision_tokens": 80,
        "aspect_mismatch": 1 / 3,
        "target_resolution": "64x64",
        "actual_num_crops": 4,
        "actual_vision_tokens": 80,
        "prompt_tokens": 100,
        "output_tokens": of.protocol.max_new_tokens,
        "status": "done",
        "valid": True,
        "invalid_reasons": [],
        "worker": "h100-0",
        "started_at": STARTED,
        **changes,
    }


def timed_row(of: Task, ref: SampleRef, repeat: int = 0, total_ms: float = 60.0, **changes: Any) -> dict[str, Any]:
    """A timed row whose stages are a sixth of the whole each."""
    stages = {name: total_ms / len(STAGES) for name in STAGES}
    return row(of, ref) | {
        "batch_size": 1,
        "batch": [of_task.uid for of_task in of.samples].index(ref.uid) if ref in of.samples else None,
        "visit": of.visit,
        "repeat": repeat,
        **stages,
        "decode_step_ms": [total_ms / 18] * 3,
        "ttft_ms": total_ms * 5 / 6,
        "tpot_ms": total_ms / 18,
        "total_ms": total_ms,
        "residual_ms": 0.0,
        "kv_cache_bytes": 4096,
        **changes,
    }


def scored_row(of: Task, ref: SampleRef, score: float = 1.0, **changes: Any) -> dict[str, Any]:
    """A scored row."""
    scored = {"prediction": "red", "metric": "exact_match", "score": score, "stop_reason": "eos", "output_tokens": 2}
    return row(of, ref) | scored | changes


def failed_row(of: Task, ref: SampleRef) -> dict[str, Any]:
    """A row of a sample that could not be used: nothing is known but that and why."""
    known = {"sample_id": ref.uid, "status": "failed", "error": f"{ref.uid}: broken image", "worker": "h100-0"}
    flags = {"valid": False, "invalid_reasons": ["failed"]}
    return {"sweep": of.sweep, "task_id": of.task_id, **knob_columns(of.knobs), **known, **flags}


def rows_of(of: Task, value: float, broken: Iterable[str] = ()) -> pa.Table:
    """Every row of a task: `value` is its total time or score; samples named in `broken` have failed."""
    made: list[dict[str, Any]] = []
    for ref in of.samples:
        if ref.uid in broken:
            made.append(failed_row(of, ref))
        elif of.kind is Kind.LATENCY:
            made += [timed_row(of, ref, repeat, value + repeat) for repeat in range(of.protocol.repeats)]
        else:
            made.append(scored_row(of, ref, value))
    return to_table(of.kind, made)


def frame(table: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as the analysis meets them: through Arrow, so that nulls are those of a result folder."""
    made: pd.DataFrame = to_table(table, list(rows)).to_pandas()
    return made

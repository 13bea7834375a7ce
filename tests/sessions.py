"""What tests of a session share: tasks by hand, and rows, failures and models of a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import picture

from knobs.experts import routers
from knobs.vision import VisionSetting
from workers.datasets import Dataset, DatasetSource, resolve_source
from workers.models import describe
from workers.models.adapter import VisionLanguageModel
from workers.schema import arrow_schema
from workers.session import Session
from workers.tasks import (
    FailureKind,
    Kind,
    Knobs,
    ModelSource,
    Protocol,
    Status,
    Task,
)

PROJECT = Path(__file__).resolve().parents[1]
TIMED = Protocol(max_new_tokens=3, batch_size=1, repeats=2, warmup=1)
SCORED = Protocol(max_new_tokens=6, batch_size=4, metric="vqa_accuracy")


def demo() -> DatasetSource:
    return resolve_source(name="demo", base_folder=PROJECT / "sweeps")


def task_for(
    source: ModelSource,
    kind: Kind = Kind.ACCURACY,
    *,
    data: DatasetSource | None = None,
    samples: int = 6,
    protocol: Protocol | None = None,
    **knobs: Any,
) -> Task:
    """A task by hand: the first blocks of six, the model's own top-k, native images, unless `knobs` says otherwise."""
    data = data or demo()
    card = describe(source.place)
    point = {"vision": VisionSetting(), "moe_top_k": card.moe_top_k, "active_blocks": tuple(range(card.num_blocks))}
    refs = tuple(Dataset.open(data).select(samples, 42))
    protocol = protocol or (SCORED if kind is Kind.ACCURACY else TIMED)
    return Task("t1", "c1", kind, "by-hand", None, source, Knobs(**{**point, **knobs}), data, refs, protocol)


def rows_of(session: Session, task: Task) -> list[dict[str, Any]]:
    result = session.run(task)
    assert result.status is Status.DONE, result.traceback
    assert (result.failure, result.reason, result.traceback) == (None, None, None)
    assert result.rows is not None
    assert result.rows.schema.equals(arrow_schema(task.kind), check_metadata=True)
    rows: list[dict[str, Any]] = result.rows.to_pylist()
    return rows


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("started_at", "session_started_at")
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def failure(session: Session, task: Task) -> tuple[FailureKind | None, str]:
    result = session.run(task)
    assert result.status is Status.FAILED
    assert result.rows is None
    assert result.reason is not None
    assert result.traceback is not None
    assert result.traceback.startswith("Traceback (most recent call last):")
    assert "\n" not in result.reason
    return result.failure, result.reason


def model_of(session: Session) -> VisionLanguageModel:
    assert session._vlm is not None
    return session._vlm


def assert_no_knob_is_switched(session: Session) -> None:
    vlm = model_of(session)
    assert [name for name, module in vlm.model.named_modules() if "forward" in module.__dict__] == []
    assert vlm.decoder._forward_pre_hooks == {}
    assert {router.top_k for router in routers(vlm.model)} <= {vlm.card.moe_top_k}


def awkward_data(folder: Path) -> DatasetSource:
    lines = []
    for name, size in [("good", (40, 60)), ("truncated", (60, 40)), ("narrow", (1, 3000)), ("fine", (50, 50))]:
        file = folder / f"{name}.png"
        picture(*size).save(file)
        if name == "truncated":
            file.write_bytes(file.read_bytes()[:200])
        lines.append({"file_name": file.name, "id": name, "question": f"What is {name}?", "answers": ["a circle"] * 10})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return resolve_source(
        name="awkward", path=str(folder), metric="vqa_accuracy", columns={"id": "id"}, base_folder=folder
    )


def two_images_data(folder: Path) -> DatasetSource:
    """A question about two images of different aspect, and one about the first of them."""
    for name, size in [("tall", (80, 40)), ("wide", (40, 100))]:
        picture(*size).save(folder / f"{name}.png")
    rows = [
        {"id": "both", "images": ["tall.png", "wide.png"], "question": "Which is wider?", "answers": ["wide"] * 10},
        {"id": "one", "images": ["tall.png"], "question": "Is it tall?", "answers": ["yes"] * 10},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    columns = {"id": "id", "image": "images"}
    place = str(folder / "questions.jsonl")
    return resolve_source(name="two", path=place, metric="vqa_accuracy", columns=columns, base_folder=folder)

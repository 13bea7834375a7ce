"""Which tasks need at least as much memory as one that did not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from handmade import KNOBS, MODEL, TIMED, samples, task

from knobs.tiling import TIERS
from knobs.vision import VisionSetting
from orchestrator.dominance import needs_as_much
from workers.tasks import Kind

BASE = {"knobs": KNOBS, "protocol": replace(TIMED, batch_size=4), "samples": samples(4)}


def timed(**changes: Any) -> Any:
    return task(Kind.LATENCY, **(BASE | changes))


def vision(knob: str, value: int | str | None, **options: Any) -> Any:
    return timed(knobs=replace(KNOBS, vision=VisionSetting(knob, value, **options)))


@pytest.mark.parametrize(
    "larger",
    [
        timed(),
        timed(visit=1),
        timed(knobs=replace(KNOBS, moe_top_k=3)),
        timed(knobs=replace(KNOBS, active_blocks=(0, 1, 2, 3, 4))),
        timed(knobs=replace(KNOBS, vision=VisionSetting("longest_edge", 128))),
        timed(protocol=replace(TIMED, batch_size=8)),
        timed(protocol=replace(TIMED, batch_size=4, max_new_tokens=99)),
        timed(samples=samples(9)),
    ],
)
def test_more_of_anything_needs_as_much(larger: Any) -> None:
    assert needs_as_much(larger, timed())
    assert needs_as_much(timed(), larger) == (larger.visit == 1 or larger == timed())


@pytest.mark.parametrize(
    "other",
    [
        timed(model=replace(MODEL, name="another")),
        timed(accelerator="A100"),
        task(Kind.ACCURACY, **BASE),
        timed(knobs=replace(KNOBS, active_blocks=(0, 1, 2, 4, 5, 6))),  # more of them, but not the same
        timed(samples=samples(4, "another")),
        timed(knobs=replace(KNOBS, vision=VisionSetting())),
        timed(knobs=replace(KNOBS, vision=VisionSetting("crops", 64))),
        timed(knobs=replace(KNOBS, moe_top_k=9, active_blocks=(0,))),  # wider and less deep
    ],
)
def test_what_cannot_be_compared_is_tried(other: Any) -> None:
    assert not needs_as_much(other, timed())


def test_a_canvas_is_larger_if_both_sides_are() -> None:
    small = vision("image_size", "560x336")
    assert needs_as_much(vision("image_size", "560x560"), small)
    assert not needs_as_much(vision("image_size", "1120x224"), small)
    assert not needs_as_much(vision("image_size", "560x560", force_full_tokens=True), small)


def test_tiers_are_ranges_and_not_compared() -> None:
    low, high = (vision("tier", name, tier=TIERS[name]) for name in ("low", "high"))
    assert not needs_as_much(high, low)
    assert needs_as_much(high, high)

"""Expansion of a sweep into combinations and tasks, and the ids that make a result the result of exactly one task."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from handmade import DATASET, KNOBS, MODEL, OF_COMBINATIONS, SCORED, TIMED, planned_dataset, samples, task
from PIL import Image

from knobs.tiling import TIERS, Tier
from knobs.vision import VisionSetting
from orchestrator.plan import (
    SAMPLES_PER_ACCURACY_TASK,
    Plan,
    PlannedDataset,
    PlannedModel,
    combination_identity,
    digest,
    expand,
    make_plan,
)
from orchestrator.resolve import planned_models, resolve_models
from orchestrator.sampling import STRATEGIES, sample
from orchestrator.spec import parse_sweep
from workers.datasets import Columns, DatasetSource
from workers.models import describe
from workers.tasks import (
    PROTOCOL_VERSION,
    Kind,
    Knobs,
    ModelSource,
    Protocol,
    Task,
)

DENSE, SPARSE, TILED = (describe(name) for name in ("tiny-smolvlm", "tiny-qwen3-vl-moe", "tiny-internvl"))
ALL_SIX = (0, 1, 2, 3, 4, 5)


def sweep(knobs: str = "{}", models: str = "tiny-smolvlm", **sections: str) -> Any:
    text = f"name: example\nmodels: [{models}]\ndatasets: [demo]\nknobs: {knobs}\n"
    return parse_sweep(text + "".join(f"{key}: {value}\n" for key, value in sections.items()))


def plan_of(
    spec: Any, datasets: Sequence[PlannedDataset] = (planned_dataset(4),), accelerators: Sequence[str] = ("cpu",)
) -> Plan:
    cards = resolve_models(spec, offline=True)
    return make_plan(spec, planned_models(spec, cards, accelerators), datasets, accelerators)


def task_ids(plan: Plan) -> set[str]:
    return {task.task_id for task in plan.tasks}


# -- expansion --------------------------------------------------------------------------------------------------------


def test_an_axis_that_a_model_lacks_is_dropped_with_the_reason_and_the_others_still_move() -> None:
    spec = sweep("{longest_edge: [32, 64], moe_top_k: [1, 2], active_blocks: [3, 6]}")
    dense, sparse = expand(spec, DENSE), expand(spec, SPARSE)
    assert [str(dropped) for dropped in dense.dropped] == ["tiny-smolvlm: moe_top_k dropped, the model is dense"]
    assert {(k.vision.value, k.moe_top_k, len(k.active_blocks)) for k in dense.knobs} == {
        (edge, None, blocks) for edge in (32, 64) for blocks in (3, 6)
    }
    assert [dropped.axis for dropped in sparse.dropped] == ["longest_edge"]
    assert "no such vision knob" in str(sparse.dropped[0])
    assert {(k.moe_top_k, len(k.active_blocks)) for k in sparse.knobs} == {(1, 3), (1, 6), (2, 3), (2, 6)}


def test_without_knobs_a_model_runs_once_with_everything_it_has_spelled_out() -> None:
    assert expand(sweep(), DENSE).knobs == [Knobs(VisionSetting(), None, ALL_SIX)]
    assert expand(sweep(), SPARSE).knobs == [Knobs(VisionSetting(), SPARSE.moe_top_k, ALL_SIX)]


def test_an_axis_that_is_dropped_leaves_the_native_setting() -> None:
    points = expand(sweep("{tiles: [1, 2], active_blocks: [6]}"), DENSE)
    assert points.knobs == [Knobs(VisionSetting(), None, ALL_SIX)]


def test_a_number_of_blocks_and_the_list_of_the_same_blocks_are_one_combination() -> None:
    spec = sweep("{active_blocks: [6, [0, 1, 2, 3, 4, 5], 2, [0, 1], [0, 5]]}")
    assert [knobs.active_blocks for knobs in expand(spec, DENSE).knobs] == [(0, 1), (0, 5), ALL_SIX]
    assert len(plan_of(spec).combinations) == 3


def test_the_models_own_top_k_written_out_is_the_same_combination_as_leaving_it_to_the_model() -> None:
    written = plan_of(sweep(f"{{moe_top_k: [{SPARSE.moe_top_k}]}}", models="tiny-qwen3-vl-moe"))
    assert task_ids(written) == task_ids(plan_of(sweep(models="tiny-qwen3-vl-moe")))


def test_a_value_that_a_model_cannot_take_is_one_skip_with_the_reason_and_costs_no_other_point() -> None:
    spec = sweep("{longest_edge: [16, 32], active_blocks: [3, 8]}", models="tiny-smolvlm, tiny-internvl")
    plan = plan_of(spec, accelerators=["A100", "H100"], datasets=[planned_dataset(3, "one"), planned_dataset(3, "two")])
    assert [str(skip) for skip in plan.skips] == [
        "tiny-smolvlm: longest_edge=16, active_blocks=3: longest_edge must be 32 (one tile) to 4096 pixels",
        "tiny-smolvlm: longest_edge=16, active_blocks=8: longest_edge must be 32 (one tile) to 4096 pixels",
        "tiny-smolvlm: longest_edge=32, active_blocks=8: the model has 6 blocks, so active_blocks must be 1 to 6",
        "tiny-internvl: active_blocks=8: the model has 6 blocks, so active_blocks must be 1 to 6",
    ]
    kept = {(c.model.name, str(c.knobs.vision), len(c.knobs.active_blocks)) for c in plan.combinations}
    assert kept == {("tiny-smolvlm", "longest_edge=32", 3), ("tiny-internvl", "native", 3)}


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ("{moe_top_k: [17]}", "the model has 16 experts, so moe_top_k must be 1 to 16"),
        ("{active_blocks: [[0, 6, 9]]}", "the model has blocks 0 to 5, not 6, 9"),
    ],
)
def test_reasons_name_what_the_model_has(knobs: str, reason: str) -> None:
    points = expand(sweep(knobs), SPARSE)
    assert points.knobs == []
    assert [skip.reason for skip in points.skips] == [reason]


def test_a_tier_goes_into_the_identity_by_what_it_means() -> None:
    """A tier of the sweep's own beside a built-in one; the same name with another range is another combination."""
    tiers = "{tiers: [{name: small, min_crops: 1, max_crops: 2, preferred_crops: [1, 2]}], aspect_distance: log}"
    molmoe = describe("tiny-molmoe")
    points = expand(sweep("{tier: [small, low]}", crop_selection=tiers), molmoe)
    small, low = (knobs.vision for knobs in points.knobs)
    assert small.tier == Tier("small", 1, 2, (1, 2))
    assert low.tier == TIERS["low"]
    assert small.aspect_distance == low.aspect_distance == "log"
    redefined = "{tiers: [{name: low, min_crops: 1, max_crops: 2, preferred_crops: [1, 2], mismatch_threshold: 0.5}]}"
    (other,) = expand(sweep("{tier: [low]}", crop_selection=redefined), molmoe).knobs
    assert other.vision.tier == Tier("low", 1, 2, (1, 2), 0.5)
    ids = {combination_id(knobs=replace(KNOBS, vision=vision)) for vision in (low, other.vision, small)}
    assert len(ids) == 3


def test_options_are_axes_where_a_family_has_them_and_what_it_does_anyway_is_measured_once() -> None:
    axes = "{crops: [2], force_full_tokens: [true, false], resize_to_fill: [true, false]}"
    molmoe = expand(sweep(axes), describe("tiny-molmoe"))
    assert {(k.vision.force_full_tokens, k.vision.resize_to_fill) for k in molmoe.knobs} == set(
        itertools.product([True, False], repeat=2)
    )
    internvl = expand(sweep(axes), describe("tiny-internvl"))
    assert [(k.vision.force_full_tokens, k.vision.resize_to_fill) for k in internvl.knobs] == [
        (None, False),
        (None, True),
    ]
    assert [dropped.axis for dropped in internvl.dropped] == ["force_full_tokens"]
    # Written out or left out, the family's own way is the same combination.
    said = expand(sweep("{crops: [2], force_full_tokens: [false], resize_to_fill: [true]}"), describe("tiny-molmoe"))
    assert said.knobs == expand(sweep("{crops: [2]}"), describe("tiny-molmoe")).knobs
    # A distance that chooses nothing is not part of what is measured.
    distance = "{aspect_distance: log}"
    sized = "{image_size: [560x336]}"
    assert (
        expand(sweep(sized, crop_selection=distance), describe("tiny-molmoe")).knobs
        == expand(sweep(sized), describe("tiny-molmoe")).knobs
    )


def test_every_axis_works_on_every_family_of_crops_and_what_has_no_grid_is_skipped() -> None:
    spec = sweep("{crops: [1, 6, 13]}", models="tiny-molmoe, tiny-internvl, tiny-smolvlm")
    plan = plan_of(spec)
    assert {(c.model.name, c.knobs.vision.value) for c in plan.combinations} == {
        *(("tiny-molmoe", crops) for crops in (1, 6, 13)),
        *(("tiny-internvl", crops) for crops in (1, 6, 13)),
        *(("tiny-smolvlm", crops) for crops in (1, 6)),
    }
    assert [str(skip) for skip in plan.skips] == [
        "tiny-smolvlm: crops=13: no grid of 13 crops has at most 12 rows and columns"
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_choose_among_the_axes_that_are_left(strategy: str) -> None:
    draw = "{strategy: lhs, n: 4, seed: 7}" if strategy == "lhs" else f"{{strategy: {strategy}}}"
    spec = sweep("{longest_edge: [32, 64, 96, 128, 160], moe_top_k: [1, 2, 3]}", sampling=draw)
    left = sample({"longest_edge": [32, 64, 96, 128, 160]}, strategy, 4 if strategy == "lhs" else None, 7)
    points = expand(spec, DENSE)
    assert [knobs.vision.value for knobs in points.knobs] == [point["longest_edge"] for point in left]


def test_latency_is_timed_on_every_kind_of_device_and_accuracy_scored_once() -> None:
    plan = plan_of(sweep("{active_blocks: [3, 6]}"), accelerators=["A100", "H100"])
    assert len(plan.combinations) == 4
    assert sorted((t.kind.value, t.accelerator, t.visit) for t in plan.tasks if t.knobs.active_blocks == ALL_SIX) == [
        ("accuracy", None, 0),
        ("latency", "A100", 0),
        ("latency", "A100", 1),
        ("latency", "H100", 0),
        ("latency", "H100", 1),
    ]
    a100, h100 = (c for c in plan.combinations if c.knobs.active_blocks == ALL_SIX)
    assert a100.accuracy_tasks == h100.accuracy_tasks
    assert not set(a100.latency_tasks) & set(h100.latency_tasks)


def test_either_measurement_can_be_left_out() -> None:
    assert {t.kind for t in plan_of(sweep(latency="off")).tasks} == {Kind.ACCURACY}
    assert {t.kind for t in plan_of(sweep(accuracy="off")).tasks} == {Kind.LATENCY}


def test_every_sample_is_scored_in_exactly_one_task_and_the_first_ones_are_timed() -> None:
    dataset = planned_dataset(2 * SAMPLES_PER_ACCURACY_TASK + 1)
    plan = plan_of(sweep(latency="{samples: 5}"), [dataset])
    scored = [t for t in plan.tasks if t.kind is Kind.ACCURACY]
    assert [len(t.samples) for t in scored] == [SAMPLES_PER_ACCURACY_TASK, SAMPLES_PER_ACCURACY_TASK, 1]
    assert tuple(ref for t in scored for ref in t.samples) == dataset.samples
    assert [t.samples for t in plan.tasks if t.kind is Kind.LATENCY] == [dataset.samples[:5]] * 2


def test_a_task_says_how_it_is_run() -> None:
    spec = sweep(
        latency="{samples: 2, repeats: 7, output_tokens: 9, warmup: 3}",
        accuracy="{batch_size: 5}",
    )
    protocols = {t.kind: t.protocol for t in plan_of(spec, [planned_dataset(4, max_new_tokens=11)]).tasks}
    assert protocols[Kind.LATENCY] == Protocol(
        max_new_tokens=9, batch_size=1, repeats=7, visits=2, warmup=3, max_relative_error=0.02
    )
    assert protocols[Kind.ACCURACY] == Protocol(max_new_tokens=11, batch_size=5, metric="exact_match")


def test_repeats_are_split_over_visits_and_come_back_to_every_combination() -> None:
    spec = sweep("{active_blocks: [2, 4, 6], longest_edge: [32, 64, 128]}", latency="{repeats: 5, visits: 2}")
    plan = plan_of(spec)
    timed = [t for t in plan.tasks if t.kind is Kind.LATENCY]
    assert [t.visit for t in timed] == [0] * 9 + [1] * 9, "all combinations, and then all of them again"
    orders = [[t.knobs for t in timed if t.visit == visit] for visit in (0, 1)]
    assert set(orders[0]) == set(orders[1])
    grid = [c.knobs for c in plan.combinations]
    assert orders[0] != orders[1] != grid != orders[0], "each visit has an order of its own, and none is the grid's"
    shares = [t.protocol.first_repeat(t.visit + 1) - t.protocol.first_repeat(t.visit) for t in timed]
    assert shares == [3] * 9 + [2] * 9
    for combination in plan.combinations:
        visits = {t.task_id: t.visit for t in timed if t.knobs == combination.knobs}
        assert [visits[task_id] for task_id in combination.latency_tasks] == [0, 1]


def test_the_order_follows_from_the_seed_and_keeps_when_combinations_are_added() -> None:
    def order(seed: int, blocks: str) -> list[str]:
        spec = sweep(f"{{active_blocks: {blocks}}}", latency=f"{{visits: 1, seed: {seed}}}")
        return [t.task_id for t in plan_of(spec).tasks if t.kind is Kind.LATENCY]

    few, many = order(0, "[1, 3, 5]"), order(0, "[1, 2, 3, 4, 5, 6]")
    assert [task_id for task_id in many if task_id in few] == few
    assert sorted(order(1, "[1, 2, 3, 4, 5, 6]")) == sorted(many), "the seed is not part of a task"
    assert len({tuple(order(seed, "[1, 2, 3, 4, 5, 6]")) for seed in range(5)}) > 1


def test_there_are_no_more_visits_than_repeats() -> None:
    timed = [t for t in plan_of(sweep(latency="{repeats: 1, visits: 3}")).tasks if t.kind is Kind.LATENCY]
    assert [(t.visit, t.protocol.visits) for t in timed] == [(0, 1)]


def test_batch_sizes_are_combinations_that_share_their_scores() -> None:
    plan = plan_of(sweep("{active_blocks: [3]}", latency="{batch_size: [1, 4]}"))
    assert [c.timed and c.timed.batch_size for c in plan.combinations] == [1, 4]
    one, four = plan.combinations
    assert one.combination_id != four.combination_id
    assert one.accuracy_tasks == four.accuracy_tasks
    assert not set(one.latency_tasks) & set(four.latency_tasks)


def test_the_anchor_is_the_whole_model_at_the_first_vision_level_and_no_part_of_an_id() -> None:
    spec = sweep("{longest_edge: [64, 32], moe_top_k: [1, 4], active_blocks: [3, 6]}", models="tiny-qwen3-vl-moe")
    anchors = {t.anchor for t in plan_of(spec).tasks if t.kind is Kind.LATENCY}
    assert [(a.knobs.moe_top_k, len(a.knobs.active_blocks)) for a in anchors if a is not None] == [(4, 6)]
    by_id = {t.task_id: t for t in plan_of(spec).tasks}
    other = {
        t.task_id: t for t in plan_of(sweep("{moe_top_k: [1], active_blocks: [3]}", models="tiny-qwen3-vl-moe")).tasks
    }
    shared = [by_id[task_id] for task_id in other if by_id[task_id].kind is Kind.LATENCY]
    assert shared
    assert all(task.anchor != other[task.task_id].anchor for task in shared)
    dense = plan_of(sweep("{longest_edge: [64, 32], active_blocks: [3, 6]}"))
    assert {t.anchor and t.anchor.knobs.vision.value for t in dense.tasks if t.kind is Kind.LATENCY} == {32}
    assert {t.anchor for t in dense.tasks if t.kind is Kind.ACCURACY} == {None}


def test_models_that_differ_only_in_what_is_written_out_are_one() -> None:
    spec = sweep("{active_blocks: [6, 8]}", models="tiny-smolvlm, {name: tiny-smolvlm, dtype: float32}")
    plan = plan_of(spec)
    assert len(plan.combinations) == 1
    assert len(plan.skips) == 1
    different = sweep("{active_blocks: [6, 8]}", models="tiny-smolvlm, {name: tiny-smolvlm, dtype: bfloat16}")
    assert len({c.combination_id for c in plan_of(different).combinations}) == 2


def test_a_combination_knows_what_is_promised_where_every_image_gets_the_same() -> None:
    promised = {
        c.knobs.vision.value: c.pinned and c.pinned.vision_tokens
        for c in plan_of(sweep("{longest_edge: [32, 64]}")).combinations
    }
    assert promised == {32: 16, 64: None}


# -- identity ---------------------------------------------------------------------------------------------------------

# When one of these changes on purpose, because a number is obtained in another way, raise PROTOCOL_VERSION in
# workers/tasks.py and put the new ids here; all existing results are then measured again. When the change is not meant
# to alter any number, undo it: everyone's finished tasks would be lost to their next run.
GOLDEN = {Kind.LATENCY: "d21c69778bd449ddcb33202fd902882a", Kind.ACCURACY: "f73c4b162873a2f49b96812a5c2efb49"}


@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_golden_ids(kind: Kind) -> None:
    assert task(kind).task_id == GOLDEN[kind]


REF = samples(1)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"model": replace(MODEL, name="another name in the results")},
        {"model": replace(MODEL, family="internvl")},
        {"model": replace(MODEL, revision="0d5bb15")},
        {"model": replace(MODEL, weights="random")},
        {"model": replace(MODEL, fingerprint="files:fedcba9876543210")},
        {"model": replace(MODEL, dtype="bfloat16")},
        {"model": replace(MODEL, attention="eager")},
        {"model": replace(MODEL, experts="batched_mm")},
        {"model": replace(MODEL, engine="graph")},
        {"knobs": replace(KNOBS, vision=VisionSetting("longest_edge", 65))},
        {"knobs": replace(KNOBS, vision=VisionSetting("longest_edge", "64"))},
        {"knobs": replace(KNOBS, vision=VisionSetting("tiles", 64))},
        {"knobs": replace(KNOBS, vision=VisionSetting())},
        {"knobs": replace(KNOBS, moe_top_k=3)},
        {"knobs": replace(KNOBS, moe_top_k=None)},
        {"knobs": replace(KNOBS, active_blocks=(0, 1, 2))},
        {"knobs": replace(KNOBS, active_blocks=(0, 1, 2, 4))},
        {"dataset": replace(DATASET, name="other")},
        {"dataset": replace(DATASET, split="validation")},
        {"dataset": replace(DATASET, prompt="{question} Be brief.")},
        {"samples": samples(2)},
        {"samples": samples(3)[::-1]},
        {"samples": (replace(REF, digest="0" * 64), *samples(3)[1:])},
        {"samples": (replace(REF, uid="questions:test:a"), *samples(3)[1:])},
        {"protocol.max_new_tokens": 99},
        {"protocol.batch_size": 99},
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_whatever_decides_a_result_changes_the_id(kind: Kind, change: dict[str, Any]) -> None:
    protocol = TIMED if kind is Kind.LATENCY else SCORED
    ((key, value),) = change.items()
    if key.startswith("protocol."):
        change = {"protocol": replace(protocol, **{key.removeprefix("protocol."): value})}
    assert task(kind, **change).task_id != task(kind).task_id


def test_what_decides_only_times_or_only_scores_changes_the_ids_of_those() -> None:
    timed, scored = task(Kind.LATENCY), task(Kind.ACCURACY)
    assert timed.task_id != scored.task_id
    assert task(Kind.LATENCY, accelerator="A100").task_id != timed.task_id
    assert task(Kind.LATENCY, protocol=replace(TIMED, repeats=3)).task_id != timed.task_id
    assert task(Kind.LATENCY, protocol=replace(TIMED, warmup=0)).task_id != timed.task_id
    assert task(Kind.ACCURACY, protocol=replace(SCORED, metric="anls")).task_id != scored.task_id
    # Which questions share an image decides the standard error, and is not part of what a question contains.
    grouped = replace(DATASET, columns=Columns(image_id="image_file"))
    assert task(Kind.ACCURACY, dataset=grouped).task_id != scored.task_id
    assert task(Kind.LATENCY, dataset=grouped).task_id == timed.task_id


@pytest.mark.parametrize(
    "change",
    [
        # The same measurement asked for by a sweep of another name is the same; results of the two never meet, because
        # a folder belongs to one sweep.
        {"sweep": "another"},
        {"task_id": "anything"},
        {"combination_id": "anything"},
        {"model": replace(MODEL, place="/elsewhere/small")},
        {"model": replace(MODEL, moe_renormalization="renormalized")},
        {"dataset": replace(DATASET, path="/elsewhere/questions.parquet")},
        {"dataset": replace(DATASET, path=None, hub_id="somebody/questions", config="all", revision="main")},
        {"dataset": replace(DATASET, columns=Columns(image="picture", question="q", answers="a", id="key"))},
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_what_decides_no_result_leaves_the_id(kind: Kind, change: dict[str, Any]) -> None:
    assert task(kind, **change).task_id == task(kind).task_id


GOLDEN_COMBINATION = "40d05cc8eea3f8c4d4e66ffc90a851c2"


def combination_id(**changes: Any) -> str:
    values = {"model": MODEL, "knobs": KNOBS, "dataset": DATASET, "timed": TIMED, "scored": SCORED} | changes
    return digest(combination_identity(**values))


def test_golden_id_of_a_combination() -> None:
    assert combination_id() == GOLDEN_COMBINATION


@pytest.mark.parametrize(
    "change",
    [
        {"model": replace(MODEL, fingerprint="files:fedcba9876543210")},
        {"knobs": replace(KNOBS, moe_top_k=3)},
        {"dataset": replace(DATASET, name="other")},
        {"dataset": replace(DATASET, split="validation")},
        {"dataset": replace(DATASET, prompt="{question} Be brief.")},
        {"timed": None},
        {"timed": replace(TIMED, max_new_tokens=16)},
        {"timed": replace(TIMED, batch_size=2)},
        {"timed": replace(TIMED, repeats=3)},
        {"timed": replace(TIMED, warmup=0)},
        {"timed": replace(TIMED, max_relative_error=0.01)},
        {"timed": replace(TIMED, max_seconds=10.0)},
        {"scored": None},
        {"scored": replace(SCORED, max_new_tokens=16)},
        {"scored": replace(SCORED, batch_size=2)},
        {"scored": replace(SCORED, metric="anls")},
    ],
    ids=repr,
)
def test_what_the_numbers_of_a_combination_mean_is_in_its_id(change: dict[str, Any]) -> None:
    assert combination_id(**change) != combination_id()


def test_where_files_are_is_not_in_the_id_of_a_combination() -> None:
    assert combination_id(model=replace(MODEL, place="/elsewhere/small")) == combination_id()
    assert combination_id(dataset=replace(DATASET, path="/elsewhere/questions.parquet")) == combination_id()


def test_a_new_way_to_obtain_numbers_makes_new_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    before = combination_id()
    monkeypatch.setattr("orchestrator.plan.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    assert combination_id() != before


def test_another_latency_protocol_makes_another_combination_with_the_scores_that_are_there() -> None:
    (short,) = plan_of(sweep(latency="{samples: 2, output_tokens: 4}")).combinations
    (long,) = plan_of(sweep(latency="{samples: 2, output_tokens: 16}")).combinations
    assert short.combination_id != long.combination_id
    assert short.accuracy_tasks == long.accuracy_tasks
    assert (short.timed and short.timed.max_new_tokens, long.timed and long.timed.max_new_tokens) == (4, 16)
    # How many samples are timed decides how well the numbers are known, not what they mean.
    (better,) = plan_of(sweep(latency="{samples: 4, output_tokens: 4}")).combinations
    assert better.combination_id == short.combination_id
    assert better.latency_tasks != short.latency_tasks


def test_a_measurement_that_is_off_has_no_protocol() -> None:
    (timed,) = plan_of(sweep(accuracy="off")).combinations
    (scored,) = plan_of(sweep(latency="off")).combinations
    assert (timed.scored, scored.timed) == (None, None)
    assert timed.timed is not None
    assert scored.scored is not None


def test_nothing_that_travels_with_a_task_was_forgotten_by_the_tests_above() -> None:
    """A field that is added to what a worker is told must be considered here."""
    names = {kind.__name__: {field.name for field in fields(kind)} for kind in (ModelSource, Knobs, Protocol, Task)}
    assert names == {
        "ModelSource": {
            *("name", "family", "place", "revision", "weights", "fingerprint"),
            *("dtype", "attention", "experts", "engine", "moe_renormalization"),
        },
        "Knobs": {"vision", "moe_top_k", "active_blocks"},
        "Protocol": {
            *("max_new_tokens", "batch_size", "repeats", "visits", "warmup", "metric"),
            *("max_relative_error", "max_seconds"),
        },
        "Task": {
            *("task_id", "combination_id", "kind", "sweep", "accelerator"),
            *("model", "knobs", "dataset", "samples", "protocol", "visit"),
            "anchor",  # decides nothing about the rows
            *("method", "candidates"),  # of importance tasks; see test_block_choice
        },
    }
    assert {field.name for field in fields(DatasetSource)} == {
        *("name", "split", "path", "hub_id", "config", "revision", "columns", "metric", "prompt"),
        "images",  # where they are; what they are is in the samples' digests
    }


def test_a_digest_does_not_depend_on_the_order_of_keys_and_tells_types_apart() -> None:
    assert digest({"a": 1, "b": [2, "ü"]}) == digest({"b": [2, "ü"], "a": 1})
    assert len({digest(value) for value in (1, "1", True, None, "None", [1], {"1": 1}, 1.5)}) == 8


def test_no_two_tasks_of_many_random_sweeps_share_an_id() -> None:
    generator = random.Random(0)
    found: dict[str, tuple[Any, ...]] = {}
    for _ in range(150):
        blocks = [sorted(generator.sample(ALL_SIX, generator.randint(1, 6))) for _ in range(2)]
        levels = {
            "active_blocks": [generator.randint(1, 6), *(b for b in blocks if b != blocks[0] or b is blocks[0])],
            "moe_top_k": sorted({generator.randint(1, 16) for _ in range(3)}),
            generator.choice(["longest_edge", "tiles"]): sorted({generator.randint(1, 300) for _ in range(3)}),
        }
        spec = sweep(
            json.dumps(levels),
            models="tiny-smolvlm, tiny-qwen3-vl-moe, tiny-internvl",
            latency=f"{{samples: {generator.randint(1, 4)}, repeats: {generator.randint(1, 3)}}}",
            accuracy=f"{{batch_size: {generator.randint(1, 4)}}}",
        )
        dataset = planned_dataset(generator.randint(1, 5), generator.choice("ab"), generator.randint(1, 3))
        for t in plan_of(spec, [dataset], accelerators=generator.sample(["H100", "A100", "cpu"], 2)).tasks:
            content = (t.kind, t.accelerator, t.model, t.knobs, t.samples, t.protocol, t.visit)
            assert found.setdefault(t.task_id, content) == content
    assert len(found) > 3000
    assert len(set(found.values())) == len(found)


# -- growing a sweep --------------------------------------------------------------------------------------------------


def test_more_levels_models_and_data_sets_keep_the_ids_that_were_there() -> None:
    small = plan_of(sweep("{longest_edge: [64], active_blocks: [3]}"))
    large = plan_of(
        sweep("{longest_edge: [128, 64, 32], active_blocks: [6, 3]}", models="tiny-qwen3-vl-moe, tiny-smolvlm"),
        [planned_dataset(9, "another"), planned_dataset(4)],
    )
    assert task_ids(small) < task_ids(large)
    assert {c.combination_id for c in small.combinations} < {c.combination_id for c in large.combinations}


def test_more_samples_keep_the_timed_task_the_full_scored_tasks_and_the_combinations() -> None:
    def ids(count: int) -> tuple[set[str], set[str], set[str]]:
        plan = plan_of(sweep(), [planned_dataset(count)])
        timed = {t.task_id for t in plan.tasks if t.kind is Kind.LATENCY}
        return timed, task_ids(plan) - timed, {c.combination_id for c in plan.combinations}

    full, more = ids(2 * SAMPLES_PER_ACCURACY_TASK), ids(3 * SAMPLES_PER_ACCURACY_TASK - 1)
    assert full[0] == more[0]
    assert full[1] < more[1]
    assert len(more[1]) == 3
    assert full[2] == more[2]


# -- the same file is the same plan, wherever, whenever and in whatever order -----------------------------------------

SPEC = """\
# {comment}
name: moved
models: [{models}]
datasets:
{datasets}
knobs:
  longest_edge: {edges}
  active_blocks: {blocks}
"""
PRINT_IDS = """
import json, sys
from orchestrator.plan import make_plan
from orchestrator.resolve import planned_models, resolve_datasets, resolve_models
from orchestrator.spec import load_sweep
sweep = load_sweep(sys.argv[1])
models = planned_models(sweep, resolve_models(sweep, offline=True), ["cpu"])
plan = make_plan(sweep, models, resolve_datasets(sweep), ["cpu"])
print(json.dumps(sorted([c.combination_id, *c.latency_tasks, *c.accuracy_tasks] for c in plan.combinations)))
"""


def write_checkpoint(folder: Path) -> None:
    """What a checkpoint consists of as far as a plan is concerned; nobody loads these weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(DENSE.config)))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(DENSE.preprocessor)))
    (folder / "model.safetensors").write_bytes(b"weights")


def write_questions(folder: Path) -> None:
    folder.mkdir(parents=True)
    for colour in ("red", "green"):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    rows = [
        {"image": f"{colour}.png", "question": f"Which colour? {i}", "answers": [colour]}
        for i, colour in enumerate(("red", "green") * 3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids_in_another_process(spec: Path, hash_seed: str) -> Any:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "HF_DATASETS_CACHE": str(spec.parent / "cache")}
    command = [sys.executable, "-c", PRINT_IDS, str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ids_survive_another_process_another_order_and_another_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "far" / "there"
    write_checkpoint(here / "my-model")
    write_questions(here / "questions")
    demo = "  - {name: demo, samples: 3}"
    for folder, name, text in (
        (here, "first.yaml", SPEC.format(
            comment="as written first", models="my-model, tiny-smolvlm", edges="[32, 64]", blocks="[3, 6]",
            datasets=f"{demo}\n  - {{name: questions/rows.jsonl, metric: exact_match}}",
        )),
        (there, "second.yaml", SPEC.format(
            # The folder by its whole path this time: it is the same model all the same.
            comment="as moved", models=f"tiny-smolvlm, {there / 'models' / 'my-model'}", edges="[64, 32]",
            blocks="[6, 3]", datasets=f"  - {{name: rows, path: {there / 'rows.jsonl'}, metric: exact_match}}\n{demo}",
        )),
    ):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    first = ids_in_another_process(here / "first.yaml", "1")
    shutil.move(here / "my-model", there / "models" / "my-model")
    for file in (here / "questions").iterdir():
        shutil.move(file, there / file.name)
    assert ids_in_another_process(there / "second.yaml", "2") == first
    assert len(first) == 2 * 2 * 2 * 2


def model_ids(spec: Any) -> set[str]:
    return task_ids(plan_of(spec))


def test_a_single_byte_of_any_file_that_a_model_reads_changes_the_ids(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    write_checkpoint(folder)
    (folder / "tokenizer.json").write_text("{}")
    spec = sweep(models=str(folder))
    seen = [model_ids(spec)]
    for file, content in (
        ("model.safetensors", "weightz"),
        ("tokenizer.json", "{ }"),
        ("chat_template.jinja", "{{ messages }}"),
        ("generation_config.json", "{}"),
        ("preprocessor_config.json", json.dumps({**DENSE.preprocessor, "do_normalize": False})),
    ):
        (folder / file).write_text(content)
        seen.append(model_ids(spec))
        assert not seen[-1] & set().union(*seen[:-1]), file
    (folder / "README.md").write_text("not read by any model")
    os.utime(folder / "model.safetensors", (1, 1))
    assert model_ids(spec) == seen[-1]


def test_a_revision_of_the_hub_is_part_of_the_ids() -> None:
    by_revision = {
        revision: model_ids(sweep(models=f"{{name: smolvlm2-256m, revision: {revision}}}"))
        for revision in ("a" * 40, "b" * 40)
    }
    assert not by_revision["a" * 40] & by_revision["b" * 40]


def test_the_comment_and_name_of_a_file_do_not_matter() -> None:
    text = "name: n\nmodels: [tiny-smolvlm]\ndatasets: [demo]\n"
    assert model_ids(parse_sweep(text, "a.yaml")) == model_ids(parse_sweep("# a comment\n" + text, "b.yaml"))


def test_planned_models_of_a_sweep_share_one_data_type() -> None:
    spec = sweep(models="tiny-smolvlm, {name: tiny-internvl, dtype: float16}")
    cards = resolve_models(spec, offline=True)

    def dtypes(*accelerators: str) -> list[str]:
        planned: list[PlannedModel] = planned_models(spec, cards, accelerators)
        return [model.source.dtype for model in planned]

    assert dtypes("cpu") == ["float32", "float16"]
    assert dtypes("cpu", "H100") == ["bfloat16", "float16"]

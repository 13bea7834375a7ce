"""Paired comparisons of combinations against differences known by hand, in simulations, and on a real result folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from orchestrator.analysis import clustered_standard_error, compare
from orchestrator.store import StoreError, read_table

BASE = {
    "model": "m",
    "accelerator": "H100",
    "dataset": "d",
    "vision_knob": "tier",
    "vision_value": "low",
    "tier": "low",
    "moe_top_k": 8,
    "num_active_blocks": 4,
    "active_blocks": [0, 1, 2, 3],
    "engine": "eager",
    "metric": "exact_match",
}
FOUR, EIGHT = {"moe_top_k": 4}, {"moe_top_k": 8}


def made(
    *combinations: dict[str, Any], scores: Sequence[Sequence[float]] = (), times: Sequence[Sequence[float]] = ()
) -> dict[str, pd.DataFrame]:
    """Tables of combinations, each with a list of scores and one of times per sample; images are named by `images`."""
    rows: dict[str, list[dict[str, Any]]] = {"combinations": [], "accuracy": [], "latency": []}
    for number, changes in enumerate(combinations):
        images = changes.get("images")
        name = f"{number:06d}" + "f" * 26
        tasks = [f"{kind} {number}" for kind, given in (("score", scores), ("time", times)) if given]
        rows["combinations"].append({**BASE, "combination_id": name, "task_ids": tasks, **changes})
        rows["combinations"][-1].pop("images", None)
        common = {"combination_id": name, "status": "done", "valid": True}
        for sample, score in enumerate(scores[number] if scores else ()):
            of = {"sample_id": f"s{sample}", "image_id": f"s{sample}" if images is None else images[sample]}
            rows["accuracy"].append({**common, **of, "task_id": f"score {number}", "score": score})
        for sample, took in enumerate(times[number] if times else ()):
            of = {"sample_id": f"s{sample}", "image_id": f"s{sample}" if images is None else images[sample]}
            run = {"task_id": f"time {number}", "batch": sample, "worker": "w"}
            for repeat, factor in enumerate((1.0, 1.0, 9.0)):
                rows["latency"].append({**common, **of, **run, "repeat": repeat, "total_ms": took * factor})
    return {table: pd.DataFrame(found) for table, found in rows.items() if found}


def digits(text: str) -> list[float]:
    return [float(digit) for digit in text]


def test_a_published_pair_and_how_much_less_certain_it_is_unpaired() -> None:
    a, b = digits("1011011011"), digits("1001010011")
    (row,) = compare(made(FOUR, EIGHT, scores=[a, b]), FOUR, EIGHT).to_dict("records")
    assert (row["num_samples"], row["num_images"], row["only_a"], row["only_b"]) == (10, 10, 0, 0)
    assert (row["accuracy_a"], row["accuracy_b"]) == (0.7, 0.5)
    assert row["difference"] == pytest.approx(-0.2)
    assert row["difference_se"] == pytest.approx(0.133333, abs=1e-6)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((-0.501621, 0.101621), abs=1e-3)
    assert row["p_value"] == row["p_holm"] == pytest.approx(0.167851, abs=1e-6)
    assert row["mcnemar_p"] == 0.5
    assert (row["better"], row["worse"], row["equal"]) == (0, 2, 8)
    unpaired = math.hypot(*(np.std(scores, ddof=1) / math.sqrt(10) for scores in (a, b)))
    assert unpaired == pytest.approx(0.226078, abs=1e-6)
    assert (row["moe_top_k_a"], row["moe_top_k_b"], row["num_active_blocks"]) == (4, 8, 4)
    assert row["num_timed"] == 0
    assert pd.isna(row["speed_up"])
    assert pd.isna(row["same_workers"])


def test_questions_about_one_image_are_not_independent() -> None:
    scores = [[0.0, 1, 0, 1, 0, 0], [1.0, 1, 0, 1, 1, 0]]
    tables = made({**FOUR, "images": "xxyyzz"}, {**EIGHT, "images": "xxyyzz"}, scores=scores)
    (row,) = compare(tables, FOUR, EIGHT).to_dict("records")
    # Differences 1 0 0 0 1 0: deviations sum to 1/3, -2/3, 1/3 by image; Miller's formula by hand.
    squares = 2 * (2 / 3) ** 2 + 4 * (1 / 3) ** 2
    error = math.sqrt(squares / 5 / 6 + (1 / 9 + 4 / 9 + 1 / 9 - squares) / 36)
    assert row["difference_se"] == pytest.approx(error)
    assert row["num_images"] == 3
    # Two degrees of freedom, of which the distribution is t / sqrt(2 + t^2).
    t = 1 / 3 / error
    assert row["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert row["difference_high"] - row["difference"] == pytest.approx(4.302653 * error, rel=1e-6)
    # McNemar's test knows of no images.
    assert pd.isna(row["mcnemar_p"])


def test_an_image_without_a_name_counts_for_itself() -> None:
    tables = made(FOUR, EIGHT, scores=[digits("0011"), digits("0111")])
    tables["accuracy"]["image_id"] = None
    assert compare(tables, FOUR, EIGHT)["num_images"].tolist() == [4]


def test_one_image_says_nothing_of_how_images_differ() -> None:
    tables = made({**FOUR, "images": "xxx"}, {**EIGHT, "images": "xxx"}, scores=[digits("001"), digits("011")])
    (row,) = compare(tables, FOUR, EIGHT).to_dict("records")
    assert row["difference"] == pytest.approx(1 / 3)
    assert all(pd.isna(row[f"difference_{name}"]) for name in ("se", "low", "high"))
    assert pd.isna(row["p_value"])


@pytest.mark.parametrize(
    ("after", "images", "chance"),
    [([1.0] * 6, "uvwxyz", 2**-5), ([1.0] * 6, "xxxyyz", 2**-2), ([0.0] * 6, "uvwxyz", 1.0)],
)
def test_samples_that_all_differ_by_the_same_give_no_interval(after: list[float], images: str, chance: float) -> None:
    tables = made({**FOUR, "images": images}, {**EIGHT, "images": images}, scores=[[0.0] * 6, after])
    (row,) = compare(tables, FOUR, EIGHT).to_dict("records")
    assert (row["difference"], row["difference_se"]) == (after[0], 0)
    assert pd.isna(row["difference_low"])
    assert pd.isna(row["difference_high"])
    assert row["p_value"] == chance


def test_rounding_is_no_difference_between_samples() -> None:
    scores = [[0.6, 0.3, 0.0, 0.9], [0.9, 0.6, 0.3, 0.9 + 0.1 + 0.2]]
    (row,) = compare(made(FOUR, EIGHT, scores=scores), FOUR, EIGHT).to_dict("records")
    assert (row["difference_se"], row["p_value"], row["better"]) == (0, 0.125, 4)


def test_samples_that_one_side_lacks_are_counted_and_left_out() -> None:
    tables = made(FOUR, EIGHT, scores=[digits("00110101"), digits("01110101")])
    rows = tables["accuracy"]
    invalid = (rows["task_id"] == "score 1") & rows["sample_id"].isin(["s0", "s4"])
    failed = (rows["task_id"] == "score 0") & (rows["sample_id"] == "s2")
    rows.loc[invalid, "valid"] = False
    rows.loc[failed, ["status", "score"]] = ["failed", None]
    tables["accuracy"] = rows[~((rows["task_id"] == "score 0") & (rows["sample_id"] == "s7"))]
    (row,) = compare(tables, FOUR, EIGHT).to_dict("records")
    assert (row["num_samples"], row["only_a"], row["only_b"]) == (4, 2, 2)
    assert (row["accuracy_a"], row["accuracy_b"]) == (0.5, 0.75)


def test_a_task_that_several_combinations_share_counts_for_each_of_them() -> None:
    tables = made(*({**k, "engine": engine} for k in (FOUR, EIGHT) for engine in ("eager", "graph")))
    rows = made({}, {}, scores=[digits("0011"), digits("0111")])["accuracy"]
    tables["combinations"]["task_ids"] = [["score 0"], ["score 0"], ["score 1"], ["score 1"]]
    found = compare(tables | {"accuracy": rows}, FOUR, EIGHT)
    assert found["engine"].tolist() == ["eager", "graph"]
    assert found["accuracy_a"].tolist() == [0.5, 0.5]
    assert found["accuracy_b"].tolist() == [0.75, 0.75]
    # The same answers twice are one test, not two.
    assert found["p_holm"].tolist() == found["p_value"].tolist()
    (same, _) = compare(tables | {"accuracy": rows}, {"engine": "eager"}, {"engine": "graph"}).to_dict("records")
    assert (same["difference"], same["equal"]) == (0, 4)
    assert pd.isna(same["p_value"])
    assert pd.isna(same["p_holm"])


def test_chances_are_adjusted_for_how_many_there_are() -> None:
    grid = [{"model": model, **k} for model in "mno" for k in (FOUR, EIGHT)]
    base = digits("0011" * 5)
    scores = [base, digits("0111" * 5), base, digits("1011" + "0011" * 4), base, digits("0111" * 3 + "0011" * 2)]
    found = compare(made(*grid, scores=scores), FOUR, EIGHT)
    first, second, third = sorted(found["p_value"])
    assert sorted(found["p_holm"]) == pytest.approx([3 * first, 2 * second, third])
    assert found.sort_values("p_value")["model"].tolist() == ["m", "o", "n"]


# -- time -------------------------------------------------------------------------------------------------------------


def test_speed_up_is_a_ratio_of_the_same_batches() -> None:
    times = [[10.0, 20.0, 40.0, 30.0], [5.0, 10.0, 20.0]]
    tables = made(EIGHT, FOUR, times=times)
    tables["latency"].loc[tables["latency"]["total_ms"] == 20.0, "total_ms"] *= 1.1
    (row,) = compare(tables, EIGHT, FOUR).to_dict("records")
    ratios = pd.Series([math.log(x) for x in (2.0, 2.2, 40 / 22)])
    assert row["num_timed"] == 3
    assert (row["total_ms_a"], row["total_ms_b"]) == pytest.approx((72 / 3, 37 / 3))
    assert row["total_ms_difference"] == pytest.approx(-35 / 3)
    assert row["speed_up"] == pytest.approx(math.exp(ratios.mean()))
    error = clustered_standard_error(ratios, pd.Series(range(3)))
    assert error is not None
    assert row["speed_up_high"] / row["speed_up"] == pytest.approx(math.exp(4.302653 * error), rel=1e-6)
    assert row["speed_up_low"] * row["speed_up_high"] == pytest.approx(row["speed_up"] ** 2)
    assert row["same_workers"] is True
    assert row["num_samples"] == 0


def batches(task: str, size: int, times: Sequence[float]) -> pd.DataFrame:
    rows = [
        {"batch": batch, "repeat": repeat, "total_ms": took, "sample_id": f"s{sample}"}
        for batch, took in enumerate(times)
        for repeat in range(2)
        for sample in range(size * batch, size * (batch + 1))
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(image_id=frame["sample_id"], task_id=task, status="done", valid=True, worker="w")


def test_a_batch_is_one_measurement_and_only_the_same_batches_are_compared() -> None:
    combinations = made(FOUR, EIGHT, {**EIGHT, "timed_batch_size": 1})["combinations"]
    combinations["task_ids"] = [["a"], ["b"], ["c"]]
    combinations["timed_batch_size"] = [2, 2, 1]
    latency = pd.concat([batches("a", 2, [8.0, 6.0, 5]), batches("b", 2, [4.0, 3, 2]), batches("c", 1, [1.0] * 6)])
    tables = {"combinations": combinations, "latency": latency}
    (row,) = compare(tables, FOUR, EIGHT).to_dict("records")
    assert row["num_timed"] == 3
    assert row["total_ms_a"] == pytest.approx(19 / 3)
    assert row["speed_up"] == pytest.approx(10 ** (1 / 3))
    with pytest.raises(ValueError, match="no sample in common"):
        compare(tables, {"timed_batch_size": 1, "moe_top_k": 8}, {"timed_batch_size": 2, "moe_top_k": ...})


def test_batches_of_the_same_images_are_not_independent() -> None:
    combinations = made(FOUR, EIGHT)["combinations"]
    combinations["task_ids"] = [["a"], ["b"]]
    times = {"a": [8.0, 8.2, 9.0, 9.2], "b": [4.0, 4.0, 4.0, 4.0]}
    images = dict(zip([f"s{n}" for n in range(8)], "xyyxzzzz", strict=True))
    latency = pd.concat([batches(task, 2, took) for task, took in times.items()])
    latency["image_id"] = latency["sample_id"].map(images)
    (row,) = compare({"combinations": combinations, "latency": latency}, EIGHT, FOUR).to_dict("records")
    error = clustered_standard_error(-pd.Series(times["a"]), pd.Series([1, 1, 2, 2]))
    assert error is not None
    # Two clusters leave one degree of freedom.
    assert row["total_ms_difference_high"] - row["total_ms_difference"] == pytest.approx(12.706205 * error, rel=1e-6)


def test_disturbed_times_do_not_count_and_visits_do_as_one() -> None:
    combinations = made(FOUR, EIGHT)["combinations"]
    combinations["task_ids"] = [["a", "a again"], ["b"]]
    disturbed = batches("a again", 1, [80.0, 80.0, 80.0]).assign(valid=[True, False, True, False, False, False])
    latency = pd.concat([batches("a", 1, [8.0, 8.0, 8.0]), disturbed, batches("b", 1, [4.0, 4.0, 4.0])])
    (row,) = compare({"combinations": combinations, "latency": latency}, FOUR, EIGHT).to_dict("records")
    assert row["total_ms_a"] == 8
    assert row["speed_up"] == pytest.approx(2)
    assert pd.isna(row["speed_up_low"])
    assert row["same_workers"] is True


def test_it_says_when_other_workers_timed_the_other_side() -> None:
    combinations = made(FOUR, EIGHT)["combinations"]
    combinations["task_ids"] = [["a"], ["b"]]
    other = batches("b", 1, [4.0, 4.5]).assign(worker="v")
    latency = pd.concat([batches("a", 1, [8.0, 8.0]), other])
    found = compare({"combinations": combinations, "latency": latency}, FOUR, EIGHT)
    assert found["same_workers"].tolist() == [False]


def test_results_of_earlier_releases_have_neither_batches_nor_workers() -> None:
    tables = made(FOUR, EIGHT, times=[[8.0, 6.0], [4.0, 2.0]])
    tables["latency"] = tables["latency"].drop(columns=["batch", "worker"])
    assert compare(tables, FOUR, EIGHT)["num_timed"].tolist() == [2]


# -- what the intervals promise ---------------------------------------------------------------------------------------

WORLDS = 1000


def simulated(effect: float, images: int, questions: int, seed: int) -> pd.DataFrame:
    """Many comparisons at once: images differ in how hard they are, and in what b adds to a on them."""
    draw = np.random.default_rng(seed)
    shape = (WORLDS, images, questions)
    hard = draw.uniform(0.2, 0.7, (WORLDS, images, 1))
    gain = effect + draw.uniform(-0.15, 0.15, (WORLDS, images, 1))
    before, after = draw.random(shape) < hard, draw.random(shape) < hard + gain
    names = [f"{k} {world}" for world in range(WORLDS) for k in (4, 8)]
    rows = pd.DataFrame({"score": np.stack([before, after], 1).reshape(-1).astype(float)})
    rows["task_id"] = np.repeat(names, images * questions)
    rows["sample_id"] = np.tile([f"s{n}" for n in range(images * questions)], 2 * WORLDS)
    rows["image_id"] = np.tile(np.repeat([f"i{n}" for n in range(images)], questions), 2 * WORLDS)
    combinations = pd.DataFrame({"combination_id": names, "task_ids": [[name] for name in names]})
    combinations["moe_top_k"] = [4, 8] * WORLDS
    combinations["model"] = np.repeat([f"m{world}" for world in range(WORLDS)], 2)
    tables = {"combinations": combinations, "accuracy": rows.assign(status="done", valid=True)}
    return compare(tables, FOUR, EIGHT)


@pytest.mark.parametrize(("images", "questions"), [(60, 1), (40, 4), (12, 5)])
def test_95_of_100_intervals_hold_the_difference(images: int, questions: int) -> None:
    found = simulated(0.1, images, questions, seed=images)
    assert len(found) == WORLDS
    held = (found["difference_low"] <= 0.1) & (found["difference_high"] >= 0.1)
    assert 0.93 <= held.mean() <= 0.97
    assert found["difference"].mean() == pytest.approx(0.1, abs=0.01)


def test_where_there_is_no_difference_one_in_twenty_seems_one_until_they_are_adjusted() -> None:
    found = simulated(0.0, 30, 4, seed=5)
    assert 0.03 <= (found["p_value"] < 0.05).mean() <= 0.07
    assert found["p_holm"].min() > 0.05


def test_pairing_and_intervals_agree_with_the_chance() -> None:
    found = simulated(0.1, 40, 2, seed=7)
    outside = (found["difference_low"] > 0) | (found["difference_high"] < 0)
    # The quantile is an expansion, within 0.2 % of the distribution.
    clear = (found["p_value"] - 0.05).abs() > 0.001
    assert (outside == (found["p_value"] < 0.05))[clear].all()


def test_95_of_100_intervals_hold_the_speed_up() -> None:
    draw, count = np.random.default_rng(3), 20
    names = [f"{k} {world}" for world in range(WORLDS) for k in (4, 8)]
    size = draw.lognormal(3, 0.5, (WORLDS, 1, count))
    ratio = np.array([1.0, 1.25])[:, None] * draw.lognormal(0, 0.05, (WORLDS, 2, count))
    rows = pd.DataFrame({"total_ms": (size * ratio).reshape(-1), "task_id": np.repeat(names, count)})
    rows["sample_id"] = rows["image_id"] = np.tile([f"s{n}" for n in range(count)], 2 * WORLDS)
    combinations = pd.DataFrame({"combination_id": names, "task_ids": [[name] for name in names]})
    combinations["moe_top_k"] = [4, 8] * WORLDS
    combinations["model"] = np.repeat([f"m{world}" for world in range(WORLDS)], 2)
    latency = rows.assign(status="done", valid=True, repeat=0, batch=None, worker="w")
    found = compare({"combinations": combinations, "latency": latency}, EIGHT, FOUR)
    held = (found["speed_up_low"] <= 1.25) & (found["speed_up_high"] >= 1.25)
    assert 0.93 <= held.mean() <= 0.97


# -- which are compared -----------------------------------------------------------------------------------------------


def grid() -> dict[str, pd.DataFrame]:
    """Two models, three top-k, two lengths; every score is that of its combination."""
    points = [
        {"model": model, "moe_top_k": k, "num_active_blocks": n, "active_blocks": list(range(n))}
        for model in "mn"
        for k in (2, 4, 8)
        for n in (4, 6)
    ]
    return made(*points, scores=[digits("01" * n) for n in range(2, 2 + len(points))])


def test_all_that_is_not_set_on_both_sides_is_alike() -> None:
    tables = grid()
    assert len(compare(tables, FOUR, EIGHT)) == 4
    several = compare(tables, EIGHT, {"moe_top_k": [2, 4]})
    assert several[["model", "num_active_blocks", "moe_top_k_b"]].values.tolist() == [
        [model, n, k] for model in "mn" for n, k in ((4, 2), (4, 4), (6, 2), (6, 4))
    ]
    # A value that only one side sets holds for both.
    one = compare(tables, {"model": "m", **FOUR}, {**EIGHT, "num_active_blocks": 6})
    assert one[["model", "num_active_blocks"]].values.tolist() == [["m", 6]]
    both = compare(tables, {"active_blocks": 4, **FOUR}, {"active_blocks": 6, **EIGHT})
    assert both[["num_active_blocks_a", "num_active_blocks_b"]].values.tolist() == [[4, 6]] * 2
    assert both["active_blocks_a"].tolist() == [(0, 1, 2, 3)] * 2
    blocks = compare(tables, {"active_blocks": [0, 1, 2, 3]}, {"active_blocks": [0, 1, 2, 3, 4, 5]})
    assert len(blocks) == 6


def test_one_combination_against_another_or_against_all() -> None:
    tables = grid()
    ids = tables["combinations"]["combination_id"].tolist()
    (row,) = compare(tables, ids[0], "000011").to_dict("records")
    assert (row["combination_a"], row["combination_b"]) == (ids[0], ids[11])
    assert (row["model_a"], row["model_b"], row["moe_top_k_a"], row["moe_top_k_b"]) == ("m", "n", 2, 8)
    like = compare(tables, ids[0], EIGHT)
    assert like["combination_b"].tolist() == [ids[4]]
    rest = compare(tables, ids[0], {"moe_top_k": ..., "num_active_blocks": ...})
    assert set(rest["combination_b"]) == set(ids[1:6])
    everything = compare(tables, ids[0], {"combination_id": ...})
    assert set(everything["combination_b"]) == set(ids[1:])


def test_vision_settings_are_named_as_in_a_sweep_and_may_lack_options() -> None:
    tables = made(
        {"force_full_tokens": False},
        {"vision_value": "high", "tier": "high", "force_full_tokens": False},
        {"vision_value": "high", "tier": "high", "force_full_tokens": True},
        {"vision_knob": "native", "vision_value": None, "tier": None, "force_full_tokens": None},
        {"vision_knob": "crops", "vision_value": "12", "tier": None, "force_full_tokens": True},
        scores=[digits("0101")] * 5,
    )
    tiers = compare(tables, {"tier": "low"}, {"tier": "high"})
    assert tiers[["vision_value_a", "vision_value_b"]].values.tolist() == [["low", "high"]]
    native = compare(tables, {"vision_knob": "native"}, {"tier": ...})
    assert native["force_full_tokens_b"].tolist() == [False, True, False]
    assert compare(tables, {"tier": "high"}, {"crops": 12})["vision_knob_b"].tolist() == ["crops"]


def test_a_model_may_lack_experts() -> None:
    dense = {"model": "dense", "moe_top_k": None}
    tables = made(FOUR, EIGHT, dense, scores=[digits("0101")] * 3)
    found = compare(tables, {"model": "dense"}, {"model": "m"})
    assert found["moe_top_k_b"].tolist() == [4, 8]
    assert len(compare(tables, {"moe_top_k": None, "model": ...}, {**FOUR, "model": ...})) == 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"moe_topk": 4}, EIGHT, "cannot be selected by moe_topk, did you mean moe_top_k"),
        ({"accuracy": 4}, EIGHT, "cannot be selected by accuracy"),
        ({"moe_top_k": 3}, EIGHT, r"no combination has moe_top_k=3; there are 2, 4, 8$"),
        ({"moe_top_k": [3, 5]}, EIGHT, "no combination has moe_top_k=3 or 5"),
        ({"model": "m", "combination_id": "000011"}, EIGHT, "no combination has model=m and combination_id=000011 at"),
        ("00", EIGHT, "'00' is too short for the beginning"),
        ("00001x", EIGHT, "no combination_id begins with '00001x'"),
        (EIGHT, EIGHT, "select the same combinations"),
        (FOUR, {"num_active_blocks": 6}, "set what may differ in both"),
        ({"model": "m", **FOUR}, {"model": "n", "num_active_blocks": 4}, None),
        ({"model": "m", "num_active_blocks": 4}, {"model": "m", "moe_top_k": 2, "num_active_blocks": 4}, "select|set"),
    ],
)
def test_what_cannot_be_selected_or_compared_is_said_in_a_line(a: Any, b: Any, message: str | None) -> None:
    if message is None:
        assert len(compare(grid(), a, b)) == 1
        return
    with pytest.raises(ValueError, match=message) as caught:
        compare(grid(), a, b)
    assert "\n" not in str(caught.value)


def test_it_says_what_stands_between_two_selections() -> None:
    tables = made({"model": "m", "num_active_blocks": 4}, {"model": "n", "num_active_blocks": 6})
    with pytest.raises(ValueError, match="differ in num_active_blocks; set what may differ in both"):
        compare(tables, {"model": "m"}, {"model": "n"})


def test_the_beginning_of_two_ids_is_ambiguous_unless_it_is_one_of_them() -> None:
    tables = made(FOUR, EIGHT, EIGHT, scores=[digits("01")] * 3)
    tables["combinations"]["combination_id"] = ["abcdef", "abcdef1", "abcdef12"]
    assert compare(tables, "abcdef", "abcdef12")["combination_a"].tolist() == ["abcdef"]
    tables["combinations"]["combination_id"] = ["abcdef0", "abcdef1", "abcdef12"]
    with pytest.raises(ValueError, match="'abcdef' is the beginning of 3 combination ids: abcdef0, abcdef1, abcdef12"):
        compare(tables, "abcdef", "abcdef12")
    assert len(compare(tables, "abcdef1", "abcdef12")) == 1


def test_an_id_is_the_same_on_every_kind_of_device() -> None:
    points = [{**k, "accelerator": kind} for k in (FOUR, EIGHT) for kind in ("A100", "H100")]
    tables = made(*points, scores=[digits("01")] * 4)
    tables["combinations"]["combination_id"] = ["first1", "first1", "second", "second"]
    assert compare(tables, "first1", "second")["accelerator"].tolist() == ["A100", "H100"]
    devices = compare(tables, {"accelerator": "A100"}, {"accelerator": "H100"})
    assert devices["moe_top_k"].tolist() == [4, 8]
    assert (devices["combination_a"] == devices["combination_b"]).all()


def test_combinations_without_a_common_sample_cannot_be_compared() -> None:
    tables = made(FOUR, EIGHT, scores=[digits("01")] * 2)
    tables["accuracy"].loc[tables["accuracy"]["task_id"] == "score 1", "sample_id"] += " of another draw"
    with pytest.raises(ValueError, match="no sample in common that is done and valid in both"):
        compare(tables, FOUR, EIGHT)


def test_tables_that_are_missing_or_empty_are_named() -> None:
    tables = made(FOUR, EIGHT, scores=[digits("01")] * 2)
    with pytest.raises(ValueError, match="no table combinations among accuracy"):
        compare({"accuracy": tables["accuracy"]}, FOUR, EIGHT)
    with pytest.raises(ValueError, match="holds no combinations"):
        compare(tables | {"combinations": tables["combinations"].iloc[:0]}, FOUR, EIGHT)
    with pytest.raises(ValueError, match="no column task_ids"):
        compare(tables | {"combinations": tables["combinations"].drop(columns="task_ids")}, FOUR, EIGHT)
    with pytest.raises(ValueError, match="the table accuracy has no column score"):
        compare(tables | {"accuracy": tables["accuracy"].drop(columns="score")}, FOUR, EIGHT)
    with pytest.raises(ValueError, match="does not say which tasks it is made of"):
        compare(tables | {"combinations": tables["combinations"].assign(task_ids=None)}, FOUR, EIGHT)
    with pytest.raises(ValueError, match="no sample in common"):
        compare({"combinations": tables["combinations"]}, FOUR, EIGHT)


def test_the_order_of_rows_does_not_matter() -> None:
    tables = grid()
    expected = compare(tables, {"moe_top_k": ...}, EIGHT)
    for seed in range(3):
        shuffled = {name: rows.sample(frac=1, random_state=seed) for name, rows in tables.items()}
        pd.testing.assert_frame_equal(compare(shuffled, {"moe_top_k": ...}, EIGHT), expected, rtol=1e-12)


def test_rows_that_stand_twice_count_once() -> None:
    tables = made(FOUR, EIGHT, scores=[digits("0101"), digits("0111")], times=[[8.0, 6.0], [4.0, 2.0]])
    twice = {name: pd.concat([rows, rows]) for name, rows in tables.items()}
    pd.testing.assert_frame_equal(compare(twice, FOUR, EIGHT), compare(tables, FOUR, EIGHT))


def test_turned_round_the_signs_are_turned_round() -> None:
    tables = made(FOUR, EIGHT, scores=[digits("010111"), digits("011101")], times=[[8.0, 6.0], [4.0, 2.0]])
    (row,), (back,) = (compare(tables, *pair).to_dict("records") for pair in ((FOUR, EIGHT), (EIGHT, FOUR)))
    assert (back["difference"], back["difference_low"]) == pytest.approx((-row["difference"], -row["difference_high"]))
    assert (back["better"], back["p_value"]) == (row["worse"], pytest.approx(row["p_value"]))
    assert (back["speed_up"], back["speed_up_low"]) == pytest.approx((1 / row["speed_up"], 1 / row["speed_up_high"]))


# -- a result folder --------------------------------------------------------------------------------------------------


def test_a_real_folder_by_path_or_by_tables(small_results: Path) -> None:
    found = compare(small_results, {"num_active_blocks": 6}, {"num_active_blocks": 2})
    combinations = read_table(small_results, "combinations")
    assert len(found) == len(combinations) / 2 == 4
    assert found["num_samples"].eq(4).all()
    accuracies = combinations.set_index("combination_id")["accuracy"]
    assert found["accuracy_a"].tolist() == pytest.approx(accuracies[found["combination_a"]].tolist())
    assert found["accuracy_b"].tolist() == pytest.approx(accuracies[found["combination_b"]].tolist())
    # A disturbed machine may leave fewer.
    assert found["num_timed"].le(2).all()
    assert found["num_timed"].dtype == "int64"
    tables = {name: pd.read_parquet(small_results / name) for name in ("combinations", "accuracy", "latency")}
    again = compare(tables, {"num_active_blocks": 6}, {"num_active_blocks": 2})
    pd.testing.assert_frame_equal(again, found, check_dtype=False, rtol=1e-12)


def test_a_real_folder_by_the_beginning_of_ids(small_results: Path) -> None:
    rows = read_table(small_results, "combinations").set_index("vision_value")
    few, many = (rows.loc[edge].iloc[0]["combination_id"] for edge in ("32", "64"))
    (row,) = compare(str(small_results), few[:8], many[:8]).to_dict("records")
    assert (row["combination_a"], row["combination_b"]) == (few, many)
    assert (row["vision_value_a"], row["vision_value_b"], row["model"]) == ("32", "64", "tiny-smolvlm")


def test_only_the_parts_behind_the_selection_are_opened_and_the_newest_of_two(
    small_results: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_results, folder)
    expected = compare(folder, {"moe_top_k": 1}, {"moe_top_k": 4})
    for path in (folder / "accuracy").rglob("*.parquet"):
        if "smolvlm" in str(path):
            path.write_bytes(b"damaged")
    part = next(path for path in (folder / "accuracy").rglob("*.parquet") if "qwen" in str(path))
    older = folder / "accuracy" / "model=tiny-qwen3-vl-moe" / "accelerator=Other" / "dataset=demo" / part.name
    older.parent.mkdir(parents=True)
    older.write_bytes(b"of a run that died")
    os.utime(older, (1, 1))
    pd.testing.assert_frame_equal(compare(folder, {"moe_top_k": 1}, {"moe_top_k": 4}), expected)
    part.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="cannot be read"):
        compare(folder, {"moe_top_k": 1}, {"moe_top_k": 4})


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no combinations"):
        compare(tmp_path, FOUR, EIGHT)

"""From values of candidates on samples to scores with standard errors, and measures of how far a ranking holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from knobs.block_tree import single_ablations
from knobs.importance import Method
from orchestrator.analysis.importance import (
    block_scores,
    block_values,
    candidate_values,
    kendall_tau,
    selection_stability,
    split_half_tau,
)

WHOLE, WITHOUT_0, WITHOUT_1, WITHOUT_2 = single_ablations(3)


def rows(values: dict[str, dict[tuple[int, ...], float]], images: dict[str, str] | None = None) -> pd.DataFrame:
    found: list[dict[str, Any]] = [
        {"sample_id": s, "image_id": (images or {}).get(s, s), "blocks": list(blocks), "value": value}
        for s, by_blocks in values.items()
        for blocks, value in by_blocks.items()
    ]
    return pd.DataFrame(found)


DROPS = {"a": (3.0, 1.0, 0.0), "b": (5.0, 0.0, -1.0), "c": (4.0, 2.0, 1.0)}
ABLATED = {
    sample: {WHOLE: base} | {blocks: base - drop for blocks, drop in zip(single_ablations(3)[1:], drops, strict=True)}
    for (sample, drops), base in zip(DROPS.items(), (10.0, -100.0, 3.0), strict=True)
}


@pytest.mark.parametrize("method", [Method.NLL, Method.ACCURACY_DROP])
def test_differences_are_paired_by_sample(method: Method) -> None:
    scores = block_scores(rows(ABLATED), method, 3, {"model": "abc"})
    assert scores.scores == pytest.approx((4.0, 1.0, 0.0))
    # Each has deviations -1, 0 and 1, however much the samples differ from one another.
    assert scores.standard_errors == pytest.approx([math.sqrt(1 / 3)] * 3)
    assert scores.method is method
    assert scores.about == {"model": "abc", "samples": "3", "images": "3"}


@pytest.mark.parametrize("method", [Method.ACTIVATION, Method.SIMILARITY])
def test_what_a_block_changes_is_averaged_as_it_is(method: Method) -> None:
    measured = {sample: {(block,): drop for block, drop in enumerate(drops)} for sample, drops in DROPS.items()}
    scores = block_scores(rows(measured), method, 3)
    assert scores.scores == pytest.approx((4.0, 1.0, 0.0))
    assert scores.standard_errors == pytest.approx([math.sqrt(1 / 3)] * 3)


def test_questions_about_one_image_are_one_cluster() -> None:
    twice = {f"{sample}{i}": values for sample, values in ABLATED.items() for i in (1, 2)}
    alone = block_scores(rows(twice), Method.NLL, 3)
    together = block_scores(rows(twice, {sample: sample[0] for sample in twice}), Method.NLL, 3)
    assert together.scores == alone.scores
    # Miller's estimate divides within clusters by n - 1 and across by n: here 4/30 + 4/36 against 4/30.
    assert together.standard_errors == pytest.approx([math.sqrt(4 / 30 + 4 / 36)] * 3)
    assert alone.standard_errors == pytest.approx([math.sqrt(4 / 30)] * 3)
    one_image = block_scores(rows(twice, dict.fromkeys(twice, "x")), Method.NLL, 3)
    assert one_image.standard_errors == (None, None, None)


def test_the_order_of_the_rows_and_rows_that_came_twice_mean_nothing() -> None:
    frame = rows(ABLATED)
    again = pd.concat([frame.sample(frac=1, random_state=1), frame.head(5)], ignore_index=True)
    again["blocks"] = [np.array(blocks) for blocks in again["blocks"]]  # as they come out of Parquet
    assert block_scores(again, Method.NLL, 3) == block_scores(frame, Method.NLL, 3)
    assert candidate_values(again) == candidate_values(frame)


def test_samples_that_lack_a_value_are_left_out() -> None:
    partly = ABLATED | {"d": {WHOLE: 7.0, WITHOUT_0: 0.0}}
    assert block_scores(rows(partly), Method.NLL, 3) == block_scores(rows(ABLATED), Method.NLL, 3)
    with pytest.raises(ValueError, match="no sample has a value of nll for each of 4 blocks"):
        block_scores(rows(ABLATED), Method.NLL, 4)


def test_values_of_candidates() -> None:
    values = candidate_values(rows(ABLATED | {"d": {WITHOUT_2: 1.0}}))
    assert set(values) == set(single_ablations(3))
    assert values[WHOLE].mean == pytest.approx(-29.0)
    assert values[WITHOUT_2].mean == pytest.approx((10 - 99 + 2 + 1) / 4)
    lone = candidate_values(rows({"a": {WHOLE: 2.0}}))[WHOLE]
    assert (lone.mean, lone.standard_error) == (2.0, None)


def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # One pair tied on the left: 5 untied pairs there and 6 on the right, all 5 agreeing.
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(30))
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0


def noisy(noise: float, samples: int = 400) -> pd.DataFrame:
    random = np.random.default_rng(0)
    return pd.DataFrame(np.arange(6) + noise * random.standard_normal((samples, 6)))


def test_two_sets_agree_more_the_larger_they_are_and_the_less_noise_there_is() -> None:
    assert split_half_tau(noisy(0.0), 5) == 1
    few, many = (split_half_tau(noisy(4.0), size, draws=100) for size in (4, 200))
    assert few < 0.6 < 0.8 < many
    assert split_half_tau(noisy(10.0), 4, draws=20) == split_half_tau(noisy(10.0), 4, draws=20), "seeded"
    with pytest.raises(ValueError, match="two sets of 201 samples need 402, not 400"):
        split_half_tau(noisy(1.0), 201)


def test_how_often_other_samples_would_select_the_same_blocks() -> None:
    images = pd.Series([f"image {i}" for i in range(400)])
    assert selection_stability(noisy(0.0), images, 4) == 1
    sure, unsure = (selection_stability(noisy(noise), images, 4, keep=()) for noise in (1.0, 40.0))
    assert unsure < 0.8 < sure
    # Questions about one image vary together: with few images the same number of samples says less.
    few_images = pd.Series([f"image {i % 4}" for i in range(400)])
    together = noisy(3.0).groupby(few_images).transform("first")
    assert selection_stability(together, few_images, 4, keep=()) < selection_stability(together, images, 4, keep=())


def test_values_are_samples_by_blocks() -> None:
    values, images = block_values(rows(ABLATED, {"a": "x", "b": "x", "c": "y"}), Method.NLL, 3)
    assert values.to_numpy().tolist() == [list(drops) for drops in DROPS.values()]
    assert images.to_dict() == {"a": "x", "b": "x", "c": "y"}

"""Validation of the vision knob against tables with known answers, and through a sweep to what it prints."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from orchestrator.analysis import (
    validate_accuracy_benefits,
    validate_distortion,
    validate_token_utilization,
    validation,
)
from orchestrator.summary import print_vision_checks

FULL = {"force_full_tokens": True, "resize_to_fill": True}
SHARED = {"force_full_tokens": False, "resize_to_fill": True}


def row(sample: str, tier: str = "medium", score: float = 1.0, **changes: Any) -> dict[str, Any]:
    """A scored row of a sample whose image has the same name."""
    crops = {"low": 2, "medium": 6, "high": 12}[tier]
    return {
        "model": "m",
        "dataset": "d",
        "metric": "exact_match",
        "vision_knob": "tier",
        "vision_value": tier,
        "tier": tier,
        "tier_definition": f"{{{tier}}}",
        "aspect_distance": "linear",
        **SHARED,
        "moe_top_k": 4,
        "num_active_blocks": 2,
        "active_blocks": [0, 1],
        "dtype": "float32",
        "sample_id": sample,
        "image_id": sample,
        "status": "done",
        "valid": True,
        "score": score,
        "selected_crops": crops,
        "aspect_mismatch": 0.1,
        "theoretical_vision_tokens": 1000,
        "predicted_vision_tokens": 700,
        "actual_vision_tokens": 700,
        **changes,
    }


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows)


def test_distortion_over_images_against_the_limits_of_the_guide() -> None:
    rows = [row(str(i), aspect_mismatch=i / 1000) for i in range(101)]
    found = validate_distortion(frame(*rows)).iloc[0]
    assert found["num_images"] == 101
    assert found["mean_mismatch"] == pytest.approx(0.05)
    assert found["std_mismatch"] == pytest.approx(math.sqrt(101 * 102 / 12) / 1000)
    assert (found["max_mismatch"], found["p95_mismatch"]) == pytest.approx((0.1, 0.095))
    assert found["p99_mismatch"] == pytest.approx(0.099)
    assert found["ok"]


@pytest.mark.parametrize(
    ("mismatches", "ok"),
    [
        ([0.19] * 100, True),
        ([0.25] * 100, False),  # the mean
        ([0.1] * 90 + [0.45] * 10, False),  # one in ten beyond 0.4
        ([0.1] * 97 + [0.45] * 3, True),
        ([0.1] * 98 + [0.61] * 2, False),  # one in fifty beyond 0.6
    ],
)
def test_each_limit_counts(mismatches: list[float], ok: bool) -> None:
    rows = [row(str(i), aspect_mismatch=value) for i, value in enumerate(mismatches)]
    assert list(validate_distortion(frame(*rows))["ok"]) == [ok]


def test_an_image_counts_once_per_setting_whatever_asks_about_it() -> None:
    rows = [
        row("a", aspect_mismatch=0.3),
        row("another question", image_id="a", aspect_mismatch=0.3),
        row("a", moe_top_k=1, aspect_mismatch=0.3),
        row("b"),
        row("c", image_id=None),
        row("d", image_id=None, status="failed"),
        row("e", aspect_mismatch=None),
        row("a", "low", aspect_mismatch=0.5),
    ]
    found = validate_distortion(frame(*rows))
    assert list(found["vision_value"]) == ["medium", "low"]
    assert list(found["num_images"]) == [3, 1]
    assert found["mean_mismatch"].tolist() == pytest.approx([0.5 / 3, 0.5])


def test_utilization_against_the_tower_and_against_the_closed_form() -> None:
    rows = [
        *(row(str(i), actual_vision_tokens=700) for i in range(3)),
        row("short", actual_vision_tokens=630),
        *(row(f"full {i}", **FULL, actual_vision_tokens=1000, predicted_vision_tokens=1000) for i in range(2)),
    ]
    shared, full = (line for _, line in validate_token_utilization(frame(*rows)).iterrows())
    assert (shared["mean_utilization"], shared["min_utilization"]) == pytest.approx((0.6825, 0.63))
    assert shared["p5_utilization"] == pytest.approx(0.63 + 0.15 * 0.07)
    assert shared["mean_as_predicted"] == pytest.approx(0.975)
    assert not shared["ok"]
    assert (full["mean_utilization"], full["mean_as_predicted"]) == (1, 1)
    assert full["ok"]


def test_tokens_that_are_missing_are_shown_although_their_rows_do_not_count() -> None:
    rows = frame(row("a", **FULL, actual_vision_tokens=900, predicted_vision_tokens=1000, valid=False))
    assert validate_token_utilization(rows)["mean_utilization"].tolist() == [0.9]


def test_the_gain_of_a_tier_is_paired_and_its_error_clustered() -> None:
    low = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    high = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    images = ["x", "x", "y", "y", "z", "z"]
    rows = [row(str(i), "low", score, image_id=images[i]) for i, score in enumerate(low)]
    rows += [row(str(i), "high", score, image_id=images[i]) for i, score in enumerate(high)]
    rows.append(row("only in one", "low", 1.0))
    found = validate_accuracy_benefits(frame(*rows))
    assert found[["from_tier", "to_tier", "num_samples"]].values.tolist() == [["low", "high", 6]]
    step = found.iloc[0]
    assert (step["from_accuracy"], step["to_accuracy"], step["gain"]) == pytest.approx((2 / 6, 4 / 6, 1 / 3))
    # Differences 1 0 0 0 1 0: deviations sum to 1/3, -2/3, 1/3 by image; Miller's formula by hand.
    plain = (2 * (2 / 3) ** 2 + 4 * (1 / 3) ** 2) / 5 / 6
    cross = ((1 / 9 + 4 / 9 + 1 / 9) - (2 * (2 / 3) ** 2 + 4 * (1 / 3) ** 2)) / 36
    assert step["gain_se"] == pytest.approx(math.sqrt(plain + cross))
    assert step["ok"]


def test_tiers_are_compared_in_order_of_size_and_only_with_their_like() -> None:
    rows = [row(str(i), tier, 0.5, moe_top_k=k) for i in range(4) for tier in ("high", "low", "medium") for k in (1, 4)]
    rows += [row(str(i), "low", 0.9, active_blocks=[0, 2], moe_top_k=4) for i in range(4)]
    rows += [row(str(i), "low", 0.9, resize_to_fill=False) for i in range(4)]
    rows += [row(str(i), "medium", 0.9) | {"vision_knob": "crops", "tier": None} for i in range(4)]
    rows += [row("bad", "low", 0.0, valid=False), row("bad", "medium", 1.0)]
    found = validate_accuracy_benefits(frame(*rows))
    steps = found[["moe_top_k", "from_tier", "to_tier", "gain"]].values.tolist()
    assert sorted(steps) == [[k, a, b, 0.0] for k in (1, 4) for a, b in [("low", "medium"), ("medium", "high")]]
    assert not found["ok"].any()


def test_combinations_of_one_tier_are_never_mixed() -> None:
    def rows(tier: str, combination: str, score: float, **changes: Any) -> list[dict[str, Any]]:
        return [row(str(i), tier, score, combination_id=combination, **changes) for i in range(4)]

    wide = {"tier_definition": "{low, wider}", "selected_crops": 3}
    every = [
        *rows("low", "a", 0.0),
        *rows("low", "wide", 0.5, **wide),
        *rows("medium", "b", 1.0),
        *rows("medium", "c", 0.25),
    ]
    found = validate_accuracy_benefits(frame(*every))
    assert list(found["from_tier"]) == ["low"] * 4
    assert list(found["to_tier"]) == ["medium"] * 4
    steps = {(line["from_combination"], line["to_combination"]): line["gain"] for _, line in found.iterrows()}
    assert steps == {("a", "b"): 1.0, ("a", "c"): 0.25, ("wide", "b"): 0.5, ("wide", "c"): -0.25}
    assert list(found["num_samples"]) == [4] * 4


def test_two_definitions_of_a_tier_count_apart_without_combinations() -> None:
    other = {"tier_definition": "{low, other}"}
    rows = [row("x", "low", 0.0), row("y", "low", 1.0, **other), row("x", score=1.0), row("y", score=1.0)]
    found = validate_accuracy_benefits(frame(*rows))
    assert found[["num_samples", "gain"]].values.tolist() == [[1, 1.0], [1, 0.0]]


def test_the_smaller_of_two_combinations_comes_first() -> None:
    rows = [row("x", "low", 0.0, combination_id="a"), row("x", "low", 0.0, combination_id="b", selected_crops=7)]
    rows += [row("x", "medium", 1.0, combination_id="c")]
    found = validate_accuracy_benefits(frame(*rows))
    assert found[["from_tier", "to_tier", "gain"]].values.tolist() == [["low", "medium", 1.0], ["medium", "low", -1.0]]


def test_rows_without_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="no column score; the gain of a tier needs rows of the accuracy table"):
        validate_accuracy_benefits(frame(row("a")).drop(columns="score"))


def test_a_gain_of_one_point_is_not_more_than_one_point() -> None:
    rows = [row(str(i), "low", 0.0) for i in range(100)] + [row(str(i), "high", float(i == 0)) for i in range(100)]
    assert list(validate_accuracy_benefits(frame(*rows))["ok"]) == [False]
    rows[150]["score"] = 1.0
    assert list(validate_accuracy_benefits(frame(*rows))["ok"]) == [True]


def test_nothing_to_judge_is_an_empty_table() -> None:
    rows = frame(row("a", aspect_mismatch=None, theoretical_vision_tokens=None) | {"tier": None})
    for validate in (validate_distortion, validate_token_utilization, validate_accuracy_benefits):
        found = validate(rows)
        assert found.empty
        assert "ok" in found


def test_the_examples_in_the_documentation() -> None:
    assert doctest.testmod(validation).failed == 0
    assert doctest.testmod(validation).attempted > 0


def test_the_summary_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(str(i), "low", 0.0, aspect_mismatch=0.5) for i in range(4)]
    rows += [row(str(i), "medium", 1.0) for i in range(4)] + [row(str(i), "high", 1.0, **FULL) for i in range(4)]
    print_vision_checks(frame(*rows))
    shown = capsys.readouterr().out
    assert "tier low " in shown
    assert "0.50!" in shown
    assert "tier high, full tokens" in shown
    assert "m on d: low to medium +100.0 ± 0.0 points of accuracy (paired, 4 samples, ± standard error)\n" in shown
    print_vision_checks(pd.DataFrame())
    assert capsys.readouterr().out == ""


def test_a_result_folder_can_be_judged_with_pandas_alone(small_results: Path) -> None:
    rows = pd.read_parquet(small_results / "accuracy")
    assert (validate_token_utilization(rows)["mean_as_predicted"] == 1).all()
    distortion = validate_distortion(rows)
    assert len(distortion)
    assert distortion["num_images"].gt(1).all()

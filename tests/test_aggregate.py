"""The row of a knob combination from hand-made sample rows, every column against a number worked out by hand."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from handmade import failed_row, frame, samples, scored_row, task, timed_row

from orchestrator.analysis import aggregate, half_width_95
from workers.schema import STAGES, STATISTICS, SUMMARISED, to_table
from workers.tasks import Kind

TIMED, SCORED = task(Kind.LATENCY), task(Kind.ACCURACY)
NO_LATENCY, NO_ACCURACY = frame("latency", []), frame("accuracy", [])
A, B, C, D = samples(4)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning of pandas or numpy is a number that was made from nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def latency(*rows: dict[str, Any]) -> dict[str, Any]:
    return aggregate(frame("latency", rows), NO_ACCURACY)


def accuracy(*rows: dict[str, Any]) -> dict[str, Any]:
    return aggregate(NO_LATENCY, frame("accuracy", rows))


# -- latency ----------------------------------------------------------------------------------------------------------


def test_times_are_summarised_over_every_repeat_of_every_sample() -> None:
    found = latency(
        timed_row(TIMED, A, 0, 60),
        timed_row(TIMED, A, 1, 66),
        timed_row(TIMED, B, 0, 120),
        timed_row(TIMED, B, 1, 126),
    )
    assert found["num_timed"] == 4
    assert found["num_invalid"] == 0
    assert found["total_ms_mean"] == pytest.approx(93)
    assert found["total_ms_p50"] == pytest.approx(93)
    assert found["total_ms_std"] == pytest.approx(math.sqrt((33**2 + 27**2 + 27**2 + 33**2) / 3))
    # Two clusters of deviations (-33, -27) and (27, 33): their squares sum to 3636, their sums are 60.
    error = math.sqrt(3636 / 12 + (2 * 3600 - 3636) / 16)
    assert found["total_ms_ci95"] == pytest.approx(half_width_95(2) * error)
    for stage in STAGES:
        assert found[f"{stage}_mean"] == pytest.approx(93 / 6)
    assert found["ttft_ms_mean"] == pytest.approx(93 * 5 / 6)
    assert found["tpot_ms_mean"] == pytest.approx(93 / 18)
    assert all(found[f"{name}_{p}"] is None for name in SUMMARISED for p in ("p90", "p95", "p99"))


def test_every_summarised_column_has_every_statistic() -> None:
    found = latency(timed_row(TIMED, A), timed_row(TIMED, B))
    assert {f"{name}_{statistic}" for name in SUMMARISED for statistic in STATISTICS} <= found.keys()


def test_percentiles_appear_one_by_one_as_the_rows_suffice() -> None:
    rows = [timed_row(TIMED, ref, total_ms=float(i)) for i, ref in enumerate(samples(131), start=1)]
    found = latency(*rows)
    assert found["total_ms_p90"] == pytest.approx(1 + 0.9 * 130)
    assert found["total_ms_p95"] == pytest.approx(1 + 0.95 * 130)
    assert found["total_ms_p99"] is None
    assert latency(*rows[:129])["total_ms_p95"] is None


def test_invalid_rows_are_left_out_and_counted() -> None:
    disturbed = timed_row(TIMED, A, 1, 9000, valid=False, invalid_reasons=["throttled"], peak_memory_bytes=10**12)
    found = latency(timed_row(TIMED, A, 0, 60), disturbed, timed_row(TIMED, B, 0, 66))
    assert (found["num_timed"], found["num_invalid"]) == (2, 1)
    assert found["total_ms_mean"] == pytest.approx(63)
    assert found["peak_memory_bytes"] is None
    assert found["num_failed"] == 0


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_a_row_that_does_not_say_whether_it_is_valid_is_not(unknown: object) -> None:
    rows = frame("latency", [timed_row(TIMED, A, 0, 60), timed_row(TIMED, A, 1, 9000)])
    found = aggregate(rows.assign(valid=pd.Series([True, unknown], dtype=object)), NO_ACCURACY)
    assert (found["num_timed"], found["num_invalid"], found["total_ms_mean"]) == (1, 1, 60)


def test_failed_rows_are_counted_by_sample_and_measured_by_nobody() -> None:
    found = aggregate(
        frame("latency", [timed_row(TIMED, A), failed_row(TIMED, B)]),
        frame("accuracy", [scored_row(SCORED, A), failed_row(SCORED, B), failed_row(SCORED, C)]),
        lost=[C.uid, D.uid],
    )
    assert found["num_failed"] == 3  # B, C and D, each once
    assert (found["num_timed"], found["num_invalid"]) == (1, 0)
    assert (found["num_samples"], found["accuracy"]) == (1, 1.0)


def test_the_time_per_output_token_of_one_token_is_null_and_nothing_else_is() -> None:
    one_token = {"tpot_ms": None, "decode_ms": 0.0, "decode_step_ms": [], "output_tokens": 1}
    found = latency(timed_row(TIMED, A, **one_token), timed_row(TIMED, B, **one_token))
    assert all(found.get(f"tpot_ms_{statistic}") is None for statistic in STATISTICS)
    assert found["decode_ms_mean"] == 0
    assert found["total_ms_mean"] == 60


def test_a_null_among_numbers_is_not_a_zero() -> None:
    found = latency(timed_row(TIMED, A, tpot_ms=None), timed_row(TIMED, B, tpot_ms=4.0))
    assert found["tpot_ms_mean"] == 4
    assert found["tpot_ms_ci95"] is None


def test_memory_is_the_largest_and_the_residual_a_mean_of_fractions() -> None:
    found = latency(
        timed_row(TIMED, A, 0, 50, residual_ms=1.0, peak_memory_bytes=300, kv_cache_bytes=7),
        timed_row(TIMED, B, 0, 100, residual_ms=4.0, peak_memory_bytes=200, kv_cache_bytes=9),
    )
    assert found["residual_fraction"] == pytest.approx((1 / 50 + 4 / 100) / 2)
    assert (found["peak_memory_bytes"], found["kv_cache_bytes"]) == (300, 9)


def test_a_batch_is_one_measurement_however_many_samples_it_has() -> None:
    whole = [timed_row(TIMED, ref, repeat, 100 + 10 * repeat, batch=0) for ref in (A, B) for repeat in (0, 1)]
    found = latency(*whole, timed_row(TIMED, C, 0, 200, batch=1))
    assert found["num_timed"] == 3
    assert found["total_ms_mean"] == pytest.approx((100 + 110 + 200) / 3)


def test_rows_of_earlier_releases_know_of_no_batches() -> None:
    rows = [timed_row(TIMED, ref, 0, total, batch=None, visit=None) for ref, total in ((A, 60), (B, 90))]
    found = latency(*rows)
    assert (found["num_timed"], found["total_ms_mean"], found["visit_spread"]) == (2, 75, None)


def test_the_visits_are_compared_on_the_batches_that_all_have() -> None:
    rows = [
        *(timed_row(TIMED, ref, repeat, 100, batch=i) for i, ref in enumerate((A, B)) for repeat in (0, 1)),
        *(timed_row(TIMED, ref, 2, 104, batch=i, visit=1) for i, ref in enumerate((A, B))),
        timed_row(TIMED, C, 0, 1000, batch=2),  # in the second visit it is invalid
        timed_row(TIMED, C, 2, 5000, batch=2, visit=1, valid=False, invalid_reasons=["cpu_busy"]),
    ]
    assert latency(*rows)["visit_spread"] == pytest.approx(0.04)
    assert latency(*rows[:4])["visit_spread"] is None


def test_corrected_times_stand_beside_the_others_if_every_row_has_one() -> None:
    rows = frame("latency", [timed_row(TIMED, A, 0, 100), timed_row(TIMED, B, 0, 130), timed_row(TIMED, C, 0, 120)])
    times = pd.DataFrame({f"{name}_corrected": rows[name] / 2 for name in SUMMARISED})
    found = aggregate(rows.join(times), NO_ACCURACY)
    assert (found["total_ms_p50"], found["total_ms_corrected_p50"]) == (120, 60)
    assert found["total_ms_corrected_mean"] == found["total_ms_mean"] / 2
    times.loc[1, "total_ms_corrected"] = None  # a worker without an anchor
    found = aggregate(rows.join(times), NO_ACCURACY)
    assert "total_ms_corrected_mean" not in found
    assert found["prefill_ms_corrected_mean"] == found["prefill_ms_mean"] / 2


def test_memory_energy_and_back_ends_are_those_of_the_rows() -> None:
    rows = [
        timed_row(TIMED, A, weights_bytes=1000, peak_reserved_bytes=70, energy_j=2.0, attention="eager"),
        timed_row(TIMED, B, weights_bytes=1000, peak_reserved_bytes=90, energy_j=4.0, attention="eager"),
        timed_row(TIMED, C, weights_bytes=1000, energy_j=None, attention="eager"),
    ]
    found = latency(*rows)
    assert (found["weights_bytes"], found["peak_reserved_bytes"], found["energy_j"]) == (1000, 90, 3.0)
    assert (found["attention"], found["experts"]) == ("eager", "grouped_mm")


def test_devices_of_one_kind_with_two_names_are_both_named() -> None:
    assert latency(timed_row(TIMED, A))["device_name"] == "Some GPU 80GB"
    found = latency(timed_row(TIMED, A, device_name="H100 PCIe"), timed_row(TIMED, B, device_name="H100 SXM"))
    assert found["device_name"] == "H100 PCIe, H100 SXM"


@pytest.mark.parametrize("timed", [[], [failed_row(TIMED, B)], [timed_row(TIMED, A, valid=False)]])
def test_where_nothing_was_timed_the_device_is_the_one_that_scored(timed: list[dict[str, Any]]) -> None:
    scored = frame("accuracy", [scored_row(SCORED, A, device_name="A100 SXM"), failed_row(SCORED, B)])
    assert aggregate(frame("latency", timed), scored)["device_name"] == "A100 SXM"
    assert aggregate(frame("latency", [timed_row(TIMED, A)]), scored)["device_name"] == "Some GPU 80GB"


# -- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_a_mean_of_scores_whose_error_is_clustered_by_image() -> None:
    scores = [1, 1, 0, 0, 1, 1]
    rows = [
        scored_row(SCORED, ref, score, image_id=image, output_tokens=tokens)
        for ref, score, image, tokens in zip(samples(6), scores, "aabbcc", [1, 2, 3, 4, 5, 9], strict=True)
    ]
    found = accuracy(*rows)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["accuracy_se"] == pytest.approx(0.285450, abs=1e-6)
    assert (found["num_samples"], found["num_failed"]) == (6, 0)
    assert found["output_tokens_mean"] == 4
    assert found["metric"] == "exact_match"


# -- vision -----------------------------------------------------------------------------------------------------------


def test_what_became_of_the_images() -> None:
    crops = [4, 6, 4, 1]
    rows = [
        scored_row(
            SCORED,
            ref,
            selected_crops=count,
            theoretical_vision_tokens=(count + 1) * 10,
            actual_num_crops=count + 1,
            actual_vision_tokens=(count + 1) * 5,
            aspect_mismatch=mismatch,
            prompt_tokens=100 + count,
        )
        for ref, count, mismatch in zip(samples(4), crops, [0.0, 0.1, 0.2, 0.4], strict=True)
    ]
    found = accuracy(*rows)
    assert json.loads(found["selected_crops_distribution"]) == {"1": 1, "4": 2, "6": 1}
    assert found["selected_crops_mean"] == 3.75
    assert found["selected_crops_std"] == pytest.approx(np.std(crops, ddof=1))
    assert found["actual_num_crops_mean"] == 4.75
    assert found["actual_vision_tokens_mean"] == 4.75 * 5
    assert found["actual_vision_tokens_std"] == pytest.approx(5 * np.std(crops, ddof=1))
    assert found["token_utilization_mean"] == pytest.approx(0.5)
    assert found["aspect_mismatch_mean"] == pytest.approx(0.175)
    assert found["aspect_mismatch_p95"] == pytest.approx(0.2 + 0.85 * 0.2)
    assert found["aspect_mismatch_p99"] == pytest.approx(0.2 + 0.97 * 0.2)
    assert found["prompt_tokens_mean"] == 103.75


def test_an_image_counts_once_however_often_it_was_timed() -> None:
    rows = [timed_row(TIMED, A, repeat, selected_crops=9) for repeat in range(9)]
    found = latency(*rows, timed_row(TIMED, B, selected_crops=1))
    assert json.loads(found["selected_crops_distribution"]) == {"1": 1, "9": 1}
    assert found["selected_crops_mean"] == 5


def test_images_are_those_that_were_scored_or_else_those_that_were_timed() -> None:
    timed = frame("latency", [timed_row(TIMED, A, prompt_tokens=10)])
    scored = frame("accuracy", [scored_row(SCORED, A, prompt_tokens=20)])
    nothing_scored = frame("accuracy", [failed_row(SCORED, A)])
    assert aggregate(timed, scored)["prompt_tokens_mean"] == 20
    assert aggregate(timed, NO_ACCURACY)["prompt_tokens_mean"] == 10
    assert aggregate(timed, nothing_scored)["prompt_tokens_mean"] == 10


def test_a_family_that_promises_nothing_leaves_the_promises_null() -> None:
    unknown = ("selected_crops", "theoretical_vision_tokens", "aspect_mismatch")
    found = accuracy(*(scored_row(SCORED, ref, **dict.fromkeys(unknown)) for ref in (A, B)))
    null = (
        *("selected_crops_distribution", "selected_crops_mean", "selected_crops_std", "token_utilization_mean"),
        *("aspect_mismatch_mean", "aspect_mismatch_p95", "aspect_mismatch_p99"),
    )
    assert {name: found[name] for name in null} == dict.fromkeys(null)
    assert found["actual_vision_tokens_mean"] == 80


# -- whoever measured -------------------------------------------------------------------------------------------------


def test_rows_of_several_workers_give_what_one_worker_alone_would_have_given() -> None:
    generator = np.random.default_rng(3)
    refs = samples(40)
    timed = [timed_row(TIMED, ref, r, float(generator.uniform(50, 90))) for ref in refs for r in range(4)]
    scored = [scored_row(SCORED, ref, float(i % 3 == 0), image_id=str(i // 4)) for i, ref in enumerate(refs)]
    alone = aggregate(frame("latency", timed), frame("accuracy", scored))

    def by_three(table: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
        order = generator.permutation(len(rows))
        parts = [
            frame(table, [{**rows[i], "worker": f"h100-{w}"} for i in order if i % 3 == w])
            for w in (2, 0, 1)  # as they happen to arrive
        ]
        return pd.concat(parts)  # labels of rows repeat, as they do when frames are simply put together

    together = aggregate(by_three("latency", timed), by_three("accuracy", scored))
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert together[name] == expected, name


# -- little or nothing ------------------------------------------------------------------------------------------------


def test_nothing_measured_is_nothing_claimed() -> None:
    assert aggregate(NO_LATENCY, NO_ACCURACY) == {"num_invalid": 0, "num_failed": 0}


def test_one_single_row_has_a_mean_and_no_spread() -> None:
    found = aggregate(frame("latency", [timed_row(TIMED, A)]), frame("accuracy", [scored_row(SCORED, A, 0.3)]))
    assert (found["total_ms_mean"], found["total_ms_p50"]) == (60, 60)
    assert (found["accuracy"], found["num_samples"], found["num_timed"]) == (0.3, 1, 1)
    spread = ("total_ms_std", "total_ms_ci95", "accuracy_se", "selected_crops_std", "actual_vision_tokens_std")
    assert {name: found[name] for name in spread} == dict.fromkeys(spread)


@pytest.mark.parametrize("broken", [failed_row(TIMED, A), timed_row(TIMED, A, valid=False)])
def test_nothing_usable_timed(broken: dict[str, Any]) -> None:
    found = aggregate(frame("latency", [broken]), frame("accuracy", [scored_row(SCORED, A)]))
    assert found["num_timed"] == 0
    assert "total_ms_mean" not in found
    assert "peak_memory_bytes" not in found
    assert found["accuracy"] == 1


def test_nothing_usable_scored() -> None:
    found = aggregate(frame("latency", [timed_row(TIMED, A)]), frame("accuracy", [failed_row(SCORED, A)]))
    assert "accuracy" not in found
    assert found["num_failed"] == 1
    assert found["total_ms_mean"] == 60


def test_everything_it_says_is_a_declared_column_of_the_declared_type() -> None:
    found = aggregate(frame("latency", [timed_row(TIMED, A)]), frame("accuracy", [scored_row(SCORED, A)]))
    stored = to_table("combinations", [found]).to_pylist()[0]
    assert {name: stored[name] for name in found} == found

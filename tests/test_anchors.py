"""Workers by their anchors: what is planted is found, noise is not, intervals hold, corrections bring truth back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from handmade import STARTED, frame, samples, task, timed_row

from orchestrator.analysis import corrected, findings_in_words, half_width_95, worker_trends
from orchestrator.analysis.anchors import CHANCE, MOST_OVERHEAD, _chance_of_t
from workers.schema import (
    PARTITIONS,
    STAGES,
    SUMMARISED,
    WORKER_COLUMNS,
    arrow_schema,
)
from workers.tasks import Kind

TIMED = task(Kind.LATENCY)
PLACE = {"model": "small", "accelerator": "H100", "dataset": "questions"}
# What the anchor takes, by timing.
TRUTH = dict.fromkeys(STAGES, 15.0) | {"tpot_ms": 5.0, "ttft_ms": 75.0, "total_ms": 90.0}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning of pandas or numpy is a number that was made from nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def at(hours: float) -> datetime:
    return STARTED + timedelta(hours=hours)


def run(
    worker: str,
    calls: int = 12,
    *,
    seed: int = 0,
    bias: float = 0.0,
    drift: float = 0.0,
    overhead: float = 0.0,
    noise: float = 0.005,
    noise_in_call: float = 0.002,
    pairs: int = 3,
    hours: float = 4.0,
    begin: float = 0.0,
    timings: Mapping[str, float] = TRUTH,
    **changes: Any,
) -> list[dict[str, Any]]:
    """The anchors of one process of a worker, evenly spread over some hours, with independent noise of every timing."""
    generator = np.random.default_rng([seed, *worker.encode(), calls])
    rows: list[dict[str, Any]] = []
    for call in range(calls):
        hour = hours * call / max(calls - 1, 1)
        level = math.log1p(bias) + math.log1p(drift) * hour + generator.normal(0, noise, len(timings))
        for pair in range(pairs):
            for marked in (True, False) if (call + pair) % 2 else (False, True):
                logs = level + marked * math.log1p(overhead) + generator.normal(0, noise_in_call, len(timings))
                times = dict(zip(timings, np.exp(logs) * list(timings.values()), strict=True))
                rows.append(
                    {
                        "worker": worker,
                        "session_started_at": at(begin - 0.1),
                        "anchor_id": "anchor",
                        "device_name": "Some GPU 80GB",
                        "visit": call,
                        "pair": pair,
                        "marked": marked,
                        "sample_id": "questions:test:0",
                        "status": "done",
                        "valid": True,
                        "started_at": at(begin + hour) + timedelta(milliseconds=100 * len(rows)),
                        **(times if marked else {"total_ms": times["total_ms"]}),
                        **changes,
                    }
                )
    return rows


def trends(*runs: list[dict[str, Any]], **place: str) -> pd.DataFrame:
    return worker_trends(pd.DataFrame([row for rows in runs for row in rows]).assign(**PLACE | place))


def line(found: pd.DataFrame, worker: str, timing: str = "total_ms") -> pd.Series:
    rows = found[(found["worker"] == worker) & (found["timing"] == timing)]
    assert len(rows) == 1
    return rows.iloc[0]


def all_findings(found: pd.DataFrame) -> set[tuple[str, str]]:
    return {(w, f) for w, findings in zip(found["worker"], found["findings"], strict=True) for f in findings}


def timed(
    worker: str, hours: float, total_ms: float | None = 90.0, begin: float = 0.0, **changes: Any
) -> dict[str, Any]:
    session = {"session_started_at": at(begin - 0.1), "started_at": at(begin + hours)}
    return {"worker": worker, "anchor_id": "anchor"} | session | dict.fromkeys(SUMMARISED, total_ms) | PLACE | changes


# -- what is measured -------------------------------------------------------------------------------------------------


def test_one_worker_by_hand() -> None:
    rows = run("h100-0", 4, hours=3, pairs=1, noise=0, noise_in_call=0)
    for call, factor in enumerate((1.00, 1.02, 1.01, 1.03)):
        for of_call in rows[2 * call : 2 * call + 2]:
            of_call |= {name: of_call[name] * factor for name in TRUTH if name in of_call}
            of_call["started_at"] = at(call)
    found = line(trends(rows), "h100-0")
    logs = np.log([1.00, 1.02, 1.01, 1.03])
    slope = float(np.array([-1.5, -0.5, 0.5, 1.5]) @ logs) / 5
    left = logs - logs.mean() - slope * np.array([-1.5, -0.5, 0.5, 1.5])
    spread = math.sqrt(float(left @ left) / 2)
    assert found["num_anchors"] == 4
    assert found["anchor_ms"] == pytest.approx(90 * math.exp(logs.mean()))
    assert found["drift_per_hour"] == pytest.approx(math.expm1(slope))
    assert found["spread"] == pytest.approx(spread)
    # Of the residuals + - + - no neighbours are alike, so that nothing is widened.
    reach = math.expm1(half_width_95(3) * spread / math.sqrt(5)) * math.exp(slope)
    assert found["drift_per_hour_ci95"] == pytest.approx(reach)
    assert (found["first_at"], found["last_at"]) == (at(0), at(3))


def test_there_is_a_row_per_run_anchor_and_timing() -> None:
    found = trends(
        run("h100-0"), run("h100-1"), run("h100-1", begin=9), run("h100-0", engine="graph", anchor_id="graph")
    )
    assert list(found.columns) == [c.name for c in (*PARTITIONS, *WORKER_COLUMNS)]
    assert len(found) == 4 * len(SUMMARISED)
    assert found["anchor"].nunique() == 2
    assert not found.duplicated(["anchor", "worker", "session_started_at", "timing"]).any()
    assert found.loc[found["timing"] != "total_ms", "overhead"].isna().all()
    assert found["overhead"].notna().sum() == 4


def test_the_anchor_in_words() -> None:
    rows = [timed_row(TIMED, samples(1)[0], visit=0, pair=0, marked=True, force_full_tokens=True, resize_to_fill=False)]
    found = worker_trends(frame("anchors", rows))
    words = (
        "longest_edge 64, full tokens, letterbox, top-k 2, 4 blocks, 4 tokens, float32 sdpa grouped_mm eager, sample "
    )
    assert set(found["anchor"]) == {words + "questions:test:0"}


def test_a_planted_drift() -> None:
    found = trends(*(run(f"cpu-{i}", 20, drift=0.03 if i == 0 else 0.0) for i in range(3)))
    drift = line(found, "cpu-0")
    assert abs(drift["drift_per_hour"] - 0.03) <= drift["drift_per_hour_ci95"] < 0.01
    assert {finding for finding in all_findings(found) if finding[1] == "drift"} == {("cpu-0", "drift")}
    assert drift["spread"] == pytest.approx(0.005, rel=0.5)


def test_one_slow_worker_of_five() -> None:
    found = trends(*(run(f"h100-{i}", bias=0.08 if i == 3 else 0.0) for i in range(5)))
    slow = line(found, "h100-3")
    assert abs(slow["bias"] - 0.08) <= slow["bias_ci95"] < 0.01
    assert all_findings(found) == {("h100-3", "slow")}
    assert all(row["findings"] == ["slow"] for _, row in found[found["worker"] == "h100-3"].iterrows())


def test_two_workers_are_half_their_difference_from_the_median() -> None:
    found = trends(run("h100-0"), run("h100-1", bias=0.08))
    slow, fast = line(found, "h100-1"), line(found, "h100-0")
    assert slow["bias"] == pytest.approx(math.sqrt(slow["anchor_ms"] / fast["anchor_ms"]) - 1)
    assert abs(slow["bias"] - (math.sqrt(1.08) - 1)) <= slow["bias_ci95"] < 0.01
    assert all_findings(found) == {("h100-1", "slow"), ("h100-0", "fast")}


def test_restarts_of_a_worker_do_not_make_it_count_more() -> None:
    slow = [run("h100-0", bias=0.1, begin=5.0 * i, seed=i) for i in range(4)]
    found = trends(*slow, run("h100-1"), run("h100-2"))
    runs = found[(found["worker"] == "h100-0") & (found["timing"] == "total_ms")]
    assert len(runs) == 4
    assert runs["bias"].to_numpy() == pytest.approx(0.1, abs=0.01)
    assert line(found, "h100-1")["bias"] == pytest.approx(0, abs=0.01)


def test_a_short_run_of_a_restarted_worker_is_known_by_the_noise_of_the_other() -> None:
    found = trends(run("h100-0", bias=0.1), run("h100-0", 1, bias=0.1, begin=9), run("h100-1"), run("h100-2"))
    short = found[(found["num_anchors"] == 1) & (found["timing"] == "total_ms")].iloc[0]
    assert abs(short["bias"] - 0.1) <= short["bias_ci95"] < 0.02
    assert short["findings"] == ["slow"]


def test_a_single_run_has_no_bias() -> None:
    found = trends(run("h100-0", bias=0.5))
    assert found[["bias", "bias_ci95"]].isna().all(axis=None)
    assert found["drift_per_hour"].notna().all()
    assert not all_findings(found)


def test_the_runs_of_a_single_worker_are_compared_with_each_other() -> None:
    """A sweep that was interrupted and went on in another state of the machine."""
    found = trends(run("cpu-0"), run("cpu-0", bias=0.1, begin=9), run("cpu-0", begin=19, seed=1))
    total = found[found["timing"] == "total_ms"]
    assert total["bias"].to_numpy() == pytest.approx([0, 0.1, 0], abs=0.01)
    assert [list(findings) for findings in total["findings"]] == [[], ["slow"], []]
    (words,) = findings_in_words(found)
    assert words.startswith("cpu-0 was 9.9 % ± ")
    assert words.endswith(" slower from 2026-01-02 11:58 on than in the median of its 3 runs in total_ms of small")
    made = corrected(pd.DataFrame([timed("cpu-0", 1.0, 99.0, begin=9), timed("cpu-0", 1.0, 90.0)]), found)
    assert made["total_ms_corrected"].to_numpy() == pytest.approx(90, rel=0.01)


def test_a_name_that_came_back_on_another_device_is_another_worker() -> None:
    found = trends(
        run("h100-0", device_uuid="GPU-0"), run("h100-0", bias=0.1, begin=9, device_uuid="GPU-1"), run("h100-1")
    )
    total = found[found["timing"] == "total_ms"].set_index("device_uuid")
    assert total.loc["GPU-1", "bias"] == pytest.approx(0.1, abs=0.01)
    assert list(total.loc["GPU-1", "findings"]) == ["slow"]
    assert "of 3 workers" in findings_in_words(found)[0]


@pytest.mark.parametrize("calls", [1, 2])
def test_few_calls_have_no_drift_and_no_spread(calls: int) -> None:
    found = trends(run("h100-0", calls, bias=0.5), *(run(f"h100-{i}") for i in (1, 2)))
    few = found[found["worker"] == "h100-0"]
    assert few[["drift_per_hour", "drift_per_hour_ci95", "spread"]].isna().all(axis=None)
    assert few["bias"].to_numpy() == pytest.approx(0.5, abs=0.04)
    # A single call does not say how noisy the worker is.
    assert few["bias_ci95"].isna().all() == (calls == 1)
    assert {finding for finding in all_findings(found) if finding[0] == "h100-0"} <= {("h100-0", "slow")}
    if calls == 1:
        assert not all_findings(found)
    assert line(found, "h100-1")["bias_ci95"] > 0


def test_one_call_workers_only() -> None:
    found = trends(*(run(f"h100-{i}", 1) for i in range(3)))
    assert found["bias"].notna().all()
    assert found["bias_ci95"].isna().all()
    assert not all_findings(found)


def test_calls_within_two_minutes_say_nothing_of_an_hour() -> None:
    found = trends(run("h100-0", 5, hours=0.03, noise=0.02), run("h100-1", 3, hours=1e-6, noise=0.02))
    assert found[["drift_per_hour", "drift_per_hour_ci95"]].isna().all(axis=None)
    assert found["spread"].notna().all()
    assert "drift" not in {finding for _, finding in all_findings(found)}


def test_calls_at_the_same_moment() -> None:
    found = trends(run("h100-0", 4, hours=0, started_at=at(0)))
    assert found["drift_per_hour"].isna().all()
    assert (found["spread"] > 0).all()


def test_a_change_too_small_to_matter_is_no_drift() -> None:
    found = trends(run("h100-0", 12, drift=0.02, hours=0.2, noise=1e-5, noise_in_call=1e-5))
    assert line(found, "h100-0")["drift_per_hour"] == pytest.approx(0.02, abs=1e-3)
    assert not all_findings(found)


def test_spread() -> None:
    found = trends(run("cpu-0", 30, noise=0.1, seed=1), run("cpu-1", 30, noise=0.02))
    assert all_findings(found) == {("cpu-0", "spread")}
    assert line(found, "cpu-0")["spread"] == pytest.approx(0.1, rel=0.4)


def test_a_planted_overhead() -> None:
    found = trends(run("h100-0", overhead=0.01), run("h100-1", overhead=0.002))
    dear, cheap = line(found, "h100-0"), line(found, "h100-1")
    assert abs(dear["overhead"] - 0.01) <= dear["overhead_ci95"] < 0.003
    assert abs(cheap["overhead"] - 0.002) <= cheap["overhead_ci95"] < 0.003
    assert all_findings(found) == {("h100-0", "overhead")}


def test_overhead_is_not_moved_by_wild_answers_and_needs_pairs() -> None:
    rows = run("h100-0", overhead=0.01)
    for row in [row for row in rows if row["marked"]][::9]:
        row["total_ms"] *= 5
    for row in rows[::10]:
        row["valid"] = False
    assert line(trends(rows), "h100-0")["overhead"] == pytest.approx(0.01, abs=0.002)
    few = line(trends(run("h100-0", 5, pairs=1, overhead=0.01)), "h100-0")
    assert few["overhead"] == pytest.approx(0.01, abs=0.006)
    assert math.isnan(few["overhead_ci95"])
    assert "overhead" not in few["findings"]


def test_pairs_of_a_call_that_are_alike_count_once() -> None:
    rows = run("h100-0", 20, pairs=5, noise=0, noise_in_call=0.001)
    alike = [row | {"total_ms": row["total_ms"] * (1 + row["marked"] * 0.02 * math.sin(row["visit"]))} for row in rows]
    spread = [
        row | {"total_ms": row["total_ms"] * (1 + row["marked"] * 0.02 * math.sin(5 * row["visit"] + row["pair"]))}
        for row in rows
    ]
    ratio = line(trends(alike), "h100-0")["overhead_ci95"] / line(trends(spread), "h100-0")["overhead_ci95"]
    assert ratio > 1.5


def test_null_and_zero_timings_are_left_out() -> None:
    rows = run("h100-0")
    for row in rows:
        row["tpot_ms"] = None
        if row["marked"] and row["visit"] % 2:
            row["transfer_ms"] = 0.0
        if row["marked"] and row["pair"] == 1:
            row["vision_ms"] = -1.0
    found = trends(rows)
    assert set(found["timing"]) == set(SUMMARISED) - {"tpot_ms"}
    assert line(found, "h100-0", "transfer_ms")["num_anchors"] == 6
    assert line(found, "h100-0", "vision_ms")["num_anchors"] == 12
    assert line(found, "h100-0", "vision_ms")["anchor_ms"] == pytest.approx(15, rel=0.01)


def test_rows_that_do_not_count() -> None:
    rows = run("h100-0", 8)
    expected = trends(rows)
    times = dict.fromkeys(TRUTH, 1e6)
    wild = [rows[0] | times | change for change in ({"valid": False}, {"valid": None}, {"status": "failed"})]
    wild += [rows[0] | times | {"visit": 8, "valid": False, "started_at": at(99)}]
    pd.testing.assert_frame_equal(trends(rows, wild), expected)
    nobody = [row | {"valid": False} for row in run("h100-1")] + [row for row in run("h100-2") if not row["marked"]]
    pd.testing.assert_frame_equal(trends(rows, nobody), expected)


def test_order_and_labels_of_rows_do_not_matter() -> None:
    rows = run("h100-0") + run("h100-1", bias=0.03)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = pd.DataFrame([rows[i] for i in order], index=[0] * len(rows)).assign(**PLACE)
    pd.testing.assert_frame_equal(worker_trends(shuffled), trends(rows))


def test_empty_frames() -> None:
    for empty in (frame("anchors", []), frame("anchors", []).assign(**PLACE), pd.DataFrame()):
        found = worker_trends(empty, frame("environments", []))
        assert list(found.columns) == [c.name for c in (*PARTITIONS, *WORKER_COLUMNS)]
        assert found.empty
        assert findings_in_words(found) == []
        assert corrected(pd.DataFrame([timed("h100-0", 1)]), found)["total_ms_corrected"].isna().all()
    some = trends(run("h100-0"))
    assert corrected(frame("latency", []).assign(**PLACE), some)["total_ms_corrected"].empty


def test_rows_of_a_result_folder() -> None:
    """Through Arrow and back: nullable columns arrive as objects, and the trends can be stored as they are."""
    ref = samples(1)[0]
    rows = []
    for i in range(3):
        for made in run(f"h100-{i}", 6, bias=0.08 if i == 2 else 0.0, device_uuid=f"GPU-{i}234-5678"):
            row = timed_row(TIMED, ref, **made)
            if not row["marked"]:
                row |= {name: None for name in SUMMARISED if name != "total_ms"}
            rows.append(row | {"environment_id": f"e{i}", "tpot_ms": None})
    rows.append(rows[0] | {"valid": None, "total_ms": 1e9})
    environments = frame("environments", [{"environment_id": "e0", "host": "a"}, {"environment_id": "e2"}])
    found = worker_trends(frame("anchors", rows).assign(**PLACE), environments)
    assert all_findings(found) == {("h100-2", "slow")}
    assert set(found["timing"]) == set(SUMMARISED) - {"tpot_ms"}
    assert line(found, "h100-0")["host"] == "a"
    assert pd.isna(line(found, "h100-1")["host"])
    assert pd.isna(line(found, "h100-2")["host"])
    names = [c.name for c in WORKER_COLUMNS]
    stored = pa.Table.from_pandas(found[names], schema=arrow_schema("workers"), preserve_index=False)
    assert stored["overhead"].null_count == 3 * 7
    back = stored.to_pandas().assign(**PLACE)
    assert findings_in_words(back) == findings_in_words(found)
    assert len(findings_in_words(found)) == 1
    latency = [timed_row(TIMED, ref, **run("h100-2", 1)[1]), timed_row(TIMED, ref)]
    latency = [{name: value for name, value in row.items() if name not in ("pair", "marked")} for row in latency]
    for table in (found, back):
        once = corrected(frame("latency", latency).assign(**PLACE), table)
        assert once["total_ms_corrected"].iloc[0] == pytest.approx(once["total_ms"].iloc[0] / 1.08, rel=0.01)
        assert math.isnan(once["total_ms_corrected"].iloc[1])  # no session: a run of nobody knows when


# -- chance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile", "chance"),
    [
        (1, 12.7062, 0.05),
        (2, 4.30265, 0.05),
        (3, 3.18245, 0.05),
        (4, 4.60409, 0.01),
        (7, 3.49948, 0.01),
        (10, 4.58689, 0.001),
        (29, 2.04523, 0.05),
        (30, 3.64596, 0.001),
    ],
)
def test_chance_is_that_of_the_tables_of_student(freedom: int, quantile: float, chance: float) -> None:
    assert _chance_of_t(quantile, 1.0, freedom) == pytest.approx(chance, rel=1e-4)
    assert _chance_of_t(-quantile, 1.0, freedom) == pytest.approx(chance, rel=1e-4)
    assert _chance_of_t(0.0, 1.0, freedom) == pytest.approx(1)
    assert (_chance_of_t(1.0, 0.0, freedom), _chance_of_t(0.0, 0.0, freedom)) == (0, 1)


@pytest.mark.parametrize(("workers", "calls", "noise"), [(2, 4, 0.03), (3, 6, 0.03), (5, 10, 0.01)])
def test_pure_noise_makes_no_findings(workers: int, calls: int, noise: float) -> None:
    """Also where the noise is so large that biases and drifts beyond the limits come about all the time."""
    seeds, made = 50, 0
    for seed in range(seeds):
        runs = [run(f"w{i}", calls, seed=seed, noise=noise, noise_in_call=noise, pairs=2) for i in range(workers)]
        made += bool({finding for _, finding in all_findings(trends(*runs))} - {"spread"})
    assert CHANCE <= 0.01
    assert made / seeds <= 0.03


def test_intervals_hold_what_was_planted_as_often_as_they_say() -> None:
    """About 95 % or more, over seeds and over timings, whose noise is independent here."""
    inside: dict[str, list[bool]] = {"bias": [], "two": [], "drift": [], "overhead": []}
    for seed in range(40):
        common: dict[str, Any] = {"seed": seed, "noise": 0.01, "noise_in_call": 0.01, "drift": 0.01, "overhead": 0.006}
        runs = [run(f"w{i}", 7, bias=0.08 if i == 0 else 0.0, **common) for i in range(3)]
        found = trends(*runs)
        slow, total = found[found["worker"] == "w0"], found[found["timing"] == "total_ms"]
        inside["bias"] += list((slow["bias"] - 0.08).abs() <= slow["bias_ci95"])
        inside["drift"] += list((found["drift_per_hour"] - 0.01).abs() <= found["drift_per_hour_ci95"])
        inside["overhead"] += list((total["overhead"] - 0.006).abs() <= total["overhead_ci95"])
        two = trends(*runs[:2])
        slow = two[two["worker"] == "w0"]
        inside["two"] += list((slow["bias"] - (math.sqrt(1.08) - 1)).abs() <= slow["bias_ci95"])
    shares = {name: sum(found) / len(found) for name, found in inside.items()}
    assert 0.92 <= shares["drift"] <= 0.98
    assert 0.92 <= shares["bias"] <= 0.995
    assert 0.92 <= shares["two"] <= 0.995
    assert shares["overhead"] >= 0.92


def test_a_machine_that_wanders_is_seldom_said_to_drift() -> None:
    made, beyond, seeds = 0, 0, 60
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        level, rows = 0.0, run("cpu-0", 30, noise=0, noise_in_call=0, pairs=1, hours=3)
        for i in range(0, len(rows), 2):
            level = 0.8 * level + generator.normal(0, 0.01)
            for row in rows[i : i + 2]:
                row |= {name: row[name] * math.exp(level) for name in TRUTH if name in row}
        found = trends(rows)
        made += ("cpu-0", "drift") in all_findings(found)
        total = line(found, "cpu-0")
        beyond += abs(total["drift_per_hour"]) > total["drift_per_hour_ci95"]
    assert made / seeds <= 0.15
    assert beyond / seeds <= 0.4  # without widening it would be half


# -- correction -------------------------------------------------------------------------------------------------------


def test_a_slow_worker_is_corrected_and_the_others_are_left_untouched() -> None:
    found = trends(*(run(f"h100-{i}", 20, bias=0.08 if i == 3 else 0.0) for i in range(5)))
    latency = pd.DataFrame([timed(f"h100-{i}", 1.0, 90 * 1.08 if i == 3 else 90.0) for i in range(5)])
    before = latency.copy()
    made = corrected(latency, found)
    pd.testing.assert_frame_equal(latency, before)
    pd.testing.assert_frame_equal(made[list(before.columns)], before)
    for timing in SUMMARISED:
        by_worker = made.set_index("worker")[f"{timing}_corrected"]
        assert abs(by_worker["h100-3"] / 90 - 1) <= line(found, "h100-3", timing)["bias_ci95"]
    untouched = made[made["worker"] != "h100-3"]
    same = [untouched[f"{timing}_corrected"] == untouched[timing] for timing in SUMMARISED]
    assert np.mean(same) >= 0.95
    assert (untouched["total_ms_corrected"] == 90).all()


def test_a_drift_is_taken_back_within_the_hours_seen() -> None:
    found = trends(run("cpu-0", 20, drift=0.03), run("cpu-1", 20), run("cpu-2", 20))
    hours = [0.0, 1.0, 2.0, 3.0, 4.0, 9.0, -5.0]
    rows = [timed("cpu-0", hour, 90 * 1.03 ** (min(max(hour, 0), 4))) for hour in hours]
    made = corrected(pd.DataFrame(rows), found)["total_ms_corrected"]
    trend = line(found, "cpu-0")
    # Its mean state against the median worker: 1.03^2, which is its bias.
    assert abs(trend["bias"] - (1.03**2 - 1)) <= trend["bias_ci95"]
    within = trend["bias_ci95"] + 2 * trend["drift_per_hour_ci95"]
    assert (abs(made / 90 - 1) <= within).all()
    assert within < 0.02
    assert made.iloc[5] == pytest.approx(made.iloc[4], rel=5e-4)
    assert made.iloc[6] == pytest.approx(made.iloc[0], rel=5e-4)


def test_the_mean_time_counts_where_it_is_known() -> None:
    """Most anchors were early: their mean state is not that of halfway."""
    early = [row for row in run("cpu-0", 40, drift=0.03) if row["visit"] < 20 or row["visit"] == 39]
    found = trends(early)
    mean = np.mean([4 * call / 39 for call in (*range(20), 39)])
    made = corrected(pd.DataFrame([timed("cpu-0", 3, 90 * 1.03**3)]), found.assign(mean_at=at(mean)))
    assert made["total_ms_corrected"].iloc[0] == pytest.approx(90 * 1.03**mean, rel=0.01)


def test_a_slope_that_is_not_found_changes_nothing() -> None:
    found = trends(run("cpu-0", 8, noise=0.03), run("cpu-1", 8, noise=0.03))
    assert line(found, "cpu-0")["drift_per_hour"] != 0
    made = corrected(pd.DataFrame([timed("cpu-0", hour) for hour in (0, 2, 4)]), found)
    assert (made["total_ms_corrected"] == 90).all()


def test_a_single_worker_is_corrected_for_drift_only() -> None:
    found = trends(run("cpu-0", 20, drift=0.03))
    made = corrected(pd.DataFrame([timed("cpu-0", hour, 90 * 1.03**hour) for hour in (0, 4)]), found)
    assert made["total_ms_corrected"].to_numpy() == pytest.approx(90 * 1.03**2, rel=0.02)


def test_rows_without_a_matching_trend_are_null() -> None:
    found = trends(run("h100-0"), run("h100-1", bias=0.1, timings={k: v for k, v in TRUTH.items() if k != "tpot_ms"}))
    rows = [
        timed("h100-1", 1.0),
        timed("h100-1", 1.0, begin=9),
        timed("h100-1", 1.0, model="other"),
        timed("h100-1", 1.0, accelerator="A100"),
        timed("h100-1", 1.0, dataset="other"),
        timed("h100-9", 1.0),
        timed("h100-1", 1.0) | {"worker": None},
        timed("h100-1", 1.0, session_started_at=None),
    ]
    made = corrected(pd.DataFrame(rows, index=[0] * len(rows)), found)
    assert list(made["total_ms_corrected"].notna()) == [True] + [False] * 7
    assert made["tpot_ms_corrected"].isna().all()
    assert corrected(pd.DataFrame(rows).drop(columns="model"), found)["total_ms_corrected"].isna().all()
    null = corrected(pd.DataFrame([timed("h100-1", 1.0, total_ms=None)]), found)
    assert null["total_ms_corrected"].isna().all()


def test_a_row_is_corrected_by_the_anchor_that_it_names() -> None:
    """Engines of one model have an anchor each, and a worker may be slow with one of them only."""
    eager = [run(f"h100-{i}", 12, bias=0.2 * (i == 2), engine="eager", anchor_id="eager") for i in range(3)]
    graph = [run(f"h100-{i}", 6, engine="graph", anchor_id="graph") for i in range(3)]
    found = trends(*eager, *graph)
    assert set(found["num_anchors"]) == {6, 12}
    rows = [timed("h100-2", 1.0, 108.0, anchor_id="eager"), timed("h100-2", 1.0, 90.0, anchor_id="graph")]
    made = corrected(pd.DataFrame(rows), found)
    assert made["total_ms_corrected"].to_numpy() == pytest.approx(90, rel=0.01)
    assert corrected(pd.DataFrame([timed("h100-2", 1.0, anchor_id="other")]), found)["total_ms_corrected"].isna().all()


def test_what_is_found_does_not_depend_on_other_models() -> None:
    alone = trends(run("h100-0", 8, drift=0.02, noise=0.01), *(run(f"h100-{i}") for i in (1, 2)))
    others = [run(f"h100-{i}", seed=i) for i in range(12)]
    rows = [
        *(
            row | PLACE
            for i in range(3)
            for row in run(f"h100-{i}", 8 if i == 0 else 12, **({"drift": 0.02, "noise": 0.01} if i == 0 else {}))
        ),
        *(row | PLACE | {"model": "another"} for of_run in others for row in of_run),
    ]
    together = worker_trends(pd.DataFrame(rows))
    mine = together[together["model"] == "small"].reset_index(drop=True)
    assert mine["findings"].map(list).tolist() == alone["findings"].map(list).tolist()


# -- in words ---------------------------------------------------------------------------------------------------------


def test_findings_in_words() -> None:
    found = trends(
        *(run(f"h100-{i}", bias=0.08 if i == 3 else 0.0, device_uuid=f"GPU-{i}234abcd-0000") for i in range(8)),
        run("h100-8", 20, drift=0.03),
        run("h100-9", 20, overhead=0.01),
    )
    slow, drifting, also_slow, costly = (line(found, name) for name in ("h100-3", "h100-8", "h100-8", "h100-9"))
    lines = findings_in_words(found)
    assert (
        f"h100-3 (GPU-3234abcd) is {100 * slow['bias']:.1f} % ± {100 * slow['bias_ci95']:.1f} slower than the median "
        "of 10 workers in total_ms of small"
    ) in lines
    assert (
        f"h100-8 became {100 * drifting['drift_per_hour']:.1f} % ± {100 * drifting['drift_per_hour_ci95']:.1f} slower "
        "per hour, over 4.0 hours, in total_ms of small"
    ) in lines
    assert (
        f"marking the stages costs {100 * costly['overhead']:.1f} % ± {100 * costly['overhead_ci95']:.1f} of a "
        f"{costly['anchor_ms']:.3g} ms answer of small on h100-9, more than {100 * MOST_OVERHEAD:g} %"
    ) in lines
    # It drifted away from the others, too.
    assert any(words.startswith("h100-8 is") for words in lines) == ("slow" in also_slow["findings"])
    assert len(lines) == 4


def test_parts_of_an_answer_are_told_when_they_weigh_something() -> None:
    parts = TRUTH | {"transfer_ms": 0.01}
    found = trends(run("h100-0"), run("h100-1"), run("h100-2"))
    assert findings_in_words(found) == []
    runs = []
    for i in range(3):
        rows = run(f"h100-{i}", timings=parts)
        for row in rows:
            if i == 2 and row["marked"]:
                row["transfer_ms"] *= 1.5
                row["vision_ms"] *= 1.1
                row["projector_ms"] *= 1.2
        runs.append(rows)
    found = trends(*runs)
    assert {row["timing"] for _, row in found.iterrows() if row["findings"]} == {
        "transfer_ms",
        "vision_ms",
        "projector_ms",
    }
    (words,) = findings_in_words(found)
    assert words.startswith("h100-2 is")
    assert words.endswith("slower than the median of 3 workers in projector_ms of small")


def test_unsteady_in_words() -> None:
    (words,) = findings_in_words(trends(run("cpu-0", 30, noise=0.1, seed=1)))
    assert words.startswith("cpu-0 is unsteady: ")
    assert words.endswith("in total_ms of small, more than 5 %")

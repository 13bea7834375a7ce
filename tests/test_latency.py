"""Latency tasks on real data and real tiny models: repeats, visits, batches, and what each timed row says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sessions import TIMED, assert_no_knob_is_switched, model_of, rows_of, task_for
from tiny import TINY

from orchestrator.analysis import aggregate
from workers.energy import Energy
from workers.measure import Timing, time_batch
from workers.schema import STAGES
from workers.session import Session
from workers.tasks import Kind, ModelSource
from workers.validity import slow_first_round

pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.mark.parametrize("name", TINY)
def test_latency_rows(session: Session, sources: dict[str, ModelSource], name: str) -> None:
    task = task_for(sources[name], Kind.LATENCY, samples=3, active_blocks=(1, 2))
    rows = rows_of(session, task)
    asked = [ref.uid for ref in task.samples]
    assert [(row["repeat"], row["sample_id"]) for row in rows] == [(r, uid) for r in (0, 1) for uid in asked]
    for row in rows:
        assert min(row[stage] for stage in STAGES) > 0
        assert row["residual_ms"] >= 0
        assert row["total_ms"] > row["ttft_ms"] > row["prefill_ms"]
        assert (row["output_tokens"], len(row["decode_step_ms"]), row["batch_size"]) == (3, 2, 1)
        assert row["tpot_ms"] == pytest.approx(sum(row["decode_step_ms"]) / 2)
        assert (row["valid"], row["invalid_reasons"], row["status"]) == (True, [], "done")
        assert row["kv_cache_bytes"] > 0
        assert row["peak_memory_bytes"] is None
    assert_no_knob_is_switched(session)


def test_operations_and_conditions_stand_in_timed_rows(session: Session, sources: dict[str, ModelSource]) -> None:
    source = sources["tiny-qwen3-vl-moe"]
    flops = {}
    for k in (1, 2, 3):
        task = task_for(source, Kind.LATENCY, samples=3, moe_top_k=k)
        result = session.run(task)
        assert result.rows is not None, result.traceback
        rows = result.rows.to_pylist()
        for row in rows:
            parts = [row[f"{stage}_flops"] for stage in ("vision", "projector", "prefill", "decode")]
            counted = row["sample_id"] in {ref.uid for ref in task.samples[:2]}
            assert row["flops"] == (sum(parts) if counted else None)
            assert all(part is None or part > 0 for part in parts)
            assert row["cpu_load_others"] >= 0
            assert row["sm_clock_mhz_start"] is None  # no GPU
            assert result.environment is not None
            assert row["environment_id"] == result.environment["environment_id"]
        flops[k] = rows[0]["prefill_flops"]
        # Every repeat of a sample has the same count.
        assert len({row["flops"] for row in rows if row["sample_id"] == rows[0]["sample_id"]}) == 1
    assert flops[3] - flops[2] == flops[2] - flops[1] > 0
    (scored, *_) = rows_of(session, task_for(source))
    assert scored["environment_id"] == result.environment["environment_id"]


def test_what_disturbs_a_measurement_makes_its_row_invalid(
    session: Session, sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.latency.reasons", lambda before, after: ["cpu_busy"])
    rows = rows_of(session, task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=1))
    assert {(row["status"], row["valid"], *row["invalid_reasons"]) for row in rows} == {("done", False, "cpu_busy")}
    frame = pd.DataFrame(rows)
    found = aggregate(frame, pd.DataFrame(columns=frame.columns))
    assert (found["num_timed"], found["num_invalid"]) == (0, len(rows))


def test_repeats_end_when_the_medians_are_known(
    session: Session, sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that are always the same end after three rounds, ever different ones after the most; rows say which."""
    spread, pace = [1.0], [1.0]

    def planted(*arguments: Any) -> Timing:
        spread.append(spread[-1] * pace[-1])
        timing = time_batch(*arguments)
        steps = tuple(spread[-1] for _ in timing.decode_step_ms)
        return replace(timing, total_ms=100 * spread[-1], prefill_ms=10 * spread[-1], decode_step_ms=steps)

    monkeypatch.setattr("workers.latency.time_batch", planted)
    protocol = replace(TIMED, repeats=6, max_relative_error=0.02)
    for growth, rounds, reason in [(1.0, 3, "precise"), (1.5, 6, "repeats")]:
        pace.append(growth)
        rows = rows_of(session, task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=2, protocol=protocol))
        assert [row["repeat"] for row in rows] == [i // 2 for i in range(2 * rounds)]
        assert {row["stopped_by"] for row in rows} == {reason}
        (error,) = {row["relative_error"] for row in rows}
        assert (error < 0.02) == (reason == "precise")
    protocol = replace(TIMED, repeats=2, max_seconds=1e-6)
    rows = rows_of(session, task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=2, protocol=protocol))
    assert {(row["repeat"], row["stopped_by"], row["relative_error"]) for row in rows} == {(0, "seconds", None)}


def test_repeats_are_shared_out_over_visits(session: Session, sources: dict[str, ModelSource]) -> None:
    protocol = replace(TIMED, repeats=5, visits=2)
    task = task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=1, protocol=protocol)
    found = [[(row["visit"], row["repeat"]) for row in rows_of(session, replace(task, visit=v))] for v in (0, 1)]
    assert found == [[(0, 0), (0, 1), (0, 2)], [(1, 3), (1, 4)]]


@pytest.mark.parametrize("name", TINY)
def test_a_batch_has_its_time_in_the_row_of_each_of_its_samples(
    session: Session, sources: dict[str, ModelSource], name: str
) -> None:
    """Three samples in batches of two: the last batch is filled up with the first sample."""
    alone = {row["sample_id"]: row for row in rows_of(session, task_for(sources[name], Kind.LATENCY, samples=3))}
    task = task_for(sources[name], Kind.LATENCY, samples=3, protocol=replace(TIMED, batch_size=2))
    rows = rows_of(session, task)
    first, second, third = (ref.uid for ref in task.samples)
    members = [(0, first), (0, second), (1, third)]
    found = [(row["repeat"], row["batch"], row["sample_id"]) for row in rows]
    assert found == [(repeat, *member) for repeat in (0, 1) for member in members], "each sample once in a round"
    for one, other in [(rows[0], rows[1]), (rows[3], rows[4])]:
        for column in ("total_ms", "vision_ms", "prefill_ms", "decode_step_ms", "started_at", "kv_cache_bytes"):
            assert one[column] == other[column], column
        longest = max(one["prompt_tokens"], other["prompt_tokens"])
        of_one = alone[one["sample_id"]]
        per_token = of_one["kv_cache_bytes"] / (of_one["prompt_tokens"] + 2)
        assert one["kv_cache_bytes"] == 2 * per_token * (longest + 2), "both are padded to the longer one"
    for row in rows:
        assert row["batch_size"] == 2
        assert row["valid"]
        for column in ("prompt_tokens", "actual_vision_tokens", "actual_num_crops", "selected_tiling", "flops"):
            assert row[column] == alone[row["sample_id"]][column], column
    found = aggregate(pd.DataFrame(rows), pd.DataFrame(columns=list(rows[0])))
    assert found["num_timed"] == 4
    assert found["total_ms_mean"] == pytest.approx(sum(rows[i]["total_ms"] for i in (0, 2, 3, 5)) / 4)


def test_weights_and_the_first_call_stand_in_the_rows(session: Session, sources: dict[str, ModelSource]) -> None:
    task = task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=2, active_blocks=(0,))
    rows = rows_of(session, task)
    parameters = sum(p.numel() * 4 for p in model_of(session).model.parameters())
    assert {row["weights_bytes"] >= parameters for row in rows} == {True}, "skipped blocks are in memory all the same"
    assert all(row["first_call_ms"] > 0 for row in rows)
    assert {(row["peak_reserved_bytes"], row["energy_j"]) for row in rows} == {(None, None)}  # a CPU tells neither
    cold = rows_of(session, replace(task, protocol=replace(TIMED, warmup=0)))
    assert {row["first_call_ms"] for row in cold} == {None}


def test_a_first_round_that_was_not_warm_does_not_count(
    session: Session, sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.latency.slow_first_round", slow_first_round)
    calls = [0]

    def planted(*arguments: Any) -> Timing:
        calls[0] += 1
        timing = time_batch(*arguments)
        return replace(timing, total_ms=200.0 if calls[0] <= 20 else 100.0)

    monkeypatch.setattr("workers.latency.time_batch", planted)
    protocol = replace(TIMED, repeats=3)  # ten calls are the warm-up, and ten the first round
    rows = rows_of(session, task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=10, protocol=protocol))
    reasons = {row["repeat"]: (row["valid"], row["invalid_reasons"]) for row in rows}
    assert reasons == {0: (False, ["slow_first_round"]), 1: (True, []), 2: (True, [])}


def test_energy_is_that_of_one_answer_and_stands_where_it_was_measured(
    session: Session, sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches of two that take 0.2 s each: three of them take more than half a second."""
    answered = []

    def planted(vlm: Any, batch: Any, *arguments: Any) -> Timing:
        return replace(time_batch(vlm, batch, *arguments), total_ms=200.0)

    def bare(vlm: Any, batch: Any, *_: Any) -> float:
        answered.append(len(batch))
        return 200.0

    def counted(gpu: Any, work: Any, least_ticks: int) -> Energy:
        work()
        return Energy(joules=30.0, relative_error=0.03, seconds=3.0, calls=5)

    monkeypatch.setattr("workers.latency.time_batch", planted)
    monkeypatch.setattr("workers.latency.time_bare", bare)
    monkeypatch.setattr("workers.latency.energy_of", counted)
    protocol = replace(TIMED, batch_size=2, repeats=4, visits=2)
    task = task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=8, protocol=protocol)
    rows = rows_of(session, task)
    assert answered == [2, 2, 2]
    found = {row["batch"]: (row["energy_j"], row["energy_relative_error"]) for row in rows}
    assert found == dict.fromkeys(range(3), (5.0, 0.03)) | {3: (None, None)}
    frame = pd.DataFrame(rows)
    assert aggregate(frame, pd.DataFrame(columns=frame.columns))["energy_j"] == 5.0
    assert {row["energy_j"] for row in rows_of(session, replace(task, visit=1))} == {None}, "once is enough"


@pytest.mark.parametrize(
    ("rounds", "batches", "slow", "said"),
    [
        (3, 24, 24, True),
        (3, 24, 17, True),
        (3, 24, 12, False),  # as many as not
        (2, 24, 24, True),
        (2, 9, 9, False),  # by chance once in 512
        (2, 10, 10, True),
        (5, 4, 4, False),
        (6, 4, 4, True),
        (9, 1, 1, False),
        (1, 24, 24, False),  # nothing to compare with
    ],
)
def test_a_first_round_is_called_slow_where_chance_would_hardly_do_it(
    rounds: int, batches: int, slow: int, said: bool
) -> None:
    totals = np.full((rounds, batches), 100.0)
    totals[0, :slow] = 111.0
    assert slow_first_round(totals) is said
    totals[0, :slow] = 109.0
    assert not slow_first_round(totals), "that little is noise"
    totals[0, :slow], totals[-1, :slow] = 111.0, 112.0
    assert not slow_first_round(totals), "a later round was as slow"


def test_a_first_round_like_the_others_is_hardly_ever_called_slow() -> None:
    generator = np.random.default_rng(0)
    draws = 100 * np.exp(generator.normal(0, 0.3, (4000, 3, 12)))  # so noisy that 10 % is nothing
    assert sum(slow_first_round(totals) for totals in draws) <= 12

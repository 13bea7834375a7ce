"""What the scheduler does with workers that fail, on a real Ray cluster: nothing is lost, nothing done twice."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import ray
from handmade import task as handmade_task
from ray.cluster_utils import Cluster

from orchestrator import schedule
from orchestrator.cluster import ClusterError, Pool
from orchestrator.schedule import Outcome, Scheduler
from workers.tasks import FailureKind, Status, Task, TaskResult

ONE, TWO = [Pool("cpu", 1, 1)], [Pool("cpu", 2, 1)]


class Fake:
    """A worker whose tasks say by their name what becomes of them."""

    def __init__(self, name: str, accelerator: str) -> None:
        self.name = name
        self.ran = 0

    def ready(self) -> dict[str, Any]:
        return {"memory_bytes": 8e9, "name": "fake", "accelerator": "cpu"}

    def run(self, task: Task) -> TaskResult:
        if "die" in task.task_id:
            os._exit(1)
        if "lost" in task.task_id or (self.name == "cpu-0" and "sick" in task.task_id):
            return self._failed(task, FailureKind.DEVICE_LOST, "CUDA error: unspecified launch failure")
        if "load" in task.task_id:
            return self._failed(task, FailureKind.MODEL_LOAD, "no such file")
        if "huge" in task.task_id or ("tight" in task.task_id and self.ran):
            return self._failed(task, FailureKind.OUT_OF_MEMORY, "CUDA out of memory")
        if "slow" in task.task_id:
            time.sleep(0.2)
        if "hang" in task.task_id:
            time.sleep(600)
        self.ran += 1
        return TaskResult(task.task_id, Status.DONE)

    def _failed(self, task: Task, kind: FailureKind, reason: str) -> TaskResult:
        return TaskResult(task.task_id, Status.FAILED, failure=kind, reason=reason)


class Broken(Fake):
    """A worker that never starts."""

    def __init__(self, name: str, accelerator: str) -> None:
        raise RuntimeError("no driver")


@pytest.fixture
def connected(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(schedule, "Worker", Fake)
    # Other processes cannot import this module by its name.
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    yield
    ray.cloudpickle.unregister_pickle_by_value(__import__(__name__))
    ray.shutdown()


def tasks(*names: str, **changes: Any) -> list[Task]:
    return [replace(handmade_task(), task_id=name, accelerator=None, **changes) for name in names]


def run(pools: Sequence[Pool], *given: Task, **options: Any) -> dict[str, Outcome]:
    with Scheduler(pools, lambda: False) as scheduler:
        outcomes = list(scheduler.run(given, **options))
    assert Counter(o.task.task_id for o in outcomes) == Counter(t.task_id for t in given), "each exactly once"
    return {o.task.task_id: o for o in outcomes}


def test_a_task_that_kills_its_worker_is_tried_three_times_and_the_others_run(connected: None) -> None:
    outcomes = run(ONE, *tasks("a", "b", "die", "c", "d"))
    assert outcomes["die"].result.failure is FailureKind.WORKER_LOST
    assert outcomes["die"].attempts == 3
    assert outcomes["die"].result.reason is not None
    assert outcomes["die"].result.reason.startswith("3 times while it ran, its worker died")
    assert {o.result.status for name, o in outcomes.items() if name != "die"} == {Status.DONE}
    assert max(o.attempts for name, o in outcomes.items() if name != "die") == 1


def test_a_task_that_loses_every_device_fails_and_the_others_run(connected: None) -> None:
    outcomes = run(TWO, *tasks("a", "lost", "b", "c"))
    assert outcomes["lost"].result.failure is FailureKind.DEVICE_LOST
    assert outcomes["lost"].attempts == 3
    assert all(outcomes[name].result.status is Status.DONE for name in "abc")


def test_one_sick_device_does_not_eat_the_queue(connected: None) -> None:
    names = [f"sick-slow-{i}" for i in range(16)]
    outcomes = run(TWO, *tasks(*names))
    assert {o.result.status for o in outcomes.values()} == {Status.DONE}


def test_when_every_device_is_sick_the_run_ends_and_says_so(connected: None) -> None:
    with pytest.raises(ClusterError, match=r"^worker cpu-0 lost its device 3 times in a row: CUDA error"):
        run(ONE, *tasks(*[f"sick-{i}" for i in range(6)]))


def test_a_kind_of_device_that_is_lost_does_not_stop_the_others(
    connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "actor_options", lambda pool, name: {"name": name, "num_cpus": 1})
    given = [replace(task, accelerator="cpu") for task in tasks("sick-1", "sick-2", "sick-3", "sick-4")]
    given += tasks("slow-a", "slow-b", "slow-c")
    ended: list[Outcome] = []
    lost = r"cpu-0 lost its device 3 times in a row.*; \d tasks are left, the same"
    with (
        pytest.raises(ClusterError, match=lost),
        Scheduler([Pool("cpu", 1, 1), Pool("H100", 1, 1)], lambda: False) as scheduler,
    ):
        ended.extend(scheduler.run(given))
    done = {o.task.task_id for o in ended if o.result.status is Status.DONE}
    assert done == {"slow-a", "slow-b", "slow-c"}


def test_a_worker_that_does_not_start_is_given_up_after_three_tries(
    connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "Worker", Broken)
    with pytest.raises(ClusterError, match=r"^worker cpu-0 does not start: .*no driver"):
        run(ONE, *tasks("a"))


def test_a_device_of_too_little_memory_is_not_used(connected: None) -> None:
    with pytest.raises(ClusterError, match="found fake with 8 GB, the sweep wants 40 GB"):
        run([Pool("cpu", 1, 1, min_memory_gb=40)], *tasks("a"))


def test_a_model_that_does_not_load_is_not_tried_for_every_task(connected: None) -> None:
    other = replace(handmade_task().model, name="other")
    outcomes = run(ONE, *tasks("load", "x", "y"), *tasks("z", model=other))
    assert outcomes["load"].result.failure is FailureKind.MODEL_LOAD
    assert outcomes["z"].result.status is Status.DONE
    # One more may have been on its way to the worker already.
    assert sum(outcomes[name].result.failure is FailureKind.MODEL_LOAD for name in ("x", "y")) >= 1


def test_the_heartbeat_says_what_the_workers_do(connected: None) -> None:
    states: list[str] = []
    run(ONE, *tasks("slow-a", "slow-b"), heartbeat=states.append)
    assert "0 of 1 workers busy, cpu-0 starting or waiting for a place" in states
    assert "1 of 1 workers busy" in states


def test_an_interruption_dispatches_nothing_more(connected: None) -> None:
    stop: list[bool] = []
    outcomes = []
    with Scheduler(ONE, lambda: bool(stop)) as scheduler:
        for outcome in scheduler.run(tasks(*[f"slow-{i}" for i in range(20)])):
            outcomes.append(outcome)
            stop.append(True)
    assert 1 <= len(outcomes) < 20


def test_workers_stay_for_the_tasks_that_come_next(connected: None) -> None:
    with Scheduler(ONE, lambda: False) as scheduler:
        (slot,) = scheduler._slots
        first = [outcome.task.task_id for outcome in scheduler.run(tasks("a", "b"))]
        second = [outcome.task.task_id for outcome in scheduler.run(tasks("c", "d"))]
        assert (first, second, slot.starts) == (["a", "b"], ["c", "d"], 1)
        assert slot.actor is not None
    assert slot.actor is None


def test_a_worker_has_its_next_task_before_the_driver_turns_to_what_ended(connected: None) -> None:
    with Scheduler(ONE, lambda: False) as scheduler:
        (slot,) = scheduler._slots
        waiting = [len(slot.given) for _ in scheduler.run(tasks("a", "b", "c", "d"))]
    assert waiting == [2, 2, 1, 0]


def test_out_of_memory_counts_from_a_worker_that_has_run_nothing_else(connected: None) -> None:
    """What earlier tasks leave behind is gone with their process; the next task finds a worker that is used again."""
    outcomes = run(ONE, *tasks("a", "b", "tight", "c"))
    assert {name: (o.result.status, o.attempts) for name, o in outcomes.items()} == {
        "a": (Status.DONE, 1),
        "b": (Status.DONE, 1),
        "tight": (Status.DONE, 2),
        "c": (Status.DONE, 1),
    }


def test_what_is_as_large_in_every_direction_as_what_did_not_fit_is_not_tried(connected: None) -> None:
    (too_large,) = tasks("huge")
    knobs = too_large.knobs
    larger = replace(too_large, task_id="larger", knobs=replace(knobs, active_blocks=(*knobs.active_blocks, 9)))
    fewer_experts = replace(too_large, task_id="fewer experts", knobs=replace(knobs, moe_top_k=1))
    outcomes = run(ONE, too_large, larger, fewer_experts)
    found = {name: (o.result.status, o.result.failure, o.attempts) for name, o in outcomes.items()}
    assert found == {
        "huge": (Status.FAILED, FailureKind.OUT_OF_MEMORY, 2),
        "larger": (Status.SKIPPED, FailureKind.DOMINATED, 1),
        "fewer experts": (Status.DONE, None, 1),
    }
    reason = outcomes["larger"].result.reason
    assert reason == "not tried: nothing about it is smaller than task huge, which ran out of memory"


def test_a_task_that_hangs_is_stopped_twice_and_the_others_run(connected: None) -> None:
    with Scheduler(TWO, lambda: False, task_seconds=3.0) as scheduler:
        outcomes = {o.task.task_id: o for o in scheduler.run(tasks("a", "hang", "b", "c"))}
    assert {name: o.result.status for name, o in outcomes.items()} == {
        **dict.fromkeys(("a", "b", "c"), Status.DONE),
        "hang": Status.FAILED,
    }
    hung = outcomes["hang"]
    assert (hung.result.failure, hung.attempts) == (FailureKind.TIMEOUT, 2)
    assert hung.result.reason == "2 times while it ran, it took longer than 0.05 minutes"

"""Which task a free worker gets next, as laws that hold for any tasks and any workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from handmade import KNOBS, MODEL, samples, task
from hypothesis import given
from hypothesis import strategies as st

from knobs.vision import VisionSetting
from orchestrator.backlog import Backlog
from workers.datasets import SampleRef
from workers.tasks import Kind, ModelSource, Task

MODELS = [replace(MODEL, name=name) for name in ("a", "b", "c")]
VISIONS = [VisionSetting(), VisionSetting("longest_edge", 64), VisionSetting("longest_edge", 128)]
KINDS = ("H100", "A100")


def make(number: int, accelerator: str | None, model: ModelSource, vision: VisionSetting, part: int = 0) -> Task:
    """A task of its own, on a part of a data set that begins with the same sample as that of others."""
    kind = Kind.ACCURACY if accelerator is None else Kind.LATENCY
    knobs = replace(KNOBS, vision=vision)
    refs = samples(1, name=f"part {part}") + samples(1, name=f"set {number}")
    return task(kind, accelerator=accelerator, model=model, knobs=knobs, samples=refs)


TASKS = st.lists(
    st.tuples(
        st.sampled_from([*KINDS, None]), st.sampled_from(MODELS), st.sampled_from(VISIONS), st.sampled_from(range(3))
    ),
    max_size=25,
).map(lambda rows: [make(number, *row) for number, row in enumerate(rows)])


def run_alone(backlog: Backlog, accelerator: str) -> list[Task]:
    """What a single worker runs, in order."""
    done: list[Task] = []
    while backlog.has_work_for(accelerator):
        given_out = backlog.next_for(accelerator, done[-1] if done else None)
        assert given_out is not None
        done.append(given_out)
    assert backlog.next_for(accelerator, done[-1] if done else None) is None
    return done


def shared(one: Task) -> tuple[ModelSource, VisionSetting | None, SampleRef | None]:
    """What a task can share with the one before it; timings use nothing that was kept, and keep their random order."""
    return (one.model, None, None) if one.kind is Kind.LATENCY else (one.model, one.knobs.vision, one.samples[0])


def ids(tasks: Sequence[Task]) -> list[str]:
    return [one.task_id for one in tasks]


@given(TASKS, st.lists(st.sampled_from(range(4)), max_size=80))
def test_every_task_is_handed_out_once_and_only_where_it_can_run(tasks: list[Task], turns: list[int]) -> None:
    backlog = Backlog(tasks)
    workers: list[tuple[str, list[Task]]] = [(KINDS[i % 2], []) for i in range(4)]
    everyone_in_the_end = [i for _ in range(len(tasks)) for i in range(4)]
    for turn in turns + everyone_in_the_end:
        kind, done = workers[turn]
        left = len(backlog)
        one = backlog.next_for(kind, done[-1] if done else None)
        assert len(backlog) == left - (one is not None)
        if one is not None:
            done.append(one)
    assert all(one.accelerator in (kind, None) for kind, done in workers for one in done)
    assert Counter(ids([one for _, done in workers for one in done])) == Counter(ids(tasks))
    assert not len(backlog)


@given(TASKS)
def test_a_worker_loads_every_model_once_and_takes_each_part_under_a_vision_setting_in_one_go(
    tasks: list[Task],
) -> None:
    done = run_alone(Backlog(tasks), "H100")
    runs = [group for group, _ in groupby(shared(one) for one in done)]
    assert len(runs) == len(set(runs))
    settings = [setting for setting, _ in groupby((model, vision) for model, vision, _ in runs)]
    assert len(settings) == len(set(settings)), "and all parts under one setting before the next"
    models = [model for model, _ in groupby(model for model, _ in settings)]
    assert len(models) == len(set(models))
    assert Counter(ids(done)) == Counter(ids([one for one in tasks if one.accelerator != "A100"]))


@given(TASKS)
def test_within_a_group_what_only_this_device_can_run_comes_first_each_in_its_order(tasks: list[Task]) -> None:
    done = run_alone(Backlog(tasks), "H100")
    for before, after in pairwise(done):
        if shared(before) == shared(after):
            assert not (before.accelerator is None and after.accelerator == "H100")
    position = {one.task_id: i for i, one in enumerate(tasks)}
    in_line = groupby(done, key=lambda one: (one.accelerator, shared(one)))
    for _, run in in_line:
        order = [position[one.task_id] for one in run]
        assert order == sorted(order)


def test_a_fresh_worker_starts_with_its_own_devices_work_and_there_with_the_longest_group() -> None:
    tasks = [
        *(make(i, None, MODELS[0], VISIONS[0]) for i in range(9)),
        make(10, "H100", MODELS[1], VISIONS[0]),
        *(make(20 + i, "H100", MODELS[2], VISIONS[1]) for i in range(2)),
    ]
    first = Backlog(tasks).next_for("H100", None)
    assert first is not None
    assert (first.accelerator, first.model) == ("H100", MODELS[2])


def test_a_worker_stays_with_its_model_even_if_others_have_more_to_do() -> None:
    last = make(0, "H100", MODELS[0], VISIONS[0])
    rest = [make(1, None, MODELS[0], VISIONS[1]), *(make(2 + i, "H100", MODELS[1], VISIONS[0]) for i in range(5))]
    following = Backlog(rest).next_for("H100", last)
    assert following == rest[0]


def test_several_workers_take_a_part_of_the_samples_each_and_none_encodes_what_another_has() -> None:
    tasks = [
        make(100 * setting + 10 * part + depth, None, MODELS[0], vision, part)
        for setting, vision in enumerate(VISIONS)
        for depth in range(4)
        for part in range(3)
    ]
    backlog = Backlog(tasks)
    last: list[Task | None] = [None] * 3
    encoded: list[set[object]] = [set(), set(), set()]
    while len(backlog):
        for worker in range(3):
            last[worker] = backlog.next_for("H100", last[worker]) or last[worker]
            one = last[worker]
            assert one is not None
            encoded[worker].add((one.knobs.vision, one.samples[0]))
    assert sum(map(len, encoded)) == len(VISIONS) * 3, "each part under each setting by one worker"


@given(TASKS.filter(len))
def test_an_innocent_task_is_the_next_of_its_group_and_a_suspect_the_last(tasks: list[Task]) -> None:
    for front in (True, False):
        backlog = Backlog(tasks)
        kind = tasks[0].accelerator or "H100"
        returned = backlog.next_for(kind, None)
        assert returned is not None
        backlog.put_back(returned, front=front)
        order = run_alone(backlog, kind)
        same_line = [one for one in order if (one.accelerator, shared(one)) == (returned.accelerator, shared(returned))]
        assert same_line[0 if front else -1] == returned
        assert Counter(ids(order)) == Counter(ids([one for one in tasks if one.accelerator in (kind, None)]))


@pytest.mark.parametrize("any_device", [True, False])
@given(tasks=TASKS)
def test_a_model_that_cannot_be_loaded_takes_its_tasks_for_that_device_with_it(
    any_device: bool, tasks: list[Task]
) -> None:
    backlog = Backlog(tasks)
    kinds = ("H100", None) if any_device else ("H100",)
    hopeless = [one for one in tasks if one.model == MODELS[0] and one.accelerator in kinds]
    taken = backlog.take_model(MODELS[0], "H100", any_device=any_device)
    assert Counter(ids(taken)) == Counter(ids(hopeless))
    assert backlog.take_model(MODELS[0], "H100", any_device=any_device) == []
    left = run_alone(backlog, "H100") + run_alone(backlog, "A100")
    assert Counter(ids(left)) == Counter(ids(tasks)) - Counter(ids(hopeless))


@given(TASKS)
def test_a_device_has_work_exactly_when_there_is_a_task_for_it(tasks: list[Task]) -> None:
    backlog = Backlog(tasks)
    assert len(backlog) == len(tasks)
    for kind in (*KINDS, "cpu"):
        assert backlog.has_work_for(kind) == any(one.accelerator in (kind, None) for one in tasks)


def test_what_is_as_large_is_taken_once_and_the_others_keep_their_order() -> None:
    waiting = [task(Kind.LATENCY, visit=visit, knobs=replace(KNOBS, moe_top_k=visit % 3 + 1)) for visit in range(3000)]
    backlog = Backlog(waiting)
    taken = backlog.take_as_large(waiting[1])
    assert ids(taken) == ids([one for one in waiting if one.knobs.moe_top_k != 1])
    assert ids(run_alone(backlog, "H100")) == ids([one for one in waiting if one.knobs.moe_top_k == 1])

"""Dispatch: tasks go to workers, results come back as they finish, and whatever dies is noticed and done again."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import ray
from ray import exceptions as ray_errors

from orchestrator.backlog import Backlog
from orchestrator.cluster import ClusterError, Pool, actor_options
from workers.actor import Worker
from workers.tasks import FailureKind, Status, Task, TaskResult

# How often a task may take its worker down with it before it counts as the cause.
MOST_ATTEMPTS = 3
# How often a task may take longer than it is given. Each time costs all of it.
MOST_TIMEOUTS = 2
# How often a task has to run out of memory to count as too large; the second time its worker has run nothing else.
MOST_OUT_OF_MEMORY = 2
# How often in a row a worker may fail to start before its device is given up.
MOST_FAILED_STARTS = 3
# A second task waits in the worker's process, so that the device never waits for the driver.
TASKS_PER_WORKER = 2
# How often in a row a device may be lost under a worker before it is given up.
MOST_LOSSES = 3
# How long one wait for results may take; bounds how late an interruption is noticed.
WAIT_SECONDS = 0.25

# The process is gone, or must be presumed gone; what it was doing is unknown.
_WORKER_GONE = (
    ray_errors.RayActorError,
    ray_errors.OutOfMemoryError,
    ray_errors.NodeDiedError,
    ray_errors.WorkerCrashedError,
    ray_errors.LocalRayletDiedError,
    ray_errors.RpcError,
    ray_errors.RuntimeEnvSetupError,
    ray_errors.ActorUnschedulableError,
)
# The result was made and then lost with the node that held it.
_RESULT_LOST = (ray_errors.ObjectLostError, ray_errors.ObjectFetchTimedOutError, ray_errors.OwnerDiedError)


@dataclass(frozen=True)
class Outcome:
    """A task that ended, on which kind of device, after how many attempts."""

    task: Task
    result: TaskResult
    accelerator: str
    attempts: int


@dataclass
class Slot:
    """One device: the worker that holds it now, the tasks it was given, oldest first, and one to try anew first."""

    pool: Pool
    name: str
    actor: Any = None
    ready: Any = None
    up: bool = False
    given: deque[tuple[Any, Task]] = field(default_factory=deque)
    oldest_since: float = 0.0
    again: Task | None = None
    last: Task | None = None
    starts: int = 0
    failed_starts: int = 0
    losses: int = 0
    not_before: float = 0.0
    retired: str | None = None


class Scheduler:
    """Runs one set of tasks after another on pools of workers; a context manager, whose end is that of its workers."""

    def __init__(
        self,
        pools: Sequence[Pool],
        interrupted: Callable[[], bool],
        task_seconds: float | None = None,
    ) -> None:
        """
        Args:
            interrupted: asked often; once true, nothing more is dispatched and what has finished is handed out.
            task_seconds: a task that takes longer, loading its model included, is stopped with its worker; None: never.
        """
        self._task_seconds = task_seconds
        self._slots = [Slot(pool, f"{pool.accelerator}-{i}".lower()) for pool in pools for i in range(pool.workers)]
        self._interrupted = interrupted
        self._attempts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            _kill(slot)

    def run(self, tasks: Sequence[Task], heartbeat: Callable[[str], None] = lambda state: None) -> Iterator[Outcome]:
        """Every task's outcome, in the order in which they end; each exactly once unless interrupted.

        Workers stay for what is run next, with the model that they have loaded.

        Args:
            heartbeat: called often with what the workers are doing, in words.

        Raises:
            ClusterError: tasks are left that no worker can take any more; raised when all others have ended.
        """
        backlog = Backlog(tasks)
        while self._can_go_on(backlog):
            if self._interrupted():
                yield from self._finished_already()
                return
            self._fill(backlog)
            heartbeat(self._state())
            ended = [outcome for slot in self._wait() for outcome in self._collect(slot, backlog)]
            # Whoever is free has its next task before the driver turns to what ended.
            self._fill(backlog)
            yield from ended
            for slot in self._slots:
                if self._is_overdue(slot):
                    yield from self._stop(slot, backlog)
                if slot.retired and slot.again is not None:
                    backlog.put_back(slot.again, front=True)
                    slot.again = None
        if len(backlog):
            reasons = [slot.retired for slot in self._slots if slot.retired]
            raise ClusterError(f"{reasons[0]}; {len(backlog)} tasks are left, the same command goes on from there")

    # -- giving -----------------------------------------------------------------------------------------------------

    def _fill(self, backlog: Backlog) -> None:
        for slot in self._slots:
            wanted = slot.retired is None and slot.actor is None and time.monotonic() >= slot.not_before
            if wanted and (slot.again or backlog.has_work_for(slot.pool.accelerator)):
                _start(slot)
            while slot.up and len(slot.given) < TASKS_PER_WORKER:
                # A task that was there when a worker died runs alone: a death can swallow its neighbour's result.
                if any(self._attempts[task.task_id] for _, task in slot.given):
                    break
                task, slot.again = slot.again or backlog.next_for(slot.pool.accelerator, slot.last), None
                if task is None:
                    break
                if self._attempts[task.task_id] and slot.given:
                    backlog.put_back(task, front=True)
                    break
                if not slot.given:
                    slot.oldest_since = time.monotonic()
                slot.given.append((slot.actor.run.options(name=f"run[{task.kind}]").remote(task), task))
                slot.last = task

    def _wait(self) -> list[Slot]:
        """Slots that have news. A worker answers in order, so its oldest call is all there is to wait for."""
        waiting = {
            (slot.given[0][0] if slot.up else slot.ready): slot
            for slot in self._slots
            if slot.actor is not None and (slot.given or not slot.up)
        }
        if not waiting:
            time.sleep(WAIT_SECONDS / 5)  # every slot rests after a failed start
            return []
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=WAIT_SECONDS)
        return [waiting[reference] for reference in ready]

    def _state(self) -> str:
        """What the workers are doing, in words."""
        busy = sum(slot.up and bool(slot.given) for slot in self._slots)
        starting = [slot.name for slot in self._slots if slot.actor is not None and not slot.up]
        state = f"{busy} of {len(self._slots)} workers busy"
        if starting:
            state += (
                f", {', '.join(starting[:3])}{', ...' if len(starting) > 3 else ''} starting or waiting for a place"
            )
        return state

    # -- taking -----------------------------------------------------------------------------------------------------

    def _collect(self, slot: Slot, backlog: Backlog) -> Iterator[Outcome]:
        if not slot.up:
            self._welcome(slot)
            return
        reference, task = slot.given[0]
        try:
            result = ray.get(reference)
        except _RESULT_LOST:
            slot.given.popleft()
            backlog.put_back(task, front=True)
            return
        except _WORKER_GONE as error:
            yield from self._bury(slot, backlog, f"its worker died: {_cause(error)}", FailureKind.WORKER_LOST)
            return
        except ray_errors.RayError as error:
            # The worker returns failures as data, so this is a call that could not even be made or answered.
            result = _failed(task, FailureKind.ERROR, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        slot.failed_starts = 0
        if result.failure is FailureKind.DEVICE_LOST:
            yield from self._bury(slot, backlog, f"the device was lost: {result.reason}", FailureKind.DEVICE_LOST)
            slot.losses += 1
            if slot.losses >= MOST_LOSSES:
                slot.retired = f"worker {slot.name} lost its device {slot.losses} times in a row: {result.reason}"
            return
        slot.losses = 0
        if result.failure is FailureKind.OUT_OF_MEMORY:
            yield from self._confirm_too_large(slot, backlog, result)
            return
        slot.given.popleft()
        slot.oldest_since = time.monotonic()
        yield self._outcome(slot, task, result)
        if result.failure is FailureKind.MODEL_LOAD:
            # Trying again for every task would fail as often as there are tasks. What another kind of device could
            # still do is left to it.
            alone = len({other.pool.accelerator for other in self._slots}) == 1
            for other_task in backlog.take_model(task.model, slot.pool.accelerator, any_device=alone):
                yield self._outcome(slot, other_task, replace(result, task_id=other_task.task_id, traceback=None))

    def _welcome(self, slot: Slot) -> None:
        try:
            found = ray.get(slot.ready)
        except ray_errors.RayError as error:
            slot.failed_starts += 1
            _kill(slot)
            if slot.failed_starts >= MOST_FAILED_STARTS:
                slot.retired = f"worker {slot.name} does not start: {str(error).strip().splitlines()[-1]}"
            slot.not_before = time.monotonic() + 0.2 * 2**slot.failed_starts
            return
        memory_gb = found["memory_bytes"] / 1e9
        if slot.pool.min_memory_gb is not None and memory_gb < slot.pool.min_memory_gb:
            slot.retired = (
                f"worker {slot.name} found {found['name']} with {memory_gb:.0f} GB, the sweep wants "
                f"{slot.pool.min_memory_gb:g} GB"
            )
            _kill(slot)
            return
        slot.up = True

    def _bury(
        self, slot: Slot, backlog: Backlog, cause: str, kind: FailureKind, most: int = MOST_ATTEMPTS
    ) -> Iterator[Outcome]:
        """A worker is gone, or no good any more: the oldest task is the suspect, the others waited behind it."""
        _, suspect = slot.given.popleft()
        self._return_given(slot, backlog)
        self._attempts[suspect.task_id] += 1
        if self._attempts[suspect.task_id] < most:
            backlog.put_back(suspect, front=False)
        else:
            reason = f"{self._attempts[suspect.task_id]} times while it ran, {cause}"
            self._attempts[suspect.task_id] -= 1  # the outcome counts the present attempt itself
            yield self._outcome(slot, suspect, _failed(suspect, kind, reason))
        _kill(slot)

    def _is_overdue(self, slot: Slot) -> bool:
        if self._task_seconds is None or not (slot.up and slot.given):
            return False
        # What has ended in the meantime is collected first.
        reference = slot.given[0][0]
        return time.monotonic() - slot.oldest_since > self._task_seconds and not ray.wait([reference], timeout=0)[0]

    def _stop(self, slot: Slot, backlog: Backlog) -> Iterator[Outcome]:
        """A call of an actor cannot be cancelled while it runs, so its process goes; others take what waited there."""
        assert self._task_seconds is not None
        cause = f"it took longer than {self._task_seconds / 60:.3g} minutes"
        yield from self._bury(slot, backlog, cause, FailureKind.TIMEOUT, MOST_TIMEOUTS)

    def _confirm_too_large(self, slot: Slot, backlog: Backlog, result: TaskResult) -> Iterator[Outcome]:
        """Out of memory may be what earlier tasks left behind, so it counts from a worker that has run nothing else.

        What needs as much in every direction is then not tried.
        """
        _, task = slot.given.popleft()
        self._return_given(slot, backlog)
        self._attempts[task.task_id] += 1
        _kill(slot)
        if self._attempts[task.task_id] < MOST_OUT_OF_MEMORY:
            slot.again = task
            return
        self._attempts[task.task_id] -= 1
        yield self._outcome(slot, task, result)
        for larger in backlog.take_as_large(task):
            reason = f"not tried: nothing about it is smaller than task {task.task_id}, which ran out of memory"
            skipped = _failed(larger, FailureKind.DOMINATED, reason)
            yield self._outcome(slot, larger, replace(skipped, status=Status.SKIPPED))

    def _return_given(self, slot: Slot, backlog: Backlog) -> None:
        for _, task in reversed(slot.given):
            backlog.put_back(task, front=True)
        slot.given.clear()

    def _finished_already(self) -> Iterator[Outcome]:
        """What workers have answered by now, without waiting for anything."""
        for slot in self._slots:
            for reference, task in slot.given if slot.up else ():
                if not ray.wait([reference], timeout=0)[0]:
                    break
                try:
                    yield self._outcome(slot, task, ray.get(reference))
                except ray_errors.RayError:
                    break

    def _can_go_on(self, backlog: Backlog) -> bool:
        """Whether anything is under way, or waits for a kind of device that still has a worker."""
        return any(
            slot.given or (not slot.retired and (slot.again or backlog.has_work_for(slot.pool.accelerator)))
            for slot in self._slots
        )

    def _outcome(self, slot: Slot, task: Task, result: TaskResult) -> Outcome:
        return Outcome(task, result, slot.pool.accelerator, self._attempts[task.task_id] + 1)


def _start(slot: Slot) -> None:
    slot.starts += 1
    # Ray frees the name of a dead actor a moment after its death, so a successor needs one of its own.
    ray_name = slot.name if slot.starts == 1 else f"{slot.name}-start-{slot.starts}"
    slot.actor = (
        ray.remote(Worker).options(**actor_options(slot.pool, ray_name)).remote(slot.name, slot.pool.accelerator)
    )
    slot.ready = slot.actor.ready.remote()


def _kill(slot: Slot) -> None:
    if slot.actor is not None:
        ray.kill(slot.actor, no_restart=True)
    slot.actor, slot.ready, slot.up, slot.last = None, None, False, None


def _failed(task: Task, failure: FailureKind, reason: str) -> TaskResult:
    now = time.time()
    return TaskResult(task.task_id, Status.FAILED, failure=failure, reason=reason, started_at=now, finished_at=now)


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

"""Which task a free worker gets next: the policy of the scheduler, without Ray, so that it can be tested alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable

from knobs.vision import VisionSetting
from orchestrator.dominance import needs_as_much
from workers.datasets import SampleRef
from workers.tasks import Kind, ModelSource, Task

# Tasks of one group share a loaded model and what the same images become: a part of a data set, named by its first
# sample. Timings share nothing but the model: theirs is one group, which keeps them in the random order of the plan.
Group = tuple[ModelSource, VisionSetting | None, SampleRef | None]


class Backlog:
    """Tasks that wait, grouped so that a worker changes its model last, and encodes each image once per vision setting.

    Each worker takes a part of the samples through all combinations of a vision setting: of several workers, none
    encodes what another has.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        # One line per kind of device, and one (None) for tasks that any device may run.
        self._lines: dict[str | None, OrderedDict[Group, deque[Task]]] = defaultdict(OrderedDict)
        for task in tasks:
            self.put_back(task, front=False)

    def __len__(self) -> int:
        return sum(len(queue) for line in self._lines.values() for queue in line.values())

    def put_back(self, task: Task, *, front: bool) -> None:
        """Return a task: to the front if it was an innocent bystander, to the back if it may be to blame."""
        queue = self._lines[task.accelerator].setdefault(_group(task), deque())
        if front:
            queue.appendleft(task)
        else:
            queue.append(task)

    def next_for(self, accelerator: str, last: Task | None) -> Task | None:
        """The task for a free worker on this kind of device, given what it ran last; None if there is none for it.

        The same model first, and in it the same group, then the same vision setting: the worker keeps what it has
        loaded, and what it has encoded, until nothing is left for it. Then tasks that only this kind of device can run,
        before those that any can; then the longest group, which no other worker has begun.
        """
        own, loaded = self._lines[accelerator], None if last is None else _group(last)
        # Nearly always; looking through all groups would take longer than a short task where there are many.
        same = [] if loaded is None else [(line, loaded) for line in (own, self._lines[None]) if loaded in line]
        candidates = same[:1] or [(line, group) for line in (own, self._lines[None]) for group in line]
        if not candidates:
            return None

        def preference(candidate: tuple[OrderedDict[Group, deque[Task]], Group]) -> tuple[bool, bool, bool, bool, int]:
            line, group = candidate
            same_model = loaded is not None and group[0] == loaded[0]
            same_vision = loaded is not None and group[:2] == loaded[:2]
            return same_model, group == loaded, same_vision, line is own, len(line[group])

        line, group = max(candidates, key=preference)
        task = line[group].popleft()
        if not line[group]:
            del line[group]
        return task

    def take_as_large(self, task: Task) -> list[Task]:
        """Remove and return the waiting tasks that need at least the memory of one that did not fit."""
        taken: list[Task] = []
        line = self._lines[task.accelerator]
        for group in [group for group in line if group[0] == task.model]:
            queue = line.pop(group)
            left: deque[Task] = deque()
            for waiting in queue:
                (taken if needs_as_much(waiting, task) else left).append(waiting)
            if left:
                line[group] = left
        return taken

    def has_work_for(self, accelerator: str) -> bool:
        """Whether any waiting task may run on this kind of device."""
        return bool(self._lines[accelerator] or self._lines[None])

    def take_model(self, model: ModelSource, accelerator: str, *, any_device: bool) -> list[Task]:
        """Remove and return the waiting tasks of a model that cannot be loaded on this kind of device.

        Args:
            any_device: also those that any device may run.
        """
        taken: list[Task] = []
        for line in [self._lines[accelerator], *([self._lines[None]] if any_device else [])]:
            for group in [group for group in line if group[0] == model]:
                taken += line.pop(group)
        return taken


def _group(task: Task) -> Group:
    if task.kind is Kind.LATENCY:
        return task.model, None, None
    return task.model, task.knobs.vision, task.samples[0] if task.samples else None

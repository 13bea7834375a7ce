"""What becomes of outcomes: parts, a row per task, and a row per combination as soon as all of its tasks have ended."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from knobs.vision import VISION_AXES, VisionLayout, VisionSetting
from orchestrator.analysis import aggregate, corrected, worker_trends
from orchestrator.plan import Combination, Plan, Skip, digest
from orchestrator.spec import Sweep
from orchestrator.store import DamagedParts, Part, Place, ResultStore
from workers.datasets import fingerprint
from workers.schema import (
    PARTITIONS,
    SCHEMA_VERSION,
    arrow_schema,
    knob_columns,
    to_table,
)
from workers.tasks import Kind, Status, Task

if TYPE_CHECKING:
    from orchestrator.schedule import Outcome

# Enough to tell the sample sets of a result folder apart, and short enough for a table.
SAMPLES_DIGEST_DIGITS = 16
# Outcomes that may wait to be written before the workers have to.
MOST_WAITING = 64
# Outcomes that are flushed to disk together.
MOST_AT_ONCE = 32


class Recorder:
    """Knows which tasks of a plan have ended, and keeps the result folder in step with them.

    Attributes:
        anchor_failures: rows of anchors that could not be timed, known after `compare_workers`.

    A part that turns out to be damaged when it is read leaves its task not ended: found by `catch_up`, this run does it
    again, found later, the next run of the same command does. The store warns of it.
    """

    def __init__(self, store: ResultStore, sweep: Sweep, plan: Plan, *, retry_failed: bool = False) -> None:
        """
        Args:
            retry_failed: count what failed before as not yet ended.
        """
        self._store = store
        self._sweep = sweep
        self._plan = plan
        self._tasks = {task.task_id: task for task in plan.tasks}
        self._combinations_of: dict[str, list[Combination]] = defaultdict(list)
        for combination in plan.combinations:
            for task_id in _tasks_of(combination):
                self._combinations_of[task_id].append(combination)
        self._trends: pd.DataFrame | None = None
        self.anchor_failures = pd.DataFrame()
        self._trends_made_from: dict[Place, str] = {}
        self.done = self._tasks.keys() & {task_id for kind in Kind for task_id in store.finished(kind)}
        self.failed = set() if retry_failed else {t for t in self._tasks.keys() - self.done if self._failed_before(t)}

    @property
    def num_tasks(self) -> int:
        """Tasks of the plan."""
        return len(self._tasks)

    def todo(self) -> list[Task]:
        """Tasks that have not ended, in the order of the plan."""
        return [t for t in self._plan.tasks if t.task_id not in self.done and t.task_id not in self.failed]

    def note_run(self) -> None:
        """Leave a note of this run, by which others see how far it is."""
        self._store.note_run(
            {
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "task_ids": sorted(self._tasks),
            }
        )

    def catch_up(self) -> None:
        """Write what a killed run may have left out: skips, rows of finished tasks, rows of complete combinations."""
        current = {name for skip in self._plan.skips for name in self._record_skip(skip)}
        if self._plan.combinations:
            # What an earlier plan could not run and this one can, or no longer asks for, is not skipped any more.
            for name in self._store.finished("tasks") - current - self._tasks.keys():
                if (self._store.stamp("tasks", name) or "").startswith(f"{Status.SKIPPED.value}:"):
                    self._store.discard("tasks", name)
        for task in self._plan.tasks:
            if task.task_id in self.done and self._ended(task.task_id)[0] != Status.DONE:
                self._record_recovered(task)
        for combination in self._plan.combinations:
            self._aggregate(combination)

    def commit(self, outcome: Outcome) -> None:
        """Make an outcome durable, and the rows of combinations that are complete with it.

        Raises:
            StoreError: the folder cannot be written.
        """
        for combination in self._commit([outcome]):
            self._aggregate(combination)

    def commit_all(self, outcomes: Iterable[Outcome], ended: Callable[[Outcome], None] = lambda outcome: None) -> None:
        """Commit outcomes as they arrive.

        They are written beside the caller, who goes on giving tasks to workers meanwhile: what arrives while the disk
        is busy is flushed together. Rows of combinations can be made again from their parts, so they wait until no
        outcome does; all are there when this returns. Nothing else may use the recorder or its store until then.

        Args:
            ended: called with each outcome when it is durable; not from the thread of the caller.

        Raises:
            StoreError: the folder cannot be written; raised when the next outcome arrives.
        """
        waiting: Queue[Outcome | None] = Queue(MOST_WAITING)
        errors: list[Exception] = []
        due: OrderedDict[tuple[str, str], Combination] = OrderedDict()

        def write() -> None:
            for batch in _batches(waiting, due):
                if errors:
                    continue  # the run is about to end, and whoever puts more must not have to wait
                try:
                    if batch:
                        complete = self._commit(batch)
                        due.update({(one.combination_id, one.accelerator): one for one in complete})
                        for outcome in batch:
                            ended(outcome)
                    else:
                        self._aggregate(due.popitem(last=False)[1])
                except Exception as error:  # raised again where the outcomes come from; a thread has nobody to tell
                    errors.append(error)
                    due.clear()

        writer = Thread(target=write, name="writer", daemon=True)
        writer.start()
        try:
            for outcome in outcomes:
                waiting.put(outcome)
                if errors:
                    break
        finally:
            # Also when the caller is interrupted: what workers have answered is not lost.
            waiting.put(None)
            writer.join()
        if errors:
            raise errors[0]
        for combination in due.values():
            self._aggregate(combination)

    def _commit(self, outcomes: Sequence[Outcome]) -> list[Combination]:
        """Make outcomes durable, and say which combinations are complete with them.

        Of each outcome the rows come first: a task is done when its part is in place.
        """
        self._store.commit_all([part for outcome in outcomes for part in self._parts_of(outcome)])
        for outcome in outcomes:
            ended = self.done if outcome.result.status is Status.DONE else self.failed
            ended.add(outcome.task.task_id)
        touched = [one for outcome in outcomes for one in self._combinations_of[outcome.task.task_id]]
        return [one for one in touched if all(t in self.done or t in self.failed for t in _tasks_of(one))]

    def _parts_of(self, outcome: Outcome) -> Iterator[Part]:
        task, result = outcome.task, outcome.result
        record = result.environment
        if record is not None and self._store.stamp("environments", record["environment_id"]) is None:
            yield Part("environments", None, record["environment_id"], to_table("environments", [record]))
        place = Place(task.model.name, outcome.accelerator, task.dataset.name)
        if result.anchors is not None:
            # A name of its own for every attempt: what was timed before a failure is not replaced by the next one.
            name = digest([task.task_id, result.started_at])
            yield Part("anchors", place, name, result.anchors, stamp=task.task_id)
        if result.status is Status.DONE:
            assert result.rows is not None
            # Measured again, a task has the same id but other numbers; when it was run tells the two apart.
            yield Part(task.kind, place, task.task_id, result.rows, stamp=repr(result.started_at))
        yield _task_part(place, task, _task_row(outcome))

    # -- combinations -----------------------------------------------------------------------------------------------

    def _aggregate(self, combination: Combination) -> None:
        """Write the row of a combination whose tasks have all ended, unless it is there and made of the same parts."""
        tasks = _tasks_of(combination)
        done = [task_id for task_id in tasks if task_id in self.done]
        failed = [task_id for task_id in tasks if task_id in self.failed]
        if not done or len(done) + len(failed) < len(tasks):
            return
        place = Place(combination.model.name, combination.accelerator, combination.dataset.name)
        parts = digest({"done": [[task_id, self._part_stamp(task_id)] for task_id in done], "failed": failed})
        parts_before, _, trends_before = (
            self._store.stamp("combinations", combination.combination_id, place) or ""
        ).partition(" ")
        trends = trends_before if self._trends is None else self._trends_made_from.get(place, "")
        if (parts_before, trends_before) == (parts, trends):
            return
        latency = self._whole_rows(Kind.LATENCY, combination.latency_tasks)
        if self._trends is not None:
            latency = corrected(latency, self._trends)
        accuracy = self._whole_rows(Kind.ACCURACY, combination.accuracy_tasks)
        if not self.done.issuperset(done):
            return  # a part was damaged: what is left would pass for the whole
        lost = {ref.uid for task_id in failed for ref in self._tasks[task_id].samples}
        behind = {"task_ids": done, "samples_digest": self._samples_digest(done, latency, accuracy)}
        row = self._identity(combination) | behind | aggregate(latency, accuracy, lost)
        self._store.commit(
            "combinations",
            place,
            combination.combination_id,
            to_table("combinations", [row]),
            stamp=parts if self._trends is None else f"{parts} {trends}",
        )

    def _identity(self, combination: Combination) -> dict[str, Any]:
        model, pinned = combination.model, combination.pinned
        timed, scored = combination.timed, combination.scored
        promised: dict[str, Any] = {}
        if pinned is not None:
            promised = {
                "theoretical_num_crops": pinned.num_crops,
                "theoretical_tiling": _promised_tiling(combination.knobs.vision, pinned),
                "theoretical_vision_tokens": pinned.vision_tokens,
            }
        return (
            promised
            | knob_columns(combination.knobs)
            | {
                "prompt": combination.dataset.prompt,
                "timed_output_tokens": timed and timed.max_new_tokens,
                "timed_repeats": timed and timed.repeats,
                "timed_visits": timed and timed.visits,
                "timed_max_relative_error": timed and timed.max_relative_error,
                "timed_limit_s": timed and timed.max_seconds,
                "timed_warmup": timed and timed.warmup,
                "timed_batch_size": timed and timed.batch_size,
                "scored_max_new_tokens": scored and scored.max_new_tokens,
                "scored_batch_size": scored and scored.batch_size,
            }
            | {
                "sweep": self._sweep.name,
                "combination_id": combination.combination_id,
                "revision": model.revision,
                "split": combination.dataset.split,
                "dtype": model.dtype,
                "attention": model.attention,
                "experts": model.experts,
                "moe_renormalization": model.moe_renormalization,
                "engine": model.engine,
                "engine_asked": model.engine,
                "schema_version": SCHEMA_VERSION,
            }
        )

    def _samples_digest(self, done: list[str], latency: pd.DataFrame, accuracy: pd.DataFrame) -> str | None:
        """Of the samples that were scored, or of the timed ones where none was."""
        scored, timed = (set(rows.loc[rows["status"] == "done", "sample_id"]) for rows in (accuracy, latency))
        behind = scored or timed
        refs = {ref for task_id in done for ref in self._tasks[task_id].samples if ref.uid in behind}
        return fingerprint(list(refs))[:SAMPLES_DIGEST_DIGITS] if refs else None

    # -- workers ----------------------------------------------------------------------------------------------------

    def compare_workers(self, *, correct: bool) -> pd.DataFrame:
        """Write what the anchors say of each worker, its rows of the table workers, and return them.

        Args:
            correct: also write the times of all combinations anew, with what they are once that is taken out. It is
                done at the end, because every anchor changes it a little.
        """
        anchors = self._whole_rows("anchors", sorted(self._store.finished("anchors")))
        self.anchor_failures = anchors[anchors["status"] == Status.FAILED.value]
        environments = self._whole_rows("environments", anchors["environment_id"].dropna().unique())
        trends = worker_trends(anchors, environments)
        partition = [column.name for column in PARTITIONS]
        for values, rows in trends.groupby(partition, dropna=False):
            place = Place(*map(str, values))
            name = digest({"workers": [place.model, place.accelerator, place.dataset]})
            stamp = self._trends_made_from[place] = self._anchors_stamp(place)
            if self._store.stamp("workers", name) != stamp:
                table = pa.Table.from_pandas(
                    rows.drop(columns=partition), arrow_schema("workers"), preserve_index=False
                )
                self._store.commit("workers", place, name, table, stamp=stamp)
        if correct and len(trends):
            self._trends = trends
            for combination in self._plan.combinations:
                self._aggregate(combination)
        return trends

    def _anchors_stamp(self, place: Place) -> str:
        """Which anchors there are in a place."""
        names = sorted(self._store.finished("anchors"))
        return digest([name for name in names if self._store.stamp("anchors", name, place) is not None])

    # -- tasks ------------------------------------------------------------------------------------------------------

    def _part_stamp(self, task_id: str) -> str | None:
        return self._store.stamp(self._tasks[task_id].kind, task_id)

    def _failed_before(self, task_id: str) -> bool:
        """Failed, or not tried because one that is no larger had failed."""
        return self._ended(task_id)[0] in (Status.FAILED, Status.SKIPPED)

    def _ended(self, task_id: str) -> tuple[str, int]:
        """How a task ended, as its row says ('' if there is none), and how many of its rows failed."""
        status, _, failed_rows = (self._store.stamp("tasks", task_id) or "").partition(" ")
        return status, int(failed_rows or 0)

    def _record_skip(self, skip: Skip) -> list[str]:
        """A row per kind of device and data set, unless it is there with the same reason; the names of all of them."""
        names = []
        row = {"sweep": self._sweep.name, "status": Status.SKIPPED.value, "reason": skip.reason}
        stamp = f"{Status.SKIPPED.value}: {skip.reason}"
        for accelerator in self._plan.accelerators:
            for dataset in self._plan.datasets:
                name = digest({"skip": [skip.model, accelerator, dataset, {k: str(v) for k, v in skip.point.items()}]})
                names.append(name)
                if self._store.stamp("tasks", name) == stamp:
                    continue
                row |= {"task_id": name, **_requested_knobs(skip.point)}
                place = Place(skip.model, accelerator, dataset)
                self._store.commit("tasks", place, name, to_table("tasks", [row]), stamp=stamp)
        return names

    def _record_recovered(self, task: Task) -> None:
        """A run died between the part and its task row; what the part says is still known, its times are not."""
        rows = self._whole_rows(task.kind, [task.task_id])
        if task.task_id not in self.done:
            return  # it is damaged
        place = Place(task.model.name, rows["accelerator"].iloc[0], task.dataset.name)
        row = _identity_of(task) | {
            "status": Status.DONE.value,
            "num_failed_rows": int((rows["status"] == Status.FAILED.value).sum()),
            "worker": _first(rows["worker"]),
            "device_name": _first(rows["device_name"]),
            "started_at": rows["started_at"].min(),
        }
        self._store.commit_all([_task_part(place, task, row)])

    # -- what there is ----------------------------------------------------------------------------------------------

    def results(self) -> pd.DataFrame:
        """The rows of this plan's combinations."""
        names = dict.fromkeys(c.combination_id for c in self._plan.combinations)
        try:
            rows = self._store.rows("combinations", names)
        except DamagedParts as damage:
            # Nothing is lost with such a row: the parts that it was made from are there.
            for combination in self._plan.combinations:
                if combination.combination_id in damage.names:
                    self._aggregate(combination)
            rows = self._whole_rows("combinations", names)
        return rows[rows["accelerator"].isin(self._plan.accelerators)]

    def vision_rows(self) -> pd.DataFrame:
        """Sample rows that show every vision setting once: those of its largest combination that has ended.

        Scored rows, or timed ones where nothing was scored: what becomes of an image does not depend on other knobs, so
        that a sweep of any size is judged by a few of its parts. The largest keeps the most of the accuracy.
        """
        largest: dict[tuple[str, str, VisionSetting], Combination] = {}
        for combination in self._plan.combinations:
            if self.done.isdisjoint(_tasks_of(combination)):
                continue
            key = (combination.model.name, combination.dataset.name, combination.knobs.vision)
            if key not in largest or _size(largest[key]) < _size(combination):
                largest[key] = combination
        parts = []
        for combination in largest.values():
            scored = [task_id for task_id in combination.accuracy_tasks if task_id in self.done]
            timed = [task_id for task_id in combination.latency_tasks if task_id in self.done]
            parts.append(self._whole_rows(*((Kind.ACCURACY, scored) if scored else (Kind.LATENCY, timed))))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def importance_rows(self) -> pd.DataFrame:
        """The rows of the importance tasks that are done."""
        done = [task.task_id for task in self._plan.tasks if task.task_id in self.done]
        rows = self._whole_rows(Kind.IMPORTANCE, done)
        return rows[rows["status"] == Status.DONE.value]

    def failed_rows(self) -> int:
        """How many rows of single samples failed inside tasks that are done."""
        return sum(self._ended(task_id)[1] for task_id in self.done)

    def failed_samples(self) -> pd.DataFrame:
        """The samples behind those rows: `sample_id` and, as `error`, the first reason in the order of the plan.

        Only tasks that have failed rows are opened, one at a time.
        """
        reasons: dict[str, str | None] = {}
        for task in self._plan.tasks:
            if task.task_id in self.done and self._ended(task.task_id)[1]:
                rows = self._whole_rows(task.kind, [task.task_id], ["sample_id", "status", "error"])
                broken = rows[rows["status"] == Status.FAILED.value]
                for sample_id, error in zip(broken["sample_id"], broken["error"], strict=True):
                    reasons.setdefault(sample_id, error)
        return pd.DataFrame({"sample_id": list(reasons), "error": list(reasons.values())}, dtype=object)

    def failures(self) -> pd.DataFrame:
        """The task rows of what failed."""
        return self._whole_rows("tasks", sorted(self.failed))

    def _whole_rows(self, table: str, names: Iterable[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of those parts that are whole; the tasks of the others have not ended any more."""
        names = list(names)
        try:
            return self._store.rows(table, names, columns)
        except DamagedParts as damage:
            self.done -= damage.names
            self.failed -= damage.names
            return self._whole_rows(table, names, columns)


def _size(combination: Combination) -> tuple[int, int]:
    return len(combination.knobs.active_blocks), combination.knobs.moe_top_k or 0


def _tasks_of(combination: Combination) -> tuple[str, ...]:
    return combination.latency_tasks + combination.accuracy_tasks


def _batches(waiting: Queue[Outcome | None], due: Mapping[Any, Any]) -> Iterator[list[Outcome]]:
    """What waits, up to a limit, until None comes; an empty batch where nothing waits and something is due."""
    ended = False
    while not ended:
        batch: list[Outcome] = []
        try:
            outcome = waiting.get(block=not due)
            while outcome is not None:
                batch.append(outcome)
                if len(batch) == MOST_AT_ONCE:
                    break
                outcome = waiting.get_nowait()
            else:
                ended = True
        except Empty:
            pass
        if batch or not ended:
            yield batch


def _task_part(place: Place, task: Task, row: dict[str, Any]) -> Part:
    # How it ended is kept as the stamp too, so that neither a rerun nor a summary need open every part.
    stamp = f"{row['status']} {row['num_failed_rows'] or 0}"
    return Part("tasks", place, task.task_id, to_table("tasks", [row]), stamp)


def _identity_of(task: Task) -> dict[str, Any]:
    return knob_columns(task.knobs) | {
        "task_id": task.task_id,
        "combination_id": task.combination_id or None,
        "sweep": task.sweep,
        "kind": task.kind.value,
        "num_samples": len(task.samples),
    }


def _task_row(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    failed_rows = None
    if result.rows is not None:
        failed_rows = sum(status == Status.FAILED.value for status in result.rows["status"].to_pylist())
    return (
        _identity_of(outcome.task)
        | dict(result.worker)
        | {
            "status": result.status.value,
            "failure": None if result.failure is None else result.failure.value,
            "reason": result.reason,
            "traceback": result.traceback,
            "num_failed_rows": failed_rows,
            "attempts": outcome.attempts,
            "started_at": datetime.fromtimestamp(result.started_at, UTC),
            "finished_at": datetime.fromtimestamp(result.finished_at, UTC),
            "duration_s": result.finished_at - result.started_at,
        }
    )


def _promised_tiling(setting: VisionSetting, pinned: VisionLayout) -> str | None:
    """The tiling that every image gets. Of a mere number of crops only one is the same grid for every aspect."""
    same_for_all = setting.knob == "image_size" or pinned.num_crops == 1
    return f"{pinned.tiling[0]}x{pinned.tiling[1]}" if same_for_all else None


def _first(values: pd.Series) -> Any:
    """The first value that is there: the row of a failed sample may say nothing."""
    return next(iter(values.dropna()), None)


def _requested_knobs(point: Mapping[str, Any]) -> dict[str, Any]:
    """The knob columns of a point that never became effective knobs."""
    axis = next((name for name in VISION_AXES if name in point), "native")
    blocks = point.get("active_blocks")
    return {
        "vision_knob": axis,
        "vision_value": str(point[axis]) if axis in point else None,
        "image_size": point.get("image_size"),
        "tier": point.get("tier"),
        "force_full_tokens": point.get("force_full_tokens"),
        "resize_to_fill": point.get("resize_to_fill"),
        "moe_top_k": point.get("moe_top_k"),
        "num_active_blocks": blocks if isinstance(blocks, int) else len(blocks) if blocks else None,
        "active_blocks": None if blocks is None or isinstance(blocks, int) else list(blocks),
    }

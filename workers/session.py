"""A session: one loaded model, opened data sets, and `run`, which turns a task into rows. Knows nothing of Ray."""

from __future__ import annotations

import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import torch

from knobs.errors import KnobError
from knobs.importance import Method
from workers.accuracy import accuracy_rows
from workers.anchor import Anchors
from workers.candidates import importance_rows, reference_answer
from workers.conditions import Observer
from workers.datasets import Dataset, DatasetSource, SampleRef
from workers.environment import environment
from workers.errors import DatasetError, DeviceError, ModelError, RowMismatch, SampleError
from workers.latency import TimedSample, latency_rows
from workers.models.adapter import VisionLanguageModel
from workers.models.loading import default_device, is_out_of_memory, load_source
from workers.nvml import Gpu, gpu_of
from workers.prepared import PreparedSample, PreparedSamples, checked, prepared_samples, preprocess
from workers.probes import CPU, Device, current_device
from workers.rows import RowMaker
from workers.schema import to_table
from workers.tasks import (
    FailureKind,
    Kind,
    ModelSource,
    Status,
    Task,
    TaskResult,
)


class Session:
    """Keeps one model until a task names another one, what images became under one setting, and opened data sets."""

    def __init__(
        self,
        name: str = "local",
        device: torch.device | None = None,
        accelerator: str | None = None,
        load: Callable[[ModelSource, torch.device], VisionLanguageModel] = load_source,
    ) -> None:
        """
        Args:
            name: of the worker, as it stands in the rows.
            device: where models are loaded; the first GPU, else the CPU, if None.
            accelerator: kind of device that its rows will be filed under; whatever is there if None. For cpu the CPU
                is used, whatever else there is.
            load: makes the model of a task.

        Raises:
            DeviceError: the device is of another kind, so that its times would be filed under a wrong name.
        """
        self.name = name
        wants_cpu = accelerator is not None and accelerator.lower() == CPU
        self.device = torch.device("cpu") if wants_cpu else device or default_device()
        self.found: Device = current_device(self.device)
        if accelerator is not None and accelerator.lower() != self.found.accelerator.lower():
            raise DeviceError(f"this worker was started for {accelerator} but {_found_instead(self.found)}")
        self._load = load
        self._source: ModelSource | None = None
        self._vlm: VisionLanguageModel | None = None
        self._datasets: dict[DatasetSource, Dataset] = {}
        self._prepared = PreparedSamples()
        self._anchors = Anchors()
        self._rows = RowMaker(name, self.found)
        self._anchor_rows: list[dict[str, Any]] = []
        self._counts_of_former_models = Counter[str]()

    @property
    def counts(self) -> Counter[str]:
        """How often each stage has run so far, over all models: the fields of `workers.models.adapter.Counts`."""
        present = {} if self._vlm is None else self._vlm.counts.as_dict()
        return self._counts_of_former_models + Counter(present)

    def run(self, task: Task) -> TaskResult:
        """Rows of a task, or the reason why there are none; what goes wrong comes back as data."""
        started = time.time()
        self._anchor_rows = []
        try:
            vlm = self._model(task.model)
            dataset = self._dataset(task.dataset)
            self._rows.environment = environment(self.device)  # after the model has come: loading may set flags
            if task.kind is Kind.LATENCY:
                self._prepared.leave_device()  # what is kept there would be in the peak memory of every answer
            self._time_anchor(task, vlm, dataset)
            with vlm.knobs(moe_top_k=task.knobs.moe_top_k, active_blocks=task.knobs.active_blocks):
                rows = {
                    Kind.LATENCY: self._latency,
                    Kind.ACCURACY: self._accuracy,
                    Kind.IMPORTANCE: self._importance,
                }[task.kind](task, vlm, dataset)
            with suppress(torch.AcceleratorError):  # the rows are there; the next task will meet the lost device
                self._time_anchor(task, vlm, dataset)
            return self._result(task, started, Status.DONE, rows=to_table(task.kind, rows))
        except Exception as error:  # a worker must outlive whatever a task does to it; the kind decides what follows
            if is_out_of_memory(error):
                self._prepared.clear()  # nothing that could be made again may be missing for the next task
            return self._result(
                task,
                started,
                Status.FAILED,
                failure=_failure_kind(error),
                reason=_reason(error),
                traceback=traceback.format_exc(),
            )

    # -- what a task needs, kept warm -------------------------------------------------------------------------------

    def _model(self, source: ModelSource) -> VisionLanguageModel:
        if self._vlm is None or self._source != source:
            self._counts_of_former_models = self.counts
            self._prepared.clear()
            self._vlm = self._source = None
            gc.collect()  # the old weights go before the new ones come; hooks tie them into cycles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._vlm = self._load(source, self.device)
            self._source = source
        return self._vlm

    def _dataset(self, source: DatasetSource) -> Dataset:
        if source not in self._datasets:
            self._datasets[source] = Dataset.open(source)
        return self._datasets[source]

    # -- latency ----------------------------------------------------------------------------------------------------

    @cached_property
    def _gpu(self) -> Gpu:
        return gpu_of(self.device)

    @cached_property
    def _observer(self) -> Observer:
        return Observer(self.device, self._gpu)

    def _latency(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> list[dict[str, Any]]:
        opened = partial(self._open, task, vlm, dataset)
        return latency_rows(task, vlm, opened, self._rows, self._observer, self._gpu)

    def _time_anchor(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> None:
        """The anchor of a task, where there is one and it is due; before and behind it, so that a change shows."""
        if task.anchor is not None:
            # As the anchor sees it: what the task's setting refuses must not give workers different yardsticks.
            opened = partial(self._open, replace(task, knobs=task.anchor.knobs), vlm, dataset)
            self._anchor_rows += self._anchors.rows_if_due(task, task.anchor, vlm, opened, self._rows, self._observer)

    def _open(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset, ref: SampleRef) -> TimedSample:
        sample = checked(dataset, ref)
        images = tuple(sample.images())
        inputs = preprocess(task, vlm, sample, images)  # what is refused is found here, not while timing
        return TimedSample(sample, images, inputs.num_prompt_tokens)

    # -- accuracy ---------------------------------------------------------------------------------------------------

    def _accuracy(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> list[dict[str, Any]]:
        return accuracy_rows(task, vlm, dataset, self._rows, self._prepared)

    # -- importance -------------------------------------------------------------------------------------------------

    def _importance(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> list[dict[str, Any]]:
        method = Method(task.method or "")
        protocol, rows = task.protocol, list[dict[str, Any]]()
        with prepared_samples(task, vlm, dataset, self._prepared) as samples:
            for refs in _batches(task.samples, protocol.batch_size):
                about = {
                    "task_id": task.task_id,
                    "sweep": task.sweep,
                    "method": method.value,
                    "worker": self.name,
                    "device_name": self.found.name,
                    "environment_id": self._rows.environment.get("environment_id"),
                    "started_at": datetime.now(UTC),
                }
                ready: list[PreparedSample] = []
                for ref, found in zip(refs, samples, strict=False):  # as many of the samples as there are references
                    try:
                        ready.append(_usable(found, method))
                    except SampleError as error:
                        failed = {"sample_id": ref.uid, "status": Status.FAILED.value, "error": str(error)}
                        rows.append(about | failed)
                made = importance_rows(vlm, ready, method, task.candidates, protocol.metric, protocol.max_new_tokens)
                rows += [about | row | {"status": Status.DONE.value} for row in made]
        return rows

    def _result(self, task: Task, started: float, status: Status, **outcome: Any) -> TaskResult:
        found = {"worker": self.name, "host": self.found.host, "device_name": self.found.name}
        return TaskResult(
            task.task_id,
            status,
            worker=found,
            environment=self._rows.environment or None,
            anchors=to_table("anchors", self._anchor_rows) if self._anchor_rows else None,
            started_at=started,
            finished_at=time.time(),
            **outcome,
        )


def _found_instead(found: Device) -> str:
    if found.accelerator != CPU:
        return f"found {found.accelerator}"
    if torch.cuda.is_available():
        return "was given the CPU"
    return f"torch sees no GPU (torch {torch.__version__}, CUDA {torch.version.cuda or 'none'})"


def _usable(found: PreparedSample | SampleError, method: Method) -> PreparedSample:
    if isinstance(found, SampleError):
        raise found
    if method is Method.NLL:
        reference_answer(found)
    return found


def _batches(samples: Sequence[SampleRef], size: int) -> Iterator[Sequence[SampleRef]]:
    for begin in range(0, len(samples), size):
        yield samples[begin : begin + size]


def _failure_kind(error: BaseException) -> FailureKind:
    """The one place where an exception becomes a kind of failure."""
    match error:
        case _ if is_out_of_memory(error):
            return FailureKind.OUT_OF_MEMORY
        case torch.AcceleratorError():
            return FailureKind.DEVICE_LOST
        case ModelError():
            return FailureKind.MODEL_LOAD
        case DatasetError() | RowMismatch():
            return FailureKind.BAD_DATASET
        case KnobError():
            return FailureKind.KNOB
        case SampleError():
            return FailureKind.BAD_SAMPLE
        case _:
            return FailureKind.ERROR


def _reason(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    known = isinstance(error, ModelError | DatasetError | RowMismatch | KnobError | SampleError)
    return first if known and first else f"{type(error).__name__}: {first}".rstrip(": ")

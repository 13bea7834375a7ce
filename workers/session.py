"""A session: one loaded model, opened data sets, and `run`, which turns a task into rows. Knows nothing of Ray."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image

from knobs.errors import KnobError
from knobs.importance import Method
from workers.anchor import Anchors
from workers.candidates import importance_rows, reference_answer
from workers.conditions import Observer
from workers.datasets import Dataset, DatasetSource, Sample, SampleRef
from workers.environment import environment
from workers.errors import DatasetError, DeviceError, ModelError, RowMismatch, SampleError
from workers.latency import TimedSample, latency_rows
from workers.models.adapter import VisionLanguageModel
from workers.models.loading import default_device, is_out_of_memory, load_source
from workers.models.processing import Inputs
from workers.nvml import Gpu, gpu_of
from workers.prepared import PreparedSample, PreparedSamples
from workers.probes import CPU, Device, current_device
from workers.rows import RowMaker, engine_columns
from workers.schema import to_table
from workers.scorers import scorer
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

    def __init__(self, name: str = "local", device: torch.device | None = None, accelerator: str | None = None) -> None:
        """
        Args:
            name: of the worker, as it stands in the rows.
            device: where models are loaded; the first GPU, else the CPU, if None.
            accelerator: kind of device that its rows will be filed under; whatever is there if None. For cpu the CPU
                is used, whatever else there is.

        Raises:
            DeviceError: the device is of another kind, so that its times would be filed under a wrong name.
        """
        self.name = name
        wants_cpu = accelerator is not None and accelerator.lower() == CPU
        self.device = torch.device("cpu") if wants_cpu else device or default_device()
        self.found: Device = current_device(self.device)
        if accelerator is not None and accelerator.lower() != self.found.accelerator.lower():
            raise DeviceError(f"this worker was started for {accelerator} but {_found_instead(self.found)}")
        self._source: ModelSource | None = None
        self._vlm: VisionLanguageModel | None = None
        self._datasets: dict[DatasetSource, Dataset] = {}
        self._prepared = PreparedSamples()
        self._anchors = Anchors()
        self._rows = RowMaker(name, self.found)
        self._anchor_rows: list[dict[str, Any]] = []

    def run(self, task: Task) -> TaskResult:
        """Rows of a task, or the reason why there are none; what goes wrong comes back as data."""
        started = time.time()
        self._anchor_rows = []
        try:
            vlm = self._model(task.model)
            dataset = self._dataset(task.dataset)
            self._rows.environment = environment(self.device)  # after the model has come: loading may set flags
            self._time_anchor(task, vlm, dataset)
            with vlm.knobs(moe_top_k=task.knobs.moe_top_k, active_blocks=task.knobs.active_blocks):
                rows = {
                    Kind.LATENCY: self._latency,
                    Kind.ACCURACY: self._accuracy,
                    Kind.IMPORTANCE: self._importance,
                }[task.kind](task, vlm, dataset)
            self._time_anchor(task, vlm, dataset)
            return self._result(task, started, Status.DONE, rows=to_table(task.kind, rows))
        except Exception as error:  # a worker must outlive whatever a task does to it; the kind decides what follows
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
            self._vlm = self._source = None
            gc.collect()  # the old weights go before the new ones come; hooks tie them into cycles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._vlm = load_source(source, self.device)
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
            opened = partial(self._open, task, vlm, dataset)
            self._anchor_rows += self._anchors.rows_if_due(task, task.anchor, vlm, opened, self._rows, self._observer)

    def _open(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset, ref: SampleRef) -> TimedSample:
        sample = _checked(dataset, ref)
        image = sample.image()
        inputs = self._preprocess(task, vlm, sample, image)  # what is refused is found here, not while timing
        question = task.dataset.prompt_for(sample.question)
        return TimedSample(sample, image, question, inputs.num_prompt_tokens)

    # -- accuracy ---------------------------------------------------------------------------------------------------

    def _accuracy(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> list[dict[str, Any]]:
        assert task.protocol.metric is not None
        score = scorer(task.protocol.metric)
        rows: list[dict[str, Any]] = []
        self._prepared.enter((task.model, task.dataset, task.knobs.vision))
        for refs in _batches(task.samples, task.protocol.batch_size):
            ready: list[tuple[PreparedSample, dict[str, Any]]] = []
            for ref in refs:
                begun = datetime.now(UTC)
                try:
                    prepared = self._prepare(task, vlm, dataset, ref)
                except SampleError as error:
                    rows.append(self._rows.failed(task, vlm, ref, error) | {"metric": score.name})
                    continue
                height, width = prepared.height, prepared.width
                row = self._rows.sample(task, vlm, prepared.sample, height, width, prepared.inputs, begun)
                ready.append((prepared, row))
            batch = [(prepared.inputs, prepared.features) for prepared, _ in ready]
            answers = vlm.answer(batch, task.protocol.max_new_tokens) if batch else []
            engine_used = engine_columns(vlm.engine_used)
            for (prepared, row), tokens in zip(ready, answers, strict=True):
                prediction = vlm.text(tokens)
                rows.append(
                    row
                    | engine_used
                    | {
                        "output_tokens": len(tokens),
                        "stop_reason": "eos" if tokens and tokens[-1] in vlm.end_token_ids else "length",
                        "question_type": prepared.sample.question_type,
                        "prediction": prediction,
                        "metric": score.name,
                        "score": score.score(prediction, prepared.sample.answers),
                    }
                )
        return rows

    # -- importance -------------------------------------------------------------------------------------------------

    def _importance(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> list[dict[str, Any]]:
        method = Method(task.method or "")
        rows: list[dict[str, Any]] = []
        self._prepared.enter((task.model, task.dataset, task.knobs.vision))
        for refs in _batches(task.samples, task.protocol.batch_size):
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
            for ref in refs:
                try:
                    prepared = self._prepare(task, vlm, dataset, ref)
                    if method is Method.NLL:
                        reference_answer(prepared)
                except SampleError as error:
                    failed = {"sample_id": ref.uid, "status": Status.FAILED.value, "error": str(error)}
                    rows.append(about | failed)
                    continue
                ready.append(prepared)
            protocol = task.protocol
            made = importance_rows(vlm, ready, method, task.candidates, protocol.metric, protocol.max_new_tokens)
            rows += [about | row | {"status": Status.DONE.value} for row in made]
        return rows

    @torch.inference_mode()
    def _prepare(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset, ref: SampleRef) -> PreparedSample:
        """A sample up to its vision features, which no other knob changes: made once for all combinations."""
        found = self._prepared.find(ref, self.device)
        if found is not None:
            return found
        sample = _checked(dataset, ref)
        image = sample.image()
        inputs = vlm.transfer(self._preprocess(task, vlm, sample, image))
        features = self._prepared.features_of(sample, self.device)
        if features is None:
            features = vlm.encode_images(inputs.vision)
        without_pixels = {name: tensor for name, tensor in inputs.vision.items() if not name.startswith("pixel")}
        made = PreparedSample(sample, image.height, image.width, replace(inputs, vision=without_pixels), features)
        self._prepared.keep(made)
        return made

    def _preprocess(self, task: Task, vlm: VisionLanguageModel, sample: Sample, image: Image.Image) -> Inputs:
        question = task.dataset.prompt_for(sample.question)
        try:
            return vlm.preprocess([image], question, task.knobs.vision)
        except SampleError as error:
            raise SampleError(f"{sample.ref.uid}: {error}") from error

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


def _checked(dataset: Dataset, ref: SampleRef) -> Sample:
    sample = dataset.sample(ref.uid)
    if sample.ref.digest != ref.digest:
        raise RowMismatch(f"{ref.uid} has changed since the sweep was planned; run the sweep again to plan anew")
    return sample


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

"""A session: one loaded model, opened data sets, and `run`, which turns a task into rows. Knows nothing of Ray."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from PIL import Image

from knobs.errors import KnobError
from knobs.importance import Method
from knobs.vision import VisionLayout, VisionSetting
from workers.candidates import importance_rows, reference_answer
from workers.conditions import Observer, condition_columns
from workers.datasets import Dataset, DatasetSource, Sample, SampleRef
from workers.environment import environment
from workers.errors import DatasetError, DeviceError, ModelError, RowMismatch, SampleError
from workers.flops import StageFlops, count_flops
from workers.measure import Timing, time_answer
from workers.models.adapter import VisionLanguageModel
from workers.models.engines import EngineUse
from workers.models.loading import default_device, is_out_of_memory, load_source
from workers.models.processing import Inputs
from workers.prepared import PreparedSample, PreparedSamples
from workers.probes import CPU, Device, current_device
from workers.schema import (
    SCHEMA_VERSION,
    STAGES,
    FailureKind,
    Kind,
    ModelSource,
    Status,
    Task,
    TaskResult,
    knob_columns,
    to_table,
)
from workers.scorers import scorer
from workers.stopping import Repeats
from workers.validity import reasons

# The times whose medians have to be known well enough before repeats end.
WATCHED = ("total_ms", "prefill_ms", "tpot_ms")

# Counting takes as long as several answers. Where a setting leaves the number of crops to the image, two samples are a
# rough estimate of the mean; each row that is counted is exact.
FLOPS_COUNTED_ON = 2

# Why a row does not count, in `invalid_reasons`.
TOKEN_MISMATCH = "token_mismatch"


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
        self._observer: Observer | None = None
        self._environment: dict[str, Any] = {}

    def run(self, task: Task) -> TaskResult:
        """Rows of a task, or the reason why there are none; what goes wrong comes back as data."""
        started = time.time()
        try:
            vlm = self._model(task.model)
            dataset = self._dataset(task.dataset)
            self._environment = environment(self.device)  # after the model has come: loading may set flags
            with vlm.knobs(moe_top_k=task.knobs.moe_top_k, active_blocks=task.knobs.active_blocks):
                rows = {
                    Kind.LATENCY: self._latency,
                    Kind.ACCURACY: self._accuracy,
                    Kind.IMPORTANCE: self._importance,
                }[task.kind](task, vlm, dataset)
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

    def _latency(self, task: Task, vlm: VisionLanguageModel, dataset: Dataset) -> list[dict[str, Any]]:
        """Warm-up of every sample, then rounds over all samples: a drift meets every sample alike."""
        if task.protocol.batch_size != 1:
            raise NotImplementedError(f"latency is timed one sample at a time, not {task.protocol.batch_size}")
        rows: list[dict[str, Any]] = []
        usable: list[tuple[Sample, Image.Image]] = []
        flops: dict[str, dict[str, Any]] = {}
        longest = 0
        for ref in task.samples:
            try:
                sample = _checked(dataset, ref)
                image = sample.image()
                inputs = self._preprocess(task, vlm, sample, image)  # what is refused is found here, warm-up or not
            except SampleError as error:
                rows.append(self._failed_row(task, vlm, ref, error))
                continue
            if len(usable) < FLOPS_COUNTED_ON:
                flops[ref.uid] = _flops_columns(count_flops(vlm, vlm.transfer(inputs), task.protocol.max_new_tokens))
            usable.append((sample, image))
            longest = max(longest, inputs.num_prompt_tokens)
        vlm.engine.reserve(1, longest + task.protocol.max_new_tokens)
        # Round by round, because a capture for one sample undoes part of the warm-up of those before it.
        for _ in range(vlm.engine.warm_up_rounds + task.protocol.warmup):
            for sample, image in usable:
                self._time(task, vlm, sample, image)
        protocol = task.protocol
        observer = self._observer = self._observer or Observer(self.device)
        repeats = Repeats(protocol.repeats, protocol.max_relative_error, protocol.max_seconds)
        timed: list[dict[str, Any]] = []
        begin, stopped = time.monotonic(), None
        while usable and stopped is None:
            made = []
            for sample, image in usable:
                begun = datetime.now(UTC)
                before = observer.snapshot()
                timing = self._time(task, vlm, sample, image)
                after = observer.snapshot()
                row = self._row(task, vlm, sample, image.height, image.width, timing.inputs, begun)
                why = [*row["invalid_reasons"], *reasons(before, after)]
                row |= {"invalid_reasons": why, "valid": not why} | condition_columns(before, after)
                row |= {"batch_size": protocol.batch_size} | flops.get(sample.ref.uid, {})
                made.append(row | _timing_columns(timing))
            repeats.add({name: np.array([row[name] for row in made]) for name in WATCHED if made[0][name] is not None})
            timed += [row | {"repeat": len(timed) // len(usable)} for row in made]
            stopped = repeats.stopped_by(time.monotonic() - begin)
        ended = {"stopped_by": stopped and stopped.value, "relative_error": repeats.relative_error}
        return rows + [row | ended for row in timed]

    def _time(self, task: Task, vlm: VisionLanguageModel, sample: Sample, image: Image.Image) -> Timing:
        question = task.dataset.prompt_for(sample.question)
        return time_answer(vlm, [image], question, task.knobs.vision, task.protocol.max_new_tokens)

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
                    rows.append(self._failed_row(task, vlm, ref, error) | {"metric": score.name})
                    continue
                row = self._row(task, vlm, prepared.sample, prepared.height, prepared.width, prepared.inputs, begun)
                ready.append((prepared, row))
            batch = [(prepared.inputs, prepared.features) for prepared, _ in ready]
            answers = vlm.answer(batch, task.protocol.max_new_tokens) if batch else []
            engine_used = _engine_columns(vlm.engine_used)
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
                "environment_id": self._environment.get("environment_id"),
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

    # -- rows -------------------------------------------------------------------------------------------------------

    def _row(
        self,
        task: Task,
        vlm: VisionLanguageModel,
        sample: Sample,
        height: int,
        width: int,
        inputs: Inputs,
        begun: datetime,
    ) -> dict[str, Any]:
        layout = vlm.card.geometry.layout(height, width, task.knobs.vision)
        lacking = [TOKEN_MISMATCH] if _lacks_tokens(layout, inputs, task.knobs.vision) else []
        promised = (
            {}
            if layout is None
            else {
                "selected_crops": layout.num_crops,
                "selected_tiling": f"{layout.tiling[0]}x{layout.tiling[1]}",
                "tower_passes": layout.tower_passes,
                "theoretical_vision_tokens": layout.vision_tokens,
                "predicted_vision_tokens": layout.prompt_vision_tokens,
                "special_tokens": layout.special_tokens,
                "aspect_mismatch": layout.aspect_mismatch,
                "target_resolution": f"{layout.target_height}x{layout.target_width}",
                "target_aspect": layout.target_width / layout.target_height,
            }
        )
        return (
            self._identity(task, vlm)
            | promised
            | {
                "sample_id": sample.ref.uid,
                "image_id": sample.image_id,
                "image_height": height,
                "image_width": width,
                "image_aspect": width / height,
                "actual_num_crops": inputs.num_crops,
                "actual_vision_tokens": inputs.num_vision_tokens,
                "prompt_tokens": inputs.num_prompt_tokens,
                "status": Status.DONE.value,
                "valid": not lacking,
                "invalid_reasons": lacking,
                "started_at": begun,
            }
        )

    def _failed_row(self, task: Task, vlm: VisionLanguageModel, ref: SampleRef, error: SampleError) -> dict[str, Any]:
        return self._identity(task, vlm) | {
            "sample_id": ref.uid,
            "status": Status.FAILED.value,
            "error": str(error),
            "valid": False,
            "invalid_reasons": ["failed"],
            "started_at": datetime.now(UTC),
        }

    def _identity(self, task: Task, vlm: VisionLanguageModel) -> dict[str, Any]:
        model = task.model
        return knob_columns(task.knobs) | {
            "sweep": task.sweep,
            "combination_id": task.combination_id,
            "task_id": task.task_id,
            "revision": model.revision,
            "device_name": self.found.name,
            "split": task.dataset.split,
            "dtype": model.dtype,
            "attention": model.attention,
            "experts": model.experts,
            "moe_renormalization": model.moe_renormalization,
            "engine": model.engine,
            "schema_version": SCHEMA_VERSION,
            "worker": self.name,
            "environment_id": self._environment.get("environment_id"),
            "device_uuid": self.found.uuid,
            "threads": self.found.threads,
            "niceness": self.found.niceness,
        }

    def _result(self, task: Task, started: float, status: Status, **outcome: Any) -> TaskResult:
        found = {"worker": self.name, "host": self.found.host, "device_name": self.found.name}
        return TaskResult(
            task.task_id,
            status,
            worker=found,
            environment=self._environment or None,
            started_at=started,
            finished_at=time.time(),
            **outcome,
        )


def _lacks_tokens(layout: VisionLayout | None, inputs: Inputs, setting: VisionSetting) -> bool:
    """Whether full tokens were promised and the prompt holds another number."""
    promised = layout is not None and setting.force_full_tokens
    return bool(promised and layout and inputs.num_vision_tokens != layout.vision_tokens)


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


def _timing_columns(timing: Timing) -> dict[str, Any]:
    stages = {name: getattr(timing, name) for name in STAGES}
    return stages | {
        "decode_step_ms": list(timing.decode_step_ms),
        "ttft_ms": timing.ttft_ms,
        "tpot_ms": timing.tpot_ms,
        "total_ms": timing.total_ms,
        "residual_ms": timing.residual_ms,
        "output_tokens": timing.output_tokens,
        "peak_memory_bytes": timing.peak_memory_bytes,
        "kv_cache_bytes": timing.kv_cache_bytes,
        **_engine_columns(timing.engine_used),
    }


def _engine_columns(used: EngineUse | None) -> dict[str, Any]:
    """What really decoded, in place of what was asked for."""
    return {} if used is None else {"engine": used.engine, "engine_note": used.note}


def _flops_columns(flops: StageFlops) -> dict[str, Any]:
    return {
        "vision_flops": flops.vision,
        "projector_flops": flops.projector,
        "prefill_flops": flops.prefill,
        "decode_flops": flops.decode,
        "flops": flops.total,
    }


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

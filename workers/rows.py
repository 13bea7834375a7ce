"""What every row of a sample says, whatever is measured on it: who, which model and knobs, which image, which crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from knobs.vision import VisionLayout
from workers.datasets import Sample, SampleRef
from workers.errors import SampleError
from workers.models.adapter import VisionLanguageModel
from workers.models.engines import EngineUse
from workers.models.processing import Inputs
from workers.probes import Device
from workers.schema import SCHEMA_VERSION, knob_columns
from workers.tasks import Knobs, Status, Task

# Height and width of an image in pixels.
Size = tuple[int, int]

# Why a row does not count, in `invalid_reasons`.
TOKEN_MISMATCH = "token_mismatch"


@dataclass
class RowMaker:
    """Makes the rows of one worker.

    Attributes:
        worker: its name.
        found: its device.
        environment: the record of what it runs in; empty until it has loaded a model.
        started_at: when its process began.
    """

    worker: str
    found: Device
    environment: dict[str, Any] = field(default_factory=dict)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def sample(
        self,
        task: Task,
        vlm: VisionLanguageModel,
        sample: Sample,
        sizes: Sequence[Size],
        inputs: Inputs,
        begun: datetime,
        knobs: Knobs | None = None,
    ) -> dict[str, Any]:
        """The row of a sample that became `inputs`.

        Args:
            sizes: height and width of its images in pixels.
            knobs: those in effect, if they are not the task's.
        """
        setting = (knobs or task.knobs).vision
        layouts = [vlm.card.geometry.layout(height, width, setting) for height, width in sizes]
        known = [layout for layout in layouts if layout is not None]
        promised = _promised(known) if len(known) == len(layouts) else {}
        lacking = [TOKEN_MISMATCH] if setting.force_full_tokens and _lacks_tokens(promised, inputs) else []
        height, width = sizes[0]
        return (
            self._identity(task, vlm, knobs or task.knobs)
            | promised
            | {
                "sample_id": sample.ref.uid,
                "image_id": sample.image_id,
                "num_images": len(sizes),
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

    def failed(self, task: Task, vlm: VisionLanguageModel, ref: SampleRef, error: SampleError) -> dict[str, Any]:
        """The row of a sample that cannot be measured."""
        return self._identity(task, vlm, task.knobs) | {
            "sample_id": ref.uid,
            "status": Status.FAILED.value,
            "error": str(error),
            "valid": False,
            "invalid_reasons": ["failed"],
            "started_at": datetime.now(UTC),
        }

    def _identity(self, task: Task, vlm: VisionLanguageModel, knobs: Knobs) -> dict[str, Any]:
        model = task.model
        return knob_columns(knobs) | {
            "sweep": task.sweep,
            "combination_id": task.combination_id,
            "task_id": task.task_id,
            "revision": model.revision,
            "device_name": self.found.name,
            "split": task.dataset.split,
            "dtype": model.dtype,
            "attention": _used(vlm, "_attn_implementation"),
            # Dense models have the attribute as well.
            "experts": None if model.experts is None else _used(vlm, "_experts_implementation"),
            "moe_renormalization": model.moe_renormalization,
            "engine": model.engine,
            "schema_version": SCHEMA_VERSION,
            "worker": self.worker,
            "session_started_at": self.started_at,
            "environment_id": self.environment.get("environment_id"),
            "device_uuid": self.found.uuid,
            "threads": self.found.threads,
            "niceness": self.found.niceness,
        }


def engine_columns(used: EngineUse | None) -> dict[str, Any]:
    """What really decoded, in place of what was asked for."""
    return {} if used is None else {"engine": used.engine, "engine_note": used.note}


def _used(vlm: VisionLanguageModel, back_end: str) -> str | None:
    """The back-end that the language model runs with, which is read off it because transformers may choose another."""
    used: str | None = getattr(vlm.decoder.config, back_end, None)
    return used


def _promised(layouts: Sequence[VisionLayout]) -> dict[str, Any]:
    """What a setting comes to: sums over the images of a sample; a shape is that of a single one only."""
    shape: dict[str, Any] = {}
    if len(layouts) == 1:
        (layout,) = layouts
        shape = {
            "selected_tiling": f"{layout.tiling[0]}x{layout.tiling[1]}",
            "aspect_mismatch": layout.aspect_mismatch,
            "target_resolution": f"{layout.target_height}x{layout.target_width}",
            "target_aspect": layout.target_width / layout.target_height,
        }
    return shape | {
        "selected_crops": sum(layout.num_crops for layout in layouts),
        "tower_passes": sum(layout.tower_passes for layout in layouts),
        "theoretical_vision_tokens": sum(layout.vision_tokens for layout in layouts),
        "predicted_vision_tokens": sum(layout.prompt_vision_tokens for layout in layouts),
        "special_tokens": sum(layout.special_tokens for layout in layouts),
    }


def _lacks_tokens(promised: Mapping[str, Any], inputs: Inputs) -> bool:
    """Whether the prompt holds another number of vision tokens than the tower makes."""
    return bool(promised) and inputs.num_vision_tokens != promised["theoretical_vision_tokens"]

"""Which tasks need at least as much memory as one that did not fit: those that are as large in every direction."""

from __future__ import annotations

from knobs.vision import VisionSetting
from workers.tasks import Task


def needs_as_much(task: Task, other: Task) -> bool:
    """Whether `task` takes at least the device memory of `other`: nothing about it is smaller.

    Says no where two tasks cannot be compared, such as vision settings of different axes. The samples of the other have
    to be among its own, in the same batches, for images differ.
    """
    return (
        (task.model, task.dataset, task.kind, task.accelerator)
        == (other.model, other.dataset, other.kind, other.accelerator)
        and task.samples[: len(other.samples)] == other.samples
        and task.protocol.batch_size >= other.protocol.batch_size
        and task.protocol.max_new_tokens >= other.protocol.max_new_tokens
        and (task.knobs.moe_top_k or 0) >= (other.knobs.moe_top_k or 0)
        and set(task.knobs.active_blocks) >= set(other.knobs.active_blocks)
        and len(task.candidates) >= len(other.candidates)
        and _as_large(task.knobs.vision, other.knobs.vision)
    )


def _as_large(setting: VisionSetting, other: VisionSetting) -> bool:
    if setting == other:
        return True
    if setting.knob != other.knob or setting.tier is not None or _options(setting) != _options(other):
        return False
    sizes = _sides(setting.value), _sides(other.value)
    return all(sizes) and len(sizes[0]) == len(sizes[1]) and all(a >= b for a, b in zip(*sizes, strict=True))


def _options(setting: VisionSetting) -> tuple[object, ...]:
    return setting.aspect_distance, setting.force_full_tokens, setting.resize_to_fill


def _sides(value: int | str | None) -> tuple[int, ...]:
    """The numbers of a level: of a canvas its sides, of any other axis one; none where it is not made of numbers."""
    parts = str(value).split("x")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()

"""The registered models that need no file, with weights sharp enough that every image, block and expert matters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from knobs.vision import VISION_OPTIONS, VisionSetting
from workers.models import REGISTERED, load
from workers.models.adapter import Features, VisionLanguageModel
from workers.models.processing import Inputs

TINY = tuple(name for name, registered in REGISTERED.items() if registered.hub_id is None)
NATIVE = VisionSetting()

# Levels to try on each vision axis that a family may have; a new axis has to name its own here.
LEVELS: dict[str, tuple[Any, ...]] = {
    "longest_edge": (32, 50, 64, 96, 128, 200),
    "tiles": (1, 2, 3, 4, 6, 9, 12),
    # Pixels and tokens of a crop differ from family to family; see `settings_of`.
    "image_size": ((1, 1), (1, 2), (2, 3)),
    "vision_tokens": (1, 2, 4, 6),
    "crops": (1, 2, 3, 4),
    "tier": ("low", "medium"),
}

# Standard deviation of the weights; Molmo's routing weights do not add up to one, so its blocks need larger ones.
DEVIATIONS = {"tiny-molmoe": 0.3}


@cache
def tiny_model(name: str) -> VisionLanguageModel:
    """The model of this name in float32 on the CPU, made sharp; one per test session."""
    vlm = load(name, dtype="float32", device="cpu")
    sharpen(vlm.model, deviation=DEVIATIONS.get(name, 0.15))
    return vlm


def sharpen(model: torch.nn.Module, seed: int = 7, deviation: float = 0.15) -> None:
    """Give every parameter a size at which it counts; freshly initialised models nearly ignore their input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else deviation * noise)


def settings_of(vlm: VisionLanguageModel) -> list[VisionSetting]:
    """Native, and every level to try on every vision axis of the model's family."""
    geometry = vlm.card.geometry
    offered = [VisionSetting(axis, _level(geometry, axis, level)) for axis in geometry.axes for level in LEVELS[axis]]
    return [NATIVE, *(setting for setting in offered if geometry.refuse(setting) is None)]


def options_of(vlm: VisionLanguageModel) -> list[VisionSetting]:
    """A few settings under every combination of the options that the model's family has."""
    geometry = vlm.card.geometry
    choices = [(None, True, False) if name in geometry.options else (None,) for name in VISION_OPTIONS]
    some = [NATIVE, VisionSetting("crops", 3), VisionSetting("tier", "low", aspect_distance="log")]
    some += [VisionSetting(geometry.axes[0], settings_of(vlm)[1].value)] if geometry.axes else []
    return [
        replace(setting, **dict(zip(VISION_OPTIONS, chosen, strict=True)))
        for setting in some
        if geometry.refuse(setting) is None
        for chosen in itertools.product(*choices)
    ]


def _level(geometry: Any, axis: str, level: Any) -> int | str:
    """A level of `LEVELS` in the pixels or tokens of a family."""
    if axis == "image_size":
        return "{}x{}".format(*geometry.grid.canvas_size(*level))
    return geometry.grid.tower_tokens(level) if axis == "vision_tokens" else level


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A noisy gradient, so that every crop of it differs from every other."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 127, height * width).reshape(height, width, 1)
    return Image.fromarray((ramp + random.integers(0, 128, (height, width, 3))).astype(np.uint8))


@torch.inference_mode()
def encoded(
    vlm: VisionLanguageModel, images: Sequence[Image.Image], question: str, setting: VisionSetting = NATIVE
) -> tuple[Inputs, Features]:
    """Inputs on the device, and the features of their images."""
    inputs = vlm.transfer(vlm.preprocess(images, question, setting))
    return inputs, vlm.encode_images(inputs.vision)


@torch.inference_mode()
def logits(vlm: VisionLanguageModel, inputs: Inputs) -> torch.Tensor:
    """Logits of the whole prompt by transformers' own forward, vision tower included; (1, tokens, vocabulary)."""
    output: torch.Tensor = vlm.model(**inputs.prompt, **inputs.vision, use_cache=False).logits
    return output


def generated(vlm: VisionLanguageModel, inputs: Inputs, max_new_tokens: int, **options: Any) -> list[int]:
    """Greedy tokens by transformers' own `generate`."""
    out = vlm.model.generate(
        **inputs.prompt, **inputs.vision, do_sample=False, max_new_tokens=max_new_tokens, **options
    )
    tokens: list[int] = out[0, inputs.prompt["input_ids"].shape[1] :].tolist()
    return tokens

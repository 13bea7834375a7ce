"""What can be said of a model from its configuration and image processor alone: five answers, and a way to get them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from knobs.errors import KnobError
from knobs.vision import VisionGeometry, VisionLayout, VisionSetting

# Models live one layer up, and this package never imports from there: its commands are handed what is named here.
DESCRIBE = "workers.models:describe"


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights, by closed form.

    Attributes:
        vision, projector, language: of each part; embeddings and the LM head belong to the language model.
        active_language: those of the language model that a token passes through with the model's own top-k.
    """

    vision: int
    projector: int
    language: int
    active_language: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.language


@dataclass(frozen=True)
class Card:
    """A family's answers about one of its models.

    Attributes:
        vision_tower, projector, language_model: what they are, with their sizes, one line each.
        parameters: None where no closed form is known.
        target_size: pixels of the images that the vision tower takes.
        preprocessing: steps of the image pipeline, in order.
        splitting_off: how an image is kept in one piece, here and with transformers' own processor.
        batching: how transformers' own processor lays out several images, padded or flat.
        padded: whether samples with fewer images are padded to the most; None where that is not known.
        padding_in_tower: whether padding goes through the vision tower too; None where that is not known.
        image_tokens: how an image stands in the prompt: one line per kind of token, in order.
    """

    vision_tower: str
    projector: str
    language_model: str
    parameters: Parameters | None
    target_size: str
    preprocessing: tuple[str, ...]
    splitting_off: str
    batching: str
    padded: bool | None
    padding_in_tower: bool | None
    image_tokens: tuple[str, ...]


class DescribedModel(Protocol):
    """What the commands of this package need of a model."""

    @property
    def name(self) -> str: ...

    @property
    def geometry(self) -> VisionGeometry: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_experts(self) -> int | None: ...

    @property
    def moe_top_k(self) -> int | None: ...

    def card(self) -> Card: ...


def described(name: str) -> DescribedModel:
    """A model by registered name, local folder or hub id, without its weights.

    Raises:
        UnusableModel: there is no such model, or its files say nothing that can be used.
    """
    describe = cast(Callable[..., DescribedModel], pkgutil.resolve_name(DESCRIBE))
    # Random weights: nothing is known of the published ones that is asked here, and they would have to be digested.
    return describe(name, random_weights=True)


def refuse_unknown(model: DescribedModel) -> None:
    """Raises:
    KnobError: the files of the model do not say how it cuts images; the message says which is missing.
    """
    if model.geometry.unknown is not None:
        raise KnobError(f"{model.name}: {model.geometry.unknown}")


def layout_of(model: DescribedModel, height: int, width: int, setting: VisionSetting) -> VisionLayout:
    """The closed form for an image of `height` x `width` pixels.

    Raises:
        KnobError: the family of the model has none, or too little is known of the model.
    """
    refuse_unknown(model)
    layout = model.geometry.layout(height, width, model.geometry.complete(setting))
    if layout is None:
        raise KnobError(f"{model.name}: its family has no closed form; its own image processor decides")
    return layout


def padded_images(counts: list[int]) -> tuple[int, int]:
    """Images that a batch of samples with so many images each holds, as they are and padded to the most."""
    return sum(counts), max(counts) * len(counts)

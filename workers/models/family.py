"""What a model family supplies: registered models, its vision arithmetic, and its processor; one file per family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knobs.card import Card, Parameters
from knobs.vision import VisionGeometry

if TYPE_CHECKING:
    import torch

    from workers.models.processing import Inputs, Processor, Tensors

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Registered:
    """A model that a sweep can name.

    Attributes:
        family: the family's name.
        config: keyword arguments of the transformers configuration; says what is built with random weights, and what
            a plan may assume before anything is downloaded.
        preprocessor: keyword arguments of the image processor.
        hub_id: published checkpoint, or None for a model that exists with random weights only.
    """

    family: str
    config: Config
    preprocessor: Config
    hub_id: str | None = None


@dataclass(frozen=True)
class Architecture:
    """What a model consists of, as its configuration has it; see `knobs.card.Card` for the fields."""

    vision_tower: str
    projector: str
    language_model: str
    parameters: Parameters | None


@dataclass(frozen=True)
class Pipeline:
    """What becomes of its images, as its image processor has it; see `knobs.card.Card` for the fields."""

    target_size: str
    preprocessing: tuple[str, ...]
    splitting_off: str
    batching: str
    padded: bool | None
    padding_in_tower: bool | None
    image_tokens: tuple[str, ...]


# Bare weights can be used from Python, with tensors that somebody else has made.
NO_PROCESSOR = "not known: the checkpoint has no image processor"
NO_PIPELINE = Pipeline(NO_PROCESSOR, (NO_PROCESSOR,), NO_PROCESSOR, NO_PROCESSOR, None, None, (NO_PROCESSOR,))


class Family(ABC):
    """One file of this package: everything the project knows about one kind of model.

    Importing the file loads neither torch nor transformers, because a plan is made from it on machines without them;
    what runs on a worker imports what it needs.

    Attributes:
        name: of the family.
        model_types: values of `model_type` in config.json that belong to it.
        special_tokens: tokens that a tokenizer must have; used where a model has no tokenizer of its own.
        weight_suffixes: files that weights are read from.
        own_weight_layout: whether `load_weights` has something to do.
    """

    name: str
    model_types: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    weight_suffixes: tuple[str, ...] = (".safetensors",)
    own_weight_layout: bool = False

    @property
    @abstractmethod
    def registered(self) -> Mapping[str, Registered]:
        """Models that a sweep can name."""

    @abstractmethod
    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """Configuration entries that name special tokens, for a tokenizer with these ids."""

    @abstractmethod
    def geometry(self, config: Config, preprocessor: Config) -> VisionGeometry: ...

    @abstractmethod
    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor: ...

    @abstractmethod
    def architecture(self, config: Config) -> Architecture: ...

    @abstractmethod
    def pipeline(self, config: Config, preprocessor: Config) -> Pipeline: ...

    def card(self, config: Config, preprocessor: Config) -> Card:
        """Architecture and image pipeline in words and numbers, from the configuration alone: no torch, no weights."""
        images = self.pipeline(config, preprocessor) if preprocessor else NO_PIPELINE
        return Card(**vars(self.architecture(config)), **vars(images))

    def language_model(self, config: Config) -> Config:
        """The part of config.json that describes the language model, in transformers' words."""
        text = config.get("text_config") or config.get("llm_config") or config
        return text if isinstance(text, dict) else {}

    def join_images(self, samples: Sequence[Inputs]) -> Tensors:
        """The vision tensors of several samples as those of one batch, so that one pass of the tower encodes it.

        The features come out in the order of the samples. Families whose tensors are not rows of images along the first
        axis, or hold places in the prompt, which move when it is padded, have their own way.

        Args:
            samples: as the family's processor makes them, each a sample or a left-padded batch.

        Raises:
            SampleError: these samples cannot share a batch.
        """
        from workers.models.processing import join_images

        return join_images([sample.vision for sample in samples])

    def register_classes(self) -> None:  # noqa: B027  most families have nothing to add
        """Make transformers' Auto classes know a model that transformers does not have."""

    def load_weights(self, folder: Path, dtype: torch.dtype, device: torch.device, backends: Config) -> Any | None:
        """The model from weights in a layout that transformers cannot read; None for what it can."""
        return None

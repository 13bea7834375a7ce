"""What a model family supplies: registered models, its vision arithmetic, and its processor; one file per family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from knobs.vision import VisionGeometry, VisionLayout, VisionSetting

if TYPE_CHECKING:
    from workers.models.processing import Processor

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


class Family(Protocol):
    """One file of this package: everything the project knows about one kind of model.

    Importing the file loads neither torch nor transformers, because a plan is made from it on machines without them;
    `processor` runs on a worker and imports what it needs.
    """

    @property
    def name(self) -> str: ...

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json that belong to this family."""

    @property
    def registered(self) -> Mapping[str, Registered]: ...

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that a tokenizer must have; used where a model has no tokenizer of its own (random weights)."""

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """Configuration entries that name special tokens, for a tokenizer with these ids."""

    def geometry(self, config: Config, preprocessor: Config) -> VisionGeometry: ...

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor: ...


class NativeGeometry:
    """A family without vision arithmetic: it takes images as its own processor makes them, and promises nothing."""

    axes: tuple[str, ...] = ()

    def refuse(self, setting: VisionSetting) -> str | None:
        return None if setting.knob == "native" else f"this family has no vision knob {setting.knob}"

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout | None:
        return None

    def pinned(self, setting: VisionSetting) -> VisionLayout | None:
        return None


def as_int(value: int | str | None) -> int | None:
    """A knob value as a whole number, or None if it is something else."""
    return value if type(value) is int else None

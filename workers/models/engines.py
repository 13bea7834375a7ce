"""How an answer is decoded: what engines have in common, and the plain one; the other is in `graph_engine`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ENGINES = ("eager", "graph")

# What a block keeps of an answer, where rows can be taken out. Others also know the method, by inheritance, and leave
# out part of their state (convolutions of linear attention).
_ROWS_CAN_LEAVE = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass(frozen=True)
class EngineUse:
    """The engine that decoded an answer, and why it is not the one that was asked for, if it is not."""

    engine: str
    note: str | None = None


class DecodeState(ABC):
    """One batch of answers while it grows; rows end at the same column because prompts are left-padded.

    Attributes:
        cache: keys and values, written by prefill and by every step.
        use: which engine decodes it; final after the last step.
    """

    cache: Any
    use: EngineUse

    @abstractmethod
    def begin(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Prefill is over.

        Args:
            attention_mask: shape (rows, tokens), of the prompt.
            position_ids: shape (..., rows, 1), of the last token of the prompt.
        """

    @abstractmethod
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """The greedy token after `token`, both of shape (rows, 1)."""

    def keep(self, rows: Sequence[int]) -> bool:
        """Go on with these rows alone, in this order, if that can be done; otherwise nothing changes.

        Returns:
            Whether the others have left, so that the next `token` has as many rows as there are in `rows`.
        """
        return False


class Engine(ABC):
    """Makes the states that answers are decoded with. Knobs stay as they are from prefill to the last step.

    Attributes:
        captures: captures so far, failed ones too. An answer during which this number changes is no answer to time.
        warm_up_rounds: untimed answers to every sample that it needs before any is timed.
    """

    captures = 0
    warm_up_rounds = 0

    def reserve(self, rows: int, tokens: int) -> None:  # noqa: B027  most engines have nothing to reserve
        """Make room for the longest of the answers that follow, so that none of them has to; arguments as below."""

    @abstractmethod
    def new_state(self, rows: int, tokens: int) -> DecodeState:
        """The state of answers that are about to begin.

        Args:
            rows: answers decoded together.
            tokens: most tokens of a row: padding, prompt and answer together.
        """

    def clear(self) -> None:  # noqa: B027
        """Give up all memory that is kept from one answer to the next."""


class EagerEngine(Engine):
    """Plain PyTorch: launches every kernel of every step from the host; keys and values grow token by token."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def new_state(self, rows: int, tokens: int) -> DecodeState:
        return EagerState(self._model)


class EagerState(DecodeState):
    """Keys and values that grow, and the mask and the positions that grow with them."""

    def __init__(self, model: Any, note: str | None = None) -> None:
        """
        Args:
            note: why another engine that was asked for is not used.
        """
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.use = EngineUse("eager", note)
        self._model = model

    def begin(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> None:
        self._attention_mask = attention_mask
        self._position_ids = position_ids

    def step(self, token: torch.Tensor) -> torch.Tensor:
        mask = self._attention_mask
        self._attention_mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
        self._position_ids = self._position_ids + 1
        output: Any = self._model(
            input_ids=token,
            attention_mask=self._attention_mask,
            position_ids=self._position_ids,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        chosen: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return chosen

    def keep(self, rows: Sequence[int]) -> bool:
        if any(type(layer) not in _ROWS_CAN_LEAVE for layer in self.cache.layers):
            return False
        kept = torch.tensor(list(rows), device=self._attention_mask.device)
        self.cache.batch_select_indices(kept)
        self._attention_mask = self._attention_mask[kept]
        self._position_ids = self._position_ids.index_select(-2, kept)
        return True


@contextmanager
def decoding_eagerly(vlm: Any) -> Iterator[None]:
    """Decode with the eager engine inside the block, whatever `vlm` (a loaded model with its `engine`) has."""
    engine = vlm.engine
    vlm.engine = EagerEngine(vlm.model)
    try:
        yield
    finally:
        vlm.engine = engine

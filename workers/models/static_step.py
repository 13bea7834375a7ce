"""One decode step over tensors that never move: what it takes to run the same kernels again for the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

# Attention reads all of a buffer, so its length decides the time of a step. 128 keeps that within a few per cent of
# the length that is needed, and the number of graphs within the number of different prompts.
CAPACITY_STEP = 128


def rounded_capacity(tokens: int) -> int:
    """Tokens that a buffer is made for, which is the next multiple of `CAPACITY_STEP`."""
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP


class Memory:
    """Keys and values of one answer at a time, in buffers that answers of every shape share.

    Attributes:
        tokens: room of every buffer, over all rows of a batch.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}

    def view(self, block: int, kind: str, states: torch.Tensor, capacity: int) -> torch.Tensor:
        """Zeros of shape (rows, heads, capacity, width), for states of shape (rows, heads, any, width)."""
        rows, heads, _, width = states.shape
        # Not inference tensors, which could only be written to in inference mode.
        with torch.inference_mode(False):
            if (block, kind) not in self._buffers:
                room = self.tokens * heads * width
                self._buffers[block, kind] = torch.empty(room, dtype=states.dtype, device=states.device)
            used = self._buffers[block, kind][: rows * capacity * heads * width]
            return used.view(rows, heads, capacity, width).zero_()


class Column:
    """Where the next key goes.

    Attributes:
        at: shape (1,), in memory that a captured step reads and advances.
        in_prompt: whether a prompt is being read, which fills the columns from the first on.
    """

    def __init__(self, device: torch.device) -> None:
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.in_prompt = True


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one block: a prompt attends to itself, as with a cache that grows, a decoded token to the buffer.

    transformers' `StaticLayer` hands the whole buffer to the prompt too, which takes other kernels for it; it also has
    a length per block to advance, where here one for all of them does.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, block: int, capacity: int, column: Column, memory: Memory) -> None:
        super().__init__()
        self._block = block
        self._capacity = capacity
        self._column = column
        self._memory = memory

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._memory.view(self._block, "keys", key_states, self._capacity)
        self.values = self._memory.view(self._block, "values", value_states, self._capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._column.in_prompt:
            self.keys.index_copy_(2, self._column.at, key_states)
            self.values.index_copy_(2, self._column.at, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, : key_states.shape[2]].copy_(key_states)
        self.values[:, :, : value_states.shape[2]].copy_(value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length if self._column.in_prompt else self._capacity, 0

    def get_seq_length(self) -> int | torch.Tensor:
        # A tensor while decoding: whoever makes a Python number of it waits for the device, which a capture refuses.
        return 0 if self._column.in_prompt else self._column.at[0]

    def get_max_length(self) -> int:
        return self._capacity


class StaticStep:
    """A decode step of a model for `rows` answers of at most `capacity` tokens, prompt included.

    Calling it turns the token in `token` into the next one and moves everything on by one position; no Python value
    changes, so that the kernels of one call, run again, are the next call.

    Attributes:
        cache: for the prefill before it, which has to write where the step reads.
        token: shape (rows, 1), the last token.
        replay: the captured step, once there is one.
    """

    def __init__(self, model: Any, decoder: Any, rotary: list[Any], rows: int, capacity: int, memory: Memory) -> None:
        """
        Args:
            decoder: the part of `model` that holds the stack of blocks.
            rotary: its dynamic rotary modules; `capacity` is within the range that they were trained for.
            memory: room for rows * capacity tokens.
        """
        self.capacity = capacity
        self.replay: Callable[[], None] | None = None
        self._model = model
        self._rotary = rotary
        # A dynamic rotary module puts another tensor in the place of its frequencies when a prompt is very long.
        self._kept_alive = list(decoder.buffers())
        additive = model.config.get_text_config(decoder=True)._attn_implementation == "eager"
        parameter = next(decoder.parameters())
        self._hidden = torch.finfo(parameter.dtype).min if additive else None
        self._dtype, device = parameter.dtype, parameter.device
        with torch.inference_mode(False):
            self._column = Column(device)
            self.token = torch.zeros((rows, 1), dtype=torch.long, device=device)
            self._columns = torch.arange(capacity, device=device)
            self._real = torch.ones((rows, 1, 1, capacity), dtype=torch.bool, device=device)
        self._position_ids: torch.Tensor | None = None  # families differ in its leading dimensions
        self._own_layers = [FixedLayer(i, capacity, self._column, memory) for i in range(len(decoder.layers))]
        self.cache = Cache(layers=list(self._own_layers))

    def empty(self) -> None:
        """Ready for a prompt: nothing of the last answer is left, not even where the mask hides it.

        A hidden value counts for zero times itself, which is not zero if it is infinite.
        """
        self._column.in_prompt = True
        held = [tensor for layer in self._layers() for tensor in (layer.keys, layer.values)]
        if held:
            torch._foreach_zero_(held)

    def begin(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Ready for the first step.

        Args:
            attention_mask: shape (rows, tokens), of the prompt; 0 is padding.
            position_ids: shape (..., rows, 1), of the last token of the prompt.
        """
        tokens = attention_mask.shape[1]
        if self._position_ids is None:
            with torch.inference_mode(False):
                self._position_ids = torch.empty_like(position_ids)
        self._column.in_prompt = False
        self._column.at.fill_(tokens)
        self._position_ids.copy_(position_ids)
        self._real.fill_(True)
        self._real[:, 0, 0, :tokens].copy_(attention_mask)

    def __call__(self) -> None:
        assert self._position_ids is not None
        self._position_ids.add_(1)
        with _frequencies_as_they_are(self._rotary):
            output = self._model(
                input_ids=self.token,
                attention_mask=self._mask(),
                position_ids=self._position_ids,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self._column.at.add_(1)

    def has_its_own_cache(self) -> bool:
        """Whether the cache is the one that a capture reads; only skipped blocks may have lost their place in it."""
        pairs = zip(self.cache.layers, self._own_layers, strict=True)
        return all(layer is own or isinstance(layer, DummyLayer) for layer, own in pairs)

    def keys_and_values(self, tokens: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of every block that has run: its index, and what it holds of the first `tokens` columns."""
        for layer in self._layers():
            yield layer._block, layer.keys[:, :, :tokens], layer.values[:, :, :tokens]

    def _mask(self) -> torch.Tensor:
        """Which columns the new token sees, in four dimensions, which transformers takes as they are."""
        visible = self._real & (self._columns <= self._column.at)
        if self._hidden is None:
            return visible
        # transformers' plain attention adds its mask.
        return torch.zeros_like(visible, dtype=self._dtype).masked_fill_(~visible, self._hidden)

    def _layers(self) -> list[FixedLayer]:
        """Without the blocks that are skipped, whose places the knob has taken, and those that have never run."""
        return [layer for layer in self.cache.layers if isinstance(layer, FixedLayer) and layer.is_initialized]


def dynamic_rotary(decoder: Any) -> list[Any]:
    """Rotary modules that compute their frequencies anew where positions go beyond what the model was trained for."""
    return [module for module in decoder.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]


@contextmanager
def _frequencies_as_they_are(rotary: list[Any]) -> Iterator[None]:
    """Keep dynamic rotary modules from comparing positions on the host; within the trained range nothing changes."""
    types = [module.rope_type for module in rotary]
    for module in rotary:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module, rope_type in zip(rotary, types, strict=True):
            module.rope_type = rope_type

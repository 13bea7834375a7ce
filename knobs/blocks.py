"""The depth knob: which transformer blocks of the language model run, switched in place on a loaded model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from knobs.configuration import entries_of
from knobs.errors import KnobError
from knobs.stack import BlockStack, stack_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def prefix_blocks(count: int, num_blocks: int) -> tuple[int, ...]:
    """The first `count` of `num_blocks` blocks: the selection that needs no importance scores."""
    return tuple(range(min(count, num_blocks)))


def refuse_blocks(active_blocks: int | Sequence[int], num_blocks: int, stack: BlockStack | None = None) -> str | None:
    """Why a model of `num_blocks` blocks cannot run `active_blocks` (a count or a list of indices), or None.

    Args:
        active_blocks: how many blocks from the first on, or their indices.
        num_blocks: blocks of the model.
        stack: what is known of their dependence on each other; if None, each is taken for independent.
    """
    if isinstance(active_blocks, int):
        if not 1 <= active_blocks <= num_blocks:
            return f"the model has {num_blocks} blocks, so active_blocks must be 1 to {num_blocks}"
        kept: Sequence[int] = prefix_blocks(active_blocks, num_blocks)
    else:
        if not active_blocks:
            return "at least one block must run"
        outside = [i for i in active_blocks if not 0 <= i < num_blocks]
        if outside:
            return f"the model has blocks 0 to {num_blocks - 1}, not {', '.join(map(str, outside))}"
        kept = active_blocks
    return None if stack is None else stack.refuse(kept)


@contextmanager
def active_blocks(decoder: nn.Module, keep: int | Sequence[int] | None) -> Iterator[None]:
    """Run only the blocks `keep` of `decoder.layers` inside the block; None, or all of them, costs nothing.

    `keep` is a list of indices, or a count of blocks from the first on, as in a sweep.

    A skipped block passes the residual stream through and owns no cache memory: its cache slot becomes transformers'
    `DummyLayer`, which sequence lengths and attention masks step over. Block indices stay what they were, so that
    layer types, rotary tables and deep-stack features that are addressed by position remain right.

    Raises:
        KnobError: an index or a count that the decoder does not have, an empty list, or a block that cannot run without
            one of those that would be skipped.
    """
    layers: Any = decoder.layers
    asked = keep if keep is None or isinstance(keep, int) else list(keep)
    if asked is not None and (reason := refuse_blocks(asked, len(layers))):
        raise KnobError(f"active_blocks {asked}: {reason}")
    kept = prefix_blocks(asked, len(layers)) if isinstance(asked, int) else asked
    skip = [] if kept is None else sorted(set(range(len(layers))) - set(kept))
    if not skip or kept is None:
        yield
        return
    config = getattr(decoder, "config", None)
    text = {} if config is None else entries_of(config)
    if reason := stack_of(text, len(layers)).refuse(kept):
        raise KnobError(f"active_blocks {asked}: {reason}")

    # Imported late: planning a sweep needs the arithmetic above without loading transformers.
    from transformers.cache_utils import Cache, DummyLayer

    def give_up_cache_slots(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            for i in skip:
                if i < len(cache.layers) and not isinstance(cache.layers[i], DummyLayer):
                    cache.layers[i] = slot = DummyLayer()
                    slot._layer_type = "dummy"  # some families ask every slot for its kind

    hook = decoder.register_forward_pre_hook(give_up_cache_slots, with_kwargs=True)
    # An instance may own a `forward` already (accelerate puts one there); it has to come back as it was.
    saved = {i: layers[i].__dict__.get("forward") for i in skip}
    try:
        for i in skip:
            layers[i].forward = _pass_through(layers[i], text.get("model_type"))
        yield
    finally:
        for i, forward in saved.items():
            if forward is None:
                layers[i].__dict__.pop("forward", None)
            else:
                layers[i].forward = forward
        hook.remove()


# What a skipped block does: it returns what it was given, in the form in which its kind of block returns it.


def _residual_stream(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _tuple_of_one(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
    return (hidden_states,)


def _with_chosen_tokens(
    hidden_states: torch.Tensor, *_: Any, prev_topk_indices: Any = None, **__: Any
) -> tuple[torch.Tensor, Any]:
    return hidden_states, prev_topk_indices


def _pass_through(layer: nn.Module, model_type: str | None) -> Callable[..., Any]:
    if "prev_topk_indices" in inspect.signature(type(layer).forward).parameters:
        return _with_chosen_tokens
    return _tuple_of_one if model_type == "chameleon" else _residual_stream

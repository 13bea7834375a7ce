"""What the two knobs promise of every model, as checks that are run on the right knobs and on wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from families import BLOCKS, TinyFamily

from knobs.blocks import active_blocks
from knobs.configuration import entries_of
from knobs.experts import experts_per_token
from knobs.routing import NOT_RENORMALIZED, RENORMALIZED, Routing, routing_of
from workers.models.requirements import stack_of_blocks

Knob = Callable[[Any, Any], AbstractContextManager[None]]

TOP_K_ENTRIES = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
NEW_TOKENS = 10


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first padded on the left, longer than the window of any family here; and their mask."""
    ids = torch.randint(9, 128, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7], ids[0, :7] = 0, 0
    return ids, mask


@torch.inference_mode()
def read(model: Any) -> torch.Tensor:
    """Logits of every token of the prompts, without a cache."""
    ids, mask = prompts()
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


@torch.inference_mode()
def answered(model: Any, cache: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Greedy tokens, the logits behind them, and the bytes that the cache holds at the end."""
    ids, mask = prompts()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        cache_implementation=cache,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits), cache_bytes(out.past_key_values)


def cache_bytes(cache: Any) -> int:
    """Bytes of everything that the slots of a cache hold: keys, values, indices, states."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that a knob could leave changed: hooks, attributes of modules, configuration, weights."""
    state: dict[str, Any] = {"configuration": model.config.to_dict()}
    for name, module in model.named_modules():
        state[name] = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if isinstance(value, dict | int | float | str | None) or callable(value)
        }
    for name, tensor in model.state_dict().items():
        state[f"weight {name}"] = (tensor.data_ptr(), tensor._version)
    return state


class Interruption(Exception):
    """What the body of a knob raises."""


def check_restored(model: Any, switched: AbstractContextManager[None]) -> None:
    """A body that raises leaves the model as it was."""
    before = state_of(model)

    def interrupted() -> None:
        with switched:
            read(model)
            raise Interruption

    with pytest.raises(Interruption):
        interrupted()
    assert state_of(model) == before


def check_blocks(family: TinyFamily, knob: Knob = active_blocks) -> None:
    """Some blocks are bit-equal to a model that has no others, in time, answers and memory; all are free."""
    full = family.build()
    stack = stack_of_blocks(full)
    untouched = state_of(full)
    whole = read(full)
    for everything in (None, BLOCKS, range(BLOCKS)):
        with knob(stack, everything):
            assert state_of(full) == untouched, "all blocks cost nothing"
    for keep in family.keeps:
        small = family.shorter(full, keep)
        with knob(stack, keep):
            assert torch.equal(read(full), read(small)), (keep, "without a cache")
            assert not torch.equal(read(full), whole), (keep, "blocks count")
            for cache in ("dynamic", "static"):
                ours, theirs = answered(full, cache), answered(small, cache)
                assert torch.equal(ours[0], theirs[0]), (keep, cache, "tokens")
                assert torch.equal(ours[1], theirs[1]), (keep, cache, "logits")
                assert ours[2] == theirs[2], (keep, cache, "bytes of the cache")
    check_restored(full, knob(stack, family.keeps[0]))
    assert torch.equal(read(full), whole)


def check_top_k(family: TinyFamily, knob: Knob = experts_per_token, levels: Sequence[int] = (1, 2, 3, 4)) -> None:
    """Any top-k is bit-equal to a model built with it, and weighs its experts as recorded; the model's own is free."""
    full = family.build()
    routing = routing_in(full)
    untouched = state_of(full)
    whole = read(full)
    assert routing.moe_top_k is not None
    with knob(full, routing.moe_top_k):
        assert state_of(full) == untouched, "the model's own top-k costs nothing"
    seen = []
    for k in levels:
        built = family.build(**{top_k_entry(family): k})
        with knob(full, k), routed(full) as (widths, sums):
            assert torch.equal(read(full), read(built)), k
        assert set(widths) <= {k}, "the experts see k choices"
        if sums:
            check_sums(torch.cat(sums), routing)
        seen.append(read(built))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]), "the number of experts matters"
    with knob(full, levels[0]):
        ours = answered(full, "dynamic")
    assert torch.equal(ours[1], answered(family.build(**{top_k_entry(family): levels[0]}), "dynamic")[1])
    check_restored(full, knob(full, levels[0]))
    assert torch.equal(read(full), whole)


def check_sums(sums: torch.Tensor, routing: Routing) -> None:
    """The weights of a token's experts add up as `moe_renormalization` says."""
    spread = float((sums.max() - sums.min()) / sums.mean())
    if routing.renormalization == RENORMALIZED:
        assert spread < 1e-5, "the same for every token"
    else:
        assert routing.renormalization == NOT_RENORMALIZED
        assert spread > 0.01, "the router's own scores"


@contextmanager
def routed(model: Any) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """How many experts each token is sent to, and what their weights add up to, of every call of experts."""
    widths: list[int] = []
    sums: list[torch.Tensor] = []

    def note(_: Any, args: tuple[Any, ...]) -> None:
        if len(args) == 3:
            widths.append(args[1].shape[-1])
            sums.append(args[2].float().sum(-1).flatten())

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if type(m).__name__.endswith("Experts")]
    try:
        yield widths, sums
    finally:
        for hook in hooks:
            hook.remove()


def routing_in(model: Any) -> Routing:
    """What the configuration of a model with experts says of its routers."""
    routing = routing_of(entries_of(model.config))
    assert routing is not None
    return routing


def top_k_entry(family: TinyFamily) -> str:
    """What a family calls the number of experts per token."""
    text = family.entries.get("text_config", family.entries)
    return next(name for name in TOP_K_ENTRIES if name in text)

"""The width knob: how many experts fire per token, switched in place on a loaded mixture-of-experts model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from knobs.configuration import entries_of
from knobs.errors import KnobError
from knobs.routing import Routing, group_limit, refuse_top_k, routing_of

if TYPE_CHECKING:
    from torch import nn

# The entry that routers of the Gemma 4 kind read from their configuration at every forward pass.
_LIVE_ENTRY = "top_k_experts"


def routers(model: nn.Module) -> list[nn.Module]:
    """The modules that choose experts: those with an integer `top_k` in which it is said how many experts there are.

    transformers gives nearly every mixture-of-experts family a router module whose `forward` reads `self.top_k`. Blocks
    that hold a router and a copy of its number are listed too: some of them shape their tensors by it.
    """
    return [m for m in model.modules() if type(getattr(m, "top_k", None)) is int and _num_experts(m) is not None]


@contextmanager
def experts_per_token(model: nn.Module, moe_top_k: int | None) -> Iterator[None]:
    """Route every token to `moe_top_k` experts inside the block; None, or what is set already, costs nothing.

    Args:
        model: the language model, or what contains it; routers of a vision tower beside it are left alone.
        moe_top_k: experts per token in each block.

    Raises:
        KnobError: the model has no router whose top-k can be set, or its routers cannot choose so many experts.
    """
    if moe_top_k is None:
        yield
        return
    language_model = _language_model(model)
    routing = _configured(model)
    switches: list[tuple[Any, str]] = [(router, "top_k") for router in routers(language_model)]
    if routing is not None:
        switches += [(config, _LIVE_ENTRY) for config in _live_configurations(language_model)]
    if not switches and (routing is None or moe_top_k != routing.moe_top_k):
        raise KnobError(
            f"moe_top_k {moe_top_k}: {routing.fixed}"
            if routing is not None and routing.fixed is not None
            else "moe_top_k: the model has no router whose top-k can be set"
        )
    for limits in (routing, *(_limits(holder) for holder, _ in switches)):
        if limits is not None and (reason := refuse_top_k(moe_top_k, limits)):
            raise KnobError(f"moe_top_k {moe_top_k}: {reason}")
    saved = [(holder, name, top_k) for holder, name in switches if (top_k := getattr(holder, name)) != moe_top_k]
    try:
        for holder, name, _ in saved:
            setattr(holder, name, moe_top_k)
        yield
    finally:
        for holder, name, top_k in saved:
            setattr(holder, name, top_k)


def _language_model(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _live_configurations(language_model: nn.Module) -> list[Any]:
    """The configuration objects that routers read at every forward pass, each once."""
    found = {id(c): c for m in language_model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if type(getattr(config, _LIVE_ENTRY, None)) is int]


def _configured(model: Any) -> Routing | None:
    config = getattr(model, "config", None)
    return None if config is None else routing_of(entries_of(config))


def _limits(holder: Any) -> Routing | None:
    """How many experts what holds a top-k can choose, as it says itself."""
    experts = _num_experts(holder)
    if experts is None:
        return None
    groups = {"n_group": getattr(holder, "num_group", None)}
    groups |= {name: getattr(holder, name, None) for name in ("topk_group", "topk_method")}
    return Routing(experts, groups=group_limit(groups))


def _num_experts(holder: Any) -> int | None:
    for part in holder.modules() if hasattr(holder, "modules") else (holder,):
        for name in ("num_experts", "n_routed_experts", "num_local_experts"):
            count = getattr(part, name, None)
            if type(count) is int:
                return count
    return None

"""The width knob: how many experts fire per token, switched in place on a loaded mixture-of-experts model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from knobs.errors import KnobError

if TYPE_CHECKING:
    from torch import nn


def routers(model: nn.Module) -> list[nn.Module]:
    """The modules that choose experts: those with an integer `top_k` that name how many experts there are.

    transformers gives every mixture-of-experts family a router module whose `forward` reads `self.top_k`; blocks that
    merely carry a copy of the number have no experts to count and are left alone.
    """
    return [m for m in model.modules() if type(getattr(m, "top_k", None)) is int and _num_experts(m) is not None]


def refuse_top_k(moe_top_k: int, num_experts: int | None) -> str | None:
    """Why a model with `num_experts` experts per block cannot route each token to `moe_top_k` of them, or None."""
    if num_experts is None:
        return "the model has no experts"
    if not 1 <= moe_top_k <= num_experts:
        return f"the model has {num_experts} experts, so moe_top_k must be 1 to {num_experts}"
    return None


@contextmanager
def experts_per_token(model: nn.Module, moe_top_k: int | None) -> Iterator[None]:
    """Route every token to `moe_top_k` experts inside the block; None leaves the model as it is.

    Raises:
        KnobError: the model has no router whose top-k can be set, or fewer experts than asked for.
    """
    if moe_top_k is None:
        yield
        return
    found = routers(model)
    if not found:
        raise KnobError("moe_top_k: the model has no router whose top-k can be set")
    for router in found:
        if reason := refuse_top_k(moe_top_k, _num_experts(router)):
            raise KnobError(f"moe_top_k {moe_top_k}: {reason}")
    saved = [(router, router.top_k) for router in found]
    try:
        for router in found:
            router.top_k = moe_top_k  # type: ignore[assignment]
        yield
    finally:
        for router, top_k in saved:
            router.top_k = top_k


def _num_experts(module: nn.Module) -> int | None:
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        count = getattr(module, name, None)
        if type(count) is int:
            return count
    return None

"""Arithmetic of an answer, stage by stage: floating-point operations of one pass under torch's counter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  registers an operator of its own for experts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from workers.models.adapter import VisionLanguageModel
from workers.models.engines import decoding_eagerly
from workers.models.processing import Inputs

# Back-ends and kinds of block of transformers whose every matrix product passes torch's dispatcher, where the counter
# sees it. Others (flash_attention_2 to 4, linear attention, ...) may launch kernels beside it, or be written with
# element-wise products, which are not counted.
SEEN_ATTENTION = ("eager", "sdpa")
SEEN_EXPERTS = ("eager", "grouped_mm", "batched_mm")
SEEN_BLOCKS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class StageFlops:
    """Floating-point operations of one answer, stage by stage; the stages are those of `workers.measure.Timing`.

    A multiply-add is two operations. Counted are matrix products, convolutions and attention, as the eager engine runs
    them; norms, activations, softmax, rotary embeddings and the choice of experts are not. Attention counts every pair
    of a query and a key, so causal attention counts as full, and padding counts as tokens.

    Attributes:
        vision: of the vision tower.
        projector: of what is between tower and language model.
        prefill: of every active block over the prompt, and of the LM head for its last position.
        decode: of all decode steps together; 0 for an answer of one token.
        uncounted: what has no formula, sorted. Operators, such as `flash_attn::fwd`, leave None for the stages in which
            they ran; back-ends and kinds of block, such as `attention flash_attention_4`, leave None for all stages,
            for half a number would look like a cheap setting.
    """

    vision: int | None
    projector: int | None
    prefill: int | None
    decode: int | None
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        """Of all stages; None if one of them is."""
        stages = (self.vision, self.projector, self.prefill, self.decode)
        known = [flops for flops in stages if flops is not None]
        return sum(known) if len(known) == len(stages) else None


@torch.inference_mode()
def count_flops(vlm: VisionLanguageModel, inputs: Inputs, output_tokens: int) -> StageFlops:
    """Count the operations of one greedy answer of exactly `output_tokens` tokens, in an untimed pass of its own.

    The knobs are set by the caller. The number depends on shapes alone: of samples that agree in their prompt's length
    and in the shapes of their pixels one has to be counted, but for crops of nothing but zeros, which SmolVLM leaves
    out. The eager engine makes the pass, whatever engine times: what a replayed graph launches is seen by nobody, and
    it attends to all the room that its cache has.

    Args:
        inputs: one sample or a left-padded batch, on the device, with its pixels.
        output_tokens: with the one that prefill makes.

    Raises:
        ValueError: fewer than one output token.
    """
    if output_tokens < 1:
        raise ValueError(f"output_tokens is {output_tokens}; prefill makes the first token, so at least 1 is counted")
    if unseen := _unseen_parts(vlm):
        return StageFlops(None, None, None, None, unseen)
    counter = FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))
    watch = _Watch(counter.flop_registry)

    def mark() -> _Mark:
        return _Mark(counter.get_total_flops(), watch.uncounted_calls)

    # The counter is entered last, so it takes an operator apart first, and what is left goes on to the watch.
    with decoding_eagerly(vlm), watch, counter:
        tower_ends: list[_Mark] = []
        begin = mark()
        features = vlm.encode_images(inputs.vision, lambda: tower_ends.append(mark()))
        projected = mark()
        token, state = vlm.prefill(inputs.prompt, inputs.vision, features, output_tokens)
        prefilled = mark()
        for _ in range(output_tokens - 1):
            token = vlm.decode_step(token, state)
        end = mark()
    return StageFlops(
        vision=_between(begin, tower_ends[-1]),
        projector=_between(tower_ends[-1], projected),
        prefill=_between(projected, prefilled),
        decode=_between(prefilled, end),
        uncounted=tuple(sorted(watch.uncounted)),
    )


# -- marks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    flops: int  # so far
    uncounted_calls: int  # so far


def _between(begin: _Mark, end: _Mark) -> int | None:
    return end.flops - begin.flops if end.uncounted_calls == begin.uncounted_calls else None


# -- what torch's counter lacks ---------------------------------------------------------------------------------------


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of shapes (batch, heads, tokens, width); with fewer heads of keys than of queries, each serves several."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _grouped(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Of matrix products in groups: every row of `left`, or a slice of it, meets the matrix of its group only.

    Shapes are (rows, inner) and (groups, inner, columns) for experts. Of the others that `aten._grouped_mm` takes, two
    matrices are cut along `inner`, two stacks are multiplied in pairs, and of a stack and a matrix the columns are cut.
    """
    rows_and_inner = left[1:] if len(left) == 3 and len(right) == 2 else left
    return 2 * _product(rows_and_inner) * right[-1]


def _vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    """Of (rows, columns) times (columns,), or of two vectors."""
    return 2 * _product(matrix)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


_aten = torch.ops.aten

# By operator. Attention stands here for every kernel, because the formula of older releases of torch refuses fewer
# heads of keys than of queries.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_cudnn_attention: _attention,
    _aten._grouped_mm: _grouped,
    torch.ops.transformers.grouped_mm_fallback: _grouped,
    _aten.mv: _vector,
    _aten.dot: _vector,
}


# -- what nobody counts -----------------------------------------------------------------------------------------------

# Parts of the names of torch's operators that multiply matrices: bmm, _int_mm, addmv, conv_tbc, mkldnn_linear, ...
_MULTIPLIES = re.compile(r"\w*mm|\w*mv|v?dot|matmul|linear|conv(?!ert)\w*|trilinear|attention|attn|mha|lstm|gru|rnn")


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operators that cost something and have no formula; everything runs as it would without."""

    supports_higher_order_operators = True

    def __init__(self, formulas: dict[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uncounted: set[str] = set()
        self.uncounted_calls = 0
        self._formulas = formulas

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._formulas and costs_something(func.namespace, packet.__name__):
            self.uncounted.add(f"{func.namespace}::{packet.__name__}")
            self.uncounted_calls += 1
        return func(*args, **(kwargs or {}))


def costs_something(namespace: str, operator: str) -> bool:
    """Whether an operator multiplies matrices, to judge by its name; true of whatever is not torch's own.

    Args:
        namespace: `aten` for torch's own.
        operator: without the name of its overload.
    """
    if namespace not in ("aten", "prim", "prims"):
        return True
    return any(_MULTIPLIES.fullmatch(part) for part in operator.split("_"))


def _unseen_parts(vlm: VisionLanguageModel) -> tuple[str, ...]:
    """Back-ends and kinds of block whose work may pass the counter by, for messages."""
    configurations = [module.config for module in vlm.model.modules() if hasattr(module, "config")]
    found = {
        "attention": ({getattr(c, "_attn_implementation", None) for c in configurations}, SEEN_ATTENTION),
        "experts": ({getattr(c, "_experts_implementation", None) for c in configurations}, SEEN_EXPERTS),
        "blocks": (set(getattr(vlm.decoder.config, "layer_types", None) or ()), SEEN_BLOCKS),
    }
    return tuple(sorted(f"{what} {name}" for what, (names, seen) in found.items() for name in names - {None, *seen}))

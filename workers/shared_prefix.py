"""What candidate block lists share is computed once: the hidden state, and the cache, behind their common first blocks.

A candidate's pass through the prompt saves its state where others branch off. A later candidate makes the same pass of
the model, embeddings, masks and rotary tables included, but the blocks before its branch do nothing: the last of them
returns what was saved, and all get their cache layers from the candidate that ran them. Results are those of each
candidate alone, bit for bit, because every block that runs sees the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from knobs.block_tree import Blocks, CandidateRun, block_list, plan_candidates
from knobs.configuration import entries_of
from knobs.stack import BlockStack, stack_of
from workers.models.adapter import VisionLanguageModel
from workers.models.engines import decoding_eagerly

Result = TypeVar("Result")

# Their `update` concatenates into new tensors, so a second object with the same tensors is a branch of its own. Other
# kinds (recurrent and convolutional states, static caches) write into their tensors.
_GROW_BY_CONCATENATION = (DynamicLayer, DynamicSlidingWindowLayer)


def run_candidates(
    vlm: VisionLanguageModel, candidates: Iterable[Sequence[int]], run: Callable[[], Result], share: bool = True
) -> Iterator[tuple[Blocks, Result]]:
    """Call `run` once for every distinct candidate, with the candidate's blocks switched on.

    Answers are decoded by the eager engine: every candidate is another setting, for which a graph would be captured
    anew, and a graph's cache cannot be branched.

    Args:
        vlm: other knobs may be on, and stay.
        candidates: block lists as `active_blocks` takes them.
        run: passes the same prompts through the model each time, all in its decoder's first pass; what follows, such as
            decode steps, may differ.
        share: compute common prefixes once; the results are the same without.

    Yields:
        Each candidate, ascending and without repetition, and what `run` returned, in the order of the tree.

    Raises:
        KnobError: a list that the model cannot run.
    """
    num_blocks = len(vlm.decoder.layers)
    if not share or _blocks_are_linked(vlm.decoder):
        runs = [CandidateRun(b) for b in sorted({block_list(candidate, num_blocks) for candidate in candidates})]
    else:
        runs = plan_candidates(candidates, num_blocks)
    prefix = SharedPrefix(vlm.decoder)
    for planned in runs:
        with decoding_eagerly(vlm), vlm.knobs(active_blocks=planned.blocks), prefix.during(planned):
            result = run()
        yield planned.blocks, result


@dataclass(frozen=True)
class _Saved:
    output: Any  # of the block before the branch: (batch, tokens, width), in the form in which its kind returns it
    cache_layers: Sequence[Any]  # of the blocks before the branch, as the prompt left them; empty without a cache


class SharedPrefix:
    """What candidates have saved for those that branch off from them; runs come in the order of their plan."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._saved: dict[int, _Saved] = {}

    def __len__(self) -> int:
        return len(self._saved)

    @contextmanager
    def during(self, planned: CandidateRun) -> Iterator[None]:
        """The decoder's first pass inside the block takes up and saves what is planned; further passes are whole."""
        taken = self._saved.pop(planned.resume_at) if planned.resume_at else None
        outputs: dict[int, Any] = {}
        with ExitStack() as first_pass:

            def end(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], ___: Any) -> None:
                first_pass.close()
                layers = _continued(kwargs.get("past_key_values"), taken, planned)
                for position, output in outputs.items():
                    self._saved[position] = _Saved(output, layers[:position])

            if taken is not None:
                first_pass.enter_context(_resumed(self.decoder, planned.resume_at, taken.output))
            for position in planned.save_at:
                hook = self.decoder.layers[position - 1].register_forward_hook(
                    # A copy, because a few kinds of block add to their input in place.
                    lambda _, __, output, position=position: outputs.update({position: _copied(output)})
                )
                first_pass.callback(hook.remove)
            first_pass.callback(self.decoder.register_forward_hook(end, with_kwargs=True).remove)
            yield


@contextmanager
def _resumed(decoder: Any, position: int, output: Any) -> Iterator[None]:
    """The blocks before `position` do nothing; the last of them returns `output`, so that the next one goes on from it.

    What a model adds between blocks (deep-stack features), or hands from block to block beside the residual stream, is
    thereby as it was.
    """
    before = list(decoder.layers[:position])
    own = [layer.__dict__.get("forward") for layer in before]
    # The others only have to return something of the same form, which must not be the same object: what a model adds
    # between blocks it may add in place.
    stand_in = _copied(output) if position > 1 else None
    try:
        for layer in before[:-1]:
            layer.forward = lambda *_, **__: stand_in
        before[-1].forward = lambda *_, **__: output
        yield
    finally:
        for layer, forward in zip(before, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _continued(cache: Cache | None, taken: _Saved | None, planned: CandidateRun) -> list[Any]:
    """Give the cache the layers of the blocks that did not run again; its layers up to the last branch, kept apart."""
    if cache is None:
        return []
    inherited = [] if taken is None else list(taken.cache_layers)
    cache.layers[: len(inherited)] = [_branched(layer) for layer in inherited]
    end = max(planned.save_at, default=0)
    return inherited[:end] + [_branched(layer) for layer in cache.layers[len(inherited) : end]]


def _branched(layer: Any) -> Any:
    """A cache layer with the same content that goes on independently of the original."""
    return copy.copy(layer) if type(layer) in _GROW_BY_CONCATENATION else copy.deepcopy(layer)


def _copied(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if isinstance(output, tuple | list) else output


def _blocks_are_linked(decoder: Any) -> bool:
    """Whether blocks read what earlier ones have left elsewhere than in their output, so that both have to run."""
    stack = stack_of(entries_of(decoder.config), len(decoder.layers))
    return stack != BlockStack(stack.num_blocks, attention=stack.attention)

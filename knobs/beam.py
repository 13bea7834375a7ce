"""Beam search over the blocks to skip, as a state machine: its state is its settings and the values known so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knobs.block_tree import Blocks
from knobs.errors import KnobError
from knobs.importance import FIRST_AND_LAST, kept_blocks


@dataclass(frozen=True)
class Value:
    """The objective of one block list, such as accuracy or the mean log-likelihood of the answers: higher is better."""

    mean: float
    standard_error: float | None = None


@dataclass(frozen=True)
class BeamSearch:
    """Takes one block after the other out of the best lists so far; each round needs the values of its candidates.

    Nothing is remembered between calls: both methods replay the search from the values that are known, so a search
    that is interrupted goes on where it was, in any process, and values that are already there are not asked for again.

    Attributes:
        num_blocks: blocks of the model.
        width: lists that each round goes on from.
        depth: blocks to take out at the most.
        keep: blocks that are never taken out; -1 is the last.
    """

    num_blocks: int
    width: int
    depth: int
    keep: Sequence[int] = FIRST_AND_LAST

    def __post_init__(self) -> None:
        removable = self.num_blocks - max(1, len(kept_blocks(self.keep, self.num_blocks)))
        if self.width < 1:
            raise KnobError(f"width {self.width}: a beam needs at least one list")
        if not 1 <= self.depth <= removable:
            raise KnobError(f"depth {self.depth}: of {self.num_blocks} blocks 1 to {removable} can be taken out")

    def next_round(self, values: Mapping[Blocks, Value]) -> list[Blocks]:
        """The candidates whose values are needed next, those that `values` has left out; empty when it is over.

        The first round is the whole model and the model without each block; every further one takes one block more out
        of each list of the beam. A list that is reached in several orders is one candidate.
        """
        for candidates in self._rounds(values):
            if unknown := [blocks for blocks in candidates if blocks not in values]:
                return unknown
        return []

    def best(self, values: Mapping[Blocks, Value]) -> dict[int, Blocks]:
        """The best list found for every number of removed blocks, 0 included, of the rounds that are complete."""
        found: dict[int, Blocks] = {}
        for candidates in self._rounds(values):
            if any(blocks not in values for blocks in candidates):
                break
            for blocks in _ranked(candidates, values):
                found.setdefault(self.num_blocks - len(blocks), blocks)
        return found

    def _rounds(self, values: Mapping[Blocks, Value]) -> list[list[Blocks]]:
        """Candidates of every round up to the first that lacks a value."""
        whole = tuple(range(self.num_blocks))
        rounds = [[whole, *self._without_one_more([whole])]]
        while len(rounds) < self.depth and all(blocks in values for blocks in rounds[-1]):
            fewest = self.num_blocks - len(rounds)
            beam = _ranked([b for b in rounds[-1] if len(b) == fewest], values)[: self.width]
            rounds.append(self._without_one_more(beam))
        return rounds

    def _without_one_more(self, beam: Sequence[Blocks]) -> list[Blocks]:
        kept = kept_blocks(self.keep, self.num_blocks)
        return sorted({tuple(b for b in blocks if b != out) for blocks in beam for out in blocks if out not in kept})


def _ranked(candidates: Sequence[Blocks], values: Mapping[Blocks, Value]) -> list[Blocks]:
    """Best first; equal ones, and those whose value is not a number, in the order of their blocks, the latter last."""

    def rank(blocks: Blocks) -> tuple[bool, float, Blocks]:
        mean = values[blocks].mean
        return (True, 0.0, blocks) if mean != mean else (False, -mean, blocks)

    return sorted(candidates, key=rank)

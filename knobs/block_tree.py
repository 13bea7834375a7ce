"""Candidate block lists as a tree: those that agree on their first blocks run them once; pure arithmetic.

Two lists share the blocks in which they agree before the first block that only one of them keeps. So the lists are the
leaves of a binary tree: at a branch, one side keeps the block and the other skips it. `plan_candidates` walks that tree
depth first and says for each list where it takes up what an earlier one saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from knobs.blocks import refuse_blocks
from knobs.errors import KnobError

Blocks = tuple[int, ...]


@dataclass(frozen=True)
class CandidateRun:
    """How one candidate runs when it takes up what an earlier one left behind.

    Attributes:
        blocks: the blocks it keeps, in ascending order.
        resume_at: the position in the model's stack from which it runs, on the state an earlier candidate saved there;
            0 is the beginning, where nothing needs to be saved.
        save_at: positions before whose block it saves its state, ascending; each is taken up by one later candidate.
    """

    blocks: Blocks
    resume_at: int = 0
    save_at: tuple[int, ...] = ()

    @property
    def block_evaluations(self) -> int:
        """Blocks that it runs itself."""
        return sum(block >= self.resume_at for block in self.blocks)


def block_list(blocks: Iterable[int], num_blocks: int) -> Blocks:
    """A list of blocks in the one form in which candidates are compared: ascending, without repetition.

    Raises:
        KnobError: no block, or one that a model of `num_blocks` blocks does not have.
    """
    asked = list(blocks)
    if reason := refuse_blocks(asked, num_blocks):
        raise KnobError(f"active_blocks {asked}: {reason}")
    return tuple(sorted(set(asked)))


def single_ablations(num_blocks: int) -> list[Blocks]:
    """The whole model, and the model without each one of its blocks in turn."""
    whole = tuple(range(num_blocks))
    return [whole, *(whole[:block] + whole[block + 1 :] for block in whole if num_blocks > 1)]


def plan_candidates(candidates: Iterable[Sequence[int]], num_blocks: int) -> list[CandidateRun]:
    """Runs of all candidates in an order in which each finds what it shares with an earlier one.

    States are taken up in the reverse order of saving, and at most log2(number of candidates) of them wait at a time:
    at a branch, the side that needs fewer is visited first, as registers are allocated for an expression (Sethi and
    Ullman 1970). The order and repetition of the candidates mean nothing.

    Args:
        candidates: block lists, each as `active_blocks` takes it.
        num_blocks: blocks of the model.

    Raises:
        KnobError: a list that the model cannot run.
    """
    distinct = sorted({block_list(candidate, num_blocks) for candidate in candidates})
    return _walk(distinct)[1] if distinct else []


def block_evaluations(runs: Iterable[CandidateRun], shared: bool = True) -> int:
    """Blocks run for all candidates, each block of each candidate counting one; shared, or each candidate alone."""
    return sum(run.block_evaluations if shared else len(run.blocks) for run in runs)


def most_saved(runs: Iterable[CandidateRun]) -> int:
    """The largest number of states that wait at a time."""
    waiting = most = 0
    for run in runs:
        waiting += len(run.save_at) - (run.resume_at > 0)
        most = max(most, waiting)
    return most


def _walk(group: Sequence[Blocks]) -> tuple[int, list[CandidateRun]]:
    """States that the group needs to have waiting, and its runs; the group is sorted and agrees up to a branch."""
    if len(group) == 1:
        return 0, [CandidateRun(group[0])]
    # In a sorted group, what the first and the last agree on, all agree on; the first may be where the last begins.
    pairs = zip(group[0], group[-1], strict=False)
    common = next((i for i, (one, other) in enumerate(pairs) if one != other), len(group[0]))
    branch = min(blocks[common] for blocks in group if len(blocks) > common)
    sides = [[b for b in group if branch not in b], [b for b in group if branch in b]]
    (fewer, first), (more, then) = sorted((_walk(side) for side in sides), key=lambda side: side[0])
    if common == 0:  # nothing has run before the branch, so there is nothing to save
        return more, first + then
    first[0] = replace(first[0], save_at=(branch, *first[0].save_at))
    then[0] = replace(then[0], resume_at=branch)
    return max(fewer + 1, more), first + then

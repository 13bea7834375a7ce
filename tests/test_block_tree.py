"""Candidate block lists as a tree: what is shared, in which order, how much waits; plans are carried out here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knobs.block_tree import (
    Blocks,
    CandidateRun,
    block_evaluations,
    block_list,
    most_saved,
    plan_candidates,
    single_ablations,
)
from knobs.errors import KnobError

NUM_BLOCKS = 7
LISTS = st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=10)


def carried_out(runs: Sequence[CandidateRun], num_blocks: int) -> tuple[dict[Blocks, Blocks], int, int]:
    """Which blocks' work each candidate ends up with, how many blocks ran, and how many states waited at the most."""
    saved: dict[int, Blocks] = {}
    ends: dict[Blocks, Blocks] = {}
    ran = waiting = 0
    for run in runs:
        state = saved.pop(run.resume_at) if run.resume_at else ()
        for position in range(run.resume_at, num_blocks):
            if position in run.save_at:
                assert position not in saved
                saved[position] = state
            if position in run.blocks:
                state, ran = (*state, position), ran + 1
        ends[run.blocks] = state
        waiting = max(waiting, len(saved))
    assert not saved, "every state is taken up"
    return ends, ran, waiting


@given(st.lists(LISTS, max_size=25))
def test_every_candidate_runs_its_blocks_and_every_common_beginning_runs_once(candidates: list[list[int]]) -> None:
    runs = plan_candidates(candidates, NUM_BLOCKS)
    distinct = {tuple(sorted(set(candidate))) for candidate in candidates}
    ends, ran, waiting = carried_out(runs, NUM_BLOCKS)
    assert ends == {blocks: blocks for blocks in distinct}
    assert len(runs) == len(distinct)
    # Each beginning of a list is one block run once: the nodes of a trie.
    beginnings = {blocks[:length] for blocks in distinct for length in range(1, len(blocks) + 1)}
    assert ran == block_evaluations(runs) == len(beginnings)
    assert block_evaluations(runs, shared=False) == sum(map(len, distinct))
    assert waiting == most_saved(runs) <= math.log2(max(len(distinct), 1))


@given(st.lists(LISTS, min_size=1, max_size=10), st.randoms())
def test_order_and_repetition_mean_nothing(candidates: list[list[int]], random: object) -> None:
    shuffled = [list(reversed(c)) + c for c in candidates] + candidates[:1]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_candidates(shuffled, NUM_BLOCKS) == plan_candidates(candidates, NUM_BLOCKS)


def test_ablation_of_sixteen_blocks() -> None:
    runs = plan_candidates(single_ablations(16), 16)
    assert (block_evaluations(runs), block_evaluations(runs, shared=False)) == (136, 256)
    assert most_saved(runs) == 1, "each state is taken up by the next candidate"


def test_all_subsets_share_the_most_there_is() -> None:
    subsets = [blocks for size in range(1, 9) for blocks in combinations(range(8), size)]
    runs = plan_candidates(subsets, 8)
    assert block_evaluations(runs) == len(subsets), "every list is the beginning of itself"
    assert most_saved(runs) <= 7


def test_what_two_lists_share_ends_at_the_first_block_that_one_of_them_lacks() -> None:
    assert plan_candidates([(0, 1, 3, 4), (0, 1, 2, 3, 4)], 5) == [
        CandidateRun((0, 1, 3, 4), resume_at=0, save_at=(2,)),
        CandidateRun((0, 1, 2, 3, 4), resume_at=2),
    ]
    # One that ends where the other goes on shares all it has.
    assert plan_candidates([(0, 1, 2), (0, 1)], 4) == [
        CandidateRun((0, 1), save_at=(2,)),
        CandidateRun((0, 1, 2), resume_at=2),
    ]


def test_lists_without_a_common_first_block_begin_at_the_beginning() -> None:
    runs = plan_candidates([(1, 2), (2, 3), (0,)], 4)
    assert all(run.resume_at == 0 and run.save_at == () for run in runs)


def test_no_candidates_no_runs() -> None:
    assert plan_candidates([], 4) == []
    assert single_ablations(1) == [(0,)]
    assert single_ablations(3) == [(0, 1, 2), (1, 2), (0, 2), (0, 1)]


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([], "active_blocks []: at least one block must run"),
        ([0, 4], "active_blocks [0, 4]: the model has blocks 0 to 3, not 4"),
    ],
)
def test_lists_that_cannot_run(blocks: list[int], reason: str) -> None:
    for refused in (lambda: block_list(blocks, 4), lambda: plan_candidates([[0], blocks], 4)):
        with pytest.raises(KnobError) as caught:
            refused()
        assert str(caught.value) == reason

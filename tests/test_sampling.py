"""The sampling strategies: the levels each one keeps, and what makes a Latin hypercube one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sampling import LEVEL_STRATEGIES, in_order, latin_hypercube, levels, sample, stratum_levels

LEVEL_COUNTS = st.integers(min_value=1, max_value=40)
AXES = st.dictionaries(
    st.sampled_from(["longest_edge", "moe_top_k", "active_blocks", "tiles"]),
    st.lists(st.integers(min_value=1, max_value=99), min_size=1, max_size=6, unique=True),
)


@pytest.mark.parametrize(
    ("strategy", "n_levels", "indices"),
    [
        ("full", 3, [0, 1, 2]),
        ("balanced", 1, [0]),
        ("balanced", 2, [0, 1]),
        ("balanced", 3, [0, 1, 2]),
        ("balanced", 4, [0, 1, 2, 3]),
        ("balanced", 5, [0, 1, 3, 4]),
        ("balanced", 12, [0, 4, 8, 11]),
        ("stratified", 1, [0]),
        ("stratified", 2, [0, 1]),
        ("stratified", 5, [0, 2, 4]),
        ("stratified", 12, [0, 6, 11]),
        ("boundary", 1, [0]),
        ("boundary", 3, [0, 1, 2]),
        ("boundary", 5, [0, 1, 2, 3, 4]),
        ("boundary", 12, [0, 3, 6, 9, 11]),
    ],
)
def test_levels_of_each_strategy(strategy: str, n_levels: int, indices: list[int]) -> None:
    assert levels(strategy, n_levels) == indices


@given(st.sampled_from(LEVEL_STRATEGIES), LEVEL_COUNTS)
def test_every_strategy_keeps_both_ends_and_repeats_nothing(strategy: str, n_levels: int) -> None:
    indices = levels(strategy, n_levels)
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert indices[-1] == n_levels - 1


@pytest.mark.parametrize(
    ("written", "ordered"),
    [
        ([8, 2, 4], [2, 4, 8]),
        ([True, False], [False, True]),
        (["784x784", "560x560", "336x560", "560x336"], ["336x560", "560x336", "560x560", "784x784"]),
        (["high", "low", "medium"], ["low", "medium", "high"]),
        (["huge", "low"], ["huge", "low"]),
        ([(0, 2, 3), 3, (0, 1, 3), 2, (5,)], [(5,), 2, 3, (0, 1, 3), (0, 2, 3)]),
    ],
)
def test_levels_are_ordered_from_little_to_much(written: list[object], ordered: list[object]) -> None:
    assert in_order(written) == ordered


def test_sizes_of_equal_area_keep_the_order_they_were_written_in() -> None:
    assert in_order(["560x336", "336x560"]) == ["560x336", "336x560"]


def test_the_product_varies_the_last_axis_fastest() -> None:
    combinations = sample({"longest_edge": [64, 32], "moe_top_k": [1, 2]}, "full")
    assert [(c["longest_edge"], c["moe_top_k"]) for c in combinations] == [(32, 1), (32, 2), (64, 1), (64, 2)]


def test_stratified_thins_out_every_axis() -> None:
    combinations = sample({"tiles": [1, 2, 3, 4, 5], "moe_top_k": [8]}, "stratified")
    assert combinations == [{"tiles": tiles, "moe_top_k": 8} for tiles in (1, 3, 5)]


@pytest.mark.parametrize("strategy", LEVEL_STRATEGIES)
def test_without_axes_there_is_the_native_setting(strategy: str) -> None:
    assert sample({}, strategy) == [{}]


def test_without_axes_lhs_gives_the_native_setting_once() -> None:
    assert sample({}, "lhs", n=5) == [{}]


@given(LEVEL_COUNTS, st.integers(min_value=1, max_value=200), st.integers(min_value=0, max_value=2**32 - 1))
def test_lhs_uses_each_stratum_once_and_levels_evenly(n_levels: int, n: int, seed: int) -> None:
    drawn = stratum_levels("moe_top_k", n_levels, n, seed)
    assert sorted(drawn) == [(2 * stratum + 1) * n_levels // (2 * n) for stratum in range(n)]
    counts = Counter(drawn)
    uses = [counts[level] for level in range(n_levels)]
    assert sum(uses) == n
    assert max(uses) - min(uses) <= 1


@given(AXES, st.integers(min_value=1, max_value=60), st.integers(min_value=0, max_value=99))
def test_lhs_points_are_distinct_points_of_the_grid(axes: dict[str, list[int]], n: int, seed: int) -> None:
    combinations = sample(axes, "lhs", n=n, seed=seed)
    grid = sample(axes, "full")
    assert 1 <= len(combinations) <= min(n, len(grid))
    # A subset of the grid in the order of the grid: distinct, and stable when n grows a sweep.
    assert [combination for combination in grid if combination in combinations] == combinations


@given(AXES, st.sampled_from(LEVEL_STRATEGIES))
def test_every_strategy_is_a_subset_of_the_grid_in_its_order(axes: dict[str, list[int]], strategy: str) -> None:
    combinations = sample(axes, strategy)
    assert [combination for combination in sample(axes, "full") if combination in combinations] == combinations


def test_lhs_depends_on_the_seed() -> None:
    drawn = {tuple(latin_hypercube({"tiles": 10, "moe_top_k": 10}, 10, seed)) for seed in range(5)}
    assert len(drawn) == 5


def test_lhs_is_the_same_in_every_process() -> None:
    code = "from orchestrator.sampling import stratum_levels; print(stratum_levels('tiles', 8, 8, 7))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent.parent,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "1")
    }
    # Written out, so that a change of the generator, which would change what a resumed sweep draws, is noticed.
    assert printed == {"[1, 7, 3, 2, 5, 0, 4, 6]"}


def test_another_axis_leaves_the_draw_of_the_first_alone() -> None:
    alone = stratum_levels("tiles", 6, 12, seed=3)
    both = latin_hypercube({"tiles": 6, "moe_top_k": 4}, 12, seed=3)
    together = sorted(zip(alone, stratum_levels("moe_top_k", 4, 12, seed=3), strict=True))
    assert both == sorted(set(together))


@pytest.mark.parametrize(
    ("axes", "strategy", "n", "message"),
    [
        ({"tiles": [1]}, "latin", None, "'latin' is not one of full, balanced, stratified, boundary, lhs"),
        ({"tiles": []}, "full", None, "axis tiles has no levels"),
        ({"tiles": [1]}, "lhs", None, "lhs needs n"),
        ({"tiles": [1]}, "lhs", 0, "lhs needs n >= 1"),
        ({"tiles": [1]}, "full", 3, "n belongs to lhs, not to full"),
    ],
)
def test_wrong_requests_are_refused(axes: dict[str, list[int]], strategy: str, n: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample(axes, strategy, n=n)


def test_lhs_has_no_levels_of_its_own() -> None:
    with pytest.raises(ValueError, match="'lhs' is not one of full, balanced, stratified, boundary"):
        levels("lhs", 3)

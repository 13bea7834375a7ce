"""Tilings, tiers and Molmo's crops: recorded choices, worked examples, and what must hold for any image."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from knobs.overlapping_crops import (
    GRID,
    MARGIN,
    adaptive_tiling,
    prompt_grid,
    prompt_image_length,
    prompt_vision_tokens,
)
from knobs.tiling import TIERS, Tier, Tiling, exact_tiling, grids, select_crops_for_tier, tiling_mismatch
from knobs.vision import VisionSetting
from workers.models.molmoe.family import MolmoEGeometry

GOLDEN = json.loads((Path(__file__).parent / "golden" / "molmoe" / "preproc.json").read_text())["items"]
GEOMETRY = MolmoEGeometry(max_crops=12)
GOLDEN_SIZES = [f"{item['h']}x{item['w']}" for item in GOLDEN]

SIDES = st.integers(1, 10_000)
CROPS = st.integers(1, 40)
GRIDS = st.tuples(st.integers(1, 15), st.integers(1, 15))
EXTREME_SIZES = [(1, 1), (10_000, 1), (1, 10_000), (112, 112), (113, 113), (112, 113), (113, 112), (9_000, 9_900)]


@pytest.mark.parametrize("item", GOLDEN, ids=GOLDEN_SIZES)
def test_adaptive_tiling_is_the_published_one(item: dict) -> None:
    chosen = [list(adaptive_tiling(item["h"], item["w"], n)) for n in range(1, 21)]
    assert chosen == item["adaptive_tilings_max_crops_1_to_20"]


@pytest.mark.parametrize("item", GOLDEN, ids=GOLDEN_SIZES)
def test_exact_tiling_is_the_recorded_one(item: dict) -> None:
    recorded = item["exact_tilings_1_to_15"]
    inner = GRID.inner_size(item["h"], item["w"])
    assert [list(exact_tiling(*inner, n)) for n in range(1, 16)] == recorded["b3d737f"]
    # A later version of the same rule did not subtract the margins.
    assert [list(exact_tiling(item["h"], item["w"], n)) for n in range(1, 16)] == recorded["doc_original_aspect"]


def test_exact_tiling_decides_ties_in_single_precision() -> None:
    # 0.25 lies between 2/5 and 1/10; in double precision the latter is nearer by one rounding.
    assert exact_tiling(1008 - MARGIN, 336 - MARGIN, 10) == (5, 2)


@pytest.mark.parametrize(
    ("width", "height", "crops", "tiling", "mismatch"),
    [(640, 480, 6, (2, 3), 0.07), (480, 640, 6, (3, 2), 0.03), (512, 512, 4, (2, 2), 0.0)],
)
def test_the_documented_tier_examples(width: int, height: int, crops: int, tiling: Tiling, mismatch: float) -> None:
    chosen_crops, chosen, distance = select_crops_for_tier(TIERS["medium"], height - MARGIN, width - MARGIN)
    assert (chosen_crops, chosen) == (crops, tiling)
    assert round(distance, 2) == mismatch


def test_an_unsuitable_preferred_count_gives_way_to_the_best_of_the_tier() -> None:
    assert select_crops_for_tier(TIERS["low"], 400, 400) == (1, (1, 1), 0.0)
    # 5 columns are nearer than 4 x 2; with any mismatch acceptable the preferred one stays.
    medium = TIERS["medium"]
    assert select_crops_for_tier(medium, 200, 1000)[:2] == (5, (1, 5))
    assert select_crops_for_tier(replace(medium, mismatch_threshold=9), 200, 1000)[:2] == (4, (1, 4))
    # Of all mismatches the threshold itself is too large: 4 crops are 0.5 from a grid of 2 x 3.
    exactly = replace(medium, preferred_crops=(4,), mismatch_threshold=0.5)
    assert select_crops_for_tier(exactly, 200, 300)[:2] == (6, (2, 3))


def test_a_bound_on_rows_and_columns_passes_over_counts_without_a_grid() -> None:
    assert grids(12, 4) == [(3, 4), (4, 3)]
    assert grids(7, 6) == []
    with pytest.raises(ValueError, match="no grid of 7 crops"):
        exact_tiling(100, 700, 7, most_per_side=6)
    assert exact_tiling(100, 700, 12, most_per_side=6) == (2, 6)
    assert select_crops_for_tier(TIERS["medium"], 100, 700)[:2] == (7, (1, 7))
    assert select_crops_for_tier(TIERS["medium"], 100, 700, most_per_side=6)[:2] == (6, (1, 6))
    # None of the preferred counts of a tier need have a grid, nor any other.
    primes = Tier("primes", 5, 7, (5, 7))
    assert select_crops_for_tier(primes, 100, 100, most_per_side=4)[0] == 6
    with pytest.raises(ValueError, match="tier primes"):
        select_crops_for_tier(primes, 100, 100, most_per_side=2)


def test_a_tier_of_any_length_is_a_matter_of_comparisons() -> None:
    endless = Tier("endless", 1, 10**12, (10**12, 2))
    with pytest.raises(ValueError, match=r"must be some of 1 to 1000000000000, all of them above 0") as caught:
        Tier("endless", 1, 10**12, (0,))
    assert len(str(caught.value)) < 120
    assert select_crops_for_tier(endless, 100, 200, most_per_side=4)[1] == (1, 2)
    assert grids(10**12, 4) == []
    geometry = MolmoEGeometry(12)
    assert "takes at most 64" in str(geometry.refuse(VisionSetting("tier", "endless", endless)))


def test_a_tier_prefers_only_counts_it_contains() -> None:
    with pytest.raises(ValueError, match="preferred_crops"):
        Tier("low", 1, 3, (2, 4))
    with pytest.raises(ValueError, match="preferred_crops"):
        Tier("none", 0, 3, (0,))


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((560, 336), (2, 1)),
        ((560, 560), (2, 2)),
        ((784, 784), (3, 3)),
        ((560, 784), (2, 3)),
        ((1, 1), (1, 1)),
        ((448, 448), (2, 2)),  # 1.5 rounds to the even 2,
        ((672, 672), (2, 2)),  # and so does 2.5
    ],
)
def test_canvas_tiling(size: Tiling, tiling: Tiling) -> None:
    assert GRID.canvas_tiling(*size) == tiling


@given(GRIDS)
def test_a_canvas_has_the_tiling_it_was_made_for(grid: Tiling) -> None:
    assert GRID.canvas_tiling(*GRID.canvas_size(*grid)) == grid


@pytest.mark.parametrize(
    ("grid", "tower", "prompt"),
    [
        ((1, 1), 288, 288),
        ((1, 2), 432, 384),
        ((2, 2), 720, 544),
        ((2, 3), 1008, 704),
        ((2, 4), 1296, 864),
        ((3, 3), 1440, 928),
        ((3, 4), 1872, 1152),
        ((3, 5), 2304, 1376),
    ],
)
def test_token_counts(grid: Tiling, tower: int, prompt: int) -> None:
    rows, columns = grid
    crops = rows * columns
    assert GRID.tower_tokens(crops) == tower
    assert prompt_vision_tokens(rows, columns) == prompt_vision_tokens(columns, rows) == prompt
    assert prompt_vision_tokens(rows, columns, force_full_tokens=True) == tower
    assert GRID.crops_for_tokens(tower) == GRID.crops_for_tokens(tower + 143) == crops
    assert prompt_image_length(rows, columns) == 160 + (8 * rows + 4) * (8 * columns + 5)
    assert prompt_image_length(rows, columns, force_full_tokens=True) == 160 + 12 * rows * (12 * columns + 1)


def test_few_tokens_are_one_crop() -> None:
    assert [GRID.crops_for_tokens(tokens) for tokens in (0, 144, 287, 288, 431)] == [1] * 5


def test_a_layout_describes_its_canvas_and_its_prompt() -> None:
    layout = GEOMETRY.layout(480, 640, VisionSetting("tier", "medium"))
    assert (layout.tiling, layout.num_crops, layout.tower_passes) == ((2, 3), 6, 7)
    assert (layout.target_height, layout.target_width) == (560, 784)
    assert (layout.vision_tokens, layout.prompt_vision_tokens) == (1008, 704)
    assert layout.prompt_vision_tokens + layout.special_tokens == prompt_image_length(2, 3)
    assert round(layout.aspect_mismatch, 2) == 0.07
    full = GEOMETRY.layout(480, 640, VisionSetting("tier", "medium", force_full_tokens=True))
    assert (full.vision_tokens, full.prompt_vision_tokens) == (1008, 1008)
    assert prompt_grid(2, 3) == (20, 28)
    assert prompt_grid(2, 3, force_full_tokens=True) == (24, 36)


@pytest.mark.parametrize(
    ("setting", "tiling"),
    [
        (VisionSetting(), (2, 3)),
        (VisionSetting("tier", "low"), (1, 1)),
        (VisionSetting("tier", "medium"), (2, 3)),
        (VisionSetting("image_size", "560x336"), (2, 1)),
        (VisionSetting("crops", 2), (1, 2)),
        (VisionSetting("vision_tokens", 1872), (3, 4)),
    ],
)
def test_every_axis_leads_to_a_tiling(setting: VisionSetting, tiling: Tiling) -> None:
    assert GEOMETRY.tiling(480, 640, setting) == tiling


def test_an_axis_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="longest_edge"):
        GEOMETRY.tiling(480, 640, VisionSetting("longest_edge", 384))


@given(SIDES, SIDES, CROPS)
def test_adaptive_tiling_never_has_more_crops_than_allowed_nor_fewer_when_more_are_allowed(
    height: int, width: int, max_crops: int
) -> None:
    rows, columns = adaptive_tiling(height, width, max_crops)
    more_rows, more_columns = adaptive_tiling(height, width, max_crops + 1)
    assert 1 <= rows * columns <= max_crops
    assert rows * columns <= more_rows * more_columns


@given(SIDES, SIDES, CROPS, st.sampled_from(["linear", "log"]))
def test_exact_tiling_has_exactly_the_crops_asked_for(height: int, width: int, crops: int, distance: str) -> None:
    inner = GRID.inner_size(height, width, distance)
    rows, columns = exact_tiling(*inner, crops, distance)
    assert rows * columns == crops
    others = [tiling_mismatch(*inner, grid, distance) for grid in grids(crops)]
    assert tiling_mismatch(*inner, (rows, columns), distance) == pytest.approx(min(others), rel=1e-5, abs=1e-6)


@given(SIDES, SIDES, CROPS, st.sampled_from(sorted(TIERS)))
def test_mirrored_images_get_mirrored_grids_by_the_log_distance(height: int, width: int, crops: int, tier: str) -> None:
    assume(height != width)
    inner, mirrored = (GRID.inner_size(*size, "log") for size in [(height, width), (width, height)])
    assert exact_tiling(*inner, crops, "log") == exact_tiling(*mirrored, crops, "log")[::-1]
    count, grid, mismatch = select_crops_for_tier(TIERS[tier], *inner, aspect_distance="log")
    assert select_crops_for_tier(TIERS[tier], *mirrored, aspect_distance="log") == (count, grid[::-1], mismatch)


@given(st.integers(1, 60))
def test_tower_and_full_tokens_rise_with_every_crop(crops: int) -> None:
    assert GRID.tower_tokens(crops) < GRID.tower_tokens(crops + 1)
    for rows in (r for r in range(1, crops + 1) if crops % r == 0):
        assert prompt_vision_tokens(rows, crops // rows, force_full_tokens=True) == GRID.tower_tokens(crops)


@given(GRIDS)
def test_prompt_tokens_rise_with_every_row_and_column_and_stay_within_the_towers(grid: Tiling) -> None:
    rows, columns = grid
    tokens = prompt_vision_tokens(rows, columns)
    assert tokens < min(prompt_vision_tokens(rows + 1, columns), prompt_vision_tokens(rows, columns + 1))
    assert tokens <= GRID.tower_tokens(rows * columns)
    assert prompt_image_length(rows, columns) <= prompt_image_length(rows, columns, force_full_tokens=True)


def in_bounds(tier: Tier, height: int, width: int, distance: str) -> None:
    inner = GRID.inner_size(height, width, distance)
    crops, (rows, columns), mismatch = select_crops_for_tier(tier, *inner, aspect_distance=distance)
    assert tier.min_crops <= crops <= tier.max_crops
    assert rows * columns == crops
    assert mismatch == tiling_mismatch(*inner, (rows, columns), distance)


@given(SIDES, SIDES, st.sampled_from(sorted(TIERS)), st.sampled_from(["linear", "log"]))
def test_every_image_gets_crops_within_its_tier(height: int, width: int, tier: str, distance: str) -> None:
    in_bounds(TIERS[tier], height, width, distance)


@pytest.mark.parametrize("size", EXTREME_SIZES)
@pytest.mark.parametrize("distance", ["linear", "log"])
def test_extreme_images_get_crops_too(size: Tiling, distance: str) -> None:
    for tier in TIERS.values():
        in_bounds(tier, *size, distance)
    for crops in range(1, 16):
        rows, columns = exact_tiling(*GRID.inner_size(*size, distance), crops, distance)
        assert rows * columns == crops
    assert all(r * c <= n for n in range(1, 21) for r, c in [adaptive_tiling(*size, n)])


def test_tiers_do_not_overlap_and_cost_ever_more() -> None:
    assert all(low.max_crops + 1 == high.min_crops for low, high in pairwise(TIERS.values()))

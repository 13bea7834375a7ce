"""Molmo's crop arithmetic: recorded tilings, worked examples, and what must hold for any image."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from knobs.overlapping_crops import (
    MARGIN,
    TIERS,
    Tier,
    Tiling,
    adaptive_tiling,
    canvas_size,
    canvas_tiling,
    crop_layout,
    crops_for_tokens,
    exact_tiling,
    prompt_grid,
    prompt_image_length,
    prompt_vision_tokens,
    select_crops_for_tier,
    tiling_for,
    tiling_mismatch,
    tower_tokens,
)
from knobs.vision import VisionSetting

GOLDEN = json.loads((Path(__file__).parent / "golden" / "molmoe" / "preproc.json").read_text())["items"]
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
    assert [list(exact_tiling(item["h"], item["w"], n)) for n in range(1, 16)] == recorded["b3d737f"]
    # A later version of the same rule did not subtract the margins.
    height, width = item["h"] + MARGIN, item["w"] + MARGIN
    assert [list(exact_tiling(height, width, n)) for n in range(1, 16)] == recorded["doc_original_aspect"]


def test_exact_tiling_decides_ties_in_single_precision() -> None:
    # 0.25 lies between 2/5 and 1/10; in double precision the latter is nearer by one rounding.
    assert exact_tiling(1008, 336, 10) == (5, 2)


@pytest.mark.parametrize(
    ("width", "height", "crops", "tiling", "mismatch"),
    [(640, 480, 6, (2, 3), 0.07), (480, 640, 6, (3, 2), 0.03), (512, 512, 4, (2, 2), 0.0)],
)
def test_the_documented_tier_examples(width: int, height: int, crops: int, tiling: Tiling, mismatch: float) -> None:
    chosen_crops, chosen, distance = select_crops_for_tier(TIERS["medium"], height, width)
    assert (chosen_crops, chosen) == (crops, tiling)
    assert round(distance, 2) == mismatch


def test_an_unsuitable_preferred_count_gives_way_to_the_best_of_the_tier() -> None:
    assert select_crops_for_tier(TIERS["low"], 512, 512) == (1, (1, 1), 0.0)
    # 5 columns are nearer than 4 x 2; with any mismatch acceptable the preferred one stays.
    assert select_crops_for_tier(TIERS["medium"], 312, 1112)[:2] == (5, (1, 5))
    assert select_crops_for_tier(TIERS["medium"], 312, 1112, mismatch_threshold=9)[:2] == (4, (1, 4))


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
    assert canvas_tiling(*size) == tiling


@given(GRIDS)
def test_a_canvas_has_the_tiling_it_was_made_for(grid: Tiling) -> None:
    assert canvas_tiling(*canvas_size(*grid)) == grid


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
    assert crop_layout(rows, columns).vision_tokens == tower_tokens(crops) == tower
    assert prompt_vision_tokens(rows, columns) == prompt_vision_tokens(columns, rows) == prompt
    assert prompt_vision_tokens(rows, columns, force_full_tokens=True) == tower
    assert crops_for_tokens(tower) == crops_for_tokens(tower + 143) == crops
    assert prompt_image_length(rows, columns) == 160 + (8 * rows + 4) * (8 * columns + 5)
    assert prompt_image_length(rows, columns, force_full_tokens=True) == 160 + 12 * rows * (12 * columns + 1)


def test_few_tokens_are_one_crop() -> None:
    assert [crops_for_tokens(tokens) for tokens in (0, 144, 287, 288, 431)] == [1] * 5


def test_a_layout_describes_its_canvas() -> None:
    layout = crop_layout(2, 3)
    assert (layout.tiling, layout.num_crops, layout.tower_passes) == ((2, 3), 6, 7)
    assert (layout.target_height, layout.target_width) == (560, 784)
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
    assert tiling_for(setting, 480, 640, max_crops=12) == tiling


def test_an_axis_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="longest_edge"):
        tiling_for(VisionSetting("longest_edge", 384), 480, 640, max_crops=12)


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
    rows, columns = exact_tiling(height, width, crops, distance)
    assert rows * columns == crops
    others = [tiling_mismatch(height, width, (r, crops // r), distance) for r in range(1, crops + 1) if crops % r == 0]
    assert tiling_mismatch(height, width, (rows, columns), distance) == pytest.approx(min(others), rel=1e-5, abs=1e-6)


@given(SIDES, SIDES, CROPS, st.sampled_from(sorted(TIERS)))
def test_mirrored_images_get_mirrored_grids_by_the_log_distance(height: int, width: int, crops: int, tier: str) -> None:
    assume(height != width)
    assert exact_tiling(height, width, crops, "log") == exact_tiling(width, height, crops, "log")[::-1]
    count, grid, mismatch = select_crops_for_tier(TIERS[tier], height, width, aspect_distance="log")
    assert select_crops_for_tier(TIERS[tier], width, height, aspect_distance="log") == (count, grid[::-1], mismatch)


@given(st.integers(1, 60))
def test_tower_and_full_tokens_rise_with_every_crop(crops: int) -> None:
    assert tower_tokens(crops) < tower_tokens(crops + 1)
    for rows in (r for r in range(1, crops + 1) if crops % r == 0):
        assert prompt_vision_tokens(rows, crops // rows, force_full_tokens=True) == tower_tokens(crops)


@given(GRIDS)
def test_prompt_tokens_rise_with_every_row_and_column_and_stay_within_the_towers(grid: Tiling) -> None:
    rows, columns = grid
    tokens = prompt_vision_tokens(rows, columns)
    assert tokens < min(prompt_vision_tokens(rows + 1, columns), prompt_vision_tokens(rows, columns + 1))
    assert tokens <= tower_tokens(rows * columns)
    assert prompt_image_length(rows, columns) <= prompt_image_length(rows, columns, force_full_tokens=True)


def in_bounds(tier: Tier, height: int, width: int, distance: str) -> None:
    crops, (rows, columns), mismatch = select_crops_for_tier(tier, height, width, aspect_distance=distance)
    assert tier.min_crops <= crops <= tier.max_crops
    assert rows * columns == crops
    assert mismatch == tiling_mismatch(height, width, (rows, columns), distance)


@given(SIDES, SIDES, st.sampled_from(sorted(TIERS)), st.sampled_from(["linear", "log"]))
def test_every_image_gets_crops_within_its_tier(height: int, width: int, tier: str, distance: str) -> None:
    in_bounds(TIERS[tier], height, width, distance)


@pytest.mark.parametrize("size", EXTREME_SIZES)
@pytest.mark.parametrize("distance", ["linear", "log"])
def test_extreme_images_get_crops_too(size: Tiling, distance: str) -> None:
    for tier in TIERS.values():
        in_bounds(tier, *size, distance)
    for crops in range(1, 16):
        rows, columns = exact_tiling(*size, crops, distance)
        assert rows * columns == crops
    assert all(r * c <= n for n in range(1, 21) for r, c in [adaptive_tiling(*size, n)])


def test_tiers_do_not_overlap_and_cost_ever_more() -> None:
    assert all(low.max_crops + 1 == high.min_crops for low, high in pairwise(TIERS.values()))

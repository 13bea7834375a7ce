"""Molmo's image tensors against recordings of the published preprocessing, and full tokens against a painted canvas."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knobs.overlapping_crops import GRID, prompt_grid, prompt_image_length, prompt_vision_tokens
from knobs.placement import place
from knobs.tiling import Tiling, exact_tiling
from knobs.vision import VisionSetting
from workers.models.molmoe import preprocessing
from workers.models.molmoe.family import MolmoEGeometry
from workers.models.molmoe.preprocessing import (
    MEAN,
    NO_POSITION,
    STD,
    CutImage,
    SpecialTokens,
    positions,
    preprocess,
    token_ids,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "molmoe" / "preproc.json").read_text())
ITEMS = GOLDEN["items"]
IDS = GOLDEN["meta"]["special_ids"]
SPECIAL = SpecialTokens(IDS["im_start"], IDS["im_end"], IDS["im_patch"], IDS["im_col"])
# Pixels are equal to the bit only where the same build of torch resizes them, with fused multiply-add.
SAME_TORCH = torch.__version__ == GOLDEN["meta"]["torch"] and torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
)
# The checkpoint's own limit, with which default_pad was recorded.
MAX_CROPS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(height: int, width: int, seed: int) -> Image.Image:
    """The picture of a record, from whole numbers only so that it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    pixels = np.empty((height, width, 3), np.uint8)
    for colour in range(3):
        across = x * (3 + 2 * colour + seed % 5) // (1 + seed // 5 % 4)
        down = y * (2 + 3 * colour + seed % 7) // (1 + seed // 3 % 3)
        pixels[..., colour] = (across + down + (x // 16 ^ y // 16) * 7 + 40 * colour) % 256
    return Image.fromarray(pixels)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()


def chosen_tiling(item: dict, mode: str) -> Tiling:
    """The tiling that the setting of a record leads to here."""
    kind, _, value = mode.partition(".")
    value = value.removesuffix(".ff0").removesuffix(".ff1")
    height, width = item["h"], item["w"]
    setting = {
        "default_pad": VisionSetting(),
        "default_fill": VisionSetting(),
        "exact": VisionSetting("vision_tokens", int(value) if kind == "exact" else None),
        "tier": VisionSetting("tier", value),
        "fixed_canvas": VisionSetting("image_size", value),
    }.get(kind)
    if setting is not None:
        return MolmoEGeometry(MAX_CROPS).tiling(height, width, setting)
    # The image_size records chose the grid anew by aspect: not a setting here, but pixels of some tiling all the same.
    rows, columns = GRID.canvas_tiling(*(int(side) for side in value.split("x")))
    return exact_tiling(*GRID.inner_size(height, width), rows * columns)


def test_every_setting_leads_to_the_recorded_tiling_but_for_a_third_of_the_tiers() -> None:
    """The recorded tier rule is a later one than the documented rule; they disagree mostly about thin images."""
    records = [(item, mode) for item in ITEMS for mode in item["modes"]]
    same = [mode for item, mode in records if list(chosen_tiling(item, mode)) == item["modes"][mode]["tiling"]]
    tiers = [mode for mode in same if mode.startswith("tier.")]
    assert len(records) == 44 * 27
    assert len(same) - len(tiers) == 44 * 21
    assert len(tiers) == 174  # of 44 * 6


@pytest.mark.parametrize("item", ITEMS, ids=[f"{item['h']}x{item['w']}" for item in ITEMS])
def test_recorded_tensors(item: dict) -> None:
    """All settings, under the tiling of the record: what is made of a tiling does not depend on who chose it."""
    image = drawn(item["h"], item["w"], item["seed"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == item["image_sha"]

    @cache
    def cut(tiling: Tiling, fit: str) -> tuple[CutImage, str, float, float]:
        made = preprocess(image, tiling, SPECIAL, fit=fit)
        deviation, mean = torch.std_mean(made.images.double(), correction=0)
        return made, digest(made.images), float(mean), float(deviation)

    for mode, record in item["modes"].items():
        tiling, full = tuple(record["tiling"]), mode.endswith(".ff1")
        made, pixels, mean, deviation = cut(tiling, "pad" if mode == "default_pad" else "fill")
        check_counts(tiling, full, record)
        assert made.images.shape == (record["n_images"], 576, 588), mode
        assert mean == pytest.approx(record["mean"], abs=1e-6), mode
        assert deviation == pytest.approx(record["std"], abs=1e-6), mode
        if "crop_means" in record:
            crop_means = made.images.double().mean((1, 2)).tolist()
            assert crop_means == pytest.approx(record["crop_means"], abs=2e-6), mode
        if "patch_sha" in record and SAME_TORCH:
            assert pixels[:16] == record["patch_sha"], mode
        if "mask_sha" in record:
            assert digest(made.image_masks)[:16] == record["mask_sha"], mode
        # The recorded order of full tokens is by arrival, not by place.
        if not full:
            assert digest(made.image_input_idx.int()) == record["idx_sha"], mode
            assert digest(made.token_ids.int())[:16] == record["tok_sha"], mode


def check_counts(tiling: Tiling, full: bool, record: dict) -> None:
    index, ids = positions(*tiling, full), token_ids(*tiling, SPECIAL, full)
    assert list(GRID.canvas_size(*tiling)) == record["canvas"]
    assert index.shape == (record["n_images"], 144)
    assert int((index >= 0).sum()) == record["valid"] == prompt_vision_tokens(*tiling, full)
    assert int((ids == SPECIAL.patch).sum()) == record["n_patch_tok"]
    assert int((ids == SPECIAL.column).sum()) == record["n_col_tok"]
    assert len(ids) == record["n_vision_seq"] == prompt_image_length(*tiling, full)
    assert digest(ids.int())[:16] == record["tok_sha"]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tiling", [(1, 1), (1, 3), (3, 1), (2, 3), (3, 5)])
def test_positions_are_all_vision_tokens_and_each_is_used_once(tiling: Tiling, full: bool) -> None:
    index, ids = positions(*tiling, full), token_ids(*tiling, SPECIAL, full)
    used = index[index >= 0]
    assert set(index[index < 0].tolist()) <= {NO_POSITION}
    assert used.sort().values.tolist() == (ids == SPECIAL.patch).nonzero().flatten().tolist()


@pytest.mark.parametrize("tiling", [(1, 1), (1, 3), (3, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("full", [False, True])
def test_every_cell_lands_where_it_is_in_the_picture(tiling: Tiling, full: bool) -> None:
    """Paint every cell of every crop with a value of its own and read the prompt back as a picture."""
    rows, columns = tiling
    painted = torch.arange((rows * columns + 1) * 144).view(-1, 144)
    index, ids = positions(rows, columns, full), token_ids(rows, columns, SPECIAL, full)
    prompt = torch.full((len(ids),), -1)
    prompt[index[index >= 0]] = painted[index >= 0]
    seen = prompt[ids == SPECIAL.patch]
    height, width = prompt_grid(rows, columns, full)
    assert seen[:144].tolist() == painted[0].tolist()
    grid = seen[144:].view(height, width)

    crops = painted[1:].view(rows, columns, 12, 12)
    for y, x in np.ndindex(height, width):
        if full:
            i, j = y // 12, x // 12
            cell = (y - 12 * i, x - 12 * j)
        else:
            # The middle 8 cells of each crop, and the outer 2 at the border of the canvas.
            i, j = min(max(y - 2, 0) // 8, rows - 1), min(max(x - 2, 0) // 8, columns - 1)
            cell = (y - 8 * i, x - 8 * j)
        assert grid[y, x] == crops[i, j, cell[0], cell[1]]


def test_patches_are_pixels_of_the_canvas_row_by_row() -> None:
    """An image of the canvas' own size is not resized, so that its pixels can be read off the patches."""
    height, width = GRID.canvas_size(2, 3)
    image = drawn(height, width, 7)
    made = preprocess(image, (2, 3), SPECIAL, fit="fill")
    source = torch.from_numpy(np.array(image)) / 255
    expected = (source - torch.tensor(MEAN)) / torch.tensor(STD)
    for crop, patch in ((0, 0), (0, 575), (4, 30), (5, 577 - 25)):
        top = 224 * (crop // 3) + 14 * (patch // 24)
        left = 224 * (crop % 3) + 14 * (patch % 24)
        window = expected[top : top + 14, left : left + 14].flatten()
        assert torch.allclose(made.images[1 + crop, patch], window, atol=1e-5)


def test_a_border_is_black_and_masked() -> None:
    made = preprocess(Image.new("RGB", (336, 168), "white"), (1, 1), SPECIAL, fit="pad")
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    assert torch.allclose(made.images[1, 0].view(14, 14, 3), black.expand(14, 14, 3))
    # 84 rows above and below the 168 of the image are 6 of 24 rows of patches.
    shares = made.image_masks[0].view(24, 24)
    assert shares[:6].sum() == shares[18:].sum() == 0
    assert bool((shares[6:18] == 1).all())
    assert bool((made.image_masks[1] == -1).all())


def test_a_filled_canvas_has_no_border() -> None:
    made = preprocess(drawn(50, 333, 3), (2, 2), SPECIAL, fit="fill")
    assert bool((made.image_masks[:-1] == 1).all())


@pytest.mark.parametrize("fit", ["pad", "fill"])
@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (3, 5000), (5000, 3)])
def test_extreme_images_are_cut_too(size: tuple[int, int], fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 10,000 pixels covers a square of 336 if it is made 3.4 million long; the whole would be 4.5 GB."""
    largest = 0

    def watched(source: torch.Tensor, height: int, width: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, height * width)
        return resize(source, height, width)

    resize = preprocessing._interpolate
    monkeypatch.setattr(preprocessing, "_interpolate", watched)
    made = preprocess(Image.new("RGB", size, (255, 0, 0)), (1, 1), SPECIAL, fit=fit)
    assert largest <= 2**22
    assert made.images.shape == (2, 576, 588)
    red = (torch.tensor((1.0, 0, 0)) - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = made.images[1].view(-1, 3)
    assert bool(pixels.isfinite().all())
    assert torch.allclose(pixels[pixels[:, 0].argmax()], red, atol=1e-4)
    # Nothing is black but the border of a padded image.
    assert bool((pixels[:, 0] > 0).all()) == (fit == "fill" or size == (1, 1))


def test_cutting_rows_first_changes_nothing_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    image = drawn(700, 90, 5)
    usual = preprocess(image, (2, 2), SPECIAL, fit="fill")
    monkeypatch.setattr(preprocessing, "LARGE", 0)
    assert torch.allclose(preprocess(image, (2, 2), SPECIAL, fit="fill").images, usual.images, atol=1e-5)


def test_place_rounds_down_to_pad_and_up_to_fill() -> None:
    padded, filled = place(427, 640, 560, 784, "pad"), place(427, 640, 560, 784, "fill")
    assert (padded.height, padded.width, padded.top, padded.left) == (523, 784, 18, 0)
    assert (filled.height, filled.width, filled.top, filled.left) == (560, 840, 0, -28)

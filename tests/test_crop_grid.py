"""The vision axes that every family of crops shares: what must hold for any image, and what becomes of the pixels."""

from __future__ import annotations

import io
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import picture, tiny_model

from knobs.crop_grid import GRID_AXES, CropGridGeometry
from knobs.placement import fit_of, place
from knobs.tiling import TIERS, Tier, grids
from knobs.vision import VisionLayout, VisionSetting
from workers.errors import SampleError
from workers.images import decode_rgb
from workers.models import REGISTERED, describe
from workers.models.adapter import VisionLanguageModel
from workers.models.processing import Inputs, lay_on_canvas


def geometry_of(name: str) -> CropGridGeometry:
    geometry = describe(name, random_weights=True).geometry
    assert isinstance(geometry, CropGridGeometry)
    return geometry


PUBLISHED = {name: geometry_of(name) for name in ("molmoe-1b", "smolvlm2-2.2b", "smolvlm2-256m", "internvl3-1b")}
TINY_CROPS = ("tiny-molmoe", "tiny-smolvlm", "tiny-internvl")


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Height and width from 10 x 10 to 6000 x 4000, aspects to 1:20 both ways."""
    longer = draw(st.integers(10, 6000))
    shorter = draw(st.integers(max(1, -(-longer // 20)), min(longer, 4000)))
    return (longer, shorter) if draw(st.booleans()) else (shorter, longer)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_every_family_of_crops_takes_all_four_axes_and_its_dial() -> None:
    families = {
        name: describe(name, random_weights=True).geometry for name in REGISTERED if not name.startswith("qwen")
    }
    crops = {name: g for name, g in families.items() if isinstance(g, CropGridGeometry)}
    assert {"molmoe-1b", "smolvlm2-2.2b", "internvl3-8b"} <= set(crops)
    for name, geometry in crops.items():
        assert set(GRID_AXES) <= set(geometry.axes), name
        for axis in geometry.axes:
            assert sum(setting.knob == axis for setting in geometry.levels()) >= 3, (name, axis)


@pytest.mark.parametrize("name", PUBLISHED)
@given(size=sizes(), distance=st.sampled_from(["linear", "log"]), full=st.sampled_from([None, True]))
def test_what_holds_for_any_image(name: str, size: tuple[int, int], distance: str, full: bool | None) -> None:
    geometry = PUBLISHED[name]
    full = full if "force_full_tokens" in geometry.options else None
    previous: VisionLayout | None = None
    for crops in range(1, 16):
        setting = VisionSetting("crops", crops, aspect_distance=distance, force_full_tokens=full)
        if not grids(crops, geometry.grid.most_per_side):
            assert geometry.refuse(setting)
            continue
        layout = geometry.layout(*size, setting)
        rows, columns = layout.tiling
        assert rows * columns == layout.num_crops == crops
        assert layout.prompt_vision_tokens <= layout.vision_tokens
        assert (layout.prompt_vision_tokens == layout.vision_tokens) or (full is None and name == "molmoe-1b")
        assert (layout.target_height, layout.target_width) == geometry.grid.canvas_size(rows, columns)
        # More crops never promise fewer tokens, and asking for as many tokens as they promise gives them.
        assert previous is None or layout.vision_tokens > previous.vision_tokens
        asked = VisionSetting("vision_tokens", layout.vision_tokens, aspect_distance=distance, force_full_tokens=full)
        assert geometry.layout(*size, asked) == layout
        canvas = VisionSetting("image_size", f"{layout.target_height}x{layout.target_width}", force_full_tokens=full)
        assert geometry.layout(*size, canvas) == layout
        previous = layout
    for tier in TIERS.values():
        chosen = geometry.layout(*size, VisionSetting("tier", tier.name, aspect_distance=distance))
        assert tier.min_crops <= chosen.num_crops <= tier.max_crops


@pytest.mark.parametrize("name", PUBLISHED)
@given(size=sizes())
def test_a_mirrored_image_gets_the_mirrored_tiling_by_the_log_distance(name: str, size: tuple[int, int]) -> None:
    geometry = PUBLISHED[name]
    if size[0] == size[1]:
        return
    for setting in (
        VisionSetting("tier", "low", aspect_distance="log"),
        VisionSetting("tier", "high", aspect_distance="log"),
        VisionSetting("crops", 6, aspect_distance="log"),
        VisionSetting("vision_tokens", geometry.grid.tower_tokens(12), aspect_distance="log"),
    ):
        assert geometry.tiling(*size, setting) == geometry.tiling(*size[::-1], setting)[::-1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_fewer_tokens_than_one_more_crop_needs_change_nothing(name: str) -> None:
    geometry = PUBLISHED[name]
    grid = geometry.grid
    for tokens in range(grid.tower_tokens(1), grid.tower_tokens(15) + 1, 7):
        crops = grid.crops_for_tokens(tokens)
        assert grid.tower_tokens(crops) <= tokens
        more = [n for n in range(crops + 1, grid.most_crops + 1) if grids(n, grid.most_per_side)]
        assert grid.tower_tokens(more[0]) > tokens


def test_custom_tiers_and_thresholds_decide() -> None:
    geometry = PUBLISHED["internvl3-1b"]
    pair = Tier("pair", 2, 5, (2,))
    assert geometry.layout(400, 800, VisionSetting("tier", "pair", pair)).tiling == (1, 2)
    assert geometry.layout(800, 800, VisionSetting("tier", "pair", pair)).tiling == (2, 2)
    patient = Tier("pair", 2, 5, (2,), mismatch_threshold=2.0)
    assert geometry.layout(800, 800, VisionSetting("tier", "pair", patient)).tiling == (2, 1)


def test_a_completed_setting_leaves_nothing_open() -> None:
    molmoe, smolvlm = PUBLISHED["molmoe-1b"], PUBLISHED["smolvlm2-2.2b"]
    low = VisionSetting("tier", "low")
    assert molmoe.complete(low) == VisionSetting("tier", "low", TIERS["low"], "linear", False, True)
    assert molmoe.complete(VisionSetting()) == VisionSetting("native", None, None, None, False, False)
    assert smolvlm.complete(low) == VisionSetting("tier", "low", TIERS["low"], "linear", None, None)
    fixed = VisionSetting("image_size", "384x768", aspect_distance="log")
    assert smolvlm.complete(fixed) == VisionSetting("image_size", "384x768")
    for geometry, setting in itertools.product((molmoe, smolvlm), (low, VisionSetting(), fixed)):
        once = geometry.complete(setting)
        assert geometry.complete(once) == once
        assert geometry.layout(333, 777, once) == geometry.layout(333, 777, setting)


# -- large images, counted in the tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_CROPS)
def test_large_and_thin_images_come_out_as_predicted(name: str) -> None:
    vlm = tiny_model(name)
    geometry = vlm.card.geometry
    generator = random.Random(4)
    few = [(6000, 4000), (4000, 200), (200, 4000)]
    for _ in range(3):
        longer = generator.randint(1000, 6000)
        few.append((longer, generator.randint(longer // 20, min(longer, 4000))))
    dial = geometry.levels()[1]
    for size in few:
        # Pixels do not matter to the counts, and one colour is quickly made.
        image = Image.new("RGB", size[::-1], (127, 90, 60))
        for setting in (VisionSetting(), dial, VisionSetting("tier", "low"), VisionSetting("crops", 4)):
            layout = geometry.layout(*size, setting)
            inputs = vlm.preprocess([image], "", setting)
            assert layout is not None
            assert inputs.num_crops == layout.num_crops, (size, setting)
            assert inputs.num_vision_tokens == layout.prompt_vision_tokens, (size, setting)


# -- pixels -----------------------------------------------------------------------------------------------------------


def pixels_of(vlm: VisionLanguageModel, image: Image.Image, setting: VisionSetting) -> torch.Tensor:
    inputs: Inputs = vlm.preprocess([image], "", setting)
    pixels = inputs.vision["pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


def test_crops_of_internvl_are_its_tiles() -> None:
    vlm = tiny_model("tiny-internvl")
    for size, n in itertools.product([(60, 90), (90, 60), (100, 33)], (1, 2, 3, 6)):
        by_dial = pixels_of(vlm, picture(*size), VisionSetting("tiles", n))
        assert torch.equal(pixels_of(vlm, picture(*size), VisionSetting("crops", n)), by_dial)


def test_a_picture_of_the_size_of_its_canvas_is_cut_as_it_is() -> None:
    vlm = tiny_model("tiny-smolvlm")
    image = picture(64, 96)
    tiles = pixels_of(vlm, image, VisionSetting("image_size", "64x96"))
    assert torch.equal(tiles, pixels_of(vlm, image, VisionSetting("longest_edge", 96)))
    upper_right = torch.from_numpy(np.array(image)[:32, 64:]).permute(2, 0, 1) / 255
    assert torch.allclose(tiles[2] * 0.5 + 0.5, upper_right, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-smolvlm", "tiny-internvl"])
def test_filling_cuts_off_and_letterboxing_adds_black(name: str) -> None:
    """A landscape in one crop: its left and right thirds are cut off, or black lies above and below it."""
    vlm = tiny_model(name)
    image = Image.new("RGB", (90, 30), "red")
    image.paste((0, 255, 0), (30, 0, 60, 30))

    def colours(fill: bool) -> np.ndarray:
        crop = pixels_of(vlm, image, VisionSetting("crops", 1, resize_to_fill=fill))
        assert crop.shape == (1, 3, 32, 32)
        green = vlm.processor is not None and crop[0, 1]
        assert isinstance(green, torch.Tensor)
        # Of three values of green (none in black and red, full) only the brightest is high.
        return (green > green.mean()).numpy() if not fill else (crop[0, 1] > crop[0, 0]).numpy()

    assert colours(fill=True).all()
    boxed = colours(fill=False)
    assert boxed[11:21, 11:21].all()
    assert not boxed[:10].any()
    assert not boxed[22:].any()
    assert not boxed[:, :10].any()


@pytest.mark.parametrize("fit", [True, False])
def test_the_canvas_is_laid_where_the_arithmetic_says(fit: bool) -> None:
    """Against the same resize without the short cut that cuts first."""
    setting = VisionSetting("crops", 6, resize_to_fill=fit)
    geometry = PUBLISHED["internvl3-1b"]
    for size in [(300, 500), (500, 300), (77, 640), (448, 448)]:
        layout = geometry.layout(*size, setting)
        image = picture(*size).resize(size[::-1], Image.Resampling.BOX).convert("RGB")
        smooth = image.resize((size[1] // 8 + 1, size[0] // 8 + 1)).resize(size[::-1], Image.Resampling.BICUBIC)
        made = np.asarray(lay_on_canvas(smooth, layout, fit_of(setting), Image.Resampling.BICUBIC)).astype(float)
        at = place(*size, layout.target_height, layout.target_width, fit_of(setting))
        whole = np.asarray(smooth.resize((at.width, at.height), Image.Resampling.BICUBIC)).astype(float)
        expected = np.zeros((layout.target_height, layout.target_width, 3))
        shown = whole[max(0, -at.top) :, max(0, -at.left) :][: layout.target_height, : layout.target_width]
        top, left = max(0, at.top), max(0, at.left)
        expected[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        assert np.abs(made - expected).mean() < 1.5, size


def test_a_checkpoint_that_does_not_cut_is_cut_under_a_knob_only() -> None:
    family, card = REGISTERED["tiny-smolvlm"].family, describe("tiny-smolvlm")
    assert family == card.family.name
    whole = {**card.preprocessor, "do_image_splitting": False}
    geometry = card.family.geometry(card.config, whole)
    assert isinstance(geometry, CropGridGeometry)
    tokenizer = tiny_model("tiny-smolvlm").processor
    assert tokenizer is not None
    processor = card.family.processor(tokenizer.tokenizer, card.config, whole)
    for setting in (VisionSetting(), VisionSetting("longest_edge", 96), VisionSetting("crops", 2)):
        layout = geometry.layout(90, 60, setting)
        assert processor([picture(90, 60)], "", setting).num_crops == layout.num_crops
        pinned = geometry.pinned(setting)
        assert pinned is None or pinned.num_crops == layout.num_crops
    assert geometry.layout(90, 60, VisionSetting()).num_crops == 1
    assert geometry.layout(90, 60, VisionSetting("longest_edge", 96)).num_crops == 6


def test_several_images_of_different_tilings_stand_in_one_prompt() -> None:
    for name in TINY_CROPS:
        vlm = tiny_model(name)
        images = [picture(40, 120), picture(120, 40), picture(50, 50)]
        for setting in (VisionSetting("tier", "low"), VisionSetting("crops", 3, resize_to_fill=False)):
            layouts = [vlm.card.geometry.layout(image.height, image.width, setting) for image in images]
            inputs = vlm.preprocess(images, "", setting)
            assert inputs.num_crops == sum(layout.num_crops for layout in layouts if layout)
            assert inputs.num_vision_tokens == sum(layout.prompt_vision_tokens for layout in layouts if layout)


# -- files ------------------------------------------------------------------------------------------------------------


def files_of(image: Image.Image) -> dict[str, bytes]:
    """The same picture as different files."""

    def saved(made: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        made.save(buffer, kind, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return {
        "turned": saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95),
        "alpha": saved(image.convert("RGBA")),
        "palette": saved(image.convert("P")),
        "16 bit": saved(grey16),
        "CMYK": saved(image.convert("CMYK"), "JPEG"),
        "bilevel": saved(image.convert("1")),
    }


@pytest.mark.parametrize("name", TINY_CROPS)
def test_the_kind_of_file_changes_no_tiling(name: str) -> None:
    vlm = tiny_model(name)
    image = picture(60, 130)
    for setting in (VisionSetting(), VisionSetting("tier", "medium"), VisionSetting("crops", 2)):
        layout = vlm.card.geometry.layout(60, 130, setting)
        assert layout is not None
        for kind, data in files_of(image).items():
            decoded = decode_rgb(data, kind)
            assert decoded.size == (130, 60), kind
            inputs = vlm.preprocess([decoded], "", setting)
            assert inputs.num_crops == layout.num_crops, kind
            assert inputs.num_vision_tokens == layout.prompt_vision_tokens, kind


@pytest.mark.parametrize("name", TINY_CROPS)
def test_one_pixel_is_an_image(name: str) -> None:
    vlm = tiny_model(name)
    for setting in (VisionSetting(), VisionSetting("tier", "high"), VisionSetting("image_size", "1x1")):
        layout = vlm.card.geometry.layout(1, 1, setting)
        assert layout is not None
        assert vlm.preprocess([picture(1, 1)], "", setting).num_crops == layout.num_crops


def test_a_hundred_megapixels_are_refused_before_they_are_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    with pytest.raises(SampleError, match=r"s: the image is too large \(10000x10000, limit 89478485 pixels\)"):
        decode_rgb(buffer.getvalue(), "s")

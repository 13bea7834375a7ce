"""Previews: where the parts of a canvas lie, that the models get just those pixels, and a command that writes a PNG."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from tiny import TINY, options_of, settings_of, tiny_model

from knobs import preview
from knobs.canvas_parts import Box, CanvasParts, canvas_parts
from knobs.card import described
from knobs.drawing import laid, shortened, shown_box, text_width, wrapped
from knobs.overlapping_crops import CROP, GRID, MARGIN, PATCH, PATCHES_PER_SIDE
from knobs.preview import main, read_picture
from knobs.preview_page import PAGE_WIDTH, arranged, page
from knobs.preview_panel import Panel, panel_of
from knobs.vision import VisionGeometry, VisionLayout, VisionSetting
from workers.images import decode_rgb
from workers.models.molmoe.preprocessing import MEAN, STD, SpecialTokens, preprocess

REPOSITORY = Path(__file__).parents[1]
SIZES = [(480, 640), (640, 480), (384, 384), (200, 1500), (1500, 200), (10, 10), (37, 1001), (3000, 2000)]
MOLMO = "tiny-molmoe"  # cuts images as the published model does
MODELS = ["molmoe-1b", "smolvlm2-2.2b", "internvl3-1b", "qwen3-vl-30b-a3b", *TINY]


def scene(height: int, width: int) -> Image.Image:
    """A picture that is nowhere black and no two parts of which look alike; smooth, so that every filter agrees."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 60 + 180 * x / width, 60 + 180 * y / height
    blue = 150 + 60 * np.sin(9 * x / width + 5 * y / height)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def panel(name: str, setting: VisionSetting, height: int, width: int) -> Panel:
    return panel_of(described(name), setting, height, width)


def levels_of(name: str) -> list[VisionSetting]:
    """Every setting worth knowing, as it is and both ways of laying the image on the canvas."""
    geometry = described(name).geometry
    levels = [replace(level, resize_to_fill=fill) for level in geometry.levels() for fill in (None, True, False)]
    return [level for level in levels if geometry.refuse(level) is None]


# -- where the parts lie ----------------------------------------------------------------------------------------------


def test_the_parts_of_a_medium_tier_canvas_of_molmo() -> None:
    parts = panel(MOLMO, VisionSetting("tier", "medium"), 480, 640).parts
    assert parts.canvas == Box(0, 0, 784, 560)
    assert parts.crops == (
        Box(0, 0, 336, 336),
        Box(224, 0, 560, 336),
        Box(448, 0, 784, 336),
        Box(0, 224, 336, 560),
        Box(224, 224, 560, 560),
        Box(448, 224, 784, 560),
    )
    assert parts.shared == (Box(224, 0, 336, 560), Box(448, 0, 560, 560), Box(0, 224, 784, 336))
    # 640 x 1.225 = 784, 480 x 1.225 = 588: 28 rows hang over.
    assert parts.image == Box(0, -14, 784, 574)
    assert parts.cut_off == (Box(0, -14, 784, 0), Box(0, 560, 784, 574))
    assert parts.padding == ()


def test_the_parts_of_a_letterboxed_canvas_of_molmo() -> None:
    parts = panel(MOLMO, VisionSetting("image_size", "336x560", resize_to_fill=False), 100, 100).parts
    assert parts.image == Box(112, 0, 448, 336)
    assert parts.padding == (Box(0, 0, 112, 336), Box(448, 0, 560, 336))
    assert parts.cut_off == ()


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_under_every_setting(name: str) -> None:
    for setting in levels_of(name):
        for height, width in SIZES:
            made = panel(name, setting, height, width)
            check_sums(made.parts, made.layout)
            assert (made.view is None) == (made.layout.tower_passes == made.layout.num_crops)
            if made.view is not None:
                assert made.view.canvas == made.parts.crops[0]
                assert not (made.view.padding and made.view.cut_off)


def check_sums(parts: CanvasParts, layout: VisionLayout) -> None:
    canvas, crops = parts.canvas, parts.crops
    assert (canvas.height, canvas.width) == (layout.target_height, layout.target_width)
    assert len(crops) == layout.num_crops
    assert len({(crop.height, crop.width) for crop in crops}) == 1
    rows, columns = layout.tiling
    assert [*crops] == sorted(crops, key=lambda crop: (crop.top, crop.left))
    assert len({crop.top for crop in crops}) == rows
    assert len({crop.left for crop in crops}) == columns
    assert (crops[0].left, crops[0].top) == (0, 0)
    assert (crops[-1].right, crops[-1].bottom) == (canvas.right, canvas.bottom)
    covered = np.zeros((canvas.height, canvas.width), np.int8)
    for crop in crops:
        covered[crop.top : crop.bottom, crop.left : crop.right] += 1
    shared = np.zeros_like(covered)
    for band in parts.shared:
        shared[band.top : band.bottom, band.left : band.right] = 1
    assert covered.min() == 1, "a crop reaches every pixel"
    assert ((covered > 1) == (shared == 1)).all()
    seen = parts.image.within(canvas)
    assert sum(box.area for box in parts.padding) == canvas.area - seen.area
    assert sum(box.area for box in parts.cut_off) == parts.image.area - seen.area
    assert not (parts.padding and parts.cut_off)


@pytest.mark.parametrize("fit", ["pad", "fill"])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("tiling", [(1, 1), (1, 3), (3, 2), (4, 4)])
def test_padding_is_where_the_masks_of_molmo_say_that_no_image_is(
    tiling: tuple[int, int], height: int, width: int, fit: str
) -> None:
    rows, columns = tiling
    layout = VisionLayout(tiling, rows * columns, rows * columns + 1, 0, *GRID.canvas_size(*tiling), 0, 0, 0.0)
    parts = canvas_parts(height, width, layout, fit, MARGIN)
    # The masks are those of the image on its canvas, whatever its pixels, so a picture of one colour will do.
    image = Image.new("RGB", (width, height), "white")
    masks = preprocess(image, tiling, SpecialTokens(1, 2, 3, 4), fit=fit).image_masks[: len(parts.crops)]
    is_image = np.ones((parts.canvas.height, parts.canvas.width), np.float32)
    for box in parts.padding:
        is_image[box.top : box.bottom, box.left : box.right] = 0
    for crop, mask in zip(parts.crops, masks, strict=True):
        inside = is_image[crop.top : crop.bottom, crop.left : crop.right]
        patches = inside.reshape(PATCHES_PER_SIDE, PATCH, PATCHES_PER_SIDE, PATCH).mean((1, 3))
        assert np.allclose(patches.flatten(), mask.numpy(), atol=1e-6)


# -- what the models get ----------------------------------------------------------------------------------------------


def tower_images(name: str, image: Image.Image, setting: VisionSetting) -> np.ndarray:
    """What goes through the vision tower, 0 to 255: the crops, then the global view; (n, height, width, 3)."""
    vlm = tiny_model(name)
    vision = vlm.processor([image], "what?", setting).vision
    if name == "tiny-molmoe":
        side = PATCHES_PER_SIDE
        patches = vision["pixel_values"].reshape(-1, side, side, PATCH, PATCH, 3)
        pixels = patches.permute(0, 1, 3, 2, 4, 5).reshape(-1, CROP, CROP, 3).roll(-1, 0)
        mean, deviation = MEAN, STD
    else:
        pixels = vision["pixel_values"].reshape(-1, *vision["pixel_values"].shape[-3:]).permute(0, 2, 3, 1)
        mean = vlm.card.preprocessor.get("image_mean", (0.5, 0.5, 0.5))
        deviation = vlm.card.preprocessor.get("image_std", (0.5, 0.5, 0.5))
    return (pixels.float() * torch.tensor(deviation) + torch.tensor(mean)).numpy() * 255


@pytest.mark.parametrize("name", [name for name in TINY if "qwen" not in name])
@pytest.mark.parametrize(("height", "width"), [(120, 200), (300, 90), (10, 10)])
def test_the_crops_drawn_are_the_crops_that_the_model_gets(name: str, height: int, width: int) -> None:
    vlm, image = tiny_model(name), scene(height, width)
    for setting in [*settings_of(vlm), *options_of(vlm)]:
        made = panel_of(vlm.card, setting, height, width)
        drawn = [laid(image, made.parts, crop) for crop in made.parts.crops]
        drawn += [laid(image, made.view, made.view.canvas)] if made.view else []
        got = tower_images(name, image, setting)
        assert len(got) == len(drawn), setting
        for i, (ours, theirs) in enumerate(zip(drawn, got, strict=True)):
            # Filters differ; and in a squeezed view of 32 pixels the edge of the padding lies between two of them.
            bound = 4 if i < len(made.parts.crops) else 8
            assert np.abs(np.asarray(ours, np.float32) - theirs).mean() < bound, (setting, i)


# -- reading ----------------------------------------------------------------------------------------------------------


def damaged(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()[:-200]


def kinds() -> Iterator[tuple[str, Image.Image, dict[str, object]]]:
    clear = scene(30, 40).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "turned.png", scene(30, 40), {"exif": turned}
    yield "clear.png", clear, {}
    yield "palette.gif", scene(30, 40).quantize(16), {}
    yield "clear-palette.png", clear.quantize(16), {}
    yield "grey.png", scene(30, 40).convert("L"), {}
    yield "clear-grey.png", clear.convert("LA"), {}
    yield "cmyk.jpg", scene(30, 40).convert("CMYK"), {}
    yield "deep.png", Image.fromarray(np.arange(0, 65536, 50, dtype=np.uint16)[:1300].reshape(26, 50)), {}


@pytest.mark.parametrize(("name", "image", "options"), kinds(), ids=lambda value: value if type(value) is str else "")
def test_an_image_is_read_as_the_workers_read_it(
    name: str, image: Image.Image, options: dict[str, object], tmp_path: Path
) -> None:
    path = saved(image, tmp_path / name, **options)
    assert ImageChops.difference(read_picture(path), decode_rgb(path.read_bytes(), name)).getbbox() is None


def test_an_image_on_its_side_gets_the_tiling_of_the_upright_one(tmp_path: Path) -> None:
    upright = scene(400, 900)
    exif = Image.Exif()
    exif[0x0112] = 6
    on_its_side = saved(upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "a.png", exif=exif)
    read = read_picture(on_its_side)
    assert read.size == upright.size
    setting = VisionSetting("tier", "medium")
    rows, columns = panel(MOLMO, setting, read.height, read.width).layout.tiling
    assert (rows, columns) == panel(MOLMO, setting, 400, 900).layout.tiling
    assert columns > rows


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_panels_keep_their_order_and_are_as_large_as_the_page_allows(name: str) -> None:
    geometry = described(name).geometry
    for height, width in SIZES[::3]:
        levels = [level for level in geometry.levels() if level.knob in ("native", *geometry.axes[:2])]
        panels = [panel(name, level, height, width) for level in levels]
        scale, rows = arranged(panels)
        assert [panel for row in rows for panel in row] == panels
        alone, _ = arranged(panels[:1])
        assert scale > 0
        assert alone * panels[0].parts.canvas.height > 200 or alone * panels[0].parts.canvas.width > 200


def test_a_page_is_never_wider_than_promised() -> None:
    for height, width in SIZES:
        for name in ("molmoe-1b", "internvl3-1b"):
            tiers = [panel(name, VisionSetting("tier", tier), height, width) for tier in ("low", "medium", "high")]
            made = page(scene(height, width), name, "a" * 200, tiers)
            assert 900 < made.width <= PAGE_WIDTH


def test_a_page_says_what_explain_says() -> None:
    made = panel("molmoe-1b", VisionSetting("tier", "medium"), 480, 640)
    assert made.title == "tier=medium"
    assert [(number.label, number.value) for number in made.numbers] == [
        ("canvas", "560 x 784 px"),
        ("image", "5 % of it cut off"),
        ("aspect mismatch", "0.07"),
        ("tiling", "2 x 3 crops"),
        ("tower passes", "7 (6 crops + global)"),
        ("vision tokens", "1008 theoretical"),
        ("", "704 actual"),
        ("special tokens", "36"),
        ("prompt tokens", "740"),
    ]


@pytest.mark.parametrize(
    ("setting", "size", "fate"),
    [
        (VisionSetting("tier", "low"), (100, 100), "whole, nothing cut off"),
        (VisionSetting("tier", "low"), (100, 100 * 1000), "over 99 % of it cut off"),
        (VisionSetting("tier", "low", resize_to_fill=False), (1000, 1000), "whole, no padding"),
        (VisionSetting(), (100, 200), "whole, 50 % padding"),
        (VisionSetting("image_size", "336x336", resize_to_fill=False), (999, 1000), "whole, under 1 % padding"),
    ],
)
def test_what_becomes_of_the_image_in_words(setting: VisionSetting, size: tuple[int, int], fate: str) -> None:
    assert panel("molmoe-1b", setting, *size).numbers[1].value == fate


def test_stretching_is_named_by_the_side_that_grows() -> None:
    for size, fate in (((100, 100), "whole, in its own shape"), ((100, 200), "stretched, 2.00 x taller")):
        assert panel("internvl3-1b", VisionSetting("tiles", 1), *size).numbers[1].value == fate
    assert panel("internvl3-1b", VisionSetting("tiles", 1), 300, 100).numbers[1].value == "stretched, 3.00 x wider"


def test_little_is_drawn_of_an_image_that_reaches_far_over_its_canvas() -> None:
    parts = panel("molmoe-1b", VisionSetting("tier", "low"), 113, 100_000).parts
    shown = shown_box(parts)
    assert parts.image.width > 100_000
    assert shown.within(parts.canvas) == parts.canvas
    assert shown.width < 2 * parts.canvas.width
    assert laid(scene(4, 3000), parts, shown).size == (shown.width, shown.height)


def test_text_is_wrapped_and_shortened_to_its_room() -> None:
    text = "The image is resized onto a canvas of whole crops."
    lines = wrapped(text, 20, 150)
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert max(text_width(line, 20) for line in lines) <= 150
    assert text_width(shortened("name" * 50, 20, 150), 20) <= 150
    assert shortened("name", 20, 150) == "name"
    assert wrapped("", 20, 150) == []


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return saved(scene(120, 200), tmp_path / "image.png")


@pytest.mark.parametrize("name", TINY)
def test_the_command_draws_every_setting_of_every_tiny_model(name: str, image: Path, tmp_path: Path) -> None:
    axes = described(name).geometry.axes
    flags = {
        "image_size": ["--resize-to", "560x784" if name == MOLMO else "64x96"],
        "vision_tokens": ["--vision-tokens", "432"],
        "tier": ["--tier", "low"],
        "crops": ["--crops", "3"],
        "longest_edge": ["--longest-edge", "64"],
        "tiles": ["--tiles", "2"],
    }
    options = described(name).geometry.options
    for arguments in [[], *(flags[axis] for axis in axes), *([["--letterbox"]] if options else [])]:
        out = tmp_path / "out.png"
        assert main([str(image), "--model", name, *arguments, "--out", str(out)]) == 0
        with Image.open(out) as made:
            assert made.format == "PNG"
            assert 900 < made.width <= PAGE_WIDTH
            assert 500 < made.height < 2500
        out.unlink()


def test_crops_that_are_nothing_but_padding_are_drawn(tmp_path: Path) -> None:
    thin = saved(scene(200, 10), tmp_path / "thin.png")
    out = tmp_path / "out.png"
    arguments = ["--model", "tiny-internvl", "--resize-to", "96x96", "--letterbox", "--out", str(out)]
    assert main([str(thin), *arguments]) == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "titles"),
    [
        (["--compare"], ["tier=low", "tier=medium", "tier=high"]),
        (["--compare", "--tier", "low"], ["tier=low", "tier=medium", "tier=high"]),
        (["--compare", "--crops", "5"], [f"crops={n}" for n in (1, 2, 4, 5, 6, 9, 12)]),
        (["--compare", "--crops", "4", "--letterbox"], [f"crops={n}" for n in (1, 2, 4, 6, 9, 12)]),
        (
            ["--compare", "--resize-to", "336x784"],
            [f"image_size={n}" for n in ("336x336", "560x336", "336x784", "560x560", "560x784", "784x784", "784x1008")],
        ),
        (["--tier", "low"], ["tier=low"]),
        ([], ["native"]),
    ],
)
def test_compared_is_what_there_is_on_the_axis(
    arguments: list[str], titles: list[str], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Panel] = []

    def remember(picture: Image.Image, model: str, name: str, panels: list[Panel]) -> Image.Image:
        drawn.extend(panels)
        return picture

    monkeypatch.setattr(preview, "page", remember)
    assert main([str(image), "--model", "molmoe-1b", *arguments, "--out", str(tmp_path / "out.png")]) == 0
    assert [panel.title for panel in drawn] == titles
    assert {panel.options for panel in drawn} == {"resize_to_fill=false" if "--letterbox" in arguments else ""}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command ends."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("knobs.preview: ").rstrip()


def test_what_cannot_be_read_ends_with_one_line(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(damaged(Image.effect_noise((64, 64), 50)))
    saved(Image.new("F", (4, 4)), tmp_path / "float.tiff")
    saved(Image.new("I", (4, 4), -5), tmp_path / "wide.tiff")

    def message(name: str) -> str:
        return refused(capsys, name, "--model", MOLMO)

    assert message("absent.png") == "there is no image absent.png"
    assert message(".") == "there is no image ."
    assert message("a" * 300) == f"there is no image {'a' * 300}"
    assert message("text.png") == "text.png is not an image that Pillow can read"
    assert message("half.png").startswith("half.png cannot be read as an image (")
    assert message("float.tiff").startswith("float.tiff is a floating-point image")
    assert message("wide.tiff").startswith("wide.tiff is 32-bit greyscale")
    monkeypatch.setattr(preview, "MAX_PIXELS", 1000)
    assert message("image.png") == "image.png is too large (120x200, limit 1000 pixels)"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert message("image.png") == "image.png is too large (limit 1000 pixels)"
    assert not (tmp_path / "preview.png").exists()


def test_a_place_that_cannot_be_written_is_refused(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = image.read_bytes()
    (tmp_path / "folder.png").mkdir()

    def message(out: Path) -> str:
        return refused(capsys, image, "--model", MOLMO, "--out", out).replace(str(tmp_path), "HERE")

    assert message(tmp_path / "a.jpg") == "--out HERE/a.jpg: the picture is a PNG, so its name must end in .png"
    assert message(tmp_path / "b" / "a.png") == "--out HERE/b/a.png: there is no folder HERE/b"
    assert message(tmp_path / "folder.png") == "--out HERE/folder.png is a folder"
    assert message(image) == "--out HERE/image.png is the image itself; name another file"
    assert message(tmp_path / f"{'a' * 300}.png").endswith(".png: cannot be written (File name too long)")
    assert image.read_bytes() == before


def test_what_a_model_cannot_do_is_said(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown model 'molmo'" in refused(capsys, image, "--model", "molmo")
    assert "crops must be 1 to 64" in refused(capsys, image, "--model", "molmoe-1b", "--crops", 65)
    assert "this family has no vision knob tiles" in refused(capsys, image, "--model", "molmoe-1b", "--tiles", 2)
    smol = ("--model", "tiny-smolvlm", "--compare")
    assert "this family has no force_full_tokens" in refused(capsys, image, *smol, "--force-full-tokens")
    assert "crops must be" in refused(capsys, image, *smol, "--crops", 100)
    qwen = refused(capsys, image, "--model", "tiny-qwen3-vl-moe", "--compare")
    assert qwen == "--compare: tiny-qwen3-vl-moe has no tier to compare"


def test_a_family_without_a_closed_form_says_so(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from knobs.vision import NativeGeometry

    class Unknown:
        name = "some-vlm"
        geometry: VisionGeometry = NativeGeometry()

    monkeypatch.setattr(preview, "described", lambda name: Unknown())
    assert refused(capsys, image, "--model", "some-vlm") == (
        "some-vlm: its family has no closed form; its own image processor decides"
    )


def test_a_folder_that_does_not_say_how_it_cuts(
    image: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described("tiny-smolvlm").config))
    for flags in ([], ["--tier", "low"], ["--compare"]):
        assert refused(capsys, image, "--model", tmp_path, *flags) == (
            f"{tmp_path}: the folder has no preprocessor_config.json, so nothing is known of how it cuts images; "
            "copy it from the base model"
        )


def test_a_reader_that_leaves_is_no_mistake(image: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "knobs.preview", str(image), "--model", "tiny-smolvlm"]
    command += ["--out", str(tmp_path / "out.png")]
    ran = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ran.stdout is not None
    assert ran.stderr is not None
    ran.stdout.close()
    assert ran.stderr.read() == ""
    ran.stderr.close()
    assert ran.wait() == 141
    assert (tmp_path / "out.png").is_file()


def test_a_preview_needs_no_torch(image: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from knobs.preview import main; code = main(sys.argv[1:]);"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules)); sys.exit(code)"
    )
    arguments = [str(image), "--model", "molmoe-1b", "--out", str(tmp_path / "out.png")]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "set()"


def test_the_picture_in_the_documentation_is_what_its_command_draws(tmp_path: Path) -> None:
    shown = REPOSITORY / "docs" / "images" / "preview-tiers.png"
    source = REPOSITORY / "sweeps" / "demo" / "images" / "scene_05.jpg"
    assert main([str(source), "--model", "molmoe-1b", "--compare", "--out", str(tmp_path / "now.png")]) == 0
    with Image.open(shown) as then, Image.open(tmp_path / "now.png") as now:
        assert then.size == now.size
        difference = ImageStat.Stat(ImageChops.difference(then.convert("RGB"), now.convert("RGB")))
    # Another release of Pillow may round a pixel elsewhere.
    assert max(difference.mean) < 1
    assert shown.stat().st_size < 300_000

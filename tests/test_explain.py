"""What `python -m knobs.explain` prints: the corrected tables of the notes, folders of images, mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from knobs.explain import main
from knobs.vision import VisionSetting
from workers.models import REGISTERED, describe

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def explain(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_corrected_table_of_smolvlm2(explain: Any) -> None:
    lines = objects(explain("--model", "smolvlm2-2.2b", "--image-size", "384x384", "--text-tokens", "5", "--json"))
    table = {line["setting"]: line for line in lines}
    found = [table[f"longest_edge={edge}"] for edge in (384, 512, 768, 1024, 1536)]
    assert [line["tower_passes"] for line in found] == [1, 5, 5, 10, 17]
    assert [line["actual_vision_tokens"] for line in found] == [81, 405, 405, 810, 1377]
    assert [line["theoretical_vision_tokens"] for line in found] == [81, 405, 405, 810, 1377]
    assert [line["prompt_tokens"] for line in found] == [89, 423, 423, 839, 1421]


@pytest.mark.parametrize(
    ("model", "size", "edge", "expected"),
    [
        ("smolvlm2-2.2b", "480x640", 768, (5, 405, 423)),
        ("smolvlm2-2.2b", "480x640", 1024, (10, 810, 839)),
        ("smolvlm2-2.2b", "480x640", 1536, (13, 1053, 1088)),
        ("smolvlm2-2.2b", "480x640", 2048, (31, 2511, 2584)),
        ("smolvlm2-2.2b", "1080x1920", 1024, (7, 567, 589)),
        ("smolvlm2-2.2b", "200x1000", 2048, (13, 1053, 1087)),
        ("smolvlm2-256m", "480x640", 2048, (13, 832, 867)),
        ("smolvlm2-256m", "1080x1920", 1536, (7, 448, 470)),
        ("smolvlm2-256m", "384x384", 2048, (17, 1088, 1132)),
    ],
)
def test_published_counts_of_other_shapes(
    explain: Any, model: str, size: str, edge: int, expected: tuple[int, int, int]
) -> None:
    flags = ("--model", model, "--image-size", size, "--longest-edge", str(edge), "--text-tokens", "5", "--json")
    (line,) = objects(explain(*flags))
    assert (line["tower_passes"], line["actual_vision_tokens"], line["prompt_tokens"]) == expected


@pytest.mark.parametrize(
    ("size", "tiling", "mismatch"),
    [("480x640", [2, 3], 0.07), ("640x480", [3, 2], 0.03), ("512x512", [2, 2], 0.0)],
)
def test_the_three_tier_examples(explain: Any, size: str, tiling: list[int], mismatch: float) -> None:
    (line,) = objects(explain("--model", "molmoe-1b", "--image-size", size, "--tier", "medium", "--json"))
    assert line["tiling"] == tiling
    assert line["num_crops"] == tiling[0] * tiling[1]
    assert round(line["aspect_mismatch"], 2) == mismatch


@pytest.mark.parametrize(
    ("canvas", "tiling", "theoretical", "actual"),
    [
        ("560x336", [2, 1], 432, 384),
        ("560x560", [2, 2], 720, 544),
        ("560x784", [2, 3], 1008, 704),
        ("784x784", [3, 3], 1440, 928),
    ],
)
def test_the_reference_sizes(explain: Any, canvas: str, tiling: list[int], theoretical: int, actual: int) -> None:
    flags = ("--model", "molmoe-1b", "--image-size", "333x777", "--resize-to", canvas, "--json")
    (line,) = objects(explain(*flags))
    assert (line["tiling"], line["target_resolution"]) == (tiling, canvas)
    assert (line["theoretical_vision_tokens"], line["actual_vision_tokens"]) == (theoretical, actual)
    (full,) = objects(explain(*flags, "--force-full-tokens"))
    assert full["actual_vision_tokens"] == full["theoretical_vision_tokens"] == theoretical


def test_internvl_has_256_tokens_per_tile_and_a_thumbnail(explain: Any) -> None:
    for tiles, passes in [(1, 1), (2, 3), (6, 7), (12, 13)]:
        flags = ("--model", "internvl3-1b", "--image-size", "480x640", "--json")
        (line,) = objects(explain(*flags, "--tiles", str(tiles)))
        assert (line["num_crops"], line["tower_passes"], line["actual_vision_tokens"]) == (tiles, passes, 256 * passes)
        assert line["special_tokens"] == 2
        (same,) = objects(explain(*flags, "--crops", str(tiles)))
        assert {**same, "setting": ""} == {**line, "setting": ""}


def test_one_setting_in_words(explain: Any) -> None:
    shown = explain("--model", "molmoe-1b", "--image-size", "480x640", "--tier", "medium", "--text-tokens", "9")
    assert shown.splitlines() == [
        "molmoe-1b: an image of 480x640 pixels (height x width) under tier=medium",
        "  tiling            2x3 (rows x columns)",
        "  canvas            560x784, covered by the image, the overhang cut off",
        "  crops             6, and a global view: 7 passes through the vision tower",
        "  vision tokens     1008 leave the tower (theoretical)",
        "                    704 stand in the prompt (actual), for 304 are shared by neighbouring crops",
        "  special tokens    36 mark the image and its parts",
        "  prompt            740 tokens for the image, 749 with 9 of text",
        "  aspect mismatch   0.07 (width/height, 0 is undistorted)",
    ]


def test_the_log_distance_mirrors(explain: Any) -> None:
    flags = ("--model", "molmoe-1b", "--tier", "low", "--aspect-distance", "log", "--json")
    ((wide,), (tall,)) = (objects(explain(*flags, "--image-size", size)) for size in ("480x640", "640x480"))
    assert wide["tiling"] == tall["tiling"][::-1]


@pytest.mark.parametrize("model", sorted(REGISTERED))
def test_every_registered_model_has_a_table_that_says_each_setting_once(explain: Any, model: str) -> None:
    overview = explain("--model", model).splitlines()
    table = explain("--model", model, "--image-size", "480x640").splitlines()
    lines = objects(explain("--model", model, "--image-size", "480x640", "--json"))
    settings = [line["setting"] for line in lines]
    assert len(settings) == len(set(settings)) == len(overview) - 2 == len(table) - 3
    assert settings[0] == "native"
    for line, row in zip(lines, table[3:], strict=True):
        numbers = row.removeprefix(line["setting"]).split()
        assert numbers[:4] == [
            "x".join(map(str, line["tiling"])),
            str(line["tower_passes"]),
            str(line["theoretical_vision_tokens"]),
            str(line["actual_vision_tokens"]),
        ]
    for axis in {setting.split("=")[0] for setting in settings} - {"native"}:
        assert sum(setting.startswith(f"{axis}=") for setting in settings) >= 3


def test_a_folder_of_images_is_read_by_its_headers(explain: Any, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "wide.png")
    Image.new("L", (480, 640)).save(tmp_path / "more" / "tall.jpg")
    turned = Image.new("RGB", (640, 480))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("not an image")
    flags = ("--model", "molmoe-1b", "--images", str(tmp_path), "--tier", "medium")
    (line,) = objects(explain(*flags, "--json"))
    assert (line["num_images"], line["num_crops_distribution"]) == (3, {"6": 3})
    # 36 for 2 x 3 crops, 44 for 3 x 2, of which there are two: the turned one is upright.
    assert line["special_tokens_mean"] == pytest.approx((36 + 2 * 44) / 3)
    assert line["aspect_mismatch_mean"] == pytest.approx((0.0652 + 2 * 0.0303) / 3, abs=1e-3)
    # Nine tenths of the way from the second of three to the last.
    assert line["aspect_mismatch_p95"] == pytest.approx(0.0303 + 0.9 * (0.0652 - 0.0303), abs=1e-3)
    shown = explain(*flags).splitlines()
    assert shown[0] == f"molmoe-1b: means over 3 images in {tmp_path}, 1 other files left out"
    assert shown[2].split()[:3] == ["tier=medium", "6.0", "7.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "molmo-1b"], "unknown model 'molmo-1b', did you mean molmoe-1b? (registered: "),
        (
            ["--model", "molmoe-1b", "--longest-edge", "384"],
            "longest_edge=384: this family has no vision knob longest_edge (vision knobs of this family: image_size, ",
        ),
        (
            ["--model", "smolvlm2-2.2b", "--crops", "11"],
            "crops=11: no grid of 11 crops has at most 10 rows and columns",
        ),
        (["--model", "smolvlm2-2.2b", "--force-full-tokens"], "this family has no force_full_tokens"),
        (["--model", "molmoe-1b", "--tier", "huge"], "tier=huge: tier must be one of low, medium, high"),
        (["--model", "molmoe-1b", "--resize-to", "560"], "image_size=560: image_size must be HEIGHTxWIDTH in pixels"),
        (
            ["--model", "molmoe-1b", "--resize-to", "²x336"],
            "image_size=²x336: image_size must be HEIGHTxWIDTH in pixels",
        ),
        (
            ["--model", "molmoe-1b", "--resize-to", f"{'9' * 400}x336"],
            "image_size must be HEIGHTxWIDTH in pixels",
        ),
        (["--model", "molmoe-1b", "--images", "/no/such/folder"], "--images: there is no folder /no/such/folder"),
        (["--model", "molmoe-1b", "--images", str(REPOSITORY / "knobs")], "--images: no file in "),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.startswith("knobs.explain: ")
    assert shown.err.count("\n") == 1


def test_at_most_one_setting_and_a_size_that_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--tier", "low", "--crops", "2"], ["--image-size", "480"], ["--image-size", "0x10"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", "molmoe-1b", *wrong])
        assert stopped.value.code == 2
    assert "must be HEIGHTxWIDTH in pixels such as 480x640, got '480'" in capsys.readouterr().err


def test_the_text_has_no_fewer_than_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("-4", "²", "1.5"):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", "molmoe-1b", "--text-tokens", wrong])
        assert stopped.value.code == 2
        assert f"must be a whole number from 0 on, got '{wrong}'" in capsys.readouterr().err


def test_the_distance_is_named_where_it_decides(explain: Any) -> None:
    flags = ("--model", "smolvlm2-2.2b", "--image-size", "480x640", "--aspect-distance", "log", "--json")
    for line in objects(explain(*flags)):
        by_aspect = line["setting"].split("=")[0] in ("vision_tokens", "crops", "tier")
        assert ("aspect_distance=log" in line["setting"]) == by_aspect


def test_the_percentile_is_that_of_the_validation(explain: Any, tmp_path: Path) -> None:
    for width in range(100, 800, 70):
        Image.new("L", (width, 300)).save(tmp_path / f"{width}.png")
    for tier in ("low", "high"):
        flags = ("--model", "molmoe-1b", "--tier", tier, "--json")
        (line,) = objects(explain(*flags, "--images", str(tmp_path)))
        each = [objects(explain(*flags, "--image-size", f"300x{width}"))[0] for width in range(100, 800, 70)]
        expected = pd.Series([one["aspect_mismatch"] for one in each]).quantile(0.95)
        assert line["aspect_mismatch_p95"] == pytest.approx(expected)


def test_a_reader_that_leaves_is_no_mistake() -> None:
    command = [sys.executable, "-m", "knobs.explain", "--model", "molmoe-1b"]
    ran = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ran.stdout is not None
    assert ran.stderr is not None
    ran.stdout.close()
    assert ran.stderr.read() == ""
    ran.stderr.close()
    assert ran.wait() == 141


def small_folder(folder: Path, **changes: dict[str, Any]) -> Path:
    """A checkpoint of tiny-smolvlm without its weights; a file named in `changes` gets these entries."""
    model = describe("tiny-smolvlm", random_weights=True)
    for file, content in (("config", model.config), ("preprocessor_config", model.preprocessor)):
        (folder / f"{file}.json").write_text(json.dumps({**content, **changes.get(file, {})}))
    return folder


@pytest.mark.parametrize("flags", [[], ["--tier", "low"], ["--image-size", "480x640"], ["--json"]])
def test_a_folder_that_does_not_say_how_it_cuts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str]
) -> None:
    folder = small_folder(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert main(["--model", str(folder), *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"knobs.explain: {folder}: the folder has no preprocessor_config.json, so nothing is known of how it cuts "
        "images; copy it from the base model\n"
    )
    assert main(["--model", str(folder), "--card"]) == 0


def test_native_alone_is_left_where_nothing_is_known(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    geometry = describe(str(folder), random_weights=True).geometry
    assert geometry.refuse(VisionSetting()) is None
    assert geometry.layout(480, 640, VisionSetting()) is None
    for wrong in (VisionSetting("tier", "low"), VisionSetting(resize_to_fill=True)):
        assert str(geometry.refuse(wrong)).startswith("the folder has no preprocessor_config.json, so nothing is known")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preprocessor_config": {"max_image_size": 7}},
            "in its configuration max_image_size is 7, not an object with longest_edge; smolvlm needs it for images",
        ),
        (
            {"preprocessor_config": {"size": {"longest_edge": "x"}}},
            "in its configuration size.longest_edge is 'x', not a whole number; smolvlm needs it for images",
        ),
        (
            {"config": {"vision_config": {"patch_size": 4, "image_size": "x"}}},
            "in its configuration vision_config.image_size is 'x', which is not of the kind of 224",
        ),
        (
            {"config": {"text_config": {"num_hidden_layers": 6, "hidden_size": {}}}},
            "in its configuration text_config.hidden_size is {}, which is not of the kind of 4096",
        ),
        (
            {"config": {"text_config": {"num_hidden_layers": 6, "head_dim": "x"}}},
            "its configuration cannot be described (TypeError: ",
        ),
    ],
)
def test_the_entry_that_is_wrong_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    folder = small_folder(tmp_path, **changes)
    assert main(["--model", str(folder), "--card"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"knobs.explain: {folder}: {message}")
    assert shown.err.count("\n") == 1


def test_it_loads_no_torch() -> None:
    code = (
        "import sys; from knobs.explain import main; main(['--model', 'molmoe-1b']); "
        "main(['--model', 'smolvlm2-2.2b', '--card']); "
        "print('loaded', *sorted({'torch', 'transformers', 'ray', 'pandas'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "loaded"

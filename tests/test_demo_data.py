"""The demo data set is what its script draws, covers what a sweep varies, and opens quickly."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from workers.datasets import Dataset, resolve_source

DEMO = Path(__file__).resolve().parents[1] / "sweeps" / "demo"

Row = dict[str, Any]


@pytest.fixture(scope="module")
def demo_rows() -> list[Row]:
    return [json.loads(line) for line in (DEMO / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_demo_is_reproduced_by_its_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DEMO / "make_demo.py"), "--out", str(tmp_path)], check=True, cwd=tmp_path)
    assert (tmp_path / "metadata.jsonl").read_bytes() == (DEMO / "metadata.jsonl").read_bytes()
    names = sorted(os.listdir(DEMO / "images"))
    assert sorted(os.listdir(tmp_path / "images")) == names
    for name in names:
        with Image.open(DEMO / "images" / name) as stored, Image.open(tmp_path / "images" / name) as drawn:
            assert (stored.mode, stored.size) == (drawn.mode, drawn.size), name
            pixels = [np.asarray(image.convert("RGBA"), dtype=np.int16) for image in (stored, drawn)]
        # Other versions of the encoders and of the font renderer differ by a shade at edges.
        assert np.abs(pixels[0] - pixels[1]).mean() < 0.5, name


def test_demo_covers_what_a_sweep_varies(demo_rows: list[Row]) -> None:
    files = sorted((DEMO / "images").iterdir())
    assert len(files) >= 48
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert {row["file_name"] for row in demo_rows} == {f"images/{file.name}" for file in files}
    kinds, sizes, rotated = set(), set(), 0
    for file in files:
        with Image.open(file) as image:
            kinds.add((file.suffix, image.mode))
            sizes.add(image.size)
            rotated += image.getexif().get(0x0112, 1) != 1
    aspects = [width / height for width, height in sizes]
    assert len(sizes) >= 10
    assert min(aspects) <= 0.4
    assert max(aspects) >= 2.5
    assert rotated == 1
    assert {(".jpg", "RGB"), (".png", "RGB"), (".png", "P"), (".png", "L"), (".png", "RGBA")} <= kinds


def test_demo_questions(demo_rows: list[Row]) -> None:
    assert {row["question_type"] for row in demo_rows} == {"colour", "count", "yes/no", "text", "number", "chart"}
    for row in demo_rows:
        assert len(row["answers"]) == 10
        assert row["answers"].count(max(set(row["answers"]), key=row["answers"].count)) >= 6


def test_demo_preset_opens_quickly_and_every_sample_decodes(demo_rows: list[Row], tmp_path: Path) -> None:
    started = time.perf_counter()
    dataset = Dataset.open(resolve_source(name="demo", base_folder=tmp_path))
    assert time.perf_counter() - started < 10  # seconds; well under one where nothing else runs
    refs = dataset.select(None, 0)
    assert len(refs) == len(demo_rows)
    assert all(dataset.sample(ref.uid).images()[0].mode == "RGB" for ref in refs)
    upright = dataset.sample("demo:test:scene_08_q1").images()[0]
    assert upright.height > upright.width

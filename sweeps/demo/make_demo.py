"""Draw the demo data set: pictures of many sizes and shapes with questions whose answers are known.

    python sweeps/demo/make_demo.py [--out FOLDER]

The result is an image folder as Hugging Face `datasets` reads it and needs no network. It is the same on every run.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import charts
import scenes
import texts
from drawing import Question
from PIL import Image

EXIF_ORIENTATION_TAG = 0x0112
ROTATE_90_CLOCKWISE_TO_SHOW = 6

PAINTERS: dict[str, tuple[int, Callable[[int], tuple[Image.Image, list[Question]]]]] = {
    "scene": (len(scenes.SIZES), scenes.scene),
    "text": (texts.COUNT, texts.text),
    "chart": (len(charts.CHARTS), charts.chart),
}

# Image files come in more kinds than RGB; each of these is one that a reader has got wrong somewhere.
SIDEWAYS = "scene_08"  # a JPEG stored rotated, with an EXIF tag that says so
PALETTE = "chart_03"
GREYSCALE = "text_12"


def make(folder: Path) -> int:
    """Write pictures and metadata.jsonl into `folder`; returns the number of questions."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = list(_rows(folder))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(rows)


def _rows(folder: Path) -> Iterator[dict[str, object]]:
    for kind, (count, paint) in PAINTERS.items():
        for index in range(count):
            image_id = f"{kind}_{index:02d}"
            picture, questions = paint(index)
            file_name = _save(folder, image_id, kind, picture)
            for number, question in enumerate(questions, 1):
                yield {
                    "file_name": file_name,
                    "question_id": f"{image_id}_q{number}",
                    "image_id": image_id,
                    "question": question.text,
                    "answers": question.answers,
                    "question_type": question.type,
                }


def _save(folder: Path, image_id: str, kind: str, picture: Image.Image) -> str:
    photograph_like = kind == "scene" and picture.width * picture.height > 60_000
    file_name = f"images/{image_id}.{'jpg' if photograph_like else 'png'}"
    path = folder / file_name
    if image_id == SIDEWAYS:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION_TAG] = ROTATE_90_CLOCKWISE_TO_SHOW
        picture.transpose(Image.Transpose.ROTATE_90).save(path, quality=88, exif=exif)
    elif photograph_like:
        picture.save(path, quality=88)
    elif image_id == PALETTE:
        picture.quantize(64).save(path, optimize=True)
    elif image_id == GREYSCALE:
        picture.convert("L").save(path, optimize=True)
    else:
        picture.save(path, optimize=True)
    return file_name


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo data set.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write into")
    folder: Path = parser.parse_args().out
    print(f"{make(folder)} questions in {folder / 'metadata.jsonl'}")


if __name__ == "__main__":
    main()

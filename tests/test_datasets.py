"""Data sets of every kind are read alike, sampled reproducibly, identified by content, and fail in one clear line."""

import io
import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers.datasets import (
    Columns,
    Dataset,
    DatasetSource,
    ImageTable,
    SampleRef,
    fingerprint,
    resolve_source,
    sample_order,
)
from workers.errors import DatasetError, SampleError

PROJECT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(colour: str, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int = 3) -> list[Row]:
    colours = ["red", "green", "blue", "white"]
    return [
        {
            "id": f"q{i}",
            "image": picture(colours[i % 4]),
            "question": f"Which colour {i}?",
            "answers": [colours[i % 4], "x"],
        }
        for i in range(count)
    ]


def source(path: Path | None, **changes: Any) -> DatasetSource:
    settings: dict[str, Any] = {
        "name": "set",
        "split": "test",
        "path": None if path is None else str(path),
        "hub_id": None,
        "config": None,
        "revision": None,
        "columns": Columns(id="id"),
        "metric": "exact_match",
        "prompt": "{question}",
    }
    return DatasetSource(**settings | changes)


def write_parquet(file: Path, content: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row | {"image": {"bytes": row["image"], "path": None}} for row in content])
    pq.write_table(table, file)
    return file


def write_with_files(folder: Path, content: list[Row], metadata: str, image_key: str) -> Path:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in content:
        name = f"pictures/{row['id']}.png"
        (folder / name).write_bytes(row["image"])
        lines.append(json.dumps({image_key: name} | {key: row[key] for key in row if key != "image"}))
    (folder / metadata).write_text("\n".join(lines) + "\n")
    return folder / metadata


def write(kind: str, folder: Path, content: list[Row]) -> Path:
    if kind == "parquet":
        return write_parquet(folder / "rows.parquet", content)
    if kind == "jsonl":
        return write_with_files(folder, content, "rows.jsonl", "image")
    return write_with_files(folder, content, "metadata.jsonl", "file_name").parent


each_kind = pytest.mark.parametrize("kind", ["parquet", "jsonl", "imagefolder"])


# --- Reading ---


@each_kind
def test_every_kind_gives_the_same_samples(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(source(write(kind, tmp_path / "data [1]", rows())))
    monkeypatch.chdir("/")  # relative image paths belong to the file, not to the current folder
    assert len(dataset) == 3
    sample = dataset.sample("set:test:q1")
    assert (sample.question, sample.answers) == ("Which colour 1?", ("green", "x"))
    assert sample.image_bytes == picture("green")
    assert sample.images()[0].getpixel((0, 0)) == (0, 128, 0)
    expected = Dataset.open(source(write_parquet(tmp_path / "other.parquet", rows())))
    assert dataset.select(None, 0) == expected.select(None, 0)


def test_reading_local_files_does_not_touch_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def getaddrinfo(*address: object, **_: object) -> list[object]:
        asked.append(address)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    Dataset.open(source(write("parquet", tmp_path, rows()))).select(None, 0)
    assert asked == []


def test_several_questions_about_one_image_share_its_id(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    lines = [{"file_name": "a.png", "id": i, "question": f"{i}?", "answers": "red"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = Dataset.open(source(tmp_path))
    samples = [dataset.sample(f"set:test:{i}") for i in range(3)]
    assert len({sample.image_id for sample in samples}) == 1
    assert len({sample.ref.digest for sample in samples}) == 3


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (["a", "b"], ("a", "b")),
        ("a", ("a",)),
        (7, ("7",)),
        ([1, 2], ("1", "2")),
        ([{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}], ("a", "b")),
        (["a", None], ("a",)),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_answers_in_the_usual_forms(kind: str, stored: object, expected: tuple[str, ...], tmp_path: Path) -> None:
    dataset = Dataset.open(source(write(kind, tmp_path, [row | {"answers": stored} for row in rows(1)])))
    assert dataset.sample("set:test:q0").answers == expected


def test_answers_of_mixed_types_in_one_json_file(tmp_path: Path) -> None:
    stored = [["two", "2"], "two", 2]
    content = [row | {"answers": answers} for row, answers in zip(rows(), stored, strict=True)]
    dataset = Dataset.open(source(write("jsonl", tmp_path, content)))
    assert [dataset.sample(f"set:test:q{i}").answers for i in range(3)] == [("two", "2"), ("two",), ("2",)]


def test_row_index_without_an_id_column(tmp_path: Path) -> None:
    dataset = Dataset.open(source(write("parquet", tmp_path, rows()), columns=Columns()))
    assert dataset.sample("set:test:2").question == "Which colour 2?"


def test_a_folder_of_splits_reads_only_the_one_asked_for(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "validation-00000-of-00002.parquet", rows(4)[:2])
    write_parquet(tmp_path / "data" / "validation-00001-of-00002.parquet", rows(4)[2:])
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows(1))
    assert len(Dataset.open(source(tmp_path, split="validation"))) == 4
    assert len(Dataset.open(source(tmp_path / "data" / "validation-*", split="validation"))) == 4
    with pytest.raises(DatasetError, match=r"no split 'validaton', did you mean validation\? \(there is: train, val"):
        Dataset.open(source(tmp_path, split="validaton"))
    (tmp_path / "data" / "validation-00001-of-00002.parquet").unlink()
    with pytest.raises(DatasetError, match=r"only 1 of 2 files .*validation-\* are there; download the rest"):
        Dataset.open(source(tmp_path, split="validation"))


def test_image_folders_by_split(tmp_path: Path) -> None:
    write("imagefolder", tmp_path / "train", rows(2))
    write("imagefolder", tmp_path / "test", rows(3))
    assert len(Dataset.open(source(tmp_path))) == 3
    with pytest.raises(DatasetError, match=r"no split 'val' \(there is: test, train\)"):
        Dataset.open(source(tmp_path, split="val"))


# --- Options, several images, several questions in a row, images elsewhere ---


def choices(content: list[Row], **columns: Any) -> list[Row]:
    return [row | {"answers": "1", "options": ["red", "green"]} | columns for row in content]


def choosing(place: Path, metric: str = "multiple_choice", **columns: Any) -> Dataset:
    chosen = Columns(id="id", options="options")
    return Dataset.open(
        source(place, columns=replace(chosen, **columns), metric=metric, prompt="{question}\n{options}")
    )


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("answer", ["1", 1, "B", "b", ["B"], 1.0])
@pytest.mark.parametrize("stored", [["red", "green"], "['red', 'green']"])
def test_answers_of_options_become_letters(kind: str, answer: object, stored: object, tmp_path: Path) -> None:
    content = choices(rows(1), answers=answer, options=stored)
    sample = choosing(write(kind, tmp_path, content)).sample("set:test:q0")
    assert (sample.answers, sample.options) == (("B",), ("red", "green"))
    assert sample.prompt == "Which colour 0?\nA. red\nB. green"


def test_other_metrics_leave_answers_as_they_are(tmp_path: Path) -> None:
    sample = choosing(write("parquet", tmp_path, choices(rows(1))), metric="exact_match").sample("set:test:q0")
    assert (sample.answers, sample.options) == (("1",), ("red", "green"))


def test_letters_without_a_column_of_options(tmp_path: Path) -> None:
    place = write("parquet", tmp_path, [row | {"answers": "c"} for row in rows(1)])
    sample = Dataset.open(source(place, metric="multiple_choice")).sample("set:test:q0")
    assert (sample.answers, sample.options, sample.prompt) == (("C",), (), "Which colour 0?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": None}, r"no options \(column 'options'\)"),
        ({"options": []}, r"no options \(column 'options'\)"),
        ({"options": ["red", ""]}, r"option B is missing \(column 'options'\)"),
        ({"options": [str(i) for i in range(27)]}, r"27 options, more than there are letters"),
        ({"answers": "2"}, r"the answer '2' is neither a letter nor an index from 0 of 2 options \(column 'answers'\)"),
        ({"answers": "C"}, r"the answer 'C' is neither"),
        ({"answers": "-1"}, r"the answer '-1' is neither"),
        ({"answers": "green"}, r"the answer 'green' is neither"),
        ({"answers": None}, r"0 answers in column 'answers', but multiple_choice needs at least 1"),
    ],
)
def test_a_choice_that_cannot_be_read_fails_alone(changes: Row, message: str, tmp_path: Path) -> None:
    content = choices(rows(2))
    content[1] |= changes
    dataset = choosing(write("parquet", tmp_path, content))
    assert len(dataset.select(None, 0)) == 2
    assert dataset.sample("set:test:q0").answers == ("B",)
    with pytest.raises(SampleError, match=rf"set:test:q1: {message}"):
        dataset.sample("set:test:q1")


@pytest.mark.parametrize("stored", ["['red'", "[red, green]", "red", "['a'] * 9", "{'a': 1}"])
def test_text_that_is_no_list_of_options(stored: str, tmp_path: Path) -> None:
    dataset = choosing(write("parquet", tmp_path, choices(rows(1), options=stored)))
    with pytest.raises(SampleError, match=r"q0: the options are no list: .* \(column 'options'\)"):
        dataset.sample("set:test:q0")


@pytest.mark.parametrize("typed", [False, True])
def test_a_list_of_images(typed: bool, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pictures = [[picture("red"), picture("blue")], [picture("red")], [], None]
    if typed:
        feature = datasets.Features(
            {
                "id": datasets.Value("string"),
                "image": datasets.List(datasets.Image()),
                "question": datasets.Value("string"),
            }
            | {"answers": datasets.List(datasets.Value("string"))}
        )
        content = [
            row | {"image": images and [{"bytes": image, "path": None} for image in images]}
            for row, images in zip(rows(4), pictures, strict=True)
        ]
        datasets.Dataset.from_list(content, features=feature).to_parquet(file)
    else:
        content = [row | {"image": images} for row, images in zip(rows(4), pictures, strict=True)]
        pq.write_table(pa.Table.from_pylist(content), file)
    dataset = Dataset.open(source(file))
    two, one = dataset.sample("set:test:q0"), dataset.sample("set:test:q1")
    assert [image.getpixel((0, 0)) for image in two.images()] == [(255, 0, 0), (0, 0, 255)]
    assert one.images()[0].getpixel((0, 0)) == (255, 0, 0)
    assert one.image_id != two.image_id
    for uid in ("set:test:q2", "set:test:q3"):
        with pytest.raises(SampleError, match=r"no image \(column 'image'\)"):
            dataset.sample(uid)


def in_records(count: int = 2, **changes: Any) -> list[Row]:
    """Rows of an image and two questions each."""
    of_image = [{"q": "How many?", "a": 2, "key": "x"}, {"q": "Which colour?", "a": "red", "key": "y"}]
    return [{"id": f"r{i}", "image": picture("red"), "asked": of_image} | changes for i in range(count)]


RECORDS = Columns(question="q", answers="a", id="id", records="asked")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_questions_of_a_row_are_samples(kind: str, tmp_path: Path) -> None:
    content = in_records()
    if kind == "parquet":  # which has one type per column
        content = [row | {"asked": [record | {"a": str(record["a"])} for record in row["asked"]]} for row in content]
    dataset = Dataset.open(source(write(kind, tmp_path, content), columns=RECORDS))
    refs = dataset.select(None, 0)
    assert [ref.uid for ref in refs] == sample_order([f"set:test:r{i}.{k}" for i in range(2) for k in range(2)], 0)
    assert dataset.select(3, 0) == refs[:3]
    sample = dataset.sample("set:test:r1.1")
    assert (sample.question, sample.answers) == ("Which colour?", ("red",))
    assert dataset.sample("set:test:r1.0").answers == ("2",)


def test_questions_with_an_id_of_their_own_keep_it_wherever_they_stand(tmp_path: Path) -> None:
    content = [
        row | {"asked": [{"q": "Why?", "a": "red", "key": f"{row['id']}{letter}"} for letter in "xy"]}
        for row in in_records()
    ]
    keyed = replace(RECORDS, id="key")
    dataset = Dataset.open(source(write("parquet", tmp_path, content), columns=keyed))
    turned = [row | {"asked": row["asked"][::-1]} for row in content[::-1]]
    again = Dataset.open(source(write("parquet", tmp_path / "turned", turned), columns=keyed))
    assert dataset.select(None, 0) == again.select(None, 0)
    assert {ref.uid for ref in dataset.select(None, 0)} == {
        f"set:test:r{i}{letter}" for i in range(2) for letter in "xy"
    }
    with pytest.raises(DatasetError, match=r"rows 0 \(record 0\) and 0 \(record 1\) have the same id 'x'"):
        Dataset.open(
            source(
                write("parquet", tmp_path / "twice", in_records(1, asked=[{"q": "?", "a": "b", "key": "x"}] * 2)),
                columns=keyed,
            )
        )
    with pytest.raises(DatasetError, match=r"row 0 \(record 0\) has no id \(column 'key'\)"):
        Dataset.open(
            source(
                write("parquet", tmp_path / "none", in_records(1, asked=[{"q": "?", "a": "b", "key": None}])),
                columns=keyed,
            )
        )


def test_a_record_of_lists_is_a_list_of_records(tmp_path: Path) -> None:
    asked = {"q": ["How many?", "Which colour?"], "a": ["2", "red"]}
    dataset = Dataset.open(source(write("parquet", tmp_path, in_records(asked=asked)), columns=RECORDS))
    assert dataset.sample("set:test:r0.1").answers == ("red",)


def test_records_that_are_none(tmp_path: Path) -> None:
    columns = replace(RECORDS, records="id")
    with pytest.raises(DatasetError, match=r"column 'id' holds no lists of records; set columns.records"):
        Dataset.open(source(write("parquet", tmp_path, in_records(asked=[{"q": "?", "a": "b"}])), columns=columns))
    columns = replace(RECORDS, question="question")
    with pytest.raises(DatasetError, match=r"no column 'question' \(there is: id, image, asked, a, q\); set columns.q"):
        Dataset.open(source(tmp_path / "rows.parquet", columns=columns))


def test_images_in_a_table_beside_the_questions(tmp_path: Path) -> None:
    place = write("jsonl", tmp_path / "questions", [row | {"about": 7} for row in rows(2)])
    images = write_parquet(tmp_path / "images.parquet", [{"key": "7", "image": picture("green")}])
    columns = Columns(id="id", image_id="about")
    table = ImageTable(path=str(images), id="key")
    dataset = Dataset.open(source(place, columns=columns, images=table))
    sample = dataset.sample("set:test:q0")
    assert sample.images()[0].getpixel((0, 0)) == (0, 128, 0)  # not the file that the questions' own column names
    assert sample.image_id == "7"


def test_columns_that_the_prompt_names(tmp_path: Path) -> None:
    content = [row | {"hint": hint} for row, hint in zip(rows(3), ["Look.", None, ["a", "b"]], strict=True)]
    place = write("jsonl", tmp_path, content)
    dataset = Dataset.open(source(place, prompt="{hint}\n{question}"))
    prompts = [dataset.sample(f"set:test:q{i}").prompt for i in range(3)]
    assert prompts == ["Look.\nWhich colour 0?", "Which colour 1?", "a, b\nWhich colour 2?"]
    with pytest.raises(DatasetError, match=r"no column 'hnt', did you mean hint\?.*; set prompt$"):
        Dataset.open(source(place, prompt="{hnt}\n{question}"))


# --- The hub, replaced by a folder ---


def test_hub_files_of_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows())
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    dataset = Dataset.open(source(None, hub_id="owner/set", revision="abc"))
    assert len(dataset) == 3
    assert (asked["repo_id"], asked["revision"], asked["repo_type"]) == ("owner/set", "abc", "dataset")
    assert "data/test-*" in asked["allow_patterns"]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(DatasetError, match=r"hub data set owner/set: .*offline mode is enabled\); .*give `path`$"):
        Dataset.open(source(None, hub_id="owner/set"))


# --- Mistakes that concern the whole data set ---


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            Columns(id="id", answers="answer"),
            r"no column 'answer', did you mean answers\? \(there is: .*\); set columns.answers",
        ),
        (Columns(id="question_id"), r"no column 'question_id', did you mean question\?"),
        (Columns(image="images"), r"no column 'images', did you mean image\?.*set columns.image$"),
    ],
)
def test_missing_column(columns: Columns, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        Dataset.open(source(write("parquet", tmp_path, rows()), columns=columns))


def test_unreadable_places(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "broken.jsonl").write_text('{"id": 1,\n')
    (tmp_path / "zero.jsonl").write_text("")
    for place, message in [
        ("none.parquet", r"no such file or folder; check `path` of data set 'set'"),
        ("*.parq", r"no such file or folder"),
        ("empty", r"neither metadata.jsonl .* nor data files"),
        ("notes.docx", r"cannot read \.docx files; give files of one kind of \.parquet, \.jsonl"),
        ("broken.parquet", r"broken\.parquet is not a Parquet file that can be read \("),
        ("broken.jsonl", r"split 'test' cannot be read \(.*\); check that it is valid json"),
        ("zero.jsonl", r"zero\.jsonl: "),
    ]:
        with pytest.raises(DatasetError, match=message) as caught:
            Dataset.open(source(tmp_path / place))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("level", [datasets.logging.WARNING, datasets.logging.INFO])
def test_the_library_logs_nothing_above_our_line(tmp_path: Path, level: int) -> None:
    (tmp_path / "broken.jsonl").write_text('{"id": 1,\n')
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger, was = logging.getLogger("datasets"), datasets.logging.get_verbosity()
    logger.addHandler(handler)
    datasets.logging.set_verbosity(level)
    try:
        with pytest.raises(DatasetError):
            Dataset.open(source(tmp_path / "broken.jsonl"))
        assert logged == []
        assert datasets.logging.get_verbosity() == level, "the caller's own reads log as before"
    finally:
        datasets.logging.set_verbosity(was)
        logger.removeHandler(handler)


def test_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(1)).slice(0, 0), tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match="the file has no rows"):
        Dataset.open(source(tmp_path / "rows.parquet"))


def test_ids_must_be_there_and_unique(tmp_path: Path) -> None:
    twice = [row | {"id": "same"} for row in rows()]
    with pytest.raises(DatasetError, match=r"rows 0 and 1 have the same id 'same' \(column 'id'\)"):
        Dataset.open(source(write_parquet(tmp_path / "twice.parquet", twice)))
    missing = [*rows(2), rows(3)[2] | {"id": None}]
    with pytest.raises(DatasetError, match="row 2 has no id"):
        Dataset.open(source(write_parquet(tmp_path / "missing.parquet", missing)))


def test_too_few_answers_for_the_metric(tmp_path: Path) -> None:
    single = [row | {"answers": ["red"]} for row in rows()]
    with pytest.raises(
        DatasetError, match=r"vqa_accuracy needs at least 2 answers per sample.*use metric: exact_match"
    ):
        Dataset.open(source(write("parquet", tmp_path, single), metric="vqa_accuracy"))


def test_relative_image_paths_of_several_folders_are_refused(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write("jsonl", tmp_path / part, rows())
    with pytest.raises(DatasetError, match="relative image paths in files of several folders are ambiguous"):
        Dataset.open(source(tmp_path / "*" / "rows.jsonl", columns=Columns()))


# --- Mistakes that concern one sample ---


@each_kind
def test_an_unusable_row_fails_alone(kind: str, tmp_path: Path) -> None:
    content = rows(4)
    content[1] |= {"answers": None}
    content[2] |= {"image": content[2]["image"][:40]}
    place = write(kind, tmp_path, content)
    if kind != "parquet":
        (tmp_path / "pictures" / "q3.png").unlink()
    dataset = Dataset.open(source(place))
    assert len({ref.digest for ref in dataset.select(None, 0)}) == 4
    assert dataset.sample("set:test:q0").images()[0].size == (8, 6)
    with pytest.raises(SampleError, match=r"set:test:q1: 0 answers in column 'answers'"):
        dataset.sample("set:test:q1")
    truncated = dataset.sample("set:test:q2")
    with pytest.raises(SampleError, match=r"set:test:q2: the image cannot be decoded|set:test:q2: not an image"):
        truncated.images()[0]
    if kind != "parquet":
        with pytest.raises(SampleError, match=r"set:test:q3: cannot read image .*q3\.png \(No such file"):
            dataset.sample("set:test:q3")
    with pytest.raises(SampleError, match=r"no such sample in .*the data changed"):
        dataset.sample("set:test:q9")


def test_missing_image_and_question(tmp_path: Path) -> None:
    content = rows(3)
    content[0] |= {"image": None}
    content[1] |= {"question": " "}
    dataset = Dataset.open(source(write("parquet", tmp_path, content)))
    with pytest.raises(SampleError, match=r"set:test:q0: no image \(column 'image'\)"):
        dataset.sample("set:test:q0")
    with pytest.raises(SampleError, match=r"set:test:q1: the question is missing"):
        dataset.sample("set:test:q1")


# --- Choice and identity ---


@pytest.mark.parametrize(("seed", "expected"), [(0, "hfgdacbe"), (1, "dgafebhc")])
def test_sample_order_is_the_documented_one(seed: int, expected: str) -> None:
    assert "".join(sample_order("abcdefgh", seed)) == expected
    assert "".join(sample_order("hgfedcba", seed)) == expected


def test_selection_is_nested_and_complete(tmp_path: Path) -> None:
    dataset = Dataset.open(source(write("parquet", tmp_path, rows(20))))
    everything = dataset.select(None, 3)
    assert len(set(everything)) == len(dataset) == 20
    assert dataset.select(5, 3) == everything[:5]
    assert dataset.select(99, 3) == everything
    assert dataset.select(5, 4) != everything[:5]
    # From the other end, so that the two meet last and neither moves the other.
    assert dataset.select_last(5, 3) == everything[:-6:-1]
    assert dataset.select_last(99, 3) == everything[::-1]
    assert dataset.select_last(0, 3) == []
    with pytest.raises(ValueError, match="cannot choose -1"):
        dataset.select(-1, 0)


def digests(place: Path) -> dict[str, str]:
    return {ref.uid: ref.digest for ref in Dataset.open(source(place)).select(None, 0)}


def test_digest_follows_content_only(tmp_path: Path) -> None:
    content = rows()
    original = digests(write("jsonl", tmp_path / "a", content))
    assert digests(write_parquet(tmp_path / "renamed.parquet", content[::-1])) == original
    changes: list[Row] = [{"image": picture("black")}, {"question": "Why?"}, {"answers": ["red", "y"]}]
    for number, change in enumerate(changes):
        changed = digests(write_parquet(tmp_path / f"{number}.parquet", [content[0] | change, *content[1:]]))
        assert changed["set:test:q0"] != original["set:test:q0"]
        assert changed["set:test:q1"] == original["set:test:q1"]


def test_digest_follows_everything_the_model_is_shown(tmp_path: Path) -> None:
    content = choices(rows(2), hint="Look.")

    def digest(name: str, prompt: str = "{hint}\n{question}\n{options}", **changes: Any) -> str:
        place = write("parquet", tmp_path / name, [content[0] | changes, content[1]])
        columns = Columns(id="id", options="options")
        opened = Dataset.open(source(place, columns=columns, metric="multiple_choice", prompt=prompt))
        return opened.sample("set:test:q0").ref.digest

    original = digest("a")
    assert digest("same") == original
    assert digest("b", options=["red", "blue"]) != original
    assert digest("c", hint="Look again.") != original
    assert digest("d", answers="0") != original
    # What the prompt does not name is not shown.
    unnamed = digest("e", prompt="{question}\n{options}")
    assert digest("f", prompt="{question}\n{options}", hint="Look again.") == unnamed


def test_digest_follows_every_image(tmp_path: Path) -> None:
    def digest(name: str, *colours: str) -> str:
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([rows(1)[0] | {"image": [picture(colour) for colour in colours]}]), file)
        return Dataset.open(source(file)).sample("set:test:q0").ref.digest

    found = {digest("a", "red", "blue"), digest("b", "red", "green"), digest("c", "blue", "red"), digest("d", "red")}
    assert len(found) == 4
    assert digest("e", "red") == digests(write("parquet", tmp_path / "plain", rows(1)))["set:test:q0"]


def test_digest_of_a_plain_sample_is_the_one_of_earlier_releases() -> None:
    ref = Dataset.open(resolve_source(name="demo", base_folder=PROJECT)).sample("demo:test:scene_00_q1").ref
    assert ref.digest == "5f42e04b7406dd57e3ca6ffaef7f7a93ccb70ffa0bf1e2f6b85c2d83d4fff15f"


def test_a_missing_image_has_its_own_digest(tmp_path: Path) -> None:
    place = write("jsonl", tmp_path, rows())
    before = digests(place)
    (tmp_path / "pictures" / "q0.png").unlink()
    after = digests(place)
    assert after["set:test:q0"] != before["set:test:q0"]
    assert after["set:test:q1"] == before["set:test:q1"]


def test_fingerprint_ignores_order_and_sees_every_digest() -> None:
    refs = [SampleRef("a", "1"), SampleRef("b", "2"), SampleRef("c", "3")]
    assert fingerprint(refs) == fingerprint(refs[::-1])
    assert fingerprint(refs) != fingerprint(refs[:2])
    assert fingerprint(refs) != fingerprint([*refs[:2], SampleRef("c", "4")])


def test_reading_a_data_set_needs_no_torch(tmp_path: Path) -> None:
    place = write("imagefolder", tmp_path / "data", rows())
    program = (
        "import sys, workers.datasets as d\n"
        "s = d.resolve_source(name='x', path=sys.argv[1], metric='exact_match', base_folder=d.Path('.'))\n"
        "data = d.Dataset.open(s)\n"
        "data.sample(data.select(1, 0)[0].uid).images()[0]\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", program, str(place)], check=True, env=environment)

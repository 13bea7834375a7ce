"""Every preset reads, asks and scores rows of the columns that its data set has on the hub."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.resolve import resolve_datasets
from orchestrator.spec import parse_sweep
from workers.datasets import Dataset, presets, resolve_source
from workers.errors import DatasetError, SampleError
from workers.scorers import SCORERS, scorer

# For every hub preset the columns its rows have, with their types, and one row besides its image.
TEXT, TEXTS = pa.string(), pa.list_(pa.string())
VQA_ANSWERS = pa.list_(pa.struct({"answer": TEXT, "answer_confidence": TEXT, "answer_id": pa.int64()}))
HUB_ROWS: dict[str, dict[str, tuple[pa.DataType, Any]]] = {
    "vqa_v2": {
        "question_type": (TEXT, "what color is the"),
        "multiple_choice_answer": (TEXT, "red"),
        "answers": (VQA_ANSWERS, [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]),
        "image_id": (pa.int64(), 262148),
        "answer_type": (TEXT, "other"),
        "question_id": (pa.int64(), 262148000),
        "question": (TEXT, "What color is the car?"),
    },
    "textvqa": {
        "image_id": (TEXT, "003a8ae2ef43b901"),
        "question_id": (pa.int32(), 34602),
        "question": (TEXT, "what is the brand of this camera?"),
        "question_tokens": (TEXTS, ["what", "is", "the", "brand", "of", "this", "camera"]),
        "image_width": (pa.int32(), 1024),
        "image_height": (pa.int32(), 664),
        "image_classes": (TEXTS, ["Camera"]),
        "ocr_tokens": (TEXTS, ["DAKOTA", "DIGITAL"]),
        "answers": (TEXTS, ["red"] * 10),
        "set_name": (TEXT, "val"),
    },
    "okvqa": {
        "question_id": (TEXT, "2971475"),
        "question": (TEXT, "What sport can you use this for?"),
        "answers": (TEXTS, ["red"] * 10),
        "question_type": (TEXT, "four"),
        "answer_type": (TEXT, "other"),
    },
    "docvqa": {
        "questionId": (TEXT, "49153"),
        "question": (TEXT, "What is the value in the chart?"),
        "question_types": (TEXTS, ["figure/diagram"]),
        "docId": (pa.int64(), 14465),
        "ucsf_document_id": (TEXT, "pybv0228"),
        "ucsf_document_page_no": (TEXT, "81"),
        "answers": (TEXTS, ["green", "red"]),
        "data_split": (TEXT, "val"),
    },
    "chartqa": {
        "type": (TEXT, "human_test"),
        "question": (TEXT, "Which colour is the tallest bar?"),
        "answer": (TEXT, "red"),
    },
    "pope": {
        "id": (TEXT, "0"),
        "question_id": (TEXT, "1"),
        "question": (TEXT, "Is there a snowboard in the image?"),
        "answer": (TEXT, "yes"),
        "image_source": (TEXT, "COCO_val2014_000000310196"),
        "category": (TEXT, "adversarial"),
    },
}

CHOICE_ANSWER = "\nAnswer with the option's letter from the given choices directly."
HUB_ROWS |= {
    "scienceqa_img": {
        "question": (TEXT, "Which of these is a solid?"),
        "choices": (TEXTS, ["water", "air", "ice"]),
        "answer": (pa.int8(), 2),
        "hint": (TEXT, "Solids keep their shape."),
        "task": (TEXT, "closed choice"),
        "subject": (TEXT, "natural science"),
    },
    "stvqa": {
        "path": (TEXT, "coco-text/COCO_train2014_000000364308.jpg"),
        "question": (TEXT, "What is the brand of the bus?"),
        "dictionary": (TEXTS, ["red", "green"]),
        "answer": (TEXTS, ["green", "red"]),
    },
    "tallyqa": {
        "qa": (
            pa.list_(pa.struct({"question": TEXT, "answer": TEXT, "is_simple": pa.bool_(), "data_source": TEXT})),
            [
                {"question": "How many cars?", "answer": "2", "is_simple": True, "data_source": "imported"},
                {"question": "How many cars are red?", "answer": "0", "is_simple": False, "data_source": "amt"},
            ],
        ),
    },
    "mmmu": {
        "id": (TEXT, "1"),
        "question": (TEXT, "What does <image 1> show?"),
        "options": (TEXT, "['a supply curve', '$10\\\\%', \"Engel's law\"]"),
        "explanation": (TEXT, ""),
        "answer": (TEXT, "C"),
        "question_type": (TEXT, "multiple-choice"),
        "subfield": (TEXT, "Microeconomics"),
    },
    "coco_cap": {
        "question_id": (TEXT, "139"),
        "question": (TEXT, "Please carefully observe the image and come up with a caption for the image"),
        "answer": (TEXTS, ["A red car in the street."] * 4 + ["A car."]),
        "id": (pa.int64(), 139),
        "file_name": (TEXT, "000000000139.jpg"),
    },
    "ai2d": {
        "question": (TEXT, "Which eats grass?"),
        "options": (TEXTS, ["the wolf", "the owl", "the hare", "the sun"]),
        "answer": (TEXT, "2"),
    },
    "gqa": {
        "id": (TEXT, "201307251"),
        "imageId": (TEXT, "n161313"),
        "question": (TEXT, "Is it overcast?"),
        "answer": (TEXT, "no"),
        "isBalanced": (pa.bool_(), True),
    },
    "mmbench_en": {
        "index": (pa.int64(), 241),
        "question": (TEXT, "Which is right?"),
        "hint": (TEXT, "nan"),
        "answer": (TEXT, "B"),
        **{letter: (TEXT, text) for letter, text in zip("ABCD", ["the left", "the right", "nan", "nan"], strict=True)},
        "category": (TEXT, "spatial_relationship"),
        "split": (TEXT, "dev"),
    },
    "mme": {
        "question_id": (TEXT, "artwork/10002.jpg"),
        "question": (TEXT, "Is this a painting? Please answer yes or no."),
        "answer": (TEXT, "Yes"),
        "category": (TEXT, "artwork"),
    },
}

# What a model says that is right, where it is not the last reference; all else is wrong.
RIGHT = {"scienceqa_img": "c", "mmmu": "(C)", "ai2d": "C. the hare", "mmbench_en": "Answer: B", "gqa": "No."}
PROMPTS = {
    "scienceqa_img": "Context: Solids keep their shape.\nWhich of these is a solid?\nA. water\nB. air\nC. ice"
    + CHOICE_ANSWER,
    "stvqa": "What is the brand of the bus?\nAnswer the question using a single word or phrase.",
    "tallyqa": "How many cars?\nAnswer the question using a single number.",
    "mmmu": "What does <image 1> show?\nA. a supply curve\nB. $10\\%\nC. Engel's law\n" + CHOICE_ANSWER,
    "coco_cap": "Provide a one-sentence caption for the provided image.",
    "ai2d": "Which eats grass?\nA. the wolf\nB. the owl\nC. the hare\nD. the sun" + CHOICE_ANSWER,
    "gqa": "Is it overcast?\nAnswer the question using a single word or phrase.",
    "mmbench_en": "Which is right?\nThere are several options:\nA. the left\nB. the right\n" + CHOICE_ANSWER,
    "mme": "Is this a painting? Please answer yes or no.",
}
IMAGE = pa.struct({"bytes": pa.binary(), "path": TEXT})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def stored(colour: str) -> dict[str, Any]:
    return {"bytes": picture(colour), "path": f"{colour}.png"}


def open_local(name: str, folder: Path, changes: Sequence[dict[str, Any]] = ({}, {}, {}, {}), **entry: Any) -> Dataset:
    """A preset on rows of its columns that differ in their id, so that the id column must be the right one.

    Images come in pairs.
    """
    columns = HUB_ROWS[name]
    known = presets()[name].columns
    image_columns = [] if presets()[name].images else list(known.images)
    rows = []
    for index, change in enumerate(changes):
        row = {column: value for column, (_, value) in columns.items()}
        if known.id is not None:
            row[known.id] = type(row[known.id])(int(row[known.id]) + index)
        first = {column: stored(["red", "blue"][index // 2 % 2]) for column in image_columns[:1]}
        rows.append(dict.fromkeys(image_columns) | row | first | change)
    schema = pa.schema({column: kind for column, (kind, _) in columns.items()} | dict.fromkeys(image_columns, IMAGE))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "rows.parquet")
    if not image_columns:
        images = [{"id": "n161313", "image": stored("red")}, {"id": "n2", "image": stored("blue")}]
        schema = pa.schema({"id": TEXT, "image": IMAGE})
        pq.write_table(pa.Table.from_pylist(images, schema=schema), folder / "images.parquet")
        entry["images"] = {"path": str(folder / "images.parquet")}
    return Dataset.open(resolve_source(name=name, path=str(folder / "rows.parquet"), base_folder=folder, **entry))


def test_every_hub_preset_has_rows_to_test_it_with() -> None:
    assert set(HUB_ROWS) == {name for name, preset in presets().items() if preset.hub_id is not None}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_hub_preset_resolves_to_the_hub(name: str, tmp_path: Path) -> None:
    source = resolve_source(name=name, base_folder=tmp_path)
    assert source.path is None
    assert source.hub_id is not None
    elsewhere = {"stvqa": "danjacobellis", "tallyqa": "vikhyatk"}
    assert source.hub_id.split("/")[0] == elsewhere.get(name, "lmms-lab-encoder")
    if name not in PROMPTS:
        assert source.prompt_for("Why?").startswith("Why?\n")
        assert "\nAnswer the question " in source.prompt


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_local_copy_of_a_hub_preset_is_read_and_scored(name: str, tmp_path: Path) -> None:
    dataset = open_local(name, tmp_path)
    refs = dataset.select(None, seed=0)
    samples = [dataset.sample(ref.uid) for ref in refs]
    questions_per_row = 2 if name == "tallyqa" else 1
    assert len({ref.uid for ref in refs}) == 4 * questions_per_row
    assert dataset.select(2, seed=0) == refs[:2]
    columns = dataset.source.columns
    by_content = columns.image_id is None
    assert len({sample.image_id for sample in samples}) == (2 if by_content else 1)
    metric = scorer(dataset.source.metric)
    for sample in samples:
        assert sample.images()[0].size == (8, 6)
        if columns.question in HUB_ROWS[name]:
            assert sample.question == HUB_ROWS[name][str(columns.question)][1]
        if columns.question_type in HUB_ROWS[name]:
            assert sample.question_type == HUB_ROWS[name][str(columns.question_type)][1]
        if metric.rule is not None:
            right = RIGHT.get(name, sample.answers[-1].capitalize())
            assert metric.score(right, sample.answers, sample.options) == 1.0
            assert metric.score("nothing of the kind", sample.answers, sample.options) == 0.0
    first = dataset.sample(min(ref.uid for ref in refs))
    expected = PROMPTS.get(name, dataset.source.prompt.replace("{question}", first.question))
    assert first.prompt == expected


def test_a_question_without_a_hint_has_no_line_for_it(tmp_path: Path) -> None:
    changes = [{"hint": ""}, {"hint": None}, {}]
    dataset = open_local("scienceqa_img", tmp_path, changes)
    prompts = [dataset.sample(f"scienceqa_img:test:{row}").prompt for row in range(3)]
    assert prompts[0] == prompts[1] == prompts[2].partition("\n")[2]


def test_every_question_of_tallyqa_is_a_sample_of_its_own(tmp_path: Path) -> None:
    question = {"question": "How many dogs?", "answer": "3", "is_simple": True, "data_source": "amt"}
    changes = [{}, {"qa": [question] * 3}, {"qa": []}, {"qa": None}, {"qa": [question, None]}]
    dataset = open_local("tallyqa", tmp_path, changes)
    uids = {ref.uid.rpartition(":")[2] for ref in dataset.select(None, seed=0)}
    assert uids == {"0.0", "0.1", "1.0", "1.1", "1.2", "3.0", "4.0", "4.1"}
    two, zero = (dataset.sample(f"tallyqa:test:0.{position}") for position in (0, 1))
    assert (two.answers, zero.answers) == (("2",), ("0",))
    assert (two.question_type, zero.question_type) == ("True", "False")
    assert two.image_id == zero.image_id
    assert two.ref.digest != zero.ref.digest
    for broken in ("3.0", "4.1"):
        with pytest.raises(SampleError, match=rf"tallyqa:test:{broken}: no record of a question \(column 'qa'\)"):
            dataset.sample(f"tallyqa:test:{broken}")
    # What a row holds does not move another row's samples.
    alone = open_local("tallyqa", tmp_path, changes[:2])
    assert alone.sample("tallyqa:test:1.2").ref == dataset.sample("tallyqa:test:1.2").ref


def test_mmmu_with_several_images_and_open_questions(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"question": "Which of <image 1> and <image 2>?", "image_2": stored("green")},
        {"options": "[]", "answer": "['12', '12.0']", "question_type": "open"},
        {"question": "What is in <image 2>?"},
        {"image_1": None, "image_2": stored("green")},
        {"options": "A, B or C"},
        {"answer": "D"},
        {"options": "['x', None]"},
        {"question": "See <image 3>", "image_3": stored("green")},
    ]
    dataset = open_local("mmmu", tmp_path, changes)
    both = dataset.sample("mmmu:validation:1")
    assert [image.getpixel((0, 0)) for image in both.images()] == [(255, 0, 0), (0, 128, 0)]
    assert both.prompt.startswith("Which of <image 1> and <image 2>?\nA. a supply")
    assert both.image_files == (picture("red"), picture("green"))
    opened = dataset.sample("mmmu:validation:2")
    assert (opened.answers, opened.options) == (("12", "12.0"), ())
    assert opened.prompt == "What does <image 1> show?\n\nAnswer the question using a single word or phrase."
    assert scorer(dataset.source.metric).score("It is 12.", opened.answers, opened.options) == 1.0
    for number, message in {
        3: r"the prompt names <image 2>, but the row has 1 images",
        4: r"the prompt names <image 1>, but the row has 1 images",
        5: r"the options are no list: 'A, B or C' \(column 'options'\)",
        6: r"the answer 'D' is neither a letter nor an index from 0 of 3 options \(column 'answer'\)",
        7: r"option B is missing \(column 'options'\)",
        8: r"the prompt names <image 3>, but the row has 2 images",
    }.items():
        with pytest.raises(SampleError, match=rf"mmmu:validation:{number}: {message}"):
            dataset.sample(f"mmmu:validation:{number}")


def test_images_of_gqa_are_joined_by_their_id(tmp_path: Path) -> None:
    dataset = open_local("gqa", tmp_path, [{}, {"imageId": "n2"}, {"imageId": "n3"}, {"imageId": None}])
    samples = [dataset.sample(f"gqa:testdev:{201307251 + row}") for row in range(2)]
    assert [sample.images()[0].getpixel((0, 0)) for sample in samples] == [(255, 0, 0), (0, 0, 255)]
    assert [sample.image_id for sample in samples] == ["n161313", "n2"]
    for row, key in ((2, "'n3'"), (3, "None")):
        with pytest.raises(SampleError, match=rf"no image with id {key} in the table of images"):
            dataset.sample(f"gqa:testdev:{201307251 + row}")
    rows = pa.Table.from_pylist([{"id": "n2", "image": stored("red")}] * 2)
    pq.write_table(rows, tmp_path / "images.parquet")
    with pytest.raises(DatasetError, match=r"two images have the same id 'n2' \(column 'id'\); set images.id"):
        Dataset.open(dataset.source)
    pq.write_table(rows.rename_columns(["key", "image"]), tmp_path / "images.parquet")
    with pytest.raises(DatasetError, match=r"images\.parquet: no column 'id' \(there is: key, image\); set images.id"):
        Dataset.open(dataset.source)


def test_the_two_tables_of_gqa_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_local("gqa", tmp_path)
    for table, name in (("rows", "instructions"), ("images", "images")):
        folder = tmp_path / "hub" / f"testdev_balanced_{name}"
        folder.mkdir(parents=True)
        (tmp_path / f"{table}.parquet").rename(folder / "testdev-00000-of-00001.parquet")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    dataset = Dataset.open(resolve_source(name="gqa", base_folder=tmp_path))
    assert dataset.sample("gqa:testdev:201307251").images()[0].size == (8, 6)


def test_options_of_mmbench_end_where_there_are_no_more(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"C": "below"}, {"A": "nan"}, {"C": None, "hint": "Look."}, {"answer": "C"}]
    dataset = open_local("mmbench_en", tmp_path, changes)
    assert dataset.sample("mmbench_en:dev:241").options == ("the left", "the right", "below")
    assert dataset.sample("mmbench_en:dev:243").options == ("the left", "the right")
    assert dataset.sample("mmbench_en:dev:243").prompt.startswith("Look.\nWhich is right?\n")
    with pytest.raises(SampleError, match=r"option A is missing \(column A, B, C, D\)"):
        dataset.sample("mmbench_en:dev:242")
    with pytest.raises(SampleError, match=r"the answer 'C' is neither .* of 2 options"):
        dataset.sample("mmbench_en:dev:244")


def test_captions_are_asked_for_without_a_question(tmp_path: Path) -> None:
    sample = open_local("coco_cap", tmp_path).sample("coco_cap:val:139")
    assert (sample.question, len(sample.answers)) == ("", 5)


def test_a_sweep_may_describe_such_a_data_set_itself(tmp_path: Path) -> None:
    open_local("gqa", tmp_path)
    open_local("coco_cap", tmp_path / "captions")
    sweep = parse_sweep(
        "name: example\nmodels: [tiny-smolvlm]\ndatasets:\n"
        "  - name: joined\n    path: rows.parquet\n    images: {path: images.parquet}\n    metric: exact_match\n"
        "    columns: {id: id, image_id: imageId, answers: answer}\n"
        "  - name: captions\n    path: captions/rows.parquet\n    metric: cider\n    prompt: Describe the image.\n"
        "    columns: {question: null, answers: answer, image: [image]}\n",
        file=str(tmp_path / "sweep.yaml"),
    )
    joined, captions = resolve_datasets(sweep)
    assert joined.source.images is not None
    assert len(joined.samples) == len(captions.samples) == 4
    assert captions.source.columns.question is None
    assert Dataset.open(captions.source).sample(captions.samples[0].uid).prompt == "Describe the image."


def test_the_page_on_data_sets_names_all_presets_and_metrics() -> None:
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
    shown, _, metrics = page.partition("## Metrics")
    rows_shown = [line.split("|")[1] for line in shown.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows_shown))) == set(presets())
    variants = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([^`]+)` \|$", metrics, re.MULTILINE))
    assert variants == {name: known.name for name, known in SCORERS.items()}

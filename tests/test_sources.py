"""A sweep's data set entry becomes a complete source, or one line that says what is missing and what there is."""

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers.datasets import Columns, Dataset, DatasetSource, presets, resolve_source
from workers.errors import DatasetError
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


def local(folder: Path, **entry: Any) -> DatasetSource:
    (folder / "rows.jsonl").write_text("{}")
    defaults: dict[str, Any] = {"name": "mine", "path": "rows.jsonl", "metric": "exact_match", "base_folder": folder}
    return resolve_source(**defaults | entry)


def test_project_presets_are_complete() -> None:
    known = presets()
    assert {"demo", "vqa_v2"} <= set(known)
    for preset in known.values():
        assert preset.metric in SCORERS
        assert preset.max_new_tokens >= 1
        assert (preset.path is None) != (preset.hub_id is None)
    assert Path(str(known["demo"].path)).is_dir()


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_hub_rows(file: Path, preset: str, count: int) -> None:
    """Write rows that differ in their id, so that the id column must be the right one; images come in pairs."""
    columns = HUB_ROWS[preset]
    id_column = presets()[preset].columns.id
    rows = []
    for index in range(count):
        row = {name: value for name, (_, value) in columns.items()}
        if id_column is not None:
            row[id_column] = type(row[id_column])(int(row[id_column]) + index)
        rows.append(row | {"image": {"bytes": picture(["red", "blue"][index // 2]), "path": f"{index}.png"}})
    image_type = pa.struct({"bytes": pa.binary(), "path": TEXT})
    schema = pa.schema({name: kind for name, (kind, _) in columns.items()} | {"image": image_type})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


def test_every_hub_preset_has_rows_to_test_it_with() -> None:
    assert set(HUB_ROWS) == {name for name, preset in presets().items() if preset.hub_id is not None}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_hub_preset_resolves_to_the_hub(name: str, tmp_path: Path) -> None:
    source = resolve_source(name=name, base_folder=tmp_path)
    assert source.path is None
    assert str(source.hub_id).startswith("lmms-lab-encoder/")
    assert source.prompt_for("Why?").startswith("Why?\n")
    assert "\nAnswer the question " in source.prompt


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_local_copy_of_a_hub_preset_is_read_and_scored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.parquet"
    write_hub_rows(file, name, count=4)
    dataset = Dataset.open(resolve_source(name=name, path=str(file), base_folder=tmp_path))
    refs = dataset.select(None, seed=0)
    samples = [dataset.sample(ref.uid) for ref in refs]
    assert len({ref.uid for ref in refs}) == 4
    columns = dataset.source.columns
    by_content = columns.image_id is None
    assert len({sample.image_id for sample in samples}) == (2 if by_content else 1)
    for sample in samples:
        assert sample.image().size == (8, 6)
        assert sample.question == HUB_ROWS[name]["question"][1]
        if columns.question_type is not None:
            assert sample.question_type == HUB_ROWS[name][columns.question_type][1]
        score = scorer(dataset.source.metric).score
        assert score(sample.answers[-1].capitalize(), sample.answers) == 1.0
        assert score("nothing of the kind", sample.answers) == 0.0


def test_a_preset_gives_defaults_and_the_entry_wins(tmp_path: Path) -> None:
    preset = resolve_source(name="vqa_v2", base_folder=tmp_path)
    assert (preset.hub_id, preset.split, preset.metric) == ("lmms-lab-encoder/VQAv2", "validation", "vqa_accuracy")
    assert preset.columns.id == "question_id"
    changed = resolve_source(
        name="vqa_v2", split="testdev", revision="abc", columns={"id": None}, metric="exact_match", base_folder=tmp_path
    )
    assert (changed.hub_id, changed.split, changed.revision) == ("lmms-lab-encoder/VQAv2", "testdev", "abc")
    assert (changed.columns.id, changed.columns.image_id, changed.metric) == (None, "image_id", "exact_match")


def test_a_local_copy_of_a_preset_keeps_its_columns(tmp_path: Path) -> None:
    source = local(tmp_path, name="vqa_v2", metric=None)
    assert (source.path, source.hub_id) == (str(tmp_path / "rows.jsonl"), None)
    assert (source.columns.id, source.metric, source.split) == ("question_id", "vqa_accuracy", "validation")


def test_local_defaults(tmp_path: Path) -> None:
    source = local(tmp_path)
    assert source == DatasetSource(
        name="mine",
        split="test",
        path=str(tmp_path / "rows.jsonl"),
        hub_id=None,
        config=None,
        revision=None,
        columns=Columns("image", "question", "answers"),
        metric="exact_match",
        prompt="{question}",
    )
    assert source.prompt_for("How {many}?") == "How {many}?"
    assert pickle.loads(pickle.dumps(source)) == source
    assert hash(source) == hash(local(tmp_path))


def test_paths_are_looked_up_beside_the_sweep_then_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_folder, current = tmp_path / "sweeps", tmp_path / "here"
    for folder in (sweep_folder, current):
        folder.mkdir()
    monkeypatch.chdir(current)
    (current / "rows.jsonl").write_text("{}")
    entry: dict[str, Any] = {"name": "mine", "path": "rows.jsonl", "metric": "exact_match", "base_folder": sweep_folder}
    assert resolve_source(**entry).path == str(current / "rows.jsonl")
    (sweep_folder / "rows.jsonl").write_text("{}")
    assert resolve_source(**entry).path == str(sweep_folder / "rows.jsonl")
    assert resolve_source(**entry | {"path": "*.jsonl"}).path == str(sweep_folder / "*.jsonl")


def test_a_file_as_name_is_called_by_its_stem(tmp_path: Path) -> None:
    assert local(tmp_path, name="rows.jsonl", path=None).name == "rows"


def test_other_names_with_a_slash_are_hub_ids(tmp_path: Path) -> None:
    source = resolve_source(name="owner/set", split="test", metric="exact_match", base_folder=tmp_path)
    assert (source.name, source.hub_id, source.path) == ("owner/set", "owner/set", None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"name": "vqa_v3", "path": None},
            r"'vqa_v3': neither a preset, did you mean vqa_v2\? \(there is: demo, vqa_v2",
        ),
        ({"path": "nowhere.parquet"}, r"'mine': no file or folder .*nowhere\.parquet"),
        ({"metric": None}, r"'mine': `metric` is missing \(allowed: exact_match, vqa_accuracy"),
        ({"metric": "exactmatch"}, r"'mine'\.metric: unknown metric 'exactmatch', did you mean exact_match\?"),
        ({"columns": {"awnsers": "a"}}, r"\.columns\.awnsers: unknown role, did you mean answers\?"),
        ({"columns": {"answers": None}}, r"\.columns\.answers: must be a column name, not None"),
        ({"columns": ["image"]}, r"\.columns: must map roles to column names"),
        ({"prompt": "Describe."}, r"\.prompt: must contain \{question\}"),
        ({"hub_id": "a/b"}, r"give either path or hub_id, not both"),
        ({"revision": "abc"}, r"revision belongs to a hub data set"),
        ({"path": None, "name": "owner/set"}, r"'owner/set': a hub data set needs `split`"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        local(tmp_path, **entry)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"not valid YAML"),
        ("- a", r"must map preset names"),
        ("a: 3", r": a: must be a mapping"),
        ("a: {pth: x}", r": a\.pth: unknown key, did you mean path\?"),
        ("a: {path: x, split: test, metric: exact_match}", r": a: max_new_tokens is missing"),
        ("a: {split: test, metric: exact_match, max_new_tokens: 4}", r": a: give either path or hub_id"),
        ("a: {path: x, split: test, metric: nope, max_new_tokens: 4}", r": a\.metric: unknown metric 'nope'"),
        ("a: {path: x, split: 3, metric: exact_match, max_new_tokens: 4}", r": a\.split: must be text, not 3"),
        ("a: {path: x, split: test, metric: exact_match, max_new_tokens: 0}", r"whole number of at least 1, not 0"),
    ],
)
def test_mistakes_in_a_preset_file_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "datasets.yaml"
    file.write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        presets(file)
    assert str(file) in str(caught.value)


def test_missing_preset_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read the data set presets"):
        presets(tmp_path / "none.yaml")

"""A sweep's data set entry becomes a complete source, or one line that says what is missing and what there is."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from workers.datasets import Columns, DatasetSource, ImageTable, presets, resolve_source
from workers.errors import DatasetError
from workers.scorers import SCORERS


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
        ({"columns": {"image": []}}, r"\.columns\.image: must be a column name, not \[\]"),
        ({"columns": {"options": ["A", None]}}, r"\.columns\.options: must be a column name, not None"),
        ({"columns": {"id": ["a", "b"]}}, r"\.columns\.id: must be a column name, not \['a', 'b'\]"),
        ({"prompt": "Describe."}, r"\.prompt: must contain \{question\}.*set columns.question to null"),
        ({"columns": {"question": None}}, r"\.prompt: contains \{question\}, but columns.question is null"),
        ({"columns": {"options": "choices"}}, r"\.prompt: must contain \{options\}, else the model does not see"),
        ({"prompt": "{question}\n{options}"}, r"\.prompt: names \{options\}, but .*; set columns.options"),
        ({"images": "images.parquet"}, r"\.images: must map path or config, split and id to names"),
        ({"images": {"pth": "x"}}, r"\.images\.pth: unknown key, did you mean path\?"),
        ({"images": {"path": 3}}, r"\.images\.path: must be text, not 3"),
        ({"images": {"path": "rows.jsonl"}}, r"\.images: needs columns.image_id"),
        ({"columns": {"image_id": "i"}, "images": {"id": "key"}}, r"\.images: needs `path`, as the data set is local"),
        ({"columns": {"image_id": "i"}, "images": {"path": "no.parquet"}}, r"\.images\.path: no file or folder .*no\."),
        (
            {"columns": {"image_id": "i"}, "images": {"path": "rows.jsonl", "config": "c"}},
            r"\.images: give either path or config, not both",
        ),
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
        (
            "a: {path: x, split: test, metric: multiple_choice, max_new_tokens: 4, columns: {options: o}}",
            r": a\.prompt: must contain \{options\}",
        ),
        (
            "a: {path: x, split: test, metric: exact_match, max_new_tokens: 4, images: {pth: y}}",
            r": a\.images\.pth: unknown key",
        ),
    ],
)
def test_mistakes_in_a_preset_file_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "datasets.yaml"
    file.write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        presets(file)
    assert str(file) in str(caught.value)


def test_several_columns_may_be_an_image_or_the_options(tmp_path: Path) -> None:
    columns = {"image": ["front", "back"], "options": ["A", "B"]}
    source = local(tmp_path, columns=columns, prompt="{question}\n{options}", metric="multiple_choice")
    assert source.columns.images == ("front", "back")
    assert source.columns.options == ("A", "B")
    assert hash(source) == hash(pickle.loads(pickle.dumps(source)))
    one = local(tmp_path, columns={"image": ["picture"], "options": ["choices"]}, prompt="{question}\n{options}")
    assert (one.columns.image, one.columns.options) == ("picture", "choices")


def test_a_table_of_images_of_its_own(tmp_path: Path) -> None:
    hub = resolve_source(name="gqa", base_folder=tmp_path)
    assert hub.images == ImageTable(config="testdev_balanced_images")
    assert hub.image_source is not None
    assert (hub.image_source.config, hub.image_source.split) == ("testdev_balanced_images", "testdev")
    assert hub.image_source.place == "hub data set lmms-lab-encoder/GQA (testdev_balanced_images)"
    # A local copy of the questions may hold the images already.
    assert local(tmp_path, name="gqa", metric=None).images is None
    (tmp_path / "images.jsonl").write_text("{}")
    apart = local(tmp_path, name="gqa", metric=None, images={"path": "images.jsonl", "id": "key"})
    assert apart.image_source is not None
    assert apart.image_source.path == str(tmp_path / "images.jsonl")
    assert apart.image_source.columns.id == "key"
    assert ("columns.image", "image") not in apart.needed_columns
    assert local(tmp_path).image_source is None


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("{hint}\n{question}", {"hint": "H"}, "H\nQ"),
        ("{hint}\n{question}", {"hint": ""}, "Q"),
        ("Context: {hint}\n{question}\n\nAnswer.", {"hint": ""}, "Q\n\nAnswer."),
        ("{question}\n{?hint}With.\n{!hint}Without.", {"hint": "H"}, "Q\nWith."),
        ("{question}\n{?hint}With.\n{!hint}Without.", {"hint": ""}, "Q\nWithout."),
        ('{question} Answer as {"text": ...} or {}.', {}, 'Q Answer as {"text": ...} or {}.'),
        ("{question} {L2-category}", {"L2-category": "{question}"}, "Q {question}"),
    ],
)
def test_prompts(template: str, values: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert local(tmp_path, prompt=template).prompt_for("Q", values) == expected


def test_a_prompt_without_all_it_names_is_no_prompt(tmp_path: Path) -> None:
    source = local(tmp_path, prompt="{question}\n{hint}")
    assert source.prompt_columns == ("hint",)
    with pytest.raises(ValueError, match=r"the prompt names \{hint\}, which has no value"):
        source.prompt_for("Q")


def test_missing_preset_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read the data set presets"):
        presets(tmp_path / "none.yaml")

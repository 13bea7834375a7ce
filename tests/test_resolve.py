"""Names in a sweep that lead nowhere, and settings that cannot be had yet, are refused with their line and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from orchestrator import resolve as resolve_module
from orchestrator.plan import distinct, make_plan
from orchestrator.resolve import (
    DEFAULT_MAX_NEW_TOKENS,
    accelerators_wanted,
    planned_models,
    refuse_unavailable,
    resolve,
    resolve_datasets,
    resolve_models,
)
from orchestrator.spec import SpecError, Sweep, load_sweep, parse_sweep
from workers.models import REGISTERED, describe

SWEEPS = Path(__file__).parents[1] / "sweeps"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def written(folder: Path, models: str = "[tiny-smolvlm]", datasets: str = "[demo]", more: str = "") -> Sweep:
    """A sweep file: name, models and datasets are on lines 1, 2 and 3."""
    file = folder / "sweep.yaml"
    file.write_text(f"name: example\nmodels: {models}\ndatasets: {datasets}\n{more}")
    return load_sweep(file)


def checkpoint(folder: Path, **changes: Any) -> Path:
    """What a plan reads of a checkpoint."""
    card = describe("tiny-smolvlm")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**card.config, **changes}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(card.preprocessor)))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def questions(file: Path, **changes: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(file.parent / "red.png")
    row = {"image": "red.png", "question": "Which colour?", "answers": ["red"], **changes}
    file.write_text(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")
    return file


def refused(resolve: Any, *arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(SpecError) as refusal:
        resolve(*arguments, **options)
    return str(refusal.value).splitlines()


# -- models -----------------------------------------------------------------------------------------------------------


def test_every_model_that_cannot_be_found_is_reported_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text-only").mkdir()
    (tmp_path / "text-only" / "config.json").write_text('{"model_type": "llama"}')
    (checkpoint(tmp_path / "no-weights") / "model.safetensors").unlink()
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "name: example\n"
        "models:\n"
        "  - tiny-smolvml\n"
        "  - tiny-internvl\n"
        "  - ./nowhere/at/all\n"
        "  - empty\n"
        "  - {name: mine, checkpoint: text-only}\n"
        "  - no-weights\n"
        "datasets: [demo]\n"
    )
    lines = refused(resolve_models, load_sweep(file), offline=True)
    known = ", ".join(sorted(REGISTERED))
    assert lines == [
        f"{file}:3: models[0]: unknown model 'tiny-smolvml', did you mean tiny-smolvlm? "
        f"(registered: {known}; or a folder, or a hub id a/b)",
        f"{file}:5: models[2]: model folder ./nowhere/at/all does not exist",
        f"{file}:6: models[3]: model folder {tmp_path / 'empty'} has no config.json, so it is not a checkpoint",
        f"{file}:7: models[4]: {tmp_path / 'text-only'}: model_type llama is not a vision-language model "
        "(no vision_config)",
        f"{file}:8: models[5]: model folder {tmp_path / 'no-weights'} has no *.safetensors; "
        "for random weights write weights: random",
    ]


def test_a_folder_is_looked_up_next_to_the_sweep_file_and_called_by_its_own_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "models" / "fine-tuned")
    sweep = written(tmp_path, "[models/fine-tuned, {name: mine, checkpoint: models/fine-tuned}, tiny-smolvlm]")
    sources = [model.source for model in planned_models(sweep, resolve_models(sweep, offline=True), ["cpu"])]
    assert [source.name for source in sources] == ["fine-tuned", "mine", "tiny-smolvlm"]
    assert [source.weights for source in sources] == ["checkpoint", "checkpoint", "random"]
    assert sources[0].place == str(tmp_path / "models" / "fine-tuned")
    assert sources[0].fingerprint == sources[1].fingerprint == sources[0].revision
    assert sources[0].fingerprint.startswith("files:")
    assert sources[2].revision is None


def test_two_folders_of_one_name_are_refused_unless_the_sweep_itself_names_them(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one" / "model")
    checkpoint(tmp_path / "two" / "model")
    lines = refused(resolve_models, written(tmp_path, "[one/model, two/model]"), offline=True)
    assert lines == [
        f"{tmp_path}/sweep.yaml:2: models[1]: would be called model in the results, like one/model; "
        "write {name: another name, checkpoint: two/model}"
    ]
    sweep = written(tmp_path, "[one/model, {name: other, checkpoint: two/model}]")
    assert [card.name for card in resolve_models(sweep, offline=True)] == ["model", "other"]
    sweep = written(tmp_path, "[{name: m, checkpoint: one/model}, {name: m, checkpoint: two/model}]")
    assert [card.name for card in resolve_models(sweep, offline=True)] == ["m", "m"]
    sweep = written(tmp_path, "[one/model, {name: one/model, dtype: float16}]")
    assert [card.name for card in resolve_models(sweep, offline=True)] == ["model", "model"]


def test_a_name_that_readers_of_parquet_take_for_a_number_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "007")
    questions(tmp_path / "2017.jsonl")
    sweep = written(tmp_path, "['007']", "[{name: 2017.jsonl, metric: exact_match}]")
    reason = "would be the name of a folder of the results that readers of Parquet take for a number"
    assert refused(resolve_models, sweep, offline=True) == [
        f"{tmp_path}/sweep.yaml:2: models[0]: 007 {reason}; write {{name: another name, checkpoint: ...}}"
    ]
    assert refused(resolve_datasets, sweep) == [
        f"{tmp_path}/sweep.yaml:3: datasets[0]: 2017 {reason}; write {{name: another name, path: ...}}"
    ]


def test_a_model_of_the_hub_is_described_without_the_network(tmp_path: Path) -> None:
    sweep = written(tmp_path, "[{name: smolvlm2-2.2b, revision: abc}, {name: smolvlm2-256m, weights: random}]")
    cards = resolve_models(sweep, offline=True)
    hub, drawn = (model.source for model in planned_models(sweep, cards, ["H100"]))
    assert (hub.place, hub.revision, hub.weights) == ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "abc", "checkpoint")
    assert (drawn.revision, drawn.weights, drawn.dtype) == (None, "random", "bfloat16")


def test_back_ends_have_defaults_and_experts_only_where_there_are_some(tmp_path: Path) -> None:
    sweep = written(tmp_path, "[tiny-smolvlm, tiny-qwen3-vl-moe, {name: tiny-qwen3-vl-moe, experts: eager}]")
    sources = [model.source for model in planned_models(sweep, resolve_models(sweep, offline=True), ["cpu"])]
    assert [source.attention for source in sources] == ["sdpa"] * 3
    assert [source.experts for source in sources] == [None, "grouped_mm", "eager"]


def test_every_combination_of_levels_is_a_model_and_each_entry_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counting(name: str, **options: Any) -> Any:
        read.append(name)
        return describe(name, **options)

    monkeypatch.setattr(resolve_module, "describe", counting)
    sweep = written(
        tmp_path,
        "[{name: tiny-qwen3-vl-moe, engine: [eager, graph], experts: [batched_mm, eager], dtype: [float16, bfloat16]}, "
        "{name: tiny-smolvlm, attention: [sdpa, eager]}]",
    )
    cards = resolve_models(sweep, offline=True)
    assert read == ["tiny-qwen3-vl-moe", "tiny-smolvlm"]
    assert [card.name for card in cards] == read
    models = planned_models(sweep, cards, ["cpu"])
    assert [(model.source.dtype, model.source.experts, model.source.engine) for model in models[:8]] == [
        (dtype, experts, engine)
        for dtype in ("float16", "bfloat16")
        for experts in ("batched_mm", "eager")
        for engine in ("eager", "graph")
    ]
    assert all(model.card is cards[0] for model in models[:8])
    assert [(model.source.name, model.source.attention, model.source.dtype) for model in models[8:]] == [
        ("tiny-smolvlm", "sdpa", "float32"),
        ("tiny-smolvlm", "eager", "float32"),
    ]
    assert len(distinct(models)) == len(models) == 10


def test_levels_that_come_to_the_same_model_are_planned_once(tmp_path: Path) -> None:
    dense = "[{name: tiny-smolvlm, experts: [eager, grouped_mm, batched_mm], attention: [sdpa, eager]}, tiny-smolvlm]"
    sweep = written(tmp_path, dense)
    models = planned_models(sweep, resolve_models(sweep, offline=True), ["cpu"])
    assert [(model.source.attention, model.source.experts) for model in models] == [
        *[("sdpa", None)] * 3,
        *[("eager", None)] * 3,
        ("sdpa", None),
    ]
    assert [model.source.attention for model in distinct(models).values()] == ["sdpa", "eager"]
    plan = make_plan(sweep, models, resolve_datasets(sweep), ["cpu"])
    assert [combination.model.attention for combination in plan.combinations] == ["sdpa", "eager"]


def test_what_is_wrong_with_an_entry_of_many_variants_is_reported_once(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one" / "model")
    checkpoint(tmp_path / "two" / "model")
    axes = "engine: [eager, graph], attention: [sdpa, eager]"
    entries = (
        f"[{{name: one/model, {axes}}}, {{name: two/model, {axes}}}, {{name: nowhere, {axes}}}, "
        f"{{name: tiny-smolvlm, weights: checkpoint, {axes}}}]"
    )
    lines = refused(resolve_models, written(tmp_path, entries), offline=True)
    assert [line.split(": ")[1] for line in lines] == ["models[1]", "models[2]", "models[3].weights"]


def test_cards_that_are_not_those_of_the_sweep_are_no_models_of_it(tmp_path: Path) -> None:
    sweep = written(tmp_path, "[{name: tiny-smolvlm, engine: [eager, graph]}, tiny-internvl]")
    cards = resolve_models(sweep, offline=True)
    for wrong in (cards[:1], [*cards, cards[0]]):
        with pytest.raises(ValueError, match="zip"):
            planned_models(sweep, wrong, ["cpu"])


# -- data sets --------------------------------------------------------------------------------------------------------


def test_every_data_set_that_cannot_be_used_is_reported_with_its_line(tmp_path: Path) -> None:
    questions(tmp_path / "no-answers.jsonl", answers=None)
    questions(tmp_path / "good.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"not Parquet")
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "name: example\n"
        "models: [tiny-smolvlm]\n"
        "datasets:\n"
        "  - dmeo\n"
        "  - {name: mine, path: nowhere.parquet, metric: exact_match}\n"
        "  - {name: demo, samples: 2}\n"
        "  - {name: good.jsonl}\n"
        "  - {name: scored, path: good.jsonl, metric: exact_mach}\n"
        "  - {name: columns, path: no-answers.jsonl, metric: exact_match}\n"
        "  - {name: broken, path: broken.parquet, metric: exact_match}\n"
        "  - {name: asked, path: good.jsonl, metric: exact_match, prompt: Describe the image.}\n"
    )
    lines = refused(resolve_datasets, load_sweep(file))
    starts = [line.split(": ", 2)[:2] for line in lines]
    assert starts == [[f"{file}:{4 + i}", f"datasets[{i}]"] for i in (0, 1, 3, 4, 5, 6, 7)]
    for line, words in zip(
        lines,
        [
            "data set 'dmeo': neither a preset, did you mean demo?",
            f"data set 'mine': no file or folder {tmp_path}/nowhere.parquet",
            "data set 'good.jsonl': `metric` is missing (allowed: ",
            "did you mean exact_match",
            "no column 'answers'",
            "broken.parquet is not a Parquet file that can be read",
            "must contain {question}",
        ],
        strict=True,
    ):
        assert words in line


def test_files_of_one_name_in_two_folders_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        questions(tmp_path / folder / "rows.jsonl")
    entries = "[{name: one/rows.jsonl, metric: exact_match}, {name: two/rows.jsonl, metric: exact_match}]"
    assert refused(resolve_datasets, written(tmp_path, datasets=entries)) == [
        f"{tmp_path}/sweep.yaml:3: datasets[1]: would be called rows in the results, like an earlier one; "
        "write {name: another name, path: ...}"
    ]


def test_samples_and_the_cap_on_answers_come_from_the_entry_then_the_preset_then_a_default(tmp_path: Path) -> None:
    questions(tmp_path / "own.jsonl")
    entries = (
        "[{name: demo, samples: 3, seed: 1}, {name: copy, path: own.jsonl, metric: exact_match}, "
        "{name: short, path: own.jsonl, metric: exact_match, max_new_tokens: 5}]"
    )
    demo, copy, short = resolve_datasets(written(tmp_path, datasets=entries))
    assert (len(demo.samples), demo.max_new_tokens, demo.source.metric) == (3, 16, "vqa_accuracy")
    assert (len(copy.samples), copy.max_new_tokens) == (1, DEFAULT_MAX_NEW_TOKENS)
    assert short.max_new_tokens == 5


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "present", "wanted"),
    [
        ("", [], ["cpu"]),
        ("", ["H100", "H100", "A100"], ["H100", "A100"]),
        ("hardware: [{accelerator: A100}]", ["H100"], ["A100"]),
        ("hardware: [{accelerator: CPU}]", ["H100"], ["cpu"]),
        (
            "hardware: [{accelerator: A100, min_memory_gb: 40}, {accelerator: A100, min_memory_gb: 80}]",
            [],
            ["A100"],
        ),
    ],
)
def test_the_sweep_says_what_to_time_on_else_what_is_there(
    tmp_path: Path, hardware: str, present: list[str], wanted: list[str]
) -> None:
    assert accelerators_wanted(written(tmp_path, more=hardware), present) == wanted


# -- what cannot be had yet -------------------------------------------------------------------------------------------


def test_everything_that_is_not_available_yet_is_refused_at_once() -> None:
    sweep = parse_sweep(
        "name: example\n"
        "models:\n"
        "  - tiny-smolvlm\n"
        "  - {name: tiny-internvl, engine: graph}\n"
        "datasets: [demo]\n"
        "hardware: [{accelerator: A100, min_memory_gb: 80}, {accelerator: a100, min_memory_gb: 40}]\n"
        "results: s3://bucket/results\n",
        "sweep.yaml",
    )
    assert refused(refuse_unavailable, sweep) == [
        "sweep.yaml:6: hardware[1]: a100 of another memory size is not available yet",
        "sweep.yaml:7: results: only local folders are available yet",
    ]


@pytest.mark.parametrize("batch_size", ["1", "16", "[1, 4, 16]"])
def test_batches_of_any_size_are_available(tmp_path: Path, batch_size: str) -> None:
    refuse_unavailable(written(tmp_path, more=f"latency: {{batch_size: {batch_size}, visits: 3, seed: 1}}"))


# -- the sweeps of the project ----------------------------------------------------------------------------------------

PROJECT_SWEEPS = sorted(file for file in SWEEPS.glob("*.yaml") if file.name != "datasets.yaml")


@pytest.mark.parametrize("file", PROJECT_SWEEPS, ids=lambda file: str(file.stem))
def test_every_sweep_of_the_project_plans_offline(tmp_path: Path, file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    # The hub is out of reach here; the demo's images stand in for its questions.
    content["datasets"] = [{"name": "demo", "samples": 4}]
    copy = tmp_path / file.name
    copy.write_text(yaml.safe_dump(content))
    refuse_unavailable(load_sweep(file))
    sweep = load_sweep(copy)
    accelerators = accelerators_wanted(sweep, [])
    models = planned_models(sweep, resolve_models(sweep, offline=True), accelerators)
    plan = make_plan(sweep, models, resolve_datasets(sweep), accelerators)
    with_results = {(combination.model.name, combination.accelerator) for combination in plan.combinations}
    assert with_results == {(model.card.name, accelerator) for model in models for accelerator in accelerators}
    # Every level that a project's sweep names must be of use to one of its models at least.
    used = {(axis, str(level)) for axis, levels in sweep.knobs.axes.items() for level in levels}
    for combination in plan.combinations:
        knobs = combination.knobs
        used -= {
            (knobs.vision.knob, str(knobs.vision.value)),
            ("moe_top_k", str(knobs.moe_top_k)),
            ("active_blocks", str(len(knobs.active_blocks))),
        }
    assert not used


def test_the_project_has_the_sweeps_that_it_promises() -> None:
    assert {"demo", "h100", "a100", "mixed"} <= {file.stem for file in PROJECT_SWEEPS}


def test_a_checkpoint_that_is_asked_for_but_does_not_exist_is_refused_rather_than_replaced(tmp_path: Path) -> None:
    sweep = written(tmp_path, "[{name: tiny-smolvlm, weights: checkpoint}]")
    assert refused(resolve_models, sweep, offline=True) == [
        f"{tmp_path}/sweep.yaml:2: models[0].weights: "
        "tiny-smolvlm has no checkpoint, it exists with random weights only"
    ]


def test_models_and_data_sets_that_lead_nowhere_are_reported_together(tmp_path: Path) -> None:
    lines = refused(resolve, written(tmp_path, "[nothing]", "[nowhere]"), offline=True)
    assert [line.split(": ")[1] for line in lines] == ["models[0]", "datasets[0]"]


def test_one_accelerator_of_two_memory_sizes_is_refused_rather_than_mixed(tmp_path: Path) -> None:
    more = "hardware: [{accelerator: A100, min_memory_gb: 80}, {accelerator: a100, min_memory_gb: 40}]"
    assert refused(refuse_unavailable, written(tmp_path, more=more)) == [
        f"{tmp_path}/sweep.yaml:4: hardware[1]: a100 of another memory size is not available yet"
    ]


def test_random_weights_of_a_folder_depend_on_its_tokenizer_and_not_on_its_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    before = describe(str(folder), random_weights=True).fingerprint
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert describe(str(folder), random_weights=True).fingerprint == before
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert describe(str(folder), random_weights=True).fingerprint != before

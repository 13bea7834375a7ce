"""Vision-language models that no file here knows: loaded from a folder, swept, with both knobs and native images."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from checkpoints import save_aria, save_gemma3
from families import ALL, BASE, VISION
from tiny import NATIVE, encoded, generated, logits, picture
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.plan import Plan, make_plan
from orchestrator.resolve import planned_models, resolve
from orchestrator.spec import load_sweep
from workers.errors import ModelError
from workers.measure import time_answer
from workers.models import load
from workers.models.adapter import VisionLanguageModel, kv_cache_bytes
from workers.models.family import Family
from workers.models.requirements import require_stages, stack_of_blocks
from workers.session import Session
from workers.tasks import Kind, Status

PROJECT = Path(__file__).resolve().parents[1]
QUESTION = "What is in the picture?"
SAVED = {"aria": save_aria, "gemma3": save_gemma3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each, with its tokenizer and its own processor."""
    made = {name: tmp_path_factory.mktemp(name) for name in SAVED}
    for name, save in SAVED.items():
        save(made[name])
    return made


@pytest.fixture(params=SAVED)
def stranger(request: pytest.FixtureRequest, folders: dict[str, Path]) -> VisionLanguageModel:
    return load(str(folders[request.param]), device="cpu")


def rebuilt(vlm: VisionLanguageModel, state: dict[str, torch.Tensor], **changes: Any) -> Any:
    """A torch model that was built with other entries in its language model's configuration."""
    config = copy.deepcopy(vlm.model.config)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config = vlm.model.generation_config
    model.load_state_dict(state)
    return VisionLanguageModel(model, vlm.processor, vlm.card, vlm.device)


def with_blocks(vlm: VisionLanguageModel, keep: list[int]) -> VisionLanguageModel:
    """A model that never had the other blocks."""
    prefix = next(n for n, module in vlm.model.named_modules() if module is vlm.decoder) + ".layers."
    state = {}
    for name, tensor in vlm.model.state_dict().items():
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            if int(index) not in keep:
                continue
            name = f"{prefix}{keep.index(int(index))}.{rest}"
        state[name] = tensor
    kinds = getattr(vlm.decoder.config, "layer_types", None)
    changes = {} if kinds is None else {"layer_types": [kinds[i] for i in keep]}
    return rebuilt(vlm, state, num_hidden_layers=len(keep), **changes)


# -- knobs, with images ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_at_every_depth(stranger: VisionLanguageModel) -> None:
    assert stranger.card.family.name == "generic"
    batch = [encoded(stranger, [picture(60, 90, seed)], QUESTION + " why?" * seed) for seed in (0, 1)]
    seen = set()
    for keep in (None, 2, [1, 3], [0, 1, 3]):
        with stranger.knobs(active_blocks=keep):
            answers = stranger.answer(batch, 8)
            assert answers == [generated(stranger, inputs, 8) for inputs, _ in batch]
        seen.add(str(answers))
    assert len(seen) == 4


@torch.inference_mode()
def test_blocks_are_bit_equal_to_a_smaller_model(stranger: VisionLanguageModel) -> None:
    inputs, features = encoded(stranger, [picture(60, 90)], QUESTION)
    for keep in ([0, 1, 3], [1, 2], [3]):
        small = with_blocks(stranger, keep)
        with stranger.knobs(active_blocks=keep):
            assert torch.equal(logits(stranger, inputs), logits(small, inputs))
            assert stranger.answer([(inputs, features)], 8) == small.answer([(inputs, features)], 8)
            held, expected = (
                kv_cache_bytes(vlm.prefill(inputs.prompt, inputs.vision, features)[1]) for vlm in (stranger, small)
            )
            assert held == expected


def test_top_k_is_bit_equal_to_a_model_built_with_it(folders: dict[str, Path]) -> None:
    vlm = load(str(folders["aria"]), device="cpu")
    inputs, features = encoded(vlm, [picture(60, 90)], QUESTION)
    for k in (1, 3, 8):
        built = rebuilt(vlm, vlm.model.state_dict(), moe_topk=k)
        with vlm.knobs(moe_top_k=k):
            assert torch.equal(logits(vlm, inputs), logits(built, inputs))
            assert vlm.answer([(inputs, features)], 8) == built.answer([(inputs, features)], 8)


def test_stages_are_timed(stranger: VisionLanguageModel) -> None:
    timing = time_answer(stranger, [picture(60, 90)], QUESTION, NATIVE, 3)
    assert min(timing.vision_ms, timing.projector_ms, timing.prefill_ms, *timing.decode_step_ms) > 0


# -- a sweep of them ---------------------------------------------------------------------------------------------------


def plan_for(folder: Path, knobs: str, models: str) -> Plan:
    """A plan of what a sweep file says, as a run makes it."""
    (folder / "sweep.yaml").write_text(
        f"name: strangers\nmodels: [{models}]\ndatasets: [{{name: demo, samples: 2, max_new_tokens: 4}}]\n"
        f"knobs: {knobs}\nlatency: {{samples: 1, repeats: 1, output_tokens: 3, warmup: 0}}\n"
    )
    sweep = load_sweep(folder / "sweep.yaml")
    cards, datasets = resolve(sweep, offline=True)
    return make_plan(sweep, planned_models(sweep, cards, ["cpu"]), datasets, ["cpu"])


def test_a_sweep_of_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    models = ", ".join(f"{{name: {name}, checkpoint: {folder}}}" for name, folder in folders.items())
    plan = plan_for(tmp_path, "{tiles: [1], moe_top_k: [1, 2, 9], active_blocks: [4, [0, 1, 3]]}", models)
    assert sorted({str(dropped) for dropped in plan.dropped}) == [
        "aria: tiles dropped, family generic has no such vision knob (it has: none)",
        "gemma3: moe_top_k dropped, the model is dense",
        "gemma3: tiles dropped, family generic has no such vision knob (it has: none)",
    ]
    assert {str(skip) for skip in plan.skips} == {
        f"aria: moe_top_k=9, active_blocks={blocks}: the model has 8 experts, so moe_top_k must be 1 to 8"
        for blocks in ("4", "(0, 1, 3)")
    }
    session, rows = Session(), {Kind.LATENCY: [], Kind.ACCURACY: []}
    for task in plan.tasks:
        result = session.run(task)
        assert result.status is Status.DONE, result.traceback
        assert result.rows is not None
        rows[task.kind] += [{"model": task.model.name, **row} for row in result.rows.to_pylist()]
    for kind, count in ((Kind.LATENCY, 1), (Kind.ACCURACY, 2)):
        found = pd.DataFrame(rows[kind])
        assert set(found["status"]) == {"done"}
        assert set(found["vision_knob"]) == {"native"}
        points = found.groupby(["model", "moe_top_k", "num_active_blocks"], dropna=False).size()
        expected = {("aria", k, blocks) for k in (1.0, 2.0) for blocks in (3, 4)}
        expected |= {("gemma3", None, blocks) for blocks in (3, 4)}
        assert {(m, None if pd.isna(k) else k, b) for m, k, b in points.index} == expected
        assert set(points) == {count}
        rules = found.groupby("model")["moe_renormalization"].agg(lambda rules: set(rules.dropna()))
        assert dict(rules) == {"aria": {"renormalized"}, "gemma3": set()}


def test_the_renormalization_of_combinations(small_results: Path) -> None:
    combinations = pd.read_parquet(small_results / "combinations")
    rules = combinations.groupby("model", observed=True)["moe_renormalization"].agg(lambda rules: set(rules.dropna()))
    assert dict(rules) == {"tiny-qwen3-vl-moe": {"renormalized"}, "tiny-smolvlm": set()}


def test_a_stranger_by_hub_id(folders: dict[str, Path], tmp_path: Path) -> None:
    """From the hub's cache, which is all there is of the hub here; in a process of its own, which reads its place."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--aria"
    shutil.copytree(folders["aria"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = f"""
from PIL import Image
from knobs.vision import VisionSetting
from workers.models import load
answers = []
for place in ("someone/aria", {str(folders["aria"])!r}):
    vlm = load(place, device="cpu")
    inputs = vlm.preprocess([Image.new("RGB", (60, 40), "teal")], "What is it?", VisionSetting())
    with vlm.knobs(moe_top_k=1, active_blocks=[0, 2]):
        answers.append(vlm.answer([(inputs, vlm.encode_images(inputs.vision))], 6))
assert vlm.card.family.name == "generic"
assert answers[0] == answers[1]
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- expert back-ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "aria"])
def test_an_expert_back_end_beside_a_vision_tower_without_experts(tmp_path: Path, name: str) -> None:
    family = ALL[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **family.entries}))
    for experts in ("eager", "grouped_mm"):
        vlm = load(str(tmp_path), weights="random", device="cpu", experts=experts)
        assert vlm.decoder.config._experts_implementation == experts


def test_a_family_whose_experts_have_no_back_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", **ALL["llama4"].entries}))
    models = f"{{name: llama4, checkpoint: {tmp_path}, weights: random}}"
    (source,) = {task.model for task in plan_for(tmp_path, "{}", models).tasks}
    assert (source.experts, source.moe_renormalization) == (None, "not renormalized")
    assert load(str(tmp_path), weights="random", device="cpu").card.moe_top_k == 1
    with pytest.raises(ModelError, match="does not support setting experts implementation"):
        load(str(tmp_path), weights="random", device="cpu", experts="grouped_mm")


# -- what the adapter cannot take apart -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("florence2", "is an encoder-decoder; only decoders that read images as tokens are supported"),
        ("t5gemma2", "is an encoder-decoder; only decoders that read images as tokens are supported"),
        ("git", "has no get_image_features, so its vision tower cannot be run apart from its language model"),
    ],
)
def test_models_without_stages_are_refused(model_type: str, reason: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type))
    with pytest.raises(ValueError, match=reason):
        require_stages(model)


def test_a_stack_that_is_some_levels_down() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("blip-2"))
    require_stages(model)
    assert len(stack_of_blocks(model).layers) == model.config.text_config.num_hidden_layers


def test_the_reason_is_that_of_loading(tmp_path: Path) -> None:
    text = {**BASE, "cross_attention_layers": [3]}
    vision = {**VISION, "num_global_layers": 1, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    entries = {
        "text_config": text,
        "vision_config": {**vision, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama", **entries}))
    expected = (
        f"{tmp_path} cannot be loaded: MllamaForConditionalGeneration has no get_image_features, so its vision tower "
        "cannot be run apart from its language model"
    )
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path), weights="random", device="cpu")
    assert str(caught.value) == expected


def test_the_page_on_families_names_what_a_family_must_supply() -> None:
    page = (PROJECT / "docs" / "adding-a-family.md").read_text()
    assert {name for name in Family.__abstractmethods__ if f"def {name}(" not in page} == set()

"""Checkpoints in folders load bit-equal to what was saved, and what is wrong with one is said in one clear line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from checkpoints import chat_template, save, save_llava, save_preprocessor
from tiny import NATIVE, TINY, encoded, generated, logits, picture, settings_of, tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText

from knobs.errors import KnobError
from knobs.vision import VisionSetting
from workers.errors import ModelError, SampleError
from workers.measure import time_answer
from workers.models import REGISTERED, describe, load, loading, registry
from workers.models.adapter import VisionLanguageModel
from workers.models.byte_tokenizer import byte_tokenizer
from workers.models.loading import load_source
from workers.models.molmoe.checkpoint import save_published
from workers.tasks import ModelSource

PROJECT = Path(__file__).resolve().parents[1]
QUESTION = "What is in the picture?"

# Parameters of the published checkpoints, in millions.
PUBLISHED = {
    "smolvlm2-256m": 256.48,
    "smolvlm2-500m": 507.48,
    "smolvlm2-2.2b": 2246.78,
    "internvl3-1b": 938.19,
    "internvl3-2b": 2088.96,
    "internvl3-8b": 7944.37,
    "qwen3-vl-30b-a3b": 31070.75,
    "molmoe-1b": 7221.88,
}
# Families that write the prompt as the tokenizer's template says; Molmo's prompt is fixed.
TEMPLATED = [name for name in TINY if name != "tiny-molmoe"]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model as a folder; read only, copy before damaging."""
    return {name: save(tiny_model(name), tmp_path_factory.mktemp("published") / name) for name in TINY}


@pytest.fixture
def damaged(published: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint to do harm to."""
    return shutil.copytree(published["tiny-smolvlm"], tmp_path / "checkpoint")


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def refusal(place: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(place), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_inputs(a: VisionLanguageModel, b: VisionLanguageModel, setting: VisionSetting = NATIVE) -> None:
    image = picture(70, 110)
    first, second = (vlm.preprocess([image], QUESTION, setting) for vlm in (a, b))
    torch.testing.assert_close(first.prompt, second.prompt, rtol=0, atol=0)
    torch.testing.assert_close(first.vision, second.vision, rtol=0, atol=0)
    assert first.num_crops == second.num_crops


# -- what loads -------------------------------------------------------------------------------------------------------


def test_a_folder_loads_what_was_saved(vlm: VisionLanguageModel, published: dict[str, Path]) -> None:
    loaded = load(str(published[vlm.card.name]), device="cpu")
    assert loaded.model.dtype == torch.float32
    for setting in settings_of(vlm):
        assert_same_inputs(vlm, loaded, setting)
    inputs, features = encoded(vlm, [picture(70, 110)], QUESTION)
    assert torch.equal(logits(loaded, inputs), logits(vlm, inputs))
    assert loaded.answer([(inputs, features)], 8) == vlm.answer([(inputs, features)], 8)
    assert loaded.end_token_ids == vlm.end_token_ids == {259}
    assert loaded.text([55, 56]) == vlm.text([55, 56]) != ""


def test_shards_load_as_one_file_does(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    save(vlm, tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    inputs, _ = encoded(vlm, [picture(70, 110)], QUESTION)
    loaded = load(str(tmp_path), device="cpu")
    assert torch.equal(logits(loaded, inputs), logits(vlm, inputs))
    # Weights left where a shard happens to have them would round differently, and differently for every layout.
    assert {p.data_ptr() % 64 for p in loaded.model.parameters()} == {0}


def test_describe_says_of_a_folder_what_it_says_of_the_name(
    vlm: VisionLanguageModel, published: dict[str, Path]
) -> None:
    card = describe(str(published[vlm.card.name]))
    named = vlm.card
    assert card.family is named.family
    assert (card.num_blocks, card.num_experts, card.moe_top_k) == (named.num_blocks, named.num_experts, named.moe_top_k)
    assert card.geometry == named.geometry
    assert card.fingerprint.startswith("files:")


def test_bfloat16(vlm: VisionLanguageModel, published: dict[str, Path]) -> None:
    loaded = load(str(published[vlm.card.name]), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    inputs, features = encoded(loaded, [picture(70, 110)], QUESTION)
    assert loaded.answer([(inputs, features)], 6) == [generated(loaded, inputs, 6)]


def test_a_folder_without_a_tokenizer_has_no_processor(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    assert loaded.processor is None
    expected = f"{tmp_path} has no tokenizer.json or no preprocessor_config.json, so it takes no images and questions"
    with pytest.raises(ModelError) as caught:
        loaded.preprocess([picture(8, 8)], QUESTION, NATIVE)
    assert str(caught.value) == expected
    with pytest.raises(ModelError) as caught:
        loaded.text([1])
    assert str(caught.value) == expected
    inputs, features = encoded(vlm, [picture(70, 110)], QUESTION)
    with loaded.knobs(active_blocks=[0, 2]), vlm.knobs(active_blocks=[0, 2]):
        assert torch.equal(logits(loaded, inputs), logits(vlm, inputs))
        assert loaded.answer([(inputs, features)], 4) == vlm.answer([(inputs, features)], 4)


@pytest.mark.parametrize("vlm", TEMPLATED, indirect=True)
def test_the_template_of_the_tokenizer_writes_the_prompt(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    processor: Any = vlm.processor
    save(vlm, tmp_path, chat_template=chat_template(template_image(vlm)))
    loaded = load(str(tmp_path), device="cpu")
    images = [picture(20, 20), picture(20, 40)]
    plain = vlm.preprocess(images, QUESTION, NATIVE)
    inputs = loaded.preprocess(images, QUESTION, NATIVE)
    text = processor.tokenizer.decode(inputs.prompt["input_ids"][0])
    assert text.startswith("<|begin|>user: <")
    assert text.endswith(f"{QUESTION}\nassistant:")
    assert inputs.num_vision_tokens == plain.num_vision_tokens
    assert text.count("<|begin|>") == 1
    assert loaded.answer([encoded(loaded, images, QUESTION)], 6) == [generated(loaded, inputs, 6)]


@pytest.mark.parametrize("vlm", TEMPLATED, indirect=True)
def test_the_template_in_a_file_of_its_own(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    template = chat_template(template_image(vlm))
    old, new = tmp_path / "old", tmp_path / "new"
    save(vlm, old)
    (old / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    save(vlm, new, chat_template=template)
    assert_same_inputs(load(str(old), device="cpu"), load(str(new), device="cpu"))


@pytest.mark.parametrize("vlm", TEMPLATED, indirect=True)
def test_a_template_without_a_place_for_the_image(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    save(vlm, tmp_path, chat_template=chat_template(""))
    with pytest.raises(ModelError, match=r"^the chat template leaves 0 places for 1 images$"):
        load(str(tmp_path), device="cpu").preprocess([picture(8, 8)], QUESTION, NATIVE)


def template_image(vlm: VisionLanguageModel) -> str:
    """What published templates write for an image: the image token, with the tokens round it where those are text."""
    processor: Any = vlm.processor
    return str(processor.prompt_image)


def test_the_published_layout_of_molmoe_loads_by_its_folder(tmp_path: Path) -> None:
    vlm = tiny_model("tiny-molmoe")
    for form in ("safetensors", "bin"):
        folder = tmp_path / form
        save_published(vlm.model, folder, format=form)  # type: ignore[arg-type]
        byte_tokenizer(vlm.card.family.special_tokens).save_pretrained(folder)
        save_preprocessor(vlm, folder)
        loaded = load(str(folder), device="cpu")
        assert loaded.card.family.name == "molmoe"
        inputs, _ = encoded(vlm, [picture(300, 420)], QUESTION)
        assert torch.equal(logits(loaded, inputs), logits(vlm, inputs))
        assert_same_inputs(loaded, vlm)
    before = describe(str(folder)).fingerprint
    with (folder / "pytorch_model.bin").open("ab") as file:
        file.write(b"0")
    assert describe(str(folder)).fingerprint != before


def test_random_weights_for_a_folder(published: dict[str, Path]) -> None:
    folder = str(published["tiny-qwen3-vl-moe"])
    one, two = (load(folder, weights="random", device="cpu") for _ in range(2))
    inputs, _ = encoded(one, [picture(70, 110)], QUESTION)
    assert torch.equal(logits(one, inputs), logits(two, inputs))
    assert not torch.equal(logits(one, inputs), logits(tiny_model("tiny-qwen3-vl-moe"), inputs))


def test_random_weights_leave_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load("tiny-internvl", device="cpu")
    assert torch.equal(torch.rand(2), expected)


# -- a family without a file of its own -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


def test_an_unregistered_family_answers_through_the_generic_adapter(llava_folder: Path) -> None:
    loaded = load(str(llava_folder), device="cpu")
    assert loaded.card.family.name == "generic"
    assert (loaded.card.num_blocks, loaded.card.num_experts, loaded.card.geometry.axes) == (4, None, ())
    batch = [encoded(loaded, [picture(60, 90, seed)], QUESTION + " why?" * seed) for seed in (0, 1)]
    inputs = batch[0][0]
    assert inputs.num_vision_tokens == 64
    assert inputs.num_crops is None
    assert int((inputs.prompt["input_ids"] == 258).sum()) == 1, "the template writes the only begin token"
    expected = [generated(loaded, inputs, 8) for inputs, _ in batch]
    assert loaded.answer(batch, 8) == expected
    with loaded.knobs(active_blocks=[1, 3]):
        assert loaded.answer(batch, 8) == [generated(loaded, inputs, 8) for inputs, _ in batch] != expected
    assert loaded.answer(batch, 8) == expected


def test_the_stages_of_an_unregistered_family(llava_folder: Path) -> None:
    timing = time_answer(load(str(llava_folder), device="cpu"), [picture(60, 90)], QUESTION, NATIVE, 3)
    assert min(timing.vision_ms, timing.projector_ms, timing.prefill_ms, *timing.decode_step_ms) > 0


def test_an_unregistered_family_needs_an_image(llava_folder: Path) -> None:
    loaded = load(str(llava_folder), device="cpu")
    with pytest.raises(SampleError, match=r"^there is no image; a question needs at least one$"):
        loaded.preprocess([], QUESTION, NATIVE)


def test_an_unregistered_family_has_native_images_only(llava_folder: Path) -> None:
    loaded = load(str(llava_folder), device="cpu")
    with pytest.raises(KnobError, match=r"^tiles=4: this family has no vision knob tiles$"):
        loaded.preprocess([picture(8, 8)], QUESTION, VisionSetting("tiles", 4))


def test_defaults_that_an_older_configuration_leaves_out(llava_folder: Path, tmp_path: Path) -> None:
    config = json.loads((llava_folder / "config.json").read_text())
    del config["text_config"]["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(str(tmp_path), random_weights=True).num_blocks == 32  # the default of Llama


@pytest.mark.parametrize(
    "parts",
    [
        {
            "processor_class": "LlavaOnevisionProcessor",
            "image_processor": {"image_processor_type": "CLIPImageProcessor"},
        },
        {
            "processor_class": "LlavaOnevisionProcessor",
            "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        },
        {"image_processor": {"image_processor_type": "Lfm2VlImageProcessor"}},
        {"image_processor": {"image_processor_type": "Cohere2VisionImageProcessor"}},
    ],
    ids=["video processor not named", "video processor named", "image processor", "image processor of another model"],
)
def test_a_processor_that_needs_torchvision(llava_folder: Path, tmp_path: Path, parts: dict[str, Any]) -> None:
    assert importlib.util.find_spec("torchvision") is None, "the project does not depend on it"
    folder = shutil.copytree(llava_folder, tmp_path / "video")
    change_json(folder / "processor_config.json", **parts)
    assert refusal(folder) == (
        f"{folder} cannot be loaded: its processor needs torchvision, which is not installed; install the build that "
        f"matches torch {torch.__version__}"
    )


# -- what does not load -----------------------------------------------------------------------------------------------


def test_no_such_folder() -> None:
    assert refusal("./no/such/folder") == "model folder ./no/such/folder does not exist"
    assert refusal("/no/such/folder") == "model folder /no/such/folder does not exist"


def test_an_unknown_name_suggests_the_nearest() -> None:
    names = ", ".join(sorted(REGISTERED))
    expected = f"(registered: {names}; or a folder, or a hub id a/b)"
    assert refusal("smolvlm2-2.2") == f"unknown model 'smolvlm2-2.2', did you mean smolvlm2-2.2b? {expected}"
    assert refusal("zzz") == f"unknown model 'zzz' {expected}"


def test_no_configuration(damaged: Path) -> None:
    (damaged / "config.json").unlink()
    assert refusal(damaged) == f"model folder {damaged} has no config.json, so it is not a checkpoint"


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_broken_json(damaged: Path, file: str) -> None:
    (damaged / file).write_text('{"model_type": ')
    expected = f"{damaged / file} cannot be read as JSON: Expecting value: line 1 column 16 (char 15)"
    assert refusal(damaged) == expected
    (damaged / file).write_text("[]")
    assert refusal(damaged) == f"{damaged / file} is not a JSON object"


def test_a_text_model(damaged: Path) -> None:
    (damaged / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    expected = f"{damaged}: model_type llama is not a vision-language model (no vision_config)"
    assert refusal(damaged) == expected


def test_a_configuration_that_says_too_little(damaged: Path) -> None:
    (damaged / "config.json").write_text("{}")
    assert refusal(damaged) == f"{damaged}: config.json has no model_type"
    (damaged / "config.json").write_text('{"model_type": "smolvlm", "text_config": {"num_hidden_layers": 2}}')
    expected = f"{damaged}: its configuration lacks 'vision_config' that smolvlm needs for images"
    assert refusal(damaged) == expected
    (damaged / "config.json").write_text('{"model_type": "never_heard_of", "vision_config": {}}')
    expected = f"{damaged}: config.json does not say how many blocks the language model has (num_hidden_layers)"
    assert refusal(damaged) == expected


def test_no_safetensors(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    expected = f"model folder {damaged} has no *.safetensors; for random weights write weights: random"
    assert refusal(damaged) == expected


def test_truncated_safetensors(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refusal(damaged)
    start = f"{damaged} cannot be loaded: {damaged} holds a *.safetensors that is damaged, copy or download it again ("
    assert message.startswith(start)


def test_a_missing_shard(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    save(vlm, tmp_path, max_shard_size="2MB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} cannot be loaded: ")
    assert shard.name in message


def test_missing_tensors(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(damaged / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.5." not in name}
    missing = sorted(tensors.keys() - kept.keys())
    assert len(missing) == 9
    save_file(kept, damaged / "model.safetensors", {"format": "pt"})
    expected = f"{damaged}: the checkpoint lacks 9 tensors, e.g. {', '.join(missing[:3])}"
    assert refusal(damaged) == expected


def test_tensors_of_other_shapes(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 320
    (damaged / "config.json").write_text(json.dumps(config))
    assert refusal(damaged).startswith(f"{damaged} cannot be loaded: ")


def test_code_in_a_checkpoint_is_not_run(damaged: Path) -> None:
    proof = damaged.parent / "it ran"
    code = f"open({str(proof)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Processor: pass\n"
    (damaged / "theirs.py").write_text(code)
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"}
    change_json(damaged / "config.json", model_type="their_model", auto_map=auto_map)
    message = refusal(damaged)
    assert message.startswith(f"{damaged} cannot be loaded: ")
    assert "code" in message
    # A known type with code beside it loads without it.
    change_json(damaged / "config.json", model_type="smolvlm", auto_map=auto_map)
    change_json(damaged / "preprocessor_config.json", auto_map={"AutoImageProcessor": "theirs.Processor"})
    change_json(damaged / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Processor", None]})
    assert load(str(damaged), device="cpu").processor is not None
    assert not proof.exists()


def test_an_unknown_attention_back_end() -> None:
    message = refusal("tiny-smolvlm", attention="magic", device="cpu")
    assert message.startswith("tiny-smolvlm cannot be loaded: ")
    assert "magic" in message
    assert "sdpa" in message


def test_an_unknown_expert_back_end() -> None:
    message = refusal("tiny-qwen3-vl-moe", experts="magic", device="cpu")
    assert message.startswith("tiny-qwen3-vl-moe cannot be loaded: ")
    assert "magic" in message


def test_an_unknown_dtype() -> None:
    assert refusal("tiny-smolvlm", dtype="int3") == "dtype 'int3' is not one of float32, bfloat16, float16"


def test_unknown_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is looked up: no hub has a model for a misspelt word."""
    monkeypatch.setattr(loading, "describe", lambda *_, **__: pytest.fail("looked up"))
    assert refusal("tiny-smolvlm", weights="rnd") == "weights 'rnd' is not one of checkpoint, random"


def test_a_checkpoint_of_a_model_that_has_none() -> None:
    expected = "tiny-smolvlm has no checkpoint, it exists with random weights only"
    assert refusal("tiny-smolvlm", weights="checkpoint") == expected


def test_a_hub_model_loads_from_the_cache_of_the_hub_as_from_its_folder(
    published: dict[str, Path], tmp_path: Path
) -> None:
    """Every family by hub id, through the calls that a network would serve, from a cache as its client lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folders = dict(published)
    molmoe = tiny_model("tiny-molmoe")
    folders["published-molmoe"] = tmp_path / "published-molmoe"
    save_published(molmoe.model, folders["published-molmoe"], format="bin")
    byte_tokenizer(molmoe.card.family.special_tokens).save_pretrained(folders["published-molmoe"])
    save_preprocessor(molmoe, folders["published-molmoe"])
    for name, folder in folders.items():
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    code = f"""
from PIL import Image
from knobs.vision import VisionSetting
from workers.models import describe, load
for name, folder in { ({name: str(folder) for name, folder in folders.items()})!r}.items():
    card = describe("someone/" + name)
    assert card.fingerprint == "hub:someone/" + name + "@{commit}", card.fingerprint
    answers = []
    for place in ("someone/" + name, folder):
        vlm = load(place, device="cpu")
        inputs = vlm.preprocess([Image.new("RGB", (60, 40), "teal")], "What is it?", VisionSetting())
        answers.append(vlm.answer([(inputs, vlm.encode_images(inputs.vision))], 6))
    assert answers[0] == answers[1], name
    print("same", name)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    repository_root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"same {name}" for name in folders]


def test_the_hub_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expected = "nobody/nothing is not in the local cache and the Hugging Face hub cannot be reached"
    assert refusal("nobody/nothing") == expected
    expected = "nobody/nothing has no config.json that can be read (offline)"
    with pytest.raises(ModelError) as caught:
        describe("nobody/nothing", offline=True)
    assert str(caught.value) == expected


def test_describing_a_registered_model_offline_needs_nothing() -> None:
    """In a process of its own, for planning must not import torch either."""
    program = (
        "import sys\n"
        "from workers.models import REGISTERED, describe\n"
        "for name in REGISTERED:\n"
        "    card = describe(name, offline=True)\n"
        "    print(name, card.num_blocks, card.fingerprint)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'planning imports no torch'\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(REGISTERED)
    assert "qwen3-vl-30b-a3b 48 hub:Qwen/Qwen3-VL-30B-A3B-Instruct@main" in done.stdout


# -- fingerprints -----------------------------------------------------------------------------------------------------


def source_of(folder: Path, **changes: Any) -> ModelSource:
    card = describe(str(folder))
    settings: dict[str, Any] = {
        "name": "mine",
        "family": card.family.name,
        "place": str(folder),
        "revision": card.fingerprint,
        "weights": "checkpoint",
        "fingerprint": card.fingerprint,
        "dtype": "float32",
        "attention": "sdpa",
        "experts": None,
        "engine": "eager",
    }
    return ModelSource(**{**settings, **changes})


def test_a_fingerprint_survives_moving_and_touching(damaged: Path) -> None:
    before = describe(str(damaged)).fingerprint
    moved = damaged.rename(damaged.parent / "elsewhere")
    for file in moved.iterdir():
        os.utime(file, (1, 1))
    (moved / "README.md").write_text("Notes are not part of the model.")
    assert describe(str(moved)).fingerprint == before


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_fingerprint_changes_with_a_byte(damaged: Path, file: str) -> None:
    before = describe(str(damaged)).fingerprint
    content = bytearray((damaged / file).read_bytes())
    if file.endswith(".json"):
        content += b"\n"
    else:
        content[-1] ^= 1
    (damaged / file).write_bytes(content)
    assert describe(str(damaged)).fingerprint != before


def test_weights_are_read_for_their_digest_once_per_process(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan and every change of model would otherwise read the whole checkpoint again."""
    digest = registry.hashlib.file_digest
    read: list[str] = []

    def counted(file: Any, algorithm: str) -> Any:
        read.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(registry.hashlib, "file_digest", counted)
    source = source_of(damaged)
    assert "model.safetensors" in read
    assert len(read) == len(set(read))
    before = len(read)
    load_source(source, torch.device("cpu"))
    load_source(source, torch.device("cpu"))
    assert len(read) == before

    # The same length, and the time of a copy that keeps times: the content still counts.
    weights = damaged / "model.safetensors"
    times = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match=r"^mine: .* changed since the sweep was planned$"):
        load_source(source, torch.device("cpu"))
    assert read[before:] == ["model.safetensors"]


def test_random_weights_have_the_fingerprint_of_their_configuration(published: dict[str, Path]) -> None:
    prints = {describe(name, random_weights=True).fingerprint for name in REGISTERED}
    assert len(prints) == len(REGISTERED)
    folder = published["tiny-smolvlm"]
    assert describe(str(folder), random_weights=True).fingerprint.startswith("random:0:")


def test_a_worker_refuses_files_that_changed_after_planning(damaged: Path) -> None:
    source = source_of(damaged)
    assert load_source(source, torch.device("cpu")).card.name == "mine"
    change_json(damaged / "config.json", scale_factor=4)
    with pytest.raises(ModelError) as caught:
        load_source(source, torch.device("cpu"))
    assert str(caught.value) == f"mine: the files at {damaged} have changed since the sweep was planned"


def test_a_worker_refuses_another_registered_configuration() -> None:
    card = describe("tiny-internvl")
    source = ModelSource(
        "tiny-internvl", "internvl", "tiny-internvl", None, "random", card.fingerprint, "float32", "sdpa", None, "eager"
    )
    assert load_source(source, torch.device("cpu")).card == card
    changed = ModelSource(
        "tiny-internvl", "internvl", "tiny-internvl", None, "random", "random:0:0", "float32", "sdpa", None, "eager"
    )
    with pytest.raises(ModelError, match=r"^tiny-internvl: .* changed since the sweep was planned$"):
        load_source(changed, torch.device("cpu"))


# -- published sizes --------------------------------------------------------------------------------------------------


def test_every_published_model_is_checked() -> None:
    assert PUBLISHED.keys() == REGISTERED.keys() - set(TINY)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    card = describe(name, random_weights=True)
    config = AutoConfig.for_model(**card.config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.005)
    assert len(model.get_decoder().layers) == card.num_blocks
    text = config.get_text_config(decoder=True)
    assert max(text.eos_token_id, text.pad_token_id, config.image_token_id) < text.vocab_size


def test_published_vision_tokens_per_tile() -> None:
    expected = {
        "smolvlm2-256m": 64,
        "smolvlm2-500m": 64,
        "smolvlm2-2.2b": 81,
        "internvl3-1b": 256,
        "internvl3-2b": 256,
        "internvl3-8b": 256,
    }
    for name, tokens in expected.items():
        geometry: Any = describe(name, random_weights=True).geometry
        assert geometry.tokens_per_tile == tokens, name
    layout = describe("smolvlm2-2.2b", random_weights=True).geometry.layout(384, 384, NATIVE)
    assert layout is not None
    assert (layout.tiling, layout.tower_passes, layout.vision_tokens) == ((4, 4), 17, 1377)

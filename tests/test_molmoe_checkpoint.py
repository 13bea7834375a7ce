"""Published MolmoE weights are read completely or not at all, in every format, and without a second copy in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from workers.errors import ModelError
from workers.models.molmoe import checkpoint
from workers.models.molmoe.checkpoint import is_published, load_published, published_keys, save_published
from workers.models.molmoe.configuration import MolmoEConfig
from workers.models.molmoe.modeling import MolmoEForConditionalGeneration

FOLDER = Path(__file__).parent / "golden" / "molmoe"
GOLDEN = FOLDER / "model"
FORMATS = [("safetensors", None), ("safetensors", 2**20), ("bin", None), ("bin", 2**20)]

# Every matrix of the language model and of the vision tower as published; fewer of them: 1 block of 16, 4 experts of
# 64, 2 layers of 23, and 1024 tokens of 50304.
REAL_WIDTHS = {
    "n_layers": 1,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "embedding_size": 1024,
    "vocab_size": 1000,
    "vision_backbone": {"image_num_layers": 2},
    "vit_layers": [-1, -2],
}


def golden_config() -> MolmoEConfig:
    return MolmoEConfig.from_pretrained(GOLDEN)


def random_state(config: MolmoEConfig) -> dict[str, torch.Tensor]:
    """Random numbers under the published names."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.empty(shape).uniform_(generator=generator) for name, shape in published_keys(config).items()}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all weight files of a folder."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- names and shapes -------------------------------------------------------------------------------------------------


def test_the_published_model_has_these_names_and_shapes() -> None:
    recorded = json.loads((FOLDER / "molmoe_1b_keys.json").read_text())
    keys = published_keys(MolmoEConfig())
    assert {name: list(shape) for name, shape in keys.items()} == recorded
    assert sum(math.prod(shape) for shape in keys.values()) == 7_221_875_712


def test_every_number_of_ours_comes_from_one_published_number() -> None:
    """Parts that overlap or leave a gap would load without complaint and answer nonsense."""
    model = MolmoEForConditionalGeneration(golden_config())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        for parts in checkpoint.published_layout(model.config).values():
            for part in parts:
                part.of(parameters).add_(1)
    assert all(bool((parameter == 1).all()) for parameter in parameters.values())


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "shard"), FORMATS)
def test_the_golden_checkpoint_survives_a_round_trip(tmp_path: Path, format: Any, shard: int | None) -> None:
    model = load_published(GOLDEN, golden_config(), torch.float32)
    save_published(model, tmp_path, format, shard)
    assert len([f for f in tmp_path.iterdir() if f.suffix == f".{format}"]) == (1 if shard is None else 2)
    assert is_published(tmp_path)
    assert same(read(tmp_path), load_file(GOLDEN / "model.safetensors"))
    config = MolmoEConfig.from_pretrained(tmp_path)
    assert same(load_published(tmp_path, config, torch.float32).state_dict(), model.state_dict())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[MolmoEConfig, dict[str, torch.Tensor]]:
    config = MolmoEConfig(**REAL_WIDTHS)
    return config, random_state(config)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_real_widths_load_in_every_format(
    wide: tuple[MolmoEConfig, dict[str, torch.Tensor]], tmp_path: Path, format: str, shards: int
) -> None:
    config, state = wide
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[format]
    names = [name] if shards == 1 else [f"part{i}.{format}" for i in range(shards)]
    index = {key: names[i % shards] for i, key in enumerate(state)}
    for file in names:
        part = {key: state[key] for key in state if index[key] == file}
        save_file(part, tmp_path / file) if format == "safetensors" else torch.save(part, tmp_path / file)
    if shards > 1:
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    model = load_published(tmp_path, config, torch.bfloat16)
    shutil.rmtree(tmp_path)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(buffer.is_meta for buffer in model.buffers())
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    block, theirs = model.get_decoder().layers[0], "model.transformer.blocks.0."
    query, key, value = half[f"{theirs}attn.att_proj.weight"].split(2048)
    assert torch.equal(block.self_attn.q_proj.weight, query)
    assert torch.equal(block.self_attn.k_proj.weight, key)
    assert torch.equal(block.self_attn.v_proj.weight, value)
    assert torch.equal(block.self_attn.o_proj.weight, half[f"{theirs}attn.attn_out.weight"])
    assert torch.equal(block.mlp.experts.gate_up_proj[3, :1024], half[f"{theirs}mlp.experts.3.gate_proj.weight"])
    assert torch.equal(block.mlp.experts.gate_up_proj[3, 1024:], half[f"{theirs}mlp.experts.3.up_proj.weight"])
    assert torch.equal(block.mlp.experts.down_proj[2], half[f"{theirs}mlp.experts.2.down_proj.weight"])
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings[:1024], half["model.transformer.wte.embedding"])
    assert torch.equal(embeddings[1024:], half["model.transformer.wte.new_embedding"])
    assert torch.equal(model.model.multi_modal_projector.pad_embed, half["model.vision_backbone.pad_embed"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state.values())


def test_the_layout_of_the_training_code(tmp_path: Path) -> None:
    published = load_file(GOLDEN / "model.safetensors")
    native: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        if ".experts." not in name:
            for old, new in ((".attn.", "."), (".mlp.ff_norm", ".ff_norm"), (".mlp.gate.", ".ffn.router.layer.")):
                name = name.replace(old, new)
            native["transformer.ff_out.weight" if name == "lm_head.weight" else name.removeprefix("model.")] = tensor
    for i in range(4):
        for new, old, transposed in (("w1", "gate_proj", False), ("v1", "up_proj", False), ("w2", "down_proj", True)):
            experts = [published[f"model.transformer.blocks.{i}.mlp.experts.{e}.{old}.weight"] for e in range(8)]
            stacked = torch.cat([expert.T if transposed else expert for expert in experts])
            native[f"transformer.blocks.{i}.ffn.experts.mlp.{new}"] = stacked
    assert native["transformer.blocks.0.ffn.experts.mlp.w2"].shape == (8 * 32, 64)
    torch.save(native, tmp_path / "pytorch_model.bin")
    assert is_published(tmp_path)
    expected = load_published(GOLDEN, golden_config(), torch.float32).state_dict()
    assert same(load_published(tmp_path, golden_config(), torch.float32).state_dict(), expected)


def test_transformers_own_layout(tmp_path: Path) -> None:
    model = load_published(GOLDEN, golden_config(), torch.float32)
    model.save_pretrained(tmp_path)
    assert not is_published(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, use_safetensors=True)
    assert type(again) is MolmoEForConditionalGeneration
    assert same(again.state_dict(), model.state_dict())


def test_the_configuration_is_left_alone() -> None:
    config = golden_config()
    before = config.to_dict()
    load_published(GOLDEN, config, torch.bfloat16, experts_implementation="eager")
    published_keys(config)
    assert config.to_dict() == before
    assert config._experts_implementation is None


# -- what does not fit ------------------------------------------------------------------------------------------------


def broken(folder: Path, change: Any) -> str:
    """The complaint about the golden checkpoint after `change(state)`."""
    state = load_file(GOLDEN / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_published(folder, golden_config(), torch.float32)
    message = str(caught.value)
    assert message.startswith(f"{folder} does not hold the weights of this MolmoE: ")
    assert "\n" not in message
    return message.split("MolmoE: ")[1]


def test_missing_tensors(tmp_path: Path) -> None:
    gone = [f"model.transformer.blocks.{i}.attn.q_norm.weight" for i in range(4)]
    message = broken(tmp_path, lambda state: [state.pop(name) for name in gone])
    assert message == f"4 missing ({', '.join(gone[:3])}, ...)"


def test_unexpected_tensors(tmp_path: Path) -> None:
    message = broken(tmp_path, lambda state: state.update({"model.extra.weight": torch.zeros(2)}))
    assert message == "1 unexpected (model.extra.weight)"


def test_several_complaints_at_once(tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["head.weight"] = state.pop("lm_head.weight")
        state["model.transformer.ln_f.weight"] = torch.zeros(63)
        state["model.vision_backbone.pad_embed"] = torch.zeros(64, 2)

    assert broken(tmp_path, change) == (
        "1 missing (lm_head.weight); 1 unexpected (head.weight); 2 of another shape "
        "(model.transformer.ln_f.weight is 63, not 64, model.vision_backbone.pad_embed is 64x2, not 2x64)"
    )


def test_weights_of_another_depth(tmp_path: Path) -> None:
    config = MolmoEConfig.from_pretrained(GOLDEN, n_layers=3)
    with pytest.raises(ModelError, match=r": 31 unexpected \(model\.transformer\.blocks\.3\."):
        load_published(GOLDEN, config, torch.float32)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weights \(model\.safetensors or pytorch_model\.bin"):
        load_published(tmp_path, golden_config(), torch.float32)
    assert not is_published(tmp_path)
    save_published(load_published(GOLDEN, golden_config(), torch.float32), tmp_path, "bin", 2**20)
    next(tmp_path.glob("*-00002-of-*.bin")).unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files, e\.g\. pytorch_model-00002-of-00002\.bin"):
        load_published(tmp_path, golden_config(), torch.float32)


def test_a_pickle_that_would_run_a_program_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model.transformer.ln_f.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        load_published(tmp_path, golden_config(), torch.float32)
    assert not (tmp_path / "ran").exists()


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from workers.models.molmoe import checkpoint
from workers.models.molmoe.configuration import MolmoEConfig

torch.set_num_threads(1)

def status(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))

config = MolmoEConfig.from_pretrained(sys.argv[1])
for folder, mapped in ((sys.argv[1], None), (sys.argv[2], None), (sys.argv[2], 2**40)):
    if mapped is not None:
        checkpoint._MAPPED_BYTES = mapped
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    model = checkpoint.load_published(Path(folder), config, torch.bfloat16)
    print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_loading_needs_little_more_memory_than_the_model(tmp_path: Path) -> None:
    """From float32 files of 600 MB to bfloat16, in a process of its own; mapped pages of the files count."""
    config = MolmoEConfig(**REAL_WIDTHS | {"moe_num_experts": 14})
    state = {name: torch.zeros(shape) for name, shape in published_keys(config).items()}
    folders = [tmp_path / "safetensors", tmp_path / "bin"]
    for folder in folders:
        config.save_pretrained(folder)
    save_file(state, folders[0] / "model.safetensors")
    torch.save(state, folders[1] / "pytorch_model.bin")
    source = sum(tensor.nbytes for tensor in state.values())
    del state
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)], capture_output=True, text=True, check=False
    )
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    target = rows[0][1]
    assert 550e6 < source == 2 * target
    bound = 1.35 * target + 300e6
    for growth, _ in rows[:2]:
        assert target < growth < bound
    assert rows[2][0] > bound, "a file mapped as a whole would have been noticed"

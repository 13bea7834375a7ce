"""Published MolmoE weights to our model and back: names, fused and per-expert matrices, one tensor in memory at a time.

A checkpoint is `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index, in the layout of the
published repository or in that of the training code (which is only read). Loading is strict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding

from workers.errors import ModelError
from workers.models.molmoe.configuration import MolmoEConfig
from workers.models.molmoe.modeling import MolmoEForConditionalGeneration

FILES = ("model.safetensors", "pytorch_model.bin")

# A mapped file counts as memory in use once it was read, so it is mapped anew after this many bytes, or after this part
# of a large file: opening one takes a quarter of a second.
_MAPPED_BYTES = 2**28
_MAPPED_PART = 32

_TRANSFORMER = "model.transformer."
_TEXT = "model.language_model."
_BLOCK_NAMES = {
    "attn.attn_norm.weight": "input_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "attn.attn_out.weight": "self_attn.o_proj.weight",
    "mlp.ff_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate.weight",
}


@dataclass(frozen=True)
class Part:
    """A piece of one of our parameters; a published tensor is its parts one below the other.

    Attributes:
        parameter: its name.
        index: which piece; all of it if empty.
        transposed: the published tensor holds it with rows and columns exchanged.
    """

    parameter: str
    index: tuple[int | slice, ...] = ()
    transposed: bool = False

    def of(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A view of the piece that has the orientation of the published tensor."""
        piece = parameters[self.parameter][self.index]
        return piece.mT if self.transposed else piece


Layout = dict[str, tuple[Part, ...]]


def load_published(
    folder: Path, config: MolmoEConfig, dtype: torch.dtype, device: torch.device | str = "cpu", **backends: Any
) -> MolmoEForConditionalGeneration:
    """The model with the weights of a published checkpoint, in evaluation mode.

    Beside the model in its `dtype`, memory holds one tensor of the checkpoint.

    Args:
        backends: `attn_implementation` and `experts_implementation` of transformers.

    Raises:
        ModelError: no weights there, or not exactly those of this configuration.
    """
    # A copy, because a model changes its configuration (dtype, back-ends).
    own = MolmoEConfig.from_dict(config.to_dict())
    model = _on_meta(own, dtype, **backends)
    files = _weight_files(folder)
    parameters = dict(model.named_parameters())
    layout = _fitting_layout(folder, own, parameters, _shapes(files))
    model.to_empty(device=device)
    # Not in any checkpoint: the table of rotary frequencies, which is float32 in a model of every dtype.
    model.model.language_model.rotary_emb = OlmoeRotaryEmbedding(own.get_text_config(decoder=True)).to(device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _tensors(files):
            pieces = [part.of(parameters) for part in layout[name]]
            for piece, values in zip(pieces, torch.split(tensor, [len(p) for p in pieces]), strict=True):
                piece.copy_(values)
    model.eval()
    return model


def is_published(folder: Path) -> bool:
    """Whether a folder holds weights in one of the layouts that `load_published` reads."""
    try:
        names = _shapes(_weight_files(folder)).keys()
    except ModelError:
        return False
    return f"{_TRANSFORMER}ln_f.weight" in names or "transformer.ln_f.weight" in names


def published_keys(config: MolmoEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint of this configuration."""
    own = MolmoEConfig.from_dict(config.to_dict())
    return _layout_shapes(published_layout(own), dict(_on_meta(own, torch.float32).named_parameters()))


def save_published(
    model: MolmoEForConditionalGeneration,
    folder: Path,
    format: Literal["safetensors", "bin"] = "safetensors",
    max_shard_bytes: int | None = None,
) -> None:
    """Write configuration and weights as they are published.

    Args:
        max_shard_bytes: start another file before one would grow beyond this; None writes one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = json.dumps(model.config.published(), indent=1, default=str)
    (folder / "config.json").write_text(entries + "\n", encoding="utf-8")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layout = published_layout(model.config)
    shards = _shards(layout, parameters, max_shard_bytes)
    file = next(name for name in FILES if name.endswith(format))
    names = [file] if len(shards) == 1 else [_shard_name(file, i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: torch.cat([part.of(parameters) for part in layout[key]]).cpu() for key in shard}
        if format == "safetensors":
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / name)
    if len(shards) > 1:
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n")


# -- layouts ----------------------------------------------------------------------------------------------------------


def published_layout(config: MolmoEConfig) -> Layout:
    """Where the tensors of the published repository belong."""
    text = config.get_text_config(decoder=True)
    width = text.intermediate_size
    layout: Layout = {
        f"{_TRANSFORMER}wte.embedding": (Part(f"{_TEXT}embed_tokens.weight", (slice(text.vocab_size),)),),
        f"{_TRANSFORMER}wte.new_embedding": (Part(f"{_TEXT}embed_tokens.weight", (slice(text.vocab_size, None),)),),
        f"{_TRANSFORMER}ln_f.weight": (Part(f"{_TEXT}norm.weight"),),
        "lm_head.weight": (Part("lm_head.weight"),),
    }
    for i in range(text.num_hidden_layers):
        theirs, ours = f"{_TRANSFORMER}blocks.{i}.", f"{_TEXT}layers.{i}."
        layout |= {theirs + name: (Part(ours + own),) for name, own in _BLOCK_NAMES.items()}
        layout[f"{theirs}attn.att_proj.weight"] = tuple(Part(f"{ours}self_attn.{p}_proj.weight") for p in "qkv")
        for e in range(text.num_experts):
            expert, stacked = f"{theirs}mlp.experts.{e}.", f"{ours}mlp.experts."
            layout[f"{expert}gate_proj.weight"] = (Part(f"{stacked}gate_up_proj", (e, slice(width))),)
            layout[f"{expert}up_proj.weight"] = (Part(f"{stacked}gate_up_proj", (e, slice(width, None))),)
            layout[f"{expert}down_proj.weight"] = (Part(f"{stacked}down_proj", (e,)),)
    return layout | _vision_layout(config)


def _vision_layout(config: MolmoEConfig) -> Layout:
    """The vision part, whose modules carry the published names."""
    theirs = "model.vision_backbone."
    places = {"model.vision_tower.": f"{theirs}image_vit.", "model.multi_modal_projector.": theirs}
    names = [name for name, _ in _on_meta(config, torch.float32).named_parameters()]
    return {
        prefix + name.removeprefix(place): (Part(name),)
        for place, prefix in places.items()
        for name in names
        if name.startswith(place)
    }


def _training_layout(config: MolmoEConfig) -> Layout:
    """Where the tensors of a checkpoint of the training code belong: experts stacked, one level less in the blocks."""
    text = config.get_text_config(decoder=True)
    width, experts = text.intermediate_size, range(text.num_experts)
    layout: Layout = {}
    for name, parts in published_layout(config).items():
        if ".mlp.experts." in name:
            continue
        name = name.removeprefix("model.").replace(".attn.", ".").replace(".mlp.ff_norm.", ".ff_norm.")
        name = name.replace(".mlp.gate.", ".ffn.router.layer.").replace("lm_head.", "transformer.ff_out.")
        layout[name] = parts
    for i in range(text.num_hidden_layers):
        theirs, ours = f"transformer.blocks.{i}.ffn.experts.mlp.", f"{_TEXT}layers.{i}.mlp.experts."
        layout[f"{theirs}w1"] = tuple(Part(f"{ours}gate_up_proj", (e, slice(width))) for e in experts)
        layout[f"{theirs}v1"] = tuple(Part(f"{ours}gate_up_proj", (e, slice(width, None))) for e in experts)
        layout[f"{theirs}w2"] = tuple(Part(f"{ours}down_proj", (e,), transposed=True) for e in experts)
    return layout


def _layout_shapes(layout: Layout, parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parts in layout.items():
        pieces = [part.of(parameters) for part in parts]
        shapes[name] = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
    return shapes


def _on_meta(config: MolmoEConfig, dtype: torch.dtype, **backends: Any) -> MolmoEForConditionalGeneration:
    with torch.device("meta"):
        model: MolmoEForConditionalGeneration = MolmoEForConditionalGeneration._from_config(
            config, dtype=dtype, **backends
        )
    return model


def _fitting_layout(
    folder: Path,
    config: MolmoEConfig,
    parameters: Mapping[str, torch.Tensor],
    found: Mapping[str, tuple[int, ...]],
) -> Layout:
    """The layout that the names are in, after a check that they are all there, no others, and of the right shapes."""
    layout = _training_layout(config) if "transformer.ln_f.weight" in found else published_layout(config)
    expected = _layout_shapes(layout, parameters)
    different = [
        f"{name} is {_times(found[name])}, not {_times(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    complaints = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unexpected", [name for name in found if name not in expected]),
            ("of another shape", different),
        )
        if names
    ]
    if complaints:
        raise ModelError(f"{folder} does not hold the weights of this MolmoE: {'; '.join(complaints)}")
    return layout


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# -- files ------------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    for name in FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if absent := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ModelError(f"{folder} lacks {len(absent)} of {len(shards)} weight files, e.g. {absent[0]}")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    raise ModelError(f"{folder} has no weights ({' or '.join(FILES)}, whole or with an index)")


def _opened(file: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    """The names in a file and a function that gives their tensors, mapped while that function lives."""
    if file.suffix == ".safetensors":
        mapped: Any = safe_open(file, framework="pt")
        return list(mapped.keys()), mapped.get_tensor
    # weights_only: a checkpoint must not run a stranger's program.
    state = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    return list(state), state.__getitem__


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        names, tensor = _opened(file)
        shapes |= {name: tuple(tensor(name).shape) for name in names}
    return shapes


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint; one must not be kept when the next is asked for."""
    for file in files:
        names, tensor = _opened(file)
        most = max(_MAPPED_BYTES, file.stat().st_size // _MAPPED_PART)
        read = 0
        for name in names:
            if read > most:
                del tensor
                _, tensor = _opened(file)
                read = 0
            values = tensor(name)
            read += values.nbytes
            yield name, values
            del values


def _shards(layout: Layout, parameters: Mapping[str, torch.Tensor], max_bytes: int | None) -> list[list[str]]:
    """Names in groups whose tensors stay below `max_bytes` together, if they do alone."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, parts in layout.items():
        nbytes = sum(part.of(parameters).nbytes for part in parts)
        if max_bytes is not None and groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def _shard_name(file: str, i: int, count: int) -> str:
    stem, suffix = file.rsplit(".", 1)
    return f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}"

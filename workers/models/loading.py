"""Building a model: weights from safetensors through `from_pretrained`, or random ones at the real size."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from workers.errors import ModelError
from workers.models import generic
from workers.models.adapter import VisionLanguageModel
from workers.models.byte_tokenizer import byte_tokenizer
from workers.models.capture import capture_on
from workers.models.engines import ENGINES
from workers.models.family import Config
from workers.models.graph_engine import GraphEngine
from workers.models.processing import Processor
from workers.models.registry import (
    RANDOM_SEED,
    ModelCard,
    describe,
    read_preprocessor,
)
from workers.models.requirements import stack_of_blocks
from workers.tasks import ModelSource

WEIGHTS = ("checkpoint", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_folder: str,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    attention: str = "sdpa",
    experts: str | None = None,
    engine: str = "eager",
    revision: str | None = None,
) -> VisionLanguageModel:
    """Load a model for use from Python.

    Args:
        name_or_folder: registered name, checkpoint folder, or hub id.
        weights: `checkpoint` or `random`; random where a registered model has no checkpoint.
        dtype: float32, bfloat16 or float16; bfloat16 on a GPU and float32 on a CPU if None.
        device: a torch device; the first GPU, else the CPU, if None.
        attention: attention back-end of transformers.
        experts: expert back-end of transformers; its default if None.
        engine: `eager`, or `graph` for decode steps that are captured once and replayed; where that cannot be, it warns
            and decodes eagerly.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: no such model, or it cannot be loaded; one line with the place and the remedy.
    """
    where = torch.device(device) if device is not None else default_device()
    dtype = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if weights is not None and weights not in WEIGHTS:
        raise ModelError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    if engine not in ENGINES:
        raise ModelError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    card = describe(name_or_folder, revision=revision, random_weights=weights == "random")
    if weights == "checkpoint" and default_weights(card) == "random":
        raise ModelError(f"{name_or_folder} has no checkpoint, it exists with random weights only")
    return build(card, weights or default_weights(card), DTYPES[dtype], where, attention, experts, engine)


def load_source(source: ModelSource, device: torch.device) -> VisionLanguageModel:
    """Load exactly what a plan named.

    Raises:
        ModelError: it cannot be loaded, or its files are no longer those the plan fingerprinted.
    """
    card = describe(
        source.name, checkpoint=source.place, revision=source.revision, random_weights=source.weights == "random"
    )
    if card.fingerprint != source.fingerprint:
        raise ModelError(f"{source.name}: the files at {source.place} have changed since the sweep was planned")
    return build(card, source.weights, DTYPES[source.dtype], device, source.attention, source.experts, source.engine)


def default_weights(card: ModelCard) -> str:
    """`random` where there is nothing else."""
    return "random" if card.fingerprint.startswith("random:") else "checkpoint"


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def build(
    card: ModelCard,
    weights: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    experts: str | None,
    engine: str = "eager",
) -> VisionLanguageModel:
    """The model in evaluation mode on its device, with its processor if it has a tokenizer.

    Raises:
        ModelError: it cannot be loaded, or does not fit into the memory of the device: no task can use it.
    """
    backends: dict[str, Any] = {"attn_implementation": attention}
    try:
        model = (
            _random(card, dtype, device, backends)
            if weights == "random"
            else _from_checkpoint(card, dtype, device, backends)
        )
        model.eval().requires_grad_(False)
        if card.routing is not None and experts is not None:
            _run_experts_by(model, experts)
        vlm = VisionLanguageModel(model, _processor(card, model), card, device)
        if engine == "graph":
            vlm.engine = GraphEngine(model, vlm.decoder, capture_on(device))
        return vlm
    except (ModelError, torch.AcceleratorError):
        raise  # a device that is dead is not the checkpoint's fault
    except SafetensorError as error:
        raise ModelError(
            f"{card.name} cannot be loaded: {_place(card)} holds a *.safetensors that is damaged, copy or download it "
            f"again ({_first_line(error)})"
        ) from error
    except Exception as error:  # transformers raises whatever it meets for a broken or foreign checkpoint
        if is_out_of_memory(error):
            raise ModelError(f"{card.name} does not fit: {_first_line(error)}") from error
        raise ModelError(f"{card.name} cannot be loaded: {_first_line(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host."""
    # Main memory: torch has no type of its own for it.
    on_the_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_the_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _random(card: ModelCard, dtype: torch.dtype, device: torch.device, backends: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    card.family.register_classes()
    config = AutoConfig.for_model(**card.config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **backends)
    model = model.to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(RANDOM_SEED)
        model.init_weights()
    model.generation_config.pad_token_id = config.get_text_config(decoder=True).pad_token_id
    model.generation_config.eos_token_id = config.get_text_config(decoder=True).eos_token_id
    return model


def _from_checkpoint(card: ModelCard, dtype: torch.dtype, device: torch.device, backends: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    card.family.register_classes()
    if card.family.own_weight_layout:
        own = card.family.load_weights(_local_folder(card), dtype, device, backends)
        if own is not None:
            return own
    # Only safetensors, never code from the checkpoint: loading a model must not run a stranger's program.
    model, report = AutoModelForImageTextToText.from_pretrained(
        _place(card),
        revision=card.checkpoint.revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **backends,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{card.name}: the checkpoint lacks {len(missing)} tensors, e.g. {', '.join(missing[:3])}")
    if device.type == "cpu":
        _leave_the_file(model)
    return model.to(device)


def _run_experts_by(model: Any, experts: str) -> None:
    """Choose the expert back-end: not while loading, where a vision tower without experts would refuse it."""
    of_whole = model._can_set_experts_implementation()
    (model if of_whole else stack_of_blocks(model)).set_experts_implementation(experts)


def _local_folder(card: ModelCard) -> Path:
    """The folder of a checkpoint, downloaded if it is on the hub."""
    if card.checkpoint.folder is not None:
        return card.checkpoint.folder
    from huggingface_hub import snapshot_download

    wanted = [f"*{suffix}" for suffix in (*card.family.weight_suffixes, ".json", ".jinja", ".txt", ".model")]
    return Path(
        snapshot_download(str(card.checkpoint.hub_id), revision=card.checkpoint.revision, allow_patterns=wanted)
    )


def _leave_the_file(model: Any) -> None:
    """Copy weights that are mapped from a file into memory of their own.

    A mapped weight is read from disk when it is first used, which may be in a timed region, and lies where the file
    has it: unaligned, kernels round differently, and one model in two files would give two answers.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _place(card: ModelCard) -> str:
    return str(card.checkpoint.folder or card.checkpoint.hub_id)


def _processor(card: ModelCard, model: Any) -> Processor | None:
    if card.checkpoint.folder is None and card.checkpoint.hub_id is None:
        return card.family.processor(byte_tokenizer(card.family.special_tokens), card.config, card.preprocessor)
    preprocessor = _checkpoint_preprocessor(card)
    tokenizer = _tokenizer(card)
    if tokenizer is None or not (preprocessor or card.family is generic.FAMILY):
        return None
    if card.family is generic.FAMILY:
        return card.family.processor(_whole_processor(card), model.config.to_dict(), {})
    return card.family.processor(tokenizer, model.config.to_dict(), preprocessor)


def _checkpoint_preprocessor(card: ModelCard) -> Config:
    """The checkpoint's own preprocessing, which decides; what is registered only served the plan."""
    if card.checkpoint.folder is not None:
        return card.preprocessor
    return read_preprocessor(card.checkpoint) or card.preprocessor


def _tokenizer(card: ModelCard) -> Any:
    from transformers import AutoTokenizer

    folder = card.checkpoint.folder
    if folder is not None and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(
        _place(card), revision=card.checkpoint.revision, trust_remote_code=False, padding_side="left"
    )
    if tokenizer.chat_template is None and folder is not None and (folder / "chat_template.json").is_file():
        # Checkpoints of a certain age keep the template of the whole processor in a file of its own.
        tokenizer.chat_template = json.loads(Path(folder / "chat_template.json").read_text())["chat_template"]
    return tokenizer


def _whole_processor(card: ModelCard) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(_place(card), revision=card.checkpoint.revision, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        # Without torchvision, transformers finds no video processor, and some image processors neither.
        words = str(error).lower()
        if find_spec("torchvision") is None and ("torchvision" in words or "video processor" in words):
            raise ModelError(
                f"{card.name} cannot be loaded: its processor needs torchvision, which is not installed; install the "
                f"build that matches torch {torch.__version__}"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Writes tiny models to folders the way published checkpoints are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import sharpen
from transformers import (
    AriaImageProcessorPil,
    AriaProcessor,
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from workers.models.adapter import VisionLanguageModel
from workers.models.byte_tokenizer import byte_tokenizer, token_ids

# The class that published checkpoints of a family name in their preprocessor_config.json.
IMAGE_PROCESSORS: dict[str, Any] = {
    "smolvlm": SmolVLMImageProcessorPil,
    "internvl": GotOcr2ImageProcessorPil,
    "qwen3_vl_moe": Qwen2VLImageProcessorPil,
}

SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SMALL_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 257,
    "bos_token_id": 258,
    "eos_token_id": 259,
}


def save(vlm: VisionLanguageModel, folder: Path, max_shard_size: str = "5GB", chat_template: str | None = None) -> Path:
    """Model, tokenizer and image processor of a tiny model."""
    vlm.model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer = byte_tokenizer(vlm.card.family.special_tokens)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    save_preprocessor(vlm, folder)
    return folder


def save_preprocessor(vlm: VisionLanguageModel, folder: Path) -> None:
    """preprocessor_config.json, as the family's own class writes it where there is one."""
    made_by = IMAGE_PROCESSORS.get(vlm.card.family.name)
    if made_by is not None:
        made_by(**vlm.card.preprocessor).save_pretrained(folder)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(vlm.card.preprocessor)))


def save_llava(folder: Path) -> torch.nn.Module:
    """A LLaVA, which no file of `workers.models` knows, with a processor that needs no torchvision."""
    tokenizer = byte_tokenizer(("<image>",))
    config = AutoConfig.for_model(
        "llava",
        image_token_index=token_ids(("<image>",))["<image>"],
        image_seq_length=64,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 257,
            "bos_token_id": 258,
            "eos_token_id": 259,
        },
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    sharpen(model)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    ).save_pretrained(folder)
    return model


def save_aria(folder: Path) -> None:
    """An Aria, whose mixture of experts and processor no file of `workers.models` knows."""
    image = {"image_token": "<|img|>"}
    config = AutoConfig.for_model(
        "aria",
        image_token_index=token_ids(tuple(image.values()))["<|img|>"],
        projector_patch_to_query_dict={784: 8},  # 28 x 28 patches become 8 vision tokens
        vision_config={**SMALL_VISION, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 35},
        text_config={**SMALL_TEXT, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    )
    save_sharpened(config, folder)
    AriaProcessor(
        AriaImageProcessorPil(),
        tokenizer_with(image),
        size_conversion={980: 8},
        chat_template=chat_template("<|img|>"),
    ).save_pretrained(folder)


def save_gemma3(folder: Path) -> None:
    """A Gemma 3, whose sliding attention and image masks no file of `workers.models` knows."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    ids = token_ids(tuple(named.values()))
    config = AutoConfig.for_model(
        "gemma3",
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        vision_config={**SMALL_VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        text_config={
            **SMALL_TEXT,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    )
    save_sharpened(config, folder)
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, do_pan_and_scan=False),
        tokenizer_with(named),
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    ).save_pretrained(folder)


def tokenizer_with(named: dict[str, str]) -> Any:
    """The byte tokenizer with special tokens under the names by which a processor asks for them."""
    tokenizer = byte_tokenizer(tuple(named.values()))
    tokenizer._set_model_specific_special_tokens(named)
    tokenizer.init_kwargs["extra_special_tokens"] = named
    return tokenizer


def save_sharpened(config: Any, folder: Path) -> None:
    """Weights of a size at which every block and expert counts."""
    model = AutoModelForImageTextToText.from_config(config).eval()
    sharpen(model)
    model.save_pretrained(folder)


def chat_template(image_token: str) -> str:
    """A small template in the manner of published ones: images where the turn has them, then the cue to answer."""
    return (
        "{% for message in messages %}<|begin|>{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image_token + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )

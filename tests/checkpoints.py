"""Writes tiny models to folders the way published checkpoints are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import sharpen
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
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


def chat_template(image_token: str) -> str:
    """A small template in the manner of published ones: images where the turn has them, then the cue to answer."""
    return (
        "{% for message in messages %}<|begin|>{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image_token + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )

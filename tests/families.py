"""Tiny models of many families of transformers, and what the same model would be with fewer blocks or another top-k."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from workers.models.requirements import stack_of_blocks

BLOCKS = 6
WIDTH = 32
# Lists of indices, not of one entry per block.
INDEX_LISTS = ("full_attn_idxs", "moe_layers")

BASE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NARROW = {**BASE, "head_dim": 8}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
GROUPED = {**ROUTED, "n_group": 4, "topk_group": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 3
SLIDING = {"sliding_window": 8, "layer_types": ALTERNATING}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"] * 3,
}
CONVOLUTION = {
    "layer_types": ["conv", "full_attention"] * 3,
    "full_attn_idxs": [1, 3, 5],
    "block_ff_dim": 64,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": WIDTH,
}


@dataclass(frozen=True)
class TinyFamily:
    """A tiny model of one family, with weights of a size at which every block and expert counts.

    Attributes:
        model_type: of the whole model, as transformers names it.
        entries: of the configuration; of a vision-language model, the language model's are under `text_config`.
        keeps: block lists that it can run.
    """

    model_type: str
    entries: dict[str, Any]
    keeps: tuple[tuple[int, ...], ...] = ((0, 1, 3, 5), (1, 2, 4, 5), (2, 3))

    def build(self, **changes: Any) -> Any:
        """The model in evaluation mode, with these entries of its language model changed; equal for equal shapes."""
        entries = copy.deepcopy(self.entries)
        entries.get("text_config", entries).update(changes)
        config = AutoConfig.for_model(self.model_type, **entries)
        has_vision = "vision_config" in entries or "vq_config" in entries
        kind = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # Scales of whole experts stay one: weights of experts are added up in the tests.
                deviation = 0.0 if name.endswith("per_expert_scale") else 0.3
                parameter.copy_(noise * deviation + ("norm" in name or not deviation))
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        return model

    def shorter(self, full: Any, keep: Sequence[int]) -> Any:
        """A model that never had the other blocks, with the weights of those it has."""
        text = self.entries.get("text_config", self.entries)
        changes: dict[str, Any] = {"num_hidden_layers": len(keep)}
        for name, value in text.items():
            if name in INDEX_LISTS:
                changes[name] = [new for new, old in enumerate(keep) if old in value]
            elif name == "kv_source_layers":
                changes[name] = [keep.index(value[old]) for old in keep]
            elif isinstance(value, list) and len(value) == BLOCKS:
                changes[name] = [value[old] for old in keep]
        if shared := text.get("num_kv_shared_layers"):
            changes["num_kv_shared_layers"] = sum(old >= BLOCKS - shared for old in keep)
        model = self.build(**changes)
        prefix = next(n for n, m in full.named_modules() if m is stack_of_blocks(full)) + ".layers."
        weights, taken = full.state_dict(), {}
        for name, made in model.state_dict().items():
            old_name = name
            if name.startswith(prefix):
                index, rest = name.removeprefix(prefix).split(".", 1)
                old_name = f"{prefix}{keep[int(index)]}.{rest}"
            taken[name] = _parts_of(weights[old_name], made, keep)
        model.load_state_dict(taken)
        return model


def _parts_of(weight: torch.Tensor, made: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
    """A weight of the whole model; of one that packs a part per block, the parts of those that are kept."""
    if weight.shape == made.shape:
        return weight
    axis = next(axis for axis in range(weight.ndim) if weight.shape[axis] != made.shape[axis])
    parts = weight.chunk(BLOCKS, dim=axis)
    return torch.cat([parts[block] for block in keep], dim=axis)


# -- language models --------------------------------------------------------------------------------------------------

LANGUAGE_MODELS: tuple[TinyFamily, ...] = (
    TinyFamily("llama", BASE),
    TinyFamily("qwen2", {**BASE, **SLIDING, "use_sliding_window": True}),
    TinyFamily("gemma3_text", {**NARROW, **SLIDING}),
    TinyFamily("lfm2", {**BASE, **CONVOLUTION}, ((0, 1, 3, 5), (1, 2, 4, 5), (1, 3, 5))),
    TinyFamily("olmoe", {**BASE, **EXPERTS, "intermediate_size": 16}),
    TinyFamily("qwen2_moe", {**BASE, **EXPERTS, "shared_expert_intermediate_size": 16}),
    TinyFamily("qwen3_moe", {**NARROW, **EXPERTS}),
    TinyFamily("mixtral", {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    TinyFamily("gpt_oss", {**NARROW, **SLIDING, "num_local_experts": 8, "num_experts_per_tok": 2}),
    TinyFamily("granitemoe", {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    TinyFamily("deepseek_v2", {**BASE, **LATENT, **ROUTED, "topk_method": "greedy", "n_group": 4, "topk_group": 2}),
    TinyFamily("deepseek_v3", {**BASE, **LATENT, **GROUPED}),
    TinyFamily("qwen3_next", {**NARROW, **EXPERTS, **LINEAR}, ((0, 1, 3, 5), (1, 2, 4, 5), (2, 3))),
    TinyFamily(
        "nemotron_h",
        {
            **NARROW,
            **ROUTED,
            "layer_types": ["linear_attention", "full_attention", "moe", "mlp", "full_attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 16,
        },
        ((0, 1, 2, 5), (1, 3, 5), (0, 4)),
    ),
    TinyFamily(
        "ernie4_5_moe",
        {**BASE, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    ),
    TinyFamily("jetmoe", {**BASE, "kv_channels": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    TinyFamily("phimoe", {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    # Of the last two blocks each reads the keys and values of the last block of its kind before them.
    TinyFamily(
        "gemma3n_text",
        {
            **NARROW,
            **SLIDING,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * BLOCKS,
        },
        ((0, 2, 3, 4, 5), (1, 2, 4), (0, 1, 2, 3)),
    ),
)

# -- vision-language models -------------------------------------------------------------------------------------------


def _vlm(
    model_type: str,
    text: dict[str, Any],
    keeps: tuple[tuple[int, ...], ...] = ((0, 1, 3, 5), (1, 2, 4, 5), (2, 3)),
    vision: dict[str, Any] | None = None,
    **entries: Any,
) -> TinyFamily:
    own_vision = VISION if vision is None else vision
    return TinyFamily(model_type, {"text_config": text, "vision_config": own_vision, **entries}, keeps)


VISION_LANGUAGE_MODELS: tuple[TinyFamily, ...] = (
    _vlm("llava_onevision", {"model_type": "qwen2", **BASE}, vision={"model_type": "siglip_vision_model", **VISION}),
    _vlm(
        "llava",
        {"model_type": "mixtral", **BASE, "num_local_experts": 8, "num_experts_per_tok": 2},
        vision={"model_type": "clip_vision_model", **VISION},
    ),
    _vlm(
        "paligemma",
        {"model_type": "gemma", **NARROW},
        vision={"model_type": "siglip_vision_model", **VISION, "projection_dim": WIDTH},
    ),
    TinyFamily(
        "chameleon",
        {
            **BASE,
            "vocabulary_map": {"<image>": 4},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "resolution": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
        },
    ),
    _vlm("gemma3", {**NARROW, **SLIDING}, vision={"model_type": "siglip_vision_model", **VISION}),
    _vlm("qwen2_5_vl", {**BASE, **MROPE}, vision=QWEN_VISION),
    _vlm("qwen3_5_moe", {**NARROW, **EXPERTS, **LINEAR}, vision=QWEN_VISION),
    _vlm("aria", {**BASE, "moe_num_experts": 8, "moe_topk": 2, "intermediate_size": 16}),
    _vlm(
        "glm4v_moe",
        {**BASE, **GROUPED, "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        vision=QWEN_VISION,
    ),
    _vlm(
        "ernie4_5_vl_moe",
        {
            **BASE,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
            "mlp_layer_types": ["sparse"] * BLOCKS,
            "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]},
        },
        vision=QWEN_VISION,
    ),
    _vlm("kimi_k25", {"model_type": "deepseek_v3", **BASE, **LATENT, **GROUPED}),
    _vlm(
        "gemma4",
        {
            **NARROW,
            **SLIDING,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "enable_moe_block": True,
            "num_kv_shared_layers": 2,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
        },
        ((0, 2, 3, 4, 5), (2, 3, 5), (0, 1, 2, 3)),
    ),
    _vlm("minimax_m3_vl", {**NARROW, "num_local_experts": 8, "num_experts_per_tok": 2}, projector_hidden_size=WIDTH),
    _vlm(
        "llama4",
        {
            **NARROW,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
            "moe_layers": list(range(BLOCKS)),
            "layer_types": ["chunked_attention", "full_attention"] * 3,
            "no_rope_layers": [1, 0] * 3,
        },
        vision={**VISION, "vision_output_dim": WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH},
    ),
    _vlm(
        "lfm2_vl",
        {"model_type": "lfm2", **BASE, **CONVOLUTION},
        ((0, 1, 3, 5), (1, 2, 4, 5), (1, 3, 5)),
        vision={"model_type": "siglip2_vision_model", **VISION},
    ),
    _vlm(
        "mistral_large4",
        {
            **BASE,
            **LATENT,
            **ROUTED,
            "kv_source_layers": [0, 1, 0, 1, 4, 5],
            "indexer_types": ["full", "full", "shared", "full", "full", "shared"],
            "no_rope_layers": [1, 0, 1, 0, 1, 1],
            "mlp_layer_types": ["sparse"] * BLOCKS,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 16,
        },
        ((0, 1, 3), (0, 1, 2, 4), (0, 4, 5)),
    ),
    _vlm(
        "glm5_next",
        {
            **BASE,
            **LATENT,
            **ROUTED,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"] * 3,
            "indexer_types": ["full"] * BLOCKS,
            "mlp_layer_types": ["dense", "sparse"] * 3,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 16,
        },
        vision=QWEN_VISION,
    ),
    # Its vision tower has experts of its own.
    _vlm(
        "dots3_note",
        {
            **BASE,
            **LATENT,
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["indexed_attention", "sliding_attention"] * 3,
            "mlp_layer_types": ["sparse"] * BLOCKS,
            "shared_experts_intermediate_size": 16,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_topk": 16,
            "per_layer_config": {},
        },
        vision={
            **VISION,
            "num_hidden_layers": 2,
            "adapter_in_dim": WIDTH,
            "adapter_out_dim": WIDTH,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "per_layer_config": {},
        },
        audio_config={
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "adapter_input_size": WIDTH,
            "adapter_out_dim": WIDTH,
            "downsample_hidden_size": 8,
        },
    ),
)

ALL: dict[str, TinyFamily] = {family.model_type: family for family in (*LANGUAGE_MODELS, *VISION_LANGUAGE_MODELS)}

"""Numbers of the published MolmoE that its config.json leaves out, and what transformers calls those it gives."""

from __future__ import annotations

from typing import Any

# The 24-layer CLIP ViT-L/14 at 336 pixels without its last layer; config.json leaves the entry out where it is this.
PUBLISHED_VISION: dict[str, Any] = {
    "image_model_type": "openai",
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_num_pos": 577,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_key_value_heads": 16,
    "image_head_dim": 64,
    "image_num_layers": 23,
    "image_mlp_dim": 4096,
    "image_mlp_activations": "quick_gelu",
    "image_norm_eps": 1e-5,
}

# Published key and its name in the text configuration, where the value is the same.
TEXT_NAMES = {
    "embedding_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "moe_num_experts": "num_experts",
    "moe_top_k": "num_experts_per_tok",
    "layer_norm_eps": "rms_norm_eps",
    "clip_qkv": "clip_qkv",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}

# The normalisation of OpenAI's CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

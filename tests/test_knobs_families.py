"""Width and depth on decoders of many kinds: dense, mixtures of experts, sliding, linear and convolutional hybrids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from knobs.blocks import active_blocks
from knobs.experts import experts_per_token

BLOCKS = 6
BASE: dict[str, Any] = {
    "hidden_size": 32,
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
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"] * 3,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "olmoe": {**BASE, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "qwen2_moe": {**BASE, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**BASE, **EXPERTS, "head_dim": 8},
    "mixtral": {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {**BASE, **SLIDING, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**BASE, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**BASE, **LATENT, "num_local_experts": 8},
    "qwen3_next": {**BASE, **EXPERTS, **LINEAR, "head_dim": 8},
    "ernie4_5_moe": {
        **BASE,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
}
DECODERS: dict[str, dict[str, Any]] = {
    **{name: MIXTURES[name] for name in ("olmoe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "granitemoe")},
    "llama": BASE,
    "qwen2": {**BASE, **SLIDING, "use_sliding_window": True},
    "gemma3_text": {**BASE, **SLIDING, "head_dim": 8},
    "lfm2": {
        **BASE,
        "layer_types": ["conv", "full_attention"] * 3,
        "full_attn_idxs": [1, 3, 5],
        "block_ff_dim": 64,
    },
}
# Each keeps an attention block: the cache of a hybrid asks one how long it is.
KEEPS = ([0, 1, 3, 5], [1, 2, 4, 5], [2, 3], [1, 3, 5])


def built(family: str, entries: dict[str, Any]) -> Any:
    """A tiny decoder with weights of a size at which every block and expert counts."""
    config = AutoConfig.for_model(family, **copy.deepcopy(entries))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name))
    return model


def smaller(family: str, entries: dict[str, Any], full: Any, keep: Sequence[int]) -> Any:
    """A model that never had the other blocks, with the weights of those it has."""
    shorter = {**entries, "num_hidden_layers": len(keep)}
    if "layer_types" in entries:
        shorter["layer_types"] = [entries["layer_types"][i] for i in keep]
    if "full_attn_idxs" in entries:
        shorter["full_attn_idxs"] = [new for new, old in enumerate(keep) if old in entries["full_attn_idxs"]]
    model, weights, prefix = built(family, shorter), full.state_dict(), "model.layers."
    taken = {}
    for name in model.state_dict():
        old = name
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            old = f"{prefix}{keep[int(index)]}.{rest}"
        taken[name] = weights[old]
    model.load_state_dict(taken)
    return model


@torch.inference_mode()
def answered(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and their logits for a left-padded batch, past the length of a sliding window."""
    ids = torch.randint(9, 128, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7], ids[0, :7] = 0, 0
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, 24:], torch.stack(out.logits)


@pytest.mark.parametrize("family", MIXTURES)
def test_top_k_is_bit_equal_to_a_model_built_with_it(family: str) -> None:
    entries = MIXTURES[family]
    model = built(family, entries)
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(0))
    key = "moe_k" if "moe_k" in entries else "num_experts_per_tok"
    seen = []
    with torch.inference_mode():
        for k in (1, 2, 3, 8):
            expected = built(family, {**entries, key: k})(input_ids=ids).logits
            with experts_per_token(model, k):
                assert torch.equal(model(input_ids=ids).logits, expected), k
            seen.append(expected)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]), "the number of experts matters"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_skipping_is_bit_equal_to_a_physically_smaller_model(family: str, cache: str) -> None:
    entries = DECODERS[family]
    full = built(family, entries)
    whole = answered(full, cache_implementation=cache)
    for keep in KEEPS:
        expected = answered(smaller(family, entries, full, keep), cache_implementation=cache)
        with active_blocks(full.get_decoder(), keep):
            tokens, logits = answered(full, cache_implementation=cache)
        assert torch.equal(tokens, expected[0]), keep
        assert torch.equal(logits, expected[1]), keep
        assert not torch.equal(logits, whole[1]), keep
    assert torch.equal(answered(full, cache_implementation=cache)[1], whole[1]), "restored"

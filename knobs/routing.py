"""What a configuration says of the routers of a mixture of experts: how many experts, which k, how weights add up.

The entries are those of a language model's part of config.json, in transformers' spellings. A plan is made from them,
so nothing here needs weights; `knobs.experts` asks the loaded routers the same questions again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knobs.configuration import family_of

RENORMALIZED = "renormalized"
NOT_RENORMALIZED = "not renormalized"
RENORMALIZED_WITH_SHARED = "renormalized with shared experts"

# Spellings of the same number in the configurations of transformers.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
_GROUPS = ("n_group", "num_expert_group")
_RENORMALIZES = ("norm_topk_prob", "moe_renormalize")

# Families whose routers do one thing whatever the configuration says. Those that choose on the logits and take the
# softmax over the chosen are among the first: it is the same number. Families that are not here read `_RENORMALIZES`.
_RULES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("afmoe", "aria", "deepseek_v4", "diffusion_gemma", "doge", "ernie4_5_moe", "ernie4_5_vl_moe", "gemma4"),
            *("gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe"),
            *("hy_v3", "inkling2", "jetmoe", "laguna", "minimax", "minimax_m2", "minimax_m3_vl", "mistral_large4"),
            *("mixtral", "muse_spark", "qwen3_5_moe", "qwen3_vl_moe", "step3p5"),
        ),
        RENORMALIZED,
    ),
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_ocr2", "jamba", "llama4", "longcat_flash", "phimoe", "switch_transformers"),
            *("unlimited_ocr", "zaya"),
        ),
        NOT_RENORMALIZED,
    ),
    "inkling": RENORMALIZED_WITH_SHARED,
}

# Families whose experts transformers can run in one way only: no back-end can be chosen.
_ONE_BACK_END = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "step3p5", "switch_transformers", "nllb-moe")

# Families whose k cannot be a knob, and why.
_FIXED: Mapping[str, str] = {
    "phimoe": "the routers of phimoe always mix two experts (sparse mixer), whatever moe_top_k says",
    "llama4": "llama4 runs every expert for every token, so another moe_top_k changes its answers and saves no time",
    "deepseek_v4": "some routers of deepseek_v4 look the experts of a token up in a table, which has one moe_top_k",
    "zaya": "the routers of zaya always choose one expert",
    "switch_transformers": "the routers of switch_transformers always choose one expert",
    "nllb-moe": "the routers of nllb-moe always choose two experts",
}


@dataclass(frozen=True)
class Routing:
    """The routers of one model.

    Attributes:
        num_experts: routed experts per block; the fewest, where blocks differ.
        moe_top_k: experts that fire per token in the checkpoint; None where blocks differ.
        groups: of how many groups of experts, out of how many, a token's experts come; None for no such limit.
        renormalization: whether the weights of the chosen experts are made to add up to one, before a constant factor;
            None where the configuration does not say.
        fixed: why another k cannot be set; None where it can.
        one_back_end: whether transformers has a single way to run the experts.
    """

    num_experts: int
    moe_top_k: int | None = None
    groups: tuple[int, int] | None = None
    renormalization: str | None = None
    fixed: str | None = None
    one_back_end: bool = False

    @property
    def most(self) -> int:
        """The largest k: with more, routers would choose experts of groups that they have ruled out."""
        if self.groups is None:
            return self.num_experts
        chosen, of = self.groups
        return chosen * (self.num_experts // of)


def refuse_top_k(moe_top_k: int, routing: Routing | None) -> str | None:
    """Why a model with these routers cannot send each token to `moe_top_k` experts, or None."""
    if routing is None:
        return "the model has no experts"
    if routing.fixed is not None and moe_top_k != routing.moe_top_k:
        return routing.fixed
    if not 1 <= moe_top_k <= routing.num_experts:
        return f"the model has {routing.num_experts} experts, so moe_top_k must be 1 to {routing.num_experts}"
    if moe_top_k > routing.most and routing.groups is not None:
        chosen, of = routing.groups
        return (
            f"a token's experts come from {chosen} of {of} groups of {routing.num_experts // of}, so moe_top_k must be "
            f"1 to {routing.most}"
        )
    return None


def routing_of(text: Mapping[str, Any]) -> Routing | None:
    """The routers that a language model's configuration describes; None for a dense model."""
    text = {**text, **nested} if isinstance(nested := text.get("ffn_config"), dict) else text
    family = family_of(text)
    experts = _fewest(_first(text, _EXPERTS))
    if experts is None or experts < 2 or _without_sparse_blocks(text, family):
        return None
    top_k = _first(text, _TOP_K)
    fixed = _FIXED.get(family)
    if top_k is None and fixed is None:
        fixed = "its configuration does not name the number of experts per token"
    rule, one_back_end = _renormalization(text, family), family in _ONE_BACK_END
    return Routing(experts, _same(top_k), group_limit(text), rule, fixed, one_back_end)


def group_limit(text: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of how many groups of experts, out of how many, the experts of a token come; None for no such limit."""
    of, chosen = _first(text, _GROUPS), text.get("topk_group")
    if type(of) is not int or type(chosen) is not int or chosen >= of or text.get("topk_method") == "greedy":
        return None
    return chosen, of


def _renormalization(text: Mapping[str, Any], family: str) -> str | None:
    if family == "cohere2_moe" and text.get("expert_selection_fn", "softmax") == "softmax":
        return RENORMALIZED
    if "moe_normalize_expert_weights" in text:  # the order of the norm that the weights are divided by
        return RENORMALIZED if text["moe_normalize_expert_weights"] == 1 else NOT_RENORMALIZED
    if (rule := _RULES.get(family)) is not None:
        return rule
    renormalizes = _first(text, _RENORMALIZES)
    if renormalizes is None:
        return None
    return RENORMALIZED if renormalizes else NOT_RENORMALIZED


def _without_sparse_blocks(text: Mapping[str, Any], family: str) -> bool:
    """Whether the configuration names experts and gives no block any, as that of a family's dense sibling may."""
    kinds, layers = text.get("mlp_layer_types") or (), text.get("layer_types") or ()
    if text.get("enable_moe_block") is False or set(kinds) == {"dense"}:
        return True
    return family == "nemotron_h" and bool(layers) and "moe" not in layers


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((text[name] for name in names if text.get(name) is not None), None)


def _fewest(value: Any) -> int | None:
    if isinstance(value, list | tuple):
        return min((count for count in value if type(count) is int), default=None)
    return value if type(value) is int else None


def _same(value: Any) -> int | None:
    if isinstance(value, list | tuple):
        value = value[0] if len(set(value)) == 1 else None
    return value if type(value) is int else None

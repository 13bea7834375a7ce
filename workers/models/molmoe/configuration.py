"""The configuration of MolmoE: the published config.json, and the OLMoE text configuration that it amounts to."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, OlmoeConfig, PreTrainedConfig

from workers.models.molmoe.published import PUBLISHED_VISION, TEXT_NAMES

# Switches of the Molmo family that change what is computed and leave no trace in names and shapes of the weights.
_ONLY: dict[str, Any] = {
    "block_type": "moe",
    "activation_type": "swiglu",
    "layer_norm_type": "rms",
    "norm_after": False,
    "rope": True,
    "rope_impl": "llama",
    "alibi": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_logits": False,
    "normalize_input_embeds": False,
    "weight_tying": False,
    "use_cls_feature": False,
    "image_pooling_2d": "attention-meanq",
    "image_pooling_h": 2,
    "image_pooling_w": 2,
    "image_projector": "mlp",
    "image_padding_embed": "pad_and_partial_pad",
}
_ONLY_VISION: dict[str, Any] = {"image_model_type": "openai", "image_mlp_activations": "quick_gelu"}


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower.

    Attributes:
        width, heads, mlp_width, layers, norm_eps: of the transformer.
        patches_per_side: of one crop; 24 for 336 pixels.
        patch_pixels: numbers in one patch, (rows * columns * RGB).
        feature_layers: blocks whose outputs, side by side, are the features of a patch.
    """

    width: int
    heads: int
    mlp_width: int
    layers: int
    norm_eps: float
    patches_per_side: int
    patch_pixels: int
    feature_layers: tuple[int, ...]


@strict
class MolmoEConfig(PreTrainedConfig):  # type: ignore[misc]
    """Keyword arguments are the keys of the published config.json; defaults are those of MolmoE-1B-0924.

    Attributes:
        embedding_size: rows of the token embedding that the LM head has logits for; `vocab_size` of them are in use.
        additional_vocab_size: rows behind those, without logits.
        vision_backbone: completed with the published vision tower.
        text_config: the language model as transformers' OLMoE; entries given here win over the published keys.
        image_*_token_id: tokens of the tokenizer; config.json does not name them.
    """

    model_type = "molmo"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"text_config": OlmoeConfig}
    # transformers' beam search and chunked prefill look the placeholder up under this name.
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_patch_token_id"}

    vocab_size: int = 50280
    embedding_size: int = 50304
    additional_vocab_size: int = 128
    d_model: int = 2048
    n_layers: int = 16
    n_heads: int = 16
    n_kv_heads: int | None = None
    mlp_ratio: int | float = 1
    mlp_hidden_size: int | None = None
    moe_num_experts: int = 64
    moe_top_k: int = 8
    rope_theta: int | float = 10000.0
    layer_norm_eps: float = 1e-5
    clip_qkv: float | None = None
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50279
    tie_word_embeddings: bool = False

    vision_backbone: dict[str, Any] | None = None
    vit_layers: list[int] | tuple[int, ...] = (-2, -9)
    image_start_token_id: int = 50280
    image_end_token_id: int = 50281
    image_patch_token_id: int = 50282
    image_col_token_id: int = 50283

    text_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_backbone = {**PUBLISHED_VISION, **(self.vision_backbone or {})}
        _refuse_other_molmos(kwargs, self.vision_backbone)
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = {**self._text_entries(), **(self.text_config or {})}
        super().__post_init__(**kwargs)
        for published, name in TEXT_NAMES.items():
            setattr(self, published, getattr(self.text_config, name))
        if not all(-self.vision.layers <= layer < self.vision.layers for layer in self.vit_layers):
            raise ValueError(f"vit_layers {list(self.vit_layers)}: the vision tower has {self.vision.layers} layers")

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        text = self.__dict__.get("text_config")
        # `from_pretrained(folder, moe_top_k=4)` sets what it is given only when the text configuration is made.
        if key in TEXT_NAMES and isinstance(text, PreTrainedConfig):
            setattr(text, TEXT_NAMES[key], value)

    def _text_entries(self) -> dict[str, Any]:
        """The published keys as keyword arguments of `OlmoeConfig`."""
        # Gate and up projection share the width that the key names.
        width = self.mlp_hidden_size if self.mlp_hidden_size is not None else int(self.mlp_ratio * self.d_model)
        return {
            **{name: getattr(self, published) for published, name in TEXT_NAMES.items()},
            "intermediate_size": width // 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.rope_theta)},
            "norm_topk_prob": False,
            "attention_bias": False,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }

    @property
    def vision(self) -> VisionShape:
        backbone = self.vision_backbone or PUBLISHED_VISION
        return VisionShape(
            width=backbone["image_emb_dim"],
            heads=backbone["image_num_heads"],
            mlp_width=backbone["image_mlp_dim"],
            layers=backbone["image_num_layers"],
            norm_eps=backbone["image_norm_eps"],
            patches_per_side=isqrt(backbone["image_num_pos"] - 1),
            patch_pixels=3 * backbone["image_patch_size"] ** 2,
            feature_layers=tuple(self.vit_layers),
        )

    def published(self) -> dict[str, Any]:
        """The content of a config.json in the published manner, with what was changed in the text configuration."""
        text = self.get_text_config(decoder=True)
        changed = {published: getattr(text, name) for published, name in TEXT_NAMES.items()}
        changed |= {"mlp_hidden_size": 2 * text.intermediate_size, "rope_theta": text.rope_parameters["rope_theta"]}
        entries: dict[str, Any] = self.to_dict()
        return {name: value for name, value in entries.items() if name != "text_config"} | changed


def _refuse_other_molmos(others: dict[str, Any], backbone: dict[str, Any]) -> None:
    """Raise for a configuration of the Molmo family that this model would load and compute something else with."""
    if "hidden_size" in others or "num_hidden_layers" in others:
        raise ValueError("this is a dense Molmo; of model_type molmo, only the mixture of experts MolmoE is supported")
    for entries, only in ((others, _ONLY), (backbone, _ONLY_VISION)):
        for name, value in only.items():
            if entries.get(name, value) != value:
                raise ValueError(f"MolmoE with {name} {entries[name]!r} is not supported, only {value!r} is")


AutoConfig.register(MolmoEConfig.model_type, MolmoEConfig)

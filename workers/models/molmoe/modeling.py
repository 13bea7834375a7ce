"""MolmoE as a transformers model: the vision tower here, the language model and its back-ends transformers' OLMoE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, OlmoeModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, torch_compilable_check

from workers.models.molmoe.configuration import MolmoEConfig
from workers.models.molmoe.vision import MultiModalProjector, VisionTower

# In place of a token, the reference's mark of padding.
NO_TOKEN = -1


class MolmoEPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = MolmoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules: ClassVar[list[str]] = ["OlmoeDecoderLayer", "VisionBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for experts in the source of the model's own module; here they are those of OLMoE.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionTower):
            init.normal_(module.class_embedding, mean=0.0, std=std)
            init.normal_(module.positional_embedding, mean=0.0, std=std)
        elif isinstance(module, MultiModalProjector):
            init.normal_(module.pad_embed, mean=0.0, std=std)


class MolmoEModel(MolmoEPreTrainedModel):
    """Vision tower, projector and language model, without the LM head."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__(config)
        text = config.get_text_config(decoder=True)
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = MultiModalProjector(config.vision, text.intermediate_size, text.hidden_size)
        self.language_model = OlmoeModel(text)
        # Some tokens are read and never written: they have an embedding and no logit.
        rows = text.vocab_size + config.additional_vocab_size
        self.language_model.embed_tokens = nn.Embedding(rows, text.hidden_size)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embeddings of the crops' windows in the order in which the prompt has places for them.

        Args:
            pixel_values: (batch, crops, patches, numbers in a patch), or without `batch` for one prompt; a crop of
                nothing but -1 is padding. All crops of all images of a prompt stand in one row, which may also hold
                those of several prompts.
            image_masks: (batch, crops, patches), see `MultiModalProjector`.
            image_input_idx: (batch, crops, windows), the place of each window in its prompt, or in the prompts of
                the row laid end to end; negative: not used.

        Returns:
            `pooler_output`: for every row (places, width); `last_hidden_state`: features of the vision tower.
        """
        if image_masks is None or image_input_idx is None:
            raise ValueError("pixel_values come with image_masks and image_input_idx")
        if pixel_values.ndim == 3:
            pixel_values, image_masks, image_input_idx = pixel_values[None], image_masks[None], image_input_idx[None]
        batch = len(pixel_values)
        is_image = ~(pixel_values == -1).flatten(2).all(dim=-1).flatten()  # (batch * crops)
        hidden = self.vision_tower(pixel_values.flatten(0, 1))
        embeddings = self.multi_modal_projector(hidden * is_image[:, None, None], image_masks.flatten(0, 1))
        embeddings = embeddings.reshape(batch, -1, embeddings.shape[-1])  # (batch, crops * windows, width)
        places = image_input_idx.flatten(1)
        # Unused windows sort behind all others and are cut off.
        order = places.masked_fill(places < 0, torch.iinfo(places.dtype).max).argsort(dim=-1, stable=True)
        used = (places >= 0).sum(dim=-1).tolist()
        features = [row[rank[:count]] for row, rank, count in zip(embeddings, order, used, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As `MolmoEForConditionalGeneration.forward`, up to the final norm."""
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if image is not None:
                raise ValueError("pixel_values and the features made of them cannot both be given")
            image = self.get_image_features(pixel_values, image_masks, image_input_idx, return_dict=True)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids.clamp(min=0))
            attention_mask = _without_no_tokens(attention_mask, input_ids, past_key_values)
            if image is not None:
                inputs_embeds = self._add_image_features(inputs_embeds, input_ids, image.pooler_output)
        elif inputs_embeds is None or input_ids is not None:
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        elif image is not None:
            raise ValueError("images need input_ids, which say where they belong")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        output: MoeModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return output

    def _add_image_features(
        self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor, parts: list[torch.Tensor]
    ) -> torch.Tensor:
        """The embeddings of the placeholders plus the features, both in the order of the prompts."""
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).to(inputs_embeds)
        is_place = (input_ids == self.config.image_patch_token_id).unsqueeze(-1)
        torch_compilable_check(
            is_place.sum() == len(features),
            lambda: f"the prompts have {int(is_place.sum())} places for {len(features)} image features",
        )
        return inputs_embeds + torch.zeros_like(inputs_embeds).masked_scatter(is_place, features)


class MolmoEForConditionalGeneration(MolmoEPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """MolmoE with its LM head, which has no logits for the additional vocabulary."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__(config)
        text = config.get_text_config(decoder=True)
        self.model = MolmoEModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `MolmoEModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of shape (batch, tokens, embedding_size).

        Args:
            input_ids: (batch, tokens); -1 is padding, besides what `attention_mask` says.
            pixel_values, image_masks, image_input_idx: see `MolmoEModel.get_image_features`. Only the order of
                `image_input_idx` counts: features go to the image patch tokens of `input_ids` one after the other,
                so that padding may be added on the left.
            mm_encoder_outputs: `{"image": what get_image_features returned}`, in place of those three.
            labels: (batch, tokens), -100 where there is none; adds `loss` to the output.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def _without_no_tokens(
    attention_mask: torch.Tensor | None, input_ids: torch.Tensor, past_key_values: Cache | None
) -> torch.Tensor | None:
    """The mask of a prompt without its -1; masks of decode steps, where no -1 can be, stay as they are."""
    if attention_mask is None:
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        return (input_ids != NO_TOKEN).long() if begins else None
    if attention_mask.shape == input_ids.shape:
        return attention_mask * (input_ids != NO_TOKEN)
    return attention_mask


AutoModelForImageTextToText.register(MolmoEConfig, MolmoEForConditionalGeneration)

"""Qwen3-VL with mixture-of-experts decoders: images at native resolution, one vision token per 2 x 2 patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knobs.card import Parameters
from knobs.vision import NativeGeometry, VisionLayout, VisionSetting
from workers.models.family import Architecture, Config, Family, Pipeline, Registered
from workers.models.parameters import Decoder, layer_norm, linear, vision_block
from workers.models.words import complete, filter_name, language_sizes, pixel_steps, side, sizes, whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from workers.models.processing import ImageTensors, Processor, Tensors

START, IMAGE, VIDEO, STOP = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"

# What transformers' classes fill in where a checkpoint leaves it out.
VISION_DEFAULTS: Config = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
TEXT_DEFAULTS: Config = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "mlp_only_layers": None,
}
CONFIG_DEFAULTS: Config = {"tie_word_embeddings": False}
IMAGE_DEFAULTS: Config = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


def resized(height: int, width: int, factor: int, least_pixels: int, most_pixels: int) -> tuple[int, int]:
    """Height and width, both multiples of `factor`, that Qwen-VL resizes an image to (`smart_resize` in transformers).

    Python's round (half to even) is meant.
    """
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > most_pixels:
        shrink = math.sqrt(height * width / most_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < least_pixels:
        grow = math.sqrt(least_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class QwenGeometry(NativeGeometry):
    """Pixels per side of one vision token, and the checkpoint's own bounds on the pixels of an image."""

    pixels_per_token: int
    least_pixels: int
    most_pixels: int

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout:
        factor = self.pixels_per_token
        target_height, target_width = resized(height, width, factor, self.least_pixels, self.most_pixels)
        tokens = (target_height // factor) * (target_width // factor)
        mismatch = abs(target_width / target_height - width / height)
        # One start and one end stand around every image.
        return VisionLayout((1, 1), 1, 1, tokens, target_height, target_width, tokens, 2, mismatch)


def _text(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int, sections: list[int]
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": sections,
            "mrope_interleaved": True,
        },
    }


class Qwen3VLMoe(Family):
    name = "qwen3_vl_moe"
    model_types = ("qwen3_vl_moe",)
    special_tokens = (START, IMAGE, VIDEO, STOP)

    @property
    def registered(self) -> Mapping[str, Registered]:
        published = {
            "text_config": {
                **_text(2048, 48, 32, 4, 128, 151936, [24, 20, 20]),
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "max_position_embeddings": 262144,
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 2048,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        }
        tiny = {
            "text_config": {
                **_text(128, 6, 4, 2, 32, 512, [8, 4, 4]),
                "intermediate_size": 256,
                "moe_intermediate_size": 128,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "max_position_embeddings": 8192,
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 128,
                "num_position_embeddings": 256,
                "deepstack_visual_indexes": [0],
            },
        }
        return {
            "qwen3-vl-30b-a3b": Registered(
                "qwen3_vl_moe",
                published,
                _preprocessor(16, 256 * 256, 4096 * 4096),
                "Qwen/Qwen3-VL-30B-A3B-Instruct",
            ),
            "tiny-qwen3-vl-moe": Registered("qwen3_vl_moe", tiny, _preprocessor(8, 64 * 64, 256 * 256)),
        }

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        return {
            "image_token_id": ids[IMAGE],
            "video_token_id": ids[VIDEO],
            "vision_start_token_id": ids[START],
            "vision_end_token_id": ids[STOP],
        }

    def geometry(self, config: Config, preprocessor: Config) -> QwenGeometry:
        pixels = whole(preprocessor, "patch_size") * whole(preprocessor, "merge_size")
        least, most = (whole(preprocessor, "size", edge) for edge in ("shortest_edge", "longest_edge"))
        return QwenGeometry(pixels, least, most)

    def architecture(self, config: Config) -> Architecture:
        config = complete(CONFIG_DEFAULTS, config)
        vision, text = complete(VISION_DEFAULTS, config.get("vision_config"), "vision_config"), _text_config(config)
        merged, levels = vision["spatial_merge_size"], vision["deepstack_visual_indexes"]
        joined, outputs = vision["hidden_size"] * merged**2, vision["out_hidden_size"]
        decoder = _decoder(text, config["tie_word_embeddings"])
        # DeepStack's mergers have their norm behind the joining of patches, the last one in front of it.
        merger = linear(joined, joined) + linear(joined, outputs)
        projector = layer_norm(vision["hidden_size"]) + merger + len(levels) * (layer_norm(joined) + merger)
        if not decoder.dense_blocks:
            del text["intermediate_size"]
        return Architecture(
            f"{sizes(vision)}, {vision['temporal_patch_size']} frames deep; {vision['num_position_embeddings']} "
            "learned positions, interpolated to the patches of each image, and rotary ones",
            f"{merged} x {merged} patches joined into one token, then LayerNorm, linear {joined} -> {joined}, GELU, "
            f"linear {joined} -> {outputs}; {len(levels)} more like it (DeepStack), of vision blocks "
            f"{', '.join(map(str, levels))}, are added to the vision tokens behind the language model's first blocks",
            language_sizes(text, decoder.tied),
            Parameters(_tower_weights(vision), projector, decoder.weights, decoder.active_weights),
        )

    def pipeline(self, config: Config, preprocessor: Config) -> Pipeline:
        geometry, values = self.geometry(config, preprocessor), complete(IMAGE_DEFAULTS, preprocessor)
        factor, least, most = geometry.pixels_per_token, geometry.least_pixels, geometry.most_pixels
        patch, frames, merged = values["patch_size"], values["temporal_patch_size"], values["merge_size"]
        size = f"both sides multiples of {factor} px, {least} to {most} pixels in all"
        return Pipeline(
            f"of each image its own: {size}; {patch} px patches, one vision token per {factor} x {factor} px, "
            f"{math.ceil(least / factor**2)} to {most // factor**2} of them",
            (
                *(["convert to RGB"] if values["do_convert_rgb"] else []),
                *(
                    [f"resize, the aspect nearly kept: {size}, {filter_name(values['resample'])}"]
                    if values["do_resize"]
                    else []
                ),
                *pixel_steps(values),
                f"cut into patches of {patch} x {patch} px, {merged} x {merged} neighbours one after the other, each "
                f"repeated over {frames} frames: rows of {3 * frames * patch**2} numbers",
            ),
            "images are never split, and no axis bounds their tokens here; transformers' own processor takes "
            "size={'shortest_edge': .., 'longest_edge': ..} in the call, which in spite of its names bounds the pixels "
            "of an image",
            f"flat: (patches of all images, {3 * frames * patch**2}) with the grid of each image; attention stays "
            "within an image, only the text is padded. Here too",
            False,
            False,
            (
                f"before the image: {START}",
                f"each {factor} x {factor} px, row by row: {IMAGE}",
                f"behind it: {STOP}",
            ),
        )

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor:
        from transformers import Qwen2VLImageProcessorPil

        from workers.models.processing import CuttingProcessor, ImageTensors

        image_processor = Qwen2VLImageProcessorPil(**preprocessor)
        merged = image_processor.merge_size**2

        class Qwen3VLProcessor(CuttingProcessor):
            image_token, template_image, prompt_image = IMAGE, IMAGE, START + IMAGE + STOP

            def cut(self, images: Sequence[Image.Image], setting: VisionSetting) -> ImageTensors:
                made = image_processor(list(images), return_tensors="pt")
                grids = made["image_grid_thw"]
                placeholders = [IMAGE * (int(grid.prod()) // merged) for grid in grids]
                vision = {"pixel_values": made["pixel_values"], "image_grid_thw": grids}
                return ImageTensors(vision, placeholders, len(images))

            def per_token(self, input_ids: torch.Tensor) -> Tensors:
                # Three-dimensional rotary positions are computed from where the images are.
                return {"mm_token_type_ids": (input_ids == self.image_token_id).long()}

        return Qwen3VLProcessor(tokenizer)


def _preprocessor(patch: int, least_pixels: int, most_pixels: int) -> dict[str, Any]:
    return {
        # Areas in pixels, under the names that transformers gives them.
        "size": {"shortest_edge": least_pixels, "longest_edge": most_pixels},
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _text_config(config: Config) -> dict[str, Any]:
    """The completed configuration of the language model; it has two names for the number of experts."""
    given = config.get("text_config") or {}
    experts = given.get("num_experts") or given.get("num_local_experts")
    defaults = {"model_type": "qwen3_vl_moe_text", **TEXT_DEFAULTS}
    return complete(defaults, {**given, "num_experts": experts}, "text_config")


def _decoder(text: Config, tied: bool) -> Decoder:
    """Sizes of the language model; blocks without experts are named one by one or follow from a step."""
    width, heads, blocks = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
    head_width, dense = text.get("head_dim") or width // heads, text["mlp_only_layers"] or ()
    return Decoder(
        blocks=blocks,
        width=width,
        heads=heads,
        key_value_heads=text["num_key_value_heads"],
        head_width=head_width,
        embeddings=text["vocab_size"],
        logits=text["vocab_size"],
        tied=tied,
        mlp_width=text["intermediate_size"],
        dense_blocks=sum(i in dense or (i + 1) % text["decoder_sparse_step"] != 0 for i in range(blocks)),
        query_key_norms=2 * head_width,
        input_bias=text["attention_bias"],
        output_bias=text["attention_bias"],
        experts=text["num_experts"],
        top_k=text["num_experts_per_tok"],
        expert_width=text["moe_intermediate_size"],
    )


def _tower_weights(vision: Config) -> int:
    """Weights of the vision tower without its mergers, which are the projector."""
    width: int = vision["hidden_size"]
    patch: int = vision["in_channels"] * side(vision["temporal_patch_size"]) * side(vision["patch_size"]) ** 2
    positions: int = vision["num_position_embeddings"]
    blocks: int = vision["depth"]
    return linear(patch, width) + positions * width + blocks * vision_block(width, vision["intermediate_size"])


FAMILY = Qwen3VLMoe()

"""SmolVLM2 (and Idefics3-style splitting): square tiles after a resize of the longest edge, then a global view."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knobs.card import Parameters
from knobs.crop_grid import CropGrid, CropGridGeometry
from knobs.placement import fit_of
from knobs.tiling import Tiling
from knobs.vision import NATIVE, VisionSetting, as_int
from workers.models.family import Architecture, Config, Family, Pipeline, Registered
from workers.models.parameters import dense_decoder, layer_norm, linear, text_config, vision_block
from workers.models.words import UNKNOWN, complete, filter_name, language_sizes, pixel_steps, side, sizes, whole

if TYPE_CHECKING:
    from PIL import Image

    from workers.models.processing import ImageTensors, Inputs, Processor, Tensors

FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
# Rows and columns that the byte tokenizer has tokens for; 4096 px (the resize cap) over 384 px tiles is 11.
MOST_TILES = 12
# The image processor never resizes beyond this, whatever longest_edge says (transformers' MAX_IMAGE_SIZE).
LARGEST_SIDE = 4096
# The most crops that a setting may ask for.
MOST_CROPS = 64

# What transformers' classes fill in where a checkpoint leaves it out; those of Idefics3 say the same.
VISION_DEFAULTS: Config = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
CONFIG_DEFAULTS: Config = {"scale_factor": 2, "tie_word_embeddings": False}
IMAGE_DEFAULTS: Config = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_image_splitting": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": True,
    "resample": 1,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def tiling(height: int, width: int, longest_edge: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles that SmolVLM cuts an image into; (0, 0) is an image that is not split.

    The longest side becomes `longest_edge`, the other follows the aspect and is made even; both are then rounded up
    to whole tiles. This is the arithmetic of transformers' SmolVLM image processor as it runs, not of its
    `get_number_of_image_patches`, which rounds the unrounded side and differs for one image in ten.
    """
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if max(height, width) > LARGEST_SIDE:
        if width >= height:
            width, height = LARGEST_SIDE, int(LARGEST_SIDE / aspect)
        else:
            height, width = LARGEST_SIDE, int(LARGEST_SIDE * aspect)
        height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return (0, 0) if max(height, width) <= tile else (height // tile, width // tile)


@dataclass(frozen=True)
class SmolVLMGeometry(CropGridGeometry):
    """Tile size in pixels, vision tokens per tile, the checkpoint's own longest edge, and whether it cuts at all."""

    tile: int
    tokens_per_tile: int
    longest_edge: int
    splits: bool = True

    dial = "longest_edge"

    @property
    def grid(self) -> CropGrid:
        most_per_side = min(LARGEST_SIDE // self.tile, MOST_TILES)
        return CropGrid(
            stride=self.tile,
            margin=0,
            tokens_per_crop=self.tokens_per_tile,
            always_overview=False,
            most_crops=min(most_per_side**2, MOST_CROPS),
            most_per_side=most_per_side,
        )

    def refuse_dial(self, value: int | str | None) -> str | None:
        edge = as_int(value)
        if edge is None or not self.tile <= edge <= LARGEST_SIDE:
            return f"longest_edge must be {self.tile} (one tile) to {LARGEST_SIDE} pixels"
        return None

    def dial_levels(self) -> Sequence[int]:
        if self.tile < 384:
            return [self.tile * n for n in range(1, 5)]
        return [edge for edge in (384, 512, 768, 1024, 1536, 2048) if edge >= self.tile]

    def edge(self, setting: VisionSetting) -> int:
        """The longest edge in pixels that native preprocessing or the dial resizes to."""
        return as_int(setting.value) or self.longest_edge

    def own_tiling(self, height: int, width: int, setting: VisionSetting) -> Tiling:
        rows, columns = tiling(height, width, self.edge(setting), self.tile)
        return (rows, columns) if rows and self.cuts(setting) else (1, 1)

    def cuts(self, setting: VisionSetting) -> bool:
        """Whether images are cut into tiles: under every knob, natively if the checkpoint does."""
        return self.splits or setting.knob != NATIVE

    def own_pinned(self, setting: VisionSetting) -> int | None:
        # One tile is one tile for every aspect; anything larger follows the image.
        return 1 if self.edge(setting) == self.tile or not self.cuts(setting) else None

    def prompt_tokens(self, tiling: Tiling, setting: VisionSetting) -> tuple[int, int]:
        rows, columns = tiling
        crops = rows * columns
        # Beside the tokens of a crop: its mark and its name, an end of line per row, then the global view's two marks
        # and one at the end. Two ends of line after the last row are one token.
        special = 2 * crops + rows + 3 if crops > 1 else 3
        return self.grid.tower_tokens(crops), special


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }


def _vision(hidden: int, intermediate: int, layers: int, heads: int, image: int, patch: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


def _preprocessor(longest_edge: int, tile: int) -> dict[str, Any]:
    return {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": tile}}


# Geometries as published: SigLIP base (512 px, patch 16) and so400m (384 px, patch 14) with SmolLM2 decoders.
_SIGLIP_BASE = _vision(768, 3072, 12, 12, 512, 16)
_SIGLIP_SO400M = _vision(1152, 4304, 27, 16, 384, 14)
_HUB = "HuggingFaceTB/SmolVLM2-{}-Instruct"


class SmolVLM(Family):
    name = "smolvlm"
    model_types = ("smolvlm", "idefics3")
    special_tokens = (
        FAKE,
        IMAGE,
        GLOBAL,
        *(f"<row_{r}_col_{c}>" for r in range(1, MOST_TILES + 1) for c in range(1, MOST_TILES + 1)),
    )

    @property
    def registered(self) -> Mapping[str, Registered]:
        return {
            "smolvlm2-256m": Registered(
                "smolvlm",
                {
                    "scale_factor": 4,
                    "vision_config": _SIGLIP_BASE,
                    "text_config": _text(576, 1536, 30, 9, 3, 49280),
                },
                _preprocessor(2048, 512),
                _HUB.format("256M-Video"),
            ),
            "smolvlm2-500m": Registered(
                "smolvlm",
                {
                    "scale_factor": 4,
                    "vision_config": _SIGLIP_BASE,
                    "text_config": _text(960, 2560, 32, 15, 5, 49280),
                },
                _preprocessor(2048, 512),
                _HUB.format("500M-Video"),
            ),
            "smolvlm2-2.2b": Registered(
                "smolvlm",
                {
                    "scale_factor": 3,
                    "vision_config": _SIGLIP_SO400M,
                    "text_config": _text(2048, 8192, 24, 32, 32, 49280),
                },
                _preprocessor(1536, 384),
                _HUB.format("2.2B"),
            ),
            "tiny-smolvlm": Registered(
                "smolvlm",
                {
                    "scale_factor": 2,
                    "vision_config": _vision(64, 128, 2, 4, 32, 4),
                    "text_config": _text(128, 384, 6, 4, 2, 512),
                },
                _preprocessor(128, 32),
            ),
        }

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        return {"image_token_id": ids[IMAGE]}

    def geometry(self, config: Config, preprocessor: Config) -> SmolVLMGeometry:
        tile = whole(preprocessor, "max_image_size", "longest_edge")
        patches = tile // whole(config, "vision_config", "patch_size")
        tokens = patches**2 // whole(config, "scale_factor") ** 2
        splits = bool(preprocessor.get("do_image_splitting", True))
        return SmolVLMGeometry(tile, tokens, whole(preprocessor, "size", "longest_edge"), splits)

    def architecture(self, config: Config) -> Architecture:
        config = complete(CONFIG_DEFAULTS, config)
        vision = complete(VISION_DEFAULTS, config.get("vision_config"), "vision_config")
        text = text_config(config, "llama")
        width, patch, scale = vision["hidden_size"], side(vision["patch_size"]), config["scale_factor"]
        positions, joined = (side(vision["image_size"]) // patch) ** 2, width * scale**2
        decoder, parameters = dense_decoder(text, config["tie_word_embeddings"]), None
        if decoder is not None:
            tower = (
                linear(vision["num_channels"] * patch**2, width)
                + positions * width
                + vision["num_hidden_layers"] * vision_block(width, vision["intermediate_size"])
                + layer_norm(width)
            )
            projector = linear(joined, decoder.width, bias=False)
            parameters = Parameters(tower, projector, decoder.weights, decoder.active_weights)
        return Architecture(
            f"SigLIP: {sizes(vision)}",
            f"pixel shuffle of {scale} x {scale} patches into one token, then one linear layer without bias, "
            f"{joined} -> {text.get('hidden_size', UNKNOWN)}",
            language_sizes(text, config["tie_word_embeddings"]),
            parameters,
        )

    def pipeline(self, config: Config, preprocessor: Config) -> Pipeline:
        geometry, values = self.geometry(config, preprocessor), complete(IMAGE_DEFAULTS, preprocessor)
        tile, tokens, resampling = geometry.tile, geometry.tokens_per_tile, filter_name(values["resample"])
        patch = side(complete(VISION_DEFAULTS, config.get("vision_config"), "vision_config")["patch_size"])
        steps = ["convert to RGB"] if values["do_convert_rgb"] else []
        if values["do_resize"]:
            edge = min(geometry.longest_edge, LARGEST_SIDE)
            steps.append(
                f"resize the longest edge to {edge} px and keep the aspect, the other side made even, {resampling}"
            )
        if values["do_image_splitting"]:
            steps += [
                f"resize both sides up to multiples of {tile} px, which stretches the image, {resampling}",
                f"cut into crops of {tile} x {tile} px, row by row; an image that fits into one stays whole",
                f"behind several crops, the image squashed to {tile} x {tile} px as global view, {resampling}",
            ]
        else:
            steps.append(f"squash to one crop of {tile} x {tile} px, {resampling}")
        return Pipeline(
            f"{tile} x {tile} px for each crop and the global view: {tile // patch} x {tile // patch} patches of "
            f"{patch} px, {tokens} vision tokens",
            (*steps, *pixel_steps(values)),
            f"longest_edge: [{tile}] in a sweep; with transformers' own processor do_image_splitting=False in the call "
            f"or as attribute of its image processor. Both squash the image to {tile} x {tile} px",
            f"padded: (samples, most crops of one, 3, {tile}, {tile}) with all-zero crops, and an int64 mask of "
            "all pixels; the model drops all-zero crops before the vision tower, so padding costs memory and transfer "
            "only. Here the crops of all samples stand in one row: no padding, no mask",
            bool(values["do_pad"]),
            False,
            (
                f"each crop, row by row: {FAKE}<row_R_col_C> then {tokens} x {IMAGE}",
                "after each row of crops: \\n",
                "after the last row, one token with the one before: \\n",
                f"the global view: {FAKE}{GLOBAL} then {tokens} x {IMAGE} then {FAKE}",
                f"an image in one crop, instead: {FAKE}{GLOBAL} then {tokens} x {IMAGE} then {FAKE}",
            ),
        )

    def join_images(self, samples: Sequence[Inputs]) -> Tensors:
        """All crops as one row, (1, crops of all samples, 3, height, width): features need no row of their own."""
        import torch

        names = samples[0].vision
        return {name: torch.cat([s.vision[name].flatten(0, 1) for s in samples])[None] for name in names}

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor:
        from transformers import SmolVLMImageProcessorPil
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        from workers.models.processing import CuttingProcessor, ImageTensors, lay_on_canvas

        geometry = self.geometry(config, preprocessor)
        # do_pad would add a mask of two thirds of the pixels' bytes that only says "all of it".
        image_processor = SmolVLMImageProcessorPil(**{**preprocessor, "do_pad": False})

        class SmolVLMProcessor(CuttingProcessor):
            image_token, template_image, prompt_image = IMAGE, IMAGE, IMAGE

            def cut(self, images: Sequence[Image.Image], setting: VisionSetting) -> ImageTensors:
                setting = geometry.complete(setting)
                if geometry.takes_whole_image(setting):
                    how: dict[str, Any] = {"size": {"longest_edge": geometry.edge(setting)}}
                    how["do_image_splitting"] = geometry.cuts(setting)
                else:
                    fit, resample = fit_of(setting), image_processor.resample
                    layouts = [geometry.layout(image.height, image.width, setting) for image in images]
                    images = [lay_on_canvas(i, at, fit, resample) for i, at in zip(images, layouts, strict=True)]
                    how = {"do_resize": False, "do_image_splitting": True}
                made = image_processor([list(images)], return_row_col_info=True, return_tensors="pt", **how)
                rows, columns = made["rows"][0], made["cols"][0]
                placeholders = [
                    get_image_prompt_string(r, c, geometry.tokens_per_tile, FAKE, IMAGE, GLOBAL)
                    for r, c in zip(rows, columns, strict=True)
                ]
                views = sum(1 for r in rows if r)  # every split image has a global view beside its crops
                pixels = made["pixel_values"]
                return ImageTensors({"pixel_values": pixels}, placeholders, pixels.shape[1] - views)

        return SmolVLMProcessor(tokenizer)


FAMILY = SmolVLM()

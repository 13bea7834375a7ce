"""InternVL3: a grid of square tiles chosen by aspect, with a thumbnail when there is more than one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knobs.card import Parameters
from knobs.crop_grid import CropGrid, CropGridGeometry
from knobs.placement import fit_of
from knobs.tiling import Tiling
from knobs.vision import VisionSetting, as_int
from workers.models.family import Architecture, Config, Family, Pipeline, Registered
from workers.models.parameters import dense_decoder, layer_norm, linear, text_config, vision_block
from workers.models.words import UNKNOWN, complete, filter_name, language_sizes, pixel_steps, side, sizes, whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from workers.models.processing import ImageTensors, Processor

START, CONTEXT, STOP = "<img>", "<IMG_CONTEXT>", "</img>"
MOST_TILES = 36

# What transformers' classes fill in where a checkpoint leaves it out.
VISION_DEFAULTS: Config = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "attention_bias": False,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
CONFIG_DEFAULTS: Config = {"downsample_ratio": 0.5, "tie_word_embeddings": True}
IMAGE_DEFAULTS: Config = {
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def tiling(height: int, width: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns of the canvas that InternVL lays an image on, with `least` to `most` tiles.

    The grid whose aspect is nearest to the image's wins; of grids that are equally near, the last in order of area
    that the image fills by more than half, as in transformers' `get_optimal_tiled_canvas`.
    """
    # A list: among grids of one area the order decides, narrow ones first.
    grids = sorted(
        [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most],
        key=lambda grid: grid[0] * grid[1],
    )
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and area > 0.5 * tile * tile * columns * rows:
            best = (columns, rows)
    return best[1], best[0]


@dataclass(frozen=True)
class InternVLGeometry(CropGridGeometry):
    """Tile size in pixels, vision tokens per tile, and the checkpoint's own range of tiles."""

    tile: int
    tokens_per_tile: int
    least_tiles: int
    most_tiles: int

    dial = "tiles"

    @property
    def grid(self) -> CropGrid:
        return CropGrid(
            stride=self.tile,
            margin=0,
            tokens_per_crop=self.tokens_per_tile,
            always_overview=False,
            most_crops=MOST_TILES,
            most_per_side=MOST_TILES,
        )

    def refuse_dial(self, value: int | str | None) -> str | None:
        tiles = as_int(value)
        return None if tiles is not None and 1 <= tiles <= MOST_TILES else f"tiles must be 1 to {MOST_TILES}"

    def dial_levels(self) -> Sequence[int]:
        return (1, 2, 4, 6, 9, 12)

    def tile_range(self, setting: VisionSetting) -> tuple[int, int]:
        """Fewest and most tiles: pinned by the dial, the checkpoint's own for native."""
        tiles = as_int(setting.value)
        return (self.least_tiles, self.most_tiles) if tiles is None else (tiles, tiles)

    def own_tiling(self, height: int, width: int, setting: VisionSetting) -> Tiling:
        return tiling(height, width, self.tile, *self.tile_range(setting))

    def own_pinned(self, setting: VisionSetting) -> int | None:
        # Only the count is pinned, not the tiling: 6 tiles are 2 x 3 or 3 x 2 by the image's aspect.
        least, most = self.tile_range(setting)
        return least if least == most else None

    def prompt_tokens(self, tiling: Tiling, setting: VisionSetting) -> tuple[int, int]:
        # One start and one end stand round all tiles of an image.
        return self.grid.tower_tokens(tiling[0] * tiling[1]), 2


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    }


def _vision(hidden: int, intermediate: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": [image, image],
        "patch_size": [patch, patch],
        "attention_bias": True,
    }


def _config(text: dict[str, Any], vision: dict[str, Any], tokens_per_tile: int) -> dict[str, Any]:
    return {
        "text_config": text,
        "vision_config": vision,
        "image_seq_length": tokens_per_tile,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


def _preprocessor(tile: int) -> dict[str, Any]:
    return {
        "size": {"height": tile, "width": tile},
        "min_patches": 1,
        "max_patches": 12,
        # The published checkpoints normalise as ImageNet; the class default is OpenAI CLIP.
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


_INTERN_VIT_300M = _vision(1024, 4096, 24, 16, 448, 14)


class InternVL(Family):
    name = "internvl"
    model_types = ("internvl",)
    special_tokens = (START, CONTEXT, STOP)

    @property
    def registered(self) -> Mapping[str, Registered]:
        decoders = {
            "1b": _text(896, 4864, 24, 14, 2, 151674),
            "2b": _text(1536, 8960, 28, 12, 2, 151674),
            "8b": _text(3584, 18944, 28, 28, 4, 151674),
        }
        published = {
            f"internvl3-{size}": Registered(
                "internvl",
                _config(text, _INTERN_VIT_300M, 256),
                _preprocessor(448),
                f"OpenGVLab/InternVL3-{size.upper()}-hf",
            )
            for size, text in decoders.items()
        }
        tiny = _config(_text(128, 384, 6, 4, 2, 512), _vision(64, 128, 2, 4, 32, 4), 16)
        return {**published, "tiny-internvl": Registered("internvl", tiny, _preprocessor(32))}

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        return {"image_token_id": ids[CONTEXT]}

    def geometry(self, config: Config, preprocessor: Config) -> InternVLGeometry:
        return InternVLGeometry(
            whole(preprocessor, "size", "height"),
            whole(config, "image_seq_length"),
            whole({"min_patches": 1, **preprocessor}, "min_patches"),
            whole({"max_patches": 12, **preprocessor}, "max_patches"),
        )

    def architecture(self, config: Config) -> Architecture:
        config = complete(CONFIG_DEFAULTS, config)
        vision = complete(VISION_DEFAULTS, config.get("vision_config"), "vision_config")
        text, joined = text_config(config, "qwen2"), int(1 / config["downsample_ratio"])
        inputs, outputs = vision["hidden_size"] * joined**2, text.get("hidden_size", UNKNOWN)
        decoder, parameters = dense_decoder(text, config["tie_word_embeddings"]), None
        if decoder is not None:
            projector = layer_norm(inputs) + linear(inputs, decoder.width) + linear(decoder.width, decoder.width)
            parameters = Parameters(_tower_weights(vision), projector, decoder.weights, decoder.active_weights)
        return Architecture(
            f"InternViT: {sizes(vision)}",
            f"pixel shuffle of {joined} x {joined} patches into one token, then LayerNorm, "
            f"linear {inputs} -> {outputs}, GELU, linear {outputs} -> {outputs}",
            language_sizes(text, config["tie_word_embeddings"]),
            parameters,
        )

    def pipeline(self, config: Config, preprocessor: Config) -> Pipeline:
        geometry, values = self.geometry(config, preprocessor), complete(IMAGE_DEFAULTS, preprocessor)
        tile, tokens, resampling = geometry.tile, geometry.tokens_per_tile, filter_name(values["resample"])
        patch = side(complete(VISION_DEFAULTS, config.get("vision_config"), "vision_config")["patch_size"])
        return Pipeline(
            f"{tile} x {tile} px for each tile and the thumbnail: {tile // patch} x {tile // patch} patches of "
            f"{patch} px, {tokens} vision tokens",
            (
                *(["convert to RGB"] if values["do_convert_rgb"] else []),
                f"choose the grid of {geometry.least_tiles} to {geometry.most_tiles} tiles whose aspect is nearest to "
                "the image's; of equals the largest that the image fills by more than half",
                f"stretch to the columns and rows of that grid times {tile} px, {resampling}",
                f"cut into tiles of {tile} x {tile} px, row by row",
                f"behind several tiles, the image squashed to {tile} x {tile} px as thumbnail, {resampling}",
                *pixel_steps(values),
            ),
            "tiles: [1] in a sweep; with transformers' own processor crop_to_patches=False in the call, in "
            "processor.images_kwargs or as argument of AutoProcessor.from_pretrained (an image processor made with it "
            f"is overruled by the processor). The image is then squashed to {tile} x {tile} px",
            f"flat: (all tiles of all images, 3, {tile}, {tile}) with the number of tiles of each image; only the text "
            "is padded. Here too",
            False,
            False,
            (
                f"before the first tile: {START}",
                f"each tile, row by row, then the thumbnail: {tokens} x {CONTEXT}",
                f"behind the last: {STOP}",
            ),
        )

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor:
        import torch
        from transformers import GotOcr2ImageProcessorPil

        from workers.models.processing import CuttingProcessor, ImageTensors, lay_on_canvas

        geometry = self.geometry(config, preprocessor)
        image_processor = GotOcr2ImageProcessorPil(**preprocessor)

        class InternVLProcessor(CuttingProcessor):
            image_token, template_image, prompt_image = CONTEXT, CONTEXT, CONTEXT

            def cut(self, images: Sequence[Image.Image], setting: VisionSetting) -> ImageTensors:
                setting = geometry.complete(setting)
                made = [self._tiles(image, setting) for image in images]
                passes = [len(tiles) for tiles in made]
                placeholders = [START + CONTEXT * (geometry.tokens_per_tile * n) + STOP for n in passes]
                crops = sum(n - 1 if n > 1 else 1 for n in passes)  # a split image has a thumbnail beside its crops
                return ImageTensors({"pixel_values": torch.cat(made)}, placeholders, crops)

            def _tiles(self, image: Image.Image, setting: VisionSetting) -> torch.Tensor:
                """(tiles, 3, height, width); the thumbnail last."""
                least, most = geometry.tile_range(setting)
                if not geometry.takes_whole_image(setting):
                    at = geometry.layout(image.height, image.width, setting)
                    least = most = at.num_crops
                    # Where the processor comes to the same tiling by itself, its thumbnail is made of the image.
                    own = tiling(image.height, image.width, geometry.tile, least, most)
                    if own != at.tiling or setting.resize_to_fill is not None:
                        image = lay_on_canvas(image, at, fit_of(setting), image_processor.resample)
                made = image_processor(
                    [image], crop_to_patches=True, min_patches=least, max_patches=most, return_tensors="pt"
                )
                pixels: torch.Tensor = made["pixel_values"]
                return pixels

        return InternVLProcessor(tokenizer)


def _tower_weights(vision: Config) -> int:
    """Weights of the vision tower."""
    width: int = vision["hidden_size"]
    blocks: int = vision["num_hidden_layers"]
    patch = side(vision["patch_size"])
    positions = (side(vision["image_size"]) // patch) ** 2 + 1
    block = vision_block(width, vision["intermediate_size"]) + 2 * width  # LayerScale behind attention and MLP
    if not vision["attention_bias"]:
        block -= 3 * width
    if vision["use_qk_norm"]:
        block += 2 * width
    if vision["norm_type"] == "rms_norm":
        block -= 2 * width
    return (
        width * (2 if vision["use_mask_token"] else 1)  # the class token is the other
        + linear(vision["num_channels"] * patch**2, width)
        + (positions * width if vision["use_absolute_position_embeddings"] else 0)
        + blocks * block
        + (0 if vision["use_mean_pooling"] else layer_norm(width))
    )


FAMILY = InternVL()

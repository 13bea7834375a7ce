"""InternVL3: a grid of square tiles chosen by aspect, with a thumbnail when there is more than one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knobs.vision import VisionLayout, VisionSetting
from workers.models.family import Config, Family, Registered, as_int

if TYPE_CHECKING:
    from PIL import Image

    from workers.models.processing import ImageTensors, Processor

START, CONTEXT, STOP = "<img>", "<IMG_CONTEXT>", "</img>"
MOST_TILES = 36


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
class InternVLGeometry:
    """Tile size in pixels, vision tokens per tile, and the checkpoint's own range of tiles."""

    tile: int
    tokens_per_tile: int
    least_tiles: int
    most_tiles: int
    axes: tuple[str, ...] = ("tiles",)

    def refuse(self, setting: VisionSetting) -> str | None:
        if setting.knob == "native":
            return None
        if setting.knob not in self.axes:
            return f"this family has no vision knob {setting.knob}"
        tiles = as_int(setting.value)
        if tiles is None or not 1 <= tiles <= MOST_TILES:
            return f"tiles must be 1 to {MOST_TILES}"
        return None

    def tile_range(self, setting: VisionSetting) -> tuple[int, int]:
        """Fewest and most tiles: pinned by the dial, the checkpoint's own for native."""
        tiles = as_int(setting.value)
        return (self.least_tiles, self.most_tiles) if tiles is None else (tiles, tiles)

    def layout(self, height: int, width: int, setting: VisionSetting) -> VisionLayout:
        rows, columns = tiling(height, width, self.tile, *self.tile_range(setting))
        crops = rows * columns
        passes = crops + 1 if crops > 1 else 1
        tokens = passes * self.tokens_per_tile
        return VisionLayout((rows, columns), crops, passes, tokens, rows * self.tile, columns * self.tile, tokens)

    def pinned(self, setting: VisionSetting) -> VisionLayout | None:
        least, most = self.tile_range(setting)
        # Only the counts are pinned, not the tiling: 6 tiles are 2 x 3 or 3 x 2 by the image's aspect.
        return self.layout(self.tile, self.tile, setting) if least == most else None


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
            int(preprocessor["size"]["height"]),
            int(config["image_seq_length"]),
            int(preprocessor.get("min_patches", 1)),
            int(preprocessor.get("max_patches", 12)),
        )

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor:
        from transformers import GotOcr2ImageProcessorPil

        from workers.models.processing import CuttingProcessor, ImageTensors

        geometry = self.geometry(config, preprocessor)
        image_processor = GotOcr2ImageProcessorPil(**preprocessor)

        class InternVLProcessor(CuttingProcessor):
            image_token, template_image, prompt_image = CONTEXT, CONTEXT, CONTEXT

            def cut(self, images: Sequence[Image.Image], setting: VisionSetting) -> ImageTensors:
                least, most = geometry.tile_range(setting)
                made = image_processor(
                    list(images), crop_to_patches=True, min_patches=least, max_patches=most, return_tensors="pt"
                )
                passes = [int(n) for n in made["num_patches"]]
                placeholders = [START + CONTEXT * (geometry.tokens_per_tile * n) + STOP for n in passes]
                crops = sum(n - 1 if n > 1 else 1 for n in passes)  # a split image has a thumbnail beside its crops
                return ImageTensors({"pixel_values": made["pixel_values"]}, placeholders, crops)

        return InternVLProcessor(tokenizer)


FAMILY = InternVL()

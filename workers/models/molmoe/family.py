"""MolmoE as a family: what is registered, its geometry of overlapping crops, and its prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knobs.card import Parameters
from knobs.crop_grid import CropGrid, CropGridGeometry
from knobs.overlapping_crops import (
    CELLS_PER_SIDE,
    CELLS_PER_STRIDE,
    CROP,
    GRID,
    MARGIN,
    PATCH,
    PATCHES_PER_SIDE,
    STRIDE,
    TOKENS_PER_CROP,
    adaptive_tiling,
    prompt_image_length,
    prompt_vision_tokens,
)
from knobs.placement import fit_of
from knobs.tiling import Tiling
from knobs.vision import NATIVE, VisionSetting
from workers.errors import SampleError
from workers.models.family import Architecture, Config, Family, Pipeline, Registered
from workers.models.molmoe.published import MEAN, PUBLISHED_VISION, STD, TEXT_NAMES
from workers.models.parameters import Decoder, layer_norm, linear, vision_block
from workers.models.words import complete, language_sizes, normalise_step, whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from workers.models.processing import Inputs, Processor, Tensors

START, END, PATCH_TOKEN, COLUMN, IMAGE = "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"


@dataclass(frozen=True)
class MolmoEGeometry(CropGridGeometry):
    """Overlapping crops; `max_crops` is what the checkpoint's own preprocessing keeps to."""

    max_crops: int

    options = ("force_full_tokens", "resize_to_fill")

    @property
    def grid(self) -> CropGrid:
        return GRID

    def own_tiling(self, height: int, width: int, setting: VisionSetting) -> Tiling:
        return adaptive_tiling(height, width, self.max_crops)

    def prompt_tokens(self, tiling: Tiling, setting: VisionSetting) -> tuple[int, int]:
        full = setting.force_full_tokens or False
        vision = prompt_vision_tokens(*tiling, full)
        return vision, prompt_image_length(*tiling, full) - vision

    def default_fill(self, setting: VisionSetting) -> bool:
        # The model's own preprocessing shows the whole image; a knob fills the canvas it asks for.
        return setting.knob != NATIVE


def _published(**changes: Any) -> dict[str, Any]:
    """The published config.json of MolmoE-1B-0924, as far as it decides what is computed."""
    return {
        "vocab_size": 50280,
        "embedding_size": 50304,
        "additional_vocab_size": 128,
        "d_model": 2048,
        "n_layers": 16,
        "n_heads": 16,
        "mlp_ratio": 1,
        "moe_num_experts": 64,
        "moe_top_k": 8,
        "rope_theta": 10000.0,
        "layer_norm_eps": 1e-5,
        "vit_layers": [-2, -9],
        "text_config": {"num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8},
        **changes,
    }


# The geometry of images is the published one, 577 positions in every crop; everything else is small.
_TINY = _published(
    vocab_size=512,
    embedding_size=512,
    additional_vocab_size=16,
    d_model=128,
    n_layers=6,
    n_heads=4,
    moe_num_experts=16,
    moe_top_k=4,
    vit_layers=[-1, -2],
    vision_backbone={
        "image_emb_dim": 32,
        "image_num_heads": 2,
        "image_num_key_value_heads": 2,
        "image_head_dim": 16,
        "image_num_layers": 2,
        "image_mlp_dim": 64,
    },
    text_config={"num_hidden_layers": 6, "num_experts": 16, "num_experts_per_tok": 4},
)


class MolmoE(Family):
    name = "molmoe"
    model_types = ("molmo",)
    special_tokens = (START, END, PATCH_TOKEN, COLUMN, IMAGE)
    # The published weights are a pytorch_model.bin; it is read as tensors only, never as a program.
    weight_suffixes = (".safetensors", ".bin")
    own_weight_layout = True

    @property
    def registered(self) -> Mapping[str, Registered]:
        preprocessor = {"max_crops": 12, "base_image_input_size": [CROP, CROP], "image_patch_size": PATCH}
        return {
            "molmoe-1b": Registered(self.name, _published(), preprocessor, "allenai/MolmoE-1B-0924"),
            "tiny-molmoe": Registered(self.name, _TINY, preprocessor),
        }

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        return {
            "image_start_token_id": ids[START],
            "image_end_token_id": ids[END],
            "image_patch_token_id": ids[PATCH_TOKEN],
            "image_col_token_id": ids[COLUMN],
        }

    def language_model(self, config: Config) -> Config:
        named = {ours: config[theirs] for theirs, ours in TEXT_NAMES.items() if theirs in config}
        return {**named, "norm_topk_prob": False, **(config.get("text_config") or {})}

    def geometry(self, config: Config, preprocessor: Config) -> MolmoEGeometry:
        size, patch = (
            preprocessor.get("base_image_input_size", [CROP, CROP]),
            preprocessor.get("image_patch_size", PATCH),
        )
        if size not in ([CROP, CROP], (CROP, CROP)) or patch != PATCH:
            raise ValueError(f"crops of {CROP} pixels and patches of {PATCH}")
        return MolmoEGeometry(whole({"max_crops": 12, **preprocessor}, "max_crops"))

    def architecture(self, config: Config) -> Architecture:
        defaults = {name: value for name, value in _published().items() if name != "text_config"}
        config, backbone = (
            complete(defaults, config),
            complete(PUBLISHED_VISION, config.get("vision_backbone"), "vision_backbone"),
        )
        text = self.language_model(config)
        width, layers, features = backbone["image_emb_dim"], backbone["image_num_layers"], config["vit_layers"]
        joined, positions = width * len(features), math.isqrt(backbone["image_num_pos"] - 1) ** 2 + 1
        # Gate and up projection of an expert share the width that the key names; the projector has the same.
        inner = int(text.get("intermediate_size") or _mlp_width(config) // 2)
        decoder = _decoder(text, inner, config["additional_vocab_size"])
        tower = (
            (1 + positions) * width  # the class token beside the positions
            + linear(3 * backbone["image_patch_size"] ** 2, width, bias=False)
            + layer_norm(width)
            + layers * vision_block(width, backbone["image_mlp_dim"])
        )
        marks = 2 * joined
        pooling = 3 * linear(joined, width) + linear(width, width)
        projector = marks + pooling + 2 * linear(width, inner, False) + linear(inner, decoder.width, False)
        words = {**text, "model_type": "olmoe", "intermediate_size": None, "moe_intermediate_size": inner}
        words["num_key_value_heads"] = decoder.key_value_heads
        return Architecture(
            f"CLIP: {layers} blocks, width {width}, {backbone['image_num_heads']} heads, "
            f"MLP {backbone['image_mlp_dim']}, patches of {PATCH} px, images of {CROP} px; features are the outputs of "
            f"blocks {' and '.join(map(str, features))} side by side, {joined} numbers a patch",
            f"attention over every 2 x 2 patches, asked by their mean, {joined} -> {width}, then gated MLP {width} -> "
            f"{inner} -> {decoder.width}; learned marks on patches that are padding",
            language_sizes(words, decoder.tied),
            Parameters(tower, projector, decoder.weights, decoder.active_weights),
        )

    def pipeline(self, config: Config, preprocessor: Config) -> Pipeline:
        most = self.geometry(config, preprocessor).max_crops
        side, step, shared = CELLS_PER_SIDE, CELLS_PER_STRIDE, CELLS_PER_SIDE - CELLS_PER_STRIDE
        row = f"{PATCH_TOKEN} then {COLUMN}"
        return Pipeline(
            f"{CROP} x {CROP} px for each crop and the global view: {PATCHES_PER_SIDE} x {PATCHES_PER_SIDE} patches of "
            f"{PATCH} px, {TOKENS_PER_CROP} vision tokens",
            (
                "convert to RGB, 0 to 1",
                f"choose R x C crops, at most {most}: those that enlarge the image least, or else shrink it least",
                f"resize onto a canvas of {STRIDE} R + {MARGIN} by {STRIDE} C + {MARGIN} px, the aspect kept, bilinear "
                "with antialiasing, centred, black around",
                f"in front of the crops, the image in the same way on {CROP} x {CROP} px as global view, always",
                normalise_step(MEAN, STD),
                f"cut into crops of {CROP} x {CROP} px every {STRIDE} px: neighbours overlap by {MARGIN} px, and of "
                f"the {shared} rows or columns of vision tokens that they share, each keeps {shared // 2}",
            ),
            "crops: [1] in a sweep; with the published processor (code of the checkpoint, never run here) "
            "images_kwargs={'max_crops': 1} in the call of process. The global view stays: "
            f"{2 * TOKENS_PER_CROP} vision tokens",
            "transformers has no processor for it, and the published one makes one prompt at a time, (crops of all "
            f"images, {PATCHES_PER_SIDE**2}, {3 * PATCH**2}). Padded in a batch: crops of -1 up to the most of one "
            "prompt go through the vision tower and are zeroed behind it. Here the crops of all samples stand in one "
            "row: no padding",
            True,
            True,
            (
                f"before the global view: {START}",
                f"each of its {side} rows: {side} x {row}",
                f"behind it: {END}",
                f"before the crops: {START}",
                f"each of the {step}R + {shared} rows of R x C crops: ({step}C + {shared}) x {row}",
                f"behind them: {END}",
            ),
        )

    def register_classes(self) -> None:
        import workers.models.molmoe.modeling  # noqa: F401  registers itself

    def load_weights(self, folder: Path, dtype: torch.dtype, device: torch.device, backends: Config) -> Any | None:
        from workers.models.molmoe.checkpoint import is_published, load_published
        from workers.models.molmoe.configuration import MolmoEConfig

        if not is_published(folder):
            return None
        config = MolmoEConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        return load_published(folder, config, dtype, device, **backends)

    def join_images(self, samples: Sequence[Inputs]) -> Tensors:
        """All crops as one row, the places of their windows counted through the rows of the left-padded batch.

        Crops that fill up a row per prompt, as the published code has them, would go through the vision tower.
        """
        import torch

        longest = max(sample.prompt["input_ids"].shape[1] for sample in samples)
        moved: list[torch.Tensor] = []
        rows = 0
        for sample in samples:
            places, (prompts, tokens) = sample.vision["image_input_idx"], sample.prompt["input_ids"].shape
            # A sample that is a batch counts its places through its own, shorter rows.
            at = (rows + places // tokens) * longest + (longest - tokens) + places % tokens
            moved.append(torch.where(places >= 0, at, places))
            rows += prompts
        return {**super().join_images(samples), "image_input_idx": torch.cat(moved)}

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor:
        import torch

        from workers.models.molmoe.preprocessing import SpecialTokens, preprocess
        from workers.models.processing import Inputs, Processor

        geometry = self.geometry(config, preprocessor)

        class MolmoEProcessor(Processor):
            """The published prompt: begin, the images, then ` User: QUESTION Assistant:`."""

            def __init__(self) -> None:
                self.tokenizer = tokenizer
                self.special = SpecialTokens(
                    start=config["image_start_token_id"],
                    end=config["image_end_token_id"],
                    patch=config["image_patch_token_id"],
                    column=config["image_col_token_id"],
                )
                self.image_token_id = self.special.patch
                # The published tokenizer has no begin token and begins with its end token.
                begin = tokenizer.bos_token_id
                self.begin = tokenizer.eos_token_id if begin is None else begin

            def __call__(self, images: Sequence[Image.Image], question: str, setting: VisionSetting) -> Inputs:
                for token in MolmoE.special_tokens:
                    if token in question:
                        raise SampleError(f"the question contains {token}, which stands for an image")
                setting = geometry.complete(setting)
                fit, full = fit_of(setting), setting.force_full_tokens or False
                tokens = [torch.tensor([self.begin])]
                pixels, masks, places = [], [], []
                crops = 0
                for image in images:
                    tiling = geometry.tiling(image.height, image.width, setting)
                    cut = preprocess(image, tiling, self.special, fit=fit, force_full_tokens=full)
                    before = sum(len(part) for part in tokens)
                    tokens.append(cut.token_ids)
                    pixels.append(cut.images)
                    masks.append(cut.image_masks)
                    places.append(torch.where(cut.image_input_idx >= 0, cut.image_input_idx + before, -100))
                    crops += tiling[0] * tiling[1]
                text = tokenizer(f" User: {question} Assistant:", add_special_tokens=False)["input_ids"]
                ids = torch.cat([*tokens, torch.tensor(text)])[None]
                return Inputs(
                    {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                    {
                        "pixel_values": torch.cat(pixels),
                        "image_masks": torch.cat(masks),
                        "image_input_idx": torch.cat(places),
                    },
                    crops,
                    int((ids == self.image_token_id).sum()),
                )

        return MolmoEProcessor()


def _mlp_width(config: Config) -> int:
    """Width of gate and up projection together."""
    width = config.get("mlp_hidden_size")
    return int(config["mlp_ratio"] * config["d_model"]) if width is None else int(width)


def _decoder(text: Config, expert_width: int, additional_vocabulary: int) -> Decoder:
    """Sizes of the language model; the additional vocabulary is read and never written."""
    width, heads = text["hidden_size"], text["num_attention_heads"]
    head_width, shared = width // heads, text.get("num_key_value_heads") or heads
    return Decoder(
        blocks=text["num_hidden_layers"],
        width=width,
        heads=heads,
        key_value_heads=shared,
        head_width=head_width,
        embeddings=text["vocab_size"] + additional_vocabulary,
        logits=text["vocab_size"],
        tied=False,
        mlp_width=0,
        dense_blocks=0,
        query_key_norms=width + shared * head_width,
        experts=text["num_experts"],
        top_k=text["num_experts_per_tok"],
        expert_width=expert_width,
    )


FAMILY = MolmoE()

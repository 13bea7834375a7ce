"""MolmoE as a family: what is registered, its geometry of overlapping crops, and its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knobs.crop_grid import CropGrid, CropGridGeometry
from knobs.overlapping_crops import CROP, GRID, PATCH, adaptive_tiling, prompt_image_length, prompt_vision_tokens
from knobs.placement import fit_of
from knobs.tiling import Tiling
from knobs.vision import NATIVE, VisionSetting
from workers.errors import SampleError
from workers.models.family import Config, Family, Registered

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from workers.models.processing import Inputs, Processor

START, END, PATCH_TOKEN, COLUMN, IMAGE = "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"

# Published keys of config.json and what transformers calls them.
_LANGUAGE_MODEL = {
    "n_layers": "num_hidden_layers",
    "moe_num_experts": "num_experts",
    "moe_top_k": "num_experts_per_tok",
}


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
        named = {ours: config[theirs] for theirs, ours in _LANGUAGE_MODEL.items() if theirs in config}
        return {**named, **(config.get("text_config") or {})}

    def geometry(self, config: Config, preprocessor: Config) -> MolmoEGeometry:
        size, patch = (
            preprocessor.get("base_image_input_size", [CROP, CROP]),
            preprocessor.get("image_patch_size", PATCH),
        )
        if list(size) != [CROP, CROP] or patch != PATCH:
            raise ValueError(f"crops of {CROP} pixels and patches of {PATCH}")
        return MolmoEGeometry(int(preprocessor.get("max_crops", 12)))

    def register_classes(self) -> None:
        import workers.models.molmoe.modeling  # noqa: F401  registers itself

    def load_weights(self, folder: Path, dtype: torch.dtype, device: torch.device, backends: Config) -> Any | None:
        from workers.models.molmoe.checkpoint import is_published, load_published
        from workers.models.molmoe.configuration import MolmoEConfig

        if not is_published(folder):
            return None
        config = MolmoEConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        return load_published(folder, config, dtype, device, **backends)

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


FAMILY = MolmoE()

"""Cards: closed forms against counted weights, constants against transformers, steps and tokens against tensors."""

from __future__ import annotations

import ast
import copy
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import save, save_llava
from PIL import Image
from tiny import TINY, picture, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from knobs.card import Card, Parameters
from knobs.vision import VisionSetting
from workers.models import REGISTERED, describe
from workers.models import internvl as internvl_file
from workers.models import qwen3_vl_moe as qwen_file
from workers.models import smolvlm as smolvlm_file
from workers.models.adapter import PROJECTORS
from workers.models.family import NO_PROCESSOR
from workers.models.molmoe import family as molmoe_file
from workers.models.parameters import DENSE_DECODERS
from workers.models.registry import family_named

TOWERS = {"vision_model", "vision_tower", "visual"}
MERGERS = {*PROJECTORS, "deepstack_merger_list"}


def card_of(name: str) -> Card:
    return describe(name, random_weights=True).card()


# -- parameters -------------------------------------------------------------------------------------------------------


def on_meta(config: Mapping[str, Any], family: str) -> nn.Module:
    """The model that a configuration describes, without memory for its weights."""
    family_named(family).register_classes()
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**copy.deepcopy(dict(config))))
    return model


def counted(model: Any) -> Parameters:
    """The same numbers from the tensors of a model; experts are the parameters that have a row per expert."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        places = set(name.split("."))
        part = "projector" if places & MERGERS else "vision" if places & TOWERS else "language"
        parts[part] += parameter.numel()
    text = model.config.get_text_config(decoder=True)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    asleep = experts - experts * text.num_experts_per_tok // text.num_experts if experts else 0
    return Parameters(parts["vision"], parts["projector"], parts["language"], parts["language"] - asleep)


@pytest.mark.parametrize("name", REGISTERED)
def test_the_closed_form_equals_the_weights_counted(name: str) -> None:
    model = describe(name, random_weights=True)
    assert model.card().parameters == counted(on_meta(model.config, model.family.name))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smolvlm2-256m", 256.48),
        ("smolvlm2-500m", 507.48),
        ("smolvlm2-2.2b", 2246.78),
        ("internvl3-1b", 938.19),
        ("internvl3-2b", 2088.96),
        ("internvl3-8b", 7944.37),
        ("qwen3-vl-30b-a3b", 31070.75),
    ],
)
def test_published_sizes(name: str, millions: float) -> None:
    parameters = card_of(name).parameters
    assert parameters is not None
    assert round(parameters.total / 1e6, 2) == millions


def test_molmoe_has_as_many_weights_as_its_checkpoint_and_uses_as_many_as_it_advertises() -> None:
    parameters = card_of("molmoe-1b").parameters
    assert parameters is not None
    assert parameters.total == 7_221_875_712
    active = parameters.vision + parameters.projector + parameters.active_language
    assert round(active / 1e9, 3) == 1.585


@pytest.mark.parametrize("name", [name for name in REGISTERED if describe(name, random_weights=True).routing is None])
def test_a_token_passes_through_all_of_a_dense_model(name: str) -> None:
    parameters = card_of(name).parameters
    assert parameters is not None
    assert parameters.active_language == parameters.language


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a registered model with other entries; those of a part are merged into it."""
    config = copy.deepcopy(dict(describe(name, random_weights=True).config))
    for entry, value in changes.items():
        config[entry] = {**config[entry], **value} if isinstance(value, dict) and entry in config else value
    return config


LLAMA = {"model_type": "llama", "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96}
QWEN3 = {"model_type": "qwen3", "attention_bias": True, "head_dim": 48}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "smolvlm, tied": ("smolvlm", changed("tiny-smolvlm", tie_word_embeddings=True)),
    "smolvlm, biases": ("smolvlm", changed("tiny-smolvlm", text_config={"attention_bias": True, "mlp_bias": True})),
    "idefics3": ("smolvlm", {**changed("tiny-smolvlm"), "model_type": "idefics3"}),
    "smolvlm, all left to the classes": ("smolvlm", {"model_type": "smolvlm"}),
    "smolvlm, half of it said": (
        "smolvlm",
        {"model_type": "smolvlm", "vision_config": {"patch_size": 16}, "text_config": LLAMA},
    ),
    "internvl, tied as its class has it": (
        "internvl",
        {k: v for k, v in changed("tiny-internvl").items() if k != "tie_word_embeddings"},
    ),
    "internvl, llama": ("internvl", {**changed("tiny-internvl"), "text_config": LLAMA}),
    "internvl, qwen3": ("internvl", changed("tiny-internvl", text_config=QWEN3)),
    "internvl, another vision tower": (
        "internvl",
        changed(
            "tiny-internvl",
            vision_config={
                "attention_bias": False,
                "use_qk_norm": True,
                "norm_type": "rms_norm",
                "use_mask_token": True,
                "use_mean_pooling": False,
                "use_absolute_position_embeddings": False,
            },
        ),
    ),
    "internvl, all left to the classes": ("internvl", {"model_type": "internvl"}),
    "qwen3_vl_moe, some dense blocks": (
        "qwen3_vl_moe",
        changed("tiny-qwen3-vl-moe", text_config={"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ),
    "qwen3_vl_moe, tied, biases, no head_dim": (
        "qwen3_vl_moe",
        changed("tiny-qwen3-vl-moe", tie_word_embeddings=True, text_config={"attention_bias": True, "head_dim": None}),
    ),
    "qwen3_vl_moe, all left to the classes": ("qwen3_vl_moe", {"model_type": "qwen3_vl_moe"}),
    "molmoe, grouped heads, another width": ("molmoe", changed("tiny-molmoe", n_kv_heads=2, mlp_hidden_size=96)),
    "molmoe, all left to the classes": ("molmoe", {"model_type": "molmo"}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_closed_form_of_other_configurations(case: str) -> None:
    family, config = OTHERS[case]
    assert family_named(family).architecture(config).parameters == counted(on_meta(config, family))


def test_a_language_model_without_a_closed_form_is_described_all_the_same() -> None:
    text = {"model_type": "gemma2", "num_hidden_layers": 5, "hidden_size": 64, "vocab_size": 512}
    found = family_named("internvl").architecture({**changed("tiny-internvl"), "text_config": text})
    assert found.parameters is None
    assert found.language_model == "gemma2: 5 blocks, width 64, vocabulary 512, LM head of its own"


# -- constants that stand for transformers' defaults -----------------------------------------------------------------


def default_of(made: Any, name: str) -> Any:
    value = getattr(made, name)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("constants", "class_name"),
    [
        (smolvlm_file.VISION_DEFAULTS, "SmolVLMVisionConfig"),
        (smolvlm_file.VISION_DEFAULTS, "Idefics3VisionConfig"),
        (smolvlm_file.CONFIG_DEFAULTS, "SmolVLMConfig"),
        (smolvlm_file.CONFIG_DEFAULTS, "Idefics3Config"),
        (smolvlm_file.IMAGE_DEFAULTS, "SmolVLMImageProcessorPil"),
        (smolvlm_file.IMAGE_DEFAULTS, "Idefics3ImageProcessorPil"),
        (internvl_file.CONFIG_DEFAULTS, "InternVLConfig"),
        (internvl_file.VISION_DEFAULTS, "InternVLVisionConfig"),
        (internvl_file.IMAGE_DEFAULTS, "GotOcr2ImageProcessorPil"),
        (qwen_file.CONFIG_DEFAULTS, "Qwen3VLMoeConfig"),
        (qwen_file.VISION_DEFAULTS, "Qwen3VLMoeVisionConfig"),
        (qwen_file.TEXT_DEFAULTS, "Qwen3VLMoeTextConfig"),
        (qwen_file.IMAGE_DEFAULTS, "Qwen2VLImageProcessorPil"),
        (DENSE_DECODERS["llama"], "LlamaConfig"),
        (DENSE_DECODERS["qwen2"], "Qwen2Config"),
        (DENSE_DECODERS["qwen3"], "Qwen3Config"),
    ],
)
def test_constants_are_the_defaults_of_transformers(constants: Mapping[str, Any], class_name: str) -> None:
    made = getattr(transformers, class_name)()
    # Two of them are None in the classes' signature and worked out when an object is made.
    worked_out = {"num_key_value_heads": "num_attention_heads", "head_dim": None, "mlp_only_layers": None}
    for name, value in constants.items():
        if value is None:
            assert name in worked_out
            default = getattr(type(made), name, None)
            assert default is None
        elif name in ("image_size", "patch_size") and class_name == "InternVLVisionConfig":
            assert default_of(made, name) == [value, value]
        else:
            assert default_of(made, name) == value, name


def test_the_published_molmoe_is_the_default_of_its_configuration() -> None:
    from workers.models.molmoe.configuration import MolmoEConfig

    made = MolmoEConfig()
    for name, value in molmoe_file._published().items():
        if name != "text_config":
            assert default_of(made, name) == value, name


# -- steps ------------------------------------------------------------------------------------------------------------


def numbers(card: Card, pattern: str) -> list[int]:
    """The numbers in the first step that matches."""
    found = next(match for step in card.preprocessing if (match := re.search(pattern, step)))
    return [int(group) for group in found.groups()]


def statistics(card: Card) -> Callable[[Image.Image], torch.Tensor]:
    """What the card's last numeric steps do to an image: (3, height, width) in 0 to 255, rescaled and normalised."""
    step = next(s for s in card.preprocessing if s.startswith("normalise: "))
    assert "rescale by 1/255" in card.preprocessing
    found = re.match(r"normalise: mean ([\d. ]+), std ([\d. ]+?)(?: \(.*\))?$", step)
    assert found is not None
    mean, std = (torch.tensor([float(n) for n in group.split()]).view(-1, 1, 1) for group in found.groups())

    def apply(image: Image.Image) -> torch.Tensor:
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(image.height, image.width, 3)
        return (pixels.permute(2, 0, 1) / 255 - mean) / std

    return apply


def tiles_of(image: Image.Image, tile: int) -> list[Image.Image]:
    rows, columns = image.height // tile, image.width // tile
    corners = [(c * tile, r * tile) for r in range(rows) for c in range(columns)]
    return [image.crop((x, y, x + tile, y + tile)) for x, y in corners]


def pixels_of(name: str, image: Image.Image) -> torch.Tensor:
    return tiny_model(name).preprocess([image], "", VisionSetting()).vision["pixel_values"]


def test_the_steps_of_smolvlm_make_its_pixels() -> None:
    card, image = card_of("tiny-smolvlm"), picture(90, 60)
    (edge,), (tile,) = numbers(card, r"longest edge to (\d+) px"), numbers(card, r"multiples of (\d+) px")
    assert sum(step.endswith("LANCZOS") for step in card.preprocessing) == 3
    lanczos, normalised = Image.Resampling.LANCZOS, statistics(card)
    width = int(edge * 60 / 90)
    resized = image.resize((width + width % 2, edge), lanczos)
    canvas = resized.resize(tuple(-(-side // tile) * tile for side in resized.size), lanczos)
    views = [*tiles_of(canvas, tile), canvas.resize((tile, tile), lanczos)]
    expected = torch.stack([normalised(view) for view in views])
    torch.testing.assert_close(pixels_of("tiny-smolvlm", image)[0], expected, rtol=0, atol=1e-6)


def test_the_steps_of_internvl_make_its_pixels() -> None:
    card, image = card_of("tiny-internvl"), picture(60, 90)
    (tile,), (least, most) = numbers(card, r"grid times (\d+) px"), numbers(card, r"grid of (\d+) to (\d+) tiles")
    assert (least, most) == (1, 12)
    assert sum(step.endswith("BICUBIC") for step in card.preprocessing) == 2
    bicubic, normalised = Image.Resampling.BICUBIC, statistics(card)
    # 2 x 3 tiles have the image's aspect exactly, and no other grid of at most 12 has.
    views = [*tiles_of(image.resize((3 * tile, 2 * tile), bicubic), tile), image.resize((tile, tile), bicubic)]
    expected = torch.stack([normalised(view) for view in views])
    torch.testing.assert_close(pixels_of("tiny-internvl", image), expected, rtol=0, atol=1e-6)


def test_the_steps_of_qwen_make_its_pixels() -> None:
    card, image = card_of("tiny-qwen3-vl-moe"), picture(100, 150)
    factor, least, most = numbers(card, r"multiples of (\d+) px, (\d+) to (\d+) pixels")
    (patch,), (joined,) = numbers(card, r"patches of (\d+) x"), numbers(card, r", (\d+) x \d+ neighbours")
    (frames,), (length,) = numbers(card, r"over (\d+) frames"), numbers(card, r"rows of (\d+) numbers")
    height, width = round(100 / factor) * factor, round(150 / factor) * factor
    assert least < height * width < most
    assert next(step for step in card.preprocessing if step.startswith("resize")).endswith("BICUBIC")
    resized = statistics(card)(image.resize((width, height), Image.Resampling.BICUBIC))
    neighbours = [
        (y + dy * patch, x + dx * patch)
        for y in range(0, height, factor)
        for x in range(0, width, factor)
        for dy in range(joined)
        for dx in range(joined)
    ]
    cut = [resized[:, y : y + patch, x : x + patch] for y, x in neighbours]
    expected = torch.stack([part[:, None].expand(-1, frames, -1, -1).flatten() for part in cut])
    assert expected.shape[1] == length
    torch.testing.assert_close(pixels_of("tiny-qwen3-vl-moe", image), expected, rtol=0, atol=1e-6)


def test_the_statistics_of_molmo_are_those_that_it_normalises_with() -> None:
    from workers.models.molmoe.preprocessing import MEAN, STD

    step = next(s for s in card_of("molmoe-1b").preprocessing if s.startswith("normalise"))
    assert step.endswith("(OpenAI CLIP)")
    assert [float(n) for n in re.findall(r"[\d.]+", step)] == [*MEAN, *STD]


def test_switched_off_steps_are_not_told() -> None:
    family = family_named("smolvlm")
    model = describe("tiny-smolvlm", random_weights=True)
    off = dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad"), False)
    pipeline = family.pipeline(model.config, {**model.preprocessor, **off, "do_image_splitting": False})
    assert pipeline.preprocessing == ("squash to one crop of 32 x 32 px, LANCZOS",)
    assert not pipeline.padded


def test_a_checkpoint_decides_on_filter_and_statistics() -> None:
    model = describe("tiny-internvl", random_weights=True)
    other = {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "rescale_factor": 1 / 127.5}
    steps = model.family.pipeline(model.config, {**model.preprocessor, **other}).preprocessing
    assert steps[-2:] == ("rescale by 0.00784314", "normalise: mean 0.1 0.2 0.3, std 1")
    assert any(step.endswith("BILINEAR") for step in steps)


# -- image tokens -----------------------------------------------------------------------------------------------------


def written(line: str) -> str:
    """The text that a line of a card stands for: `WHERE: TOKENS then N x TOKEN then TOKENS`."""
    _, _, what = line.partition(": ")
    parts = [re.fullmatch(r"(?:(\d+) x )?(\S+)", part) for part in what.split(" then ")]
    assert all(parts), line
    return "".join(part[2].replace("\\n", "\n") * int(part[1] or 1) for part in parts if part)


def image_text(name: str, image: Image.Image) -> str:
    """The prompt of an image and no question, as its tokens stand for text."""
    vlm = tiny_model(name)
    assert vlm.processor is not None
    ids = vlm.preprocess([image], "", VisionSetting()).prompt["input_ids"][0]
    text: str = vlm.processor.tokenizer.decode(ids, skip_special_tokens=False)
    return text


def test_the_tokens_of_smolvlm() -> None:
    crop, after_row, after_last, overview, alone = card_of("tiny-smolvlm").image_tokens
    # 128 x 64 pixels at a longest edge of 128: four rows of two crops.
    rows = [
        "".join(written(crop.replace("row_R_col_C", f"row_{r}_col_{c}")) for c in (1, 2)) + written(after_row)
        for r in (1, 2, 3, 4)
    ]
    assert image_text("tiny-smolvlm", picture(128, 64)) == "".join(rows) + written(after_last) + written(overview)
    vlm = tiny_model("tiny-smolvlm")
    assert vlm.processor is not None
    ids = vlm.preprocess([picture(40, 30)], "", VisionSetting("longest_edge", 32)).prompt["input_ids"][0]
    assert vlm.processor.tokenizer.decode(ids, skip_special_tokens=False) == written(alone)


def test_the_tokens_of_internvl() -> None:
    before, tile, behind = card_of("tiny-internvl").image_tokens
    # 1 x 2 tiles of 32 pixels, and the thumbnail.
    assert image_text("tiny-internvl", picture(32, 64)) == written(before) + 3 * written(tile) + written(behind)


def test_the_tokens_of_qwen() -> None:
    before, square, behind = card_of("tiny-qwen3-vl-moe").image_tokens
    found = re.match(r"each (\d+) x (\d+) px", square)
    assert found is not None
    side = int(found[1])
    expected = written(before) + (128 // side) * (192 // side) * written(square) + written(behind)
    assert image_text("tiny-qwen3-vl-moe", picture(128, 192)) == expected


def test_the_tokens_of_molmo() -> None:
    before, row, behind, before_crops, crop_row, behind_crops = card_of("tiny-molmoe").image_tokens
    (count,) = re.findall(r"each of its (\d+) rows", row)
    found = re.match(r"each of the (\d+)R \+ (\d+) rows of R x C crops: \((\d+)C \+ (\d+)\) x", crop_row)
    assert found is not None
    a, b, c, d = map(int, found.groups())
    rows, columns = 1, 2
    line = re.sub(r"\(\d+C \+ \d+\)", str(c * columns + d), crop_row)
    expected = written(before) + int(count) * written(row) + written(behind)
    expected += written(before_crops) + (a * rows + b) * written(line) + written(behind_crops)
    # 224 pixels more per crop, and 112 of margins.
    text = image_text("tiny-molmoe", picture(336, 560))
    assert expected in text
    assert text.count("<im_start>") == 2


def test_what_one_crop_costs_is_what_the_setting_gives() -> None:
    """The sweep setting that a card names to switch splitting off keeps every image in one crop."""
    for name in TINY:
        model = describe(name, random_weights=True)
        found = re.match(r"(\w+): \[(\d+)\] in a sweep", model.card().splitting_off)
        if not model.geometry.axes:
            assert found is None
            continue
        assert found is not None, name
        setting = VisionSetting(found[1], int(found[2]))
        assert model.geometry.refuse(setting) is None
        pinned = model.geometry.pinned(model.geometry.complete(setting))
        assert pinned is not None
        assert pinned.num_crops == 1


# -- batching ---------------------------------------------------------------------------------------------------------


def test_transformers_pads_smolvlm_to_the_most_crops_and_no_other() -> None:
    from transformers import GotOcr2ImageProcessorPil, Qwen2VLImageProcessorPil, SmolVLMImageProcessorPil

    counts = [3, 2, 5]
    samples = [[picture(30, 30, seed) for seed in range(count)] for count in counts]
    flat = [image for sample in samples for image in sample]
    smolvlm, internvl, qwen = (
        describe(f"tiny-{n}", random_weights=True) for n in ("smolvlm", "internvl", "qwen3-vl-moe")
    )
    made = SmolVLMImageProcessorPil(**smolvlm.preprocessor)(samples, do_image_splitting=False, return_tensors="pt")
    assert made["pixel_values"].shape[:2] == (3, 5)
    assert made["pixel_attention_mask"].dtype == torch.int64
    assert (made["pixel_values"].flatten(2) != 0).any(-1).sum(1).tolist() == counts
    assert smolvlm.card().padded
    cut = GotOcr2ImageProcessorPil(**internvl.preprocessor)(flat, return_tensors="pt")
    assert len(cut["pixel_values"]) == sum(counts)
    packed = Qwen2VLImageProcessorPil(**qwen.preprocessor)(flat, return_tensors="pt")
    assert len(packed["pixel_values"]) == int(packed["image_grid_thw"].prod(-1).sum())
    assert (internvl.card().padded, qwen.card().padded) == (False, False)


@torch.inference_mode()
def test_padding_goes_through_the_tower_of_molmo_and_not_of_smolvlm() -> None:
    def crops_in_tower(name: str, tower: str, fill: float) -> int:
        vlm = tiny_model(name)
        vision = vlm.preprocess([picture(30, 30)], "", VisionSetting("crops", 1)).vision
        pixels = vision["pixel_values"]
        axis = 1 if pixels.ndim == 5 else 0
        extra = torch.full_like(pixels, fill)
        vision = {**vision, "pixel_values": torch.cat([pixels, extra], dim=axis)}
        if "image_masks" in vision:
            vision["image_masks"] = vision["image_masks"].repeat(2, 1)
            vision["image_input_idx"] = torch.cat([vision["image_input_idx"], vision["image_input_idx"] * 0 - 100])
        seen: list[int] = []
        module = vlm.model.get_submodule(tower)
        hook = module.register_forward_hook(lambda _, given, named, out: seen.append(len(out[0])), with_kwargs=True)
        vlm.encode_images(vision)
        hook.remove()
        assert pixels.shape[axis] in (1, 2)
        return seen[0] - pixels.shape[axis]

    assert crops_in_tower("tiny-smolvlm", "model.vision_model", 0.0) == 0
    assert not card_of("tiny-smolvlm").padding_in_tower
    assert crops_in_tower("tiny-molmoe", "model.vision_tower.transformer.resblocks.0", -1.0) > 0
    assert card_of("tiny-molmoe").padding_in_tower


# -- every model ------------------------------------------------------------------------------------------------------


def lines_of(card: Card) -> list[str]:
    single = [card.vision_tower, card.projector, card.language_model, card.target_size]
    return [*single, card.splitting_off, card.batching, *card.preprocessing, *card.image_tokens]


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_model_answers_every_question(name: str) -> None:
    card = card_of(name)
    assert card.parameters is not None
    assert all(lines_of(card))
    assert not any("not known" in line or "None" in line for line in lines_of(card))
    assert all("\n" not in line for line in lines_of(card))


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_folder_has_the_card_of_its_model(name: str, tmp_path: Path) -> None:
    folder = save(tiny_model(name), tmp_path / name)
    found = describe(str(folder)).card()
    assert found == card_of(name)
    assert found.parameters == counted(tiny_model(name).model)


def test_a_checkpoint_without_an_image_processor_says_so(tmp_path: Path) -> None:
    folder = save(tiny_model("tiny-smolvlm"), tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    card = describe(str(folder)).card()
    assert card.parameters == card_of("tiny-smolvlm").parameters
    assert card.preprocessing == card.image_tokens == (NO_PROCESSOR,)
    assert card.padded is None


def test_a_family_without_a_file_of_its_own(tmp_path: Path) -> None:
    save_llava(tmp_path)
    card = describe(str(tmp_path)).card()
    assert card.parameters is None
    assert card.vision_tower.startswith("clip_vision_model: 2 blocks, width 32, 2 heads")
    assert card.language_model.startswith("llama: 4 blocks, width 64, 4 heads, 2 key/value heads, MLP 128")
    assert "32 px" in card.target_size
    assert card.preprocessing == (
        "its own processor decides, the order too; its settings are:",
        "convert to RGB",
        "resize, shortest_edge 32, BICUBIC",
        "cut out the centre, height 32, width 32",
        "rescale by 1/255",
        "normalise: mean 0.48145466 0.4578275 0.40821073, std 0.26862954 0.26130258 0.27577711 (OpenAI CLIP)",
    )
    assert (card.padded, card.padding_in_tower) == (None, None)
    assert all("its own processor decides" in line for line in (card.splitting_off, card.batching))


def test_cards_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from knobs.card import described\n"
        f"cards = [described(name).card() for name in {list(REGISTERED)}]\n"
        "print(len(cards), sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    repository = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert ast.literal_eval(run.stdout.replace(" [", ", [", 1)) == (len(REGISTERED), [])

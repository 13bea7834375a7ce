"""Several samples through the vision tower in one pass: the answers and the features of each sample alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from checkpoints import SMALL_TEXT, SMALL_VISION, save_aria, save_gemma3, save_llava, sharpen
from tiny import NATIVE, TINY, picture, settings_of, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics2ImageProcessorPil,
    LlavaNextImageProcessorPil,
    PixtralImageProcessorPil,
)

from knobs.vision import VisionSetting
from workers.errors import SampleError
from workers.models import load
from workers.models.adapter import Features, VisionLanguageModel, merge_features
from workers.models.processing import Inputs, Tensors, join_images

# Different aspects, so that native preprocessing cuts them into different numbers of crops where a family cuts.
SIZES = [(60, 90), (200, 31), (40, 40)]
# MolmoE's crops are of 336 pixels in the tiny model too.
LARGE_SIZES = [(60, 90), (250, 700), (700, 400)]
QUESTIONS = ["What is in the picture?", "Why?", "How many shapes are there, and of what colour is each of them?"]
STRANGERS = {"llava": save_llava, "aria": save_aria, "gemma3": save_gemma3}
NEW_TOKENS = 8
# Of features of the order of one; rounding alone, for matrix products of other sizes add up in another order.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionLanguageModel]:
    """Models that no file of `workers.models` knows, with transformers' own processors."""
    made = {}
    for name, save in STRANGERS.items():
        folder = tmp_path_factory.mktemp(name)
        save(folder)
        made[name] = load(str(folder), dtype="float32", device="cpu")
    return made


@pytest.fixture(params=[*TINY, *STRANGERS])
def any_vlm(request: pytest.FixtureRequest, strangers: dict[str, VisionLanguageModel]) -> VisionLanguageModel:
    """Every registered tiny model and every stranger."""
    name = request.param
    return strangers[name] if name in strangers else tiny_model(name)


def sizes_for(vlm: VisionLanguageModel) -> list[tuple[int, int]]:
    """Height and width of each sample's image, in pixels."""
    return LARGE_SIZES if vlm.card.family.name == "molmoe" else SIZES


def settings_for(vlm: VisionLanguageModel) -> list[VisionSetting]:
    """Native, and where the family has vision axes the level under which the samples differ most in their crops."""

    def differences(setting: VisionSetting) -> tuple[int, int]:
        layouts = [vlm.card.geometry.layout(*size, setting) for size in sizes_for(vlm)]
        counts = [layout.num_crops for layout in layouts if layout is not None]
        return len(set(counts)), -sum(counts)

    settings = settings_of(vlm)
    return [NATIVE] if len(settings) == 1 else [NATIVE, max(settings[1:], key=differences)]


def samples(vlm: VisionLanguageModel, setting: VisionSetting = NATIVE) -> list[Inputs]:
    """Three samples on the host."""
    return [
        vlm.preprocess([picture(*size, seed)], question, setting)
        for seed, (size, question) in enumerate(zip(sizes_for(vlm), QUESTIONS, strict=True))
    ]


@torch.inference_mode()
def each_alone(vlm: VisionLanguageModel, parts: Sequence[Inputs]) -> list[tuple[Inputs, Features]]:
    """Every sample encoded in a pass of its own."""
    moved = [vlm.transfer(part) for part in parts]
    return [(part, vlm.encode_images(part.vision)) for part in moved]


@torch.inference_mode()
def in_one_pass(vlm: VisionLanguageModel, parts: Sequence[Inputs], count: int = NEW_TOKENS) -> list[list[int]]:
    """Exactly `count` tokens of every sample, as a batch is timed."""
    batch = vlm.transfer(vlm.collate(parts))
    features = vlm.encode_images(batch.vision)
    token, state = vlm.prefill(batch.prompt, batch.vision, features, count)
    tokens = [token]
    while len(tokens) < count:
        tokens.append(vlm.decode_step(tokens[-1], state))
    rows: list[list[int]] = torch.cat(tokens, dim=-1).tolist()
    return rows


@contextmanager
def endless(vlm: VisionLanguageModel) -> Iterator[None]:
    """Answers that never end, so that all have the same number of tokens."""
    ends = vlm.model.generation_config.eos_token_id
    vlm.model.generation_config.eos_token_id = -1
    try:
        yield
    finally:
        vlm.model.generation_config.eos_token_id = ends


@contextmanager
def tower_calls(vlm: VisionLanguageModel) -> Iterator[list[None]]:
    calls: list[None] = []
    hook = vlm.model.get_encoder(modality="image").register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def rows_of(value: Any) -> torch.Tensor:
    """Features of any layout as (vision tokens, width), in the order in which the language model reads them."""
    parts = value if isinstance(value, list | tuple) else [value]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def check_features(found: Features, expected: Features) -> None:
    assert found.keys() == expected.keys()
    torch.testing.assert_close(
        rows_of(found["pooler_output"]), rows_of(expected["pooler_output"]), rtol=CLOSE, atol=CLOSE
    )
    # DeepStack: one tensor per level of the tower.
    levels = zip(found.get("deepstack_features") or [], expected.get("deepstack_features") or [], strict=True)
    for mine, theirs in levels:
        torch.testing.assert_close(rows_of(mine), rows_of(theirs), rtol=CLOSE, atol=CLOSE)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_batch_answers_as_its_samples(any_vlm: VisionLanguageModel) -> None:
    with endless(any_vlm):
        for setting in settings_for(any_vlm):
            parts = samples(any_vlm, setting)
            assert len({part.num_prompt_tokens for part in parts}) == 3, "padding of different widths"
            if any_vlm.card.geometry.axes:
                assert len({part.num_crops for part in parts}) > 1, setting
            alone = each_alone(any_vlm, parts)
            expected = [any_vlm.answer([sample], NEW_TOKENS)[0] for sample in alone]
            assert len({tuple(row) for row in expected}) == 3, "the order of the samples counts"
            assert any_vlm.answer(alone, NEW_TOKENS) == expected
            assert in_one_pass(any_vlm, parts) == expected, setting
            assert in_one_pass(any_vlm, parts[::-1]) == expected[::-1], setting


def test_a_batch_answers_as_its_samples_under_the_other_knobs(any_vlm: VisionLanguageModel) -> None:
    parts = samples(any_vlm)
    alone = each_alone(any_vlm, parts)
    with endless(any_vlm):
        for blocks in (2, [0, 1, 3]):
            for top_k in (None,) if any_vlm.card.num_experts is None else (1, 3):
                with any_vlm.knobs(moe_top_k=top_k, active_blocks=blocks):
                    assert in_one_pass(any_vlm, parts) == any_vlm.answer(alone, NEW_TOKENS)


def test_samples_of_several_images(any_vlm: VisionLanguageModel) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(sizes_for(any_vlm))]
    parts = [
        any_vlm.preprocess(several, question, NATIVE)
        for several, question in zip(([images[0]], images, images[1:]), QUESTIONS, strict=True)
    ]
    with endless(any_vlm):
        assert in_one_pass(any_vlm, parts, 4) == any_vlm.answer(each_alone(any_vlm, parts), 4)


def test_a_batch_of_batches(any_vlm: VisionLanguageModel) -> None:
    parts = samples(any_vlm)
    # The longest prompt last, so that the first two are padded twice.
    first, second, third = sorted(parts, key=lambda part: part.num_prompt_tokens)
    nested = [any_vlm.collate([second, first]), third]
    with endless(any_vlm):
        assert in_one_pass(any_vlm, nested, 4) == in_one_pass(any_vlm, [second, first, third], 4)


@torch.inference_mode()
def test_the_answer_of_the_model_itself(any_vlm: VisionLanguageModel) -> None:
    """transformers' forward reads the batch too, pixels included."""
    batch = any_vlm.transfer(any_vlm.collate(samples(any_vlm)))
    logits = any_vlm.model(**batch.prompt, **batch.vision, use_cache=False).logits[:, -1]
    first = [row[:1] for row in in_one_pass(any_vlm, samples(any_vlm), 1)]
    # No positions are given, so some models count padding, too; that shifts a row as a whole, and rotary embeddings
    # are relative.
    assert logits.argmax(-1, keepdim=True).tolist() == first


# -- features and counts ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_features_are_those_of_the_samples(any_vlm: VisionLanguageModel) -> None:
    for setting in settings_for(any_vlm):
        parts = samples(any_vlm, setting)
        found = any_vlm.encode_images(any_vlm.transfer(any_vlm.collate(parts)).vision)
        check_features(found, merge_features([features for _, features in each_alone(any_vlm, parts)]))


@torch.inference_mode()
def test_the_tower_runs_once(any_vlm: VisionLanguageModel) -> None:
    batch = any_vlm.transfer(any_vlm.collate(samples(any_vlm)))
    tower_ends: list[None] = []
    with tower_calls(any_vlm) as calls:
        any_vlm.encode_images(batch.vision, lambda: tower_ends.append(None))
        assert len(calls) == len(tower_ends) == 1
        each_alone(any_vlm, samples(any_vlm))
        assert len(calls) == 4


def test_counts_are_sums(any_vlm: VisionLanguageModel) -> None:
    for setting in settings_for(any_vlm):
        parts = samples(any_vlm, setting)
        batch = any_vlm.collate(parts)
        assert batch.num_vision_tokens == sum(part.num_vision_tokens for part in parts) > 0
        crops = [part.num_crops for part in parts]
        assert batch.num_crops == (None if None in crops else sum(crop or 0 for crop in crops))
        assert batch.num_prompt_tokens == sum(part.num_prompt_tokens for part in parts)
        longest = max(part.num_prompt_tokens for part in parts)
        assert {tuple(tensor.shape) for tensor in batch.prompt.values()} == {(3, longest)}
        assert batch.vision.keys() == parts[0].vision.keys()


def test_crops_that_are_unknown_stay_unknown(vlm: VisionLanguageModel) -> None:
    first, second, _ = samples(vlm)
    assert vlm.collate([first, replace(second, num_crops=None)]).num_crops is None


def test_one_sample_is_itself(any_vlm: VisionLanguageModel) -> None:
    sample = samples(any_vlm)[0]
    assert any_vlm.collate([sample]) is sample


def test_no_sample_is_a_mistake(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match=r"^there is no sample to make a batch of$"):
        vlm.collate([])


def test_joining_leaves_the_samples_alone(any_vlm: VisionLanguageModel) -> None:
    parts, again = samples(any_vlm), samples(any_vlm)
    any_vlm.collate(parts)
    for part, fresh in zip(parts, again, strict=True):
        torch.testing.assert_close((part.prompt, part.vision), (fresh.prompt, fresh.vision), rtol=0, atol=0)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_no_crop_is_padding() -> None:
    """Padding crops would go through MolmoE's tower, and cost memory and transfer with SmolVLM."""
    for name, axis in (("tiny-smolvlm", 1), ("tiny-internvl", 0), ("tiny-molmoe", 0)):
        vlm = tiny_model(name)
        parts = samples(vlm)
        counts = [part.vision["pixel_values"].shape[axis] for part in parts]
        assert len(set(counts)) > 1, name
        shape = list(parts[0].vision["pixel_values"].shape)
        shape[axis] = sum(counts)
        assert list(vlm.collate(parts).vision["pixel_values"].shape) == shape, name


def test_places_of_molmoe_point_into_the_padded_batch() -> None:
    vlm = tiny_model("tiny-molmoe")
    parts = sorted(samples(vlm), key=lambda part: part.num_prompt_tokens)
    for batch in (vlm.collate(parts), vlm.collate([vlm.collate(parts[:2]), parts[2]])):
        is_patch = (batch.prompt["input_ids"] == vlm.model.config.image_patch_token_id).flatten().nonzero().flatten()
        places = batch.vision["image_input_idx"]
        assert torch.equal(places[places >= 0].sort().values, is_patch)
        assert set(places[places < 0].tolist()) <= {-100}


def small_images() -> list[Any]:
    return [picture(60, 90), picture(90, 30, 1), picture(33, 44, 2)]


LLAVA_NEXT = LlavaNextImageProcessorPil(
    size={"shortest_edge": 32},
    crop_size={"height": 32, "width": 32},
    image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32]],
)
IDEFICS2 = Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}, do_image_splitting=False)
PIXTRAL = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})


@pytest.mark.parametrize(
    ("processor", "nested"),
    [(LLAVA_NEXT, False), (IDEFICS2, True), (PIXTRAL, False)],
    ids=["llava_next", "idefics2", "pixtral"],
)
def test_padding_is_that_of_transformers(processor: Any, nested: bool) -> None:
    images = [[image] for image in small_images()] if nested else small_images()
    alone = [dict(processor([image], return_tensors="pt")) for image in images]
    whole = dict(processor(images, return_tensors="pt"))
    assert len({part["pixel_values"].shape for part in alone}) > 1
    joined = join_images(alone)
    assert joined.keys() == whole.keys()
    for name, tensor in whole.items():
        assert joined[name].dtype == tensor.dtype
        assert torch.equal(joined[name], tensor), name


def padded_models() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    vision = {**SMALL_VISION, "image_size": 32, "patch_size": 8}
    text: dict[str, Any] = {"model_type": "llama", **SMALL_TEXT}
    yield (
        "llava_next",
        partial(
            AutoConfig.for_model,
            "llava_next",
            image_grid_pinpoints=LLAVA_NEXT.image_grid_pinpoints,
            vision_config={**vision, "model_type": "clip_vision_model"},
            text_config=text,
        ),
        LLAVA_NEXT,
    )
    yield (
        "idefics2",
        partial(
            AutoConfig.for_model,
            "idefics2",
            vision_config={**vision, "image_size": 64, "model_type": "idefics2_vision"},
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            text_config={**text, "model_type": "mistral"},
        ),
        IDEFICS2,
    )
    yield (
        "mistral3",
        partial(
            AutoConfig.for_model,
            "mistral3",
            vision_config={**vision, "image_size": 64, "model_type": "pixtral", "head_dim": 16},
            text_config={**text, "model_type": "mistral"},
            spatial_merge_size=1,
        ),
        PIXTRAL,
    )


@pytest.mark.parametrize(
    ("config", "processor"),
    [pytest.param(config, processor, id=name) for name, config, processor in padded_models()],
)
@torch.inference_mode()
def test_a_model_sees_no_padding(config: Callable[[], Any], processor: Any) -> None:
    model = AutoModelForImageTextToText.from_config(config()).eval()
    sharpen(model)
    nested = isinstance(processor, Idefics2ImageProcessorPil)
    images = [[image] for image in small_images()] if nested else small_images()
    alone: list[Tensors] = [dict(processor([image], return_tensors="pt")) for image in images]

    def encoded(vision: Tensors) -> torch.Tensor:
        return rows_of(model.base_model.get_image_features(**vision, return_dict=True).pooler_output)

    found, expected = encoded(join_images(alone)), torch.cat([encoded(part) for part in alone])
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)


# -- what cannot be joined --------------------------------------------------------------------------------------------


def test_images_of_different_sizes_without_a_mask_are_refused(strangers: dict[str, VisionLanguageModel]) -> None:
    vlm = strangers["llava"]
    first, second, _ = samples(vlm)
    wider = replace(second, vision={"pixel_values": torch.zeros(1, 3, 32, 48)})
    with pytest.raises(SampleError) as caught:
        vlm.collate([first, wider])
    assert str(caught.value) == (
        "pixel_values of shapes (1, 3, 32, 32), (1, 3, 32, 48) cannot share a batch: they differ beyond the first "
        "axis, and nothing beside them says what would be padding"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # A position of (0, 0) is a position, so only pixels and masks may end in zeros.
        ({"pixel_mask": (1, 4), "positions": (1, 4)}, {"pixel_mask": (1, 6), "positions": (1, 6)}),
        # Padding fills axes and adds none.
        ({"pixel_mask": (1, 4)}, {"pixel_mask": (1, 1, 4)}),
        ({"pixel_mask": ()}, {"pixel_mask": ()}),
    ],
)
def test_other_tensors_that_differ_are_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    parts = [{name: torch.ones(shape) for name, shape in part.items()} for part in (one, other)]
    with pytest.raises(SampleError, match="cannot share a batch: they differ beyond the first axis"):
        join_images(parts)


def test_samples_with_different_entries_are_refused() -> None:
    one = {"pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(SampleError) as caught:
        join_images([one, {**one, "pixel_mask": torch.ones(1, 4, 4)}])
    assert str(caught.value) == ("samples with pixel_values and with pixel_values, pixel_mask cannot share a batch")


# -- the tests above would notice -------------------------------------------------------------------------------------


def test_images_in_the_wrong_order_would_be_noticed(
    any_vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images of one size, whose features fit into each other's places.
    parts = [any_vlm.preprocess([picture(60, 90, seed)], QUESTIONS[0], NATIVE) for seed in range(3)]
    with endless(any_vlm):
        expected = in_one_pass(any_vlm, parts)
        join = type(any_vlm.card.family).join_images
        monkeypatch.setattr(type(any_vlm.card.family), "join_images", lambda family, given: join(family, given[::-1]))
        assert in_one_pass(any_vlm, parts) != expected


def test_places_that_are_not_shifted_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_model("tiny-molmoe")
    parts = samples(vlm)
    with endless(vlm):
        expected = in_one_pass(vlm, parts)
        monkeypatch.setattr(
            type(vlm.card.family), "join_images", lambda _, given: join_images([part.vision for part in given])
        )
        assert in_one_pass(vlm, parts) != expected

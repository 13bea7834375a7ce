"""The contract of every model family, run for each registered tiny model: answers, stages, knobs, vision arithmetic."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import NATIVE, TINY, encoded, generated, logits, options_of, picture, settings_of, tiny_model
from transformers import AutoModelForImageTextToText, SmolVLMImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from knobs.blocks import active_blocks
from knobs.errors import KnobError
from knobs.experts import experts_per_token, routers
from knobs.tiling import Tier
from knobs.vision import VisionSetting
from workers.errors import SampleError
from workers.models import adapter
from workers.models.adapter import Features, VisionLanguageModel, kv_cache_bytes, left_pad, merge_features
from workers.models.internvl import tiling as internvl_tiling
from workers.models.processing import Inputs
from workers.models.qwen3_vl_moe import resized
from workers.models.smolvlm import tiling as smolvlm_tiling

SIZES = [(60, 90), (90, 40), (64, 64), (200, 31)]
QUESTION = "What is in the picture?"
MOE = tuple(name for name in TINY if tiny_model(name).card.num_experts is not None)


@pytest.fixture(params=MOE)
def moe(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return tiny_model(request.param)


def samples(vlm: VisionLanguageModel, setting: VisionSetting = NATIVE) -> list[tuple[Inputs, Features]]:
    return [
        encoded(vlm, [picture(*size, seed)], f"{QUESTION} {'why? ' * seed}", setting) for seed, size in enumerate(SIZES)
    ]


@torch.inference_mode()
def stepwise(vlm: VisionLanguageModel, inputs: Inputs, features: Features, count: int) -> list[int]:
    """Exactly `count` tokens, as the timed path makes them."""
    token, state = vlm.prefill(inputs.prompt, inputs.vision, features)
    tokens = [int(token)]
    while len(tokens) < count:
        token = vlm.decode_step(token, state)
        tokens.append(int(token))
    return tokens


def rebuilt(vlm: VisionLanguageModel, change: Any = None, state: dict[str, torch.Tensor] | None = None) -> Any:
    """Another torch model from the same configuration, changed by `change(text config)`, with the same weights."""
    config = copy.deepcopy(vlm.model.config)
    if change is not None:
        change(config.get_text_config(decoder=True))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config = vlm.model.generation_config
    model.load_state_dict(vlm.model.state_dict() if state is None else state)
    return model


def wrapped(model: Any, vlm: VisionLanguageModel) -> VisionLanguageModel:
    return VisionLanguageModel(model, vlm.processor, vlm.card, vlm.device)


def physically_smaller(vlm: VisionLanguageModel, keep: Sequence[int]) -> VisionLanguageModel:
    """A model that never had the other blocks: fewer layers in its configuration, the kept weights renumbered."""
    prefix = next(n for n, module in vlm.model.named_modules() if module is vlm.decoder) + ".layers."
    state = {}
    for name, tensor in vlm.model.state_dict().items():
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            if int(index) not in keep:
                continue
            name = f"{prefix}{list(keep).index(int(index))}.{rest}"
        state[name] = tensor

    def shorten(text: Any) -> None:
        text.num_hidden_layers = len(keep)
        if getattr(text, "layer_types", None):
            text.layer_types = [text.layer_types[i] for i in keep]

    return wrapped(rebuilt(vlm, shorten, state), vlm)


def neutralised(vlm: VisionLanguageModel, keep: Sequence[int]) -> VisionLanguageModel:
    """All blocks run, but those not kept add exactly zero to the residual stream: their last projections are zero."""
    copied = wrapped(rebuilt(vlm), vlm)
    with torch.no_grad():
        for i, layer in enumerate(copied.decoder.layers):
            if i not in keep:
                last = [p for n, p in layer.named_parameters() if re.search(r"\.(o_proj|down_proj)(\.weight)?$", n)]
                assert len(last) == 2, "one for attention, one for the feed-forward network"
                for parameter in last:
                    parameter.zero_()
    return copied


def number_of_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def own_forwards(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


# -- the tiny models are fit to test with -----------------------------------------------------------------------------


def test_outputs_depend_on_the_image_and_on_every_block(vlm: VisionLanguageModel) -> None:
    inputs, _ = encoded(vlm, [picture(60, 90, 0)], QUESTION)
    other, _ = encoded(vlm, [picture(60, 90, 1)], QUESTION)
    last = logits(vlm, inputs)[0, -1]
    # Half a standard deviation of the logits is far beyond rounding, and enough to change tokens.
    clearly = 0.5 * float(last.std())
    assert float((logits(vlm, other)[0, -1] - last).abs().max()) > clearly
    for block in range(vlm.card.num_blocks):
        with vlm.knobs(active_blocks=[i for i in range(vlm.card.num_blocks) if i != block]):
            assert float((logits(vlm, inputs)[0, -1] - last).abs().max()) > clearly, f"block {block}"


def test_outputs_depend_on_every_expert_count(moe: VisionLanguageModel) -> None:
    inputs, _ = encoded(moe, [picture(60, 90)], QUESTION)
    seen = []
    for k in (1, 2, 4, 8, 16):
        with moe.knobs(moe_top_k=k):
            seen.append(logits(moe, inputs)[0, -1])
    differences = [float((a - b).abs().max()) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(differences) > 0.1


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answer_equals_generate(vlm: VisionLanguageModel) -> None:
    for inputs, features in samples(vlm):
        expected = generated(vlm, inputs, 12)
        assert vlm.answer([(inputs, features)], 12) == [expected]
        assert stepwise(vlm, inputs, features, len(expected)) == expected


def test_answer_equals_generate_when_the_answer_ends_early(vlm: VisionLanguageModel) -> None:
    batch = samples(vlm)
    free = [generated(vlm, inputs, 12) for inputs, _ in batch]
    # A token that ends the first answer in its middle.
    end = next(token for i, token in enumerate(free[0]) if i >= 3 and token not in free[0][:i])
    vlm.model.generation_config.eos_token_id = end
    expected = [generated(vlm, inputs, 12) for inputs, _ in batch]
    assert 3 < len(expected[0]) < 12
    assert expected[0][-1] == end
    assert [vlm.answer([sample], 12)[0] for sample in batch] == expected
    assert vlm.answer(batch, 12) == expected


def test_several_ends_and_the_very_first_token_as_end(vlm: VisionLanguageModel) -> None:
    inputs, features = samples(vlm)[0]
    free = generated(vlm, inputs, 8)
    vlm.model.generation_config.eos_token_id = [free[0], free[3]]
    assert vlm.answer([(inputs, features)], 8) == [free[:1]] == [generated(vlm, inputs, 8)]


def test_a_batch_stops_when_its_last_answer_ends(vlm: VisionLanguageModel) -> None:
    answered = [(sample, generated(vlm, sample[0], 12)) for sample in samples(vlm)]
    (one, short), (other, long) = next(
        (a, b) for a in answered for b in answered if b[1][0] not in (a[1][0], b[1][3]) and a is not b
    )
    batch = [one, other]
    vlm.model.generation_config.eos_token_id = [short[0], long[3]]
    passes: list[None] = []
    counter = vlm.decoder.register_forward_hook(lambda *_: passes.append(None))
    answers = vlm.answer(batch, 12)
    counter.remove()
    assert 1 == len(answers[0]) < len(answers[1]) <= 4
    assert len(passes) == len(answers[1])


def test_the_cap_of_one_token(vlm: VisionLanguageModel) -> None:
    batch = samples(vlm)
    assert vlm.answer(batch, 1) == [generated(vlm, inputs, 1) for inputs, _ in batch]


def test_a_left_padded_batch_answers_as_one_by_one(vlm: VisionLanguageModel) -> None:
    batch = samples(vlm)
    assert len({inputs.num_prompt_tokens for inputs, _ in batch}) > 2, "padding of different widths"
    assert vlm.answer(batch, 12) == [vlm.answer([sample], 12)[0] for sample in batch]


def test_several_images_in_one_prompt(vlm: VisionLanguageModel) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(SIZES[:3])]
    inputs, features = encoded(vlm, images, QUESTION)
    alone = [encoded(vlm, [image], QUESTION)[0] for image in images]
    assert inputs.num_vision_tokens == sum(i.num_vision_tokens for i in alone)
    assert inputs.num_crops == sum(i.num_crops or 0 for i in alone)
    expected = generated(vlm, inputs, 10)
    assert vlm.answer([(inputs, features)], 10) == [expected]
    swapped = encoded(vlm, images[::-1], QUESTION)
    assert vlm.answer([swapped], 10) != [expected], "the order of the images counts"
    assert vlm.answer([(inputs, features), swapped], 10) == [expected, generated(vlm, swapped[0], 10)]


def test_a_question_without_an_image_is_refused(vlm: VisionLanguageModel) -> None:
    with pytest.raises(SampleError, match=r"^there is no image; a question needs at least one$"):
        vlm.preprocess([], QUESTION, NATIVE)


def test_features_serve_every_setting_of_the_other_knobs(vlm: VisionLanguageModel) -> None:
    inputs, kept = samples(vlm)[0]
    answers = set()
    for blocks in ([0, 1, 2, 3, 4, 5], [0, 2, 4], [1, 5]):
        for top_k in (None,) if vlm.card.num_experts is None else (1, 4):
            with vlm.knobs(moe_top_k=top_k, active_blocks=blocks):
                _, fresh = encoded(vlm, [picture(*SIZES[0])], QUESTION)
                answer = vlm.answer([(inputs, kept)], 10)
                assert answer == vlm.answer([(inputs, fresh)], 10) == [generated(vlm, inputs, 10)]
                answers.add(tuple(answer[0]))
    assert len(answers) >= 3, "the knobs change the answer, so the comparison says something"


def test_features_are_not_used_up(vlm: VisionLanguageModel) -> None:
    sample = samples(vlm)[0]
    before = {name: copy.deepcopy(value) for name, value in sample[1].items()}
    first = vlm.answer([sample], 6)
    assert vlm.answer([sample], 6) == first
    torch.testing.assert_close(dict(sample[1]), before, rtol=0, atol=0)


# -- vision arithmetic ------------------------------------------------------------------------------------------------


def tower_passes(inputs: Inputs) -> int:
    """Images that go through the tower, counted in the tensors: (1, tiles, ...), (tiles, ...) or packed patches."""
    if "image_grid_thw" in inputs.vision:
        return len(inputs.vision["image_grid_thw"])
    pixels = inputs.vision["pixel_values"]
    return pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0]


def tokens_without_an_image(vlm: VisionLanguageModel) -> int:
    """Prompt tokens of an empty question that are there whatever the image."""
    assert vlm.processor is not None
    if vlm.card.family.name == "molmoe":
        return 1 + len(vlm.processor.tokenizer(" User:  Assistant:")["input_ids"])
    return len(vlm.processor.tokenizer("")["input_ids"])


def random_sizes(count: int, largest: int, seed: int) -> list[tuple[int, int]]:
    """Sizes spread evenly over the orders of magnitude of their sides."""
    generator = random.Random(seed)
    return [(round(largest ** generator.random()), round(largest ** generator.random())) for _ in range(count)]


def test_the_closed_form_is_what_the_tensors_hold(vlm: VisionLanguageModel) -> None:
    settings = settings_of(vlm)
    # Of every axis at least two levels, native, and what the options make of some.
    assert len(settings) >= 1 + 2 * len(vlm.card.geometry.axes)
    settings += options_of(vlm)
    nothing = tokens_without_an_image(vlm)
    # No side beyond 199, because Qwen refuses aspects beyond 200; that has a test of its own.
    # Crops of 336 pixels cost the most time, and MolmoE's arithmetic has recordings of its own.
    random = 10 if vlm.card.family.name == "molmoe" else 60
    sizes = [(1, 1), (3, 3), (3, 199), (31, 33), (150, 1), *random_sizes(random, 199, seed=1)]
    for height, width in sizes:
        image = picture(height, width)
        for setting in settings:
            layout = vlm.card.geometry.layout(height, width, setting)
            assert layout is not None
            where = f"{height}x{width} {setting}"
            inputs = vlm.preprocess([image], "", setting)
            assert inputs.num_crops == layout.num_crops == layout.tiling[0] * layout.tiling[1], where
            assert inputs.num_vision_tokens == layout.prompt_vision_tokens, where
            beside = inputs.num_prompt_tokens - inputs.num_vision_tokens - nothing
            assert beside == layout.special_tokens, where
            assert layout.prompt_vision_tokens <= layout.vision_tokens, where
            if setting.force_full_tokens:
                assert layout.prompt_vision_tokens == layout.vision_tokens, where
            assert tower_passes(inputs) == layout.tower_passes, where
            pinned = vlm.card.geometry.pinned(setting)
            if pinned is not None:
                counts = (layout.num_crops, layout.tower_passes, layout.vision_tokens)
                assert counts == (pinned.num_crops, pinned.tower_passes, pinned.vision_tokens), where


def test_the_tower_emits_as_many_embeddings_as_the_prompt_has_places(vlm: VisionLanguageModel) -> None:
    for setting in settings_of(vlm):
        inputs, features = encoded(vlm, [picture(60, 90)], QUESTION, setting)
        made = features["pooler_output"]
        parts = made if isinstance(made, list | tuple) else [made]
        assert sum(part.numel() // part.shape[-1] for part in parts) == inputs.num_vision_tokens


def test_the_grid_of_smolvlm_is_that_of_its_image_processor() -> None:
    for longest, tile in [(1536, 384), (2048, 512), (450, 384)]:
        processor = SmolVLMImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
        # At 450 pixels, the odd side of 225 x 450 is made even, and that takes it into a second row.
        for height, width in [
            (1, 1),
            (10, 3000),
            (3000, 10),
            (480, 640),
            (225, 450),
            *random_sizes(12, 1500, seed=tile),
        ]:
            made = processor([[picture(height, width)]], return_row_col_info=True)
            expected = (made["rows"][0][0], made["cols"][0][0])
            assert smolvlm_tiling(height, width, longest, tile) == expected, (height, width, longest, tile)


def test_the_published_smolvlm_token_counts() -> None:
    """Vision tokens of 640x480 at longest edge 768, 1024, 1536, 2048, with tiles of 384 (81 tokens) and 512 (64)."""
    for tile, tokens, expected in [(384, 81, [405, 810, 1053, 2511]), (512, 64, [320, 320, 640, 832])]:
        grids = [smolvlm_tiling(480, 640, longest, tile) for longest in (768, 1024, 1536, 2048)]
        assert [(rows * columns + 1) * tokens for rows, columns in grids] == expected


def test_the_canvas_of_internvl_is_that_of_transformers() -> None:
    sizes = [(1, 1), (10, 3000), (3000, 10), (448, 448), (384, 384), (480, 640), *random_sizes(2000, 4000, seed=2)]
    for height, width in sizes:
        for least, most in [(1, 12), (1, 6), (4, 4), (12, 12)]:
            columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
            assert internvl_tiling(height, width, 448, least, most) == (rows, columns), (height, width, least, most)


def test_the_resize_of_qwen_is_that_of_transformers() -> None:
    refused = 0
    for height, width in [(1, 1), (10, 3000), (48, 80), (20, 4000), *random_sizes(2000, 6000, seed=3)]:
        for factor, least, most in [(32, 256**2, 4096**2), (16, 64**2, 256**2)]:
            if max(height, width) / min(height, width) > 200:
                with pytest.raises(ValueError, match="aspect ratio"):
                    smart_resize(height, width, factor, least, most)
                refused += 1
            else:
                expected = tuple(smart_resize(height, width, factor, least, most))
                assert resized(height, width, factor, least, most) == expected, (height, width)
    assert 0 < refused < 1500


def test_an_image_too_narrow_for_qwen_is_a_bad_sample() -> None:
    with pytest.raises(SampleError, match=r"^absolute aspect ratio must be smaller than 200, got 3000\.0$"):
        tiny_model("tiny-qwen3-vl-moe").preprocess([picture(1, 3000)], QUESTION, NATIVE)


@pytest.mark.parametrize("name", ["tiny-smolvlm", "tiny-internvl"])
def test_families_that_squash_take_any_aspect(name: str) -> None:
    vlm = tiny_model(name)
    for size in [(1, 3000), (3000, 1), (1, 1)]:
        inputs, features = encoded(vlm, [picture(*size)], QUESTION)
        assert vlm.answer([(inputs, features)], 4) == [generated(vlm, inputs, 4)]


def test_aspect_mismatch() -> None:
    geometry = tiny_model("tiny-smolvlm").card.geometry
    layout = geometry.layout(100, 200, VisionSetting("longest_edge", 64))
    assert layout is not None
    assert (layout.target_height, layout.target_width) == (32, 64)
    assert layout.aspect_mismatch == 0
    one_by_two = geometry.layout(100, 150, VisionSetting("image_size", "32x64"))
    assert one_by_two is not None
    assert one_by_two.aspect_mismatch == pytest.approx(0.5)


def test_settings_that_a_family_cannot_take(vlm: VisionLanguageModel) -> None:
    impossible = [
        VisionSetting("no_such_knob", 1),
        VisionSetting("longest_edge", 31),
        VisionSetting("longest_edge", 4097),
        VisionSetting("tiles", 0),
        VisionSetting("tiles", 37),
        VisionSetting("tier", "enormous"),
        VisionSetting("crops", 0),
        VisionSetting("crops", 65),
        VisionSetting("image_size", "100"),
        VisionSetting("image_size", "99999x99999"),
        VisionSetting("vision_tokens", 1),
        VisionSetting("tier", "giant", Tier("giant", 60, 70, (70,))),
    ]
    for setting in impossible:
        reason = vlm.card.geometry.refuse(setting)
        assert reason, setting
        with pytest.raises(KnobError) as caught:
            vlm.preprocess([picture(32, 32)], QUESTION, setting)
        assert str(caught.value) == f"{setting}: {reason}"


# -- prompts ----------------------------------------------------------------------------------------------------------


def text_tokens(vlm: VisionLanguageModel) -> int:
    assert vlm.processor is not None
    return len(vlm.processor.tokenizer(QUESTION)["input_ids"])


def test_prompt_overhead_of_smolvlm() -> None:
    """Three tokens round one tile; else two per tile, one per row's end and three, less the newlines that merge."""
    vlm = tiny_model("tiny-smolvlm")
    seen = set()
    for setting in settings_of(vlm):
        layout = vlm.card.geometry.layout(60, 90, setting)
        assert layout is not None
        rows, columns = layout.tiling
        overhead = 3 if layout.tower_passes == 1 else 2 * rows * columns + 3 + rows
        inputs = vlm.preprocess([picture(60, 90)], QUESTION, setting)
        assert inputs.num_prompt_tokens == layout.vision_tokens + overhead + text_tokens(vlm)
        seen.add(layout.tiling)
    assert {(1, 1), (2, 2), (2, 3), (3, 4)} <= seen


@pytest.mark.parametrize("name", ["tiny-internvl", "tiny-qwen3-vl-moe"])
def test_prompt_overhead_of_two(name: str) -> None:
    vlm = tiny_model(name)
    for setting in settings_of(vlm):
        inputs = vlm.preprocess([picture(60, 90)], QUESTION, setting)
        assert inputs.num_prompt_tokens == inputs.num_vision_tokens + 2 + text_tokens(vlm)


def test_a_question_cannot_smuggle_in_an_image(vlm: VisionLanguageModel) -> None:
    assert vlm.processor is not None
    token = vlm.processor.tokenizer.convert_ids_to_tokens(vlm.processor.image_token_id)
    with pytest.raises(SampleError) as caught:
        vlm.preprocess([picture(32, 32)], f"What does {token} mean?", NATIVE)
    assert str(caught.value) == f"the question contains {token}, which stands for an image"


# -- the width knob ---------------------------------------------------------------------------------------------------


def test_top_k_equals_a_model_built_with_it(moe: VisionLanguageModel) -> None:
    inputs, features = samples(moe)[0]
    for k in (1, 2, 3, 16):

        def route(text: Any, k: int = k) -> None:
            text.num_experts_per_tok = k

        built = wrapped(rebuilt(moe, route), moe)
        assert {router.top_k for router in routers(built.model)} == {k}
        with moe.knobs(moe_top_k=k):
            assert torch.equal(logits(moe, inputs), logits(built, inputs))
            assert moe.answer([(inputs, features)], 10) == built.answer([(inputs, features)], 10)


def test_every_block_has_a_router_and_top_k_comes_back(moe: VisionLanguageModel) -> None:
    found = routers(moe.model)
    assert len(found) == moe.card.num_blocks
    with moe.knobs(moe_top_k=1):
        assert [r.top_k for r in found] == [1] * len(found)
        with moe.knobs(moe_top_k=2):
            assert [r.top_k for r in found] == [2] * len(found)
        assert [r.top_k for r in found] == [1] * len(found)
    assert [r.top_k for r in found] == [moe.card.moe_top_k] * len(found)


@pytest.mark.parametrize("k", [0, -1, 17])
def test_a_top_k_beyond_the_experts(moe: VisionLanguageModel, k: int) -> None:
    expected = rf"^moe_top_k {k}: the model has 16 experts, so moe_top_k must be 1 to 16$"
    with pytest.raises(KnobError, match=expected), moe.knobs(moe_top_k=k):
        pass
    assert {r.top_k for r in routers(moe.model)} == {moe.card.moe_top_k}


def test_top_k_on_a_dense_model() -> None:
    vlm = tiny_model("tiny-smolvlm")
    assert vlm.card.num_experts is None
    with pytest.raises(KnobError, match=r"^moe_top_k: the model has no router whose top-k can be set$"):
        vlm.knobs(moe_top_k=2).__enter__()


def test_a_router_missed_would_be_noticed(moe: VisionLanguageModel) -> None:
    """The comparison with a model built with that k has teeth: one router left as it was breaks it."""
    inputs, _ = samples(moe)[0]
    with moe.knobs(moe_top_k=1):
        right = logits(moe, inputs)
        routers(moe.model)[3].top_k = 4  # type: ignore[assignment]
        assert not torch.equal(logits(moe, inputs), right)


# -- the depth knob ---------------------------------------------------------------------------------------------------

KEEPS = ([0, 1, 2, 3], [0, 2, 5], [0], [1, 2, 3, 4, 5], [2, 4], [5])


def deepstack_blocks(vlm: VisionLanguageModel) -> int:
    """Blocks that vision features are added behind, by position; they are not part of a block and stay."""
    vision = getattr(vlm.model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", ()))


def test_skipping_equals_a_physically_smaller_model(vlm: VisionLanguageModel) -> None:
    compared = 0
    for keep in KEEPS:
        if any(i not in keep for i in range(deepstack_blocks(vlm))):
            continue  # a smaller model would add them behind another block
        inputs, features = samples(vlm)[0]
        small = physically_smaller(vlm, keep)
        expected = small.answer([(inputs, features)], 10)
        with vlm.knobs(active_blocks=keep):
            assert torch.equal(logits(vlm, inputs), logits(small, inputs)), keep
            assert vlm.answer([(inputs, features)], 10) == expected == [generated(vlm, inputs, 10)], keep
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("keep", KEEPS)
def test_skipping_equals_blocks_that_add_nothing(vlm: VisionLanguageModel, keep: list[int]) -> None:
    batch = samples(vlm)
    reference = neutralised(vlm, keep)
    expected = reference.answer(batch, 10)
    with vlm.knobs(active_blocks=keep):
        assert torch.equal(logits(vlm, batch[0][0]), logits(reference, batch[0][0]))
        assert vlm.answer(batch, 10) == expected
    assert vlm.answer(batch, 10) != expected


def test_the_order_and_repetition_of_indices_mean_nothing(vlm: VisionLanguageModel) -> None:
    sample = samples(vlm)[0]
    with vlm.knobs(active_blocks=[0, 2, 5]):
        expected = vlm.answer([sample], 8)
    with vlm.knobs(active_blocks=[5, 0, 2, 2]):
        assert vlm.answer([sample], 8) == expected


@torch.inference_mode()
def test_a_skipped_block_holds_no_cache(vlm: VisionLanguageModel) -> None:
    inputs, features = samples(vlm)[0]

    def held(keep: Sequence[int]) -> int:
        with vlm.knobs(active_blocks=keep):
            token, state = vlm.prefill(inputs.prompt, inputs.vision, features)
            vlm.decode_step(token, state)
            return kv_cache_bytes(state)

    text = vlm.model.config.get_text_config(decoder=True)
    per_block = 2 * (inputs.num_prompt_tokens + 1) * text.num_key_value_heads * vlm.decoder.layers[0].self_attn.head_dim
    for keep in ([0], [3], [1, 4], [0, 1, 2, 3, 4], range(6)):
        assert held(keep) == len(keep) * per_block * 4


def test_everything_is_as_before_after_the_knobs(vlm: VisionLanguageModel) -> None:
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in vlm.model.state_dict().items()}
    config = copy.deepcopy(vlm.model.config.to_dict())
    hooks, forwards = number_of_hooks(vlm.model), own_forwards(vlm.model)
    sample = samples(vlm)[0]
    before = vlm.answer([sample], 8)
    options: dict[str, Any] = {"active_blocks": [1, 3], "moe_top_k": None if vlm.card.num_experts is None else 1}
    with vlm.knobs(**options):
        assert own_forwards(vlm.model) != forwards
        assert vlm.answer([sample], 8) != before

    def interrupted() -> None:
        with vlm.knobs(**options):
            vlm.answer([sample], 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (number_of_hooks(vlm.model), own_forwards(vlm.model)) == (hooks, forwards)
    assert vlm.model.config.to_dict() == config
    after = vlm.model.state_dict()
    assert after.keys() == state.keys()
    for name, (address, value) in state.items():
        assert after[name].data_ptr() == address, name
        assert torch.equal(after[name], value), name
    assert vlm.answer([sample], 8) == before


def test_a_forward_of_the_instances_own_comes_back(vlm: VisionLanguageModel) -> None:
    layer = vlm.decoder.layers[2]
    own = layer.forward
    layer.forward = own
    try:
        with vlm.knobs(active_blocks=[0, 1]):
            assert layer.__dict__["forward"] is not own
        assert layer.__dict__["forward"] is own
    finally:
        del layer.__dict__["forward"]


def test_all_blocks_register_nothing(vlm: VisionLanguageModel) -> None:
    hooks = number_of_hooks(vlm.model)
    for everything in (None, range(6), [5, 4, 3, 2, 1, 0]):
        with vlm.knobs(active_blocks=everything):
            assert number_of_hooks(vlm.model) == hooks
            assert own_forwards(vlm.model) == []
    with vlm.knobs(active_blocks=[0, 1, 2, 3, 4]):
        assert number_of_hooks(vlm.model) == hooks + 1
        assert len(own_forwards(vlm.model)) == 1


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ([], "active_blocks []: at least one block must run"),
        ([0, 6], "active_blocks [0, 6]: the model has blocks 0 to 5, not 6"),
        ([-1], "active_blocks [-1]: the model has blocks 0 to 5, not -1"),
    ],
)
def test_blocks_that_are_not_there(vlm: VisionLanguageModel, keep: list[int], reason: str) -> None:
    with pytest.raises(KnobError) as caught:
        vlm.knobs(active_blocks=keep).__enter__()
    assert str(caught.value) == reason
    assert own_forwards(vlm.model) == []


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_count_of_blocks_is_that_many_from_the_first_on(vlm: VisionLanguageModel, count: int) -> None:
    sample = samples(vlm)[0]
    with vlm.knobs(active_blocks=list(range(count))):
        expected = vlm.answer([sample], 8)
    with vlm.knobs(active_blocks=count):
        assert len(own_forwards(vlm.model)) == 6 - count
        assert vlm.answer([sample], 8) == expected


@pytest.mark.parametrize("count", [0, -1, 7])
def test_a_count_beyond_the_blocks(vlm: VisionLanguageModel, count: int) -> None:
    expected = rf"^active_blocks {count}: the model has 6 blocks, so active_blocks must be 1 to 6$"
    with pytest.raises(KnobError, match=expected), vlm.knobs(active_blocks=count):
        pass
    assert own_forwards(vlm.model) == []


def test_a_refused_depth_gives_the_width_back(moe: VisionLanguageModel) -> None:
    with pytest.raises(KnobError):
        moe.knobs(moe_top_k=1, active_blocks=[9]).__enter__()
    assert {r.top_k for r in routers(moe.model)} == {moe.card.moe_top_k}


def test_both_knobs_at_once(moe: VisionLanguageModel) -> None:
    inputs, features = samples(moe)[0]

    def route(text: Any) -> None:
        text.num_experts_per_tok = 2

    reference = physically_smaller(wrapped(rebuilt(moe, route), moe), [0, 3])
    with moe.knobs(moe_top_k=2, active_blocks=[0, 3]):
        assert moe.answer([(inputs, features)], 10) == reference.answer([(inputs, features)], 10)


# -- the comparisons have teeth: a wrong skip or a wrong batch does not pass ------------------------------------------


@contextmanager
def only_identity_forward(decoder: Any, keep: Sequence[int] | None) -> Iterator[None]:
    """The plausible wrong skip: the residual passes through, but the block keeps its empty place in the cache."""
    skipped = [layer for i, layer in enumerate(decoder.layers) if keep is not None and i not in keep]
    for layer in skipped:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in skipped:
            del layer.__dict__["forward"]


def test_a_skip_that_keeps_the_cache_slot_would_be_noticed(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = samples(vlm)

    def passes(keep: Sequence[int]) -> bool:
        expected = neutralised(vlm, keep).answer(batch, 10)
        try:
            with vlm.knobs(active_blocks=keep):
                return vlm.answer(batch, 10) == expected
        except (RuntimeError, IndexError):
            return False

    assert passes([1, 2, 3, 4, 5])
    monkeypatch.setattr(adapter, "only_blocks", only_identity_forward)
    assert not passes([1, 2, 3, 4, 5])


def test_positions_that_ignore_the_padding_would_be_noticed(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = samples(vlm)
    expected = [vlm.answer([sample], 12)[0] for sample in batch]

    def unmasked(prompts: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
        padded = left_pad(prompts, pad_token_id)
        return padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}

    monkeypatch.setattr(adapter, "left_pad", unmasked)
    assert vlm.answer(batch, 12) != expected


def test_features_in_the_wrong_order_would_be_noticed(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [encoded(vlm, [image], QUESTION) for image in (picture(60, 90), Image.new("RGB", (90, 60)))]
    expected = vlm.answer(batch, 12)
    monkeypatch.setattr(adapter, "merge_features", lambda parts: merge_features(parts[::-1]))
    assert vlm.answer(batch, 12) != expected


def test_the_knobs_work_without_the_adapter(moe: VisionLanguageModel) -> None:
    """`knobs` needs a module with `layers` and routers, nothing of `workers`."""
    inputs, _ = samples(moe)[0]
    with moe.knobs(moe_top_k=2, active_blocks=[0, 1]):
        expected = logits(moe, inputs)
    with experts_per_token(moe.model, 2), active_blocks(moe.decoder, [0, 1]):
        assert torch.equal(logits(moe, inputs), expected)

"""FLOPs of every stage against closed forms of every family, number for number; and that none is ever silently zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_aria, save_gemma3
from tiny import NATIVE, TINY, picture, settings_of, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations import moe as transformers_moe

from knobs.vision import VisionSetting
from workers import flops
from workers.flops import StageFlops, costs_something, count_flops
from workers.models import load
from workers.models.adapter import VisionLanguageModel
from workers.models.processing import Inputs, left_pad

MOE = tuple(name for name in TINY if tiny_model(name).card.num_experts is not None)
QUESTION = "What is in the picture?"
BACK_ENDS = ("eager", "grouped_mm", "batched_mm")


# -- closed forms: two operations per multiply-add --------------------------------------------------------------------


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and mixing of all heads together; every query meets every key."""
    return 2 * (2 * queries * keys * width)


def mlp(rows: int, width: int, inner: int) -> int:
    return linear(rows, width, inner) + linear(rows, inner, width)


def gated_mlp(rows: int, width: int, inner: int) -> int:
    return linear(rows, width, inner) + mlp(rows, width, inner)


def vision_block(tokens: int, width: int, inner: int) -> int:
    """Of one crop, whose tokens see one another."""
    return 4 * linear(tokens, width, width) + attention(tokens, tokens, width) + mlp(tokens, width, inner)


def text_block(text: Any, tokens: int, context: int, top_k: int | None) -> int:
    """One block of the language model for `tokens` new ones that see `context` of them, themselves included."""
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    of_queries, of_keys = text.num_attention_heads * head, text.num_key_value_heads * head
    projections = 2 * linear(tokens, width, of_queries) + 2 * linear(tokens, width, of_keys)
    if top_k is None:
        feed_forward = gated_mlp(tokens, width, text.intermediate_size)
    else:
        inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        feed_forward = linear(tokens, width, text.num_experts) + top_k * gated_mlp(tokens, width, inner)
    return projections + attention(tokens, context, of_queries) + feed_forward


def smolvlm_vision(config: Any, inputs: Inputs) -> tuple[int, int]:
    vision, crops = config.vision_config, inputs.vision["pixel_values"].shape[:2].numel()
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    embedding = linear(patches, 3 * vision.patch_size**2, width)
    blocks = vision.num_hidden_layers * vision_block(patches, width, vision.intermediate_size)
    joined = config.scale_factor**2
    return (
        crops * (embedding + blocks),
        crops * linear(patches // joined, joined * width, config.text_config.hidden_size),
    )


def internvl_vision(config: Any, inputs: Inputs) -> tuple[int, int]:
    vision, crops = config.vision_config, len(inputs.vision["pixel_values"])
    width, (height_of_patch, width_of_patch) = vision.hidden_size, vision.patch_size
    patches = (vision.image_size[0] // height_of_patch) * (vision.image_size[1] // width_of_patch)
    embedding = linear(patches, 3 * height_of_patch * width_of_patch, width)
    blocks = vision.num_hidden_layers * vision_block(patches + 1, width, vision.intermediate_size)  # and a class token
    joined, outputs = int(1 / config.downsample_ratio) ** 2, config.text_config.hidden_size
    tokens = patches // joined
    return (
        crops * (embedding + blocks),
        crops * (linear(tokens, joined * width, outputs) + linear(tokens, outputs, outputs)),
    )


def qwen_vision(config: Any, inputs: Inputs) -> tuple[int, int]:
    vision = config.vision_config
    width, merged = vision.hidden_size, vision.spatial_merge_size**2
    tower = projector = 0
    for patches in inputs.vision["image_grid_thw"].prod(dim=-1).tolist():
        tokens = patches // merged
        merger = linear(tokens, merged * width, merged * width) + linear(tokens, merged * width, vision.out_hidden_size)
        tower += linear(patches, 3 * vision.temporal_patch_size * vision.patch_size**2, width)
        tower += vision.depth * vision_block(patches, width, vision.intermediate_size)
        tower += len(vision.deepstack_visual_indexes) * merger  # DeepStack's mergers run between the blocks
        projector += merger
    return tower, projector


def molmoe_vision(config: Any, inputs: Inputs) -> tuple[int, int]:
    shape, text, crops = config.vision, config.get_text_config(decoder=True), len(inputs.vision["pixel_values"])
    patches, width = shape.patches_per_side**2, shape.width
    used_blocks = max(layer % shape.layers for layer in shape.feature_layers) + 1
    tower = linear(patches, shape.patch_pixels, width)
    tower += used_blocks * vision_block(patches + 1, width, shape.mlp_width)  # and a class token
    windows, joined = patches // 4, width * len(shape.feature_layers)
    # In each window the mean of its four patches asks the four.
    pooling = linear(windows, joined, width) + 2 * linear(4 * windows, joined, width) + linear(windows, width, width)
    pooling += windows * attention(1, 4, width)
    into_text = 2 * linear(windows, width, text.intermediate_size)
    into_text += linear(windows, text.intermediate_size, text.hidden_size)
    return crops * tower, crops * (pooling + into_text)


VISION: dict[str, Callable[[Any, Inputs], tuple[int, int]]] = {
    "smolvlm": smolvlm_vision,
    "internvl": internvl_vision,
    "qwen3_vl_moe": qwen_vision,
    "molmoe": molmoe_vision,
}


def closed_form(
    vlm: VisionLanguageModel, inputs: Inputs, output_tokens: int, top_k: int | None = None, blocks: int | None = None
) -> StageFlops:
    text = vlm.model.config.get_text_config(decoder=True)
    top_k, blocks = top_k or vlm.card.moe_top_k, blocks or vlm.card.num_blocks
    rows, prompt = inputs.prompt["input_ids"].shape
    vision, projector = VISION[vlm.card.family.name](vlm.model.config, inputs)
    head = linear(1, text.hidden_size, text.vocab_size)
    # The first token comes from prefill; the step after it sees the prompt, that token, and so on.
    steps = [blocks * text_block(text, 1, prompt + step, top_k) + head for step in range(1, output_tokens)]
    prefill = blocks * text_block(text, prompt, prompt, top_k) + head
    return StageFlops(vision, projector, rows * prefill, rows * sum(steps))


def sample(
    vlm: VisionLanguageModel,
    size: tuple[int, int] = (60, 90),
    setting: VisionSetting = NATIVE,
    question: str = QUESTION,
    images: int = 1,
) -> Inputs:
    return vlm.transfer(vlm.preprocess([picture(*size, seed) for seed in range(images)], question, setting))


def smallest(vlm: VisionLanguageModel) -> Inputs:
    """A prompt with as few vision tokens as the family offers, so that many settings can be counted."""
    samples = [sample(vlm, setting=setting) for setting in settings_of(vlm)[:2]]
    return min(samples, key=lambda inputs: inputs.num_prompt_tokens)


def stages(counted: StageFlops) -> list[Any]:
    return [counted.vision, counted.projector, counted.prefill, counted.decode]


def differences(few: list[int], more: list[int]) -> list[int]:
    return [b - a for a, b in zip(few, more, strict=True)]


@contextmanager
def experts_by(vlm: VisionLanguageModel, back_end: str) -> Iterator[None]:
    before = vlm.decoder.config._experts_implementation
    vlm.decoder.set_experts_implementation(back_end)
    try:
        yield
    finally:
        vlm.decoder.set_experts_implementation(before)


@pytest.fixture(params=MOE)
def moe(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return tiny_model(request.param)


# -- the counter against the closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 90), (90, 40), (31, 200)])
def test_every_stage_of_an_answer(vlm: VisionLanguageModel, size: tuple[int, int]) -> None:
    inputs = sample(vlm, size)
    assert count_flops(vlm, inputs, 4) == closed_form(vlm, inputs, 4)


def test_every_vision_setting(vlm: VisionLanguageModel) -> None:
    # The first two levels of every axis, and of MolmoE overlaps left in, which are more tokens from the same crops.
    axes = [list(of_axis) for _, of_axis in groupby(settings_of(vlm), key=lambda setting: setting.knob)]
    settings = [setting for of_axis in axes for setting in of_axis[:2]]
    if "force_full_tokens" in vlm.card.geometry.options:
        settings.append(VisionSetting("crops", 2, force_full_tokens=True))
    for setting in settings:
        inputs = sample(vlm, setting=setting)
        assert count_flops(vlm, inputs, 2) == closed_form(vlm, inputs, 2), setting


def test_several_images(vlm: VisionLanguageModel) -> None:
    inputs = sample(vlm, images=3)
    assert count_flops(vlm, inputs, 2) == closed_form(vlm, inputs, 2)


@pytest.mark.parametrize("output_tokens", [1, 2, 9])
def test_every_length_of_answer(vlm: VisionLanguageModel, output_tokens: int) -> None:
    inputs = smallest(vlm)
    counted = count_flops(vlm, inputs, output_tokens)
    assert counted == closed_form(vlm, inputs, output_tokens)
    assert (counted.decode == 0) == (output_tokens == 1)
    assert counted.total == sum((counted.vision, counted.projector, counted.prefill, counted.decode))


def test_a_left_padded_batch_pays_for_its_padding(vlm: VisionLanguageModel) -> None:
    parts = [sample(vlm, question="why? " * n) for n in (1, 5)]
    prompt = left_pad([part.prompt for part in parts], vlm.pad_token_id)
    join = torch.stack if parts[0].vision.get("image_input_idx") is not None else torch.cat
    vision = {name: join([part.vision[name] for part in parts]) for name in parts[0].vision}
    batch = replace(parts[1], prompt=prompt, vision=vision)
    counted, longest = count_flops(vlm, batch, 3), closed_form(vlm, parts[1], 3)
    doubled = [None if part is None else 2 * part for part in stages(longest)]
    assert stages(counted) == doubled


@pytest.mark.parametrize("blocks", [[0], [5], [1, 5], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_every_block_list(vlm: VisionLanguageModel, blocks: list[int]) -> None:
    inputs = smallest(vlm)
    with vlm.knobs(active_blocks=blocks):
        assert count_flops(vlm, inputs, 3) == closed_form(vlm, inputs, 3, blocks=len(blocks))


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("top_k", [1, 3, 8, 16])
def test_every_expert_back_end(moe: VisionLanguageModel, back_end: str, top_k: int) -> None:
    inputs = smallest(moe)
    with experts_by(moe, back_end), moe.knobs(moe_top_k=top_k, active_blocks=[1, 4]):
        assert count_flops(moe, inputs, 3) == closed_form(moe, inputs, 3, top_k, blocks=2)


def test_grouped_experts_where_torch_has_no_kernel(moe: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(transformers_moe, "_can_use_grouped_mm", lambda *_: calls.append(None))
    inputs = smallest(moe)
    with experts_by(moe, "grouped_mm"):
        assert count_flops(moe, inputs, 2) == closed_form(moe, inputs, 2)
    assert len(calls) == 2 * 2 * moe.card.num_blocks, "two products per block and pass"


def test_eager_attention_counts_as_fused(vlm: VisionLanguageModel) -> None:
    inputs = smallest(vlm)
    vlm.model.set_attn_implementation("eager")
    try:
        assert count_flops(vlm, inputs, 3) == closed_form(vlm, inputs, 3)
    finally:
        vlm.model.set_attn_implementation("sdpa")


def test_bfloat16_counts_as_float32() -> None:
    for name in TINY:
        vlm = load(name, dtype="bfloat16", device="cpu")
        inputs = smallest(vlm)
        assert count_flops(vlm, inputs, 3) == closed_form(vlm, inputs, 3), name


# -- linear in the knobs ----------------------------------------------------------------------------------------------


def test_linear_in_experts_per_token(moe: VisionLanguageModel) -> None:
    inputs = smallest(moe)
    by_k = []
    for k in range(1, 6):
        with moe.knobs(moe_top_k=k):
            by_k.append(stages(count_flops(moe, inputs, 3)))
    ((vision, projector, prefill, decode),) = {tuple(differences(few, more)) for few, more in pairwise(by_k)}
    assert (vision, projector) == (0, 0)
    # What one expert more costs a token is the same everywhere.
    assert prefill % inputs.num_prompt_tokens == 0
    assert decode == 2 * prefill // inputs.num_prompt_tokens > 0


def test_linear_in_active_blocks(vlm: VisionLanguageModel) -> None:
    inputs = smallest(vlm)
    by_count = []
    for count in range(1, 7):
        with vlm.knobs(active_blocks=count):
            by_count.append(stages(count_flops(vlm, inputs, 3)))
    ((vision, projector, prefill, decode),) = {tuple(differences(few, more)) for few, more in pairwise(by_count)}
    assert (vision, projector) == (0, 0)
    assert prefill > decode > 0


# -- models that no file here knows -----------------------------------------------------------------------------------


def test_a_dense_stranger_with_sliding_windows(tmp_path: Path) -> None:
    save_gemma3(tmp_path)
    vlm = load(str(tmp_path), device="cpu")
    inputs, text = sample(vlm), vlm.decoder.config
    prompt, head = inputs.num_prompt_tokens, linear(1, text.hidden_size, text.vocab_size)
    made = count_flops(vlm, inputs, 3)
    assert made.uncounted == ()
    assert made.prefill == vlm.card.num_blocks * text_block(text, prompt, prompt, None) + head
    # The cache of a block with a window keeps the tokens before the new one that still lie in it.
    windows = [text.sliding_window if kind == "sliding_attention" else prompt + 9 for kind in text.layer_types]
    assert min(windows) < prompt
    steps = [text_block(text, 1, min(prompt + step, window), None) for step in (1, 2) for window in windows]
    assert made.decode == sum(steps) + 2 * head


def test_a_stranger_with_experts(tmp_path: Path) -> None:
    save_aria(tmp_path)
    vlm = load(str(tmp_path), device="cpu")
    inputs, text = sample(vlm), vlm.decoder.config
    by_k = []
    for k in (1, 2, 3):
        with vlm.knobs(moe_top_k=k):
            made = count_flops(vlm, inputs, 3)
        assert made.uncounted == ()
        by_k.append(stages(made))
    expert = vlm.card.num_blocks * gated_mlp(1, text.hidden_size, text.intermediate_size)
    for few, more in pairwise(by_k):
        assert differences(few, more) == [0, 0, inputs.num_prompt_tokens * expert, 2 * expert]


# -- the pass leaves nothing behind -----------------------------------------------------------------------------------


def test_counting_leaves_the_model_and_its_engine_alone(vlm: VisionLanguageModel) -> None:
    inputs = smallest(vlm)
    engine = vlm.engine
    with torch.inference_mode():
        before = vlm.answer([(inputs, vlm.encode_images(inputs.vision))], 4)
        used = vlm.engine_used
        first = count_flops(vlm, inputs, 3)
        assert count_flops(vlm, inputs, 3) == first
        assert vlm.engine is engine
        assert vlm.engine_used is used
        assert vlm.answer([(inputs, vlm.encode_images(inputs.vision))], 4) == before


def test_an_engine_that_replays_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_model("tiny-smolvlm")
    inputs = smallest(vlm)

    class Replaying:
        def new_state(self, rows: int, tokens: int) -> Any:
            raise AssertionError("decoded by the engine that times")

    engine = Replaying()
    monkeypatch.setattr(vlm, "engine", engine)
    assert count_flops(vlm, inputs, 3) == closed_form(vlm, inputs, 3)
    assert vlm.engine is engine


def test_the_engine_comes_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_model("tiny-smolvlm")
    engine = vlm.engine
    inputs = replace(smallest(vlm), vision={})
    with pytest.raises(TypeError):
        count_flops(vlm, inputs, 3)
    assert vlm.engine is engine


def test_an_answer_without_tokens_is_refused() -> None:
    vlm = tiny_model("tiny-smolvlm")
    with pytest.raises(ValueError, match=r"^output_tokens is 0; prefill makes the first token"):
        count_flops(vlm, smallest(vlm), 0)


# -- what has no formula is None, never zero --------------------------------------------------------------------------


@pytest.fixture
def strange_product() -> Iterator[Callable[..., torch.Tensor]]:
    """An operator from outside torch that multiplies matrices."""
    library = torch.library.Library("strange", "DEF")
    library.define("product(Tensor left, Tensor right) -> Tensor")
    library.impl("product", lambda left, right: left @ right, "CompositeExplicitAutograd")
    yield torch.ops.strange.product
    library._destroy()


@pytest.mark.parametrize(
    ("where", "unknown"),
    [("connector", ["projector"]), ("lm_head", ["prefill", "decode"]), ("vision_model.encoder.layers.0", ["vision"])],
)
def test_a_stage_with_an_operator_that_nobody_counts(
    strange_product: Callable[..., torch.Tensor], where: str, unknown: list[str]
) -> None:
    vlm = tiny_model("tiny-smolvlm")
    inputs = smallest(vlm)
    expected = closed_form(vlm, inputs, 3)
    part = vlm.model.lm_head if where == "lm_head" else vlm.model.model.get_submodule(where)

    def beside(*_: Any) -> None:
        strange_product(torch.ones(2, 3), torch.ones(3, 2))

    hook = part.register_forward_pre_hook(beside)
    try:
        counted = count_flops(vlm, inputs, 3)
    finally:
        hook.remove()
    assert counted == replace(expected, **dict.fromkeys(unknown), uncounted=("strange::product",))
    assert counted.total is None
    assert count_flops(vlm, inputs, 3) == expected


def test_without_the_formulas_no_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is needed: torch alone counts neither attention on a CPU nor grouped experts, and says nothing."""
    vlm = tiny_model("tiny-qwen3-vl-moe")
    inputs = smallest(vlm)
    monkeypatch.setattr(flops, "_FORMULAS", {})
    counted = count_flops(vlm, inputs, 2)
    assert counted.uncounted == ("aten::_grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu")
    assert (counted.vision, counted.prefill, counted.decode) == (None, None, None)
    assert counted.projector == closed_form(vlm, inputs, 2).projector


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("_attn_implementation_internal", "flash_attention_3", "attention flash_attention_3"),
        ("_experts_implementation_internal", "deepgemm", "experts deepgemm"),
        ("layer_types", ["full_attention", "linear_attention"] * 3, "blocks linear_attention"),
    ],
)
def test_parts_that_torch_does_not_see(entry: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_model("tiny-qwen3-vl-moe")
    monkeypatch.setattr(vlm.decoder.config, entry, value, raising=False)
    assert count_flops(vlm, smallest(vlm), 2) == StageFlops(None, None, None, None, (reason,))


@pytest.mark.parametrize(
    "operator",
    [
        *("mm", "_int_mm", "addmm_", "_scaled_grouped_mm", "_weight_int4pack_mm_for_cpu", "addmv", "vdot", "matmul"),
        *(
            "linear",
            "mkldnn_linear",
            "conv_depthwise3d",
            "mkldnn_convolution",
            "slow_conv3d_forward",
            "_cudnn_rnn",
            "_trilinear",
        ),
        *("_native_multi_head_attention", "_scaled_dot_product_attention_math_for_mps"),
    ],
)
def test_operators_of_torch_that_would_be_noticed(operator: str) -> None:
    assert hasattr(torch.ops.aten, operator)
    assert costs_something("aten", operator)


@pytest.mark.parametrize(
    "operator",
    [
        *(
            "add",
            "mul",
            "_softmax",
            "native_layer_norm",
            "_to_copy",
            "upsample_linear1d",
            "upsample_bilinear2d",
            "cummax",
        ),
        *("lgamma", "_convert_indices_from_csr_to_coo", "silu", "topk", "histc", "embedding", "_fused_sdp_choice"),
    ],
)
def test_operators_of_torch_that_cost_nothing(operator: str) -> None:
    assert hasattr(torch.ops.aten, operator)
    assert not costs_something("aten", operator)


def test_whatever_is_not_torchs_own_costs_something() -> None:
    assert costs_something("flash_attn", "_flash_attn_forward")
    assert costs_something("some_kernels", "silu_and_mul")


# -- formulas one by one ----------------------------------------------------------------------------------------------


def operations_of(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=flops._FORMULAS) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("heads_of_keys", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7)])
def test_attention_with_grouped_queries(heads_of_keys: int, queries: int, keys: int) -> None:
    query = torch.randn(2, 4, queries, 8)
    key, value = torch.randn(2, heads_of_keys, keys, 8), torch.randn(2, heads_of_keys, keys, 8)
    made = operations_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    assert made == 2 * attention(queries, keys, 4 * 8)


@dataclass(frozen=True)
class Grouped:
    left: tuple[int, ...]
    right: tuple[int, ...]
    cut: bool  # in groups that end at 8 and 16
    flops: int


@pytest.mark.parametrize(
    "case",
    [
        Grouped((16, 32), (2, 32, 24), True, 2 * 16 * 32 * 24),
        Grouped((24, 16), (16, 32), True, 2 * 24 * 16 * 32),  # cut along the inner dimension
        Grouped((2, 8, 32), (32, 16), True, 2 * 8 * 32 * 16),  # cut along the columns
        Grouped((2, 8, 32), (2, 32, 24), False, 2 * 2 * 8 * 32 * 24),
    ],
)
def test_every_form_of_grouped_product(case: Grouped) -> None:
    left, right = torch.randn(case.left), torch.randn(case.right)
    ends = torch.tensor([8, 16], dtype=torch.int32) if case.cut else None
    made = operations_of(lambda: torch.nn.functional.grouped_mm(left, right, offs=ends))
    assert made == case.flops


def test_vectors() -> None:
    assert operations_of(lambda: torch.randn(3, 5) @ torch.randn(5)) == 2 * 3 * 5
    assert operations_of(lambda: torch.randn(5) @ torch.randn(5)) == 2 * 5

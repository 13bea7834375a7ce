"""Our MolmoE computes what the reference does: a tiny random model, its inputs, and the values to find."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.models.olmoe.modeling_olmoe as olmoe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from knobs.blocks import active_blocks
from knobs.experts import experts_per_token, routers
from workers.models.adapter import VisionLanguageModel
from workers.models.molmoe import modeling, vision
from workers.models.molmoe.checkpoint import load_published
from workers.models.molmoe.configuration import MolmoEConfig
from workers.models.molmoe.modeling import MolmoEForConditionalGeneration
from workers.models.processing import Inputs

GOLDEN = Path(__file__).parent / "golden" / "molmoe" / "model"
TOKENS = {
    "image_start_token_id": 500,
    "image_end_token_id": 501,
    "image_patch_token_id": 502,
    "image_col_token_id": 503,
}
# Float32 on different machines; mistakes cost far more, see the end of this file.
CLOSE = 2e-4

INPUTS = load_file(GOLDEN / "inputs.safetensors")
EXPECTED = load_file(GOLDEN / "expected.safetensors")
RECORD = json.loads((GOLDEN / "cases.json").read_text())
CASES = [pytest.param(case, id=case["key"]) for case in RECORD["cases"]]


@cache
def config() -> MolmoEConfig:
    return MolmoEConfig.from_pretrained(GOLDEN, **TOKENS)


@cache
def golden_model() -> MolmoEForConditionalGeneration:
    return load_published(GOLDEN, config(), torch.float32)


@pytest.fixture
def model() -> MolmoEForConditionalGeneration:
    return golden_model()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def prompt(name: str) -> dict[str, torch.Tensor]:
    """imgA: three crops; imgB: two; text: none."""
    inputs = {"input_ids": INPUTS[f"{name}.input_ids"]}
    if name != "text":
        inputs["pixel_values"] = (INPUTS[f"{name}.images_u8"].float() * 2 - 255) / 128
        inputs["image_masks"] = INPUTS[f"{name}.image_masks"]
        inputs["image_input_idx"] = INPUTS[f"{name}.image_input_idx"]
    return inputs


def vision_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "input_ids"}


@contextmanager
def knobs(model: MolmoEForConditionalGeneration, case: dict[str, Any]) -> Iterator[None]:
    keep = [i for i, runs in enumerate(case["block_mask"]) if runs]
    with experts_per_token(model, case["top_k"]), active_blocks(model.get_decoder(), keep):
        yield


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max())


def last_logits(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=1, **options).logits[:, -1]
    return logits


def generated(
    model: Any, inputs: dict[str, torch.Tensor], count: int = 12, **options: Any
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens and the logits that chose the last of them."""
    output = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output.logits[-1]


# -- the reference's values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_without_a_cache(model: MolmoEForConditionalGeneration, case: dict[str, Any]) -> None:
    inputs, greedy = prompt(case["prompt"]), case["greedy"]
    with knobs(model, case):
        assert off(model(**inputs, use_cache=False).logits[0, -3:], EXPECTED[f"{case['key']}.last3"]) < CLOSE
        # Every position sees what stands before it only, so one pass shows each greedy choice.
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([greedy[:-1]])], dim=1)
        logits = model(**inputs, use_cache=False).logits[0, -len(greedy) :]
    assert logits.argmax(dim=-1).tolist() == greedy
    assert off(logits[-1], EXPECTED[f"{case['key']}.decode_last"]) < CLOSE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_with_a_cache(model: MolmoEForConditionalGeneration, case: dict[str, Any], cache: str) -> None:
    with knobs(model, case):
        tokens, logits = generated(model, prompt(case["prompt"]), cache_implementation=cache)
    assert tokens == [case["greedy"]]
    assert off(logits[0], EXPECTED[f"{case['key']}.decode_last"]) < CLOSE


def test_every_golden_case_is_here() -> None:
    assert len(CASES) == 36
    assert {case["prompt"] for case in RECORD["cases"]} == {"imgA", "imgB", "text"}


def test_generation_stops_at_the_end_token(model: MolmoEForConditionalGeneration) -> None:
    case = RECORD["eos_case"]
    with experts_per_token(model, case["top_k"]):
        tokens, _ = generated(model, prompt(case["prompt"]), eos_token_id=case["eos_token_id"])
    assert tokens == [case["greedy"]]


def right_padded_batch() -> dict[str, torch.Tensor]:
    """imgA and imgB as the reference takes a batch: -1 behind everything that is shorter."""
    length, crops = RECORD["batch2"]["T"], RECORD["batch2"]["C"]
    rows = []
    for name in ("imgA", "imgB"):
        inputs = prompt(name)
        missing = crops - inputs["pixel_values"].shape[1]
        rows.append(
            {
                key: torch.nn.functional.pad(
                    tensor,
                    (0, length - tensor.shape[1]) if key == "input_ids" else (0, 0) * (tensor.ndim - 2) + (0, missing),
                    value=-1,
                )
                for key, tensor in inputs.items()
            }
        )
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def test_a_batch_padded_with_minus_one_on_the_right(model: MolmoEForConditionalGeneration) -> None:
    batch = right_padded_batch()
    logits = model(**batch, use_cache=False).logits
    assert (batch["input_ids"] == -1).sum() > 0
    for name, row in RECORD["batch2"]["rows"].items():
        found = logits[row["row"], row["last_valid_pos"]]
        assert off(found, EXPECTED[f"batch2.k2.{name}.last"]) < CLOSE
        assert off(found, EXPECTED[f"{name}.k2.all.last3"][-1]) < CLOSE


def test_the_stages_inside(model: MolmoEForConditionalGeneration) -> None:
    inputs, trace = prompt("imgA"), {k.removeprefix("trace.imgA."): v for k, v in EXPECTED.items() if "trace" in k}
    features = model.model.vision_tower(inputs["pixel_values"][0])
    assert off(features[:, 100], trace["vit_out_patch100"]) < 1e-5
    embeddings = model.model.multi_modal_projector(features, inputs["image_masks"][0])
    assert off(embeddings[:, RECORD["trace_feature_rows"]], trace["image_features_rows"]) < 1e-5
    assert off(embeddings.mean(dim=(1, 2)), trace["image_features_mean"]) < 1e-5
    output = model(**inputs, use_cache=False, output_hidden_states=True, output_router_logits=True)
    assert len(output.hidden_states) == 5
    for i, hidden in enumerate(output.hidden_states):
        assert off(hidden[0, RECORD["trace_positions"]], trace[f"hidden{i}"]) < 5e-5, f"after {i} blocks"
    for i, logits in enumerate(output.router_logits):
        assert off(logits.softmax(dim=-1)[[0, 5, 421]], trace[f"router_probs{i}"]) < 1e-5, f"block {i}"


# -- where image features go ------------------------------------------------------------------------------------------


def two_images() -> dict[str, torch.Tensor]:
    """One prompt with both pictures, all crops in a row, without a batch dimension on the vision side."""
    first, second = prompt("imgA"), prompt("imgB")
    length = first["input_ids"].shape[1]
    places = second["image_input_idx"]
    second["image_input_idx"] = torch.where(places < 0, places, places + length)
    return {key: torch.cat([first[key], second[key]], dim=1)[0 if key != "input_ids" else slice(None)] for key in first}


@pytest.mark.parametrize("inputs", [prompt("imgA"), prompt("imgB"), two_images()], ids=["imgA", "imgB", "both"])
def test_merging_by_token_is_merging_by_index(
    model: MolmoEForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> None:
    ids, text = inputs["input_ids"], model.get_input_embeddings()
    made = model.base_model.get_image_features(**vision_of(inputs), return_dict=True)
    by_token = model.model._add_image_features(text(ids), ids, made.pooler_output)
    # As the reference does it: every window to the place that its index names.
    crops, masks = (
        inputs[name].reshape(-1, *inputs[name].shape[-k:]) for name, k in (("pixel_values", 2), ("image_masks", 1))
    )
    windows = model.model.multi_modal_projector(model.model.vision_tower(crops), masks).flatten(0, 1)
    places = inputs["image_input_idx"].flatten()
    assert (places < 0).any() == (len(crops) > 2), "crops that overlap have windows without a place"
    by_index = text(ids)
    by_index[0, places[places >= 0]] += windows[places >= 0]
    assert torch.equal(by_token, by_index)


def test_several_images_in_a_prompt_and_in_a_batch(model: MolmoEForConditionalGeneration) -> None:
    both, alone = two_images(), prompt("imgB")
    expected = [last_logits(model, inputs)[0] for inputs in (both, alone, prompt("text"))]
    parts = [model.base_model.get_image_features(**vision_of(i), return_dict=True).pooler_output for i in (both, alone)]
    batch = left_padded([both["input_ids"], alone["input_ids"], prompt("text")["input_ids"]])
    image = {"image": SimpleNamespace(pooler_output=[part for one in parts for part in one])}
    logits = last_logits(model, batch, mm_encoder_outputs=image)
    assert max(off(row, one) for row, one in zip(logits, expected, strict=True)) < CLOSE
    swapped = {"image": SimpleNamespace(pooler_output=[part for one in parts[::-1] for part in one])}
    assert off(last_logits(model, batch, mm_encoder_outputs=swapped), logits) > 100 * CLOSE


def test_too_many_features_are_refused(model: MolmoEForConditionalGeneration) -> None:
    inputs = prompt("imgA")
    inputs["input_ids"] = inputs["input_ids"][:, :-200]
    with pytest.raises(ValueError, match=r"the prompts have \d+ places for 384 image features"):
        model(**inputs)


def test_images_ask_for_what_belongs_to_them(model: MolmoEForConditionalGeneration) -> None:
    inputs = prompt("imgA")
    with pytest.raises(ValueError, match="pixel_values come with image_masks and image_input_idx"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    image = model.get_image_features(**vision_of(inputs), return_dict=True)
    with pytest.raises(ValueError, match="cannot both be given"):
        model(**inputs, mm_encoder_outputs={"image": image})
    with pytest.raises(ValueError, match="images need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64), mm_encoder_outputs={"image": image})
    with pytest.raises(ValueError, match="exactly one of"):
        model(attention_mask=torch.ones(1, 3))


# -- batches, back-ends, precision ------------------------------------------------------------------------------------


def left_padded(prompts: list[torch.Tensor], pad: int = 1) -> dict[str, torch.Tensor]:
    longest = max(ids.shape[1] for ids in prompts)
    pads = [longest - ids.shape[1] for ids in prompts]
    pad_left = torch.nn.functional.pad
    return {
        "input_ids": torch.cat([pad_left(ids, (n, 0), value=pad) for ids, n in zip(prompts, pads, strict=True)]),
        "attention_mask": torch.cat(
            [pad_left(torch.ones_like(ids), (n, 0)) for ids, n in zip(prompts, pads, strict=True)]
        ),
    }


@pytest.mark.parametrize("pad", [1, -1])
def test_left_padding_changes_nothing(model: MolmoEForConditionalGeneration, pad: int) -> None:
    names = ("imgA", "imgB", "text")
    batch = left_padded([prompt(name)["input_ids"] for name in names], pad)
    if pad == -1:
        del batch["attention_mask"]
    parts = [model.get_image_features(**vision_of(prompt(name)), return_dict=True).pooler_output for name in names[:2]]
    logits = last_logits(
        model, batch, mm_encoder_outputs={"image": SimpleNamespace(pooler_output=[p for one in parts for p in one])}
    )
    for row, name in zip(logits, names, strict=True):
        assert off(row, EXPECTED[f"{name}.k2.all.last3"][-1]) < CLOSE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_generates_as_one_by_one(model: MolmoEForConditionalGeneration, cache: str) -> None:
    batch = right_padded_batch()
    batch |= left_padded([prompt(name)["input_ids"] for name in ("imgA", "imgB")])
    for key in ("k2.all", "k4.skip2"):
        cases = [next(c for c in RECORD["cases"] if c["key"] == f"{name}.{key}") for name in ("imgA", "imgB")]
        with knobs(model, cases[0]):
            tokens, logits = generated(model, batch, cache_implementation=cache)
        assert tokens == [case["greedy"] for case in cases]
        assert off(logits, torch.stack([EXPECTED[f"{c['key']}.decode_last"] for c in cases])) < CLOSE


def test_the_adapter_takes_the_stages_apart(model: MolmoEForConditionalGeneration) -> None:
    vlm = VisionLanguageModel(model, None, None, torch.device("cpu"))  # type: ignore[arg-type]
    assert vlm.decoder is model.model.language_model
    assert model.get_encoder(modality="image") is model.model.vision_tower
    order: list[str] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda *_: order.append("projector"))
    batch = []
    for name in ("imgA", "imgB"):
        inputs = prompt(name)
        text = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
        crops = {key: tensor[0] for key, tensor in vision_of(inputs).items()}
        features = vlm.encode_images(crops, on_tower_end=lambda: order.append("tower"))
        batch.append((Inputs(text, crops, len(crops["pixel_values"]) - 1, 0), features))
    hook.remove()
    assert order == ["tower", "projector"] * 2
    for key in ("k2.all", "k1.skip1", "k8.skip2"):
        cases = [next(c for c in RECORD["cases"] if c["key"] == f"{name}.{key}") for name in ("imgA", "imgB")]
        keep = [i for i, runs in enumerate(cases[0]["block_mask"]) if runs]
        with vlm.knobs(cases[0]["top_k"], keep):
            assert vlm.answer(batch, 12) == [case["greedy"] for case in cases]


@contextmanager
def backend(setter: Callable[[str], None], chosen: str, default: str) -> Iterator[None]:
    setter(chosen)
    try:
        yield
    finally:
        setter(default)


def test_attention_back_ends_agree(model: MolmoEForConditionalGeneration) -> None:
    for inputs in (prompt("imgA"), left_padded([prompt("text")["input_ids"], prompt("text")["input_ids"][:, 4:]])):
        sdpa = last_logits(model, inputs)
        with backend(model.set_attn_implementation, "eager", "sdpa"):
            assert model.get_decoder().config._attn_implementation == "eager"
            assert off(last_logits(model, inputs), sdpa) < 5e-5


def test_expert_back_ends_agree(model: MolmoEForConditionalGeneration) -> None:
    inputs = prompt("text")
    assert model.get_experts_implementation() == {"": "grouped_mm", "text_config": "grouped_mm"}
    for k in (1, 2, 8):
        with experts_per_token(model, k):
            grouped = last_logits(model, inputs)
            for other in ("eager", "batched_mm"):
                with backend(model.set_experts_implementation, other, "grouped_mm"):
                    assert model.get_decoder().config._experts_implementation == other
                    assert off(last_logits(model, inputs), grouped) < 1e-5 * float(grouped.abs().max())


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_back_ends_can_be_chosen_when_loading(experts: str) -> None:
    loaded = load_published(
        GOLDEN, config(), torch.float32, attn_implementation="eager", experts_implementation=experts
    )
    assert loaded.get_experts_implementation() == {"": experts, "text_config": experts}
    assert loaded.get_decoder().config._attn_implementation == "eager"
    assert off(last_logits(loaded, prompt("text"))[0], EXPECTED["text.k2.all.last3"][-1]) < CLOSE


def test_bfloat16_is_close() -> None:
    half = load_published(GOLDEN, config(), torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_decoder().rotary_emb.inv_freq.dtype == torch.float32
    # What the reference itself loses by running in bfloat16, with weights and a residual stream left in float32.
    expected = EXPECTED["imgA.k2.all.last3"][-1]
    autocast = off(EXPECTED["info.imgA.k2.all.bf16_autocast_last"], expected)
    found = last_logits(half, prompt("imgA"))
    assert found.dtype == torch.bfloat16
    assert off(found[0], expected) < 2 * autocast < float(expected.std())
    tokens, _ = generated(half, prompt("imgA"), 4)
    assert len(tokens[0]) == 4


def test_a_training_step_reaches_every_part(model: MolmoEForConditionalGeneration) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        trained = copy.deepcopy(model)
        inputs = {name: tensor.clone() for name, tensor in prompt("imgA").items()}
        trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        idle = [name for name, p in trained.named_parameters() if p.grad is None or not bool(p.grad.abs().sum())]
    # Nothing reads the last block of the tower.
    assert {name.split(".resblocks.")[-1].split(".")[0] for name in idle} <= {"3"}


# -- configuration ----------------------------------------------------------------------------------------------------


def test_the_auto_classes_know_it() -> None:
    published = json.loads((GOLDEN / "config.json").read_text())
    made = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**published, **TOKENS))
    assert type(made) is MolmoEForConditionalGeneration
    assert {r.top_k for r in routers(made)} == {2}
    assert (made.generation_config.eos_token_id, made.generation_config.pad_token_id) == (499, 1)
    assert all(bool(p.isfinite().all()) for p in made.parameters())


def test_the_defaults_are_the_published_model() -> None:
    text, tower = MolmoEConfig().get_text_config(decoder=True), MolmoEConfig().vision
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.intermediate_size) == (
        16,
        2048,
        16,
        1024,
    )
    assert (text.num_experts, text.num_experts_per_tok, text.norm_topk_prob, text.vocab_size) == (64, 8, False, 50304)
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (text.rms_norm_eps, text.eos_token_id, text.pad_token_id) == (1e-5, 50279, 1)
    assert (tower.layers, tower.width, tower.heads, tower.patches_per_side, tower.patch_pixels) == (
        23,
        1024,
        16,
        24,
        588,
    )
    assert MolmoEConfig().image_token_id == MolmoEConfig().image_patch_token_id == 50282


def test_text_entries_win_over_published_keys() -> None:
    made = MolmoEConfig(n_layers=4, moe_top_k=2, text_config={"num_hidden_layers": 3, "eos_token_id": 259})
    assert (made.n_layers, made.text_config.num_hidden_layers, made.eos_token_id, made.moe_top_k) == (3, 3, 259, 2)
    again = MolmoEConfig.from_dict(made.to_dict())
    assert again.to_dict() == made.to_dict()
    made.text_config.num_hidden_layers = 2
    assert MolmoEConfig.from_dict(made.to_dict()).n_layers == 2
    assert made.published()["n_layers"] == 2
    assert "text_config" not in made.published()
    made.moe_top_k = 1
    assert made.text_config.num_experts_per_tok == 1
    assert MolmoEConfig.from_pretrained(GOLDEN, moe_top_k=4).text_config.num_experts_per_tok == 4


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 3584, "num_hidden_layers": 28}, "this is a dense Molmo"),
        ({"block_type": "sequential"}, "MolmoE with block_type 'sequential' is not supported, only 'moe' is"),
        ({"norm_after": True}, "norm_after True is not supported"),
        ({"vision_backbone": {"image_model_type": "siglip"}}, "image_model_type 'siglip'"),
        ({"vit_layers": [-2, -30]}, r"vit_layers \[-2, -30\]: the vision tower has 23 layers"),
    ],
)
def test_other_molmos_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MolmoEConfig(**entries)


# -- the comparison has teeth -----------------------------------------------------------------------------------------


def renormalised(model: Any, _: pytest.MonkeyPatch) -> None:
    for router in routers(model):
        router.norm_topk_prob = True  # type: ignore[assignment]


def other_norm_eps(model: Any, _: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, olmoe.OlmoeRMSNorm):
            module.variance_epsilon = 1e-6


def interleaved_rotation(_: Any, patch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    patch.setattr(olmoe, "rotate_half", rotate)


def norm_per_head(model: Any, _: pytest.MonkeyPatch) -> None:
    for layer in model.get_decoder().layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):

            def forward(x: torch.Tensor, norm: Any = norm) -> torch.Tensor:
                split = x.unflatten(-1, (4, 16))
                split = split * torch.rsqrt(split.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
                scaled: torch.Tensor = norm.weight * split.flatten(-2)
                return scaled

            norm.forward = forward


def masks_in_step(model: Any, _: pytest.MonkeyPatch) -> None:
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda _, args: (args[0], args[1].roll(1, dims=0)))


def gate_on_the_wrong_matrix(model: Any, _: pytest.MonkeyPatch) -> None:
    projector = model.model.multi_modal_projector.image_projector
    projector.w1, projector.w3 = projector.w3, projector.w1


def features_swapped(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.vision_tower.feature_blocks.reverse()


def last_block_of_the_tower(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.vision_tower.feature_blocks[0] += 1


def exact_gelu(_: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.w2(torch.nn.functional.gelu(self.w1(hidden)))
        return output

    patch.setattr(vision.VisionFeedForward, "forward", forward)


def features_in_place_of_embeddings(_: Any, patch: pytest.MonkeyPatch) -> None:
    def replace(self: Any, embeds: torch.Tensor, ids: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        return embeds.masked_scatter((ids == 502).unsqueeze(-1), torch.cat(parts))

    patch.setattr(modeling.MolmoEModel, "_add_image_features", replace)


@pytest.mark.parametrize(
    "mistake",
    [
        renormalised,
        other_norm_eps,
        interleaved_rotation,
        norm_per_head,
        masks_in_step,
        gate_on_the_wrong_matrix,
        features_swapped,
        last_block_of_the_tower,
        exact_gelu,
        features_in_place_of_embeddings,
    ],
)
def test_a_mistake_would_be_noticed(
    model: MolmoEForConditionalGeneration,
    mistake: Callable[[Any, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = copy.deepcopy(model)
    mistake(wrong, monkeypatch)
    differences = [
        off(wrong(**prompt(name), use_cache=False).logits[0, -3:], EXPECTED[f"{name}.k2.all.last3"])
        for name in ("imgA", "imgB", "text")
    ]
    assert max(differences) > CLOSE

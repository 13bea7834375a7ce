"""Candidates that share their first blocks answer, to the last bit, as each alone; and what each measure measures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import ALL
from knob_contract import answered
from tiny import encoded, picture, tiny_model

from knobs.block_tree import Blocks, block_evaluations, most_saved, plan_candidates, single_ablations
from knobs.blocks import active_blocks as only_blocks
from knobs.configuration import entries_of
from knobs.errors import KnobError
from knobs.importance import Method
from knobs.stack import stack_of
from workers import shared_prefix
from workers.candidates import answer_tokens, block_changes, importance_rows, log_likelihoods, reference_answer
from workers.datasets import Sample, SampleRef
from workers.errors import ModelError, SampleError
from workers.models.adapter import Features, VisionLanguageModel
from workers.models.engines import EagerEngine
from workers.models.processing import Inputs
from workers.models.requirements import stack_of_blocks
from workers.prepared import PreparedSample
from workers.scorers import scorer
from workers.shared_prefix import SharedPrefix, run_candidates

SIZES = [(60, 90), (40, 64)]
ANSWERS = ["yes", "no it is not"]


@cache
def batch_of(vlm: VisionLanguageModel) -> list[tuple[Inputs, Features]]:
    """Prompts of different lengths, so that some are padded; not to be changed."""
    return [encoded(vlm, [picture(*size, i)], f"What is it? {'why? ' * i}") for i, size in enumerate(SIZES)]


def samples_of(vlm: VisionLanguageModel) -> list[PreparedSample]:
    return [
        PreparedSample(
            Sample(SampleRef(f"test:{i}", ""), "What is it?", (answer, answer, "else"), f"image {i}", b"", None),
            [SIZES[i]],
            inputs,
            features,
        )
        for i, (answer, (inputs, features)) in enumerate(zip(ANSWERS, batch_of(vlm), strict=True))
    ]


def candidates_of(num_blocks: int, seed: int = 0) -> list[Blocks]:
    """Ablations, and lists that agree on beginnings of every length."""
    generator = random.Random(seed)
    drawn = [tuple(generator.sample(range(num_blocks), generator.randint(1, num_blocks))) for _ in range(3)]
    return [*single_ablations(num_blocks), *drawn, (0,), (0, 1, 2, 3), (num_blocks - 1,)]


@contextmanager
def blocks_counted(decoder: Any) -> Iterator[list[int]]:
    """The blocks that compute inside, one entry for each time: those that call the norm that they begin with."""
    ran: list[int] = []
    inner = [next(m for n, m in layer.named_children() if "norm" in n) for layer in decoder.layers]
    hooks = [m.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(inner)]
    yield ran
    for hook in hooks:
        hook.remove()


def state_of(vlm: VisionLanguageModel) -> tuple[Any, ...]:
    """What must be as before: hooks, forwards of instances, and the engine."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules())
    own = [name for name, module in vlm.model.named_modules() if "forward" in module.__dict__]
    return hooks, own, vlm.engine


# -- the same as each alone -------------------------------------------------------------------------------------------


def test_answers_are_those_of_each_candidate_alone(vlm: VisionLanguageModel) -> None:
    batch, candidates = batch_of(vlm), candidates_of(vlm.card.num_blocks)
    before = state_of(vlm)
    shared = dict(run_candidates(vlm, candidates, lambda: vlm.answer(batch, 8)))
    assert state_of(vlm) == before
    assert set(shared) == {tuple(sorted(c)) for c in candidates}
    for blocks, answers in shared.items():
        with vlm.knobs(active_blocks=blocks):
            assert vlm.answer(batch, 8) == answers, blocks
    assert len({str(answers) for answers in shared.values()}) > len(shared) / 2, "blocks change the answers"


def test_likelihoods_are_those_of_each_candidate_alone(vlm: VisionLanguageModel) -> None:
    batch, candidates = batch_of(vlm), candidates_of(vlm.card.num_blocks, seed=1)
    answers = [answer_tokens(vlm, inputs, text) for (inputs, _), text in zip(batch, ANSWERS, strict=True)]
    shared = dict(run_candidates(vlm, candidates, lambda: log_likelihoods(vlm, batch, answers)))
    for blocks, values in shared.items():
        with vlm.knobs(active_blocks=blocks):
            assert log_likelihoods(vlm, batch, answers) == values, blocks
    assert len({tuple(values) for values in shared.values()}) == len(shared), "blocks change the likelihoods"


# Of every kind of cache, and of every form in which blocks return their state; the last two have linked blocks.
KINDS = (
    *("llama", "gemma3_text", "lfm2", "qwen3_next", "nemotron_h", "olmoe", "deepseek_v3", "gpt_oss", "llama4"),
    *("chameleon", "glm5_next", "qwen2_5_vl"),
    *("gemma3n_text", "mistral_large4"),
)


class TextModel:
    """As much of a loaded model as candidates need."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoder, self.engine = model, stack_of_blocks(model), EagerEngine(model)

    def knobs(self, active_blocks: Sequence[int]) -> Any:
        return only_blocks(self.decoder, active_blocks)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", KINDS)
def test_decoders_of_many_kinds(family: str, cache: str) -> None:
    """Tokens, logits and the size of the cache by transformers' own `generate`, left-padded, past sliding windows."""
    model = TextModel(ALL[family].build())
    stack = stack_of(entries_of(model.model.config), 6)
    candidates = [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4), (0, 1, 2, 4, 5), *ALL[family].keeps]
    candidates = [blocks for blocks in candidates if stack.refuse(blocks) is None]
    with blocks_counted(model.decoder) as ran:
        shared = dict(run_candidates(model, candidates, lambda: answered(model.model, cache)))  # type: ignore[arg-type]
    with blocks_counted(model.decoder) as ran_alone:
        for blocks, (tokens, logits, cache_bytes) in shared.items():
            with model.knobs(blocks):
                expected = answered(model.model, cache)
            assert torch.equal(tokens, expected[0]), blocks
            assert torch.equal(logits, expected[1]), blocks
            assert cache_bytes == expected[2], blocks
    saved = block_evaluations(runs := plan_candidates(candidates, 6), shared=False) - block_evaluations(runs)
    assert saved > 0
    assert len(ran_alone) - len(ran) == (0 if stack.dependencies else saved)


def test_other_knobs_stay_on() -> None:
    vlm = tiny_model("tiny-qwen3-vl-moe")
    batch, candidates = batch_of(vlm), single_ablations(vlm.card.num_blocks)
    with vlm.knobs(moe_top_k=1):
        narrow = dict(run_candidates(vlm, candidates, lambda: vlm.answer(batch, 6)))
        alone = dict(run_candidates(vlm, candidates, lambda: vlm.answer(batch, 6), share=False))
    assert narrow == alone
    assert narrow != dict(run_candidates(vlm, candidates, lambda: vlm.answer(batch, 6)))


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_blocks_run_as_often_as_planned(vlm: VisionLanguageModel) -> None:
    batch, candidates = batch_of(vlm), candidates_of(vlm.card.num_blocks)
    answers = [[70, 71], [72]]
    plan = plan_candidates(candidates, vlm.card.num_blocks)
    for share in (True, False):
        with blocks_counted(vlm.decoder) as ran:
            list(run_candidates(vlm, candidates, lambda: log_likelihoods(vlm, batch, answers), share))
        assert len(ran) == block_evaluations(plan, shared=share)
    assert block_evaluations(plan) < 0.6 * block_evaluations(plan, shared=False)


def test_states_wait_no_longer_than_planned(vlm: VisionLanguageModel) -> None:
    batch, plan = batch_of(vlm), plan_candidates(candidates_of(vlm.card.num_blocks), vlm.card.num_blocks)
    prefix, waiting = SharedPrefix(vlm.decoder), []
    for planned in plan:
        with vlm.knobs(active_blocks=planned.blocks), prefix.during(planned):
            vlm.answer(batch, 2)
        waiting.append(len(prefix))
    assert max(waiting) == most_saved(plan) <= 4
    assert waiting[-1] == 0


def test_answers_of_candidates_are_decoded_eagerly() -> None:
    vlm = tiny_model("tiny-smolvlm")
    before = vlm.engine
    vlm.engine = other = SimpleNamespace()  # type: ignore[assignment]
    try:
        seen = [engine for _, engine in run_candidates(vlm, [(0,)], lambda: vlm.engine)]
        assert isinstance(seen[0], EagerEngine)
        assert vlm.engine is other
    finally:
        vlm.engine = before


def test_everything_is_as_before_after_an_interruption(vlm: VisionLanguageModel) -> None:
    batch, before = batch_of(vlm), state_of(vlm)
    expected = vlm.answer(batch, 4)
    calls: list[None] = []

    def interrupted(when: int, late: bool) -> list[list[int]]:
        calls.append(None)
        if len(calls) == when and not late:
            raise KeyboardInterrupt
        answers = vlm.answer(batch, 2)
        if len(calls) == when:
            raise KeyboardInterrupt
        return answers

    for when in (1, 3):
        for late in (False, True):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                list(run_candidates(vlm, single_ablations(6), lambda when=when, late=late: interrupted(when, late)))
            assert state_of(vlm) == before
    assert vlm.answer(batch, 4) == expected


def test_candidates_that_cannot_run(vlm: VisionLanguageModel) -> None:
    for share in (True, False):
        with pytest.raises(KnobError, match=r"^active_blocks \[0, 6\]: the model has blocks 0 to 5, not 6$"):
            list(run_candidates(vlm, [[0, 6]], lambda: None, share))


# -- the comparisons have teeth ---------------------------------------------------------------------------------------


def differs(vlm: VisionLanguageModel, run: Callable[[], Any]) -> bool:
    candidates = [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 5), (0, 1, 3, 4, 5)]
    alone = dict(run_candidates(vlm, candidates, run, share=False))
    try:
        return dict(run_candidates(vlm, candidates, run)) != alone
    except RuntimeError:
        return True


def test_a_cache_that_is_not_branched_would_be_noticed(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(vlm)
    assert not differs(vlm, lambda: vlm.answer(batch, 4))
    monkeypatch.setattr(shared_prefix, "_branched", lambda layer: layer)
    assert differs(vlm, lambda: vlm.answer(batch, 4))


def test_a_state_of_another_branch_would_be_noticed(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, resumed = batch_of(vlm), shared_prefix._resumed
    assert not differs(vlm, lambda: log_likelihoods(vlm, batch, [[70], [71]]))
    monkeypatch.setattr(shared_prefix, "_resumed", lambda decoder, at, state: resumed(decoder, at, state + 1e-3))
    assert differs(vlm, lambda: log_likelihoods(vlm, batch, [[70], [71]]))


# -- likelihoods ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(vlm: VisionLanguageModel, index: int, answer: list[int]) -> float:
    """The likelihood by transformers' own forward, vision tower included, without padding; one end token."""
    inputs, _ = encoded(vlm, [picture(*SIZES[index], index)], f"What is it? {'why? ' * index}")
    fill = {"input_ids": answer, "attention_mask": [1] * len(answer)}
    prompt = {
        name: torch.cat([tensor, torch.tensor([fill.get(name, [0] * len(answer))], dtype=tensor.dtype)], dim=-1)
        for name, tensor in inputs.prompt.items()
    }
    logits = vlm.model(**prompt, **inputs.vision, use_cache=False).logits[0, -len(answer) - 1 :]
    (end,) = vlm.end_token_ids
    return -float(torch.nn.functional.cross_entropy(logits, torch.tensor([*answer, end]), reduction="sum"))


def test_likelihoods_are_those_of_transformers_forward(vlm: VisionLanguageModel) -> None:
    answers = [[70, 75, 90], []]
    expected = [by_hand(vlm, index, answer) for index, answer in enumerate(answers)]
    assert log_likelihoods(vlm, batch_of(vlm), answers) == pytest.approx(expected, rel=1e-4)


def test_any_token_that_ends_an_answer_is_its_end(vlm: VisionLanguageModel) -> None:
    batch, found = batch_of(vlm)[:1], []
    ends: int | list[int]
    for ends in (70, 71, [70, 71]):
        vlm.model.generation_config.eos_token_id = ends
        found.append(log_likelihoods(vlm, batch, [[80]])[0])
    # P(answer) (P(70) + P(71)) is the sum of the two.
    assert found[2] == pytest.approx(float(torch.tensor(found[:2]).logsumexp(dim=0)), rel=1e-5)
    vlm.model.generation_config.eos_token_id = []
    assert vlm.end_token_ids == frozenset()
    assert log_likelihoods(vlm, batch, [[80]])[0] > max(found)
    assert log_likelihoods(vlm, batch, [[]]) == [0.0]


def test_an_answer_continues_its_prompt() -> None:
    vlm = tiny_model("tiny-smolvlm")
    assert vlm.processor is not None
    tokenizer = vlm.processor.tokenizer

    def after(text: str) -> str:
        inputs = batch_of(vlm)[0][0]
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        return str(tokenizer.decode(answer_tokens(vlm, replace(inputs, prompt={"input_ids": ids}), " yes ")))

    assert after("Assistant:") == " yes"
    assert after("assistant\n") == "yes"
    assert after("Is it? ") == "yes"
    assert after("What?" + tokenizer.convert_ids_to_tokens(vlm.processor.image_token_id)) == "yes"


def test_an_answer_needs_a_tokenizer() -> None:
    vlm = tiny_model("tiny-smolvlm")
    bare = VisionLanguageModel(vlm.model, None, vlm.card, vlm.device)
    with pytest.raises(ModelError, match="tiny-smolvlm has no tokenizer"):
        answer_tokens(bare, batch_of(vlm)[0][0], "yes")


# -- what each block changes ------------------------------------------------------------------------------------------


def test_changes_are_those_between_the_hidden_states() -> None:
    vlm = tiny_model("tiny-smolvlm")
    batch = batch_of(vlm)
    found = block_changes(vlm, batch)
    for row, (inputs, _) in enumerate(batch):
        with torch.inference_mode():
            states = vlm.model(**inputs.prompt, **inputs.vision, output_hidden_states=True).hidden_states
        # The last of them has been through the final norm.
        for block in range(5):
            before, after = states[block][0], states[block + 1][0]
            relative = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean()
            cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
            assert float(found[Method.ACTIVATION][row, block]) == pytest.approx(float(relative), rel=1e-4)
            assert float(found[Method.SIMILARITY][row, block]) == pytest.approx(1 - float(cosine.mean()), rel=1e-4)


def test_a_block_that_adds_nothing_changes_nothing_and_padding_does_not_count(vlm: VisionLanguageModel) -> None:
    batch, before = batch_of(vlm), state_of(vlm)
    together = block_changes(vlm, batch)
    alone = [block_changes(vlm, [sample]) for sample in batch]
    layer = vlm.decoder.layers[2]
    layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        without = block_changes(vlm, batch)
    finally:
        del layer.forward
    for method in (Method.ACTIVATION, Method.SIMILARITY):
        assert together[method].shape == (2, 6)
        torch.testing.assert_close(together[method], torch.cat([one[method] for one in alone]), rtol=1e-4, atol=1e-5)
        assert float(together[method].min()) > 1e-3
        torch.testing.assert_close(without[method][:, 2], torch.zeros(2), rtol=0, atol=1e-6)
    assert state_of(vlm) == before


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.NLL, Method.ACCURACY_DROP])
def test_rows_of_candidates(vlm: VisionLanguageModel, method: Method) -> None:
    samples, candidates = samples_of(vlm), [(0, 1, 2, 3, 4, 5), (0, 2, 3, 4, 5)]
    batch = [(s.inputs, s.features) for s in samples]
    if method is Method.ACCURACY_DROP:
        # What the model without block 1 says first is right, so that some score is not 0.
        with vlm.knobs(active_blocks=candidates[1]):
            said = vlm.text(vlm.answer(batch, 4)[0])
        samples[0] = replace(samples[0], sample=replace(samples[0].sample, answers=(said,)))
    found = importance_rows(vlm, samples, method, candidates, "anls", max_new_tokens=4)
    key = [(row["sample_id"], row["image_id"], tuple(row["blocks"])) for row in found]
    assert sorted(key) == sorted((f"test:{i}", f"image {i}", blocks) for i in range(2) for blocks in candidates)
    value = {(row["sample_id"], tuple(row["blocks"])): row["value"] for row in found}
    for blocks in candidates:
        with vlm.knobs(active_blocks=blocks):
            if method is Method.NLL:
                answers = [answer_tokens(vlm, s.inputs, reference_answer(s)) for s in samples]
                expected = log_likelihoods(vlm, batch, answers)
            else:
                texts = [vlm.text(tokens) for tokens in vlm.answer(batch, 4)]
                expected = [scorer("anls").score(t, s.sample.answers) for t, s in zip(texts, samples, strict=True)]
        assert [value[f"test:{i}", blocks] for i in range(2)] == expected
    assert len(set(value.values())) > 1


@pytest.mark.parametrize("method", [Method.ACTIVATION, Method.SIMILARITY])
def test_rows_of_blocks(method: Method) -> None:
    vlm = tiny_model("tiny-internvl")
    samples = samples_of(vlm)
    found = importance_rows(vlm, samples, method)
    expected = block_changes(vlm, [(s.inputs, s.features) for s in samples])[method]
    assert len(found) == 12
    for row in found:
        (block,) = row["blocks"]
        index = int(row["sample_id"].split(":")[1])
        assert row["value"] == float(expected[index, block])
        assert row["image_id"] == f"image {index}"


def test_no_samples_no_rows_and_what_cannot_be_measured() -> None:
    vlm = tiny_model("tiny-smolvlm")
    assert importance_rows(vlm, [], Method.NLL, [(0,)]) == []
    samples = samples_of(vlm)
    unanswered = replace(samples[0], sample=replace(samples[0].sample, answers=()))
    with pytest.raises(SampleError, match=r"^test:0: no reference answer"):
        importance_rows(vlm, [unanswered], Method.NLL, [(0,)])
    with pytest.raises(ValueError, match="unknown metric 'exact_mach', did you mean exact_match"):
        importance_rows(vlm, samples, Method.ACCURACY_DROP, [(0,)], metric="exact_mach")


def test_the_reference_is_what_most_annotators_said() -> None:
    sample = samples_of(tiny_model("tiny-smolvlm"))[0]
    for answers, expected in [(("a", "b", "b"), "b"), (("b", "a", "a", "b"), "b"), (("c",), "c")]:
        assert reference_answer(replace(sample, sample=replace(sample.sample, answers=answers))) == expected

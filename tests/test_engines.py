"""The graph engine gives the tokens of the eager engine, says where it could not be used, and leaves nothing behind.

A capture on a CPU is a recording of the step's tensor operations (`recorded.py`), so that, as with a CUDA graph, no
Python of the step runs again. What only a GPU can show is in `test_engines_cuda.py`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from recorded import Recording
from tiny import NATIVE, TINY, encoded, picture, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from workers.errors import ModelError
from workers.measure import time_answer
from workers.models import graph_engine, load
from workers.models.adapter import Features, VisionLanguageModel, kv_cache_bytes, left_pad, merge_features
from workers.models.engines import EagerEngine, EngineUse
from workers.models.graph_engine import GraphEngine
from workers.models.processing import Inputs
from workers.models.static_step import CAPACITY_STEP, StaticStep, rounded_capacity

Sample = tuple[Inputs, Features]
QUESTION = "What is in the picture?"
GRAPH = EngineUse("graph")


@pytest.fixture
def eager(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The same model, decoding eagerly whatever engine `vlm` has been given."""
    return VisionLanguageModel(vlm.model, vlm.processor, vlm.card, vlm.device)


@pytest.fixture
def recording(vlm: VisionLanguageModel) -> Iterator[Recording]:
    """Captures of `vlm`, which decodes by engine graph in this test."""
    with graph(vlm) as made:
        yield made


@contextmanager
def graph(vlm: VisionLanguageModel, recording: Recording | None = None) -> Iterator[Recording]:
    made = Recording() if recording is None else recording
    before = vlm.engine
    vlm.engine = GraphEngine(vlm.model, vlm.decoder, lambda: made)
    try:
        yield made
    finally:
        vlm.engine = before


def asked(vlm: VisionLanguageModel, words: int, seed: int = 0) -> Sample:
    """A question of at least so many words about a picture."""
    return encoded(vlm, [picture(60, 90, seed)], f"{QUESTION} {'why? ' * words}")


def up_to(vlm: VisionLanguageModel, tokens: int, seed: int = 0) -> Sample:
    """A sample whose prompt has exactly so many tokens: every letter is one."""
    bare = encoded(vlm, [picture(60, 90, seed)], "a")[0].num_prompt_tokens
    sample = encoded(vlm, [picture(60, 90, seed)], "a" * (tokens - bare + 1))
    assert sample[0].num_prompt_tokens == tokens
    return sample


def padded(vlm: VisionLanguageModel) -> list[Sample]:
    """Three prompts of different lengths, which make a batch that is padded on the left."""
    batch = [asked(vlm, words, seed) for seed, words in enumerate([0, 3, 1])]
    assert len({inputs.num_prompt_tokens for inputs, _ in batch}) == 3
    return batch


def lengths(vlm: VisionLanguageModel) -> tuple[int, int]:
    """A length of prompts that leaves room for an answer in its bucket, and one of the bucket after it."""
    shortest = encoded(vlm, [picture(60, 90)], "a")[0].num_prompt_tokens
    first = rounded_capacity(shortest + 80) - 40
    return first, first + CAPACITY_STEP


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, [0, 2, 5], [1, 2, 3, 4, 5], [3]])
def test_tokens_are_those_of_the_eager_engine(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, blocks: list[int] | None
) -> None:
    batch = padded(vlm)
    answers = set()
    for top_k in (None,) if vlm.card.num_experts is None else (None, 1, 2):
        with vlm.knobs(moe_top_k=top_k, active_blocks=blocks), no_warning():
            expected = eager.answer(batch, 12)
            assert vlm.answer(batch, 12) == expected
            assert vlm.engine_used == GRAPH
            for sample in batch:
                alone = eager.answer([sample], 12)
                assert vlm.answer([sample], 12) == alone
            answers.add(str(expected))
    assert len(answers) == (1 if vlm.card.num_experts is None else 3), "the knobs reach the answer"
    assert recording.replayed >= 4 * 5


def test_answers_after_one_another(vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording) -> None:
    """Longer and shorter prompts of one bucket, another bucket, and the first again: no capture is made twice."""
    first, second = lengths(vlm)
    prompts = [first, first - 30, first - 1, second, first - 20, first - 3, second - 3]
    expected = [eager.answer([up_to(vlm, tokens, i)], 20) for i, tokens in enumerate(prompts)]
    for _ in range(2):
        assert [vlm.answer([up_to(vlm, tokens, i)], 20) for i, tokens in enumerate(prompts)] == expected
    assert len({str(answer) for answer in expected}) >= 5
    # The longer bucket needs more memory, which the graph of the first does not read, so that one is captured again.
    assert recording.captured == 3


def test_a_short_answer_after_a_long_one(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording
) -> None:
    tokens, _ = lengths(vlm)
    long, short = up_to(vlm, tokens - 20, 1), up_to(vlm, tokens - 33, 2)
    expected = eager.answer([long], 50), eager.answer([short], 12)
    assert (vlm.answer([long], 50), vlm.answer([short], 12)) == expected
    assert recording.captured == 1


def test_padding_changes_from_batch_to_batch(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording
) -> None:
    batch = padded(vlm)
    orders = [batch, batch[::-1], [batch[1], batch[0], batch[2]]]
    assert [vlm.answer(order, 12) for order in orders] == [eager.answer(order, 12) for order in orders]
    assert recording.captured == 1


@torch.inference_mode()
def test_a_short_batch_after_one_with_more_padding_than_it_has_tokens(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording
) -> None:
    """Columns that were padding before are not any more."""
    tokens, _ = lengths(vlm)
    short = [up_to(vlm, tokens + i, i) for i in range(2)]
    much_longer = up_to(vlm, 3 * tokens)
    room = rounded_capacity(3 * tokens + 12)
    for batch in ([short[0], much_longer], short, [much_longer, short[0]], short):
        expected = eager.answer(batch, 12)
        prompt = left_pad([inputs.prompt for inputs, _ in batch], vlm.pad_token_id)
        grids = [{n: t for n, t in inputs.vision.items() if not n.startswith("pixel")} for inputs, _ in batch]
        vision = {name: torch.cat([grid[name] for grid in grids]) for name in grids[0]}
        features = merge_features([made for _, made in batch])
        token, state = vlm.prefill(prompt, vision, features, room - prompt["input_ids"].shape[1])
        found = [token]
        while len(found) < 12:
            found.append(vlm.decode_step(found[-1], state))
        assert torch.cat(found, dim=-1).tolist() == expected
    assert recording.captured == 1


def test_batches_of_several_sizes(vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording) -> None:
    batch = padded(vlm)
    for size in (3, 2, 1, 2, 3):
        assert vlm.answer(batch[:size], 12) == eager.answer(batch[:size], 12)
    assert recording.captured == 3


def test_an_answer_that_ends_early(vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording) -> None:
    batch = padded(vlm)
    free = eager.answer(batch, 12)
    vlm.model.generation_config.eos_token_id = free[0][3]
    assert vlm.answer(batch, 12) == eager.answer(batch, 12) != free
    assert recording.captured == 1


@pytest.mark.parametrize("count", [1, 2])
def test_answers_of_a_token_or_two(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, count: int
) -> None:
    sample = asked(vlm, 0)
    assert vlm.answer([sample], count) == eager.answer([sample], count)
    assert recording.captured == count - 1, "the first token comes from prefill"


def test_prefill_is_bit_for_bit_that_of_the_eager_engine(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording
) -> None:
    inputs, features = asked(vlm, 2)
    tokens = inputs.num_prompt_tokens
    with vlm.knobs(active_blocks=[0, 2, 5]):
        _, static = vlm.prefill(inputs.prompt, inputs.vision, features)
        _, growing = eager.prefill(inputs.prompt, inputs.vision, features)
    for block in (0, 2, 5):
        ours, theirs = static.cache.layers[block], growing.cache.layers[block]
        assert torch.equal(ours.keys[:, :, :tokens], theirs.keys)
        assert torch.equal(ours.values[:, :, :tokens], theirs.values)
        assert not ours.keys[:, :, tokens:].any()
        assert not ours.values[:, :, tokens:].any()


@pytest.mark.parametrize("name", TINY)
def test_attention_that_adds_its_mask(name: str) -> None:
    vlm = load(name, dtype="float32", device="cpu", attention="eager")
    shared = tiny_model(name)
    vlm.model.load_state_dict(shared.model.state_dict())
    batch = padded(vlm)
    expected = vlm.answer(batch, 12)
    with graph(vlm), no_warning():
        assert vlm.answer(batch, 12) == expected
    assert vlm.engine_used == GRAPH


@pytest.mark.parametrize("name", [n for n in TINY if tiny_model(n).card.num_experts is not None])
def test_the_back_end_of_the_experts_belongs_to_the_setting(name: str) -> None:
    vlm = tiny_model(name)
    sample = asked(vlm, 0)
    expected = vlm.answer([sample], 8)
    try:
        with graph(vlm) as recording, no_warning():
            for back_end in ("grouped_mm", "batched_mm", "grouped_mm"):
                vlm.model.set_experts_implementation(back_end)
                assert vlm.answer([sample], 8) == expected
    finally:
        vlm.model.set_experts_implementation("grouped_mm")
    assert recording.captured == 3


# -- the comparisons have teeth ---------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, name: str, by: Callable[[StaticStep], None]) -> None:
    """Let `by` undo something each time after a method of the static step has run."""
    whole = getattr(StaticStep, name)

    def method(self: StaticStep, *args: Any) -> None:
        whole(self, *args)
        by(self)

    monkeypatch.setattr(StaticStep, name, method)


def test_a_mask_that_is_not_updated_would_be_noticed(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = padded(vlm)
    expected = eager.answer(batch, 12)

    def forgets_padding(step: StaticStep) -> None:
        step._real.fill_(True)

    broken(monkeypatch, "begin", forgets_padding)
    assert vlm.answer(batch, 12) != expected


def test_a_column_that_is_not_reset_would_be_noticed(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = lengths(vlm)
    samples = [up_to(vlm, tokens - 33, 1), up_to(vlm, tokens, 2)]
    expected = [eager.answer([sample], 12) for sample in samples]
    first: list[int] = []

    def stays(step: StaticStep) -> None:
        first.append(int(step._column.at))
        step._column.at.fill_(first[0])

    broken(monkeypatch, "begin", stays)
    answers = [vlm.answer([sample], 12) for sample in samples]
    assert answers[0] == expected[0]
    assert answers[1] != expected[1]


def test_what_an_answer_leaves_does_not_reach_the_next(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it is hidden: zero times infinity is not zero."""
    sample = asked(vlm, 0)
    expected = eager.answer([sample], 12)

    def spoil() -> None:
        for _, keys, values in vlm.engine._step(1, rounded_capacity(sample[0].num_prompt_tokens + 12)).keys_and_values(
            CAPACITY_STEP * 100
        ):
            keys.fill_(math.inf)
            values.fill_(math.inf)

    assert vlm.answer([sample], 12) == expected
    spoil()
    assert vlm.answer([sample], 12) == expected
    monkeypatch.setattr(torch, "_foreach_zero_", lambda _: None)
    spoil()
    assert vlm.answer([sample], 12) != expected
    assert recording.captured == 1


@pytest.mark.parametrize("part", ["position", "column"])
def test_a_step_that_does_not_move_on_would_be_noticed(
    vlm: VisionLanguageModel,
    eager: VisionLanguageModel,
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    sample = asked(vlm, 0)
    expected = eager.answer([sample], 12)

    def stays(step: StaticStep) -> None:
        assert step._position_ids is not None
        (step._position_ids if part == "position" else step._column.at).sub_(1)

    broken(monkeypatch, "__call__", stays)
    assert vlm.answer([sample], 12) != expected


def test_a_graph_of_other_knobs_would_be_noticed(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = asked(vlm, 0)
    with vlm.knobs(active_blocks=[0, 2, 5]):
        expected = eager.answer([sample], 12)
        vlm.answer([sample], 12)
    monkeypatch.setattr(GraphEngine, "_setting_now", lambda _: None)
    vlm.answer([sample], 12)
    with vlm.knobs(active_blocks=[0, 2, 5]):
        assert vlm.answer([sample], 12) != expected


def test_the_step_of_the_eager_engine_cannot_be_captured(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording
) -> None:
    """The stand-in for a capture is one: a step that looks at a value of a tensor does not get through it."""
    inputs, features = asked(vlm, 0)
    token, state = eager.prefill(inputs.prompt, inputs.vision, features)

    def step() -> None:
        token.copy_(state.step(token))

    with pytest.raises(RuntimeError, match="waits for the device"):
        recording(step, lambda: None)


# -- what an engine holds ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_bytes_of_the_cache_are_those_of_the_room_made(vlm: VisionLanguageModel, recording: Recording) -> None:
    inputs, features = asked(vlm, 0)
    text = vlm.model.config.get_text_config(decoder=True)
    per_token = 2 * text.num_key_value_heads * vlm.decoder.layers[0].self_attn.head_dim * 4
    for keep in ([0], [1, 4], list(range(6))):
        with vlm.knobs(active_blocks=keep):
            token, state = vlm.prefill(inputs.prompt, inputs.vision, features, 8)
            vlm.decode_step(token, state)
            room = rounded_capacity(inputs.num_prompt_tokens + 8)
            assert room % CAPACITY_STEP == 0
            assert kv_cache_bytes(state) == len(keep) * room * per_token


def test_capacities_are_rounded_up() -> None:
    assert [rounded_capacity(n) for n in (1, 127, 128, 129, 256, 257)] == [128, 128, 128, 256, 256, 384]


def test_room_that_is_made_ahead_is_made_once(vlm: VisionLanguageModel, recording: Recording) -> None:
    """Growing for a longer answer would give up the graphs of the shorter ones."""
    tokens, longer = lengths(vlm)
    short, long = up_to(vlm, tokens), up_to(vlm, longer)
    vlm.engine.reserve(1, longer + 12)
    for sample in (short, long, short, long):
        vlm.answer([sample], 12)
    assert recording.captured == 2


def test_another_setting_of_the_knobs_gives_up_the_graphs(vlm: VisionLanguageModel, recording: Recording) -> None:
    sample = asked(vlm, 0)
    engine = vlm.engine
    assert isinstance(engine, GraphEngine)
    for blocks in ([0, 1], [0, 1], None, [0, 1]):
        with vlm.knobs(active_blocks=blocks):
            vlm.answer([sample], 4)
        assert len(engine._steps) == 1
    assert recording.captured == 3, "one for every change"
    engine.clear()
    assert engine._memory.tokens == len(engine._steps) == 0


def test_only_so_many_graphs_are_kept(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_engine, "MOST_GRAPHS", 2)
    batch = padded(vlm)
    expected = {size: eager.answer(batch[:size], 6) for size in (3, 2, 1)}
    for size, captured in [(3, 1), (2, 2), (3, 2), (1, 3), (3, 3), (2, 4)]:
        assert vlm.answer(batch[:size], 6) == expected[size]
        assert recording.captured == captured


@torch.inference_mode()
def test_an_answer_that_was_overwritten_does_not_go_on(vlm: VisionLanguageModel, recording: Recording) -> None:
    inputs, features = asked(vlm, 0)
    token, first = vlm.prefill(inputs.prompt, inputs.vision, features)
    token = vlm.decode_step(token, first)
    vlm.prefill(inputs.prompt, inputs.vision, features)
    with pytest.raises(RuntimeError, match=r"^another answer has begun; engine graph decodes one after the other$"):
        vlm.decode_step(token, first)


@torch.inference_mode()
def test_more_tokens_than_there_is_room_for(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording
) -> None:
    tokens, _ = lengths(vlm)
    inputs, features = up_to(vlm, tokens + 38)  # 2 columns are left
    expected = eager.answer([(inputs, features)], 3)[0]
    token, state = vlm.prefill(inputs.prompt, inputs.vision, features, 2)
    found = [int(token)]
    for _ in range(2):
        token = vlm.decode_step(token, state)
        found.append(int(token))
    assert found == expected
    with pytest.raises(ValueError, match=rf"^there is no room for more than {tokens + 40} tokens; announce them"):
        vlm.decode_step(token, state)


@torch.inference_mode()
def test_tokens_that_were_handed_out_stay_what_they_are(vlm: VisionLanguageModel, recording: Recording) -> None:
    inputs, features = asked(vlm, 0)
    token, state = vlm.prefill(inputs.prompt, inputs.vision, features)
    handed = [token]
    for _ in range(6):
        handed.append(vlm.decode_step(handed[-1], state))
    assert len({tensor.data_ptr() for tensor in handed}) == 7
    assert [int(tensor) for tensor in handed] == vlm.answer([(inputs, features)], 7)[0]


def test_it_works_outside_of_inference_mode(vlm: VisionLanguageModel, recording: Recording) -> None:
    inputs, features = asked(vlm, 0)
    expected = vlm.answer([(inputs, features)], 4)[0]
    token, state = vlm.prefill(inputs.prompt, inputs.vision, features)
    found = [int(token)]
    for _ in range(3):
        token = vlm.decode_step(token, state)
        found.append(int(token))
    assert found == expected


# -- falling back -----------------------------------------------------------------------------------------------------


def note_of(vlm: VisionLanguageModel) -> str:
    """Why the last answer was decoded eagerly."""
    used = vlm.engine_used
    assert used is not None
    assert used.engine == "eager"
    assert used.note is not None
    return used.note


def warned_once(caught: Sequence[warnings.WarningMessage]) -> str:
    assert len(caught) == 1
    return str(caught[0].message)


def test_a_cpu_has_no_graphs(vlm: VisionLanguageModel) -> None:
    asked_for = load(vlm.card.name, device="cpu", engine="graph")
    assert asked_for.engine.warm_up_rounds == 0
    plain = load(vlm.card.name, device="cpu")
    assert isinstance(plain.engine, EagerEngine)
    sample = asked(plain, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert asked_for.answer([sample], 6) == plain.answer([sample], 6)
    assert warned_once(caught) == "decoding by engine eager, not graph as asked for: a CPU has no CUDA graphs"
    assert note_of(asked_for) == "a CPU has no CUDA graphs"
    assert plain.engine_used == EngineUse("eager")


def test_an_engine_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match=r"^engine 'jet' is not one of eager, graph$"):
        load("tiny-smolvlm", device="cpu", engine="jet")


@pytest.mark.parametrize("name", [n for n in TINY if tiny_model(n).card.num_experts is not None])
@pytest.mark.parametrize("known", [True, False], ids=["known before", "found by the capture"])
def test_experts_that_wait_for_the_device(name: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_model(name)
    sample = asked(vlm, 0)
    if not known:
        monkeypatch.setattr(GraphEngine, "_why_not", lambda _: None)
    try:
        vlm.model.set_experts_implementation("eager")
        expected = vlm.answer([sample], 8)
        with graph(vlm) as recording:
            with pytest.warns(UserWarning, match="experts eager"):
                answers = [vlm.answer([sample], 8) for _ in range(2)]
            engine = vlm.engine
    finally:
        vlm.model.set_experts_implementation("grouped_mm")
    assert answers == [expected] * 2
    if known:
        assert note_of(vlm) == "experts eager waits for the device at every block (grouped_mm and batched_mm do not)"
    else:
        beginning = "the decode step cannot be captured (attention sdpa, experts eager): RuntimeError: aten"
        assert note_of(vlm).startswith(beginning)
        assert note_of(vlm).endswith(" waits for the device")
    assert (recording.captured, engine.captures) == (0, 0 if known else 1)


def test_attention_that_takes_no_fixed_mask(vlm: VisionLanguageModel, recording: Recording) -> None:
    config = vlm.decoder.config
    config._attn_implementation_internal = "flex_attention"
    try:
        with pytest.warns(UserWarning, match="flex_attention"):
            state = vlm.engine.new_state(1, 10)
    finally:
        config._attn_implementation_internal = "sdpa"
    assert state.use == EngineUse("eager", "attention flex_attention takes no fixed mask (sdpa does)")


@pytest.mark.parametrize(
    ("model_type", "extra", "kinds"),
    [
        ("gemma3_text", {"sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "LinearAttentionLayer"),
    ],
)
def test_blocks_without_plain_full_attention(model_type: str, extra: dict[str, Any], kinds: str) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, hidden_size=16, vocab_size=32, **extra)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    engine = GraphEngine(model, model.model, Recording)
    with pytest.warns(UserWarning, match=kinds):
        state = engine.new_state(1, 10)
    assert state.use == EngineUse("eager", f"the model has blocks without plain full attention ({kinds})")


def test_prompts_beyond_the_range_of_a_dynamic_rotary_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within it, the graph engine works, though such a module compares positions on the host."""
    vlm = tiny_model("tiny-internvl")
    tokens, longer = lengths(vlm)
    short, long = up_to(vlm, tokens), up_to(vlm, longer)
    rotary = vlm.decoder.rotary_emb
    assert rotary.rope_type == "dynamic"
    monkeypatch.setattr(rotary, "original_max_seq_len", longer - 10)
    monkeypatch.setattr(rotary, "max_seq_len_cached", longer - 10)
    frequencies = rotary.inv_freq.clone()
    expected = [vlm.answer([sample], 12) for sample in (short, long, short)]
    with graph(vlm):
        assert vlm.answer([short], 12) == expected[0]
        assert vlm.engine_used == GRAPH
        with pytest.warns(UserWarning, match="rotary"):
            assert vlm.answer([long], 12) == expected[1]
        assert note_of(vlm) == f"rotary frequencies change beyond {longer - 10} tokens"
        assert vlm.answer([short], 12) == expected[2]
        assert vlm.engine_used == GRAPH
    assert rotary.rope_type == "dynamic"
    assert torch.equal(rotary.inv_freq, frequencies)


class Refusing(Recording):
    """Fails like a capture that meets something in its middle."""

    def __call__(self, step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        step()
        step()
        raise RuntimeError("\n called a synchronizing operation\nand more")


@pytest.mark.parametrize("capture", [Refusing(), Recording()], ids=["capture", "step"])
def test_whatever_a_capture_raises(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, capture: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer goes on from the same keys and values; the next ones do not try again under the same knobs."""
    batch = padded(vlm)
    expected = eager.answer(batch, 12), eager.answer(batch[:1], 12)
    experts = "" if vlm.card.num_experts is None else ", experts grouped_mm"
    reason = f"the decode step cannot be captured (attention sdpa{experts}): RuntimeError: "
    if type(capture) is Recording:

        def refuse(_: StaticStep) -> None:
            raise RuntimeError("a mask of four dimensions? no")

        monkeypatch.setattr(StaticStep, "_mask", refuse)
        reason += "a mask of four dimensions? no"
    else:
        reason += "called a synchronizing operation"
    with graph(vlm, capture), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (vlm.answer(batch, 12), vlm.answer(batch[:1], 12)) == expected
        assert note_of(vlm) == reason
        assert vlm.engine.captures == 1
        with vlm.knobs(active_blocks=[0, 1, 2]):
            assert vlm.answer(batch, 12) == eager.answer(batch, 12)
        assert vlm.engine.captures == 2
    assert warned_once(caught) == f"decoding by engine eager, not graph as asked for: {reason}"


@pytest.mark.parametrize("what", ["cache", "blocks"])
def test_a_prompt_that_is_read_in_another_way_than_answers_are_decoded(
    vlm: VisionLanguageModel, eager: VisionLanguageModel, recording: Recording, what: str
) -> None:
    """Whoever exchanges parts during the prompt gets eager answers and not wrong ones."""
    batch = padded(vlm)
    expected = eager.answer(batch, 12)
    layer = vlm.decoder.layers[2]

    def exchange(_: Any, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
        if what == "cache":
            layers = kwargs["past_key_values"].layers
            layers[0] = copy.deepcopy(layers[0])
        else:
            layer.forward = type(layer).forward.__get__(layer)
        hook.remove()

    hook = vlm.decoder.register_forward_hook(exchange, with_kwargs=True)
    with pytest.warns(UserWarning, match="another way"):
        assert vlm.answer(batch, 12) == expected
    layer.__dict__.pop("forward", None)
    assert note_of(vlm) == "the prompt was read in another way than answers are decoded"
    assert recording.captured == 0
    assert vlm.answer(batch, 12) == expected
    assert vlm.engine_used == GRAPH


# -- timing -----------------------------------------------------------------------------------------------------------


def test_no_capture_is_in_a_timing(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int] = []
    preprocess = vlm.preprocess

    def counted(*arguments: Any) -> Inputs:
        answers.append(vlm.engine.captures)
        return preprocess(*arguments)

    monkeypatch.setattr(vlm, "preprocess", counted)
    tokens, longer = lengths(vlm)
    short, long = ("a" * n for n in (1, longer - tokens + 1))
    with graph(vlm) as recording:
        # The longer one takes more memory, so that the shorter is captured once more.
        asked_in_turn = [short, short, long, short, long]
        captured_before = [[0, 1, 1], [1], [1, 2, 2], [2, 3, 3], [3]]
        for question, expected in zip(asked_in_turn, captured_before, strict=True):
            answers.clear()
            timing = time_answer(vlm, [picture(60, 90)], question, NATIVE, 8)
            assert answers == expected
            assert timing.engine_used == GRAPH
            assert len(timing.decode_step_ms) == 7
    assert recording.captured == 3


def test_a_timing_says_what_decoded(vlm: VisionLanguageModel) -> None:
    timing = time_answer(vlm, [picture(60, 90)], QUESTION, NATIVE, 3)
    assert timing.engine_used == EngineUse("eager")
    with graph(vlm, Refusing()), pytest.warns(UserWarning, match="cannot be captured"):
        timing = time_answer(vlm, [picture(60, 90)], QUESTION, NATIVE, 3)
    assert timing.engine_used.engine == "eager"
    assert "synchronizing" in str(timing.engine_used.note)

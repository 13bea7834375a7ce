"""Width and depth on many families of transformers: what both knobs promise holds, and wrong knobs are found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import knob_contract
import pytest
import torch
from families import ALL, BLOCKS, TinyFamily
from knob_contract import answered, check_blocks, check_top_k, read, routing_in, state_of
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache, DummyLayer

from knobs.blocks import active_blocks
from knobs.configuration import entries_of
from knobs.errors import KnobError
from knobs.experts import experts_per_token, routers
from knobs.routing import NOT_RENORMALIZED, RENORMALIZED, routing_of
from knobs.stack import BlockStack
from workers.models.requirements import stack_of_blocks

FIXED = ("phimoe", "llama4")
MIXTURES = [
    *(
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "mixtral",
        "gpt_oss",
        "granitemoe",
        "deepseek_v2",
        "deepseek_v3",
        "qwen3_next",
    ),
    *("nemotron_h", "ernie4_5_moe", "jetmoe", "llava", "qwen3_5_moe", "aria", "glm4v_moe", "ernie4_5_vl_moe"),
    *("kimi_k25", "gemma4", "minimax_m3_vl", "mistral_large4", "glm5_next", "dots3_note"),
]


def with_entries(family: TinyFamily, **changes: Any) -> TinyFamily:
    """The family with other entries of its language model's configuration."""
    text = family.entries.get("text_config")
    own = changes if text is None else {"text_config": {**text, **changes}}
    return TinyFamily(family.model_type, {**family.entries, **own}, family.keeps)


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_blocks(name: str) -> None:
    check_blocks(ALL[name])


@pytest.mark.parametrize("name", MIXTURES)
def test_top_k(name: str) -> None:
    check_top_k(ALL[name])


def test_every_mixture_of_experts_is_among_them() -> None:
    with_experts = {name for name, family in ALL.items() if routing_of(entries_of(family.build().config)) is not None}
    assert with_experts == {*MIXTURES, *FIXED}


def test_weights_that_are_not_renormalized_are_so_for_these_families() -> None:
    """Three because their configuration says so, and one whose routers never do; `check_top_k` adds them up."""
    kept = {name for name in MIXTURES if routing_in(ALL[name].build()).renormalization == NOT_RENORMALIZED}
    assert kept == {"olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2"}


@pytest.mark.parametrize("name", ["olmoe", "glm4v_moe"])
def test_renormalization_follows_the_configuration_where_routers_do(name: str) -> None:
    own = routing_in(ALL[name].build()).renormalization
    other = with_entries(ALL[name], norm_topk_prob=own == NOT_RENORMALIZED)
    assert {own, routing_in(other.build()).renormalization} == {RENORMALIZED, NOT_RENORMALIZED}
    check_top_k(other)


def test_routers_of_a_vision_tower_are_left_alone() -> None:
    """Images are encoded once for every top-k, so it must not change what becomes of them."""
    model = ALL["dots3_note"].build()
    inside = routers(stack_of_blocks(model))
    (tower,) = (router for router in routers(model) if router not in inside)
    with experts_per_token(model, 1):
        assert {router.top_k for router in inside} == {1}
        assert tower.top_k == 2


def test_knobs_inside_knobs() -> None:
    family = ALL["gemma4"]
    model = family.build()
    stack = stack_of_blocks(model)
    with experts_per_token(model, 1), active_blocks(stack, (0, 1, 2, 3)):
        outer = read(model)
        with experts_per_token(model, 3), active_blocks(stack, (2, 3)):
            assert not torch.equal(read(model), outer)
        assert torch.equal(read(model), outer)
        with experts_per_token(model, 2):  # the model's own, but not what is set
            assert not torch.equal(read(model), outer)
        assert torch.equal(read(model), outer)


# -- routers that are not a knob ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_router_refuses_every_top_k_but_its_own(name: str) -> None:
    model = ALL[name].build()
    routing = routing_in(model)
    untouched = state_of(model)
    for k in {1, 2, 4} - {routing.moe_top_k}:
        with pytest.raises(KnobError) as caught:
            experts_per_token(model, k).__enter__()
        assert str(caught.value) == f"moe_top_k {k}: {routing.fixed}"
        assert name in str(routing.fixed)
    with experts_per_token(model, routing.moe_top_k):
        assert state_of(model) == untouched


def test_why_the_router_of_phimoe_is_fixed() -> None:
    model = ALL["phimoe"].build()
    own = read(model)
    for router in routers(model):
        router.top_k = 1  # type: ignore[assignment]
    assert torch.equal(read(model), own)


def test_why_the_router_of_llama4_is_fixed() -> None:
    def counted(model: Any) -> tuple[torch.Tensor, int]:
        with FlopCounterMode(display=False) as counter:
            return read(model), counter.get_total_flops()

    model = ALL["llama4"].build()
    logits, flops = counted(model)
    for router in routers(model):
        router.top_k = 4  # type: ignore[assignment]
    other_logits, other_flops = counted(model)
    assert not torch.equal(other_logits, logits)
    assert other_flops == flops > 0


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4v_moe", "kimi_k25", "dots3_note"])
def test_no_more_experts_than_the_chosen_groups_have(name: str) -> None:
    model = ALL[name].build()
    expected = "a token's experts come from 2 of 4 groups of 2, so moe_top_k must be 1 to 4"
    with pytest.raises(KnobError) as caught:
        experts_per_token(model, 5).__enter__()
    assert str(caught.value) == f"moe_top_k 5: {expected}"
    # What the loaded routers say is enough, and so is what the configuration says.
    stack = stack_of_blocks(model)
    with pytest.raises(KnobError, match=expected):
        experts_per_token(stack.layers, 5).__enter__()
    for router in routers(model):
        router.num_group = 1  # type: ignore[assignment]
    with pytest.raises(KnobError, match=expected):
        experts_per_token(model, 5).__enter__()


def test_groups_that_a_router_does_not_look_at_limit_nothing() -> None:
    check_top_k(ALL["deepseek_v2"], levels=(1, 5, 7))
    limited = with_entries(ALL["deepseek_v2"], topk_method="group_limited_greedy")
    with pytest.raises(KnobError, match="1 to 4"):
        check_top_k(limited, levels=(5,))


@pytest.mark.parametrize("name", ["llama", "paligemma"])
def test_a_dense_model_has_no_top_k(name: str) -> None:
    with pytest.raises(KnobError, match=r"^moe_top_k: the model has no router whose top-k can be set$"):
        experts_per_token(ALL[name].build(), 1).__enter__()


# -- blocks that others need -------------------------------------------------------------------------------------------

REFUSED = [
    ("gemma4", [0, 1, 3, 4], "block 4 reads the keys and values of block 2, so it cannot run without it"),
    ("gemma4", [0, 1, 2, 5], "block 5 reads the keys and values of block 3, so it cannot run without it"),
    ("gemma3n_text", [3, 4, 5], "block 4 reads the keys and values of block 2, so it cannot run without it"),
    ("mistral_large4", [0, 3], "block 3 reads the keys and values of block 1, so it cannot run without it"),
    ("mistral_large4", [5], "block 5 attends to the tokens chosen by block 4, so it cannot run without it"),
    ("qwen3_next", [0, 2], "at least one attention block must run (blocks 1, 3, 5)"),
    ("qwen3_5_moe", 1, "at least one attention block must run (blocks 1, 3, 5)"),
    ("lfm2_vl", [4], "at least one attention block must run (blocks 1, 3, 5)"),
    ("nemotron_h", [0, 2, 3], "at least one attention block must run (blocks 1, 4)"),
]


@pytest.mark.parametrize(("name", "keep", "reason"), REFUSED)
def test_blocks_that_cannot_run_without_others(
    name: str, keep: int | list[int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ALL[name].build()
    stack = stack_of_blocks(model)
    untouched = state_of(model)
    with pytest.raises(KnobError) as caught:
        active_blocks(stack, keep).__enter__()
    assert str(caught.value) == f"active_blocks {keep}: {reason}"
    assert state_of(model) == untouched
    # And the reason is one: without the refusal the model does not get through.
    monkeypatch.setattr(BlockStack, "refuse", lambda *_: None)
    with pytest.raises((KeyError, ValueError)), active_blocks(stack, keep):
        answered(model, "dynamic")


def test_a_block_is_not_left_to_attend_to_what_another_one_chose() -> None:
    """Here nothing would fail without the refusal: block 2 would take the choice of block 0 for that of block 1."""
    with pytest.raises(
        KnobError, match=r"block 2 attends to the tokens chosen by block 1, so it cannot run without it$"
    ):
        active_blocks(stack_of_blocks(ALL["mistral_large4"].build()), [0, 2]).__enter__()


# -- the contract has teeth: wrong knobs break it ----------------------------------------------------------------------

# Switches that a wrong knob never closes; forgotten ones would close themselves.
LEFT_OPEN: list[Any] = []


@contextmanager
def next_block_instead(stack: Any, keep: Any) -> Iterator[None]:
    """Skips the block behind each one it should."""
    whole = keep is None or keep == BLOCKS or len(keep) == BLOCKS
    with active_blocks(stack, None if whole else sorted((block + 1) % BLOCKS for block in keep)):
        yield


@contextmanager
def skipped(stack: Any, keep: Any) -> Iterator[list[Any]]:
    """The blocks to skip pass their input on; nothing else is done."""
    kept = range(BLOCKS) if keep is None or keep == BLOCKS else keep
    layers = [layer for block, layer in enumerate(stack.layers) if block not in kept]
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield layers
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


@contextmanager
def slots_stay(stack: Any, keep: Any) -> Iterator[None]:
    """The plausible wrong skip: blocks keep their empty slots, which lengths and masks are asked of."""
    with skipped(stack, keep):
        yield


@contextmanager
def blocks_still_run(stack: Any, keep: Any) -> Iterator[None]:
    """Gives up the slots of blocks that go on running."""

    def give_up(_: Any, __: Any, named: dict[str, Any]) -> None:
        if isinstance(cache := named.get("past_key_values"), Cache):
            for block in set(range(len(cache.layers))) - set(keep):
                cache.layers[block] = DummyLayer()

    everything = keep is None or keep == BLOCKS or len(keep) == BLOCKS
    hook = None if everything else stack.register_forward_pre_hook(give_up, with_kwargs=True)
    yield
    if hook is not None:
        hook.remove()


@contextmanager
def a_hook_in_any_case(stack: Any, keep: Any) -> Iterator[None]:
    """Right, but never free."""
    hook = stack.register_forward_pre_hook(lambda *_: None)
    with active_blocks(stack, keep):
        yield
    hook.remove()


@contextmanager
def not_restored_after_an_error(stack: Any, keep: Any) -> Iterator[None]:
    """Right as long as nothing goes wrong."""
    LEFT_OPEN.append(switch := active_blocks(stack, keep))
    switch.__enter__()
    yield
    switch.__exit__(None, None, None)


WRONG_BLOCKS = (next_block_instead, slots_stay, blocks_still_run, a_hook_in_any_case, not_restored_after_an_error)


@pytest.mark.parametrize("knob", WRONG_BLOCKS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5_moe", "gemma4"])
def test_a_wrong_skip_would_be_noticed(name: str, knob: Any) -> None:
    assert not passes(lambda: check_blocks(ALL[name], knob))


@contextmanager
def configuration_instead(model: Any, k: int) -> Iterator[None]:
    """Edits what most routers have read when they were built."""
    text = model.config.get_text_config(decoder=True)
    (name,) = {"num_experts_per_tok", "moe_k", "moe_topk"} & text.to_dict().keys()
    own = getattr(text, name)
    setattr(text, name, k)
    try:
        yield
    finally:
        setattr(text, name, own)


@contextmanager
def one_router_missed(model: Any, k: int) -> Iterator[None]:
    """Leaves one of six as it was."""
    with experts_per_token(model, k):
        missed: Any = next(m for m in routers(model) if type(m).__name__.endswith("Router"))
        missed.top_k, set_to = 2, missed.top_k
        try:
            yield
        finally:
            missed.top_k = set_to


@contextmanager
def weights_as_scored(model: Any, k: int) -> Iterator[None]:
    """The right experts, each with the router's own score: not renormalized."""

    def scored(_: Any, __: Any, made: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, chosen = made
        return logits, logits.float().softmax(-1).gather(-1, chosen).to(weights.dtype), chosen

    own = routing_in(model).moe_top_k
    gates = [m for m in routers(model) if type(m).__name__.endswith("Router")] if k != own else []
    hooks = [gate.register_forward_hook(scored) for gate in gates]
    try:
        with experts_per_token(model, k):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def top_k_not_restored_after_an_error(model: Any, k: int) -> Iterator[None]:
    """Right as long as nothing goes wrong."""
    LEFT_OPEN.append(switch := experts_per_token(model, k))
    switch.__enter__()
    yield
    switch.__exit__(None, None, None)


WRONG_TOP_K = (configuration_instead, one_router_missed, weights_as_scored, top_k_not_restored_after_an_error)


@pytest.mark.parametrize("knob", WRONG_TOP_K)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_5_moe", "ernie4_5_vl_moe"])
def test_a_wrong_top_k_would_be_noticed(name: str, knob: Any) -> None:
    assert not passes(lambda: check_top_k(ALL[name], knob))


def test_weights_that_do_not_add_up_as_recorded_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wrong in (("mixtral", NOT_RENORMALIZED), ("olmoe", RENORMALIZED)):
        right = routing_in(ALL[name].build())
        monkeypatch.setattr(knob_contract, "routing_in", lambda _, r=right, w=wrong: replace(r, renormalization=w))
        assert not passes(lambda n=name: check_top_k(ALL[n]))  # type: ignore[misc]


def passes(check: Callable[[], None]) -> bool:
    """Whether a check finds nothing; wrong knobs break an assertion, or the model on their way."""
    try:
        check()
    except (AssertionError, RuntimeError, ValueError, LookupError, NotImplementedError):
        return False
    return True

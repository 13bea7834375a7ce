"""Capturing on a GPU: the order of the calls, which any machine can check, and the tokens, where there is a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import NATIVE, TINY, encoded, picture, sharpen, tiny_model

from workers.measure import time_answer
from workers.models import load
from workers.models.adapter import VisionLanguageModel
from workers.models.capture import CudaCapture, _side_stream, capture_on
from workers.models.engines import EagerEngine, EngineUse
from workers.models.graph_engine import GraphEngine

QUESTION = "What is in the picture?"
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# -- the order of the calls -------------------------------------------------------------------------------------------


class Calls:
    """Stands in for `torch.cuda` and writes down what is called; the step raises the time `fails_at` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.fails_at = 0
        signature = inspect.signature(torch.cuda.graph.__init__)

        def graph(*arguments: Any, **named: Any) -> Any:
            given = signature.bind(None, *arguments, **named).arguments
            assert (given["cuda_graph"], given["pool"], given["stream"]) == (self.graph, "pool", self.side)
            assert given["capture_error_mode"] == "thread_local"
            return self.block("graph")

        self.main, self.side, self.graph = (_Named(self, name) for name in ("main", "side", "graph"))
        stand_ins: dict[str, Any] = {
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: self.graph,
            "Stream": lambda _: self.side,
            "device": lambda device: self.block(str(device)),
            "stream": lambda stream: self.block(stream.name),
            "current_stream": lambda: self.main,
            "graph": graph,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: self("sync debug", str(mode)),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def __call__(self, *words: str) -> None:
        self.log.append(" ".join(words))
        if self.log.count("step") == self.fails_at and self.log[-1] == "step":
            raise RuntimeError("as told")

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        self("enter", name)
        try:
            yield
        finally:
            self.log.append(f"leave {name}")


class _Named:
    def __init__(self, calls: Calls, name: str) -> None:
        self._calls, self.name = calls, name

    def wait_stream(self, other: _Named) -> None:
        self._calls(self.name, "waits for", other.name)

    def replay(self) -> None:
        self._calls("replay")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    _side_stream.cache_clear()
    yield Calls(monkeypatch)
    _side_stream.cache_clear()


WARM = ["step", "restore"]
BEFORE = ["enter cuda:0", "side waits for main", "enter side"]


def captured(calls: Calls) -> Callable[[], None]:
    make_capture = capture_on(torch.device("cuda", 0))
    assert make_capture is not None
    capture = make_capture()
    assert isinstance(capture, CudaCapture)
    return capture(lambda: calls("step"), lambda: calls("restore"))


def test_a_capture_follows_warm_up_on_a_side_stream_and_a_look_for_waits(calls: Calls) -> None:
    replay = captured(calls)
    assert calls.log == [
        *BEFORE,
        *(WARM * 3),
        *("sync debug error", "step", "sync debug 0", "restore"),
        *("enter graph", "step", "leave graph"),
        *("leave side", "main waits for side", "leave cuda:0"),
    ]
    calls.log.clear()
    replay()
    assert calls.log == ["replay"], "no step of Python's"


def test_a_step_that_waits_is_never_captured(calls: Calls) -> None:
    calls.fails_at = 4
    with pytest.raises(RuntimeError, match="as told"):
        captured(calls)
    assert calls.log == [
        *BEFORE,
        *(WARM * 3),
        *("sync debug error", "step", "sync debug 0"),
        *("leave side", "leave cuda:0"),
    ]


def test_a_capture_that_fails_leaves_the_side_stream(calls: Calls) -> None:
    calls.fails_at = 5
    with pytest.raises(RuntimeError, match="as told"):
        captured(calls)
    assert calls.log[-4:] == ["step", "leave graph", "leave side", "leave cuda:0"]


def test_only_a_gpu_has_something_to_capture_with() -> None:
    assert capture_on(torch.device("cpu")) is None


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(name: str) -> VisionLanguageModel:
    """The tiny model with sharp weights in float32 on the GPU; its experts do not wait for the device."""
    experts = None if tiny_model(name).card.num_experts is None else "batched_mm"
    vlm = load(name, dtype="float32", device="cuda", experts=experts, engine="graph")
    sharpen(vlm.model)
    return vlm


@contextmanager
def eagerly(vlm: VisionLanguageModel) -> Iterator[None]:
    engine, vlm.engine = vlm.engine, EagerEngine(vlm.model)
    try:
        yield
    finally:
        vlm.engine = engine


@on_a_gpu
@pytest.mark.parametrize("name", TINY)
def test_tokens_on_a_gpu_are_those_of_the_eager_engine(name: str) -> None:
    vlm = on_gpu(name)
    batch = [encoded(vlm, [picture(60, 90, i)], f"{QUESTION} {'why? ' * i}") for i in range(3)]
    for top_k in (None,) if vlm.card.num_experts is None else (None, 1, 2):
        for blocks in (None, [0, 2, 5]):
            with vlm.knobs(moe_top_k=top_k, active_blocks=blocks):
                with eagerly(vlm):
                    together, alone = vlm.answer(batch, 12), [vlm.answer([sample], 12)[0] for sample in batch]
                for _ in range(2):
                    assert vlm.answer(batch, 12) == together
                    assert [vlm.answer([sample], 12)[0] for sample in batch] == alone
                    assert vlm.engine_used == EngineUse("graph")


@on_a_gpu
def test_a_timing_on_a_gpu() -> None:
    vlm = on_gpu("tiny-smolvlm")
    timing = time_answer(vlm, [picture(60, 90)], QUESTION, NATIVE, 8)
    assert timing.engine_used == EngineUse("graph")
    assert min(timing.decode_step_ms) > 0


@on_a_gpu
def test_experts_that_wait_are_found_on_a_gpu_and_leave_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = on_gpu("tiny-qwen3-vl-moe")
    monkeypatch.setattr(GraphEngine, "_why_not", lambda _: None)
    sample = encoded(vlm, [picture(60, 90)], QUESTION)
    with eagerly(vlm):
        expected = vlm.answer([sample], 8)
    vlm.model.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match="synchroniz"):
        assert vlm.answer([sample], 8) == expected
    vlm.model.set_experts_implementation("batched_mm")
    assert vlm.answer([sample], 8) == expected
    assert vlm.engine_used == EngineUse("graph")

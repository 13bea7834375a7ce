"""The graph engine: one decode step is captured and replayed for every token, so that the host cannot slow it down."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from knobs.experts import routers
from workers.models.capture import Capture
from workers.models.engines import DecodeState, EagerState, Engine, EngineUse
from workers.models.static_step import Memory, StaticStep, dynamic_rotary, rounded_capacity

# Attention of transformers that takes a mask of four dimensions.
MASKED_ATTENTION = ("sdpa", "eager")

# Graphs kept at a time: one per batch size and rounded length. Beyond that, the one unused for longest goes.
MOST_GRAPHS = 64


class GraphEngine(Engine):
    """Captures a decode step per batch size and rounded length; prefill runs the kernels of the eager engine.

    What cannot be captured is decoded eagerly, with one warning that says why, and its states say so. Graphs belong to
    one setting of the knobs; another one drops them. Answers of all shapes share one memory for keys and values, so
    only the last answer begun can be continued.
    """

    def __init__(self, model: Any, decoder: Any, make_capture: Callable[[], Capture] | None) -> None:
        """
        Args:
            decoder: the part of `model` that holds the stack of blocks.
            make_capture: called for every set of graphs; None where the device cannot capture.
        """
        self.model = model
        self.decoder = decoder
        self.warm_up_rounds = 0 if make_capture is None else 1
        self.begun = 0
        self._config = model.config.get_text_config(decoder=True)
        self._make_capture = make_capture
        self._capture: Capture | None = None
        # Looked for once: going through all modules takes a millisecond, which would be one of every prefill.
        self._routers: list[Any] = list(routers(decoder))
        self._rotary = dynamic_rotary(decoder)
        self._setting: Hashable = None
        self._refusal: str | None = None
        self._memory = Memory(0)
        self._steps: dict[tuple[int, int], StaticStep] = {}
        self._warned: set[str] = set()

    def reserve(self, rows: int, tokens: int) -> None:
        if not self.setting_is_the_same():
            self.clear()
            self._setting, self._refusal = self._setting_now(), self._why_not()
        room = rows * rounded_capacity(tokens)
        if room > self._memory.tokens:
            self.clear()  # what is captured reads memory that is too small
            self._memory = Memory(room)

    def new_state(self, rows: int, tokens: int) -> DecodeState:
        self.reserve(rows, tokens)
        capacity = rounded_capacity(tokens)
        if reason := self._refusal or self._why_not_as_long(capacity):
            return EagerState(self.model, self.fallen_back(reason))
        self.begun += 1
        return GraphState(self, self._step(rows, capacity))

    def clear(self) -> None:
        while self._steps:
            self._drop_oldest()
        self._memory = Memory(0)
        self._capture = None

    def setting_is_the_same(self) -> bool:
        """Whether the knobs are as they were when room was last made."""
        return self._setting == self._setting_now()

    def capture(self, step: StaticStep, restore: Callable[[], None]) -> None:
        """Give the step its `replay`.

        Raises:
            Exception: it cannot be captured.
        """
        assert self._make_capture is not None
        self.captures += 1
        self._capture = self._capture or self._make_capture()
        step.replay = self._capture(step, restore)

    def give_up(self, error: Exception) -> str:
        """A capture has failed: all that follows under this setting of the knobs is decoded eagerly. Returns why."""
        self.clear()
        config = self._config
        back_ends = f"attention {config._attn_implementation}"
        if self._routers:
            back_ends += f", experts {config._experts_implementation}"
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        self._refusal = f"the decode step cannot be captured ({back_ends}): {type(error).__name__}: {first_line}"
        return self.fallen_back(self._refusal)

    def fallen_back(self, reason: str) -> str:
        """Warn of a reason, once."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"decoding by engine eager, not graph as asked for: {reason}", stacklevel=2)
        return reason

    def _step(self, rows: int, capacity: int) -> StaticStep:
        step = self._steps.pop((rows, capacity), None)
        if step is None:
            if len(self._steps) >= MOST_GRAPHS:
                self._drop_oldest()
            step = StaticStep(self.model, self.decoder, self._rotary, rows, capacity, self._memory)
        self._steps[rows, capacity] = step  # the one used last is the last to go
        return step

    def _drop_oldest(self) -> None:
        device = next(self.decoder.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it must not go while it is replayed
        del self._steps[next(iter(self._steps))]

    def _setting_now(self) -> Hashable:
        """All that is switched in place on a model and fixed by a capture; read off it, whoever has switched it."""
        config = self._config
        return (
            tuple(layer.__dict__.get("forward") for layer in self.decoder.layers),
            tuple(getattr(router, "top_k", None) for router in self._routers),
            config._experts_implementation,
            config._attn_implementation,
        )

    def _why_not(self) -> str | None:
        """Why nothing can be captured under this setting, as far as that can be told without trying."""
        config = self._config
        if self._make_capture is None:
            return "a CPU has no CUDA graphs"
        if config._attn_implementation not in MASKED_ATTENTION:
            return f"attention {config._attn_implementation} takes no fixed mask (sdpa does)"
        # Experts that have no back-ends call theirs eager too, whatever it does.
        if config._experts_implementation == "eager" and self._routers and self._experts_have_back_ends():
            return "experts eager waits for the device at every block (grouped_mm and batched_mm do not)"
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        if other := sorted(kind.__name__ for kind in kinds - {DynamicLayer}):
            return f"the model has blocks without plain full attention ({', '.join(other)})"
        return None

    def _experts_have_back_ends(self) -> bool:
        return bool(getattr(self.decoder, "_can_set_experts_implementation", bool)())

    def _why_not_as_long(self, capacity: int) -> str | None:
        trained = min((getattr(module, "original_max_seq_len", 0) for module in self._rotary), default=capacity)
        return f"rotary frequencies change beyond {trained} tokens" if capacity > trained else None


class GraphState(DecodeState):
    """The one answer that the buffers of an engine hold."""

    def __init__(self, engine: GraphEngine, step: StaticStep) -> None:
        self.cache = step.cache
        self.use = EngineUse("graph")
        self._engine = engine
        self._static = step
        self._answer = engine.begun
        self._eager: EagerState | None = None
        step.empty()

    def begin(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> None:
        self._prompt = attention_mask, position_ids
        self._tokens = attention_mask.shape[1]
        self._static.begin(attention_mask, position_ids)
        if not self._engine.setting_is_the_same() or not self._static.has_its_own_cache():
            self._engine.clear()
            self._go_on_eagerly(self._engine.fallen_back("the prompt was read in another way than answers are decoded"))

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """As declared.

        Raises:
            RuntimeError: another answer has begun since.
            ValueError: there is no room for another token; fewer were announced.
        """
        if self._eager is not None:
            return self._eager.step(token)
        if self._answer != self._engine.begun:
            raise RuntimeError("another answer has begun; engine graph decodes one after the other")
        if self._tokens >= self._static.capacity:
            raise ValueError(f"there is no room for more than {self._static.capacity} tokens; announce them at prefill")
        self._static.token.copy_(token)
        if self._static.replay is None and not self._captured(token):
            return self.step(token)
        assert self._static.replay is not None
        self._static.replay()
        self._tokens += 1
        # The buffer is overwritten by the next step.
        return self._static.token.clone()

    def keep(self, rows: Sequence[int]) -> bool:
        # A graph has the number of its rows fixed; one for fewer rows would be another capture, and a copy of the
        # buffers that all shapes share.
        return self._eager is not None and self._eager.keep(rows)

    def _captured(self, token: torch.Tensor) -> bool:
        def restore() -> None:
            self._static.begin(*self._prompt)
            self._static.token.copy_(token)

        try:
            self._engine.capture(self._static, restore)
        except Exception as error:  # whatever a model or a driver meets there, the answer can go on without
            self._go_on_eagerly(self._engine.give_up(error))
            return False
        return True

    def _go_on_eagerly(self, note: str) -> None:
        """From the same keys and values, in a cache that grows."""
        self._eager = EagerState(self._engine.model, note)
        for block, keys, values in self._static.keys_and_values(self._tokens):
            self._eager.cache.layers[block].update(keys, values)
        self._eager.begin(*self._prompt)
        self.cache, self.use = self._eager.cache, self._eager.use

"""A capture for the CPU: the tensor operations of one step, recorded with their arguments and run again in order.

As with a CUDA graph, no Python of the step runs again, every number that Python has computed is what it was when the
step was recorded, and a step that has to know a value of a tensor cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# What needs a value, or the number of values, of a tensor on the host.
WAITS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose),
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.bincount),
}


class Recording:
    """`Capture` in terms of recorded operations; counts what is captured and replayed."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        operations = _Operations()
        with torch.inference_mode(False), torch.no_grad():  # as on a GPU, see `CudaCapture`
            step()
            restore()
            with _WithoutValues(), operations:
                step()
            restore()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            operations.run_again()

        return replay


class _WithoutValues(TorchFunctionMode):
    """Refuses what hands the values of a tensor to Python without an operation of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            raise RuntimeError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func} waits for the device")
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, made))  # keeps every tensor alive, so that identities stay unique
        return made

    def run_again(self) -> None:
        now: dict[int, Any] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value)

        for func, args, kwargs, made in self._calls:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            now |= {id(then): value for then, value in zip(tree_leaves(made), tree_leaves(again), strict=True)}

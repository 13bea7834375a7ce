"""Capturing a decode step: the one seam between the graph engine and CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch

# Kernels are chosen, workspaces made and modules loaded in the first runs, none of which may happen in a capture.
WARM_UP_STEPS = 3


class Capture(Protocol):
    """Captures steps; one object per set of graphs that live and are dropped together."""

    def __call__(self, step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        """What repeats the device's work of `step`, and none of its Python, whenever it is called.

        Args:
            step: reads and writes only tensors that stay where they are; run several times.
            restore: puts those tensors back, and is called after every run; they are restored in the end.

        Raises:
            Exception: whatever stands in the way, such as a step that waits for the device.
        """
        ...


class CudaCapture:
    """Captures with `torch.cuda.graph`; its graphs share one pool of memory for what is between input and output.

    They may be replayed in any order, because nothing in that pool is read after the replay that wrote it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream = _side_stream(self._device)
        # Not in inference mode: a graph whose generator of random numbers was made in it can only be replayed in it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            stream.wait_stream(torch.cuda.current_stream())
            # Entered here as well as by `torch.cuda.graph`, which does not leave its stream when a capture fails.
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    step()
                    restore()
                # A step that waits for the device cannot be captured. It is found here, where it only raises: a
                # capture that fails half-way may leave the allocator in a state that nobody vouches for.
                with _waiting_is_an_error():
                    step()
                restore()
                # What other threads of the process do with the device is not part of this capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay


def capture_on(device: torch.device) -> Callable[[], Capture] | None:
    """What makes captures on a device; None for one that has no graphs."""
    return (lambda: CudaCapture(device)) if device.type == "cuda" else None


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all warm-ups and captures; one only, because cuBLAS keeps a workspace for every stream it met."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

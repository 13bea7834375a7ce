"""What a worker or a driver finds of the machine it runs on: accelerators, device names, host."""

from __future__ import annotations

import os
import platform
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU = "cpu"

# As Ray 2.60 reads NVML's names: a maker, words in capitals, then the first one with a digit in it.
_KIND = re.compile(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)")


@dataclass(frozen=True)
class Device:
    """The device a worker measures on.

    Attributes:
        accelerator: kind as sweeps name it, e.g. H100, or cpu.
        name: as the driver names it.
        uuid: distinguishes two GPUs of a kind; None on a CPU.
        memory_bytes: total device memory; main memory on a CPU.
        host, pid: where the worker runs.
        threads: threads that torch computes with on the host.
        niceness: Ray starts workers at 15 unless told otherwise, which slows preprocessing on a busy host.
    """

    accelerator: str
    name: str
    uuid: str | None
    memory_bytes: int
    host: str
    pid: int
    threads: int
    niceness: int


def accelerator_kind(device_name: str) -> str:
    """The kind in a driver's device name, exactly as Ray spells it: `NVIDIA H100 80GB HBM3` is H100.

    Task ids contain the kind and Ray is asked for it, so a rule of our own would time things twice or wait for ever.
    A100-SXM4-40GB and A100-SXM4-80GB are both A100; their memory tells them apart. Where no word in capitals has a
    digit, the kind is the whole name: `NVIDIA GeForce RTX 4090` is GeForce-RTX-4090.
    """
    found = _KIND.match(device_name)
    kind = found.group(1).replace(" ", "-") if found else ""
    return kind if len(kind) > 1 else re.sub(r"^NVIDIA\s+", "", device_name).strip().replace(" ", "-")


def local_accelerators() -> list[str]:
    """Kinds of the GPUs of this machine, found without torch; empty on a machine without."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [accelerator_kind(_text(pynvml.nvmlDeviceGetName(handle))) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def current_device(device: torch.device) -> Device:
    """What this process finds of the device that it loads models on. Imports torch."""
    import psutil
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, uuid, memory = properties.name, f"GPU-{properties.uuid}", properties.total_memory
        kind = accelerator_kind(name)
    else:
        name, uuid, memory, kind = cpu_name(), None, psutil.virtual_memory().total, CPU
    return Device(
        accelerator=kind,
        name=name,
        uuid=uuid,
        memory_bytes=memory,
        host=socket.gethostname(),
        pid=os.getpid(),
        threads=torch.get_num_threads(),
        niceness=os.nice(0),
    )


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value

"""What holds on the machine at one moment: clocks, heat and power of the GPU, who else uses it, how busy the CPU is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa

from workers.columns import Column
from workers.nvml import Gpu, GpuState, gpu_of

if TYPE_CHECKING:
    import torch

_INT, _FLOAT = pa.int64(), pa.float64()

# Read at the start and at the end of a measurement.
_MOMENT = (
    Column("sm_clock_mhz", _INT, "MHz", "clock of the GPU's processors; null on a CPU"),
    Column("memory_clock_mhz", _INT, "MHz", "clock of the GPU's memory; null on a CPU"),
    Column("cpu_clock_mhz", _FLOAT, "MHz", "mean clock of the cores; null on a GPU"),
    Column("temperature_c", _FLOAT, "°C", "temperature of the device, of a CPU its hottest sensor"),
    Column("power_w", _FLOAT, "W", "power that the GPU draws, by its sensor, which averages over up to a second"),
    Column("power_limit_w", _FLOAT, "W", "power that the GPU may draw"),
    Column("clock_events", pa.list_(pa.string()), "", "what holds the GPU's clocks, in NVML's words; usually gpu_idle"),
    Column("foreign_processes", _INT, "", "other processes with a compute context on the GPU"),
    Column(
        "other_memory_bytes",
        _INT,
        "byte",
        "GPU memory in use beyond what torch has reserved in this process: its CUDA context, and what others hold",
    ),
)

# Of the time between the two.
_BETWEEN = (
    Column("power_capped_s", _FLOAT, "s", "time for which the power limit held the GPU's clocks down"),
    Column("thermally_slowed_s", _FLOAT, "s", "time for which heat held the GPU's clocks down"),
    Column(
        "cpu_load_others",
        _FLOAT,
        "",
        "cores that other processes, and other virtual machines, kept busy on average; counted in hundredths of a "
        "second per core, so it is rough for short rows",
    ),
)

# The columns that `condition_columns` fills; null is what a machine does not tell.
CONDITION_COLUMNS = (
    *(
        Column(f"{column.name}_{moment}", column.type, column.unit, f"{column.meaning}; at the {moment} of the row")
        for column in _MOMENT
        for moment in ("start", "end")
    ),
    *_BETWEEN,
)

# Sensors of a processor by the names of the Linux drivers: Intel, AMD (two), ARM boards.
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


@dataclass(frozen=True)
class Conditions:
    """One moment. None is what the machine does not tell.

    Attributes:
        taken_s: on a clock that only moves forward.
        gpu: all None on a CPU.
        foreign_processes: other processes that compute on the GPU.
        other_memory_bytes: GPU memory that torch has not reserved in this process: its context, and what others hold.
        busy_cpu_s: time that any process has spent on the cores this one may use, and that other virtual machines took.
        own_cpu_s: time that this process has spent, all threads.
        logical_cores: how many this process may use, as the operating system counts.
        cores: the same without counting a core twice for its two hardware threads.
        threads_needed: threads that must not wait: on a CPU those torch computes with, on a GPU the one that launches.
        cpu_clock_mhz, cpu_temperature_c: None on a GPU, where they decide little and can be slow to read.
        cpu_throttlings: how often heat has slowed the processor since it started (Intel).
    """

    taken_s: float
    gpu: GpuState
    foreign_processes: int | None
    other_memory_bytes: int | None
    busy_cpu_s: float
    own_cpu_s: float
    logical_cores: int
    cores: float
    threads_needed: int
    cpu_clock_mhz: float | None = None
    cpu_temperature_c: float | None = None
    cpu_throttlings: int | None = None


class Observer:
    """Takes the conditions on one device, outside of what is timed.

    One snapshot took 0.22 ms on a two-core virtual machine without a GPU, and takes some 10 to 20 us more per core;
    NVML adds about ten questions. `python -m workers.selfcheck` measures it.
    """

    def __init__(self, device: torch.device, gpu: Gpu | None = None) -> None:
        """
        Args:
            gpu: in place of the one behind `device`.
        """
        self._device = device
        self._gpu = gpu or gpu_of(device)
        self._on_cpu = device.type == "cpu"
        every_core = psutil.cpu_count() or 1
        self._allowed = _allowed_cores(every_core)
        physical = psutil.cpu_count(logical=False) or every_core
        self._cores = len(self._allowed) * min(1.0, physical / every_core)
        self._throttle_counter = _throttle_counter(self._allowed[0])

    def snapshot(self) -> Conditions:
        """What holds now; never raises."""
        import torch

        gpu = self._gpu.state()
        reserved = _reserved_memory(self._device)
        own_context = reserved is not None
        conditions: dict[str, Any] = {}
        if self._on_cpu:
            conditions = {"cpu_clock_mhz": _cpu_clock(), "cpu_temperature_c": _cpu_temperature()}
        return Conditions(
            gpu=gpu,
            foreign_processes=foreign_processes(gpu.pids, os.getpid(), own_context=own_context),
            other_memory_bytes=None if gpu.used_memory_bytes is None else gpu.used_memory_bytes - (reserved or 0),
            logical_cores=len(self._allowed),
            cores=self._cores,
            threads_needed=torch.get_num_threads() if self._on_cpu else 1,
            cpu_throttlings=_counted(self._throttle_counter),
            # These belong together, so they are read one right after the other.
            busy_cpu_s=_busy_cpu(self._allowed),
            own_cpu_s=time.process_time(),
            taken_s=time.perf_counter(),
            **conditions,
        )


def foreign_processes(pids: frozenset[int] | None, own: int, *, own_context: bool) -> int | None:
    """How many of the processes on a GPU are not this one.

    Inside a container a driver may answer with pids of the host (NVIDIA/nvidia-docker#1483), among which this process
    cannot be told; but it is one of them, as it has a context on the GPU. A driver that shows a container nothing, not
    even this process, says nothing of others.

    Args:
        own_context: this process computes on the GPU, so it is among the pids.
    """
    if pids is None or (own_context and not pids):
        return None
    return len(pids) - (own in pids or own_context)


def cpu_load_others(before: Conditions, after: Conditions) -> float | None:
    """Cores that others kept busy between two moments, on average; None if no time has passed."""
    elapsed = after.taken_s - before.taken_s
    if elapsed <= 0:
        return None
    own = after.own_cpu_s - before.own_cpu_s
    # The two are counted in steps of different size, so that their difference can fall short of nothing.
    return max(0.0, after.busy_cpu_s - before.busy_cpu_s - own) / elapsed


def condition_columns(before: Conditions, after: Conditions) -> dict[str, Any]:
    """`CONDITION_COLUMNS` of a row that was measured between two moments."""
    columns: dict[str, Any] = {}
    for moment, conditions in (("start", before), ("end", after)):
        gpu = conditions.gpu
        temperature = gpu.temperature_c if gpu.temperature_c is not None else conditions.cpu_temperature_c
        columns |= {
            f"sm_clock_mhz_{moment}": gpu.sm_clock_mhz,
            f"memory_clock_mhz_{moment}": gpu.memory_clock_mhz,
            f"cpu_clock_mhz_{moment}": conditions.cpu_clock_mhz,
            f"temperature_c_{moment}": temperature,
            f"power_w_{moment}": gpu.power_w,
            f"power_limit_w_{moment}": gpu.power_limit_w,
            f"clock_events_{moment}": None if gpu.clock_events is None else list(gpu.clock_events),
            f"foreign_processes_{moment}": conditions.foreign_processes,
            f"other_memory_bytes_{moment}": conditions.other_memory_bytes,
        }
    return columns | {
        "power_capped_s": rise(before.gpu.power_capped_s, after.gpu.power_capped_s),
        "thermally_slowed_s": rise(before.gpu.thermally_slowed_s, after.gpu.thermally_slowed_s),
        "cpu_load_others": cpu_load_others(before, after),
    }


def rise(before: float | None, after: float | None) -> float | None:
    """By how much a counter rose; None where it was not read twice, or began anew."""
    return None if before is None or after is None or after < before else after - before


def _reserved_memory(device: torch.device) -> int | None:
    """GPU memory that torch has taken in this process; None before it has a context there."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.memory_reserved(device) if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _allowed_cores(every_core: int) -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(every_core))  # macOS, Windows


def _busy_cpu(cores: list[int]) -> float:
    """Seconds that cores were busy; `user` and `nice` have guests in them already, steal is another machine's."""
    times = psutil.cpu_times(percpu=True)
    counted = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
    return sum(getattr(times[core], name, 0.0) for core in cores if core < len(times) for name in counted)


def _cpu_clock() -> float | None:
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return frequency.current or None if frequency else None


def _cpu_temperature() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):
        return None  # macOS, Windows
    try:
        found = psutil.sensors_temperatures()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return max((sensor.current for name in _CPU_SENSORS for sensor in found.get(name, [])), default=None)


def _throttle_counter(core: int) -> Path:
    """Where the kernel counts for the processor of a core (Documentation/ABI/testing/sysfs-devices-system-cpu)."""
    return Path(f"/sys/devices/system/cpu/cpu{core}/thermal_throttle/package_throttle_count")


def _counted(counter: Path) -> int | None:
    try:
        return int(counter.read_text())
    except (OSError, ValueError):
        return None

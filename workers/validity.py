"""Why a measurement is not to be trusted: a closed list of reasons, each with its rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum

import numpy as np

from workers.conditions import Conditions, cpu_load_others, rise
from workers.nvml import HW_POWER_BRAKE, HW_SLOWDOWN, HW_THERMAL, IDLE, SW_POWER_CAP, SW_THERMAL

# The SM clock wanders by a few steps of 15 MHz at any time; a tenth is far outside and moves compute-bound stages by as
# much, which is more than the intervals that a sweep is to resolve.
CLOCK_DROP = 0.10

# Heat that held the clocks for this share of the time can have moved a time by at most about as much.
THERMAL_SHARE = 0.01

# A CUDA context, its kernels and the workspaces of libraries take 0.3 to 1.2 GB that torch does not count. Twice that,
# rounded, cannot be this process alone.
OWN_UNCOUNTED_BYTES = 2 * 1024**3

# Share of the cores we need that others may take: what system daemons and the driver take of a quiet machine.
CPU_SHARE = 0.10

# A first round that is slower by less than this moves a mean of three rounds by less than the 3 % that noise does.
SLOWER_FIRST = 0.10

# How often a first round may look slow by chance, if it was as warm as the later ones.
BY_CHANCE = 0.001

# The operating system counts the time of each core in steps of this size (USER_HZ), so less is not there.
CPU_TICK_S = 0.01


class Reason(StrEnum):
    """What disturbed a measurement, as it stands in `invalid_reasons`.

    What a machine does not tell never is a reason. A low clock alone is none either: a bound on it has cost another
    tool every sample of a bandwidth-bound run (NVIDIA/nvbench#231). Nor is a power limit that holds steadily, as it
    does on some cards whenever they are busy: times under it are the card's own, and `power_capped_s` says so.

    THERMAL_THROTTLE: heat slowed the device. On a GPU NVML names a thermal slowdown at either end, or counts more than
        `THERMAL_SHARE` of the time (nvml.h: nvmlClocksEventReasonSwThermalSlowdown, ...HwThermalSlowdown,
        NVML_PERF_POLICY_THERMAL); on a CPU the kernel counted a throttling (package_throttle_count). Depends on what
        ran before and on the room, so the time is not that of the knobs.
    HARDWARE_SLOWDOWN: a protection outside of the GPU's software halved its clocks or worse, at either end (nvml.h:
        nvmlClocksEventReasonHwSlowdown, ...HwPowerBrakeSlowdown).
    POWER_CAP: the SM clock fell by more than `CLOCK_DROP` while the power limit held it at the end (nvml.h:
        nvmlClocksEventReasonSwPowerCap): the limit set in within the measurement.
    CLOCK_DROP: it fell by as much, and NVML names no power limit. Neither is said of a GPU that was idle at either end,
        where its clock is no one's business.
    LIMITS_CHANGED: the power limit or the application clock are not at the end what they were at the start.
    FOREIGN_PROCESS: at either end another process has a compute context on the GPU, be it idle, for it need not stay
        so; or more of its memory is taken than can be ours (`OWN_UNCOUNTED_BYTES`), which is how a process in another
        container shows. Graphics contexts do not count: a desktop always has them.
    CPU_BUSY: others left our threads too few cores: they used more than the cores that we do not need, plus
        `CPU_SHARE` of those that we do. A machine with cores to spare may be busy. What one tick per core would explain
        is not counted, so a disturbance of rows of some 10 ms goes unseen.
    SLOW_FIRST_ROUND: see `slow_first_round`; of the first round of a visit only.
    """

    THERMAL_THROTTLE = "thermal_throttle"
    HARDWARE_SLOWDOWN = "hardware_slowdown"
    POWER_CAP = "power_cap"
    CLOCK_DROP = "clock_drop"
    LIMITS_CHANGED = "limits_changed"
    FOREIGN_PROCESS = "foreign_process"
    CPU_BUSY = "cpu_busy"
    SLOW_FIRST_ROUND = "slow_first_round"


def reasons(before: Conditions, after: Conditions) -> list[str]:
    """Why what was measured between two moments does not count; empty if nothing says so."""
    return [reason.value for reason, holds in _RULES.items() if holds(before, after)]


def slow_first_round(totals: np.ndarray) -> bool:
    """Whether the first of several rounds was slower than all others, so that the warm-up was not enough.

    If it were like the others, each batch would be slowest in it with a chance of one in the number of rounds. So it is
    said where so many batches are, by `SLOWER_FIRST` and more, that chance would do it once in 1 / `BY_CHANCE` times.
    Few batches in few rounds can never say so.

    Args:
        totals: (rounds, batches), positive, in the order of measuring.
    """
    rounds = len(totals)
    if rounds < 2:
        return False
    batches = int(totals.shape[1])
    slow = int((totals[0] > (1 + SLOWER_FIRST) * totals[1:].max(axis=0)).sum())
    chance = 1 / rounds
    ways = [math.comb(batches, k) * chance**k * (1 - chance) ** (batches - k) for k in range(slow, batches + 1)]
    return 2 * slow > batches and sum(ways) < BY_CHANCE


def _thermal_throttle(before: Conditions, after: Conditions) -> bool:
    slowed = rise(before.gpu.thermally_slowed_s, after.gpu.thermally_slowed_s) or 0.0
    return (
        _named(before, SW_THERMAL, HW_THERMAL)
        or _named(after, SW_THERMAL, HW_THERMAL)
        or slowed > THERMAL_SHARE * (after.taken_s - before.taken_s)
        or (rise(before.cpu_throttlings, after.cpu_throttlings) or 0) > 0
    )


def _hardware_slowdown(before: Conditions, after: Conditions) -> bool:
    return any(_named(moment, HW_SLOWDOWN, HW_POWER_BRAKE) for moment in (before, after))


def _power_cap(before: Conditions, after: Conditions) -> bool:
    return _fell(before, after) and _named(after, SW_POWER_CAP)


def _clock_drop(before: Conditions, after: Conditions) -> bool:
    return _fell(before, after) and not _named(after, SW_POWER_CAP)


def _limits_changed(before: Conditions, after: Conditions) -> bool:
    pairs = (
        (before.gpu.power_limit_w, after.gpu.power_limit_w),
        (before.gpu.application_sm_clock_mhz, after.gpu.application_sm_clock_mhz),
    )
    return any(start is not None and end is not None and start != end for start, end in pairs)


def _foreign_process(before: Conditions, after: Conditions) -> bool:
    return any(
        (moment.foreign_processes or 0) > 0 or (moment.other_memory_bytes or 0) > OWN_UNCOUNTED_BYTES
        for moment in (before, after)
    )


def _cpu_busy(before: Conditions, after: Conditions) -> bool:
    load = cpu_load_others(before, after)
    if load is None:
        return False
    needed = min(float(after.threads_needed), after.cores)
    uncertain = CPU_TICK_S * after.logical_cores / (after.taken_s - before.taken_s)
    return load > after.cores - needed + CPU_SHARE * needed + uncertain


def _named(moment: Conditions, *events: str) -> bool:
    return not set(events).isdisjoint(moment.gpu.clock_events or ())


def _fell(before: Conditions, after: Conditions) -> bool:
    start, end = before.gpu.sm_clock_mhz, after.gpu.sm_clock_mhz
    if start is None or end is None or _named(before, IDLE) or _named(after, IDLE):
        return False
    return end < (1 - CLOCK_DROP) * start


_RULES: dict[Reason, Callable[[Conditions, Conditions], bool]] = {
    Reason.THERMAL_THROTTLE: _thermal_throttle,
    Reason.HARDWARE_SLOWDOWN: _hardware_slowdown,
    Reason.POWER_CAP: _power_cap,
    Reason.CLOCK_DROP: _clock_drop,
    Reason.LIMITS_CHANGED: _limits_changed,
    Reason.FOREIGN_PROCESS: _foreign_process,
    Reason.CPU_BUSY: _cpu_busy,
}

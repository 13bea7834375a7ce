"""Energy of one round of work by a device's own counter, which only rises in steps: repeated over several of them.

What the counter shows is the energy up to its last step, its tick, so that a reading is short of the truth by what was
drawn since. NVML's ticks come some 20 to 100 ms apart, depending on GPU and driver (PETSc's `PetscLogGpuEnergyMeter`,
ml.energy on Zeus); rounds of work take from less than a millisecond to seconds. The rules, for one formula for all:

- The device never waits in the window. Waiting for a tick at either end would add idle energy to the work, or, as the
  sensor lags behind and A100 and H100 sample only a quarter of each tick (arXiv 2312.02741), put idle time in place of
  work. So work goes on across both ends, after a lead-in of `LEAD_S`, and whatever lags does so at both ends alike.
- Each end of the window is the end of a call within, or just before, which a tick came. So the counter is late by about
  the same at both ends, and

      joules of a call = (counter at the end - counter at the start) / calls between them

  of whole calls: it does not matter that power changes within a call, nor when the calls were slow.
- Readings are rare but for the search of a tick at either end, since the device rests while it is read.

Bias: none from the ticks over many windows, as both ends are chosen by one rule; if calls and ticks are as regular as
can be, then the error of one window repeats in the next. Upwards by what the device draws while it is read: that share
of the window times idle power over power at work.

Relative error: with `late` the most that a tick can lie before an end of the window (the time since the reading before,
and not more than a tick), and `reading` the time spent reading,

    relative error = (late + reading) / (window - late)

It bounds the error where the power just before either end is not above the mean one and no tick is later than those
seen. Calls that are short against a tick have late = tick / 20, so 0.5 % of a window of ten ticks; for longer ones it
is up to a tick, so 11 %, and more ticks make it less. Errors are mostly smaller: the moments of two ticks within calls
differ by 0.41 of a tick in standard deviation. Not in it: the sensor's own error (arXiv 2312.02741), other processes,
and work that repeats in step with a sensor that looks only part of the time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.nvml import Gpu

# Work before the window: the longest that a sensor of NVIDIA's is said to average over (nvmlDeviceGetPowerUsage).
LEAD_S = 1.0
# A counter that has not shown its ticks after so long, while nothing else is done, does not tick.
TICK_WAIT_S = 3.0
# The longest of so many is taken as the tick, as they differ.
_TICKS_SEEN = 3
# A counter that ticks more often is treated as if it did not: the window would be too short to read rarely in it.
_LEAST_TICK_S = 0.02
# Readings in a tick while one is searched for.
_FINE = 20


@dataclass(frozen=True)
class Energy:
    """What a call of `work` took.

    Attributes:
        joules: of one call, mean over `calls`; all that the board draws, idle power included.
        relative_error: how far `joules` may be off because of the counter's ticks and of reading it (module docstring).
        seconds: length of the window.
        calls: whole ones in the window.
    """

    joules: float
    relative_error: float
    seconds: float
    calls: int


@dataclass(frozen=True)
class _Reading:
    """The counter, and when it was asked and had answered."""

    joules: float
    began: float
    ended: float


@dataclass(frozen=True)
class _Edge:
    """The end of a call, with the first reading that shows a tick.

    Attributes:
        late_s: the tick came at most so long before it.
        calls: since the reading that the work began with.
        reading_s: time spent reading, this one and that included.
    """

    reading: _Reading
    late_s: float
    calls: int
    reading_s: float


def energy_of(
    gpu: Gpu,
    work: Callable[[], None],
    least_ticks: int = 10,
    most_seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy | None:
    """Joules of one call of `work`, repeated over `least_ticks` of the counter; None where the device does not tell.

    None is: no counter, one that does not tick, began anew or stopped answering, or too few ticks in the time. Takes
    some four ticks, then `LEAD_S` and the window: about 2.5 s at ticks of 100 ms and calls shorter than that.

    Args:
        work: a whole round of answers; returns when the device is done with it. What it raises is passed on.
        least_ticks: that the window is long, at least 2.
        most_seconds: no call begins later than so long after the first, but for the one in which the lead-in and the
            one in which the window consist at least. So it takes at most that, `TICK_WAIT_S` and two calls.
        clock: in seconds, as it passes for the host.
    """
    if least_ticks < 2:
        raise ValueError(f"least_ticks is {least_ticks}: a window of fewer than 2 ticks says nothing")
    tick_s = _tick(gpu, clock)
    lead = None if tick_s is None else _read(gpu, clock)
    if tick_s is None or lead is None:
        return None
    deadline = lead.began + most_seconds
    start = _work_to_a_tick(gpu, work, clock, lead, LEAD_S, tick_s, deadline)
    if start is None:
        return None
    end = _work_to_a_tick(gpu, work, clock, start.reading, least_ticks * tick_s, tick_s, deadline)
    if end is None:
        return None
    seconds = end.reading.began - start.reading.began
    late_s = max(start.late_s, end.late_s)
    return Energy(
        joules=(end.reading.joules - start.reading.joules) / end.calls,
        relative_error=(late_s + end.reading_s) / (seconds - late_s),
        seconds=seconds,
        calls=end.calls,
    )


def _read(gpu: Gpu, clock: Callable[[], float]) -> _Reading | None:
    began = clock()
    joules = gpu.energy_j()
    return None if joules is None else _Reading(joules, began, clock())


def _tick(gpu: Gpu, clock: Callable[[], float]) -> float | None:
    """Seconds between ticks, the longest of a few, seen by asking without pause; None if they do not come in time."""
    first = previous = _read(gpu, clock)
    edges: list[float] = []
    while first is not None and previous is not None and previous.ended - first.began < TICK_WAIT_S:
        now = _read(gpu, clock)
        if now is None or now.joules < previous.joules:
            return None
        if now.joules > previous.joules:
            edges.append(now.ended)
        if len(edges) > _TICKS_SEEN:
            longest = max(later - earlier for earlier, later in itertools.pairwise(edges))
            return max(longest, _LEAST_TICK_S)
        previous = now
    return None


def _work_to_a_tick(
    gpu: Gpu,
    work: Callable[[], None],
    clock: Callable[[], float],
    begin: _Reading,
    least_s: float,
    tick_s: float,
    deadline: float,
) -> _Edge | None:
    """Work for `least_s` from a reading on, and to the first call after that which shows a tick.

    Reads once a tick, to see the counter fail, and `_FINE` times as often once the time is over; or after each call, if
    calls are longer.
    """
    previous, calls, reading_s = begin, 0, begin.ended - begin.began
    while True:
        searching = previous.began - begin.began >= least_s
        pause_s = tick_s / _FINE if searching else tick_s
        earlier = calls
        while True:
            work()
            calls += 1
            ended = clock()
            if ended - previous.ended >= pause_s or ended >= deadline:
                break
        now = _read(gpu, clock)
        if now is None or now.joules < previous.joules:
            return None
        reading_s += now.ended - now.began
        closely = searching or calls == earlier + 1
        if closely and now.joules > previous.joules and now.began - begin.began >= least_s:
            return _Edge(now, min(now.ended - previous.began, tick_s), calls, reading_s)
        if now.ended >= deadline:
            return None
        previous = now

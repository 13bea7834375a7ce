"""What a self-check has measured, and the figures it comes to; pure arithmetic between `selfcheck` and `checks`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from workers.conditions import Conditions, cpu_load_others, rise
from workers.nvml import IDLE
from workers.stopping import FEWEST_ROUNDS, relative_half_width
from workers.trends import paired_overhead, trend
from workers.validity import reasons

# What no stage accounts for, what a repeated answer may wander, and how narrow a sweep wants its intervals.
ERROR_LIMIT = 0.02
# A first call counts as settled this near to the later ones, or as near as nine in ten of them are.
SETTLED_WITHIN = 0.05
SETTLED_QUANTILE = 0.9
# Standard error of a median in distances between quartiles, times the square root of the number: of a normal
# distribution, 1.2533 / 1.3490.
_MEDIAN_ERROR = 0.929
# The same answer in so many groups one after the other, each of so many answers at least.
GROUPS = 8
FEWEST_OF_A_GROUP = 4


@dataclass(frozen=True)
class PairTimes:
    """A marked and a bare answer without their tensors; times in milliseconds.

    Attributes:
        at: when the marked one began.
        around: conditions before and after the marked one, then of the bare one.
    """

    at: datetime
    marked_first: bool
    total_ms: float
    prefill_ms: float
    tpot_ms: float | None
    residual_ms: float
    bare_ms: float
    around: tuple[Conditions, Conditions, Conditions, Conditions]

    def in_time(self) -> tuple[Conditions, Conditions, Conditions, Conditions]:
        """The conditions in the order in which they were taken."""
        marked, bare = self.around[:2], self.around[2:]
        return (*marked, *bare) if self.marked_first else (*bare, *marked)

    def reasons(self) -> tuple[list[str], list[str]]:
        """Why the marked and the bare answer would not count in a sweep."""
        return reasons(*self.around[:2]), reasons(*self.around[2:])


@dataclass(frozen=True)
class Measured:
    """Everything that was measured.

    Attributes:
        first_calls_ms: totals of the first answers after loading, the very first included.
        discarded_calls: how many of these a sweep would not have timed.
        pairs: in the order of measuring.
        snapshot_ms, timers_differ: as in `Figures`.
    """

    on_gpu: bool
    engine: str
    engine_note: str | None
    niceness: int
    first_calls_ms: tuple[float, ...]
    discarded_calls: int
    pairs: tuple[PairTimes, ...]
    snapshot_ms: float
    timers_differ: float | None


@dataclass(frozen=True)
class Noise:
    """How one repeated time scatters.

    Attributes:
        name: of the time.
        median_ms: of all repeats.
        spread: distance between the quartiles, relative to the median.
        repeats_needed: until the 95 % interval of the median is +-`ERROR_LIMIT`.
    """

    name: str
    median_ms: float
    spread: float
    repeats_needed: int


@dataclass(frozen=True)
class Figures:
    """What was measured; shares and slopes are relative (0.02 is 2 %), None is what the machine does not tell.

    Attributes:
        on_gpu: the device is one.
        engine, engine_note: which decoded, and why it is not the one that was asked for.
        pairs, seconds: of a marked and a bare answer, and the stretch of time over which they were taken.
        answer_ms: median total of a marked answer.
        overhead, overhead_half_width: of marked over bare answers, with its 95 % interval.
        residual_mean, residual_largest: share of total, without sign, that no stage accounts for.
        residual_excess: share of answers in which that is more than `ERROR_LIMIT`.
        noise: of the times that a sweep watches; total first.
        first_ms, settled_ms: the first call after loading, and the median of the later ones.
        settled_within: how near to that level counts as settled: what later calls scatter, `SETTLED_WITHIN` at least.
        slow_calls, calls: calls before the first one that is as near, of how many.
        discarded_calls: how many a sweep would not have timed.
        group_medians_ms: of the same answer, in groups one after the other.
        spread, spread_by_noise: of these, standard deviation; and what it would be around one level.
        slope_per_hour, slope_half_width: of a line through them, with its 95 % interval.
        clock_mhz: lowest and highest of the groups' median clocks: of the GPU's processors, or the CPU's cores.
        clock_events: what held the GPU's clocks at any moment, idling apart.
        temperature_c: at the start and at the end.
        power_capped_s, thermally_slowed_s: time for which they held the GPU's clocks down.
        throttlings: how often heat slowed the CPU.
        foreign_processes, other_memory_bytes: most that were found on the GPU, see `workers.conditions`.
        cores_others: cores that others kept busy on average.
        cores, threads_needed: of this process.
        answers, invalid: answers that were judged, and those that a sweep would leave out.
        reasons: how many answers each reason was found for.
        snapshot_ms: what asking for the conditions costs.
        timers_differ: device's clock over host's, less one; None on a CPU, which has one clock.
        niceness: of this process.
    """

    on_gpu: bool
    engine: str
    engine_note: str | None
    pairs: int
    seconds: float
    answer_ms: float
    overhead: float
    overhead_half_width: float
    residual_mean: float
    residual_largest: float
    residual_excess: float
    noise: tuple[Noise, ...]
    first_ms: float
    settled_ms: float
    settled_within: float
    slow_calls: int
    calls: int
    discarded_calls: int
    group_medians_ms: tuple[float, ...]
    spread: float
    spread_by_noise: float
    slope_per_hour: float
    slope_half_width: float
    clock_mhz: tuple[float, float] | None
    clock_events: tuple[str, ...] | None
    temperature_c: tuple[float, float] | None
    power_capped_s: float | None
    thermally_slowed_s: float | None
    throttlings: int | None
    foreign_processes: int | None
    other_memory_bytes: int | None
    cores_others: float | None
    cores: float
    threads_needed: int
    answers: int
    invalid: int
    reasons: Mapping[str, int]
    snapshot_ms: float
    timers_differ: float | None
    niceness: int


def figures_of(measured: Measured) -> Figures:
    """The figures that what was measured comes to.

    Answers that a sweep would leave out stay in: the machine is what is judged.

    Raises:
        ValueError: nothing was measured.
    """
    pairs = measured.pairs
    if not pairs or not measured.first_calls_ms:
        raise ValueError("a self-check needs a first call and a pair of answers")
    totals = np.array([pair.total_ms for pair in pairs])
    left_over = np.abs([pair.residual_ms for pair in pairs]) / totals
    overhead, overhead_half_width = paired_overhead(
        totals, [pair.bare_ms for pair in pairs], [pair.marked_first for pair in pairs]
    )
    watched, groups = _noise(pairs), _groups(pairs)
    medians = [float(np.median([pair.total_ms for pair in group])) for group in groups]
    line = trend([_hours(pairs[0].at, group) for group in groups], medians)
    settled_ms, within, slow_calls = settled(measured.first_calls_ms)
    moments = [moment for pair in pairs for moment in pair.in_time()]
    first, last = moments[0], moments[-1]
    why_not = [found for pair in pairs for found in pair.reasons()]
    return Figures(
        on_gpu=measured.on_gpu,
        engine=measured.engine,
        engine_note=measured.engine_note,
        pairs=len(pairs),
        seconds=last.taken_s - first.taken_s,
        answer_ms=float(np.median(totals)),
        overhead=overhead,
        overhead_half_width=overhead_half_width,
        residual_mean=float(left_over.mean()),
        residual_largest=float(left_over.max()),
        residual_excess=float((left_over > ERROR_LIMIT).mean()),
        noise=watched,
        first_ms=measured.first_calls_ms[0],
        settled_ms=settled_ms,
        settled_within=within,
        slow_calls=slow_calls,
        calls=len(measured.first_calls_ms),
        discarded_calls=measured.discarded_calls,
        group_medians_ms=tuple(medians),
        spread=line.spread,
        spread_by_noise=_MEDIAN_ERROR * watched[0].spread / math.sqrt(len(pairs) / len(groups)) if watched else 0.0,
        slope_per_hour=line.slope_per_hour,
        slope_half_width=line.half_width,
        clock_mhz=_clock(groups, measured.on_gpu),
        clock_events=_events(moments),
        temperature_c=_temperature(first, last),
        power_capped_s=rise(first.gpu.power_capped_s, last.gpu.power_capped_s),
        thermally_slowed_s=rise(first.gpu.thermally_slowed_s, last.gpu.thermally_slowed_s),
        throttlings=_whole(rise(first.cpu_throttlings, last.cpu_throttlings)),
        foreign_processes=_most([moment.foreign_processes for moment in moments]),
        other_memory_bytes=_most([moment.other_memory_bytes for moment in moments]),
        cores_others=cpu_load_others(first, last),
        cores=last.cores,
        threads_needed=last.threads_needed,
        answers=len(why_not),
        invalid=sum(bool(found) for found in why_not),
        reasons=dict(Counter(reason for found in why_not for reason in found)),
        snapshot_ms=measured.snapshot_ms,
        timers_differ=measured.timers_differ,
        niceness=measured.niceness,
    )


def settled(calls_ms: Sequence[float]) -> tuple[float, float, int]:
    """The level of the later half of the first calls, how near to it counts, and how many calls came before one did."""
    later = np.array(calls_ms[len(calls_ms) // 2 :])
    level = float(np.median(later))
    within = max(SETTLED_WITHIN, float(np.quantile(later, SETTLED_QUANTILE)) / level - 1)
    slow = (call for call, took in enumerate(calls_ms) if took <= (1 + within) * level)
    return level, within, next(slow, len(calls_ms))


def _noise(pairs: Sequence[PairTimes]) -> tuple[Noise, ...]:
    watched: dict[str, Callable[[PairTimes], float | None]] = {
        "total": lambda pair: pair.total_ms,
        "prefill": lambda pair: pair.prefill_ms,
        "TPOT": lambda pair: pair.tpot_ms,
    }
    found = []
    for name, time_of in watched.items():
        times = np.array([time for pair in pairs if (time := time_of(pair)) is not None])
        if len(times) < 2:
            continue
        low, median, high = (float(value) for value in np.quantile(times, [0.25, 0.5, 0.75]))
        # The interval narrows with the square root of the number of repeats.
        needed = len(times) * (relative_half_width(times[:, None]) / ERROR_LIMIT) ** 2
        found.append(Noise(name, median, (high - low) / median, max(FEWEST_ROUNDS, math.ceil(needed))))
    return tuple(found)


def _groups(pairs: Sequence[PairTimes]) -> list[Sequence[PairTimes]]:
    """Consecutive pairs, as evenly as possible; fewer than `GROUPS` groups rather than small ones."""
    count = max(1, min(GROUPS, len(pairs) // FEWEST_OF_A_GROUP))
    edges = [round(edge * len(pairs) / count) for edge in range(count + 1)]
    return [pairs[begin:end] for begin, end in itertools.pairwise(edges)]


def _hours(since: datetime, group: Sequence[PairTimes]) -> float:
    return float(np.mean([(pair.at - since).total_seconds() for pair in group])) / 3600


def _clock(groups: Sequence[Sequence[PairTimes]], on_gpu: bool) -> tuple[float, float] | None:
    """Over groups, because single readings wander; without those of an idle GPU unless there are no others."""
    busy = [_clocks(group, on_gpu, idle_too=False) for group in groups]
    told = busy if any(busy) else [_clocks(group, on_gpu, idle_too=True) for group in groups]
    medians = [float(np.median(clocks)) for clocks in told if clocks]
    return (min(medians), max(medians)) if medians else None


def _clocks(group: Sequence[PairTimes], on_gpu: bool, *, idle_too: bool) -> list[float]:
    moments = [moment for pair in group for moment in pair.around]
    clocks = [
        moment.gpu.sm_clock_mhz if on_gpu else moment.cpu_clock_mhz
        for moment in moments
        if idle_too or IDLE not in (moment.gpu.clock_events or ())
    ]
    return [clock for clock in clocks if clock is not None]


def _events(moments: Sequence[Conditions]) -> tuple[str, ...] | None:
    told = [moment.gpu.clock_events for moment in moments if moment.gpu.clock_events is not None]
    return tuple(sorted({event for events in told for event in events} - {IDLE})) if told else None


def _temperature(first: Conditions, last: Conditions) -> tuple[float, float] | None:
    begin, end = (
        moment.cpu_temperature_c if moment.gpu.temperature_c is None else moment.gpu.temperature_c
        for moment in (first, last)
    )
    return None if begin is None or end is None else (begin, end)


def _most(found: Sequence[int | None]) -> int | None:
    return max((number for number in found if number is not None), default=None)


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)

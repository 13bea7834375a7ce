"""When to stop repeating: precise enough, no better to be had within the limits, or the limits reached."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import numpy as np

# The times whose medians have to be known well enough before repeats end.
WATCHED = ("total_ms", "prefill_ms", "tpot_ms")
# Fewer rounds say too little of their own spread.
FEWEST_ROUNDS = 3
# Normal quantile of a 95 % interval.
Z95 = 1.959964
# The noise counts as steady when its last estimates differ by less than this share of their mean...
STEADY_WITHIN = 0.1
# ...over this many rounds.
STEADY_ROUNDS = 4


class StoppedBy(StrEnum):
    """Why the repeats of a combination ended.

    PRECISE: the 95 % interval of the median of every watched time is narrow enough.
    LEVELLED_OFF: it is not, and at a noise that no longer changes the most repeats would not make it so.
    REPEATS, SECONDS: the most repeats were made, or the time was up.
    """

    PRECISE = "precise"
    LEVELLED_OFF = "levelled_off"
    REPEATS = "repeats"
    SECONDS = "seconds"


def relative_half_width(times: np.ndarray) -> float:
    """Half-width of the 95 % interval of the median, relative to the median, of repeated times.

    Samples differ in length, and that is no noise: each time is divided by the median of its sample. What is left, in
    the order of measuring, is one series; its interval is that of order statistics (ranks n/2 -+ 1.96 sqrt(n)/2,
    Conover 1999, section 3.2), with the number of independent measurements in the place of n, because neighbours in
    time are alike (see `independent`). It is widened by sqrt(r / (r - 1)) for r rounds, because a median of few is
    close to them.

    Args:
        times: (rounds, samples), positive, each round after the other.

    Returns:
        A ratio; infinite for fewer than two rounds.
    """
    rounds = len(times)
    if rounds < 2:
        return float("inf")
    ratios = (times / np.median(times, axis=0)).ravel()
    reach = Z95 / 2 / np.sqrt(independent(ratios))
    low, high = np.quantile(ratios, [max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)])
    return float(high - low) / 2 * float(np.sqrt(rounds / (rounds - 1)))


def independent(series: np.ndarray) -> float:
    """How many independent values a series in time is worth: n / (1 + 2 sum of autocorrelations), at most n.

    The sum ends where a pair of neighbouring autocorrelations is no longer positive: Geyer 1992, initial positive
    sequence.
    """
    n = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred)
    if n < 4 or variance == 0:
        return float(n)
    correlations = np.array([float(centred[: n - k] @ centred[k:]) / variance for k in range(n // 2)])
    total = 0.0
    for k in range(1, len(correlations) - 1, 2):
        pair = float(correlations[k] + correlations[k + 1])
        if pair <= 0:
            break
        total += pair
    return float(n / max(1.0, 1 + 2 * total))


class Repeats:
    """Watches the times of a combination round by round and says when enough is enough."""

    def __init__(self, most: int, max_relative_error: float | None = None, max_seconds: float | None = None) -> None:
        """
        Args:
            most: rounds at the most.
            max_relative_error: stop when the relative half-width of every watched time is below; None: never early.
            max_seconds: start no further round when this much time has been spent; None: no limit.
        """
        self._most = most
        self._wanted = max_relative_error
        self._max_seconds = max_seconds
        self._rounds: list[Mapping[str, np.ndarray]] = []
        self._widths: list[float] = []
        self._spreads: list[float] = []

    def add(self, round_times: Mapping[str, np.ndarray]) -> None:
        """One more round: for each watched time, the milliseconds of every sample."""
        self._rounds.append(round_times)
        tables = [np.stack([made[name] for made in self._rounds]) for name in round_times]
        self._widths.append(max((relative_half_width(table) for table in tables), default=0.0))
        self._spreads.append(max((_spread(table) for table in tables), default=0.0))

    @property
    def relative_error(self) -> float | None:
        """The largest relative half-width over the watched times; None before the second round."""
        return self._widths[-1] if len(self._rounds) > 1 else None

    def stopped_by(self, seconds: float) -> StoppedBy | None:
        """Why no further round is needed after `seconds` of repeats, or None."""
        rounds = len(self._rounds)
        if self._wanted is not None and rounds >= FEWEST_ROUNDS:
            if self._widths[-1] < self._wanted:
                return StoppedBy.PRECISE
            if rounds < self._most and self._is_steady() and self._rounds_needed() > self._most:
                return StoppedBy.LEVELLED_OFF
        if rounds >= self._most:
            return StoppedBy.REPEATS
        if self._max_seconds is not None and seconds >= self._max_seconds:
            return StoppedBy.SECONDS
        return None

    def _is_steady(self) -> bool:
        recent = self._spreads[-STEADY_ROUNDS:]
        mean = sum(recent) / len(recent)
        return len(recent) == STEADY_ROUNDS and max(recent) - min(recent) < STEADY_WITHIN * mean

    def _rounds_needed(self) -> float:
        """Rounds at which the interval would be narrow enough, for it narrows with the square root of their number."""
        assert self._wanted is not None
        return len(self._rounds) * (self._widths[-1] / self._wanted) ** 2


def _spread(times: np.ndarray) -> float:
    """Distance between the quartiles of the ratios to each sample's median."""
    low, high = np.quantile(times / np.median(times, axis=0), [0.25, 0.75])
    return float(high - low)

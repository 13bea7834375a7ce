"""Do times stay what they are? A line through repeated times, and what the same answer costs more with marks than bare.

Small, pure and without units: the callers know what was measured, and what is too much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workers.stopping import Z95, independent

# Order statistics of fewer values than these enclose the median in less than 95 of 100 cases: 1 - 2 / 2^5 = 0.94.
FEWEST_FOR_A_MEDIAN = 6


@dataclass(frozen=True)
class Trend:
    """The line log(value) = a + b hours, by least squares.

    Attributes:
        level: geometric mean of the values, which the line has at the mean of the hours.
        slope_per_hour: b: 0.02 is two per cent more per hour.
        half_width: of the 95 % interval of the slope, by Student's t; infinite for fewer than three values, or if all
            were taken at once. The values have to be independent, such as medians of groups well apart.
        spread: standard deviation of the log values about their mean, so relative to the level; the slope is in it.
    """

    level: float
    slope_per_hour: float
    half_width: float
    spread: float


def trend(hours: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Trend:
    """The line through positive values that were taken at some hours.

    Raises:
        ValueError: no values, another number of hours, or a value that has no logarithm.
    """
    x, y = np.asarray(hours, dtype=float), np.asarray(values, dtype=float)
    if len(y) == 0 or x.shape != y.shape or not (y > 0).all():
        raise ValueError("a trend needs positive values, each with its hour")
    n, logs = len(y), np.log(y)
    level, spread = float(np.exp(logs.mean())), float(logs.std(ddof=1)) if n > 1 else 0.0
    from_mean = x - x.mean()
    square = float(from_mean @ from_mean)
    if square == 0:
        return Trend(level, 0.0, math.inf, spread)
    slope = float(from_mean @ logs) / square
    if n < 3:
        return Trend(level, slope, math.inf, spread)
    left = logs - logs.mean() - slope * from_mean
    error = math.sqrt(float(left @ left) / (n - 2) / square)
    return Trend(level, slope, student_t95(n - 2) * error, spread)


def paired_overhead(
    marked: Sequence[float] | np.ndarray,
    bare: Sequence[float] | np.ndarray,
    marked_first: Sequence[bool] | np.ndarray | None = None,
) -> tuple[float, float]:
    """What marking adds: the median ratio of marked to bare less one, and the half-width of its 95 % interval.

    Being first in a pair has an effect of its own, on caches and on heat. With `marked_first` the medians of the two
    orders are taken apart and their mean is returned, in which that effect cancels whatever its size.

    Args:
        marked, bare: totals of the pairs, in the order of measuring.
        marked_first: of each pair, which came first; None: one median over all.

    Returns:
        Both relative: 0.005 is half a per cent. The half-width is infinite below `FEWEST_FOR_A_MEDIAN` pairs of an
        order.

    Raises:
        ValueError: no pairs, or lists of different length.
    """
    over, under = np.asarray(marked, dtype=float), np.asarray(bare, dtype=float)
    if len(over) == 0 or over.shape != under.shape:
        raise ValueError("an overhead needs pairs, each with a marked and a bare total")
    logs = np.log(over / under)
    orders = [logs]
    if marked_first is not None:
        first = np.asarray(marked_first, dtype=bool)
        if first.shape != logs.shape:
            raise ValueError("an overhead needs to know the order of every pair or of none")
        orders = [order for order in (logs[first], logs[~first]) if len(order)]
    middle = sum(float(np.median(order)) for order in orders) / len(orders)
    half_width = math.hypot(*(median_half_width(order) for order in orders)) / len(orders)
    return math.expm1(middle), math.exp(middle) * half_width


def median_half_width(values: np.ndarray) -> float:
    """Half-width of the 95 % interval of the median of a series in time, by order statistics.

    Ranks n/2 -+ 1.96 sqrt(n)/2 (Conover 1999, section 3.2), with the number of independent values in the place of n,
    see `workers.stopping.independent`.
    """
    if len(values) < FEWEST_FOR_A_MEDIAN:
        return math.inf
    reach = Z95 / 2 / math.sqrt(independent(values))
    low, high = np.quantile(values, [max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)])
    return float(high - low) / 2


def student_t95(freedom: int) -> float:
    """97.5 % quantile of Student's t: half-width of a 95 % interval in standard errors.

    Closed forms for 1 and 2 degrees of freedom, beyond that the expansion of Abramowitz and Stegun 26.7.5, which is
    within 0.2 % of the table from 3 on.

    Raises:
        ValueError: without a degree of freedom there is no interval.
    """
    if freedom < 1:
        raise ValueError("an interval needs at least one degree of freedom")
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 2 * 0.475 * math.sqrt(2 / (1 - 4 * 0.475**2))
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    widened: float = z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
    return widened

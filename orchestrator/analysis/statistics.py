"""The few statistics that combinations are made of, each with its formula's source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
import pandas as pd

from workers.trends import student_t95


@cache
def half_width_95(clusters: int) -> float:
    """Half-width of a 95 % interval in standard errors, from the number of independent clusters behind the mean.

    Raises:
        ValueError: fewer than two clusters have no interval.
    """
    if clusters < 2:
        raise ValueError("an interval needs at least two clusters")
    return student_t95(clusters - 1)


@cache
def sample_floor(quantile: float, confidence: float = 0.99) -> int:
    """Fewest rows for which a percentile says something: with `confidence`, at least two of them lie beyond it.

    The number of rows beyond the quantile q is binomial, so the floor is the smallest n with
    1 - q^n - n q^(n-1) (1-q) >= confidence: 64 for the 90th percentile, 130 for the 95th, 662 for the 99th.
    """
    n = 2
    while 1 - quantile**n - n * quantile ** (n - 1) * (1 - quantile) < confidence:
        n += 1
    return n


def percentile(values: pd.Series, quantile: float) -> float | None:
    """The percentile by linear interpolation, or None below the sample floor; the median needs no floor."""
    present = values.dropna()
    if len(present) < (1 if quantile == 0.5 else sample_floor(quantile)):
        return None
    return float(np.quantile(present.to_numpy(dtype=float), quantile))


def clustered_standard_error(values: pd.Series, clusters: pd.Series) -> float | None:
    """Standard error of the mean when rows of one cluster (an image, a sample) are not independent.

    SE_c = sqrt(SE^2 + (1/n^2) * sum_c[(sum_{i in c} d_i)^2 - sum_{i in c} d_i^2]) with d_i the deviations from the
    mean: Miller 2024, arXiv 2411.00640, eq. 4. It is the plain standard error when every cluster has one row. None for
    fewer than two clusters, which say nothing of how clusters differ.
    """
    n = len(values)
    if clusters.nunique(dropna=False) < 2:
        return None
    deviations = values.to_numpy(dtype=float) - float(values.mean())
    plain = float((deviations**2).sum()) / (n - 1) / n
    sums = pd.Series(deviations).groupby(clusters.to_numpy(), dropna=False).sum().to_numpy()
    cross = float((sums**2).sum() - (deviations**2).sum()) / n**2
    # Rounding may leave a value just below zero where all deviations cancel.
    return math.sqrt(max(plain + cross, 0.0))


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion, which stays within 0 and 1 and has a width where all or none succeed.

    Wilson 1927, Journal of the American Statistical Association 22, 209-212: the proportions that a score test does
    not reject. `n` need not be whole, so that it can be an effective sample size.

    Raises:
        ValueError: there is no trial, more successes than trials or fewer than none, or no such confidence.

    >>> [round(bound, 4) for bound in wilson_interval(81, 100)]
    [0.7222, 0.8749]
    """
    if not 0 <= successes <= n or n <= 0:
        raise ValueError(f"{successes:g} of {n:g} is no proportion")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence lies between 0 and 1, not at {confidence:g}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Exactly 0 and 1 where rounding would miss them.
    low, high = 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half
    return max(0.0, low), min(1.0, high)


def accuracy_interval(scores: pd.Series, images: pd.Series) -> tuple[float, float] | None:
    """95 % interval of the mean of scores from 0 to 1, questions about one image not being independent.

    Scores that are all 0 or 1: Wilson's interval with the effective sample size of Korn and Graubard 1998 (Survey
    Methodology 24, 193-201): n over the design effect (SE_c / SE)^2, which is p (1 - p) / SE_c^2 but for n / (n - 1),
    times (t_{n-1} / t_{c-1})^2 for c images, and never more than n. With a question per image it is n.

    Other scores: mean +- t_{c-1} SE_c, cut off at 0 and 1.

    Where all scores are alike (all right, all wrong) they tell nothing of how images differ. The interval is then
    Wilson's with as many trials as images, the widest that scores of that mean can call for.

    Returns:
        Both ends, or None for fewer than two images, like `clustered_standard_error`.
    """
    values = scores.to_numpy(dtype=float)
    error = clustered_standard_error(scores, images)
    if error is None:
        return None
    n, groups, mean = len(values), images.nunique(dropna=False), min(max(float(values.mean()), 0.0), 1.0)
    if np.ptp(values) == 0:
        return wilson_interval(mean * groups, groups)
    if not np.isin(values, (0.0, 1.0)).all():
        reach = half_width_95(groups) * error
        return max(0.0, mean - reach), min(1.0, mean + reach)
    plain = mean * (1 - mean) / (n - 1)
    # An error below the plain one may well be luck, and is not believed.
    effective = n / max(1.0, error**2 / plain) * (half_width_95(n) / half_width_95(groups)) ** 2
    return wilson_interval(mean * effective, effective)


def student_t_chance(t: float, freedom: int) -> float:
    """Probability that Student's t is at least this far from zero, either way.

    The regularised incomplete beta function I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2), by its continued
    fraction: Abramowitz and Stegun 26.7.1 and 26.5.8.

    Raises:
        ValueError: without a degree of freedom there is no such distribution.
    """
    if freedom < 1:
        raise ValueError("Student's t needs at least one degree of freedom")
    square = t * t
    if square == 0 or math.isinf(square):
        return 1.0 if square == 0 else 0.0
    x, y = freedom / (freedom + square), square / (freedom + square)
    a, b = freedom / 2, 0.5
    # The fraction converges fast on one side of the mean of the beta distribution only.
    if x <= (a + 1) / (a + b + 2):
        return _beta_tail(a, b, x, y)
    return 1.0 - _beta_tail(b, a, y, x)


def _beta_tail(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b) with y = 1 - x, by the modified method of Lentz."""
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y) - math.log(a)
    )
    value, c, d = 1.0, 1.0, 0.0
    for step in range(10_000):
        m = step // 2
        if step == 0:
            numerator = 1.0
        elif step % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + numerator * d)
        c = 1 + numerator / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return min(1.0, front * (value - 1))


def mcnemar_chance(better: int, worse: int) -> float:
    """Exact test of McNemar: how likely so uneven a split of the changed samples is if either way is as likely.

    Twice the smaller tail of the binomial distribution with one half, at most 1. Samples have to be independent.

    >>> round(mcnemar_chance(10, 2), 6)
    0.038574
    """
    changed = better + worse
    term = tail = 1
    for k in range(min(better, worse)):
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << changed))


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of several tests, each adjusted for there being several: Holm 1979, Scandinavian J. of Statistics 6.

    Whoever believes those at or below 0.05 believes a wrong one in at most 5 of 100 such tables, however the tests
    depend on each other.

    >>> [round(chance, 3) for chance in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(chances)), key=lambda test: chances[test])
    adjusted, least = [1.0] * len(chances), 0.0
    for rank, test in enumerate(order):
        least = max(least, min(1.0, (len(chances) - rank) * chances[test]))
        adjusted[test] = least
    return adjusted

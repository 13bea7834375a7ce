"""The few statistics that combinations are made of, each with its formula's source."""

from __future__ import annotations

import math
from functools import cache

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

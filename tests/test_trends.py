"""A line through repeated times and the cost of marks, on series whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workers.trends import median_half_width, paired_overhead, student_t95, trend


def test_a_line_that_is_one() -> None:
    hours = np.linspace(0, 2, 9)
    found = trend(hours, 100 * np.exp(0.03 * hours))
    assert found.slope_per_hour == pytest.approx(0.03)
    assert found.half_width == pytest.approx(0, abs=1e-9)
    assert found.level == pytest.approx(100 * math.exp(0.03))


def test_the_spread_is_relative_to_the_level() -> None:
    values = np.array([99.0, 101.0, 99.0, 101.0])
    found, larger = (trend([0, 1, 2, 3], scale * values) for scale in (1, 7))
    assert found.spread == pytest.approx(0.01 * math.sqrt(4 / 3), rel=1e-3)
    assert larger.spread == pytest.approx(found.spread)


def test_the_slope_is_independent_of_where_the_hours_begin() -> None:
    values = [100, 103, 101, 104]
    early, late = trend([0, 1, 2, 3], values), trend([500_000, 500_001, 500_002, 500_003], values)
    assert late.slope_per_hour == pytest.approx(early.slope_per_hour)
    assert late.half_width == pytest.approx(early.half_width)


def test_the_interval_of_the_slope_holds_the_truth_in_95_of_100_cases() -> None:
    random, hours, held = np.random.default_rng(1), np.arange(6) / 60, 0
    for _ in range(2000):
        found = trend(hours, 50 * np.exp(0.4 * hours + 0.01 * random.standard_normal(6)))
        held += abs(found.slope_per_hour - 0.4) < found.half_width
    assert 0.935 < held / 2000 < 0.965


def test_too_few_values_have_a_level_and_no_interval() -> None:
    assert trend([0], [7.0]).level == pytest.approx(7)
    assert trend([0], [7.0]).half_width == math.inf
    assert trend([0, 1], [7.0, 8.0]).half_width == math.inf
    assert trend([1, 1, 1], [7.0, 8.0, 9.0]).half_width == math.inf, "all at once"


@pytest.mark.parametrize(("hours", "values"), [([], []), ([0], [1, 2]), ([0, 1], [1, 0]), ([0, 1], [1, -1])])
def test_what_has_no_trend(hours: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="positive values"):
        trend(hours, values)


def test_an_overhead_is_the_median_ratio() -> None:
    bare = np.linspace(90, 110, 40)
    overhead, half_width = paired_overhead(1.02 * bare, bare)
    assert overhead == pytest.approx(0.02)
    assert half_width == pytest.approx(0, abs=1e-12)


def test_an_outlier_moves_no_median() -> None:
    bare = np.full(41, 100.0)
    marked = bare * 1.01
    marked[7] = 900
    assert paired_overhead(marked, bare)[0] == pytest.approx(0.01)


def test_being_first_cancels() -> None:
    """Whoever is first pays 5 %: far more than what is looked for, and more of the pairs begin marked."""
    first = np.array([True, False] * 20 + [True] * 10)
    random = np.random.default_rng(2)
    marked = 100 * 1.004 * np.where(first, 1.05, 1) * np.exp(0.001 * random.standard_normal(50))
    bare = 100 * np.where(first, 1, 1.05)
    overhead, half_width = paired_overhead(marked, bare, first)
    assert overhead == pytest.approx(0.004, abs=1e-3)
    assert half_width < 1e-3


def test_the_interval_of_the_overhead_holds_the_truth_in_95_of_100_cases() -> None:
    random, held = np.random.default_rng(3), 0
    first = np.arange(60) % 2 == 0
    for _ in range(500):
        marked, bare = 100 * np.exp(0.02 * random.standard_normal((2, 60)))
        overhead, half_width = paired_overhead(1.005 * marked, bare, first)
        held += abs(overhead - 0.005) < half_width
    assert 0.92 < held / 500 < 0.99


def test_few_pairs_have_no_interval() -> None:
    overhead, half_width = paired_overhead([101.0] * 5, [100.0] * 5)
    assert overhead == pytest.approx(0.01)
    assert half_width == math.inf
    assert median_half_width(np.ones(5)) == math.inf
    assert median_half_width(np.ones(6)) == 0


@pytest.mark.parametrize(
    ("marked", "bare", "first"), [([], [], None), ([1.0], [1.0, 2.0], None), ([1.0], [1.0], [True, False])]
)
def test_what_has_no_overhead(marked: list[float], bare: list[float], first: list[bool] | None) -> None:
    with pytest.raises(ValueError, match="an overhead needs"):
        paired_overhead(marked, bare, first)


def test_student_t_against_the_table() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 6: 2.447, 10: 2.228, 30: 2.042, 1000: 1.962}
    for freedom, quantile in table.items():
        assert student_t95(freedom) == pytest.approx(quantile, rel=2e-3)
    with pytest.raises(ValueError, match="degree of freedom"):
        student_t95(0)

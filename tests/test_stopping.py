"""When repeats end: intervals that hold what they say, noise that neighbours share, and each reason to stop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workers.stopping import FEWEST_ROUNDS, Repeats, StoppedBy, independent, relative_half_width

LENGTHS = np.array([10.0, 40.0, 100.0, 300.0])  # milliseconds that samples take


def rounds(count: int, noise: float, seed: int, correlation: float = 0.0) -> np.ndarray:
    """Times (rounds, samples) with relative Gaussian noise that follows an autoregression in the order of measuring."""
    generator = np.random.default_rng(seed)
    series = np.empty(count * len(LENGTHS))
    level = generator.normal()
    for i in range(len(series)):
        level = correlation * level + math.sqrt(1 - correlation**2) * generator.normal()
        series[i] = level
    return LENGTHS * (1 + noise * series.reshape(count, -1))


@pytest.mark.parametrize(("count", "correlation"), [(8, 0.0), (30, 0.0), (30, 0.6), (100, 0.8)])
def test_the_interval_holds_the_true_median_as_often_as_it_says(count: int, correlation: float) -> None:
    """Of 400 repetitions, about 95 % lie inside; short series and correlated ones somewhat fewer, and not far."""
    inside = 0
    for seed in range(400):
        times = rounds(count, 0.05, seed, correlation)
        estimate = float(np.median(times / LENGTHS))
        inside += abs(estimate - 1) <= relative_half_width(times)
    assert 0.86 <= inside / 400 <= 0.995


def test_without_counting_correlation_the_interval_would_be_much_too_narrow() -> None:
    widths = [relative_half_width(rounds(60, 0.05, seed, 0.8)) for seed in range(50)]
    free = [relative_half_width(rounds(60, 0.05, seed)) for seed in range(50)]
    assert np.median(widths) > 1.8 * np.median(free)


def test_the_number_of_independent_values() -> None:
    generator = np.random.default_rng(0)
    free = generator.normal(size=2000)
    assert independent(free) > 1500
    series = np.empty(20000)
    level = 0.0
    for i in range(len(series)):
        level = 0.8 * level + generator.normal()
        series[i] = level
    # (1 + 0.8) / (1 - 0.8) = 9 values are worth one.
    assert independent(series) == pytest.approx(20000 / 9, rel=0.2)
    assert independent(np.ones(7)) == 7
    assert independent(np.array([1.0, 2.0])) == 2


def test_samples_of_different_length_are_no_noise() -> None:
    assert relative_half_width(np.tile(LENGTHS, (5, 1))) == 0
    assert relative_half_width(LENGTHS[None]) == math.inf


def fed(repeats: Repeats, times: np.ndarray, seconds: float = 0.0) -> tuple[StoppedBy | None, int]:
    """Rounds until it says stop, and how many those were."""
    for count, row in enumerate(times, start=1):
        repeats.add({"total_ms": row})
        if reason := repeats.stopped_by(seconds * count):
            return reason, count
    return None, len(times)


def test_precise_times_end_early_but_not_before_three_rounds() -> None:
    assert fed(Repeats(50, 0.02), rounds(50, 1e-4, 1)) == (StoppedBy.PRECISE, FEWEST_ROUNDS)
    reason, count = fed(Repeats(500, 0.02), rounds(500, 0.05, 1))
    assert reason is StoppedBy.PRECISE
    assert 3 <= count < 60
    reason, more = fed(Repeats(500, 0.005), rounds(500, 0.05, 1))
    assert (reason, more > 2 * count) == (StoppedBy.PRECISE, True)


def test_every_watched_time_has_to_be_precise() -> None:
    repeats = Repeats(6, 0.02)
    exact, noisy = rounds(6, 1e-4, 1), rounds(6, 0.5, 2)
    for i in range(6):
        repeats.add({"total_ms": exact[i], "tpot_ms": noisy[i]})
        assert (repeats.stopped_by(0.0) is None) == (i < 5)
    assert repeats.stopped_by(0.0) is StoppedBy.REPEATS
    assert repeats.relative_error is not None
    assert repeats.relative_error > 0.02


def test_without_a_wish_all_repeats_are_made() -> None:
    assert fed(Repeats(7), rounds(9, 1e-4, 1)) == (StoppedBy.REPEATS, 7)
    assert fed(Repeats(1, 0.02), rounds(3, 1e-4, 1)) == (StoppedBy.REPEATS, 1)
    once = Repeats(1)
    once.add({"total_ms": LENGTHS})
    assert once.relative_error is None


def test_steady_noise_that_the_most_repeats_cannot_beat_is_not_waited_for() -> None:
    """0.1 % wanted of 20 % noise: hundreds of thousands of repeats; 40 are allowed, and fewer are made."""
    reason, count = fed(Repeats(40, 0.001), rounds(40, 0.2, 3))
    assert reason is StoppedBy.LEVELLED_OFF
    assert FEWEST_ROUNDS < count < 40
    # Noise that grows is not steady.
    growing = LENGTHS * (1 + 0.02 * np.arange(1, 13)[:, None] * np.random.default_rng(0).choice([-1, 1], (12, 4)))
    assert fed(Repeats(12, 0.001), growing)[0] is StoppedBy.REPEATS


def test_the_time_is_up() -> None:
    assert fed(Repeats(50, max_seconds=10), rounds(50, 0.1, 1), seconds=2.5) == (StoppedBy.SECONDS, 4)

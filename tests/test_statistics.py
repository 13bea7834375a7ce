"""Standard errors against published vectors, and percentiles that are only given where the rows can carry them."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analysis import (
    accuracy_interval,
    clustered_standard_error,
    half_width_95,
    holm,
    percentile,
    sample_floor,
    statistics,
    wilson_interval,
)
from orchestrator.analysis.statistics import mcnemar_chance, student_t_chance

SCORES = st.lists(st.floats(0, 1), min_size=2, max_size=40)


def clustered(values: list[float], clusters: str) -> float | None:
    return clustered_standard_error(pd.Series(values), pd.Series(list(clusters)))


@pytest.mark.parametrize(
    ("values", "clusters", "alone", "together"),
    [
        ([1, 1, 0, 0, 1, 1], "aabbcc", 0.210819, 0.285450),
        ([1, 0, 1, 0, 1, 0], "aabbcc", 0.223607, 0.091287),
        ([0.3, 1, 0.9, 0.6, 0, 1, 1, 0.3], "11122344", 0.140073, 0.113693),
    ],
)
def test_published_vectors(values: list[float], clusters: str, alone: float, together: float) -> None:
    assert clustered(values, "abcdefgh"[: len(values)]) == pytest.approx(alone, abs=1e-6)
    assert clustered(values, clusters) == pytest.approx(together, abs=1e-6)


def test_three_right_of_four() -> None:
    assert clustered([1, 0, 1, 1], "abcd") == pytest.approx(0.25)


@given(SCORES)
def test_rows_on_their_own_have_the_plain_standard_error(values: list[float]) -> None:
    alone = clustered_standard_error(pd.Series(values), pd.Series(range(len(values))))
    assert alone == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-12)


@given(SCORES)
def test_order_names_of_clusters_and_labels_of_rows_do_not_matter(values: list[float]) -> None:
    clusters = [i // 3 for i in range(len(values))]
    if len(set(clusters)) < 2:
        return
    expected = clustered_standard_error(pd.Series(values), pd.Series(clusters))
    order = np.random.default_rng(len(values)).permutation(len(values))
    # Rows of several workers put together repeat their labels.
    shuffled = pd.Series([values[i] for i in order], index=[0] * len(values))
    names = pd.Series([f"image {clusters[i]}" for i in order], index=[0] * len(values))
    assert clustered_standard_error(shuffled, names) == pytest.approx(expected, abs=1e-12)


@given(SCORES, st.floats(-5, 5), st.floats(0.1, 10))
def test_it_ignores_a_shift_and_follows_a_scale(values: list[float], shift: float, scale: float) -> None:
    clusters = pd.Series([i // 2 for i in range(len(values))])
    if clusters.nunique() < 2:
        return
    expected = clustered_standard_error(pd.Series(values), clusters)
    moved = clustered_standard_error(pd.Series(values) * scale + shift, clusters)
    assert expected is not None
    assert moved == pytest.approx(expected * scale, rel=1e-6, abs=1e-7)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(2, 5))
def test_asking_the_same_again_about_an_image_makes_nothing_more_certain(values: list[float], times: int) -> None:
    copies = pd.Series(np.repeat(values, times))
    images = pd.Series(np.repeat(range(len(values)), times))
    repeated, once = (
        clustered_standard_error(copies, images),
        clustered_standard_error(pd.Series(values), images[::times]),
    )
    assert repeated is not None
    assert once is not None
    # The two differ by the usual n - 1 only: as images, not as rows, they are counted.
    assert once * math.sqrt((len(values) - 1) / len(values)) <= repeated + 1e-9
    assert repeated <= once + 1e-9


@pytest.mark.parametrize(("values", "clusters"), [([], ""), ([0.5], "a"), ([1, 0, 1], "aaa")])
def test_one_cluster_says_nothing_of_how_clusters_differ(values: list[float], clusters: str) -> None:
    assert clustered_standard_error(pd.Series(values, dtype=float), pd.Series(list(clusters), dtype=object)) is None


def test_rows_that_all_agree_have_no_error() -> None:
    assert clustered([1, 1, 1, 1], "aabb") == 0


def test_deviations_that_cancel_within_an_image_make_the_mean_more_certain() -> None:
    assert clustered([0.1, 0.7, 0.7, 0.1], "abcd") == pytest.approx(math.sqrt(0.36 / 12))
    assert clustered([0.1, 0.7, 0.7, 0.1], "aabb") == pytest.approx(math.sqrt(0.36 / 12 - 0.36 / 16))


@pytest.mark.parametrize(("quantile", "floor"), [(0.9, 64), (0.95, 130), (0.99, 662)])
def test_sample_floors(quantile: float, floor: int) -> None:
    assert sample_floor(quantile) == floor
    assert percentile(pd.Series(np.arange(floor - 1)), quantile) is None
    assert percentile(pd.Series(np.arange(floor)), quantile) == pytest.approx(quantile * (floor - 1))


@pytest.mark.parametrize("quantile", [0.9, 0.95])
def test_at_the_floor_two_rows_lie_beyond_the_percentile_as_often_as_promised(quantile: float) -> None:
    generator = np.random.default_rng(0)
    beyond = (generator.random((20_000, sample_floor(quantile))) > quantile).sum(axis=1)
    one_fewer = (generator.random((20_000, sample_floor(quantile) - 20)) > quantile).sum(axis=1)
    assert np.mean(beyond >= 2) == pytest.approx(0.99, abs=0.003)
    assert np.mean(one_fewer >= 2) < 0.985


def test_missing_values_do_not_count_towards_the_floor() -> None:
    values = pd.Series([float(i) for i in range(64)])
    assert percentile(values, 0.9) is not None
    assert percentile(values.where(values != 5), 0.9) is None


def test_the_median_needs_one_row() -> None:
    assert percentile(pd.Series([], dtype=float), 0.5) is None
    assert percentile(pd.Series([3.0]), 0.5) == 3
    assert percentile(pd.Series([3.0, 4.0, None]), 0.5) == 3.5


@pytest.mark.parametrize(
    ("clusters", "table"),
    [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (8, 2.3646), (24, 2.0687), (64, 1.9983), (10_000, 1.9602)],
)
def test_few_clusters_widen_the_interval_as_in_the_tables_of_students_t(clusters: int, table: float) -> None:
    assert half_width_95(clusters) == pytest.approx(table, rel=2e-3)


def test_one_cluster_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two clusters"):
        half_width_95(1)


# -- intervals of proportions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0, 0.277533),
        (10, 10, 0.722467, 1),
        (5, 10, 0.236593, 0.763407),
        (1, 3, 0.061492, 0.792340),
        (81, 100, 0.722212, 0.874852),
        (700, 1000, 0.670876, 0.727593),
    ],
)
def test_wilson_against_another_implementation(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.5, 0.999))
def test_wilson_ends_where_the_score_test_begins_to_reject(right: int, wrong: int, confidence: float) -> None:
    n = max(right + wrong, 1)
    low, high = wilson_interval(right, n, confidence)
    assert 0 <= low <= right / n <= high <= 1
    assert wilson_interval(n - right, n, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    assert wilson_interval(2 * right, 2 * n, confidence)[1] <= high
    for end in (low, high):
        if 0 < end < 1:
            z = abs(right / n - end) / math.sqrt(end * (1 - end) / n)
            assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-6)


def test_none_and_all_are_exact_ends() -> None:
    assert all(wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1 for n in range(1, 300))


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "0 of 0 is no proportion"),
        (3, 2, 0.95, "3 of 2 is no"),
        (-1, 2, 0.95, "-1 of 2"),
        (1, 2, 1.0, "confidence"),
    ],
)
def test_what_is_no_proportion(successes: float, n: float, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, n, confidence)


def interval(values: list[float], images: str) -> tuple[float, float] | None:
    return accuracy_interval(pd.Series(values), pd.Series(list(images), dtype=object))


def test_a_question_per_image_is_wilsons_interval() -> None:
    assert interval([1, 1, 0, 1], "abcd") == pytest.approx(wilson_interval(3, 4))
    assert interval([1.0] * 81 + [0.0] * 19, "".join(map(chr, range(100)))) == pytest.approx(
        (0.722212, 0.874852), abs=1e-6
    )


def test_images_whose_questions_agree_count_once() -> None:
    # Six answers about three images: design effect (0.285450 / 0.210819)^2, and two degrees of freedom instead of five.
    effective = 6 / (0.285450 / 0.210819) ** 2 * (half_width_95(6) / half_width_95(3)) ** 2
    assert interval([1, 1, 0, 0, 1, 1], "aabbcc") == pytest.approx(
        wilson_interval(4 / 6 * effective, effective), rel=1e-5
    )
    # Images whose questions disagree are not believed to say more than as many images would.
    effective = 6 * (half_width_95(6) / half_width_95(3)) ** 2
    assert interval([1, 0, 1, 0, 1, 0], "aabbcc") == pytest.approx(wilson_interval(effective / 2, effective))


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_where_all_scores_are_alike_there_are_as_many_trials_as_images(score: float) -> None:
    assert interval([score] * 12, "aaabbbcccddd") == pytest.approx(wilson_interval(4 * score, 4))


def test_scores_between_0_and_1_have_an_interval_by_their_error() -> None:
    scores = [0.3, 1, 0.9, 0.6, 0, 1, 1, 0.3]
    low, high = interval(scores, "11122344") or (math.nan, math.nan)
    assert (low + high) / 2 == pytest.approx(np.mean(scores))
    assert (high - low) / 2 == pytest.approx(half_width_95(4) * 0.113693, rel=1e-5)
    assert interval([0.9, 1, 0.3], "abc") == (pytest.approx(0, abs=0.1), 1.0)


@pytest.mark.parametrize(("values", "images"), [([], ""), ([1.0], "a"), ([1.0, 0.0], "aa")])
def test_one_image_has_no_interval(values: list[float], images: str) -> None:
    assert accuracy_interval(pd.Series(values, dtype=float), pd.Series(list(images), dtype=object)) is None


@pytest.mark.parametrize(
    ("right", "alike", "images", "questions"),
    [(0.8, 0.0, 100, 1), (0.9, 0.3, 60, 5), (0.5, 0.5, 25, 6), (0.95, 0.2, 150, 3)],
)
def test_95_of_100_intervals_hold_the_accuracy(right: float, alike: float, images: int, questions: int) -> None:
    draw = np.random.default_rng(images)
    names = pd.Series(np.repeat(range(images), questions))
    size = 1 / alike - 1 if alike else None
    held = 0
    for _ in range(1500):
        easy = np.full(images, right) if size is None else draw.beta(right * size, (1 - right) * size, images)
        answers = draw.random((images, questions)) < easy[:, None]
        low, high = accuracy_interval(pd.Series(answers.ravel().astype(float)), names) or (2, -1)
        held += low <= right <= high
    assert 0.93 <= held / 1500 <= 0.975


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "freedom", "chance"),
    [
        (12.706205, 1, 0.05),
        (2.228139, 10, 0.05),
        (-2.228139, 10, 0.05),
        (3.169273, 10, 0.01),
        (1.5, 9, 0.167851),
        (1.959964, 10**9, 0.05),
        (0, 3, 1),
        (math.inf, 3, 0),
        (1e-200, 3, 1),
        (1e200, 3, 0),
    ],
)
def test_students_t_against_its_tables(t: float, freedom: int, chance: float) -> None:
    assert student_t_chance(t, freedom) == pytest.approx(chance, abs=1e-6)


@given(st.floats(-50, 50), st.sampled_from([1, 2]))
def test_students_t_in_closed_form(t: float, freedom: int) -> None:
    exact = 1 - 2 / math.pi * math.atan(abs(t)) if freedom == 1 else 1 - abs(t) / math.sqrt(2 + t * t)
    assert student_t_chance(t, freedom) == pytest.approx(exact, abs=1e-12)


@given(st.floats(0, 30), st.floats(0.01, 5), st.integers(1, 2000))
def test_further_away_is_less_likely(t: float, further: float, freedom: int) -> None:
    near, far = student_t_chance(t, freedom), student_t_chance(t + further, freedom)
    assert 0 <= far < near <= 1


def test_chances_too_small_for_a_difference_of_one_are_still_told_apart() -> None:
    assert 0 < student_t_chance(40, 200) < student_t_chance(30, 200) < 1e-70


def test_students_t_needs_freedom() -> None:
    with pytest.raises(ValueError, match="degree of freedom"):
        student_t_chance(1, 0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(better: int, worse: int) -> None:
    n = better + worse
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(better, worse) + 1))
    assert mcnemar_chance(better, worse) == mcnemar_chance(worse, better) == float(min(Fraction(1), 2 * tail))


def test_mcnemar_of_many_samples() -> None:
    assert mcnemar_chance(2, 0) == 0.5
    # The normal approximation with continuity correction.
    z = (30_000 - 29_500 - 1) / math.sqrt(59_500)
    assert mcnemar_chance(30_000, 29_500) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_holm_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_a_chance_nor_exceeds_bonferroni_nor_changes_the_order(chances: list[float]) -> None:
    adjusted = holm(chances)
    assert all(p <= q <= min(1.0, len(chances) * p) for p, q in zip(chances, adjusted, strict=True))
    assert [adjusted[i] for i in np.argsort(chances, kind="stable")] == sorted(adjusted)


def test_the_examples_in_the_documentation() -> None:
    assert doctest.testmod(statistics).failed == 0
    assert doctest.testmod(statistics).attempted > 0

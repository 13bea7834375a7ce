"""Standard errors against published vectors, and percentiles that are only given where the rows can carry them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analysis import clustered_standard_error, half_width_95, percentile, sample_floor

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

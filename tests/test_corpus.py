"""Metrics of a whole corpus have their published values and an honest error, and stand in the combination's row."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from handmade import failed_row, frame, samples, scored_row, task

from orchestrator.analysis import aggregate
from orchestrator.analysis.corpus import (
    cider_score,
    cluster_bootstrap,
    corpus_score,
    f1_score,
    is_of_corpus,
    yes_no_statistics,
)
from orchestrator.analysis.statistics import clustered_standard_error
from workers.scorers import SCORERS
from workers.scoring.captions import cider
from workers.tasks import Kind

SCORED = task(Kind.ACCURACY)
CAPTIONS = ["a man riding a horse", "a plate of food", "a bus"]
REFERENCES = [
    ["a man rides a horse", "a man riding a brown horse"],
    ["a plate with food on it", "food on a plate"],
    ["a red bus on the street", "a bus parked on a street"],
]


def rows(metric: str, predictions: list[str], answers: list[list[str]], **columns: list[Any]) -> pd.DataFrame:
    """Rows of the accuracy table, as they come out of a result folder."""
    scorer = SCORERS[metric]
    made = []
    for index, ref in enumerate(samples(len(predictions))):
        given = {name: values[index] for name, values in columns.items()}
        score = scorer.row_score(predictions[index], answers[index])
        scored = {"prediction": predictions[index], "answers": answers[index], "metric": scorer.name, "score": score}
        made.append(scored_row(SCORED, ref) | scored | given)
    return frame("accuracy", made)


def yes_no_rows(predictions: list[str], gold: list[str], **columns: list[Any]) -> pd.DataFrame:
    return rows("yes_no/f1", predictions, [[answer] for answer in gold], **columns)


# --- F1 ---

SAID, MEANT = ["yes", "yes", "no", "no", "maybe", "yes"], ["yes", "no", "yes", "no", "yes", "yes"]


def test_statistics_of_yes_and_no() -> None:
    found = yes_no_statistics(yes_no_rows(SAID, MEANT))
    assert found.accuracy == 0.5
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 0.5  # the unclear answer to a yes is a miss
    assert found.f1 == pytest.approx(0.5714, abs=5e-5)
    assert found.yes_ratio == 0.5
    assert found.unparsable == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("said", "meant", "precision", "recall"),
    [(["no"], ["no"], 0, 0), (["no"], ["yes"], 0, 0), (["yes"], ["no"], 0, 0), (["yes"], ["yes"], 1, 1)],
)
def test_statistics_that_are_undefined_are_zero(
    said: list[str], meant: list[str], precision: float, recall: float
) -> None:
    found = yes_no_statistics(yes_no_rows(said, meant))
    assert (found.precision, found.recall, found.f1) == (precision, recall, recall)


def test_f1_is_the_mean_over_kinds_of_question_where_all_have_one() -> None:
    together = yes_no_rows(SAID, MEANT)
    assert f1_score(together).value == pytest.approx(4 / 7)
    by_kind = yes_no_rows(SAID, MEANT, question_type=["popular"] * 3 + ["random"] * 3)
    # 1, 1 and 1 of true and false positives and false negatives; then 1, 0 and 1.
    assert f1_score(by_kind).value == pytest.approx((0.5 + 2 / 3) / 2)
    some = yes_no_rows(SAID, MEANT, question_type=["popular"] * 3 + [None] * 3)
    assert f1_score(some).value == pytest.approx(4 / 7)


def test_error_of_f1_is_clustered_by_image_and_the_same_every_time() -> None:
    generator = np.random.default_rng(1)
    meant = [["yes", "no"][value] for value in generator.integers(2, size=200)]
    said = [answer if right else "no" for answer, right in zip(meant, generator.random(200) < 0.7, strict=True)]
    alone = f1_score(yes_no_rows(said, meant)).standard_error
    # Every answer four times, once per image or four times about one image.
    four = (said * 4, meant * 4)
    apart = f1_score(yes_no_rows(*four, image_id=[f"{i}" for i in range(800)])).standard_error
    shared = f1_score(yes_no_rows(*four, image_id=[f"{i % 200}" for i in range(800)])).standard_error
    assert alone is not None
    assert apart == pytest.approx(alone / 2, rel=0.1)
    assert shared == pytest.approx(alone, rel=0.1)
    assert f1_score(yes_no_rows(said, meant)).standard_error == alone
    assert f1_score(yes_no_rows(["yes"] * 2, ["yes"] * 2, image_id=["a"] * 2)).standard_error is None


def test_bootstrap_of_a_mean_is_its_clustered_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=40)

    def mean(weights: np.ndarray) -> float:
        return float(weights @ values / weights.sum())

    expected = clustered_standard_error(pd.Series(values), pd.Series(range(40)))
    assert cluster_bootstrap(mean, 40) == pytest.approx(expected, rel=0.06)
    assert cluster_bootstrap(mean, 40) != cluster_bootstrap(mean, 40, seed=1)
    assert cluster_bootstrap(mean, 1) is None


# --- CIDEr ---


def test_cider_of_rows_is_that_of_pycocoevalcap() -> None:
    found = cider_score(rows("cider", CAPTIONS, REFERENCES))
    assert found.value == pytest.approx(2.8585, abs=5e-5)
    terms = pd.Series(cider(CAPTIONS, REFERENCES))
    assert found.standard_error == pytest.approx(clustered_standard_error(terms, pd.Series(range(3))))


def test_the_idf_is_that_of_the_samples_scored() -> None:
    part = cider_score(rows("cider", CAPTIONS[:2], REFERENCES[:2]))
    assert part.value != pytest.approx(sum(cider(CAPTIONS, REFERENCES)[:2]) / 2, abs=0.1)
    one = cider_score(rows("cider", CAPTIONS[:1], REFERENCES[:1]))
    assert (one.value, one.standard_error) == (0.0, None)


# --- In a combination's row ---


def test_a_combination_has_the_score_of_its_corpus() -> None:
    nothing = frame("latency", [])
    captions = rows("cider", CAPTIONS, REFERENCES)
    found = aggregate(nothing, captions)
    assert found["accuracy"] == pytest.approx(2.8585, abs=5e-5)
    assert found["accuracy_se"] > 0
    assert (found["metric"], found["num_samples"]) == ("cider/d-ptb-like-1", 3)
    answers = yes_no_rows(SAID, MEANT)
    assert aggregate(nothing, answers)["accuracy"] == pytest.approx(4 / 7)
    assert aggregate(nothing, answers.assign(metric=SCORERS["yes_no"].name))["accuracy"] == 0.5


def test_rows_that_failed_or_do_not_count_are_not_part_of_the_corpus() -> None:
    captions = rows("cider", [*CAPTIONS, "a dog"], [*REFERENCES, ["a dog on grass"]], valid=[True] * 3 + [False])
    failed = frame("accuracy", [failed_row(SCORED, samples(5)[4])])
    found = aggregate(frame("latency", []), pd.concat([captions, failed], ignore_index=True))
    assert found["accuracy"] == pytest.approx(2.8585, abs=5e-5)
    assert (found["num_samples"], found["num_failed"], found["num_invalid"]) == (3, 1, 1)


def test_without_stored_references_there_is_no_score_of_the_corpus() -> None:
    captions = rows("cider", CAPTIONS, REFERENCES)
    for known in (captions.drop(columns="answers"), captions.assign(answers=None)):
        found = aggregate(frame("latency", []), known)
        assert (found["accuracy"], found["accuracy_se"], found["num_samples"]) == (None, None, 3)


@pytest.mark.parametrize("name", SCORERS)
def test_every_metric_of_the_corpus_is_computed(name: str) -> None:
    candidate = SCORERS[name]
    assert is_of_corpus(candidate.name) == candidate.of_corpus
    answers = [["yes", "yes"], ["no", "no"]]
    found = corpus_score(rows(name, ["yes", "no"], answers))
    assert (found is not None) == candidate.of_corpus

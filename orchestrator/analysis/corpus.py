"""Metrics of all answers of a combination together, which no mean of single scores gives: CIDEr, and F1 of yes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from orchestrator.analysis.statistics import clustered_standard_error
from workers.scorers import SCORERS
from workers.scoring.captions import cider
from workers.scoring.short_answers import parse_yes_no

# The spread over these is known to about 2 % of itself.
BOOTSTRAP_REPEATS = 1000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class CorpusScore:
    """A metric of a corpus with its standard error, clustered by image; None for a single image."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class YesNoStatistics:
    """What answers of yes and no come to, with yes as the positive.

    Attributes:
        accuracy: share of right answers; one that says neither, or both, is wrong.
        precision, recall, f1: 0 where undefined.
        yes_ratio: share of answers that say yes.
        unparsable: share of answers that say neither yes nor no, or both.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsable: float


def corpus_score(rows: pd.DataFrame) -> CorpusScore | None:
    """The score of a combination, where its metric is one of the corpus.

    Args:
        rows: valid rows of the accuracy table, of one combination.

    Returns:
        None if the metric is a mean of the rows' scores, or if a row has no reference answers (results of releases that
        did not store them).
    """
    metrics = set(rows["metric"].dropna())
    measure = _MEASURES.get(metrics.pop()) if len(metrics) == 1 else None
    if measure is None or "answers" not in rows or rows["answers"].isna().any():
        return None
    return measure(rows)


def is_of_corpus(metric: object) -> bool:
    """Whether a metric, as rows name it, is not the mean of the rows' scores."""
    return metric in _MEASURES


# --- Captions ---


def cider_score(rows: pd.DataFrame) -> CorpusScore:
    """CIDEr-D of the rows' predictions, see `workers.scoring.captions.cider`; each row is an image.

    The idf is that of these rows' references, so that only combinations scored on the same samples compare. With it
    fixed the corpus score is the mean of terms, and what a bootstrap over images with that idf converges to is the
    closed form of the clustered standard error, which is taken.
    """
    terms = pd.Series(cider(rows["prediction"].tolist(), [list(answers) for answers in rows["answers"]]))
    clusters = rows["image_id"].reset_index(drop=True)
    return CorpusScore(float(terms.mean()), clustered_standard_error(terms, clusters))


# --- Yes and no ---


def yes_no_statistics(rows: pd.DataFrame) -> YesNoStatistics:
    """Accuracy, precision, recall, F1 and the ratio of yes.

    P = TP / (TP + FP), R = TP / (TP + FN), F1 = 2 P R / (P + R) as in POPE (Li et al. 2023). An answer that is neither
    yes nor no is a false negative where the reference is yes, and no false positive where it is no; POPE's own code
    takes it for a yes, lmms-eval leaves it out of the recall.
    """
    said, meant = _said_and_meant(rows)
    counts = pd.Series(_counts(said, meant).sum(axis=0), index=["tp", "fp", "fn"])
    predicted, positive = counts["tp"] + counts["fp"], counts["tp"] + counts["fn"]
    return YesNoStatistics(
        accuracy=float((said.notna() & (said == meant)).mean()),
        precision=float(counts["tp"] / predicted) if predicted else 0.0,
        recall=float(counts["tp"] / positive) if positive else 0.0,
        f1=_f1(counts.to_numpy()),
        yes_ratio=float((said == "yes").mean()),
        unparsable=float(said.isna().mean()),
    )


def f1_score(rows: pd.DataFrame) -> CorpusScore:
    """F1 of yes: the mean over the kinds of question if every row has one, as POPE's three, else of all rows.

    The standard error is the spread over a bootstrap of images with a fixed seed; F1 has no closed form.
    """
    counts = _counts(*_said_and_meant(rows))
    kinds = rows["question_type"] if rows["question_type"].notna().all() else pd.Series("", index=rows.index)
    kind_codes, names = pd.factorize(kinds.to_numpy())
    cluster_codes, images = pd.factorize(rows["image_id"].to_numpy(), use_na_sentinel=False)
    of_clusters = np.zeros((len(images), len(names), counts.shape[1]))
    np.add.at(of_clusters, (cluster_codes, kind_codes), counts)

    def mean_f1(weights: np.ndarray) -> float:
        return float(np.mean([_f1(total) for total in np.tensordot(weights, of_clusters, axes=1)]))

    return CorpusScore(mean_f1(np.ones(len(images))), cluster_bootstrap(mean_f1, len(images)))


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], float],
    clusters: int,
    repeats: int = BOOTSTRAP_REPEATS,
    seed: int = BOOTSTRAP_SEED,
) -> float | None:
    """Standard error of a statistic by drawing clusters with replacement (Efron 1979); None for fewer than two.

    Args:
        statistic: of the number of times each cluster is drawn.
    """
    if clusters < 2:
        return None
    generator = np.random.default_rng(seed)
    draws = (np.bincount(generator.integers(clusters, size=clusters), minlength=clusters) for _ in range(repeats))
    # With n clusters the spread over draws is that of a variance divided by n, and not by n - 1.
    correction = math.sqrt(clusters / (clusters - 1))
    return float(np.std([statistic(drawn) for drawn in draws], ddof=1)) * correction


def _said_and_meant(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    said = rows["prediction"].map(parse_yes_no)
    meant = rows["answers"].map(lambda answers: parse_yes_no(answers[0]) if len(answers) else None)
    return said, meant


def _counts(said: pd.Series, meant: pd.Series) -> np.ndarray:
    """True positives, false positives and false negatives of each row."""
    yes, gold = (said == "yes").to_numpy(), (meant == "yes").to_numpy()
    return np.stack([yes & gold, yes & ~gold, ~yes & gold], axis=1).astype(float)


def _f1(counts: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN), which is 2 P R / (P + R)."""
    true_positive, false_positive, false_negative = counts
    total = 2 * true_positive + false_positive + false_negative
    return float(2 * true_positive / total) if total else 0.0


_MEASURES: dict[str, Callable[[pd.DataFrame], CorpusScore]] = {
    SCORERS["cider"].name: cider_score,
    SCORERS["yes_no/f1"].name: f1_score,
}

"""The metrics that a sweep can name, each with the variant that is stored with every score."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from workers.scoring.annotators import normalize_evalai, vqa_accuracy, vqa_accuracy_official
from workers.scoring.choices import multiple_choice, multiple_choice_or_open
from workers.scoring.short_answers import anls, counting, exact_match, relaxed_accuracy, yes_no

Rule = Callable[..., float]  # (prediction, answers) -> 0..1, of multiple choice (prediction, answers, options)


@dataclass(frozen=True)
class Scorer:
    """A metric as a sweep names it; `name` says the variant and is stored with every score.

    Attributes:
        rule: scores one answer; None where only all answers of a combination together have a score.
        minimum_answers: a sample with fewer answers would score 0 whatever the model says.
        choices: whether answers are letters of options: of every sample's (required), or of those that have some
            (optional); the rule is then told the options.
        of_corpus: a combination's accuracy is not the mean of its rows' scores, see `orchestrator.analysis.corpus`.
    """

    name: str
    rule: Rule | None
    minimum_answers: int = 1
    choices: Literal["none", "optional", "required"] = "none"
    of_corpus: bool = False

    def score(self, prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
        """The score of one answer, 0 to 1.

        Args:
            options: of the sample, in the order of their letters; empty if it has none. Ignored by other metrics.

        Raises:
            ValueError: there are no answers, or the metric does not score single answers.
        """
        if self.rule is None:
            raise ValueError(f"{self.name} has no score of a single answer; choose another metric where one is needed")
        if self.choices != "none":
            return self.rule(prediction, answers, options)
        return self.rule(prediction, answers)

    def row_score(self, prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float | None:
        """As `score`, but None for a metric that does not score single answers."""
        return None if self.rule is None else self.score(prediction, answers, options)


SCORERS: dict[str, Scorer] = {
    "exact_match": Scorer("exact_match", exact_match),
    # Leaving one annotator out of one leaves nobody to agree with.
    "vqa_accuracy": Scorer("vqa_accuracy/loo-always", vqa_accuracy, minimum_answers=2),
    "vqa_accuracy/official": Scorer("vqa_accuracy/official", vqa_accuracy_official, minimum_answers=2),
    "vqa_accuracy/evalai": Scorer(
        "vqa_accuracy/evalai", partial(vqa_accuracy, normalize=normalize_evalai), minimum_answers=2
    ),
    "anls": Scorer("anls/half-wrong-is-0", anls),  # other harnesses keep a similarity of exactly 0.5
    "relaxed_accuracy": Scorer("relaxed_accuracy/5-percent", relaxed_accuracy),
    "counting": Scorer("counting/first-number", counting),
    "yes_no": Scorer("yes_no/one-word", yes_no),
    "yes_no/f1": Scorer("yes_no/f1-of-yes", yes_no, of_corpus=True),
    "multiple_choice": Scorer("multiple_choice/letter-or-text", multiple_choice, choices="required"),
    "multiple_choice_or_open": Scorer("multiple_choice_or_open/mmmu", multiple_choice_or_open, choices="optional"),
    "cider": Scorer("cider/d-ptb-like-1", None, of_corpus=True),  # the number is that of the tokeniser's rules
}


def scorer(name: str) -> Scorer:
    """The scorer a sweep file calls `name`. Raises ValueError naming the nearest one if there is none."""
    if name in SCORERS:
        return SCORERS[name]
    nearest = difflib.get_close_matches(name, SCORERS, n=1)
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"unknown metric {name!r}{hint} (allowed: {', '.join(SCORERS)})")

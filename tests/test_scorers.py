"""The scorers give the published values, stay within 0..1 and ignore the order of the annotators."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.scorers import (
    CONTRACTIONS,
    SCORERS,
    Scorer,
    exact_match,
    leave_one_out,
    normalize_evalai,
    normalize_vqa,
    scorer,
)

SHORT_TEXT = st.text(alphabet="abtheno2 3,.'-?", max_size=12)
ANSWERS = st.lists(SHORT_TEXT, min_size=1, max_size=12)


def answers(*counted: tuple[str, int]) -> list[str]:
    return [answer for answer, count in counted for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("a red car", "red car"),
        ("1,000 people!", "1000 people"),
        ("3.5.", "3.5"),
        ("U.S.A.", "usa"),
        ("wi-fi", "wi fi"),
        ("coca - cola", "coca cola"),
        ("yes,it is", "yes it is"),
        ("1,2", "12"),
        ("1, 2", "1 2"),
        ("dont", "don't"),
        ("5 oclock", "5 o'clock"),
        ("it's a cat's toy", "it's cat's toy"),
        ("10:30", "10:30"),
        ("$5.00", "$5.00"),
        ("50%", "50%"),
        ("24/7", "24 7"),
        ("the", ""),
        ("two\nred\tcars", "2 red cars"),
        ("shouldntve", "shouldntve"),  # two apostrophes missing: not in the table
        ("shouldnt've", "shouldn't've"),
        ("shouldn'tve", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("shes", "shes"),
        ("Im", "im"),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert normalize_vqa(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("yes,it is", "yesit is"), ("it's a cat's toy", "it 's cat 's toy"), ("The Dog.", "dog")],
)
def test_evalai_normalisation(text: str, expected: str) -> None:
    assert normalize_evalai(text) == expected


def test_contraction_table_is_the_official_one() -> None:
    assert len(CONTRACTIONS) + len(["let's", "she's"]) == 120  # the official table also maps these two to themselves
    assert CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ows'at"] == CONTRACTIONS["'ow'sat"] == "'ow's'at"


def test_only_32_full_stops_are_removed_as_in_the_official_code() -> None:
    assert normalize_vqa("a." * 40).count(".") == 8


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators(matches: int, expected: float) -> None:
    assert leave_one_out("x", answers(("x", matches), ("y", 10 - matches))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "gold", "official", "always"),
    [
        ("Yes", answers(("yes", 10)), 0.0, 1.0),
        ("Yes.", answers(("yes", 9), ("no", 1)), 1.0, 1.0),
        ("table", answers(("down", 7), ("at table", 1), ("skateboard", 1), ("table", 1)), 0.3, 0.3),
        ("two", answers(("2", 3), ("3", 7)), 0.9, 0.9),
        ("2", answers(("two", 2), ("3", 8)), 0.6, 0.6),
        ("a dog", answers(("dog", 1), ("cat", 9)), 0.3, 0.3),
        ("", answers(("yes", 10)), 0.0, 0.0),
        ("red", ["red", "red"], 1 / 3, 1 / 3),
        ("no", answers(("yes", 8), ("no", 2)), 0.6, 0.6),
        ("yes", answers(("yes", 8), ("no", 2)), 1.0, 1.0),
        ("", answers(("the", 10)), 0.0, 0.0),
    ],
)
def test_vqa_accuracy(prediction: str, gold: list[str], official: float, always: float) -> None:
    assert SCORERS["vqa_accuracy/official"].score(prediction, gold) == pytest.approx(official)
    assert SCORERS["vqa_accuracy"].score(prediction, gold) == pytest.approx(always)


def test_evalai_variant_splits_possessives() -> None:
    gold = answers(("mcdonald 's", 10))
    assert SCORERS["vqa_accuracy/evalai"].score("McDonald's", gold) == 1.0
    assert SCORERS["vqa_accuracy"].score("McDonald's", gold) == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Yes", "yes", 1.0),
        ("yes.", "yes", 1.0),
        (" a cat", "cat", 0.0),
        ("t-shirt", "t shirt", 0.0),
        ("t-shirt", "tshirt", 1.0),
        ("3.5", "35", 1.0),  # an artefact of the published rule
        ("(B)", "B", 1.0),
        ("café", "cafe", 0.0),
        ("\u201cyes\u201d", "yes", 0.0),
        ("", "", 0.0),
    ],
)
def test_exact_match(prediction: str, gold: str, expected: float) -> None:
    assert exact_match(prediction, [gold]) == expected
    assert exact_match(prediction, ["something else", gold]) == expected


# --- The contract every scorer keeps; a new entry of SCORERS is covered without a new test ---

each_scorer = pytest.mark.parametrize("candidate", SCORERS.values(), ids=list(SCORERS))


@each_scorer
@given(prediction=SHORT_TEXT, gold=ANSWERS, seed=st.integers(0, 2**16))
def test_score_is_bounded_and_ignores_answer_order(
    candidate: Scorer, prediction: str, gold: list[str], seed: int
) -> None:
    score = candidate.score(prediction, gold)
    assert isinstance(score, float)
    assert 0.0 <= score <= 1.0
    assert candidate.score(prediction, random.Random(seed).sample(gold, len(gold))) == score


@each_scorer
def test_right_wrong_and_empty_predictions(candidate: Scorer) -> None:
    assert candidate.score("7", ["7"] * 10) == 1.0
    assert candidate.score("8", ["7"] * 10) == 0.0
    assert candidate.score(" \n", ["7"] * 10) == 0.0
    assert candidate.score("7", ["7"] * candidate.minimum_answers) > 0.0


@each_scorer
def test_no_answers_is_an_error(candidate: Scorer) -> None:
    with pytest.raises(ValueError, match="no answers"):
        candidate.score("7", [])


def test_stored_names_say_the_variant_and_are_unique() -> None:
    assert len({candidate.name for candidate in SCORERS.values()}) == len(SCORERS)
    assert scorer("vqa_accuracy").name == "vqa_accuracy/loo-always"


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'vqa_acuracy', did you mean vqa_accuracy\? \(allowed: exact"):
        scorer("vqa_acuracy")

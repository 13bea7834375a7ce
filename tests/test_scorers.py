"""The scorers give the published values, stay within 0..1 and ignore the order of the annotators."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.scorers import (
    CONTRACTIONS,
    SCORERS,
    Scorer,
    anls,
    counting,
    exact_match,
    leave_one_out,
    levenshtein,
    normalize_evalai,
    normalize_vqa,
    parse_count,
    parse_yes_no,
    relaxed_accuracy,
    scorer,
    yes_no,
)

SHORT_TEXT = st.text(alphabet="abtheno2 3,.'-?", max_size=12) | st.sampled_from(
    ["yes", "No.", "two", "5%", "1e3", "inf"]
)
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


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The Coca", 0.0),
        ("CocaCola", 8 / 9),
        ("Coca cola", 1.0),
        ("Cola", 0.0),
        ("Cat", 0.0),
        (" The    Coca ", 0.0),
        ("   CocaCola  ", 8 / 9),
    ],
)
def test_anls_published_example(prediction: str, expected: float) -> None:
    assert anls(prediction, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("0.29", "0.28", 0.75),
        ("1975.", "1975", 0.8),
        ("the year 1975", "1975", 0.0),
        ("ab", "ac", 0.0),  # exactly half: some harnesses give 0.5
        ("", "x", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls(prediction: str, gold: str, expected: float) -> None:
    assert anls(prediction, [gold]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("left", "right", "expected"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_levenshtein(left: str, right: str, expected: int) -> None:
    assert levenshtein(left, right) == levenshtein(right, left) == expected


PIX2STRUCT_PAIRS = [
    ("abc", "abc", 1.0),
    ("abc", "Abc", 1.0),
    ("Abc", "abc", 1.0),
    ("100%", "96%", 1.0),
    ("100%", "94%", 0.0),
    ("100%", "0.96", 1.0),
    ("100%", "0.94", 0.0),
    ("Don't", "Won't", 0.0),
]


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        *PIX2STRUCT_PAIRS,
        ("10.5", "10", 1.0),
        ("10.51", "10", 0.0),
        ("9.5", "10", 1.0),
        ("14", "14%", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # a gold of 0 is compared as text
        ("1,000", "1000", 0.0),
        ("$5", "5", 0.0),
        ("yes.", "yes", 0.0),
        ("2019", "2100", 1.0),  # the known weakness with years
        ("nan", "5", 0.0),
        ("1e3", "1000", 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, gold: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [gold]) == expected
    assert relaxed_accuracy(prediction, ["something else", gold]) == expected


def test_published_means_of_the_pix2struct_pairs() -> None:
    def mean(name: str) -> float:
        scores = [SCORERS[name].score(prediction, [gold]) for prediction, gold, _ in PIX2STRUCT_PAIRS]
        return sum(scores) / len(scores)

    assert mean("relaxed_accuracy") == 0.625
    assert mean("anls") == pytest.approx(0.475)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("There are 3 dogs.", 3),
        ("3.0", 3),
        ("3 or 4", 3),
        ("21", 21),
        ("none", 0),
        ("no dogs", 0),
        ("zero", 0),
        ("Twenty", 20),
        ("1,000", 1000),
        ("-2", -2),
        ("2.5", None),
        ("2.5kg", None),
        ("I see two cats and three dogs", 2),
        ("No, there are 3", 3),
        ("13th", None),
        ("1,000th", None),
        ("many", None),
        ("", None),
        ("9" * 5000, None),  # beyond what can be converted
    ],
)
def test_count_parsing(text: str, expected: int | None) -> None:
    assert parse_count(text) == expected


def test_counting() -> None:
    assert counting("There are three.", ["3"]) == 1.0
    assert counting("There are three.", ["4", "3.0"]) == 1.0
    assert counting("There are three.", ["4"]) == 0.0
    assert counting("many", ["many"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("No, there is not", "no"),
        ("There is no dog.", "no"),
        ("I don't know", None),
        ("", None),
        ("The answer is yes", "yes"),
        ("Yes. No doubt", None),
        ("Know", None),
        ("Nope", None),
        ("**Yes**", "yes"),
    ],
)
def test_yes_no_parsing(text: str, expected: str | None) -> None:
    assert parse_yes_no(text) == expected


def test_yes_no_counts_an_unclear_answer_as_wrong() -> None:
    predictions = ["yes", "yes", "no", "no", "maybe", "yes"]
    gold = ["yes", "no", "yes", "no", "yes", "yes"]
    scores = [yes_no(prediction, [answer]) for prediction, answer in zip(predictions, gold, strict=True)]
    assert scores == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]


# --- The contract every scorer keeps; a new entry of SCORERS is covered without a new test ---

# Right and wrong for every metric: as text, as a count (0 and 1) and as yes or no.
RIGHT, WRONG = "no dogs", "yes, 1"

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
    assert candidate.score(RIGHT, [RIGHT] * 10) == 1.0
    assert candidate.score(WRONG, [RIGHT] * 10) == 0.0
    assert candidate.score(" \n", [RIGHT] * 10) == 0.0
    assert candidate.score(RIGHT, [RIGHT] * candidate.minimum_answers) > 0.0


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

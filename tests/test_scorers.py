"""The scorers give the published values, stay within 0..1 and ignore the order of the annotators."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.scorers import SCORERS, Scorer, scorer
from workers.scoring.annotators import CONTRACTIONS, leave_one_out, normalize_evalai, normalize_vqa
from workers.scoring.captions import cider, cider_of_tokens, tokens_of
from workers.scoring.choices import multiple_choice, multiple_choice_or_open, open_answer, parse_choice
from workers.scoring.short_answers import (
    anls,
    counting,
    exact_match,
    levenshtein,
    parse_count,
    parse_yes_no,
    relaxed_accuracy,
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


# --- Multiple choice ---

OPTIONS = ("the red apple", "the green pear", "the banana", "the plum")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # The table of published parsers: what each makes of these is in their code, ours is meant to be right.
        ("B", "B"),
        ("b", "B"),
        ("B. the green pear", "B"),
        ("(B)", "B"),
        ("B)", "B"),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
        ("The answer is B.", "B"),
        ("Answer: B", "B"),
        ("A or B", None),
        ("A dog is shown, so B", "B"),
        ("DNA", None),
        ("the green pear", "B"),
        ("B\nExplanation: (A) is not", "B"),
        ("I don't know", None),
        ("", None),
        ("B: pear", "B"),
        ("(A) is wrong, (B) is right", "B"),
        ("It is A", "A"),
        ("The correct option is (C) because A fails", "C"),
        ("E", None),
        # Further ones.
        ("[d]", "D"),
        ("The answer is: (D)", "D"),
        ("The answer is **C**.", "C"),
        ("$\\boxed{\\text{C}}$", "C"),
        ("**B. the green pear**", "B"),
        ("The answer is A because of its colour", "A"),
        ("The answer is A dog", None),
        ("A is right", "A"),
        ("(A) or (C)", None),
        ("The Green Pear.", "B"),
        ("I see the green pear here", "B"),
        ("the green pear and the plum", None),
        ("Neither of them", None),
        ("Option C", "C"),
        ("A's", None),
        ("answer: E", None),
    ],
)
def test_choice_parsing(response: str, letter: str | None) -> None:
    assert parse_choice(response, OPTIONS) == letter
    assert multiple_choice(response, ["B"], OPTIONS) == float(letter == "B")


def test_an_answer_that_is_the_text_of_an_option_means_it_whatever_letters_it_holds() -> None:
    assert parse_choice("Vitamin C", ("Vitamin C", "Vitamin D", "iron")) == "A"
    assert parse_choice("yes", ("yes", "yes")) is None


def test_choices_without_options_are_letters_alone() -> None:
    assert parse_choice("(F)") == "F"
    assert parse_choice("I don't think so") is None
    assert parse_choice("the green pear") is None


def test_an_unclear_choice_is_wrong_every_time() -> None:
    assert {multiple_choice("I cannot say", [letter], OPTIONS) for letter in "ABCD" for _ in range(20)} == {0.0}


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("The answer is 12.", "12", 1.0),
        ("x = 12", "12", 1.0),
        ("1,200", "1200", 1.0),
        ("12.001", "12", 1.0),
        ("12.01", "12", 0.0),
        ("-5", "5", 0.0),
        ("blueish", "blue", 1.0),
        ("3/4", "0.75", 0.0),
        ("50%", "50", 1.0),
        ("5 or 6", "5", 1.0),
        ("3.14159", "3.14", 1.0),
        # What the published code gets wrong: sentences, and key words inside others.
        ("The sum is 12. That is all", "12", 1.0),
        ("It is clear that the sum is 12. However this holds", "12", 1.0),
        ("the answer is blue in this picture", "blue", 1.0),
        ("banana", "a", 0.0),
        ("Clearly a", "a", 1.0),
        ("1e3", "1000", 1.0),
        ("nan", "12", 0.0),
        ("", "12", 0.0),
    ],
)
def test_open_answers(prediction: str, gold: str, expected: float) -> None:
    assert open_answer(prediction, [gold]) == expected
    assert open_answer(prediction, ["something else", gold]) == expected


def test_open_questions_are_those_without_options() -> None:
    assert multiple_choice_or_open("It is B", ["B"], OPTIONS) == 1.0
    assert multiple_choice_or_open("about 12 metres", ["12"]) == 1.0
    assert multiple_choice_or_open("about 12 metres", ["B"], OPTIONS) == 0.0


# --- Captions ---


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog's bowl.", "a dog 's bowl"),
        ("isn't", "is n't"),
        ("can't", "ca n't"),
        ("cannot", "can not"),
        ("$5.00", "$ 5.00"),
        ("50%", "50 %"),
        ("black-and-white", "black-and-white"),
        ("9:30 am", "9:30 am"),
        ("1,000", "1,000"),
        ("the U.S. flag", "the u.s. flag"),
        ("(left)", "-lrb- left -rrb-"),
        ('A "stop" sign; red, white -- and blue: big...', "a stop sign red white and blue big"),
        ("a 2-story house\n at 5 o’clock", "a 2-story house at 5 o'clock"),
        ("", ""),
    ],
)
def test_caption_tokens(text: str, tokens: str) -> None:
    assert tokens_of(text) == tokens.split()


SIX_WORDS = ("a man riding a big horse", "two cats on the red mat")


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        (  # published in the README of aac-metrics
            ["a man is speaking", "rain falls"],
            [
                ["a man speaks", "someone speaks", "a man is speaking while a bird is chirping in the background"],
                ["rain is falling hard on a surface"],
            ],
            [1.3641, 0.5587],
        ),
        ([*SIX_WORDS], [[SIX_WORDS[0]], [SIX_WORDS[1]]], [10, 10]),
        ([*SIX_WORDS], [[SIX_WORDS[1]], [SIX_WORDS[0]]], [0, 0]),
        ([SIX_WORDS[0]], [[SIX_WORDS[0]]], [0]),  # ln 1 = 0
        (["cat", "dog"], [["cat"], ["dog"]], [2.5, 2.5]),  # one order of four exists
        (["", "dogs run"], [["a cat sits"], ["dogs run"]], [0, 5]),
        (["a cat a cat a cat a cat", "dogs run"], [["a cat"], ["dogs run"]], [0.6823, 5]),
        (["the", "the"], [["the"], ["the"]], [0, 0]),
        (
            ["a man riding a horse", "a plate of food", "a bus"],
            [
                ["a man rides a horse", "a man riding a brown horse"],
                ["a plate with food on it", "food on a plate"],
                ["a red bus on the street", "a bus parked on a street"],
            ],
            [4.5679, 2.4580, 1.5495],
        ),
    ],
)
def test_cider_of_pycocoevalcap(predictions: list[str], references: list[list[str]], expected: list[float]) -> None:
    split = [[reference.split() for reference in of_image] for of_image in references]
    assert cider_of_tokens([text.split() for text in predictions], split) == pytest.approx(expected, abs=5e-5)
    assert cider(predictions, references) == pytest.approx(expected, abs=5e-5)


def test_published_cider_of_the_pix2struct_pairs() -> None:
    terms = cider([prediction for prediction, _, _ in PIX2STRUCT_PAIRS], [[gold] for _, gold, _ in PIX2STRUCT_PAIRS])
    assert sum(terms) / len(terms) == pytest.approx(1.2861, abs=5e-5)


def test_cider_needs_references_and_as_many_images_as_captions() -> None:
    assert cider([], []) == []
    with pytest.raises(ValueError, match="no answers"):
        cider(["a cat"], [[]])
    with pytest.raises(ValueError, match="argument 2"):
        cider(["a cat"], [["a cat"], ["a dog"]])


# --- The contract every scorer keeps; a new entry of SCORERS is covered without a new test ---

# Right and wrong for every metric: as text, as a count (0 and 1) and as yes or no; for multiple choice as a letter.
RIGHT, WRONG = "no dogs", "yes, 1"

each_scorer = pytest.mark.parametrize(
    "candidate", [c for c in SCORERS.values() if c.rule], ids=[name for name, c in SCORERS.items() if c.rule]
)


def right_and_wrong(candidate: Scorer) -> tuple[str, str, list[str]]:
    """A right and a wrong prediction, and the options."""
    return (RIGHT, WRONG, []) if candidate.choices == "none" else ("b", "(C)", list(OPTIONS))


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
    right, wrong, options = right_and_wrong(candidate)
    assert candidate.score(right, [right] * 10, options) == candidate.row_score(right, [right] * 10, options) == 1.0
    assert candidate.score(wrong, [right] * 10, options) == 0.0
    assert candidate.score(" \n", [right] * 10, options) == 0.0
    assert candidate.score(right, [right] * candidate.minimum_answers, options) > 0.0


@each_scorer
def test_no_answers_is_an_error(candidate: Scorer) -> None:
    with pytest.raises(ValueError, match="no answers"):
        candidate.score("7", [])


def test_stored_names_say_the_variant_and_are_unique() -> None:
    assert len({candidate.name for candidate in SCORERS.values()}) == len(SCORERS)
    assert scorer("vqa_accuracy").name == "vqa_accuracy/loo-always"


def test_a_metric_of_the_corpus_alone_scores_no_single_answer() -> None:
    (alone,) = (candidate for candidate in SCORERS.values() if candidate.rule is None)
    assert alone is SCORERS["cider"]
    assert alone.of_corpus
    assert alone.row_score("a cat", ["a cat"]) is None
    with pytest.raises(ValueError, match="cider/d-ptb-like-1 has no score of a single answer"):
        alone.score("a cat", ["a cat"])


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'vqa_acuracy', did you mean vqa_accuracy\? \(allowed: exact"):
        scorer("vqa_acuracy")

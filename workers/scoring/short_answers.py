"""Short answers against references: exact match, relaxed accuracy, ANLS, counts, yes and no."""

import re
import string
from collections.abc import Callable, Sequence

from workers.scoring.references import require_answers


def normalize_exact_match(text: str) -> str:
    """Lower-case and delete ASCII punctuation, the lmms-eval exact-match rule."""
    return text.lower().translate(_DELETE_ASCII_PUNCTUATION)


_DELETE_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


# --- Parsing numbers, counts and yes or no ---

_ZERO_TO_TWENTY = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
""".split()  # noqa: SIM905 - as for the contractions
_COUNT_WORDS = {"none": 0} | {word: value for value, word in enumerate(_ZERO_TO_TWENTY)}
_COUNT = re.compile(
    # A whole numeral: not "13" of "13th", "5" of "2.5" or "000" of "1,000".
    r"(?<![\w.])(?<!\d,)(?P<numeral>-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?!\w|\.\d|,\d{3})"
    rf"|\b(?P<word>{'|'.join(_COUNT_WORDS)})\b"
    r"|\bno\s+[a-z]"  # "no dogs"
)
_YES_OR_NO = re.compile(r"\b(?:yes|no)\b")


def parse_count(text: str) -> int | None:
    """The first standalone number of a text: a numeral, zero to twenty, or 0 for "none" and "no dogs".

    None if there is no number or the first one is not whole. VLMEvalKit's rule for TallyQA, which stops at 20 and
    knows neither signs nor thousands nor "none".
    """
    found = _COUNT.search(text.lower())
    if found is None:
        return None
    if found["numeral"] is None:
        return _COUNT_WORDS[found["word"] or "none"]
    value = float(found["numeral"].replace(",", ""))
    return int(value) if value.is_integer() else None


def parse_yes_no(text: str) -> str | None:
    """Whichever of "yes" and "no" is among the words, None if neither or both are; VLMEvalKit's rule for POPE."""
    said = set(_YES_OR_NO.findall(text.lower()))
    return said.pop() if len(said) == 1 else None


def _parse_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# --- Scores ---

_RELAXED_TOLERANCE = 0.05
_ANLS_THRESHOLD = 0.5


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any answer after the lmms-eval normalisation, else 0.0.

    An empty prediction scores 0. Raises ValueError if there are no answers.
    """
    require_answers(answers)
    if not prediction.strip():
        return 0.0
    normalized = normalize_exact_match(prediction.strip())
    return float(any(normalize_exact_match(answer) == normalized for answer in answers))


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is within 5 % of any answer, or equals one that is not a number, else 0.0.

    ChartQA's measure (Masry et al. 2022) as the code of Pix2Struct computes it: "96%" is 0.96, a gold of 0 is compared
    as text, and neither currency signs nor thousands commas are read. Years pass within 5 % like any number.
    Raises ValueError if there are no answers.
    """
    require_answers(answers)
    return float(any(_relaxed_match(prediction, answer) for answer in answers))


def _relaxed_match(prediction: str, answer: str) -> bool:
    predicted, gold = _parse_number(prediction), _parse_number(answer)
    if predicted is not None and gold:
        return abs(predicted - gold) / abs(gold) <= _RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 from half of the characters wrong.

    The term of one question in ANLS (Biten et al. 2019, "Scene Text Visual Question Answering"): 1 - NL if NL < 0.5,
    else 0, with NL the edit distance over the longer length; without regard to case and repeated spaces.
    Raises ValueError if there are no answers.
    """
    require_answers(answers)
    return max(_levenshtein_similarity(_fold(prediction), _fold(answer)) for answer in answers)


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _levenshtein_similarity(left: str, right: str) -> float:
    longer = max(len(left), len(right))
    distance = levenshtein(left, right) / longer if longer else 0.0
    return 1.0 - distance if distance < _ANLS_THRESHOLD else 0.0


def levenshtein(left: str, right: str) -> int:
    """The least number of characters to insert, delete or replace that turns one text into the other."""
    row = list(range(len(right) + 1))
    for deleted, left_character in enumerate(left, 1):
        above, row = row, [deleted]
        for column, right_character in enumerate(right):
            replaced = above[column] + (left_character != right_character)
            row.append(min(replaced, above[column + 1] + 1, row[column] + 1))
    return row[-1]


def counting(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if prediction and any answer give the same whole number, see `parse_count`, else 0.0.

    Raises ValueError if there are no answers.
    """
    return _same_meaning(prediction, answers, parse_count)


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if prediction and any answer say the same of yes and no, see `parse_yes_no`, else 0.0.

    POPE's own code takes whatever is not a no for a yes; here an unclear prediction is wrong.
    Raises ValueError if there are no answers.
    """
    return _same_meaning(prediction, answers, parse_yes_no)


def _same_meaning(prediction: str, answers: Sequence[str], parse: Callable[[str], object | None]) -> float:
    require_answers(answers)
    meant = parse(prediction)
    return float(meant is not None and any(parse(answer) == meant for answer in answers))

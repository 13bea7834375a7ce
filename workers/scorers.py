"""Score a model's answer against the annotators' answers, with the exact rules of the published metrics."""

import difflib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

# --- VQA text normalisation: vqaEval.py of GT-Vision-Lab/VQA, the official evaluation code ---

_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
# The official code passes a flag where `re.sub` expects a count, so only this many full stops are removed.
_OFFICIAL_FULL_STOP_COUNT = 32
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = {"none": "0", "zero": "0"} | {
    word: str(value)
    for value, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
_CONTRACTED_WORDS = """
    'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()  # noqa: SIM905 - a list of quoted words would be unreadable here


def _contraction_map() -> dict[str, str]:
    """Map every form with exactly one apostrophe missing to the full word; this gives the official table."""
    mapping = {
        word[:position] + word[position + 1 :]: word
        for word in _CONTRACTED_WORDS
        for position, character in enumerate(word)
        if character == "'"
    }
    mapping["somebody'd"] = "somebodyd"  # the official table has this one entry the wrong way round
    return mapping


CONTRACTIONS = _contraction_map()


def normalize_vqa(text: str) -> str:
    """Normalise an answer as the official VQA evaluation does: punctuation, number words, articles, contractions."""
    text = _flatten_whitespace(text)
    cleaned = text
    has_thousands_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    for symbol in _VQA_PUNCTUATION:
        # The official code looks at the input string here, not at what earlier symbols left of it.
        touches_space = symbol + " " in text or " " + symbol in text
        cleaned = cleaned.replace(symbol, "" if touches_space or has_thousands_comma else " ")
    cleaned = _FULL_STOP_NOT_BEFORE_DIGIT.sub("", cleaned, count=_OFFICIAL_FULL_STOP_COUNT)
    words = (_NUMBER_WORDS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_evalai(text: str) -> str:
    """Normalise an answer as the TextVQA / EvalAI evaluation does: split off possessives first, then the VQA rule."""
    return normalize_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def normalize_exact_match(text: str) -> str:
    """Lower-case and delete ASCII punctuation, the lmms-eval exact-match rule."""
    return text.lower().translate(_DELETE_ASCII_PUNCTUATION)


_DELETE_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _flatten_whitespace(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


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


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Average over annotators of min(1, matches among the other annotators / 3), on already normalised text.

    The official VQA accuracy. With ten annotators 0, 1, 2, 3 and 4 or more matches give 0, .3, .6, .9 and 1.
    """
    total = len(answers)
    matches = sum(answer == prediction for answer in answers)
    # Leaving out a matching annotator leaves matches - 1; in integer thirds, so that a full match is exactly 1.
    thirds = matches * min(3, matches - 1) + (total - matches) * min(3, matches)
    return thirds / (3 * total)


def vqa_accuracy(prediction: str, answers: Sequence[str], normalize: Callable[[str], str] = normalize_vqa) -> float:
    """VQA accuracy in 0..1, normalising prediction and answers always.

    An empty prediction scores 0. Raises ValueError if there are no answers.
    """
    _require_answers(answers)
    if not prediction.strip():
        return 0.0
    return leave_one_out(normalize(prediction), [normalize(answer) for answer in answers])


def vqa_accuracy_official(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy in 0..1 as the official code computes it: text is normalised only if the annotators disagree."""
    _require_answers(answers)
    if len({_flatten_whitespace(answer) for answer in answers}) == 1:
        return vqa_accuracy(prediction, answers, normalize=_flatten_whitespace)
    return vqa_accuracy(prediction, answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any answer after the lmms-eval normalisation, else 0.0.

    An empty prediction scores 0. Raises ValueError if there are no answers.
    """
    _require_answers(answers)
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
    _require_answers(answers)
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
    _require_answers(answers)
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
    _require_answers(answers)
    meant = parse(prediction)
    return float(meant is not None and any(parse(answer) == meant for answer in answers))


def _require_answers(answers: Sequence[str]) -> None:
    if not answers:
        raise ValueError("no answers to score against")


# --- Registry ---


@dataclass(frozen=True)
class Scorer:
    """A metric as a sweep names it; `name` says the variant and is stored with every score."""

    name: str
    score: Callable[[str, Sequence[str]], float]  # (prediction, answers) -> 0..1
    minimum_answers: int = 1  # a sample with fewer answers would score 0 whatever the model says


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
}


def scorer(name: str) -> Scorer:
    """The scorer a sweep file calls `name`. Raises ValueError naming the nearest one if there is none."""
    if name in SCORERS:
        return SCORERS[name]
    nearest = difflib.get_close_matches(name, SCORERS, n=1)
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"unknown metric {name!r}{hint} (allowed: {', '.join(SCORERS)})")

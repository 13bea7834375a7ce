"""VQA accuracy: agreement with ten annotators, with the text normalisation of the official evaluation code."""

import re
from collections.abc import Callable, Sequence

from workers.scoring.references import require_answers

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


def _flatten_whitespace(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


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
    require_answers(answers)
    if not prediction.strip():
        return 0.0
    return leave_one_out(normalize(prediction), [normalize(answer) for answer in answers])


def vqa_accuracy_official(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy in 0..1 as the official code computes it: text is normalised only if the annotators disagree."""
    require_answers(answers)
    if len({_flatten_whitespace(answer) for answer in answers}) == 1:
        return vqa_accuracy(prediction, answers, normalize=_flatten_whitespace)
    return vqa_accuracy(prediction, answers)

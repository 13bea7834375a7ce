"""Multiple choice: which letter an answer means, without guessing, and MMMU's rule for its open questions."""

import re
import string
from collections.abc import Sequence

from workers.scoring.references import require_answers

LETTERS = string.ascii_uppercase

# What follows a capital that is a word and no letter: "A dog", "I think". "A is right" does mean the letter.
_NO_ARTICLE = "is|was|because|since|as|and|or|but|would|seems"
_NO_WORD = rf"(?!['’]\w)(?!(?<=[AI])\s+(?!(?:{_NO_ARTICLE})\b)[a-z])"
_OPEN, _CLOSE = r"[(\[*\"'\s]*", r"(?![A-Za-z0-9])"

_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_FIRST = re.compile(r"([A-Z])(?:[.):](?=\s|$)|[ \t]*\n)")
_FIRST_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_STATED = re.compile(
    rf"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice|ANSWER)\b\W{{0,4}}(?:\s*(?:is|:))+{_OPEN}(?:[Oo]ption\s+\(?)?([A-Z]){_CLOSE}{_NO_WORD}"
)
_MARKED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}|\*\*\s*\(?([A-Z])\)?[.:]?\s*\*\*")
_EITHER = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?\s+or\s+\(?([A-Z])\)?(?![A-Za-z0-9])")
_CAPITAL = re.compile(rf"(?<![A-Za-z0-9'’])([A-Z]){_CLOSE}{_NO_WORD}")


def parse_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter that an answer means, None if it means none or leaves it open; never a guess.

    The first rule that fits counts: the whole answer is a letter, or is the text of one option; it begins with `B.`,
    `B)`, `B:`, a `B` on its own line, or the only `(B)`; the last "answer is B" (or option, choice; or a colon); the
    last boxed or bold letter; "A or B" means none; the last capital that stands alone and is no word (the article A,
    the pronoun I); the only option whose text the answer contains.

    Args:
        options: texts in the order of their letters; without them every letter from A to Z may be meant.
    """
    text = text.strip()
    letters = LETTERS[: len(options)] if options else LETTERS
    if alone := _ALONE.fullmatch(text):
        letter = alone[1].upper()
        return letter if letter in letters else None
    folded = _fold(text)
    whole = [letter for letter, option in zip(letters, options, strict=False) if folded and _fold(option) == folded]
    if len(whole) == 1:
        return whole[0]
    if (first := _FIRST.match(text)) and first[1] in letters:
        return first[1]
    bracketed = set(_FIRST_IN_BRACKETS.findall(text))
    if (first := _FIRST_IN_BRACKETS.match(text)) and bracketed == {first[1]} and first[1] in letters:
        return first[1]
    for pattern in (_STATED, _MARKED):
        named = ["".join(filter(None, found.groups())) for found in pattern.finditer(text)]
        if meant := [letter for letter in named if letter in letters]:
            return meant[-1]
    if any(one != other and {one, other} <= set(letters) for one, other in _EITHER.findall(text)):
        return None
    if capitals := [letter for letter in _CAPITAL.findall(text) if letter in letters]:
        return str(capitals[-1])
    contained = [letter for letter, option in zip(letters, options, strict=False) if _contains(folded, _fold(option))]
    return contained[0] if len(contained) == 1 else None


def _fold(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _contains(text: str, part: str) -> bool:
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def multiple_choice(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """1.0 if the prediction means the letter of any answer, see `parse_choice`, else 0.0.

    What cannot be parsed is wrong; MMMU's own code, and lmms-eval with it, takes a random letter there instead.
    Raises ValueError if there are no answers.
    """
    require_answers(answers)
    meant = parse_choice(prediction, options)
    return float(meant is not None and any(answer.strip().upper() == meant for answer in answers))


def multiple_choice_or_open(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Multiple choice where a sample has options, MMMU's rule for open questions where it has none."""
    return multiple_choice(prediction, answers, options) if options else open_answer(prediction, answers)


# --- Open questions: eval_utils.py of MMMU-Benchmark/MMMU ---

_KEY_WORDS = ("could be", "so", "is", "thus", "therefore", "final", "answer", "result")
_KEY = re.compile(rf"\b(?:{'|'.join(_KEY_WORDS)})\s")
_KEY_OR_EQUALS = re.compile(rf"\b(?:{'|'.join(_KEY_WORDS)})\s|=")
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def open_answer(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if a number in the key phrases equals a reference's, or a phrase contains a reference, else 0.0.

    MMMU's rule: a key phrase is what follows the last "is", "answer", "so", "thus", "=" and the like of a sentence, the
    shortest such rest, or the whole answer where there is none; numbers are rounded to two decimals. Unlike its code,
    sentences are told apart before capitals are gone and key words are whole words, "this" holds no "is".
    Raises ValueError if there are no answers.
    """
    require_answers(answers)
    phrases = _key_phrases(prediction)
    if not prediction.strip():
        return 0.0
    numbers = {value for phrase in phrases for value in _numbers(phrase)}
    return float(any(_agrees(answer.strip().lower(), phrases, numbers) for answer in answers))


def _key_phrases(text: str) -> list[str]:
    sentences = [sentence.lower() for sentence in _SENTENCE_END.split(text.strip().strip("."))]
    phrases = []
    for sentence in sentences:
        key = _KEY_OR_EQUALS if sentence is sentences[-1] else _KEY
        rests = [sentence[found.end() :].strip() for found in key.finditer(sentence)]
        if rests and rests[-1].strip(string.punctuation):
            phrases.append(rests[-1])
    return phrases or [text.strip().strip(".").lower()]


def _numbers(phrase: str) -> list[float]:
    found = [phrase, *(number for pattern in _NUMBERS for number in pattern.findall(phrase))]
    return [value for text in found if (value := _number(text)) is not None]


def _number(text: str) -> float | None:
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def _agrees(answer: str, phrases: Sequence[str], numbers: set[float]) -> bool:
    value = _number(answer)
    if value is not None:
        return value in numbers
    # One letter stands in almost every text, so it has to stand alone there.
    return any(f" {answer} " in f" {phrase} " if len(answer) == 1 else answer in phrase for phrase in phrases)

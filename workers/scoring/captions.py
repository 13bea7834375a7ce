"""CIDEr-D of a corpus of captions, with tokens as near to the Penn Treebank's as regular expressions come."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from workers.scoring.references import require_answers

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0

NGram = tuple[str, ...]

# --- Tokens: those of Stanford's PTBTokenizer as pycocoevalcap calls it, which needs Java ---

_BRACKETS = str.maketrans(
    {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
_TOKEN = re.compile(
    r"""
      -[lr][rsc]b-                                   # a bracket
    | (?:[a-z]\.){2,}                                # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs)\.(?=\s+\w)        # titles keep their full stop
    | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?!\w|-\w)  # 1,000 and 9:30
    | o['’]clock\b
    | can(?=not\b) | gon(?=na\b) | got(?=ta\b) | wan(?=na\b) | lem(?=me\b) | gim(?=me\b)
    | [^\W\d]+?(?=n['’]t\b)                          # is n't
    | n['’]t\b
    | ['’](?:s|m|d|re|ve|ll)\b
    | \w+(?:[-&]\w+)*                                # black-and-white
    | [^\w\s]                                        # $, % and the like, one by one
    """,
    re.VERBOSE,
)
# pycocoevalcap's list; its brackets are missing here because it compares them in capitals with tokens in small letters.
_DROPPED = frozenset("\"'`.?!,:-;…’‘“”–—")


def tokens_of(text: str) -> list[str]:
    """The tokens of a caption: lower case, clitics split off ("is n't", "dog 's"), punctuation dropped.

    Equal to PTBTokenizer on common captions, not on everything: it knows many more abbreviations.
    """
    found = _TOKEN.findall(text.lower().translate(_BRACKETS))
    return [token.replace("’", "'") for token in found if token not in _DROPPED]


# --- CIDEr-D: Vedantam et al. 2015, as cider_scorer.py of pycocoevalcap computes it ---


@dataclass(frozen=True)
class _Weights:
    """A caption as tf-idf vectors, one per order, with their norms and the number of its bigrams."""

    vectors: tuple[dict[NGram, float], ...]
    norms: tuple[float, ...]
    bigrams: int


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each image, 0 to 10; the corpus has their mean. Papers print a hundred times as much.

    10 * mean over references and n = 1..4 of exp(-(l_c - l_r)^2 / (2 * 6^2)) * sum_g min(w_c, w_r) * w_r / |w_c| |w_r|,
    w(g) = tf(g) * (ln N - ln max(1, df(g))), with df(g) the images whose references hold the n-gram g, N all images,
    and l counted in bigrams as pycocoevalcap does.

    The idf comes from the references given here: of a part of a data set it is another one, so that a subset's number
    cannot be compared with the whole set's, and a single image always has 0.

    Args:
        predictions: one caption per image.
        references: the captions that people gave it, at least one.
    """
    return cider_of_tokens(
        [tokens_of(prediction) for prediction in predictions],
        [[tokens_of(reference) for reference in of_image] for of_image in references],
    )


def cider_of_tokens(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """As `cider`, of captions that are tokens already."""
    for of_image in references:
        require_answers(["" for _ in of_image])
    counted = [[_ngrams(reference) for reference in of_image] for of_image in references]
    frequency = Counter(ngram for of_image in counted for ngram in {ngram for counts in of_image for ngram in counts})
    images = math.log(len(references)) if references else 0.0

    def weighed(counts: Counter[NGram]) -> _Weights:
        vectors: tuple[dict[NGram, float], ...] = tuple({} for _ in ORDERS)
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (images - math.log(max(1, frequency[ngram])))
        norms = tuple(math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors)
        return _Weights(vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))

    scores = []
    for prediction, counts_of_image in zip(predictions, counted, strict=True):
        candidate = weighed(_ngrams(prediction))
        similarities = [_similarity(candidate, weighed(counts)) for counts in counts_of_image]
        scores.append(10.0 * sum(similarities) / len(similarities))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    return Counter(tuple(tokens[start : start + n]) for n in ORDERS for start in range(len(tokens) - n + 1))


def _similarity(candidate: _Weights, reference: _Weights) -> float:
    """Mean over the orders of the clipped cosine, less the more the lengths differ."""
    total = 0.0
    for n in range(len(ORDERS)):
        of_reference = reference.vectors[n]
        shared = sum(
            min(weight, of_reference.get(ngram, 0.0)) * of_reference.get(ngram, 0.0)
            for ngram, weight in candidate.vectors[n].items()
        )
        norms = candidate.norms[n] * reference.norms[n]
        total += shared / norms if norms else shared
    return total / len(ORDERS) * math.exp(-((candidate.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))

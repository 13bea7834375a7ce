"""Which blocks matter: a score for every block of a model, and the blocks to keep when only so many may run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from knobs.blocks import refuse_blocks
from knobs.errors import KnobError

# Blocks that a selection keeps whatever their scores; negative ones count from the last.
FIRST_AND_LAST = (0, -1)


class Method(StrEnum):
    """How the importance of a block is measured; higher is more important, and what a block adds may also do harm.

    ACCURACY_DROP: accuracy of the whole model less that of the model without the block.
    NLL: the same with the log-likelihood of the reference answers, in nats per answer: how much the negative
        log-likelihood rises. It says something of every sample, and accuracy only of those whose answer flips.
    ACTIVATION: what the block adds to the residual stream over what it leaves there, |out - in| / |out| (Euclidean
        norms of one token's state): the relative magnitude of Samragh et al. 2023, arXiv 2312.09299.
    SIMILARITY: 1 - cosine of the block's input and output: the block influence of Men et al. 2024, ShortGPT, arXiv
        2403.03853, eq. 1.

    The last two need one pass of the whole model and no answers; a sample's value is the mean over the tokens of its
    prompt, vision tokens included and padding not.
    """

    ACCURACY_DROP = "accuracy_drop"
    NLL = "nll"
    ACTIVATION = "activation"
    SIMILARITY = "similarity"

    @property
    def needs_ablation(self) -> bool:
        """Whether it compares the model with and without the block, and not what goes into the block and comes out."""
        return self in (Method.ACCURACY_DROP, Method.NLL)


@dataclass(frozen=True)
class BlockScores:
    """The score of every block of one model.

    Attributes:
        scores: by block; higher is more important.
        standard_errors: of each score; None where a score has none, as in a file written by hand.
        method: how they were measured, if that is known.
        about: what else is known of them: `model` (fingerprint), `dataset`, `samples`, `seed` and the like, as text.
    """

    scores: tuple[float, ...]
    standard_errors: tuple[float | None, ...]
    method: Method | None = None
    about: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.standard_errors):
            raise ValueError(f"{len(self.scores)} scores with {len(self.standard_errors)} standard errors")
        if wrong := [block for block, score in enumerate(self.scores) if not math.isfinite(score)]:
            raise ValueError(f"the scores of blocks {', '.join(map(str, wrong))} are not finite")

    @property
    def num_blocks(self) -> int:
        return len(self.scores)

    def ranking(self) -> tuple[int, ...]:
        """Blocks from the most important to the least; of equal ones the earlier first."""
        return tuple(sorted(range(self.num_blocks), key=lambda block: (-self.scores[block], block)))


def select_blocks(scores: BlockScores, count: int, keep: Sequence[int] = FIRST_AND_LAST) -> tuple[int, ...]:
    """The `count` most important blocks, in ascending order; of equally important ones the earlier.

    Args:
        scores: of all blocks of the model.
        count: blocks to run.
        keep: blocks among them whatever their scores; -1 is the last block. Empty: the scores alone decide.

    Raises:
        KnobError: the model has no such number of blocks, or `keep` names none of its blocks or too many.
    """
    if reason := refuse_blocks(count, scores.num_blocks):
        raise KnobError(f"active_blocks {count}: {reason}")
    kept = kept_blocks(keep, scores.num_blocks)
    if len(kept) > count:
        named = ", ".join(map(str, sorted(kept)))
        raise KnobError(f"active_blocks {count}: keep alone names {len(kept)} blocks ({named})")
    others = [block for block in scores.ranking() if block not in kept]
    return tuple(sorted([*kept, *others[: count - len(kept)]]))


def kept_blocks(keep: Sequence[int], num_blocks: int) -> frozenset[int]:
    """The blocks that `keep` names in a model of `num_blocks` blocks, negative ones counted from the last.

    Raises:
        KnobError: the model does not have one of them.
    """
    if outside := [block for block in keep if not -num_blocks <= block < num_blocks]:
        named = ", ".join(map(str, outside))
        raise KnobError(f"keep {named}: the model has blocks 0 to {num_blocks - 1}, and -1 is the last")
    return frozenset(block % num_blocks for block in keep)

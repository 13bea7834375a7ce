"""The same answer with marks and without, alternated: what measuring costs, and a yardstick for the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from knobs.vision import VisionSetting
from workers.conditions import Conditions, Observer
from workers.measure import Prompt, Timing, time_bare, time_batch
from workers.models.adapter import VisionLanguageModel


@dataclass(frozen=True)
class Pair:
    """One marked and one bare answer, right after each other.

    Attributes:
        marked: with all stages.
        bare_ms: total of the one without marks.
        marked_at, bare_at: when each began.
        around_marked, around_bare: what held right before and right after each.
    """

    marked: Timing
    bare_ms: float
    marked_at: datetime
    bare_at: datetime
    around_marked: tuple[Conditions, Conditions]
    around_bare: tuple[Conditions, Conditions]


def time_pairs(
    vlm: VisionLanguageModel,
    prompt: Prompt,
    setting: VisionSetting,
    output_tokens: int,
    pairs: int,
    observer: Observer,
) -> Iterator[Pair]:
    """Pairs of answers as they are made; the first is marked first, the second bare first, and so on.

    The order alternates because what came before has an effect on an answer: on caches, on the allocator, on heat.
    Nothing is warmed up here.
    """
    for pair in range(pairs):
        marked: tuple[Timing, datetime, tuple[Conditions, Conditions]] | None = None
        bare: tuple[float, datetime, tuple[Conditions, Conditions]] | None = None
        for is_marked in (True, False) if pair % 2 == 0 else (False, True):
            begun, before = datetime.now(UTC), observer.snapshot()
            if is_marked:
                timing = time_batch(vlm, [prompt], setting, output_tokens)
                marked = timing, begun, (before, observer.snapshot())
            else:
                total_ms = time_bare(vlm, [prompt], setting, output_tokens)
                bare = total_ms, begun, (before, observer.snapshot())
        assert marked is not None
        assert bare is not None
        yield Pair(marked[0], bare[0], marked[1], bare[1], marked[2], bare[2])

"""The bench of a whole sweep runs at a tiny size, compares the same work, and has teeth."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import sweep

from knobs.vision import VisionSetting
from workers.tasks import Knobs


def test_the_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["--quick"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("`python bench/sweep.py --quick` on ")
    cells = {row[0]: row[1:] for line in lines if line.startswith("| ") for row in [line.strip("| ").split(" | ")]}
    assert cells["plain, timed once"][1:4] == ["81", "162", "162"]
    # One vision pass per image and setting, one prompt per sample and combination, in batches.
    assert cells["ours"][1:4] == ["9", "9", "81 in 27"]
    assert cells["floor"][2:4] == ["9", "81"]
    assert "Every image passed the tower 3 times, once per vision setting. All 27 answers" in out


SIZE = replace(sweep.QUICK, vision=("336x336",), samples=1)
KNOBS = Knobs(VisionSetting("image_size", "336x336"), 1, (0, 1))


def outcome(answer: str = "a", passes: int = 1) -> sweep.Spent:
    spent = sweep.Spent(counts=Counter(vision_passes=passes))
    spent.answers[KNOBS, "s"] = answer
    spent.scores[KNOBS, "s"] = 0.0
    spent.times[KNOBS] = {}
    return spent


def test_what_differs_ends_the_bench() -> None:
    sweep.check(outcome(), outcome(), [KNOBS], SIZE)
    with pytest.raises(AssertionError, match="1 of 1 answers differ"):
        sweep.check(outcome(), outcome("b"), [KNOBS], SIZE)
    with pytest.raises(AssertionError, match="2 vision passes of 1 images"):
        sweep.check(outcome(passes=2), outcome(), [KNOBS], SIZE)
    with pytest.raises(AssertionError, match="not complete"):
        sweep.check(outcome(), outcome(), [KNOBS, KNOBS], SIZE)


def test_the_floor_counts_what_must_happen_once() -> None:
    point = {"vision": "336x336", "num_active_blocks": 2}
    flops = {"vision_flops": 100, "projector_flops": 10, "prefill_flops": 1000, "decode_flops": 150, "flops": 1260}
    timed = [{"kind": "latency", **point, "moe_top_k": k, **flops} for k in (1, 2)]
    # Answers of 16 tokens and of 1, which needs no step.
    scored = [{"kind": "accuracy", **point, "moe_top_k": k, "output_tokens": n} for k in (1, 2) for n in (16, 1)]
    size = replace(SIZE, samples=2, timed_samples=1, repeats=3)
    found = sweep.floor(pd.DataFrame(timed + scored), size)
    assert found == {"vision": 220.0, "prefill": 4000.0, "decode": 300.0, "timed": 3 * 2 * 1260.0}

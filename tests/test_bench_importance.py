"""The bench of block importance runs at a tiny size, shares what it says, and simulates what it describes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import importance

from knobs.importance import Method


def test_the_tiny_run(capsys: pytest.CaptureFixture[str]) -> None:
    importance.main(["--tiny", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    ablations = [row for row in cells if row[0].startswith("ablation")]
    assert [row[1:5] for row in ablations] == [["17", "256", "136", "0.531"]] * 2
    assert ablations[0][5] == "0"
    # One token more than prefill makes, decoded by each candidate's own blocks.
    assert ablations[1][5] == "256"
    (beam,) = (row for row in cells if row[0].startswith("beam"))
    assert int(beam[3]) < 0.6 * int(beam[2])
    assert len([row for row in cells if row[0].endswith("%")]) == 6
    assert lines[0].startswith("`python bench/importance.py --tiny` on ")


def test_the_comparison_has_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="sharing has changed a value or a token"):
        importance.compared(importance.built(importance.TINY), [], lambda _vlm, _samples, share: {0: share}, repeats=0)


@pytest.mark.parametrize("accuracy", [0.55, 0.95])
def test_the_simulated_model_is_as_described(accuracy: float) -> None:
    values = importance.simulated(accuracy, samples=100_000)
    drops, rises = (values[method].to_numpy() for method in (Method.ACCURACY_DROP, Method.NLL))
    assert set(np.unique(drops)) == {-1.0, 0.0, 1.0}, "removing a block may also help"
    for measured in (drops, rises):
        assert (np.diff(measured.mean(axis=0)) > 0).all(), "the later a block, the more it matters"
    # Whoever loses the right answer loses likelihood.
    assert (rises[drops == 1] > 0).all()
    assert drops.mean(axis=0)[-1] < accuracy


def test_what_cannot_be_reached_is_none() -> None:
    values = importance.simulated(0.75, samples=64)[Method.ACCURACY_DROP]
    assert importance.samples_for_tau(values, [16, 32], draws=5) is None
    assert importance.samples_for_selection(values, [16, 32], draws=5) is None

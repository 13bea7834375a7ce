"""The bench of the driver runs at a small size, does what it says, and finds everything it wrote."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import scale

from workers.schema import TABLES
from workers.tasks import Kind


def test_the_quick_run(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--quick", "--address", cluster.address, "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`python bench/scale.py --quick` on ")
    cells = {row[0]: row[1:] for line in lines if line.startswith("| ") for row in [line.strip("| ").split(" | ")]}
    assert "plan of 200 tasks, 20 combinations" in cells
    assert cells["gap on a worker, the same"][0] == "p50 < 5 ms"
    assert cells["into the store alone"][1].endswith(" tasks/s")
    # A part and a row for every task, a row for every combination, sweep.json, run.json, lock and perhaps stamps.
    assert int(cells["result folder"][-1].split()[0]) in (423, 424)
    assert "resume: open, see what is done, catch up, a fresh process" in cells
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_has_the_tasks_it_is_asked_for() -> None:
    _, plan, _ = scale.planned(2000)
    assert Counter(task.kind for task in plan.tasks) == {Kind.LATENCY: 1800, Kind.ACCURACY: 200}
    assert not plan.skips
    rows = scale.Rows().result(plan.tasks[0], "cpu-0").rows
    assert rows is not None
    assert rows["task_id"].to_pylist() == [plan.tasks[0].task_id] * 2
    assert [name for name in rows.schema.names if rows[name].null_count] == ["error"]
    assert len(rows.schema) == len(TABLES["latency"])

"""From a sweep with `engine: graph` to its rows: they, their combination and the summary say what really decoded."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from handmade import failed_row, frame, samples, scored_row, task, timed_row
from ray.cluster_utils import Cluster
from recorded import Recording

from orchestrator.analysis import aggregate
from orchestrator.plan import make_plan
from orchestrator.resolve import planned_models, refuse_unavailable, resolve
from orchestrator.run import DONE, main
from orchestrator.spec import parse_sweep
from workers.measure import Timing, time_batch
from workers.models import loading
from workers.session import Session
from workers.tasks import Kind, Status, Task

SWEEP = """\
name: graphs
models: [{{name: {model}, engine: graph}}{more}]
datasets: [{{name: demo, samples: 3, max_new_tokens: 4}}]
knobs: {{active_blocks: [2]}}
latency: {{samples: 3, repeats: 2, visits: 1, output_tokens: 4, warmup: {warmup}}}
accuracy: {{batch_size: 2}}
"""
MODELS = ["tiny-smolvlm", "tiny-qwen3-vl-moe"]
NO_GRAPHS = "a CPU has no CUDA graphs"


def tasks(model: str, warmup: int = 1) -> dict[Kind, Task]:
    """The latency and the accuracy task of a sweep that asks for engine graph."""
    sweep = parse_sweep(SWEEP.format(model=model, more="", warmup=warmup))
    refuse_unavailable(sweep)
    cards, datasets = resolve(sweep, offline=True)
    plan = make_plan(sweep, planned_models(sweep, cards, ["cpu"]), datasets, ["cpu"])
    assert {task.model.engine for task in plan.tasks} == {"graph"}
    return {task.kind: task for task in plan.tasks}


def rows_of(session: Session, task: Task) -> pd.DataFrame:
    result = session.run(task)
    assert result.status is Status.DONE, result.traceback
    assert result.rows is not None
    return result.rows.to_pandas()


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.LATENCY, Kind.ACCURACY])
@pytest.mark.parametrize("model", MODELS)
def test_rows_of_a_cpu_say_eager_and_why(model: str, kind: Kind) -> None:
    with pytest.warns(UserWarning, match=NO_GRAPHS):
        rows = rows_of(Session("w", torch.device("cpu")), tasks(model)[kind])
    assert set(rows["engine"]) == {"eager"}
    assert set(rows["engine_note"]) == {NO_GRAPHS}
    assert set(rows["status"]) == {"done"}


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_rows_say_graph_and_none_of_them_holds_a_capture(
    model: str, warmup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is captured in a round of its own, before any warm-up of the protocol."""
    recording = Recording()
    monkeypatch.setattr(loading, "capture_on", lambda _: lambda: recording)
    captured: list[int] = []

    def noted(*arguments: Any) -> Timing:
        captured.append(recording.captured)
        return time_batch(*arguments)

    monkeypatch.setattr("workers.latency.time_batch", noted)
    session = Session("w", torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = {kind: replace(task, anchor=None) for kind, task in tasks(model, warmup).items()}
        rows = {kind: rows_of(session, task) for kind, task in made.items()}
    for table in rows.values():
        assert set(table["engine"]) == {"graph"}
        assert table["engine_note"].isna().all()
    per_round = 3
    assert len(captured) == per_round * (1 + warmup + 2)
    assert captured[0] == 0
    assert len(set(captured[per_round:])) == 1, "after the first round there is nothing left to capture"
    assert captured[-1] >= 1
    # The room for keys and values that was made, in 32-bit numbers: two blocks of 128 tokens or more.
    assert (rows[Kind.LATENCY]["kv_cache_bytes"] % (2 * 2 * 128 * 4) == 0).all()


def test_a_failed_row_says_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "data.jsonl").write_text('{"image": "broken.png", "question": "?", "answers": ["a"]}\n')
    text = SWEEP.format(model="tiny-smolvlm", more="", warmup=1).replace(
        "name: demo", f"name: mine, path: {tmp_path / 'data.jsonl'}, metric: exact_match"
    )
    sweep = parse_sweep(text.replace("samples: 3, max", "max"))
    cards, datasets = resolve(sweep, offline=True)
    plan = make_plan(sweep, planned_models(sweep, cards, ["cpu"]), datasets, ["cpu"])
    for planned in plan.tasks:
        rows = rows_of(Session("w", torch.device("cpu")), planned)
        assert rows[["status", "engine"]].values.tolist() == [["failed", "graph"]]
        assert rows["engine_note"].isna().all()


# -- combinations -----------------------------------------------------------------------------------------------------

TIMED, SCORED = task(Kind.LATENCY), task(Kind.ACCURACY)
A, B = samples(2)
EAGER = {"engine": "eager", "engine_note": NO_GRAPHS}


@pytest.mark.parametrize(
    ("latency", "accuracy", "expected"),
    [
        ([EAGER, EAGER], [EAGER, EAGER], ("eager", NO_GRAPHS)),
        ([{"engine": "graph"}] * 2, [EAGER, EAGER], ("graph", None)),  # scored elsewhere; the row's times are a graph's
        ([EAGER, {"engine": "graph"}], [], ("eager, graph", NO_GRAPHS)),
        ([], [EAGER, EAGER], ("eager", NO_GRAPHS)),
    ],
)
def test_a_combination_says_what_its_times_were_decoded_by(
    latency: list[dict[str, str]], accuracy: list[dict[str, str]], expected: tuple[str, str | None]
) -> None:
    found = aggregate(
        frame("latency", [timed_row(TIMED, ref) | used for ref, used in zip((A, B), latency, strict=False)]),
        frame("accuracy", [scored_row(SCORED, ref, 1.0) | used for ref, used in zip((A, B), accuracy, strict=False)]),
    )
    assert (found["engine"], found["engine_note"]) == expected


def test_failed_rows_do_not_say_what_decoded() -> None:
    failed = failed_row(TIMED, A) | {"engine": "graph"}
    found = aggregate(frame("latency", [failed, timed_row(TIMED, B) | EAGER]), frame("accuracy", []))
    assert found["engine"] == "eager"
    assert "engine" not in aggregate(frame("latency", [failed]), frame("accuracy", []))


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_sweep_that_asks_for_graphs_on_a_cpu(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "graphs.yaml"
    spec.write_text(SWEEP.format(model="tiny-smolvlm", more=", tiny-smolvlm", warmup=1))
    given = [str(spec), "--results", str(tmp_path)]
    note = "note     tiny-smolvlm: a CPU has no CUDA graphs, so on one it decodes by engine eager\n"

    assert main([*given, "--dry-run"]) == DONE
    assert note in capsys.readouterr().out

    assert main([*given, "--address", cluster.address]) == DONE
    out = capsys.readouterr().out
    assert note in out
    assert f"note     tiny-smolvlm on cpu: engine eager in 1 combination: {NO_GRAPHS}\n" in out

    asked_for_graph = []
    for table in ("latency", "accuracy", "combinations"):
        rows = pd.read_parquet(tmp_path / "graphs" / table)
        assert set(rows["engine"]) == {"eager"}, table
        assert set(rows["engine_note"].dropna()) == {NO_GRAPHS}
        # The model that was to be eager all along is another combination, and has nothing to note.
        assert rows.groupby("combination_id")["engine_note"].nunique(dropna=False).eq(1).all()
        asked_for_graph.append(set(rows.loc[rows["engine_note"].notna(), "combination_id"]))
    assert asked_for_graph[0] == asked_for_graph[1] == asked_for_graph[2]
    assert len(asked_for_graph[0]) == 1

    assert main([*given, "--address", cluster.address]) == DONE
    assert "4 done, 0 failed before, 0 to run" in capsys.readouterr().out, "what was asked for is done"

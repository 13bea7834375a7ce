"""A sweep from the command line to the tables, on a real Ray cluster with real workers and tiny models."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from PIL import Image
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from orchestrator.run import DONE, INTERRUPTED, SOME_FAILED, WRONG, main
from workers.schema import STAGES, SUMMARISED

REPOSITORY = Path(__file__).parents[1]

SMALL = """\
name: small
models: [{models}]
datasets: [{{name: demo, samples: {samples}, max_new_tokens: 2}}]
knobs:
  longest_edge: [32, 64]
  moe_top_k: [1, 4]
  active_blocks: {blocks}
latency: {{samples: 2, repeats: 2, visits: 1, output_tokens: 3}}
accuracy: {{batch_size: 4}}
"""


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`python -m orchestrator.run` in this process: text of a sweep and further arguments to (code, stdout, stderr)."""

    def run_sweep(text: str, *arguments: str, address: str | None = None) -> tuple[int, str, str]:
        spec = tmp_path / "sweep.yaml"
        spec.write_text(text)
        given = [str(spec), "--results", str(tmp_path / "results"), "--address", address or cluster.address]
        code = main([*given, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run_sweep


def small(models: str = "tiny-smolvlm", samples: int = 4, blocks: str = "[2]") -> str:
    return SMALL.format(models=models, samples=samples, blocks=blocks)


def read(tmp_path: Path, table: str) -> pd.DataFrame:
    """What a user does: pandas over the folder."""
    return pd.read_parquet(tmp_path / "results" / "small" / table)


def test_a_sweep_measures_every_stage_of_every_combination(run, tmp_path: Path) -> None:
    code, out, _ = run(small("tiny-smolvlm, tiny-internvl, tiny-qwen3-vl-moe"))

    assert code == DONE
    combinations = read(tmp_path, "combinations")
    # two vision levels, no dial of its own, two top-k levels
    assert combinations.groupby("model").size().to_dict() == {
        "tiny-smolvlm": 2,
        "tiny-internvl": 1,
        "tiny-qwen3-vl-moe": 2,
    }
    # Whatever else keeps this machine busy makes rows invalid, and never makes them disappear.
    assert (combinations["num_timed"] + combinations["num_invalid"] == 4).all()
    undisturbed = combinations[combinations["num_timed"] == 4]
    for name in SUMMARISED:
        assert (undisturbed[f"{name}_p50"] > 0).all(), name
        assert undisturbed[f"{name}_ci95"].notna().all(), name
    assert (undisturbed["flops"] > 0).all()
    assert (undisturbed["stopped_by"] == "repeats").all()
    assert (undisturbed["kv_cache_bytes"] > 0).all()
    assert (combinations["num_failed"] == 0).all()
    assert (combinations["num_samples"] == 4).all()
    assert combinations["accuracy"].between(0, 1).all()
    # Every row can be traced to what it ran in, which stands in the folder once.
    environments = read(tmp_path, "environments").set_index("environment_id")
    assert environments.index.is_unique
    for table in ("latency", "accuracy"):
        named = set(read(tmp_path, table)["environment_id"])
        assert named <= set(environments.index)
        assert environments.loc[sorted(named), "torch_version"].notna().all()
    assert combinations["device_name"].notna().all()
    dense = combinations["model"] != "tiny-qwen3-vl-moe"
    assert combinations.loc[dense, "moe_top_k"].isna().all()
    assert sorted(combinations.loc[~dense, "moe_top_k"]) == [1, 4]

    latency = read(tmp_path, "latency")
    assert len(latency) == 5 * 2 * 2
    assert (latency["decode_step_ms"].map(len) == 2).all()
    assert (latency[list(STAGES)] > 0).all().all()
    assert (latency["residual_ms"] >= 0).all(), "the total is taken round all the stages"
    assert (latency["ttft_ms"] < latency["total_ms"]).all()
    assert (latency["threads"] == 1).all()
    assert (latency["niceness"] == 0).all()
    assert len(read(tmp_path, "accuracy")) == 5 * 4
    tasks = read(tmp_path, "tasks")
    assert (tasks["status"] == "done").all()
    assert len(tasks) == 10

    lines = out.splitlines()
    assert lines[0] == lines[-1] == f"results: {tmp_path / 'results' / 'small'}"
    assert "tiny-qwen3-vl-moe" in out
    assert "dropped  tiny-smolvlm: moe_top_k dropped, the model is dense" in out


def test_the_same_command_again_measures_nothing_and_more_levels_only_the_difference(run, tmp_path: Path) -> None:
    assert run(small())[0] == DONE
    before = read(tmp_path, "latency").sort_values("started_at")

    code, out, _ = run(small())
    assert code == DONE
    assert "4 tasks: 2 latency, 2 accuracy; 4 done, 0 failed before, 0 to run" in out
    pd.testing.assert_frame_equal(read(tmp_path, "latency").sort_values("started_at"), before)

    code, out, _ = run(small(blocks="[2, 3]"))
    assert code == DONE
    assert "4 done, 0 failed before, 4 to run" in out
    after = read(tmp_path, "latency")
    assert len(after) == 2 * len(before)
    assert set(before["started_at"]) < set(after["started_at"])


def test_a_dry_run_tells_what_is_done_already(run) -> None:
    run(small())
    code, out, _ = run(small(blocks="[2, 9]"), "--dry-run")
    assert code == DONE
    assert "4 tasks: 2 latency, 2 accuracy; 4 done, 0 failed before, 0 to run" in out
    assert "skipped  tiny-smolvlm: longest_edge=32, active_blocks=9: the model has 6 blocks" in out


def test_a_value_the_model_cannot_take_is_a_skipped_row_and_the_others_run(run, tmp_path: Path) -> None:
    code, _, _ = run(small("tiny-qwen3-vl-moe", blocks="[2, 9]"))
    assert code == DONE
    tasks = read(tmp_path, "tasks")
    skipped = tasks[tasks["status"] == "skipped"]
    assert sorted(skipped["moe_top_k"]) == [1, 4]
    assert set(skipped["reason"]) == {"the model has 6 blocks, so active_blocks must be 1 to 6"}
    assert len(read(tmp_path, "combinations")) == 2


def test_a_truncated_image_is_a_failed_row_and_the_sweep_goes_on(run, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (60, 40), (80 * i, 90, 200)).save(folder / f"{i}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    rows = [f'{{"image": "{i}.png", "question": "What is it?", "answers": ["a"]}}\n' for i in range(3)]
    (folder / "photos.jsonl").write_text("".join(rows))
    text = small().replace(
        "datasets: [{name: demo, samples: 4, max_new_tokens: 2}]",
        "datasets: [{name: photos, path: photos/photos.jsonl, metric: exact_match}]",
    )
    code, out, _ = run(text.replace("samples: 2, repeats", "samples: 3, repeats"))

    assert code == SOME_FAILED
    # two vision levels, each timed and scored
    assert "1 sample in 4 rows" in out
    accuracy = read(tmp_path, "accuracy")
    failed = accuracy[accuracy["status"] == "failed"]
    assert set(failed["sample_id"]) == {"photos:test:1"}
    assert failed["error"].str.contains("truncated").all()
    assert failed["score"].isna().all()
    combinations = read(tmp_path, "combinations")
    assert (combinations["num_failed"] == 1).all()
    assert (combinations["num_samples"] == 2).all()
    assert (combinations["num_timed"] + combinations["num_invalid"] == 4).all()


def test_a_model_that_cannot_be_loaded_fails_its_tasks_at_once_and_others_are_measured(run, tmp_path: Path) -> None:
    broken = small("{name: tiny-internvl, attention: flash_attention_2}, tiny-smolvlm")
    code, out, _ = run(broken)
    assert code == SOME_FAILED
    tasks = read(tmp_path, "tasks")
    failed = tasks[tasks["status"] == "failed"]
    assert set(failed["model"]) == {"tiny-internvl"}
    assert set(failed["failure"]) == {"model_load"}
    assert failed["reason"].str.startswith("tiny-internvl cannot be loaded: ").all()
    assert set(read(tmp_path, "combinations")["model"]) == {"tiny-smolvlm"}
    assert "failed   tiny-internvl" in out

    code, out, _ = run(broken)
    assert code == SOME_FAILED
    assert "2 failed before, 0 to run" in out
    code, out, _ = run(broken, "--retry-failed")
    assert code == SOME_FAILED
    assert "0 failed before, 2 to run" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("moe_top_k", "moe_topk"), "sweep.yaml:6: knobs.moe_topk: unknown key, did you mean moe_top_k?"),
        (("[1, 4]", "[0]"), "sweep.yaml:6: knobs.moe_top_k[0]: must be a whole number >= 1"),
        (("tiny-smolvlm", "tiny-smolvl"), "sweep.yaml:2: models[0]: unknown model 'tiny-smolvl', did you mean tiny-"),
        (("tiny-smolvlm", "./models/mine"), "sweep.yaml:2: models[0]: model folder ./models/mine does not exist"),
        (("name: demo", "name: dmeo"), "sweep.yaml:3: datasets[0]: data set 'dmeo': neither a preset"),
        (("name: demo", "name: x, metric: exact_match, path: no.json"), "data set 'x': no file or folder"),
        (
            ("latency:", "hardware: [{accelerator: cpu, min_memory_gb: 99999}]\nlatency:"),
            "GB, the sweep wants 99999 GB",
        ),
        (("repeats: 2", "max_relative_error: 2"), "latency.max_relative_error: must be a number between 0 and 1"),
        (
            ("latency:", "hardware: [{accelerator: H100}]\nlatency:"),
            "the sweep asks for H100 (sweep.yaml:8), but the cluster has: 2 CPU cores; --wait MINUTES waits for more",
        ),
    ],
)
def test_what_is_wrong_ends_the_run_with_one_clear_line(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(small().replace(*change))
    code, _, err = run(small().replace(*change))
    assert code == WRONG
    assert message in err.replace(f"{tmp_path}/", "")
    assert len([line for line in err.strip().splitlines() if " tasks done" not in line]) == 1


def test_a_sweep_file_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweeps/nowhere.yaml"]) == WRONG
    assert "sweeps/nowhere.yaml" in capsys.readouterr().err


def test_a_folder_that_is_not_ours_is_left_alone(run, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "small"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    code, _, err = run(small())
    assert code == WRONG
    assert "is not a result folder of this tool (no sweep.json; it holds thesis.tex)" in err
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_an_address_where_nobody_listens_is_an_answer_within_seconds(run) -> None:
    code, _, err = run(small(), address="127.0.0.1:9")
    assert code == WRONG
    assert err == "no Ray cluster at 127.0.0.1:9 (Connection refused)\n"


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_has_finished_and_the_same_command_goes_on(
    cluster: Cluster, run, tmp_path: Path, number: int
) -> None:
    text = small("tiny-smolvlm, tiny-internvl", samples=12, blocks="[1, 2, 3, 4, 5, 6]")
    process = _started(text, tmp_path, cluster)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert process.returncode == INTERRUPTED, err
    assert "stopping; what has finished is kept" in err
    assert "interrupted: " in out
    kept = set(read(tmp_path, "latency")["task_id"])
    assert 0 < len(kept) < 24

    code, out, _ = run(text)
    assert code == DONE
    assert "0 failed before" in out
    tasks = read(tmp_path, "tasks")
    assert tasks["task_id"].is_unique
    assert len(tasks) == 2 * 18
    assert kept < set(read(tmp_path, "latency")["task_id"])


@pytest.mark.chaos
def test_a_killed_driver_loses_nothing_that_was_committed(cluster: Cluster, run, tmp_path: Path) -> None:
    text = small(samples=12, blocks="[1, 2, 3, 4, 5, 6]")
    process = _started(text, tmp_path, cluster)
    process.kill()
    process.communicate(timeout=60)
    kept = read(tmp_path, "latency").set_index(["task_id", "sample_id", "repeat"])["total_ms"]

    code, _, _ = run(text)
    assert code == DONE
    tasks = read(tmp_path, "tasks")
    assert tasks["task_id"].is_unique
    assert len(tasks) == 24
    after = read(tmp_path, "latency").set_index(["task_id", "sample_id", "repeat"])["total_ms"]
    assert after.index.is_unique
    assert (after[kept.index] == kept).all(), "what was committed is not measured again"


@pytest.mark.chaos
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_counted_twice(
    cluster: Cluster, run, tmp_path: Path
) -> None:
    text = small(samples=12, blocks="[1, 2, 3, 4, 5, 6]")
    process = _started(text, tmp_path, cluster)
    os.kill(_busy_worker(cluster), signal.SIGKILL)
    out, err = process.communicate(timeout=120)

    assert process.returncode == DONE, out + err
    tasks = read(tmp_path, "tasks")
    assert tasks["task_id"].is_unique
    assert len(tasks) == 24
    assert (tasks["status"] == "done").all()
    assert tasks["attempts"].max() == 2


def _started(text: str, tmp_path: Path, cluster: Cluster) -> subprocess.Popen[str]:
    """A run in a process of its own that has committed its first result."""
    (tmp_path / "sweep.yaml").write_text(text)
    command = [sys.executable, "-m", "orchestrator.run", str(tmp_path / "sweep.yaml")]
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path / "results"), "--address", cluster.address],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "results" / "small" / "latency").rglob("*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def _busy_worker(cluster: Cluster) -> int:
    """Process id of a worker in the middle of a task; Ray titles its processes after what they are doing."""
    raylet = psutil.Process(cluster.head_node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid)
    while True:
        for process in raylet.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::run["):
                    return process.pid
        time.sleep(0.01)

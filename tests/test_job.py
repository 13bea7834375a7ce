"""The sweep as a Ray job: submitted to a head with its dashboard, with results that outlive the job's own folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pandas as pd
import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

SWEEP = """\
name: submitted
models: [tiny-smolvlm]
datasets: [{name: demo, samples: 2, max_new_tokens: 2}]
knobs: {longest_edge: [32], active_blocks: [2, 99]}
latency: {samples: 1, repeats: 1, output_tokens: 2}
"""


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head() -> Iterator[str]:
    """URL of the dashboard of a Ray head in processes of its own, started with this environment on its PATH."""
    # Ray's sockets live below this folder, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    port = free_port()
    process = subprocess.Popen(
        [
            *(BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *(f"--port={free_port()}", f"--dashboard-port={port}", f"--temp-dir={folder}"),
            # By default a fixed one, which the cluster that other tests share has taken.
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:  # blocks until Ray says that it runs, or ends
        if "Ray runtime started" in line:
            break
    yield f"http://127.0.0.1:{port}"
    # All at once: asked politely, the parts of a head wait for one another.
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_sweep_leaves_its_results_outside_the_jobs_folder(head: str, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for package in ("orchestrator", "workers", "knobs", "sweeps"):
        shutil.copytree(REPOSITORY / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "sweeps" / "submitted.yaml").write_text(SWEEP)
    submit = [
        *(BIN / "ray", "job", "submit", "--address", head, "--working-dir", copy),
        *("--runtime-env-json", f'{{"env_vars": {{"SWEEP_RESULTS_ROOT": "{tmp_path}"}}}}', "--"),
        *("python", "-m", "orchestrator.run", "sweeps/submitted.yaml"),
    ]
    for _ in range(20):
        submitted = subprocess.run(
            submit,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        # A head says that it runs a moment before its agent, which starts jobs, has come up.
        if "No available agent" not in submitted.stderr + submitted.stdout:
            break

    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    place = tmp_path / "results" / "submitted"
    lines = [line for line in submitted.stdout.splitlines() if line.startswith("results: ")]
    assert lines == [f"results: {place}"] * 2
    assert len(pd.read_parquet(place / "combinations")) == 1
    assert sorted(pd.read_parquet(place / "tasks")["status"]) == ["done", "done", "skipped"]

"""The record of what a worker runs in: complete, the same twice, another after a switch, without secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from nvml_recorded import UUID, RecordedNvml

from workers.code_version import PACKAGES, ROOT, code_version, git_state, source_digest
from workers.environment import ENVIRONMENT_COLUMNS, ID_DIGITS, environment, environment_id
from workers.environment_variables import WITHHELD, variables_that_matter
from workers.nvml import Gpu

CPU = torch.device("cpu")


def test_the_record_fills_its_columns() -> None:
    record = environment(CPU)
    assert set(record) == {column.name for column in ENVIRONMENT_COLUMNS}
    schema = pa.schema([(column.name, column.type) for column in ENVIRONMENT_COLUMNS])
    assert pa.Table.from_pylist([record], schema=schema).to_pylist() == [
        {column.name: record[column.name] for column in ENVIRONMENT_COLUMNS}
    ]


def test_columns_are_declared_once_with_unit_and_meaning() -> None:
    names = [column.name for column in ENVIRONMENT_COLUMNS]
    assert len(names) == len(set(names))
    endings = {"MHz": "_mhz", "W": "_w", "byte": "_bytes", "s": "_s", "ms": "_ms", "°C": "_c", "J": "_j"}
    for column in ENVIRONMENT_COLUMNS:
        assert len(column.meaning) >= 7
        for unit, ending in endings.items():
            assert (column.unit == unit) == column.name.endswith(ending), column.name


def test_what_is_known_on_any_machine() -> None:
    record = environment(CPU)
    assert record["torch_version"] == torch.__version__
    assert record["python_version"] == sys.version.split()[0]
    for name in (
        "host",
        "device_name",
        "cpu_name",
        "kernel",
        "operating_system",
        "transformers_version",
        "ray_version",
    ):
        assert record[name], name
    assert 0 < record["cpu_usable_cores"] <= record["cpu_logical_cores"]
    assert record["threads"] == torch.get_num_threads()
    assert record["device_uuid"] is None
    assert len(record["environment_id"]) == ID_DIGITS


def test_the_id_is_the_same_twice_and_in_another_process() -> None:
    first = environment(CPU)
    assert environment(CPU) == first
    code = (
        "import torch; from workers.environment import environment;"
        f"torch.set_num_threads({torch.get_num_threads()});"
        "print(environment(torch.device('cpu'))['environment_id'])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_the_id_is_of_everything_else() -> None:
    record = environment(CPU)
    assert environment_id(record) == record["environment_id"]
    for name in record.keys() - {"environment_id"}:
        assert environment_id(record | {name: "another"}) != record["environment_id"], name


@pytest.fixture
def switches() -> Iterator[None]:
    """Puts back what a test turns."""
    benchmark, precision = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cuda.enable_flash_sdp(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("switches")
def test_a_switch_that_is_turned_changes_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [environment(CPU)["environment_id"]]
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    ids.append(environment(CPU)["environment_id"])
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    record = environment(CPU)
    assert record["float32_matmul"] == "tf32"
    ids.append(record["environment_id"])
    torch.backends.cuda.enable_flash_sdp(False)
    record = environment(CPU)
    assert "flash" not in record["attention_kernels"]
    ids.append(record["environment_id"])
    torch.use_deterministic_algorithms(True)
    ids.append(environment(CPU)["environment_id"])
    monkeypatch.setenv("OMP_PROC_BIND", "spread")
    ids.append(environment(CPU)["environment_id"])
    assert len(set(ids)) == len(ids)


def test_settings_of_the_gpu_are_in_it() -> None:
    record = environment(CPU, Gpu(UUID, RecordedNvml()))
    assert record["driver_version"] == "570.124.06"
    assert record["power_limit_w"] == pytest.approx(700.0)
    assert (record["persistence_mode"], record["mig"], record["ecc"]) == (True, False, True)
    assert record["compute_mode"] == "default"
    assert record["environment_id"] != environment(CPU)["environment_id"]


# -- environment variables --------------------------------------------------------------------------------------------


def test_variables_that_matter_are_kept() -> None:
    kept = {
        "OMP_NUM_THREADS": "4",
        "MKL_NUM_THREADS": "4",
        "CUDA_VISIBLE_DEVICES": "GPU-8f2b1c9d-1111-2222-3333-444455556666",
        "CUDA_LAUNCH_BLOCKING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": "/scratch/torch",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": "/data/hub",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": "/usr/lib/libjemalloc.so.2",
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    others = {"PATH": "/usr/bin", "HOME": "/home/someone", "SHELL": "/bin/sh", "EDITOR": "ed"}
    assert variables_that_matter(kept | others) == kept


def test_secrets_are_not_in_it() -> None:
    secret = "s3cr3t"
    by_name = {
        "HF_TOKEN": secret,
        "HF_TOKEN_PATH": secret,
        "NVIDIA_API_KEY": secret,
        "TORCH_AUTH": secret,
        "NCCL_PASSWORD": secret,
        "CUDA_SECRETS": secret,
        "TRANSFORMERS_APIKEY": secret,
        "HF_CREDENTIALS": secret,
    }
    assert variables_that_matter(by_name) == {}
    by_value = {
        "HF_ENDPOINT": "https://someone:pass@hub.example.org",
        "HF_HUB_NOTE": "hf_abcdefghijklmnop",
        "PYTORCH_NOTE": "Bearer eyJhbGciOi",
        "CUDA_NOTE": "AKIAIOSFODNN7EXAMPLE",
        "OMP_NOTE": "q8Zr5Tn2Vx7Lk3Wp9Bs4Hd6Jf1Mg0CyQ",
    }
    assert variables_that_matter(by_value) == dict.fromkeys(sorted(by_value), WITHHELD)


def test_a_secret_in_the_environment_does_not_reach_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotforothers")
    monkeypatch.setenv("HF_HUB_MIRROR", "https://user:thisisnotforothers@example.org")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "thisisnotforothers")
    record = environment(CPU)
    assert "thisisnotforothers" not in json.dumps(record)
    assert json.loads(record["environment_variables"])["HF_HUB_MIRROR"] == WITHHELD


# -- code -------------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one file."""
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_commit_and_whether_files_differ_from_it(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == (commit, False)
    (checkout / "results").mkdir()
    (checkout / "results" / "rows.parquet").write_text("not code")
    assert git_state(checkout) == (commit, False)
    (checkout / "a.py").write_text("a = 2\n")
    assert git_state(checkout) == (commit, True)


def test_a_hook_does_not_lead_to_its_own_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    assert git_state(checkout)[1] is False


def test_no_commit_without_a_checkout_of_its_own(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert git_state(installed) == (None, None)


def test_no_commit_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) == (None, None)


def test_a_broken_repository_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    assert git_state(tmp_path) == (None, None)


def test_the_digest_follows_the_code_and_not_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        for package in PACKAGES:
            folder = tmp_path / place / package
            folder.mkdir(parents=True)
            (folder / "a.py").write_text(f"name = {package!r}\n")
    one, two = tmp_path / "one", tmp_path / "two"
    assert source_digest(one) == source_digest(two)
    (two / "knobs" / "notes.txt").write_text("no code\n")
    assert source_digest(one) == source_digest(two)
    (two / "knobs" / "a.py").write_text("name = 'other'\n")
    assert source_digest(one) != source_digest(two)


def test_the_code_of_this_project() -> None:
    code = code_version()
    assert code is code_version()
    assert len(code.digest) == 32
    if (ROOT / ".git").exists() and git_state(ROOT)[0]:
        assert len(code.commit or "") == 40
        assert code.dirty in (True, False)

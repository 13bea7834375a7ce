"""What the documentation shows works: commands, sweeps, Python blocks, links and figures are run or checked here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.run import main
from orchestrator.spec import parse_sweep
from workers.models import REGISTERED

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of a page, the README by default, in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Command lines of the README without their comments."""
    lines = "".join(blocks("bash")).splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks("yaml", page.read_text())])
def test_every_sweep_shown_is_a_sweep(text: str) -> None:
    assert parse_sweep(text).models


def test_the_first_sweep_shown_can_be_planned_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-sweep.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    shown = next(command for command in commands() if command.endswith("--dry-run"))
    assert shlex.split(shown)[:4] == ["python", "-m", "orchestrator.run", "my-sweep.yaml"]
    assert main(shlex.split(shown)[3:]) == 0


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_every_make_command_is_a_target(command: str) -> None:
    dry = subprocess.run([*shlex.split(command), "--dry-run"], cwd=REPOSITORY, capture_output=True, check=False)
    assert dry.returncode == 0, dry.stderr


def test_every_option_shown_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    runs = [command.split("orchestrator.run", 1)[1] for command in commands() if "orchestrator.run" in command]
    assert runs
    for shown in runs:
        assert set(re.findall(r"--[a-z-]+", shown)) <= known, shown


@pytest.mark.parametrize("command", [c for c in commands() if "-m knobs." in c])
def test_every_command_about_images_works(command: str, tmp_path: Path) -> None:
    arguments = shlex.split(command)[1:]
    if "knobs.preview" in command:
        arguments += ["--out", str(tmp_path / "preview.png")]
    ran = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout


@pytest.mark.parametrize(
    "shown", [block for page in PAGES for block in blocks("console", page.read_text())], ids=lambda text: text[:70]
)
def test_what_a_page_shows_is_what_the_command_prints(shown: str) -> None:
    command, _, expected = shown.partition("\n")
    arguments = shlex.split(command.removeprefix("$ python "))
    ran = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout == expected


def test_the_validation_shown_works_on_a_result_folder(small_results: Path, tmp_path: Path) -> None:
    shutil.copytree(small_results, tmp_path / "results" / "demo")
    (shown,) = blocks("python", (REPOSITORY / "docs" / "vision-knob.md").read_text())
    ran = subprocess.run([sys.executable, "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "mean_mismatch" in ran.stdout


def test_the_pandas_lines_work_on_a_result_folder(small_results: Path, tmp_path: Path) -> None:
    shutil.copytree(small_results, tmp_path / "results" / "demo")
    shown = next(block for block in blocks("python") if "pd.read_parquet" in block)
    ran = subprocess.run([sys.executable, "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "tiny-smolvlm" in ran.stdout


def test_the_python_lines_work() -> None:
    shown = next(block for block in blocks("python") if "time_answer" in block)
    ran = subprocess.run([sys.executable, "-c", shown], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    prefill_ms, tpot_ms = map(float, ran.stdout.split())
    assert prefill_ms > 0 < tpot_ms


def test_the_models_named_are_the_models_there_are() -> None:
    listed = README.split("Models that a sweep can name:")[1].split("Any other")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == set(REGISTERED)


def test_the_percentile_floors_stated_are_the_floors() -> None:
    from orchestrator.analysis import sample_floor

    stated = re.search(r"\((\d+) rows for the 90th, (\d+) for the\s+95th, (\d+) for the 99th\)", README)
    assert stated is not None
    assert [int(n) for n in stated.groups()] == [sample_floor(q) for q in (0.9, 0.95, 0.99)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_broken(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_exists(page: Path) -> None:
    for name in re.findall(r"`((?:orchestrator|workers|knobs|sweeps|tests|docs)/[\w./-]+)`", page.read_text()):
        assert (REPOSITORY / name).exists(), name

"""The arrows of the house: imports point orchestrator -> workers -> knobs, and planning loads no torch and no Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("knobs", "workers", "orchestrator")  # each may import itself and those before it
FILES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which layer they reach"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    assert not imported(path) & set(above)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_the_driver_knows_ray(path: Path) -> None:
    if path.relative_to(REPOSITORY).parts[0] != "orchestrator":
        assert "ray" not in imported(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_file_says_in_one_sentence_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, path
    assert docstring.splitlines()[0].endswith((".", ":")), path


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_driver_imports_no_torch() -> None:
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.parts[-2] == "orchestrator" or "analysis" in path.parts
    ]
    assert "orchestrator.schedule" in modules
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    loaded = run_python(code)
    assert loaded.returncode == 0, loaded.stderr
    assert not {"torch", "transformers"} & set(loaded.stdout.split())


@pytest.mark.parametrize(
    "sweep", sorted(p.name for p in (REPOSITORY / "sweeps").glob("*.yaml") if p.stem != "datasets")
)
def test_a_dry_run_needs_neither_torch_nor_ray_nor_weights(sweep: str, tmp_path: Path) -> None:
    arguments = [f"sweeps/{sweep}", "--dry-run", "--results", str(tmp_path / "results")]
    code = (
        "import sys\n"
        "from orchestrator.run import main\n"
        f"code = main({arguments!r})\n"
        "print('loaded', *sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    dry = run_python(code)
    assert dry.returncode == 0, dry.stderr
    assert " combinations (" in dry.stdout
    assert " 0 done, 0 failed before" in dry.stdout
    assert dry.stdout.splitlines()[-1] == "loaded"
    assert not (tmp_path / "results").exists()

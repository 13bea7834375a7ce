"""Which code is running: its version, its commit, and a digest of its files, which is there when no git is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "vlm-knobs"
PACKAGES = ("knobs", "workers", "orchestrator")

# A cold file system can make git slow; a record is not worth waiting for longer.
GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class CodeVersion:
    """The code of this project that is running.

    Attributes:
        version: of the installed distribution; None if it runs from files that were never installed.
        commit, dirty: None where there is neither git nor a note of the installer, as in the copy that a Ray job runs.
        digest: of all its modules, the same for the same code wherever it lies.
    """

    version: str | None
    commit: str | None
    dirty: bool | None
    digest: str


@cache
def code_version() -> CodeVersion:
    """Found once per process, for what is imported does not change with the files."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = None
    commit, dirty = git_state(ROOT)
    return CodeVersion(version, commit or _installed_commit(), dirty, source_digest(ROOT))


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root` and whether tracked files differ from it; None where git does not say.

    Only a checkout of its own counts: a package that was installed below another project's checkout is none of that
    project's code.
    """
    if not (root / ".git").exists():  # a file in a worktree
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if changes is None else bool(changes)


def source_digest(root: Path) -> str:
    """Of the modules below `root`, by name and content."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()[:32]


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None if there is none, it refuses, or it takes too long. Writes nothing."""
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", "-c", "core.fsmonitor=false", *arguments]
    # Inside a hook git points at the repository that the hook belongs to.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _installed_commit() -> str | None:
    """The commit that an installer notes for a distribution from a repository (PEP 610), if it is what is running."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
        note = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if Path(str(distribution.locate_file("workers"))).resolve() != ROOT / "workers":
        return None
    commit = note.get("vcs_info", {}).get("commit_id")
    return commit if isinstance(commit, str) else None

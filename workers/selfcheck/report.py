"""How a self-check speaks: progress meanwhile, the lines of the machine and of its checks, and the file."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rich.progress
from rich.console import Console

from workers.conditions import condition_columns
from workers.selfcheck.answer_checks import Check, count
from workers.selfcheck.figures import Figures, Measured

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_LOOKS = 0.5


class Progress:
    """What a person sees meanwhile, on standard error: a bar on a terminal, a line now and then anywhere else.

    Nothing is drawn while an answer is timed: the bar has no thread of its own. A context manager; nothing may be
    written to standard output inside.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        console = Console(file=sys.stderr)
        words, note = (rich.progress.TextColumn(f"{{task.{name}}}") for name in ("description", "fields[note]"))
        self._bar = rich.progress.Progress(
            words, rich.progress.BarColumn(), note, console=console, auto_refresh=False, transient=True
        )
        self._row = self._bar.add_task("", total=seconds, note="")
        self._on_terminal = console.is_terminal

    def __enter__(self) -> Self:
        if self._on_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._on_terminal:
            self._bar.stop()

    def phase(self, what: str) -> None:
        """Something else begins."""
        self._last = time.monotonic()
        if self._on_terminal:
            self._bar.update(self._row, description=what, refresh=True)
        else:
            print(f"{what} ...", file=sys.stderr, flush=True)

    def at(self, seconds: float, pairs: int) -> None:
        """So far; shown now and then."""
        now = time.monotonic()
        if now - self._last < (SECONDS_BETWEEN_LOOKS if self._on_terminal else SECONDS_BETWEEN_LINES):
            return
        self._last = now
        note = f"{seconds:.0f} of {self._seconds:.0f} s, {pairs} pairs"
        if self._on_terminal:
            self._bar.update(self._row, completed=seconds, note=note, refresh=True)
        else:
            print(note, file=sys.stderr, flush=True)


def environment_lines(found: Mapping[str, Any]) -> Iterable[str]:
    """The machine and the software of a record of `workers.environment`, in a few lines."""
    limit, most = found["power_limit_w"], found["default_power_limit_w"]
    device = [
        found["device_name"],
        found["driver_version"] and f"driver {found['driver_version']}",
        found["cuda_version"] and found["device_uuid"] and f"CUDA {found['cuda_version']}",
        limit and f"{limit:.0f} W" + (f" of {most:.0f} W by default" if most else ""),
        found["device_uuid"] and f"{found['device_memory_bytes'] / 1024**3:.0f} GiB",
    ]
    processor = [
        found["cpu_name"] if found["device_uuid"] else None,
        f"{found['cpu_usable_cores']} of {found['cpu_logical_cores']} logical cores",
        f"torch uses {count(found['threads'], 'thread')}",
        found["cpu_capability"],
        found["container"] and f"in {found['container']}",
    ]
    packages = [f"{name} {found[f'{name}_version']}" for name in ("torch", "transformers")]
    system = [found["operating_system"], f"kernel {found['kernel']}", f"Python {found['python_version']}", *packages]
    version = found["project_version"] and f"vlm-knobs {found['project_version']}"
    commit = found["code_commit"]
    changed = " with changes" if found["code_dirty"] else ""
    code = f"commit {commit[:12]}{changed}" if commit else f"digest {found['code_digest'][:12]}"
    yield f"device      {_listed(device)}"
    yield f"processor   {_listed(processor)}"
    yield f"software    {_listed(system)}"
    yield f"code        {_listed([version, code])}"
    yield f"variables   {_listed(f'{name}={value}' for name, value in _variables(found)) or 'none that matter'}"


def _variables(found: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    with suppress(TypeError, ValueError):
        return sorted(json.loads(found["environment_variables"]).items())
    return []


def _listed(parts: Iterable[str | None]) -> str:
    return ", ".join(part for part in parts if part)


def check_lines(judged: Sequence[Check]) -> Iterable[str]:
    """A line per check, and one below it where there is something to do."""
    width = max(len(check.name) for check in judged)
    yield f"{'verdict':<8}  {'check':<{width}}  what was found [limit]"
    for check in judged:
        yield f"{check.verdict:<8}  {check.name:<{width}}  {check.value} [{check.limit}]"
        if check.remedy:
            yield f"{'':<8}  {'':<{width}}  -> {check.remedy}"


# -- the file ---------------------------------------------------------------------------------------------------------


def record(measured: Measured, figures: Figures, judged: Sequence[Check], verdict: str) -> dict[str, Any]:
    """Everything that was found, down to every time, with the conditions in the columns of a sweep's rows."""
    pairs = []
    for pair in measured.pairs:
        entry = asdict(pair)
        del entry["around"]
        names = "marked", "bare"
        for name, found, around in zip(names, pair.reasons(), (pair.around[:2], pair.around[2:]), strict=True):
            entry[name] = {"invalid_reasons": found, **condition_columns(*around)}
        pairs.append(entry)
    return {
        "verdict": verdict,
        "checks": [asdict(check) for check in judged],
        "figures": asdict(figures),
        "raw": {"first_calls_ms": measured.first_calls_ms, "pairs": pairs},
    }


def write(file: Path, found: dict[str, Any]) -> None:
    """Write it as JSON, beside its place first: a reader must never see half a file."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.writing")
    try:
        unfinished.write_text(json.dumps(_finite(found), indent=1, default=str) + "\n", encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """JSON knows no infinity, which is what an interval of too few values is: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value

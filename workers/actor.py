"""The Ray actor: a thin shell round a `Session`, one per device."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from workers.tasks import Task, TaskResult


class Worker:
    """Runs one task after the other on its device; torch is imported in its process only."""

    def __init__(self, name: str, accelerator: str | None = None) -> None:
        """
        Args:
            name: of the worker, as it stands in the rows.
            accelerator: kind of device it is started for, e.g. H100, or cpu; whatever is there if None.

        Raises:
            DeviceError: the device is not of that kind.
        """
        from workers.session import Session

        _quiet_libraries()
        self._session = Session(name, accelerator=accelerator)

    def ready(self) -> dict[str, Any]:
        """What the worker found: answered once it can take tasks."""
        return asdict(self._session.found)

    def run(self, task: Task) -> TaskResult:
        return self._session.run(task)

    def __repr__(self) -> str:
        # Ray shows this in its dashboard and in front of log lines.
        return self._session.name


def _quiet_libraries() -> None:
    """Progress bars and notices of libraries would fill the driver's terminal; failures come back as data."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

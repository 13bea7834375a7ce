"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

INTERRUPTED = 130


class Interruption:
    """Remembers that a stop was asked for; calling it says whether."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def listen(self) -> None:
        """Take over both signals. Ray installs handlers of its own when it starts, so this comes after."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(INTERRUPTED)
        self._asked = True
        print("stopping; what has finished is kept, once more ends at once", file=sys.stderr, flush=True)

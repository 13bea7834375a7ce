"""Lines on standard output, whether or not somebody reads them to the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

READER_GONE = 141  # what a shell reports of a program whose reader, such as `head`, has closed the pipe


def print_lines(lines: Iterable[str]) -> int:
    """Print; the exit code is 0, or READER_GONE where the reader has left before the end."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain once more
        return READER_GONE
    return 0

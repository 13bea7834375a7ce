"""What a column of a table is: its name, Arrow type, unit and meaning."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """A column: its Arrow type, its unit ('' where it has none) and what it means."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str

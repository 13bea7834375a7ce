"""Writes the JSON Schema of a sweep, from which editors complete keys, explain them and mark mistakes while typing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.spec_models import Sweep

SCHEMA_PATH = Path(__file__).resolve().parent.parent / "sweeps" / "sweep.schema.json"


def sweep_json_schema() -> dict[str, Any]:
    """The JSON Schema of a sweep file, with the meaning and unit of every key."""
    schema: dict[str, Any] = _without_noise(Sweep.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_noise(value: Any) -> Any:
    """Drops titles that repeat the key, and empty defaults that an editor would insert although they are not valid."""
    if isinstance(value, list):
        return [_without_noise(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_noise(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str)) and not (key == "default" and isinstance(item, list | dict))
    }


def schema_text() -> str:
    """The file as it is committed."""
    return json.dumps(sweep_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    print(SCHEMA_PATH)

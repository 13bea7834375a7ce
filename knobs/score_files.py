"""Block scores as a file that a sweep can name: Parquet with everything that is known of them, or JSON by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from knobs.errors import KnobError
from knobs.importance import BlockScores, Method

_METADATA = b"block_importance"
_SCHEMA = pa.schema(
    [
        pa.field("block", pa.int32(), nullable=False, metadata={"meaning": "index in the language model, from 0"}),
        pa.field("score", pa.float64(), nullable=False, metadata={"meaning": "higher is more important"}),
        pa.field("standard_error", pa.float64(), metadata={"meaning": "of the score, clustered by image"}),
    ]
)
_FORMATS = (".parquet", ".json")


def write_scores(path: Path, scores: BlockScores) -> None:
    """Write scores where `read_scores` finds them; a JSON file holds the bare scores, `{"0": 0.31, ...}`.

    Raises:
        KnobError: the name ends in neither .parquet nor .json.
    """
    _check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps({str(block): score for block, score in enumerate(scores.scores)}, indent=2) + "\n")
        return
    about = {"method": scores.method, "about": dict(scores.about)}
    columns = [list(range(scores.num_blocks)), list(scores.scores), list(scores.standard_errors)]
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_METADATA: json.dumps(about)}))
    pq.write_table(table, path)


def read_scores(path: Path, num_blocks: int, model: str | None = None) -> BlockScores:
    """The scores in a file, checked against the model that they are for.

    Args:
        path: `.parquet` with the columns `block`, `score` and perhaps `standard_error`, or `.json` with an object of
            scores by block.
        num_blocks: blocks of the model.
        model: fingerprint of the model; compared with the file's, if the file has one.

    Raises:
        KnobError: in one line with the path and the remedy: there is no such file, it is of another kind, lacks a
            block, has one too many or twice, holds something that is no number, or belongs to another model.
    """
    _check_format(path)
    if not path.is_file():
        raise KnobError(f"{path}: no such file of block scores; correct the path, or choose method nll to measure them")
    found, method, about = _read_json(path) if path.suffix == ".json" else _read_parquet(path)
    written_for = about.get("model")
    if model is not None and written_for is not None and written_for != model:
        raise KnobError(f"{path}: these scores were measured on {written_for}, not on {model}; measure them again")
    scores, errors = _by_block(path, found, num_blocks)
    return BlockScores(scores, errors, method, about)


_Entry = tuple[Any, Any, Any]  # block, score, standard error, as they stand in the file


def _check_format(path: Path) -> None:
    if path.suffix not in _FORMATS:
        raise KnobError(f"{path}: unknown format {path.suffix!r}; block scores are .parquet or .json")


def _read_json(path: Path) -> tuple[list[_Entry], Method | None, dict[str, str]]:
    try:
        # As pairs, because a block that is named twice would otherwise be lost silently.
        pairs = json.loads(path.read_text(), object_pairs_hook=list)
    except (ValueError, OSError, RecursionError) as error:
        raise KnobError(f"{path}: cannot be read as JSON ({_first_line(error)}); write it anew") from error
    if not isinstance(pairs, list) or any(not isinstance(pair, tuple) for pair in pairs):
        raise KnobError(f'{path}: expected an object of scores by block, like {{"0": 0.31, "1": 0.02}}')
    return [(_index(key), score, None) for key, score in pairs], None, {}


def _read_parquet(path: Path) -> tuple[list[_Entry], Method | None, dict[str, str]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise KnobError(f"{path}: cannot be read as Parquet ({_first_line(error)}); write it anew") from error
    if lacking := [name for name in ("block", "score") if name not in table.column_names]:
        raise KnobError(f"{path}: no column {' and '.join(lacking)} among {', '.join(table.column_names)}")
    kind = table.schema.field("block").type
    if not pa.types.is_integer(kind):
        named = "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)
        raise KnobError(f"{path}: the indices in its column block are {named}, not whole numbers; write them as such")
    errors = table["standard_error"].to_pylist() if "standard_error" in table.column_names else [None] * len(table)
    entries = list(zip(table["block"].to_pylist(), table["score"].to_pylist(), errors, strict=True))
    method, about = _origin(path, (table.schema.metadata or {}).get(_METADATA, b"{}"))
    return entries, method, about


def _origin(path: Path, written: bytes) -> tuple[Method | None, dict[str, str]]:
    """How the scores of a Parquet file were measured, and on what, as far as its metadata say so."""
    try:
        origin = json.loads(written)
    except (ValueError, RecursionError):
        origin = None
    about = origin.get("about", {}) if isinstance(origin, dict) else None
    if not isinstance(origin, dict) or not isinstance(about, dict):
        raise KnobError(
            f"{path}: its metadata {_METADATA.decode()} are not the JSON object they should be; remove them"
        )
    method = origin.get("method")
    return Method(method) if method in list(Method) else None, about


def _by_block(
    path: Path, entries: Sequence[_Entry], num_blocks: int
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    has = f"the model has blocks 0 to {num_blocks - 1}"
    if strange := [block for block, _, _ in entries if type(block) is not int or not 0 <= block < num_blocks]:
        raise KnobError(f"{path}: scores for {_listed(strange)}, but {has}")
    counts = Counter(block for block, _, _ in entries)
    if twice := [block for block, count in counts.items() if count > 1]:
        raise KnobError(f"{path}: more than one score for {_listed(twice)}; leave one of each")
    if missing := [block for block in range(num_blocks) if block not in counts]:
        raise KnobError(f"{path}: no score for {_listed(missing)}; {has} and each needs one")
    if wrong := [block for block, score, _ in entries if not _is_number(score)]:
        raise KnobError(f"{path}: the score of {_listed(wrong)} is not a finite number")
    score_of: Mapping[int, float] = {block: float(score) for block, score, _ in entries}
    error_of = {block: float(error) if _is_number(error) else None for block, _, error in entries}
    blocks = range(num_blocks)
    return tuple(score_of[block] for block in blocks), tuple(error_of[block] for block in blocks)


def _index(key: str) -> int | str:
    return int(key) if key.isdecimal() and len(key) < 10 else key


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _listed(blocks: Sequence[Any]) -> str:
    shown = ", ".join(map(str, blocks[:8])) + (", ..." if len(blocks) > 8 else "")
    return f"block{'s' if len(blocks) > 1 else ''} {shown}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

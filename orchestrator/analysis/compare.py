"""Is one combination better than another? Differences over the same samples, with what can be said for them.

What makes a sample easy or hard, short or long, is the same for both combinations and cancels in a paired difference,
which is therefore known better than either mean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.analysis.selection import ALIKE, Selection, pairs_of, plain, rank_of, selected, shown
from orchestrator.analysis.statistics import (
    clustered_standard_error,
    half_width_95,
    holm,
    mcnemar_chance,
    student_t_chance,
)
from orchestrator.store import StoreError, read_table
from workers.schema import arrow_schema

# A result folder, or its tables by name.
Results: TypeAlias = "str | os.PathLike[str] | Mapping[str, pd.DataFrame]"
_SCORED = ["task_id", "sample_id", "image_id", "status", "valid", "score"]
_TIMED = ["task_id", "sample_id", "image_id", "status", "valid", "batch", "repeat", "worker", "total_ms"]
_LATER = {"batch", "worker"}
_MEASURED = [
    *("num_samples", "num_images", "only_a", "only_b", "accuracy_a", "accuracy_b"),
    *("difference", "difference_se", "difference_low", "difference_high", "p_value", "p_holm", "mcnemar_p"),
    *("better", "worse", "equal"),
    *("num_timed", "total_ms_a", "total_ms_b"),
    *("total_ms_difference", "total_ms_difference_low", "total_ms_difference_high"),
    *("speed_up", "speed_up_low", "speed_up_high", "same_workers"),
]
_COUNTS = ["num_samples", "num_images", "only_a", "only_b", "better", "worse", "equal", "num_timed"]
# A standard error of scores, or of logarithms of times, below this is rounding: all differences are alike.
_ROUNDING = 1e-12


def compare(results: Results, a: Selection, b: Selection) -> pd.DataFrame:
    """Paired differences between combinations: what b adds to a, over the samples that both have.

    Args:
        results: a result folder, or its tables by name: `combinations`, and `accuracy` or `latency` or both.
        a, b: which combinations. A combination_id or its beginning, of 6 characters or more; or values of columns, such
            as `{"model": "molmoe-1b", "moe_top_k": 8}`. Vision axes can be named as in a sweep, `{"tier": "low"}`, and
            so can a number of blocks, `{"active_blocks": 12}`. A list is any of its values, `...` is any value at all,
            None is null.

    Where a selection fits several combinations, each of a is compared with each of b that is alike in all columns of
    knobs and of how it was measured but those that both selections set: `{"moe_top_k": 4}` against `{"moe_top_k": 8}`
    gives a row per model, data set, vision setting and number of blocks. An id sets every column but the accelerator.

    Returns:
        A row per pair, with its `combination_a` and `combination_b`. A column that has two values in some row is there
        as `<column>_a` and `<column>_b`, any other once; beyond model, accelerator, data set and knobs only columns
        that vary are shown.

        `num_samples`, `num_images`: samples that are done and valid in both, and their images; `only_a`, `only_b`:
        samples that only one of them has, which count nowhere else. `accuracy_a`, `accuracy_b`: over the shared ones.

        `difference`: b - a. `difference_se`: of the paired differences, clustered by image. `difference_low`,
        `difference_high`: 95 % interval, by Student's t with one degree of freedom less than images; null where all
        samples differ by the same, which says nothing of how they vary. `better`, `worse`, `equal`: samples by b.

        `p_value`: how likely a difference as large as this, either way, is where there is none; two-sided, of the same
        t. Where all samples differ by the same, 2^(1 - images): that as many images point the same way. It is null for
        a single image, and where both are the same answers. It is not adjusted for the number of rows; `p_holm` is, by
        Holm's method over all comparisons of the table (rows about the same answers are one). `mcnemar_p`: McNemar's
        exact test, for scores of 0 and 1 with a question per image, as it knows of no clusters.

        `num_timed`: batches of the same samples that both have timed. `total_ms_a`, `total_ms_b`: mean of their
        medians over repeats. `total_ms_difference`: b - a, with its 95 % interval. `speed_up`: a / b, geometric mean
        over batches, 2 if b takes half the time, with the interval of the mean logarithm. Batches of the same images
        are a cluster. These intervals count what differs between samples, not a device that was slower all the while
        one of both was timed; `same_workers` says whether the same workers timed both, and the table `workers` how
        they differ.

    Raises:
        ValueError: a selection fits nothing or is ambiguous, or no two of the selected combinations can be compared.
        StoreError: a file of the folder cannot be read.
    """
    combinations = _combinations(results)
    cells = {name: [plain(cell) for cell in combinations[name]] for name in combinations if name in ALIKE}
    chosen_a, set_by_a = selected(combinations, cells, a)
    chosen_b, set_by_b = selected(combinations, cells, b)
    pairs = pairs_of(cells, chosen_a, chosen_b, set_by_a & set_by_b)
    ids = combinations["combination_id"].astype(str).tolist()
    rank = [tuple(rank_of(cells[name][at]) for name in ALIKE if name in cells) for at in range(len(ids))]
    pairs.sort(key=lambda pair: tuple((rank[at], ids[at]) for at in pair))

    used = {at for pair in pairs for at in pair}
    tasks = {at: _task_ids(ids[at], cell) for at, cell in enumerate(combinations["task_ids"]) if at in used}
    wanted = set().union(*tasks.values())
    scores = _by_task(_rows(results, "accuracy", wanted, _SCORED))
    times = _by_task(_rows(results, "latency", wanted, _TIMED))
    scored = {at: _scores(scores, tasks[at]) for at in used}
    timed = {at: _times(times, tasks[at]) for at in used}

    found = [_accuracy(scored[x], scored[y]) | _latency(timed[x], timed[y]) for x, y in pairs]
    if not any(row["num_samples"] or "num_timed" in row for row in found):
        raise ValueError("the combinations have no sample in common that is done and valid in both")
    _adjust(found, [frozenset((scored[x].tasks, scored[y].tasks)) for x, y in pairs])
    compared = shown(cells, ids, pairs)
    measured = pd.DataFrame(found, columns=_MEASURED).fillna(dict.fromkeys(_COUNTS, 0))
    types = {name: "int64" if name in _COUNTS else "float64" for name in _MEASURED if name != "same_workers"}
    measured["same_workers"] = measured["same_workers"].astype("boolean")
    return pd.concat([compared, measured.astype(types)], axis=1)


# -- the rows behind them ---------------------------------------------------------------------------------------------


def _combinations(results: Results) -> pd.DataFrame:
    if isinstance(results, Mapping):
        if "combinations" not in results:
            raise ValueError(f"there is no table combinations among {', '.join(results)}")
        combinations, where = results["combinations"], "the table combinations"
    else:
        combinations, where = read_table(Path(results), "combinations"), str(results)
    if combinations.empty:
        raise ValueError(f"{where} holds no combinations")
    if missing := {"combination_id", "task_ids"} - set(combinations):
        raise ValueError(f"{where} has no column {', '.join(sorted(missing))}")
    # Tables of several folders put together may hold a row twice.
    return combinations.drop_duplicates([name for name in ("combination_id", "accelerator") if name in combinations])


def _task_ids(combination: str, cell: Any) -> frozenset[str]:
    tasks = plain(cell)
    if not isinstance(tasks, tuple):
        raise ValueError(f"combination {combination} does not say which tasks it is made of; run the sweep again")
    return frozenset(map(str, tasks))


def _rows(results: Results, table: str, tasks: set[str], columns: list[str]) -> pd.DataFrame:
    """What these tasks put into a table; of a folder, no other part is opened."""
    if not isinstance(results, Mapping):
        return _parts(Path(results), table, tasks, columns)
    if table not in results:
        return pd.DataFrame(columns=columns)
    rows = results[table]
    if missing := set(columns) - _LATER - set(rows):
        raise ValueError(f"the table {table} has no column {', '.join(sorted(missing))}")
    return rows[rows["task_id"].astype(str).isin(tasks)].reindex(columns=columns)


def _parts(folder: Path, table: str, tasks: set[str], columns: list[str]) -> pd.DataFrame:
    newest: dict[str, Path] = {}
    for path in (folder / table).rglob("[!._]*.parquet"):
        # A run that died at the wrong moment left two.
        if path.stem in tasks and (path.stem not in newest or _age(path) < _age(newest[path.stem])):
            newest[path.stem] = path
    if not newest:
        return pd.DataFrame(columns=columns)
    schema = arrow_schema(table)
    parts = []
    for path in sorted(newest.values()):
        try:
            parts.append(pq.read_table(path, columns=columns, schema=schema, partitioning=None))
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{path} cannot be read ({error}); remove it and run the sweep again") from None
    frame: pd.DataFrame = pa.concat_tables(parts).to_pandas()
    return frame


def _age(path: Path) -> int:
    return -path.stat().st_mtime_ns


def _by_task(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows that are done, by task."""
    done = rows[rows["status"] == "done"]
    # A sample whose image has no name of its own counts for itself.
    images = done["image_id"].astype(object).where(done["image_id"].notna(), done["sample_id"])
    return {str(task): found for task, found in done.assign(image_id=images).groupby("task_id", observed=True)}


@dataclass(frozen=True)
class _Scores:
    """Scores of a combination by sample, with the images, and the tasks that they are from."""

    scores: dict[str, float]
    images: dict[str, Hashable]
    tasks: frozenset[str]


def _scores(by_task: Mapping[str, pd.DataFrame], tasks: frozenset[str]) -> _Scores:
    scores: dict[str, float] = {}
    images: dict[str, Hashable] = {}
    scoring = tasks.intersection(by_task)
    for task in sorted(scoring):
        rows = by_task[task]
        counted = rows[rows["valid"].eq(True) & rows["score"].notna()]
        scores |= dict(zip(counted["sample_id"], counted["score"].astype(float), strict=True))
        images |= dict(zip(counted["sample_id"], counted["image_id"], strict=True))
    return _Scores(scores, images, scoring)


@dataclass(frozen=True)
class _Times:
    """Median times of a combination by batch, which is named by its samples, with the images that they are about."""

    medians: dict[frozenset[str], float]
    clusters: dict[frozenset[str], Hashable]
    workers: frozenset[str]


def _times(by_task: Mapping[str, pd.DataFrame], tasks: frozenset[str]) -> _Times:
    times: dict[frozenset[str], dict[tuple[str, Any], float]] = {}
    clusters: dict[frozenset[str], Hashable] = {}
    workers: set[str] = set()
    for task in sorted(tasks.intersection(by_task)):
        rows = by_task[task]
        counted = rows["valid"].eq(True) & rows["total_ms"].gt(0)
        # Results of earlier releases know of no batches; their samples were timed one by one.
        batches = rows["batch"].astype(object).where(rows["batch"].notna(), rows["sample_id"])
        samples = _members(batches, rows["sample_id"])
        images = _members(batches, rows["image_id"])
        workers |= set(rows.loc[counted, "worker"].dropna())
        # The time of a batch stands in the row of each of its samples.
        columns = (batches[counted], rows.loc[counted, "repeat"], rows.loc[counted, "total_ms"])
        for batch, repeat, took in zip(*columns, strict=True):
            name = samples[batch]
            times.setdefault(name, {})[task, repeat] = float(took)
            clusters[name] = images[batch]
    medians = {name: float(np.median(list(repeats.values()))) for name, repeats in times.items()}
    return _Times(medians, clusters, frozenset(workers))


def _members(batches: pd.Series, names: pd.Series) -> dict[Hashable, frozenset[Any]]:
    members: dict[Hashable, set[Any]] = {}
    for batch, name in zip(batches, names, strict=True):
        members.setdefault(batch, set()).add(name)
    return {batch: frozenset(found) for batch, found in members.items()}


# -- what they differ in ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mean:
    """A mean with its standard error and the ends of its 95 % interval; None where the values cannot tell."""

    mean: float
    error: float | None
    low: float | None
    high: float | None
    groups: int


def _mean(values: list[float], clusters: list[Hashable]) -> _Mean:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    series, groups = pd.Series(values, dtype=float), len(numbers)
    mean = float(series.mean())
    error = clustered_standard_error(series, pd.Series([numbers[name] for name in clusters]))
    if error is None:
        return _Mean(mean, None, None, None, groups)
    if error <= _ROUNDING:
        return _Mean(mean, 0.0, None, None, groups)
    reach = half_width_95(groups) * error
    return _Mean(mean, error, mean - reach, mean + reach, groups)


def _accuracy(a: _Scores, b: _Scores) -> dict[str, Any]:
    shared = sorted(a.scores.keys() & b.scores.keys())
    counts: dict[str, Any] = {
        "num_samples": len(shared),
        "only_a": len(a.scores) - len(shared),
        "only_b": len(b.scores) - len(shared),
    }
    if not shared:
        return counts
    before, after = [a.scores[sample] for sample in shared], [b.scores[sample] for sample in shared]
    differences = [y - x for x, y in zip(before, after, strict=True)]
    found = _mean(differences, [a.images[sample] for sample in shared])
    better, worse = sum(d > _ROUNDING for d in differences), sum(d < -_ROUNDING for d in differences)
    independent = {*before, *after} <= {0.0, 1.0} and found.groups == len(shared)
    same = a.tasks == b.tasks
    return counts | {
        "num_images": found.groups,
        "accuracy_a": math.fsum(before) / len(shared),
        "accuracy_b": math.fsum(after) / len(shared),
        "difference": found.mean,
        "difference_se": found.error,
        "difference_low": found.low,
        "difference_high": found.high,
        "p_value": None if same else _chance(found),
        "mcnemar_p": mcnemar_chance(better, worse) if independent and not same else None,
        "better": better,
        "worse": worse,
        "equal": len(shared) - better - worse,
    }


def _chance(found: _Mean) -> float | None:
    if found.error is None:
        return None
    if found.error == 0:
        return 1.0 if abs(found.mean) <= _ROUNDING else 2.0 ** (1 - found.groups)
    return student_t_chance(found.mean / found.error, found.groups - 1)


def _latency(a: _Times, b: _Times) -> dict[str, Any]:
    # In a fixed order, so that rounding does not depend on that of the rows.
    shared = sorted(a.medians.keys() & b.medians.keys(), key=sorted)
    if not shared:
        return {}
    clusters = [a.clusters[samples] for samples in shared]
    before, after = [a.medians[samples] for samples in shared], [b.medians[samples] for samples in shared]
    difference = _mean([y - x for x, y in zip(before, after, strict=True)], clusters)
    ratio = _mean([math.log(x / y) for x, y in zip(before, after, strict=True)], clusters)
    return {
        "num_timed": len(shared),
        "total_ms_a": math.fsum(before) / len(shared),
        "total_ms_b": math.fsum(after) / len(shared),
        "total_ms_difference": difference.mean,
        "total_ms_difference_low": difference.low,
        "total_ms_difference_high": difference.high,
        "speed_up": math.exp(ratio.mean),
        "speed_up_low": None if ratio.low is None else math.exp(ratio.low),
        "speed_up_high": None if ratio.high is None else math.exp(min(ratio.high, 700.0)),
        "same_workers": a.workers == b.workers,
    }


def _adjust(found: list[dict[str, Any]], answers: list[frozenset[frozenset[str]]]) -> None:
    """Give every row its p_holm; rows about the same two sets of answers are one test."""
    tests = {about: row["p_value"] for about, row in zip(answers, found, strict=True) if row.get("p_value") is not None}
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    for about, row in zip(answers, found, strict=True):
        row["p_holm"] = adjusted.get(about)

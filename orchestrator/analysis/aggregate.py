"""Sample rows of one knob combination become its row in `combinations/`."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pandas as pd

from orchestrator.analysis.corpus import corpus_score, is_of_corpus
from orchestrator.analysis.statistics import accuracy_interval, clustered_standard_error, half_width_95, percentile
from workers.schema import SUMMARISED
from workers.stopping import WATCHED, relative_half_width


def aggregate(latency: pd.DataFrame, accuracy: pd.DataFrame, lost: Collection[str] = ()) -> dict[str, Any]:
    """The measured columns of a combination, from the rows that belong to it; empty frames leave their columns null.

    Args:
        latency, accuracy: rows of these tables, of one combination on one kind of device, whoever measured them.
        lost: ids of samples that have no row, because their whole task failed.
    """
    return {
        **_latency_columns(latency),
        **_accuracy_columns(accuracy),
        **_vision_columns(latency, accuracy),
        **_run_columns(latency, accuracy),
        "num_invalid": _invalid_rows(latency) + _invalid_rows(accuracy),
        "num_failed": len(_failed_samples(latency) | _failed_samples(accuracy) | set(lost)),
    }


def _latency_columns(rows: pd.DataFrame) -> dict[str, Any]:
    if rows.empty:
        return {}
    valid = rows[(rows["status"] == "done") & rows["valid"].eq(True)]
    answers = _answers(valid)
    columns: dict[str, Any] = {"num_timed": len(answers)}
    for name in SUMMARISED:
        columns |= {f"{name}_{key}": value for key, value in _summary(answers[name], answers["batch"]).items()}
        if f"{name}_corrected" in answers:
            corrected = answers[f"{name}_corrected"].dropna().astype(float)
            # A part of the rows would be the times of some workers only.
            if len(corrected) and len(corrected) == answers[name].notna().sum():
                columns[f"{name}_corrected_mean"] = float(corrected.mean())
                columns[f"{name}_corrected_p50"] = float(corrected.median())
    if len(valid):
        counted = valid.drop_duplicates("sample_id")["flops"].dropna()
        columns["flops"] = float(counted.astype(float).mean()) if len(counted) else None
        columns["stopped_by"] = _only(valid["stopped_by"])
        columns["relative_error"] = _relative_error(answers)
        columns["residual_fraction"] = float((answers["residual_ms"] / answers["total_ms"]).mean())
        columns["visit_spread"] = _visit_spread(answers)
        columns["energy_j"] = _or_none(valid["energy_j"].astype(float).mean(), float)
        for name in ("peak_memory_bytes", "peak_reserved_bytes", "kv_cache_bytes", "weights_bytes"):
            columns[name] = _or_none(valid[name].max(), int)
    return columns


def _answers(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per timed batch, which has its time in the row of each of its samples, and is one measurement."""
    # Results of earlier releases know of no batches; their samples were timed one by one.
    numbers = rows["batch"].astype(object).where(rows["batch"].notna(), rows["sample_id"])
    return rows.assign(batch=numbers).drop_duplicates(["task_id", "batch", "repeat"])


def _relative_error(answers: pd.DataFrame) -> float | None:
    """Half-width of the 95 % interval of the median over the median, the largest of the watched times, of all visits.

    A round counts if none of its batches is missing; a shift between visits makes neighbours alike, and so widens it.
    """
    batches = answers["batch"].nunique()
    widths = []
    for name in WATCHED:
        rounds = answers.pivot_table(index="repeat", columns="batch", values=name, aggfunc="first").dropna()
        if len(rounds) >= 2 and len(rounds.columns) == batches:
            widths.append(relative_half_width(rounds.to_numpy(dtype=float)))
    return max(widths, default=None)


def _visit_spread(answers: pd.DataFrame) -> float | None:
    """How far the visits' medians of total are apart, over the batches that all of them have."""
    totals = answers.pivot_table(index="batch", columns="visit", values="total_ms", aggfunc="median").dropna()
    if totals.empty or len(totals.columns) < 2:
        return None
    medians = totals.median()
    return float(medians.max() / medians.min() - 1)


def _summary(values: pd.Series, batches: pd.Series) -> dict[str, float | None]:
    """Statistics over repeats of batches; a column that is null throughout (TPOT of one token) stays null."""
    measured = values.notna()
    present = values[measured].astype(float)
    if present.empty:
        return {}
    error = clustered_standard_error(present, batches[measured])
    return {
        "mean": float(present.mean()),
        "std": float(present.std()) if len(present) > 1 else None,
        "p50": percentile(present, 0.5),
        "p90": percentile(present, 0.9),
        "p95": percentile(present, 0.95),
        "p99": percentile(present, 0.99),
        "ci95": None if error is None else half_width_95(batches[measured].nunique(dropna=False)) * error,
    }


def _accuracy_columns(rows: pd.DataFrame) -> dict[str, Any]:
    if rows.empty:
        return {}
    scored = rows[(rows["status"] == "done") & rows["valid"].eq(True)]
    if scored.empty:
        return {}
    metric = _only(scored["metric"])
    accuracy, error, low, high = _or_none(scored["score"].mean(), float), None, None, None
    if is_of_corpus(metric):
        found = corpus_score(scored)
        accuracy, error = (None, None) if found is None else (found.value, found.standard_error)
    elif accuracy is not None:
        error = clustered_standard_error(scored["score"], scored["image_id"])
        low, high = accuracy_interval(scored["score"], scored["image_id"]) or (None, None)
    return {
        "accuracy": accuracy,
        "accuracy_se": error,
        "accuracy_low": low,
        "accuracy_high": high,
        "metric": metric,
        "num_samples": len(scored),
        "output_tokens_mean": float(scored["output_tokens"].mean()),
    }


def _vision_columns(latency: pd.DataFrame, accuracy: pd.DataFrame) -> dict[str, Any]:
    """What became of the images: over the scored samples, or the timed ones where none was scored."""
    scored, timed = (rows[rows["status"] == "done"] for rows in (accuracy, latency))
    samples = (timed if scored.empty else scored).drop_duplicates("sample_id")
    if samples.empty:
        return {}
    selected = samples["selected_crops"].dropna().astype(int)
    actual = samples["actual_vision_tokens"].astype(float)
    utilization = actual / samples["theoretical_vision_tokens"].astype(float)
    mismatch = samples["aspect_mismatch"].astype(float)
    distribution = {str(crops): int(count) for crops, count in selected.value_counts().sort_index().items()}
    return {
        "selected_crops_distribution": json.dumps(distribution) if distribution else None,
        "selected_crops_mean": _or_none(selected.mean(), float),
        "selected_crops_std": _or_none(selected.std(), float),
        "actual_num_crops_mean": _or_none(samples["actual_num_crops"].astype(float).mean(), float),
        "actual_vision_tokens_mean": _or_none(actual.mean(), float),
        "actual_vision_tokens_std": _or_none(actual.std(), float),
        "token_utilization_mean": _or_none(utilization.mean(), float),
        "aspect_mismatch_mean": _or_none(mismatch.mean(), float),
        # Over images these are descriptive, not a claim about a tail, so they need no sample floor.
        "aspect_mismatch_p95": _or_none(mismatch.quantile(0.95), float),
        "aspect_mismatch_p99": _or_none(mismatch.quantile(0.99), float),
        "prompt_tokens_mean": float(samples["prompt_tokens"].mean()),
    }


def _run_columns(latency: pd.DataFrame, accuracy: pd.DataFrame) -> dict[str, Any]:
    """Device and engine of the row's times; where there are none, those that its scores come from."""
    timed = latency[latency["valid"].eq(True)]
    scored = accuracy[accuracy["status"] == "done"]
    behind = scored if timed.empty else timed
    used = ("device_name", "attention", "experts", "engine", "engine_note")
    return {name: _only(behind[name]) for name in used if not behind.empty}


def _invalid_rows(rows: pd.DataFrame) -> int:
    """Rows that are there but do not count; failed ones are counted as samples instead."""
    return 0 if rows.empty else int(((rows["status"] == "done") & ~rows["valid"].eq(True)).sum())


def _failed_samples(rows: pd.DataFrame) -> set[str]:
    return set(rows.loc[rows["status"] == "failed", "sample_id"])


def _only(values: pd.Series) -> Any:
    """The one value of a column, several joined: two GPUs of a kind may have different names, answers two engines."""
    present = sorted(set(values.dropna()))
    return present[0] if len(present) == 1 else ", ".join(map(str, present)) or None


def _or_none(value: Any, kind: type) -> Any:
    return None if pd.isna(value) else kind(value)

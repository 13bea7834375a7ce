"""What a run prints before and after: the plan, the table of combinations, the failures, and where everything is."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from orchestrator.plan import Plan
from workers.schema import Kind

# Wide enough for every column where there is no terminal to ask.
WIDTH_OF_LOGS = 150
# A failed sweep may have thousands; the table of tasks has them all.
MOST_FAILURES_SHOWN = 10
MOST_SAMPLES_SHOWN = 5


def print_plan(plan: Plan, accelerators: Collection[str], done: Collection[str], failed: Collection[str]) -> None:
    """Combinations, tasks, what is dropped or skipped and why, and what earlier runs have done."""
    per_model = Counter(combination.model.name for combination in plan.combinations)
    kinds = Counter(task.kind for task in plan.tasks)
    models = ", ".join(f"{name} {count}" for name, count in per_model.items())
    datasets = len({combination.dataset for combination in plan.combinations})
    print(
        f"{len(plan.combinations)} combinations ({models or 'none'}) "
        f"on {', '.join(accelerators)}, {_count(datasets, 'data set')}"
    )
    print(
        f"{len(plan.tasks)} tasks: {kinds[Kind.LATENCY]} latency, {kinds[Kind.ACCURACY]} accuracy; "
        f"{len(done)} done, {len(failed)} failed before, {len(plan.tasks) - len(done) - len(failed)} to run"
    )
    for dropped in plan.dropped:
        print(f"dropped  {dropped}")
    for skip in plan.skips:
        print(f"skipped  {skip}")


def print_combinations(plan: Plan) -> None:
    """Every combination in a line."""
    for combination in plan.combinations:
        knobs = combination.knobs
        width = "" if knobs.moe_top_k is None else f" moe_top_k={knobs.moe_top_k}"
        print(
            f"  {combination.combination_id[:8]} {combination.model.name} {combination.accelerator} "
            f"{combination.dataset.name}: {knobs.vision}{width} "
            f"active_blocks={len(knobs.active_blocks)} [{_ranges(knobs.active_blocks)}]"
        )


def print_results(rows: pd.DataFrame) -> None:
    """The table of knob combinations: accuracy with its standard error, medians of the stages, the mean total."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_OF_LOGS)
    several = [name for name in ("accelerator", "dataset") if rows[name].nunique() > 1]
    table = Table(header_style="bold", caption="times in ms; accuracy ± standard error", caption_justify="left")
    for name in ("model", *several, "vision knob"):
        table.add_column(name, overflow="fold")
    for name in (
        "top-k",
        "blocks",
        "vision tokens",
        "accuracy",
        "vision",
        "prefill",
        "TTFT",
        "TPOT",
        "total, mean ± 95 %",
    ):
        table.add_column(name, justify="right")
    order = ["model", *several, "total_ms_mean", "accuracy"]
    for _, row in rows.sort_values(order, na_position="last").iterrows():
        value = row["vision_knob"] if pd.isna(row["vision_value"]) else f"{row['vision_knob']} {row['vision_value']}"
        table.add_row(
            row["model"],
            *(row[name] for name in several),
            value,
            _number(row["moe_top_k"], 0),
            _number(row["num_active_blocks"], 0),
            _number(row["actual_vision_tokens_mean"], 0),
            _with_error(row["accuracy"], row["accuracy_se"], 3),
            _number(row["vision_ms_p50"], 1),
            _number(row["prefill_ms_p50"], 1),
            _number(row["ttft_ms_p50"], 1),
            _number(row["tpot_ms_p50"], 2),
            _with_error(row["total_ms_mean"], row["total_ms_ci95"], 1),
        )
    console.print(table)


def print_failures(failures: pd.DataFrame, failed_rows: int, failed_samples: pd.DataFrame) -> None:
    """A line per failed task, and the samples that failed inside finished ones, each with a reason.

    Args:
        failed_rows: how many rows those samples have left.
        failed_samples: see `Recorder.failed_samples`.
    """
    for _, row in failures.head(MOST_FAILURES_SHOWN).iterrows():
        knobs = (
            f"{row['vision_knob']} top-k {_number(row['moe_top_k'], 0)} blocks {_number(row['num_active_blocks'], 0)}"
        )
        print(f"failed   {row['model']} {row['kind']} {knobs}: {row['failure']}: {row['reason']}")
    if len(failures) > MOST_FAILURES_SHOWN:
        print(f"failed   ... and {len(failures) - MOST_FAILURES_SHOWN} more, in the tasks table")
    if len(failed_samples):
        _print_failed_samples(failed_samples, failed_rows)


def _print_failed_samples(samples: pd.DataFrame, rows: int) -> None:
    print(f"failed   {_count(len(samples), 'sample')} in {_count(rows, 'row')}:")
    for sample_id, error in samples[["sample_id", "error"]].head(MOST_SAMPLES_SHOWN).itertuples(index=False):
        reason = next(iter(str(error or "no reason given").splitlines()))
        # Most reasons name the sample already.
        print(f"         {reason if reason.startswith(sample_id) else f'{sample_id}: {reason}'}")
    if len(samples) > MOST_SAMPLES_SHOWN:
        more = len(samples) - MOST_SAMPLES_SHOWN
        print(f"         ... and {more} more, in the column error of the sample tables")


def print_warnings(warnings: list[str]) -> None:
    """Everything that was put right on the way, once; the list is emptied."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    warnings.clear()


def print_place(root: Path) -> None:
    """Where the results are; the first line of a run and the last."""
    print(f"results: {root}", flush=True)


def _ranges(indices: Sequence[int]) -> str:
    """Ascending indices with runs shortened: 0-3, 6, 8-9."""
    parts: list[str] = []
    begin = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            first, last = indices[begin], indices[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            begin = i
    return ", ".join(parts)


def _number(value: Any, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def _with_error(value: Any, error: Any, digits: int) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.{digits}f}" + ("" if pd.isna(error) else f" ± {error:.{digits}f}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

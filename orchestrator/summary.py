"""What a run prints before and after: the plan, the table of combinations, the failures, and where everything is."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from orchestrator.analysis.anchors import findings_in_words
from orchestrator.analysis.validation import (
    LEAST_GAIN,
    MISMATCH_LIMITS,
    validate_accuracy_benefits,
    validate_distortion,
    validate_token_utilization,
)
from orchestrator.block_questions import Question
from orchestrator.plan import Plan
from workers.probes import CPU
from workers.tasks import Kind, ModelSource

# Wide enough for every column where there is no terminal to ask.
WIDTH_OF_LOGS = 150
# A failed sweep may have thousands; the table of tasks has them all.
MOST_FAILURES_SHOWN = 10
MOST_SAMPLES_SHOWN = 5


def print_questions(questions: Sequence[Question]) -> None:
    """What a run will measure before it can choose blocks; until then the plan is shown with the first ones."""
    for question in questions:
        tasks = _count(len(question.tasks(pd.DataFrame())), "task")
        rounds = " in the first round" if question.search is not None else ""
        print(
            f"note: blocks are chosen first, {question} ({tasks}{rounds}); until then the first blocks stand in, and "
            "what is done cannot be told"
        )


def print_plan(plan: Plan, accelerators: Collection[str], done: Collection[str], failed: Collection[str]) -> None:
    """Combinations, tasks, what is dropped or skipped and why, and what earlier runs have done."""
    if not plan.combinations and plan.tasks and all(task.kind is Kind.IMPORTANCE for task in plan.tasks):
        models = ", ".join(dict.fromkeys(task.model.name for task in plan.tasks))
        lists = max(len(task.candidates) for task in plan.tasks)
        each = f" of up to {lists} block lists each" if lists else ""
        print(
            f"choosing blocks of {models}: {_count(len(plan.tasks), 'task')}{each}; "
            f"{len(done)} done, {len(failed)} failed before"
        )
        return
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
    on_a_cpu = [c for c in plan.combinations if c.accelerator == CPU]
    for name in dict.fromkeys(c.model.name for c in on_a_cpu if c.model.engine == "graph"):
        print(f"note     {name}: a CPU has no CUDA graphs, so on one it decodes by engine eager")


def print_combinations(plan: Plan) -> None:
    """Every combination in a line, with what tells variants of one model apart."""
    variants = _variants(plan)
    several_sizes = len({c.timed.batch_size for c in plan.combinations if c.timed}) > 1
    for combination in plan.combinations:
        knobs = combination.knobs
        width = "" if knobs.moe_top_k is None else f" moe_top_k={knobs.moe_top_k}"
        print(
            f"  {combination.combination_id[:8]} {combination.model.name}{variants[combination.model]} "
            f"{combination.accelerator} {combination.dataset.name}: {knobs.vision}{width} "
            f"active_blocks={len(knobs.active_blocks)} [{_ranges(knobs.active_blocks)}]"
            + (f" batch_size={combination.timed.batch_size}" if several_sizes and combination.timed else "")
        )


def _variants(plan: Plan) -> dict[ModelSource, str]:
    """Data type and back-ends of each model, as far as models of one name differ in them."""
    models = dict.fromkeys(combination.model for combination in plan.combinations)
    words = {}
    for model in models:
        named = [other for other in models if other.name == model.name]
        differ = [
            name for name in ("dtype", "attention", "experts", "engine") if len({getattr(o, name) for o in named}) > 1
        ]
        words[model] = "".join(f" {name}={getattr(model, name)}" for name in differ)
    return words


def print_results(rows: pd.DataFrame) -> None:
    """The table of knob combinations: accuracy with its standard error, medians of the stages, the mean total."""
    told_apart = (
        "accelerator",
        "dataset",
        "dtype",
        "attention",
        "experts",
        "engine",
        "engine_asked",
        "timed_batch_size",
    )
    several = [name for name in told_apart if rows[name].nunique() > 1]
    table = Table(header_style="bold", caption="times in ms; accuracy ± standard error", caption_justify="left")
    for name in ("model", *several, "vision knob"):
        table.add_column(name.removeprefix("timed_").replace("_", " "), overflow="fold")
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
    fits_differ = _fits_differ(rows)
    for _, row in rows.sort_values(order, na_position="last").iterrows():
        table.add_row(
            row["model"],
            *(_cell(row[name]) for name in several),
            _vision_words(row, fits_differ),
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
    _console().print(table)


def print_engines(rows: pd.DataFrame) -> None:
    """A line per model and reason for which another engine decoded than the sweep asked for."""
    others = rows[rows["engine_note"].notna()]
    for (model, accelerator, engine, note), group in others.groupby(["model", "accelerator", "engine", "engine_note"]):
        print(f"note     {model} on {accelerator}: engine {engine} in {_count(len(group), 'combination')}: {note}")


def print_trust(rows: pd.DataFrame, workers: pd.DataFrame, anchor_failures: pd.DataFrame) -> None:
    """How far the times can be trusted: rows that do not count, what measuring costs, and workers that differ.

    Args:
        rows: of the table combinations.
        workers: of the table workers.
        anchor_failures: rows of the table anchors that failed.
    """
    invalid, counted = int(rows["num_invalid"].fillna(0).sum()), int(rows["num_timed"].fillna(0).sum())
    if invalid:
        print(f"invalid  {_count(invalid, 'row')} beside {counted} timed answers; the column invalid_reasons says why")
    total = workers[workers["timing"] == "total_ms"]
    for (accelerator, model), of_model in total.groupby(["accelerator", "model"]):
        on = len(of_model.drop_duplicates(["worker", "host", "device_uuid"]))
        words = f"timed {_count(int(of_model['num_anchors'].sum()), 'time')} on {_count(on, 'worker')}"
        words += "" if rows["accelerator"].nunique() == 1 else f" with {accelerator}"
        if of_model["spread"].notna().any():
            words += f", spread {100 * of_model['spread'].max():.1f} %"
        costs = of_model.dropna(subset=["overhead", "overhead_ci95"])
        if len(costs):
            most = costs.sort_values("overhead").iloc[-1]
            at_most = f" on {most['worker']}, at most" if len(costs) > 1 else ""
            cost = f"{100 * most['overhead']:.2f} % ± {100 * most['overhead_ci95']:.2f}"
            words += f"; marking the stages costs {cost}{at_most}"
        else:
            words += "; too few valid pairs to say what marking the stages costs"
        print(f"anchor   {model}: {words}")
    for model, of_model in anchor_failures.groupby("model") if len(anchor_failures) else ():
        print(f"note     the anchor of {model!s} could not be timed: {of_model['error'].iloc[0]}")
    for line in findings_in_words(workers):
        print(f"note     {line}")


def print_vision_checks(rows: pd.DataFrame) -> None:
    """Whether the vision knob is sound on these images: distortion, use of tokens, and what each tier adds.

    Args:
        rows: see `Recorder.vision_rows`.
    """
    if rows.empty:
        return
    distortion, utilization = validate_distortion(rows), validate_token_utilization(rows)
    limits = ", ".join(f"{name} < {limit}" for name, limit in MISMATCH_LIMITS.items())
    caption = f"mean ... max: mismatch of aspect, want {limits} (! where not); tokens used: of those the tower makes"
    table = Table(header_style="bold", caption=caption, caption_justify="left")
    several = [name for name in ("model", "dataset") if distortion[name].nunique() > 1]
    for name in (*several, "vision knob"):
        table.add_column(name, overflow="fold")
    measures = ("mean", "std", "p95", "p99", "max")
    for name in ("images", *measures, "tokens used", "as predicted"):
        table.add_column(name, justify="right")
    fits_differ = _fits_differ(rows)
    for (_, row), (_, used) in zip(distortion.iterrows(), utilization.iterrows(), strict=True):
        cells = []
        for measure in measures:
            value = row[f"{measure}_mismatch"]
            cells.append(_number(value, 2) + ("!" if value >= MISMATCH_LIMITS.get(measure, math.inf) else ""))
        table.add_row(
            *(row[name] for name in several),
            _vision_words(row, fits_differ),
            str(row["num_images"]),
            *cells,
            _number(used["mean_utilization"], 2),
            "yes" if used["ok"] else f"no, {_number(used['mean_as_predicted'], 3)}",
        )
    if len(distortion):
        _console().print(table)
    steps = validate_accuracy_benefits(rows) if "score" in rows else pd.DataFrame()
    for _, step in steps.iterrows():
        options = ", ".join(_option_words(step, fits_differ))
        gain = f"{100 * step['gain']:+.1f}" + ("" if pd.isna(step["gain_se"]) else f" ± {100 * step['gain_se']:.1f}")
        verdict = "" if step["ok"] else f", not the {100 * LEAST_GAIN:.0f} wanted"
        place = f"{step['model']} on {step['dataset']}" + (f" ({options})" if options else "")
        print(
            f"tiers    {place}: {step['from_tier']} to {step['to_tier']} {gain} points of accuracy "
            f"(paired, {_count(step['num_samples'], 'sample')}, ± standard error){verdict}"
        )


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
        print(f"{row['status']:8} {row['model']} {row['kind']} {knobs}: {row['failure']}: {row['reason']}")
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


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_OF_LOGS)


def _vision_words(row: pd.Series, fits_differ: bool) -> str:
    """The vision setting of a row, with the options that are not what the family does anyway."""
    level = row["vision_knob"] if pd.isna(row["vision_value"]) else f"{row['vision_knob']} {row['vision_value']}"
    return ", ".join([level, *_option_words(row, fits_differ)])


def _option_words(row: pd.Series, fits_differ: bool) -> list[str]:
    words = []
    if row["force_full_tokens"] is True:
        words.append("full tokens")
    if row["aspect_distance"] == "log":
        words.append("log")
    if fits_differ and not pd.isna(row["resize_to_fill"]):
        words.append("fill" if row["resize_to_fill"] else "letterbox")
    return words


def _fits_differ(rows: pd.DataFrame) -> bool:
    """Whether rows of one model differ in how images are laid on the canvas."""
    return bool((rows.groupby(["model", "vision_knob"])["resize_to_fill"].nunique(dropna=False) > 1).any())


def _number(value: Any, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def _cell(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _with_error(value: Any, error: Any, digits: int) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.{digits}f}" + ("" if pd.isna(error) else f" ± {error:.{digits}f}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

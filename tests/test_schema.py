"""The columns: each has a meaning and a known unit, names say the unit, and the contract of the product is complete."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from knobs.tiling import TIERS
from knobs.vision import VisionSetting
from workers.schema import (
    COMBINATION_COLUMNS,
    LATENCY_COLUMNS,
    PARTITIONS,
    SCHEMA_VERSION,
    STAGES,
    SUMMARISED,
    TABLES,
    Column,
    arrow_schema,
    knob_columns,
    to_table,
)
from workers.tasks import Knobs

# One base unit per quantity, and how a name that carries it ends.
UNIT_ENDINGS = {"ms": "_ms", "s": "_s", "byte": "_bytes", "J": "_j", "MHz": "_mhz", "W": "_w", "°C": "_c"}
OTHER_UNITS = {"", "token", "pixel", "FLOP"}

ALL = [(table, column) for table, columns in TABLES.items() for column in columns]

# What a combination must say; the promise to whoever reads results.
IDENTITY = [
    "sweep",
    "combination_id",
    "model",
    "revision",
    "accelerator",
    "device_name",
    "dataset",
    "split",
    "dtype",
    "attention",
    "experts",
    "moe_renormalization",
    "engine",
    "engine_note",
    "schema_version",
]
KNOBS = [
    "vision_knob",
    "vision_value",
    "image_size",
    "tier",
    "force_full_tokens",
    "moe_top_k",
    "num_active_blocks",
    "active_blocks",
]
VISION = [
    "theoretical_num_crops",
    "theoretical_tiling",
    "theoretical_vision_tokens",
    "selected_crops_distribution",
    "selected_crops_mean",
    "selected_crops_std",
    "actual_num_crops_mean",
    "actual_vision_tokens_mean",
    "actual_vision_tokens_std",
    "token_utilization_mean",
    "aspect_mismatch_mean",
    "aspect_mismatch_p95",
    "aspect_mismatch_p99",
    "prompt_tokens_mean",
]
ACCURACY = ["accuracy", "accuracy_se", "accuracy_low", "accuracy_high"]
ACCURACY += ["metric", "num_samples", "num_failed", "output_tokens_mean"]
TIMES = ["preprocess_ms", "vision_ms", "projector_ms", "prefill_ms", "decode_ms", "tpot_ms", "ttft_ms", "total_ms"]
CORRECTED = ["corrected_mean", "corrected_p50"]
STATISTICS = ["mean", "std", "p50", "p90", "p95", "p99", "ci95"]
LATENCY = [f"{name}_{statistic}" for name in TIMES for statistic in STATISTICS]
LATENCY += [f"{name}_{statistic}" for name in TIMES for statistic in CORRECTED]
LATENCY += ["num_timed", "num_invalid", "residual_fraction", "visit_spread"]
MEASURED = [
    "prompt",
    "engine_asked",
    "timed_output_tokens",
    "timed_repeats",
    "timed_visits",
    "timed_max_relative_error",
    "timed_limit_s",
    "stopped_by",
    "relative_error",
    "timed_warmup",
    "timed_batch_size",
    "scored_max_new_tokens",
    "scored_batch_size",
    "samples_digest",
    "task_ids",
]
COST = ["peak_memory_bytes", "peak_reserved_bytes", "weights_bytes", "flops", "kv_cache_bytes", "energy_j"]

# What the raw rows must hold behind them.
SAMPLE = [
    "sample_id",
    "image_height",
    "image_width",
    "image_aspect",
    "actual_num_crops",
    "selected_crops",
    "selected_tiling",
    "tower_passes",
    "aspect_mismatch",
    "target_resolution",
    "target_aspect",
    "theoretical_vision_tokens",
    "predicted_vision_tokens",
    "special_tokens",
    "actual_vision_tokens",
    "valid",
    "invalid_reasons",
    "prompt_tokens",
    "output_tokens",
    "status",
    "error",
    "worker",
]


def names(columns: tuple[Column, ...]) -> set[str]:
    return {column.name for column in columns}


@pytest.mark.parametrize(("table", "column"), ALL, ids=[f"{table}.{column.name}" for table, column in ALL])
def test_a_column_has_a_meaning_and_a_unit(table: str, column: Column) -> None:
    assert len(column.meaning) >= 7
    assert column.unit in UNIT_ENDINGS.keys() | OTHER_UNITS
    stem = column.name
    for statistic in [*CORRECTED, *STATISTICS]:
        stem = stem.removesuffix(f"_{statistic}")
    stem = stem.removesuffix("_start").removesuffix("_end")
    for unit, ending in UNIT_ENDINGS.items():
        assert (column.unit == unit) == stem.endswith(ending), f"{column.name} is in {column.unit or 'no unit'}"
    if column.unit:
        number = column.type.value_type if pa.types.is_list(column.type) else column.type
        assert pa.types.is_integer(number) or pa.types.is_floating(number) or column.unit == "pixel"


@pytest.mark.parametrize("table", TABLES)
def test_no_column_is_declared_twice(table: str) -> None:
    declared = [column.name for column in TABLES[table]]
    assert len(declared) == len(set(declared))
    assert not set(declared) & names(PARTITIONS), "partition columns come from folder names"


def test_a_combination_says_everything_that_was_promised() -> None:
    promised = {*IDENTITY, *KNOBS, *MEASURED, *VISION, *ACCURACY, *LATENCY, *COST}
    assert promised <= names(COMBINATION_COLUMNS) | names(PARTITIONS)
    # Beyond the promise: the transfer to the device, a stage of its own.
    extra = names(COMBINATION_COLUMNS) - promised
    how_crops_are_chosen = {"tier_definition", "aspect_distance", "resize_to_fill"}
    assert extra == {f"transfer_ms_{name}" for name in [*STATISTICS, *CORRECTED]} | how_crops_are_chosen


@pytest.mark.parametrize("table", ["latency", "accuracy"])
def test_sample_rows_say_everything_that_was_promised(table: str) -> None:
    assert {*SAMPLE, *KNOBS} <= names(TABLES[table])
    assert set(IDENTITY) <= names(TABLES[table]) | names(PARTITIONS)


def test_stages_are_columns_and_summarised() -> None:
    assert set(STAGES) | {"decode_step_ms", "residual_ms", "valid", "invalid_reasons"} <= names(LATENCY_COLUMNS)
    assert set(STAGES) < set(SUMMARISED) <= names(LATENCY_COLUMNS)
    assert {"prediction", "score", "stop_reason", "metric"} <= names(TABLES["accuracy"])


@pytest.mark.parametrize("table", TABLES)
def test_the_schema_carries_unit_and_meaning(table: str) -> None:
    schema = arrow_schema(table)
    assert schema.metadata == {b"schema_version": str(SCHEMA_VERSION).encode()}
    for column in TABLES[table]:
        field = schema.field(column.name)
        assert field.type == column.type
        assert field.metadata == {b"unit": column.unit.encode(), b"meaning": column.meaning.encode()}


@pytest.mark.parametrize("table", TABLES)
def test_rows_take_the_declared_columns(table: str) -> None:
    name = next(column.name for column in TABLES[table] if column.type == pa.string())
    made = to_table(table, [{name: "a"}, {}])
    assert made.schema.equals(arrow_schema(table), check_metadata=True)
    assert made[name].to_pylist() == ["a", None]
    assert made[made.schema.names[-1]].null_count == 2
    assert to_table(table, []).schema == arrow_schema(table)


def test_an_undeclared_column_is_refused() -> None:
    with pytest.raises(KeyError, match=r"latency has no column nonsense, prefil_ms"):
        to_table("latency", [{"sweep": "a"}, {"prefil_ms": 1.0, "nonsense": 2, "sweep": "b"}])


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        to_table("latency", [{"prefill_ms": "fast"}])


def test_knob_columns() -> None:
    knobs = Knobs(VisionSetting("longest_edge", 64), 4, (0, 2))
    assert knob_columns(knobs) == {
        "vision_knob": "longest_edge",
        "vision_value": "64",
        "image_size": None,
        "tier": None,
        "tier_definition": None,
        "aspect_distance": None,
        "force_full_tokens": None,
        "resize_to_fill": None,
        "moe_top_k": 4,
        "num_active_blocks": 2,
        "active_blocks": [0, 2],
    }
    native = knob_columns(Knobs(VisionSetting(), None, (0,)))
    assert (native["vision_knob"], native["vision_value"], native["moe_top_k"]) == ("native", None, None)
    sized = knob_columns(Knobs(VisionSetting("image_size", "560x336"), None, (0,)))
    assert (sized["image_size"], sized["vision_value"], sized["tier"]) == ("560x336", "560x336", None)
    tier = VisionSetting("tier", "low", TIERS["low"], "log", force_full_tokens=True, resize_to_fill=False)
    low = knob_columns(Knobs(tier, None, (0,)))
    assert json.loads(low["tier_definition"]) == {
        "name": "low",
        "min_crops": 1,
        "max_crops": 3,
        "preferred_crops": [2, 3],
        "mismatch_threshold": 0.3,
    }
    assert [low[name] for name in KNOBS if name in ("tier", "force_full_tokens")] == ["low", True]
    assert (low["aspect_distance"], low["resize_to_fill"]) == ("log", False)
    assert set(native) == {*KNOBS, "tier_definition", "aspect_distance", "resize_to_fill"}

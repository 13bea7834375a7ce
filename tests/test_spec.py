"""Sweep files: what a valid one becomes, and the exact line that is printed for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.json_schema import SCHEMA_PATH, schema_text, sweep_json_schema
from orchestrator.spec import Accuracy, Latency, Problem, SpecError, load_sweep, parse_sweep
from orchestrator.spec_models import MODEL_AXES, Knobs, ModelEntry, ModelVariant, Section, Sweep

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(path for path in (ROOT / "sweeps").glob("*.yaml") if path.name != "datasets.yaml")  # the presets
HEAD = "name: x\nmodels: [m]\ndatasets: [d]\n"
AXES = ", ".join(Knobs.model_fields)
TOP = ", ".join(Sweep.model_fields)
COUNTS = "must be a whole number >= 1, or a list of them"
ENGINES = "must be one of eager, graph, or a list of them"

# What stands from line 4 of an otherwise valid sweep, and what is printed about it.
MISTAKES_BELOW_THE_HEAD = [
    # unknown keys, on each level
    ("knob: {}", f"4: knob: unknown key, did you mean knobs? (allowed: {TOP})"),
    ("moe_top_k: [4]", f"4: moe_top_k: unknown key, did you mean knobs.moe_top_k? (allowed: {TOP})"),
    ("zzz: 1", f"4: zzz: unknown key (allowed: {TOP})"),
    ("on: 1", f"4: on: unknown key (allowed: {TOP})"),
    ("knobs:\n  moe_topk: [4]", f"5: knobs.moe_topk: unknown key, did you mean moe_top_k? (allowed: {AXES})"),
    ("knobs: {Tiles: [4]}", f"4: knobs.Tiles: unknown key, did you mean tiles? (allowed: {AXES})"),
    (
        "sampling: {stratgy: full}",
        "4: sampling.stratgy: unknown key, did you mean strategy? (allowed: strategy, n, seed)",
    ),
    (
        "latency:\n  samples: 8\n  warm_up: 1",
        "6: latency.warm_up: unknown key, did you mean warmup? "
        "(allowed: samples, repeats, visits, output_tokens, batch_size, warmup, max_relative_error, max_seconds, seed)",
    ),
    (
        "knobs: {batch_size: [4]}",
        f"4: knobs.batch_size: unknown key, did you mean latency.batch_size? (allowed: {AXES})",
    ),
    (
        "knobs: {engine: [eager, graph]}",
        f"4: knobs.engine: unknown key, did you mean engine in an entry of models? (allowed: {AXES})",
    ),
    (
        "hardware:\n  - acelerator: H100",
        "5: hardware[0].accelerator: required key is missing\n"
        "sweep.yaml:5: hardware[0].acelerator: unknown key, did you mean accelerator? "
        "(allowed: accelerator, min_memory_gb, workers)",
    ),
    # wrong kinds of value
    ("knobs: [4]", f"4: knobs: must be a mapping of keys ({AXES}), got [4]"),
    ("sampling: lhs", "4: sampling: must be a mapping of keys (strategy, n, seed), got 'lhs'"),
    ("latency: on", "4: latency: must be a mapping of keys, or off, got on"),
    ("latency:", "4: latency: must be a mapping of keys, or off, got nothing"),
    ("latency: {samples: eight}", "4: latency.samples: must be a whole number >= 1, got 'eight'"),
    ("latency: {samples: yes}", "4: latency.samples: must be a whole number >= 1, got yes"),
    ("latency: {samples: 8.0}", "4: latency.samples: must be a whole number >= 1, got 8.0"),
    (
        "latency: {samples: '8'}",
        "4: latency.samples: must be a whole number >= 1, got '8' (YAML reads this as text, write 8)",
    ),
    (
        "latency: {max_relative_error: 2e-2}",
        "4: latency.max_relative_error: must be a number between 0 and 1, both excluded, got '2e-2' "
        "(YAML reads this as text, write 0.02)",
    ),
    ("results: 5", '4: results: must be text, got 5 (write "5", in quotes)'),
    ("results: {a: 1}", "4: results: must be text, got a mapping"),
    ("accuracy: {batch_size: 99999999999999999999}", "4: accuracy.batch_size: the number is too large"),
    ("accuracy: {batch_size: !!int x}", "4: accuracy.batch_size: cannot read 'x' as int"),
    (
        "results: !!python/name:os.system ''",
        "4: results: the YAML tag tag:yaml.org,2002:python/name:os.system is not supported, write a plain value",
    ),
    ("? [a]\n: 1", "4: a key must be one plain word"),
    ("latency: &a {samples: *a}", "4: latency.samples: contains itself, through a YAML alias"),
    ("latency: {<<: 3}", "4: latency: << must name another mapping"),
    # impossible values
    ("latency: {samples: 0}", "4: latency.samples: must be a whole number >= 1, got 0"),
    ("latency: {warmup: -1}", "4: latency.warmup: must be a whole number >= 0, got -1"),
    *(
        (
            f"latency: {{max_relative_error: {value}}}",
            f"4: latency.max_relative_error: must be a number between 0 and 1, both excluded, got {value}",
        )
        for value in ("0", "1", "-0.5", ".nan", ".inf", "true")
    ),
    ("accuracy: {batch_size: 0}", "4: accuracy.batch_size: must be a whole number >= 1, got 0"),
    ("accuracy: {batch_size: [1, 4]}", "4: accuracy.batch_size: must be a whole number >= 1, got [1, 4]"),
    # sizes of timed batches: one, or a list
    *(
        (f"latency: {{batch_size: {written}}}", f"4: latency.batch_size: {COUNTS}, got {shown}")
        for written, shown in [
            ("0", "0"),
            ("-1", "-1"),
            ("true", "true"),
            ("4.0", "4.0"),
            ("null", "null"),
            ("all", "'all'"),
            ("{from: 1}", "a mapping"),
            ("'4'", "'4' (YAML reads this as text, write 4)"),
            ("1e1", "'1e1' (YAML reads this as text, write 10)"),
            ("'1, 4'", "'1, 4', write [1, 4]"),
        ]
    ),
    ("latency:\n  batch_size:", f"5: latency.batch_size: {COUNTS}, got nothing"),
    ("latency:\n  batch_size: 1, 4", f"5: latency.batch_size: {COUNTS}, got '1, 4', write [1, 4]"),
    (
        "latency: {batch_size: []}",
        "4: latency.batch_size: must not be an empty list, name at least one value or leave the key out",
    ),
    (
        "latency:\n  batch_size:\n  - 1\n  - 0\n  - '4'\n  - [4]",
        "7: latency.batch_size[1]: must be a whole number >= 1, got 0\n"
        "sweep.yaml:8: latency.batch_size[2]: must be a whole number >= 1, got '4' "
        "(YAML reads this as text, write 4)\n"
        "sweep.yaml:9: latency.batch_size[3]: must be a whole number >= 1, got [4]",
    ),
    (
        "latency:\n  batch_size:\n  - 8\n  - 4\n  - 010",
        "8: latency.batch_size[2]: 010 is listed twice, first on line 6",
    ),
    (
        "latency: {batch_size: [4, 4, 4]}",
        "4: latency.batch_size[1]: 4 is listed twice, first on line 4\n"
        "sweep.yaml:4: latency.batch_size[2]: 4 is listed twice, first on line 4",
    ),
    ("latency: {batch_size: [4, 99999999999999999999]}", "4: latency.batch_size[1]: the number is too large"),
    # visits and their order
    ("latency: {visits: 0}", "4: latency.visits: must be a whole number >= 1, got 0"),
    ("latency: {visits: [1, 2]}", "4: latency.visits: must be a whole number >= 1, got [1, 2]"),
    (
        "latency: {visit: 2}",
        "4: latency.visit: unknown key, did you mean visits? "
        "(allowed: samples, repeats, visits, output_tokens, batch_size, warmup, max_relative_error, max_seconds, seed)",
    ),
    ("latency: {seed: -1}", "4: latency.seed: must be a whole number from 0 to 4294967295, got -1"),
    ("latency: {seed: 4294967296}", "4: latency.seed: must be a whole number from 0 to 4294967295, got 4294967296"),
    ("latency: off\naccuracy: off", "5: accuracy: latency and accuracy are both off, nothing is left to measure"),
    # hardware
    ("hardware: []", "4: hardware: must not be an empty list, name at least one value or leave the key out"),
    ("hardware: {accelerator: H100}", "4: hardware: must be a list, got a mapping"),
    (
        "hardware: [H100]",
        "4: hardware[0]: must be a mapping of keys (accelerator, min_memory_gb, workers), got 'H100'",
    ),
    (
        "hardware: [{accelerator: H100, workers: 0}]",
        "4: hardware[0].workers: must be a whole number >= 1, or all, got 0",
    ),
    (
        "hardware: [{accelerator: H100, workers: al}]",
        "4: hardware[0].workers: must be a whole number >= 1, or all, got 'al', did you mean all?",
    ),
    (
        "hardware: [{accelerator: H100, min_memory_gb: 0}]",
        "4: hardware[0].min_memory_gb: must be a number > 0, got 0",
    ),
    (
        "hardware:\n- {accelerator: H100}\n- {accelerator: H100, workers: 2}",
        "6: hardware[1]: the same accelerator is listed twice, first on line 5",
    ),
    # axes
    ("knobs: {moe_top_k: 4}", "4: knobs.moe_top_k: must be a list, write [4]"),
    ("knobs: {tier: low}", "4: knobs.tier: must be a list, write [low]"),
    ("knobs:\n  moe_top_k:", "5: knobs.moe_top_k: must be a list, got nothing"),
    ("knobs: {tiles: []}", "4: knobs.tiles: must not be an empty list, name at least one value or leave the key out"),
    ("knobs: {moe_top_k: [1, 0]}", "4: knobs.moe_top_k[1]: must be a whole number >= 1, got 0"),
    ("knobs: {moe_top_k: [true]}", "4: knobs.moe_top_k[0]: must be a whole number >= 1, got true"),
    ("knobs: {force_full_tokens: [1]}", "4: knobs.force_full_tokens[0]: must be true or false, got 1"),
    ("knobs:\n  tiles:\n  - 4\n  - 2\n  - 4", "8: knobs.tiles[2]: 4 is listed twice, first on line 6"),
    ("knobs: {resize_to_fill: [no, off]}", "4: knobs.resize_to_fill[1]: off is listed twice, first on line 4"),
    *(
        (
            f"knobs: {{image_size: [{size}]}}",
            f"4: knobs.image_size[0]: must be HEIGHTxWIDTH in pixels such as 560x336, got {shown}",
        )
        for size, shown in [("560", "560"), ("560*336", "'560*336'"), ("560:33", "560:33"), ("0x336", "0x336")]
    ),
    (
        "knobs: {tier: [lo]}",
        "4: knobs.tier[0]: must be one of low, medium, high, got 'lo', did you mean low?",
    ),
    (
        "knobs: {tier: [tiny]}\ncrop_selection: {tiers: [{name: small, min_crops: 1, max_crops: 2, "
        "preferred_crops: [2]}]}",
        "4: knobs.tier[0]: must be one of low, medium, high, small, got 'tiny', or define it under "
        "crop_selection.tiers",
    ),
    (
        "crop_selection: {aspect_distance: logarithmic}",
        "4: crop_selection.aspect_distance: must be one of linear, log, got 'logarithmic'",
    ),
    (
        "crop_selection: {tiers: [{name: small, min_crops: 3, max_crops: 2, preferred_crops: [2]}]}",
        "4: crop_selection.tiers[0].max_crops: must be at least min_crops, 3, got 2",
    ),
    (
        "crop_selection: {tiers: [{name: small, min_crops: 1, max_crops: 2, preferred_crops: [2, 4]}]}",
        "4: crop_selection.tiers[0].preferred_crops[1]: must be 1 to 2, got 4",
    ),
    (
        "crop_selection: {tiers: [{name: small, min_crops: 1, max_crops: 2, preferred_crops: []}]}",
        "4: crop_selection.tiers[0].preferred_crops: must not be an empty list, name at least one value or leave the "
        "key out",
    ),
    (
        "crop_selection:\n  tiers:\n  - {name: a, min_crops: 1, max_crops: 2, preferred_crops: [2]}\n"
        "  - {name: a, min_crops: 1, max_crops: 3, preferred_crops: [2]}",
        "7: crop_selection.tiers[1]: the tier a is defined twice, first on line 6",
    ),
    (
        "crop_selection: {tiers: [{name: small, min_crops: 1, max_crops: 1, preferred_crops: [1], min_crop: 1}]}",
        "4: crop_selection.tiers[0].min_crop: unknown key, did you mean min_crops? (allowed: name, min_crops, "
        "max_crops, preferred_crops, mismatch_threshold)",
    ),
    (
        "knobs:\n  image_size: [560x336]\n  moe_top_k: [4]\n  tiles: [4]\n  crops: [4]",
        "7: knobs.tiles: a sweep has at most one vision axis, "
        "found image_size (line 5), tiles (line 7), crops (line 8)",
    ),
    (
        "knobs:\n  tiles: [4]\n  moe_top_k: [8]\n  tiles: [2]",
        "7: knobs.tiles: duplicate key, first given on line 5",
    ),
    # blocks
    *(
        (
            f"knobs: {{active_blocks: [{setting}]}}",
            "4: knobs.active_blocks[0]: must be a number of blocks >= 1 or a list of block indices "
            f"such as [0, 1, 3], got {shown}",
        )
        for setting, shown in [("0", "0"), ("true", "true"), ("half", "'half'"), ("{}", "a mapping")]
    ),
    (
        "knobs: {active_blocks: [[]]}",
        "4: knobs.active_blocks[0]: must be a list of block indices such as [0, 1, 3], got []",
    ),
    (
        "knobs: {active_blocks: [4, [0, -1]]}",
        "4: knobs.active_blocks[1]: must be a list of block indices, each a whole number >= 0, got [0, -1]",
    ),
    *(
        (
            f"knobs: {{active_blocks: [{blocks}]}}",
            f"4: knobs.active_blocks[0]: must be a list of block indices in ascending order, each once, got {blocks}",
        )
        for blocks in ("[3, 1]", "[1, 1]")
    ),
    (
        "knobs: {active_blocks: [[0, 1], 2, [0, 1]]}",
        "4: knobs.active_blocks[2]: [0, 1] is listed twice, first on line 4",
    ),
    (
        "block_selection: {method: nll, keep: [1, 1]}",
        "4: block_selection.keep: must be a list of block indices, each once, got [1, 1]",
    ),
    (
        "block_selection: {method: importance}",
        "4: block_selection.method: importance reads block scores from a file, add scores: FILE",
    ),
    (
        "block_selection: {method: accuracy}",
        "4: block_selection.method: must be one of prefix, importance, accuracy_drop, nll, activation, similarity, "
        "beam, got 'accuracy', did you mean accuracy_drop?",
    ),
    ("block_selection: {keep: [0]}", "4: block_selection.keep: is not used by method prefix; leave it out"),
    (
        "block_selection: {method: importance, scores: a.json, samples: 4}",
        "4: block_selection.samples: is not used by method importance; leave it out",
    ),
    (
        "block_selection: {method: nll, scores: a.json}",
        "4: block_selection.scores: is not used by method nll; leave it out",
    ),
    (
        "block_selection: {method: nll, width: 3}",
        "4: block_selection.width: is not used by method nll; leave it out",
    ),
    (
        "block_selection: {method: beam, objective: speed}",
        "4: block_selection.objective: must be one of accuracy, nll, got 'speed'",
    ),
    (
        "block_selection: {method: nll, keep: all}",
        "4: block_selection.keep: must be a list of block indices such as [0, -1], where -1 is the last, got 'all'",
    ),
    # sampling
    (
        "sampling: {strategy: ballanced}",
        "4: sampling.strategy: must be one of full, balanced, stratified, boundary, lhs, got 'ballanced', "
        "did you mean balanced?",
    ),
    ("sampling: {strategy: lhs}", "4: sampling.strategy: lhs draws a number of combinations, add n: NUMBER"),
    ("sampling: {strategy: lhs, n: 0}", "4: sampling.n: must be a whole number >= 1, got 0"),
    (
        "sampling: {strategy: boundary, n: 9}",
        "4: sampling.n: belongs to strategy lhs, boundary decides the number of combinations itself",
    ),
    ("sampling: {n: 9}", "4: sampling.n: belongs to strategy lhs, full decides the number of combinations itself"),
    ("sampling: {seed: -1}", "4: sampling.seed: must be a whole number from 0 to 4294967295, got -1"),
]

# Whole files.
NAME_RULE = "at most 100 letters, digits, dots, dashes and underscores, not starting with a dot"
MISTAKES_IN_WHOLE_FILES = [
    ("", "sweep.yaml: is empty, a sweep needs at least name, models and datasets"),
    ("# only a comment\n", "sweep.yaml: is empty, a sweep needs at least name, models and datasets"),
    ("- a\n", f"sweep.yaml:1: a sweep must be a mapping of keys ({TOP}), got ['a']"),
    ("hello", f"sweep.yaml:1: a sweep must be a mapping of keys ({TOP}), got 'hello'"),
    (
        "a: [1\nb: 2",
        "sweep.yaml:2:2: not valid YAML: expected ',' or ']', but got ':' "
        "(while parsing a flow sequence that starts on line 1)",
    ),
    (
        "a:\n\tb: 1",
        "sweep.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token, indent with spaces",
    ),
    (
        "a: 1\n---\nb: 1",
        "sweep.yaml:2:1: not valid YAML: expected a single document in the stream, but found another document",
    ),
    ("a: 1\nb: \x00", "sweep.yaml:2: not valid YAML: the character U+0000 is not allowed"),
    ('a: "\\Uffffffff"', "sweep.yaml: not valid YAML: an escape in a quoted text names no character"),
    ("[" * 3000, "sweep.yaml: not a sweep: nested too deeply"),
    (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
        ),
        "sweep.yaml: not a sweep: more than 100000 values",
    ),
    ("# x\nname: x\nmodels: [m]\n", "sweep.yaml:2: datasets: required key is missing"),
    ("name: a/b\nmodels: [m]\ndatasets: [d]", f"sweep.yaml:1: name: must be {NAME_RULE}, got 'a/b'"),
    ("name: .a\nmodels: [m]\ndatasets: [d]", f"sweep.yaml:1: name: must be {NAME_RULE}, got '.a'"),
    ("name: 2024\nmodels: [m]\ndatasets: [d]", f"sweep.yaml:1: name: must be {NAME_RULE}, got 2024"),
    ("name: x\nmodels: m\ndatasets: [d]", "sweep.yaml:2: models: must be a list, write [m]"),
    (
        "name: x\nmodels: []\ndatasets: [d]",
        "sweep.yaml:2: models: must not be an empty list, name at least one value or leave the key out",
    ),
    ("name: x\nmodels: [5]\ndatasets: [d]", "sweep.yaml:2: models[0]: must be a name, or a mapping with a name, got 5"),
    ("name: x\nmodels: ['']\ndatasets: [d]", "sweep.yaml:2: models[0].name: must be text, got ''"),
    ("name: x\nmodels: [{dtype: float16}]\ndatasets: [d]", "sweep.yaml:2: models[0].name: required key is missing"),
    (
        "name: x\nmodels:\n- {name: m, dtype: bf16}\ndatasets: [d]",
        "sweep.yaml:3: models[0].dtype: must be one of float32, bfloat16, float16, or a list of them, got 'bf16', "
        "did you mean bfloat16?",
    ),
    (
        "name: x\nmodels:\n- name: m\n  dtype:\n  - float16\n  - bf16\n  experts: [grouped, eager]\ndatasets: [d]",
        "sweep.yaml:6: models[0].dtype[1]: must be one of float32, bfloat16, float16, got 'bf16', "
        "did you mean bfloat16?\n"
        "sweep.yaml:7: models[0].experts[0]: must be one of eager, grouped_mm, batched_mm, got 'grouped', "
        "did you mean grouped_mm?",
    ),
    *(
        (
            f"name: x\nmodels:\n- name: m\n  engine: {written}\ndatasets: [d]",
            f"sweep.yaml:4: models[0].engine: {ENGINES}, got {shown}",
        )
        for written, shown in [
            ("eager, graph", "'eager, graph', write [eager, graph]"),
            ("grpah", "'grpah', did you mean graph?"),
            ("off", "off"),
            ("~", "~"),
            ("", "nothing"),
            ("{eager: graph}", "a mapping"),
        ]
    ),
    (
        "name: x\nmodels: [{name: m, engine: [eager, null, on, [graph]]}]\ndatasets: [d]",
        "sweep.yaml:2: models[0].engine[1]: must be one of eager, graph, got null\n"
        "sweep.yaml:2: models[0].engine[2]: must be one of eager, graph, got on\n"
        "sweep.yaml:2: models[0].engine[3]: must be one of eager, graph, got ['graph']",
    ),
    (
        "name: x\nmodels: [{name: m, attention: [sdpa, !!int x]}]\ndatasets: [d]",
        "sweep.yaml:2: models[0].attention[1]: cannot read 'x' as int",
    ),
    (
        "name: x\nmodels: [{name: m, attention: []}]\ndatasets: [d]",
        "sweep.yaml:2: models[0].attention: must not be an empty list, name at least one value or leave the key out",
    ),
    (
        "name: x\nmodels: [{name: m, weights: [checkpoint, random]}]\ndatasets: [d]",
        "sweep.yaml:2: models[0].weights: must be one of checkpoint, random, got ['checkpoint', 'random']",
    ),
    (
        "name: x\nmodels:\n- m\n- name: n\n  attention:\n  - sdpa\n  - eager\n  - sdpa\ndatasets: [d]",
        "sweep.yaml:8: models[1].attention[2]: sdpa is listed twice, first on line 6",
    ),
    (
        "name: x\nmodels:\n- {name: m, engine: [eager, graph]}\n- {name: m, engine: eager}\ndatasets: [d]",
        "sweep.yaml:4: models[1]: the same model is listed twice, first on line 3",
    ),
    (
        "name: x\nmodels:\n- {name: m, engine: graph}\n- m\n- {name: m, engine: [graph, eager]}\ndatasets: [d]",
        "sweep.yaml:5: models[2]: the same model is listed twice, first on line 3",
    ),
    (
        "name: x\nmodels:\n- {name: m, attention: [sdpa, eager], engine: graph}\n"
        "- {name: m, dtype: [float16, float61], attention: sdpa, engine: [eager, graph]}\n"
        "- {name: m, dtype: [bfloat16, float16], attention: [eager, sdpa], engine: eager}\ndatasets: [d]",
        "sweep.yaml:4: models[1].dtype[1]: must be one of float32, bfloat16, float16, got 'float61', "
        "did you mean float16?\n"
        "sweep.yaml:5: models[2]: the same model is listed twice, first on line 4",
    ),
    (
        "name: x\nmodels:\n- name: m\n  revision: 0b10\ndatasets: [d]",
        'sweep.yaml:4: models[0].revision: must be text, got 0b10 (write "0b10", in quotes)',
    ),
    (
        "name: x\nmodels:\n- m\n- n\n- {name: m, engine: eager}\ndatasets: [d]",
        "sweep.yaml:5: models[2]: the same model is listed twice, first on line 3",
    ),
    (
        "name: x\nmodels: [m]\ndatasets:\n- d\n- {name: d, split: train}",
        "sweep.yaml:5: datasets[1]: the dataset d is listed twice, first on line 4",
    ),
    (
        "name: x\nmodels: [m]\ndatasets: [{name: d, samples: -1}]",
        "sweep.yaml:3: datasets[0].samples: must be a whole number >= 1, got -1",
    ),
    (
        "name: x\nmodels: [m]\ndatasets: [{name: d, columns: {imag: i}}]",
        "sweep.yaml:3: datasets[0].columns.imag: unknown key, did you mean image? "
        "(allowed: image, question, answers, id, image_id, question_type, options, records)",
    ),
    (
        "name: x\nmodels: [m]\ndatasets: [{name: d, columns: {options: 3}}]",
        "sweep.yaml:3: datasets[0].columns.options: must be text, or a list of them, got 3",
    ),
    (
        "name: x\nmodels: [m]\ndatasets: [{name: d, images: {pth: i}}]",
        "sweep.yaml:3: datasets[0].images.pth: unknown key, did you mean path? (allowed: path, config, split, id)",
    ),
]


def message(text: str) -> str:
    with pytest.raises(SpecError) as raised:
        parse_sweep(text)
    return str(raised.value)


@pytest.mark.parametrize(("below", "expected"), MISTAKES_BELOW_THE_HEAD, ids=lambda text: text[:40])
def test_each_mistake_is_one_plain_line(below: str, expected: str) -> None:
    assert message(HEAD + below) == f"sweep.yaml:{expected}"


@pytest.mark.parametrize(("text", "expected"), MISTAKES_IN_WHOLE_FILES, ids=lambda text: text[:40])
def test_each_mistake_in_a_whole_file_is_one_plain_line(text: str, expected: str) -> None:
    assert message(text) == expected


def test_all_mistakes_of_a_file_are_reported_in_its_order() -> None:
    text = HEAD + (
        "knobs:\n  tiles: [0]\n  crops: [1]\n  moe_topk: [1]\nlatency: {samples: x, repeats: -1}\n"
        "sampling: {strategy: lhs}\nextra: 1\nextra: 2\n"
    )
    places = [line.split(": ")[:2] for line in message(text).splitlines()]
    assert places == [
        ["sweep.yaml:5", "knobs.tiles[0]"],
        ["sweep.yaml:6", "knobs.crops"],
        ["sweep.yaml:7", "knobs.moe_topk"],
        ["sweep.yaml:8", "latency.samples"],
        ["sweep.yaml:8", "latency.repeats"],
        ["sweep.yaml:9", "sampling.strategy"],
        ["sweep.yaml:10", "extra"],
        ["sweep.yaml:11", "extra"],
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message_of(path: Path | str) -> str:
        with pytest.raises(SpecError) as raised:
            load_sweep(path)
        return str(raised.value)

    (tmp_path / "h100.yaml").write_text("a: 1")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    meant = tmp_path / "h100.yaml"
    assert message_of(tmp_path / "h10.yaml") == f"{tmp_path / 'h10.yaml'}: no such file, did you mean {meant}?"
    assert message_of("no/such/folder.yaml") == "no/such/folder.yaml: no such file"
    assert message_of(tmp_path) == f"{tmp_path}: is a folder, a sweep is one YAML file"
    assert message_of(meant / "x.yaml") == f"{meant / 'x.yaml'}: cannot be read: Not a directory"
    assert message_of(tmp_path / "latin.yaml") == f"{tmp_path}/latin.yaml:2: is not UTF-8 text, save the file as UTF-8"
    assert message_of("a\0b") == "a\\x00b: cannot be read: embedded null byte"


def test_a_minimal_sweep_has_the_documented_defaults() -> None:
    sweep = parse_sweep(HEAD)
    assert (sweep.name, sweep.results, sweep.hardware) == ("x", "results/", None)
    model = {"name": "m", "weights": "checkpoint", "engine": ("eager",)}
    assert sweep.models[0].model_dump(exclude_none=True) == model
    assert sweep.datasets[0].model_dump(exclude_none=True) == {"name": "d", "seed": 0}
    assert sweep.knobs.axes == {}
    assert sweep.knobs.vision_axis is None
    assert sweep.block_selection.method == "prefix"
    assert (sweep.sampling.strategy, sweep.sampling.n, sweep.sampling.seed) == ("full", None, 0)
    assert sweep.latency == Latency(
        samples=64,
        repeats=10,
        visits=2,
        output_tokens=16,
        batch_size=1,
        warmup=1,
        max_relative_error=0.02,
        max_seconds=None,
        seed=0,
    )
    assert sweep.latency == Latency()
    assert sweep.latency is not None
    assert sweep.latency.batch_size == (1,)
    assert sweep.accuracy == Accuracy(batch_size=16)


def test_axes_keep_the_values_as_written() -> None:
    sweep = parse_sweep(HEAD + "knobs: {image_size: [560x336], force_full_tokens: [no], active_blocks: [12, [0, 2]]}")
    assert sweep.knobs.axes == {
        "image_size": ("560x336",),
        "force_full_tokens": (False,),
        "active_blocks": (12, (0, 2)),
    }
    assert sweep.knobs.vision_axis == "image_size"


@pytest.mark.parametrize("word", ["off", "no", "false", "OFF", "'off'"])
def test_off_in_every_spelling(word: str) -> None:
    assert parse_sweep(HEAD + f"accuracy: {word}").accuracy is None
    assert parse_sweep(HEAD + f"latency: {word}").latency is None


def test_values_that_yaml_makes_hard() -> None:
    sweep = parse_sweep(
        HEAD.replace("[m]", "[{name: m, revision: 2024-01-01}]")
        + "knobs:\n  # moe_top_k: [4]\nlatency: {max_relative_error: null}\n"
        + "hardware: [{accelerator: A100, min_memory_gb: 80}]\n"
    )
    assert sweep.models[0].revision == "2024-01-01"
    assert sweep.knobs.axes == {}
    assert sweep.latency is not None
    assert sweep.latency.max_relative_error is None
    assert sweep.hardware is not None
    assert sweep.hardware[0].min_memory_gb == 80.0
    assert sweep.hardware[0].workers == "all"


def test_merge_keys_fill_in_what_is_not_written() -> None:
    sweep = parse_sweep("name: x\nmodels: [&m {name: m, dtype: float16}, {<<: *m, name: n}]\ndatasets: [d]")
    assert [(model.name, model.dtype) for model in sweep.models] == [("m", ("float16",)), ("n", ("float16",))]


def test_the_same_model_twice_is_fine_when_another_key_differs() -> None:
    sweep = parse_sweep("name: x\nmodels: [m, {name: m, dtype: float16}]\ndatasets: [d]")
    assert [variant.dtype for variant in sweep.model_variants] == [None, "float16"]


@pytest.mark.parametrize(
    ("written", "sizes"),
    [("16", (16,)), ("[16]", (16,)), ("[1, 4, 16]", (1, 4, 16)), ("[16, 1]", (16, 1)), ("0x10", (16,))],
)
def test_one_batch_size_is_a_list_of_one(written: str, sizes: tuple[int, ...]) -> None:
    sweep = parse_sweep(HEAD + f"latency: {{batch_size: {written}}}")
    assert sweep.latency is not None
    assert sweep.latency.batch_size == sizes


def test_more_visits_than_repeats_and_a_seed_are_fine() -> None:
    sweep = parse_sweep(HEAD + "latency: {repeats: 2, visits: 3, seed: 7}")
    assert sweep.latency is not None
    assert (sweep.latency.repeats, sweep.latency.visits, sweep.latency.seed) == (2, 3, 7)


def test_every_combination_of_the_levels_of_an_entry_is_a_model_of_its_own() -> None:
    sweep = parse_sweep(
        "name: x\nmodels: [m, {name: n, engine: [eager, graph], attention: [sdpa, eager], dtype: null}]\ndatasets: [d]"
    )
    m, n = sweep.models
    assert (n.engine, n.attention, n.dtype, n.experts) == (("eager", "graph"), ("sdpa", "eager"), None, None)
    assert sweep.model_variants == (
        ModelVariant(0, m, None, None, None, "eager"),
        ModelVariant(1, n, None, "sdpa", None, "eager"),
        ModelVariant(1, n, None, "sdpa", None, "graph"),
        ModelVariant(1, n, None, "eager", None, "eager"),
        ModelVariant(1, n, None, "eager", None, "graph"),
    )
    assert sweep.where("models[1].engine[1]") == "sweep.yaml:2"


def test_a_model_has_an_axis_for_each_key_that_takes_a_list() -> None:
    axes = list(MODEL_AXES)
    assert [name for name in ModelEntry.model_fields if name in axes] == axes
    assert list(ModelVariant.__dataclass_fields__) == ["index", "entry", *axes]
    for axis, levels in MODEL_AXES.items():
        sweep = parse_sweep(f"name: x\nmodels: [{{name: m, {axis}: [{', '.join(levels)}]}}]\ndatasets: [d]")
        assert [getattr(variant, axis) for variant in sweep.model_variants] == list(levels)


def test_entries_that_share_levels_but_no_combination_are_fine() -> None:
    entries = (
        "{name: m, engine: [eager, graph], attention: sdpa}, {name: m, engine: [eager, graph], attention: eager}, "
        "{name: m, engine: eager, dtype: [float16, float32]}, {name: m, engine: graph}, "
        "{name: n, engine: [eager, graph]}"
    )
    sweep = parse_sweep(f"name: x\nmodels: [{entries}]\ndatasets: [d]")
    assert [variant.index for variant in sweep.model_variants] == [0, 0, 1, 1, 2, 2, 3, 4, 4]


def test_long_lists_of_levels_that_there_are_not_are_refused_in_no_time() -> None:
    levels = ", ".join(f"level-{i}" for i in range(5000))
    entry = ", ".join(f"{axis}: [{levels}]" for axis in MODEL_AXES)
    lines = message(f"name: x\nmodels: [{{name: m, {entry}}}]\ndatasets: [d]").splitlines()
    assert len(lines) == 5000 * len(MODEL_AXES)


def test_where_finds_the_line_of_every_entry_and_value() -> None:
    text = (
        "name: x\nmodels:\n  - m\n  - name: n\n    dtype: float16\ndatasets: [d]\nknobs:\n  tiles:\n    - 4\n    - 6\n"
    )
    sweep = parse_sweep(text, "sweeps/a.yaml")
    assert sweep.where("models[0]") == "sweeps/a.yaml:3"
    assert sweep.where("models[0].name") == "sweeps/a.yaml:3"
    assert sweep.where("models[1]") == "sweeps/a.yaml:4"
    assert sweep.where("models[1].dtype") == "sweeps/a.yaml:5"
    assert sweep.where("knobs.tiles[1]") == "sweeps/a.yaml:10"
    assert sweep.where("latency.samples") == "sweeps/a.yaml:1"
    assert str(sweep.problem("models[1]", "no such model")) == "sweeps/a.yaml:4: models[1]: no such model"


def test_a_sweep_cannot_be_changed() -> None:
    sweep = parse_sweep(HEAD)
    with pytest.raises(ValidationError):
        sweep.name = "y"  # type: ignore[misc]


def test_reading_a_sweep_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.spec import load_sweep; import orchestrator.sampling;"
        "load_sweep('sweeps/demo.yaml');"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_committed_sweeps_are_valid_and_point_editors_to_the_schema(path: Path) -> None:
    assert load_sweep(path).name == path.stem
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=sweep.schema.json"
    jsonschema: Any = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load(path.read_text()), sweep_json_schema())


def test_the_committed_schema_is_current() -> None:
    hint = "sweeps/sweep.schema.json is out of date, run: python -m orchestrator.json_schema"
    assert SCHEMA_PATH.read_text(encoding="utf-8") == schema_text(), hint


@pytest.mark.parametrize(
    ("models", "latency", "right"),
    [
        ("[{name: m, engine: [eager, graph], dtype: float16}]", "{batch_size: 4}", True),
        (
            "[{name: m, engine: graph, attention: [sdpa, eager], experts: null}]",
            "{batch_size: [1, 4], visits: 1}",
            True,
        ),
        ("[{name: m, engine: []}]", "{}", False),
        ("[{name: m, engine: [eager, eager]}]", "{}", False),
        ("[{name: m, engine: null}]", "{}", False),
        ("[m]", "{batch_size: []}", False),
        ("[m]", "{batch_size: [4, 4]}", False),
        ("[m]", "{batch_size: [0]}", False),
        ("[m]", "{batch_size: 0}", False),
        ("[m]", "{visits: 0}", False),
    ],
)
def test_the_schema_takes_one_value_or_a_list_where_a_sweep_does(models: str, latency: str, right: bool) -> None:
    text = f"name: x\nmodels: {models}\ndatasets: [d]\nlatency: {latency}\n"
    assert (problems_of(text) == ()) is right
    jsonschema: Any = pytest.importorskip("jsonschema")
    schema = sweep_json_schema()
    assert jsonschema.Draft202012Validator(schema).is_valid(yaml.safe_load(text)) is right


def test_the_schema_tells_editors_the_value_that_is_taken_where_one_or_more_may_stand() -> None:
    sections = sweep_json_schema()["$defs"]
    assert sections["Latency"]["properties"]["batch_size"]["default"] == 1
    assert sections["ModelEntry"]["properties"]["engine"]["default"] == "eager"
    assert sections["ModelEntry"]["properties"]["dtype"]["default"] is None


def test_every_key_is_explained_in_the_schema() -> None:
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"


GARBAGE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["off", "low", "lhs", "560x336", "importance", "all", "<<", "1e3", "2:30", "graph", "1, 4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def section_of(model: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(model.model_fields)), GARBAGE, max_size=5)


SECTIONS = st.sampled_from(Section.__subclasses__()).flatmap(section_of)
ANY_SWEEP = st.dictionaries(
    st.sampled_from(sorted(Sweep.model_fields)), GARBAGE | SECTIONS | st.lists(SECTIONS | GARBAGE, max_size=3)
)


def problems_of(text: str) -> tuple[Problem, ...]:
    try:
        parse_sweep(text)
    except SpecError as error:
        return error.problems
    return ()


def only_spec_errors(text: str) -> None:
    for problem in problems_of(text):
        line = str(problem)
        assert line.isprintable()
        # The words for an error that has none of its own: no mistake should get there.
        assert "is not allowed here" not in line


@given(ANY_SWEEP)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_known_keys_with_random_values_never_raise_anything_else(data: dict[str, Any]) -> None:
    only_spec_errors(yaml.safe_dump(data))
    only_spec_errors(json.dumps(data))


@given(st.text(max_size=60) | st.text("ab:-[]{}&*<!?|>\"'\\ \n\t#,U0", max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_text_never_raises_anything_else(text: str) -> None:
    only_spec_errors(text)
    only_spec_errors(HEAD + text)


def test_columns_of_a_data_set_may_be_several_or_none() -> None:
    sweep = parse_sweep(
        "name: x\nmodels: [m]\ndatasets:\n"
        "- {name: d, columns: {image: [a, b], options: choices, question: null, records: qa}, images: {id: key}}"
    )
    entry = sweep.datasets[0]
    assert entry.columns is not None
    assert entry.columns.model_dump(exclude_unset=True) == {
        "image": ("a", "b"),
        "options": ("choices",),
        "question": None,
        "records": "qa",
    }
    assert entry.images is not None
    assert entry.images.model_dump(exclude_none=True) == {"id": "key"}

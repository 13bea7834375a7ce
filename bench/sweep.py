"""What a sweep costs: every setting and sample on its own, against tasks that share what no knob changes.

    python bench/sweep.py             # a small MolmoE with random weights, 27 settings, 24 samples; ten minutes
    python bench/sweep.py --quick     # a model of seconds, to see that it runs
    python bench/sweep.py --rounding  # how many answers differ between a batch and one sample at a time

The plain way goes through all settings and samples: preprocess, generate a fixed number of tokens, timed, then generate
again for the score, until end-of-sequence. It shares nothing, so its cost is proportional to the samples: it is run on
the first `--plain-samples` of them under every setting, and its time is scaled to all. Ours runs the same sweep in a
session: timed answers of a few samples, and scores of all. The bench ends with an error if one answer differs or one
image passed the vision tower more often than once per vision setting.

The floor is the operations that must happen, at the rate of a large matrix product on this machine: each image through
the tower once per vision setting, each prompt once per setting, the tokens of the answers, and the timed answers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import transformers
from molmoe import SMALL, matmul_rate
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from knobs.vision import VisionSetting
from orchestrator.backlog import Backlog
from orchestrator.plan import in_random_order
from workers.datasets import Dataset, DatasetSource, SampleRef, resolve_source
from workers.models import describe
from workers.models.adapter import VisionLanguageModel
from workers.models.byte_tokenizer import byte_tokenizer
from workers.models.processing import Inputs
from workers.probes import cpu_name
from workers.scorers import scorer
from workers.session import Session
from workers.tasks import Kind, Knobs, ModelSource, Protocol, Status, Task

SMALLER: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 1,
    "mlp_ratio": 1,
    "moe_num_experts": 8,
    "moe_top_k": 4,
    "vit_layers": [-1, -2],
    "vision_backbone": {
        "image_emb_dim": 32,
        "image_num_heads": 1,
        "image_num_key_value_heads": 1,
        "image_head_dim": 32,
        "image_num_layers": 2,
        "image_mlp_dim": 64,
    },
    "text_config": {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 4},
}
OUTPUT_TOKENS = 16
STAGES = ("preprocess_ms", "vision_ms", "projector_ms", "prefill_ms", "decode_ms", "total_ms")
GOAL = 1.3  # times the floor


@dataclass(frozen=True)
class Size:
    """What is swept, and on how much."""

    shape: dict[str, Any]
    vision: tuple[str, ...]
    top_k: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: int
    plain_samples: int
    timed_samples: int
    repeats: int


FULL = Size(SMALL, ("336x336", "336x560", "560x560"), (2, 4, 8), (4, 6, 8), 24, 2, 2, 3)
QUICK = Size(SMALLER, ("336x336", "336x560", "560x560"), (1, 2, 4), (2, 3, 4), 3, 1, 1, 1)
ROUNDED = replace(QUICK, samples=64)


@dataclass
class Spent:
    """What one way took, and what came out: answers by setting and sample, times by setting.

    Attributes:
        parts: seconds by kind of work.
        counts: fields of `workers.models.adapter.Counts`.
    """

    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    answers: dict[tuple[Knobs, str], str] = field(default_factory=dict)
    scores: dict[tuple[Knobs, str], float] = field(default_factory=dict)
    times: dict[Knobs, dict[str, float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    if options.rounding:
        print(rounding(ROUNDED, [torch.float32, torch.bfloat16]))
        return
    size = QUICK if options.quick else FULL
    size = replace(size, plain_samples=options.plain_samples or size.plain_samples)
    with tempfile.TemporaryDirectory() as folder:
        data = drawn(Path(folder), size.samples)
        dataset = Dataset.open(data)
        refs = tuple(dataset.select(None, 42))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source, vlm = built(size.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        print(header(options, size, vlm), flush=True)
        rate = matmul_rate(device, vlm.model.dtype)
        settings = grid(size)
        ours, rows = swept(source, vlm, data, refs, settings, size)
        plain = one_by_one(vlm, dataset, refs[: size.plain_samples], settings)
        rate = max(rate, matmul_rate(device, vlm.model.dtype))
    check(ours, plain, settings, size)
    print(report(ours, plain, floor(rows, size), rate, size))
    print(stages(rows, ours.parts[Kind.LATENCY.value], rate))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; times mean nothing")
    parser.add_argument("--rounding", action="store_true", help="count answers that a batch changes, by data type")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: 1)")
    parser.add_argument("--plain-samples", type=int, help="samples that the plain way is run on (default: 2 of 24)")
    return parser.parse_args(arguments)


# -- model and samples ------------------------------------------------------------------------------------------------


class Spelled(VisionLanguageModel):
    """Answers as numbers of tokens: a tokenizer of bytes has no text for most of a real vocabulary, so that answers
    that differ would read alike."""

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def built(entries: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[ModelSource, VisionLanguageModel]:
    """The model with random weights, of whose tokens one in twelve ends an answer, so that answers differ in length."""
    card = describe("molmoe-1b", random_weights=True)
    card.family.register_classes()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**dict(card.config) | entries)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).to(device).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)  # as they are initialised, the blocks add next to nothing
    model.generation_config.eos_token_id = list(range(0, model.config.get_text_config().vocab_size, 12))
    model.generation_config.pad_token_id = 0
    processor = card.family.processor(
        byte_tokenizer(card.family.special_tokens), model.config.to_dict(), card.preprocessor
    )
    source = ModelSource(
        name="molmoe",
        family=card.family.name,
        place="bench",
        revision=None,
        weights="random",
        fingerprint="bench",
        dtype=str(dtype).removeprefix("torch."),
        attention="sdpa",
        experts="grouped_mm",
        engine="eager",
    )
    return source, Spelled(model, processor, card, device)


def drawn(folder: Path, samples: int) -> DatasetSource:
    """Questions of different length, each about an image of its own."""
    lines = []
    for number in range(samples):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        question = "What is in the picture" + " and what is beside it" * (number % 5) + "?"
        entry = {"file_name": f"{number}.png", "id": number, "question": question, "answers": ["a circle"] * 10}
        lines.append(json.dumps(entry))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return resolve_source(
        name="drawn", path=str(folder), metric="vqa_accuracy", columns={"id": "id"}, base_folder=folder
    )


def grid(size: Size) -> list[Knobs]:
    return [
        Knobs(VisionSetting("image_size", canvas), top_k, tuple(range(blocks)))
        for canvas in size.vision
        for top_k in size.top_k
        for blocks in size.blocks
    ]


# -- the two ways -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def one_by_one(
    vlm: VisionLanguageModel, dataset: Dataset, refs: Sequence[SampleRef], settings: Sequence[Knobs]
) -> Spent:
    """The plain way, by transformers' own `generate`, after one generate that warms up."""
    spent = Spent()
    score = scorer(dataset.source.metric)
    warm = dataset.sample(refs[0].uid)
    generated(vlm, vlm.preprocess([warm.images()[0]], warm.prompt, settings[0].vision), 2)
    for done, knobs in enumerate(settings):
        for ref in refs:
            sample = dataset.sample(ref.uid)
            start = time.perf_counter()
            inputs = vlm.preprocess([sample.images()[0]], sample.prompt, knobs.vision)
            preprocessed = time.perf_counter()
            with vlm.knobs(knobs.moe_top_k, knobs.active_blocks):
                generated(vlm, inputs, OUTPUT_TOKENS, min_new_tokens=OUTPUT_TOKENS)
                timed = time.perf_counter()
                tokens = generated(vlm, inputs, OUTPUT_TOKENS)
            prediction = vlm.text(tokens)
            spent.answers[knobs, ref.uid] = prediction
            spent.scores[knobs, ref.uid] = score.score(prediction, sample.answers)
            end = time.perf_counter()
            spent.parts["preprocess"] += preprocessed - start
            spent.parts["timed"] += timed - preprocessed
            spent.parts["score"] += end - timed
            spent.counts.update(preprocessings=1, vision_passes=2, prefills=2)
        progress("plain", done + 1, len(settings))
    return spent


def generated(vlm: VisionLanguageModel, inputs: Inputs, tokens: int, **options: Any) -> list[int]:
    inputs = vlm.transfer(inputs)
    out = vlm.model.generate(**inputs.prompt, **inputs.vision, do_sample=False, max_new_tokens=tokens, **options)
    row: list[int] = out[0, inputs.prompt["input_ids"].shape[1] :].tolist()
    return row


def swept(
    source: ModelSource,
    vlm: VisionLanguageModel,
    data: DatasetSource,
    refs: tuple[SampleRef, ...],
    settings: Sequence[Knobs],
    size: Size,
) -> tuple[Spent, pd.DataFrame]:
    """Ours: tasks as a plan makes them, handed out by the backlog to one session; and the timed rows."""
    timed = Protocol(OUTPUT_TOKENS, batch_size=1, repeats=size.repeats, warmup=1)
    scored = Protocol(OUTPUT_TOKENS, batch_size=16, metric=data.metric)
    tasks = []
    for number, knobs in enumerate(settings):
        for kind, samples, protocol in (
            (Kind.LATENCY, refs[: size.timed_samples], timed),
            (Kind.ACCURACY, refs, scored),
        ):
            about = (kind, "bench", None, source, knobs, data, samples, protocol)
            tasks.append(Task(f"{kind.value}-{number}", f"c{number}", *about))
    backlog, last = Backlog(in_random_order(tasks, seed=42)), None
    session = Session("bench", vlm.device, load=lambda _source, _device: vlm)
    spent, rows = Spent(), []
    for done in range(len(tasks)):
        task = backlog.next_for("cpu", last)
        assert task is not None
        last = task
        before, start = session.counts, time.perf_counter()
        result = session.run(task)
        spent.parts[task.kind.value] += time.perf_counter() - start
        assert result.status is Status.DONE, result.traceback
        assert result.rows is not None
        if task.kind is Kind.ACCURACY:
            spent.counts += session.counts - before
            for row in result.rows.to_pylist():
                spent.answers[task.knobs, row["sample_id"]] = row["prediction"]
                spent.scores[task.knobs, row["sample_id"]] = row["score"]
        frame = result.rows.to_pandas().assign(vision=task.knobs.vision.value, kind=task.kind.value)
        rows.append(frame)
        if task.kind is Kind.LATENCY:
            frame["decode_ms"] = frame["decode_step_ms"].map(np.sum)
            spent.times[task.knobs] = {stage: float(frame[stage].median()) for stage in STAGES}
        progress("ours", done + 1, len(tasks))
    return spent, pd.concat(rows, ignore_index=True)


def progress(way: str, done: int, of: int) -> None:
    if done % 9 == 0 or done == of:
        print(f"{way}: {done} of {of}", file=sys.stderr, flush=True)


# -- what must be -----------------------------------------------------------------------------------------------------


def check(ours: Spent, plain: Spent, settings: Sequence[Knobs], size: Size) -> None:
    """Raises AssertionError: an answer differs, a score or a time is missing, or an image was encoded again."""
    different = [key for key, answer in plain.answers.items() if ours.answers[key] != answer]
    if different:
        raise AssertionError(f"{len(different)} of {len(plain.answers)} answers differ, such as {different[0]}")
    if len(ours.scores) != len(settings) * size.samples or ours.times.keys() != set(settings):
        raise AssertionError("the table is not complete")
    if ours.counts["vision_passes"] != len(size.vision) * size.samples:
        raise AssertionError(f"{ours.counts['vision_passes']} vision passes of {size.samples} images")


def floor(rows: pd.DataFrame, size: Size) -> dict[str, float]:
    """Operations by kind of work, from those counted on the timed samples."""
    timed, scored = (rows[rows["kind"] == kind.value] for kind in (Kind.LATENCY, Kind.ACCURACY))
    stages = ["vision_flops", "projector_flops", "prefill_flops", "decode_flops"]
    point = ["vision", "moe_top_k", "num_active_blocks"]
    counted = timed.groupby(point)[[*stages, "flops"]].mean()
    of_image = counted.groupby("vision")[["vision_flops", "projector_flops"]].mean().sum(axis=1)
    lengths = scored.groupby(point)["output_tokens"].sum()
    prompts = counted["prefill_flops"].sum() * size.samples
    # Prefill makes the first token of an answer.
    steps = (counted["decode_flops"] / (OUTPUT_TOKENS - 1) * (lengths - size.samples)).sum()
    answers = counted["flops"].sum() * size.timed_samples * size.repeats
    return {
        "vision": float(of_image.sum() * size.samples),
        "prefill": float(prompts),
        "decode": float(steps),
        "timed": float(answers),
    }


# -- what a batch changes ---------------------------------------------------------------------------------------------


def rounding(size: Size, dtypes: Sequence[torch.dtype]) -> str:
    """Answers that are not the same in batches of 16 and one sample at a time, under every setting."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["| data type | answers | differ | differ at the first token |", "|---|--:|--:|--:|"]
    for dtype in dtypes:
        source, vlm = built(size.shape, device, dtype)
        with tempfile.TemporaryDirectory() as folder:
            data = drawn(Path(folder), size.samples)
            refs = tuple(Dataset.open(data).select(None, 42))
            session = Session("bench", device, load=lambda _source, _device, vlm=vlm: vlm)  # type: ignore[misc]
            found: dict[int, list[str]] = {}
            for batch_size in (1, 16):
                protocol = Protocol(OUTPUT_TOKENS, batch_size=batch_size, metric=data.metric)
                found[batch_size] = []
                for knobs in grid(size):
                    task = Task("t", "c", Kind.ACCURACY, "bench", None, source, knobs, data, refs, protocol)
                    result = session.run(task)
                    assert result.rows is not None, result.traceback
                    found[batch_size] += result.rows["prediction"].to_pylist()
        pairs = list(zip(found[1], found[16], strict=True))
        differ = sum(alone != batched for alone, batched in pairs)
        at_once = sum(alone.split()[0] != batched.split()[0] for alone, batched in pairs)
        name = str(dtype).removeprefix("torch.")
        shares = [f"{count} ({count / len(pairs):.2%})" for count in (differ, at_once)]
        lines.append(f"| {name} | {len(pairs)} | {' | '.join(shares)} |")
    return "\n".join(lines)


# -- what is printed --------------------------------------------------------------------------------------------------


def header(options: argparse.Namespace, size: Size, vlm: VisionLanguageModel) -> str:
    device = torch.cuda.get_device_name() if vlm.device.type == "cuda" else f"{cpu_name()}, {options.threads} thread(s)"
    text = vlm.model.config.get_text_config(decoder=True)
    return (
        f"`python bench/sweep.py{' --quick' if options.quick else ''}` on {device}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.python_implementation()} {platform.python_version()}, "
        f"{str(vlm.model.dtype).removeprefix('torch.')}.\n\n"
        f"MolmoE of width {text.hidden_size}, {text.num_hidden_layers} blocks, {text.num_experts} experts, random "
        f"weights. Image sizes {', '.join(size.vision)}; top-k {', '.join(map(str, size.top_k))}; blocks "
        f"{', '.join(map(str, size.blocks))}. {size.samples} samples scored; {size.timed_samples} timed "
        f"{size.repeats} times; answers of at most {OUTPUT_TOKENS} tokens. The plain way was run on "
        f"{size.plain_samples} samples and scaled.\n"
    )


def report(ours: Spent, plain: Spent, flops: dict[str, float], rate: float, size: Size) -> str:
    scale = size.samples / size.plain_samples
    once, thrice = plain.seconds * scale, (plain.seconds + 2 * plain.parts["timed"]) * scale
    least = sum(flops.values()) / rate
    counts = {name: ours.counts[name] for name in ("preprocessings", "vision_passes", "prefills", "prompts")}
    rows: list[tuple[Any, ...]] = [
        ("plain, timed once", once, int(plain.counts["preprocessings"] * scale), *both(plain, scale)),
        ("plain, timed three times", thrice, "", "", ""),
        (
            "ours",
            ours.seconds,
            counts["preprocessings"],
            counts["vision_passes"],
            f"{counts['prompts']} in {counts['prefills']}",
        ),
        ("floor", least, "", len(size.vision) * size.samples, counts["prompts"]),
    ]
    table = ["| way | s | preprocessings | vision passes | prefills | plain / it | it / floor |", "|---|" + "--:|" * 6]
    for name, seconds, *cells in rows:
        ratios = [f"{once / seconds:.2f}", f"{seconds / least:.2f}"]
        table.append("| " + " | ".join([name, f"{seconds:.1f}", *map(str, cells), *ratios]) + " |")
    scored_floor = (flops["vision"] + flops["prefill"] + flops["decode"]) / rate
    per_image = counts["vision_passes"] / size.samples
    return "\n".join(
        [
            *table,
            "",
            "Preprocessings, vision passes and prefills of ours are those of the scores; timed answers share nothing.",
            f"Every image passed the tower {per_image:g} times, once per vision setting. All {len(plain.answers)} "
            "answers of the plain way are answered alike.",
            f"Matmul: {rate / 1e9:.0f} GFLOP/s. Floor: {sum(flops.values()) / 1e9:.0f} GFLOP, of them "
            + ", ".join(f"{name} {value / 1e9:.0f}" for name, value in flops.items())
            + ".",
            f"Scores: {ours.parts['accuracy']:.1f} s, {ours.parts['accuracy'] / scored_floor:.2f} x their floor of "
            f"{scored_floor:.1f} s, of which vision {flops['vision'] / rate:.1f} s, prefill "
            f"{flops['prefill'] / rate:.1f} s, decode {flops['decode'] / rate:.1f} s.",
            f"Timed: {ours.parts['latency']:.1f} s, {ours.parts['latency'] * rate / flops['timed']:.2f} x their floor "
            f"of {flops['timed'] / rate:.1f} s: with a warm-up of each sample and a count of its operations.",
            f"The goal is {GOAL} x the floor: {'reached' if ours.seconds <= GOAL * least else 'missed'}.",
        ]
    )


def stages(rows: pd.DataFrame, seconds: float, rate: float) -> str:
    """Where the rest goes: each stage of the timed answers against its own operations at the rate of the floor.

    Args:
        seconds: that all latency tasks took.
    """
    timed = rows[rows["kind"] == Kind.LATENCY.value]
    answers = float(timed["total_ms"].sum()) / 1e3
    measured = {
        "vision": timed["vision_ms"] + timed["projector_ms"],
        "prefill": timed["prefill_ms"],
        "decode": timed["decode_step_ms"].map(np.sum),
    }
    flops = {
        "vision": timed["vision_flops"] + timed["projector_flops"],
        "prefill": timed["prefill_flops"],
        "decode": timed["decode_flops"],
    }
    lines = [
        f"\nOf the {seconds:.1f} s of timing, {answers:.1f} s are the timed answers, the rest warm-up and counting. "
        "What a timed answer takes:\n",
        "| stage | ms | floor, ms | ratio |",
        "|---|--:|--:|--:|",
    ]
    for name, times in measured.items():
        least = float(flops[name].mean()) / rate * 1e3
        lines.append(f"| {name} | {times.mean():.1f} | {least:.1f} | {times.mean() / least:.2f} |")
    return "\n".join(lines)


def both(plain: Spent, scale: float) -> list[int]:
    return [int(plain.counts[name] * scale) for name in ("vision_passes", "prefills")]


if __name__ == "__main__":
    main()

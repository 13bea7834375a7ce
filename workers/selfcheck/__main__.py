"""`python -m workers.selfcheck`: is this machine, as it is now, fit to measure on? No Ray, no download, some minutes.

One answer of a model with random weights is timed again and again, with and without marks at its stages, while the
machine's conditions are read; what comes of it is judged check by check, each with its limit and a remedy.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from knobs.errors import KnobError, UnusableModel
from knobs.printing import print_lines
from knobs.vision import VisionSetting
from workers.conditions import Observer
from workers.environment import environment
from workers.errors import DeviceError, WorkerError
from workers.measure import Clock, Prompt, Timing, time_bare, time_batch
from workers.models import load
from workers.models.adapter import VisionLanguageModel
from workers.models.engines import ENGINES
from workers.models.loading import default_device, is_out_of_memory
from workers.pairs import Pair, time_pairs
from workers.selfcheck import answer_checks, machine_checks
from workers.selfcheck.answer_checks import Check, Verdict
from workers.selfcheck.figures import Figures, Measured, PairTimes, figures_of
from workers.selfcheck.report import Progress, check_lines, environment_lines, record, write

FIT, DOUBTFUL, WRONG, INTERRUPTED = 0, 1, 2, 130

# Of each kind of device a model whose answer takes some 100 ms there.
DEFAULT_MODELS = {"cpu": "tiny-smolvlm", "cuda": "smolvlm2-256m"}
DEFAULT_SECONDS = 75.0
NATIVE = VisionSetting()
QUESTION = "What is in the picture?"

# An answer this long shows what marks cost, and leaves time for hundreds of them.
AIMED_AT_MS = 100.0
FEWEST_TOKENS, MOST_TOKENS = 4, 128
TOKENS_AT_FIRST = 8
# First calls: at least so many, and more up to a limit and a share of the time.
FEWEST_CALLS, MOST_CALLS, SHARE_OF_CALLS = 10, 30, 0.15
# After a change of length two answers fill the allocator's cache again.
SETTLING_CALLS = 2
# Below six pairs of each order the overhead has no interval.
FEWEST_PAIRS = 12
FEWEST_SNAPSHOTS, MOST_SNAPSHOTS, SNAPSHOT_SECONDS = 5, 200, 1.0
TIMER_SECONDS = 1.0


@dataclass(frozen=True)
class Asked:
    """What to measure on; None is for the check to choose."""

    model: str
    device: torch.device
    engine: str
    seconds: float
    output_tokens: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 nothing doubtful, 1 something is, 2 the arguments or the environment are wrong, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        _refuse_place(arguments.json)
        return _run(_asked(arguments), arguments.json)
    except (WorkerError, UnusableModel, KnobError, OSError) as error:
        return _wrong(str(error))
    except KeyboardInterrupt:
        print("selfcheck: interrupted, nothing is judged", file=sys.stderr)
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:  # torch's, of the device; a mistake of ours keeps its traceback
        if not (is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)):
            raise
        return _wrong(" ".join(str(error).split()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workers.selfcheck",
        description="Is this machine, as it is now, fit to measure on? Times one answer of a model with random weights "
        "again and again and judges what that shows.",
    )
    parser.add_argument("--model", help="registered name, folder or hub id (default: a small one for the device)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the first GPU, else the CPU")
    parser.add_argument("--engine", choices=ENGINES, default="eager", help="how answers are decoded (default: eager)")
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=DEFAULT_SECONDS,
        metavar="N",
        help=f"how long to measure (default: {DEFAULT_SECONDS:.0f}); longer narrows the intervals",
    )
    parser.add_argument(
        "--output-tokens",
        type=_tokens,
        metavar="N",
        help=f"length of the answer (default: what makes it take about {AIMED_AT_MS:.0f} ms)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write checks, figures and every time to a file")
    return parser


def _positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def _tokens(text: str) -> int:
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")


def _asked(arguments: argparse.Namespace) -> Asked:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "finds no GPU, or no driver for it"
        raise DeviceError(f"--device cuda: torch {torch.__version__} {why}")
    device = torch.device("cpu") if arguments.device == "cpu" else default_device()
    model = arguments.model or DEFAULT_MODELS[device.type]
    return Asked(model, device, arguments.engine, arguments.seconds, arguments.output_tokens)


def _refuse_place(file: Path | None) -> None:
    """Before a minute of measuring, not after."""
    if file is None:
        return
    if file.is_dir():
        raise IsADirectoryError(f"--json: {file} is a folder, name a file in it")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: there is no folder {file.parent}")


def _wrong(message: str) -> int:
    print(f"selfcheck: {message}", file=sys.stderr)
    return WRONG


def _run(asked: Asked, file: Path | None) -> int:
    print(f"loading {asked.model} with random weights ...", file=sys.stderr, flush=True)
    vlm = load(asked.model, weights="random", device=asked.device, engine=asked.engine)
    found = environment(asked.device)  # after the model has come: loading may set flags
    if code := print_lines(environment_lines(found)):
        return code
    with Progress(asked.seconds) as progress:
        measured, tokens = measure(vlm, asked, progress)
    figures = figures_of(measured)
    judged = judge(figures, found)
    verdict = answer_checks.verdict(judged)
    heading = f"{asked.model}, random weights, {measured.engine} engine, answers of {tokens} tokens to a drawn image"
    code = print_lines(["", heading, "", *check_lines(judged), "", f"Verdict: {verdict}"])
    if file is not None:
        subject = {"model": asked.model, "weights": "random", "image": "640x480, drawn", "output_tokens": tokens}
        write(file, {"subject": subject, **record(measured, figures, judged, verdict), "environment": found})
    if code:
        return code
    return DOUBTFUL if any(check.verdict is Verdict.DOUBTFUL for check in judged) else FIT


def judge(figures: Figures, found: Mapping[str, Any]) -> list[Check]:
    """Every check of a machine.

    Args:
        found: the record of its environment, see `workers.environment`.
    """
    every = [
        answer_checks.overhead(figures),
        answer_checks.residual(figures),
        *([answer_checks.timers(figures)] if figures.on_gpu else []),
        answer_checks.noise(figures),
        answer_checks.warm_up(figures),
        answer_checks.anchor(figures),
        answer_checks.drift(figures),
        machine_checks.clock(figures),
        machine_checks.heat(figures),
        machine_checks.others(figures),
        machine_checks.invalid_answers(figures),
        machine_checks.settings(figures, found),
        answer_checks.snapshot(figures),
    ]
    return every if figures.engine_note is None else [answer_checks.engine(figures), *every]


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(vlm: VisionLanguageModel, asked: Asked, progress: Progress) -> tuple[Measured, int]:
    """First calls, then pairs until the time is up; and the tokens of an answer of a pair."""
    begun = time.monotonic()
    prompt = Prompt([drawn_image()], QUESTION)
    progress.phase("first calls")
    tokens = asked.output_tokens or TOKENS_AT_FIRST
    calls = list(_first_calls(vlm, prompt, tokens, SHARE_OF_CALLS * asked.seconds))
    tokens = asked.output_tokens or tokens_for(calls[len(calls) // 2 :])
    inputs = vlm.preprocess(prompt.images, prompt.question, NATIVE)
    vlm.engine.reserve(1, inputs.num_prompt_tokens + tokens)
    for _ in range(vlm.engine.warm_up_rounds + SETTLING_CALLS):
        time_batch(vlm, [prompt], NATIVE, tokens)
    observer, on_gpu = Observer(vlm.device), vlm.device.type == "cuda"
    snapshot_ms = _snapshot_ms(observer)
    timers_differ = _timers_differ(vlm, prompt, tokens) if on_gpu else None
    progress.phase(f"pairs of answers, {tokens} tokens each")
    pairs: list[PairTimes] = []
    for pair in time_pairs(vlm, prompt, NATIVE, tokens, sys.maxsize, observer):
        pairs.append(_times(pair))
        used = pair.marked.engine_used
        elapsed = time.monotonic() - begun
        progress.at(elapsed, len(pairs))
        if elapsed >= asked.seconds and len(pairs) >= FEWEST_PAIRS:
            break
    measured = Measured(
        on_gpu=on_gpu,
        engine=used.engine,
        engine_note=used.note,
        niceness=os.nice(0),
        first_calls_ms=tuple(timing.total_ms for timing in calls),
        discarded_calls=vlm.engine.warm_up_rounds + answer_checks.WARM_UP,
        pairs=tuple(pairs),
        snapshot_ms=snapshot_ms,
        timers_differ=timers_differ,
    )
    return measured, tokens


def _first_calls(vlm: VisionLanguageModel, prompt: Prompt, tokens: int, seconds: float) -> Iterator[Timing]:
    begun = time.monotonic()
    for call in range(MOST_CALLS):
        if call >= FEWEST_CALLS and time.monotonic() - begun > seconds:
            return
        yield time_batch(vlm, [prompt], NATIVE, tokens)


def tokens_for(timings: Sequence[Timing]) -> int:
    """How many tokens make an answer about as long as aimed at; prefill makes the first."""
    first = statistics.median(timing.ttft_ms for timing in timings)
    each = statistics.median(timing.tpot_ms or math.inf for timing in timings)
    return max(FEWEST_TOKENS, min(MOST_TOKENS, 1 + round((AIMED_AT_MS - first) / each)))


def _snapshot_ms(observer: Observer) -> float:
    begun, taken = time.perf_counter(), 0
    while taken < FEWEST_SNAPSHOTS or (taken < MOST_SNAPSHOTS and time.perf_counter() - begun < SNAPSHOT_SECONDS):
        observer.snapshot()
        taken += 1
    return (time.perf_counter() - begun) / taken * 1e3


def _timers_differ(vlm: VisionLanguageModel, prompt: Prompt, tokens: int) -> float:
    """The device's clock against the host's over a stretch of answers so long that what lies between is nothing."""
    clock = Clock(vlm.device)
    clock.synchronize()
    host_begin, begin = time.perf_counter(), clock.mark()
    while time.perf_counter() - host_begin < TIMER_SECONDS:
        time_bare(vlm, [prompt], NATIVE, tokens)
    end = clock.mark()
    clock.synchronize()
    return clock.ms(begin, end) / ((time.perf_counter() - host_begin) * 1e3) - 1


def _times(pair: Pair) -> PairTimes:
    marked = pair.marked
    return PairTimes(
        at=pair.marked_at,
        marked_first=pair.marked_at <= pair.bare_at,
        total_ms=marked.total_ms,
        prefill_ms=marked.prefill_ms,
        tpot_ms=marked.tpot_ms,
        residual_ms=marked.residual_ms,
        bare_ms=pair.bare_ms,
        around=(*pair.around_marked, *pair.around_bare),
    )


def drawn_image() -> Image.Image:
    """The same on every machine, without a file."""
    image = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 250, 300, 430), fill="teal")
    draw.polygon([(40, 250), (180, 120), (320, 250)], fill="firebrick")
    draw.ellipse((420, 60, 560, 200), fill="gold")
    return image


if __name__ == "__main__":
    sys.exit(main())

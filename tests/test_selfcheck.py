"""The self-check: what it judges by planted figures, the figures by planted times, the command on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvml_recorded import UUID, RecordedNvml

from workers.conditions import Conditions
from workers.environment import environment
from workers.measure import Clock, Prompt
from workers.models import load
from workers.nvml import Gpu, GpuState
from workers.selfcheck import __main__ as selfcheck
from workers.selfcheck.__main__ import judge, main
from workers.selfcheck.answer_checks import ANSWERS_OF_A_SWEEP, Check, Verdict, count, percent, signed, verdict
from workers.selfcheck.figures import Figures, Measured, Noise, PairTimes, figures_of, settled
from workers.selfcheck.report import Progress, check_lines, environment_lines, record, write

CPU = torch.device("cpu")
GIB = 1024**3

FINE = Figures(
    on_gpu=True,
    engine="eager",
    engine_note=None,
    pairs=320,
    seconds=60.0,
    answer_ms=98.0,
    overhead=0.001,
    overhead_half_width=0.002,
    residual_mean=0.004,
    residual_largest=0.011,
    residual_excess=0.0,
    noise=(Noise("total", 98.0, 0.008, 3), Noise("prefill", 20.0, 0.01, 3), Noise("TPOT", 2.0, 0.02, 5)),
    first_ms=900.0,
    settled_ms=98.0,
    settled_within=0.05,
    slow_calls=1,
    calls=30,
    discarded_calls=1,
    group_medians_ms=(98.0, 98.1, 97.9, 98.0, 98.1, 98.0, 97.9, 98.0),
    spread=0.001,
    spread_by_noise=0.001,
    slope_per_hour=0.06,
    slope_half_width=0.3,
    clock_mhz=(1965.0, 1980.0),
    clock_events=(),
    temperature_c=(41.0, 47.0),
    power_capped_s=0.0,
    thermally_slowed_s=0.0,
    throttlings=None,
    foreign_processes=0,
    other_memory_bytes=GIB,
    cores_others=0.3,
    cores=16.0,
    threads_needed=1,
    answers=640,
    invalid=1,
    reasons={"cpu_busy": 1},
    snapshot_ms=1.2,
    timers_differ=0.00002,
    niceness=0,
)

ENVIRONMENT: dict[str, Any] = {
    "threads": 8,
    "cpu_usable_cores": 16,
    "cpu_quota": None,
    "cpu_governor": "performance",
    "persistence_mode": True,
    "ecc": True,
    "mig": False,
    "power_limit_w": 700.0,
    "default_power_limit_w": 700.0,
}

OF_A_GPU = ("power_capped_s", "thermally_slowed_s", "clock_events", "temperature_c")


def judged(found: dict[str, Any] | None = None, **changes: Any) -> dict[str, Check]:
    figures = dataclasses.replace(FINE, **changes)
    return {check.name: check for check in judge(figures, ENVIRONMENT | (found or {}))}


def doubtful(found: dict[str, Any] | None = None, **changes: Any) -> dict[str, str]:
    """Names and remedies of what is doubtful once the figures are changed so."""
    checks = judged(found, **changes).values()
    return {check.name: check.remedy or "" for check in checks if check.verdict is Verdict.DOUBTFUL}


# -- judging ----------------------------------------------------------------------------------------------------------


def test_all_fine() -> None:
    checks = judged()
    assert {check.verdict for check in checks.values()} == {Verdict.OK}
    assert {check.remedy for check in checks.values()} == {None}
    assert list(checks) == [
        *("overhead", "residual", "timers", "noise", "warm-up", "anchor", "drift", "clock", "heat", "load by others"),
        *("invalid answers", "settings", "snapshot"),
    ]
    words = verdict(list(checks.values()))
    assert words == "nothing is doubtful: this machine, as it is now, is fit to measure on."


@pytest.mark.parametrize(
    ("changes", "name", "remedy"),
    [
        ({"overhead": 0.02}, "overhead", "longer answers"),
        ({"residual_mean": 0.05}, "residual", "do not add up"),
        ({"residual_excess": 0.06}, "residual", "do not add up"),
        ({"timers_differ": -0.004}, "timers", "clock source"),
        ({"noise": (Noise("total", 98.0, 0.3, 900),)}, "noise", "raise samples or repeats"),
        ({"slow_calls": 4}, "warm-up", "warmup: 4}"),
        ({"spread": 0.04}, "anchor", "compare only what one sweep"),
        ({"slope_per_hour": 3.0}, "drift", "let it run loaded"),
        ({"slope_per_hour": -3.0}, "drift", "let it run loaded"),
        ({"clock_mhz": (1500.0, 1980.0)}, "clock", "--lock-gpu-clocks"),
        ({"thermally_slowed_s": 3.0}, "heat", "too hot"),
        ({"clock_events": ("hw_power_brake_slowdown",)}, "heat", "supply"),
        ({"foreign_processes": 1}, "load by others", "nvidia-smi shows which"),
        ({"other_memory_bytes": 20 * GIB}, "load by others", "another container"),
        ({"cores_others": 15.6}, "load by others", "OMP_NUM_THREADS"),
        ({"invalid": 80, "reasons": {"clock_drop": 70, "cpu_busy": 10}}, "invalid answers", "see clock; see load"),
        ({"niceness": 10}, "settings", "niceness 10"),
        ({"snapshot_ms": 25.0}, "snapshot", "persistence mode"),
    ],
)
def test_what_is_doubtful_and_what_to_do(changes: dict[str, Any], name: str, remedy: str) -> None:
    found = doubtful(**changes)
    assert list(found) == [name], "and nothing else"
    assert remedy in found[name]


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        ({"threads": 17}, "OMP_NUM_THREADS=16"),
        ({"cpu_quota": 2.5}, "OMP_NUM_THREADS=2"),
        ({"cpu_governor": "powersave"}, "cpupower frequency-set -g performance"),
        ({"persistence_mode": False}, "nvidia-smi -pm 1"),
        ({"power_limit_w": 450.0}, "nvidia-smi -pl 700"),
        ({"mig": True}, "a whole one"),
    ],
)
def test_settings(found: dict[str, Any], remedy: str) -> None:
    assert list(doubtful(found)) == ["settings"]
    assert remedy in doubtful(found)["settings"]


def test_several_settings_are_one_line_with_all_remedies() -> None:
    remedy = doubtful({"persistence_mode": False, "mig": True}, niceness=5)["settings"]
    assert remedy.count(";") == 2


def test_a_cpu_is_judged_by_what_it_has() -> None:
    on_cpu = dict.fromkeys(("foreign_processes", "other_memory_bytes", "timers_differ", *OF_A_GPU), None) | {
        "on_gpu": False,
        "throttlings": 0,
        "clock_mhz": (2600.0, 2600.0),
        "threads_needed": 8,
    }
    gpu_only = {"persistence_mode": None, "ecc": None, "mig": None, "power_limit_w": None}
    assert doubtful(gpu_only, **on_cpu) == {}
    assert "timers" not in judged(gpu_only, **on_cpu)
    assert doubtful(gpu_only, **on_cpu | {"throttlings": 3}).keys() == {"heat"}
    assert doubtful(gpu_only, **on_cpu | {"clock_mhz": (1800.0, 2600.0)}).keys() == {"clock"}
    assert doubtful(gpu_only, **on_cpu | {"cores_others": 9.0}).keys() == {"load by others"}


def test_what_a_machine_does_not_tell_is_not_doubtful() -> None:
    silent = ("clock_mhz", "foreign_processes", "other_memory_bytes", "cores_others", "timers_differ", *OF_A_GPU)
    checks = judged({"cpu_governor": None}, **dict.fromkeys(silent))
    untold = {name for name, check in checks.items() if check.verdict is Verdict.NOT_TOLD}
    assert untold == {"clock", "heat", "load by others", "timers"}
    words = verdict(list(checks.values()))
    assert words.startswith("nothing is doubtful, as far as it tells")
    assert words.endswith("Not told: timers, clock, heat, load by others.")


def test_an_interval_that_holds_the_limit_decides_nothing() -> None:
    wide = judged(overhead=0.004, overhead_half_width=0.01, slope_half_width=10.0)
    assert wide["overhead"].verdict is wide["drift"].verdict is Verdict.NOT_TOLD
    assert "--seconds" in (wide["overhead"].remedy or "")
    assert judged(overhead=0.004, overhead_half_width=math.inf)["overhead"].verdict is Verdict.NOT_TOLD
    assert judged(overhead=-0.03)["overhead"].verdict is Verdict.OK, "marks do not make it faster, noise does"


def test_noise_explains_a_spread_of_small_groups_and_slow_first_calls() -> None:
    assert judged(spread=0.04, spread_by_noise=0.03)["anchor"].verdict is Verdict.NOT_TOLD
    assert judged(spread=0.015, spread_by_noise=0.03)["anchor"].verdict is Verdict.OK
    assert judged(slow_calls=4, settled_within=0.6)["warm-up"].verdict is Verdict.NOT_TOLD


def test_so_many_answers_that_their_number_says_nothing() -> None:
    assert "takes over 100,000 answers" in judged(noise=(Noise("total", 98.0, 9.0, 7_654_321),))["noise"].value
    assert "takes 7,654 answers" in judged(noise=(Noise("total", 98.0, 9.0, 7_654),))["noise"].value


def test_few_answers_make_no_groups() -> None:
    few = judged(group_medians_ms=(98.0, 99.0), slope_half_width=math.inf, noise=())
    assert {few[name].verdict for name in ("anchor", "drift", "noise")} == {Verdict.NOT_TOLD}


def test_another_engine_than_asked_for() -> None:
    assert "a CPU has no CUDA graphs" in judged(engine_note="a CPU has no CUDA graphs")["engine"].value
    assert doubtful(engine_note="a CPU has no CUDA graphs").keys() == {"engine"}


def test_more_calls_that_a_sweep_discards() -> None:
    assert doubtful(slow_calls=3, discarded_calls=3) == {}
    assert "warmup: 2}" in doubtful(slow_calls=4, discarded_calls=3)["warm-up"]


def test_the_verdict_names_what_is_doubtful() -> None:
    words = verdict(list(judged(overhead=0.02, niceness=5).values()))
    assert words.startswith("doubtful in 2 of 13 checks (overhead, settings): ")


def test_lines_have_value_limit_and_remedy() -> None:
    lines = list(check_lines(list(judged(overhead=0.02).values())))
    assert lines[0].startswith("verdict   check ")
    assert lines[1].startswith("doubtful  overhead ")
    assert "+2.00 ± 0.20 %" in lines[1]
    assert lines[1].endswith("[at most 0.5 %]")
    assert lines[2].strip().startswith("-> ")
    assert len(lines) == 15


@pytest.mark.parametrize(
    ("share", "half_width", "words"),
    [(0.0011, 0.0059, "+0.11 ± 0.59 %"), (-0.0227, 0.09, "-2.3 ± 9.0 %"), (1.7, 8, "+170 ± 800 %")],
)
def test_intervals(share: float, half_width: float, words: str) -> None:
    assert signed(share, half_width) == words


def test_counts() -> None:
    assert [count(number, "core") for number in (1, 2.5, 12_000)] == ["1 core", "2.5 cores", "12,000 cores"]


@pytest.mark.parametrize(
    ("share", "words"), [(0.12, "12 %"), (0.034, "3.4 %"), (0.0005, "0.05 %"), (0.02, "2 %"), (0, "0 %"), (0.1, "10 %")]
)
def test_percentages(share: float, words: str) -> None:
    assert percent(share) == words


# -- figures ----------------------------------------------------------------------------------------------------------

BUSY = GpuState(
    sm_clock_mhz=1980,
    clock_events=(),
    temperature_c=40.0,
    power_capped_s=10.0,
    thermally_slowed_s=2.0,
    power_limit_w=700.0,
    pids=frozenset({1}),
)


def moment(taken_s: float, gpu: GpuState = BUSY, **changes: Any) -> Conditions:
    made = Conditions(
        taken_s=taken_s,
        gpu=gpu,
        foreign_processes=0,
        other_memory_bytes=GIB,
        busy_cpu_s=taken_s,
        own_cpu_s=taken_s,
        logical_cores=16,
        cores=16.0,
        threads_needed=1,
    )
    return dataclasses.replace(made, **changes)


def pairs_of(totals: Sequence[float], marks: float = 1.0, gpus: Sequence[GpuState] = (BUSY,)) -> tuple[PairTimes, ...]:
    """A pair every second of answers that take so long with marks; GPUs go round."""
    made = []
    for number, total in enumerate(totals):
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
        times = [number + part for part in (0.0, 0.2, 0.4, 0.6)]
        moments = [moment(time, gpus[number % len(gpus)]) for time in times]
        if number % 2:
            moments = moments[2:] + moments[:2]
        around = moments[0], moments[1], moments[2], moments[3]
        made.append(PairTimes(at, number % 2 == 0, total, total / 5, total / 50, 0.01 * total, total / marks, around))
    return tuple(made)


def measured(pairs: tuple[PairTimes, ...], **changes: Any) -> Measured:
    made = Measured(
        on_gpu=True,
        engine="eager",
        engine_note=None,
        niceness=0,
        first_calls_ms=(900.0, *[100.0] * 11),
        discarded_calls=1,
        pairs=pairs,
        snapshot_ms=1.0,
        timers_differ=0.0,
    )
    return dataclasses.replace(made, **changes)


def test_figures_of_planted_times() -> None:
    wander = random.Random(1)
    figures = figures_of(measured(pairs_of([100 + wander.uniform(-1, 1) for _ in range(80)], marks=1.02)))
    assert figures.overhead == pytest.approx(0.02)
    assert figures.residual_mean == pytest.approx(0.01)
    assert figures.residual_excess == 0
    assert figures.noise[0].spread == pytest.approx(0.01, rel=0.4)
    assert [noise.name for noise in figures.noise] == ["total", "prefill", "TPOT"]
    assert (figures.first_ms, figures.settled_ms, figures.slow_calls, figures.calls) == (900, 100, 1, 12)
    assert len(figures.group_medians_ms) == 8
    assert figures.seconds == pytest.approx(79.6)
    assert (figures.answers, figures.invalid, figures.cores_others) == (160, 0, 0)
    assert doubtful_names(figures) == ["overhead"]


def doubtful_names(figures: Figures) -> list[str]:
    return [check.name for check in judge(figures, ENVIRONMENT) if check.verdict is Verdict.DOUBTFUL]


def test_a_drift_is_found() -> None:
    figures = figures_of(measured(pairs_of([100 * 1.001**number for number in range(80)])))
    assert figures.slope_per_hour == pytest.approx(3600 * math.log(1.001), rel=1e-3)
    assert {"anchor", "drift"} <= set(doubtful_names(figures))


def test_noise_that_lasts_needs_more_repeats_than_a_sweep_has() -> None:
    slow_wave = [100 * (1 + 0.3 * math.sin(number / 20)) for number in range(200)]
    total = figures_of(measured(pairs_of(slow_wave))).noise[0]
    assert total.repeats_needed > ANSWERS_OF_A_SWEEP


def test_clocks_events_heat_and_reasons() -> None:
    slow = dataclasses.replace(BUSY, sm_clock_mhz=1400, clock_events=("sw_thermal_slowdown",), thermally_slowed_s=5.0)
    idle = dataclasses.replace(BUSY, sm_clock_mhz=345, clock_events=("gpu_idle",))
    pairs = pairs_of([100.0] * 16, gpus=[BUSY, idle])[:8] + pairs_of([100.0] * 16, gpus=[slow])[8:]
    figures = figures_of(measured(pairs))
    assert figures.clock_mhz == (1400, 1980)
    assert figures.clock_events == ("sw_thermal_slowdown",)
    assert figures.thermally_slowed_s == 3
    assert figures.power_capped_s == 0
    assert figures.reasons == {"thermal_throttle": 16}
    assert (figures.invalid, figures.answers) == (16, 32)
    assert doubtful_names(figures) == ["clock", "heat", "invalid answers"]


def test_a_gpu_that_says_idle_between_answers_still_has_a_clock() -> None:
    idle = dataclasses.replace(BUSY, sm_clock_mhz=1755, clock_events=("gpu_idle",))
    figures = figures_of(measured(pairs_of([100.0] * 16, gpus=[idle])))
    assert figures.clock_mhz == (1755, 1755)
    assert figures.clock_events == ()


@pytest.mark.parametrize(
    ("calls", "slow"),
    [
        ([100.0] * 12, 0),
        ([900.0, *[100.0] * 11], 1),
        ([900.0, 300.0, 107.0, *[100.0] * 9], 3),
        ([900.0, *[100.0, 104.0] * 6], 1),
        ([900.0, 118.0, *[100.0, 120.0] * 6], 1),
    ],
)
def test_calls_before_it_settled(calls: list[float], slow: int) -> None:
    assert settled(calls)[2] == slow


def test_nothing_measured_has_no_figures() -> None:
    with pytest.raises(ValueError, match="a pair of answers"):
        figures_of(measured(()))


# -- the file and the machine -----------------------------------------------------------------------------------------


def test_the_file_is_whole_and_has_no_infinity(tmp_path: Path) -> None:
    taken = measured(pairs_of([100.0] * 4))
    figures = figures_of(taken)
    assert figures.overhead_half_width == math.inf
    checks = judge(figures, ENVIRONMENT)
    write(tmp_path / "check.json", record(taken, figures, checks, verdict(checks)))
    found = json.loads((tmp_path / "check.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["figures"]["overhead_half_width"] is None
    assert [entry["total_ms"] for entry in found["raw"]["pairs"]] == [100] * 4
    assert found["raw"]["pairs"][0]["marked"]["sm_clock_mhz_end"] == 1980
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


def test_the_lines_of_a_machine_with_a_gpu() -> None:
    found = environment(CPU, Gpu(UUID, RecordedNvml())) | {"device_uuid": f"GPU-{UUID}", "device_name": "NVIDIA H100"}
    lines = list(environment_lines(found))
    assert lines[0].startswith("device      NVIDIA H100, driver 570.124.06, ")
    assert "700 W of 700 W by default" in lines[0]
    assert [line.split()[0] for line in lines] == ["device", "processor", "software", "code", "variables"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own, as a user would; whether it is doubtful is for the machine to say."""
    file = tmp_path / "check.json"
    command = [sys.executable, "-m", "workers.selfcheck", "--device", "cpu", "--seconds", "2", "--json", str(file)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    found = json.loads(file.read_text())
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert ran.returncode == ("doubtful" in verdicts.values()), ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("device ")
    assert lines[-1] == f"Verdict: {found['verdict']}"
    for name, judged_as in verdicts.items():
        assert any(line.startswith(f"{judged_as:<8}  {name} ") for line in lines)
    assert "timers" not in verdicts
    assert verdicts["residual"] == "ok"
    assert len(found["raw"]["pairs"]) >= selfcheck.FEWEST_PAIRS
    assert len(found["raw"]["first_calls_ms"]) >= selfcheck.FEWEST_CALLS
    assert found["environment"]["torch_version"] == str(torch.__version__)
    assert found["subject"]["model"] == "tiny-smolvlm"
    assert "Traceback" not in ran.stderr


@pytest.mark.filterwarnings("ignore:decoding by engine eager")
def test_an_engine_that_is_not_there_is_doubtful(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "tiny-internvl", "--device", "cpu", "--engine", "graph", "--output-tokens", "2"]
    assert main([*asked, "--seconds", "0.1"]) == 1
    assert "doubtful  engine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny-smolvml"], "did you mean tiny-smolvlm?"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--json", "/tmp"], "/tmp is a folder"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("selfcheck: ")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("selfcheck: --device cuda: torch ")


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--seconds", "inf"], ["--output-tokens", "0"], ["--device", "tpu"], ["--what"]]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "CUDA out of memory. Tried"),
    ],
)
def test_what_ends_it_early(
    raised: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def time_nothing(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(selfcheck, "time_batch", time_nothing)
    assert main(["--device", "cpu"]) == code
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "measure", lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["--device", "cpu"])


# -- measuring --------------------------------------------------------------------------------------------------------


def timing(ttft_ms: float, tpot_ms: float | None) -> Any:
    return SimpleNamespace(ttft_ms=ttft_ms, tpot_ms=tpot_ms)


def test_the_length_of_an_answer() -> None:
    assert selfcheck.tokens_for([timing(20, 2)] * 3) == 41
    assert selfcheck.tokens_for([timing(300, 20)]) == selfcheck.FEWEST_TOKENS
    assert selfcheck.tokens_for([timing(1, 0.01)]) == selfcheck.MOST_TOKENS


def test_progress_has_no_thread_that_disturbs_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    before = threading.active_count()
    with Progress(10) as progress:
        progress.phase("first calls")
        progress.at(1.0, 3)
        assert threading.active_count() == before


def test_the_timers_of_one_clock_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both are one clock, which makes it a test of the arithmetic."""
    monkeypatch.setattr(selfcheck, "TIMER_SECONDS", 0.02)
    vlm = load("tiny-internvl", device="cpu")
    prompt = Prompt([selfcheck.drawn_image()], selfcheck.QUESTION)
    monkeypatch.setattr(Clock, "ms", lambda _, begin, end: (end - begin) * 1.001e3)
    assert selfcheck._timers_differ(vlm, prompt, 2) == pytest.approx(0.001, abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    assert main(["--device", "cuda", "--model", "tiny-smolvlm", "--seconds", "3", "--json", str(file)]) in (0, 1)
    found = json.loads(file.read_text())
    assert abs(found["figures"]["timers_differ"]) < 0.01
    assert found["figures"]["residual_mean"] < 0.2
    assert found["environment"]["device_uuid"]

"""Why a row does not count: every rule by conditions made for it, the CPU's by a process that really is busy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from nvml_recorded import ANSWERS, UUID, NvmlError, RecordedNvml

from workers.conditions import (
    CONDITION_COLUMNS,
    Conditions,
    Observer,
    condition_columns,
    cpu_load_others,
    foreign_processes,
)
from workers.nvml import CLOCK_EVENTS, Gpu, GpuSettings, GpuState, gpu_of
from workers.validity import CLOCK_DROP, CPU_SHARE, OWN_UNCOUNTED_BYTES, Reason, reasons

CPU = torch.device("cpu")
GIB = 1024**3

QUIET = GpuState(
    sm_clock_mhz=1980,
    memory_clock_mhz=2619,
    clock_events=(),
    temperature_c=55.0,
    power_w=310.0,
    power_capped_s=10.0,
    thermally_slowed_s=2.0,
    power_limit_w=700.0,
    application_sm_clock_mhz=1980,
    pids=frozenset({1}),
    used_memory_bytes=4 * GIB,
)


def moment(taken_s: float = 0.0, gpu: GpuState = QUIET, **changes: Any) -> Conditions:
    """Sixteen cores, one of them needed, nobody else about."""
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


def gpu(**changes: Any) -> GpuState:
    return dataclasses.replace(QUIET, **changes)


def between(start: GpuState, end: GpuState) -> list[str]:
    """The reasons of one second that begins and ends so."""
    return reasons(moment(0.0, start), moment(1.0, end))


# -- the rules --------------------------------------------------------------------------------------------------------


def test_a_quiet_machine_gives_no_reason() -> None:
    assert reasons(moment(0.0), moment(1.0)) == []


def test_what_a_machine_does_not_tell_is_no_reason() -> None:
    unknown = {"gpu": GpuState(), "foreign_processes": None, "other_memory_bytes": None}
    assert reasons(moment(0.0, **unknown), moment(1.0, **unknown)) == []
    assert reasons(moment(0.0), moment(1.0, **unknown)) == []
    assert reasons(moment(0.0, **unknown), moment(1.0)) == []


@pytest.mark.parametrize("event", ["sw_thermal_slowdown", "hw_thermal_slowdown"])
def test_a_thermal_slowdown_at_either_end(event: str) -> None:
    assert between(gpu(clock_events=(event,)), QUIET) == [Reason.THERMAL_THROTTLE]
    assert between(QUIET, gpu(clock_events=(event,))) == [Reason.THERMAL_THROTTLE]


def test_a_thermal_slowdown_between_the_ends_is_counted() -> None:
    assert between(QUIET, gpu(thermally_slowed_s=2.02)) == [Reason.THERMAL_THROTTLE]
    assert between(QUIET, gpu(thermally_slowed_s=2.005)) == []
    assert between(QUIET, gpu(thermally_slowed_s=0.5)) == [], "the counter began anew"


def test_a_processor_that_was_throttled() -> None:
    assert reasons(moment(0.0, cpu_throttlings=7), moment(1.0, cpu_throttlings=8)) == [Reason.THERMAL_THROTTLE]
    assert reasons(moment(0.0, cpu_throttlings=7), moment(1.0, cpu_throttlings=7)) == []


@pytest.mark.parametrize("event", ["hw_slowdown", "hw_power_brake_slowdown"])
def test_a_hardware_slowdown_at_either_end(event: str) -> None:
    assert between(gpu(clock_events=(event,)), QUIET) == [Reason.HARDWARE_SLOWDOWN]
    assert between(QUIET, gpu(clock_events=(event,))) == [Reason.HARDWARE_SLOWDOWN]


def test_a_power_limit_that_sets_in_within_the_row() -> None:
    capped = ("sw_power_cap",)
    assert between(QUIET, gpu(clock_events=capped, sm_clock_mhz=1500)) == [Reason.POWER_CAP]


def test_a_power_limit_that_holds_steadily_costs_no_row() -> None:
    """A card whose limit binds whenever it is busy would lose them all."""
    steady = gpu(clock_events=("sw_power_cap",), sm_clock_mhz=1500)
    assert between(steady, gpu(clock_events=("sw_power_cap",), sm_clock_mhz=1485, power_capped_s=11.0)) == []


def test_a_clock_that_falls() -> None:
    fallen = int(1980 * (1 - CLOCK_DROP)) - 1
    assert between(QUIET, gpu(sm_clock_mhz=fallen)) == [Reason.CLOCK_DROP]
    assert between(QUIET, gpu(sm_clock_mhz=fallen + 2)) == []
    assert between(gpu(sm_clock_mhz=345), QUIET) == [], "a clock that rises"
    assert between(gpu(sm_clock_mhz=1100), gpu(sm_clock_mhz=1070)) == [], "a low clock alone"


def test_the_clock_of_an_idle_gpu_says_nothing() -> None:
    idle = ("gpu_idle",)
    assert between(QUIET, gpu(clock_events=idle, sm_clock_mhz=345)) == []
    assert between(gpu(clock_events=idle), gpu(sm_clock_mhz=1500, clock_events=("sw_power_cap",))) == []


def test_limits_that_someone_changes() -> None:
    assert between(QUIET, gpu(power_limit_w=500.0)) == [Reason.LIMITS_CHANGED]
    assert between(QUIET, gpu(application_sm_clock_mhz=1410)) == [Reason.LIMITS_CHANGED]
    assert between(QUIET, gpu(power_limit_w=None, application_sm_clock_mhz=None)) == []


def test_a_foreign_process() -> None:
    foreign = [Reason.FOREIGN_PROCESS]
    assert reasons(moment(0.0), moment(1.0, foreign_processes=1)) == foreign
    assert reasons(moment(0.0, foreign_processes=2), moment(1.0)) == foreign
    # Where pids cannot be told, memory that cannot be ours.
    more = OWN_UNCOUNTED_BYTES + 1
    assert reasons(moment(0.0), moment(1.0, foreign_processes=None, other_memory_bytes=more)) == foreign
    assert reasons(moment(0.0), moment(1.0, foreign_processes=None, other_memory_bytes=more - 1)) == []


@pytest.mark.parametrize(
    ("cores", "needed", "others", "busy"),
    [
        (16, 16, 16 * CPU_SHARE - 0.01, False),
        (16, 16, 16 * CPU_SHARE + 0.01, True),
        (16, 4, 12.0, False),  # cores to spare
        (16, 4, 12.5, True),
        (16, 1, 14.0, False),
        (2, 4, 0.19, False),  # more threads than cores: as if there were as many
        (2, 4, 0.21, True),
    ],
)
def test_others_matter_when_they_take_cores_that_we_need(cores: int, needed: int, others: float, busy: bool) -> None:
    elapsed = 1000.0  # so long that the steps of the counters are nothing
    shape = {"logical_cores": cores, "cores": float(cores), "threads_needed": needed}
    after = moment(elapsed, own_cpu_s=elapsed, busy_cpu_s=elapsed * (1 + others), **shape)
    assert cpu_load_others(moment(0.0, **shape), after) == pytest.approx(others)
    assert reasons(moment(0.0, **shape), after) == ([Reason.CPU_BUSY] if busy else [])


def test_a_tick_per_core_is_no_load() -> None:
    """10 ms of others in a row of 20 ms may be one tick that fell into it."""
    shape = {"logical_cores": 2, "cores": 2.0, "threads_needed": 2}
    start = moment(0.0, **shape)
    assert reasons(start, moment(0.02, own_cpu_s=0.02, busy_cpu_s=0.03, **shape)) == []
    assert reasons(start, moment(0.2, own_cpu_s=0.2, busy_cpu_s=0.3, **shape)) == [Reason.CPU_BUSY]


def test_no_time_has_no_load() -> None:
    assert cpu_load_others(moment(), moment()) is None
    assert reasons(moment(), moment()) == []
    assert cpu_load_others(moment(), moment(1.0, busy_cpu_s=0.4, own_cpu_s=0.5)) == 0.0


def test_reasons_come_together_in_one_order() -> None:
    end = gpu(clock_events=("sw_thermal_slowdown", "sw_power_cap"), sm_clock_mhz=900, power_limit_w=500.0)
    found = reasons(moment(0.0), moment(1.0, end, foreign_processes=1))
    assert found == ["thermal_throttle", "power_cap", "limits_changed", "foreign_process"]


def test_every_reason_has_a_rule_and_is_explained() -> None:
    documented = Reason.__doc__ or ""
    for reason in Reason:
        assert f"{reason.name}:" in documented
    everything = gpu(
        clock_events=("sw_thermal_slowdown", "hw_slowdown", "sw_power_cap"), sm_clock_mhz=900, power_limit_w=500.0
    )
    seen = set(reasons(moment(0.0), moment(1.0, everything, foreign_processes=1, busy_cpu_s=100.0)))
    assert seen | {Reason.CLOCK_DROP, Reason.SLOW_FIRST_ROUND} == set(Reason)  # the last is not said of a moment


# -- pids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pids", "own_context", "others"),
    [
        ({7}, True, 0),
        ({7, 8, 9}, True, 2),
        ({7, 8}, False, 1),
        ({90001}, True, 0),  # pids of the host: the one that is there is us
        ({90001, 90002}, True, 1),
        ({90001}, False, 1),
        (set(), False, 0),
        (set(), True, None),  # a driver that does not even show us
        (None, True, None),
    ],
)
def test_foreign_processes(pids: set[int] | None, own_context: bool, others: int | None) -> None:
    found = foreign_processes(None if pids is None else frozenset(pids), 7, own_context=own_context)
    assert found == others


# -- NVML -------------------------------------------------------------------------------------------------------------


def test_a_gpu_as_recorded() -> None:
    asked = Gpu(UUID, RecordedNvml())
    assert asked.state() == GpuState(
        sm_clock_mhz=1980,
        memory_clock_mhz=2619,
        clock_events=("gpu_idle",),
        temperature_c=41,
        power_w=pytest.approx(118.25),
        power_capped_s=pytest.approx(2.5),
        thermally_slowed_s=0.0,
        power_limit_w=pytest.approx(700.0),
        application_sm_clock_mhz=1980,
        pids=frozenset({4242}),
        used_memory_bytes=3 * GIB,
    )
    assert asked.settings() == GpuSettings(
        driver_version="570.124.06",
        power_limit_w=pytest.approx(700.0),
        default_power_limit_w=pytest.approx(700.0),
        max_sm_clock_mhz=1980,
        max_memory_clock_mhz=2619,
        application_sm_clock_mhz=1980,
        persistence_mode=True,
        compute_mode="default",
        mig=False,
        ecc=True,
    )


@pytest.mark.parametrize("missing", sorted(ANSWERS))
def test_a_question_that_is_not_answered_is_null(missing: str) -> None:
    asked = Gpu(UUID, RecordedNvml({name: answer for name, answer in ANSWERS.items() if name != missing}))
    told = {**vars(asked.state()), **vars(asked.settings())}
    assert 1 <= [value is None for value in told.values()].count(True) <= 2, missing


def test_an_older_driver_is_asked_in_older_words() -> None:
    newer = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperatureV")
    answers = {name: answer for name, answer in ANSWERS.items() if name not in newer}
    older = {"nvmlDeviceGetCurrentClocksThrottleReasons": 0x24, "nvmlDeviceGetTemperature": {0: 80}}
    state = Gpu(UUID, RecordedNvml(answers | older)).state()
    assert state.clock_events == ("sw_power_cap", "sw_thermal_slowdown")
    assert state.temperature_c == 80


def test_every_bit_of_the_clock_events_has_a_name() -> None:
    import pynvml

    named = {bit: name.replace("_", "") for bit, name in CLOCK_EVENTS.items()}
    prefix = "nvmlClocksEventReason"
    bits = {
        value: name.removeprefix(prefix).lower()
        for name, value in vars(pynvml).items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in ("All", "None", "UserDefinedClocks")
    }
    assert named == bits


def test_every_question_is_one_of_pynvml() -> None:
    import pynvml

    library = RecordedNvml()
    asked = Gpu(UUID, library)
    asked.state(), asked.settings()
    asked = Gpu(UUID, empty := RecordedNvml({}))  # the older words too
    asked.state()
    for question in library.asked + empty.asked:
        assert callable(getattr(pynvml, question)), question


@pytest.mark.parametrize(
    "asked",
    [
        Gpu(None),
        Gpu(UUID, RecordedNvml(driver=False)),
        Gpu(UUID, RecordedNvml(uuid="GPU-another")),
        Gpu(UUID, RecordedNvml({}, uuid=f"MIG-{UUID}")),
        Gpu(UUID, SimpleNamespace(NVMLError=NvmlError, nvmlInit=lambda: None)),
        gpu_of(CPU),
    ],
    ids=["no GPU", "no driver", "unknown", "MIG slice", "old pynvml", "CPU"],
)
def test_no_answer_at_all_is_null(asked: Gpu) -> None:
    assert asked.state() == GpuState()
    assert asked.settings() == GpuSettings()


def test_without_a_driver_the_real_library_is_null_too() -> None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert Gpu(UUID).state() == GpuState()
    else:
        pynvml.nvmlShutdown()
        assert Gpu(UUID).state() == GpuState(), "there is no such GPU"


# -- columns ----------------------------------------------------------------------------------------------------------


def test_a_row_says_what_held_at_both_ends() -> None:
    end = gpu(sm_clock_mhz=1500, clock_events=("sw_power_cap",), temperature_c=61.0, power_capped_s=10.25)
    row = condition_columns(moment(0.0), moment(1.0, end, busy_cpu_s=3.0))
    assert set(row) == {column.name for column in CONDITION_COLUMNS}
    assert (row["sm_clock_mhz_start"], row["sm_clock_mhz_end"]) == (1980, 1500)
    assert (row["temperature_c_start"], row["temperature_c_end"]) == (55.0, 61.0)
    assert row["clock_events_end"] == ["sw_power_cap"]
    assert row["power_capped_s"] == pytest.approx(0.25)
    assert row["thermally_slowed_s"] == 0.0
    assert row["cpu_load_others"] == pytest.approx(2.0)


def test_columns_take_what_rows_give() -> None:
    schema = pa.schema([(column.name, column.type) for column in CONDITION_COLUMNS])
    unknown = {"gpu": GpuState(), "foreign_processes": None, "other_memory_bytes": None}
    rows = [condition_columns(moment(0.0), moment(1.0)), condition_columns(moment(0.0, **unknown), moment(1.0))]
    assert pa.Table.from_pylist(rows, schema=schema).to_pylist() == rows


def test_a_column_says_its_unit() -> None:
    endings = {"MHz": "_mhz", "W": "_w", "°C": "_c", "byte": "_bytes", "s": "_s"}
    for column in CONDITION_COLUMNS:
        stem = column.name.removesuffix("_start").removesuffix("_end")
        for unit, ending in endings.items():
            assert (column.unit == unit) == stem.endswith(ending), column.name


# -- this machine -----------------------------------------------------------------------------------------------------


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """As many processes that compute without end."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_snapshot_of_this_machine() -> None:
    observer = Observer(CPU)
    before = observer.snapshot()
    while time.process_time() < before.own_cpu_s + 0.05:
        pass
    after = observer.snapshot()
    assert before.gpu == GpuState()
    assert before.foreign_processes is None
    assert before.other_memory_bytes is None
    assert before.threads_needed == torch.get_num_threads()
    assert 0 < before.cores <= before.logical_cores
    assert after.taken_s > before.taken_s
    assert after.own_cpu_s >= before.own_cpu_s + 0.05
    assert after.busy_cpu_s >= before.busy_cpu_s
    load = condition_columns(before, after)["cpu_load_others"]
    assert 0.0 <= load <= before.logical_cores + 1


def test_a_busy_machine_is_seen() -> None:
    observer = Observer(CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(observer.snapshot().logical_cores)
    try:
        with busy_processes(1):
            deadline = time.monotonic() + 60
            found: list[str] = []
            while Reason.CPU_BUSY not in found:
                assert time.monotonic() < deadline, "a busy process was not seen in a minute"
                before = observer.snapshot()
                time.sleep(0.25)
                found = reasons(before, observer.snapshot())
    finally:
        torch.set_num_threads(threads)


def test_own_work_is_not_that_of_others() -> None:
    """A loop of our own keeps a core busy; it is seen as ours at least once, however busy the others are."""
    observer = Observer(CPU)
    deadline = time.monotonic() + 60
    while True:
        before = observer.snapshot()
        while time.process_time() < before.own_cpu_s + 0.25:
            pass
        after = observer.snapshot()
        all_busy = (after.busy_cpu_s - before.busy_cpu_s) / (after.taken_s - before.taken_s)
        own = (after.own_cpu_s - before.own_cpu_s) / (after.taken_s - before.taken_s)
        others = cpu_load_others(before, after)
        assert others is not None
        assert others == pytest.approx(max(0.0, all_busy - own))
        if own > 0.5:
            return
        assert time.monotonic() < deadline, "this process got less than half a core for a minute"


def test_an_observer_asks_the_gpu_it_is_given() -> None:
    seen = Observer(CPU, Gpu(UUID, RecordedNvml())).snapshot()
    assert seen.gpu.power_limit_w == pytest.approx(700.0)
    assert seen.foreign_processes == 1, "this process has no context, so whoever is there is another"
    assert seen.other_memory_bytes == 3 * GIB

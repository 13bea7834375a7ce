"""Joules of a call, by a simulated device that draws a known power and shows it only in ticks."""

from __future__ import annotations

import bisect
import dataclasses
import math
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from nvml_recorded import ANSWERS, ENERGY, HANDLE, UUID, NvmlError, RecordedNvml

from workers.energy import LEAD_S, TICK_WAIT_S, Energy, energy_of
from workers.nvml import Gpu

QUESTION = "nvmlDeviceGetTotalEnergyConsumption"
IDLE_W, WORK_W = 90.0, 400.0


class Device(RecordedNvml):
    """In place of pynvml: time passes only by work and by readings, the counter follows at its ticks.

    Args:
        tick_s, jitter: the time between ticks, and by what share it differs at random to either side.
        read_s: what a reading takes, the device idle.
        lag_s: the counter shows at a tick what was drawn until so long before it.
        sampled: the part of the time before a tick that the sensor looks at, and takes for the whole.
    """

    def __init__(
        self,
        tick_s: float = 0.1,
        jitter: float = 0.0,
        read_s: float = 1e-4,
        lag_s: float = 0.0,
        sampled: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.now = 100.0
        self.calls = self.reads = 0
        self.tick_s, self.jitter, self.read_s, self.lag_s, self.sampled = tick_s, jitter, read_s, lag_s, sampled
        self.ticks = [self.now]
        self._random = random.Random(seed)
        self._times, self._drawn = [0.0, self.now], [0.0, self.now * IDLE_W]
        self._next = self.now + tick_s * self._random.random()
        self._shown = 5000.0

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float, power_w: float) -> None:
        """Draw power; the counter ticks meanwhile."""
        self.now += seconds
        self._times.append(self.now)
        self._drawn.append(self._drawn[-1] + seconds * power_w)
        while self._next <= self.now:
            self._tick(self._next)
            self._next += self.tick_s * (1 + self.jitter * self._random.uniform(-1, 1))

    def working(self, *stages: tuple[float, float]) -> Callable[[], None]:
        """A call of these stages, in seconds and watts."""

        def work() -> None:
            self.calls += 1
            for seconds, power_w in stages:
                self.spend(seconds, power_w)

        return work

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == HANDLE
        self.reads += 1
        self.spend(self.read_s / 2, IDLE_W)
        millijoules = int(self.shown() * 1e3)
        self.spend(self.read_s / 2, IDLE_W)
        return millijoules

    def shown(self) -> float:
        return self._shown

    def _tick(self, moment: float) -> None:
        seconds = moment - self.ticks[-1]
        looked = seconds * self.sampled
        end = moment - self.lag_s
        self._shown += (self._until(end) - self._until(end - looked)) / looked * seconds
        self.ticks.append(moment)

    def _until(self, moment: float) -> float:
        """Joules drawn until then."""
        i = bisect.bisect_left(self._times, moment, 1, len(self._times) - 1)
        before, after = self._times[i - 1], self._times[i]
        share = (moment - before) / (after - before)
        return self._drawn[i - 1] + share * (self._drawn[i] - self._drawn[i - 1])


def measured(device: Device, work: Callable[[], None], **arguments: Any) -> Energy | None:
    return energy_of(Gpu(UUID, device), work, clock=device.clock, **arguments)


def checked(device: Device, *stages: tuple[float, float], **arguments: Any) -> Energy:
    """The energy of a call of these stages, which is as far from the truth as it says at most."""
    found = measured(device, device.working(*stages), **arguments)
    assert found is not None
    truth = sum(seconds * power_w for seconds, power_w in stages)
    assert abs(found.joules - truth) <= found.relative_error * found.joules, (found, truth)
    call_s = sum(seconds for seconds, _ in stages)
    assert found.seconds == pytest.approx(found.calls * call_s, rel=0.1)
    return found


# -- the counter ------------------------------------------------------------------------------------------------------


def test_the_counter_in_joules() -> None:
    assert Gpu(UUID, RecordedNvml(ANSWERS | ENERGY)).energy_j() == pytest.approx(7_654_321.25)


def test_the_question_is_one_of_pynvml() -> None:
    import pynvml

    library = RecordedNvml(ENERGY)
    Gpu(UUID, library).energy_j()
    assert library.asked == [QUESTION]
    assert callable(getattr(pynvml, QUESTION))


@pytest.mark.parametrize(
    "gpu",
    [
        Gpu(None),
        Gpu(UUID, RecordedNvml(driver=False)),
        Gpu(UUID, RecordedNvml(ENERGY, uuid="GPU-another")),
        Gpu(UUID, RecordedNvml({})),
        Gpu(UUID, RecordedNvml({}, uuid=f"MIG-{UUID}")),
        Gpu(UUID, SimpleNamespace(NVMLError=NvmlError, nvmlInit=lambda: None)),
    ],
    ids=["no GPU", "no driver", "unknown", "not supported", "MIG slice", "old pynvml"],
)
def test_no_counter_is_null_and_nothing_is_done_for_it(gpu: Gpu) -> None:
    calls: list[None] = []
    assert gpu.energy_j() is None
    assert energy_of(gpu, lambda: calls.append(None)) is None
    assert calls == []


# -- energy of a call -------------------------------------------------------------------------------------------------

CALLS_S = [0.0002, 0.003, 0.017, 0.06, 0.1, 0.13, 0.37, 1.3, 7.0]


@pytest.mark.parametrize("call_s", CALLS_S)
@pytest.mark.parametrize("jitter", [0.0, 0.15])
@pytest.mark.parametrize("tick_s", [0.02, 0.1])
def test_the_joules_of_a_call(call_s: float, jitter: float, tick_s: float) -> None:
    for seed in range(20):
        device = Device(tick_s, jitter, seed=seed)
        found = checked(device, (call_s, WORK_W))
        assert found.seconds >= 10 * tick_s * (1 - jitter)
        assert found.relative_error <= 0.13


@pytest.mark.parametrize("least_ticks", [2, 5, 10, 40])
@pytest.mark.parametrize("call_s", [0.0002, 0.06, 0.37])
def test_the_window_spans_as_many_ticks_as_asked_for(least_ticks: int, call_s: float) -> None:
    device = Device()
    found = checked(device, (call_s, WORK_W), least_ticks=least_ticks)
    ended = device.now - device.read_s
    seen = [moment for moment in device.ticks if ended - found.seconds < moment <= ended]
    assert len(seen) >= least_ticks
    assert found.seconds <= (least_ticks + 2) * 0.1 + 2 * call_s


def test_a_very_short_call_is_known_well() -> None:
    """Readings take half as long as the call, and the device rests meanwhile; so they are rare."""
    device = Device()
    found = checked(device, (0.0002, WORK_W))
    assert found.calls > 4500
    assert found.relative_error < 0.012
    assert found.joules == pytest.approx(0.0002 * WORK_W, rel=0.006)


def test_slow_readings_are_in_the_error() -> None:
    fast, slow = (checked(Device(read_s=read_s), (0.0002, WORK_W)).relative_error for read_s in (2e-5, 1e-3))
    assert fast < 0.01 < slow < 0.08


def test_a_call_longer_than_a_tick_is_known_to_a_tick() -> None:
    found = checked(Device(), (0.37, WORK_W))
    assert found.calls == 3
    assert found.relative_error == pytest.approx(0.1 / (found.seconds - 0.1), rel=0.02)
    more = checked(Device(), (0.37, WORK_W), least_ticks=60)
    assert more.relative_error < 0.02


@pytest.mark.parametrize("call_s", [0.0002, 0.06, 0.37])
def test_over_many_tries_it_is_right_on_average(call_s: float) -> None:
    found = [checked(Device(jitter=0.1, seed=seed, read_s=1e-4), (call_s, WORK_W)) for seed in range(60)]
    off = [energy.joules / (call_s * WORK_W) - 1 for energy in found]
    spread = math.sqrt(sum(value**2 for value in off) / len(off))
    assert abs(sum(off) / len(off)) <= 3 * spread / math.sqrt(len(off)) + 0.001
    assert spread <= 0.6 * max(energy.relative_error for energy in found)


@pytest.mark.parametrize("lag_s", [0.03, 0.1, 0.25])
@pytest.mark.parametrize("call_s", CALLS_S)
def test_a_counter_that_lags_behind(call_s: float, lag_s: float) -> None:
    """It would show the rest before the window in place of work, if there were one."""
    checked(Device(lag_s=lag_s), (call_s, WORK_W))


@pytest.mark.parametrize("call_s", [0.0002, 0.003, 0.37])
def test_a_sensor_that_looks_a_quarter_of_the_time(call_s: float) -> None:
    for seed in range(10):
        checked(Device(sampled=0.25, jitter=0.05, seed=seed), (call_s, WORK_W))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("call_s", CALLS_S)
def test_power_that_falls_within_a_call(call_s: float, share: float) -> None:
    """As it does from prefill to decode."""
    for seed in range(10):
        checked(Device(seed=seed), (share * call_s, 600.0), ((1 - share) * call_s, 250.0))


def test_calls_that_take_turns() -> None:
    """Of unlike length: the mean over whole calls."""
    device = Device()
    lengths = [0.004, 0.001, 0.007]

    def work() -> None:
        device.calls += 1
        device.spend(lengths[device.calls % 3], WORK_W)

    found = measured(device, work)
    assert found is not None
    assert found.joules == pytest.approx(0.004 * WORK_W, rel=found.relative_error)


def test_a_counter_without_visible_ticks() -> None:
    class Continuous(Device):
        def shown(self) -> float:
            return 5000.0 + self._drawn[-1]

    for call_s in (0.0002, 0.06, 0.37):
        found = checked(Continuous(), (call_s, WORK_W))
        assert found.seconds >= 0.2
        assert found.relative_error < 0.12


# -- where there is nothing to tell -----------------------------------------------------------------------------------


def test_a_counter_that_is_stuck() -> None:
    device = Device()
    begun = device.now
    device.tick_s = device._next = math.inf
    assert measured(device, device.working((0.01, WORK_W))) is None
    assert device.calls == 0
    assert device.now - begun <= TICK_WAIT_S + 1e-3


def test_a_stuck_counter_on_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.energy.TICK_WAIT_S", 0.05)
    begun = time.monotonic()
    assert energy_of(Gpu(UUID, RecordedNvml(ENERGY)), lambda: None) is None
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("call_s", [0.0002, 0.37])
@pytest.mark.parametrize("after_s", [0.0, LEAD_S / 2, LEAD_S + 0.5])
def test_a_counter_that_gets_stuck(after_s: float, call_s: float) -> None:
    device = Device()
    work = device.working((call_s, WORK_W))

    def last() -> None:
        if device.calls * call_s >= after_s:
            device._next = math.inf
        work()

    assert measured(device, last, most_seconds=4.0) is None
    assert device.calls <= math.ceil(4.0 / call_s)


@pytest.mark.parametrize("call_s", [0.0002, 0.06, 0.37])
@pytest.mark.parametrize("after_s", [0.0, LEAD_S / 2, LEAD_S + 0.5])
def test_a_counter_that_begins_anew(after_s: float, call_s: float) -> None:
    device = Device()
    work = device.working((call_s, WORK_W))

    def restart() -> None:
        before = device.calls * call_s
        work()
        if before <= after_s < device.calls * call_s:
            device._shown = 0.0

    assert measured(device, restart) is None


def test_a_counter_that_begins_anew_before_any_work() -> None:
    class Restarting(Device):
        def shown(self) -> float:
            return self._shown - (5000.0 if self.now > 100.15 else 0.0)

    device = Restarting()
    assert measured(device, device.working((0.01, WORK_W))) is None
    assert device.calls == 0


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 0.997, 1.0])
def test_a_counter_that_stops_answering(share: float) -> None:
    class Failing(Device):
        fails_at = math.inf

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
            if self.reads >= self.fails_at:
                raise NvmlError("GPU is lost")
            return super().nvmlDeviceGetTotalEnergyConsumption(handle)

    whole = Failing()
    assert measured(whole, whole.working((0.01, WORK_W))) is not None
    device = Failing()
    device.fails_at = int(share * (whole.reads - 1))
    assert measured(device, device.working((0.01, WORK_W))) is None
    assert device.reads == device.fails_at


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call_s", [0.0002, 0.06, 0.37])
def test_too_few_ticks_in_the_time(call_s: float) -> None:
    device = Device()
    assert measured(device, device.working((call_s, WORK_W)), most_seconds=1.5) is None
    assert device.calls <= math.ceil(1.5 / call_s)


@pytest.mark.parametrize("call_s", CALLS_S)
def test_no_more_calls_than_the_time_allows(call_s: float) -> None:
    device = Device()
    checked(device, (call_s, WORK_W), most_seconds=3.0)
    assert device.calls <= max(2, math.ceil(3.0 / call_s))


def test_a_call_longer_than_all_the_time_is_made_twice() -> None:
    device = Device()
    found = checked(device, (12.0, WORK_W))
    assert device.calls == 2
    assert found.calls == 1
    assert found.relative_error < 0.01


def test_what_work_raises_is_passed_on() -> None:
    def work() -> None:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        measured(Device(), work)


def test_a_window_of_one_tick_is_refused() -> None:
    with pytest.raises(ValueError, match="least_ticks"):
        energy_of(Gpu(None), lambda: None, least_ticks=1)


def test_on_the_real_clock() -> None:
    """A counter that follows the clock at ticks of 20 ms, at 100 W."""

    class Following(RecordedNvml):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
            return int(time.perf_counter() / 0.02) * 2000

    found = energy_of(Gpu(UUID, Following()), lambda: time.sleep(0.002))
    assert found is not None
    call_s = found.seconds / found.calls
    assert found.joules == pytest.approx(100.0 * call_s, rel=found.relative_error)
    assert dataclasses.is_dataclass(found)

"""One GPU as its driver sees it: what NVML answers, and null for whatever it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Names of the bits of `nvmlDeviceGetCurrentClocksEventReasons`, which older drivers call throttle reasons (nvml.h).
IDLE = "gpu_idle"
SW_POWER_CAP = "sw_power_cap"
HW_SLOWDOWN = "hw_slowdown"
SW_THERMAL = "sw_thermal_slowdown"
HW_THERMAL = "hw_thermal_slowdown"
HW_POWER_BRAKE = "hw_power_brake_slowdown"
CLOCK_EVENTS = {
    0x001: IDLE,
    0x002: "applications_clocks_setting",
    0x004: SW_POWER_CAP,
    0x008: HW_SLOWDOWN,
    0x010: "sync_boost",
    0x020: SW_THERMAL,
    0x040: HW_THERMAL,
    0x080: HW_POWER_BRAKE,
    0x100: "display_clock_setting",
}

# Arguments of NVML, from nvml.h.
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
_GPU_TEMPERATURE = 0
_POWER_POLICY, _THERMAL_POLICY = 0, 1
_MEMORY_V2 = 0x02000028
_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}


@dataclass(frozen=True)
class GpuSettings:
    """What an administrator sets, or the driver: the same over a run. None where NVML does not say.

    `application_sm_clock_mhz` is the clock that was asked for, which locking clocks may or may not change.
    """

    driver_version: str | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    max_sm_clock_mhz: int | None = None
    max_memory_clock_mhz: int | None = None
    application_sm_clock_mhz: int | None = None
    persistence_mode: bool | None = None
    compute_mode: str | None = None
    mig: bool | None = None
    ecc: bool | None = None


@dataclass(frozen=True)
class GpuState:
    """What changes from one moment to the next. None where NVML does not say.

    Attributes:
        clock_events: names out of `CLOCK_EVENTS`: what holds the clocks at this moment.
        power_capped_s, thermally_slowed_s: how long that has held them below what was asked for, since some moment in
            the past; only differences mean anything.
        power_limit_w, application_sm_clock_mhz: as in `GpuSettings`, read again because someone may change them.
        pids: processes with a compute context on the GPU, in whatever pid namespace the driver answers.
        used_memory_bytes: taken by anyone, without what the driver keeps for itself.
    """

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    clock_events: tuple[str, ...] | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_capped_s: float | None = None
    thermally_slowed_s: float | None = None
    power_limit_w: float | None = None
    application_sm_clock_mhz: int | None = None
    pids: frozenset[int] | None = None
    used_memory_bytes: int | None = None


class Gpu:
    """Asks NVML about one GPU; never raises for what a driver, a container or a MIG slice does not tell."""

    def __init__(self, uuid: str | None, library: Any = None) -> None:
        """
        Args:
            uuid: as torch gives it, without a prefix; None for no GPU at all. Not an index: CUDA counts visible devices
                in an order of its own, NVML all of them by bus id.
            library: in place of pynvml.
        """
        self._nvml: Any = library
        self._handle: Any = None
        if uuid is None:
            return
        if self._nvml is None:
            import pynvml

            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return  # no driver, or none that this process may talk to
        for kind in ("GPU", "MIG"):
            self._handle = self._handle or self._call("nvmlDeviceGetHandleByUUID", f"{kind}-{uuid}")

    def settings(self) -> GpuSettings:
        if self._handle is None:
            return GpuSettings()
        return GpuSettings(
            driver_version=_text(self._call("nvmlSystemGetDriverVersion")),
            power_limit_w=self._ask("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
            default_power_limit_w=self._ask("nvmlDeviceGetPowerManagementDefaultLimit", scale=1e-3),
            max_sm_clock_mhz=self._ask("nvmlDeviceGetMaxClockInfo", _SM_CLOCK),
            max_memory_clock_mhz=self._ask("nvmlDeviceGetMaxClockInfo", _MEMORY_CLOCK),
            application_sm_clock_mhz=self._ask("nvmlDeviceGetApplicationsClock", _SM_CLOCK),
            persistence_mode=_flag(self._ask("nvmlDeviceGetPersistenceMode")),
            compute_mode=_COMPUTE_MODES.get(self._ask("nvmlDeviceGetComputeMode")),
            mig=_flag(self._ask("nvmlDeviceGetMigMode", part=_first)),
            ecc=_flag(self._ask("nvmlDeviceGetEccMode", part=_first)),
        )

    def state(self) -> GpuState:
        if self._handle is None:
            return GpuState()
        events = self._either("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        return GpuState(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", _SM_CLOCK),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
            clock_events=None if events is None else tuple(n for bit, n in CLOCK_EVENTS.items() if events & bit),
            temperature_c=self._either("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", _GPU_TEMPERATURE),
            power_w=self._ask("nvmlDeviceGetPowerUsage", scale=1e-3),
            power_capped_s=self._ask("nvmlDeviceGetViolationStatus", _POWER_POLICY, part=_violation, scale=1e-9),
            thermally_slowed_s=self._ask("nvmlDeviceGetViolationStatus", _THERMAL_POLICY, part=_violation, scale=1e-9),
            power_limit_w=self._ask("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
            application_sm_clock_mhz=self._ask("nvmlDeviceGetApplicationsClock", _SM_CLOCK),
            pids=None if processes is None else frozenset(process.pid for process in processes),
            used_memory_bytes=self._used_memory(),
        )

    def energy_j(self) -> float | None:
        """Joules that the whole board has drawn since the driver was loaded; only differences mean anything.

        Every process on the GPU counts. From Volta on (nvml.h, which counts in millijoules); None on older ones and on
        a slice of MIG. It rises in steps, most often some 20 to 100 ms apart: `workers.energy` is made for them.
        """
        if self._handle is None:
            return None
        joules: float | None = self._ask("nvmlDeviceGetTotalEnergyConsumption", scale=1e-3)
        return joules

    def _used_memory(self) -> int | None:
        """The first version of the question counts what the driver reserves as used, some drivers know no other."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", _MEMORY_V2) or self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def _either(self, newer: str, older: str, *arguments: Any) -> Any:
        answer = self._ask(newer, *arguments)
        return self._ask(older, *arguments) if answer is None else answer

    def _ask(
        self, question: str, *arguments: Any, part: Callable[[Any], Any] | None = None, scale: float | None = None
    ) -> Any:
        """The answer about this GPU, `part` of it, times `scale`; None where there is none."""
        answer = self._call(question, self._handle, *arguments)
        if answer is None:
            return None
        if part is not None:
            answer = part(answer)
        return answer if scale is None else answer * scale

    def _call(self, question: str, *arguments: Any) -> Any:
        function = getattr(self._nvml, question, None)  # an older pynvml lacks the newer questions
        if function is None:
            return None
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None  # not supported, not permitted, or the GPU is gone, of which torch will tell


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a torch device; one that answers nothing for a CPU. Imports torch."""
    if device.type != "cuda":
        return Gpu(None)
    import torch

    return Gpu(str(torch.cuda.get_device_properties(device).uuid))


def _first(pair: Any) -> Any:
    """NVML's present mode; the other is the one after a reset."""
    return pair[0]


def _violation(status: Any) -> Any:
    """In nanoseconds (nvmlViolationTime_t)."""
    return status.violationTime


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value

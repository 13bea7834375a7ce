"""A stand-in for pynvml: answers by the name of the question, and NVML's own error for what it has no answer to."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

UUID = "1f2e3d4c-0000-1111-2222-333344445555"
HANDLE = "the handle"

# What an idle data-centre GPU answers, in NVML's units: milliwatts, MHz, nanoseconds, bytes.
ANSWERS: dict[str, Any] = {
    "nvmlSystemGetDriverVersion": "570.124.06",
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetMaxClockInfo": {1: 1980, 2: 2619},
    "nvmlDeviceGetApplicationsClock": {1: 1980, 2: 2619},
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetComputeMode": 0,
    "nvmlDeviceGetMigMode": [0, 1],
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
    "nvmlDeviceGetClockInfo": {1: 1980, 2: 2619},
    "nvmlDeviceGetTemperatureV": {0: 41},
    "nvmlDeviceGetPowerUsage": 118_250,
    "nvmlDeviceGetViolationStatus": {
        0: SimpleNamespace(referenceTime=1, violationTime=2_500_000_000),
        1: SimpleNamespace(referenceTime=1, violationTime=0),
    },
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=4242, usedGpuMemory=None)],
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85_520_809_984, used=3 * 1024**3, free=0),
}

# Apart from the others, as it is no part of a state or of the settings: millijoules since the driver was loaded.
ENERGY: dict[str, Any] = {"nvmlDeviceGetTotalEnergyConsumption": 7_654_321_250}


class NvmlError(Exception):
    """What pynvml raises, whatever NVML's code."""


class RecordedNvml:
    """Takes the place of the module `pynvml` in a `Gpu`."""

    NVMLError = NvmlError

    def __init__(self, answers: dict[str, Any] | None = None, *, uuid: str = f"GPU-{UUID}", driver: bool = True):
        self.answers = ANSWERS if answers is None else answers
        self.asked: list[str] = []
        self._uuid = uuid
        self._driver = driver

    def nvmlInit(self) -> None:
        if not self._driver:
            raise NvmlError("library not found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self._uuid:
            raise NvmlError("not found")
        return HANDLE

    def __getattr__(self, question: str) -> Callable[..., Any]:
        if not question.startswith("nvml"):
            raise AttributeError(question)

        def answer(*arguments: Any) -> Any:
            self.asked.append(question)
            about = arguments[1:] if arguments[:1] == (HANDLE,) else arguments
            found = self.answers.get(question)
            if isinstance(found, dict):
                found = found.get(about[0])
            if found is None:
                raise NvmlError("not supported")
            return found

        return answer

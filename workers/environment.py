"""What a worker runs in, as one record: versions, driver, device, processor, code, back-ends, environment variables."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from workers.code_version import code_version
from workers.columns import Column
from workers.environment_variables import variables_that_matter
from workers.nvml import Gpu, gpu_of
from workers.probes import cpu_name, current_device

if TYPE_CHECKING:
    import torch

_STRING, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()

# Packages whose version can change a time or an answer; the column is the name with `_version` behind it.
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "triton": "triton",
    "flash_attn": "flash-attn",
    "kernels": "kernels",
    "numpy": "numpy",
    "pillow": "pillow",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "ray": "ray",
}

ENVIRONMENT_COLUMNS = (
    Column("environment_id", _STRING, "", "digest of all that follows; rows name the record they were made in by it"),
    Column("host", _STRING, "", "machine, as it calls itself"),
    Column("device_name", _STRING, "", "device as its driver names it"),
    Column("device_uuid", _STRING, "", "tells two GPUs of a kind apart; null on a CPU"),
    Column("device_memory_bytes", _INT, "byte", "memory of the GPU; main memory on a CPU"),
    Column("compute_capability", _STRING, "", "of the GPU, e.g. 9.0"),
    Column("driver_version", _STRING, "", "NVIDIA's driver"),
    Column("power_limit_w", _FLOAT, "W", "power that the GPU may draw"),
    Column("default_power_limit_w", _FLOAT, "W", "power that it may draw unless someone says otherwise"),
    Column("max_sm_clock_mhz", _INT, "MHz", "highest clock of its processors"),
    Column("max_memory_clock_mhz", _INT, "MHz", "highest clock of its memory"),
    Column("application_sm_clock_mhz", _INT, "MHz", "clock of its processors that it is asked for"),
    Column("persistence_mode", _BOOL, "", "the driver stays loaded when nobody uses the GPU"),
    Column("compute_mode", _STRING, "", "how many processes may compute on the GPU: default for any number"),
    Column("mig", _BOOL, "", "the GPU can be split into slices"),
    Column("ecc", _BOOL, "", "its memory corrects errors, at the cost of some bandwidth on cards without HBM"),
    Column("cpu_name", _STRING, "", "model of the processor"),
    Column("cpu_capability", _STRING, "", "instruction set that torch's kernels use, e.g. AVX512"),
    Column("cpu_cores", _INT, "", "cores of the machine; null where it does not tell"),
    Column("cpu_logical_cores", _INT, "", "the same as the operating system counts them, hardware threads apart"),
    Column("cpu_usable_cores", _INT, "", "logical cores that the worker may use"),
    Column("cpu_quota", _FLOAT, "", "cores whose time a container may use; null for no limit"),
    Column("cpu_governor", _STRING, "", "how Linux chooses clocks: performance, powersave, ..."),
    Column("cpu_max_clock_mhz", _FLOAT, "MHz", "highest clock of the processor; null where it does not tell"),
    Column("memory_bytes", _INT, "byte", "main memory"),
    Column("threads", _INT, "", "threads that torch computes an operation with"),
    Column("interop_threads", _INT, "", "operations that torch runs side by side where a model asks for it"),
    Column("operating_system", _STRING, "", "distribution and version, else the system's name"),
    Column("kernel", _STRING, "", "release of the kernel"),
    Column("container", _STRING, "", "docker, podman, kubernetes, ... as far as can be told; null for none"),
    Column("python_version", _STRING, "", "version of the interpreter"),
    *(Column(f"{name}_version", _STRING, "", f"version of {name}; null if it is absent") for name in PACKAGES),
    Column("cuda_version", _STRING, "", "CUDA that torch was built with; null for a build without"),
    Column("cudnn_version", _STRING, "", "cuDNN that torch has loaded"),
    Column("project_version", _STRING, "", "release of this project"),
    Column("code_commit", _STRING, "", "git commit of this project; null outside a checkout, as in a Ray job"),
    Column("code_dirty", _BOOL, "", "tracked files differed from that commit"),
    Column("code_digest", _STRING, "", "digest of this project's modules: the same code has the same one anywhere"),
    Column(
        "float32_matmul", _STRING, "", "precision of float32 matrix products on the GPU: ieee, tf32, or none if unset"
    ),
    Column("float32_convolution", _STRING, "", "precision of float32 convolutions on the GPU, in the same words"),
    Column("bf16_reduced_reduction", _BOOL, "", "sums inside bfloat16 matrix products may be rounded to bfloat16"),
    Column("cudnn_benchmark", _BOOL, "", "cuDNN tries its algorithms per shape and keeps the fastest"),
    Column("cudnn_deterministic", _BOOL, "", "cuDNN uses deterministic algorithms only"),
    Column("deterministic_algorithms", _BOOL, "", "torch uses deterministic algorithms only"),
    Column("attention_kernels", pa.list_(_STRING), "", "kernels that scaled dot-product attention may choose from"),
    Column("onednn", _BOOL, "", "torch uses oneDNN on the CPU"),
    Column("environment_variables", _STRING, "", "JSON object of those that matter to speed or numbers; no secrets"),
)

# Enough to tell the environments of a result folder apart, and short enough for a column of every row.
ID_DIGITS = 16


def environment(device: torch.device, gpu: Gpu | None = None) -> dict[str, Any]:
    """The record of this process on this device, in `ENVIRONMENT_COLUMNS`; null is what cannot be found. Imports torch.

    Nothing in it differs between two workers on the same device, or between two calls unless something was changed, so
    that the same environment has the same id; pid, time and what a worker is called are not in it.

    Args:
        gpu: in place of the one behind `device`.
    """
    record = {
        **_device(device, gpu or gpu_of(device)),
        **_processor(),
        **_system(),
        **_versions(),
        **_code(),
        **_back_ends(),
        "environment_variables": _json(variables_that_matter(os.environ)),
    }
    return {"environment_id": environment_id(record), **record}


def environment_id(record: dict[str, Any]) -> str:
    """Digest of a record without its id."""
    rest = {name: value for name, value in record.items() if name != "environment_id"}
    return hashlib.sha256(_json(rest).encode()).hexdigest()[:ID_DIGITS]


def _device(device: torch.device, gpu: Gpu) -> dict[str, Any]:
    import torch

    found = current_device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    settings = gpu.settings()
    return {
        "host": found.host,
        "device_name": found.name,
        "device_uuid": found.uuid,
        "device_memory_bytes": found.memory_bytes,
        "compute_capability": None if capability is None else f"{capability[0]}.{capability[1]}",
        "driver_version": settings.driver_version,
        "power_limit_w": settings.power_limit_w,
        "default_power_limit_w": settings.default_power_limit_w,
        "max_sm_clock_mhz": settings.max_sm_clock_mhz,
        "max_memory_clock_mhz": settings.max_memory_clock_mhz,
        "application_sm_clock_mhz": settings.application_sm_clock_mhz,
        "persistence_mode": settings.persistence_mode,
        "compute_mode": settings.compute_mode,
        "mig": settings.mig,
        "ecc": settings.ecc,
    }


def _processor() -> dict[str, Any]:
    import psutil
    import torch

    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        frequency = None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    return {
        "cpu_name": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_logical_cores": psutil.cpu_count(),
        "cpu_usable_cores": usable,
        "cpu_quota": _cpu_quota(),
        "cpu_governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cpu_max_clock_mhz": frequency.max or None if frequency else None,
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
    }


@cache
def _system() -> dict[str, Any]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = f"{platform.system()} {platform.version()}"
    return {"operating_system": name, "kernel": platform.release(), "container": _container()}


@cache
def _versions() -> dict[str, Any]:
    import torch

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    installed = {f"{name}_version": _version(distribution) for name, distribution in PACKAGES.items()}
    return installed | {
        "python_version": platform.python_version(),
        # As built: the distribution's own version leaves out what it was built for.
        "torch_version": str(torch.__version__),
        "cuda_version": torch.version.cuda,
        "cudnn_version": None if cudnn is None else str(cudnn),
    }


def _code() -> dict[str, Any]:
    code = code_version()
    return {
        "project_version": code.version,
        "code_commit": code.commit,
        "code_dirty": code.dirty,
        "code_digest": code.digest,
    }


def _back_ends() -> dict[str, Any]:
    """Read each time, for they can be switched while a process runs.

    Precision through torch's newer names: the older ones raise once someone has set the newer.
    """
    import torch

    cuda = torch.backends.cuda
    kernels: dict[str, Callable[[], bool]] = {
        "flash": cuda.flash_sdp_enabled,
        "memory efficient": cuda.mem_efficient_sdp_enabled,
        "cudnn": cuda.cudnn_sdp_enabled,
        "math": cuda.math_sdp_enabled,
    }
    return {
        "float32_matmul": cuda.matmul.fp32_precision,
        "float32_convolution": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "bf16_reduced_reduction": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention_kernels": [name for name, enabled in kernels.items() if enabled()],
        "onednn": torch.backends.mkldnn.enabled,
    }


def _container() -> str | None:
    """What a process can notice of the container it is in."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if Path("/run/.containerenv").exists():
        return "podman"
    if Path("/.dockerenv").exists():
        return "docker"
    for name in ("APPTAINER_NAME", "SINGULARITY_NAME"):
        if name in os.environ:
            return "apptainer"
    return None


def _cpu_quota() -> float | None:
    """Cores' worth of time that a control group grants (version 2, then version 1)."""
    quota, _, period = (_line("/sys/fs/cgroup/cpu.max") or "").partition(" ")
    if not period:
        quota = _line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or ""
        period = _line("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or ""
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None  # max, or no control groups
    return cores if cores > 0 else None


def _line(place: str) -> str | None:
    try:
        return Path(place).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

"""The Ray cluster of a run: which one, whether it is there, what it has, and one pool of workers per kind of device."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from orchestrator.spec import Sweep
from workers.probes import CPU

# Ray itself waits many minutes for an address where nobody listens.
PROBE_SECONDS = 3.0

# How often the cluster is asked whether a device has come.
POLL_SECONDS = 2.0

# Preprocessing threads per GPU worker, where the node has that many cores per GPU.
MOST_THREADS_PER_GPU = 8


class ClusterError(Exception):
    """A cluster that is not there, or lacks what the sweep asks for; one line with the remedy."""


@dataclass(frozen=True)
class Pool:
    """Workers on one kind of device.

    Attributes:
        accelerator: the kind.
        workers: how many.
        threads: cores that each may use on its host.
        min_memory_gb: a worker that finds less device memory is not used.
    """

    accelerator: str
    workers: int
    threads: int
    min_memory_gb: float | None = None

    def __str__(self) -> str:
        return f"{self.workers} x {self.accelerator} with {self.threads} thread{'' if self.threads == 1 else 's'} each"


@dataclass(frozen=True)
class Cluster:
    """A connected cluster.

    Attributes:
        address: of its head.
        dashboard: where the Ray dashboard is and how to enter, or None.
        gpus: number of GPUs by kind.
        cpus: number of cores of the nodes that are alive.
    """

    address: str
    dashboard: str | None
    gpus: dict[str, int]
    cpus: int

    def __str__(self) -> str:
        kinds = [f"{count} x {kind}" for kind, count in sorted(self.gpus.items())]
        return ", ".join([*kinds, f"{self.cpus} CPU cores"])


def connect(address: str | None) -> Cluster:
    """Connect to a cluster: `address`, else the one RAY_ADDRESS names (as inside a Ray job), else a private local one.

    The address is always passed to Ray explicitly: left to itself it may pick another cluster on the machine, or
    start a new one.

    Raises:
        ClusterError: nobody listens there, or Ray cannot connect.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or "local"
    if wanted not in ("local", "auto"):
        _probe(wanted)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        context = ray.init(wanted, include_dashboard=True, **quiet) if wanted == "local" else ray.init(wanted, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(_refused(wanted, error)) from None
    gpus, cpus = _devices()
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
    if dashboard and wanted == "local" and os.environ.get("RAY_AUTH_MODE") != "disabled":
        dashboard += " (asks for the token that `ray get-auth-token` prints)"  # Ray's default for local clusters
    # A connection through Ray's client (ray://) knows only the address it was given.
    place = getattr(context, "address_info", {}).get("address", wanted)
    return Cluster(place, dashboard, gpus, cpus)


def wait_for_devices(
    sweep: Sweep,
    cluster: Cluster,
    seconds: float,
    interrupted: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Cluster:
    """The cluster once it has every kind of device that the sweep names, or as it is when the time is over.

    Nodes that an autoscaler starts, or that someone else gives back, come minutes after a run was started.

    Args:
        seconds: how long to wait at most.
        interrupted: asked often; once true, nothing more is waited for.
    """
    wanted = [entry.accelerator for entry in sweep.hardware or () if entry.accelerator.lower() != CPU]
    deadline, told = time.monotonic() + seconds, False
    while True:
        missing = [kind for kind in wanted if kind.lower() not in {there.lower() for there in cluster.gpus}]
        if not missing or time.monotonic() >= deadline or interrupted():
            return cluster
        if not told:
            say(f"waiting up to {seconds / 60:.3g} minutes for {', '.join(missing)}; the cluster has: {cluster}")
            told = True
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        gpus, cpus = _devices()
        cluster = replace(cluster, gpus=gpus, cpus=cpus)


def pools_for(sweep: Sweep, accelerators: Sequence[str], cluster: Cluster) -> list[Pool]:
    """One pool per kind of device, with no more workers than the cluster has devices.

    Raises:
        ClusterError: the sweep names a kind that the cluster does not have.
    """
    entries = {entry.accelerator.lower(): entry for entry in sweep.hardware or ()}
    pools: list[Pool] = []
    missing: list[str] = []
    for kind in accelerators:
        entry = entries.get(kind.lower())
        there = 1 if kind == CPU else cluster.gpus.get(kind, 0)
        if not there or not cluster.cpus:
            missing.append(kind)
            continue
        if kind == CPU:
            # Workers on the same cores disturb each other's timing, so there is one unless the sweep says otherwise.
            workers = entry.workers if entry is not None and isinstance(entry.workers, int) else 1
            workers = min(workers, cluster.cpus)
            # One core is left to the driver and to Ray: threads that wait for a core they share wait for each other.
            threads = max(1, (cluster.cpus - 1) // workers)
        else:
            workers = min(entry.workers, there) if entry is not None and isinstance(entry.workers, int) else there
            threads = max(1, min(MOST_THREADS_PER_GPU, cluster.cpus // max(1, sum(cluster.gpus.values()))))
        pools.append(Pool(kind, workers, threads, entry.min_memory_gb if entry is not None else None))
    if missing:
        where = f" ({sweep.where('hardware')})" if sweep.hardware is not None else ""
        wait = "; --wait MINUTES waits for more"
        raise ClusterError(f"the sweep asks for {', '.join(missing)}{where}, but the cluster has: {cluster}{wait}")
    return pools


def actor_options(pool: Pool, name: str) -> dict[str, Any]:
    """Options of the actor of one worker: a device of its own, and none of Ray's changes to how a process runs."""
    threads = str(pool.threads)
    # Ray starts workers at nice 15 with one thread; both would be measured.
    environment = {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": threads}
    if pool.accelerator == CPU:
        # An actor that asks Ray for no GPU still sees those of its node.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    options: dict[str, Any] = {
        "name": name,
        # Retrying is the driver's decision: Ray would run a task that kills its worker over and over.
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": environment},
    }
    if pool.accelerator == CPU:
        return options | {"num_cpus": pool.threads}
    return options | {"num_cpus": 1, "num_gpus": 1, "accelerator_type": pool.accelerator}


def _devices() -> tuple[dict[str, int], int]:
    """GPUs by kind, and cores, of the nodes that are alive."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus: dict[str, int] = {}
    for node in nodes:
        count = int(node["Resources"].get("GPU", 0))
        for kind in _kinds(node) if count else ():
            gpus[kind] = gpus.get(kind, 0) + count
    return gpus, int(sum(node["Resources"].get("CPU", 0) for node in nodes))


def _kinds(node: dict[str, Any]) -> list[str]:
    prefix = "accelerator_type:"
    return [name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)]


def _refused(address: str, error: BaseException) -> str:
    """One line for a connection that Ray gave up, with its own reason."""
    reasons = [str(e).strip().splitlines()[0] for e in (error.__cause__, error) if e is not None and str(e).strip()]
    if any("auth" in reason.lower() or "token" in reason.lower() for reason in reasons):
        hint = "it asks for a token, which the variable RAY_AUTH_TOKEN holds for those who may enter"
    else:
        hint = "start one with `ray start --head`, or leave --address out for a private local one"
    return f"cannot join the Ray cluster at {address} ({reasons[0] if reasons else type(error).__name__}); {hint}"


def _probe(address: str) -> None:
    """Knock at the address, so that a wrong one is an answer within seconds."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the address of a dashboard, which takes jobs; to run from here give HOST:6379 or "
            "ray://HOST:10001 (--address, or RAY_ADDRESS)"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"{address!r} is not an address of a Ray cluster (auto, local, HOST:PORT or ray://HOST:PORT)"
        )
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster at {address} ({error.strerror or error})") from None

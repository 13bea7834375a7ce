"""Which cluster, which devices, which pools: decided by plain rules, and refused in one line with a remedy."""

from __future__ import annotations

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from orchestrator.cluster import Cluster, ClusterError, Pool, actor_options, connect, pools_for, wait_for_devices
from orchestrator.resolve import accelerators_wanted
from orchestrator.spec import Sweep, parse_sweep

SMALL = "name: s\nmodels: [tiny-smolvlm]\ndatasets: [demo]\n"
MIXED = Cluster("10.0.0.1:6379", None, {"H100": 8, "A100": 4}, 96)
BARE = Cluster("10.0.0.1:6379", None, {}, 4)


def sweep(hardware: str | None = None) -> Sweep:
    return parse_sweep(SMALL + (f"hardware: {hardware}\n" if hardware else ""))


def pools(of: Sweep, cluster: Cluster) -> list[Pool]:
    return pools_for(of, accelerators_wanted(of, list(cluster.gpus)), cluster)


def test_without_hardware_everything_there_is_used() -> None:
    assert pools(sweep(), MIXED) == [Pool("H100", 8, 8), Pool("A100", 4, 8)]
    assert pools(sweep(), BARE) == [Pool("cpu", 1, 3)]


def test_one_core_is_left_to_the_driver() -> None:
    assert pools(sweep(), Cluster("a", None, {}, 1)) == [Pool("cpu", 1, 1)]
    assert pools(sweep("[{accelerator: CPU, workers: 3}]"), BARE) == [Pool("cpu", 3, 1)]


def test_a_kind_is_spelled_as_the_cluster_spells_it_because_ids_hold_it() -> None:
    asked = sweep("[{accelerator: h100, workers: 2, min_memory_gb: 80}]")
    assert accelerators_wanted(asked, ["H100"]) == ["H100"]
    assert accelerators_wanted(asked, []) == ["H100"], "a dry run asks no cluster"
    assert accelerators_wanted(sweep("[{accelerator: GeForce-RTX-4090}]"), []) == ["GeForce-RTX-4090"]
    assert pools(asked, MIXED) == [Pool("H100", 2, 8, 80)]


def test_no_more_workers_than_devices_and_the_run_says_how_many() -> None:
    [pool] = pools(sweep("[{accelerator: A100, workers: 16}]"), MIXED)
    assert str(pool) == "4 x A100 with 8 threads each"


def test_a_kind_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ClusterError) as caught:
        pools(sweep("[{accelerator: L40S}]"), MIXED)
    assert str(caught.value) == (
        "the sweep asks for L40S (sweep.yaml:4), but the cluster has: 4 x A100, 8 x H100, 96 CPU cores; "
        "--wait MINUTES waits for more"
    )


def test_a_device_that_comes_later_is_waited_for(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cluster.POLL_SECONDS", 0.05)
    nodes, said = [], []

    def joins(line: str) -> None:
        said.append(line)
        resources = {"accelerator_type:L40S": 1}
        nodes.append(cluster.add_node(num_cpus=1, num_gpus=2, resources=resources))

    asked = sweep("[{accelerator: l40s, workers: 1}, {accelerator: cpu}]")
    there = connect(cluster.address)
    try:
        assert "L40S" not in there.gpus
        found = wait_for_devices(asked, there, 60, say=joins)
        assert found.gpus["L40S"] == 2
        assert found.cpus == there.cpus + 1
        assert said == [f"waiting up to 1 minutes for l40s; the cluster has: {there}"]
        assert wait_for_devices(asked, found, 60, say=joins) == found, "what is there is not waited for"
        assert len(nodes) == 1
    finally:
        ray.shutdown()
        for node in nodes:
            cluster.remove_node(node)


def test_waiting_ends_with_the_time_or_an_interruption() -> None:
    asked, said = sweep("[{accelerator: L40S}]"), []
    assert wait_for_devices(asked, BARE, 0, say=said.append) == BARE
    assert wait_for_devices(asked, BARE, 600, lambda: True, said.append) == BARE
    assert wait_for_devices(sweep(), BARE, 600, say=said.append) == BARE
    assert said == []


def test_a_worker_gets_its_device_and_none_of_the_changes_that_ray_makes() -> None:
    gpu = actor_options(Pool("H100", 1, 8), "h100-0")
    assert (gpu["num_gpus"], gpu["accelerator_type"]) == (1, "H100")
    assert gpu["runtime_env"]["env_vars"] == {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "8"}
    cpu = actor_options(Pool("cpu", 1, 3), "cpu-0")
    assert cpu["num_cpus"] == 3
    assert cpu["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == "", "nor a GPU it did not ask for"
    assert (gpu["max_restarts"], gpu["max_task_retries"]) == (0, 0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "is the address of a dashboard, which takes jobs; to run from here give HOST:6379"),
        ("somewhere", "'somewhere' is not an address of a Ray cluster"),
        ("127.0.0.1:9", "no Ray cluster at 127.0.0.1:9 (Connection refused)"),
    ],
)
def test_an_address_that_cannot_be_joined(address: str, message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        connect(address)
    assert message in str(caught.value)

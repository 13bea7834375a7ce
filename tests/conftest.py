"""Fixtures that more than one test file uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before Ray is imported: no statistics leave the machine, and no token is written into the home folder.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")

import pytest
import torch
from checkpoints import save
from ray.cluster_utils import Cluster
from sessions import awkward_data
from tiny import TINY, tiny_model

from orchestrator.run import main
from workers.datasets import DatasetSource
from workers.models import describe
from workers.models.adapter import VisionLanguageModel
from workers.session import Session
from workers.tasks import ModelSource


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny models are slower with more threads, and results then depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TINY)
def vlm(request: pytest.FixtureRequest) -> Iterator[VisionLanguageModel]:
    """Each registered tiny model with sharp weights; shared over the session, its answers never end unless told to."""
    shared = tiny_model(request.param)
    ends = shared.model.generation_config.eos_token_id
    yield shared
    shared.model.generation_config.eos_token_id = ends


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One head without a dashboard, shared by all tests; workers of one run are gone when the next begins."""
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    yield head
    head.shutdown()


@pytest.fixture(scope="session")
def small_results(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of a real run of two tiny models; not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(
        "name: small\n"
        "models: [tiny-smolvlm, tiny-qwen3-vl-moe]\n"
        "datasets: [{name: demo, samples: 4, max_new_tokens: 2}]\n"
        "knobs: {longest_edge: [32, 64], moe_top_k: [1, 4], active_blocks: [2, 6]}\n"
        "latency: {samples: 2, repeats: 2, output_tokens: 3}\n"
    )
    assert main([str(folder / "small.yaml"), "--results", str(folder), "--address", cluster.address]) == 0
    return folder / "small"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """The tiny models with sharp weights, as checkpoints in folders."""
    found = {}
    for name in TINY:
        folder = save(tiny_model(name), tmp_path_factory.mktemp("models") / name)
        card = describe(str(folder))
        found[name] = ModelSource(
            name=name,
            family=card.family.name,
            place=str(folder),
            revision=card.fingerprint,
            weights="checkpoint",
            fingerprint=card.fingerprint,
            dtype="float32",
            attention="sdpa",
            experts=None if card.num_experts is None else "grouped_mm",
            engine="eager",
        )
    return found


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs beside the tests is no subject of those that ask for this; see test_conditions."""
    for module in ("latency", "anchor"):
        monkeypatch.setattr(f"workers.{module}.reasons", lambda before, after: [])
    monkeypatch.setattr("workers.latency.slow_first_round", lambda totals: False)


@pytest.fixture
def session() -> Session:
    return Session("worker-1", torch.device("cpu"))


@pytest.fixture(scope="session")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> DatasetSource:
    """Four questions about a good, a truncated, a very narrow and another good image."""
    return awkward_data(tmp_path_factory.mktemp("awkward"))

"""A session turns tasks into rows on real data and real tiny models, and everything that goes wrong into data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from handmade import OF_COMBINATIONS
from sessions import (
    PROJECT,
    SCORED,
    TIMED,
    assert_no_knob_is_switched,
    awkward_data,
    failure,
    model_of,
    rows_of,
    task_for,
    two_images_data,
)
from tiny import TINY, picture

from knobs.errors import KnobError
from knobs.vision import VisionSetting
from orchestrator.analysis import aggregate
from workers.datasets import Dataset, DatasetSource
from workers.errors import DatasetError, DeviceError, ModelError, RowMismatch, SampleError
from workers.models import describe, loading
from workers.probes import Device, accelerator_kind, cpu_name, current_device
from workers.session import Session, _failure_kind
from workers.tasks import FailureKind, Kind, ModelSource, Protocol

METRIC = "vqa_accuracy/loo-always"  # scorer and variant

pytestmark = pytest.mark.usefixtures("quiet_machine")


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_accuracy_rows(session: Session, sources: dict[str, ModelSource], name: str) -> None:
    task = task_for(sources[name], active_blocks=(0, 1, 4))
    rows = rows_of(session, task)
    assert [row["sample_id"] for row in rows] == [ref.uid for ref in task.samples]
    data = Dataset.open(task.dataset)
    question_types = {ref.uid: data.sample(ref.uid).question_type for ref in task.samples}
    assert len(set(question_types.values())) > 1
    for row in rows:
        assert (row["task_id"], row["combination_id"], row["sweep"]) == ("t1", "c1", "by-hand")
        assert (row["status"], row["error"], row["worker"]) == ("done", None, "worker-1")
        assert (row["num_active_blocks"], row["active_blocks"]) == (3, [0, 1, 4])
        assert row["moe_top_k"] == model_of(session).card.moe_top_k
        assert (row["vision_knob"], row["vision_value"]) == ("native", None)
        layout = model_of(session).card.geometry.layout(row["image_height"], row["image_width"], VisionSetting())
        assert layout is not None
        assert row["theoretical_vision_tokens"] == layout.vision_tokens >= row["actual_vision_tokens"] > 0
        assert row["actual_vision_tokens"] == layout.prompt_vision_tokens
        assert row["selected_crops"] == row["actual_num_crops"] > 0
        assert row["prompt_tokens"] > row["actual_vision_tokens"]
        assert row["image_aspect"] == row["image_width"] / row["image_height"]
        assert (row["metric"], row["split"]) == (METRIC, "test")
        assert 0 <= row["score"] <= 1
        assert 1 <= row["output_tokens"] <= 6
        assert row["stop_reason"] == ("length" if row["output_tokens"] == 6 else "eos")
        assert row["question_type"] == question_types[row["sample_id"]]
    assert len({row["prediction"] for row in rows}) >= 4
    assert_no_knob_is_switched(session)


@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_rows_say_what_decides_the_time_on_the_host(
    sources: dict[str, ModelSource], awkward: DatasetSource, kind: Kind
) -> None:
    """In a row that failed too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        session = Session("worker-1", accelerator="cpu")
    finally:
        torch.set_num_threads(threads)
    rows = rows_of(session, task_for(sources["tiny-qwen3-vl-moe"], kind, data=awkward, samples=4))
    assert {row["status"] for row in rows} == {"done", "failed"}
    found = {(row["device_uuid"], row["threads"], row["niceness"]) for row in rows}
    assert found == {(None, threads + 1, os.nice(0))}

    session._rows.found = replace(session.found, uuid="GPU-1", niceness=15)
    for row in rows_of(session, task_for(sources["tiny-smolvlm"], kind, samples=2)):
        assert (row["device_uuid"], row["niceness"]) == ("GPU-1", 15)


def test_the_knobs_of_the_task_reach_the_model(session: Session, sources: dict[str, ModelSource]) -> None:
    def predictions(name: str, **knobs: Any) -> list[str]:
        return [row["prediction"] for row in rows_of(session, task_for(sources[name], **knobs))]

    qwen = "tiny-qwen3-vl-moe"
    settings: list[dict[str, Any]] = [{}, {"moe_top_k": 1}, {"active_blocks": (0, 1)}]
    answers = [predictions(qwen, **knobs) for knobs in settings]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    assert predictions(qwen) == answers[0], "nothing of the other tasks is left"

    task = task_for(sources["tiny-smolvlm"], vision=VisionSetting("longest_edge", 64))
    for row in rows_of(session, task):
        assert (row["vision_knob"], row["vision_value"]) == ("longest_edge", "64")
        assert row["actual_vision_tokens"] == row["theoretical_vision_tokens"] <= 80
        height, width = (int(side) for side in row["target_resolution"].split("x"))
        assert max(height, width) == 64
        assert row["aspect_mismatch"] == abs(width / height - row["image_aspect"])


@pytest.mark.parametrize("name", TINY)
def test_the_batch_size_does_not_change_predictions(
    session: Session, sources: dict[str, ModelSource], name: str
) -> None:
    task = task_for(sources[name], samples=9)
    one, four = (rows_of(session, replace(task, protocol=replace(SCORED, batch_size=size))) for size in (1, 4))
    wanted = ("sample_id", "prediction", "score", "output_tokens", "stop_reason", "prompt_tokens")
    assert [[row[w] for w in wanted] for row in one] == [[row[w] for w in wanted] for row in four]
    assert len({row["prediction"] for row in one}) >= 5


def test_an_answer_that_ends_by_itself(session: Session, sources: dict[str, ModelSource]) -> None:
    task = task_for(sources["tiny-smolvlm"], samples=4)
    free = rows_of(session, task)
    vlm = model_of(session)
    sample = Dataset.open(task.dataset).sample(free[0]["sample_id"])
    inputs = vlm.preprocess([sample.images()[0]], task.dataset.prompt_for(sample.question), VisionSetting())
    second = vlm.answer([(inputs, vlm.encode_images(inputs.vision))], 2)[0][1]
    vlm.model.generation_config.eos_token_id = second
    ended = rows_of(session, task)[0]
    assert ended["stop_reason"] == "eos"
    assert ended["output_tokens"] <= 2


FULL = VisionSetting("tier", "low", force_full_tokens=True)


def test_full_tokens_stand_in_the_prompt(session: Session, sources: dict[str, ModelSource]) -> None:
    source = sources["tiny-molmoe"]
    for kind in (Kind.LATENCY, Kind.ACCURACY):
        for setting in (FULL, replace(FULL, force_full_tokens=False)):
            vision = describe(source.place).geometry.complete(setting)
            for row in rows_of(session, task_for(source, kind, vision=vision, samples=3)):
                assert row["actual_vision_tokens"] == row["predicted_vision_tokens"] > 0
                assert row["tower_passes"] == row["selected_crops"] + 1
                assert row["theoretical_vision_tokens"] == 144 * row["tower_passes"]
                full = row["actual_vision_tokens"] == row["theoretical_vision_tokens"]
                assert full or not setting.force_full_tokens
                assert (row["valid"], row["invalid_reasons"]) == (True, [])
                assert (row["tier"], row["aspect_distance"], row["resize_to_fill"]) == ("low", "linear", True)
                rows, columns = map(int, row["selected_tiling"].split("x"))
                assert rows * columns == row["selected_crops"]
                height, width = map(int, row["target_resolution"].split("x"))
                assert row["target_aspect"] == width / height


def test_tokens_that_are_missing_make_a_row_invalid(
    session: Session, sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that drops the shared tokens although all were promised: measured, shown, and not counted."""
    source = sources["tiny-molmoe"]
    rows_of(session, task_for(source, samples=1))
    vlm = model_of(session)
    processor = vlm.processor

    class Forgetful:
        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, images: Any, question: str, setting: VisionSetting) -> Any:
            assert processor is not None
            return processor(images, question, replace(setting, force_full_tokens=False))

    monkeypatch.setattr(vlm, "processor", Forgetful())
    crops = VisionSetting("crops", 2, force_full_tokens=True)
    for kind in (Kind.LATENCY, Kind.ACCURACY):
        rows = rows_of(session, task_for(source, kind, vision=crops, samples=2))
        assert {(row["status"], row["valid"], *row["invalid_reasons"]) for row in rows} == {
            ("done", False, "token_mismatch")
        }
        assert {(row["actual_vision_tokens"], row["theoretical_vision_tokens"]) for row in rows} == {(384, 432)}
    frame = pd.DataFrame(rows)
    found = aggregate(pd.DataFrame(columns=frame.columns), frame)
    assert "accuracy" not in found
    assert found["num_invalid"] == 2


# -- samples that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol", [SCORED, TIMED, replace(TIMED, warmup=0)], ids=["accuracy", "latency", "no warm-up"]
)
def test_a_bad_sample_is_a_failed_row_and_the_others_go_on(
    session: Session, sources: dict[str, ModelSource], awkward: DatasetSource, protocol: Protocol
) -> None:
    kind = Kind.LATENCY if protocol.metric is None else Kind.ACCURACY
    task = task_for(sources["tiny-qwen3-vl-moe"], kind, data=awkward, samples=4, protocol=protocol)
    rows = rows_of(session, task)
    failed = {row["sample_id"]: row for row in rows if row["status"] == "failed"}
    assert failed.keys() == {"awkward:test:truncated", "awkward:test:narrow"}
    assert failed["awkward:test:narrow"]["error"] == (
        "awkward:test:narrow: absolute aspect ratio must be smaller than 200, got 3000.0"
    )
    assert failed["awkward:test:truncated"]["error"].startswith("awkward:test:truncated: the image cannot be decoded (")
    done = [row["sample_id"] for row in rows if row["status"] == "done"]
    assert sorted(done) == sorted(["awkward:test:good", "awkward:test:fine"] * protocol.repeats)
    for row in failed.values():
        if kind is Kind.LATENCY:
            assert (row["valid"], row["invalid_reasons"], row["total_ms"]) == (False, ["failed"], None)
        else:
            assert (row["score"], row["prediction"], row["metric"]) == (None, None, METRIC)


def test_every_sample_may_fail(session: Session, sources: dict[str, ModelSource], tmp_path: Path) -> None:
    data = awkward_data(tmp_path)
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"not an image")
    for kind in (Kind.LATENCY, Kind.ACCURACY):
        rows = rows_of(session, task_for(sources["tiny-smolvlm"], kind, data=data, samples=4))
        assert [row["status"] for row in rows] == ["failed"] * 4


def test_families_that_squash_take_the_narrow_image(
    session: Session, sources: dict[str, ModelSource], awkward: DatasetSource
) -> None:
    rows = rows_of(session, task_for(sources["tiny-internvl"], data=awkward, samples=4))
    assert [row["sample_id"] for row in rows if row["status"] == "failed"] == ["awkward:test:truncated"]


# -- tasks that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_a_row_that_changed_after_planning(
    session: Session, sources: dict[str, ModelSource], tmp_path: Path, kind: Kind
) -> None:
    task = task_for(sources["tiny-smolvlm"], kind, data=awkward_data(tmp_path), samples=4)
    picture(40, 60, seed=9).save(tmp_path / "good.png")
    found = failure(session, task)
    expected = "awkward:test:good has changed since the sweep was planned; run the sweep again to plan anew"
    assert found == (FailureKind.BAD_DATASET, expected)


def test_a_data_set_that_is_gone(session: Session, sources: dict[str, ModelSource], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    task = task_for(sources["tiny-smolvlm"], data=awkward_data(folder))
    shutil.rmtree(folder)
    kind, reason = failure(session, task)
    assert kind is FailureKind.BAD_DATASET
    assert str(folder) in reason


def test_a_model_that_cannot_be_loaded(session: Session, sources: dict[str, ModelSource]) -> None:
    source = sources["tiny-smolvlm"]
    task = task_for(source)
    kind, reason = failure(session, replace(task, model=replace(source, attention="magic")))
    assert kind is FailureKind.MODEL_LOAD
    assert reason.startswith("tiny-smolvlm cannot be loaded: ")
    assert "magic" in reason
    changed = replace(task, model=replace(source, fingerprint="files:0"))
    assert failure(session, changed) == (
        FailureKind.MODEL_LOAD,
        f"tiny-smolvlm: the files at {source.place} have changed since the sweep was planned",
    )
    assert len(rows_of(session, task)) == 6, "the session goes on"


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"moe_top_k": 2}, "moe_top_k: the model has no router whose top-k can be set"),
        ({"active_blocks": (0, 6)}, "active_blocks [0, 6]: the model has blocks 0 to 5, not 6"),
        ({"active_blocks": ()}, "active_blocks []: at least one block must run"),
        ({"vision": VisionSetting("tiles", 4)}, "tiles=4: this family has no vision knob tiles"),
        (
            {"vision": VisionSetting("longest_edge", 16)},
            "longest_edge=16: longest_edge must be 32 (one tile) to 4096 pixels",
        ),
    ],
)
@pytest.mark.parametrize("kind", OF_COMBINATIONS)
def test_a_knob_that_the_model_cannot_take(
    session: Session, sources: dict[str, ModelSource], knobs: dict[str, Any], reason: str, kind: Kind
) -> None:
    assert failure(session, task_for(sources["tiny-smolvlm"], kind, **knobs)) == (FailureKind.KNOB, reason)
    assert_no_knob_is_switched(session)


def test_something_unexpected(session: Session, sources: dict[str, ModelSource]) -> None:
    """A model that breaks in the middle of an answer, as a fault in our own code would."""
    task = task_for(sources["tiny-qwen3-vl-moe"], moe_top_k=1, active_blocks=(0, 2))
    expected = rows_of(session, task)
    hook = model_of(session).decoder.norm.register_forward_hook(lambda *_: {}["planted"])
    try:
        result = session.run(task)
    finally:
        hook.remove()
    assert (result.failure, result.reason) == (FailureKind.ERROR, "KeyError: 'planted'")
    assert result.traceback is not None
    assert "in prefill" in result.traceback
    assert_no_knob_is_switched(session)
    again = rows_of(session, task)
    assert [row["prediction"] for row in again] == [row["prediction"] for row in expected]


def test_a_value_error_of_the_model_is_not_blamed_on_the_sample(
    session: Session, sources: dict[str, ModelSource]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("planted")

    task = task_for(sources["tiny-smolvlm"], Kind.LATENCY)
    rows_of(session, task)
    hook = model_of(session).decoder.register_forward_hook(broken)
    try:
        assert failure(session, task) == (FailureKind.ERROR, "ValueError: planted")
    finally:
        hook.remove()


def test_out_of_main_memory(session: Session, sources: dict[str, ModelSource]) -> None:
    """A petabyte is more than any allocator gives; the exception is torch's own."""
    task = task_for(sources["tiny-smolvlm"])
    rows_of(session, task)
    hook = model_of(session).decoder.register_forward_hook(lambda *_: torch.empty(1 << 50, dtype=torch.uint8))
    try:
        kind, reason = failure(session, task)
    finally:
        hook.remove()
    assert kind is FailureKind.OUT_OF_MEMORY
    assert reason.startswith("RuntimeError: ")
    assert len(rows_of(session, task)) == 6


def out_of_device_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")


def out_of_any_memory(*_: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("full", "reason"),
    [
        (out_of_device_memory, "tiny-smolvlm does not fit: CUDA out of memory. Tried to allocate 2.00 GiB."),
        (out_of_any_memory, "tiny-smolvlm does not fit: MemoryError"),
    ],
)
def test_out_of_memory_while_loading_is_the_models_fault(
    session: Session,
    sources: dict[str, ModelSource],
    monkeypatch: pytest.MonkeyPatch,
    full: Callable[..., None],
    reason: str,
) -> None:
    """For every task of the model would try again what cannot fit."""
    task = task_for(sources["tiny-smolvlm"])
    with monkeypatch.context() as patched:
        patched.setattr(loading, "_from_checkpoint", full)
        assert failure(session, task) == (FailureKind.MODEL_LOAD, reason)
    assert len(rows_of(session, task)) == 6, "the session goes on"


def test_a_model_larger_than_main_memory(session: Session, sources: dict[str, ModelSource], tmp_path: Path) -> None:
    source = sources["tiny-smolvlm"]
    task = task_for(source)
    config = json.loads((Path(source.place) / "config.json").read_text())
    config["text_config"]["vocab_size"] = 1 << 42
    folder = shutil.copytree(source.place, tmp_path / "large")
    (folder / "config.json").write_text(json.dumps(config))
    card = describe(str(folder), random_weights=True)
    large = replace(source, place=str(folder), weights="random", revision=None, fingerprint=card.fingerprint)
    kind, reason = failure(session, replace(task, model=large))
    assert kind is FailureKind.MODEL_LOAD
    assert reason.startswith("tiny-smolvlm does not fit: ")
    assert "DefaultCPUAllocator" in reason
    assert len(rows_of(session, task)) == 6, "the session goes on"


def no_such_device() -> torch.AcceleratorError:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), FailureKind.OUT_OF_MEMORY),
        (MemoryError, FailureKind.OUT_OF_MEMORY),
        (lambda: pa.ArrowMemoryError("malloc of size 64 failed"), FailureKind.OUT_OF_MEMORY),
        (no_such_device, FailureKind.DEVICE_LOST),
        (lambda: ModelError("x"), FailureKind.MODEL_LOAD),
        (lambda: DatasetError("x"), FailureKind.BAD_DATASET),
        (lambda: RowMismatch("x"), FailureKind.BAD_DATASET),
        (lambda: KnobError("x"), FailureKind.KNOB),
        (lambda: SampleError("x"), FailureKind.BAD_SAMPLE),
        (lambda: ValueError("out of memory"), FailureKind.ERROR),
        (lambda: RuntimeError("CUDA error in a message decides nothing"), FailureKind.ERROR),
    ],
)
def test_the_type_of_an_exception_decides_the_kind(make: Callable[[], Exception], kind: FailureKind) -> None:
    assert _failure_kind(make()) is kind


# -- the device -------------------------------------------------------------------------------------------------------

GPU = Device("A100", "NVIDIA A100-SXM4-80GB", "GPU-1", 1 << 36, "node", 1, 4, 0)


def see_a_gpu(monkeypatch: pytest.MonkeyPatch, found: Device = GPU) -> None:
    """As on a machine with one; the CPU is still described as it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "workers.session.current_device", lambda device: found if device.type == "cuda" else current_device(device)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_for_a_gpu_that_sees_none_takes_no_task() -> None:
    """Its times would be filed under H100."""
    with pytest.raises(DeviceError) as caught:
        Session("worker-1", accelerator="H100")
    assert str(caught.value) == (
        f"this worker was started for H100 but torch sees no GPU (torch {torch.__version__}, "
        f"CUDA {torch.version.cuda or 'none'})"
    )


def test_a_worker_on_another_kind_of_gpu_takes_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    see_a_gpu(monkeypatch)
    with pytest.raises(DeviceError, match=r"^this worker was started for H100 but found A100$"):
        Session("worker-1", accelerator="H100")
    with pytest.raises(DeviceError, match=r"^this worker was started for A100 but was given the CPU$"):
        Session("worker-1", torch.device("cpu"), accelerator="A100")


@pytest.mark.parametrize("accelerator", ["A100", "a100", None])
def test_a_worker_on_the_kind_of_gpu_it_was_started_for(
    monkeypatch: pytest.MonkeyPatch, accelerator: str | None
) -> None:
    see_a_gpu(monkeypatch)
    session = Session("worker-1", accelerator=accelerator)
    assert (session.device, session.found) == (torch.device("cuda", 0), GPU)


@pytest.mark.parametrize("device", [None, torch.device("cuda", 0)])
@pytest.mark.parametrize("accelerator", ["cpu", "CPU"])
def test_a_worker_for_the_cpu_leaves_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, sources: dict[str, ModelSource], device: torch.device | None, accelerator: str
) -> None:
    see_a_gpu(monkeypatch)
    session = Session("worker-1", device, accelerator)
    assert session.device == torch.device("cpu")
    assert (session.found.accelerator, session.found.name, session.found.uuid) == ("cpu", cpu_name(), None)
    monkeypatch.undo()
    rows = rows_of(session, task_for(sources["tiny-smolvlm"], samples=2))
    assert {(row["device_name"], row["device_uuid"]) for row in rows} == {(cpu_name(), None)}
    assert model_of(session).device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_actor_passes_its_kind_on() -> None:
    """In a process of its own, for an actor quietens libraries for good."""
    code = (
        "from workers.actor import Worker\n"
        "from workers.errors import DeviceError\n"
        "for accelerator in ((), ('cpu',), ('H100',)):\n"
        "    try:\n"
        "        print(Worker('w', *accelerator).ready()['accelerator'])\n"
        "    except DeviceError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu\ncpu\nthis worker was started for H100 but torch sees no GPU (")


KINDS = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100",
    "NVIDIA H100 NVL": "H100",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA H20": "H20",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A10G": "A10G",
    "NVIDIA A40": "A40",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "Tesla V100-SXM2-16GB": "V100",
    "Tesla T4": "T4",
    "Tesla P100-PCIE-16GB": "P100",
    "NVIDIA RTX A6000": "RTX-A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX-6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000",
    "Quadro RTX 6000": "RTX-6000",
    "Quadro P5000": "P5000",
    "NVIDIA GeForce RTX 4090": "GeForce-RTX-4090",
    "NVIDIA GeForce GTX 1080 Ti": "GeForce-GTX-1080-Ti",
    "GeForce GTX TITAN X": "GeForce-GTX-TITAN-X",
    "NVIDIA TITAN RTX": "TITAN-RTX",
    "NVIDIA TITAN V": "TITAN-V",
    "NVIDIA Graphics Device": "Graphics-Device",
    "Orin": "Orin",
    "NVIDIA 7 Series": "7-Series",  # one character is too short for a kind
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_spelled_as_ray_spells_them(name: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    rays = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name)
    assert accelerator_kind(name) == rays == KINDS[name]


# -- what is kept warm ------------------------------------------------------------------------------------------------


def test_a_model_is_kept_for_the_next_task_and_let_go_for_another(
    session: Session, sources: dict[str, ModelSource]
) -> None:
    first, second = sources["tiny-smolvlm"], sources["tiny-internvl"]
    rows_of(session, task_for(first))
    kept = model_of(session)
    rows_of(session, task_for(first, Kind.LATENCY, samples=2, active_blocks=(0,)))
    assert model_of(session) is kept
    weights = weakref.ref(kept.model)
    del kept
    rows_of(session, task_for(second))
    assert model_of(session).card.name == "tiny-internvl"
    assert weights() is None, "the weights of the first model still take memory"
    rows_of(session, task_for(first))
    assert model_of(session).card.name == "tiny-smolvlm"


def test_another_dtype_is_another_model(session: Session, sources: dict[str, ModelSource]) -> None:
    source = sources["tiny-internvl"]
    rows_of(session, task_for(source))
    rows = rows_of(session, task_for(replace(source, dtype="bfloat16")))
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert model_of(session).model.dtype is torch.bfloat16


def test_the_result_says_who_ran_it_and_when(session: Session, sources: dict[str, ModelSource]) -> None:
    task = task_for(sources["tiny-smolvlm"])
    for result in (session.run(task), session.run(replace(task, knobs=replace(task.knobs, moe_top_k=2)))):
        assert result.task_id == "t1"
        assert result.worker == {
            "worker": "worker-1",
            "host": session.found.host,
            "device_name": session.found.name,
        }
        assert 0 < result.started_at <= result.finished_at


@pytest.mark.parametrize("kind", OF_COMBINATIONS)
@pytest.mark.parametrize("name", TINY)
def test_a_question_about_several_images(
    session: Session, sources: dict[str, ModelSource], tmp_path: Path, name: str, kind: Kind
) -> None:
    """Crops and tokens are sums over the images, and batches may hold prompts with one and with two."""
    data = two_images_data(tmp_path)
    protocol = replace(TIMED, batch_size=2) if kind is Kind.LATENCY else None
    rows = rows_of(session, task_for(sources[name], kind, data=data, samples=2, protocol=protocol))
    found = {row["sample_id"].split(":")[-1]: row for row in rows}
    both, one = found["both"], found["one"]
    assert (both["num_images"], one["num_images"]) == (2, 1)
    assert both["status"] == one["status"] == "done"
    for row in (both, one):
        assert row["actual_vision_tokens"] == row["predicted_vision_tokens"] > 0
        assert (row["selected_tiling"] is None) == (row is both)
        assert (row["image_height"], row["image_width"]) == (80, 40)
    for column in ("selected_crops", "tower_passes", "predicted_vision_tokens", "special_tokens"):
        assert both[column] > one[column], column
    assert both["valid"]
    if kind is Kind.ACCURACY:
        alone = [
            row
            for ref in task_for(sources[name], kind, data=data, samples=2).samples
            for row in rows_of(session, replace(task_for(sources[name], kind, data=data, samples=2), samples=(ref,)))
        ]
        assert {row["sample_id"]: row["prediction"] for row in alone} == {r["sample_id"]: r["prediction"] for r in rows}

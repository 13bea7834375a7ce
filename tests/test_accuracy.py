"""Batched, cached and shared answers are those of one sample at a time; work is done once, ahead, and within bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL
from knob_contract import NEW_TOKENS, prompts
from sessions import SCORED, TIMED, awkward_data, demo, failure, model_of, rows_of, task_for, without_times
from tiny import TINY, encoded, picture

import workers.prepared
from knobs.vision import VisionSetting
from workers.accuracy import BATCHES_PER_WINDOW, _Ready, by_length
from workers.datasets import Dataset, DatasetSource, Sample, SampleRef
from workers.errors import SampleError
from workers.models import describe
from workers.models.adapter import VisionLanguageModel, features_bytes
from workers.models.engines import EagerEngine
from workers.models.processing import Inputs
from workers.models.requirements import stack_of_blocks
from workers.prepared import (
    MOST_AHEAD,
    Ahead,
    PreparedSample,
    PreparedSamples,
    background_threads,
    prepared_samples,
    preparing_ahead,
)
from workers.session import Session
from workers.tasks import FailureKind, Kind, ModelSource, Protocol, Task

pytestmark = pytest.mark.usefixtures("quiet_machine")

WANTED = ("sample_id", "prediction", "score", "output_tokens", "stop_reason", "prompt_tokens")
LONG = Protocol(max_new_tokens=12, batch_size=8, metric="vqa_accuracy")


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with four cores."""
    monkeypatch.setattr(workers.prepared, "background_threads", lambda vlm: 3)


def preparing() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prepare")]


def new_session() -> Session:
    return Session("worker-1", torch.device("cpu"))


def ending(session: Session, task: Task, share: int = 6) -> None:
    """Make one token in `share` end an answer, so that answers end at different steps."""
    rows_of(session, replace(task, samples=task.samples[:1]))
    vlm = model_of(session)
    vlm.model.generation_config.eos_token_id = list(range(0, vlm.model.config.get_text_config().vocab_size, share))


# -- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_answers_that_end_at_different_steps_are_those_of_each_sample_alone(
    sources: dict[str, ModelSource], in_threads: None, name: str
) -> None:
    """Batched, in buckets, with rows that leave, features shared and kept, prepared in threads: token for token."""
    task = task_for(sources[name], samples=20, protocol=LONG)
    alone, together = new_session(), new_session()
    ending(alone, task)
    ending(together, task)
    expected = []
    for ref in task.samples:
        alone._prepared.clear()
        expected += rows_of(alone, replace(task, samples=(ref,), protocol=replace(LONG, batch_size=1)))
    lengths = {row["output_tokens"] for row in expected}
    assert len(lengths) >= 4
    assert {row["stop_reason"] for row in expected} == {"eos", "length"} or max(lengths) < 12
    for _ in range(2):
        found = rows_of(together, task)
        assert [[row[w] for w in WANTED] for row in found] == [[row[w] for w in WANTED] for row in expected]


@pytest.mark.parametrize("knobs", [{"active_blocks": (0, 2, 5)}, {"moe_top_k": 1}], ids=["blocks", "experts"])
def test_rows_leave_under_every_knob(sources: dict[str, ModelSource], knobs: dict[str, Any]) -> None:
    task = task_for(sources["tiny-molmoe"], samples=16, protocol=LONG, **knobs)
    one, eight = new_session(), new_session()
    ending(one, task)
    ending(eight, task)
    expected = rows_of(one, replace(task, protocol=replace(LONG, batch_size=1)))
    before = eight.counts
    assert [[row[w] for w in WANTED] for row in rows_of(eight, task)] == [[row[w] for w in WANTED] for row in expected]
    spent = eight.counts - before
    longest = max(row["output_tokens"] for row in expected)
    assert spent["decoded_rows"] < 8 * spent["decode_steps"], "rows have left"
    assert spent["decode_steps"] <= 2 * (longest - 1)
    assert spent["decoded_rows"] >= sum(row["output_tokens"] - 1 for row in expected)


def test_rows_leave_when_they_are_a_quarter_of_the_batch(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [encoded(vlm, [picture(40, 60, seed)], f"What is it? {'?' * seed}") for seed in range(8)]
    free = vlm.answer(batch, 6)
    # End the first answer at its second token, and whatever else has that token, wherever it has it.
    vlm.model.generation_config.eos_token_id = [free[0][1], free[3][2], free[5][1]]
    ends = vlm.end_token_ids
    expected = [next((row[: i + 1] for i, token in enumerate(row) if token in ends), row) for row in free]
    widths: list[int] = []
    step = VisionLanguageModel.decode_step

    def watched(self: VisionLanguageModel, token: torch.Tensor, state: Any) -> torch.Tensor:
        widths.append(len(token))
        return step(self, token, state)

    monkeypatch.setattr(VisionLanguageModel, "decode_step", watched)
    assert vlm.answer(batch, 6) == expected
    rows, left = 8, []
    for tokens in range(1, max(map(len, expected))):
        going_on = sum(len(row) > tokens for row in expected)
        rows = going_on if rows - going_on >= rows / 4 else rows
        left.append(rows)
    assert widths == left
    assert widths[-1] < 8


@pytest.mark.parametrize("name", ALL)
def test_rows_that_stay_go_on_as_they_would_have(name: str) -> None:
    """Every kind of decoder: what cannot do without rows says so and goes on with all."""
    model = ALL[name].build()
    decoder = stack_of_blocks(model)

    @torch.inference_mode()
    def decoded(keep: list[int] | None) -> tuple[list[list[int]], bool]:
        ids, mask = prompts()
        state = EagerEngine(model).new_state(len(ids), ids.shape[1] + NEW_TOKENS)
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": state.cache}
        positions = model._prepare_position_ids_for_generation(ids, dict(given))
        output = model(**given, position_ids=positions, use_cache=True, return_dict=True)
        state.begin(mask, positions[..., -1:])
        token, left = output.logits[:, -1].argmax(-1, keepdim=True), False
        tokens = []
        for step in range(NEW_TOKENS):
            token = state.step(token)
            if step == 1 and keep is not None:
                left = state.keep(keep)
                token = token[keep] if left else token
            tokens.append(token)
        return [[int(row) for row in token[:, 0]] for token in tokens], left

    assert decoder is not None
    expected, _ = decoded(None)
    for kept in ([1], [0]):
        found, left = decoded(kept)
        if left:
            expected_now = expected[:1] + [[row[i] for i in kept] for row in expected[1:]]
            assert found == expected_now
        else:
            assert found == expected


def test_most_kinds_of_decoder_let_rows_leave() -> None:
    kinds = {"olmoe", "qwen3_moe", "mixtral", "llama"} & ALL.keys()
    assert kinds
    for name in kinds:
        model = ALL[name].build()
        ids, mask = prompts()
        with torch.inference_mode():
            state = EagerEngine(model).new_state(2, 99)
            model(input_ids=ids, attention_mask=mask, past_key_values=state.cache, use_cache=True)
            state.begin(mask, (mask.cumsum(-1) - 1)[:, -1:])
            assert state.keep([1])


# -- buckets ----------------------------------------------------------------------------------------------------------


def ready(lengths: list[int]) -> list[_Ready]:
    made = []
    for place, length in enumerate(lengths):
        ids = torch.zeros((1, length), dtype=torch.long)
        sample = Sample(SampleRef(f"s{place}", ""), "?", ("a",), "i", b"", None)
        inputs = Inputs({"input_ids": ids, "attention_mask": ids + 1}, {}, None, 0)
        made.append(_Ready(place, PreparedSample(sample, [(1, 1)], inputs, {}), begun=None))  # type: ignore[arg-type]
    return made


def test_batches_are_alike_in_length_and_follow_from_the_samples() -> None:
    batches = [[one.place for one in batch] for batch in by_length(ready([5, 9, 5, 7, 9, 1, 5]), 3)]
    assert batches == [[1, 4, 3], [0, 2, 6], [5]]


def test_padding_is_less_than_in_the_order_of_the_samples(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_for(sources["tiny-smolvlm"], samples=40)
    padded: list[int] = []
    prefill = VisionLanguageModel.prefill

    def watched(self: VisionLanguageModel, prompt: Any, *arguments: Any) -> Any:
        padded.append(prompt["input_ids"].numel())
        return prefill(self, prompt, *arguments)

    monkeypatch.setattr(VisionLanguageModel, "prefill", watched)
    rows = rows_of(new_session(), task)
    size = SCORED.batch_size
    assert [row["sample_id"] for row in rows] == [ref.uid for ref in task.samples]
    lengths = [row["prompt_tokens"] for row in rows]
    in_order = sum(max(lengths[i : i + size]) * len(lengths[i : i + size]) for i in range(0, len(lengths), size))
    windows = [lengths[i : i + BATCHES_PER_WINDOW * size] for i in range(0, len(lengths), BATCHES_PER_WINDOW * size)]
    expected = sum(
        sorted(window)[::-1][i] * len(window[i : i + size]) for window in windows for i in range(0, len(window), size)
    )
    assert len(padded) == 10
    assert sum(padded) == expected < in_order


# -- ahead ------------------------------------------------------------------------------------------------------------


def refs(count: int) -> list[SampleRef]:
    return [SampleRef(str(i), "") for i in range(count)]


def test_results_and_errors_come_in_order_whichever_is_ready_first() -> None:
    def make(ref: SampleRef) -> int:
        number = int(ref.uid)
        time.sleep(0.02 * (number % 3 == 0))
        if number % 4 == 1:
            raise SampleError(f"no {number}")
        return number

    def outcome(result: Callable[[], int]) -> int | str:
        try:
            return result()
        except SampleError as error:
            return str(error)

    for threads in (0, 1, 3):
        with preparing_ahead(threads) as ahead:
            found = [outcome(result) for result in ahead.map(make, refs(12), lambda _: 1)]
        assert found == [f"no {i}" if i % 4 == 1 else i for i in range(12)]
        assert preparing() == []


def test_the_look_ahead_is_bounded_in_samples_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(ref: SampleRef) -> int:
        made.append(int(ref.uid))
        return 10

    def after(taken: int) -> int:
        """How many were made when so many were taken, and nothing more happens."""
        made.clear()
        with preparing_ahead(2) as ahead:
            results = ahead.map(make, refs(200), lambda size: size)
            for _ in range(taken):
                next(results)()
            time.sleep(0.2)
            return len(made)

    assert after(1) <= MOST_AHEAD
    assert MOST_AHEAD <= after(10) <= MOST_AHEAD + 10
    monkeypatch.setattr(workers.prepared, "MOST_BYTES_AHEAD", 40)
    # Those that were running when the bound was looked at come on top, and the one that is taken.
    assert after(10) <= 10 + MOST_AHEAD


def test_nothing_is_left_when_whoever_takes_them_gives_up() -> None:
    begun: list[str] = []

    def make(ref: SampleRef) -> int:
        begun.append(ref.uid)
        time.sleep(0.05)
        return 1

    def give_up() -> None:
        with preparing_ahead(2) as ahead:
            next(ahead.map(make, refs(100), lambda _: 1))()
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        give_up()
    assert preparing() == []
    assert len(begun) < 10


def test_torch_computes_with_as_many_threads_as_before() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with preparing_ahead(2) as ahead:
            inside = [result() for result in ahead.map(lambda _: torch.get_num_threads(), refs(4), lambda _: 1)]
        assert inside == [1] * 4
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("device", "family", "cores", "expected"),
    [("cpu", "molmoe", 8, 0), ("cuda", "molmoe", 8, 7), ("cuda", "molmoe", 1, 1), ("cuda", "generic", 8, 1)],
)
def test_threads_are_those_that_the_device_leaves(
    monkeypatch: pytest.MonkeyPatch, device: str, family: str, cores: int, expected: int
) -> None:
    class Model:
        pass

    vlm: Any = Model()
    vlm.device = torch.device(device)
    vlm.card, vlm.card.family, vlm.card.family.name = Model(), Model(), family  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert background_threads(vlm) == expected


@pytest.mark.parametrize("name", TINY)
def test_many_threads_prepare_what_one_prepares(sources: dict[str, ModelSource], name: str) -> None:
    session = new_session()
    task = task_for(sources[name], samples=40)
    rows_of(session, replace(task, samples=task.samples[:1]))
    vlm, dataset = model_of(session), Dataset.open(task.dataset)

    def ids(ref: SampleRef) -> list[int]:
        sample = dataset.sample(ref.uid)
        inputs = vlm.preprocess([sample.images()[0]], sample.prompt, VisionSetting())
        return [*inputs.prompt["input_ids"][0].tolist(), float(sum(t.double().sum() for t in inputs.vision.values()))]

    def all_of(threads: int) -> list[list[int]]:
        with preparing_ahead(threads) as ahead:
            return [result() for result in ahead.map(ids, list(task.samples), lambda _: 1)]

    assert all_of(8) == all_of(0)


def test_a_bad_sample_is_that_samples_row_and_others_go_on(
    sources: dict[str, ModelSource], awkward: DatasetSource, in_threads: None
) -> None:
    rows = rows_of(new_session(), task_for(sources["tiny-qwen3-vl-moe"], data=awkward, samples=4))
    by_name = {row["sample_id"].split(":")[-1]: row for row in rows}
    assert {name: row["status"] for name, row in by_name.items()} == {
        "good": "done",
        "truncated": "failed",
        "narrow": "failed",
        "fine": "done",
    }
    assert by_name["truncated"]["error"].startswith("awkward:test:truncated: the image cannot be decoded (")
    assert preparing() == []


def test_a_task_that_fails_leaves_no_thread(sources: dict[str, ModelSource], in_threads: None, tmp_path: Path) -> None:
    session = new_session()
    task = task_for(sources["tiny-smolvlm"], data=awkward_data(tmp_path), samples=4)
    picture(40, 60, seed=9).save(tmp_path / "good.png")
    assert failure(session, task)[0] is FailureKind.BAD_DATASET
    assert preparing() == []
    assert failure(session, task_for(sources["tiny-smolvlm"], vision=VisionSetting("tiles", 4)))[0] is FailureKind.KNOB
    assert preparing() == []


@pytest.mark.parametrize("kind", [Kind.LATENCY, Kind.ACCURACY])
def test_no_thread_prepares_beside_a_timed_answer(
    sources: dict[str, ModelSource], in_threads: None, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Seen from inside the vision tower: threads are there in an accuracy task, and never in a latency task."""
    seen: list[int] = []
    encode = VisionLanguageModel.encode_images

    def watched(self: VisionLanguageModel, *arguments: Any, **options: Any) -> Any:
        seen.append(len(preparing()))
        return encode(self, *arguments, **options)

    session = new_session()
    rows_of(session, task_for(sources["tiny-smolvlm"], vision=VisionSetting("longest_edge", 64)))
    assert preparing() == []
    monkeypatch.setattr(VisionLanguageModel, "encode_images", watched)
    rows_of(session, task_for(sources["tiny-smolvlm"], kind))
    assert seen
    assert all(seen) if kind is Kind.ACCURACY else not any(seen)
    assert preparing() == []


# -- once -------------------------------------------------------------------------------------------------------------


def test_every_image_passes_the_tower_once_per_setting_and_every_sample_is_preprocessed_once(
    sources: dict[str, ModelSource],
) -> None:
    session = new_session()
    settings = [VisionSetting("longest_edge", edge) for edge in (32, 64)]
    points = [{"active_blocks": kept} for kept in ((0, 1, 2, 3, 4, 5), (0, 2, 4))]
    for vision in settings:
        for point in points:
            task = task_for(sources["tiny-smolvlm"], samples=30, vision=vision, **point)
            rows = rows_of(session, task)
    images = len({row["image_id"] for row in rows})
    assert images < 30
    counts = session.counts
    assert counts["vision_passes"] == len(settings) * images
    assert counts["preprocessings"] == len(settings) * 30
    assert counts["prompts"] == len(settings) * len(points) * 30
    assert counts["prefills"] == len(settings) * len(points) * 8
    assert counts["decode_steps"] == counts["prefills"] * (SCORED.max_new_tokens - 1)
    rows_of(session, task_for(sources["tiny-internvl"], samples=1))
    assert session.counts["prompts"] == counts["prompts"] + 1, "another model counts on"


def test_two_data_sets_in_turns_are_both_kept(sources: dict[str, ModelSource], awkward: DatasetSource) -> None:
    session = new_session()
    tasks = [
        task_for(sources["tiny-smolvlm"], active_blocks=kept, data=data, samples=3)
        for kept in ((0, 1), (0, 1, 2))
        for data in (demo(), awkward)
    ]
    for task in tasks[:2]:
        rows_of(session, task)
    passes = session.counts["vision_passes"]
    for task in tasks[2:]:
        rows_of(session, task)
    assert session.counts["vision_passes"] == passes


def test_another_prompt_is_another_sample_about_the_same_image(sources: dict[str, ModelSource]) -> None:
    session = new_session()
    task = task_for(sources["tiny-smolvlm"])
    other = replace(task.dataset, prompt=f"{task.dataset.prompt}!!")
    rows = rows_of(session, task)
    passes = session.counts["vision_passes"]
    asked = rows_of(session, replace(task, dataset=other))
    assert session.counts["vision_passes"] == passes
    assert [row["prompt_tokens"] for row in asked] == [row["prompt_tokens"] + 2 for row in rows]


# -- bounds -----------------------------------------------------------------------------------------------------------


def sample_of(number: int, image: int | None = None, size: int = 100) -> PreparedSample:
    """A sample of 16 bytes of inputs, an image file of 4 and `size` bytes of features."""
    ids = torch.zeros((1, 1), dtype=torch.long)
    content = f"{number if image is None else image:04d}".encode()
    sample = Sample(SampleRef(f"s{number}", ""), "?", ("a",), "i", content, None)
    inputs = Inputs({"input_ids": ids, "attention_mask": ids}, {}, None, 0)
    return PreparedSample(sample, [(1, 1)], inputs, {"pooler_output": torch.full((size,), number, dtype=torch.uint8)})


# Stands for a GPU: tensors stay in host memory, only the accounts are the device's.
DEVICE = torch.device("meta")


@contextmanager
def accounts_hold(kept: PreparedSamples) -> Iterator[None]:
    yield
    features = list(kept._features.values())
    samples = [sample for group in kept._kept.values() for sample in group.values()]
    assert kept.num_device_bytes == sum(f.num_bytes for f in features if f.on_device) <= max(kept.max_device_bytes, 0)
    host = sum(f.num_bytes for f in features if not f.on_device) + sum(s.num_bytes for s in samples)
    assert kept.num_bytes == host <= kept.max_bytes
    assert all(f.num_bytes == features_bytes(f.features) for f in features)
    assert sum(f.users for f in features) == len(samples) == len(kept._image_of)


def test_the_device_is_filled_first_and_then_host_memory() -> None:
    kept = PreparedSamples(max_bytes=400, max_device_bytes=350)
    kept.enter("setting", "group", DEVICE)
    for number in range(100):
        with accounts_hold(kept):
            kept.keep(sample_of(number))
    there = [f.on_device for f in kept._features.values()]
    assert there == [True] * 3 + [False] * 2
    assert [kept.has(SampleRef(f"s{n}", "")) for n in range(7)] == [True] * 5 + [False] * 2
    host = torch.device("cpu")
    assert int(kept.find(SampleRef("s4", ""), host).features["pooler_output"][0]) == 4


def test_on_a_cpu_there_is_one_bound() -> None:
    kept = PreparedSamples(max_bytes=400, max_device_bytes=350)
    kept.enter("setting", "group", torch.device("cpu"))
    for number in range(100):
        with accounts_hold(kept):
            kept.keep(sample_of(number))
    assert (len(kept._features), kept.num_device_bytes) == (3, 0)


def test_features_of_one_image_count_once_and_live_as_long_as_a_question_about_it() -> None:
    kept = PreparedSamples(max_bytes=10_000)
    kept.enter("setting", "a", torch.device("cpu"))
    for number in range(5):
        with accounts_hold(kept):
            kept.keep(sample_of(number, image=0))
            kept.keep(sample_of(number, image=0))
    assert kept.num_bytes == 100 + 5 * 20
    kept.enter("setting", "b", torch.device("cpu"))
    kept.keep(sample_of(9, image=0))
    with accounts_hold(kept):
        kept._drop("a")
    assert kept.features_of(sample_of(7, image=0).sample, torch.device("cpu")) is not None
    with accounts_hold(kept):
        kept._drop("b")
    assert kept.features_of(sample_of(7, image=0).sample, torch.device("cpu")) is None


@pytest.mark.parametrize("by_part", [False, True], ids=["combination by combination", "part by part"])
def test_in_either_order_of_tasks_as_much_is_found_as_fits(by_part: bool) -> None:
    """Three parts of five samples under four combinations, and room for one and a half parts."""
    order = [part for part in range(3) for _ in range(4)] if by_part else [0, 1, 2] * 4
    kept = PreparedSamples(max_bytes=8 * 120)
    made = 0
    for part in order:
        kept.enter("setting", part, torch.device("cpu"))
        for number in range(5 * part, 5 * part + 5):
            if not kept.has(SampleRef(f"s{number}", "")):
                made += 1
                with accounts_hold(kept):
                    kept.keep(sample_of(number))
    assert made == (15 if by_part else 15 + 3 * 7)


def test_another_setting_takes_everything_with_it() -> None:
    kept = PreparedSamples(max_bytes=1000, max_device_bytes=1000)
    kept.enter("setting", "group", DEVICE)
    kept.keep(sample_of(0))
    kept.enter("other", "group", DEVICE)
    assert not kept.has(SampleRef("s0", ""))
    assert (kept.num_bytes, kept.num_device_bytes) == (0, 0)


def test_before_a_timed_answer_the_device_is_given_up() -> None:
    kept = PreparedSamples(max_bytes=20 * 5 + 200, max_device_bytes=500)
    kept.enter("setting", "group", DEVICE)
    for number in range(5):
        kept.keep(sample_of(number))
    assert kept.num_device_bytes == 500
    with accounts_hold(kept):
        assert kept.leave_device()
    # As much as host memory takes; the rest is made again.
    assert (len(kept._features), kept.num_device_bytes) == (2, 0)
    assert not kept.leave_device()


def test_a_latency_task_finds_nothing_kept_on_the_device(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    left: list[str] = []
    monkeypatch.setattr(session._prepared, "leave_device", lambda: left.append("left"))
    rows_of(session, task_for(sources["tiny-smolvlm"]))
    assert left == []
    rows_of(session, task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=1))
    assert left == ["left"]


def test_what_is_kept_goes_before_a_task_fails_for_lack_of_memory(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    task = task_for(sources["tiny-smolvlm"])
    expected = without_times(rows_of(session, task))
    left: list[str] = []

    def leave() -> bool:
        left.append("left")
        return len(left) == 1

    monkeypatch.setattr(session._prepared, "leave_device", leave)
    answer = VisionLanguageModel.answer

    def full(self: VisionLanguageModel, *arguments: Any) -> Any:
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, *arguments)

    monkeypatch.setattr(VisionLanguageModel, "answer", full)
    assert without_times(rows_of(session, task)) == expected

    def always_full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionLanguageModel, "answer", always_full)
    assert failure(session, task)[0] is FailureKind.OUT_OF_MEMORY
    assert session._prepared.num_bytes == 0, "nothing is missing for the next task"


def test_what_is_kept_stays_within_its_bound_and_the_rest_is_made_again(sources: dict[str, ModelSource]) -> None:
    session = new_session()
    task = task_for(sources["tiny-smolvlm"], samples=24)
    expected = without_times(rows_of(session, task))
    images = len({row["image_id"] for row in expected})
    everything = session._prepared.num_bytes
    assert everything > 0
    session._prepared = PreparedSamples(max_bytes=everything // 10)
    before = session.counts
    for _ in range(2):
        assert without_times(rows_of(session, task)) == expected
        assert 0 < session._prepared.num_bytes <= everything // 10
    passes = (session.counts - before)["vision_passes"]
    assert images < passes < 2 * 24, "some are found again although ten times as many passed by"


def test_a_timed_answer_never_uses_what_is_kept(sources: dict[str, ModelSource]) -> None:
    session = new_session()
    rows_of(session, task_for(sources["tiny-smolvlm"]))
    before = session.counts
    rows_of(session, task_for(sources["tiny-smolvlm"], Kind.LATENCY, samples=2))
    counted = 2  # samples on which operations are counted, once
    assert (session.counts - before)["vision_passes"] == 2 * (TIMED.repeats + TIMED.warmup) + counted


@pytest.mark.parametrize("name", TINY)
def test_an_image_is_encoded_once_for_all_depths_and_widths_and_nothing_changes(
    sources: dict[str, ModelSource], name: str
) -> None:
    card = describe(sources[name].place)
    points: list[dict[str, Any]] = [{"active_blocks": kept} for kept in ((0, 1, 2, 3, 4, 5), (0, 2, 4), (1, 5))]
    if card.num_experts is not None:
        points += [{"moe_top_k": 1}, {"moe_top_k": 2}]
    tasks = [task_for(sources[name], **point) for point in points]
    alone = [without_times(rows_of(new_session(), task)) for task in tasks]
    session = new_session()
    assert [without_times(rows_of(session, task)) for task in tasks] == alone
    assert session.counts["vision_passes"] == len({row["image_id"] for row in alone[0]}), "however many combinations"


@pytest.mark.parametrize("name", TINY)
def test_questions_about_one_image_share_its_features_and_answers_stay_the_same(
    sources: dict[str, ModelSource], name: str
) -> None:
    task = task_for(sources[name], samples=40)
    session = new_session()
    together = rows_of(session, task)
    images = {row["image_id"] for row in together}
    assert session.counts["vision_passes"] == len(images) < 40
    alone = [row for ref in task.samples[:6] for row in rows_of(new_session(), replace(task, samples=(ref,)))]
    assert without_times(together)[:6] == without_times(alone)


def test_another_vision_setting_or_model_is_encoded_anew(sources: dict[str, ModelSource]) -> None:
    session = new_session()
    for edge in (32, 64):
        rows = rows_of(session, task_for(sources["tiny-smolvlm"], vision=VisionSetting("longest_edge", edge)))
    images = len({row["image_id"] for row in rows})
    assert session.counts["vision_passes"] == 2 * images
    rows_of(session, task_for(sources["tiny-internvl"]))
    assert session.counts["vision_passes"] == 3 * images


def test_samples_that_are_prepared_come_in_order_and_without_pixels(sources: dict[str, ModelSource]) -> None:
    session = new_session()
    task = task_for(sources["tiny-molmoe"])
    rows_of(session, task)
    vlm, dataset = model_of(session), Dataset.open(task.dataset)
    kept = PreparedSamples()
    for _ in range(2):
        with prepared_samples(task, vlm, dataset, kept) as samples:
            found = list(samples)
        assert all(isinstance(one, PreparedSample) for one in found)
        assert [one.sample.ref for one in found if isinstance(one, PreparedSample)] == list(task.samples)
        assert not any(
            name.startswith("pixel") for one in found if isinstance(one, PreparedSample) for name in one.inputs.vision
        )


def test_ahead_without_threads_is_lazy() -> None:
    made: list[str] = []
    results = Ahead(None).map(lambda ref: made.append(ref.uid), refs(3), lambda _: 1)
    next(results)()
    assert made == ["0"]

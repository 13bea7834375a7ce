"""Samples ready for the language model, made once per vision setting and used by every top-k and block setting."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil
import torch
from PIL import Image

from workers.datasets import Dataset, Sample, SampleRef
from workers.errors import RowMismatch, SampleError
from workers.models.adapter import Features, VisionLanguageModel, features_bytes, features_to
from workers.models.processing import Inputs
from workers.rows import Size
from workers.tasks import Task

# Of the host's memory, which other workers on it and their models share.
SHARE_OF_MEMORY = 0.1
MOST_BYTES = 4 * 2**30
# Of what is free on the device once the model is there; the rest is for activations, keys and values.
SHARE_OF_DEVICE = 0.25

# Preprocessing runs ahead by at most so many samples, and by none as long as so many bytes wait to be taken.
MOST_AHEAD = 32
MOST_BYTES_AHEAD = 2**30
# Beyond that, preparing outruns any device.
MOST_THREADS = 8

HOST = torch.device("cpu")

T = TypeVar("T")


# -- one sample -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedSample:
    """A sample whose images, of these sizes, have been decoded, cut and encoded; pixels dropped."""

    sample: Sample
    sizes: list[Size]
    inputs: Inputs
    features: Features

    @property
    def num_bytes(self) -> int:
        """Bytes beside the features, which other questions about the image may share."""
        return _inputs_bytes(self.inputs) + _files_bytes(self.sample)


@dataclass(frozen=True)
class _Preprocessed:
    """A sample before its image is encoded: all in host memory, nothing asked of the device."""

    sample: Sample
    sizes: list[Size]
    inputs: Inputs

    @property
    def num_bytes(self) -> int:
        return _inputs_bytes(self.inputs) + _files_bytes(self.sample)


def checked(dataset: Dataset, ref: SampleRef) -> Sample:
    """A sample of a task.

    Raises:
        RowMismatch: it is not what it was when the task was planned.
        SampleError: it cannot be read.
    """
    sample = dataset.sample(ref.uid)
    if sample.ref.digest != ref.digest:
        raise RowMismatch(f"{ref.uid} has changed since the sweep was planned; run the sweep again to plan anew")
    return sample


def preprocess(task: Task, vlm: VisionLanguageModel, sample: Sample, images: Sequence[Image.Image]) -> Inputs:
    """Tensors of a sample under the prompt and the vision setting of its task, in host memory.

    Raises:
        KnobError: the model cannot take the vision setting.
        SampleError: it cannot take an image or the question; with the sample's name.
    """
    try:
        return vlm.preprocess(images, sample.prompt, task.knobs.vision)
    except SampleError as error:
        raise SampleError(f"{sample.ref.uid}: {error}") from error


# -- all samples of a task --------------------------------------------------------------------------------------------


@contextmanager
def prepared_samples(
    task: Task, vlm: VisionLanguageModel, dataset: Dataset, kept: PreparedSamples
) -> Iterator[Iterator[PreparedSample | SampleError]]:
    """The samples of a task in its order, up to their vision features, which no other knob changes, on the device.

    What is not kept from an earlier task is decoded and preprocessed ahead of the device in threads, and encoded when
    it is asked for. At the end of the block there is no such thread any more, so that none runs beside a timed answer.
    """
    kept.enter((task.model, task.knobs.vision), (task.dataset, task.samples), vlm.device)
    reading = threading.Lock()

    def preprocessed(ref: SampleRef) -> _Preprocessed:
        with reading:  # what opens data sets does not say whether several threads may read one
            sample = checked(dataset, ref)
        images = sample.images()
        sizes = [(image.height, image.width) for image in images]
        return _Preprocessed(sample, sizes, preprocess(task, vlm, sample, images))

    @torch.inference_mode()
    def encoded(made: _Preprocessed) -> PreparedSample:
        inputs = vlm.transfer(made.inputs)
        features = kept.features_of(made.sample, vlm.device)
        if features is None:
            features = vlm.encode_images(inputs.vision)
        without_pixels = {name: tensor for name, tensor in inputs.vision.items() if not name.startswith("pixel")}
        prepared = PreparedSample(made.sample, made.sizes, replace(inputs, vision=without_pixels), features)
        kept.keep(prepared)
        return prepared

    def one_by_one(ahead: Ahead) -> Iterator[PreparedSample | SampleError]:
        # What is kept is not made again; nothing of this task's own samples is dropped while it runs.
        to_make = [ref for ref in task.samples if not kept.has(ref)]
        made = ahead.map(preprocessed, to_make, lambda one: one.num_bytes)
        waiting = set(to_make)
        for ref in task.samples:
            if ref not in waiting:
                yield kept.find(ref, vlm.device)
                continue
            try:
                result = next(made)()
            except SampleError as error:
                yield error
                continue
            yield encoded(result)

    with preparing_ahead(background_threads(vlm)) as ahead:
        yield one_by_one(ahead)


def background_threads(vlm: VisionLanguageModel) -> int:
    """Threads that preprocess while the device works: of the cores that torch may use, all but the one that launches.

    None on a CPU, which is the device: there torch computes with every core that the worker was given, and one more
    thread takes turns with it. One for processors of transformers, which set up their tokenizer anew at every call.
    """
    if vlm.device.type == "cpu":
        return 0
    if vlm.card.family.name == "generic":
        return 1
    return max(1, min(MOST_THREADS, torch.get_num_threads() - 1))


# -- ahead ------------------------------------------------------------------------------------------------------------


class Ahead:
    """Runs functions in background threads, in order, a bounded number of results ahead of whoever takes them."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    def map(
        self, make: Callable[[SampleRef], T], refs: list[SampleRef], num_bytes: Callable[[T], int]
    ) -> Iterator[Callable[[], T]]:
        """For each of `refs` a function that waits for `make(ref)`: it returns what that returned, or raises it."""
        if self._pool is None:
            for ref in refs:
                yield lambda ref=ref: make(ref)  # type: ignore[misc]
            return
        left, running = deque(refs), deque[Future[T]]()
        while left or running:
            while (
                left and len(running) < MOST_AHEAD and (not running or _waiting(running, num_bytes) < MOST_BYTES_AHEAD)
            ):
                running.append(self._pool.submit(make, left.popleft()))
            yield running.popleft().result


@contextmanager
def preparing_ahead(threads: int) -> Iterator[Ahead]:
    """Threads for the time of the block; at its end what has not begun never will, and what has is waited for."""
    if not threads:
        yield Ahead(None)
        return
    # A thread that torch computes in would otherwise bring as many helpers as there are cores. Set here, not there:
    # the number is one for all threads.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        yield Ahead(pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(torch_threads)


def _waiting(running: deque[Future[T]], num_bytes: Callable[[T], int]) -> int:
    return sum(num_bytes(one.result()) for one in running if one.done() and one.exception() is None)


# -- kept from task to task -------------------------------------------------------------------------------------------


@dataclass
class _SharedFeatures:
    features: Features
    num_bytes: int
    on_device: bool
    users: int = 0  # kept samples whose image this is


class PreparedSamples:
    """Keeps prepared samples of one model and vision setting until its bounds are reached: features on the device as
    long as there is room for them, then in host memory, like everything else.

    Tasks come in one of two orders: each combination goes through all parts of a data set, or each part goes through
    all combinations. In the first, whatever is there will be needed again, before anything newer: so nothing is dropped
    for something newer, for that would push out what is needed next, and none would ever be found. In the second, a
    part that was run several times in a row, and left, is over: it goes when there is no room.
    """

    def __init__(self, max_bytes: int | None = None, max_device_bytes: int | None = None) -> None:
        """
        Args:
            max_bytes: bound on host memory; a share of the host's if None.
            max_device_bytes: bound on device memory; a share of what is free when a setting is entered if None. On a
                CPU there is only host memory.
        """
        own_share = int(psutil.virtual_memory().total * SHARE_OF_MEMORY)
        self.max_bytes = min(own_share, MOST_BYTES) if max_bytes is None else max_bytes
        self.num_bytes = 0
        self.num_device_bytes = 0
        self._wanted_device_bytes = max_device_bytes
        self.max_device_bytes = 0
        self._setting: Hashable = None
        self._group: Hashable = None
        self._came_again = False
        self._over: list[Hashable] = []
        self._kept: dict[Hashable, dict[SampleRef, PreparedSample]] = {}  # by group; without features
        self._image_of: dict[tuple[Hashable, SampleRef], bytes] = {}
        self._features: dict[bytes, _SharedFeatures] = {}

    def enter(self, setting: Hashable, group: Hashable, device: torch.device) -> None:
        """Say what comes: samples of one task.

        Args:
            setting: what features depend on, model and vision setting; another one makes all that is kept useless.
            group: which samples, of which data set and with which prompt.
            device: where features are wanted.
        """
        if setting != self._setting:
            self.clear()
            self._setting = setting
            self.max_device_bytes = 0
            if device.type != "cpu":
                asked = self._wanted_device_bytes
                self.max_device_bytes = _share_of_device(device) if asked is None else asked
        if group == self._group:
            self._came_again = True
        else:
            if self._came_again and self._group not in self._over:
                self._over.append(self._group)
            self._came_again = False
            self._group = group
            if group in self._over:  # it was not, after all
                self._over.remove(group)
        self._kept.setdefault(group, {})

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._image_of.clear()
        self._features.clear()
        self._over.clear()
        self._setting = self._group = None
        self._came_again = False
        self.num_bytes = self.num_device_bytes = 0

    def has(self, ref: SampleRef) -> bool:
        """Whether `find` finds a sample of the present group."""
        return ref in self._kept.get(self._group, {})

    @torch.inference_mode()
    def find(self, ref: SampleRef, device: torch.device) -> PreparedSample:
        """A sample of the present group that was kept, its tensors on `device`. Raises KeyError if there is none."""
        kept = self._kept[self._group][ref]
        shared = self._features[self._image_of[self._group, ref]]
        return replace(kept, inputs=kept.inputs.to(device), features=features_to(shared.features, device))

    @torch.inference_mode()
    def features_of(self, sample: Sample, device: torch.device) -> Features | None:
        """The features of a sample's image, if another question about the same image was kept."""
        shared = self._features.get(_image_key(sample))
        return None if shared is None else features_to(shared.features, device)

    def keep(self, prepared: PreparedSample) -> None:
        """Keep a sample of the present group if there is room for it."""
        if self.has(prepared.sample.ref):
            return
        key, own = _image_key(prepared.sample), prepared.num_bytes
        while True:
            shared = self._features.get(key)
            size = 0 if shared is not None else features_bytes(prepared.features)
            on_device = bool(size) and self.num_device_bytes + size <= self.max_device_bytes
            if self.num_bytes + own + (0 if on_device else size) <= self.max_bytes:
                break
            if not self._over:
                return
            self._drop(self._over.pop(0))
        if shared is None:
            features = prepared.features if on_device else features_to(prepared.features, HOST)
            shared = self._features[key] = _SharedFeatures(features, size, on_device)
            if on_device:
                self.num_device_bytes += size
            else:
                self.num_bytes += size
        shared.users += 1
        ref = prepared.sample.ref
        self._image_of[self._group, ref] = key
        self._kept[self._group][ref] = replace(prepared, inputs=prepared.inputs.to(HOST), features={})
        self.num_bytes += own

    @torch.inference_mode()
    def leave_device(self) -> bool:
        """Give the device's memory up: to host memory as far as there is room, the rest is made again when needed.

        Returns:
            Whether there was anything to give up.
        """
        there = {key: shared for key, shared in self._features.items() if shared.on_device}
        gone = set()
        for key, shared in there.items():
            if self.num_bytes + shared.num_bytes <= self.max_bytes:
                shared.features, shared.on_device = features_to(shared.features, HOST), False
                self.num_bytes += shared.num_bytes
                self.num_device_bytes -= shared.num_bytes
            else:
                gone.add(key)
        for (group, ref), key in list(self._image_of.items()):
            if key in gone:
                self._forget(group, ref)
        self.max_device_bytes = 0  # until another setting is entered
        return bool(there)

    def _drop(self, group: Hashable) -> None:
        for ref in list(self._kept.get(group, {})):
            self._forget(group, ref)
        self._kept.pop(group, None)

    def _forget(self, group: Hashable, ref: SampleRef) -> None:
        self.num_bytes -= self._kept[group].pop(ref).num_bytes
        key = self._image_of.pop((group, ref))
        shared = self._features[key]
        shared.users -= 1
        if not shared.users:
            del self._features[key]
            if shared.on_device:
                self.num_device_bytes -= shared.num_bytes
            else:
                self.num_bytes -= shared.num_bytes


def _share_of_device(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, and free to be used
    return int((free + held) * SHARE_OF_DEVICE)


def _inputs_bytes(inputs: Inputs) -> int:
    tensors = (*inputs.prompt.values(), *inputs.vision.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _files_bytes(sample: Sample) -> int:
    return sum(map(len, sample.image_files))


def _image_key(sample: Sample) -> bytes:
    # By content: two data sets, or two rows without an image id, may hold the same file.
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in sample.image_files)).digest()

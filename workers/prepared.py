"""Samples ready for the language model, made once per vision setting and used by every top-k and block setting."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, replace

import psutil
import torch

from workers.datasets import Sample, SampleRef
from workers.models.adapter import Features, features_bytes, features_to
from workers.models.processing import Inputs

# Of the host's memory. Features wait there and not on the device, whose peak memory is measured.
SHARE_OF_MEMORY = 0.1
MOST_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PreparedSample:
    """A sample whose image has been decoded, cut and encoded; all tensors in host memory, pixels dropped."""

    sample: Sample
    height: int
    width: int
    inputs: Inputs
    features: Features

    @property
    def num_bytes(self) -> int:
        """Bytes beside the features, which other questions about the image may share."""
        tensors = (*self.inputs.prompt.values(), *self.inputs.vision.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + len(self.sample.image_bytes)


class PreparedSamples:
    """Keeps prepared samples of one group until the bound is reached, and forgets them when another group comes.

    Nothing is dropped for something newer: every task of a group goes through its samples in the same order, so the
    newest would push out what is needed next, and none would ever be found.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """
        Args:
            max_bytes: bound on what is kept; a share of the host's memory if None.
        """
        own_share = int(psutil.virtual_memory().total * SHARE_OF_MEMORY)
        self.max_bytes = min(own_share, MOST_BYTES) if max_bytes is None else max_bytes
        self.num_bytes = 0
        self._group: Hashable = None
        self._kept: dict[SampleRef, PreparedSample] = {}
        self._features: dict[bytes, Features] = {}

    def enter(self, group: Hashable) -> None:
        """Say what the following samples depend on: model, data set and vision setting."""
        if group != self._group:
            self._kept.clear()
            self._features.clear()
            self.num_bytes, self._group = 0, group

    def find(self, ref: SampleRef, device: torch.device) -> PreparedSample | None:
        """A sample that was kept, its tensors on `device`."""
        kept = self._kept.get(ref)
        if kept is None:
            return None
        return replace(kept, inputs=kept.inputs.to(device), features=features_to(kept.features, device))

    def features_of(self, sample: Sample, device: torch.device) -> Features | None:
        """The features of a sample's image, if another question about the same image was kept."""
        kept = self._features.get(_image_key(sample))
        return None if kept is None else features_to(kept, device)

    def keep(self, prepared: PreparedSample) -> None:
        """Keep a sample if there is room for it."""
        key = _image_key(prepared.sample)
        shared = self._features.get(key)
        size = prepared.num_bytes + (features_bytes(prepared.features) if shared is None else 0)
        if self.num_bytes + size > self.max_bytes:
            return
        host = torch.device("cpu")
        if shared is None:
            shared = self._features[key] = features_to(prepared.features, host)
        self._kept[prepared.sample.ref] = replace(prepared, inputs=prepared.inputs.to(host), features=shared)
        self.num_bytes += size


def _image_key(sample: Sample) -> bytes:
    # By content: two data sets, or two rows without an image id, may hold the same file.
    return hashlib.sha256(sample.image_bytes).digest()

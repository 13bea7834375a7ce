"""Images and a question become tensors: prompt, placeholders, tokens; each family adds how it cuts an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from knobs.placement import Fit, place
from knobs.vision import VisionLayout, VisionSetting
from workers.errors import ModelError, SampleError

Tensors = dict[str, torch.Tensor]

# Entries that run along the prompt, one value per token; everything else a processor returns belongs to the images.
PROMPT_ENTRIES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

# Entries that say which part of an image's pixels is image, besides those that have `mask` in their name. With one of
# them zeros at the end of pixels are not looked at; without, they would be a black border that the model sees.
SIZE_ENTRIES = ("image_sizes", "spatial_shapes")


@dataclass(frozen=True)
class Inputs:
    """One sample, or a left-padded batch of samples, ready for the model.

    Attributes:
        prompt: tensors of shape (batch, tokens): input_ids, attention_mask and what else the family wants per token.
        vision: keyword arguments of the model's `get_image_features`.
        num_crops: crops in the tensors, without the global view; None where the family does not cut images.
        num_vision_tokens: image placeholders in the prompt, counted.
    """

    prompt: Tensors
    vision: Tensors
    num_crops: int | None
    num_vision_tokens: int

    def to(self, device: torch.device) -> Inputs:
        """The same tensors on another device."""
        return replace(
            self,
            prompt={name: tensor.to(device) for name, tensor in self.prompt.items()},
            vision={name: tensor.to(device) for name, tensor in self.vision.items()},
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt without padding, over the batch."""
        return int(self.prompt["attention_mask"].sum())


@dataclass(frozen=True)
class ImageTensors:
    """What a family makes of the images of one prompt: tensors, the text that stands for each, and their crops."""

    vision: Tensors
    placeholders: Sequence[str]
    num_crops: int | None


class Processor(ABC):
    """Question and images to `Inputs`, for one sample.

    Attributes:
        tokenizer: the model's tokenizer.
        image_token_id: the token in the prompt that one vision token takes the place of.
    """

    tokenizer: Any
    image_token_id: int

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image], question: str, setting: VisionSetting) -> Inputs:
        """Tensors for one sample.

        Args:
            images: RGB images, in the order in which the prompt refers to them.
            question: the text of the user's turn.
            setting: a level of the vision knob that this family takes.
        """


class CuttingProcessor(Processor):
    """A processor that writes the prompt itself. Subclasses say how images are cut and which text stands for them.

    Attributes:
        image_token: the token that is replaced by one vision token.
        template_image: what the chat template (or, without one, the plain prompt) holds in the place of an image.
        prompt_image: the same with the tokens around it, used where there is no chat template.
    """

    image_token: str
    template_image: str
    prompt_image: str

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @abstractmethod
    def cut(self, images: Sequence[Image.Image], setting: VisionSetting) -> ImageTensors:
        """Resize, crop and normalise RGB images under a vision setting."""

    def per_token(self, input_ids: torch.Tensor) -> Tensors:
        """Further tensors of the shape of `input_ids` that the family's model wants."""
        return {}

    def __call__(self, images: Sequence[Image.Image], question: str, setting: VisionSetting) -> Inputs:
        if self.template_image in question:
            raise SampleError(f"the question contains {self.template_image}, which stands for an image")
        cut = self.cut(images, setting)
        text = self._fill(self.prompt_text(question, len(images)), cut.placeholders)
        encoded = self.tokenizer(text, return_tensors="pt", add_special_tokens=self.tokenizer.chat_template is None)
        ids = encoded["input_ids"]
        prompt = {"input_ids": ids, "attention_mask": encoded["attention_mask"], **self.per_token(ids)}
        return Inputs(prompt, cut.vision, cut.num_crops, int((ids == self.image_token_id).sum()))

    def prompt_text(self, question: str, num_images: int) -> str:
        """The user's turn, images first, in the tokenizer's chat template if it has one."""
        if self.tokenizer.chat_template is None:
            return self.prompt_image * num_images + question
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _fill(self, text: str, placeholders: Sequence[str]) -> str:
        parts = text.split(self.template_image)
        if len(parts) != len(placeholders) + 1:
            raise ModelError(f"the chat template leaves {len(parts) - 1} places for {len(placeholders)} images")
        filled = [parts[0]]
        for placeholder, part in zip(placeholders, parts[1:], strict=True):
            filled += [placeholder, part]
        return "".join(filled)


def lay_on_canvas(image: Image.Image, layout: VisionLayout, fit: Fit, resample: int) -> Image.Image:
    """An RGB image resized to the canvas of its layout, with Pillow's filter of this number; black where it ends."""
    height, width = layout.target_height, layout.target_width
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling(resample))
    if fit == "fill":
        # The part that stays is cut out first: a thin image that fills a canvas would be enormous before the cut.
        scale = max(height / image.height, width / image.width)
        left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
        kept = (
            max(0.0, left),
            max(0.0, top),
            min(image.width, image.width - left),
            min(image.height, image.height - top),
        )
        return image.resize((width, height), Image.Resampling(resample), box=kept)
    at = place(image.height, image.width, height, width, fit)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize((at.width, at.height), Image.Resampling(resample)), (at.left, at.top))
    return canvas


def left_pad(samples: Sequence[Tensors], pad_token_id: int) -> Tensors:
    """Prompts of shape (1, tokens) as one batch (samples, longest), padded on the left so that all end together."""
    longest = max(s["input_ids"].shape[1] for s in samples)
    fill = {"input_ids": pad_token_id}
    return {
        name: torch.cat(
            [
                torch.nn.functional.pad(s[name], (longest - s[name].shape[1], 0), value=fill.get(name, 0))
                for s in samples
            ]
        )
        for name in samples[0]
    }


def join_images(samples: Sequence[Tensors]) -> Tensors:
    """Vision tensors of several samples as those of one batch: sample after sample along the first axis.

    Where the other axes differ, for images came out in different sizes or numbers of crops, pixels and masks end in
    zeros, as in a batch of transformers' own processors, provided that a mask or sizes among the tensors tell the model
    what is image. How exactly it keeps to them is the model's affair; tensors that agree are joined to the bit.

    Raises:
        SampleError: these samples cannot share a batch; the message names the entry and its shapes.
    """
    names = list(samples[0])
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise SampleError(f"samples with {', '.join(names)} and with {', '.join(sample)} cannot share a batch")
    told = any("mask" in name or name in SIZE_ENTRIES for name in names)
    return {
        name: _joined(name, [sample[name] for sample in samples], told and ("pixel" in name or "mask" in name))
        for name in names
    }


def _joined(name: str, parts: Sequence[torch.Tensor], may_pad: bool) -> torch.Tensor:
    """Along the first axis; the others, where they differ, padded with zeros at the end if they may be."""
    shapes = [tuple(part.shape) for part in parts]
    if shapes[0] and len({shape[1:] for shape in shapes}) == 1:
        return torch.cat(list(parts))
    if not may_pad or not shapes[0] or len({len(shape) for shape in shapes}) > 1:
        raise SampleError(
            f"{name} of shapes {', '.join(map(str, dict.fromkeys(shapes)))} cannot share a batch: they differ beyond "
            "the first axis, and nothing beside them says what would be padding"
        )
    largest = [max(sizes) for sizes in list(zip(*shapes, strict=True))[1:]]
    joined, row = parts[0].new_zeros((sum(shape[0] for shape in shapes), *largest)), 0
    for part in parts:
        joined[row : row + len(part)][tuple(slice(size) for size in part.shape)] = part
        row += len(part)
    return joined

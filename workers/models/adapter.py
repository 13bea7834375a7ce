"""One interface to every loaded vision-language model: the stages of an answer as plain functions, and the knobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from knobs.blocks import active_blocks as only_blocks
from knobs.errors import KnobError
from knobs.experts import experts_per_token
from knobs.vision import VisionSetting
from workers.errors import ModelError, SampleError
from workers.models.engines import DecodeState, EagerEngine, Engine, EngineUse
from workers.models.processing import Inputs, Processor, Tensors, join_images, left_pad
from workers.models.registry import ModelCard
from workers.models.requirements import require_stages, stack_of_blocks

# Names of the module between vision tower and language model, over the families of transformers.
PROJECTORS = ("connector", "multi_modal_projector", "mm_projector", "aligner", "merger", "embed_vision")

# What a vision tower returns beside the features that the language model reads; large, and dead after the projector.
_TOWER_LEFTOVERS = ("last_hidden_state", "hidden_states", "attentions")

Features = dict[str, Any]

# Tokens of an answer that prefill makes room for, if it is not told how many there will be.
ROOM_FOR_AN_ANSWER = 128

# Rows that have ended leave their batch when they are at least this share of it. Leaving copies the keys and values of
# those that stay once, which the eager engine does at every step anyway.
SHARE_THAT_LEAVES = 0.25


@dataclass
class Counts:
    """What a model has been asked for so far; whoever wants to know what something took compares before and after.

    Attributes:
        preprocessings: prompts made of images and a question.
        vision_passes: runs of the vision tower.
        prefills, decode_steps: runs of the language model over prompts, and over the last tokens of a batch.
        prompts, decoded_rows: rows in those, ended ones that were still in their batch too.
    """

    preprocessings: int = 0
    vision_passes: int = 0
    prefills: int = 0
    prompts: int = 0
    decode_steps: int = 0
    decoded_rows: int = 0
    # Preprocessing is the one thing that several threads do.
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def preprocessed(self) -> None:
        with self._lock:
            self.preprocessings += 1

    def as_dict(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class VisionLanguageModel:
    """A loaded transformers model with its stages taken apart and its knobs within reach.

    Attributes:
        model: the torch module.
        processor: question and images to tensors; None for a checkpoint without a tokenizer.
        card: what was known of it before loading.
        device: where it runs.
        engine: how answers are decoded; plain PyTorch unless `workers.models.loading` has put another in its place.
        engine_used: by which the last `answer` was decoded.
        counts: how often its stages have run.
    """

    def __init__(self, model: Any, processor: Processor | None, card: ModelCard, device: torch.device) -> None:
        self.model = model
        self.processor = processor
        self.card = card
        self.device = device
        require_stages(model)
        self.decoder = stack_of_blocks(model)
        self.engine: Engine = EagerEngine(model)
        self.engine_used: EngineUse | None = None
        self.counts = Counts()
        self._on_tower_end: Callable[[], None] | None = None
        self._mark_tower_end()

    # -- knobs ------------------------------------------------------------------------------------------------------

    @contextmanager
    def knobs(self, moe_top_k: int | None = None, active_blocks: int | Sequence[int] | None = None) -> Iterator[None]:
        """Switch knobs in place and restore them at the end, also when the body raises; None leaves a knob alone.

        Args:
            moe_top_k: experts per token.
            active_blocks: blocks of the language model that run: how many from the first on, or their indices.

        Raises:
            KnobError: this model cannot take the value.
        """
        with ExitStack() as stack:
            stack.enter_context(experts_per_token(self.decoder, moe_top_k))
            stack.enter_context(only_blocks(self.decoder, active_blocks))
            yield

    # -- stages, in the order in which an answer passes through them ------------------------------------------------

    def preprocess(self, images: Sequence[Image.Image], question: str, setting: VisionSetting) -> Inputs:
        """Images and question in host memory to tensors in host memory.

        Raises:
            KnobError: this model cannot take the vision setting.
            SampleError: there is no image, or this model cannot take one (too narrow, say) or the question.
            ModelError: it was loaded without a processor.
        """
        if self.processor is None:
            raise ModelError(_no_processor(self.card))
        if reason := self.card.geometry.refuse(setting):
            raise KnobError(f"{setting}: {reason}")
        if not images:
            raise SampleError("there is no image; a question needs at least one")
        self.counts.preprocessed()
        try:
            return self.processor(images, question, setting)
        except ValueError as error:
            # Image processors refuse an image with a plain ValueError.
            raise SampleError(str(error)) from error

    def collate(self, samples: Sequence[Inputs]) -> Inputs:
        """Several samples as one batch: prompts padded on the left, images joined for one pass of the vision tower.

        `encode_images` of the batch and `prefill` with its features do what encoding every sample alone and merging the
        features does. Tensors stay where they are, which is in host memory if `preprocess` has just made them.

        Args:
            samples: of `preprocess` or of this function, all on one device.

        Returns:
            A single sample as it is, or new tensors: the prompt of shape (samples, longest prompt), the vision part as
            `Family.join_images` has it, and the sums of crops (None if one sample has None) and of vision tokens.

        Raises:
            SampleError: images of these samples cannot go through the tower together.
            ValueError: there is no sample.
        """
        if not samples:
            raise ValueError("there is no sample to make a batch of")
        if len(samples) == 1:
            return samples[0]
        crops = [sample.num_crops for sample in samples if sample.num_crops is not None]
        return Inputs(
            prompt=left_pad([sample.prompt for sample in samples], self.pad_token_id),
            vision=self.card.family.join_images(samples),
            num_crops=sum(crops) if len(crops) == len(samples) else None,
            num_vision_tokens=sum(sample.num_vision_tokens for sample in samples),
        )

    def transfer(self, inputs: Inputs) -> Inputs:
        """Tensors to the device."""
        return inputs.to(self.device)

    def encode_images(self, vision: Tensors, on_tower_end: Callable[[], None] | None = None) -> Features:
        """Vision tower and projector: pixels to the embeddings that the language model reads.

        Args:
            vision: the vision part of `Inputs`, on the device.
            on_tower_end: called when the tower's last hidden state is there and the projector has not begun.
        """
        self.counts.vision_passes += 1
        self._on_tower_end = on_tower_end
        try:
            features = self.model.base_model.get_image_features(**vision, return_dict=True)
        finally:
            self._on_tower_end = None
        return {name: value for name, value in features.items() if name not in _TOWER_LEFTOVERS}

    def prefill(
        self, prompt: Tensors, vision: Tensors, features: Features, max_new_tokens: int = ROOM_FOR_AN_ANSWER
    ) -> tuple[torch.Tensor, DecodeState]:
        """Embedding merge, every active block, final norm and LM head: the first token of every row.

        Args:
            prompt: tensors of shape (batch, tokens), left-padded.
            vision: the vision parts of the same samples; pixels are not read again, grids are.
            features: what `encode_images` made of them, in one pass or merged by `merge_features`.
            max_new_tokens: how long the answer may become, for engines that make room ahead.

        Returns:
            Tokens of shape (batch, 1) and the state for the next step.
        """
        grids = _without_pixels(vision)
        rows, tokens = prompt["input_ids"].shape
        self.counts.prefills += 1
        self.counts.prompts += rows
        state = self.engine.new_state(rows, tokens + max_new_tokens)
        positions = self.model._prepare_position_ids_for_generation(
            prompt["input_ids"], {**prompt, **grids, "past_key_values": state.cache}
        )
        try:
            output = self.model(
                **prompt,
                position_ids=positions,
                past_key_values=state.cache,
                mm_encoder_outputs={"image": _as_output(features)},
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            )
        except torch.OutOfMemoryError:
            self.engine.clear()  # room that was made for this answer must not be missing for a smaller one
            raise
        state.begin(prompt["attention_mask"], positions[..., -1:])
        return output.logits[:, -1].argmax(-1, keepdim=True), state

    def decode_step(self, token: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """The greedy token after `token`, both of shape (batch, 1); `state` moves on by one position."""
        self.counts.decode_steps += 1
        self.counts.decoded_rows += token.shape[0]
        return state.step(token)

    # -- answers ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(self, batch: Sequence[tuple[Inputs, Features]], max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens of every sample up to and including end-of-sequence, at most `max_new_tokens`.

        Answers that have ended leave the batch where the engine can do without them, so that the rest is decoded alone.

        Args:
            batch: inputs on the device and the features of their images; features may be shared between calls.
        """
        prompt = left_pad([inputs.prompt for inputs, _ in batch], self.pad_token_id)
        # The tower has run, so pixels, which are by far the most bytes and the family's affair, are not joined.
        vision = join_images([_without_pixels(inputs.vision) for inputs, _ in batch])
        features = merge_features([features for _, features in batch])
        token, state = self.prefill(prompt, vision, features, max_new_tokens)
        ends = self.end_token_ids
        answers: list[list[int]] = [[] for _ in batch]
        rows = list(range(len(batch)))  # of the batch, those that are still decoded
        while True:
            for row, chosen in zip(rows, token[:, 0].tolist(), strict=True):
                if not answers[row] or answers[row][-1] not in ends:
                    answers[row].append(chosen)
            going_on = [at for at, row in enumerate(rows) if answers[row][-1] not in ends]
            if not going_on or len(answers[rows[going_on[0]]]) >= max_new_tokens:
                break
            leaving = len(rows) - len(going_on)
            if leaving and leaving >= SHARE_THAT_LEAVES * len(rows) and state.keep(going_on):
                rows, token = [rows[at] for at in going_on], token[going_on]
            token = self.decode_step(token, state)
        self.engine_used = state.use
        return answers

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text without special tokens, stripped."""
        if self.processor is None:
            raise ModelError(_no_processor(self.card))
        return str(self.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as `generate` reads them."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.model.config.get_text_config(decoder=True).eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or [])

    @property
    def pad_token_id(self) -> int:
        """Fills the left of shorter prompts; masked, so any token serves where the model names none."""
        pad = self.model.generation_config.pad_token_id
        return int(pad) if pad is not None else 0

    def _mark_tower_end(self) -> None:
        encoder = self.model.get_encoder(modality="image")
        inside = next((m for name, m in encoder.named_modules() if name.split(".")[-1] in PROJECTORS), None)

        def reached(*_: Any) -> None:
            if self._on_tower_end is not None:
                self._on_tower_end()

        # Where the projector is the tower's last part (Qwen), the tower ends when the projector begins.
        if inside is not None:
            inside.register_forward_pre_hook(reached)
        else:
            encoder.register_forward_hook(reached)


def merge_features(parts: Sequence[Features]) -> Features:
    """Features of several samples as one, images in order."""
    return {name: _join([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]


def features_to(features: Features, device: torch.device) -> Features:
    """The same features on another device."""
    return {name: _each(value, lambda tensor: tensor.to(device)) for name, value in features.items()}


def features_bytes(features: Features) -> int:
    """Bytes of all tensors in features."""
    sizes: list[int] = []
    for value in features.values():
        _each(value, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)


def kv_cache_bytes(state: DecodeState) -> int:
    """Bytes of keys and values in the cache; blocks that are skipped have none.

    With the eager engine they are as many as there are tokens, with the graph engine as many as there is room for.
    """
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in state.cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor)
    )


def _no_processor(card: ModelCard) -> str:
    return f"{card.name} has no tokenizer.json or no preprocessor_config.json, so it takes no images and questions"


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return [_each(item, change) for item in value] if isinstance(value, list | tuple) else value


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values)
    if isinstance(first, list | tuple):
        # A list per image is strung together; a list per layer of lists per image is joined layer by layer.
        if first and isinstance(first[0], list | tuple):
            return [_join(list(layer)) for layer in zip(*values, strict=True)]
        return [item for value in values for item in value]
    return first


def _without_pixels(vision: Tensors) -> Tensors:
    return {name: tensor for name, tensor in vision.items() if not name.startswith("pixel")}


def _as_output(features: Features) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**features)

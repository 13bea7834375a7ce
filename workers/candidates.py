"""What block lists are worth on samples: answers scored, reference answers' likelihood, and what each block changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from knobs.importance import Method
from workers.errors import ModelError, SampleError
from workers.models.adapter import Features, VisionLanguageModel, merge_features
from workers.models.processing import Inputs, Tensors, join_images, left_pad
from workers.prepared import PreparedSample
from workers.scorers import scorer
from workers.shared_prefix import run_candidates

Batch = Sequence[tuple[Inputs, Features]]


def importance_rows(
    vlm: VisionLanguageModel,
    samples: Sequence[PreparedSample],
    method: Method,
    candidates: Iterable[Sequence[int]] = (),
    metric: str | None = None,
    max_new_tokens: int = 16,
    share: bool = True,
) -> list[dict[str, Any]]:
    """The values of block lists on one batch of samples; knobs that are on stay on.

    Args:
        vlm: the loaded model.
        samples: one batch, with tensors on the device.
        method: what is measured. For the two that ablate, the value of a list of blocks is the sample's score
            (ACCURACY_DROP) or the log-likelihood of its reference answer in nats (NLL), with just those blocks
            running; for the others it is that of one block in the whole model, see `Method`.
        candidates: block lists for the methods that ablate; the others measure every block.
        metric: name of the scorer, for ACCURACY_DROP.
        max_new_tokens: cap on the answers, for ACCURACY_DROP.
        share: compute what candidates share once; the values are the same without.

    Returns:
        Rows of `sample_id`, `image_id`, `blocks` (the list, or the one block) and `value`.

    Raises:
        KnobError: a candidate that the model cannot run.
        SampleError: a sample has no reference answer.
        ValueError: there is no such metric.
    """
    batch = [(sample.inputs, sample.features) for sample in samples]
    if not batch:
        return []
    valued: Iterable[tuple[Sequence[int], Sequence[float]]]
    match method:
        case Method.ACCURACY_DROP:
            score = scorer(metric or "").score

            def scores() -> list[float]:
                texts = [vlm.text(tokens) for tokens in vlm.answer(batch, max_new_tokens)]
                return [score(text, s.sample.answers, s.sample.options) for text, s in zip(texts, samples, strict=True)]

            valued = run_candidates(vlm, candidates, scores, share)
        case Method.NLL:
            answers = [answer_tokens(vlm, s.inputs, reference_answer(s)) for s in samples]
            valued = run_candidates(vlm, candidates, lambda: log_likelihoods(vlm, batch, answers), share)
        case Method.ACTIVATION | Method.SIMILARITY:
            measured = block_changes(vlm, batch)[method].tolist()
            valued = [([block], list(column)) for block, column in enumerate(zip(*measured, strict=True))]
    return [
        {"sample_id": s.sample.ref.uid, "image_id": s.sample.image_id, "blocks": list(blocks), "value": value}
        for blocks, values in valued
        for s, value in zip(samples, values, strict=True)
    ]


def reference_answer(prepared: PreparedSample) -> str:
    """The answer that most annotators gave, of several the one given first.

    Raises:
        SampleError: there is none.
    """
    if not prepared.sample.answers:
        raise SampleError(f"{prepared.sample.ref.uid}: no reference answer, which the log-likelihood needs")
    return Counter(prepared.sample.answers).most_common(1)[0][0]


def answer_tokens(vlm: VisionLanguageModel, inputs: Inputs, answer: str) -> list[int]:
    """An answer as tokens that continue a prompt; a space comes first unless the prompt ends in white space or a
    special token.

    So `Assistant:` is followed by ` yes`, and the line break after `assistant` of a chat template by `yes`.

    Raises:
        ModelError: the model was loaded without a tokenizer.
    """
    if vlm.processor is None:
        raise ModelError(f"{vlm.card.name} has no tokenizer, so an answer cannot be made tokens")
    tokenizer = vlm.processor.tokenizer
    last = str(tokenizer.decode(inputs.prompt["input_ids"][0, -1:], skip_special_tokens=True))
    begins = not last or last[-1].isspace()
    tokens: list[int] = tokenizer(
        answer.strip() if begins else f" {answer.strip()}", add_special_tokens=False
    ).input_ids
    return tokens


@torch.inference_mode()
def log_likelihoods(vlm: VisionLanguageModel, batch: Batch, answers: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihood of each answer after its prompt in nats, by teacher forcing: one pass, no cache.

    The sum over the answer's tokens and its end, any of the tokens that end an answer: the log of the probability of
    exactly this answer. A model without such tokens counts no end.

    Args:
        batch: inputs on the device and the features of their images.
        answers: tokens of each answer, without end-of-sequence; an empty one has its end alone.
    """
    prompts = [_continued(inputs.prompt, answer) for (inputs, _), answer in zip(batch, answers, strict=True)]
    kept = max(map(len, answers)) + 1  # the last prompt position predicts the first token, the last token the end
    logits = _forward(vlm, prompts, batch, logits_to_keep=kept)
    log_probabilities = logits[:, -kept:].float().log_softmax(dim=-1)
    ends = sorted(vlm.end_token_ids)
    values = []
    for row, answer in zip(log_probabilities, answers, strict=True):
        # Prompts are padded on the left, so the answers end together.
        predicted = row[kept - len(answer) - 1 : -1].gather(-1, torch.tensor(answer, device=row.device)[:, None].long())
        end = row[-1, ends].logsumexp(dim=-1) if ends else row.new_zeros(())
        values.append(predicted.sum() + end)
    found: list[float] = torch.stack(values).tolist()
    return found


@torch.inference_mode()
def block_changes(vlm: VisionLanguageModel, batch: Batch) -> dict[Method, torch.Tensor]:
    """How much each block changes the residual stream, from one pass of the prompts through the whole model.

    Returns:
        ACTIVATION and SIMILARITY, each of shape (batch, blocks): means over the tokens of each prompt, see `Method`.
    """
    prompts = [inputs.prompt for inputs, _ in batch]
    is_token = left_pad(prompts, vlm.pad_token_id)["attention_mask"].bool()
    activations: list[torch.Tensor] = []
    similarities: list[torch.Tensor] = []

    def mean(values: torch.Tensor) -> torch.Tensor:
        # Chosen and not multiplied by 0: a position that is all padding may hold anything, NaN included.
        return values.where(is_token, 0.0).sum(dim=-1) / is_token.sum(dim=-1)

    def compare(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).float()
        after = (output if isinstance(output, torch.Tensor) else output[0]).float()
        activations.append(mean((after - before).norm(dim=-1) / after.norm(dim=-1)))
        similarities.append(mean(1 - torch.cosine_similarity(before, after, dim=-1)))

    with _on_every_block(vlm, compare):
        _forward(vlm, prompts, batch, logits_to_keep=1)
    return {
        Method.ACTIVATION: torch.stack(activations, dim=-1),
        Method.SIMILARITY: torch.stack(similarities, dim=-1),
    }


def _forward(vlm: VisionLanguageModel, prompts: Sequence[Tensors], batch: Batch, **options: Any) -> torch.Tensor:
    """Logits of a batch of prompts without a cache; vision features are given, so the tower does not run."""
    prompt = left_pad(prompts, vlm.pad_token_id)
    grids = join_images([inputs.vision for inputs, _ in batch])  # prepared samples have no pixels any more
    features = merge_features([features for _, features in batch])
    output = vlm.model(
        **prompt,
        position_ids=vlm.model._prepare_position_ids_for_generation(prompt["input_ids"], {**prompt, **grids}),
        mm_encoder_outputs={"image": SimpleNamespace(**features)},
        use_cache=False,
        return_dict=True,
        **options,
    )
    logits: torch.Tensor = output.logits
    return logits


def _continued(prompt: Tensors, answer: Sequence[int]) -> Tensors:
    """A prompt with the tokens of its answer; what else runs along it is 0 for text, as for padding."""
    added = torch.tensor([list(answer)], dtype=torch.long, device=prompt["input_ids"].device)
    fill = {"input_ids": added, "attention_mask": torch.ones_like(added)}
    return {
        name: torch.cat([tensor, fill.get(name, torch.zeros_like(added)).to(tensor.dtype)], dim=-1)
        for name, tensor in prompt.items()
    }


@contextmanager
def _on_every_block(vlm: VisionLanguageModel, hook: Any) -> Iterator[None]:
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in vlm.decoder.layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()

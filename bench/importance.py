"""What sharing saves in the search for the blocks to keep, and how many samples each kind of score needs.

    python bench/importance.py             # a small MolmoE of 16 blocks with random weights, minutes on a CPU
    python bench/importance.py --tiny      # a model of seconds, to see that it runs

Single-block ablation and a beam search of width 3 and depth 4 run with and without shared prefixes, taking turns, on
the same prompts and vision features; the run ends if one value or one token differs. Block evaluations are counted
where they happen. The second part is a simulation, see `simulated`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from knobs.beam import BeamSearch, Value
from knobs.block_tree import Blocks, single_ablations
from knobs.importance import BlockScores, Method, select_blocks
from knobs.vision import VisionSetting
from orchestrator.analysis.importance import candidate_values, split_half_tau
from workers.candidates import importance_rows
from workers.datasets import Sample, SampleRef
from workers.models import describe
from workers.models.adapter import VisionLanguageModel
from workers.models.byte_tokenizer import byte_tokenizer
from workers.prepared import PreparedSample
from workers.probes import cpu_name
from workers.shared_prefix import run_candidates

BLOCKS = 16
ONE_CROP = VisionSetting("image_size", "336x336")
QUESTIONS = {"What is it?": "a cat", "How many of them are there in the picture?": "seven"}


def shape(width: int, experts: int) -> dict[str, Any]:
    """Entries of MolmoE's configuration that make it small; 16 blocks as the 1B has."""
    heads = width // 32
    return {
        "d_model": width,
        "n_layers": BLOCKS,
        "n_heads": heads,
        "mlp_ratio": 1,
        "moe_num_experts": experts,
        "moe_top_k": 2,
        "vit_layers": [-1, -2],
        "vision_backbone": {
            "image_emb_dim": 64,
            "image_num_heads": 2,
            "image_num_key_value_heads": 2,
            "image_head_dim": 32,
            "image_num_layers": 2,
            "image_mlp_dim": 128,
        },
        "text_config": {"num_hidden_layers": BLOCKS, "num_experts": experts, "num_experts_per_tok": 2},
    }


SMALL, TINY = shape(192, experts=16), shape(32, experts=4)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    vlm = built(TINY if options.tiny else SMALL)
    samples = prepared(vlm)
    print(header(options, vlm, samples))
    print(heading(), flush=True)
    for name, search in searches(options.tiny).items():
        print(line(name, *compared(vlm, samples, search, options.repeats)), flush=True)
    print(stability_table(draws=10 if options.tiny else 200, largest=64 if options.tiny else 8192))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; times mean nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each variant (default: 5)")
    return parser.parse_args(arguments)


# -- model and samples ------------------------------------------------------------------------------------------------


def built(entries: dict[str, Any]) -> VisionLanguageModel:
    """The model with random weights of a size at which every block changes the answers, float32 on the CPU."""
    card = describe("molmoe-1b", random_weights=True)
    card.family.register_classes()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**dict(card.config) | entries)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)  # as they are initialised, the blocks add next to nothing
    tokenizer = byte_tokenizer(card.family.special_tokens)
    processor = card.family.processor(tokenizer, model.config.to_dict(), card.preprocessor)
    return VisionLanguageModel(model, processor, card, torch.device("cpu"))


@torch.inference_mode()
def prepared(vlm: VisionLanguageModel) -> list[PreparedSample]:
    """Two questions of different length, each about an image of its own, with their vision features."""
    made = []
    for i, (question, answer) in enumerate(QUESTIONS.items()):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (336, 336, 3), dtype=np.uint8))
        inputs = vlm.transfer(vlm.preprocess([image], question, ONE_CROP))
        sample = Sample(SampleRef(f"bench:{i}", ""), question, (answer,), f"image {i}", b"", None)
        made.append(PreparedSample(sample, [(image.height, image.width)], inputs, vlm.encode_images(inputs.vision)))
    return made


# -- with and without sharing -----------------------------------------------------------------------------------------

Outcome = dict[Any, Any]  # of each candidate: values or tokens
Search = Callable[[VisionLanguageModel, Sequence[PreparedSample], bool], Outcome]


def ablated_likelihood(vlm: VisionLanguageModel, samples: Sequence[PreparedSample], share: bool) -> Outcome:
    """Log-likelihood of the answers under the whole model and without each block."""
    return by_candidate(importance_rows(vlm, samples, Method.NLL, single_ablations(BLOCKS), share=share))


def ablated_answers(tokens: int) -> Search:
    """Tokens of the greedy answers under the whole model and without each block."""

    def answered(vlm: VisionLanguageModel, samples: Sequence[PreparedSample], share: bool) -> Outcome:
        batch = [(sample.inputs, sample.features) for sample in samples]
        return dict(run_candidates(vlm, single_ablations(BLOCKS), lambda: vlm.answer(batch, tokens), share))

    return answered


def beam_search(width: int, depth: int) -> Search:
    """Log-likelihoods in all rounds of a beam search that keeps the first and the last block."""

    def searched(vlm: VisionLanguageModel, samples: Sequence[PreparedSample], share: bool) -> Outcome:
        search, rows = BeamSearch(BLOCKS, width, depth), list[dict[str, Any]]()
        values: dict[Blocks, Value] = {}
        while candidates := search.next_round(values):
            rows += importance_rows(vlm, samples, Method.NLL, candidates, share=share)
            values = candidate_values(pd.DataFrame(rows))
        return by_candidate(rows)

    return searched


def searches(tiny: bool) -> dict[str, Search]:
    tokens, width, depth = (2, 1, 2) if tiny else (8, 3, 4)
    return {
        "ablation of each block, likelihood": ablated_likelihood,
        f"ablation of each block, answers of {tokens} tokens": ablated_answers(tokens),
        f"beam search, width {width}, depth {depth}, likelihood": beam_search(width, depth),
    }


def by_candidate(rows: Sequence[dict[str, Any]]) -> Outcome:
    found: Outcome = {}
    for row in rows:
        found.setdefault(tuple(row["blocks"]), {})[row["sample_id"]] = row["value"]
    return found


@dataclass
class Spent:
    """What one variant took.

    Attributes:
        prompt_blocks, decode_blocks: blocks run on prompts, and on single decoded tokens.
        seconds, cpu_seconds: of each repeat, by the clock and computed by this process; others on the machine disturb
            the latter less.
    """

    prompt_blocks: int = 0
    decode_blocks: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def compared(
    vlm: VisionLanguageModel, samples: Sequence[PreparedSample], search: Search, repeats: int
) -> tuple[Outcome, Spent, Spent]:
    """A search alone and with sharing, taking turns; the first round warms up, counts and compares.

    Raises:
        AssertionError: a value or a token is not the same.
    """
    spent = {False: Spent(), True: Spent()}
    outcomes = {}
    for share in spent:
        with counted(vlm, spent[share]):
            outcomes[share] = search(vlm, samples, share)
    if outcomes[True] != outcomes[False]:
        raise AssertionError("sharing has changed a value or a token")
    for _ in range(repeats):
        for share in spent:
            start, cpu_start = time.perf_counter(), time.process_time()
            search(vlm, samples, share)
            spent[share].seconds.append(time.perf_counter() - start)
            spent[share].cpu_seconds.append(time.process_time() - cpu_start)
    return outcomes[True], spent[False], spent[True]


@contextmanager
def counted(vlm: VisionLanguageModel, spent: Spent) -> Iterator[None]:
    """Count every block that computes, at its attention, which a block that is passed through does not call."""

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if hidden_states.shape[1] > 1:
            spent.prompt_blocks += 1
        else:
            spent.decode_blocks += 1

    hooks = [b.self_attn.register_forward_pre_hook(count, with_kwargs=True) for b in vlm.decoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- how many samples a score needs -----------------------------------------------------------------------------------

DROPS = np.geomspace(0.05, 5.0, BLOCKS)
SPREAD = 3.0
TAU = 0.9
KEPT = 12


def simulated(accuracy: float, samples: int, seed: int = 0) -> dict[Method, pd.DataFrame]:
    """What removing each block costs each of many samples, of a model whose blocks matter to a known degree.

    A sample's margin, the logit of the right answer less that of its only rival, is normal with standard deviation 3
    and a mean that makes the whole model right on the share `accuracy`. Without block b it falls by an amount drawn
    for that sample: exponential with mean DROPS[b] (0.05 to 5, each 1.36 times the one before), so that most samples
    hardly notice and some collapse, and normal with deviation 0.25, so that some gain. The answer is right if the
    margin m is above 0, and its log-likelihood is -log(1 + exp(-m)): one margin decides both.
    """
    random = np.random.default_rng(seed)
    margin = statistics.NormalDist().inv_cdf(accuracy) * SPREAD + SPREAD * random.standard_normal((samples, 1))
    fall = DROPS * random.exponential(size=(samples, BLOCKS)) + 0.25 * random.standard_normal((samples, BLOCKS))
    without = margin - fall
    return {
        Method.ACCURACY_DROP: pd.DataFrame((margin > 0) * 1.0 - (without > 0)),
        Method.NLL: pd.DataFrame(np.logaddexp(0.0, -without) - np.logaddexp(0.0, -margin)),
    }


def samples_for_tau(values: pd.DataFrame, sizes: Sequence[int], draws: int) -> int | None:
    """The fewest samples of `sizes` at which two sets of that many rank the blocks alike, by Kendall's tau."""
    return next((size for size in sizes if split_half_tau(values, size, draws) >= TAU), None)


def samples_for_selection(values: pd.DataFrame, sizes: Sequence[int], draws: int) -> int | None:
    """The fewest samples at which nine in ten sets of that many select the KEPT blocks that matter most."""
    array, random = values.to_numpy(), np.random.default_rng(1)
    truth = select_blocks(as_scores(DROPS), KEPT, keep=())
    for size in sizes:
        drawn = (array[random.integers(len(array), size=size)].mean(axis=0) for _ in range(draws))
        if statistics.mean(select_blocks(as_scores(means), KEPT, keep=()) == truth for means in drawn) >= 0.9:
            return size
    return None


def as_scores(values: Any) -> BlockScores:
    return BlockScores(tuple(map(float, values)), (None,) * len(values))


# -- what is printed --------------------------------------------------------------------------------------------------


def header(options: argparse.Namespace, vlm: VisionLanguageModel, samples: Sequence[PreparedSample]) -> str:
    text = vlm.model.config.get_text_config(decoder=True)
    command = "python bench/importance.py" + (" --tiny" if options.tiny else "")
    lengths = " and ".join(str(sample.inputs.num_prompt_tokens) for sample in samples)
    return (
        f"`{command}` on {cpu_name()}, {options.threads} thread(s); torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.python_implementation()} {platform.python_version()}, float32.\n\n"
        f"MolmoE of width {text.hidden_size}, {text.num_hidden_layers} blocks, {text.num_experts} experts, random "
        f"weights; one batch of two prompts of {lengths} tokens, their vision features given. Median (minimum) of "
        f"{options.repeats} repeats, the variants taking turns.\n"
    )


def heading() -> str:
    names = [
        "search",
        "candidates",
        "alone",
        "shared",
        "ratio",
        "decode",
        "alone, s",
        "shared, s",
        "ratio",
        "CPU ratio",
    ]
    return "| " + " | ".join(names) + " |\n|---|" + "--:|" * (len(names) - 1)


def line(name: str, outcome: Outcome, alone: Spent, shared: Spent) -> str:
    """A row of the table: blocks run on prompts, blocks run on decoded tokens (never shared), and seconds."""
    assert alone.decode_blocks == shared.decode_blocks
    medians = [statistics.median(spent.seconds) for spent in (alone, shared)]
    cpu_medians = [statistics.median(spent.cpu_seconds) for spent in (alone, shared)]
    cells = [
        name,
        str(len(outcome)),
        str(alone.prompt_blocks),
        str(shared.prompt_blocks),
        f"{shared.prompt_blocks / alone.prompt_blocks:.3f}",
        str(alone.decode_blocks),
        *(f"{m:.2f} ({min(s.seconds):.2f})" for m, s in zip(medians, (alone, shared), strict=True)),
        f"{medians[1] / medians[0]:.2f}",
        f"{cpu_medians[1] / cpu_medians[0]:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def stability_table(draws: int, largest: int) -> str:
    """How many samples each kind of score needs, for models that are right seldom, often and nearly always."""
    steps = int(2 * np.log2(largest / 16))
    sizes = [round(16 * 2 ** (step / 2)) for step in range(steps + 1)]
    names = ["right answers", "measure", Method.ACCURACY_DROP.value, Method.NLL.value, "ratio"]
    lines = ["", "| " + " | ".join(names) + " |", "|--:|---|--:|--:|--:|"]
    for accuracy in (0.55, 0.75, 0.95):
        values = simulated(accuracy, samples=2 * largest)
        for measure, needed in (
            (f"two sets agree: tau {TAU}", samples_for_tau),
            (f"the {KEPT} right blocks in 9 of 10 sets", samples_for_selection),
        ):
            counts = [needed(values[method], sizes, draws) for method in (Method.ACCURACY_DROP, Method.NLL)]
            shown = [f"> {largest}" if count is None else str(count) for count in counts]
            ratio = f"{counts[0] / counts[1]:.1f}" if counts[0] and counts[1] else ""
            lines.append("| " + " | ".join([f"{accuracy:.0%}", measure, *shown, ratio]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

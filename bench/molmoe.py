"""MolmoE's speed on this machine: grouped experts against a plain loop over the same weights, and against the roofline.

    python bench/molmoe.py                  # a small shape, minutes on a CPU
    python bench/molmoe.py --shape 1b       # the real shape with random weights, for a GPU

Everything is timed in one process, the variants taking turns, so that their ratios hold when the machine's speed
drifts. On a GPU decoding is timed with the graph engine as well, whose step is captured once and replayed. The roofline
is measured in the same run: a large matrix product for FLOP/s, a large copy for bytes/s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from knobs.vision import VisionSetting
from workers.models import describe
from workers.models.adapter import VisionLanguageModel
from workers.models.byte_tokenizer import byte_tokenizer
from workers.models.capture import Capture, capture_on
from workers.models.engines import EagerEngine, Engine
from workers.models.graph_engine import GraphEngine
from workers.models.molmoe.checkpoint import load_published, save_published
from workers.models.molmoe.configuration import MolmoEConfig
from workers.probes import cpu_name

# Enough of the model to be bound by the same things, small enough for a CPU: 2 x 3 crops make a prompt of ~770 tokens.
SMALL = {
    "d_model": 512,
    "n_layers": 8,
    "n_heads": 8,
    "mlp_ratio": 1,
    "moe_num_experts": 32,
    "moe_top_k": 8,
    "vit_layers": [-1, -3],
    "vision_backbone": {
        "image_emb_dim": 256,
        "image_num_heads": 4,
        "image_num_key_value_heads": 4,
        "image_head_dim": 64,
        "image_num_layers": 6,
        "image_mlp_dim": 1024,
    },
    "text_config": {"num_hidden_layers": 8, "num_experts": 32, "num_experts_per_tok": 8},
}
TOP_K = (1, 2, 4, 8)
# Two of transformers' expert back-ends on our model, and the plain loop written here.
LOOP = "loop"
PLAIN = ("grouped_mm", "eager", LOOP)
GRAPHED = ("grouped_mm", "batched_mm")
DECODE_STEPS = 8


@dataclass(frozen=True)
class Variant:
    """One way to run the model: a back-end of the experts, or the plain loop, and an engine."""

    name: str
    experts: str
    engine: Engine


def variants(vlm: VisionLanguageModel, make_capture: Callable[[], Capture] | None) -> list[Variant]:
    """The variants that are compared; those with graphs only where something can capture them."""
    plain = [Variant(name, name, EagerEngine(vlm.model)) for name in PLAIN]
    if make_capture is None:
        return plain
    # An engine of its own for each, because one drops its graphs when the back-end changes.
    return plain + [
        Variant(f"{experts} graph", experts, GraphEngine(vlm.model, vlm.decoder, make_capture)) for experts in GRAPHED
    ]


class PlainLoop(nn.Module):
    """The published way: a Python loop over every expert, each with its own tokens; weights are shared, not copied."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden (tokens, width), index and weights (tokens, top-k) -> (tokens, width)."""
        out = torch.zeros_like(hidden)
        for expert in range(self.experts.num_experts):
            token, slot = torch.where(index == expert)
            if token.numel() == 0:
                continue
            gate, up = (hidden[token] @ self.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            made = (nn.functional.silu(gate) * up) @ self.experts.down_proj[expert].T
            out.index_add_(0, token, made * weights[token, slot, None])
        return out


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.load:
        print(growth_while_loading(options.load))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vlm, peak_load = built(options.shape, dtype, device)
    inputs = vlm.transfer(vlm.preprocess([Image.effect_noise((672, 448), 80).convert("RGB")], "What is it?", SIX_CROPS))
    with torch.inference_mode():
        features = vlm.encode_images(inputs.vision)
        flops_rate, bytes_rate = matmul_rate(device, dtype), copy_rate(device, dtype)
        loops = [PlainLoop(block.mlp.experts) for block in vlm.decoder.layers]
        print(header(options, device, dtype, vlm, inputs, flops_rate, bytes_rate))
        compared = variants(vlm, capture_on(device))
        tables: dict[str, list[str]] = {"prefill": [], "decode": []}
        for k in TOP_K:
            with vlm.knobs(moe_top_k=k):
                times = measured(vlm, compared, loops, inputs, features, options.repeats)
            # Prefill is the same with both engines.
            prefill = {name: [both[0] for both in times[name]] for name in PLAIN}
            decode = {name: [both[1] for both in values] for name, values in times.items()}
            tables["prefill"].append(cells(k, prefill, prefill_flops(vlm, inputs, k), flops_rate, 1e9, 0))
            tables["decode"].append(cells(k, decode, active_bytes(vlm, k), bytes_rate, 1e6, 1))
            print(f"top-k {k} measured", file=sys.stderr, flush=True)
    print("\nPrefill of the text, vision features given, ms:\n")
    print(head(PLAIN, "GFLOP", "best GFLOP/s"), *tables["prefill"], sep="\n")
    engines = "eager engine" + ("; graph: captured once, replayed" if len(compared) > len(PLAIN) else "")
    print(f"\nOne decode step, {engines}, ms:\n")
    print(head([variant.name for variant in compared], "MB", "best GB/s"), *tables["decode"], sep="\n")
    print(footer(device, vlm, peak_load))
    if options.shape == "small":
        print(loading(vlm))


SIX_CROPS = VisionSetting("image_size", "560x784")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", "1b"], default="small")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: 1)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of each variant (default: 9)")
    return parser.parse_args()


def built(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[VisionLanguageModel, int]:
    """The model with random weights, and the peak of memory in bytes while it was made."""
    card = describe("molmoe-1b", random_weights=True)
    config = dict(card.config) | (SMALL if shape == "small" else {})
    card.family.register_classes()
    before = peak_bytes(device)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config), dtype=dtype)
    model = model.to_empty(device=device)
    model.init_weights()
    model.eval().requires_grad_(False)
    processor = card.family.processor(
        byte_tokenizer(card.family.special_tokens), model.config.to_dict(), card.preprocessor
    )
    return VisionLanguageModel(model, processor, card, device), peak_bytes(device) - before


def measured(
    vlm: VisionLanguageModel,
    compared: Sequence[Variant],
    loops: list[PlainLoop],
    inputs: Any,
    features: Any,
    repeats: int,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of prefill and of a decode step for every variant; they take turns, after rounds that warm up.

    A variant that the engine could not run as it should has no times.
    """
    times: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in compared}
    # What captures does so in the first round and empties the allocator's cache by it, so that needs a second.
    warm_up = 1 + max(variant.engine.warm_up_rounds for variant in compared)
    for turn in range(warm_up + repeats):
        for variant in compared:
            vlm.engine = variant.engine
            restore = replaced(vlm, loops if variant.experts == LOOP else None)
            if variant.experts != LOOP:
                vlm.model.set_experts_implementation(variant.experts)
            both = timed(vlm, inputs, features)
            restore()
            if turn >= warm_up and both is not None:
                times[variant.name].append(both)
    return times


def cells(k: int, times: dict[str, list[float]], work: float, rate: float, unit: float, digits: int) -> str:
    """One line of a table: times of each variant, ratios to the loop, and how far from the floor."""
    median = {name: statistics.median(values) * 1e3 for name, values in times.items() if values}
    least = {name: min(values) * 1e3 for name, values in times.items() if values}
    floor = work / rate * 1e3
    ours = [name for name in times if name != LOOP]
    columns = [
        str(k),
        *(f"{median[name]:.{digits}f} ({least[name]:.{digits}f})" if name in median else "-" for name in times),
        *(f"{median[LOOP] / median[name]:.2f}" if name in median else "-" for name in ours),
        f"{work / unit:.1f}",
        f"{work / min(median[name] for name in ours if name in median) * 1e3 / 1e9:.1f}",
        *(f"{median[name] / floor:.2f}" if name in median else "-" for name in ours),
    ]
    return "| " + " | ".join(columns) + " |"


def head(variant_names: Sequence[str], work: str, rate: str) -> str:
    """The heading of a table."""
    ours = [name for name in variant_names if name != LOOP]
    names = [
        "top-k",
        *variant_names,
        *(f"{LOOP} / {name}" for name in ours),
        work,
        rate,
        *(f"{name} / floor" for name in ours),
    ]
    return "| " + " | ".join(names) + " |\n|" + "--:|" * len(names)


def replaced(vlm: VisionLanguageModel, loops: list[PlainLoop] | None) -> Callable[[], None]:
    """Put the plain loops in the place of the experts; the returned function puts the experts back."""
    if loops is None:
        return lambda: None
    blocks = vlm.decoder.layers
    for block, loop in zip(blocks, loops, strict=True):
        block.mlp.experts = loop

    def restore() -> None:
        for block, loop in zip(blocks, loops, strict=True):
            block.mlp.experts = loop.experts

    return restore


def timed(vlm: VisionLanguageModel, inputs: Any, features: Any) -> tuple[float, float] | None:
    """Seconds of prefill, and of one decode step (mean of a few); None if another engine than asked for decoded."""
    synchronize(vlm.device)
    start = time.perf_counter()
    token, state = vlm.prefill(inputs.prompt, inputs.vision, features, DECODE_STEPS + 1)
    synchronize(vlm.device)
    prefilled = time.perf_counter()
    for _ in range(DECODE_STEPS):
        token = vlm.decode_step(token, state)
    synchronize(vlm.device)
    done = time.perf_counter()
    return None if state.use.note else (prefilled - start, (done - prefilled) / DECODE_STEPS)


def prefill_flops(vlm: VisionLanguageModel, inputs: Any, k: int) -> float:
    """Floating-point operations of the text prefill: projections, attention, experts, router, head of one position.

    As torch's counter does, a multiply-add counts as two and causal attention as if it were full.
    """
    text = vlm.model.config.get_text_config(decoder=True)
    tokens, width = inputs.prompt["input_ids"].shape[1], text.hidden_size
    projections = 2 * tokens * width * (2 * width + 2 * text.num_key_value_heads * (width // text.num_attention_heads))
    attention = 4 * tokens * tokens * width
    experts = k * 2 * tokens * 3 * width * text.intermediate_size
    router = 2 * tokens * width * text.num_experts
    return float(text.num_hidden_layers * (projections + attention + experts + router) + 2 * width * text.vocab_size)


def active_bytes(vlm: VisionLanguageModel, k: int) -> int:
    """Bytes of weights that one decoded token needs: everything of the language model but the experts not chosen."""
    text = vlm.model.config.get_text_config(decoder=True)
    size = next(vlm.model.parameters()).element_size()
    expert = 3 * text.hidden_size * text.intermediate_size
    dense = sum(p.numel() for p in vlm.decoder.layers.parameters())
    dense -= text.num_hidden_layers * text.num_experts * expert
    head = sum(p.numel() for p in vlm.model.lm_head.parameters())
    return int(size * (dense + text.num_hidden_layers * k * expert + head))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best(lambda: a @ b, device)


def copy_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes read per second while a tensor far beyond the caches is summed, the best of several."""
    elements = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    # A copy reads and writes; decoding only reads, so both directions count as traffic.
    return 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source), device)


def best(run: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def loading(vlm: VisionLanguageModel) -> str:
    """Memory of a fresh process that loads these weights from a published checkpoint, float32 on disk."""
    lines = []
    weights = sum(p.numel() for p in vlm.model.parameters())
    for form in ("safetensors", "bin"):
        with tempfile.TemporaryDirectory() as folder:
            save_published(vlm.model, Path(folder), format=form)
            command = [sys.executable, __file__, "--load", folder]
            growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        lines.append(f"{growth / 1e6:.0f} MB from {form}")
    return (
        f"Loading {weights * 4 / 1e6:.0f} MB of float32 as {weights * 2 / 1e6:.0f} MB of bfloat16: the peak of a fresh "
        f"process grows by {', '.join(lines)}."
    )


def growth_while_loading(folder: Path) -> int:
    """Bytes by which the peak of this process grows while the checkpoint in `folder` is loaded as bfloat16."""
    config = MolmoEConfig(**json.loads((folder / "config.json").read_text()))
    before = peak_bytes(torch.device("cpu"))
    load_published(folder, config, torch.bfloat16)
    return peak_bytes(torch.device("cpu")) - before


def header(
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    vlm: VisionLanguageModel,
    inputs: Any,
    flops_rate: float,
    bytes_rate: float,
) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {options.threads} thread(s)"
    text = vlm.model.config.get_text_config(decoder=True)
    command = "python bench/molmoe.py" + (f" --shape {options.shape}" if options.shape != "small" else "")
    return "\n".join(
        [
            f"`{command}` on {name}; torch {torch.__version__}, {platform.python_implementation()} "
            f"{platform.python_version()}, {str(dtype).removeprefix('torch.')}.",
            "",
            f"Shape: width {text.hidden_size}, {text.num_hidden_layers} blocks, {text.num_experts} experts of "
            f"{text.intermediate_size}; prompt of {inputs.prompt['input_ids'].shape[1]} tokens (2 x 3 crops). "
            f"Matmul: {flops_rate / 1e9:.0f} GFLOP/s. Copy: {bytes_rate / 1e9:.1f} GB/s, both directions.",
            f"Median (minimum) of {options.repeats} repeats. `floor` is what the same FLOPs cost as one large matmul, "
            "or the same bytes as one large copy.",
        ]
    )


def footer(device: torch.device, vlm: VisionLanguageModel, peak_load: int) -> str:
    weights = sum(p.numel() * p.element_size() for p in vlm.model.parameters())
    place = "device" if device.type == "cuda" else "process"
    return (
        f"\nMemory: weights {weights / 1e6:.0f} MB; the peak grew by {peak_load / 1e6:.0f} MB while they were made; "
        f"peak of the {place} over the whole run {peak_bytes(device) / 1e6:.0f} MB."
    )


if __name__ == "__main__":
    main()

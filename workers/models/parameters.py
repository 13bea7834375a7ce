"""Numbers of weights by closed form: layers, blocks of a vision tower, and decoders from their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.models.family import Config
from workers.models.words import complete

# What transformers' configuration classes fill in where a config.json leaves it out; None follows from the others.
DENSE_DECODERS: Mapping[str, Config] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
}


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    """Weights of a linear layer; also of a convolution over patches that do not overlap."""
    return inputs * outputs + (outputs if bias else 0)


def layer_norm(width: int) -> int:
    """Scale and shift; an RMSNorm has `width` weights, the scale alone."""
    return 2 * width


def vision_block(width: int, mlp_width: int) -> int:
    """Weights of a block as all vision transformers here have it: two LayerNorms, attention, an MLP, biases everywhere.

    Attention is four projections of `width`, whether queries, keys and values are made by three layers or by one.
    """
    mlp = linear(width, mlp_width) + linear(mlp_width, width)
    return 2 * layer_norm(width) + 4 * linear(width, width) + mlp


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder-only language model with RMSNorms and gated MLPs, which is every one here.

    Attributes:
        blocks, width, heads, key_value_heads, head_width: of the transformer.
        embeddings, logits: rows of the token embedding and of the LM head.
        tied: whether the LM head is the embedding.
        mlp_width: of the MLP of a dense block.
        query_key_norms: weights of the norms of queries and keys in one block.
        input_bias, output_bias, mlp_bias: biases of queries, keys and values; of attention's output; of the MLP.
        dense_blocks: blocks without experts.
        experts, top_k, expert_width: of the other blocks.
    """

    blocks: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    embeddings: int
    logits: int
    tied: bool
    mlp_width: int
    dense_blocks: int
    query_key_norms: int = 0
    input_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0

    @property
    def weights(self) -> int:
        """All weights: blocks, final norm, embedding, and the LM head where it is one of its own."""
        return self._with_experts(self.experts)

    @property
    def active_weights(self) -> int:
        """Weights that a token passes through with the model's own top-k.

        That is attention, norms, routers and MLPs of all blocks, `top_k` experts of every block that has experts, the
        final norm, and embedding and LM head in full.
        """
        return self._with_experts(self.top_k)

    def _with_experts(self, experts: int) -> int:
        inside, shared = self.heads * self.head_width, self.key_value_heads * self.head_width
        attention = (
            linear(self.width, inside, self.input_bias)
            + 2 * linear(self.width, shared, self.input_bias)
            + linear(inside, self.width, self.output_bias)
            + self.query_key_norms
        )
        dense = 2 * linear(self.width, self.mlp_width, self.mlp_bias) + linear(
            self.mlp_width, self.width, self.mlp_bias
        )
        router = self.experts * self.width
        sparse = router + experts * 3 * self.width * self.expert_width
        head = 0 if self.tied else self.logits * self.width
        return (
            self.blocks * (attention + 2 * self.width)
            + self.dense_blocks * dense
            + (self.blocks - self.dense_blocks) * sparse
            + self.width
            + self.embeddings * self.width
            + head
        )


def text_config(config: Config, kind: str) -> dict[str, Any]:
    """The completed configuration of the language model in a composite one; `kind` is its `model_type` if not said."""
    text = complete({"model_type": kind}, config.get("text_config"), "text_config")
    return complete(DENSE_DECODERS.get(text["model_type"], {}), text, "text_config")


def dense_decoder(text: Config, tied: bool) -> Decoder | None:
    """A dense language model from its completed configuration; None for a `model_type` that is not known here."""
    kind = text.get("model_type")
    if kind not in DENSE_DECODERS:
        return None
    width, heads, blocks = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
    head_width = text.get("head_dim") or width // heads
    # Qwen2 has no switch for its biases, and none on the output.
    bias = bool(text.get("attention_bias"))
    return Decoder(
        blocks=blocks,
        width=width,
        heads=heads,
        key_value_heads=text.get("num_key_value_heads") or heads,
        head_width=head_width,
        embeddings=text["vocab_size"],
        logits=text["vocab_size"],
        tied=tied,
        mlp_width=text["intermediate_size"],
        dense_blocks=blocks,
        query_key_norms=2 * head_width if kind == "qwen3" else 0,
        input_bias=kind == "qwen2" or bias,
        output_bias=kind != "qwen2" and bias,
        mlp_bias=bool(text.get("mlp_bias")),
    )

"""What a configuration says of a stack of blocks: which of them others depend on, so that they cannot be skipped alone.

The entries are those of a language model's part of config.json, in transformers' spellings. A plan is made from them,
so nothing here needs weights; `knobs.blocks` asks the loaded model's configuration the same questions again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knobs.configuration import family_of

# Kinds of block that keep a state of fixed size, or none, and so do not know how long the sequence is.
_WITHOUT_LENGTH = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")

# Families of which no block can be skipped, and why.
_WHOLE: Mapping[str, str] = {
    "mllama_text_model": "no block of mllama can be skipped: some of its caches are as long as the image, not the text",
    "longcat_flash": "no block of longcat_flash can be skipped: each of them has two places in the cache",
    "zaya": "no block of zaya can be skipped: its routers hand their states from one block to the next",
}


@dataclass(frozen=True)
class Dependency:
    """A block that needs another one.

    Attributes:
        block, source: indices; `block` cannot run without `source`.
        what: what it takes from there, as words that follow "block 7 ".
    """

    block: int
    source: int
    what: str


@dataclass(frozen=True)
class BlockStack:
    """The blocks of one language model, as far as they depend on each other.

    Attributes:
        num_blocks: how many there are.
        attention: the blocks that keep keys and values, where others do not; at least one has to run, because the
            cache asks one how long it is. Empty where all do.
        dependencies: blocks that read what another one has made.
        needed: blocks that cannot be skipped, with what they do for the others, as words that follow "block 0 ".
        whole: why no block can be skipped; None where they can.
    """

    num_blocks: int
    attention: tuple[int, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    needed: tuple[tuple[int, str], ...] = ()
    whole: str | None = None

    def refuse(self, kept: Collection[int]) -> str | None:
        """Why these blocks, which the model has, cannot be run without the others; None if they can."""
        if len(set(kept)) == self.num_blocks:
            return None
        if self.whole is not None:
            return self.whole
        for needed in self.dependencies:
            if needed.block in kept and needed.source not in kept:
                return f"block {needed.block} {needed.what} block {needed.source}, so it cannot run without it"
        if missing := [(block, what) for block, what in self.needed if block not in kept]:
            return f"block {missing[0][0]} {missing[0][1]}, so it cannot be skipped"
        if self.attention and not set(self.attention).intersection(kept):
            return f"at least one attention block must run (blocks {_listed(self.attention)})"
        return None


def stack_of(text: Mapping[str, Any], num_blocks: int) -> BlockStack:
    """The stack that a language model's configuration describes.

    Args:
        text: its entries, with `layer_types` where blocks are of several kinds.
        num_blocks: blocks of the model.
    """
    kinds = text.get("layer_types") or ()
    attention = tuple(i for i, kind in enumerate(kinds) if kind not in _WITHOUT_LENGTH)
    return BlockStack(
        num_blocks,
        attention if len(attention) < len(kinds) else (),
        (*_key_value_sources(text, num_blocks), *_index_sources(text)),
        _needed(text, num_blocks),
        _WHOLE.get(family_of(text)),
    )


def _key_value_sources(text: Mapping[str, Any], num_blocks: int) -> list[Dependency]:
    what = "reads the keys and values of"
    if sources := text.get("kv_source_layers"):
        return [Dependency(block, source, what) for block, source in enumerate(sources) if source != block]
    shared, kinds = text.get("num_kv_shared_layers"), text.get("layer_types")
    if not shared or not kinds:
        return []
    # The last blocks share; each reads from the last block of its own kind before them.
    first = num_blocks - int(shared)
    own: Sequence[str] = kinds[:first]
    last = {kind: block for block, kind in enumerate(own)}
    return [Dependency(block, last[kinds[block]], what) for block in range(first, num_blocks) if kinds[block] in last]


def _index_sources(text: Mapping[str, Any]) -> list[Dependency]:
    found: list[Dependency] = []
    source: int | None = None
    kinds = text.get("layer_types") or ()
    for block, index in enumerate(text.get("indexer_types") or ()):
        if block < len(kinds) and kinds[block] in _WITHOUT_LENGTH:
            continue
        if index != "shared":
            source = block
        elif source is not None:
            found.append(Dependency(block, source, "attends to the tokens chosen by"))
    return found


def _needed(text: Mapping[str, Any], num_blocks: int) -> tuple[tuple[int, str], ...]:
    if type(size := text.get("n_layers_per_attn_res_block")) is int:
        return tuple((block, "begins a new residual stream") for block in range(0, num_blocks, size))
    kinds = text.get("layer_types") or ()
    if family_of(text) == "qwen4_exp" and "indexed_attention" in kinds:
        return ((kinds.index("indexed_attention"), "keeps the positions for all indexed attention"),)
    return ()


def _listed(blocks: Sequence[int]) -> str:
    shown = ", ".join(map(str, blocks[:8]))
    return f"{shown}, ..." if len(blocks) > 8 else shown

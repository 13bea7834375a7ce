"""A tokenizer that needs no file, for models with random weights: one token per byte, plus the family's own tokens."""

from __future__ import annotations

from typing import Any

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
STANDARD_TOKENS = (PAD, BEGIN, END)


def byte_tokenizer(special_tokens: tuple[str, ...]) -> Any:
    """A byte-level BPE whose only merge is the double newline, which the published tokenizers have as well.

    Args:
        special_tokens: tokens of the family, given ids after the 257 byte symbols and the three standard ones.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    newline = "Ċ"
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary[newline * 2] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*STANDARD_TOKENS, *special_tokens)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, padding_side="left"
    )


def token_ids(special_tokens: tuple[str, ...]) -> dict[str, int]:
    """The ids that `byte_tokenizer` gives, by arithmetic: planning needs them without loading a tokenizer."""
    return {token: 257 + i for i, token in enumerate((*STANDARD_TOKENS, *special_tokens))}

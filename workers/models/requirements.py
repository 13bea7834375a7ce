"""What the adapter needs of a transformers model: stages that can be run one by one, and blocks that can be skipped."""

from __future__ import annotations

from typing import Any

# Where text models that name themselves as their decoder keep the stack of blocks.
_DOWN = ("model", "decoder")


def require_stages(model: Any) -> None:
    """Refuse a model whose stages cannot be told apart.

    Raises:
        ValueError: it is an encoder-decoder, or its images cannot be encoded apart from its text.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True).is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder; only decoders that read images as tokens are supported")
    if not hasattr(model.base_model, "get_image_features"):
        raise ValueError(
            f"{kind} has no get_image_features, so its vision tower cannot be run apart from its language model"
        )


def stack_of_blocks(model: Any) -> Any:
    """The module whose `layers` are the transformer blocks of the language model.

    Raises:
        ValueError: there is none that can be found.
    """
    found = model.get_decoder()
    for _ in range(3):
        if hasattr(found, "layers"):
            return found
        found = next((getattr(found, part) for part in _DOWN if hasattr(found, part)), found)
    raise ValueError(f"{type(found).__name__} has no stack of blocks (layers) that could be run in part")

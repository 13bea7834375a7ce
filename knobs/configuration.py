"""The entries of a language model's configuration, the same whether they come from config.json or a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def entries_of(config: Any) -> dict[str, Any]:
    """The entries of a transformers configuration object; of a model that has several, the language model's."""
    text = config.get_text_config(decoder=True)
    # Some classes work the kinds of their blocks out and do not write them down.
    return {**text.to_dict(), "layer_types": getattr(text, "layer_types", None)}


def family_of(text: Mapping[str, Any]) -> str:
    """The model type of a language model, without the ending that tells it from the model it is part of."""
    return str(text.get("model_type", "")).removesuffix("_text")

"""Sizes of networks and steps of image pipelines as lines of text, from configurations in transformers' words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knobs.routing import routing_of
from workers.models.family import Config

# What a configuration may say of a transformer, in the order in which it is told, under the names it goes by.
_SIZES = (
    ("{} blocks", ("num_hidden_layers", "depth", "num_layers", "n_layers", "n_layer")),
    ("width {}", ("hidden_size", "embed_dim", "d_model", "n_embd")),
    ("{} heads", ("num_attention_heads", "num_heads", "n_heads", "n_head")),
    ("{} key/value heads", ("num_key_value_heads",)),
    ("MLP {}", ("intermediate_size", "ffn_dim")),
    ("MLP {} of each expert", ("moe_intermediate_size",)),
    ("patches of {} px", ("patch_size",)),
    ("images of {} px", ("image_size",)),
)

_STATISTICS: Mapping[tuple[float, ...], str] = {
    (0.48145466, 0.4578275, 0.40821073, 0.26862954, 0.26130258, 0.27577711): " (OpenAI CLIP)",
    (0.485, 0.456, 0.406, 0.229, 0.224, 0.225): " (ImageNet)",
}

UNKNOWN = "not known"


class WrongEntry(ValueError):
    """An entry of a configuration that is of another kind than it should be; the message names it."""


def complete(defaults: Config, given: Any, within: str = "") -> dict[str, Any]:
    """A configuration with `defaults` for what it leaves out or at None, as transformers reads it.

    Args:
        within: key of the configuration inside another one, for messages.

    Raises:
        WrongEntry: an entry is of another kind than its default.
    """
    entries = given if isinstance(given, Mapping) else {}
    said = {name: value for name, value in entries.items() if value is not None}
    for name in defaults.keys() & said.keys():
        if not _alike(said[name], defaults[name]):
            place = f"{within}.{name}" if within else name
            raise WrongEntry(f"{place} is {said[name]!r}, which is not of the kind of {defaults[name]!r}")
    return {**defaults, **said}


def _alike(value: Any, default: Any) -> bool:
    """Whether a value can stand for a default: numbers for numbers, several numbers for one and the reverse."""
    if isinstance(default, int | float | list | tuple):
        entries = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(entry, int | float) for entry in entries)
    return default is None or isinstance(value, type(default)) or not isinstance(default, str)


def whole(config: Config, *keys: str) -> int:
    """The whole number that stands under nested keys.

    Raises:
        KeyError: one of them is missing.
        WrongEntry: something else stands there, or on the way.
    """
    found: Any = config
    for depth, key in enumerate(keys):
        if not isinstance(found, Mapping):
            raise WrongEntry(f"{'.'.join(keys[:depth])} is {found!r}, not an object with {key}")
        found = found[key]
    if type(found) is not int and not (isinstance(found, float) and found.is_integer()):
        raise WrongEntry(f"{'.'.join(keys)} is {found!r}, not a whole number")
    return int(found)


def side(value: int | Sequence[int]) -> int:
    """Pixels of one side of a square that a configuration writes as one number or as two."""
    return value if isinstance(value, int) else value[0]


def sizes(part: Config) -> str:
    """A transformer in one line, as far as its configuration says anything.

    For example `24 blocks, width 2048, 32 heads, 32 key/value heads, MLP 8192`.
    """
    words = []
    for phrase, names in _SIZES:
        value = next((part[name] for name in names if part.get(name) is not None), None)
        if isinstance(value, list | tuple) and value and set(value) == {value[0]}:
            value = value[0]
        if type(value) is int:
            words.append(phrase.format(value))
    return ", ".join(words) or f"sizes {UNKNOWN}"


def language_sizes(text: Config, tied: bool | None) -> str:
    """As `sizes`, with the kind of the model, its experts and vocabulary, and its LM head unless `tied` is None."""
    words = [f"{text.get('model_type', UNKNOWN)}: {sizes(text)}"]
    if (routing := routing_of(text)) is not None:
        words.append(f"{routing.num_experts} experts in a block, {routing.moe_top_k} for a token")
    if "vocab_size" in text:
        words.append(f"vocabulary {text['vocab_size']}")
    if tied is not None:
        words.append(f"LM head {'tied to the embedding' if tied else 'of its own'}")
    return ", ".join(words)


def filter_name(resample: int) -> str:
    """Pillow's name of a resampling filter, such as LANCZOS for 1."""
    from PIL import Image  # planning without a card needs no Pillow

    return Image.Resampling(resample).name


def pixel_steps(values: Config) -> list[str]:
    """Rescaling and normalisation, as far as an image processor is set to do them."""
    steps = []
    if values["do_rescale"]:
        factor = values["rescale_factor"]
        steps.append("rescale by 1/255" if abs(255 * factor - 1) < 1e-9 else f"rescale by {factor:g}")
    if values["do_normalize"]:
        steps.append(normalise_step(values["image_mean"], values["image_std"]))
    return steps


def normalise_step(mean: float | Sequence[float], std: float | Sequence[float]) -> str:
    """The normalisation, of all channels alike or of each, with the name of its statistics where they have one."""
    means, deviations = _channels(mean), _channels(std)
    known = _STATISTICS.get((*means, *deviations), "")
    return f"normalise: mean {_numbers(means)}, std {_numbers(deviations)}{known}"


def _channels(value: float | Sequence[float]) -> tuple[float, ...]:
    return (value,) if isinstance(value, int | float) else tuple(value)


def _numbers(channels: tuple[float, ...]) -> str:
    """One number where red, green and blue are treated alike, else three."""
    distinct = channels[:1] if len(set(channels)) == 1 else channels
    return " ".join(f"{value:.8g}" for value in distinct)

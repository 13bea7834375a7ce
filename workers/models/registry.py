"""From the name of a model to everything a plan may know of it: no torch, no weights, no download but small files."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from knobs.card import Card
from knobs.configuration import entries_of, family_of
from knobs.routing import Routing, routing_of
from knobs.stack import BlockStack, stack_of
from knobs.vision import UnknownGeometry, VisionGeometry
from workers.errors import ModelError
from workers.models import generic, internvl, qwen3_vl_moe, smolvlm
from workers.models.byte_tokenizer import token_ids
from workers.models.family import Config, Family, Registered
from workers.models.molmoe import family as molmoe
from workers.models.words import WrongEntry

# The whole list of families; a new one is a file and a line here.
FAMILIES: tuple[Family, ...] = (molmoe.FAMILY, smolvlm.FAMILY, internvl.FAMILY, qwen3_vl_moe.FAMILY)

REGISTERED: Mapping[str, Registered] = {name: r for family in FAMILIES for name, r in family.registered.items()}

# Keys of a preprocessor_config.json that say which class reads it, not what it does.
_CLASS_KEYS = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "_processor_class")

# Language models whose every block is attention and needs no other: whatever their config.json leaves out decides
# nothing about which blocks and experts there are.
PLAIN_LANGUAGE_MODELS = (
    *("cohere2", "gemma", "gemma2", "gemma3", "glm4v", "granite", "llama", "mistral", "olmo2", "opt", "phi", "phi3"),
    *("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl"),
)

RANDOM_SEED = 0

# Configuration, image processor, tokenizer and chat template.
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Checkpoint:
    """Where weights and configuration come from: a local folder, a hub repository, or neither (registered name)."""

    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model before it is loaded.

    Attributes:
        name: as the user wrote it.
        family: see `workers.models.family`.
        checkpoint: where its files are.
        config, preprocessor: contents of config.json and preprocessor_config.json, or what is registered.
        fingerprint: digest of everything that decides what it computes, weights included.
        stack: transformer blocks of the language model, and which of them depend on each other.
        routing: its routers; None for a dense model.
        geometry: its vision arithmetic.
    """

    name: str
    family: Family
    checkpoint: Checkpoint
    config: Config
    preprocessor: Config
    fingerprint: str
    stack: BlockStack
    routing: Routing | None
    geometry: VisionGeometry

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the language model."""
        return self.stack.num_blocks

    @property
    def num_experts(self) -> int | None:
        """Routed experts per block; None for a dense model."""
        return None if self.routing is None else self.routing.num_experts

    @property
    def moe_top_k(self) -> int | None:
        """How many experts fire per token by default; None for a dense model, and where blocks differ."""
        return None if self.routing is None else self.routing.moe_top_k

    def card(self) -> Card:
        """What its family can say of it in words and numbers, from configuration and image processor alone.

        Raises:
            ModelError: an entry of the configuration is of a kind that says nothing.
        """
        try:
            return self.family.card(self.config, self.preprocessor)
        except WrongEntry as error:
            raise ModelError(f"{self.name}: in its configuration {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{self.name}: its configuration cannot be described ({_in_words(error)})") from error


def family_named(name: str) -> Family:
    """The family of this name; `generic` for what has no file of its own."""
    return next((family for family in FAMILIES if family.name == name), generic.FAMILY)


def describe(
    name: str,
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    base_folder: Path | None = None,
    offline: bool = False,
) -> ModelCard:
    """What is known of a model by registry name, local folder or hub id.

    Args:
        checkpoint: folder or hub id to use instead of what the name says.
        revision: branch, tag or commit on the hub; the default branch if None.
        random_weights: only the configuration matters, so a registered name needs no file.
        base_folder: where relative folders start; the current folder is tried next.
        offline: use what is registered or cached and never the network.

    Imports no torch, except for a config.json that leaves something to the defaults of transformers: the number of
    blocks, or, of a family that has no file here, which of its blocks are attention and how its experts are chosen.

    Raises:
        ModelError: no such model, or its files say nothing that can be used.
    """
    place = checkpoint or name
    folder = _folder(place, base_folder)
    registered = REGISTERED.get(place)
    if folder is not None:
        return _from_folder(name, folder, random_weights)
    if registered is not None:
        if random_weights or registered.hub_id is None:
            return _from_registered(name, registered, Checkpoint(), None)
        located = _locate_on_hub(registered.hub_id, revision, offline)
        return _from_registered(name, registered, located, f"hub:{located.hub_id}@{located.revision}")
    if "/" in place and not place.startswith((".", "/", "~")):
        return _from_hub(name, place, revision, random_weights, offline)
    raise ModelError(_unknown(place))


def _folder(place: str, base_folder: Path | None) -> Path | None:
    for base in filter(None, (base_folder, Path.cwd())):
        candidate = (base / Path(place).expanduser()).resolve()
        if candidate.is_dir() and (place not in REGISTERED or (candidate / "config.json").is_file()):
            return candidate
    return None


def _unknown(place: str) -> str:
    if "/" in place:
        return f"model folder {place} does not exist"
    near = difflib.get_close_matches(place, REGISTERED, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    return f"unknown model {place!r}{hint} (registered: {', '.join(sorted(REGISTERED))}; or a folder, or a hub id a/b)"


def _from_registered(name: str, registered: Registered, located: Checkpoint, fingerprint: str | None) -> ModelCard:
    family = family_named(registered.family)
    ids = token_ids(family.special_tokens)
    config = {"model_type": family.model_types[0], **registered.config}
    if located.hub_id is None:
        # Random weights come with the byte tokenizer, so the configuration has to name its ids.
        end = {"pad_token_id": 257, "bos_token_id": 258, "eos_token_id": 259}
        config |= {**family.token_ids(ids), "text_config": {**registered.config["text_config"], **end}}
        fingerprint = f"random:{RANDOM_SEED}:{_digest([config, registered.preprocessor])}"
    assert fingerprint is not None
    return _card(name, family, located, config, registered.preprocessor, fingerprint)


def _from_folder(name: str, folder: Path, random_weights: bool) -> ModelCard:
    config = _json(folder / "config.json", f"model folder {folder} has no config.json, so it is not a checkpoint")
    family = _family_of(config, str(folder))
    preprocessor = read_preprocessor(Checkpoint(folder=folder))
    if random_weights:
        # The tokenizer and its chat template still decide the prompts.
        fingerprint = f"random:{RANDOM_SEED}:{_digest_of_files(folder, _SMALL_FILES)}"
    else:
        suffixes = family.weight_suffixes
        if not any(path.suffix in suffixes for path in folder.iterdir()):
            kinds = " or ".join(f"*{suffix}" for suffix in suffixes)
            raise ModelError(f"model folder {folder} has no {kinds}; for random weights write weights: random")
        fingerprint = f"files:{_digest_of_files(folder, (*_SMALL_FILES, *suffixes))}"
    return _card(name, family, Checkpoint(folder=folder), config, preprocessor, fingerprint)


def _from_hub(name: str, hub_id: str, revision: str | None, random_weights: bool, offline: bool) -> ModelCard:
    located = _locate_on_hub(hub_id, revision, offline)
    config = _hub_json(located, "config.json", offline)
    if config is None:
        raise ModelError(f"{hub_id} has no config.json that can be read{' (offline)' if offline else ''}")
    family = _family_of(config, hub_id)
    preprocessor = read_preprocessor(located, offline)
    if random_weights:
        fingerprint = f"random:{RANDOM_SEED}:{_digest([config, preprocessor])}"
    else:
        fingerprint = f"hub:{hub_id}@{located.revision}"
    return _card(name, family, located, config, preprocessor, fingerprint)


def _card(
    name: str, family: Family, located: Checkpoint, config: Config, preprocessor: Config, fingerprint: str
) -> ModelCard:
    text = _language_model(family, config)
    blocks = text.get("num_hidden_layers")
    if type(blocks) is not int:
        raise ModelError(f"{name}: config.json does not say how many blocks the language model has (num_hidden_layers)")
    try:
        # Bare weights can be used from Python, but nothing is known of how they want their images.
        known = preprocessor or family is generic.FAMILY  # of which nothing is known with a file either
        geometry = family.geometry(config, preprocessor) if known else UnknownGeometry(_no_preprocessor(located))
    except WrongEntry as error:
        raise ModelError(f"{name}: in its configuration {error}; {family.name} needs it for images") from error
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{name}: its configuration lacks {error} that {family.name} needs for images") from error
    stack, routing = stack_of(text, blocks), routing_of(text)
    return ModelCard(name, family, located, config, preprocessor, fingerprint, stack, routing, geometry)


def _no_preprocessor(located: Checkpoint) -> str:
    place, remedy = "the folder", "copy it from the base model"
    if located.folder is None:
        place, remedy = "its repository", "use a folder that has the base model's"
    return f"{place} has no preprocessor_config.json, so nothing is known of how it cuts images; {remedy}"


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _language_model(family: Family, config: Config) -> Config:
    """The language model's part of a configuration, with the defaults that decide which blocks and experts it has."""
    text = {"model_type": config.get("model_type"), **family.language_model(config)}
    known = family is not generic.FAMILY or family_of(text) in PLAIN_LANGUAGE_MODELS
    routing = routing_of(text)
    enough = type(text.get("num_hidden_layers")) is int and (routing is None or routing.renormalization is not None)
    return text if known and enough else _with_defaults(config) or text


def _with_defaults(config: Config) -> Config | None:
    """The same with what a checkpoint leaves out because it is a default; None if transformers does not know it.

    Imports torch, the one place in planning that does: every configuration class of transformers comes with it, and
    the defaults stand nowhere else. So it is called only where they may decide something.
    """
    from transformers import AutoConfig

    try:
        return entries_of(AutoConfig.for_model(**config))
    except Exception:  # transformers raises whatever it meets for a configuration that it cannot read
        return None


def _family_of(config: Config, place: str) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{place}: config.json has no model_type")
    found = next((family for family in FAMILIES if model_type in family.model_types), None)
    if found is None and "vision_config" not in config and not _reads_images(model_type):
        raise ModelError(f"{place}: model_type {model_type} is not a vision-language model (no vision_config)")
    return found or generic.FAMILY


def _reads_images(model_type: str) -> bool:
    """Whether transformers lists a family among the vision-language models, some of which have no vision_config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(missing) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


def read_preprocessor(located: Checkpoint, offline: bool = False) -> dict[str, Any]:
    """Keyword arguments of a checkpoint's image processor; empty where it has none.

    They stand in a file of their own, or inside the file of the whole processor that newer releases write.
    """
    for file, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if located.folder is not None:
            path = located.folder / file
            content = _json(path, f"{path} does not exist") if path.is_file() else None
        else:
            content = _hub_json(located, file, offline)
        if content and key is not None:
            content = content.get(key)
        if content:
            return {k: v for k, v in content.items() if k not in _CLASS_KEYS}
    return {}


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _digest_of_files(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Digest of the content of the files a checkpoint consists of; names count, times and places do not."""
    digests = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes):
        now = path.stat()
        content = _digest_of_file(path, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
        digests.append((path.name, content))
    return _digest(digests)


@cache
def _digest_of_file(path: Path, *_: int) -> str:
    """SHA-256 of a file, once per process for the same size, times and inode: weights take a minute to read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate_on_hub(hub_id: str, revision: str | None, offline: bool) -> Checkpoint:
    """The commit that a revision means now; offline, the commit in the local cache, else the revision as written."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if not (offline or HF_HUB_OFFLINE):
        try:
            return Checkpoint(hub_id=hub_id, revision=HfApi().model_info(hub_id, revision=revision, timeout=10).sha)
        except RepositoryNotFoundError:
            raise ModelError(f"the hub has no model {hub_id}, or it is private and no token is set") from None
        except RevisionNotFoundError:
            raise ModelError(f"{hub_id} has no revision {revision}") from None
        except (HfHubHTTPError, OSError):
            pass  # unreachable: what is cached serves
        except Exception as error:  # the HTTP client's own transport errors share no base with the above
            if "connect" not in f"{type(error).__name__} {error}".lower():
                raise ModelError(f"{hub_id} cannot be looked up: {error}") from None
    cached = _cached_commit(hub_id, revision or "main")
    if cached is None and not offline:
        raise ModelError(f"{hub_id} is not in the local cache and the Hugging Face hub cannot be reached")
    return Checkpoint(hub_id=hub_id, revision=cached or revision or "main")


def _cached_commit(hub_id: str, revision: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _hub_json(located: Checkpoint, file: str, offline: bool) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    assert located.hub_id is not None
    try:
        path = hf_hub_download(located.hub_id, file, revision=located.revision, local_files_only=offline)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except HfHubHTTPError as error:  # gated, for one: the repository is listed, its files are not given out
        raise ModelError(f"{located.hub_id}: {file} cannot be downloaded: {str(error).splitlines()[0]}") from None
    return _json(Path(path), f"{located.hub_id} has no {file}")

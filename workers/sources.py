"""Say where a data set is and what its columns are called: presets, a sweep's entry, and the source both give."""

import difflib
import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from workers.errors import DatasetError
from workers.scorers import SCORERS, scorer

PRESET_FILE = Path(__file__).resolve().parents[1] / "sweeps" / "datasets.yaml"
DEFAULT_PROMPT = "{question}"
# Local files carry no split of their own; this one only names them.
DEFAULT_LOCAL_SPLIT = "test"


@dataclass(frozen=True)
class Columns:
    """What the data set calls its columns; the optional ones may be absent.

    Attributes:
        id: unique per row; without it the row index is used, so that reordering the file changes the samples.
        image_id: shared by the questions about one image; without it the image's content is used.
    """

    image: str = "image"
    question: str = "question"
    answers: str = "answers"
    id: str | None = None
    image_id: str | None = None
    question_type: str | None = None

    def named(self) -> dict[str, str]:
        """The columns the data set must have, by role."""
        return {field.name: name for field in fields(self) if (name := getattr(self, field.name)) is not None}


@dataclass(frozen=True)
class DatasetSource:
    """Where a data set is, how to read and how to score it; small enough to travel with every task.

    Attributes:
        name: shown in results: preset name, hub id or file stem.
        path: absolute local file, folder or glob; None for the hub.
        metric: a key of `workers.scorers.SCORERS`.
        prompt: template with `{question}`.
    """

    name: str
    split: str
    path: str | None
    hub_id: str | None
    config: str | None
    revision: str | None
    columns: Columns
    metric: str
    prompt: str

    def prompt_for(self, question: str) -> str:
        """The text sent to the model, before its chat template."""
        return self.prompt.replace("{question}", question)

    @property
    def place(self) -> str:
        """Where the data set is, for messages."""
        if self.path is not None:
            return self.path
        config = f" ({self.config})" if self.config else ""
        return f"hub data set {self.hub_id}{config}"


@dataclass(frozen=True)
class Preset:
    """A data set the project knows by name; everything a sweep's entry may leave out.

    Attributes:
        path: absolute local file, folder or glob, or None for the hub.
        max_new_tokens: cap on the answer, in tokens.
    """

    name: str
    path: str | None
    hub_id: str | None
    config: str | None
    revision: str | None
    split: str
    columns: Columns
    metric: str
    prompt: str
    max_new_tokens: int


def presets(path: Path | None = None) -> dict[str, Preset]:
    """The presets of a YAML file, by default the project's own. Raises DatasetError naming file, preset and key."""
    file = PRESET_FILE if path is None else path
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"{file}: cannot read the data set presets ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise DatasetError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise DatasetError(f"{file}: must map preset names to their settings")
    return {str(name): _preset(file, str(name), entry) for name, entry in document.items()}


def _preset(file: Path, name: str, entry: object) -> Preset:
    where = f"{file}: {name}"
    if not isinstance(entry, dict):
        raise DatasetError(f"{where}: must be a mapping")
    allowed = {field.name: field.type for field in fields(Preset) if field.name != "name"}
    for key in entry:
        if key not in allowed:
            raise DatasetError(f"{where}.{key}: unknown key{nearest(str(key), allowed)}")
    for key in ("split", "metric", "max_new_tokens"):
        if key not in entry:
            raise DatasetError(f"{where}: {key} is missing")
    for key, value in entry.items():
        if key == "max_new_tokens":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DatasetError(f"{where}.max_new_tokens: must be a whole number of at least 1, not {value!r}")
        elif key != "columns" and not isinstance(value, str):
            raise DatasetError(f"{where}.{key}: must be text, not {value!r}")
    if ("path" in entry) == ("hub_id" in entry):
        raise DatasetError(f"{where}: give either path or hub_id")
    _check_metric(where, entry["metric"])
    prompt = entry.get("prompt", DEFAULT_PROMPT)
    _check_prompt(where, prompt)
    return Preset(
        name=name,
        # As a pattern or a path, relative to the presets' own folder.
        path=str(file.resolve().parent / entry["path"]) if "path" in entry else None,
        hub_id=entry.get("hub_id"),
        config=entry.get("config"),
        revision=entry.get("revision"),
        split=entry["split"],
        columns=_columns(where, entry.get("columns"), Columns()),
        metric=entry["metric"],
        prompt=prompt,
        max_new_tokens=entry["max_new_tokens"],
    )


def resolve_source(
    *,
    name: str,
    base_folder: Path,
    split: str | None = None,
    path: str | None = None,
    hub_id: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, Any] | None = None,
    metric: str | None = None,
    prompt: str | None = None,
) -> DatasetSource:
    """Complete a sweep's data set entry from the preset of that name, or from defaults if there is none.

    A relative path is looked up in `base_folder` (the sweep file's), then in the current folder. Reads no data.
    Raises DatasetError if the entry does not say where the data are, or how to score them.
    """
    where = f"data set {name!r}"
    if path is not None and hub_id is not None:
        raise DatasetError(f"{where}: give either path or hub_id, not both")
    known = presets()
    preset = known.get(name)
    if path is None and hub_id is None:
        if preset is not None:
            path, hub_id = preset.path, preset.hub_id
            config, revision = config or preset.config, revision or preset.revision
        elif _matches(Path(name), base_folder) is not None:
            path = name
            name = Path(name).stem
        elif name.count("/") == 1:
            hub_id = name
        else:
            raise DatasetError(
                f"{where}: neither a preset{nearest(name, known)} nor a hub id (owner/name); local files need `path`"
            )
    if path is not None:
        found = _matches(Path(path), base_folder)
        if found is None:
            tried = dict.fromkeys(str(folder / path) for folder in (base_folder.absolute(), Path.cwd()))
            raise DatasetError(f"{where}: no file or folder {' or '.join(tried)}")
        path = found
        for key, value in (("config", config), ("revision", revision)):
            if value is not None:
                raise DatasetError(f"{where}: {key} belongs to a hub data set, but this one is local ({path})")
        split = split or (preset.split if preset else DEFAULT_LOCAL_SPLIT)
    else:
        split = split or (preset.split if preset else None)
        if split is None:
            raise DatasetError(f"{where}: a hub data set needs `split`, for instance split: validation")
    metric = metric or (preset.metric if preset else None)
    if metric is None:
        raise DatasetError(f"{where}: `metric` is missing (allowed: {', '.join(SCORERS)})")
    _check_metric(where, metric)
    prompt = prompt or (preset.prompt if preset else DEFAULT_PROMPT)
    _check_prompt(where, prompt)
    return DatasetSource(
        name=name,
        split=split,
        path=path,
        hub_id=hub_id,
        config=config,
        revision=revision,
        columns=_columns(where, columns, preset.columns if preset else Columns()),
        metric=metric,
        prompt=prompt,
    )


def _matches(path: Path, base_folder: Path) -> str | None:
    """The absolute form of a file, folder or glob that exists, or None."""
    for folder in (base_folder.absolute(), Path.cwd()):
        # Links are kept: a downloaded file is often a link to one that has lost its ending.
        candidate = os.path.abspath(folder / path.expanduser())
        if os.path.exists(candidate):
            return candidate
        pattern = str(path) if path.is_absolute() else os.path.join(glob.escape(str(folder)), path)
        if glob.has_magic(str(path)) and glob.glob(pattern, recursive=True):
            return pattern
    return None


def _columns(where: str, given: object, defaults: Columns) -> Columns:
    if given is None:
        return defaults
    if not isinstance(given, Mapping):
        raise DatasetError(f"{where}.columns: must map roles to column names")
    roles = [field.name for field in fields(Columns)]
    for role, name in given.items():
        if role not in roles:
            raise DatasetError(f"{where}.columns.{role}: unknown role{nearest(str(role), roles)}")
        required = role in ("image", "question", "answers")
        if not (isinstance(name, str) and name) and (required or name is not None):
            raise DatasetError(f"{where}.columns.{role}: must be a column name, not {name!r}")
    return replace(defaults, **given)


def _check_metric(where: str, metric: str) -> None:
    try:
        scorer(metric)
    except ValueError as error:
        raise DatasetError(f"{where}.metric: {error}") from None


def _check_prompt(where: str, prompt: str) -> None:
    if "{question}" not in prompt:
        raise DatasetError(f"{where}.prompt: must contain {{question}}, else every sample asks the same")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    choices = list(allowed)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{hint} (there is: {', '.join(choices)})"

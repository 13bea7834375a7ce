"""Complete what a sweep says of a data set: the presets, and the source that a sweep's entry and its preset give."""

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from workers.errors import DatasetError
from workers.scorers import SCORERS
from workers.sources import (
    Columns,
    DatasetSource,
    ImageTable,
    check_metric,
    check_prompt,
    columns_of,
    image_table_of,
    nearest,
)

PRESET_FILE = Path(__file__).resolve().parents[1] / "sweeps" / "datasets.yaml"
DEFAULT_PROMPT = "{question}"
# Local files carry no split of their own; this one only names them.
DEFAULT_LOCAL_SPLIT = "test"


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
    images: ImageTable | None = None


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
        elif key not in ("columns", "images") and not isinstance(value, str):
            raise DatasetError(f"{where}.{key}: must be text, not {value!r}")
    if ("path" in entry) == ("hub_id" in entry):
        raise DatasetError(f"{where}: give either path or hub_id")
    check_metric(where, entry["metric"])
    columns = columns_of(where, entry.get("columns"), Columns())
    prompt = entry.get("prompt", DEFAULT_PROMPT)
    check_prompt(where, prompt, columns)
    images = image_table_of(where, entry.get("images"), None, columns)
    if images is not None and images.path is not None:
        images = replace(images, path=str(file.resolve().parent / images.path))
    return Preset(
        name=name,
        # As a pattern or a path, relative to the presets' own folder.
        path=str(file.resolve().parent / entry["path"]) if "path" in entry else None,
        hub_id=entry.get("hub_id"),
        config=entry.get("config"),
        revision=entry.get("revision"),
        split=entry["split"],
        columns=columns,
        metric=entry["metric"],
        prompt=prompt,
        max_new_tokens=entry["max_new_tokens"],
        images=images,
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
    images: Mapping[str, Any] | None = None,
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
    # The preset's table of images lies where the preset's questions do.
    known_images = preset.images if preset is not None and path is None and hub_id is None else None
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
    check_metric(where, metric)
    chosen = columns_of(where, columns, preset.columns if preset else Columns())
    prompt = prompt or (preset.prompt if preset else DEFAULT_PROMPT)
    check_prompt(where, prompt, chosen)
    table = image_table_of(where, images, known_images, chosen)
    if table is not None:
        table = _placed(where, table, base_folder, local=path is not None)
    return DatasetSource(
        name=name,
        split=split,
        path=path,
        hub_id=hub_id,
        config=config,
        revision=revision,
        columns=chosen,
        metric=metric,
        prompt=prompt,
        images=table,
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


def _placed(where: str, table: ImageTable, base_folder: Path, local: bool) -> ImageTable:
    """The table with an absolute path, if it has one."""
    if table.path is None:
        if local:
            raise DatasetError(f"{where}.images: needs `path`, as the data set is local")
        return table
    found = _matches(Path(table.path), base_folder)
    if found is None:
        raise DatasetError(f"{where}.images.path: no file or folder {base_folder.absolute() / table.path}")
    return replace(table, path=found)

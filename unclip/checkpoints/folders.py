"""Model folders: location of a model, content of model.json, and files of the weights.

Nothing here imports torch, so that `unclip models` and the error for an unknown name are fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints import hub
from unclip.checkpoints.hub import CONFIG_FILE, MODEL_FILE, MODEL_FILES, HubArguments
from unclip.config import MAX_CONFIG, check_keywords
from unclip.files import printable, read_json, read_text, shorten
from unclip.safe_yaml import parse_yaml

if TYPE_CHECKING:
    from typing_extensions import Unpack

OPTIONS_FILE, SCHEDULE_FILE = "options.json", "schedule.json"
WEIGHTS_FILE, CARD_FILE = "model.safetensors", "README.md"
FORMAT_NAME, VERSION = "unclip", 1
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^\s@]+))?")
_PACKAGE = Path(__file__).parent.parent


def bundled_models() -> dict[str, Path]:
    """Return name -> folder of the models that ship with the package, in a wheel or a checkout."""
    for assets in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if files := sorted(assets.glob(f"*/{MODEL_FILE}")):
            return {file.parent.name: file.parent for file in files}
    return {}


def locate(
    name_or_path: str | Path,
    files: Sequence[str] = MODEL_FILES,
    **hub_arguments: Unpack[HubArguments],
) -> Path:
    """Resolve a bundled model's name, a local path or a Hub id "org/name[@revision]" to a path.

    A Hub repository is downloaded once and cached; `files` are patterns of the files to download.
    Raises ValueError if there is no such model.
    """
    check_keywords(hub_arguments, HubArguments.__annotations__, ("dtype", "device", "offload"))
    bundled = bundled_models()
    if str(name_or_path) in bundled:
        return bundled[str(name_or_path)]
    if (path := Path(name_or_path)).exists():
        return path
    known = f"bundled models: {', '.join(bundled) or 'none'}"
    if path.parent.is_file():
        raise ValueError(f"model {str(name_or_path)!r} does not exist: {path.parent} is a file")
    if isinstance(name_or_path, str) and (found := _HUB_ID.fullmatch(name_or_path)):
        hub_id, revision = found.groups()
        if revision is not None:
            if hub_arguments.get("revision", revision) != revision:
                other = hub_arguments.get("revision")
                raise ValueError(f"{name_or_path} and revision={other!r} differ; give one of them")
            hub_arguments["revision"] = revision
        try:
            return hub.fetch(hub_id, files, **hub_arguments)
        except ValueError as error:
            reason = f"is not a local folder and could not be downloaded: {error}"
            raise ValueError(f"model {name_or_path!r} {reason}; {known}") from None
    raise ValueError(f"unknown model {str(name_or_path)!r}; {known}; or give a folder or Hub id")


def is_hub_id(name_or_path: str | Path) -> bool:
    return isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path) is not None


def read_model_json(folder: Path) -> dict[str, Any]:
    """Return the validated content of `model.json`: kind, name, licence, components."""
    file = folder / MODEL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {MODEL_FILE}")
    model = read_json(file)
    if (model.get("format"), model.get("version")) != (FORMAT_NAME, VERSION):
        found = f"format {model.get('format')!r} version {model.get('version')!r}"
        raise ValueError(f"{file} has {found}; expected {FORMAT_NAME!r} version {VERSION}")
    for key, kind in {"kind": str, "name": str, "licence": str, "components": list}.items():
        if not isinstance(model.get(key), kind):
            raise ValueError(f"{file}: {key} is {model.get(key)!r}; expected a {kind.__name__}")
    # A name is that of a folder in this one, so it must not be a path.
    if not all(isinstance(name, str) and name.isidentifier() for name in model["components"]):
        raise ValueError(f"{file}: components are {shorten(model['components'])}; expected names")
    return model


def shared_from(folder: Path) -> dict[str, str]:
    """Return component -> bundled model for the components that a folder shares with one."""
    shared = read_model_json(folder).get("borrowed", {})
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in shared.values()):
        expected = "expected a mapping of components to bundled models"
        raise ValueError(f"{folder / MODEL_FILE}: borrowed is {shared!r}; {expected}")
    return shared


def component_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each component. Raises ValueError if a shared component is not found."""
    folders, bundled = {}, bundled_models()
    for name, owner in shared_from(folder).items():
        if owner not in bundled or name not in read_model_json(bundled[owner])["components"]:
            known = f"expected a bundled model with it (bundled: {', '.join(bundled) or 'none'})"
            raise ValueError(f"{folder / MODEL_FILE} takes {name} from {owner!r}; {known}")
        folders[name] = bundled[owner] / name
    return folders | {name: folder / name for name in read_model_json(folder)["components"]}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a component, or {} if there is none."""
    file = folder / CONFIG_FILE
    return read_json(file) if file.is_file() else {}


def only_file(folder: Path, pattern: str) -> Path:
    """Return the only file in a folder that matches a pattern. Raises ValueError otherwise."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder}: expected one file {pattern}, found {names}")
    return found[0]


def weights_index(folder: Path) -> Path:
    """Return the file that holds a component's weights, or the index of its shards.

    Full precision comes before a variant such as `model.fp16.safetensors`, safetensors before .bin.
    """
    found = [
        # The name of a variant has one part more.
        (file.name.count(".") - 2 * (file.suffix == ".json"), rank, file.name)
        for rank, ending in enumerate((".safetensors", ".bin"))
        for file in (*folder.glob(f"*{ending}"), *folder.glob(f"*{ending}.index*.json"))
        if not re.search(r"-\d+-of-\d+\.", file.name)
    ]
    if not found:
        raise FileNotFoundError(f"{folder} has no weights; expected a .safetensors or .bin file")
    return folder / min(found)[-1]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that together hold a component's weights."""
    file = weights_index(folder)
    if file.suffix != ".json":
        return [file]
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file} has no weight_map; expected the file name of each tensor")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{file} names {shorten(name)}; expected a file in the same folder")
    shards = [folder / name for name in sorted(set(names.values()))]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing; {file.name} names it")
    return shards


def folder_name(folder: Path) -> str:
    """Return a folder's name, or the repository's if it is a snapshot from the Hub."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def card_licence(folder: Path) -> str:
    """Return the licence in the header of the model card, or ""."""
    card = folder / CARD_FILE
    try:
        found = re.match(r"---\n(.*?)\n---", read_text(card), re.S)
        header, _ = parse_yaml(found[1][:MAX_CONFIG], str(card)) if found else ({}, {})
    except (ValueError, OSError):
        return ""
    return printable(header.get("license") or "") if isinstance(header, dict) else ""

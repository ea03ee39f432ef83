"""One checkpoint of DALLE2-pytorch: its sampling weights, training configuration and release.

Three forms: {version, config, model}; before release 0.26.2, a bare state dict next to a JSON file;
the trainer's {model, ema, ema_model, optimizer, ...}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.checkpoints.pickles import Stub, read_checkpoint
from unclip.checkpoints.states import is_state, rename_plain
from unclip.files import read_json

Release = tuple[int, ...]

PREFIXES = {"prior": "net.", "decoder": "unets."}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file, as far as loading needs it."""

    file: Path
    part: str  # "prior" or "decoder"
    state: Mapping[str, Tensor]
    config: Mapping[str, Any]  # this part's section of the training configuration
    where: str  # that section, for error messages
    release: Release


def only_checkpoint(folder: Path) -> Path:
    """Return the checkpoint in a folder, or below it: the best, the latest, or the only one."""
    found = sorted(folder.glob("*.pth")) or sorted(folder.rglob("*.pth"))
    for name in ("best.pth", "latest.pth"):
        if len(named := [file for file in found if file.name == name]) == 1:
            return named[0]
    if len(found) != 1:
        names = ", ".join(str(file.relative_to(folder)) for file in found) or "none"
        raise ValueError(f"{folder}: expected one .pth file, found {names}")
    return found[0]


def read_file(file: Path, part: str) -> Checkpoint:
    """Read a prior or a decoder with its configuration.

    Raises ValueError if it is not one, and FileNotFoundError if its configuration is missing.
    """
    content = read_checkpoint(file)
    state = weights(content)
    if not any(name.startswith(PREFIXES[part]) for name in state):
        raise ValueError(f"{file} is not a {part} of DALLE2-pytorch: it has no {PREFIXES[part]}*")
    header = {} if is_state(content) else content
    config, source = header.get("config"), file
    if config is None:
        names = (f"{part}_config.json", f"{file.stem}_config.json", "config.json")
        source = next((path for path in map(file.with_name, names) if path.is_file()), None)
        if source is None:
            raise FileNotFoundError(
                f"{file} holds no configuration; put the model's {part}_config.json next to it"
            )
        config = read_json(source)
    if not isinstance(config, Mapping) or not isinstance(config.get(part), Mapping):
        raise ValueError(f"{source} has no section {part!r}; expected the whole configuration")
    release = release_of(header.get("version")) or release_by_names(state, part)
    return Checkpoint(file, part, state, config[part], f"{source}: {part}", release)


def weights(content: Any) -> Mapping[str, Tensor]:
    """Return the weights for sampling: the EMA if the trainer saved one; {} if there are none."""
    return rename_plain(_stored_weights(content))


def _stored_weights(content: Any) -> Mapping[str, Tensor]:
    if is_state(content) or not isinstance(content, Mapping):
        return content if is_state(content) else {}
    if is_state(content.get("ema_model")):
        return content["ema_model"]
    if is_state(content.get("ema")):
        # A prior has "ema_model.net.*"; a decoder has one EMA per U-Net, "0.ema_model.*".
        named = (
            (re.fullmatch(r"(?:(\d+)\.)?ema_model\.(.*)", name), x)
            for name, x in content["ema"].items()
        )
        if found := {f"unets.{m[1]}.{m[2]}" if m[1] else m[2]: x for m, x in named if m}:
            return found
    return content["model"] if is_state(content.get("model")) else {}


def release_of(version: Any) -> Release | None:
    """Parse "1.0.2", or an object of packaging's Version in the file, to (1, 0, 2)."""
    if isinstance(version, Stub):
        inner = version.state.get("_version") if isinstance(version.state, dict) else version.state
        inner = inner.args if isinstance(inner, Stub) else inner  # (epoch, release, ...)
        release = inner[1] if isinstance(inner, tuple) and len(inner) > 1 else None
        return release if isinstance(release, tuple) else None
    found = re.match(r"\d+(\.\d+)*", version) if isinstance(version, str) else None
    return tuple(map(int, found[0].split("."))) if found else None


def release_by_names(state: Mapping[str, Tensor], part: str) -> Release:
    """Infer the release of a file without a version: the last one that wrote such names.

    The trainer has always saved its version; single models have one since 0.26.2.
    """

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in state)

    if has(r".*\.gamma"):
        return (0, 15, 4)
    if part == "prior":
        if has(r"net\.null_text_encodings"):
            return (1, 15, 6)  # re-saved by someone else, without the version
        return (0, 26, 1) if has(r"net\.null_text_embed") else (0, 22, 1)
    if has(r"unets\.\d+\.downs\.0\.[04]\.1\.weight"):
        return (1, 15, 6)  # re-saved, as above
    for name in state:
        if found := re.fullmatch(r"(unets\.[1-9]\d*\.)to_out\.weight", name):
            # Since 0.24 the input image is concatenated in front of the last convolution.
            last_block = state[f"{found[1]}final_resnet_block.block2.project.weight"]
            return (0, 26, 1) if state[name].shape[1] > last_block.shape[0] else (0, 22, 3)
    return (0, 26, 1) if has(r"unets\.\d+\.ups\.\d+\.3\.net\.0\.weight") else (0, 20, 1)

"""One file of DALLE2-pytorch: which of its weights are for sampling, how they were trained, by which release.

Three forms: {version, config, model}; before release 0.26.2 a bare state dict, with a JSON file beside; the trainer's
{model, ema, ema_model, optimizer, ...}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.checkpoints.pickles import Stub, read_checkpoint
from unclip.files import read_json

Release = tuple[int, ...]

PREFIXES = {"prior": "net.", "decoder": "unets."}


@dataclass(frozen=True)
class Checkpoint:
    """What is needed of a file."""

    file: Path
    part: str  # "prior" or "decoder"
    state: Mapping[str, Tensor]
    config: Mapping[str, Any]  # this part's section of the training configuration
    where: str  # that section, for messages
    release: Release


def only(folder: Path) -> Path:
    """The checkpoint in a folder, or else below it: the best, the latest, or the only one."""
    found = sorted(folder.glob("*.pth")) or sorted(folder.rglob("*.pth"))
    for name in ("best.pth", "latest.pth"):
        if len(named := [file for file in found if file.name == name]) == 1:
            return named[0]
    if len(found) != 1:
        told = ", ".join(str(file.relative_to(folder)) for file in found) or "none"
        raise ValueError(f"{folder} should hold one .pth file; found {told}")
    return found[0]


def read_file(file: Path, part: str) -> Checkpoint:
    """A prior or a decoder with its configuration. ValueError, or FileNotFoundError that says which file is missing."""
    content = read_checkpoint(file)
    state = weights(content)
    if not any(name.startswith(PREFIXES[part]) for name in state):
        raise ValueError(
            f"{file} holds no {part} of DALLE2-pytorch, whose tensors begin with {PREFIXES[part]!r}"
        )
    told = {} if state is content else content
    config, source = told.get("config"), file
    if config is None:
        names = (f"{part}_config.json", f"{file.stem}_config.json", "config.json")
        source = next((path for path in map(file.with_name, names) if path.is_file()), None)
        if source is None:
            raise FileNotFoundError(
                f"{file} has no configuration in it; put its model's {part}_config.json beside it"
            )
        config = read_json(source)
    if not isinstance(config, Mapping) or not isinstance(config.get(part), Mapping):
        raise ValueError(
            f"{source}: its configuration has no section {part!r}; expected the whole one of the training"
        )
    release = release_of(told.get("version")) or release_by_names(state, part)
    return Checkpoint(file, part, state, config[part], f"{source}: {part}", release)


def weights(content: Any) -> Mapping[str, Tensor]:
    """The state that sampling uses: averaged where the trainer saved it so, else as it is; empty if there is none."""
    if _is_state(content) or not isinstance(content, Mapping):
        return content if _is_state(content) else {}
    if _is_state(content.get("ema_model")):
        return content["ema_model"]
    if _is_state(content.get("ema")):
        # A prior's are "ema_model.net.*"; a decoder's U-Nets are averaged one by one: "0.ema_model.*".
        named = (
            (re.fullmatch(r"(?:(\d+)\.)?ema_model\.(.*)", name), x)
            for name, x in content["ema"].items()
        )
        if found := {f"unets.{m[1]}.{m[2]}" if m[1] else m[2]: x for m, x in named if m}:
            return found
    return content["model"] if _is_state(content.get("model")) else {}


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(x, Tensor) for x in content.values())
    )


def release_of(version: Any) -> Release | None:
    """(1, 0, 2) of "1.0.2" or of packaging's Version, which is an object in the file."""
    if isinstance(version, Stub):
        inner = version.state.get("_version") if isinstance(version.state, dict) else version.state
        inner = inner.args if isinstance(inner, Stub) else inner  # (epoch, release, ...)
        release = inner[1] if isinstance(inner, tuple) and len(inner) > 1 else None
        return release if isinstance(release, tuple) else None
    found = re.match(r"\d+(\.\d+)*", version) if isinstance(version, str) else None
    return tuple(map(int, found[0].split("."))) if found else None


def release_by_names(state: Mapping[str, Tensor], part: str) -> Release:
    """For a file that does not tell: the last release that wrote such names, and wrote them without telling.

    The trainer's checkpoints have always told their release, models alone since 0.26.2.
    """

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in state)

    if has(r".*\.gamma"):
        return (0, 15, 4)
    if part == "prior":
        if has(r"net\.null_text_encodings"):
            return (1, 15, 6)  # made nameless by someone else
        return (0, 26, 1) if has(r"net\.null_text_embed") else (0, 22, 1)
    if has(r"unets\.\d+\.downs\.0\.[04]\.1\.weight"):
        return (1, 15, 6)  # likewise
    for name in state:
        if found := re.fullmatch(r"(unets\.[1-9]\d*\.)to_out\.weight", name):
            sees = (
                state[name].shape[1]
                > state[f"{found[1]}final_resnet_block.block2.project.weight"].shape[0]
            )
            return (
                (0, 26, 1) if sees else (0, 22, 3)
            )  # since 0.24 the last convolution sees the small picture
    return (0, 26, 1) if has(r"unets\.\d+\.ups\.\d+\.3\.net\.0\.weight") else (0, 20, 1)

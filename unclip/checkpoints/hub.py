"""What of a repository on the Hub is a model, and how that gets here; never imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

MODEL_FILE, INDEX_FILE, CONFIG_FILE = "model.json", "model_index.json", "config.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "README.md")
VARIANTS = ("*.fp16.*", "*.fp16-*")  # of weights that are there in full precision too
# Of models that are neither ours nor diffusers'. DALLE2-pytorch's lie in folders, beside whatever else was tried.
FOREIGN_FILES = (
    "*.pt",
    "*.ckpt",
    "*.th",
    "*.json.gz",
    "*.bpe.gz",
    "prior/*.pth",
    "decoder/*.pth",
    "upsampler/*.pth",
)
ALWAYS = (MODEL_FILE, INDEX_FILE, CONFIG_FILE)  # fetched in any case, if they are there
# A prior's repository may hold far larger encoders, which are not wanted.
PRIOR_FILES = (*ALWAYS, "prior*", "*_stats.th", "scheduler/*", "model.*", "schedule.json")


def wanted(names: Sequence[str], files: Sequence[str] = MODEL_FILES) -> list[str]:
    """Of the files in a repository, those that make a model; `files` are patterns of what is asked for.

    Variants of weights and .bin files only where there is nothing else. ValueError if it holds several models.
    """
    chosen = _matching(names, files)
    if files != MODEL_FILES:
        return _newest(chosen)
    chosen = [name for name in chosen if not _matching([name], VARIANTS)]
    if not {MODEL_FILE, INDEX_FILE} & set(names):
        return _newest(chosen + _without_mini(_matching(names, FOREIGN_FILES)))
    components = [
        name.split("/")[0] for name in names if re.fullmatch(rf"[^/]+/{CONFIG_FILE}", name)
    ]
    for component in components:
        if not _matching(chosen, [f"{component}/*.safetensors"]):
            chosen += _matching(names, [f"{component}/*.safetensors", f"{component}/*.bin"])
    return chosen


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _without_mini(names: list[str]) -> list[str]:
    """Without a file whose larger twin is there: min-dalle's repository holds two models."""
    return [
        name for name in names if "_mini." not in name or name.replace("_mini.", ".") not in names
    ]


def _newest(names: list[str]) -> list[str]:
    """Of the .pth files in a folder, the one that `dalle2_pytorch_files.only` takes: the best, the latest, the only."""
    kept = [name for name in names if not name.endswith(".pth")]
    checkpoints = [PurePosixPath(name) for name in names if name.endswith(".pth")]
    for part in dict.fromkeys(path.parts[0] for path in checkpoints):
        found = [path for path in checkpoints if path.parts[0] == part]
        found = [
            path for path in found if len(path.parts) <= 2
        ] or found  # at the top of the folder, else below
        named = (
            [path for path in found if path.name == name] for name in ("best.pth", "latest.pth")
        )
        found = next((paths for paths in named if len(paths) == 1), found)
        if len(found) > 1:
            told = ", ".join(map(str, found))
            raise ValueError(
                f"it holds several models ({told}); fetch one into a folder, and give that instead"
            )
        kept.append(str(found[0]))
    return kept


def fetch(hub_id: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of what is `wanted` of a repository, fetched once and then cached; ValueError tells why there is none.

    Without a network, what was fetched before.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    reason = "the Hub cannot be reached"
    try:
        names = list_repo_files(hub_id)
    except RepositoryNotFoundError:
        raise ValueError("the Hub has no such model, or it is private") from None
    except Exception as error:  # the network's own kinds, which change with the Hub's library
        names = None
        reason = _first_line(error) if isinstance(error, HfHubHTTPError) else reason
    try:
        if names is None:
            return Path(
                snapshot_download(hub_id, allow_patterns=list(ALWAYS), local_files_only=True)
            )
        return Path(snapshot_download(hub_id, allow_patterns=wanted(names, files)))
    except LocalEntryNotFoundError:
        raise ValueError(f"{reason} and nothing of it is cached") from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

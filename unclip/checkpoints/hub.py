"""Model downloads from the Hub: which files of a repository are needed. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack

MODEL_FILE, INDEX_FILE, CONFIG_FILE = "model.json", "model_index.json", "config.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "README.md")
VARIANTS = ("*.fp16.*", "*.fp16-*")  # variants of weights that also exist in full precision
# Files of models in neither our own nor diffusers' layout. DALLE2-pytorch's repositories hold other
# experiments too, outside of these folders.
FOREIGN_FILES = (
    *("*.pt", "*.ckpt", "*.th", "*.json.gz", "*.bpe.gz"),
    *("prior/*.pth", "decoder/*.pth", "upsampler/*.pth"),
)
ALWAYS = (MODEL_FILE, INDEX_FILE, CONFIG_FILE)
# A prior's repository may also hold far larger encoders, which are not needed.
PRIOR_FILES = (*ALWAYS, "prior*", "*_stats.th", "scheduler/*", "model.*", "schedule.json")
CODEC_FILES = (CONFIG_FILE, "model.safetensors", "encoder.pkl", "decoder.pkl", "*.ckpt", "*.yaml")


class HubArguments(TypedDict, total=False):
    """Arguments of all functions that load a model, for a Hub id; see `huggingface_hub`."""

    revision: str | None  # branch, tag or commit; also as "org/name@revision"
    cache_dir: str | Path | None  # default: HF_HOME's
    token: str | bool | None  # for private models; default: that of `hf auth login`
    local_files_only: bool  # load from the cache only; do not download


def select(names: Sequence[str], files: Sequence[str] = MODEL_FILES) -> list[str]:
    """Return the files of a repository that make a model; `files` are patterns of what is needed.

    Variants of weights and .bin files are selected only if there is nothing else. Raises ValueError
    if the repository holds several models.
    """
    chosen = _matching(names, files)
    if files != MODEL_FILES:
        return _one_checkpoint(chosen)
    chosen = [name for name in chosen if not _matching([name], VARIANTS)]
    if not {MODEL_FILE, INDEX_FILE} & set(names):
        foreign = _matching(names, FOREIGN_FILES)
        # min-dalle's repository holds two models; the larger one is selected.
        mini = [name for name in foreign if name.replace("_mini.", ".") in {*foreign} - {name}]
        return _one_checkpoint(chosen + [name for name in foreign if name not in mini])
    components = [n.split("/")[0] for n in names if re.fullmatch(rf"[^/]+/{CONFIG_FILE}", n)]
    for component in components:
        if not _matching(chosen, [f"{component}/*.safetensors"]):
            chosen += _matching(names, [f"{component}/*.safetensors", f"{component}/*.bin"])
    return chosen


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _one_checkpoint(names: list[str]) -> list[str]:
    """Keep one .pth file per folder: the one that `only_checkpoint` in dalle2_pytorch selects."""
    selected = [name for name in names if not name.endswith(".pth")]
    checkpoints = [PurePosixPath(name) for name in names if name.endswith(".pth")]
    for part in dict.fromkeys(path.parts[0] for path in checkpoints):
        found = [path for path in checkpoints if path.parts[0] == part]
        found = [path for path in found if len(path.parts) <= 2] or found  # top of the folder first
        for name in ("best.pth", "latest.pth"):
            if len(named := [path for path in found if path.name == name]) == 1:
                found = named
                break
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise ValueError(f"it holds several models ({several}); download one into a folder")
        selected.append(str(found[0]))
    return selected


def fetch(
    hub_id: str, files: Sequence[str] = MODEL_FILES, **arguments: Unpack[HubArguments]
) -> Path:
    """Download the files of a repository that `select` returns; return the cached folder.

    Without a network, earlier downloads are used. Raises ValueError with the reason on failure.
    """
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local_files_only = arguments.pop("local_files_only", False)
    remote: dict[str, Any] = {**arguments}
    remote.pop("cache_dir", None)
    names, reason = None, "the Hub cannot be reached"
    try:
        if local_files_only:
            reason = "local_files_only is set"
        else:
            # list_repo_files would repeat the request for 25 s without a network.
            names = [file.rfilename for file in model_info(hub_id, **remote).siblings or ()]
    except RepositoryNotFoundError:
        raise ValueError("the Hub has no such model, or it is private") from None
    except RevisionNotFoundError:
        raise ValueError(f"the model has no revision {remote.get('revision')!r}") from None
    except HfHubHTTPError as error:
        reason = _first_line(error)
    except Exception:  # network errors, whose classes change with the versions of the Hub's library
        pass
    wanted: dict[str, Any] = {"allow_patterns": list(ALWAYS), "local_files_only": True}
    if names is not None:
        wanted = {"allow_patterns": select(names, files)}
    try:
        return Path(snapshot_download(hub_id, **wanted, **arguments))
    except LocalEntryNotFoundError:
        raise ValueError(f"{reason}, and the model is not cached") from None
    except Exception as error:  # HTTP errors, a full disk, or network errors as above
        raise ValueError(_first_line(error)) from None


def upload(
    folder: Path, repo_id: str, private: bool, token: str | bool | None, revision: str | None
) -> str:
    """Upload a folder, in one commit, to a repository that is created if needed; return its URL.

    ValueError with the reason on failure.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload a model of unclip",
        )
        return str(url)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        advice = "check the name, and log in with `hf auth login` or give a token"
        reason = f"{_first_line(error)}; {advice}"
    except Exception as error:  # network errors, as in `fetch`
        reason = f"the Hub cannot be reached ({_first_line(error)})"
    raise ValueError(f"{repo_id} could not be uploaded: {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

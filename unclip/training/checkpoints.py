"""Checkpoints: everything that the next training step depends on, in a folder `step-0001000`.

    model.safetensors        the weights being optimised
    ema.safetensors          their average, as a full set of weights (absent without EMA)
    optimizer.safetensors    "exp_avg/<parameter>" and so on
    rng-0.json               the random state of each process
    state.json               step, position in the data, settings, versions
    tokenizer.json           for networks that read captions themselves

No file is a pickle.
"""

from __future__ import annotations

import base64
import contextlib
import json
import platform
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from unclip import __version__
from unclip.config import flatten, parse, save_json, to_dict
from unclip.files import atomic_folder
from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer
from unclip.training.ema import EMA
from unclip.weights import read_tensors, write_safetensors

# Settings that may differ in a resumed run. Any other change makes it a different run.
MUTABLE_SETTINGS = (
    *(f"optim.{name}" for name in ("lr", "warmup", "schedule", "final_lr", "decay_steps")),
    *("optim.clip_norm", "fit.output", "fit.steps", "fit.keep", "fit.trackers", "fit.progress"),
    *("fit.log_every", "fit.val_every", "fit.val_batches", "fit.preview_every", "fit.save_every"),
    *("fit.compile", "fit.gradient_checkpointing", "fit.channels_last"),
    *("data.workers", "data.cache", "data.max_broken", "val_data"),
)


class Checkpoints:
    """The checkpoint folders of one run, of which the `keep` newest are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{7}", path.name))

    def find(self, name: str) -> Path:
        """Return the folder of "latest" or of a path; FileNotFoundError if there is none."""
        if name == "latest":
            if not (found := self.all()):
                raise FileNotFoundError(f"no checkpoint in {self.folder}; start without --resume")
            return found[-1]
        if not (Path(name) / "state.json").is_file():
            raise FileNotFoundError(
                f"{name} is not a checkpoint; expected a folder such as {self.folder}/step-0001000"
            )
        return Path(name)

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield a folder for the checkpoint of `step`; on success, remove all but the newest."""
        with atomic_folder(self.folder / f"step-{step:07d}") as folder:
            yield folder
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)


class Resumable(Protocol):
    """A data loader whose position can be saved and restored."""

    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass
class RunState:
    """The state of a run after `step` updates and `hours`; equal on all processes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    loader: Resumable
    scaler: torch.amp.GradScaler | None  # fp16 only
    config: Any  # all settings of the run: a dataclass, or a plain dict
    processes: int = 1
    tokenizer: BPETokenizer | None = None
    step: int = 0
    hours: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return self.config if isinstance(self.config, dict) else to_dict(self.config)

    def save(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        """Write the state to `folder`, with the random state of each process."""
        _save_tensors(self.model.state_dict(), folder / "model.safetensors")
        _save_optimizer(self.optimizer, self.model, folder / "optimizer.safetensors")
        if self.ema:
            with self.ema.swapped_in():
                _save_tensors(self.model.state_dict(), folder / "ema.safetensors")
        for i, state in enumerate(random_states):
            save_json(state, folder / f"rng-{i}.json")
        versions = {"unclip": __version__, "torch": torch.__version__}
        state = {
            "step": self.step,
            "hours": self.hours,
            "data": self.loader.state_dict(),
            "ema_updates": self.ema.updates if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "processes": self.processes,
            "settings": self.settings,
            "versions": {**versions, "python": platform.python_version()},
        }
        save_json(state, folder / "state.json")
        if self.tokenizer:
            self.tokenizer.save(folder / TOKENIZER_FILE)

    def restore(self, folder: Path, process: int) -> dict[str, Any]:
        """Restore what `save` wrote and return the random state of a process.

        The caller sets the random state just before the next step.
        """
        state = _read_json(folder / "state.json")
        _check_settings(self._with_defaults(state["settings"]), self.settings, folder)
        if state["processes"] != self.processes:
            raise ValueError(
                f"{folder} was saved by {state['processes']} process(es); "
                f"this run has {self.processes}"
            )
        try:  # in place: the optimizer refers to these parameters
            self.model.load_state_dict(read_tensors(folder / "model.safetensors"))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}/model.safetensors does not fit: {reason}") from None
        _load_optimizer(self.optimizer, self.model, folder / "optimizer.safetensors")
        if self.ema:
            self.ema.load(read_tensors(folder / "ema.safetensors"), state["ema_updates"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["data"])
        self.step, self.hours = state["step"], state["hours"]
        return _read_json(folder / f"rng-{process}.json")

    def _with_defaults(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Add the defaults of settings that a checkpoint of an older version does not have."""
        if isinstance(self.config, dict):
            return saved
        try:
            return to_dict(parse(type(self.config), saved))
        except ValueError:  # a setting was removed: `_check_settings` reports it as a difference
            return saved


def _check_settings(saved: dict[str, Any], current: dict[str, Any], source: Path) -> None:
    """Raise ValueError with every difference that is not in MUTABLE_SETTINGS."""
    old, new = flatten(saved), flatten(current)
    different = [
        f"{name} was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
        and not any(name == m or name.startswith(f"{m}.") for m in MUTABLE_SETTINGS)
    ]
    if different:
        raise ValueError(
            f"{source} was trained with other settings: {'; '.join(different)}. "
            f"A resumed run may change only {', '.join(MUTABLE_SETTINGS)}; "
            f"to change more, start from its weights with --init {source}"
        )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint") from None


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors of any device and memory format; a shared storage is written once per name."""
    written, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        written[name] = tensor.clone() if memory in storages else tensor
        storages.add(memory)
    write_safetensors(written, file)


def _save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    states = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    tensors = {
        f"{key}/{name}": torch.as_tensor(value)  # a step may be a number
        for name, state in states.items()
        for key, value in state.items()
    }
    _save_tensors(tensors, file)


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    """Load the moments; learning rates, weight decay and betas stay the optimizer's own."""
    names = {p: name for name, p in model.named_parameters()}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        kind, _, name = key.partition("/")
        saved.setdefault(name, {})[kind] = tensor
    state = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if names[p] in saved:  # a parameter without a gradient has no moments
            state[i] = {kind: _restored(p, value) for kind, value in saved[names[p]].items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _restored(parameter: Tensor, moment: Tensor) -> Tensor | int:
    """Copy a moment to the parameter's memory format; step counts have another shape."""
    if moment.ndim == 0 and moment.dtype == torch.int64:  # bitsandbytes counts steps with an int
        return int(moment)
    if moment.shape != parameter.shape:
        return moment.clone()
    return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def random_state() -> dict[str, Any]:
    """Return the state of all global generators (Python, NumPy, torch, device) as plain JSON."""
    version, python, gauss = random.getstate()
    numpy = dict(np.random.get_state(legacy=False))
    device = _device_module()
    return {
        "python": [version, list(python), gauss],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
        "device": _encode(device.get_rng_state()) if device else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state that `random_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(_decode(state["torch"]))
    device = _device_module()
    if device and state["device"]:
        device.set_rng_state(_decode(state["device"]))


def _device_module() -> ModuleType | None:
    """Return torch.cuda or the like; None if the machine has no accelerator."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

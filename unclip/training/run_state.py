"""Everything that the next step of a run depends on, to and from the folder of a checkpoint.

    model.safetensors        the weights that are being optimised
    ema.safetensors          their average, as a full set of weights (absent without EMA)
    optimizer.safetensors    "exp_avg/<parameter>" and so on
    rng-0.json               the random state of each process
    state.json               step, place in the data, settings, versions
    tokenizer.json           of a network that reads captions itself (vocabulary.py reads it)

No pickle anywhere.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unclip import __version__
from unclip.config import flatten, parse, save_json, to_dict
from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer
from unclip.training.ema import EMA
from unclip.weights import load_strictly, read_tensors, write_safetensors

# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = (
    *(
        "optim.lr",
        "optim.warmup",
        "optim.schedule",
        "optim.final_lr",
        "optim.decay_steps",
        "optim.clip_norm",
    ),
    *("fit.output", "fit.steps", "fit.keep", "fit.trackers", "fit.progress", "fit.val_batches"),
    *("fit.log_every", "fit.val_every", "fit.preview_every", "fit.save_every"),
    *("fit.compile", "fit.gradient_checkpointing", "fit.channels_last"),
    *("data.workers", "data.cache", "data.max_broken", "val_data"),
)


class HasPlace(Protocol):
    """A loader that can tell where it is in the data, and go there."""

    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass
class RunState:
    """The parts of a running training, on every process the same; `step` updates are done, in `hours`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    loader: HasPlace
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
        """Write all of it; `random_states` has that of each process."""
        _save_tensors(self.model.state_dict(), folder / "model.safetensors")
        _save_optimizer(self.optimizer, self.model, folder / "optimizer.safetensors")
        if self.ema:
            with self.ema.swapped_in():
                _save_tensors(self.model.state_dict(), folder / "ema.safetensors")
        for i, state in enumerate(random_states):
            save_json(state, folder / f"rng-{i}.json")
        place = {
            "step": self.step,
            "hours": self.hours,
            "data": self.loader.state_dict(),
            "ema_updates": self.ema.updates if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "processes": self.processes,
            "settings": self.settings,
            "versions": {
                "unclip": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        save_json(place, folder / "state.json")
        if self.tokenizer:
            self.tokenizer.save(folder / TOKENIZER_FILE)

    def restore(self, folder: Path, process: int) -> dict[str, Any]:
        """Continue from what `save` wrote; returns the random state of this process, to be set before the next step."""
        place = read_json(folder / "state.json")
        check_settings(_completed(place["settings"], self.config), self.settings, folder)
        if place["processes"] != self.processes:
            raise ValueError(
                f"{folder} is of a run on {place['processes']} process(es), this one has {self.processes}"
            )
        try:  # in place: the optimiser holds these very parameters
            self.model.load_state_dict(read_tensors(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(
                f"{folder}/model.safetensors does not fit: {' '.join(str(error).split())}"
            ) from None
        _load_optimizer(self.optimizer, self.model, folder / "optimizer.safetensors")
        if self.ema:
            self.ema.load(read_tensors(folder / "ema.safetensors"), place["ema_updates"])
        if self.scaler:
            self.scaler.load_state_dict(place["scaler"])
        self.loader.load_state_dict(place["data"])
        self.step, self.hours = place["step"], place["hours"]
        return read_json(folder / f"rng-{process}.json")


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Start from the weights in `source`: a safetensors file, a component or a checkpoint folder (its EMA weights)."""
    path, tensors = read_weights(source)
    load_strictly(model, tensors, path)


def read_weights(source: str | Path) -> tuple[Path, dict[str, Tensor]]:
    """What `load_weights` loads, and the file that it is from."""
    path = Path(source)
    if path.is_dir():
        files = [
            path / name
            for name in ("ema.safetensors", "model.safetensors")
            if (path / name).is_file()
        ]
        if not files:
            raise FileNotFoundError(f"no ema.safetensors or model.safetensors in {path}")
        path = files[0]
    # Copies, not the mapped file: trained weights must not depend on a file that may be replaced.
    return path, {name: tensor.clone() for name, tensor in read_tensors(path).items()}


def _completed(saved: dict[str, Any], config: Any) -> dict[str, Any]:
    """A checkpoint's settings, with the defaults of those that its version did not have yet."""
    if isinstance(config, dict):
        return saved
    try:
        return to_dict(parse(type(config), saved))
    except ValueError:  # it had some that are gone, which will be told as differences
        return saved


def check_settings(saved: dict[str, Any], present: dict[str, Any], source: Path) -> None:
    """ValueError naming every setting that differs from the checkpoint's and may not."""
    old, new = flatten(saved), flatten(present)
    different = [
        f"{name} was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
        and not any(name == m or name.startswith(f"{m}.") for m in MAY_CHANGE)
    ]
    if different:
        raise ValueError(
            f"{source} was trained with other settings: {'; '.join(different)}. A resumed run may change only "
            f"{', '.join(MAY_CHANGE)}; to change more, start from its weights with --init {source}"
        )


def read_json(file: Path) -> Any:
    """The content of a JSON file of a checkpoint; ValueError if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint") from None


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Of any device and memory format; what shares memory under two names is written twice."""
    written, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        written[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    write_safetensors(written, file)


def _save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    states = {
        name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state
    }
    _save_tensors(
        {f"{kind}/{name}": t for name, state in states.items() for kind, t in state.items()}, file
    )


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, file: Path) -> None:
    """The moments come from the file; rates, decay and betas stay the optimiser's own."""
    names = {p: name for name, p in model.named_parameters()}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        kind, _, name = key.partition("/")
        saved.setdefault(name, {})[kind] = tensor
    state = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if names[p] in saved:  # a parameter that never had a gradient has no moments
            state[i] = {kind: _laid_out_like(p, tensor) for kind, tensor in saved[names[p]].items()}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _laid_out_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """A copy in the memory format of the parameter (channels_last); step counts have no such shape."""
    if moment.shape != parameter.shape:
        return moment.clone()
    return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)

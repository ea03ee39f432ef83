"""Everything that the next training step depends on, to be saved and restored exactly."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unclip import __version__
from unclip.config import flatten, parse, save_json, to_dict
from unclip.data.loader import Batch
from unclip.files import read_json
from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer
from unclip.training.checkpoints import STATE, SavedState, file_entry, read_state
from unclip.training.ema import EMA
from unclip.training.sharding import first_row, is_primary, is_sharded, local
from unclip.training.tensors import SavedTensors, write_rows
from unclip.weights import fit_error

# Settings that may differ in a resumed run. Any other change makes it a different run.
MUTABLE_SETTINGS = (
    *(f"optim.{name}" for name in ("lr", "warmup", "schedule", "final_lr", "decay_steps")),
    *("optim.clip_norm", "fit.output", "fit.steps", "fit.keep", "fit.trackers", "fit.progress"),
    *("fit.log_every", "fit.val_every", "fit.val_batches", "fit.preview_every", "fit.save_every"),
    *("fit.compile", "fit.gradient_checkpointing", "fit.channels_last"),
    *("fit.max_hours", "fit.async_save"),
    *("data.workers", "data.cache", "data.max_broken", "val_data"),
)


class Loader(Protocol):
    """Batches of an epoch from the current position on; the next `iter` starts the next epoch."""

    @property
    def broken(self) -> Mapping[Any, str]: ...  # images that could not be read, and why
    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...  # batches per epoch
    def samples_hash(self) -> str: ...  # equal for data that has only moved
    def state_dict(self) -> dict[str, int]: ...  # the position after the batches returned so far
    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass
class Snapshot:
    """The files of a checkpoint, in memory: the tensors of this process, and the rest in JSON."""

    tensors: dict[str, dict[str, tuple[Tensor, int]]]  # file -> name -> tensor, first row
    documents: dict[str, Any]  # of the main process
    tokenizer: BPETokenizer | None

    def write_tensors(self, folder: Path) -> dict[str, Any]:
        """Write the tensors of this process and return the entries of the manifest."""
        for name, tensors in self.tensors.items():
            write_rows(tensors, folder / name)
            with (folder / name).open("rb+") as file:  # on this machine, which may not be the main
                os.fsync(file.fileno())
        return {name: file_entry(folder / name) for name in self.tensors}

    def write_documents(self, folder: Path) -> None:
        for name, document in self.documents.items():
            save_json(document, folder / name)
        if self.tokenizer:
            self.tokenizer.save(folder / TOKENIZER_FILE)


@dataclass
class RunState:
    """The state of a run after `step` updates and `hours`; equal on all processes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    loader: Loader
    scaler: torch.amp.GradScaler | None  # fp16 only
    config: Any  # all settings of the run: a dataclass, or a plain dict
    processes: int = 1
    process: int = 0
    tokenizer: BPETokenizer | None = None
    samples: str | None = None  # hash of the data's samples
    statistics: nn.Module | None = None  # buffers that the loss reads
    step: int = 0
    hours: float = 0.0
    pending: list[str] = field(default_factory=list)  # evaluations of this step, to be done

    @property
    def settings(self) -> dict[str, Any]:
        return self.config if isinstance(self.config, dict) else to_dict(self.config)

    def snapshot(
        self,
        random_states: list[dict[str, Any]],
        reports: list[dict[str, Any]],
        copy: bool,
    ) -> Snapshot:
        """Collect what is saved; copy: because training continues while it is written.

        random_states, reports: of each process.
        """
        model = self.model.state_dict(keep_vars=True)
        tensors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {  # tensor, and the one it is like
            "model": {name: (local(x.detach()), x) for name, x in model.items()},
            "optimizer": self._moments(),
        }
        if self.ema:
            tensors["ema"] = {name: (self.ema.average_of(x), x) for name, x in model.items()}
        if self.statistics is not None:
            buffers = self.statistics.state_dict()
            tensors["statistics"] = {name: (x, x) for name, x in buffers.items()}
        suffix = f"-{self.process:05d}" if is_sharded(self.model) else ""
        files = {f"{kind}{suffix}.safetensors": _own(x, copy) for kind, x in tensors.items()}
        if self.process > 0 and (not suffix or not any(files.values())):
            files = {}  # another process saves the same
        state = SavedState(
            step=self.step,
            hours=self.hours,
            data=self.loader.state_dict(),
            ema_updates=self.ema.updates if self.ema else None,
            scaler=self.scaler.state_dict() if self.scaler else None,
            processes=self.processes,
            settings=self.settings,
            versions={
                **{"unclip": __version__, "torch": torch.__version__},
                "python": platform.python_version(),
            },
            samples=self.samples,
            pending=tuple(self.pending),
            reports=tuple(reports),
        )
        documents = {f"rng-{i}.json": random for i, random in enumerate(random_states)}
        return Snapshot(files, {**documents, STATE: to_dict(state)}, self.tokenizer)

    def _moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        states = [
            (name, self.optimizer.state[p])
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
        ]
        moments = {  # a step may be a number
            f"{kind}/{name}": torch.as_tensor(value)
            for name, state in states
            for kind, value in state.items()
        }
        return {key: (local(moment), moment) for key, moment in moments.items()}

    def restore(self, folder: Path) -> SavedState:
        """Restore what was saved, by any number of processes, and return state.json.

        The caller sets the random state just before the next step.
        """
        state = read_state(folder)
        # older versions saved only the start of the hash
        same = state.samples is not None and (self.samples or "").startswith(state.samples)
        self._check_settings(state, folder, moved=same)
        if state.samples is not None and not same and self.process == 0:
            warnings.warn(
                f"the data has other samples than {folder} was trained on; the run continues at "
                f"the same position, but does not equal an uninterrupted one",
                stacklevel=2,
            )
        saved, own = SavedTensors(folder, "model"), self.model.state_dict()
        _check_names(saved, own)
        with torch.no_grad():  # in place: the optimizer refers to these parameters
            for name, tensor in own.items():
                local(tensor).copy_(saved.rows(name, tensor))
        self._load_moments(SavedTensors(folder, "optimizer"))
        if self.ema:
            self.ema.load(SavedTensors(folder, "ema"), state.ema_updates or 0)
        if self.statistics is not None:
            self.statistics.load_state_dict(dict(SavedTensors(folder, "statistics")))
        if self.scaler and state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.loader.load_state_dict(self._position(state))
        self.step, self.hours, self.pending = state.step, state.hours, list(state.pending)
        return state

    def _position(self, state: SavedState) -> dict[str, Any]:
        """Return the position in the data, in batches of this number of processes."""
        position = dict(state.data)
        if state.processes != self.processes and "batch" in position:
            position["batch"] = position["batch"] * state.processes // self.processes
            if position["batch"] == len(self.loader):  # the rest is less than a batch
                position = {"epoch": position["epoch"] + 1, "batch": 0}
        return position

    def _load_moments(self, saved: SavedTensors) -> None:
        """Load the moments; learning rates, weight decay and betas stay the optimizer's own."""
        parameters = dict(self.model.named_parameters())
        kinds: dict[str, list[str]] = {}  # parameter -> kinds of its moments
        for key in saved:
            kind, _, name = key.partition("/")
            kinds.setdefault(name, []).append(kind)
        if unknown := [name for name in kinds if name not in parameters]:
            raise fit_error(saved.source, [], unknown, [])
        names = {p: name for name, p in parameters.items()}
        state = {}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            if found := kinds.get(names[p]):  # a parameter without a gradient has no moments
                state[i] = {kind: _moment(saved, f"{kind}/{names[p]}", p) for kind in found}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_settings(self, state: SavedState, source: Path, moved: bool) -> None:
        """Raise ValueError with every difference that a resumed run may not have."""
        old, new = flatten(self._with_defaults(state.settings)), flatten(self.settings)
        mutable = (*MUTABLE_SETTINGS, *(["data.path"] if moved else []))
        if state.processes != self.processes and (
            _batch_size(old) * state.processes == _batch_size(new) * self.processes
        ):
            mutable = (*mutable, "fit.accumulate")
        different = [
            f"{name} was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name)
            and not any(name == m or name.startswith(f"{m}.") for m in mutable)
        ]
        if different:
            raise ValueError(
                f"{source} was trained with other settings: {'; '.join(different)}. "
                f"A resumed run may change only {', '.join(MUTABLE_SETTINGS)}, and data.path if "
                f"the samples are the same; "
                f"to change more, start from its weights with --init {source}"
            )

    def _with_defaults(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Add the defaults of settings that a checkpoint of an older version does not have."""
        if isinstance(self.config, dict):
            return saved
        try:
            return to_dict(parse(type(self.config), saved))
        except ValueError:  # a setting was removed: `_check_settings` reports it as a difference
            return saved


def restore_random_state(folder: Path, process: int) -> dict[str, Any] | None:
    """Read the random state of a process; None if the run had fewer processes."""
    file = folder / f"rng-{process}.json"
    return read_json(file) if file.is_file() else None


def _batch_size(settings: dict[str, Any]) -> int:
    return settings.get("fit.accumulate", 1)


def _own(tensors: dict[str, tuple[Tensor, Tensor]], copy: bool) -> dict[str, tuple[Tensor, int]]:
    """Return the tensors that this process saves, on the CPU, and their first rows."""
    return {
        name: (x.detach().to("cpu", copy=copy).contiguous(), first_row(like))
        for name, (x, like) in tensors.items()
        if is_primary(like) and not (x.shape != like.shape and len(x) == 0)
    }


def _check_names(saved: SavedTensors, own: dict[str, Tensor]) -> None:
    missing = [name for name in own if name not in saved]
    unexpected = [name for name in saved if name not in own]
    if missing or unexpected:
        raise fit_error(saved.source, missing, unexpected, [])


def _moment(saved: SavedTensors, key: str, parameter: Tensor) -> Tensor | int:
    """Return a moment in the memory format of its parameter; ValueError for another shape."""
    if not key.startswith("exp_avg"):  # a step count, or a part of bitsandbytes' 8-bit state
        value = saved[key].clone()
        return int(value) if value.dtype == torch.int64 and value.ndim == 0 else value
    rows = saved.rows(key, parameter)
    moment = torch.empty_like(parameter, dtype=rows.dtype, requires_grad=False)
    local(moment).copy_(rows)
    return moment

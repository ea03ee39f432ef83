"""A small model, its data and a training run, shared by the tests of the loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run
from unclip.training.optim import OptimConfig
from unclip.weights import read_tensors

# `fit` ends with a garbage collection; visiting all imported objects would take seconds per test.
gc.freeze()

OPTIM = OptimConfig(lr=1e-2, warmup=2)


class TinyLoader:
    """A loader of five batches of four images per epoch, a function of the position."""

    def __init__(self, batches: int = 5, size: int = 4, rank: int = 0, processes: int = 1) -> None:
        self.batches, self.size, self.rank, self.processes = batches, size, rank, processes
        self.epoch = self.batch = 0
        self.broken: dict[str, str] = {}
        self.keys: list[str] = []

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        torch.empty((), dtype=torch.int64).random_()  # as DataLoader at the start of an epoch
        while self.epoch == epoch:
            generator = torch.Generator().manual_seed(100 * epoch + self.batch)
            image = torch.randn(self.size * self.processes, 3, 4, 4, generator=generator)[
                self.rank :: self.processes
            ]
            key = f"e{epoch}b{self.batch}"
            self.keys.append(key)
            self.batch += 1
            if self.batch == len(self):
                self.epoch, self.batch = epoch + 1, 0
            yield {"image": image, "key": [f"{key}i{i}" for i in range(self.size)]}

    def samples_hash(self) -> str:
        return f"{self.batches} batches of {self.size}"

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def tiny_model(width: int = 8) -> nn.Module:
    torch.manual_seed(7)
    first, last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
    return nn.Sequential(first, nn.GroupNorm(2, width), nn.SiLU(), nn.Dropout(0.2), last)


def denoising_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """MSE of the predicted noise, which comes from the global generator."""
    noise = torch.randn_like(batch["image"])
    loss = (model(batch["image"] + noise) - noise).square().mean()
    return {"loss": loss, "root": loss.detach().sqrt()}


def fit_config(folder: Path, steps: int = 6, **changes: Any) -> FitConfig:
    """A config without validation, previews, intermediate checkpoints and trackers."""
    config = FitConfig(str(folder), steps, val_every=0, preview_every=0, save_every=0, trackers=())
    return replace(config, **changes)


def run_fit(config: FitConfig, loss_fn: Callable = denoising_loss, **options: Any) -> TinyLoader:
    """Train the tiny model and return its loader; `start` has the fields of `Run`."""
    loader = options.pop("loader", None) or TinyLoader()
    start = options.pop("start", {})
    settings = {"fit": vars(config), "model": {"width": options.get("width", 8)}}
    model = tiny_model(options.pop("width", 8))
    fit(
        model,
        loss_fn,
        loader,
        config,
        options.pop("optim", OPTIM),
        run=Run(settings, **start),
        **options,
    )
    return loader


def checkpoint_tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint: model, average and optimizer."""
    checkpoint = folder / "checkpoints" / f"step-{step:07d}"
    files = ("model", "ema", "optimizer")
    return {
        f"{f}/{k}": t
        for f in files
        for k, t in read_tensors(checkpoint / f"{f}.safetensors").items()
    }


def plain_model() -> nn.Module:
    """Return a model without dropout, which would differ between processes."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))


def plain_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """A loss without randomness."""
    return {"loss": model(batch["image"]).square().mean()}

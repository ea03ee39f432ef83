"""A small model, its data and its loop, which tests of training share."""

from __future__ import annotations

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

OPTIM = OptimConfig(lr=1e-2, warmup=2)


class TinyLoader:
    """Five batches of four pictures an epoch; what a batch holds depends on its place only."""

    def __init__(self, batches: int = 5, size: int = 4, rank: int = 0, processes: int = 1) -> None:
        self.batches, self.size, self.rank, self.processes = batches, size, rank, processes
        self.epoch = self.batch = 0
        self.broken: dict[str, str] = {}
        self.given: list[str] = []

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        torch.empty((), dtype=torch.int64).random_()  # as a DataLoader does when a pass begins
        while self.epoch == epoch:
            generator = torch.Generator().manual_seed(100 * epoch + self.batch)
            image = torch.randn(self.size * self.processes, 3, 4, 4, generator=generator)[
                self.rank :: self.processes
            ]
            key = f"e{epoch}b{self.batch}"
            self.given.append(key)
            self.batch += 1
            if self.batch == len(self):
                self.epoch, self.batch = epoch + 1, 0
            yield {"image": image, "key": [f"{key}i{i}" for i in range(self.size)]}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def tiny_model(width: int = 8) -> nn.Module:
    torch.manual_seed(7)
    first, last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
    return nn.Sequential(first, nn.GroupNorm(2, width), nn.SiLU(), nn.Dropout(0.2), last)


def denoising(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    noise = torch.randn_like(batch["image"])
    loss = (model(batch["image"] + noise) - noise).square().mean()
    return {"loss": loss, "root": loss.detach().sqrt()}


def quiet(folder: Path, steps: int = 6, **changes: Any) -> FitConfig:
    config = FitConfig(str(folder), steps, val_every=0, preview_every=0, save_every=0, trackers=())
    return replace(config, **changes)


def run(config: FitConfig, loss_fn: Callable = denoising, **options: Any) -> TinyLoader:
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


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of the model, its average and the optimiser."""
    checkpoint = folder / "checkpoints" / f"step-{step:07d}"
    files = ("model", "ema", "optimizer")
    return {
        f"{f}/{k}": t
        for f in files
        for k, t in read_tensors(checkpoint / f"{f}.safetensors").items()
    }


def plain_model() -> nn.Module:
    """Without dropout, which draws something else in each process."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))


def straight(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    return {"loss": model(batch["image"]).square().mean()}

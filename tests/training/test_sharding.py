"""Sharded training (FSDP2, HSDP) equals DDP, and a run goes on with another number of processes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import OPTIM, TinyLoader, fit_config, plain_loss
from scripts import run_in_two_processes
from torch import Tensor, nn

from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.optim import OptimConfig
from unclip.training.tensors import SavedTensors

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "20",
}
HSDP = {**FSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}


@dataclass(frozen=True)
class Script:
    fit: FitConfig
    optim: OptimConfig = OPTIM


class Scaled(nn.Module):
    """Layers of uneven sizes, a scalar as CLIP's temperature, frozen weights, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Conv2d(5, 1, 1))
        self.linear = nn.Linear(4, 7)
        self.scale = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.register_buffer("mean", torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x).flatten(1)
        return self.frozen(self.linear(h) * self.scale.exp() - self.mean)


def main(run: Run[Script]) -> None:
    config = run.config
    loader = TinyLoader(
        rank=int(os.environ.get("RANK", 0)), processes=int(os.environ.get("WORLD_SIZE", 1))
    )
    fit(
        Scaled().to(run.device),
        plain_loss,
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=loader if config.fit.val_every else None,
    )


def start(folder: Path, *arguments: str, env: dict[str, str] | None, **settings: Any) -> Path:
    """Run this script in two processes with the environment of a launch config, or here."""
    folder.mkdir(exist_ok=True)
    values = {**vars(fit_config(folder / "run", 4, precision="fp32")), **settings}
    file = folder / "run.yaml"
    file.write_text(json.dumps({"fit": values}))
    argv = ["--config", str(file), *arguments]
    if env is None:
        launch(main, Script, None, argv)
    else:
        run_in_two_processes(__file__, *argv, environment=env)
    return folder / "run"


def saved(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / f"checkpoints/step-{step:07d}"
    return {
        f"{kind}/{name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in SavedTensors(folder, kind).items()
    }


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_sharded_run_equals_one_process_and_resumes_with_any_number(tmp_path: Path) -> None:
    """One process takes two batches for each batch of two processes."""
    one = start(tmp_path / "one", env=None, accumulate=4, log_every=1)
    settings = {"accumulate": 2, "log_every": 1, "val_every": 2, "val_batches": 1}
    two = start(tmp_path / "two", env=FSDP, **settings, steps=2, async_save=True)
    shards = sorted(p.name for p in (two / "checkpoints/step-0000002").glob("model*"))
    assert shards == ["model-00000.safetensors", "model-00001.safetensors"]
    settings["val_every"] = 0
    start(tmp_path / "two", "--resume=latest", env=None, **{**settings, "accumulate": 4}, steps=3)
    start(tmp_path / "two", "--resume=latest", env=FSDP, **settings, steps=4)
    assert_close(saved(two, 4), saved(one, 4))
    state = json.loads((two / "checkpoints/step-0000004/state.json").read_text())
    assert state["data"] == {"epoch": 1, "batch": 3}
    rows = [
        [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    losses, sharded = ([row["loss"] for row in r if "loss" in row] for r in rows)
    assert sharded == pytest.approx(losses, rel=1e-5)
    exported = SavedTensors(two / "model", "model")
    assert all(
        torch.equal(exported[name], SavedTensors(two / "checkpoints/step-0000004", "ema")[name])
        for name in exported
    )


if __name__ == "__main__":
    launch(main, Script, None)

"""Sharded training (FSDP2, HSDP) equals DDP, and a run goes on with another number of processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partialmethod
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import OPTIM, TinyLoader, fit_config, plain_loss
from forks import FSDP, fork, wait
from networks import Captioned, build
from torch import Tensor, nn

from unclip.models.unclip.prior import EmbeddingStats
from unclip.training.fit import fit
from unclip.training.initialization import read_weights
from unclip.training.launch import Run
from unclip.training.tensors import SavedTensors

HSDP = {**FSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}


class SampleLoader(TinyLoader):
    """40 samples per epoch; batch n of P processes has the samples that one would get in P."""

    def __len__(self) -> int:
        return 40 // (self.size * self.processes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            epoch, number = (int(x) for x in batch["key"][0][1:].partition("i")[0].split("b"))
            samples = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(epoch))
            first = number * self.size * self.processes
            rows = slice(first + self.rank, first + self.size * self.processes, self.processes)
            yield {**batch, "image": samples[rows]}


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


def start(output: Path, processes: int, env: dict[str, str] | None = None, **settings: Any) -> None:
    """Train in forks, on eight batches of four samples in each update, and wait for them."""
    resume = "latest" if output.is_dir() else None
    values = {"steps": 4, "precision": "fp32", "log_every": 1, "accumulate": 4 // processes}
    config = fit_config(output, **{**values, **settings})

    def train(rank: int) -> None:
        loader = SampleLoader(rank=rank, processes=processes)
        run = Run({"fit": vars(config)}, resume=resume)
        validation = {"val_loader": SampleLoader()} if config.val_every else {}
        model = Scaled()
        model.mean += rank  # like statistics of its own data; those of rank 0 count
        fit(model, plain_loss, loader, config, OPTIM, run=run, **validation)

    assert wait(fork(train, processes, env), 300) == [0] * processes


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


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_sharded_run_equals_one_process_and_resumes_with_any_number(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    start(one, 1)
    start(two, 2, FSDP, steps=2, async_save=True, val_every=2, val_batches=1)
    shards = sorted(p.name for p in (two / "checkpoints/step-0000002").glob("model*"))
    assert shards == ["model-00000.safetensors", "model-00001.safetensors"]
    start(two, 1, steps=3)
    start(two, 2, FSDP)
    assert_close(saved(two, 4), saved(one, 4))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    state = json.loads((two / "checkpoints/step-0000004/state.json").read_text())
    assert state["data"] == {"epoch": 1, "batch": 3}  # 4 updates of 16 samples
    exported = SavedTensors(two / "model", "model")
    _, averages = read_weights(two / "checkpoints/step-0000004")  # as for --init
    assert all(torch.equal(exported[name], averages[name]) for name in averages)


@pytest.mark.parametrize("env", [None, FSDP], ids=["DDP", "FSDP2"])
def test_statistics_are_those_of_the_first_process_and_are_restored(
    tmp_path: Path, env: dict[str, str] | None
) -> None:
    def train(steps: int, measured: float, resume: str | None) -> None:
        config = fit_config(tmp_path, steps, precision="fp32")

        def run(rank: int) -> None:
            stats, seen = EmbeddingStats(3), []
            stats.emb_mean += measured + rank

            def loss_fn(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
                seen.append(stats.emb_mean.tolist())
                return plain_loss(model, batch)

            loader = SampleLoader(rank=rank, processes=2)
            settings = Run({"fit": vars(config)}, resume=resume)
            fit(Scaled(), loss_fn, loader, config, OPTIM, run=settings, statistics=stats)
            assert seen == [[1.0] * 3]

        assert wait(fork(run, 2, env), 300) == [0, 0]

    train(1, 1.0, None)
    train(2, 5.0, "latest")
    saved = SavedTensors(tmp_path / "checkpoints/step-0000002", "statistics")
    assert saved["emb_mean"].tolist() == [1.0] * 3


@pytest.mark.nightly
@pytest.mark.parametrize("env", [None, HSDP], ids=["DDP", "HSDP"])
def test_other_kinds_of_parallelism_equal_one_process(
    tmp_path: Path, env: dict[str, str] | None
) -> None:
    # Two updates: the remainder of an epoch depends on the number of processes.
    start(tmp_path / "one", 1, steps=2)
    start(tmp_path / "four", 4, env, steps=2)
    assert_close(saved(tmp_path / "four", 2), saved(tmp_path / "one", 2))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "checkpointed": {"precision": "fp32", "gradient_checkpointing": True, "accumulate": 2},
    "compiled": {"precision": "fp32", "compile": True},
    "all": {"precision": "bf16", "gradient_checkpointing": True, "accumulate": 2, "compile": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "options"),
    [
        *product(["prior", "decoder", "clip"], OPTIONS),
        *product(["codec", "dalle"], ["plain"]),
    ],
)
def test_sharded_networks_equal_ddp(tmp_path: Path, network: str, options: str) -> None:
    """Both draw the same noise. Compilation is that of torch.compile without code generation."""

    def train(output: Path, env: dict[str, str] | None) -> None:
        config = fit_config(output, 3, log_every=1, **OPTIONS[options])

        def run(rank: int) -> None:
            nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
            model, loss_fn = build(network)
            loader = Captioned(rank=rank, processes=2)
            fit(model, loss_fn, loader, config, OPTIM, run=Run({"fit": vars(config)}))

        assert wait(fork(run, 2, env), 600) == [0, 0]

    train(tmp_path / "sharded", FSDP)
    train(tmp_path / "whole", None)
    in_bf16 = OPTIONS[options]["precision"] == "bf16"
    tolerance = 2e-2 if in_bf16 else 1e-4  # gradients are reduced in another order
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=tolerance)
    if not in_bf16:
        one, other = saved(tmp_path / "sharded", 3), saved(tmp_path / "whole", 3)
        assert one.keys() == other.keys()
        for name in (name for name in one if name.startswith("model/")):
            # A step of AdamW has the size lr even for a gradient that is only a rounding error.
            squares = one.get(name.replace("model/", "optimizer/exp_avg_sq/"), torch.ones(()))
            difference = (one[name] - other[name]).abs() * (squares > 1e-10)
            assert difference.max() < 1e-3, name

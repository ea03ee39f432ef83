"""The training loop: exact resume, and no loss of checkpoints after errors."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import (
    OPTIM,
    TinyLoader,
    checkpoint_tensors,
    denoising_loss,
    fit_config,
    plain_loss,
    plain_model,
    run_fit,
    tiny_model,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.training.dry_run import describe
from unclip.training.fit import fit
from unclip.training.launch import Run, make_accelerator
from unclip.training.log import available_trackers
from unclip.training.optim import OptimConfig
from unclip.training.stopping import SIGNALS, StopRequest


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.filterwarnings("ignore:this CPU has no bfloat16 instructions")
@pytest.mark.parametrize(
    "options", [{"precision": "fp32"}, {"precision": "bf16", "channels_last": True}], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    whole = run_fit(
        fit_config(uninterrupted, accumulate=2, **options),
        optim=replace(OPTIM, schedule="constant"),
    )
    config = fit_config(resumed, accumulate=2, **options)
    first = run_fit(replace(config, steps=3), optim=replace(OPTIM, schedule="constant"))
    torch.manual_seed(999)  # the state of the process does not matter
    second = run_fit(config, optim=replace(OPTIM, schedule="constant"), start={"resume": "latest"})
    # 3 x 2 batches, 5 per epoch: the first part stops within an epoch
    assert first.keys + second.keys == whole.keys
    assert_same(checkpoint_tensors(resumed, 6), checkpoint_tensors(uninterrupted, 6))
    assert not torch.equal(
        checkpoint_tensors(resumed, 6)["model/0.weight"],
        checkpoint_tensors(resumed, 3)["model/0.weight"],
    )


def test_validation_and_previews_do_not_change_the_training(tmp_path: Path) -> None:
    noises: list[Tensor] = []

    def preview(model: nn.Module) -> Image.Image:
        assert not model.training
        noises.append(torch.randn(3))
        return Image.new("RGB", (8, 8), "red")

    without, with_previews = tmp_path / "without", tmp_path / "with_previews"
    run_fit(fit_config(without))
    config = fit_config(
        with_previews,
        val_every=2,
        preview_every=3,
        save_every=1,
        log_every=1,
        trackers=("tensorboard",),
    )
    run_fit(config, val_loader=TinyLoader(2), preview=preview)
    assert_same(checkpoint_tensors(without, 6), checkpoint_tensors(with_previews, 6))
    assert torch.equal(noises[0], noises[1])  # the seed is fixed
    assert sorted(p.name for p in (with_previews / "previews").iterdir()) == [
        "step-0000003.png",
        "step-0000006.png",
    ]
    assert list((with_previews / "logs").rglob("events.out.tfevents.*"))


def test_a_validation_measures_its_first_samples_with_the_averaged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclip.training.fit.MEASURED", 6)
    seen: list[list[str]] = []
    model = tiny_model()

    def measure(batches: Sequence[dict[str, Any]]) -> dict[str, float]:
        assert all(len(batch["image"]) == len(batch["key"]) for batch in batches)
        seen.append([key for batch in batches for key in batch["key"]])
        torch.randn(3)  # must not change the training
        return {"weight": model[0].weight.sum().item()}

    runs: dict[str, dict[str, Any]] = {"without": {}, "measured": {"measure": measure}}
    for name, options in runs.items():
        model = tiny_model()
        config = fit_config(tmp_path / name, 4, val_every=2, log_every=0)
        options = {"run": Run({}), "val_loader": TinyLoader(3), **options}
        fit(model, denoising_loss, TinyLoader(), config, OPTIM, **options)
    assert seen == [[f"e0b{i // 4}i{i % 4}" for i in range(6)]] * 2
    assert_same(
        checkpoint_tensors(tmp_path / "without", 4), checkpoint_tensors(tmp_path / "measured", 4)
    )
    rows = [
        json.loads(row) for row in (tmp_path / "measured/metrics.jsonl").read_text().splitlines()
    ]
    average = checkpoint_tensors(tmp_path / "measured", 4)["ema/0.weight"].sum().item()
    assert rows[1]["val_weight"] == pytest.approx(average, rel=1e-5)
    without = [
        json.loads(row) for row in (tmp_path / "without/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in without]


def test_metrics_are_means_and_validation_noise_is_fixed(tmp_path: Path) -> None:
    losses: list[float] = []

    def recording_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        terms = denoising_loss(model, batch)
        losses.append(terms["loss"].item())
        return terms

    constant = OptimConfig(lr=1e-30, weight_decay=0.0)  # the validation loss must not change
    run_fit(
        fit_config(tmp_path, 4, accumulate=2, log_every=2, val_every=2),
        recording_loss,
        optim=constant,
        val_loader=TinyLoader(2),
    )
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert rows[0]["loss"] == pytest.approx(np.mean(losses[:4]), rel=1e-6)
    assert rows[2]["epoch"] == pytest.approx(8 / 5)
    assert (
        rows[1]["val_loss"] == rows[3]["val_loss"] == pytest.approx(np.mean(losses[-2:]), rel=1e-6)
    )
    assert {"grad_norm", "samples_per_s", "lr", "root"} <= rows[0].keys()


def test_accumulated_gradients_are_averaged(tmp_path: Path) -> None:
    norms = []
    for accumulate in (1, 3):
        config = fit_config(
            tmp_path / str(accumulate), 1, accumulate=accumulate, log_every=1, precision="fp32"
        )
        fit(
            plain_model(),
            lambda model, batch: plain_loss(model, {"image": torch.ones(1, 3, 4, 4)}),
            TinyLoader(),
            config,
            OPTIM,
        )
        norms.append(
            json.loads((tmp_path / str(accumulate) / "metrics.jsonl").read_text())["grad_norm"]
        )
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_updates_that_overflow_in_fp16_are_left_out_of_the_mean_gradient_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_scaler(*args: Any) -> Any:  # fp16 itself needs a GPU
        accelerator = make_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**127, backoff_factor=2.0**-127)
        return accelerator

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": 100 * plain_loss(model, batch)["loss"]}

    monkeypatch.setattr("unclip.training.fit.make_accelerator", with_scaler)
    norms = []
    for log_every in (1, 3):
        folder = tmp_path / str(log_every)
        run_fit(fit_config(folder, 3, log_every=log_every, precision="fp32"), loss_fn)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        norms.append([row.get("grad_norm") for row in rows])
    (overflow, *others), (mean,) = norms
    assert overflow is None
    assert mean == pytest.approx(sum(others) / 2)


def test_metrics_after_the_resumed_step_are_replaced(tmp_path: Path) -> None:
    config = fit_config(tmp_path, 4, log_every=1, save_every=2, keep=9)
    with pytest.raises(RuntimeError, match="power cut"):
        run_fit(config, failing_at(4, RuntimeError("power cut")))
    run_fit(config, start={"resume": "latest"})
    assert [
        json.loads(r)["step"] for r in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4]


def failing_at(batch_number: int, error: Exception) -> Callable:
    calls = []

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        calls.append(batch)
        if len(calls) == batch_number:
            raise error
        return denoising_loss(model, batch)

    return loss_fn


def test_the_averaged_weights_are_exported(tmp_path: Path) -> None:
    def export(model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "mine.pt")

    run_fit(fit_config(tmp_path), export=export)
    exported = torch.load(tmp_path / "model" / "mine.pt", weights_only=True)
    saved = checkpoint_tensors(tmp_path, 6)
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[f"ema/{name}"])
        assert not torch.equal(tensor, saved[f"model/{name}"])


def test_init_loads_only_the_weights(tmp_path: Path) -> None:
    run_fit(fit_config(tmp_path / "first"))
    start = {"init": str(tmp_path / "first" / "model")}
    run_fit(
        fit_config(tmp_path / "second", 1),
        optim=OptimConfig(lr=1e-30, weight_decay=0.0),
        start=start,
    )
    first, second = (
        checkpoint_tensors(tmp_path / "first", 6),
        checkpoint_tensors(tmp_path / "second", 1),
    )
    assert torch.equal(first["ema/0.weight"], second["model/0.weight"])
    assert second["optimizer/step/0.weight"] == 1


def test_a_resumed_run_may_change_only_some_settings(tmp_path: Path) -> None:
    run_fit(fit_config(tmp_path, 2))
    with pytest.raises(
        ValueError,
        match=r"other settings: model\.width was 8, is 16\. A resumed run may change only",
    ):
        run_fit(fit_config(tmp_path, 4), width=16, start={"resume": "latest"})
    with pytest.raises(
        ValueError, match=r"fit\.accumulate was 1, is 3; fit\.ema was 0\.999, is None"
    ):
        run_fit(fit_config(tmp_path, 4, accumulate=3, ema=None), start={"resume": "latest"})
    run_fit(
        fit_config(tmp_path, 4, log_every=1),
        optim=replace(OPTIM, lr=1e-3),
        start={"resume": "latest"},
    )
    assert (tmp_path / "checkpoints" / "step-0000004").is_dir()
    with pytest.raises(ValueError, match="already contains step-0000004, which would be lost"):
        run_fit(fit_config(tmp_path, 4))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_without_steps_left_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, steps: int
) -> None:
    run_fit(fit_config(tmp_path, 2))
    settings = (tmp_path / "config.json").read_text()
    assert "nothing to train" not in capsys.readouterr().out
    run_fit(fit_config(tmp_path, steps), start={"resume": "latest"})
    line = f"nothing to train: the checkpoint is at step 2 and fit.steps is {steps}; set fit.steps"
    assert line in capsys.readouterr().out
    assert (tmp_path / "config.json").read_text() == settings


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_saves_a_checkpoint_and_exits_0(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train/prior.py", "--config", "a b.yaml", "--init=x", "--resume", "y"]
    )
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    calls = []

    def loss_with_signal(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        calls.append(batch)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return denoising_loss(model, batch)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run_fit(fit_config(tmp_path, accumulate=2), loss_with_signal)
    assert stop.value.code == 0
    assert (len(calls), signal.getsignal(number)) == (4, before)
    command = "python train/prior.py --config 'a b.yaml' --resume latest"
    assert f"stopped after step 2; to resume: {command}" in capsys.readouterr().out
    run_fit(fit_config(tmp_path, accumulate=2), start={"resume": "latest"})
    run_fit(fit_config(tmp_path / "uninterrupted", accumulate=2))
    assert_same(checkpoint_tensors(tmp_path, 6), checkpoint_tensors(tmp_path / "uninterrupted", 6))


def test_a_signal_that_nohup_ignores_does_not_stop() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_update(tmp_path: Path, value: float) -> None:
    def bad_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        terms = denoising_loss(model, batch)
        return {**terms, "loss": terms["loss"] * value} if batch["key"][0] == "e0b3i0" else terms

    with pytest.raises(
        FloatingPointError,
        match=r"^step 4: loss (nan|inf), .*; batch: e0b3i0, e0b3i1, e0b3i2, e0b3i3",
    ):
        run_fit(fit_config(tmp_path, save_every=1), bad_loss)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000002",
        "step-0000003",
    ]
    assert all(tensor.isfinite().all() for tensor in checkpoint_tensors(tmp_path, 3).values())


def test_a_non_finite_gradient_stops_before_the_update(tmp_path: Path) -> None:
    def bad_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        zero = (model(batch["image"]) * 0).sum()
        return {"loss": zero.sqrt()}  # 0 with an infinite derivative

    with pytest.raises(
        FloatingPointError, match=r"^step 1: loss 0, gradient norm nan \(in 0\.weight and 5 more\)"
    ):
        run_fit(fit_config(tmp_path), bad_loss)
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """A limit on file sizes makes real writes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def loss_with_full_disk(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        if batch["key"][0] == "e0b3i0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        return denoising_loss(model, batch)

    try:
        with pytest.raises(
            OSError, match=r"cannot write .*step-0000004: .*; what was saved before is untouched"
        ) as error:
            run_fit(
                fit_config(tmp_path, save_every=1, trackers=("tensorboard",)), loss_with_full_disk
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000002",
        "step-0000003",
    ]
    run_fit(fit_config(tmp_path), start={"resume": "latest"})
    run_fit(fit_config(tmp_path / "uninterrupted"))
    assert_same(checkpoint_tensors(tmp_path, 6), checkpoint_tensors(tmp_path / "uninterrupted", 6))


def test_a_dry_run_prints_the_cost_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = nn.Linear(48, 10, bias=False)
    config = fit_config(tmp_path / "run", accumulate=3, precision="fp32")
    with pytest.raises(SystemExit) as stop:
        fit(
            model,
            lambda m, batch: {"loss": m(batch["image"].flatten(1)).square().mean()},
            TinyLoader(),
            config,
            OPTIM,
            run=Run({}, dry_run=True),
        )
    assert stop.value.code == 0
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    assert "480 (480 trained)" in text
    flops = 2 * 2 * 4 * 48 * 10  # product and weight gradient; a multiply-add counts as 2
    assert f"{3 * flops:.3e} per step, {flops / 4:.3e} per sample" in text
    # 480 weights of 4 bytes. At most, the gradient of a batch exists next to the sum of those
    # before it, with the gradients of 4 x 10 outputs and the loss and its gradient.
    sizes = "weights 0.00192 MB, gradients 0.00192 MB, AdamW 0.00384 MB, EMA 0.00192 MB"
    assert f"{sizes}, activations 0.00209 MB" in text


def test_dry_run_counts_attention() -> None:
    q = nn.Parameter(torch.randn(1, 2, 8, 4))  # 2 heads, 8 tokens, 4 channels per head
    text = describe(
        nn.ParameterList([q]),
        lambda: F.scaled_dot_product_attention(q, q, q).sum(),
        {"q": q},
        ema=False,
    )
    product = 2 * 2 * 8 * 8 * 4
    # 2 products forward; 4 backward, and the scores once more
    assert f"{(2 + 5) * product:.3e} per step" in text


def test_broken_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loader = TinyLoader()
    loader.broken = {"a.png": "damaged", "b.png": "damaged"}
    run_fit(fit_config(tmp_path, 1, log_every=1), loader=loader)
    assert "broken 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trackers": ("wandbb",)}, "unknown tracker 'wandbb'; expected one of .*tensorboard"),
        ({"gradient_checkpointing": True}, "Sequential does not support gradient.checkpointing"),
    ],
)
def test_unsupported_settings_are_rejected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_fit(fit_config(tmp_path, **changes))


def test_a_missing_default_tracker_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match=r"tensorboard is not installed; logging to metrics\.jsonl only"
    ):
        assert available_trackers(("tensorboard",)) == []
    with pytest.raises(ValueError, match="the tracker 'wandb' is not installed: pip install wandb"):
        available_trackers(("wandb", "tensorboard"))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"ema": 1.0}, {"save_every": -1}, {"keep": 0}, {"val_batches": 0}]
)
def test_invalid_settings_are_rejected(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        fit_config(tmp_path, **{"steps": 1, **wrong})

"""EMA, optimizer, learning rate, random state and checkpoint folders."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_clip, tiny_prior
from fitting import OPTIM, fit_config, run_fit, tiny_model
from safetensors.torch import save_file
from scripts import write_shape_images
from torch import nn

from unclip.config import to_dict
from unclip.data.loader import DataConfig, Loader
from unclip.files import atomic_folder
from unclip.models.codecs.quantizers import NearestConfig, VectorQuantizer
from unclip.training.checkpoints import Checkpoints, SavedState
from unclip.training.ema import EMA
from unclip.training.initialization import load_weights
from unclip.training.optim import OptimConfig, build_optimizer
from unclip.training.random_state import random_state, set_random_state
from unclip.training.run_state import RunState


def test_the_ema_decay_warms_up() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.9)
    nn.init.ones_(model.weight)
    ema.update()  # decay (1 + 0) / (10 + 0)
    with ema.swapped_in():
        torch.testing.assert_close(model.weight, torch.full((1, 2), 0.9))
    ema.updates = 10_000
    ema.update()
    with ema.swapped_in():
        torch.testing.assert_close(model.weight, torch.full((1, 2), 0.9 + 0.1 * 0.1))
    assert torch.equal(model.weight, torch.ones(1, 2))


def test_ema_ignores_frozen_parameters_and_is_restored_after_an_error() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    ema = EMA(model, decay=0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
        model.bias += 1
    with pytest.raises(KeyError), ema.swapped_in():
        assert torch.equal(model.weight, before)
        bias = model.bias.detach().clone()
        raise KeyError
    assert torch.equal(model.weight, before + 1)
    assert torch.equal(model.bias, bias)


def test_ema_averages_bf16_weights_in_fp32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.999)
    ema.updates = 10**6
    nn.init.zeros_(model.weight)
    for _ in range(100):  # each changes the average by less than bf16 resolves
        ema.update()
    with ema.swapped_in():
        assert model.weight.item() == pytest.approx(0.999**100, abs=4e-3)


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = OptimConfig(lr=1.0, warmup=10, final_lr=0.1)
    assert [config.lr_at(step, 110) for step in (0, 4, 9, 10)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0]
    )
    assert config.lr_at(60, 110) == pytest.approx(0.55)  # half way
    assert config.lr_at(110, 110) == pytest.approx(0.1)
    assert replace(config, schedule="constant").lr_at(109, 110) == 1.0
    assert OptimConfig(lr=1.0, warmup=0).lr_at(0, 10) == 1.0
    early = replace(config, decay_steps=110)
    assert [early.lr_at(step, 1000) for step in (60, 110, 900)] == pytest.approx([0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"warmup": -1}, {"final_lr": 2.0}, {"clip_norm": 0.0}, {"decay_steps": 9}],
)
def test_invalid_settings_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        OptimConfig(**wrong)


def test_gains_biases_and_embeddings_have_no_weight_decay() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(3, 2), "linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}
    )
    decayed, other = build_optimizer(model, OptimConfig(weight_decay=0.5)).param_groups
    assert [p is model["linear"].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], other["weight_decay"], len(other["params"])) == (0.5, 0.0, 4)


def test_embedding_parameters_have_no_weight_decay() -> None:
    prior, codec = tiny_prior(), VectorQuantizer(NearestConfig(), 8, 4)
    for model, name in (
        (prior, "positions"),
        (codec, "codebook"),
        (tiny_clip(), "positional_embedding"),
    ):
        other = {id(p) for p in build_optimizer(model, OptimConfig()).param_groups[-1]["params"]}
        tables = [p for key, p in model.named_parameters() if key.endswith(name)]
        assert tables and all(id(p) in other for p in tables)


def test_a_model_without_trainable_parameters_is_rejected() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False), OptimConfig())


def random_numbers() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.randn(()).item(),
    ]


def test_random_state_is_restored_exactly() -> None:
    random_numbers()  # an odd number of normals: each library buffers the second of a pair
    state = random_state()
    first = random_numbers()
    assert random_numbers() != first
    set_random_state(state)
    assert random_numbers() == first


def test_a_gpu_build_works_without_a_gpu(monkeypatch) -> None:
    """current_accelerator() returns a device even if the machine has none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    state = random_state()
    assert state["device"] is None
    set_random_state(state)


def test_a_folder_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(
        OSError, match="cannot write .*model: No space left; what was saved before is untouched"
    ):
        with atomic_folder(target) as folder:
            (folder / "a").write_text("second")
            raise OSError("No space left")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "a").read_text() == "first"
    with atomic_folder(target) as folder:
        (folder / "b").write_text("third")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failure_of_a_folder_inside_another_is_described_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="^cannot write [^:]*model: full; [^;]*untouched$"):
        with atomic_folder(tmp_path / "step"), atomic_folder(tmp_path / "model"):
            raise OSError("full")
    assert not [*tmp_path.iterdir()]


def write_empty_checkpoint(folder: Path) -> None:
    for name in ("model", "optimizer"):
        save_file({}, folder / f"{name}.safetensors")
    (folder / "rng-0.json").write_text("{}")
    state = SavedState(1, 0.0, {}, None, None, 1, {}, {})
    (folder / "state.json").write_text(json.dumps(to_dict(state)))


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / ".step-0000009.new").mkdir()  # left by a killed run
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.find("latest")
    for step in (9, 9_999_999, 10_000_000):
        with checkpoints.writing(step) as folder:
            write_empty_checkpoint(folder)
    assert [p.name for p in checkpoints.all()] == ["step-9999999", "step-10000000"]
    assert checkpoints.find("latest").name == "step-10000000"
    assert checkpoints.find(str(tmp_path / "step-9999999")).name == "step-9999999"
    with pytest.raises(
        FileNotFoundError, match="nowhere is not a checkpoint; expected a folder such as"
    ):
        checkpoints.find("nowhere")


def test_initial_weights_are_loaded(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_file({k: v.half() for k, v in other.state_dict().items()}, tmp_path / "model.safetensors")
    load_weights(model, tmp_path)
    torch.testing.assert_close(model.weight, other.weight, atol=1e-3, rtol=1e-3)
    assert model.weight.dtype == torch.float32
    save_file(nn.Linear(2, 2, bias=False).state_dict(), tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=r"ema\.safetensors does not fit: missing: bias"):
        load_weights(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no ema\.safetensors or model\.safetensors in"):
        load_weights(model, tmp_path.parent)


@pytest.mark.filterwarnings("ignore:the data has other samples")  # it is not compared here
def test_more_processes_resume_in_the_remainder_of_an_epoch(tmp_path: Path) -> None:
    data = DataConfig(str(tmp_path / "data"), image_size=8, batch_size=1)
    write_shape_images(tmp_path / "data")

    def remove(*images: int) -> None:
        for image in images:
            for file in (tmp_path / "data").glob(f"{image}.*"):
                file.unlink()

    def resume() -> Loader:
        model, loader = tiny_model(), Loader(data, num_processes=2, process_index=0)
        settings = {"fit": vars(config), "model": {"width": 8}}
        optimizer = build_optimizer(model, OPTIM)
        state = RunState(model, optimizer, None, loader, None, settings, processes=2)
        state.restore(tmp_path / "run/checkpoints/step-0000010")
        return loader

    remove(11)
    config = fit_config(tmp_path / "run", 10)
    run_fit(config, loader=Loader(data))  # 10 of 11 batches
    assert resume().state_dict() == {"epoch": 1, "batch": 0}  # 5 of 5 batches
    remove(9, 10)
    with pytest.raises(ValueError, match="batch 5, but an epoch has 4 .*the data has changed"):
        resume()

"""LoRA adapters from training to generation: scripts, resume, pipelines, command line, bundling."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import OPTIM, checkpoint_tensors, fit_config, run_fit
from scripts import ROOT, run_script, write_shape_images

import unclip
from unclip.cli.main import main as cli
from unclip.image_io import read_metadata
from unclip.weights import read_tensors

pytest.importorskip("peft")


def train(network: str, output: str, *settings: str, init: str | None = None, resume: bool = False):
    run_script(
        ROOT / "train" / f"{network}.py",
        *("--config", str(ROOT / f"configs/tiny/{network}.yaml"), "--set", f"fit.output={output}"),
        *("--set", "fit.trackers=[]", "--set", "val_data=null"),
        *(word for setting in settings for word in ("--set", setting)),
        *(("--init", init) if init else ()),
        *(("--resume", "latest") if resume else ()),
    )


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    """A folder with a model of configs/tiny, and an adapter of its prior and of its decoder."""
    folder, before = tmp_path_factory.mktemp("lora"), Path.cwd()
    write_shape_images(folder / "data/tiny")
    os.chdir(folder)
    try:
        for network in ("clip", "prior", "decoder"):
            train(network, f"runs/tiny/{network}", "fit.steps=2")
        bundle("runs/tiny/model")
        for network in ("prior", "decoder"):
            init, rate = f"runs/tiny/{network}/model", "optim.lr=0.3"
            train(network, f"runs/{network}", "lora.rank=2", "fit.steps=4", rate, init=init)
        yield folder
    finally:
        os.chdir(before)


def bundle(output: str, *settings: str) -> None:
    settings = ("upsamplers=[]", "options.upsamplers=[]", f"output={output}", *settings)
    run_script(
        ROOT / "train/bundle.py",
        *("--config", str(ROOT / "configs/tiny/model.yaml")),
        *(word for setting in settings for word in ("--set", setting)),
    )


def sample(pipe: unclip.UnCLIPPipeline) -> np.ndarray:
    """Return embeddings and pixels as one vector: the images hardly depend on this prior."""
    result = pipe("a red circle", num_images=2, seed=0, progress=False)
    pixels = [np.asarray(image, np.float32) / 255 for image in result.images]
    return np.concatenate([result.image_emb.numpy().ravel(), np.stack(pixels).ravel()])


@pytest.mark.parametrize("network", ["prior", "decoder"])
def test_an_adapter_changes_the_images_and_can_be_unloaded(network):
    pipe, path = unclip.load("runs/tiny/model"), f"runs/{network}/model"
    assert sorted(os.listdir(path)) == ["adapter_config.json", "adapter_model.safetensors"]
    before = sample(pipe)
    assert np.array_equal(sample(pipe.load_lora(path, 0.0)), before)
    adapted = sample(pipe.load_lora(path))  # again: the scale changes
    assert len(pipe.adapters.loaded) == 1 and not np.array_equal(adapted, before)
    assert np.array_equal(sample(pipe.unload_lora(path)), before)
    merged = sample(pipe.load_lora(path, merge=True))
    assert abs(merged - adapted).max() < 0.01


def test_several_adapters_and_metadata():
    pipe = unclip.load("runs/tiny/model")
    pipe.load_lora("runs/prior/model", 0.5).load_lora("runs/decoder/model", component="decoder")
    entry = pipe("a red circle", seed=0, progress=False).metadata[0]
    assert entry["lora"] == [
        {"path": "runs/prior/model", "scale": 0.5},
        {"path": "runs/decoder/model", "scale": 1.0},
    ]
    pipe.unload_lora()
    assert "lora" not in pipe("a red circle", seed=0, progress=False).metadata[0]


def test_a_path_is_the_same_however_it_is_written():
    pipe, path = unclip.load("runs/tiny/model"), "runs/prior/model"
    pipe.load_lora(path, 0.5).load_lora(os.path.abspath(path), 1.0)
    assert [one.scale for one in pipe.adapters.loaded] == [1.0]
    pipe.unload_lora(path)
    assert not pipe.adapters.loaded


@pytest.mark.parametrize("merge", [True, False])
def test_a_merged_adapter_is_not_added_again(merge):
    pipe, path = unclip.load("runs/tiny/model"), "runs/prior/model"
    merged = sample(pipe.load_lora(path, merge=True))
    with pytest.raises(ValueError, match="model is merged already; load the model again"):
        pipe.load_lora(os.path.abspath(path), merge=merge)
    assert len(pipe.adapters.loaded) == 1 and np.array_equal(sample(pipe), merged)


def test_bundling_merges_adapters():
    bundle("runs/merged", "loras=[runs/prior/model, runs/decoder/model]")
    pipe = unclip.load("runs/tiny/model")
    pipe.load_lora("runs/prior/model").load_lora("runs/decoder/model")
    assert abs(sample(unclip.load("runs/merged")) - sample(pipe)).max() < 0.01
    with pytest.raises(ValueError, match="the LoRA runs/prior/model is not part of the weights"):
        pipe.save_pretrained("runs/unmerged")


@pytest.mark.parametrize("network", ["prior", "decoder"])
def test_a_resumed_adapter_equals_an_uninterrupted_one(network):
    init, lora = f"runs/tiny/{network}/model", "lora={rank: 2, dropout: 0.1}"
    train(network, f"runs/whole_{network}", lora, "fit.steps=4", init=init)
    train(network, f"runs/parts_{network}", lora, "optim.decay_steps=4", "fit.steps=2", init=init)
    train(network, f"runs/parts_{network}", lora, "optim.decay_steps=4", "fit.steps=4", resume=True)
    whole, parts = (
        read_tensors(f"runs/{run}_{network}/model/adapter_model.safetensors")
        for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def adapter_of(run: str) -> dict[str, torch.Tensor]:
    return read_tensors(f"runs/{run}/model/adapter_model.safetensors")


@pytest.mark.parametrize("network", ["prior", "decoder"])
@pytest.mark.parametrize("source", ["checkpoints/step-0000004", "model"])
def test_other_settings_start_from_an_adapter(network, source):
    run, init = f"{network}_{Path(source).name}", f"runs/{network}/{source}"
    base = [f"base=runs/tiny/{network}/model", "model=null"] if source == "model" else []
    settings = ["lora.rank=2", "data.batch_size=2", "optim.lr=1.0e-30", "optim.weight_decay=0"]
    train(network, f"runs/{run}", *settings, "fit.steps=1", *base, init=init)
    before, after = adapter_of(network), adapter_of(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = (f"{folder}/checkpoints" for folder in (f"runs/{network}", f"runs/{run}"))
    old, new = (read_tensors(next(Path(f).glob("*/ema.safetensors"))) for f in saved)
    assert all(torch.equal(old[name], new[name]) for name in old if name in new)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["lora.rank=2"], "runs/prior/model is an adapter; set base, not model"),
        (
            ["lora.rank=3", "base=runs/tiny/prior/model", "model=null"],
            "lora.rank is 3 and lora.alpha is 3; expected 2 and 2, as in runs/prior/model",
        ),
        ([], "runs/prior/model is an adapter; set lora to train it further"),
    ],
)
def test_an_adapter_that_cannot_be_continued(settings, message):
    with pytest.raises(SystemExit, match=message):
        train("prior", "runs/none", *settings, init="runs/prior/model")


@pytest.mark.parametrize(
    "settings, message",
    [
        (["lora={rank: 3}"], "lora.rank is 3 and lora.alpha is 3; expected 2 and 2, as in runs/"),
        (["lora={rank: 2, alpha: 8}"], "lora.alpha is 8; expected 2 and 2, as in runs/prior/check"),
        ([], "runs/prior/checkpoints/step-0000004 is an adapter; set lora to train it further"),
    ],
)
def test_a_checkpoint_of_an_adapter_that_cannot_be_continued(settings, message):
    with pytest.raises(SystemExit, match=message):
        train("prior", "runs/none", *settings, init="runs/prior/checkpoints/step-0000004")


def test_an_adapter_is_not_a_network():
    base = ["base=runs/prior/model", "model=null", "lora.rank=2"]
    with pytest.raises(SystemExit, match=r"runs/prior/model is an adapter \(LoRA\); expected the"):
        train("prior", "runs/none", *base)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pipe: pipe.load_lora("nowhere"), "no LoRA in nowhere; expected a folder with"),
        (lambda pipe: pipe.load_lora("runs/prior/model", component="up"), "component is 'up'"),
        (
            lambda pipe: pipe.load_lora("runs/prior/model", component="decoder"),
            "fits no network of the model: decoder: there is no linear layer blocks.0",
        ),
        (lambda pipe: pipe.load_lora("runs/prior/model", float("nan")), "scale is nan"),
        (lambda pipe: pipe.load_lora("runs/prior/model", "x"), "scale is 'x'"),
        (lambda pipe: pipe.unload_lora("a"), "the LoRA a is not loaded; loaded: none"),
        (
            lambda pipe: pipe.load_lora("runs/prior/model", merge=True).unload_lora(),
            "is merged into the weights; load the model again",
        ),
        (
            lambda pipe: pipe.quantize().load_lora("runs/prior/model"),
            r"call load_lora\(\) before quantize\(\)",
        ),
        (
            lambda pipe: pipe.offload().load_lora("runs/prior/model"),
            r"call load_lora\(\) before offload\(\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(unclip.load("runs/tiny/model"))


def test_an_adapter_needs_a_trained_network():
    with pytest.raises(SystemExit, match="lora adapts a trained network; .*--init"):
        train("prior", "runs/none", "lora.rank=2")


@pytest.mark.parametrize("extra", [[], ["--offload"], ["--quantize", "int8"], ["--compile"]])
def test_the_command_line_generates_with_adapters(extra, capsys):
    prompt = ["generate", "a red circle", "--seed", "0", "--quiet"]
    base = [*prompt, "--model", "runs/tiny/model", *extra]
    assert cli([*base, "-o", "plain.png"]) == 0
    assert cli([*base, "--lora", "runs/prior/model:2", "-o", "lora.png"]) == 0, capsys.readouterr()
    assert read_metadata("lora.png")[0]["lora"] == [{"path": "runs/prior/model", "scale": 2.0}]
    assert Path("lora.png").read_bytes() != Path("plain.png").read_bytes()

    again = ["generate", "--from", "lora.png", "--model", "runs/tiny/model", "-o", "again.png"]
    assert cli([*again, "--quiet"]) == 2
    assert "with LoRA adapters; give --lora runs/prior/model:2" in capsys.readouterr().err
    assert cli(["info", "lora.png"]) == 0
    assert capsys.readouterr().out.endswith("--trust-model --lora runs/prior/model:2\n")
    assert cli([*again, "--quiet", "--lora", "runs/prior/model:2", *extra]) == 0
    assert Path("again.png").read_bytes() == Path("lora.png").read_bytes()


def test_dalle_has_no_adapters(capsys):
    assert cli(["generate", "a", "--model", "emoji-dalle1", "--lora", "x"]) == 2
    assert "is of kind dalle, which has no --lora" in capsys.readouterr().err


# -- the optimizer with 8-bit state


def test_8_bit_state_is_resumed_exactly(tmp_path):
    pytest.importorskip("bitsandbytes")
    optim = replace(OPTIM, kind="adamw8bit")
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        resume = {"start": {"resume": "latest"}} if (name, steps) == ("parts", 6) else {}
        config = fit_config(tmp_path / name, steps)
        run_fit(config, optim=replace(optim, schedule="constant"), width=256, **resume)
    whole, parts = (checkpoint_tensors(tmp_path / name, 6) for name in ("whole", "parts"))
    assert any(t.dtype == torch.uint8 for t in whole.values())
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_an_8_bit_optimizer_that_is_not_installed(tmp_path):
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'unclip\[finetune\]'"):
        run_fit(fit_config(tmp_path), optim=replace(OPTIM, kind="adamw8bit"))

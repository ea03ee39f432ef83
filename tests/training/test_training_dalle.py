"""DALL-E stage two: losses of text and image codes, a frozen codec, the training script."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import ROOT, load_script, run_script, write_shape_images

import unclip
from unclip.checkpoints.store import load_component, save_component
from unclip.config import load_config
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqvae import ConvNetConfig
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.tokenizer import BPETokenizer
from unclip.training.checkpoints import MANIFEST, write_manifest
from unclip.training.dalle import DALLELoss, DALLELossConfig, image_codes

CAPTIONS = ["a red circle", "a blue square", "a green circle", "a black square"]
CODEC = DVAEConfig(image_size=16, vocab_size=32, width=8, groups=3, blocks=1, code_width=8)
CONFIG = DALLEConfig(270, 12, 32, (4, 4), width=16, depth=2, heads=2, head_dim=8, kernel=3)
KEEP_ALL = DALLELossConfig(drop_text=0.0, bpe_dropout=0.0)


@pytest.fixture
def parts() -> tuple[DALLE, BPETokenizer, DVAE]:
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(CAPTIONS, CONFIG.text_vocab, CONFIG.context_length, marked=False)
    return DALLE(CONFIG), tokenizer, DVAE(CODEC).eval()


@pytest.fixture
def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1, "caption": CAPTIONS}


def test_text_and_image_losses_are_means_and_text_has_weight_one_eighth(parts, batch):
    dalle, tokenizer, codec = parts
    terms = DALLELoss(*parts, KEEP_ALL)(dalle, batch)
    tokens, codes = dalle.tokens(*tokenizer(CAPTIONS)), codec.encode(batch["image"])
    logits = dalle(tokens, codes)
    text = F.cross_entropy(logits.text.flatten(0, 1), tokens.flatten())
    image = F.cross_entropy(logits.codes.flatten(0, 1), codes.flatten())
    torch.testing.assert_close([terms["text"], terms["image"]], [text, image])
    torch.testing.assert_close(terms["loss"], text / 8 + image * 7 / 8)


def test_the_codec_has_no_gradient(parts, batch):
    dalle, _, codec = parts
    batch["image"].requires_grad_()
    DALLELoss(*parts, KEEP_ALL)(dalle, batch)["loss"].backward()
    assert all(p.grad is None for p in codec.parameters()) and batch["image"].grad is None
    assert any(p.grad is not None and p.grad.any() for p in dalle.code_emb.parameters())


def test_precomputed_codes_give_the_same_loss(parts, batch):
    dalle, _, codec = parts
    loss = DALLELoss(*parts, KEEP_ALL)
    precomputed = {"codes": image_codes(codec, batch), "caption": CAPTIONS}
    assert torch.equal(loss(dalle, batch)["loss"], loss(dalle, precomputed)["loss"])


def test_dropped_captions_are_excluded_from_the_text_loss(parts, batch):
    dalle, tokenizer, codec = parts
    loss = DALLELoss(*parts, DALLELossConfig(drop_text=0.5, bpe_dropout=0.0))
    torch.manual_seed(2)
    drop = torch.rand(4) < 0.5
    assert 0 < drop.sum() < 4
    torch.manual_seed(2)
    terms = loss(dalle, batch)
    ids, mask = tokenizer(CAPTIONS)
    codes = codec.encode(batch["image"])
    log_p = dalle.log_likelihood(dalle.tokens(ids, mask, drop), codes)
    torch.testing.assert_close(terms["image"], -log_p[1].mean())
    torch.testing.assert_close(terms["text"], -log_p[0][~drop].mean())


def test_eval_mode_drops_nothing(parts, batch):
    dalle = parts[0].eval()
    dropping = DALLELoss(*parts, DALLELossConfig(drop_text=0.9, bpe_dropout=0.9))
    torch.testing.assert_close(dropping(dalle, batch), DALLELoss(*parts, KEEP_ALL)(dalle, batch))
    dalle.train()
    assert dropping(dalle, batch)["image"] != DALLELoss(*parts, KEEP_ALL)(dalle, batch)["image"]


def train(*arguments: str) -> None:
    run_script(
        ROOT / "train/dalle.py", "--config", str(ROOT / "configs/tiny/dalle.yaml"), *arguments
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with images, a codec, and a trained transformer of configs/tiny."""
    folder, before = tmp_path_factory.mktemp("dalle"), Path.cwd()
    write_shape_images(folder / "data/tiny")
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        save_component(DVAE(CODEC), "runs/tiny/codec/model")
        train()
        yield folder
    finally:
        os.chdir(before)


def test_a_run_writes_model_tokenizer_and_previews(workplace):
    run = workplace / "runs/tiny/dalle"
    config = load_config(ROOT / "configs/tiny/dalle.yaml", load_script("dalle").DALLETraining)
    assert load_component(run / "model").config == config.model
    tokenizer = BPETokenizer.load(
        run / "model/tokenizer.json", config.model.context_length, marked=False
    )
    assert tokenizer.vocab_size <= config.model.text_vocab
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"val_loss", "val_text", "val_image"} <= rows[-1].keys()
    assert rows[-1]["val_loss"] < next(row for row in rows if "val_loss" in row)["val_loss"]
    (preview,) = (run / "previews").glob("*.png")
    assert Image.open(preview).height >= 2 * 16  # reconstructions above samples


def test_the_parts_are_bundled_as_a_model(workplace):
    bundle = "--config", str(ROOT / "configs/tiny/model_dalle.yaml")
    run_script(ROOT / "train/bundle.py", *bundle)
    pipe = unclip.load("runs/tiny/model_dalle", device="cpu")
    assert (pipe.kind, pipe.name, pipe.options.top_k) == (
        "dalle",
        "tiny-dalle1",
        16,
    ) and pipe.clip is None
    tokenizer = BPETokenizer.load("runs/tiny/dalle/model/tokenizer.json", 16, marked=False)
    assert torch.equal(pipe.tokenizer(CAPTIONS)[0], tokenizer(CAPTIONS)[0])
    assert [image.size for image in pipe(CAPTIONS, seed=0, progress=False).images] == [(16, 16)] * 4
    with pytest.raises(SystemExit, match="runs/tiny/codec/model is a DVAE; expected a DALLE"):
        run_script(ROOT / "train/bundle.py", *bundle, "--set=dalle=runs/tiny/codec/model")
    with pytest.raises(
        SystemExit, match="runs/tiny/dalle/model is a DALLE; expected an image codec"
    ):
        run_script(ROOT / "train/bundle.py", *bundle, "--set=codec=runs/tiny/dalle/model")
    save_component(GaussianVAE(GaussianVAEConfig(image_size=16, net=ConvNetConfig(width=8))), "vae")
    with pytest.raises(SystemExit, match="vae is a GaussianVAE; expected discrete codes"):
        run_script(ROOT / "train/bundle.py", *bundle, "--set=codec=vae")
    with pytest.raises(SystemExit, match="--set codex=3: codex is unknown; did you mean 'codec'"):
        run_script(ROOT / "train/bundle.py", *bundle, "--set=codex=3")


def test_a_run_is_resumed(workplace):
    train("--resume", "latest", "--set=fit.steps=10")
    assert (workplace / "runs/tiny/dalle/checkpoints/step-0000010").is_dir()


@pytest.mark.filterwarnings("ignore:the data has other samples")
@pytest.mark.parametrize(
    "start",
    ["--init model", "--init file", "--init checkpoint", "--init bundle", "--resume", "old"],
)
def test_weights_keep_their_tokenizer(workplace, tmp_path, monkeypatch, start):
    for folder in ("runs", "data"):
        shutil.copytree(workplace / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/tiny/dalle"
    expected = (run / "model/tokenizer.json").read_text()
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert (checkpoint / "tokenizer.json").read_text() == expected
    for text in Path("data/tiny").glob("*.txt"):
        text.write_text("zwölf zwölf")  # a new tokenizer would differ
    (tmp_path / "bundle").mkdir()
    shutil.copytree(run / "model", tmp_path / "bundle/dalle")
    shutil.copytree(run / "model", tmp_path / "bundle/tokenizer")
    (tmp_path / "bundle/dalle/tokenizer.json").unlink()
    places = {
        "model": run / "model",
        "file": run / "model/model.safetensors",
        "checkpoint": checkpoint,
    }
    out = run
    if start.startswith("--init"):
        out = tmp_path / "out"
        arguments = [
            "--init",
            str({**places, "bundle": tmp_path / "bundle/dalle"}[start.split()[1]]),
        ]
        arguments += ["--set=fit.steps=1"]
    else:
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        arguments = ["--resume", "latest", f"--set=fit.steps={step + 1}"]
        if start == "old":
            (checkpoint / "tokenizer.json").unlink()
            (checkpoint / MANIFEST).unlink()
            write_manifest(checkpoint, {})
    train(*arguments, f"--set=fit.output={out}")
    assert (out / "model/tokenizer.json").read_text() == expected
    assert all(
        (folder / "tokenizer.json").read_text() == expected
        for folder in sorted(out.glob("checkpoints/*"))[-1:]
    )


def test_weights_without_a_tokenizer_are_rejected(workplace, tmp_path):
    shutil.copy("runs/tiny/dalle/model/model.safetensors", tmp_path)
    arguments = "--init", str(tmp_path), f"--set=fit.output={tmp_path / 'out'}", "--set=fit.steps=1"
    with pytest.raises(SystemExit, match=r"error: .*tokenizer\.json is missing"):
        train(*arguments)
    train(*arguments, "--set=tokenizer=runs/tiny/dalle/model/tokenizer.json")


def test_a_dry_run_prints_the_costs(workplace, capsys):
    train("--dry-run", "--set=fit.output=runs/tiny/dry")
    assert (
        "59,678 trained" in capsys.readouterr().out and not (workplace / "runs/tiny/dry").exists()
    )


def test_images_are_encoded_once(workplace, capsys):
    pytest.importorskip("pyarrow")
    run_script(
        ROOT / "train/encode.py",
        "data/tiny",
        "codes",
        "--codec",
        "runs/tiny/codec/model",
        "--device",
        "cpu",
    )
    assert "12 rows, 0 broken" in capsys.readouterr().out
    once = (
        "--set=data.path=codes",
        "--set=data.augment.shift=0",
        "--set=fit.output=runs/tiny/once",
    )
    train(*once, "--set=fit.steps=2")
    assert (workplace / "runs/tiny/once/model/model.safetensors").is_file()
    with pytest.raises(SystemExit, match="contains image codes, which cannot be augmented"):
        train("--set=data.path=codes", "--set=fit.output=runs/tiny/other")
    with pytest.raises(
        SystemExit, match="error: runs/tiny/dalle/model is a DALLE; expected a codec"
    ):
        run_script(
            ROOT / "train/encode.py", "data/tiny", "again", "--codec", "runs/tiny/dalle/model"
        )
    with pytest.raises(
        SystemExit, match="error: codes already contains image codes; expected images"
    ):
        run_script(ROOT / "train/encode.py", "codes", "again", "--codec", "runs/tiny/codec/model")


def test_mismatched_parts_are_rejected(workplace):
    with pytest.raises(
        SystemExit,
        match="the codec has 32 codes on a grid of 4 x 4; the transformer expects 64 on 4 x 4",
    ):
        train("--set=model.image_vocab=64")
    with pytest.raises(SystemExit, match="data/tiny is read at 8 pixels; expected 16"):
        train("--set=data.image_size=8")
    with pytest.raises(SystemExit, match="runs/tiny/dalle/model is a DALLE; expected a codec"):
        train("--set=codec=runs/tiny/dalle/model")
    with pytest.raises(SystemExit, match=r"tokenizer\.json has \d+ tokens; expected at most 100"):
        train("--set=tokenizer=runs/tiny/dalle/model/tokenizer.json", "--set=model.text_vocab=100")
    with pytest.raises(SystemExit, match="drop_text is 1.5; expected less than 1"):
        train("--set=loss.drop_text=1.5")

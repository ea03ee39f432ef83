"""The training scripts in order, from images to a model that generates images."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import FSDP, fork, wait
from PIL import Image
from scripts import ROOT, load_script, run_script, write_shape_images

import unclip
from unclip.checkpoints import folders
from unclip.checkpoints.registry import load_codec
from unclip.clip import CLIP
from unclip.config import load_config
from unclip.data import embeddings
from unclip.data.loader import open_data
from unclip.data.parts import PartWriter
from unclip.weights import read_tensors

NETWORKS = (
    "clip",
    "prior",
    "ar_prior",
    "one_shot_prior",
    "layout",
    "layout_prior",
    "decoder",
    "upsampler",
    "codec",
    "dalle",
)

TEXT = "{kind: transformer, vocab_size: 300, context_length: 16, width: 16, depth: 1, heads: 1}"


def train(network: str, *arguments: str) -> None:
    run_script(
        ROOT / "train" / f"{network}.py",
        "--config",
        str(ROOT / f"configs/tiny/{network}.yaml"),
        *arguments,
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which all networks of configs/tiny are trained and bundled."""
    folder, before = tmp_path_factory.mktemp("tiny"), Path.cwd()
    write_shape_images(folder / "data/tiny")
    os.chdir(folder)
    try:
        for network in NETWORKS:
            train(network)
        run_script(ROOT / "train/bundle.py", "--config", str(ROOT / "configs/tiny/model.yaml"))
        yield folder
    finally:
        os.chdir(before)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_writes_weights_checkpoints_and_settings(workplace, network):
    run = workplace / "runs/tiny" / network
    weights = next((run / "model").glob("*.safetensors"))
    assert all(tensor.isfinite().all() for tensor in read_tensors(weights).values())
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert [
        json.loads((run / "checkpoints" / c / "state.json").read_text())["step"]
        for c in checkpoints
    ] == [4, 8]
    assert json.loads((run / "config.json").read_text())["fit"]["steps"] == 8
    assert (run / "checkpoints" / checkpoints[-1] / "tokenizer.json").is_file() == (
        network in ("clip", "dalle")
    )


@pytest.mark.parametrize(
    ("network", "figures"),
    [
        ("clip", {"val_recall_of_captions", "val_recall_of_images"}),
        ("prior", {"val_cosine", "val_cosine_unrelated", "val_cosine_gap"}),
        ("ar_prior", {"val_cosine", "val_cosine_unrelated", "val_cosine_gap"}),
        ("one_shot_prior", {"val_cosine", "val_cosine_unrelated", "val_cosine_gap"}),
    ],
)
def test_validation_measures_what_clip_and_the_priors_are_for(workplace, network, figures):
    rows = (workplace / f"runs/tiny/{network}/metrics.jsonl").read_text().splitlines()
    validations = [row for row in map(json.loads, rows) if "val_loss" in row]
    assert len(validations) == 2 and all(figures <= row.keys() for row in validations)
    assert all(-1 <= row[name] <= 1 for row in validations for name in figures)


@pytest.mark.parametrize("network", ["decoder", "upsampler", "codec", "dalle"])
def test_image_networks_write_previews(workplace, network):
    assert list((workplace / "runs/tiny" / network).rglob("*.png"))


def test_the_text_tower_is_trained_alone(workplace):
    tower = "--set=text_tower={base: runs/tiny/clip/model}"
    train("clip", tower, "--set=fit.output=runs/tiny/clip_text")
    before, after = (
        read_tensors(workplace / f"runs/tiny/{name}/model/open_clip_model.safetensors")
        for name in ("clip", "clip_text")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("visual.", "logit")) for name in changed)


def test_a_decoder_is_trained_for_sampled_layouts(workplace):
    arguments = (
        "--set=layout=runs/tiny/layout/model",
        "--set=layout_prior=runs/tiny/layout_prior/model",
        "--set=model.layout={emb_dim: 32, size: 8, width: 32, depth: 2}",
        "--set=model.unet.in_channels=6",
        "--set=fit.output=runs/tiny/decoder_layouts",
    )
    train("decoder", *arguments)
    output = "--set=output=runs/tiny/model_layouts"
    parts = (
        "--set=decoder=runs/tiny/decoder_layouts/model",
        "--set=layout_prior=runs/tiny/layout_prior/model",
    )
    model = str(ROOT / "configs/tiny/model.yaml")
    run_script(ROOT / "train/bundle.py", "--config", model, output, *parts)
    pipe = unclip.load(workplace / "runs/tiny/model_layouts")
    assert pipe("a red circle", seed=0, progress=False).images[0].size == (32, 32)
    with pytest.raises(SystemExit, match="layout_prior is runs/x; expected null without layouts"):
        train("decoder", "--set=layout_prior=runs/x")


def test_the_prior_has_the_statistics_of_the_embeddings(workplace):
    weights = read_tensors(workplace / "runs/tiny/prior/model/model.safetensors")
    fresh = torch.full_like(weights["emb_std"], len(weights["emb_std"]) ** -0.5)
    assert not torch.equal(weights["emb_std"], fresh) and weights["emb_mean"].any()


def test_the_bundle_generates_images(workplace):
    pipe = unclip.load(workplace / "runs/tiny/model")
    result = pipe(["a red circle", "a blue square"], num_images=2, seed=3, progress=False)
    assert [image.size for image in result.images] == [(32, 32)] * 4
    assert result.image_emb.shape == (4, 32) and result.image_emb.isfinite().all()
    again = pipe.variations(result.images[0], seed=1, progress=False)
    assert again.images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("config", "setting", "message"),
    [
        ("model", "prior=runs/p/model", "prior runs/p/model: train it with train/prior.py,"),
        ("model", "upsamplers=[runs/u]", "upsampler 0 runs/u: train it with train/upsampler.py"),
        ("model", "loras=[runs/l]", "lora 0 runs/l: train it with train/prior.py or"),
        ("model_dalle", "codec=runs/c", "codec runs/c: train it with train/codec.py"),
    ],
)
def test_the_script_of_a_missing_component_is_named(workplace, config, setting, message):
    with pytest.raises(SystemExit, match=f"error: missing {message}"):
        run_script(
            ROOT / "train/bundle.py",
            *("--config", str(ROOT / f"configs/tiny/{config}.yaml"), "--set", setting),
        )


@pytest.mark.parametrize("clip", [None, "runs/tiny/clip/model", "shared"])
def test_a_dalle_is_bundled_with_its_own_a_shared_or_no_clip(workplace, clip, monkeypatch):
    models = {"shared": workplace / "runs/tiny/model"}
    monkeypatch.setattr(folders, "bundled_models", lambda: models)
    setting = [] if clip is None else [f"--set=clip={clip}"]
    run_script(
        ROOT / "train/bundle.py", "--config", str(ROOT / "configs/tiny/model_dalle.yaml"), *setting
    )
    folder = workplace / "runs/tiny/model_dalle"
    assert (folder / "clip").is_dir() == (clip == "runs/tiny/clip/model")
    assert folders.shared_from(folder) == ({"clip": "shared"} if clip == "shared" else {})
    pipe = unclip.load(folder)
    result = pipe(
        "a red circle", num_candidates=None if clip is None else 2, seed=3, progress=False
    )
    assert result.images[0].size == (16, 16) and (result.scores is None) == (pipe.clip is None) == (
        clip is None
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prior=runs/tiny/decoder/model", "runs/tiny/decoder/model is a Decoder; expected a prior"),
        (
            "decoder=runs/tiny/prior/model",
            "runs/tiny/prior/model is a DiffusionPrior; expected a decoder",
        ),
        (
            "inpainter=runs/tiny/layout/model",
            "runs/tiny/layout/model is a Layout; expected a decoder",
        ),
        (
            "upsamplers=[runs/tiny/decoder/model]",
            "runs/tiny/decoder/model is a Decoder; expected an upsampler",
        ),
    ],
)
def test_a_network_of_the_wrong_kind_is_not_bundled(workplace, setting, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run_script(
            ROOT / "train/bundle.py",
            "--config",
            str(ROOT / "configs/tiny/model.yaml"),
            "--set",
            setting,
        )


@pytest.mark.parametrize("kind", ["ar_prior", "one_shot_prior"])
def test_a_prior_without_diffusion_replaces_the_diffusion_prior(workplace, kind):
    pipe = unclip.load(workplace / "runs/tiny/model")
    pipe.prior = unclip.load_prior(workplace / "runs/tiny" / kind / "model")
    assert pipe("a red circle", seed=0, progress=False).image_emb.isfinite().all()
    assert not torch.equal(pipe.prior.emb_std, torch.full((32,), 32**-0.5))  # measured on the data
    settings = f"--set=prior=runs/tiny/{kind}/model", f"--set=output=runs/tiny/with_{kind}"
    config = str(ROOT / "configs/tiny/model.yaml")
    run_script(ROOT / "train/bundle.py", "--config", config, *settings)
    assert type(unclip.load(workplace / f"runs/tiny/with_{kind}").prior) is type(pipe.prior)


def test_explained_variance_determines_the_components(workplace):
    train(
        "ar_prior",
        "--set=explained_variance=0.9",
        "--set=fit.output=runs/tiny/explained",
        "--set=fit.steps=1",
    )
    config = json.loads((workplace / "runs/tiny/explained/model/config.json").read_text())
    assert config["components"] == 2
    codes = unclip.load_prior(workplace / "runs/tiny/explained/model").network.codes
    assert codes.components.shape == (2, 32) and codes.mean.any()


def test_a_run_is_resumed_with_more_steps(workplace):
    run = workplace / "runs/tiny/prior"
    before = read_tensors(run / "model/model.safetensors")["head.weight"].clone()
    train("prior", "--resume", "latest", "--set=fit.steps=10")
    assert json.loads((run / "config.json").read_text())["fit"]["steps"] == 10
    assert not torch.equal(read_tensors(run / "model/model.safetensors")["head.weight"], before)


def test_a_run_starts_from_the_weights_of_another(workplace):
    before = read_tensors(workplace / "runs/tiny/decoder/model/model.safetensors")[
        "image_to_time.weight"
    ]
    output = "--set=fit.output=runs/tiny/continued"
    train(
        "decoder",
        "--init",
        "runs/tiny/decoder/model",
        output,
        "--set=fit.steps=1",
        "--set=optim.lr=1e-9",
    )
    after = read_tensors(workplace / "runs/tiny/continued/model/model.safetensors")[
        "image_to_time.weight"
    ]
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_a_decoder_is_fine_tuned_to_inpaint_and_resumed(workplace):
    config = ["--config", str(ROOT / "configs/tiny/inpaint.yaml"), "--set=optim.lr=1e-6"]
    script, run, plain = (
        ROOT / "train/decoder.py",
        workplace / "runs/tiny/inpaint",
        "runs/tiny/decoder/model",
    )
    run_script(script, *config, "--init", plain, "--set=fit.steps=4")
    run_script(script, *config, "--resume", "latest", "--set=fit.steps=8")
    weights, before = (
        read_tensors(Path(folder) / "model.safetensors") for folder in (run / "model", plain)
    )
    channels = before["unet.stem.weight"].shape[1]
    after = weights["unet.stem.weight"]
    assert after.shape[1] == channels // 3 * 7 and after[:, channels:].any()
    torch.testing.assert_close(after[:, :channels], before["unet.stem.weight"], atol=1e-4, rtol=0)
    assert list(run.rglob("*.png"))

    bundle = ["--set=inpainter=runs/tiny/inpaint/model", "--set=output=runs/tiny/painter"]
    run_script(ROOT / "train/bundle.py", "--config", str(ROOT / "configs/tiny/model.yaml"), *bundle)
    pipe = unclip.load(workplace / "runs/tiny/painter")
    image, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    painted = pipe.inpaint(image, mask, "a blue square", seed=0, progress=False)
    assert painted.metadata[0]["arguments"]["painting"]["trained"] is True
    assert painted.images[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_decoder_is_conditioned_on_a_frozen_layout(workplace):
    settings = [
        "--set=layout=runs/tiny/layout/model",
        "--set=fit.output=runs/tiny/settings",
        "--set=emb_noise=0.5",
    ]
    settings += [
        "--set=model.layout={emb_dim: 32, size: 8, width: 32, depth: 2}",
        "--set=model.unet.in_channels=6",
    ]
    train("decoder", *settings, "--init", "runs/tiny/decoder/model", "--set=fit.steps=4")
    train("decoder", *settings, "--resume", "latest", "--set=fit.steps=8")
    after, layout = (
        read_tensors(workplace / f"runs/tiny/{name}/model/model.safetensors")
        for name in ("settings", "layout")
    )
    for name, tensor in layout.items():
        assert torch.equal(after[f"layout.{name}"], tensor)
    assert after["unet.stem.weight"][:, 12:].any()
    own = ["--set=fit.output=runs/tiny/shown_again", "--set=fit.steps=1"]
    train(
        "decoder", *settings[2:], *own, "--init", "runs/tiny/settings/model"
    )  # its weights include the layout
    again = read_tensors(workplace / "runs/tiny/shown_again/model/model.safetensors")
    assert all(torch.equal(again[f"layout.{name}"], tensor) for name, tensor in layout.items())
    with pytest.raises(SystemExit, match="model.layout is not trained here; set layout"):
        train("decoder", *settings[2:], *own)
    with pytest.raises(SystemExit, match="model.layout, its config, is missing"):
        train("decoder", settings[0])
    with pytest.raises(SystemExit, match="agreement is 5.0; expected 0, unless task is 'inpaint'"):
        train("decoder", "--set=agreement=5.0")
    with pytest.raises(SystemExit, match="agreement is 5.0; expected 0, unless task is 'inpaint'"):
        train("decoder", *settings[1:], "--set=agreement=5.0")
    with pytest.raises(SystemExit, match="emb_mix is 0.5; expected 0, unless task is 'inpaint'"):
        train("decoder", "--set=emb_mix=0.5")
    with pytest.raises(SystemExit, match="copy_paste is 2.0; expected at most 1"):
        train("decoder", "--set=copy_paste=2.0")


def test_a_decoder_without_layout_is_trained_with_noise_on_its_embeddings(workplace):
    """The standard deviation of the noise is measured once: a resumed run equals a whole one."""
    settings = ["--set=emb_noise=0.5", "--set=stats_batches=1", "--set=optim.schedule=constant"]
    outputs = [f"--set=fit.output=runs/tiny/noisy_{name}" for name in ("whole", "resumed")]
    train("decoder", *settings, outputs[0])
    train("decoder", *settings, outputs[1], "--set=fit.steps=4")
    train("decoder", *settings, outputs[1], "--resume", "latest")
    whole, resumed, plain = (
        read_tensors(workplace / f"runs/tiny/{name}/model/model.safetensors")
        for name in ("noisy_whole", "noisy_resumed", "decoder")
    )
    assert whole.keys() == plain.keys()  # the noise is not part of the saved decoder
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    statistics = [
        read_tensors(
            workplace / f"runs/tiny/noisy_{name}/checkpoints/{step}/statistics.safetensors"
        )
        for name, step in (("whole", "step-0000008"), ("resumed", "step-0000004"))
    ]
    clip = CLIP.from_pretrained("runs/tiny/clip/model")
    config = load_config(ROOT / "configs/tiny/decoder.yaml", load_script("decoder").DecoderTraining)
    loader = open_data(config.data)
    with torch.no_grad():
        std = clip.encode_image(next(iter(loader))["image"]).std(dim=0)
    for saved in statistics:
        torch.testing.assert_close(saved["emb_std"], std)


def test_a_layout_network_learns_the_same_from_precomputed_embeddings(workplace):
    pytest.importorskip("pyarrow")
    clip, output = ("--clip", "runs/tiny/clip/model"), "--set=fit.output=runs/tiny/layout_emb"
    embeddings.main(["data/tiny", "emb_plain", *clip])
    embeddings.main(["data/tiny", "emb_layout", *clip, "--layout", "8"])
    with pytest.raises(SystemExit, match="have no layouts; compute them with --layout 8"):
        train("layout", "--set=data.path=emb_plain", "--set=val_data=null", output)
    train("layout", "--set=data.path=emb_layout", output)
    losses = [
        json.loads((workplace / f"runs/tiny/{run}/metrics.jsonl").read_text().splitlines()[0])
        for run in ("layout", "layout_emb")
    ]
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=0.05)


def test_a_dry_run_prints_the_costs_and_writes_nothing(workplace, capsys):
    train("upsampler", "--dry-run", "--set=fit.output=runs/tiny/dry")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("parameters", "memory", "FLOPs"))
    assert not (workplace / "runs/tiny/dry").exists()


def test_a_run_folder_is_not_overwritten(workplace):
    with pytest.raises(SystemExit, match="already contains"):
        train("upsampler")


def test_a_typo_is_reported_with_its_line(workplace, tmp_path):
    config = tmp_path / "typo.yaml"
    config.write_text((ROOT / "configs/tiny/prior.yaml").read_text().replace("warmup:", "warm_up:"))
    with pytest.raises(
        SystemExit, match=r"typo\.yaml:\d+: optim\.warm_up is unknown; did you mean 'warmup'"
    ):
        run_script(ROOT / "train/prior.py", "--config", str(config))


def test_a_typo_in_the_config_of_clip_is_reported_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"clip\.yaml:2: model: model_cfg\.text_cfg\.widht is unknown; did you mean 'width'"
    with pytest.raises(SystemExit, match=message):
        train("clip", "--dry-run", "--set=model.model_cfg.text_cfg.widht=32")


def test_a_config_of_clip_without_a_vocabulary_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shape_images(tmp_path / "data/tiny")
    with pytest.raises(SystemExit, match=r"text_cfg\.vocab_size is missing; expected the size"):
        train("clip", "--dry-run", "--set=model.model_cfg.text_cfg.vocab_size=null")


@pytest.mark.parametrize(
    ("network", "settings"),
    [("codec", ("perceptual=null", "adversarial=null")), ("upsampler", ())],
)
def test_images_suffice_where_no_captions_are_used(network, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shape_images(tmp_path / "data/tiny")
    for caption in (tmp_path / "data/tiny").glob("*.txt"):
        caption.unlink()
    train(network, "--set=fit.steps=1", *(f"--set={setting}" for setting in settings))
    assert (tmp_path / f"runs/tiny/{network}/model").is_dir()
    with pytest.raises(SystemExit, match="no captions; expected"):
        train("clip")


def test_a_codec_is_exported_without_its_discriminator(workplace):
    codec = load_codec(workplace / "runs/tiny/codec/model")
    assert (codec.grid, codec.vocab_size) == ((4, 4), 32)
    rows = [
        json.loads(row)
        for row in (workplace / "runs/tiny/codec/metrics.jsonl").read_text().splitlines()
    ]
    assert {"nll", "kl_bits", "usage", "perplexity", "hinge", "perceptual"} <= rows[0].keys()
    temperatures = [row["temperature"] for row in rows if "temperature" in row]
    assert temperatures == sorted(temperatures, reverse=True) and temperatures[-1] < 0.3
    train(
        "codec",
        "--init",
        "runs/tiny/codec/model",
        "--set=fit.output=runs/tiny/tuned",
        "--set=fit.steps=1",
    )
    tuned = load_codec(workplace / "runs/tiny/tuned/model")
    assert (tuned.encoder.input.w - codec.encoder.input.w).abs().max() < 0.01


def test_errors_in_a_codec_config_are_reported(workplace):
    with pytest.raises(SystemExit, match="data has images of 8 pixels; expected 16"):
        train("codec", "--set=data.image_size=8", "--set=fit.output=runs/tiny/faulty")
    with pytest.raises(
        SystemExit, match="anneal.kl is unknown; this codec anneals temperature, kl_weight"
    ):
        train(
            "codec",
            "--set=anneal.kl={start: 0, end: 1, steps: 2}",
            "--set=fit.output=runs/tiny/faulty",
        )
    with pytest.raises(
        SystemExit, match="model.kind is 'vae'; expected 'dvae' or 'gaussian' or 'vqgan' or 'vqvae'"
    ):
        train("codec", "--set=model.kind=vae", "--set=fit.output=runs/tiny/faulty")
    with pytest.raises(SystemExit, match="model.withd is unknown; did you mean 'width'"):
        train("codec", "--set=model.withd=3", "--set=fit.output=runs/tiny/faulty")


def test_accelerate_launches_a_script(workplace):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        str(ROOT / "train/clip.py"),
    ]
    arguments = [
        "--config",
        str(ROOT / "configs/tiny/clip.yaml"),
        "--set=fit.output=runs/tiny/launched",
    ]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (workplace / "runs/tiny/launched/model/tokenizer.json").is_file()


def test_weights_that_do_not_exist_are_named(workplace):
    with pytest.raises(SystemExit, match="none does not exist; expected a model"):
        train("clip", "--init", "none", "--set=fit.output=runs/tiny/none")


def test_a_saved_clip_is_fine_tuned(workplace):
    before, after = workplace / "runs/tiny/clip/model", workplace / "runs/tiny/clip_more/model"
    settings = "--set=fit.output=runs/tiny/clip_more", "--set=fit.steps=1", "--set=optim.lr=1e-9"
    train("clip", "--init", str(before), *settings)
    assert (after / "tokenizer.json").read_text() == (before / "tokenizer.json").read_text()
    one, other = (
        read_tensors(folder / "open_clip_model.safetensors") for folder in (before, after)
    )
    floats = [
        name for name, tensor in one.items() if tensor.is_floating_point() and "running" not in name
    ]
    assert floats and all(torch.allclose(one[name], other[name], atol=1e-6) for name in floats)


@pytest.mark.parametrize(
    ("network", "setting", "message"),
    [
        (
            "prior",
            "text_width=64",
            r"model\.text_width is 64; expected 32, as in the CLIP runs/tiny/clip/model",
        ),
        ("prior", "context_length=8", r"model\.context_length is 8; the CLIP .* has 16"),
        ("layout", "emb_dim=64", r"model\.emb_dim is 64; expected 32"),
        ("decoder", "emb_dim=64", r"model\.emb_dim is 64; expected 32"),
        ("decoder", f"text={TEXT}", r"model\.text\.vocab_size is 300; the CLIP .* has 320"),
        (
            "clip",
            "model_cfg.text_cfg.vocab_size=200",
            r"tokenizer\.json has 2\d\d tokens; expected at most 200",
        ),
    ],
)
def test_a_network_that_does_not_match_clip_is_rejected(workplace, network, setting, message):
    tokenizer = ["--set=tokenizer=runs/tiny/clip/model/tokenizer.json"] if network == "clip" else []
    with pytest.raises(SystemExit, match=message):
        train(network, f"--set=model.{setting}", *tokenizer, "--set=fit.output=runs/tiny/unfit")
    assert not Path("runs/tiny/unfit").exists()


def test_unsuitable_data_is_rejected(workplace, tmp_path):
    pytest.importorskip("pyarrow")
    captions = {"caption": ["a", "b"]}
    for name, width in (("emb", 32), ("wide", 48)):
        emb = torch.rand(2, width).numpy()
        PartWriter(tmp_path / name).write_part(0, {"img_emb": emb, "text_emb": emb}, captions)
    codes = PartWriter(tmp_path / "codes")
    codes.write_part(0, {"codes": torch.zeros(2, 4, 4).byte().numpy()}, captions)
    (tmp_path / "codes/codes.json").write_text('{"vocab_size": 32}')
    output = "--set=fit.output=runs/tiny/unfit"
    for network in ("clip", "codec", "decoder", "upsampler"):
        with pytest.raises(SystemExit, match="emb contains embeddings(; expected images$|, which)"):
            train(network, f"--set=data.path={tmp_path}/emb", output)
    with pytest.raises(
        SystemExit, match="codes contains image codes; expected images or embeddings"
    ):
        train("prior", f"--set=data.path={tmp_path}/codes", output)
    with pytest.raises(SystemExit, match="wide has embeddings of width 48; .* 32"):
        train("prior", f"--set=data.path={tmp_path}/wide", output)
    with pytest.raises(
        SystemExit, match="emb contains embeddings, which cannot be augmented or cropped"
    ):
        train("prior", f"--set=data.path={tmp_path}/emb", "--set=data.augment.shift=0.1", output)
    with pytest.raises(SystemExit, match="stats_batches is 0; expected at least 1"):
        train("prior", "--set=stats_batches=0", output)


def test_two_processes_agree_on_the_number_of_components(workplace):
    settings = (
        "--set=fit.steps=1",
        "--set=fit.output=runs/tiny/explained_by_two",
        "--set=explained_variance=0.7",
    )
    assert wait(fork(lambda rank: train("ar_prior", *settings), 2), 300) == [0, 0]
    assert (workplace / "runs/tiny/explained_by_two/model").is_dir()


@pytest.mark.parametrize("network", ["decoder", "codec"])
def test_two_processes_train_a_sharded_network_with_previews(workplace, network):
    output = f"--set=fit.output=runs/tiny/sharded_{network}"
    arguments = [f"--config={ROOT}/configs/tiny/{network}.yaml", output, "--set=fit.steps=4"]
    arguments += ["--set=fit.preview_every=2", *(["--set=adversarial=null"] * (network == "codec"))]

    def train(rank: int) -> None:
        run_script(ROOT / f"train/{network}.py", *arguments)

    assert wait(fork(train, 2, FSDP), 600) == [0, 0]
    folder = workplace / f"runs/tiny/sharded_{network}"
    assert len(list((folder / "previews").iterdir())) == 2
    assert len(list((folder / "checkpoints/step-0000004").glob("model-0000?.safetensors"))) == 2
    loaded = unclip.checkpoints.store.load_component(folder / "model")
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_a_dry_run_of_two_processes_ends_with_a_gathering_loss(workplace, tmp_path):
    def dry_run(rank: int) -> None:
        with (tmp_path / f"{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
            train("clip", "--dry-run", "--set=fit.output=runs/tiny/dry")

    assert wait(fork(dry_run, 2), 300) == [0, 0]
    printed = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert printed.count("per step") == 1


def test_a_grown_decoder_keeps_its_trained_levels(workplace):
    small = workplace / "runs/tiny/decoder/model"
    levels = json.loads((small / "config.json").read_text())["unet"]["levels"]
    channels, blocks = levels[0]["channels"], 2
    arguments = ["--small", str(small), "--blocks", str(blocks), "--out", "grown"]
    run_script(ROOT / "train/progressive_grow.py", "--channels", str(channels), *arguments)

    config = json.loads((workplace / "grown/config.json").read_text())
    assert config["unet"]["levels"] == [
        {"channels": channels, "blocks": blocks, "attention": False},
        *levels,
    ]
    assert json.loads((workplace / "grown/schedule.json").read_text())["shift"] == 2.0
    inner, outer = (
        read_tensors(folder / "model.safetensors") for folder in (small, workplace / "grown")
    )
    first = "unet.down.{}.res.conv1.weight"  # after the two new blocks and their downsampling
    assert torch.equal(outer[first.format(3)], inner[first.format(0)])
    assert torch.equal(outer["unet.mid.0.res.conv1.weight"], inner["unet.mid.0.res.conv1.weight"])
    assert (
        len(unclip.checkpoints.store.load_component("grown").unet.up)
        == len(levels) * 2 + blocks + 1
    )
    with pytest.raises(
        SystemExit, match="runs/tiny/prior/model is a DiffusionPrior; expected a decoder"
    ):
        run_script(
            ROOT / "train/progressive_grow.py",
            "--small",
            "runs/tiny/prior/model",
            "--channels",
            "8",
            "--out",
            "other",
        )
    arguments[-1] = str(small / "config.json")
    with pytest.raises(SystemExit, match=r"config\.json is not a directory"):
        run_script(ROOT / "train/progressive_grow.py", "--channels", str(channels), *arguments)
    arguments[-1] = "grown"
    with pytest.raises(SystemExit, match=f"has {channels + 8} channels; expected {channels}"):
        run_script(ROOT / "train/progressive_grow.py", "--channels", str(channels + 8), *arguments)
    with pytest.warns(FutureWarning, match="train/progressive_grow.py"):  # the old name
        run_script(ROOT / "train/grow.py", "--channels", str(channels), *arguments)

"""Every config is valid and can be built; the paper's and Karlo's have the published sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, load_script, run_script
from torch import nn

from unclip.checkpoints.store import NETWORKS, load_component
from unclip.clip import CLIP
from unclip.config import load_config, to_dict
from unclip.models.unet import Attention

CONFIGS = sorted(
    path.relative_to(ROOT / "configs").as_posix()
    for path in ROOT.glob("configs/**/*.yaml")
    if path.parent.name != "accelerate"
)
CONFIG_CLASSES = {
    "clip": ("clip", "CLIPTraining"),
    "prior": ("prior", "PriorTraining"),
    "ar": ("ar_prior", "ARPriorTraining"),
    "one": ("one_shot_prior", "OneShotPriorTraining"),
    "layout": ("layout", "LayoutTraining"),
    "layout_prior": ("layout_prior", "LayoutPriorTraining"),
    "decoder": ("decoder", "DecoderTraining"),
    "inpaint": ("decoder", "DecoderTraining"),
    "upsampler": ("upsampler", "UpsamplerTraining"),
    "codec": ("codec", "CodecTraining"),
    "dvae": ("codec", "CodecTraining"),
    "dalle": ("dalle", "DALLETraining"),
    "model": ("bundle", "Parts"),
}
STACKS = sorted({Path(name).parent.name for name in CONFIGS} - {"finetune"})
PROCESSES = 64  # configs/paper and configs/karlo are written for this number

PARAMETERS = {
    "paper/clip": 986_523_137,
    "paper/prior": 1_225_927_680,
    "paper/ar_prior": 1_220_275_200,
    "paper/decoder": 3_567_370_758,
    "paper/upsampler_256": 729_702_083,
    "paper/upsampler_1024": 282_059_139,
    "paper/dvae": 97_616_006,
    "paper/dalle": 12_293_857_024,
    "karlo/prior": 1_022_028_544,
    "karlo/decoder": 893_318_086,
    "karlo/upsampler": 691_579_523,
    "karlo/upsampler_last": 2 * 691_579_523,
}
PAPER_SIZES = {  # Table 3
    "paper/prior": 1.0e9,
    "paper/ar_prior": 1.0e9,
    "paper/decoder": 3.5e9,
    "paper/upsampler_256": 0.7e9,
    "paper/upsampler_1024": 0.3e9,
    "paper/dalle": 12.0e9,  # 2102.12092, table 1
}
VISION = {"image_size": 256, "patch_size": 16, "width": 1280, "layers": 32}
UPSAMPLER = {
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.weight_decay": 0,
    "model.unet.mid_attention": False,
}
PAPER = {  # Table 3, 2.1, 2.2 and appendix C
    "paper/clip": {
        **{f"model.model_cfg.vision_cfg.{name}": value for name, value in VISION.items()},
        "model.model_cfg.text_cfg.width": 1024,
        "model.model_cfg.text_cfg.layers": 24,
        "optim.lr": 3e-4,
        "batch": 32_768,
    },
    "paper/prior": {
        "model.context_length": 256,
        "model.width": 2048,
        "model.depth": 24,
        "model.heads": 32,
        "drop.text": 0.1,
        "schedule.kind": "cosine",
        "schedule.num_timesteps": 1000,
        "optim.lr": 1.1e-4,
        "optim.betas": [0.9, 0.96],
        "optim.eps": 1e-6,
        "optim.weight_decay": 0.06,
        "fit.steps": 600_000,
        "fit.ema": 0.9999,
        "batch": 4096,
    },
    "paper/ar_prior": {
        "model.context_length": 256,
        "model.width": 2048,  # Table 3's text encoder, which CLIP replaces here
        "model.depth": 24,
        "model.heads": 32,
        "model.components": 319,
        "model.buckets": 1024,
        "drop.text": 0.1,
        "optim.lr": 1.6e-4,
        "optim.betas": [0.9, 0.91],
        "optim.eps": 1e-10,
        "optim.weight_decay": 0.04,
        "fit.steps": 1_000_000,
        "fit.ema": 0.999,
        "batch": 4096,
    },
    "paper/decoder": {
        "channels": [512, 1024, 1536, 2048],
        "depth": 3,
        "attention": [False, True, True, True],  # at 32, 16 and 8 of 64 pixels
        "model.unet.head_dim": 64,
        "model.unet.dropout": 0.1,
        "model.context_tokens": 4,
        "model.learned_variance": True,
        "model.text.context_length": 256,
        "model.text.width": 2048,
        "model.text.depth": 24,
        "model.text.heads": 32,
        "drop.text": 0.5,
        "drop.image": 0.1,
        "schedule.kind": "cosine",
        "optim.lr": 1.2e-4,
        "optim.betas": [0.9, 0.999],
        "optim.eps": 1e-8,
        "optim.weight_decay": 0,
        "fit.steps": 800_000,
        "fit.ema": 0.9999,
        "batch": 2048,
    },
    "paper/upsampler_256": {
        **UPSAMPLER,
        "channels": [320, 640, 960, 1280],
        "depth": 3,
        "attention": [False] * 4,
        "model.unet.dropout": 0.1,
        "data.crop": 256 // 4,
        "schedule.kind": "cosine",
        "corruption.kind": "blur",
        "corruption.kernel": 3,
        "corruption.sigma": [0.6, 0.6],
        "optim.lr": 1.2e-4,
        "fit.steps": 1_000_000,
        "fit.ema": 0.9999,
        "batch": 1024,
    },
    "paper/upsampler_1024": {
        **UPSAMPLER,
        "channels": [192, 192, 384, 384, 768, 768],
        "depth": 2,
        "attention": [False] * 6,
        "model.unet.dropout": 0,
        "data.crop": 1024 // 4,
        "schedule.kind": "linear",
        "corruption.kind": "bsr",
        "optim.lr": 1e-4,
        "fit.steps": 1_000_000,
        "fit.ema": 0.9999,
        "batch": 512,
    },
    "paper/dvae": {  # 2102.12092, A
        "model.image_size": 256,
        "model.vocab_size": 8192,
        "anneal.temperature.start": 1,
        "anneal.temperature.end": 1 / 16,
        "anneal.temperature.steps": 150_000,
        "anneal.kl_weight.end": 6.6,
        "anneal.kl_weight.steps": 5000,
        "optim.lr": 1e-4,
        "optim.betas": [0.9, 0.999],
        "optim.eps": 1e-8,
        "optim.weight_decay": 1e-4,
        "optim.final_lr": 1.25e-6 / 1e-4,
        "optim.decay_steps": 1_200_000,
        "fit.steps": 3_000_000,
        "fit.ema": 0.999,
        "batch": 512,
    },
    "paper/dalle": {  # 2102.12092, 2.2, B.1 and B.2
        "model.text_vocab": 16_384,
        "model.context_length": 256,
        "model.image_vocab": 8192,
        "model.grid": [32, 32],
        "model.depth": 64,
        "model.heads": 62,
        "model.head_dim": 64,
        "model.width": 3968,
        "model.attention": ["row", "column", "row", "row"],
        "model.last_attention": "conv",
        "model.kernel": 11,
        "loss.text_weight": 1 / 8,
        "loss.bpe_dropout": 0.1,
        "optim.lr": 4.5e-4,
        "optim.betas": [0.9, 0.96],
        "optim.eps": 1e-8,
        "optim.weight_decay": 0.045,
        "optim.warmup": 5000,
        "optim.final_lr": 2**-5,
        "optim.clip_norm": 4,
        "fit.steps": 430_000,
        "batch": 1024,
    },
}


def kind_of(name: str) -> str:
    """Return the kind of network, such as "upsampler" for upsampler_256.yaml."""
    return re.match("layout_prior|[a-z]+", Path(name).stem)[0]


@cache
def config(name: str) -> Any:
    """Load a config by its path under configs/, as the class of its script."""
    script, cls = CONFIG_CLASSES[kind_of(name)]
    return load_config(ROOT / "configs" / name, getattr(load_script(script), cls))


@cache
def network(name: str) -> nn.Module:
    """Build a config's network on the meta device."""
    networks, settings = {config: network for network, config in NETWORKS.values()}, config(name)
    if getattr(settings, "base", None):
        return load_component(ROOT / settings.base)
    model = settings.model
    with torch.device("meta"):
        return (
            CLIP(model, tokenizer=lambda texts: None)
            if kind_of(name) == "clip"
            else networks[type(model)](model)
        )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def at(values: Mapping[str, Any], place: str) -> Any:
    for key in place.split("."):
        values = values[key]
    return values


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_valid_and_its_network_can_be_built(name):
    if kind_of(name) == "model":
        parts = config(name)
        assert parts.kind == "dalle" or len(parts.options.upsamplers) == len(parts.upsamplers)
    else:
        assert count(network(name)) > 0


@pytest.mark.parametrize("name", ["karlo", "paper"])
def test_a_decoder_without_layout_takes_noise_on_its_embeddings(name):
    training = load_script("decoder").DecoderTraining
    path = ROOT / f"configs/{name}/decoder.yaml"
    assert load_config(path, training, ["emb_noise=0.3"]).emb_noise == 0.3


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert count(network(f"{name}.yaml")) == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER)
def test_hyperparameters_of_the_paper(name):
    settings = to_dict(config(f"{name}.yaml"))
    settings["batch"] = settings["data"]["batch_size"] * settings["fit"]["accumulate"] * PROCESSES
    if unet := settings["model"].get("unet"):
        settings["channels"] = [level["channels"] for level in unet["levels"]]
        settings["attention"] = [level["attention"] for level in unet["levels"]]
        (settings["depth"],) = {level["blocks"] for level in unet["levels"]}
    assert {place: at(settings, place) for place in PAPER[name]} == PAPER[name]


def test_the_12_billion_model_has_12_09_billion_weights_in_its_layers():
    layers = network("paper/dalle.yaml").layers
    assert (
        sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        == 64 * 12 * 3968**2
        == 12_092_178_432
    )
    kinds = [pattern.kind for pattern in config("paper/dalle.yaml").model.patterns]
    assert kinds == [
        "conv" if i == 64 else "column" if (i - 2) % 4 == 0 else "row" for i in range(1, 65)
    ]


def test_the_table_of_sizes_is_correct_and_explains_large_differences():
    table = (ROOT / "configs/paper/README.md").read_text()
    for name, parameters in PARAMETERS.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}.yaml` |")]
        assert f"| {parameters:,} |" in row
        if size := PAPER_SIZES.get(name):
            off = parameters / size - 1
            assert f"| {off:+.0%} |".replace("-", "−") in row
            assert abs(off) <= 0.1 or f"**`{name}.yaml`**" in table


def test_karlo_sizes_equal_the_published_checkpoint():
    prior, decoder = network("karlo/prior.yaml"), network("karlo/decoder.yaml")
    statistics = prior.emb_mean.numel() + prior.emb_std.numel()  # parameters in the checkpoint
    assert count(prior) + statistics == 1_022_030_080
    assert count(decoder.unet) == 885_439_686
    assert count(decoder) - count(decoder.unet) == 7_878_400  # text_proj
    assert sum(isinstance(module, Attention) for module in decoder.modules()) == 22
    assert count(network("karlo/upsampler_last.yaml")) == 2 * 691_579_523


@pytest.mark.parametrize("stack", STACKS)
def test_the_networks_of_a_folder_are_compatible(stack):
    parts = {Path(name).stem: config(name) for name in CONFIGS if Path(name).parent.name == stack}
    model, prior, decoder = parts["model"], parts["prior"], parts["decoder"]
    clip = prior.clip
    if "clip" in parts:
        text_cfg = parts["clip"].model.model_cfg["text_cfg"]
        last = parts.get("clip_text", parts["clip"])
        clip = f"{last.fit.output}/model"
        assert parts["clip"].model.model_cfg["embed_dim"] == prior.model.emb_dim
        assert text_cfg["width"] == prior.model.text_width
        assert text_cfg["context_length"] == prior.model.context_length
        assert (
            decoder.model.text.kind != "transformer"
            or text_cfg["vocab_size"] == decoder.model.text.vocab_size
        )
    assert prior.clip == decoder.clip == model.clip == clip
    if "inpaint" in parts:  # fine-tuned from the decoder: only its input differs
        tuned = parts["inpaint"]
        unet = replace(decoder.model.unet, in_channels=7)
        assert tuned.model == replace(decoder.model, unet=unet, inpaints=True)
        assert (tuned.clip, tuned.schedule, tuned.loss) == (clip, decoder.schedule, decoder.loss)
    if decoder.layout:
        layout = parts["layout"]
        assert (layout.clip, f"{layout.fit.output}/model", layout.model) == (
            clip,
            decoder.layout,
            decoder.model.layout,
        )
    assert (prior.model.emb_dim, prior.model.text_width) == (
        decoder.model.emb_dim,
        decoder.model.text_width,
    )
    assert [model.prior, model.decoder] == [f"{part.fit.output}/model" for part in (prior, decoder)]
    size = decoder.model.image_size
    upsamplers = {
        f"{part.fit.output}/model": part
        for name, part in parts.items()
        if name.startswith("upsampler") and f"{name}_last" not in parts
    }
    assert set(model.upsamplers) == set(upsamplers)
    for folder in model.upsamplers:
        part = upsamplers[folder]
        assert (part.model.low_size, part.data.image_size) == (size, part.model.high_size)
        assert part.data.crop % part.model.unet.size_divisor == 0
        size = part.model.high_size


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if Path(name).stem in ("ar_prior", "one_shot_prior")]
)
def test_other_priors_are_compatible_with_the_diffusion_prior(name):
    stem = "prior_transformer" if Path(name).parent.name == "emoji" else "prior"
    own, other = config(f"{Path(name).parent}/{stem}.yaml"), config(name)
    sizes = ("emb_dim", "text_width", "context_length")
    assert [getattr(own.model, size) for size in sizes] == [
        getattr(other.model, size) for size in sizes
    ]
    assert (own.clip, own.data, own.val_data, own.drop) == (
        other.clip,
        other.data,
        other.val_data,
        other.drop,
    )


@pytest.mark.parametrize("stack", ["emoji", "tiny"])
def test_codec_and_transformer_of_a_folder_are_compatible(stack):
    codec, dalle, model = (
        config(f"{stack}/{name}.yaml") for name in ("codec", "dalle", "model_dalle")
    )
    dalle.model.check_codec(codec.model.vocab_size, network(f"{stack}/codec.yaml").grid)
    assert (
        dalle.codec == model.codec == f"{codec.fit.output}/model"
        and model.dalle == f"{dalle.fit.output}/model"
    )
    assert dalle.data.image_size == codec.model.image_size
    assert model.clip in (None, "emoji")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("decoder", "task=draw", "task=generate"),
        ("ar_prior", "explained=0.9", "explained_variance=0.9"),
    ],
)
def test_old_settings_are_read(name, old, new):
    script, cls = CONFIG_CLASSES[kind_of(name)]
    file, cls = ROOT / f"configs/tiny/{name}.yaml", getattr(load_script(script), cls)
    assert load_config(file, cls, [old]) == load_config(file, cls, [new])


def test_training_images_smaller_than_the_decoder_are_rejected():
    with pytest.raises(SystemExit, match="image_size is 8; expected at least 16"):
        train("decoder", "tiny/decoder.yaml", "--set=data.image_size=8")


def test_a_task_needs_a_matching_model():
    with pytest.raises(SystemExit, match="model.inpaints is false; expected true"):
        train("decoder", "tiny/decoder.yaml", "--set=task=inpaint")


def test_a_last_unet_without_weights_is_rejected():
    level = "levels: [{channels: 8}]"
    unet = f"{{in_channels: 6, out_channels: 3, groups: 8, mid_attention: false, {level}}}"
    given = f"--set=model.last_unet={unet}"
    with pytest.raises(SystemExit, match="last_unet is trained after model.unet, with `last`"):
        train("upsampler", "tiny/upsampler.yaml", given)
    with pytest.raises(SystemExit, match="last starts from a trained upsampler; give --init"):
        train("upsampler", "tiny/upsampler.yaml", given, "--set=last={}")
    with pytest.raises(SystemExit, match="last trains model.last_unet, which is null"):
        train("upsampler", "tiny/upsampler.yaml", "--set=last={}")
    with pytest.raises(SystemExit, match="loss has no effect on model.last_unet"):
        train(
            "upsampler", "tiny/upsampler.yaml", given, "--set=last={}", "--set=loss.min_snr_gamma=5"
        )


def train(script: str, name: str, *arguments: str) -> None:
    run_script(ROOT / f"train/{script}.py", "--config", str(ROOT / "configs" / name), *arguments)


def test_a_fine_tuned_model_has_the_parts_of_the_bundled_one():
    prior, layout_prior, decoder, model = (
        config(f"finetune/{name}.yaml") for name in ("prior", "layout_prior", "decoder", "model")
    )
    assert prior.base == model.prior
    assert {prior.clip, layout_prior.clip, decoder.clip} == {model.clip}
    for name, trained in (("layout_prior", layout_prior), ("decoder", decoder)):
        assert trained.base == f"assets/emoji/{name}"
        assert getattr(model, name) == f"{trained.fit.output}/model"
    assert decoder.layout_prior == model.layout_prior
    assert model.loras == (f"{prior.fit.output}/model",)


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("prior", ["base=assets/emoji/prior"], "exactly one of model .* and base "),
        ("prior", ["model=null"], "exactly one of model .* and base "),
        ("prior", ["model=null", f"base={ROOT}/assets/emoji/decoder"], "decoder is a Decoder; exp"),
        ("prior", ["model=null", "base=nowhere"], "nowhere/config.json is missing"),
        ("decoder", ["model=null", f"base={ROOT}/assets/emoji/prior"], "expected Decoder"),
        ("layout_prior", ["model=null", f"base={ROOT}/assets/emoji/decoder"], "expected LayoutPr"),
    ],
)
def test_errors_of_base(script, settings, message):
    with pytest.raises(SystemExit, match=message):
        train(script, f"tiny/{script}.yaml", *(f"--set={setting}" for setting in settings))

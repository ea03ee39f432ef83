"""Whole models with random weights, which generate an image in a tenth of a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from unclip.clip import CLIP, CLIPConfig
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import LevelSpec, UNetConfig
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.tokenizer import BPETokenizer
from unclip.types import StageOptions, UnCLIPOptions

torch.set_num_threads(1)  # the networks are too small to use several cores

EMB_DIM, TEXT_WIDTH, CONTEXT = 16, 24, 24
TINY_OPTIONS = UnCLIPOptions(
    prior=StageOptions(steps=3, guidance=2.0, sampler="ancestral"),
    decoder=StageOptions(steps=3, guidance=3.0, eta=1.0),
    upsamplers=(StageOptions(steps=2),),
)


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Return a black image with a white box: left, top, right, bottom."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def tiny_clip() -> CLIP:
    tokenizer = BPETokenizer.train(
        ["a red apple", "a blue fish"], vocab_size=270, context_length=CONTEXT
    )
    text_cfg = {
        "context_length": CONTEXT,
        "vocab_size": tokenizer.vocab_size,
        "width": TEXT_WIDTH,
        "heads": 2,
    }
    model_cfg = {
        "embed_dim": EMB_DIM,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {**text_cfg, "layers": 1, "eos_id": tokenizer.end_id, "pool_type": "eos"},
    }
    return CLIP(CLIPConfig(model_cfg), tokenizer)


def tiny_unet(in_channels: int, out_channels: int, context_dim: int | None = None) -> UNetConfig:
    levels = (LevelSpec(16, blocks=1), LevelSpec(32, blocks=1, attention=context_dim is not None))
    return UNetConfig(
        in_channels,
        out_channels,
        levels,
        head_dim=16,
        groups=8,
        context_dim=context_dim,
        mid_attention=False,
    )


def tiny_prior(**changes: object) -> DiffusionPrior:
    config = PriorConfig(EMB_DIM, TEXT_WIDTH, CONTEXT, width=32, depth=2, heads=2)
    return DiffusionPrior(replace(config, **changes))


def tiny_decoder(**changes: object) -> Decoder:
    config = DecoderConfig(
        tiny_unet(3, 6, context_dim=24), 8, EMB_DIM, TEXT_WIDTH, learned_variance=True
    )
    return Decoder(replace(config, **changes))


def tiny_upsampler(low: int = 8, **changes: object) -> Upsampler:
    return Upsampler(
        replace(UpsamplerConfig(tiny_unet(6, 3), low_size=low, high_size=2 * low), **changes)
    )


def scrambled(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Randomise zero-initialised parameters, which make the output independent of the input."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return module


@pytest.fixture(scope="session")
def tiny_pipe() -> UnCLIPPipeline:
    """unCLIP with random weights. Tests must not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = [
            scrambled(module)
            for module in (tiny_clip(), tiny_prior(), tiny_decoder(), tiny_upsampler())
        ]
    clip, prior, decoder, upsampler = networks
    schedules = {"upsampler_0": ScheduleConfig("linear")}
    return UnCLIPPipeline(
        clip,
        prior,
        decoder,
        [upsampler],
        TINY_OPTIONS,
        schedules=schedules,
        name="tiny",
        licence="MIT",
    )


@pytest.fixture(scope="session")
def tiny_dalle() -> DallePipeline:
    """DALL-E whose random weights are large enough that codes depend on previous ones.

    Tests must not change it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = DVAE(
            DVAEConfig(image_size=16, vocab_size=24, width=8, groups=3, blocks=1, code_width=8)
        )
        tokenizer = BPETokenizer.train(["a red apple", "a blue fish"], 270, CONTEXT, marked=False)
        config = DALLEConfig(
            tokenizer.vocab_size,
            CONTEXT,
            24,
            (4, 4),
            width=24,
            depth=3,
            heads=2,
            head_dim=8,
            kernel=3,
        )
        dalle = DALLE(config)
        for p in dalle.parameters():
            nn.init.normal_(p, std=0.5)
        return DallePipeline(tokenizer, codec, dalle, tiny_clip(), name="tiny-dalle", licence="MIT")


@pytest.fixture(scope="session")
def tiny_dalle_folder(tiny_dalle: DallePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model on disk. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dalle"
    tiny_dalle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def invertible_pipe() -> UnCLIPPipeline:
    """unCLIP whose outputs change as little with x_t as a trained model's, so that it can invert.

    Tests must not change it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, prior = scrambled(tiny_clip()), scrambled(tiny_prior())
        unet = tiny_unet(3, 3, context_dim=24)
        decoder = scrambled(
            tiny_decoder(unet=unet, prediction="v", learned_variance=False), std=0.02
        )
        upsampler = scrambled(tiny_upsampler(prediction="v"), std=0.02)
    options = UnCLIPOptions(
        prior=StageOptions(steps=3, guidance=2.0, sampler="ancestral"),
        decoder=StageOptions(steps=4, guidance=2.0),
        upsamplers=(StageOptions(steps=3),),
    )
    schedules = {"decoder": ScheduleConfig(shift=2.0)}
    return UnCLIPPipeline(
        clip, prior, decoder, [upsampler], options, schedules=schedules, name="still", licence="MIT"
    )


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipe: UnCLIPPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model on disk. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe.save_pretrained(folder)
    return folder

"""Karlo and DALL-E with random weights, which need no download, at full size or small."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.clip import CLIP, CLIPConfig
from unclip.evaluation import STAGES
from unclip.models.dalle.layers import LayerSpec
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.published.plain_dvae import PlainDVAE, PlainDVAEConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import LevelSpec, UNetConfig
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.tokenizer import BPETokenizer

M = TypeVar("M", bound=nn.Module)
LICENCE = "none: random weights"
NOISE_BLOCK = 2**20 + 7  # a prime, so that no two rows of a weight are equal


def random_network(
    network: type[M],
    config: object,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> M:
    """Build a network on the meta device and fill it with noise in `dtype`, in seconds.

    Weights are windows into one block of noise, scaled by fan-in so that activations stay finite.
    """
    with torch.device("meta"):
        module = network(config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2 * NOISE_BLOCK, generator=generator).to(device, dtype)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            start = i * 7919 % NOISE_BLOCK
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 400  # biases of std 1/20
            for part in parameter.view(-1).split(NOISE_BLOCK):
                torch.mul(noise[start : start + len(part)], fan_in**-0.5, out=part)
        for layer in module.modules():
            if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
                layer.weight.add_(1)
        if isinstance(module, DiffusionPrior):
            std = torch.full_like(module.emb_std, 1 / math.sqrt(768))
            module.set_stats(torch.zeros_like(module.emb_mean), std)
    return module


@dataclass(frozen=True)
class KarloSize:
    """Sizes of Karlo's networks; configs/karlo has the full ones as YAML."""

    width: int  # of text and embeddings
    text_layers: int
    prior_width: int
    prior_depth: int
    channels: tuple[int, ...]
    context_dim: int
    image_size: int  # of the decoder; the upsampler's is four times as large

    @property
    def prior(self) -> PriorConfig:
        sizes = (self.width, self.width, 77, self.prior_width, self.prior_depth)
        return PriorConfig(*sizes, heads=self.prior_width // 64, null_text="empty_prompt")

    @property
    def decoder(self) -> DecoderConfig:
        levels = tuple(LevelSpec(c, blocks=3, attention=i > 0) for i, c in enumerate(self.channels))
        return self._decoder(UNetConfig(3, 6, levels, context_dim=self.context_dim))

    @property
    def placeholder_decoder(self) -> DecoderConfig:
        """Build a tiny decoder for a pipeline of which only other stages are called."""
        levels = (LevelSpec(32, blocks=1),)
        return self._decoder(UNetConfig(3, 6, levels, context_dim=32, mid_attention=False))

    def _decoder(self, unet: UNetConfig) -> DecoderConfig:
        return DecoderConfig(
            unet,
            self.image_size,
            self.width,
            self.width,
            null_text="empty_prompt",
            learned_variance=True,
        )

    @property
    def upsampler(self) -> UpsamplerConfig:
        levels = tuple(LevelSpec(c, blocks=3) for c in self.channels)
        unet = UNetConfig(6, 3, levels, time_shift="additive", mid_attention=False)
        return UpsamplerConfig(unet, self.image_size, 4 * self.image_size, last_unet=unet)

    @property
    def clip(self) -> CLIPConfig:
        """Build the text tower only, which is all that text to image needs."""
        text = {
            "context_length": 77,
            "vocab_size": 49408,
            "width": self.width,
            "heads": max(1, self.width // 64),
            "layers": self.text_layers,
        }
        model = {"embed_dim": self.width, "vision_cfg": None, "text_cfg": text, "quick_gelu": True}
        return CLIPConfig(model)


KARLO_SIZES = {
    "karlo-random": KarloSize(768, 12, 2048, 20, (320, 640, 960, 1280), 1536, 64),
    "karlo-tiny": KarloSize(64, 1, 128, 2, (32, 64), 96, 16),
}


def build_karlo(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    stages: Collection[str] = STAGES["unclip"],
) -> UnCLIPPipeline:
    """Build a pipeline in which only `stages` can be called."""
    size = KARLO_SIZES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIP(size.clip)
    decoder = size.decoder if "decoder" in stages else size.placeholder_decoder
    prior = random_network(DiffusionPrior, size.prior, dtype, device) if "prior" in stages else None
    upsamplers = []
    if "upsampler" in stages:
        upsamplers.append(random_network(Upsampler, size.upsampler, dtype, device))
    pipe = UnCLIPPipeline(
        clip,
        prior,
        random_network(Decoder, decoder, dtype, device),
        upsamplers,
        replace(KARLO_OPTIONS, upsamplers=KARLO_OPTIONS.upsamplers[: len(upsamplers)]),
        name=name,
        licence=LICENCE,
    )
    return pipe.to(device, dtype)


_DALLE_PYTORCH = {  # the defaults of DALLE-pytorch
    "attention": ("full",),
    "last_attention": None,
    "layer": LayerSpec(mlp="geglu", qkv_bias=False, gain=1.0, shift=True),
    "positions": "rotary",
}
DALLE_SIZES = {  # "dalle-random" is DALLE-pytorch with dim=512, depth=12 and 1,024 image codes
    "dalle-random": DALLEConfig(
        10_000, 256, 8192, (32, 32), width=512, depth=12, heads=8, **_DALLE_PYTORCH
    ),
    "dalle-tiny": DALLEConfig(
        300, 8, 32, (4, 4), width=24, depth=2, heads=2, head_dim=18, **_DALLE_PYTORCH
    ),
}
CODEC_HALVINGS = 3


def build_dalle(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> DallePipeline:
    """Build a DALL-E pipeline without CLIP."""
    config = DALLE_SIZES[name]
    V, L = config.text_vocab, config.context_length
    tokenizer = BPETokenizer.train(["a red apple"], V, L, marked=False)
    codec_config = PlainDVAEConfig(
        image_size=config.grid[0] * 2**CODEC_HALVINGS,
        vocab_size=config.image_vocab,
        halvings=CODEC_HALVINGS,
    )
    codec = random_network(PlainDVAE, codec_config, dtype, device)
    dalle = random_network(DALLE, config, dtype, device)
    return DallePipeline(tokenizer, codec, dalle, name=name, licence=LICENCE)

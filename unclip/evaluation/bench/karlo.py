"""Karlo's networks with random weights, full size or small: nothing to download, filled in seconds.

    python -m unclip.evaluation.bench.karlo karlo-random FOLDER --dtype bf16

writes them as a model folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.cli.common import DTYPES
from unclip.clip import CLIP, CLIPConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import LevelSpec, UNetConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

M = TypeVar("M", bound=nn.Module)

STAGES = ("prior", "decoder", "upsampler")
TILE = 2**20 + 7  # a prime: no row of a weight is another's copy


@dataclass(frozen=True)
class Size:
    """What tells the small stack from the full one; configs/karlo has the latter as YAML."""

    emb_dim: int  # and text width
    text_layers: int
    prior_width: int
    prior_depth: int
    channels: tuple[int, ...]
    context_dim: int
    image_size: int  # the upsampler's is four times as much

    @property
    def prior(self) -> PriorConfig:
        D, C = self.emb_dim, self.prior_width
        return PriorConfig(D, D, 77, C, self.prior_depth, heads=C // 64, null_text="empty_prompt")

    @property
    def decoder(self) -> DecoderConfig:
        levels = tuple(LevelSpec(c, blocks=3, attention=i > 0) for i, c in enumerate(self.channels))
        unet = UNetConfig(3, 6, levels, context_dim=self.context_dim)
        return DecoderConfig(
            unet,
            self.image_size,
            self.emb_dim,
            self.emb_dim,
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
        """The text tower alone: text to image does without the other."""
        text = {
            "context_length": 77,
            "vocab_size": 49408,
            "width": self.emb_dim,
            "heads": max(1, self.emb_dim // 64),
        }
        text_cfg = {**text, "layers": self.text_layers}
        return CLIPConfig(
            {
                "embed_dim": self.emb_dim,
                "vision_cfg": None,
                "text_cfg": text_cfg,
                "quick_gelu": True,
            }
        )


SIZES = {
    "karlo-random": Size(768, 12, 2048, 20, (320, 640, 960, 1280), 1536, 64),
    "karlo-tiny": Size(64, 1, 128, 2, (32, 64), 96, 16),
}


def build(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    stages: Collection[str] = STAGES,
) -> UnCLIPPipeline:
    """A pipeline in which `stages` can be called; the decoder of a pipeline without that stage is a tiny stand-in."""
    size = SIZES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIP(size.clip)
    decoder = size.decoder if "decoder" in stages else _stand_in(size)
    prior = random_network(DiffusionPrior, size.prior, dtype, device) if "prior" in stages else None
    upsamplers = (
        [random_network(Upsampler, size.upsampler, dtype, device)] if "upsampler" in stages else []
    )
    options = replace(KARLO_OPTIONS, upsamplers=KARLO_OPTIONS.upsamplers[: len(upsamplers)])
    networks = (clip, prior, random_network(Decoder, decoder, dtype, device), upsamplers)
    return UnCLIPPipeline(*networks, options, name=name, licence="none: random weights").to(
        device, dtype
    )


def random_network(
    network: type[M],
    config: object,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> M:
    """Made on the meta device and filled in its own dtype: parts of one block of noise, scaled by each layer's inputs.

    Every layer answers with about the variance that it is given, so that activations stay finite.
    """
    with torch.device("meta"):
        module = network(config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.to_empty(device=device)
    noise = torch.randn(2 * TILE, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            start = i * 7919 % TILE
            inputs = parameter[0].numel() if parameter.ndim > 1 else 400  # biases of 1/20
            for part in parameter.view(-1).split(TILE):
                torch.mul(noise[start : start + len(part)], inputs**-0.5, out=part)
        for layer in module.modules():
            if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
                layer.weight += 1
        if isinstance(module, DiffusionPrior):
            module.set_stats(
                torch.zeros_like(module.emb_mean),
                torch.full_like(module.emb_std, 1 / math.sqrt(768)),
            )
    return module


def _stand_in(size: Size) -> DecoderConfig:
    unet = UNetConfig(3, 6, (LevelSpec(32, blocks=1),), context_dim=32, mid_attention=False)
    return DecoderConfig(
        unet,
        size.image_size,
        size.emb_dim,
        size.emb_dim,
        null_text="empty_prompt",
        learned_variance=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()
    try:
        build(args.name, getattr(torch, DTYPES[args.dtype])).save_pretrained(args.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

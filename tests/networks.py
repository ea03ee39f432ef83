"""A tiny network of each kind with its loss, and batches for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import tiny_clip, tiny_decoder, tiny_prior
from fitting import TinyLoader
from torch import nn

from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.tokenizer import BPETokenizer
from unclip.training.codec import CodecLoss
from unclip.training.dalle import DALLELoss, DALLELossConfig
from unclip.training.losses import CLIPLoss, ConditionDropout, DecoderLoss, PriorLoss

CAPTIONS = ["a red apple", "a blue fish"]


class Captioned(TinyLoader):
    """Images of 16 pixels with captions."""

    def __iter__(self):
        for batch in super().__iter__():
            image = batch["image"].repeat(1, 1, 4, 4).clamp(-1, 1)
            yield {**batch, "image": image, "caption": CAPTIONS * (len(image) // 2)}


def build(network: str) -> tuple[nn.Module, Callable[..., Any]]:
    torch.manual_seed(0)
    if network in ("prior", "decoder"):
        clip, drop, loss = tiny_clip().requires_grad_(False), ConditionDropout(), LossConfig()
        if network == "prior":
            prior = tiny_prior()
            return prior, PriorLoss(prior, clip, Schedule(), drop, loss)
        decoder = tiny_decoder()
        return decoder, DecoderLoss(decoder, clip, Schedule(), drop, loss)
    if network == "clip":
        clip = tiny_clip()
        return clip, CLIPLoss(clip)
    codec = DVAE(
        DVAEConfig(image_size=16, vocab_size=24, width=8, groups=3, blocks=1, code_width=8)
    )
    if network == "codec":
        return codec, CodecLoss(codec, {})
    tokenizer = BPETokenizer.train(CAPTIONS, 270, 8, marked=False)
    sizes = {"width": 24, "depth": 3, "heads": 2, "head_dim": 8, "kernel": 3}
    dalle = DALLE(DALLEConfig(tokenizer.vocab_size, 8, 24, (4, 4), **sizes))
    frozen = codec.requires_grad_(False).eval()
    return dalle, DALLELoss(dalle, tokenizer, frozen, DALLELossConfig())

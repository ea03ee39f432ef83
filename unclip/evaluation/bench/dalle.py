"""DALL-E's stages as calls that can be timed, and its networks with random weights: nothing to download."""

# P prompts, N codes of a picture

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unclip.evaluation.bench.calls import Work
from unclip.evaluation.bench.clock import Stage
from unclip.evaluation.bench.karlo import random_network
from unclip.models.dalle.layers import LayerSpec
from unclip.models.dalle.sampling import sample_codes
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.models.published.plain_dvae import PlainDVAE, PlainDVAEConfig
from unclip.pipelines.base import generators_from
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions, OnStep

# What DALLE-pytorch makes of dim=512, depth=12 and no other options, for a picture of 1,024 codes.
SIZES = {
    "dalle-random": DALLEConfig(10_000, 256, 8192, (32, 32), width=512, depth=12, heads=8),
    "dalle-tiny": DALLEConfig(300, 8, 32, (4, 4), width=24, depth=2, heads=2, head_dim=18),
}
SIZES = {
    name: replace(
        size,
        attention=("full",),
        last_attention=None,
        layer=LayerSpec(mlp="geglu", qkv_bias=False, gain=1.0, shift=True),
        positions="rotary",
    )
    for name, size in SIZES.items()
}
# DALL-E mega but for its depth.
MEGA_SIZES = {
    "mega-random": BartDALLEConfig(encoder_depth=2, decoder_depth=2),
    "mega-tiny": BartDALLEConfig(
        300, 8, 32, (4, 4), 24, encoder_depth=2, decoder_depth=2, heads=2, mlp_width=48
    ),
}
HALVINGS = 3  # of the codec


def build(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> DallePipeline:
    """A pipeline without CLIP."""
    config = SIZES[name]
    tokenizer = BPETokenizer.train(
        ["a red apple"], config.text_vocab, config.context_length, marked=False
    )
    side = config.grid[0] * 2**HALVINGS
    codec = PlainDVAEConfig(image_size=side, vocab_size=config.image_vocab, halvings=HALVINGS)
    networks = (
        random_network(PlainDVAE, codec, dtype, device),
        random_network(DALLE, config, dtype, device),
    )
    return DallePipeline(tokenizer, *networks, name=name, licence="none: random weights")


def build_mega(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> BartDALLE:
    return random_network(BartDALLE, MEGA_SIZES[name], dtype, device).eval().requires_grad_(False)


def code_work(pipe: DallePipeline, prompt: str, num_images: int, options: CodeOptions) -> Work:
    """For pictures of one prompt; a step of "codes" is one code of each."""
    tokens = pipe.dalle.tokens(*pipe.tokenizer([prompt]))
    codec, N = pipe.codec, pipe.dalle.config.num_codes
    codes = torch.randint(
        codec.vocab_size, (num_images, *codec.grid), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        prefix = pipe.dalle.condition(tokens)
        null = None if options.guidance == 1 else pipe.dalle.condition(pipe.dalle.null_tokens(1))

    @torch.inference_mode()
    def text(on_step: OnStep) -> Tensor:
        return pipe.dalle.condition(tokens).logits

    def draw(on_step: OnStep) -> Tensor:
        return sample_codes(
            pipe.dalle,
            prefix.repeat_interleave(num_images),
            generators_from(range(num_images)),
            options,
            null=null,
            on_code=lambda n, codes: on_step(None),
            compiled_step=pipe.step,
        )

    calls: dict[str, Stage[Tensor]] = {
        "text": text,
        "codes": draw,
        "codec": lambda on_step: pipe.decode(codes),
    }
    return Work(calls, {"codes": N}, codec.image_size)

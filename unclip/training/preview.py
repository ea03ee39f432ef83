"""Preview images of a network in training, always from the same inputs and seeds."""

# B images, s side

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip.clip import CLIP
from unclip.data.loader import Batch
from unclip.diffusion.samplers import Denoise, Estimator, randn, sample
from unclip.diffusion.schedules import Schedule
from unclip.image_io import grid, to_pil
from unclip.models.codecs.codec import ImageCodec, Reconstructor
from unclip.models.dalle.sampling import sample_codes
from unclip.models.dalle.transformer import DALLE
from unclip.models.unclip.decoder import Decoder, masked_image
from unclip.models.unclip.upsampler import Upsampler
from unclip.tokenizer import BPETokenizer
from unclip.training.dalle import image_codes
from unclip.training.fit import Preview
from unclip.training.inpainting import HoleConfig, random_holes
from unclip.training.losses import resize_square
from unclip.types import CodeOptions, StageOptions

SHOWN, UPSAMPLED = 12, 6  # images
DECODER_OPTIONS = StageOptions(steps=20, guidance=2.0)
UPSAMPLER_OPTIONS = StageOptions(steps=6)

Batches = Iterable[Batch]


def decoder_preview(
    clip: CLIP, schedule: Schedule, loader: Batches, holes: HoleConfig | None = None
) -> Preview:
    """Show validation images above samples from their CLIP embeddings and captions.

    With `holes`, for a decoder that inpaints, the images with holes are shown between them.
    """
    batch = next(iter(loader))
    images, captions = batch["image"][:SHOWN], batch["caption"][:SHOWN]

    @torch.no_grad()
    def preview(decoder: Decoder) -> Image.Image:
        config, rows = decoder.config, len(images)
        text, image_emb = clip.encode_text(captions), clip.encode_image(images).float()
        small, known = resize_square(images.to(image_emb.device), config.image_size), None
        if holes is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                masks = random_holes(rows, config.image_size, holes)
            known = masked_image(small, masks.to(small.device))
        cond = decoder.condition(image_emb, text, known=known)
        drop = torch.ones(rows, dtype=torch.bool, device=image_emb.device)
        if config.null_text == "learned":
            null = decoder.condition(image_emb, text, drop, drop, known)
        else:
            null = decoder.condition(image_emb, clip.encode_text([""] * rows), drop, known=known)
        both = type(cond).cat([cond, null])
        samples = _sample(
            lambda x, t: decoder.denoise(x, t, cond),
            small,
            schedule,
            DECODER_OPTIONS,
            config,
            denoise_both=lambda x, t: decoder.denoise(x, t, both),
        )
        return sheet([small, samples] if known is None else [small, known[:, :3], samples])

    return preview


def upsampler_preview(schedule: Schedule, loader: Batches) -> Preview:
    """Show the low-resolution input, the upsampled image and the validation image."""
    images = next(iter(loader))["image"][:UPSAMPLED]

    @torch.no_grad()
    def preview(upsampler: Upsampler) -> Image.Image:
        config, side = upsampler.config, images.shape[-1]
        low_res = resize_square(images, side * config.low_size // config.high_size)
        device = next(upsampler.parameters()).device
        context = low_res.to(device)
        samples = _sample(
            lambda x, t: upsampler.denoise(x, t, context),
            images.to(device),
            schedule,
            UPSAMPLER_OPTIONS,
            config,
        )
        return sheet([F.interpolate(low_res, (side, side), mode="nearest"), samples, images])

    return preview


def codec_preview(codec_of: Callable[[nn.Module], Reconstructor], loader: Batches) -> Preview:
    """Show validation images above their reconstructions by the codec in the trained model."""
    images = next(iter(loader))["image"][:SHOWN]

    def preview(model: nn.Module) -> Image.Image:
        codec = codec_of(model)
        return sheet([images, codec.reconstruct(images.to(codec.last_layer.device))])

    return preview


def dalle_preview(tokenizer: BPETokenizer, codec: ImageCodec, loader: Batches) -> Preview:
    """Show the codec's reconstructions of validation images above samples from their captions."""
    batch = next(iter(loader))
    ids, mask = tokenizer(batch["caption"][:SHOWN])
    codes = image_codes(codec, batch)[:SHOWN]

    def preview(dalle: DALLE) -> Image.Image:
        prefix = dalle.condition(dalle.tokens(ids, mask))
        samples = sample_codes(dalle, prefix, _generators(len(prefix)), CodeOptions())
        return sheet([codec.decode(codes), codec.decode(samples)])

    return preview


def _sample(
    denoise: Denoise,
    like: Tensor,
    schedule: Schedule,
    options: StageOptions,
    config: Any,
    denoise_both: Denoise | None = None,
) -> Tensor:
    """Sample images (B, 3, s, s) of the shape of `like` with the seeds 0 to B - 1."""
    generators = _generators(len(like))
    estimate = Estimator(
        denoise,
        schedule,
        options,
        config.prediction,
        config.learned_variance,
        clip=1.0,
        denoise_both=denoise_both,
    )
    x_T = randn(like.shape, generators, like.device)
    return sample(estimate, x_T, schedule, options, generators=generators)


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def sheet(rows: list[Tensor]) -> Image.Image:
    """Arrange rows of images (B, 3, s, s) in [-1, 1] one above the other."""
    return grid([image for row in rows for image in to_pil(row)], columns=len(rows[0]))

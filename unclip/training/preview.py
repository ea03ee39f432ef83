"""Pictures that a network draws while it trains, always from the same inputs and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unclip.clip import CLIP
from unclip.diffusion.guidance import classifier_free
from unclip.diffusion.samplers import randn, sample
from unclip.diffusion.schedules import Schedule
from unclip.image_io import grid
from unclip.models.codecs.codec import Autoencoder, ImageCodec
from unclip.models.dalle.sampling import sample_codes
from unclip.models.dalle.transformer import DALLE
from unclip.models.unclip.decoder import masked_image
from unclip.tokenizer import BPETokenizer
from unclip.training.dalle import image_codes
from unclip.training.inpainting import HoleConfig, random_holes
from unclip.training.losses import resized
from unclip.types import CodeOptions, StageOptions

Preview = Callable[[nn.Module], Image.Image]

# B pictures, s side


def decoder_preview(
    clip: CLIP,
    schedule: Schedule,
    loader: Iterable,
    count: int = 12,
    options: StageOptions | None = None,
    holes: HoleConfig | None = None,
) -> Preview:
    """Validation pictures above what the decoder draws from their CLIP embeddings and captions.

    With `holes`, for a decoder that inpaints: between them, what it is told of the pictures.
    """
    options = options or StageOptions(steps=20, guidance=2.0)
    batch = next(iter(loader))
    truth, captions = batch["image"][:count], batch["caption"][:count]

    @torch.no_grad()
    def draw(decoder: nn.Module) -> Image.Image:
        config, rows = decoder.config, len(truth)
        text, image_emb = clip.encode_text(captions), clip.encode_image(truth).float()
        small, known = resized(truth.to(image_emb.device), config.image_size), None
        if holes is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                marked = random_holes(rows, config.image_size, holes)
            known = masked_image(small, marked.to(small.device))
        cond = decoder.condition(image_emb, text, known=known)
        dropped = torch.ones(rows, dtype=torch.bool, device=image_emb.device)
        if config.null_text == "learned":
            null = decoder.condition(image_emb, text, dropped, dropped, known)
        else:
            null = decoder.condition(image_emb, clip.encode_text([""] * rows), dropped, known=known)
        both = type(cond).cat([cond, null])
        denoise = classifier_free(
            lambda x, t: decoder.denoise(x, t, both),
            lambda x, t: decoder.denoise(x, t, cond),
            options,
            schedule.num_timesteps,
            config.learned_variance,
        )
        drawn = _draw(denoise, small, schedule, options, config)
        return sheet([small, drawn] if known is None else [small, known[:, :3], drawn])

    return draw


def upsampler_preview(
    schedule: Schedule, loader: Iterable, count: int = 6, options: StageOptions | None = None
) -> Preview:
    """Validation pictures: the low-res input, the upsampled picture, the truth."""
    options = options or StageOptions(steps=6)
    truth = next(iter(loader))["image"][:count]

    @torch.no_grad()
    def draw(upsampler: nn.Module) -> Image.Image:
        config, side = upsampler.config, truth.shape[-1]
        low_side = side * config.low_size // config.high_size
        low_res = resized(truth, low_side)
        device = next(upsampler.parameters()).device
        drawn = _draw(
            lambda x, t: upsampler.denoise(x, t, low_res.to(device)),
            truth.to(device),
            schedule,
            options,
            config,
        )
        return sheet(
            [nn.functional.interpolate(low_res, (side, side), mode="nearest"), drawn, truth]
        )

    return draw


def codec_preview(codec: Autoencoder, loader: Iterable, count: int = 12) -> Preview:
    """Validation pictures above what `codec`, which is trained or part of what is trained, makes of them."""
    truth = next(iter(loader))["image"][:count]

    def draw(_: nn.Module) -> Image.Image:
        return sheet([truth, codec.reconstruct(truth.to(codec.last_layer.device))])

    return draw


def dalle_preview(
    tokenizer: BPETokenizer,
    codec: ImageCodec,
    loader: Iterable,
    count: int = 12,
    options: CodeOptions | None = None,
) -> Preview:
    """Validation pictures, as far as the codec can show them, above what the transformer draws from their captions."""
    batch = next(iter(loader))
    ids, mask = tokenizer(batch["caption"][:count])
    truth = image_codes(codec, batch)[:count]

    def draw(dalle: DALLE) -> Image.Image:
        prefix = dalle.condition(dalle.tokens(ids, mask))
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prefix))]
        drawn = sample_codes(dalle, prefix, generators, options or CodeOptions())
        return sheet([codec.decode(truth), codec.decode(drawn)])

    return draw


def _draw(
    denoise: Callable, like: Tensor, schedule: Schedule, options: StageOptions, config
) -> Tensor:
    """Pictures (B, 3, s, s) of the shape of `like`, from the seeds 0 .. B - 1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(like))]
    return sample(
        denoise,
        randn(like.shape, generators, like.device),
        schedule,
        options,
        prediction=config.prediction,
        learned_variance=config.learned_variance,
        clip=1.0,
        generators=generators,
    )


def sheet(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures (B, 3, s, s) in [-1, 1], one above the other."""
    pixels = (
        torch.cat([row.float().cpu() for row in rows]).clamp(-1, 1).add(1).mul(127.5).round().byte()
    )
    images = [
        Image.fromarray(np.ascontiguousarray(image)) for image in pixels.permute(0, 2, 3, 1).numpy()
    ]
    return grid(images, columns=len(rows[0]))

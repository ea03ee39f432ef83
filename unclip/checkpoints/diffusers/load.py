"""Karlo in diffusers' folder layout, for text-to-image or for variations, as our networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from unclip.checkpoints.diffusers import configs, layout
from unclip.checkpoints.diffusers.layout import (
    CONFIG_FILE,
    KARLO_OPTIONS,
    SCHEDULER_FILE,
    read_index,
)
from unclip.checkpoints.diffusers.names import prior_rules, text_proj_rules, unet_rules
from unclip.checkpoints.folders import fill
from unclip.checkpoints.renaming import under
from unclip.checkpoints.store import Bundle, Components
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig


def load_bundle(folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Reads the folder onto the CPU, networks in `dtype` (CLIP and the prior's statistics in float32).

    Weights are read and cast tensor by tensor, so that no more than the model itself is ever in memory.
    ValueError or FileNotFoundError, in one line, for anything that is missing, unknown, damaged or of another size.
    """
    from unclip.checkpoints.transformers.clip import read_clip  # late: open_clip is slow to import

    components = read_index(folder)
    with_images = "image_encoder" in components
    networks: dict[str, Callable[[], nn.Module]] = {
        "clip": lambda: read_clip(folder, with_images=with_images)
    }
    schedules = {}
    if "prior" in components:
        scheduler = folder / "prior_scheduler" / SCHEDULER_FILE
        networks["prior"] = lambda: read_prior(folder / "prior", scheduler, dtype)[0]
        schedules["prior"] = configs.read_scheduler(scheduler).schedule
    networks["decoder"] = lambda: read_decoder(folder, dtype)[0]
    schedules["decoder"] = _picture_scheduler(folder / "decoder_scheduler").schedule
    networks["upsampler_0"] = lambda: read_upsampler(
        folder, decoder_config(folder).image_size, dtype
    )[0]
    schedules["upsampler_0"] = _picture_scheduler(folder / "super_res_scheduler").schedule
    return Bundle(
        "unclip",
        Components(networks),
        schedules,
        KARLO_OPTIONS,
        layout.name(folder),
        layout.licence(folder),
    )


def read_prior(
    folder: Path, scheduler_file: Path, dtype: torch.dtype
) -> tuple[DiffusionPrior, ScheduleConfig]:
    """A PriorTransformer, of Karlo's or of another's."""
    scheduler = configs.read_scheduler(scheduler_file)
    if scheduler.prediction != "x0" or scheduler.learned_variance:
        raise ValueError(
            f"{scheduler_file}: a prior predicts the 'sample', with variance 'fixed_small_log'"
        )
    config = configs.read_prior(folder / CONFIG_FILE, scheduler.limit)
    with torch.device("meta"):
        prior = DiffusionPrior(config)
    return fill(prior, {folder: prior_rules(config)}, dtype), scheduler.schedule


def decoder_config(folder: Path) -> DecoderConfig:
    scheduler = _picture_scheduler(folder / "decoder_scheduler")
    decoder, text_proj = (folder / part / CONFIG_FILE for part in ("decoder", "text_proj"))
    return configs.read_decoder(
        decoder, text_proj, scheduler.prediction, scheduler.learned_variance
    )


def read_decoder(folder: Path, dtype: torch.dtype) -> tuple[Decoder, ScheduleConfig]:
    config = decoder_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    parts = {
        folder / "decoder": under("", "unet.", unet_rules(config.unet)),
        folder / "text_proj": text_proj_rules(),
    }
    return fill(decoder, parts, dtype), _picture_scheduler(folder / "decoder_scheduler").schedule


def read_upsampler(
    folder: Path, low_size: int, dtype: torch.dtype
) -> tuple[Upsampler, ScheduleConfig]:
    """The two networks of super-resolution as one: `super_res_last` is for the last step."""
    scheduler = _picture_scheduler(folder / "super_res_scheduler")
    first, last = folder / "super_res_first", folder / "super_res_last"
    (unet, size), (last_unet, last_size) = (
        configs.read_unet(part / CONFIG_FILE) for part in (first, last)
    )
    if size != last_size:
        raise ValueError(
            f"{last / CONFIG_FILE}: sample_size is {last_size}, but super_res_first has {size}"
        )
    try:
        config = UpsamplerConfig(
            unet,
            low_size,
            size,
            scheduler.prediction,
            scheduler.learned_variance,
            last_unet=last_unet,
        )
    except ValueError as error:
        raise ValueError(f"{first / CONFIG_FILE}: {error}") from None
    with torch.device("meta"):
        upsampler = Upsampler(config)
    parts = {
        first: under("", "unet.", unet_rules(unet)),
        last: under("", "last_unet.", unet_rules(last_unet)),
    }
    return fill(upsampler, parts, dtype), scheduler.schedule


def _picture_scheduler(folder: Path) -> configs.Scheduler:
    scheduler = configs.read_scheduler(folder / SCHEDULER_FILE)
    if scheduler.limit != 1.0:
        given = (
            f"clip_sample_range is {scheduler.limit}" if scheduler.limit else "clip_sample is False"
        )
        raise ValueError(f"{folder / SCHEDULER_FILE}: {given}; pictures are clipped to 1")
    return scheduler

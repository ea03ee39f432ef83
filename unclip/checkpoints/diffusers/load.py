"""Karlo in diffusers' folder layout, for text-to-image or image variations, as our networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from unclip.checkpoints.diffusers import configs
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS, SCHEDULER_FILE, read_index, recognise
from unclip.checkpoints.diffusers.names import prior_rules, text_proj_rules, unet_rules
from unclip.checkpoints.folders import (
    CONFIG_FILE,
    card_licence,
    folder_name,
    read_config,
    weights_index,
)
from unclip.checkpoints.formats import Bundle, Components, Format, LoadedPrior
from unclip.checkpoints.renaming import Part, Rule, build, prefixed, read_weights
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig


def load_bundle(folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load the folder onto the CPU: networks in `dtype`, CLIP and prior statistics in float32.

    Weights are read and cast tensor by tensor, so that the model is never in memory twice.
    Raises ValueError or FileNotFoundError for missing, unknown, damaged or misshaped parts.
    """
    from unclip.checkpoints.transformers.clip import read_clip  # late: open_clip is slow to import

    names = read_index(folder)
    components: dict[str, Callable[[], nn.Module]] = {
        "clip": lambda: read_clip(folder, with_images="image_encoder" in names)
    }
    schedules = {}
    if "prior" in names:
        scheduler = folder / "prior_scheduler" / SCHEDULER_FILE
        components["prior"] = lambda: read_prior(folder / "prior", scheduler, dtype).network
        schedules["prior"] = configs.read_scheduler(scheduler).schedule
    components["decoder"] = lambda: read_decoder(folder, dtype)
    schedules["decoder"] = _image_scheduler(folder / "decoder_scheduler").schedule
    components["upsampler_0"] = lambda: read_upsampler(folder, dtype)
    schedules["upsampler_0"] = _image_scheduler(folder / "super_res_scheduler").schedule
    name, licence = folder_name(folder), card_licence(folder)
    return Bundle("unclip", Components(components), schedules, KARLO_OPTIONS, name, licence)


def recognise_prior(path: Path) -> bool:
    return recognise(path) or read_config(path).get("_class_name") == "PriorTransformer"


def load_prior(path: Path, dtype: torch.dtype = torch.float32) -> LoadedPrior:
    """Load a PriorTransformer (Karlo, Kandinsky) from its own folder or its pipeline's."""
    folder = _prior_folder(path)
    files = [folder.parent / name / SCHEDULER_FILE for name in ("scheduler", "prior_scheduler")]
    return read_prior(folder, next(filter(Path.is_file, files), files[0]), dtype)


def _prior_folder(path: Path) -> Path:
    return path / "prior" if recognise(path) else path


def read_prior(folder: Path, scheduler_file: Path, dtype: torch.dtype) -> LoadedPrior:
    """Load a PriorTransformer and its noise schedule."""
    scheduler = configs.read_scheduler(scheduler_file)
    if scheduler.prediction != "x0" or scheduler.learned_variance:
        expected = "prediction_type 'sample' and variance_type 'fixed_small_log'"
        raise ValueError(f"{scheduler_file}: expected {expected} for a prior")
    config = configs.read_prior(folder / CONFIG_FILE, scheduler.limit)
    prior = build(DiffusionPrior, config, [_part(folder, prior_rules(config))], dtype)
    return LoadedPrior(prior, scheduler.schedule)


def read_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    scheduler = _image_scheduler(folder / "decoder_scheduler")
    unet, text_proj = folder / "decoder", folder / "text_proj"
    config = configs.read_decoder(
        unet / CONFIG_FILE,
        text_proj / CONFIG_FILE,
        scheduler.prediction,
        scheduler.learned_variance,
    )
    unet_part = _part(unet, prefixed("", "unet.", unet_rules(config.unet)))
    return build(Decoder, config, [unet_part, _part(text_proj, text_proj_rules())], dtype)


def read_upsampler(folder: Path, dtype: torch.dtype) -> Upsampler:
    """Load both super-resolution networks as one: `super_res_last` runs the last step."""
    scheduler = _image_scheduler(folder / "super_res_scheduler")
    first, last = folder / "super_res_first", folder / "super_res_last"
    _, low_size = configs.read_unet(folder / "decoder" / CONFIG_FILE, conditional=True)
    unet, size = configs.read_unet(first / CONFIG_FILE)
    last_unet, last_size = configs.read_unet(last / CONFIG_FILE)
    if size != last_size:
        raise ValueError(f"{last / CONFIG_FILE}: sample_size is {last_size}; expected {size}")
    prediction, variance = scheduler.prediction, scheduler.learned_variance
    try:
        config = UpsamplerConfig(unet, low_size, size, prediction, variance, last_unet=last_unet)
    except ValueError as error:
        raise ValueError(f"{first / CONFIG_FILE}: {error}") from None
    parts = [
        _part(first, prefixed("", "unet.", unet_rules(unet))),
        _part(last, prefixed("", "last_unet.", unet_rules(last_unet))),
    ]
    return build(Upsampler, config, parts, dtype)


def _part(folder: Path, rules: list[Rule]) -> Part:
    return Part(read_weights(folder), rules, weights_index(folder))


def _image_scheduler(folder: Path) -> configs.Scheduler:
    scheduler = configs.read_scheduler(folder / SCHEDULER_FILE)
    if scheduler.limit != 1.0:
        limit = scheduler.limit or "off"
        raise ValueError(f"{folder / SCHEDULER_FILE}: clip_sample_range is {limit}; expected 1")
    return scheduler


FORMAT = Format("diffusers", "unclip", recognise, load_bundle)
PRIOR = Format(
    "diffusers",
    "prior",
    recognise_prior,
    load_prior,
    lambda path: {"prior": read_weights(_prior_folder(path))},
)

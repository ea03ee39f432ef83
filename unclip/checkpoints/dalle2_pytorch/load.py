"""Priors, decoders and upsamplers of DALLE2-pytorch, as laion published them and as its trainer writes them.

A folder of them:

  prior/       best.pth or latest.pth, prior_config.json; without a prior the model draws variations only
  decoder/     likewise, decoder_config.json; a file since release 1.0 holds its configuration itself
  upsampler/   likewise, if the upsampler comes from another file than the decoder
  clip/        the CLIP in open_clip's layout; without it, the one that a configuration names is fetched
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unclip.checkpoints.dalle2_pytorch.configs import (
    ClipSource,
    DecoderSource,
    PriorSource,
    decoder_config,
    prior_config,
    read,
    upsampler_config,
)
from unclip.checkpoints.dalle2_pytorch.files import Checkpoint, only, read_file, weights
from unclip.checkpoints.dalle2_pytorch.names import IGNORED, decoder_rules, prior_rules, unet_rules
from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import build, under
from unclip.checkpoints.store import Bundle
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionUpsampler,
)
from unclip.models.published.relative_prior import RelativePrior
from unclip.types import StageOptions, UnCLIPOptions

if TYPE_CHECKING:
    from unclip.clip import CLIP

STEPS = 64  # where a configuration names no number; the prior's trainer samples with so many
DECODER_GUIDANCE = 1.7  # of laion's own inference configuration; the files hold none

Loaded = tuple[nn.Module, ScheduleConfig, StageOptions]


def recognise(folder: Path) -> bool:
    return folder.is_dir() and any((folder / "decoder").rglob("*.pth"))


def recognise_prior(path: Path) -> bool:
    """A .pth file with a prior, its folder, or that of the whole model."""
    if path.is_dir():
        return any(map(recognise_prior, [*path.glob("*.pth"), *path.glob("prior/*.pth")]))
    return path.suffix == ".pth" and any(
        name.startswith("net.") for name in weights(read_checkpoint(path))
    )


def load_bundle(folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """The folder described above. ValueError or FileNotFoundError names what is missing or not supported."""
    loaded: dict[str, Loaded] = {}
    clips: list[ClipSource | None] = []  # as the configurations name it
    if (folder / "prior").is_dir():
        checkpoint = read_file(only(folder / "prior"), "prior")
        loaded["prior"] = _prior(checkpoint, dtype)
        clips.append(_source(checkpoint).clip)
    checkpoint = read_file(only(folder / "decoder"), "decoder")
    loaded["decoder"] = _decoder(checkpoint, dtype)
    loaded |= _upsamplers(checkpoint, dtype)
    clips.append(_source(checkpoint).clip)
    if (folder / "upsampler").is_dir():
        checkpoint = read_file(only(folder / "upsampler"), "decoder")
        if not (found := dict(_upsamplers(checkpoint, dtype))):
            raise ValueError(
                f"{checkpoint.file} holds no upsampler, that is no U-Net but the first"
            )
        loaded |= found

    options = {name: stage for name, (_, _, stage) in loaded.items()}
    ups = tuple(options.pop(name) for name in list(options) if name.startswith("upsampler_"))
    return Bundle(
        kind="unclip",
        components={
            "clip": _clip(folder, clips),
            **{name: module for name, (module, _, _) in loaded.items()},
        },
        schedules={name: schedule for name, (_, schedule, _) in loaded.items()},
        options=UnCLIPOptions(**options, upsamplers=ups),
        name=folder.name,
        licence="",
    )


def load_prior(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ScheduleConfig]:
    """What `recognise_prior` knows, and the noise schedule that it was trained on."""
    path = path / "prior" if (path / "prior").is_dir() else path
    prior, schedule, _ = _prior(read_file(only(path) if path.is_dir() else path, "prior"), dtype)
    return prior, schedule


def _source(checkpoint: Checkpoint) -> Any:
    return read(
        PriorSource if checkpoint.part == "prior" else DecoderSource,
        checkpoint.config,
        checkpoint.where,
    )


def _prior(checkpoint: Checkpoint, dtype: torch.dtype) -> Loaded:
    source, state, release = _source(checkpoint), checkpoint.state, checkpoint.release
    config, bias_scale = prior_config(source, state, release, checkpoint.where)
    schedule = _schedule(checkpoint, "noise_scheduler", source.beta_schedule, source.timesteps)
    # What training put for x_t is never wanted: guidance that drops x_t with the text would forget what it is at.
    unused = ["net.null_image_embed"] + ["net.null_text_embeds"] * (config.text_null != "learned")
    prior = build(
        RelativePrior,
        config,
        {**state, "emb_norm": torch.ones(())},
        prior_rules(config, state, bias_scale),
        checkpoint.file,
        dtype,
        (*IGNORED, *unused),
    )
    return prior, schedule, StageOptions(source.sample_timesteps or STEPS, eta=1.0)


def _decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> Loaded:
    source, state = _source(checkpoint), _only_unet(checkpoint, 0)
    config = decoder_config(source, state, checkpoint.release, checkpoint.where)
    unused = ["unets.0.null_text_embed"] * (config.text_width is None)
    rules = decoder_rules(config, state, "unets.0.")
    decoder = build(
        CrossAttentionDecoder, config, state, rules, checkpoint.file, dtype, (*IGNORED, *unused)
    )
    guidance = DECODER_GUIDANCE if source.image_cond_drop_prob > 0 else 1.0
    return decoder, _unet_schedule(checkpoint, 0), _stage(source, 0, guidance)


def _upsamplers(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Loaded]]:
    """Of a file, which need not have the decoder's U-Net."""
    source = _source(checkpoint)
    for i in range(1, len(source.unets)):
        state = _only_unet(checkpoint, i)
        if not any(name.startswith("unets.") for name in state):
            continue  # the trainer deletes the U-Nets that it doesn't train
        config = upsampler_config(source, i, state, checkpoint.release, checkpoint.where)
        rules = under("", "unet.", unet_rules(config.unet, state, f"unets.{i}."))
        unused = f"unets.{i}.null_*"  # made for every U-Net, but this one is not told what could be missing
        upsampler = build(
            CrossAttentionUpsampler,
            config,
            state,
            rules,
            checkpoint.file,
            dtype,
            (*IGNORED, unused),
        )
        yield f"upsampler_{i - 1}", (upsampler, _unet_schedule(checkpoint, i), _stage(source, i))


def _only_unet(checkpoint: Checkpoint, i: int) -> dict[str, torch.Tensor]:
    """The state without the other U-Nets."""
    other = re.compile(rf"unets\.(?!{i}\.)")
    return {name: x for name, x in checkpoint.state.items() if not other.match(name)}


def _stage(source: DecoderSource, i: int, guidance: float = 1.0) -> StageOptions:
    threshold = source.dynamic_thres_percentile if source.use_dynamic_thres else None
    steps, eta = source.each("sample_timesteps")[i] or STEPS, source.ddim_sampling_eta
    return StageOptions(steps, guidance, eta=eta, dynamic_threshold=threshold)


def _unet_schedule(checkpoint: Checkpoint, i: int) -> ScheduleConfig:
    source = _source(checkpoint)
    return _schedule(checkpoint, f"noise_schedulers.{i}", source.schedules[i], source.timesteps)


def _schedule(checkpoint: Checkpoint, name: str, kind: str, num_timesteps: int) -> ScheduleConfig:
    """The schedule that the configuration names; ValueError if the file's own tables are of another."""
    if kind not in ("cosine", "linear"):
        raise ValueError(
            f"{checkpoint.where}: beta_schedule is {kind!r}; only cosine and linear are supported"
        )
    config = ScheduleConfig(kind, num_timesteps)
    table, ours = checkpoint.state.get(f"{name}.alphas_cumprod"), Schedule(config).alpha_bar
    if table is not None and (
        table.shape != ours.shape or not torch.allclose(table.double(), ours, rtol=0, atol=1e-3)
    ):
        raise ValueError(
            f"{checkpoint.file}: its tables {name} are not the {kind} schedule with {num_timesteps} timesteps that its "
            f"configuration names"
        )
    return config


def _clip(folder: Path, named: Sequence[ClipSource | None]) -> CLIP:
    from unclip.clip import (
        CLIP,
    )  # late: open_clip is slow to import, and a prior alone does without it

    here, named = folder / "clip", [source for source in named if source is not None]
    if here.is_dir():
        return CLIP.from_pretrained(here)
    if (
        len(told := {f"{source.make} {source.model}" for source in named}) != 1
        or named[0].make != "openai"
    ):
        names = " and ".join(sorted(told)) or "none"
        raise FileNotFoundError(
            f"{here} is missing, and cannot be fetched as the configurations name {names}; put the CLIP there, in "
            f"open_clip's layout"
        )
    return CLIP.from_open_clip(
        named[0].model.replace("/", "-").replace("@", "-").removesuffix("px"), "openai"
    )

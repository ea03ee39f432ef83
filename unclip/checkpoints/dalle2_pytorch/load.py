"""DALLE2-pytorch's priors, decoders and upsamplers, as LAION published and its trainer saves them.

A folder:

  prior/       best.pth or latest.pth, prior_config.json; without a prior, only variations
  decoder/     the same with decoder_config.json; since release 1.0 the .pth holds its configuration
  upsampler/   the same, if the upsampler is in a different file from the decoder
  clip/        the CLIP in open_clip's layout; without it, the configured one is downloaded
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from unclip.checkpoints.dalle2_pytorch.configs import (
    ClipSource,
    DecoderSource,
    PriorSource,
    decoder_config,
    prior_config,
    read,
    upsampler_config,
)
from unclip.checkpoints.dalle2_pytorch.files import (
    PREFIXES,
    Checkpoint,
    only_checkpoint,
    read_file,
    weights,
)
from unclip.checkpoints.dalle2_pytorch.names import IGNORED, decoder_rules, prior_rules, unet_rules
from unclip.checkpoints.formats import Bundle, Format, LoadedPrior, States
from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import Part, build, prefixed, read_weights
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionUpsampler,
)
from unclip.models.published.relative_prior import RelativePrior
from unclip.types import StageOptions, UnCLIPOptions

if TYPE_CHECKING:
    from unclip.clip import CLIP

STEPS = 64  # if the configuration has no number; the default of the prior's trainer
DECODER_GUIDANCE = 1.7  # from LAION's inference configuration; the checkpoints hold none


class Stage(NamedTuple):
    """A network with its noise schedule and default sampling options."""

    network: nn.Module
    schedule: ScheduleConfig
    options: StageOptions


def recognise(folder: Path) -> bool:
    return folder.is_dir() and any((folder / "decoder").rglob("*.pth"))


def load_bundle(folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load the folder. Raises ValueError or FileNotFoundError for missing or unsupported parts."""
    stages: dict[str, Stage] = {}
    clips: list[ClipSource | None] = []
    if (folder / "prior").is_dir():
        checkpoint = read_file(only_checkpoint(folder / "prior"), "prior")
        stages["prior"] = _prior(checkpoint, dtype)
        clips.append(_prior_source(checkpoint).clip)
    checkpoint = read_file(only_checkpoint(folder / "decoder"), "decoder")
    stages["decoder"] = _decoder(checkpoint, dtype)
    stages |= _upsamplers(checkpoint, dtype)
    clips.append(_decoder_source(checkpoint).clip)
    if (folder / "upsampler").is_dir():
        checkpoint = read_file(only_checkpoint(folder / "upsampler"), "decoder")
        if not (found := dict(_upsamplers(checkpoint, dtype))):
            raise ValueError(f"{checkpoint.file} has no upsampler, a U-Net after the first one")
        stages |= found

    options: dict[str, Any] = {name: stage.options for name, stage in stages.items()}
    upsamplers = tuple(options.pop(name) for name in list(options) if name.startswith("upsampler_"))
    networks = {name: stage.network for name, stage in stages.items()}
    return Bundle(
        kind="unclip",
        components={"clip": _clip(folder, clips), **networks},
        schedules={name: stage.schedule for name, stage in stages.items()},
        options=UnCLIPOptions(**options, upsamplers=upsamplers),
        name=folder.name,
        licence="",
    )


def probe(folder: Path) -> States:
    """Return the tensors of each part; CLIP only if it is in the folder.

    The U-Nets of a file are the decoder and its upsamplers.
    """
    states: States = {}
    if (folder / "clip").is_dir():
        states["clip"] = read_weights(folder / "clip")
    if (folder / "prior").is_dir():
        states |= probe_prior(folder)
    own_upsampler = (folder / "upsampler").is_dir()
    for part in ("decoder", "upsampler") if own_upsampler else ("decoder",):
        state = read_file(only_checkpoint(folder / part), "decoder").state
        unets = {int(name.split(".")[1]) for name in state if name.startswith("unets.")}
        for i in sorted(unets):
            if not own_upsampler or (i == 0) == (part == "decoder"):
                unet = {name: x for name, x in state.items() if name.startswith(f"unets.{i}.")}
                states[f"upsampler_{i - 1}" if i else "decoder"] = unet
    return states


def recognise_prior(path: Path) -> bool:
    """Recognise a .pth file with a prior, its folder, or the folder of the whole model."""
    if path.is_dir():
        return any(map(recognise_prior, [*path.glob("*.pth"), *path.glob("prior/*.pth")]))
    if path.suffix != ".pth":
        return False
    return any(name.startswith(PREFIXES["prior"]) for name in weights(read_checkpoint(path)))


def load_prior(path: Path, dtype: torch.dtype = torch.float32) -> LoadedPrior:
    """Load what `recognise_prior` accepts."""
    stage = _prior(read_file(_prior_file(path), "prior"), dtype)
    return LoadedPrior(stage.network, stage.schedule)


def probe_prior(path: Path) -> States:
    state = read_file(_prior_file(path), "prior").state
    return {"prior": {name: x for name, x in state.items() if name.startswith(PREFIXES["prior"])}}


def _prior_file(path: Path) -> Path:
    path = path / "prior" if (path / "prior").is_dir() else path
    return only_checkpoint(path) if path.is_dir() else path


def _prior_source(checkpoint: Checkpoint) -> PriorSource:
    return read(PriorSource, checkpoint.config, checkpoint.where)


def _decoder_source(checkpoint: Checkpoint) -> DecoderSource:
    return read(DecoderSource, checkpoint.config, checkpoint.where)


def _prior(checkpoint: Checkpoint, dtype: torch.dtype) -> Stage:
    source, state = _prior_source(checkpoint), checkpoint.state
    config, bias_scale = prior_config(source, state, checkpoint.release, checkpoint.where)
    # Training also drops x_t. Guidance does not use that: it would lose the current sample.
    unused = ["net.null_image_embed"] + ["net.null_text_embeds"] * (config.text_null != "learned")
    rules = prior_rules(config, state, bias_scale)
    part = Part({**state, "emb_norm": torch.ones(())}, rules, checkpoint.file)
    prior = build(RelativePrior, config, [part], dtype, (*IGNORED, *unused))
    schedule = _schedule(checkpoint, "noise_scheduler", source.beta_schedule, source.timesteps)
    return Stage(prior, schedule, StageOptions(source.sample_timesteps or STEPS, eta=1.0))


def _decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> Stage:
    source, state = _decoder_source(checkpoint), _only_unet(checkpoint, 0)
    config = decoder_config(source, state, checkpoint.release, checkpoint.where)
    part = Part(state, decoder_rules(config, state, "unets.0."), checkpoint.file)
    unused = ["unets.0.null_text_embed"] * (config.text_width is None)
    decoder = build(CrossAttentionDecoder, config, [part], dtype, (*IGNORED, *unused))
    guidance = DECODER_GUIDANCE if source.image_cond_drop_prob > 0 else 1.0
    schedule = _unet_schedule(checkpoint, source, 0)
    return Stage(decoder, schedule, _unet_options(source, 0, guidance))


def _upsamplers(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Stage]]:
    """Yield the upsamplers in a file, which need not have the decoder's U-Net."""
    source = _decoder_source(checkpoint)
    for i in range(1, len(source.unets)):
        state = _only_unet(checkpoint, i)
        if not any(name.startswith("unets.") for name in state):
            continue  # the trainer deletes the U-Nets that it does not train
        config = upsampler_config(source, i, state, checkpoint.release, checkpoint.where)
        rules = prefixed("", "unet.", unet_rules(config.unet, state, f"unets.{i}."))
        unused = f"unets.{i}.null_*"  # saved for every U-Net, but upsamplers are unconditional
        part = Part(state, rules, checkpoint.file)
        upsampler = build(CrossAttentionUpsampler, config, [part], dtype, (*IGNORED, unused))
        schedule = _unet_schedule(checkpoint, source, i)
        yield f"upsampler_{i - 1}", Stage(upsampler, schedule, _unet_options(source, i))


def _only_unet(checkpoint: Checkpoint, i: int) -> dict[str, Tensor]:
    """Return the state without the other U-Nets."""
    other = re.compile(rf"unets\.(?!{i}\.)")
    return {name: x for name, x in checkpoint.state.items() if not other.match(name)}


def _unet_options(source: DecoderSource, i: int, guidance: float = 1.0) -> StageOptions:
    threshold = source.dynamic_thres_percentile if source.use_dynamic_thres else None
    steps = source.each("sample_timesteps")[i] or STEPS
    return StageOptions(steps, guidance, eta=source.ddim_sampling_eta, dynamic_threshold=threshold)


def _unet_schedule(checkpoint: Checkpoint, source: DecoderSource, i: int) -> ScheduleConfig:
    return _schedule(checkpoint, f"noise_schedulers.{i}", source.schedules[i], source.timesteps)


def _schedule(checkpoint: Checkpoint, name: str, kind: str, num_timesteps: int) -> ScheduleConfig:
    """Return the configured schedule. Raises ValueError if the file's own table differs from it."""
    if kind not in ("cosine", "linear"):
        raise ValueError(f"{checkpoint.where}: beta_schedule is {kind}; expected cosine or linear")
    config = ScheduleConfig(kind, num_timesteps)
    table, ours = checkpoint.state.get(f"{name}.alphas_cumprod"), Schedule(config).alpha_bar
    if table is not None and (
        table.shape != ours.shape or not torch.allclose(table.double(), ours, rtol=0, atol=1e-3)
    ):
        expected = f"the configured {kind} schedule with {num_timesteps} timesteps"
        raise ValueError(f"{checkpoint.file}: {name}.alphas_cumprod is not {expected}")
    return config


def _clip(folder: Path, sources: Sequence[ClipSource | None]) -> CLIP:
    from unclip.clip import CLIP  # late: open_clip is slow to import, and a prior alone needs none

    own = folder / "clip"
    if own.is_dir():
        return CLIP.from_pretrained(own)
    found = {(source.make, source.model) for source in sources if source is not None}
    if [make for make, _ in found] != ["openai"]:
        names = " and ".join(sorted(map(" ".join, found))) or "none"
        fault = f"is missing and cannot be downloaded, as the configurations name {names}"
        raise FileNotFoundError(f"{own} {fault}; put the CLIP there in open_clip's layout")
    [(_, model)] = found
    name = model.replace("/", "-").replace("@", "-").removesuffix("px")
    return CLIP.from_open_clip(name, "openai")


FORMAT = Format("DALLE2-pytorch", "unclip", recognise, load_bundle, probe)
PRIOR = Format("DALLE2-pytorch", "prior", recognise_prior, load_prior, probe_prior)

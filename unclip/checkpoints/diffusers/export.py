"""A model of ours as a folder that diffusers' unCLIP pipelines read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.diffusers import configs
from unclip.checkpoints.diffusers.configs import Scheduler
from unclip.checkpoints.diffusers.layout import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    KARLO_OPTIONS,
    SCHEDULER_FILE,
    recognise,
)
from unclip.checkpoints.diffusers.names import prior_rules, text_proj_rules, unet_rules
from unclip.checkpoints.folders import write_weights
from unclip.checkpoints.renaming import LEAVES, Rule, to_there
from unclip.checkpoints.store import Bundle
from unclip.config import save_json
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import atomic_folder, keep_others, read_json
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import UNetConfig

WEIGHTS_FILE, CLIP_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
# The class was moved, and diffusers no longer finds it under the name "unclip" that Karlo's own index has for it.
TEXT_PROJ_LIBRARY = "diffusers.pipelines.deprecated.unclip.text_proj"
Entries = dict[str, tuple[str, str]]  # component -> its library and class


def save_for_diffusers(
    bundle: Bundle, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes a folder for diffusers' UnCLIPPipeline, or without a prior for UnCLIPImageVariationPipeline.

    Whole or not at all, weights in `dtype` if it is given; with prior and image encoder it serves either pipeline.
    What lies there beside an old model's components stays.
    ValueError, which tells the reason for each part, if diffusers has no class for one of them.
    """
    folder = Path(folder)
    if against := reasons_against(bundle):
        raise ValueError(f"{bundle.name} cannot be written for diffusers: {'; '.join(against)}")
    if folder.exists() and not recognise(folder) and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no folder of diffusers'; give a new folder")
    old = read_json(folder / INDEX_FILE) if recognise(folder) else {}
    with atomic_folder(folder) as part:
        index: Entries = _write_clip(bundle, part, dtype)
        for name, write in {
            "prior": _write_prior,
            "decoder": _write_decoder,
            "upsampler_0": _write_upsampler,
        }.items():
            if name in bundle.components:
                index |= write(bundle.components[name], bundle.schedules[name], part, dtype)
        pipeline = (
            "UnCLIPPipeline" if "prior" in bundle.components else "UnCLIPImageVariationPipeline"
        )
        head = {"_class_name": pipeline, "_diffusers_version": version("diffusers")}
        save_json(
            {**head, **{name: list(entry) for name, entry in sorted(index.items())}},
            part / INDEX_FILE,
        )
        if not (folder / CARD_FILE).is_file():  # else somebody may have written more
            card = f"---\nlicense: {json.dumps(bundle.licence, ensure_ascii=False)}\n---\n\n# {bundle.name}\n"
            (part / CARD_FILE).write_text(card, encoding="utf-8")
        keep_others(folder, part, {*old, INDEX_FILE})
    _tell_options(bundle)


def reasons_against(bundle: Bundle) -> list[str]:
    """Why diffusers cannot express a model: one line for each part that it has no equal for."""
    if bundle.kind != "unclip":
        return [f"it is a model of kind {bundle.kind!r}, and only 'unclip' has a pipeline there"]
    found: dict[str, list[str]] = {name: [] for name in bundle.components}
    known = {"prior": (DiffusionPrior, _against_prior), "decoder": (Decoder, _against_decoder)}
    for name, module in bundle.components.items():
        if name == "clip":
            continue
        kind, reasons = known.get(name, (Upsampler, _against_upsampler))
        if type(module) is not kind:
            found[name] = [f"it is a {type(module).__name__}"]
            continue
        reasons = [*reasons(module.config), *_against_schedule(bundle.schedules[name])]
        found[name] = list(dict.fromkeys(reasons))  # an upsampler's networks may have the same
    found["clip"] = _against_clip(bundle)
    if (upsamplers := sum(name.startswith("upsampler_") for name in bundle.components)) != 1:
        found["upsamplers"] = [f"there are {upsamplers}; the pipeline has one"]
    return [f"{name} ({', '.join(reasons)})" for name, reasons in found.items() if reasons]


def _against_clip(bundle: Bundle) -> list[str]:
    from unclip.checkpoints.transformers import clip as towers

    clip = bundle.components["clip"]
    images = towers.reasons_against_vision(clip) if "prior" not in bundle.components else []
    return [*towers.reasons_against_text(clip), *images]


def _against_prior(config: PriorConfig) -> Iterable[str]:
    if config.null_text != "empty_prompt":
        yield "its null text is learned, not the empty prompt"
    if config.mlp_ratio != 4:
        yield f"mlp_ratio is {config.mlp_ratio}, not 4"
    yield from _against_widths(config)


def _against_widths(config: PriorConfig | DecoderConfig) -> Iterable[str]:
    if config.text_width != config.emb_dim:
        yield f"text_width {config.text_width} is not emb_dim {config.emb_dim}"


def _against_decoder(config: DecoderConfig) -> Iterable[str]:
    if config.null_text != "empty_prompt":
        yield "its null text is learned, not the empty prompt"
    if config.text.kind != "clip_states":
        yield "it reads the text with a transformer of its own"
    if not config.text_emb_in_time:
        yield "the text embedding is not added to the time embedding"
    if config.prediction == "v":
        yield "it predicts v"
    if not config.learned_variance:
        yield "its variance is not learned"
    if config.layout:
        yield "it is shown a layout"
    if config.inpaints:
        yield "it inpaints"
    yield from _against_widths(config)
    yield from _against_unet(config.unet)
    if not config.unet.mid_attention:
        yield "no attention in the middle"


def _against_upsampler(config: UpsamplerConfig) -> Iterable[str]:
    if config.residual:
        yield "it predicts a residual"
    if config.prediction == "v":
        yield "it predicts v"
    for unet in filter(None, (config.unet, config.last_unet)):
        yield from _against_unet(unet)
        if unet.mid_attention or any(level.attention for level in unet.levels):
            yield "attention"
        if len({level.blocks for level in unet.levels}) > 1:
            yield "levels of different depth"


def _against_unet(config: UNetConfig) -> Iterable[str]:
    if config.patch != 1:
        yield f"patch is {config.patch}, not 1"
    if config.resample != "residual":
        yield f"resample is {config.resample!r}, not 'residual'"


def _against_schedule(config: ScheduleConfig) -> Iterable[str]:
    if config.kind != "cosine":
        yield f"its schedule is {config.kind}, not cosine"
    if config.shift != 1 or config.zero_terminal_snr:
        yield "its schedule is shifted" if config.shift != 1 else "its schedule ends at SNR 0"


def _write_clip(bundle: Bundle, folder: Path, dtype: torch.dtype | None) -> Entries:
    from unclip.checkpoints.transformers import clip as towers
    from unclip.checkpoints.transformers.tokenizer import write_tokenizer

    clip = bundle.components["clip"]
    text_rules, vision_rules = towers.rules(clip.config)
    tokenizer, state = towers.for_transformers(clip)
    config = towers.write_config(clip, tokenizer)
    _write(state, text_rules, folder / "text_encoder", config, dtype, CLIP_WEIGHTS_FILE)
    entries = {
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", write_tokenizer(tokenizer, folder / "tokenizer")),
    }
    if against := towers.reasons_against_vision(clip):
        if clip.model.visual is not None:
            warnings.warn(f"the image encoder is left out: {', '.join(against)}", stacklevel=3)
        return entries
    vision = folder / "image_encoder"
    _write(state, vision_rules, vision, towers.write_vision_config(clip), dtype, CLIP_WEIGHTS_FILE)
    _save_json(towers.write_processor(clip), folder / "feature_extractor" / towers.PROCESSOR_FILE)
    return entries | {
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
    }


def _write_prior(
    prior: DiffusionPrior, schedule: ScheduleConfig, folder: Path, dtype: torch.dtype | None
) -> Entries:
    _write(
        prior.state_dict(),
        prior_rules(prior.config),
        folder / "prior",
        configs.write_prior(prior.config),
        dtype,
    )
    scheduler = Scheduler(schedule, "x0", False, prior.config.x0_limit)
    return {
        "prior": ("diffusers", "PriorTransformer"),
        **_write_scheduler(scheduler, folder / "prior_scheduler"),
    }


def _write_decoder(
    decoder: Decoder, schedule: ScheduleConfig, folder: Path, dtype: torch.dtype | None
) -> Entries:
    config = decoder.config
    unet_json, text_proj_json = configs.write_decoder(config)
    _write(decoder.unet.state_dict(), unet_rules(config.unet), folder / "decoder", unet_json, dtype)
    _write(decoder.state_dict(), text_proj_rules(), folder / "text_proj", text_proj_json, dtype)
    scheduler = Scheduler(schedule, config.prediction, config.learned_variance, 1.0)
    return {
        "decoder": ("diffusers", "UNet2DConditionModel"),
        "text_proj": (TEXT_PROJ_LIBRARY, "UnCLIPTextProjModel"),
        **_write_scheduler(scheduler, folder / "decoder_scheduler"),
    }


def _write_upsampler(
    upsampler: Upsampler, schedule: ScheduleConfig, folder: Path, dtype: torch.dtype | None
) -> Entries:
    """One network for all steps is written twice: the pipeline wants one for the last."""
    config, entries = upsampler.config, {}
    last = (
        (upsampler.last_unet, config.last_unet)
        if upsampler.last_unet is not None
        else (upsampler.unet, config.unet)
    )
    for name, (unet, unet_config) in {
        "super_res_first": (upsampler.unet, config.unet),
        "super_res_last": last,
    }.items():
        unet_json = configs.write_unet(unet_config, config.high_size)
        _write(unet.state_dict(), unet_rules(unet_config), folder / name, unet_json, dtype)
        entries[name] = ("diffusers", "UNet2DModel")
    scheduler = Scheduler(schedule, config.prediction, config.learned_variance, 1.0)
    return entries | _write_scheduler(scheduler, folder / "super_res_scheduler")


def _write_scheduler(scheduler: Scheduler, folder: Path) -> Entries:
    _save_json(configs.write_scheduler(scheduler), folder / SCHEDULER_FILE)
    return {folder.name: ("diffusers", "UnCLIPScheduler")}


def _write(
    state: Mapping[str, Tensor],
    rules: Sequence[Rule],
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    file: str = WEIGHTS_FILE,
) -> None:
    """Those tensors of a state dict that the rules name, and their config.json."""
    _save_json(config, folder / CONFIG_FILE)
    places = {name + leaf for rule in rules for name in rule.here for leaf in LEAVES}
    wanted = {name: tensor for name, tensor in state.items() if name in places}
    write_weights(to_there(wanted, rules), folder / file, dtype)


def _save_json(config: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    save_json(config, file)


def _tell_options(bundle: Bundle) -> None:
    """diffusers' folders hold no sampling options; says what to call its pipeline with, if not its own defaults."""
    ours, theirs, wanted = bundle.options, KARLO_OPTIONS, {}
    stages = [("prior", ours.prior, theirs.prior)] if "prior" in bundle.components else []
    stages.append(("decoder", ours.decoder, theirs.decoder))
    stages += [
        ("super_res", *pair) for pair in zip(ours.upsamplers, theirs.upsamplers, strict=False)
    ]
    for name, stage, default in stages:
        if stage.steps != default.steps:
            wanted[f"{name}_num_inference_steps"] = stage.steps
        if stage.guidance != default.guidance and name != "super_res":
            wanted[f"{name}_guidance_scale"] = stage.guidance
    if wanted:
        told = ", ".join(f"{name}={value}" for name, value in wanted.items())
        warnings.warn(
            f"diffusers' folders hold no sampling options; to draw as here, give {told}",
            stacklevel=3,
        )

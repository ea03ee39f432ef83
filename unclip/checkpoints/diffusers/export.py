"""Export of our models to folders that diffusers' unCLIP pipelines load."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.diffusers import configs
from unclip.checkpoints.diffusers.configs import Scheduler
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS, SCHEDULER_FILE, recognise
from unclip.checkpoints.diffusers.names import prior_rules, text_proj_rules, unet_rules
from unclip.checkpoints.folders import CARD_FILE
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.hub import CONFIG_FILE, INDEX_FILE
from unclip.checkpoints.renaming import Rule, export_state, select
from unclip.config import save_json
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import atomic_folder, keep_others, read_json
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import UNetConfig
from unclip.weights import write_safetensors

PIPELINE_FILE = "pipeline.py"  # of folders with their own pipeline (see `custom`)
WEIGHTS_FILE, CLIP_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
# diffusers has moved this class: it no longer finds it as "unclip", the entry in Karlo's index.
TEXT_PROJ_LIBRARY = "diffusers.pipelines.deprecated.unclip.text_proj"
Entries = dict[str, tuple[str, str]]  # component -> its library and class


def save_for_diffusers(
    bundle: Bundle, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a folder for UnCLIPPipeline, or without a prior for UnCLIPImageVariationPipeline.

    With a prior and an image encoder, it works with both. Weights are written in `dtype` if it is
    given. The folder is replaced atomically; files that do not belong to an older model are kept.
    Raises ValueError with the reasons if diffusers cannot express the model.
    """
    folder = Path(folder)
    if reasons := reasons_against(bundle):
        raise ValueError(f"{bundle.name} cannot be written for diffusers: {'; '.join(reasons)}")
    writers = {"prior": _write_prior, "decoder": _write_decoder, "upsampler_0": _write_upsampler}
    with index_folder(bundle, folder) as (part, index):
        has_prior = "prior" in bundle.components
        index["_class_name"] = "UnCLIPPipeline" if has_prior else "UnCLIPImageVariationPipeline"
        entries = write_text_encoder(bundle, part, dtype)
        entries |= _write_image_encoder(bundle, part, dtype)
        for name, write in writers.items():
            if name in bundle.components:
                entries |= write(bundle.components[name], bundle.schedules[name], part, dtype)
        index |= {name: list(entry) for name, entry in sorted(entries.items())}
    _warn_of_options(bundle)


@contextlib.contextmanager
def index_folder(bundle: Bundle, folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a new folder, and a model_index.json to fill, that replace `folder` at the end.

    Raises ValueError if `folder` exists and is not a diffusers folder.
    """
    if folder.exists() and not recognise(folder) and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a diffusers folder; choose a new folder")
    old = read_json(folder / INDEX_FILE) if recognise(folder) else {}
    index: dict[str, Any] = {"_class_name": None, "_diffusers_version": version("diffusers")}
    with atomic_folder(folder) as part:
        yield part, index
        save_json(index, part / INDEX_FILE)
        if not (folder / CARD_FILE).is_file():  # do not replace a model card
            licence = json.dumps(bundle.licence, ensure_ascii=False)
            card = f"---\nlicense: {licence}\n---\n\n# {bundle.name}\n"
            (part / CARD_FILE).write_text(card, encoding="utf-8")
        keep_others(folder, part, {*old, INDEX_FILE, PIPELINE_FILE})


def reasons_against(bundle: Bundle) -> list[str]:
    """Return why diffusers cannot express a model: one entry for each unsupported component."""
    if bundle.kind != "unclip":
        return [f"its kind is {bundle.kind!r}; diffusers has a pipeline for 'unclip' only"]
    found: dict[str, list[str]] = {"clip": against_clip(bundle)}
    known = {"prior": (DiffusionPrior, _against_prior), "decoder": (Decoder, _against_decoder)}
    for name, module in bundle.components.items():
        if name == "clip":
            continue
        kind, reasons = known.get(name, (Upsampler, _against_upsampler))
        if type(module) is not kind:
            found[name] = [f"it is a {type(module).__name__}, not a {kind.__name__}"]
            continue
        reasons = [*reasons(module.config), *_against_schedule(bundle.schedules[name])]
        found[name] = list(dict.fromkeys(reasons))  # both U-Nets of an upsampler may have the same
    if (upsamplers := sum(name.startswith("upsampler_") for name in bundle.components)) != 1:
        found["upsamplers"] = [f"there are {upsamplers}; the pipeline has one"]
    return [f"{name} ({', '.join(reasons)})" for name, reasons in found.items() if reasons]


def against_clip(bundle: Bundle) -> list[str]:
    from unclip.checkpoints.transformers import clip as towers

    clip = bundle.components["clip"]
    images = [] if "prior" in bundle.components else towers.reasons_against_vision(clip)
    return [*towers.reasons_against_text(clip), *images]


def _against_prior(config: PriorConfig) -> Iterator[str]:
    if config.mlp_ratio != 4:
        yield f"mlp_ratio is {config.mlp_ratio}, not 4"
    yield from _against_text(config)


def _against_text(config: PriorConfig | DecoderConfig) -> Iterator[str]:
    if config.null_text != "empty_prompt":
        yield "its null text is learned, not the empty prompt"
    if config.text_width != config.emb_dim:
        yield f"text_width {config.text_width} is not emb_dim {config.emb_dim}"


def _against_decoder(config: DecoderConfig) -> Iterator[str]:
    faults = {
        "it has its own text transformer": config.text.kind != "clip_states",
        "the text embedding is not added to the time embedding": not config.text_emb_in_time,
        "it predicts v": config.prediction == "v",
        "its variance is not learned": not config.learned_variance,
        "it is conditioned on a layout": config.layout is not None,
        "it inpaints": config.inpaints,
        "no attention in the middle": not config.unet.mid_attention,
    }
    yield from _against_text(config)
    yield from (reason for reason, holds in faults.items() if holds)
    yield from _against_unet(config.unet)


def _against_upsampler(config: UpsamplerConfig) -> Iterator[str]:
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


def _against_unet(config: UNetConfig) -> Iterator[str]:
    if config.patch != 1:
        yield f"patch is {config.patch}, not 1"
    if config.resample != "residual":
        yield f"resample is {config.resample!r}, not 'residual'"


def _against_schedule(config: ScheduleConfig) -> Iterator[str]:
    if config.kind != "cosine":
        yield f"its schedule is {config.kind}, not cosine"
    if config.shift != 1 or config.zero_terminal_snr:
        yield "its schedule is shifted" if config.shift != 1 else "its schedule ends at SNR 0"


def write_text_encoder(bundle: Bundle, folder: Path, dtype: torch.dtype | None) -> Entries:
    from unclip.checkpoints.transformers import clip as towers
    from unclip.checkpoints.transformers.tokenizer import write_tokenizer

    clip = bundle.components["clip"]
    text_rules, _ = towers.rules(clip.config)
    tokenizer, state = towers.for_transformers(clip)
    config = towers.write_config(clip, tokenizer)
    write_component(state, text_rules, folder / "text_encoder", config, dtype, CLIP_WEIGHTS_FILE)
    return {
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", write_tokenizer(tokenizer, folder / "tokenizer")),
    }


def _write_image_encoder(bundle: Bundle, folder: Path, dtype: torch.dtype | None) -> Entries:
    from unclip.checkpoints.transformers import clip as towers

    clip = bundle.components["clip"]
    if reasons := towers.reasons_against_vision(clip):
        if clip.model.visual is not None:
            warnings.warn(f"the image encoder is left out: {', '.join(reasons)}", stacklevel=3)
        return {}
    _, rules = towers.rules(clip.config)
    state, config = clip.model.state_dict(), towers.write_vision_config(clip)
    write_component(state, rules, folder / "image_encoder", config, dtype, CLIP_WEIGHTS_FILE)
    write_json(towers.write_processor(clip), folder / "feature_extractor" / towers.PROCESSOR_FILE)
    return {
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
    }


def _write_prior(
    prior: DiffusionPrior, schedule: ScheduleConfig, folder: Path, dtype: torch.dtype | None
) -> Entries:
    config = prior.config
    assert isinstance(config, PriorConfig)
    prior_json = configs.write_prior(config)
    write_component(prior.state_dict(), prior_rules(config), folder / "prior", prior_json, dtype)
    scheduler = Scheduler(schedule, "x0", False, config.x0_limit)
    return {
        "prior": ("diffusers", "PriorTransformer"),
        **_write_scheduler(scheduler, folder / "prior_scheduler"),
    }


def _write_decoder(
    decoder: Decoder, schedule: ScheduleConfig, folder: Path, dtype: torch.dtype | None
) -> Entries:
    config = decoder.config
    unet_json, text_proj_json = configs.write_decoder(config)
    write_component(
        decoder.unet.state_dict(), unet_rules(config.unet), folder / "decoder", unet_json, dtype
    )
    write_component(
        decoder.state_dict(), text_proj_rules(), folder / "text_proj", text_proj_json, dtype
    )
    scheduler = Scheduler(schedule, config.prediction, config.learned_variance, 1.0)
    return {
        "decoder": ("diffusers", "UNet2DConditionModel"),
        "text_proj": (TEXT_PROJ_LIBRARY, "UnCLIPTextProjModel"),
        **_write_scheduler(scheduler, folder / "decoder_scheduler"),
    }


def _write_upsampler(
    upsampler: Upsampler, schedule: ScheduleConfig, folder: Path, dtype: torch.dtype | None
) -> Entries:
    """Write both networks; a single U-Net is written twice, as the pipeline needs a last one."""
    config = upsampler.config
    first = last = (upsampler.unet, config.unet)
    if upsampler.last_unet is not None and config.last_unet is not None:
        last = (upsampler.last_unet, config.last_unet)
    for name, (unet, unet_config) in {"super_res_first": first, "super_res_last": last}.items():
        unet_json = configs.write_unet(unet_config, config.high_size)
        write_component(unet.state_dict(), unet_rules(unet_config), folder / name, unet_json, dtype)
    scheduler = Scheduler(schedule, config.prediction, config.learned_variance, 1.0)
    return {
        "super_res_first": ("diffusers", "UNet2DModel"),
        "super_res_last": ("diffusers", "UNet2DModel"),
        **_write_scheduler(scheduler, folder / "super_res_scheduler"),
    }


def _write_scheduler(scheduler: Scheduler, folder: Path) -> Entries:
    write_json(configs.write_scheduler(scheduler), folder / SCHEDULER_FILE)
    return {folder.name: ("diffusers", "UnCLIPScheduler")}


def write_component(
    state: Mapping[str, Tensor],
    rules: Sequence[Rule],
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    file: str = WEIGHTS_FILE,
) -> None:
    """Write a component: its config.json and the tensors of a state dict that the rules name."""
    write_json(config, folder / CONFIG_FILE)
    tensors = {}
    for name, x in export_state(select(state, rules), rules).items():
        x = x.detach().to("cpu", dtype if x.is_floating_point() else None)
        # safetensors refuses tensors that share storage, as the parts of a split Linear do.
        tensors[name] = x.clone(memory_format=torch.contiguous_format)
    write_safetensors(tensors, folder / file, metadata={"format": "pt"})


def write_json(config: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    save_json(config, file)


def _warn_of_options(bundle: Bundle) -> None:
    """Warn if the sampling options differ from the pipeline's defaults: its folders hold none."""
    ours, theirs, arguments = bundle.options, KARLO_OPTIONS, {}
    stages = [("prior", ours.prior, theirs.prior)] if "prior" in bundle.components else []
    stages.append(("decoder", ours.decoder, theirs.decoder))
    upsamplers = zip(ours.upsamplers, theirs.upsamplers, strict=False)
    stages += [("super_res", *pair) for pair in upsamplers]
    for name, stage, default in stages:
        if stage.steps != default.steps:
            arguments[f"{name}_num_inference_steps"] = stage.steps
        if stage.guidance != default.guidance and name != "super_res":
            arguments[f"{name}_guidance_scale"] = stage.guidance
    if arguments:
        call = ", ".join(f"{name}={value}" for name, value in arguments.items())
        warnings.warn(
            f"a diffusers folder holds no sampling options; call its pipeline with {call}",
            stacklevel=3,
        )

"""Export for diffusers: a folder for its unCLIP pipeline, or else one with its own pipeline.py.

The bundled model is of the second kind. Its text encoder, tokenizer and schedulers use classes of
transformers and diffusers, as does a `DiffusionPrior`; the folder holds the code of the other
networks (see `standalone`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.diffusers import configs, export
from unclip.checkpoints.diffusers.export import PIPELINE_FILE, Entries
from unclip.checkpoints.diffusers.layout import SCHEDULER_FILE
from unclip.checkpoints.diffusers.names import prior_rules
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.renaming import move
from unclip.config import to_dict
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.models.unclip.mlp_prior import MLPPrior
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.upsampler import Upsampler
from unclip.types import StageOptions, stages_of

CODE = Path(__file__).parent / "standalone"
MODULE, CLASS_NAME = "networks", "UnCLIPFolderPipeline"
MAX_UPSAMPLERS = 2
# Fields of our configurations that the classes in networks.py take. diffusers would mistake a
# setting for the submodule of the same name.
DECODER = (
    *("unet", "image_size", "emb_dim", "text_width", "context_tokens", "null_text"),
    *("text_emb_in_time", "layout", "inpaints"),
)
UPSAMPLER = ("unet", "low_size", "high_size", "residual")
MLP_PRIOR = (
    *("emb_dim", "text_width", "context_length", "width", "depth", "heads", "mlp_ratio"),
    *("mlp_width", "mlp_depth", "text_states"),
)
LAYOUT_PRIOR = ("emb_dim", "size", "components", "width", "depth", "text_width", "text_heads")
FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    Decoder: DECODER,
    Upsampler: UPSAMPLER,
    MLPPrior: MLP_PRIOR,
    LayoutPrior: LAYOUT_PRIOR,
}
NULL_TEXT = ("null_emb", "null_state")  # of a prior; networks of their own in the folder
RENAMED = {"unet": "unet_config", "layout": "layout_config"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def save(bundle: Bundle, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads.

    It has the layout of Karlo if the model fits it (`export.save_for_diffusers`), else its own
    pipeline.py. Raises ValueError with the reasons if neither can express the model.
    """
    if not export.reasons_against(bundle):
        return export.save_for_diffusers(bundle, folder, dtype)
    if reasons := reasons_against(bundle):
        raise ValueError(f"{bundle.name} cannot be written for diffusers: {'; '.join(reasons)}")
    parts, schedules = bundle.components, bundle.schedules
    with export.index_folder(bundle, Path(folder)) as (part, index):
        index["_class_name"] = [Path(PIPELINE_FILE).stem, CLASS_NAME]
        entries = export.write_text_encoder(bundle, part, dtype)
        entries |= _write_prior(parts["prior"], schedules["prior"], part, dtype)
        if (layouts := parts.get("layout_prior")) is not None:
            entries |= _write_network(layouts, part / "layout_prior", dtype)
            schedule, limit = schedules["layout_prior"], layouts.config.x0_limit
            entries |= _write_scheduler(part, "layout_prior", schedule, "x0", limit)
        for name, network in _image_networks(bundle):
            entries |= _write_network(network, part / name, dtype)
            prediction = network.config.prediction
            entries |= _write_scheduler(part, name, schedules[name], prediction, 1.0)
        (part / PIPELINE_FILE).write_bytes((CODE / PIPELINE_FILE).read_bytes())
        index |= {name: list(entry) for name, entry in sorted(entries.items())}
        index["options"] = _options(bundle)
    _warn(bundle)


def reasons_against(bundle: Bundle) -> list[str]:
    """Return why pipeline.py cannot run a model: one entry for each unsupported component."""
    if bundle.kind != "unclip":
        return [f"its kind is {bundle.kind!r}; diffusers has a pipeline for 'unclip' only"]
    if "prior" not in bundle.components:
        return ["it has no prior"]
    found = {"clip": [*export.against_clip(bundle)], "prior": [*_against_prior(bundle)]}
    for name, network in _image_networks(bundle):
        found[name] = [*_against_network(network)]
    if (count := len(bundle.options.upsamplers)) > MAX_UPSAMPLERS:
        found["upsamplers"] = [f"there are {count}; the pipeline has {MAX_UPSAMPLERS} at most"]
    return [f"{name} ({', '.join(reasons)})" for name, reasons in found.items() if reasons]


def _image_networks(bundle: Bundle) -> Iterator[tuple[str, Any]]:
    """Iterate over decoder and upsamplers, without those that are not used."""
    yield "decoder", bundle.components["decoder"]
    for i in range(len(bundle.options.upsamplers)):
        yield f"upsampler_{i}", bundle.components[f"upsampler_{i}"]


def _against_prior(bundle: Bundle) -> Iterator[str]:
    prior = bundle.components["prior"]
    if type(prior) is MLPPrior:
        return
    if type(prior) is not DiffusionPrior:
        yield f"it is a {type(prior).__name__}, not a DiffusionPrior or MLPPrior"
        return
    config = prior.config
    if config.mlp_ratio != 4:
        yield f"mlp_ratio is {config.mlp_ratio}, not 4"
    if config.text_width != config.emb_dim:
        yield f"text_width {config.text_width} is not emb_dim {config.emb_dim}"


def _against_network(network: nn.Module) -> Iterator[str]:
    if type(network) not in (Decoder, Upsampler):
        yield f"it is a {type(network).__name__}"
    elif isinstance(network, Decoder) and network.config.text.kind != "clip_states":
        yield "it has its own text transformer"
    elif isinstance(network, Upsampler) and network.config.last_unet is not None:
        yield "it has a U-Net of its own for the last step"


def _write_prior(
    prior: DiffusionPrior | MLPPrior,
    schedule: ScheduleConfig,
    folder: Path,
    dtype: torch.dtype | None,
) -> Entries:
    config, state = prior.config, prior.state_dict()
    if isinstance(prior, MLPPrior):
        entries = _write_network(prior, folder / "prior", dtype)
    else:
        assert isinstance(config, PriorConfig)
        prior_json = configs.write_prior(config)
        export.write_component(state, prior_rules(config), folder / "prior", prior_json, dtype)
        entries = {"prior": ("diffusers", "PriorTransformer")}
    if config.null_text == "learned":
        null = [move(name, name) for name in NULL_TEXT]
        values = _config("NullText", emb_dim=config.emb_dim, text_width=config.text_width)
        export.write_component(state, null, folder / "null_text", values, dtype)
        entries |= _add_code(folder / "null_text", "NullText")
    return entries | _write_scheduler(folder, "prior", schedule, "x0", config.x0_limit)


def _write_network(network: Any, folder: Path, dtype: torch.dtype | None) -> Entries:
    kind, state, config = type(network), network.state_dict(), to_dict(network.config)
    values = {RENAMED.get(field, field): config[field] for field in FIELDS[kind]}
    rules = [move(name, name) for name in state if name not in NULL_TEXT]
    export.write_component(state, rules, folder, _config(kind.__name__, **values), dtype)
    return _add_code(folder, kind.__name__)


def _add_code(folder: Path, kind: str) -> Entries:
    """Put the code of a network next to its weights, where diffusers looks for it."""
    (folder / f"{MODULE}.py").write_bytes((CODE / f"{MODULE}.py").read_bytes())
    return {folder.name: (MODULE, kind)}


def _write_scheduler(
    folder: Path, stage: str, schedule: ScheduleConfig, prediction: str, limit: float | None
) -> Entries:
    """Write DDIM with the noise levels of a stage and our timesteps."""
    config = _config(
        "DDIMScheduler",
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=Schedule(schedule).betas.tolist(),
        prediction_type=PREDICTIONS[prediction],
        clip_sample=limit is not None,
        clip_sample_range=limit or 1.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=0,
    )
    name = f"{stage}_scheduler"
    export.write_json(config, folder / name / SCHEDULER_FILE)
    return {name: ("diffusers", "DDIMScheduler")}


def _config(kind: str, **values: Any) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": version("diffusers"), **values}


def _options(bundle: Bundle) -> dict[str, Any]:
    """Return the sampling options that pipeline.py knows."""
    guided, upsamplers = _guided_stages(bundle), bundle.options.upsamplers
    return {
        **{name: {"steps": s.steps, "guidance": s.guidance} for name, s in guided.items()},
        "upsamplers": [{"steps": stage.steps} for stage in upsamplers],
        "prior_candidates": bundle.options.prior_candidates,
    }


def _guided_stages(bundle: Bundle) -> dict[str, StageOptions]:
    stages = {"prior": bundle.options.prior, "decoder": bundle.options.decoder}
    if (layouts := bundle.components.get("layout_prior")) is not None:
        config = layouts.config
        stages["layout_prior"] = StageOptions(config.steps, config.guidance)
    return stages


def _warn(bundle: Bundle) -> None:
    """Warn of what the folder does not hold, which changes the images."""
    options, lost = bundle.options, []
    for name, stage in (stages_of(options) | _guided_stages(bundle)).items():
        plain = StageOptions(stage.steps, stage.guidance)
        if stage != plain:
            lost.append(f"{name} is sampled by plain DDIM")
        if bundle.schedules[name].num_timesteps % stage.steps:
            lost.append(f"diffusers spaces {stage.steps} steps of {name} differently")
    if options.embedding != "prior":
        lost.append(f"embedding is {options.embedding!r}, but the pipeline decodes the prior's")
    if "inpainter" in bundle.components:
        lost.append("the inpainting decoder is left out")
    if lost:
        warnings.warn(f"images differ from ours: {'; '.join(lost)}", stacklevel=3)

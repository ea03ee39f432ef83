"""Our own format: a folder of JSON and safetensors, loaded strictly and written atomically.

emoji/
  model.json               format, version, kind, name, licence, components; borrowed: components
                           that are read from a bundled model
  options.json             default sampling options
  clip/                    in open_clip's layout (see clip.py)
  prior/                   config.json (type and fields), model.safetensors, schedule.json
                           (no schedule for a prior that is not sampled by diffusion)
  layout_prior/            as prior/; optional
  decoder/  upsampler_0/   as prior/; a DALL-E 1 model has codec/ and dalle/ without a schedule
  tokenizer/               config.json (type and fields) and tokenizer.json, if it is not CLIP's
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn

from unclip.checkpoints.folders import (
    CONFIG_FILE,
    FORMAT_NAME,
    MODEL_FILE,
    OPTIONS_FILE,
    SCHEDULE_FILE,
    VERSION,
    WEIGHTS_FILE,
    component_folders,
    read_config,
    read_model_json,
)
from unclip.checkpoints.formats import Bundle, Components, Format, LoadedPrior
from unclip.checkpoints.renaming import read_weights
from unclip.clip import CONFIG_FILE as CLIP_CONFIG_FILE
from unclip.config import parse, save_json, to_dict
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import atomic_folder, keep_others, printable, read_json
from unclip.models.codecs.dvae import DVAE
from unclip.models.codecs.vae import GaussianVAE
from unclip.models.codecs.vqgan import VQGAN
from unclip.models.codecs.vqvae import VQVAE
from unclip.models.dalle.transformer import DALLE
from unclip.models.lora import CONFIG_FILE as LORA_CONFIG_FILE
from unclip.models.published.bart_dalle import BartDALLE
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionUpsampler,
)
from unclip.models.published.glide import GLIDE
from unclip.models.published.plain_dvae import PlainDVAE
from unclip.models.published.relative_prior import RelativePrior
from unclip.models.unclip.ar_prior import ARPrior
from unclip.models.unclip.decoder import Decoder, Layout
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.models.unclip.mlp_prior import MLPPrior
from unclip.models.unclip.one_shot_prior import OneShotPrior
from unclip.models.unclip.prior import DenoisingPrior, DiffusionPrior, DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.tokenizer import load_tokenizer
from unclip.types import OPTIONS
from unclip.weights import TensorFile, load_strictly, meta_device, write_tensors

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)
_NETWORKS: tuple[type[nn.Module], ...] = (
    *(DiffusionPrior, MLPPrior, ARPrior, OneShotPrior, RelativePrior),
    Layout,  # trained on its own, then part of a decoder
    LayoutPrior,
    *(Decoder, Upsampler, GLIDE, CrossAttentionDecoder, CrossAttentionUpsampler),
    *(DALLE, BartDALLE),
    *(DVAE, PlainDVAE, VQVAE, VQGAN, GaussianVAE),
)
# type in config.json -> the network and its config
NETWORKS = {kind.__name__: (kind, get_type_hints(kind.__init__)["config"]) for kind in _NETWORKS}


def save_component(
    module: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    schedule: ScheduleConfig | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Save one network: its config, its weights (in `dtype` if given) and its noise schedule.

    notes: facts about the training, written to notes.json for readers.
    """
    assert type(module).__name__ in NETWORKS, f"{type(module).__name__} is not in NETWORKS"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json({"type": type(module).__name__, **to_dict(module.config)}, folder / CONFIG_FILE)
    if schedule is not None:
        save_json(schedule, folder / SCHEDULE_FILE)
    if notes:
        save_json(notes, folder / "notes.json")
    write_tensors(module, folder / WEIGHTS_FILE, dtype)


def component_config(folder: str | Path) -> tuple[type[nn.Module], Any]:
    """Read the class and config of the network in a folder; raises as `load_component` does."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file() and (Path(folder) / LORA_CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is an adapter (LoRA); expected the network that it adapts")
    config = read_json(file)
    kind = config.pop("type", None)
    if kind not in NETWORKS:
        names = ", ".join(NETWORKS)
        raise ValueError(f"{file}: type is {printable(repr(kind))}; expected one of {names}")
    network, config_type = NETWORKS[kind]
    return network, parse(config_type, config, str(file))


def load_component(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    mapped: bool = False,
) -> nn.Module:
    """Load the network in a folder, in eval mode: parameters in `dtype`, buffers in float32.

    It is built on the meta device, without initialisation, and filled tensor by tensor: at most one
    tensor is in memory twice. mapped: parameters are views of the file, in its dtype (see
    `TensorFile`). Raises ValueError for an unknown type, a wrong config key, missing, unexpected or
    misshaped tensors, and a truncated file.
    """
    folder = Path(folder)
    network, config = component_config(folder)
    with meta_device(folder / CONFIG_FILE):
        module = network(config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    file = folder / WEIGHTS_FILE
    load_strictly(module, TensorFile(file, mapped), file, as_stored=mapped)
    unsaved = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not unsaved, f"{network.__name__} has buffers that are not saved: {unsaved}"
    return module.to(device).eval()


def load_as(
    folder: str | Path, kinds: type[M] | tuple[type[M], ...], expected: str, **options: Any
) -> M:
    """Load a component that must be one of `kinds`; `expected` names them in the error.

    options: arguments of `load_component`.
    """
    module = load_component(folder, **options)
    if not isinstance(module, kinds):
        raise ValueError(f"{folder} is a {type(module).__name__}; expected {expected}")
    return module


def with_base(config: C, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> C:
    """Complete a training config whose `base` is the folder of a trained network.

    `model` and `schedule` become the network's own. Raises ValueError unless it is one of `kinds`
    and exactly one of `base` and `model` is given.
    """
    settings: Any = config
    if (settings.base is None) == (settings.model is None):
        raise ValueError("expected exactly one of model (sizes) and base (a trained network)")
    if settings.base is None:
        return config
    network, model = component_config(settings.base)
    if not issubclass(network, kinds):
        names = " or ".join(
            kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
        )
        raise ValueError(f"base: {settings.base} is a {network.__name__}; expected {names}")
    schedule = replace(load_schedule(settings.base), x0_errors=None)  # training changes the errors
    return replace(settings, base=None, model=model, schedule=schedule)


def is_diffused(folder: str | Path) -> bool:
    """Return whether the network in a folder is sampled by diffusion and so has a schedule."""
    kind = read_json(Path(folder) / CONFIG_FILE).get("type")
    return kind not in NETWORKS or not issubclass(NETWORKS[kind][0], DirectPrior)


def load_schedule(folder: str | Path) -> ScheduleConfig:
    """Load the noise schedule that the network in a folder was trained on."""
    file = Path(folder) / SCHEDULE_FILE
    return parse(ScheduleConfig, read_json(file), str(file))


def save_bundle(
    bundle: Bundle,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    shared_from: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder atomically; files that do not belong to the model it replaces are kept.

    shared_from: components that are not stored but read from a bundled model, as {"clip": "emoji"}.
    Raises ValueError if the folder holds something other than a model.
    """
    folder = Path(folder)
    old = read_model_json(folder)["components"] if recognise(folder) else []
    occupied = folder.is_dir() and any(
        file.is_dir() or file.name in (CONFIG_FILE, CLIP_CONFIG_FILE) for file in folder.iterdir()
    )
    if not recognise(folder) and (folder.is_file() or occupied):
        raise ValueError(f"{folder} exists and is not a model folder; choose a new folder")
    with atomic_folder(folder) as part:
        for name, module in bundle.components.items():
            if type(module).__name__ in NETWORKS:
                save_component(module, part / name, dtype, bundle.schedules.get(name))
            else:  # CLIP or a tokenizer
                module.save_pretrained(part / name, dtype)
        save_json(bundle.options, part / OPTIONS_FILE)
        model = {
            "format": FORMAT_NAME,
            "version": VERSION,
            "kind": bundle.kind,
            "name": bundle.name,
            "licence": bundle.licence,
            "components": list(bundle.components),
            **({"borrowed": dict(shared_from)} if shared_from else {}),
        }
        save_json(model, part / MODEL_FILE)
        keep_others(folder, part, {*old, MODEL_FILE, OPTIONS_FILE})


def recognise(folder: Path) -> bool:
    return (folder / MODEL_FILE).is_file()


def load_bundle(
    folder: str | Path, dtype: torch.dtype = torch.float32, *, mapped: bool = False
) -> Bundle:
    """Load a model folder onto the CPU, networks in `dtype`, CLIP in float32.

    mapped: see `load_component`.
    """
    from unclip.clip import CLIP  # late: open_clip is slow to import, and a component needs none

    folder = Path(folder)
    model = read_model_json(folder)
    if model["kind"] not in OPTIONS:
        kinds = ", ".join(OPTIONS)
        kind = printable(repr(model["kind"]))
        raise ValueError(f"{folder}: kind is {kind}; expected one of {kinds}")
    folders = component_folders(folder)
    readers = {"clip": CLIP.from_pretrained, "tokenizer": load_tokenizer}
    networks = [name for name in folders if name not in readers]
    readers |= dict.fromkeys(networks, partial(load_component, dtype=dtype, mapped=mapped))
    diffused = [n for n in networks if model["kind"] != "dalle" and is_diffused(folders[n])]
    options = folder / OPTIONS_FILE
    return Bundle(
        kind=model["kind"],
        components=Components({name: partial(readers[name], folders[name]) for name in folders}),
        schedules={name: load_schedule(folders[name]) for name in diffused},
        options=parse(OPTIONS[model["kind"]], read_json(options), str(options)),
        name=model["name"],
        licence=model["licence"],
    )


def recognise_component(path: Path) -> bool:
    return "type" in read_config(path)


def recognise_prior(path: Path) -> bool:
    return recognise(path) or recognise_component(path)


def load_prior(path: Path, dtype: torch.dtype = torch.float32) -> LoadedPrior:
    """Load the prior in a component folder or in a model folder."""
    folder = path / "prior" if recognise(path) else path
    if not folder.is_dir():
        raise ValueError(f"{path} is a model without a prior")
    kinds = (DenoisingPrior, RelativePrior, DirectPrior)
    prior = load_as(folder, kinds, "a prior", dtype=dtype)
    return LoadedPrior(prior, load_schedule(folder) if is_diffused(folder) else None)


FORMAT = Format(FORMAT_NAME, "model", recognise, load_bundle)
COMPONENT = Format(
    FORMAT_NAME,
    "component",
    recognise_component,
    load_component,
    lambda path: {path.name: read_weights(path)},
)
PRIOR = Format(FORMAT_NAME, "prior", recognise_prior, load_prior)

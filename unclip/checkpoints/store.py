"""Our own format: a folder of JSON and safetensors, strict on the way in and atomic on the way out.

emoji/
  model.json               format, version, kind, name, licence, components
  options.json             how to sample, unless the caller says otherwise
  clip/                    open_clip's layout (see clip.py)
  prior/                   config.json (type and fields), schedule.json, model.safetensors
  decoder/  upsampler_0/   likewise
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.catalogue import (
    CONFIG_FILE,
    FORMAT,
    MODEL_FILE,
    OPTIONS_FILE,
    SCHEDULE_FILE,
    VERSION,
    WEIGHTS_FILE,
    read_json,
    read_model_json,
)
from unclip.config import parse, save_json, to_dict
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import atomic_folder
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.types import UnCLIPOptions
from unclip.weights import load_strictly, read_tensors, write_tensors

NETWORKS: dict[str, tuple[type[nn.Module], type]] = {
    "DiffusionPrior": (DiffusionPrior, PriorConfig),
    "Decoder": (Decoder, DecoderConfig),
    "Upsampler": (Upsampler, UpsamplerConfig),
}
OPTIONS = {"unclip": UnCLIPOptions}  # by kind of model


@dataclass(frozen=True)
class Bundle:
    """All that a checkpoint holds; a pipeline is made from it."""

    kind: str
    components: dict[str, nn.Module]  # clip, prior, decoder, upsampler_0, ...
    schedules: dict[str, ScheduleConfig]  # of each component that is sampled by diffusion
    options: Any
    name: str
    licence: str


def save_component(
    module: nn.Module, folder: str | Path, dtype: torch.dtype | None = None, schedule: ScheduleConfig | None = None
) -> None:
    """Writes one network: its config, its weights (in `dtype` if given) and the noise schedule it was trained on."""
    assert type(module).__name__ in NETWORKS, f"{type(module).__name__} is not in NETWORKS"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json({"type": type(module).__name__, **to_dict(module.config)}, folder / CONFIG_FILE)
    if schedule is not None:
        save_json(schedule, folder / SCHEDULE_FILE)
    write_tensors(module, folder / WEIGHTS_FILE, dtype)


def load_component(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """The network in a folder, in eval mode; parameters in `dtype`, buffers (statistics) in float32 whatever it is.

    Built on the meta device and then given its tensors, so nothing is initialised in vain. ValueError names an unknown
    type, a wrong config key, tensors that are missing, unexpected or mis-shaped, and a truncated file.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    kind = config.pop("type", None)
    if kind not in NETWORKS:
        raise ValueError(f"{folder / CONFIG_FILE}: type is {kind!r}; expected one of {', '.join(NETWORKS)}")
    network, config_type = NETWORKS[kind]
    with torch.device("meta"):
        module = network(parse(config_type, config, str(folder / CONFIG_FILE)))
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    # Copies of the mapped memory: the file may be replaced while the model is in use.
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / WEIGHTS_FILE).items()}
    load_strictly(module, tensors, folder / WEIGHTS_FILE)
    assert not any(buffer.is_meta for buffer in module.buffers()), f"{kind} has a buffer that is not saved"
    return module.to(device).eval()


def load_schedule(folder: str | Path) -> ScheduleConfig:
    """The noise schedule that the network in a folder was trained on."""
    file = Path(folder) / SCHEDULE_FILE
    return parse(ScheduleConfig, read_json(file), str(file))


def save_bundle(bundle: Bundle, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a model folder whole or not at all; a model card and its pictures, if they lie there, stay.

    ValueError rather than replacing a folder of anything else.
    """
    folder = Path(folder)
    inside = list(folder.iterdir()) if folder.is_dir() else []
    if folder.is_file() or (not recognise(folder) and any(entry.is_dir() for entry in inside)):
        raise ValueError(f"{folder} exists and is no model folder; give a new folder")
    with atomic_folder(folder) as part:
        for file in inside:
            if file.is_file():
                shutil.copy2(file, part)
        for name, module in bundle.components.items():
            if name in bundle.schedules:
                save_component(module, part / name, dtype, bundle.schedules[name])
            else:
                module.save_pretrained(part / name, dtype)
        save_json(bundle.options, part / OPTIONS_FILE)
        model = {
            "format": FORMAT,
            "version": VERSION,
            "kind": bundle.kind,
            "name": bundle.name,
            "licence": bundle.licence,
            "components": list(bundle.components),
        }
        save_json(model, part / MODEL_FILE)


def recognise(folder: Path) -> bool:
    return (folder / MODEL_FILE).is_file()


def load_bundle(folder: str | Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Reads a model folder onto the CPU, networks in `dtype` (CLIP in float32)."""
    from unclip.clip import CLIP  # late: open_clip is slow to import, and a component alone does without it

    folder = Path(folder)
    model = read_model_json(folder)
    if model["kind"] not in OPTIONS:
        raise ValueError(f"{folder / MODEL_FILE}: kind is {model['kind']!r}; expected one of {', '.join(OPTIONS)}")
    networks = [name for name in model["components"] if name != "clip"]
    components: dict[str, nn.Module] = {"clip": CLIP.from_pretrained(folder / "clip")}
    components |= {name: load_component(folder / name, dtype) for name in networks}
    return Bundle(
        kind=model["kind"],
        components=components,
        schedules={name: load_schedule(folder / name) for name in networks},
        options=parse(OPTIONS[model["kind"]], read_json(folder / OPTIONS_FILE), str(folder / OPTIONS_FILE)),
        name=model["name"],
        licence=model["licence"],
    )

"""Our own format: a folder of JSON and safetensors, strict on the way in and atomic on the way out.

emoji/
  model.json               format, version, kind, name, licence, components; borrowed: those of a bundled model
  options.json             how to sample, unless the caller says otherwise
  clip/                    open_clip's layout (see clip.py)
  prior/                   config.json (type and fields), schedule.json, model.safetensors
                           (no schedule where the prior draws without diffusion)
  decoder/  upsampler_0/   likewise; of DALL-E instead: codec/, dalle/, without a schedule
  tokenizer/               where the tokenizer is not CLIP's: config.json (type and fields), tokenizer.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.registry import (
    CONFIG_FILE,
    FORMAT,
    MODEL_FILE,
    OPTIONS_FILE,
    SCHEDULE_FILE,
    VERSION,
    WEIGHTS_FILE,
    component_folders,
    read_json,
    read_model_json,
)
from unclip.config import parse, save_json, to_dict
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import atomic_folder, keep_others
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.codecs.vqvae import VQVAE, VQVAEConfig
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionDecoderConfig,
    CrossAttentionUpsampler,
    CrossAttentionUpsamplerConfig,
)
from unclip.models.published.glide import GLIDE, GLIDEConfig
from unclip.models.published.plain_dvae import PlainDVAE, PlainDVAEConfig
from unclip.models.published.relative_prior import RelativePrior, RelativePriorConfig
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.layout import Layout, LayoutConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.prior import DirectPrior
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.tokenizer import load_tokenizer
from unclip.types import CodeOptions, GLIDEOptions, UnCLIPOptions
from unclip.weights import TensorFile, load_strictly, write_tensors

NETWORKS: dict[str, tuple[type[nn.Module], type]] = {
    "DiffusionPrior": (DiffusionPrior, PriorConfig),
    "ARPrior": (ARPrior, ARPriorConfig),
    "OneShotPrior": (OneShotPrior, OneShotPriorConfig),
    "Layout": (Layout, LayoutConfig),  # on its way into a decoder
    "Decoder": (Decoder, DecoderConfig),
    "Upsampler": (Upsampler, UpsamplerConfig),
    "GLIDE": (GLIDE, GLIDEConfig),
    "RelativePrior": (RelativePrior, RelativePriorConfig),
    "CrossAttentionDecoder": (CrossAttentionDecoder, CrossAttentionDecoderConfig),
    "CrossAttentionUpsampler": (CrossAttentionUpsampler, CrossAttentionUpsamplerConfig),
    "DALLE": (DALLE, DALLEConfig),
    "BartDALLE": (BartDALLE, BartDALLEConfig),
    "DVAE": (DVAE, DVAEConfig),
    "PlainDVAE": (PlainDVAE, PlainDVAEConfig),
    "VQVAE": (VQVAE, VQVAEConfig),
    "VQGAN": (VQGAN, VQGANConfig),
    "GaussianVAE": (GaussianVAE, GaussianVAEConfig),
}
OPTIONS = {"unclip": UnCLIPOptions, "glide": GLIDEOptions, "dalle": CodeOptions}  # by kind of model


class Components(Mapping[str, Any]):
    """Components that are read from their files when they are first asked for, one without the others."""

    def __init__(self, readers: Mapping[str, Callable[[], Any]]) -> None:
        self._readers, self._read = dict(readers), {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Bundle:
    """All that a checkpoint holds; a pipeline is made from it."""

    kind: str
    components: Mapping[
        str, Any
    ]  # networks: clip, prior, decoder, upsampler_0, ...; a tokenizer if there is no CLIP
    schedules: dict[str, ScheduleConfig]  # of each component that is sampled by diffusion
    options: Any
    name: str
    licence: str


def save_component(
    module: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    schedule: ScheduleConfig | None = None,
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
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    mapped: bool = False,
) -> nn.Module:
    """The network in a folder, in eval mode; parameters in `dtype`, buffers (statistics) in float32 whatever it is.

    Built on the meta device and then given its tensors one by one, each in its dtype at once: nothing is initialised
    in vain, and at most one tensor is in memory twice. ValueError names an unknown type, a wrong config key, tensors
    that are missing, unexpected or mis-shaped, and a truncated file. mapped: parameters are views of the file, in its
    dtype (see `TensorFile`).
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    kind = config.pop("type", None)
    if kind not in NETWORKS:
        raise ValueError(
            f"{folder / CONFIG_FILE}: type is {kind!r}; expected one of {', '.join(NETWORKS)}"
        )
    network, config_type = NETWORKS[kind]
    with torch.device("meta"):
        module = network(parse(config_type, config, str(folder / CONFIG_FILE)))
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    load_strictly(
        module, TensorFile(folder / WEIGHTS_FILE, mapped), folder / WEIGHTS_FILE, as_stored=mapped
    )
    assert not any(buffer.is_meta for buffer in module.buffers()), (
        f"{kind} has a buffer that is not saved"
    )
    return module.to(device).eval()


def load_kind(
    folder: str | Path,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...],
    expected: str,
    **options: Any,
) -> nn.Module:
    """As `load_component`, with its options; ValueError unless the network is of one of `kinds`, told as `expected`."""
    module = load_component(folder, **options)
    if not isinstance(module, kinds):
        raise ValueError(f"{folder} holds a {type(module).__name__}; expected {expected}")
    return module


def is_diffused(folder: str | Path) -> bool:
    """Whether the network in a folder is sampled by diffusion, and so has a schedule."""
    network, _ = NETWORKS.get(read_json(Path(folder) / CONFIG_FILE).get("type"), (None, None))
    return network is None or not issubclass(network, DirectPrior)


def load_schedule(folder: str | Path) -> ScheduleConfig:
    """The noise schedule that the network in a folder was trained on."""
    file = Path(folder) / SCHEDULE_FILE
    return parse(ScheduleConfig, read_json(file), str(file))


def save_bundle(
    bundle: Bundle,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    borrowed: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder whole or not at all; what lies there beside the old model's components stays.

    borrowed: components that are read from a bundled model instead, such as {"clip": "emoji"}.

    ValueError rather than replacing a folder of anything else.
    """
    folder = Path(folder)
    old = read_model_json(folder)["components"] if recognise(folder) else []
    if folder.is_file() or (
        not recognise(folder) and folder.is_dir() and any(map(Path.is_dir, folder.iterdir()))
    ):
        raise ValueError(f"{folder} exists and is no model folder; give a new folder")
    with atomic_folder(folder) as part:
        for name, module in bundle.components.items():
            if type(module).__name__ in NETWORKS:
                save_component(module, part / name, dtype, bundle.schedules.get(name))
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
            **({"borrowed": dict(borrowed)} if borrowed else {}),
        }
        save_json(model, part / MODEL_FILE)
        keep_others(folder, part, {*old, MODEL_FILE, OPTIONS_FILE})


def recognise(folder: Path) -> bool:
    return (folder / MODEL_FILE).is_file()


def load_bundle(
    folder: str | Path, dtype: torch.dtype = torch.float32, *, mapped: bool = False
) -> Bundle:
    """Reads a model folder onto the CPU, networks in `dtype` (CLIP in float32). mapped: see `load_component`."""
    from unclip.clip import (
        CLIP,
    )  # late: open_clip is slow to import, and a component alone does without it

    folder = Path(folder)
    model = read_model_json(folder)
    if model["kind"] not in OPTIONS:
        raise ValueError(
            f"{folder / MODEL_FILE}: kind is {model['kind']!r}; expected one of {', '.join(OPTIONS)}"
        )
    readers = {"clip": CLIP.from_pretrained, "tokenizer": load_tokenizer}
    places = component_folders(folder)
    networks = [name for name in places if name not in readers]
    diffused = (
        [] if model["kind"] == "dalle" else [name for name in networks if is_diffused(places[name])]
    )
    readers |= dict.fromkeys(networks, partial(load_component, dtype=dtype, mapped=mapped))
    components = Components({name: partial(readers[name], place) for name, place in places.items()})
    return Bundle(
        kind=model["kind"],
        components=components,
        schedules={name: load_schedule(places[name]) for name in diffused},
        options=parse(
            OPTIONS[model["kind"]], read_json(folder / OPTIONS_FILE), str(folder / OPTIONS_FILE)
        ),
        name=model["name"],
        licence=model["licence"],
    )

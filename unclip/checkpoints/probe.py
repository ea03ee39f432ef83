"""What a file or folder of a foreign format holds, as its tensors tell; no network is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unclip.checkpoints import dalle_pytorch, glide, karlo, min_dalle, priors, taming
from unclip.checkpoints.dalle2_pytorch import load as dalle2_pytorch
from unclip.checkpoints.dalle2_pytorch.files import PREFIXES, only, read_file
from unclip.checkpoints.diffusers import layout as diffusers_layout
from unclip.checkpoints.folders import read_weights
from unclip.checkpoints.openai import dvae as openai_dvae
from unclip.checkpoints.pickles import read_checkpoint, read_state
from unclip.checkpoints.registry import CONFIG_FILE, ComponentInfo, ModelInfo, tensors_info
from unclip.files import read_json

States = dict[str, Mapping[str, Tensor]]  # the tensors of each component, as the files hold them


@dataclass(frozen=True)
class FormatProbe:
    """How one format is told, and looked into."""

    format: str  # as FORMATS, CODECS or PRIORS call it
    kind: str
    recognise: Callable[[Path], bool]
    look: Callable[[Path], States]


def foreign_summary(path: Path) -> ModelInfo:
    """What `unclip info` tells of a path that `load`, `load_codec` or `load_prior` takes; ValueError for any other."""
    for known in CONTENTS:
        if known.recognise(path):
            parts = [_component(name, state) for name, state in known.look(path).items()]
            folder = path if path.is_dir() else path.parent
            return ModelInfo(
                diffusers_layout.name(path),
                known.kind,
                diffusers_layout.licence(folder),
                parts,
                {},
                known.format,
            )
    names = ", ".join(dict.fromkeys(known.format for known in CONTENTS))
    raise ValueError(f"{path} holds no model, codec or prior of a known format ({names})")


def _component(name: str, state: Mapping[str, Tensor]) -> ComponentInfo:
    tensors = list(state.values())
    return tensors_info(
        name, [(str(x.dtype), x.shape) for x in tensors], sum(x.nbytes for x in tensors)
    )


def _karlo(folder: Path) -> States:
    files = {
        "clip": karlo.CLIP_FILE,
        "prior": karlo.PRIOR_FILE,
        "decoder": karlo.DECODER_FILE,
        "upsampler_0": karlo.UPSAMPLER_FILE,
    }
    return {
        name: read_state(karlo.only(folder, file))
        for name, file in files.items()
        if any(folder.glob(file))
    }


def _glide(path: Path) -> States:
    base = (
        path
        if path.is_file()
        else next(path / name for name in glide.PAIRS if (path / name).is_file())
    )
    upsampler = base.with_name(glide.PAIRS[base.name])
    return {"decoder": read_state(base)} | (
        {"upsampler_0": read_state(upsampler)} if upsampler.is_file() else {}
    )


def _dalle2_pytorch(folder: Path) -> States:
    """CLIP only if it lies there; a file's U-Nets are the decoder and its upsamplers."""
    states: States = {}
    if (folder / "clip").is_dir():
        states["clip"] = read_weights(folder / "clip")
    if (folder / "prior").is_dir():
        states |= _dalle2_pytorch_prior(folder)
    for part in ("decoder", "upsampler"):
        if (folder / part).is_dir():
            for name, x in read_file(only(folder / part), "decoder").state.items():
                if name.startswith("unets."):
                    unet = int(name.split(".")[1])
                    if (unet == 0) == (part == "decoder") or not (folder / "upsampler").is_dir():
                        states.setdefault(f"upsampler_{unet - 1}" if unet else "decoder", {})[
                            name
                        ] = x
    return states


def _dalle2_pytorch_prior(path: Path) -> States:
    path = path / "prior" if (path / "prior").is_dir() else path
    state = read_file(only(path) if path.is_dir() else path, "prior").state
    return {"prior": {name: x for name, x in state.items() if name.startswith(PREFIXES["prior"])}}


def _dalle_pytorch(path: Path) -> States:
    state = read_checkpoint(path / "dalle.pt" if path.is_dir() else path)["weights"]
    codec = {name: x for name, x in state.items() if name.startswith("vae.")}
    return {"codec": codec, "dalle": {name: x for name, x in state.items() if name not in codec}}


def _is_taming(path: Path) -> bool:
    """Karlo's and Kandinsky's priors are .ckpt files too."""
    return taming.recognise(path) and any(name.startswith("quantize.") for name in read_state(path))


def _taming(path: Path) -> States:
    return {
        "codec": {name: x for name, x in read_state(path).items() if not name.startswith("loss.")}
    }


def _is_component(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and "type" in read_json(path / CONFIG_FILE)


def _component_of_diffusers(path: Path) -> States:
    return {
        "prior": read_weights(
            path / "prior" if (path / diffusers_layout.INDEX_FILE).is_file() else path
        )
    }


def _original_prior(path: Path) -> States:
    return {"prior": read_state(path if path.is_file() else karlo.only(path, "prior*.ckpt"))}


_PRIORS = {known.name: known.recognise for known in priors.PRIORS}
CONTENTS = (
    FormatProbe("Karlo's own", "unclip", karlo.recognise, _karlo),
    FormatProbe("GLIDE", "glide", glide.recognise, _glide),
    FormatProbe("DALLE2-pytorch", "unclip", dalle2_pytorch.recognise, _dalle2_pytorch),
    FormatProbe("min-dalle", "dalle", min_dalle.recognise, min_dalle.states),
    FormatProbe("DALLE-pytorch", "dalle", dalle_pytorch.recognise, _dalle_pytorch),
    FormatProbe(
        "OpenAI's dVAE",
        "codec",
        openai_dvae.recognise,
        lambda path: {"codec": openai_dvae.read(path)},
    ),
    FormatProbe("taming-transformers", "codec", _is_taming, _taming),
    FormatProbe("unclip", "component", _is_component, lambda path: {path.name: read_weights(path)}),
    FormatProbe("diffusers", "prior", _PRIORS["diffusers"], _component_of_diffusers),
    FormatProbe(
        "Karlo's and Kandinsky's own",
        "prior",
        _PRIORS["Karlo's and Kandinsky's own"],
        _original_prior,
    ),
    FormatProbe("DALLE2-pytorch", "prior", _PRIORS["DALLE2-pytorch"], _dalle2_pytorch_prior),
)

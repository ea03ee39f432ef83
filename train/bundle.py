"""Assemble trained networks into a model folder for `unclip.load`.

A part may also be a bundled model's name, such as clip=emoji, which stands for its component.

python train/bundle.py --config configs/emoji/model.yaml
python train/bundle.py --config configs/emoji/model_dalle.yaml
"""

from __future__ import annotations

import argparse
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from unclip.checkpoints.folders import bundled_models, component_folders
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.registry import load_codec
from unclip.checkpoints.store import is_diffused, load_as, load_schedule, save_bundle
from unclip.clip import CLIP
from unclip.config import config, load_config
from unclip.files import exit_on_error
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.transformer import DALLE
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionUpsampler,
)
from unclip.models.published.relative_prior import RelativePrior
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.models.unclip.mlp_prior import MLPPrior
from unclip.models.unclip.prior import DiffusionPrior, DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.tokenizer import BPETokenizer
from unclip.training.initialization import find_tokenizer
from unclip.types import CodeOptions, UnCLIPOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@config
class UnCLIPParts:
    """The parts of an unCLIP model.

    Components are folders `<fit.output>/model` of a training, or names of bundled models.
    """

    name: str
    licence: str
    output: str  # the model folder; an existing model in it is replaced
    clip: str
    decoder: str
    prior: str | None = None
    layout_prior: str | None = None  # samples the decoder's layouts
    inpainter: str | None = None  # a decoder trained with the task "inpaint"
    upsamplers: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()  # adapters, which are merged into the weights
    options: UnCLIPOptions = field(default_factory=UnCLIPOptions)  # default sampling options
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"  # of the stored weights
    kind: Literal["unclip"] = "unclip"


@config
class DalleParts:
    """The parts of a DALL-E 1 model."""

    kind: Literal["dalle"]
    name: str
    licence: str
    output: str  # as in `UnCLIPParts`
    codec: str
    dalle: str  # with its tokenizer.json
    clip: str | None = None  # ranks candidates: a folder, or a bundled model to share CLIP from
    options: CodeOptions = field(default_factory=CodeOptions)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"


ROLES = {  # component: accepted classes, name in error messages
    "prior": ((DiffusionPrior, MLPPrior, DirectPrior, RelativePrior), "a prior"),
    "layout_prior": (LayoutPrior, "a layout prior"),
    "decoder": ((Decoder, CrossAttentionDecoder), "a decoder"),
    "inpainter": (Decoder, "a decoder"),
    "upsampler": ((Upsampler, CrossAttentionUpsampler), "an upsampler"),
}

SCRIPTS = {  # that train a component
    "clip": "train/clip.py",
    "prior": "train/prior.py, train/ar_prior.py or train/one_shot_prior.py",
    "layout_prior": "train/layout.py and model.kind: diffusion",
    "decoder": "train/decoder.py",
    "inpainter": "train/decoder.py and task: inpaint",
    "upsampler": "train/upsampler.py",
    "lora": "train/prior.py or train/decoder.py, and lora: {rank: 16}",
    "codec": "train/codec.py",
    "dalle": "train/dalle.py",
}

Parts = UnCLIPParts | DalleParts  # selected by `kind`


def main(parts: Parts) -> None:
    dtype = DTYPES[parts.dtype]
    shared_clip = parts.clip if isinstance(parts, DalleParts) else None
    parts = _find_bundled(parts)
    _check_folders(parts)
    if isinstance(parts, UnCLIPParts):
        pipe = assemble_unclip(parts)
        for path in parts.loras:
            pipe.load_lora(path, merge=True)
        pipe.save_pretrained(parts.output, dtype)
    else:
        shared = {"clip": shared_clip} if shared_clip in bundled_models() else {}
        save_bundle(assemble_dalle(parts, copy_clip=not shared), parts.output, dtype, shared)
    size = sum(file.stat().st_size for file in Path(parts.output).rglob("*.safetensors"))
    components = ", ".join(component_folders(Path(parts.output)))
    print(f"{parts.output}: {components}; {size / 1e6:.1f} MB of weights in {parts.dtype}")


def _find_bundled(parts: Parts) -> Parts:
    """Replace the names of bundled models by the folders of their components.

    ValueError if a model has no such component.
    """

    def find(name: str, path: str | None) -> str | None:
        if path not in (bundled := bundled_models()):
            return path
        folders = component_folders(bundled[path])
        if name not in folders:
            raise ValueError(f"{name}: {path} has no {name}; it has {', '.join(folders)}")
        return str(folders[name])

    found: dict[str, Any] = {n: find(n, getattr(parts, n)) for n in SCRIPTS if hasattr(parts, n)}
    if isinstance(parts, UnCLIPParts):
        upsamplers = enumerate(parts.upsamplers)
        found["upsamplers"] = tuple(find(f"upsampler_{i}", path) for i, path in upsamplers)
    return replace(parts, **found)


def _check_folders(parts: Parts) -> None:
    """Raise FileNotFoundError with the scripts that make missing components."""
    folders: dict[str, str | None] = {name: getattr(parts, name, None) for name in SCRIPTS}
    folders |= {f"upsampler {i}": path for i, path in enumerate(getattr(parts, "upsamplers", ()))}
    folders |= {f"lora {i}": path for i, path in enumerate(getattr(parts, "loras", ()))}
    missing = [
        f"{name} {path}: train it with {SCRIPTS[name.split()[0]]}"
        for name, path in folders.items()
        if path and not Path(path).is_dir()
    ]
    if missing:
        raise FileNotFoundError(f"missing {'; '.join(missing)}")


def assemble_unclip(parts: UnCLIPParts) -> UnCLIPPipeline:
    names = ("prior", "layout_prior", "decoder", "inpainter")
    folders = {name: getattr(parts, name) for name in names}
    folders |= {f"upsampler_{i}": folder for i, folder in enumerate(parts.upsamplers)}
    folders = {name: folder for name, folder in folders.items() if folder is not None}
    components: dict[str, Any] = {"clip": CLIP.from_pretrained(parts.clip)}
    for name, folder in folders.items():
        components[name] = load_as(folder, *ROLES[name.rstrip("_0123456789")])
    bundle = Bundle(
        kind=parts.kind,
        components=components,
        schedules={
            n: load_schedule(folder) for n, folder in folders.items() if is_diffused(folder)
        },
        options=parts.options,
        name=parts.name,
        licence=parts.licence,
    )
    return UnCLIPPipeline.from_bundle(bundle)


def assemble_dalle(parts: DalleParts, copy_clip: bool) -> Bundle:
    dalle = load_as(parts.dalle, DALLE, "a DALLE of train/dalle.py")
    codec = load_codec(parts.codec)
    if not isinstance(codec, ImageCodec):
        raise ValueError(f"{parts.codec} is a {type(codec).__name__}; expected discrete codes")
    file = find_tokenizer(Path(parts.dalle))
    components: dict[str, Any] = {
        "tokenizer": BPETokenizer.load(file, dalle.config.context_length, marked=False),
        "codec": codec,
        "dalle": dalle,
    }
    if copy_clip and parts.clip is not None:
        components["clip"] = CLIP.from_pretrained(parts.clip)
    bundle = Bundle(parts.kind, components, {}, parts.options, parts.name, parts.licence)
    DallePipeline.from_bundle(bundle)  # raises ValueError if the parts do not fit
    return bundle


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )
    args = parser.parse_args()
    with exit_on_error():
        main(load_config(args.config, Parts, args.set))

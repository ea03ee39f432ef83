"""Puts trained networks together as one model folder, which `unclip.load` opens.

python train/bundle.py --config configs/emoji/model.yaml
python train/bundle.py --config configs/emoji/model_dalle.yaml
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from unclip.checkpoints.codecs import load_codec
from unclip.checkpoints.registry import bundled_models, component_folders
from unclip.checkpoints.store import Bundle, is_diffused, load_kind, load_schedule, save_bundle
from unclip.clip import CLIP
from unclip.config import load_config
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.transformer import DALLE
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionUpsampler,
)
from unclip.models.published.relative_prior import RelativePrior
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unclip.text_prior import DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions, UnCLIPOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class UnCLIPParts:
    """Of unCLIP."""

    name: str
    licence: str
    output: str  # the model folder; an older model there is replaced whole
    clip: str  # folders of components, as training leaves them in <fit.output>/model
    decoder: str
    prior: str | None = None
    inpainter: str | None = None  # a decoder that was trained with the task "inpaint"
    upsamplers: tuple[str, ...] = ()
    options: UnCLIPOptions = field(
        default_factory=UnCLIPOptions
    )  # how the model is sampled by default
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"  # of the stored weights
    kind: Literal["unclip"] = "unclip"


@dataclass(frozen=True)
class DalleParts:
    """Of DALL-E 1."""

    kind: Literal["dalle"]
    name: str
    licence: str
    output: str
    codec: str  # folders of components
    dalle: str  # with its tokenizer.json
    clip: str | None = (
        None  # that chooses among candidates; or the name of a bundled model, which then lends its own
    )
    options: CodeOptions = field(default_factory=CodeOptions)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"


ROLES = {  # kinds of networks, and what they are called
    "prior": ((DiffusionPrior, DirectPrior, RelativePrior), "a prior"),
    "decoder": ((Decoder, CrossAttentionDecoder), "a decoder"),
    "inpainter": (Decoder, "a decoder"),
    "upsampler": ((Upsampler, CrossAttentionUpsampler), "an upsampler"),
}

Parts = UnCLIPParts | DalleParts  # told by `kind`


def main(parts: Parts) -> None:
    dtype = DTYPES[parts.dtype]
    if isinstance(parts, UnCLIPParts):
        _unclip(parts).save_pretrained(parts.output, dtype)
    else:
        borrowed = {"clip": parts.clip} if parts.clip in bundled_models() else {}
        save_bundle(_dalle(parts, copy_clip=not borrowed), parts.output, dtype, borrowed)
    size = sum(file.stat().st_size for file in Path(parts.output).rglob("*.safetensors"))
    components = ", ".join(component_folders(Path(parts.output)))
    print(f"{parts.output}: {components}; {size / 1e6:.1f} MB of weights in {parts.dtype}")


def _dalle(parts: DalleParts, copy_clip: bool) -> Bundle:
    dalle = load_kind(parts.dalle, DALLE, "a DALLE, as train/dalle.py makes it")
    codec = load_codec(parts.codec)
    if not isinstance(codec, ImageCodec):
        raise ValueError(
            f"{parts.codec} holds a {type(codec).__name__}; expected a codec that gives codes"
        )
    tokenizer = BPETokenizer.load(
        Path(parts.dalle) / "tokenizer.json", dalle.config.context_length, marked=False
    )
    components = {"tokenizer": tokenizer, "codec": codec, "dalle": dalle}
    if copy_clip and parts.clip is not None:
        components["clip"] = CLIP.from_pretrained(parts.clip)
    bundle = Bundle(parts.kind, components, {}, parts.options, parts.name, parts.licence)
    DallePipeline.from_bundle(bundle)  # which refuses parts that don't fit
    return bundle


def _unclip(parts: UnCLIPParts) -> UnCLIPPipeline:
    folders = {"prior": parts.prior, "decoder": parts.decoder, "inpainter": parts.inpainter}
    folders |= {f"upsampler_{i}": folder for i, folder in enumerate(parts.upsamplers)}
    folders = {name: folder for name, folder in folders.items() if folder is not None}
    components = {"clip": CLIP.from_pretrained(parts.clip)}
    bundle = Bundle(
        kind=parts.kind,
        components=components
        | {name: load_kind(folder, *ROLES[name.split("_")[0]]) for name, folder in folders.items()},
        schedules={
            name: load_schedule(folder) for name, folder in folders.items() if is_diffused(folder)
        },
        options=parts.options,
        name=parts.name,
        licence=parts.licence,
    )
    return UnCLIPPipeline.from_bundle(bundle)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )
    args = parser.parse_args()
    try:
        main(load_config(args.config, Parts, args.set))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

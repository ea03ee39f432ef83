"""Puts trained networks together as one model folder, which `unclip.load` opens.

    python train/bundle.py --config configs/emoji/model.yaml
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from unclip.checkpoints.store import Bundle, load_component, load_schedule, save_bundle
from unclip.clip import CLIP
from unclip.config import load_config
from unclip.types import UnCLIPOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelParts:
    name: str
    licence: str
    output: str  # the model folder; an older model there is replaced whole
    clip: str  # folders of components, as training leaves them in <fit.output>/model
    decoder: str
    prior: str | None = None
    upsamplers: tuple[str, ...] = ()
    options: UnCLIPOptions = field(default_factory=UnCLIPOptions)  # how the model is sampled by default
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"  # of the stored weights


def main(parts: ModelParts) -> None:
    folders = {"prior": parts.prior, "decoder": parts.decoder}
    folders |= {f"upsampler_{i}": folder for i, folder in enumerate(parts.upsamplers)}
    folders = {name: folder for name, folder in folders.items() if folder is not None}
    components = {"clip": CLIP.from_pretrained(parts.clip)}
    bundle = Bundle(
        kind="unclip",
        components=components | {name: load_component(folder) for name, folder in folders.items()},
        schedules={name: load_schedule(folder) for name, folder in folders.items()},
        options=parts.options,
        name=parts.name,
        licence=parts.licence,
    )
    save_bundle(bundle, parts.output, DTYPES[parts.dtype])
    size = sum(file.stat().st_size for file in Path(parts.output).rglob("*.safetensors"))
    print(f"{parts.output}: {', '.join(bundle.components)}; {size / 1e6:.1f} MB of weights in {parts.dtype}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    args = parser.parse_args()
    try:
        main(load_config(args.config, ModelParts, args.set))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

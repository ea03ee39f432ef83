"""Grow a trained decoder to twice its image size: the U-Net gets one more level at the top.

    python train/progressive_grow.py --small runs/emoji/decoder32/model --channels 64 --blocks 1 \\
        --out runs/emoji/grown

Progressive growing (1710.10196): the levels trained on small images are kept, at their scale. Train
the result with `--init`. Its schedule has twice the shift, so that a timestep hides the same shapes
as before.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch

from unclip.checkpoints.store import load_as, load_schedule, save_component
from unclip.files import check_folder, exit_on_error
from unclip.models.unclip.decoder import Decoder
from unclip.models.unet import LevelSpec


@torch.no_grad()
def progressive_grow(small: Decoder, level: LevelSpec) -> Decoder:
    """Return a decoder of twice the image size: `small` with `level` above its own levels.

    The new level and the layers at both ends are initialised at random.
    """
    config = small.config
    levels = (level, *config.unet.levels)
    unet = replace(config.unet, levels=levels, time_dim=config.unet.time_width)
    large = Decoder(replace(config, unet=unet, image_size=2 * config.image_size))
    offset = level.blocks + 1  # the level's blocks and its downsampling come first
    tensors = large.state_dict()
    for name, tensor in small.state_dict().items():
        if re.match(r"unet\.(stem|norm|head)\.", name):
            continue
        if match := re.match(r"unet\.down\.(\d+)\.", name):
            name = f"unet.down.{int(match[1]) + offset}.{name[match.end() :]}"
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"the new level has {level.channels} channels; "
                f"expected {config.unet.levels[0].channels}, as the level below it"
            )
        tensors[name].copy_(tensor)
    return large


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--small", required=True, metavar="FOLDER", help="the trained decoder")
    add("--channels", required=True, type=int, metavar="N", help="channels of the new level")
    add("--blocks", default=2, type=int, metavar="N", help="its blocks (default: %(default)s)")
    add("--out", required=True, metavar="FOLDER", help="output folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    with exit_on_error():
        check_folder(Path(args.out))
        small = load_as(args.small, Decoder, "a decoder of train/decoder.py")
        large = progressive_grow(small, LevelSpec(args.channels, args.blocks))
        schedule = load_schedule(args.small)
        save_component(large, args.out, schedule=replace(schedule, shift=2 * schedule.shift))
    print(f"{args.out}: {large.config.image_size} pixels, levels {large.config.unet.levels}")


if __name__ == "__main__":
    main()

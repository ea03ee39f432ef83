"""Puts a trained decoder inside one that draws twice as large: its U-Net gets one more level at the top.

    python train/grow.py --small runs/emoji/decoder32/model --channels 64 --blocks 1 --out runs/emoji/grown

Progressive growing (1710.10196): what was learned cheaply on small pictures stays, at its own scale. Train the result
with `--init`; its schedule has twice the shift, so that each timestep hides the same shapes as before.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace

import torch

from unclip.checkpoints.store import load_kind, load_schedule, save_component
from unclip.models.unclip.decoder import Decoder
from unclip.models.unet import LevelSpec


@torch.no_grad()
def grow(small: Decoder, level: LevelSpec) -> Decoder:
    """A decoder of twice the picture side, the same but for `level` above the others; that and both ends are new."""
    config = small.config
    unet = replace(
        config.unet, levels=(level, *config.unet.levels), time_dim=config.unet.time_width
    )
    large = Decoder(replace(config, unet=unet, image_size=2 * config.image_size))
    offset = level.blocks + 1  # the level's blocks and its downsampling come first on the way down
    tensors = large.state_dict()
    for name, tensor in small.state_dict().items():
        if re.match(r"unet\.(stem|norm|head)\.", name):
            continue
        name = re.sub(
            r"^unet\.down\.(\d+)\.", lambda match: f"unet.down.{int(match[1]) + offset}.", name
        )
        if tensors[name].shape != tensor.shape:
            own = config.unet.levels[0].channels
            raise ValueError(
                f"the new level has {level.channels} channels; expected {own}, as the one below it"
            )
        tensors[name].copy_(tensor)
    return large


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    small = load_kind(args.small, Decoder, "a decoder, as train/decoder.py makes it")
    large, schedule = grow(small, LevelSpec(args.channels, args.blocks)), load_schedule(args.small)
    save_component(large, args.out, schedule=replace(schedule, shift=2 * schedule.shift))
    print(f"{args.out}: draws {large.config.image_size} pixels, levels {large.config.unet.levels}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", required=True, metavar="FOLDER", help="the trained decoder")
    parser.add_argument("--channels", required=True, type=int, metavar="N", help="of the new level")
    parser.add_argument(
        "--blocks", default=2, type=int, metavar="N", help="of the new level (default: 2)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the grown one goes")
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

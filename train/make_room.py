"""Prepare a trained CLIP for training with a reconstruction head: see unclip/training/room.py.

python train/make_room.py --clip CLIP --data 'data/emoji/train-*.tar' --out runs/emoji/clip_room
accelerate launch train/clip.py --config configs/emoji/clip_reconstruct.yaml --init runs/emoji/clip_room
"""  # noqa: E501

from __future__ import annotations

import argparse
from itertools import islice

import torch

from unclip.clip import CLIP
from unclip.data.loader import DataConfig, open_data
from unclip.files import exit_on_error
from unclip.training.room import make_room, pool_by_attention

BATCH = 600  # the pooling is fitted to one batch


def main(clip_folder: str, data: str, out: str, images: int, keep: int) -> None:
    clip = CLIP.from_pretrained(clip_folder)
    data_config = DataConfig(data, clip.image_size, min(images, BATCH))
    loader = open_data(data_config, captions_needed=False)
    needed = max(1, images // BATCH)
    batches = [batch["image"] for batch in islice(loader, needed)]
    if len(batches) < needed:
        raise ValueError(f"{data} has fewer than {images} images per epoch; set a lower --images")
    if clip.config.model_cfg["vision_cfg"].get("timm_pool") == "avg":
        clip = pool_by_attention(clip, batches[0])
    make_room(clip, torch.cat(batches), keep)
    clip.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", required=True, metavar="FOLDER", help="a trained CLIP")
    parser.add_argument("--data", required=True, metavar="DATA", help="its training images")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the new CLIP")
    parser.add_argument(
        "--images", type=int, default=6000, metavar="N", help="images to use (default: %(default)s)"
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=128,
        metavar="K",
        help="directions of the embedding to keep (default: %(default)s)",
    )
    args = parser.parse_args()
    with exit_on_error():
        main(args.clip, args.data, args.out, args.images, args.keep)

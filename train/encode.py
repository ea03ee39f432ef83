"""Encode images once with a trained codec, for train/dalle.py. Rerun to resume.

python train/encode.py "data/emoji/train-*.tar" data/codes/train --codec runs/emoji/codec/model
"""

from __future__ import annotations

import argparse
from typing import Any

from unclip.checkpoints.store import load_as
from unclip.data.codes import encode
from unclip.data.precompute import add_arguments, run_command
from unclip.data.precomputed import CodeDataset
from unclip.data.samples import Dataset
from unclip.models.codecs.codec import ImageCodec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "codes and captions", part_size=100_000)
    parser.add_argument("--codec", required=True, metavar="FOLDER", help="a trained codec")
    options = parser.parse_args()

    def compute(dataset: Dataset, device: str, out: str, **sizes: Any) -> dict[int, str]:
        codec = load_as(options.codec, ImageCodec, "a codec of train/codec.py", device=device)
        source = {"data": options.data, "codec": options.codec}
        return encode(dataset, codec, out, source=source, **sizes)

    run_command(options, compute, CodeDataset)


if __name__ == "__main__":
    main()

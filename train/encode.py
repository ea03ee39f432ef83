"""Encodes pictures once with a trained codec, for train/dalle.py; started again, it goes on.

python train/encode.py "data/emoji/train-*.tar" data/emoji-codes/train --codec runs/emoji/codec/model
"""

from __future__ import annotations

import argparse

import torch

from unclip.checkpoints.store import load_component
from unclip.data.codes import CodeDataset, encode
from unclip.data.loader import open_dataset
from unclip.data.precomputed import PrecomputedDataset, parquet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="tar shards (a pattern in quotes), a folder of pictures, or a CSV")
    parser.add_argument("out", metavar="OUT", help="folder for codes and captions")
    parser.add_argument("--codec", required=True, metavar="FOLDER", help="a trained codec")
    parser.add_argument("--all-captions", action="store_true", help="a row for each caption, not the first only")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once (default: %(default)s)")
    parser.add_argument("--part-size", type=int, default=100_000, help="pictures in a file (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    options = parser.parse_args()
    try:
        parquet()
        dataset = open_dataset(options.data)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(f"{options.data} holds {dataset.told} already; expected pictures")
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        broken = encode(
            dataset,
            load_component(options.codec, device=device),
            options.out,
            all_captions=options.all_captions,
            batch_size=options.batch_size,
            part_size=options.part_size,
            source={"data": options.data, "codec": options.codec},
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last complete part") from None
    print(f"{options.out}: {len(CodeDataset(options.out))} rows, {len(broken)} broken pictures left out")
    for reason in broken.values():
        print(f"broken: {reason}")


if __name__ == "__main__":
    main()

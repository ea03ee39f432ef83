"""Encode images once with a trained codec, for train/dalle.py. Rerun to resume.

python train/encode.py "data/emoji/train-*.tar" data/codes/train --codec runs/emoji/codec/model
"""

from __future__ import annotations

import argparse
from typing import Any

from unclip.checkpoints.store import load_as
from unclip.data.codes import code_settings, encoder
from unclip.data.job_command import add_arguments, run_command, source_settings
from unclip.data.precompute import Compute
from unclip.data.precomputed import CODES_FILE
from unclip.models.codecs.codec import ImageCodec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "codes and captions", part_size=100_000)
    parser.add_argument("--codec", required=True, metavar="FOLDER", help="a trained codec")
    run_command(parser.parse_args(), load_encoder, CODES_FILE)


def load_encoder(options: argparse.Namespace, device: str) -> tuple[Compute, dict[str, Any]]:
    """Load --codec; return its computation and the settings of the command line."""
    codec = load_as(options.codec, ImageCodec, "a codec of train/codec.py", device=device)
    settings = code_settings(codec, options.all_captions)
    settings |= source_settings(options) | {"codec": options.codec}
    return encoder(codec, options.all_captions), settings


if __name__ == "__main__":
    main()

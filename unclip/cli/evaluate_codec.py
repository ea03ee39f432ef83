"""The command `unclip evaluate-codec`; torch is imported when it runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from unclip.checkpoints.folders import locate
from unclip.cli.common import add_command, check_writable, whole_number, write_figures

SHOWN = 12  # pictures with their reconstructions


def add_codec_command(commands: Any) -> None:
    """Declares it on the subparsers of `unclip`."""
    about = "measure what an image codec loses, and how it uses its codebook"
    parser = add_command(commands, evaluate_codec, about)
    parser.add_argument(
        "codec", metavar="CODEC", help="folder or file of a codec, or a model that has one"
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DATA", help="pictures: tars, or a folder"
    )
    parser.add_argument(
        "--size",
        type=whole_number,
        metavar="S",
        help="side of the pictures (default: that of the training)",
    )
    parser.add_argument(
        "--limit", type=whole_number, metavar="N", help="take so many of them (default: all)"
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=32,
        metavar="N",
        help="pictures at once (default: 32)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, cuda, mps (default: cpu)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        help="write pictures above their reconstructions here",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def evaluate_codec(args: Namespace) -> None:
    check_writable(args.json)
    path = locate(args.codec)  # a misspelt name is told before torch is imported

    from unclip.checkpoints.registry import load_codec
    from unclip.evaluation import codec as evaluation
    from unclip.evaluation.pairs import load_pairs
    from unclip.image_io import save_png

    codec = load_codec(path / "codec" if (path / "codec").is_dir() else path, args.device)
    images = load_pairs(args.data, args.size or codec.image_size, args.limit, not args.quiet).images
    results = evaluation.evaluate_codec(codec, images, args.batch_size)
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:{width}}  {value:.4g}")
    write_figures(results, args.json)
    if args.picture is not None:
        chosen = images[:: max(1, len(images) // SHOWN)][:SHOWN]
        save_png(evaluation.reconstructions(codec, chosen), args.picture)
        print(args.picture)

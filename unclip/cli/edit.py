"""`unclip edit`: inpainting, outpainting and image-to-image."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from unclip.cli import arguments as flags
from unclip.cli.loading import load_model
from unclip.cli.output import check_output, write_results

CANDIDATES = replace(flags.CANDIDATES, sets={"dalle": None}, former=None)
PAINTING = ("strength", "resamples", "agreement")  # options of painting by diffusion
ONLY_UNCLIP = (*PAINTING, "training_free", "extend")


def add_commands(commands: Any) -> None:
    parser = flags.add_command(
        commands,
        edit,
        "inpaint, outpaint or change an image",
        'unclip edit table.png --mask hole.png --prompt "an apple on a table" -o edited.png\n'
        '  unclip edit table.png --extend 0 0 128 0 --prompt "an apple on a table" -o wider.png\n'
        '  unclip edit sketch.png --strength 0.7 --prompt "a red apple" -o apple.png',
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    about = "description of the whole edited image (default: its own content)"
    parser.add_argument("--prompt", type=flags.prompt, metavar="TEXT", help=about)
    area = parser.add_mutually_exclusive_group()
    about = "inpaint where this image is white or transparent"
    area.add_argument("--mask", type=Path, metavar="IMAGE", help=about)
    about = "outpaint: number of pixels to add on each side"
    sides = ("LEFT", "TOP", "RIGHT", "BOTTOM")
    area.add_argument("--extend", nargs=4, type=int, metavar=sides, help=about)
    about = "how much may change, from above 0 to 1 (default: 1 with --mask, else 0.6)"
    parser.add_argument("--strength", type=flags.fraction, metavar="FRACTION", help=about)
    about = "passes over each group of steps, to harmonise the painted part (default: 4)"
    parser.add_argument("--resamples", help=about, **flags.COUNT)
    about = (
        "how strongly the kept part changes the embedding of the prompt, "
        "for decoders with a layout (default: 3; 0 = not at all)"
    )
    parser.add_argument("--agreement", type=flags.number, metavar="WEIGHT", help=about)
    about = "use the plain decoder even if the model has one that was trained to inpaint"
    parser.add_argument("--training-free", action="store_true", help=about)
    flags.add_num_images(parser)
    flags.add_seed(parser)
    flags.add_output(parser)
    sampling = (*flags.DETERMINISTIC, *flags.CODES, *flags.PRIOR, flags.LORA)
    flags.add_pipeline(parser, *sampling, flags.NEGATIVE_PROMPT, CANDIDATES)


def edit(args: Namespace) -> None:
    from unclip.image_io import open_image

    painting = {name: value for name in PAINTING if (value := getattr(args, name)) is not None}
    if args.training_free:
        painting["trained"] = False
    if args.extend is not None and args.strength is not None:
        raise ValueError("--strength cannot be given with --extend: the added area is empty")
    if args.mask is None and args.extend is None and (given := painting.keys() - {"strength"}):
        flag = "training-free" if "trained" in given else min(given)
        raise ValueError(
            f"--{flag} needs --mask or --extend: without them, no part of the image is kept"
        )
    flags.check_prior(args, args.prompt, "--prompt")
    image = open_image(args.image)
    check_output(args, args.num_images)
    pipe: Any = load_model(args, check=lambda model: _check_supported(model, args))

    from unclip.diffusion.repaint import PaintOptions

    call: dict[str, Any] = {
        "num_images": args.num_images,
        "seed": args.seed,
        "options": flags.sampling_options(pipe, args),
        "progress": not args.quiet,
    }
    texts = ("negative_prompt", "num_candidates")
    call |= {name: value for name in texts if (value := getattr(args, name)) is not None}
    if pipe.kind == "unclip" and (args.mask is not None or args.extend is not None):
        call["painting"] = PaintOptions(**painting)
    if args.mask is not None:
        result = pipe.inpaint(image, args.mask, args.prompt, **call)
    elif args.extend is not None:
        sides = dict(zip(("left", "top", "right", "bottom"), args.extend, strict=True))
        result = pipe.outpaint(image, args.prompt, **sides, **call)
    else:
        result = pipe.image_to_image(image, args.prompt, **painting, **call)
    write_results([result], len(result), [args.image.stem], args)


def _check_supported(model: Any, args: Namespace) -> None:
    """Raise a ValueError if an edit is not inpainting and the model is not an unCLIP model."""
    if model.kind == "unclip":
        return
    given = [f"--{name.replace('_', '-')}" for name in ONLY_UNCLIP if getattr(args, name)]
    if given or args.mask is None:
        problem = f"{given[0]} needs an unCLIP model" if given else "edit needs --mask"
        raise ValueError(f"{model.name} is of kind {model.kind}, which only inpaints; {problem}")

"""What the commands that begin with pictures share: their arguments, the latents of these, the names of their files."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.cli.common import (
    Drawing,
    add_model,
    add_output,
    columns_of,
    load_model,
    whole_number,
    write,
)

if TYPE_CHECKING:
    from unclip.pipelines.unclip.latent import Latent
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
    from unclip.types import GenerationResult, UnCLIPOptions

LATENT = ".safetensors"


def add_seed(
    parser: ArgumentParser, about: str = "of the first picture (default: random)", seed: Any = None
) -> None:
    """--seed, with its default."""
    parser.add_argument("--seed", type=int, default=seed, metavar="S", help=about)


def add_sampling(parser: ArgumentParser) -> None:
    """What `sampled` reads."""
    parser.add_argument(
        "--steps", type=whole_number, metavar="N", help="sampling steps of the decoder"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="guidance of the decoder; 1 = none"
    )
    parser.add_argument(
        "--upsampler-steps", type=whole_number, metavar="N", help="sampling steps of each upsampler"
    )


def add_inversion(parser: ArgumentParser, output: str | None = None) -> None:
    """What `invert` and `write_named` read; output: where the pictures may go."""
    about = "corrections of each step of the inversion, at most; 0 = plain DDIM (default: 10)"
    parser.add_argument("--iterations", type=int, metavar="N", help=about)
    add_sampling(parser)
    add_model(parser)
    add_output(parser, **({"about": output} if output else {}))


def load_unclip(args: Namespace) -> UnCLIPPipeline:
    """The model of --model; ValueError if it is of another kind."""
    pipe = load_model(args)

    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

    if not isinstance(pipe, UnCLIPPipeline):
        raise ValueError(
            f"{pipe.name} is of kind {pipe.kind}; {args.run.__name__} needs an unCLIP model"
        )
    return pipe


def stems_of(args: Namespace) -> list[str]:
    """Of each picture, the name of the file that it or its latent is in; a file may hold the latents of several.

    Before a model is loaded: ValueError if one cannot be read, or is not to be had as the command line asks.
    """
    saved, pictures = _sources(args)
    asked = [
        name
        for name in ("steps", "guidance", "upsampler_steps", "iterations")
        if vars(args)[name] is not None
    ]
    if saved and asked:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ValueError(f"{saved[0]} was inverted as it tells; {told} cannot be given with it")

    from unclip.image_io import open_image

    for path in pictures:
        open_image(path)  # and let go of it: several large ones would fill the memory
    counts = dict.fromkeys(pictures, 1)
    if saved:
        from unclip.pipelines.unclip.latent import Latent

        counts |= {path: len(Latent.load(path)) for path in saved}
    return [path.stem for path in args.sources for _ in range(counts[path])]


def invert(pipe: UnCLIPPipeline, args: Namespace) -> Latent:
    """The latents of all sources: of saved ones, those; of pictures, by inversion."""
    from unclip.diffusion.inversion import InversionOptions
    from unclip.pipelines.unclip.latent import Latent

    saved, pictures = _sources(args)
    latents = {path: Latent.load(path) for path in saved}
    for latent in latents.values():
        pipe.check_latent(latent)
    if pictures:
        options = (
            Latent.cat(list(latents.values())).options
            if saved
            else deterministic_options(pipe, args)
        )
        inversion = (
            InversionOptions() if args.iterations is None else InversionOptions(args.iterations)
        )
        inverted = pipe.invert(
            pictures, options=options, inversion=inversion, progress=not args.quiet
        )
        latents |= dict(zip(pictures, inverted, strict=True))
    return Latent.cat([latents[path] for path in args.sources])


def _sources(args: Namespace) -> tuple[list[Path], list[Path]]:
    """The saved latents and the pictures among the sources, each once."""
    paths = list(dict.fromkeys(args.sources))
    return [path for path in paths if path.suffix == LATENT], [
        path for path in paths if path.suffix != LATENT
    ]


def deterministic_options(pipe: UnCLIPPipeline, args: Namespace) -> UnCLIPOptions:
    """Those of the model that can be inverted, changed where the command line says so."""
    from unclip.pipelines.unclip.latent import deterministic

    return sampled(deterministic(pipe.options), args)


def sampled(options: UnCLIPOptions, args: Namespace) -> UnCLIPOptions:
    """Changed where the command line says so."""

    def change(stage: Any, **values: Any) -> Any:
        return replace(
            stage, **{name: value for name, value in values.items() if value is not None}
        )

    decoder = change(options.decoder, steps=args.steps, guidance=args.guidance)
    upsamplers = tuple(change(stage, steps=args.upsampler_steps) for stage in options.upsamplers)
    return replace(options, decoder=decoder, upsamplers=upsamplers)


def write_named(result: GenerationResult, args: Namespace, stems: Sequence[str]) -> None:
    """Files are named after what they were made of, and numbered where several have one name."""
    each = len(result) // len(stems)
    names = [f"{stem}-{args.run.__name__}" for stem in stems for _ in range(each)]
    numbered = [
        name if names.count(name) == 1 else f"{name}-{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]
    drawings = [Drawing(*one) for one in zip(numbered, result.images, result.metadata, strict=True)]
    write(drawings, args, columns_of(result.metadata))


def tell(path: Path, args: Namespace) -> None:
    """The name of a file that was written, unless --quiet."""
    if not args.quiet:
        print(path)

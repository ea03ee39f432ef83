"""`unclip reconstruct`, `vary`, `interpolate` and `diff`: manipulations of inverted images."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.cli import arguments as flags
from unclip.cli.generate import BATCH_SIZE, parts_of
from unclip.cli.loading import load_unclip
from unclip.cli.output import check_output, is_image, print_path, write_results
from unclip.files import check_file

if TYPE_CHECKING:
    from unclip.pipelines.unclip.latent import Latent
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

LATENT = ".safetensors"
ANIMATIONS = (".gif", ".mp4")


def add_commands(commands: Any) -> None:
    parser = flags.add_command(
        commands,
        reconstruct,
        "invert images into latents and generate the images again from them",
        "unclip reconstruct apple.png --save-latent apple.safetensors -o again.png",
    )
    _add_sources(parser)
    about = "save the latents; other commands accept the file in place of the images"
    parser.add_argument("--save-latent", type=Path, metavar="FILE", help=about)
    flags.add_output(parser)
    _add_inversion(parser)

    parser = flags.add_command(
        commands,
        vary,
        "generate variations of images; --eta sets how much they differ",
        "unclip vary apple.png --eta 0.3 -n 4 --grid -o variations.png",
    )
    _add_sources(parser)
    about = "fraction of fresh noise, from 0 (reconstruction) to 1 (default: 0.5)"
    parser.add_argument("--eta", type=flags.fraction, default=0.5, metavar="FRACTION", help=about)
    flags.add_num_images(parser, of=" per source")
    flags.add_seed(parser)
    flags.add_output(parser)
    _add_inversion(parser)

    parser = flags.add_command(
        commands,
        interpolate,
        "interpolate between images or prompts",
        "unclip interpolate apple.png lemon.png --frames 24 -o path.gif",
    )
    _add_sources(parser, "*")
    about = "interpolate between prompts instead of images"
    parser.add_argument(
        "--prompts", nargs="+", type=flags.prompt, default=[], metavar="PROMPT", help=about
    )
    about = "number of frames, both ends included (default: 9)"
    parser.add_argument("--frames", type=flags.at_least(2), default=9, metavar="N", help=about)
    about = "space the frames evenly by CLIP similarity, not by interpolation weight"
    parser.add_argument("--even", action="store_true", help=about)
    about = "noise of the frames: interpolated (default), that of the first image, or random"
    choices = ("slerp", "first", "random")
    parser.add_argument("--noise", choices=choices, default="slerp", help=about)
    about = "frames per second of a .gif or .mp4 (default: 10)"
    parser.add_argument("--fps", type=float, default=10.0, metavar="N", help=about)
    flags.add_seed(parser)
    flags.add_output(
        parser,
        "a .gif, .mp4, .png, .jpg or .webp file, or a folder (default: the current one)",
    )
    _add_inversion(parser, *flags.PRIOR)

    parser = flags.add_command(
        commands,
        diff,
        "edit images by the difference between two captions (text diff)",
        'unclip diff cat.png --from "a photo of a cat" --to "a super saiyan cat" '
        "--theta 0 0.15 0.3 --grid -o cats.png",
    )
    _add_sources(parser)
    about = "caption of the image as it is (default: empty)"
    parser.add_argument(
        "--from", dest="base", type=flags.text, default="", metavar="TEXT", help=about
    )
    about = "caption of the desired image"
    parser.add_argument(
        "--to", dest="target", type=flags.text, required=True, metavar="TEXT", help=about
    )
    about = "strength from 0 (unchanged) to 1; several values give several images (default: 0.3)"
    parser.add_argument(
        "--theta", nargs="+", type=flags.fraction, default=[0.3], metavar="FRACTION", help=about
    )
    about = (
        "fraction of fresh noise; 0, as in the paper, keeps the noise of the image, "
        "and with it parts of the image (default: 0.5)"
    )
    parser.add_argument("--eta", type=flags.fraction, default=0.5, metavar="FRACTION", help=about)
    flags.add_seed(parser)
    flags.add_output(parser)
    _add_inversion(parser)


def _add_sources(parser: ArgumentParser, nargs: str = "+") -> None:
    about = f"images, or files of saved latents ({LATENT})"
    parser.add_argument("sources", nargs=nargs, type=Path, metavar="IMAGE", help=about)


def _add_inversion(parser: ArgumentParser, *more: flags.SamplingFlag) -> None:
    about = "maximum corrections per step of the inversion; 0 = plain DDIM (default: 10)"
    parser.add_argument("--iterations", type=flags.at_least(0), metavar="N", help=about)
    flags.add_pipeline(parser, *flags.DETERMINISTIC, *more, flags.LORA)


def reconstruct(args: Namespace) -> None:
    from unclip.pipelines.request import batches_of

    names = _check_sources(args)
    check_output(args, len(names))
    if args.save_latent is not None:
        if args.save_latent.suffix != LATENT:
            raise ValueError(f"{args.save_latent}: latents are written as {LATENT}")
        check_file(args.save_latent)
    pipe = _load(args)
    latent = _invert(pipe, args)
    if args.save_latent is not None:
        latent.save(args.save_latent)
        print_path(args.save_latent, args)
    results = (
        pipe.reconstruct(latent[rows], progress=not args.quiet)
        for rows in batches_of(len(latent), BATCH_SIZE)
    )
    write_results(results, len(latent), names, args)


def vary(args: Namespace) -> None:
    names = _check_sources(args)
    check_output(args, len(names) * args.num_images)
    pipe = _load(args)
    latent = _invert(pipe, args)
    results = (
        pipe.vary(latent[rows], eta=args.eta, **part, progress=not args.quiet)
        for rows, part in parts_of(args, len(latent))
    )
    write_results(results, len(latent) * args.num_images, names, args)


def interpolate(args: Namespace) -> None:
    from unclip.image_io import check_animation, save_animation, slug
    from unclip.pipelines.request import batches_of, seeds_from
    from unclip.pipelines.unclip.latent import path_positions

    if bool(args.sources) == bool(args.prompts):
        raise ValueError("give either images or --prompts")
    if args.prompts and args.iterations is not None:
        raise ValueError("--iterations is for inversion; it cannot be given with --prompts")
    flags.check_prior(args, args.prompts, "--prompts")
    ends = args.prompts or _check_sources(args)
    if len(ends) < 2:
        raise ValueError(f"expected at least 2 images or prompts; got {len(ends)}")
    output: Path = args.output or Path()
    animated = output.suffix.lower() in ANIMATIONS
    if animated:
        if args.grid:
            raise ValueError(f"{output} is an animation; --grid cannot be given with it")
        check_animation(output, args.fps)
        check_file(output)
    else:
        args.grid = args.grid or is_image(output)
        check_output(args, args.frames, ".gif, .mp4, .png, .jpg or .webp")
    pipe = _load(args)
    seed = seeds_from(args.seed, 1)[0]
    chosen = {"noise": args.noise, "seed": seed, "progress": not args.quiet}
    if args.prompts:
        options = _deterministic_options(pipe, args)
        path = pipe.imagine(args.prompts, seed=seed, options=options, progress=not args.quiet)
    else:
        path = _invert(pipe, args)
    if animated or args.even:  # even frames are known once all of them have been sampled
        results = iter([pipe.interpolate(path, frames=args.frames, even=args.even, **chosen)])
    else:
        positions = path_positions(args.frames)
        results = (
            pipe.interpolate(path, frames=positions[rows], **chosen)
            for rows in batches_of(args.frames, BATCH_SIZE)
        )
    if animated:
        result = next(results)
        save_animation(result.images, output, args.fps, result.metadata)
        return print_path(output, args)
    name = slug("-".join(args.prompts or [source.stem for source in args.sources]))
    write_results(results, args.frames, [name], args)


def diff(args: Namespace) -> None:
    from unclip.embeddings import text_direction
    from unclip.pipelines.request import batches_of, seeds_from

    names = _check_sources(args)
    check_output(args, len(names) * len(args.theta))
    pipe = _load(args)
    # Report captions without a difference before the inversion, which takes long.
    text_direction(*pipe.encode_text([args.target, args.base]).emb)
    latent = _invert(pipe, args)
    texts, seeds = (args.base, args.target, args.theta), seeds_from(args.seed, len(latent))
    sampling = {"eta": args.eta, "progress": not args.quiet}
    results = (
        pipe.text_diff(latent[rows], *texts, seed=seeds[rows], **sampling)
        for rows in batches_of(len(latent), max(1, BATCH_SIZE // len(args.theta)))
    )
    write_results(results, len(latent) * len(args.theta), names, args)


def _load(args: Namespace) -> UnCLIPPipeline:
    """Load --model; options that cannot be inverted are reported before that, if they are known."""
    from unclip.pipelines.unclip.latent import check_invertible

    return load_unclip(args, lambda model: check_invertible(_deterministic_options(model, args)))


def _split_sources(args: Namespace) -> tuple[list[Path], list[Path]]:
    """Return the files of latents and the images among the sources, each once."""
    paths = list(dict.fromkeys(args.sources))
    latents = [path for path in paths if path.suffix == LATENT]
    return latents, [path for path in paths if path.suffix != LATENT]


def _check_sources(args: Namespace) -> list[str]:
    """Return the file name of each source image without suffix; raise if one cannot be read.

    A file of latents can have several images.
    """
    from unclip.image_io import open_image

    saved, images = _split_sources(args)
    given = [flag.name for flag in flags.given_flags(args)]
    if args.iterations is not None:
        given.append("--iterations")
    if saved and given:
        raise ValueError(
            f"{saved[0]} stores the options of its inversion; "
            f"{', '.join(given)} cannot be given with it"
        )
    counts = dict.fromkeys(images, 1)
    for path in images:
        open_image(path)  # not kept: several large images would fill the memory
    if saved:
        from unclip.pipelines.unclip.latent import Latent

        counts |= {path: len(Latent.load(path)) for path in saved}
    return [path.stem for path in args.sources for _ in range(counts[path])]


def _invert(pipe: UnCLIPPipeline, args: Namespace) -> Latent:
    """Return the latents of all sources: load those that are saved, invert the images."""
    from unclip.diffusion.inversion import InversionOptions
    from unclip.pipelines.unclip.latent import Latent

    saved, images = _split_sources(args)
    latents = {path: Latent.load(path) for path in saved}
    for latent in latents.values():
        pipe.check_latent(latent)
    if images:
        if saved:
            options = Latent.cat(list(latents.values())).options
        else:
            options = _deterministic_options(pipe, args)
        iterations = {} if args.iterations is None else {"iterations": args.iterations}
        inversion = InversionOptions(**iterations)
        inverted = pipe.invert(
            images, options=options, inversion=inversion, progress=not args.quiet
        )
        latents |= {path: inverted[i] for i, path in enumerate(images)}
    return Latent.cat([latents[path] for path in args.sources])


def _deterministic_options(model: Any, args: Namespace) -> Any:
    from unclip.pipelines.unclip.latent import deterministic

    return flags.sampling_options(model, args, deterministic(model.options))

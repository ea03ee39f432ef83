"""The commands that manipulate, edit and probe pictures; torch is imported when one of them runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.pipelines.command_line import (
    Drawing,
    add_command,
    add_model,
    add_output,
    check_output,
    columns_of,
    load_model,
    share,
    slug,
    whole_number,
    write,
)

if TYPE_CHECKING:
    from unclip.pipelines.latent import Latent
    from unclip.pipelines.unclip import UnCLIPPipeline
    from unclip.types import GenerationResult, UnCLIPOptions

ANIMATIONS = (".gif", ".mp4")
LATENT = ".safetensors"


def add_commands(commands: Any) -> None:
    """Declares them on the subparsers of `unclip`."""
    for add in (_add_reconstruct, _add_vary, _add_interpolate, _add_diff, _add_edit, _add_probe):
        add(commands)


def _add_seed(parser: ArgumentParser, about: str = "of the first picture (default: random)", seed: Any = None) -> None:
    parser.add_argument("--seed", type=int, default=seed, metavar="S", help=about)


def _add_sampling(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole_number, metavar="N", help="sampling steps of the decoder")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance of the decoder; 1 = none")
    parser.add_argument("--upsampler-steps", type=whole_number, metavar="N", help="sampling steps of each upsampler")


def _add_inversion(parser: ArgumentParser, output: str | None = None) -> None:
    about = "corrections of each step of the inversion, at most; 0 = plain DDIM (default: 10)"
    parser.add_argument("--iterations", type=int, metavar="N", help=about)
    _add_sampling(parser)
    add_model(parser)
    add_output(parser, **({"about": output} if output else {}))


def _add_reconstruct(commands: Any) -> None:
    parser = add_command(
        commands,
        reconstruct,
        "invert pictures into latents, and draw them again from these",
        "unclip reconstruct apple.png --save-latent apple.safetensors -o again.png",
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE", help="or a saved latent (.safetensors)")
    parser.add_argument(
        "--save-latent", type=Path, metavar="FILE", help="keep the latents, in place of a picture later"
    )
    _add_inversion(parser)


def reconstruct(args: Namespace) -> None:
    stems = _stems(args)
    check_output(args, len(stems))
    if args.save_latent is not None and args.save_latent.suffix != LATENT:
        raise ValueError(f"{args.save_latent}: latents are written as {LATENT}")
    pipe, latent = _invert(args)
    if args.save_latent is not None:
        latent.save(args.save_latent)
        _tell(args.save_latent, args)
    _write(pipe.reconstruct(latent, progress=not args.quiet), args, stems)


def _add_vary(commands: Any) -> None:
    parser = add_command(
        commands,
        vary,
        "draw variations of pictures, as near to them as you like",
        "unclip vary apple.png --eta 0.3 -n 4 --grid -o variations.png",
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE", help="or a saved latent (.safetensors)")
    about = "share of fresh noise, from 0 (the picture again) to 1 (default: 0.5)"
    parser.add_argument("--eta", type=share, default=0.5, metavar="SHARE", help=about)
    parser.add_argument("-n", "--num-images", type=whole_number, default=1, metavar="N", help="of each (default: 1)")
    _add_seed(parser)
    _add_inversion(parser)


def vary(args: Namespace) -> None:
    stems = _stems(args)
    check_output(args, len(stems) * args.num_images)
    pipe, latent = _invert(args)
    drawn = {"eta": args.eta, "num_images": args.num_images, "seed": args.seed, "progress": not args.quiet}
    _write(pipe.vary(latent, **drawn), args, stems)


def _add_interpolate(commands: Any) -> None:
    parser = add_command(
        commands,
        interpolate,
        "draw the way from one picture or prompt to another",
        "unclip interpolate apple.png lemon.png --frames 24 -o way.gif",
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="IMAGE", help="or saved latents (.safetensors)")
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="in place of pictures")
    parser.add_argument("--frames", type=whole_number, default=9, metavar="N", help="with both ends (default: 9)")
    about = "frames where CLIP sees equal steps between them, rather than at equal steps of the way"
    parser.add_argument("--even", action="store_true", help=about)
    about = "of the frames: on the way too (slerp, the default), the first picture's, or random from --seed"
    parser.add_argument("--noise", choices=("slerp", "first", "random"), default="slerp", help=about)
    parser.add_argument(
        "--fps", type=float, default=10.0, metavar="N", help="frames a second of a .gif or .mp4 (default: 10)"
    )
    _add_seed(parser)
    _add_inversion(parser, "a .gif, an .mp4, a .png, or a folder (default: this one)")


def interpolate(args: Namespace) -> None:
    from unclip.pictures import find_ffmpeg, save_animation

    if bool(args.sources) == bool(args.prompts):
        raise ValueError("give either pictures or --prompts, one of the two")
    animated = args.output is not None and args.output.suffix.lower() in ANIMATIONS
    if args.output is not None and args.output.suffix.lower() == ".mp4":
        find_ffmpeg()  # before anything is drawn
    if not animated:
        args.grid = args.grid or (args.output is not None and args.output.suffix.lower() == ".png")
        check_output(args, args.frames)
    chosen = {name: getattr(args, name) for name in ("frames", "even", "noise", "seed")}
    chosen["progress"] = not args.quiet
    if args.prompts:
        pipe = _load(args)
        result = pipe.interpolate(prompts=args.prompts, options=_deterministic(pipe, args), **chosen)
    else:
        pipe, latent = _invert(args)
        result = pipe.interpolate(latent, **chosen)
    if animated:
        save_animation(result.images, args.output, args.fps, result.metadata)
        return _tell(args.output, args)
    _write(result, args, [slug("-".join(args.prompts or [path.stem for path in args.sources]))])


def _add_diff(commands: Any) -> None:
    parser = add_command(
        commands,
        diff,
        "turn pictures from what one caption says towards what another says",
        'unclip diff cat.png --from "a photo of a cat" --to "a super saiyan cat" --theta 0 0.15 0.3 --grid -o cats.png',
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE", help="or a saved latent (.safetensors)")
    parser.add_argument("--from", dest="base", default="", metavar="TEXT", help="what it is now (default: nothing)")
    parser.add_argument("--to", dest="target", required=True, metavar="TEXT", help="what it is to become")
    about = "how far, from 0 (not at all) to 1; several make a strip (default: 0.3)"
    parser.add_argument("--theta", nargs="+", type=share, default=[0.3], metavar="FRACTION", help=about)
    about = "share of fresh noise; 0 (the paper) begins with the picture itself, but shreds of it stay (default: 0.5)"
    parser.add_argument("--eta", type=share, default=0.5, metavar="SHARE", help=about)
    _add_seed(parser)
    _add_inversion(parser)


def diff(args: Namespace) -> None:
    stems = _stems(args)
    check_output(args, len(stems) * len(args.theta))
    pipe, latent = _invert(args)
    drawn = {"eta": args.eta, "seed": args.seed, "progress": not args.quiet}
    _write(pipe.text_diff(latent, args.base, args.target, args.theta, **drawn), args, stems)


def _add_edit(commands: Any) -> None:
    parser = add_command(
        commands,
        edit,
        "paint into a picture, beyond its borders, or over it",
        'unclip edit table.png --mask hole.png --prompt "an apple on a table" -o edited.png\n'
        '  unclip edit table.png --extend 0 0 128 0 --prompt "an apple on a table" -o wider.png\n'
        '  unclip edit sketch.png --strength 0.7 --prompt "a red apple" -o apple.png',
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--prompt", metavar="TEXT", help="what the whole picture is to show (default: what it shows)")
    parser.add_argument("--mask", type=Path, metavar="IMAGE", help="paint where it is white, or transparent")
    about = "pixels to add on the left, above, on the right and below"
    parser.add_argument("--extend", nargs=4, type=int, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=about)
    about = "how much of what is there is given up, above 0 to 1 (default: 1 with --mask, else 0.6)"
    parser.add_argument("--strength", type=float, metavar="SHARE", help=about)
    about = "times each stretch of steps is repeated to harmonise what is painted (default: 4)"
    parser.add_argument("--resamples", type=whole_number, metavar="N", help=about)
    about = "how far what is asked for bends to what is kept, if the decoder is shown a layout (default: 3; 0: not)"
    parser.add_argument("--agreement", type=float, metavar="WEIGHT", help=about)
    about = "with the plain decoder, though the model has one that was trained to inpaint"
    parser.add_argument("--training-free", action="store_true", help=about)
    parser.add_argument("-n", "--num-images", type=whole_number, default=1, metavar="N", help="(default: 1)")
    _add_seed(parser)
    _add_sampling(parser)
    add_model(parser)
    add_output(parser)


def edit(args: Namespace) -> None:
    from unclip.pictures import open_picture

    if args.mask is not None and args.extend is not None:
        raise ValueError("--mask paints into a picture and --extend beyond it; give one of the two")
    if args.extend is not None and args.strength is not None:
        raise ValueError("beyond a picture there is nothing to be kept: --strength does not go with --extend")
    painted = args.mask is not None or args.extend is not None
    if not painted:
        for name in ("resamples", "agreement"):
            if getattr(args, name) is not None:
                raise ValueError(f"without --mask or --extend nothing is kept that --{name} could bring into harmony")
    if args.training_free and not painted:
        raise ValueError("without --mask or --extend the plain decoder draws anyway: --training-free says nothing")
    image = open_picture(args.image)
    check_output(args, args.num_images)
    pipe = _load(args)

    from unclip.diffusion.repaint import PaintOptions

    options = _sampling(pipe.options, args)
    drawn = {"num_images": args.num_images, "seed": args.seed, "options": options, "progress": not args.quiet}
    if painted:
        trained = False if args.training_free else None
        said = {name: getattr(args, name) for name in ("strength", "resamples", "agreement")} | {"trained": trained}
        drawn["painting"] = PaintOptions(**{name: value for name, value in said.items() if value is not None})
    if args.mask is not None:
        result = pipe.inpaint(image, args.mask, args.prompt, **drawn)
    elif args.extend is not None:
        sides = dict(zip(("left", "top", "right", "bottom"), args.extend, strict=True))
        result = pipe.outpaint(image, args.prompt, **sides, **drawn)
    else:
        strength = {} if args.strength is None else {"strength": args.strength}
        result = pipe.image_to_image(image, args.prompt, **strength, **drawn)
    _write(result, args, [args.image.stem])


def _add_probe(commands: Any) -> None:
    parser = add_command(
        commands,
        probe,
        "see what CLIP sees: principal components of pictures, or a word written on one",
        "unclip probe apple.png cat.png --data data/emoji/train-*.tar --save-pca pca.safetensors -o components.png\n"
        '  unclip probe apple.png --word pizza --classes "an apple" "a pizza" -o attack.png',
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--data", nargs="+", metavar="DATA", help="pictures or embeddings that the PCA is fitted on")
    parser.add_argument("--pca", type=Path, metavar="FILE", help="a PCA that was saved, in place of --data")
    parser.add_argument("--save-pca", type=Path, metavar="FILE", help="keep the PCA for the next time")
    about = "how many to draw from (default: those of the paper)"
    parser.add_argument("--components", nargs="+", type=whole_number, metavar="N", help=about)
    parser.add_argument("--word", metavar="TEXT", help="to be written on the picture")
    parser.add_argument("--classes", nargs="+", metavar="CAPTION", help="that the picture may be taken for")
    parser.add_argument("-n", "--num-images", type=whole_number, default=3, metavar="N", help="variations (default: 3)")
    _add_seed(parser, "fixed, so that only the embedding differs (default: 0)", 0)
    _add_sampling(parser)
    add_model(parser)
    about = "a .png file (default: components.png or attack.png)"
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=about)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no file names")


def probe(args: Namespace) -> None:
    from unclip.pictures import open_picture, save_png

    if (args.word is None) != (args.classes is None):
        raise ValueError("--word and --classes go together: a word, and what the picture may then be taken for")
    if args.word is None and (args.data is None) == (args.pca is None):
        raise ValueError("give either --data to fit a PCA on, or --pca, a saved one; or --word and --classes")
    if args.word is not None and len(args.sources) > 1:
        raise ValueError(f"a word is written on one picture; got {len(args.sources)}")
    args.output = args.output or Path("components.png" if args.word is None else "attack.png")
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"{args.output}: figures are written as .png")
    images = [open_picture(path) for path in args.sources]
    pipe = _load(args)

    from unclip.pipelines import probing

    drawn = {"seed": args.seed, "options": _sampling(pipe.options, args), "progress": not args.quiet}
    if args.word is not None:
        attack = probing.typographic_attack(
            pipe, images[0], args.word, args.classes, num_images=args.num_images, **drawn
        )
        figure, metadata, _ = attack
    else:
        pca = _pca(pipe, args)
        components = args.components or probing.shown_components(pca)
        results = probing.draw_components(pipe, images, pca, components, **drawn)
        figure = probing.components_figure(images, components, results)
        metadata = [result.metadata[i] for i in range(len(images)) for result in results]
    save_png(figure, args.output, metadata)
    _tell(args.output, args)


def _pca(pipe: UnCLIPPipeline, args: Namespace) -> Any:
    from unclip.latents import PCA
    from unclip.pipelines.probing import read_embeddings

    if args.pca is not None:
        pca = PCA.load(args.pca)
        if len(pca.mean) != pipe.clip.emb_dim:
            raise ValueError(f"{args.pca} is of embeddings of width {len(pca.mean)}; CLIP's are {pipe.clip.emb_dim}")
    else:
        pca = PCA.fit(read_embeddings(pipe, args.data, progress=not args.quiet))
    if args.save_pca is not None:
        pca.save(args.save_pca)
        _tell(args.save_pca, args)
    return pca


def _load(args: Namespace) -> UnCLIPPipeline:
    pipe = load_model(args)

    from unclip.pipelines.unclip import UnCLIPPipeline

    if not isinstance(pipe, UnCLIPPipeline):
        raise ValueError(f"{pipe.name} is of kind {pipe.kind}; {args.run.__name__} needs an unCLIP model")
    return pipe


def _invert(args: Namespace) -> tuple[UnCLIPPipeline, Latent]:
    """The model, and the latents of all sources: of saved ones, those; of pictures, by inversion."""
    saved = [path for path in args.sources if path.suffix == LATENT]
    asked = [name for name in ("steps", "guidance", "upsampler_steps", "iterations") if vars(args)[name] is not None]
    if saved and asked:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ValueError(f"{saved[0]} was inverted as it tells; {told} cannot be given with it")

    from unclip.pictures import open_picture

    pictures = {path: open_picture(path) for path in args.sources if path not in saved}
    pipe = _load(args)

    from unclip.diffusion.inversion import InversionOptions
    from unclip.pipelines.latent import Latent

    latents = {path: Latent.load(path) for path in saved}
    if pictures:
        options = latents[saved[0]].options if saved else _deterministic(pipe, args)
        inversion = InversionOptions() if args.iterations is None else InversionOptions(args.iterations)
        chosen = {"options": options, "inversion": inversion, "progress": not args.quiet}
        inverted = pipe.invert(list(pictures.values()), **chosen)
        latents |= {path: inverted[[i]] for i, path in enumerate(pictures)}
    return pipe, Latent.cat([latents[path] for path in args.sources])


def _stems(args: Namespace) -> list[str]:
    """Of each picture, the name of the file that it or its latent is in; a file may hold the latents of several."""
    return [path.stem for path in args.sources for _ in range(_count(path))]


def _count(path: Path) -> int:
    if path.suffix != LATENT:
        return 1

    from unclip.pipelines.latent import Latent

    return len(Latent.load(path))


def _deterministic(pipe: UnCLIPPipeline, args: Namespace) -> UnCLIPOptions:
    from unclip.pipelines.latent import deterministic

    return _sampling(deterministic(pipe.options), args)


def _sampling(options: UnCLIPOptions, args: Namespace) -> UnCLIPOptions:
    """Changed where the command line says so."""

    def change(stage: Any, **values: Any) -> Any:
        return replace(stage, **{name: value for name, value in values.items() if value is not None})

    decoder = change(options.decoder, steps=args.steps, guidance=args.guidance)
    upsamplers = tuple(change(stage, steps=args.upsampler_steps) for stage in options.upsamplers)
    return replace(options, decoder=decoder, upsamplers=upsamplers)


def _write(result: GenerationResult, args: Namespace, stems: Sequence[str]) -> None:
    """Files are named after what they were made of, and numbered where several have one name."""
    each = len(result) // len(stems)
    names = [f"{stem}-{args.run.__name__}" for stem in stems for _ in range(each)]
    numbered = [name if names.count(name) == 1 else f"{name}-{names[:i].count(name)}" for i, name in enumerate(names)]
    drawings = [Drawing(*one) for one in zip(numbered, result.images, result.metadata, strict=True)]
    write(drawings, args, columns_of(result.metadata))


def _tell(path: Path, args: Namespace) -> None:
    if not args.quiet:
        print(path)

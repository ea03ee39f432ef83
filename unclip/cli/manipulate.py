"""The commands that manipulate, edit and probe pictures; torch is imported when one of them runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.cli.common import (
    add_command,
    add_model,
    add_output,
    check_file,
    check_output,
    share,
    slug,
    whole_number,
)
from unclip.cli.sources import (
    LATENT,
    add_inversion,
    add_sampling,
    add_seed,
    deterministic_options,
    invert,
    load_unclip,
    sampled,
    stems_of,
    tell,
    write_named,
)

if TYPE_CHECKING:
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

ANIMATIONS = (".gif", ".mp4")


def add_commands(commands: Any) -> None:
    """Declares them on the subparsers of `unclip`."""
    for add in (_add_reconstruct, _add_vary, _add_interpolate, _add_diff, _add_edit, _add_probe):
        add(commands)


def _add_reconstruct(commands: Any) -> None:
    parser = add_command(
        commands,
        reconstruct,
        "invert pictures into latents, and draw them again from these",
        "unclip reconstruct apple.png --save-latent apple.safetensors -o again.png",
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="IMAGE", help="or a saved latent (.safetensors)"
    )
    parser.add_argument(
        "--save-latent",
        type=Path,
        metavar="FILE",
        help="keep the latents, in place of a picture later",
    )
    add_inversion(parser)


def reconstruct(args: Namespace) -> None:
    stems = stems_of(args)
    check_output(args, len(stems))
    if args.save_latent is not None:
        if args.save_latent.suffix != LATENT:
            raise ValueError(f"{args.save_latent}: latents are written as {LATENT}")
        check_file(args.save_latent)
    pipe = load_unclip(args)
    latent = invert(pipe, args)
    if args.save_latent is not None:
        latent.save(args.save_latent)
        tell(args.save_latent, args)
    write_named(pipe.reconstruct(latent, progress=not args.quiet), args, stems)


def _add_vary(commands: Any) -> None:
    parser = add_command(
        commands,
        vary,
        "draw variations of pictures, as near to them as you like",
        "unclip vary apple.png --eta 0.3 -n 4 --grid -o variations.png",
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="IMAGE", help="or a saved latent (.safetensors)"
    )
    about = "share of fresh noise, from 0 (the picture again) to 1 (default: 0.5)"
    parser.add_argument("--eta", type=share, default=0.5, metavar="SHARE", help=about)
    parser.add_argument(
        "-n", "--num-images", type=whole_number, default=1, metavar="N", help="of each (default: 1)"
    )
    add_seed(parser)
    add_inversion(parser)


def vary(args: Namespace) -> None:
    stems = stems_of(args)
    number = len(stems) * args.num_images
    check_output(args, number)
    pipe = load_unclip(args)
    args.seed = _first_seed(args, number)
    latent = invert(pipe, args)
    drawn = {
        "eta": args.eta,
        "num_images": args.num_images,
        "seed": args.seed,
        "progress": not args.quiet,
    }
    write_named(pipe.vary(latent, **drawn), args, stems)


def _first_seed(args: Namespace, number: int) -> int:
    """Of so many pictures: --seed, or else a random one; it is checked before anything is inverted."""
    from unclip.pipelines.base import seeds_from

    return seeds_from(args.seed, number)[0]


def _add_interpolate(commands: Any) -> None:
    parser = add_command(
        commands,
        interpolate,
        "draw the way from one picture or prompt to another",
        "unclip interpolate apple.png lemon.png --frames 24 -o way.gif",
    )
    parser.add_argument(
        "sources", nargs="*", type=Path, metavar="IMAGE", help="or saved latents (.safetensors)"
    )
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="in place of pictures")
    parser.add_argument(
        "--frames", type=whole_number, default=9, metavar="N", help="with both ends (default: 9)"
    )
    about = "frames where CLIP sees equal steps between them, rather than at equal steps of the way"
    parser.add_argument("--even", action="store_true", help=about)
    about = "of the frames: on the way too (slerp, the default), the first picture's, or random from --seed"
    parser.add_argument(
        "--noise", choices=("slerp", "first", "random"), default="slerp", help=about
    )
    parser.add_argument(
        "--fps",
        type=float,
        default=10.0,
        metavar="N",
        help="frames a second of a .gif or .mp4 (default: 10)",
    )
    add_seed(parser)
    add_inversion(parser, "a .gif, an .mp4, a .png, or a folder (default: this one)")


def interpolate(args: Namespace) -> None:
    from unclip.image_io import check_animation, save_animation

    if bool(args.sources) == bool(args.prompts):
        raise ValueError("give either pictures or --prompts, one of the two")
    if args.prompts and args.iterations is not None:
        raise ValueError("--prompts are not inverted: --iterations does not go with them")
    stems = stems_of(args)
    animated = args.output is not None and args.output.suffix.lower() in ANIMATIONS
    if animated:
        if args.grid:
            raise ValueError(
                f"{args.output} is an animation: --grid, one sheet with all pictures, does not go with it"
            )
        check_animation(args.output, args.fps)
        check_file(args.output)
    else:
        args.grid = args.grid or (args.output is not None and args.output.suffix.lower() == ".png")
        check_output(args, args.frames)

    from unclip.pipelines.unclip.latent import check_path, places_on_path

    check_path(len(args.prompts or stems))
    places_on_path(args.frames)
    pipe = load_unclip(args)
    args.seed = _first_seed(args, len(args.prompts or stems))
    chosen = {name: getattr(args, name) for name in ("frames", "even", "noise", "seed")}
    chosen["progress"] = not args.quiet
    if args.prompts:
        result = pipe.interpolate(
            prompts=args.prompts, options=deterministic_options(pipe, args), **chosen
        )
    else:
        result = pipe.interpolate(invert(pipe, args), **chosen)
    if animated:
        save_animation(result.images, args.output, args.fps, result.metadata)
        return tell(args.output, args)
    write_named(
        result, args, [slug("-".join(args.prompts or [path.stem for path in args.sources]))]
    )


def _add_diff(commands: Any) -> None:
    parser = add_command(
        commands,
        diff,
        "turn pictures from what one caption says towards what another says",
        'unclip diff cat.png --from "a photo of a cat" --to "a super saiyan cat" --theta 0 0.15 0.3 --grid -o cats.png',
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="IMAGE", help="or a saved latent (.safetensors)"
    )
    parser.add_argument(
        "--from", dest="base", default="", metavar="TEXT", help="what it is now (default: nothing)"
    )
    parser.add_argument(
        "--to", dest="target", required=True, metavar="TEXT", help="what it is to become"
    )
    about = "how far, from 0 (not at all) to 1; several make a strip (default: 0.3)"
    parser.add_argument(
        "--theta", nargs="+", type=share, default=[0.3], metavar="FRACTION", help=about
    )
    about = "share of fresh noise; 0 (the paper) begins with the picture itself, but shreds of it stay (default: 0.5)"
    parser.add_argument("--eta", type=share, default=0.5, metavar="SHARE", help=about)
    add_seed(parser)
    add_inversion(parser)


def diff(args: Namespace) -> None:
    stems = stems_of(args)
    check_output(args, len(stems) * len(args.theta))
    pipe = load_unclip(args)
    args.seed = _first_seed(args, len(stems))

    from unclip.embeddings import text_direction

    text_direction(
        *pipe.encode_text([args.target, args.base]).emb
    )  # if there is none, that is told before inversion
    latent = invert(pipe, args)
    drawn = {"eta": args.eta, "seed": args.seed, "progress": not args.quiet}
    write_named(pipe.text_diff(latent, args.base, args.target, args.theta, **drawn), args, stems)


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
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what the whole picture is to show (default: what it shows)",
    )
    parser.add_argument(
        "--mask", type=Path, metavar="IMAGE", help="paint where it is white, or transparent"
    )
    about = "pixels to add on the left, above, on the right and below"
    parser.add_argument(
        "--extend", nargs=4, type=int, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=about
    )
    about = "how much of what is there is given up, above 0 to 1 (default: 1 with --mask, else 0.6)"
    parser.add_argument("--strength", type=float, metavar="SHARE", help=about)
    about = "times each stretch of steps is repeated to harmonise what is painted (default: 4)"
    parser.add_argument("--resamples", type=whole_number, metavar="N", help=about)
    about = "how far what is asked for bends to what is kept, if the decoder is shown a layout (default: 3; 0: not)"
    parser.add_argument("--agreement", type=float, metavar="WEIGHT", help=about)
    about = "with the plain decoder, though the model has one that was trained to inpaint"
    parser.add_argument("--training-free", action="store_true", help=about)
    parser.add_argument(
        "-n", "--num-images", type=whole_number, default=1, metavar="N", help="(default: 1)"
    )
    add_seed(parser)
    add_sampling(parser)
    add_model(parser)
    add_output(parser)


def edit(args: Namespace) -> None:
    from unclip.image_io import open_image

    if args.mask is not None and args.extend is not None:
        raise ValueError("--mask paints into a picture and --extend beyond it; give one of the two")
    if args.extend is not None and args.strength is not None:
        raise ValueError(
            "beyond a picture there is nothing to be kept: --strength does not go with --extend"
        )
    painted = args.mask is not None or args.extend is not None
    if not painted:
        for name in ("resamples", "agreement"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"without --mask or --extend nothing is kept that --{name} could bring into harmony"
                )
    if args.training_free and not painted:
        raise ValueError(
            "without --mask or --extend the plain decoder draws anyway: --training-free says nothing"
        )
    image = open_image(args.image)
    check_output(args, args.num_images)
    pipe = load_unclip(args)

    from unclip.diffusion.repaint import PaintOptions

    options = sampled(pipe.options, args)
    drawn = {
        "num_images": args.num_images,
        "seed": args.seed,
        "options": options,
        "progress": not args.quiet,
    }
    if painted:
        trained = False if args.training_free else None
        said = {name: getattr(args, name) for name in ("strength", "resamples", "agreement")} | {
            "trained": trained
        }
        drawn["painting"] = PaintOptions(
            **{name: value for name, value in said.items() if value is not None}
        )
    if args.mask is not None:
        result = pipe.inpaint(image, args.mask, args.prompt, **drawn)
    elif args.extend is not None:
        sides = dict(zip(("left", "top", "right", "bottom"), args.extend, strict=True))
        result = pipe.outpaint(image, args.prompt, **sides, **drawn)
    else:
        strength = {} if args.strength is None else {"strength": args.strength}
        result = pipe.image_to_image(image, args.prompt, **strength, **drawn)
    write_named(result, args, [args.image.stem])


def _add_probe(commands: Any) -> None:
    parser = add_command(
        commands,
        probe,
        "see what CLIP sees: principal components of pictures, or a word written on one",
        "unclip probe apple.png cat.png --data data/emoji/train-*.tar --save-pca pca.safetensors -o components.png\n"
        '  unclip probe apple.png --word pizza --classes "an apple" "a pizza" -o attack.png',
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--data", nargs="+", metavar="DATA", help="pictures or embeddings that the PCA is fitted on"
    )
    parser.add_argument(
        "--pca", type=Path, metavar="FILE", help="a PCA that was saved, in place of --data"
    )
    parser.add_argument(
        "--save-pca", type=Path, metavar="FILE", help="keep the PCA for the next time"
    )
    about = "how many to draw from (default: those of the paper)"
    parser.add_argument("--components", nargs="+", type=whole_number, metavar="N", help=about)
    parser.add_argument("--word", metavar="TEXT", help="to be written on the picture")
    parser.add_argument(
        "--classes", nargs="+", metavar="CAPTION", help="that the picture may be taken for"
    )
    parser.add_argument(
        "-n",
        "--num-images",
        type=whole_number,
        default=3,
        metavar="N",
        help="variations (default: 3)",
    )
    add_seed(parser, "fixed, so that only the embedding differs (default: 0)", 0)
    add_sampling(parser)
    add_model(parser)
    about = "a .png file (default: components.png or attack.png)"
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=about)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no file names")


def probe(args: Namespace) -> None:
    from unclip.image_io import open_image, save_png

    if (args.word is None) != (args.classes is None):
        raise ValueError(
            "--word and --classes go together: a word, and what the picture may then be taken for"
        )
    for name in ("components", "data", "pca", "save_pca"):
        if args.word is not None and getattr(args, name) is not None:
            raise ValueError(
                f"a word is written on a picture without a PCA: --{name.replace('_', '-')} says nothing"
            )
    if args.word is None and (args.data is None) == (args.pca is None):
        raise ValueError(
            "give either --data to fit a PCA on, or --pca, a saved one; or --word and --classes"
        )
    if args.word is not None and len(args.sources) > 1:
        raise ValueError(f"a word is written on one picture; got {len(args.sources)}")
    args.output = args.output or Path("components.png" if args.word is None else "attack.png")
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"{args.output}: figures are written as .png")
    for path in (args.output, args.save_pca):
        if path is not None:
            check_file(path)
    images = [open_image(path) for path in args.sources]
    pipe = load_unclip(args)

    from unclip.pipelines.unclip import probing

    drawn = {"seed": args.seed, "options": sampled(pipe.options, args), "progress": not args.quiet}
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
    tell(args.output, args)


def _pca(pipe: UnCLIPPipeline, args: Namespace) -> Any:
    from unclip.embeddings import PCA
    from unclip.pipelines.unclip.probing import read_embeddings

    if args.pca is not None:
        pca = PCA.load(args.pca)
        if len(pca.mean) != pipe.clip.emb_dim:
            raise ValueError(
                f"{args.pca} is of embeddings of width {len(pca.mean)}; CLIP's are {pipe.clip.emb_dim}"
            )
    else:
        pca = PCA.fit(read_embeddings(pipe, args.data, progress=not args.quiet))
    if args.save_pca is not None:
        pca.save(args.save_pca)
        tell(args.save_pca, args)
    return pca

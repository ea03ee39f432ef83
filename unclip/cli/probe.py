"""`unclip probe`: probes of CLIP (principal components, typographic attacks)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.cli import arguments as flags
from unclip.cli.loading import load_unclip
from unclip.cli.output import print_path
from unclip.files import check_file

if TYPE_CHECKING:
    from unclip.embeddings import PCA
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline


def add_commands(commands: Any) -> None:
    parser = flags.add_command(
        commands,
        probe,
        "show what CLIP sees: principal components of images, or a word written on one",
        "unclip probe apple.png cat.png --data data/emoji/train-*.tar "
        "--save-pca pca.safetensors -o components.png\n"
        '  unclip probe apple.png --word pizza --classes "an apple" "a pizza" -o attack.png',
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE")
    source = parser.add_mutually_exclusive_group()
    about = "fit the PCA on the images or embeddings of this data: tars, or a folder"
    source.add_argument("--data", nargs="+", metavar="DATA", help=about)
    source.add_argument("--pca", type=Path, metavar="FILE", help="use a saved PCA")
    parser.add_argument("--save-pca", type=Path, metavar="FILE", help="save the PCA")
    about = "numbers of components to decode (default: as in the paper)"
    parser.add_argument("--components", nargs="+", help=about, **flags.COUNT)
    parser.add_argument(
        "--word", type=flags.text, metavar="TEXT", help="write this word on the image"
    )
    about = "captions to classify the image by, with and without the word"
    parser.add_argument("--classes", nargs="+", type=flags.text, metavar="CAPTION", help=about)
    flags.add_num_images(parser, 3, " per embedding, with --word")
    flags.add_seed(parser, 0)  # fixed, so that only the embeddings differ
    about = "a .png file (default: components.png or attack.png)"
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=about)
    flags.add_quiet(parser)
    flags.add_pipeline(parser, *flags.DETERMINISTIC, flags.LORA)


def probe(args: Namespace) -> None:
    from unclip.image_io import open_image, save_png

    _check(args)
    images = [open_image(path) for path in args.sources]
    pipe = load_unclip(args)

    from unclip.pipelines.unclip import probing

    sampling = {
        "seed": args.seed,
        "options": flags.sampling_options(pipe, args),
        "progress": not args.quiet,
    }
    if args.word is not None:
        figure, metadata, _ = probing.typographic_attack(
            pipe, images[0], args.word, args.classes, num_images=args.num_images, **sampling
        )
    else:
        pca = _load_pca(pipe, args)
        components = args.components or probing.shown_components(pca)
        results = probing.draw_components(pipe, images, pca, components, **sampling)
        figure = probing.components_figure(images, components, results)
        metadata = [result.metadata[i] for i in range(len(images)) for result in results]
    save_png(figure, args.output, metadata)
    print_path(args.output, args)


def _check(args: Namespace) -> None:
    """Set the default of --output; raise a ValueError for arguments that cannot be combined."""
    if (args.word is None) != (args.classes is None):
        raise ValueError("--word and --classes must be given together")
    if args.word is None and args.data is None and args.pca is None:
        raise ValueError("give --data to fit a PCA on, --pca FILE, or --word and --classes")
    for name in ("components", "data", "pca", "save_pca"):
        if args.word is not None and getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is for principal components; it cannot be given with --word"
            )
    if args.word is not None and len(args.sources) > 1:
        raise ValueError(f"--word expects one image; got {len(args.sources)}")
    args.output = args.output or Path("components.png" if args.word is None else "attack.png")
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"{args.output}: figures are written as .png")
    for path in (args.output, args.save_pca):
        if path is not None:
            check_file(path)


def _load_pca(pipe: UnCLIPPipeline, args: Namespace) -> PCA:
    from unclip.embeddings import PCA
    from unclip.pipelines.unclip.probing import read_embeddings

    if args.pca is None:
        pca = PCA.fit(read_embeddings(pipe, args.data, progress=not args.quiet))
    else:
        pca, width = PCA.load(args.pca), pipe.decoder.config.emb_dim
        if len(pca.mean) != width:
            raise ValueError(
                f"{args.pca} is for embeddings of width {len(pca.mean)}; "
                f"{pipe.name} has embeddings of width {width}"
            )
    if args.save_pca is not None:
        pca.save(args.save_pca)
        print_path(args.save_pca, args)
    return pca

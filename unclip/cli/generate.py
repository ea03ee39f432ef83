"""`unclip generate`, `variations` and `complete`: images from prompts or from an image."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.folders import bundled_models
from unclip.cli import arguments as flags
from unclip.cli.benchmarks import (
    IMAGES_PER_PROMPT,
    BenchmarkPrompt,
    DPGPrompt,
    check_resumed,
    dpg_bench,
    geneval,
)
from unclip.cli.loading import load_dalle, load_model
from unclip.cli.output import check_output, print_path, write_as_they_come, write_images

if TYPE_CHECKING:
    from PIL import Image

    from unclip.cli.loading import AnyPipeline
    from unclip.types import GenerationResult

BATCH_SIZE = 16
COMPLETION_MODEL = "emoji-dalle1"


def add_commands(commands: Any) -> None:
    parser = flags.add_command(commands, generate, "generate images from prompts")
    parser.add_argument("prompts", nargs="*", type=flags.prompt, metavar="PROMPT")
    about = "more prompts, one per line; - reads standard input"
    parser.add_argument(
        "--prompts-file", type=flags.prompts_file, default=[], metavar="FILE", help=about
    )
    about = f"generate {IMAGES_PER_PROMPT} images (-n) of each prompt of "
    resumes = "into its layout of --output; the same command resumes"
    for name, parse, metavar, source in (
        ("--geneval", geneval, "FILE", "GenEval's metadata (.jsonl)"),
        ("--dpg-bench", dpg_bench, "FOLDER", "DPG-Bench (NAME.txt)"),
    ):
        parser.add_argument(
            name, dest="benchmark", type=parse, metavar=metavar, help=f"{about}{source} {resumes}"
        )
    about = "generate an image again, from the metadata in its file"
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help=about)
    about = "with --from: load the models that the file names even if they are not bundled"
    parser.add_argument("--trust-model", action="store_true", help=about)
    _add_images(parser)
    sampling = (*flags.SAMPLING, *flags.FROM_TEXT, flags.LORA, flags.CANDIDATES)
    flags.add_pipeline(parser, *sampling)
    # With --from, the default is the model in the metadata; benchmarks have several images.
    parser.set_defaults(model=None, num_images=None)

    parser = flags.add_command(
        commands, variations, "generate variations of images from their embeddings"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    _add_images(parser)
    flags.add_pipeline(parser, *flags.SAMPLING, flags.LORA, *flags.FROM_IMAGE)
    _add_fit(parser)

    parser = flags.add_command(commands, complete, "complete an image from its upper part (DALL-E)")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    about = "caption of the completed image (default: none)"
    parser.add_argument("caption", nargs="?", type=flags.prompt, metavar="PROMPT", help=about)
    _add_images(parser)
    about = "fraction of the image to keep, from the top, in [0, 1) (default: 0.4375)"
    parser.add_argument("--keep", help=about, **flags.NUMBER)
    sampling = (*flags.SAMPLING, flags.NEGATIVE_PROMPT, flags.CANDIDATES)
    flags.add_pipeline(parser, *sampling, model=COMPLETION_MODEL)
    _add_fit(parser)


def _add_images(parser: ArgumentParser) -> None:
    flags.add_num_images(parser, of=" per prompt or image")
    flags.add_seed(parser)
    flags.add_output(parser)


def _add_fit(parser: ArgumentParser) -> None:
    about = "DALL-E: crop the image to a square and resize it to the model's size"
    parser.add_argument("--fit", action="store_true", help=about)


def generate(args: Namespace) -> None:
    images = 1 if args.benchmark is None else IMAGES_PER_PROMPT
    args.num_images = args.num_images or images
    if args.benchmark is not None:
        return _generate_benchmark(args.benchmark, args)
    if args.source is not None:
        return _regenerate(args)
    prompts: list[Any] = [*args.prompts, *args.prompts_file]
    if not prompts:
        raise ValueError("no prompt is given; give prompts, --prompts-file FILE or --from PNG")
    if args.mix is not None:
        prompts = [_mixture(prompts, args.mix)]
    check_output(args, len(prompts) * args.num_images)
    args.model = args.model or flags.DEFAULT_MODEL
    pipe = _load_generator(prompts, args)
    given = _given(negative_prompt=args.negative_prompt, num_candidates=args.num_candidates)
    given |= {"options": flags.sampling_options(pipe, args), "progress": not args.quiet}
    parts = parts_of(args, len(prompts), args.num_candidates)
    results = (pipe(prompts[rows], **part, **given, batch_size=BATCH_SIZE) for rows, part in parts)
    _write_all(results, args)


def _generate_benchmark(prompts: Sequence[BenchmarkPrompt], args: Namespace) -> None:
    """Write the images of all prompts that are not complete; prompt p has the seeds of `parts_of`.

    An earlier command must have had the same settings, which are compared with its first image.
    """
    from tqdm import tqdm

    from unclip.pipelines.request import batches_of, seeds_from

    n, output, candidates = args.num_images, args.output, args.num_candidates
    if args.prompts or args.prompts_file or args.source or args.mix or args.grid:
        raise ValueError("--geneval and --dpg-bench take no other prompts, --from, --mix or --grid")
    if output is None:
        raise ValueError("--geneval and --dpg-bench need a folder; give --output FOLDER")
    single_file = isinstance(prompts[0], DPGPrompt)
    if single_file and n > IMAGES_PER_PROMPT:
        raise ValueError(f"-n is {n}; expected at most {IMAGES_PER_PROMPT} images in DPG-Bench")
    check_output(args, max(2, len(prompts) * n), "files in a folder")
    args.model = args.model or flags.DEFAULT_MODEL
    complete = [prompt.is_complete(output, n) for prompt in prompts]
    pipe = _load_generator([one.prompt for one in prompts], args)
    options = flags.sampling_options(pipe, args)
    per_prompt = candidates or n
    seeds = seeds_from(args.seed, len(prompts) * per_prompt)
    if any(complete):
        k = complete.index(True)
        settings: dict[str, Any] = {"prompt": prompts[k].prompt, "model": pipe.source}
        settings["negative_prompt"] = args.negative_prompt
        if candidates is None:  # which change the seed of the first image, and the options
            settings["options"] = pipe.describe(options)["options"]
            settings |= {} if args.seed is None else {"seed": seeds[k * n]}
        path = prompts[k].first_image(output)
        check_resumed(path, n if single_file else 1, settings)
    given = _given(negative_prompt=args.negative_prompt, num_candidates=candidates)
    todo = [k for k, done in enumerate(complete) if not done]
    done, hidden = len(prompts) - len(todo), args.quiet
    with tqdm(total=len(prompts), initial=done, unit="prompt", disable=hidden, leave=False) as bar:
        for part in batches_of(len(todo), max(1, BATCH_SIZE // per_prompt)):
            rows = todo[part]
            result = pipe(
                [prompts[k].prompt for k in rows],
                num_images=n,
                seed=[s for k in rows for s in seeds[k * per_prompt : (k + 1) * per_prompt]],
                options=options,
                batch_size=BATCH_SIZE,
                progress=False,
                **given,
            )
            for i, k in enumerate(rows):
                own = slice(i * n, (i + 1) * n)
                prompts[k].write(result.images[own], result.metadata[own], output)
                bar.update()
    print_path(output, args)


def _load_generator(prompts: Sequence[Any], args: Namespace) -> AnyPipeline:
    """Load --model; errors of prompts and candidates are raised before, if the kind is known."""
    from unclip.pipelines.request import PromptBatch
    from unclip.pipelines.rerank import check_candidates

    if args.num_candidates is not None:
        check_candidates(args.num_images, args.num_candidates)
    batch = PromptBatch.of(prompts, args.negative_prompt)

    def check(model: Any) -> None:
        if model.kind == "unclip":
            batch.check(flags.sampling_options(model, args))

    return load_model(args, check=check)


def _mixture(prompts: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if len(prompts) != len(weights):
        raise ValueError(f"--mix has {len(weights)} weights for {len(prompts)} prompts")
    mixture = dict.fromkeys(prompts, 0.0)
    for prompt, weight in zip(prompts, weights, strict=True):
        mixture[prompt] += weight
    return mixture


def _given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None; some kinds of models lack the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def parts_of(
    args: Namespace, num_prompts: int = 1, candidates: int | None = None
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Split a command into calls; yield the prompts, and num_images and seed, of each.

    With candidates, one call generates all candidates of a prompt. An interrupted command keeps the
    images of the finished calls.
    """
    from unclip.pipelines.request import seeds_from, split_batches

    per_prompt = candidates or args.num_images
    seeds = seeds_from(args.seed, num_prompts * per_prompt)
    size = max(BATCH_SIZE, candidates or 0)
    for rows, n in split_batches(num_prompts, per_prompt, size):
        yield rows, {"num_images": args.num_images if candidates else n, "seed": seeds[0]}
        seeds = seeds[n * len(range(num_prompts)[rows]) :]


def _regenerate(args: Namespace) -> None:
    from unclip.image_io import read_metadata

    given = [flag for flag in flags.given_flags(args) if flag is not flags.LORA]
    others = (args.prompts, args.prompts_file, args.num_images > 1, given)
    if any(others) or args.seed is not None:
        raise ValueError(
            "--from takes prompts, seed and sampling options from the metadata of the PNG; "
            "they cannot be given with it"
        )
    entries = read_metadata(args.source)
    first = entries[0]
    args.grid = args.grid or len(entries) > 1
    check_output(args, len(entries))
    _check_trust(args, first)
    args.model = args.model or first.get("model") or flags.DEFAULT_MODEL
    args.prior = first.get("prior_model")
    _check_lora(args, first.get("lora") or [])
    args.quantize = args.quantize or first.get("quantized")
    dtypes = {long: short for short, long in flags.DTYPES.items()}
    pipe = load_model(args, dtypes.get(first.get("dtype", "")))

    from unclip.pipelines.provenance import regenerate

    latents: dict[str, Any] = {}  # each source is inverted once
    _write_all(
        (regenerate(pipe, one, progress=not args.quiet, latents=latents)[0] for one in entries),
        args,
    )


def _check_lora(args: Namespace, stored: list[Any]) -> None:
    """Raise a ValueError unless --lora is given once for each adapter in the metadata."""
    if len(stored) != len(args.lora or ()):
        wanted = flags.lora_options(stored).strip() or "no --lora"
        raise ValueError(f"{args.source} was generated with LoRA adapters; give {wanted}")


def _check_trust(args: Namespace, entry: dict[str, Any]) -> None:
    """Raise a ValueError if the PNG names models that are neither bundled nor trusted."""
    named = {"model": None if args.model else entry.get("model"), "prior": entry.get("prior_model")}
    bundled = bundled_models()
    unknown = [
        f"the {part} {name!r}" for part, name in named.items() if name and name not in bundled
    ]
    if unknown and not args.trust_model:
        choice = "" if args.model else "give --model NAME, or "
        raise ValueError(
            f"{args.source} asks for {' and '.join(unknown)}, which the package does not bundle; "
            f"{choice}add --trust-model if you trust the file"
        )


def variations(args: Namespace) -> None:
    from unclip.image_io import open_image

    for path in args.images:
        open_image(path)  # not kept: several large images would fill the memory
    check_output(args, len(args.images) * args.num_images)
    pipe = load_model(args)
    given = _given(prompt=args.prompt, negative_prompt=args.negative_prompt, keep=args.keep)
    given |= {"options": flags.sampling_options(pipe, args), "progress": not args.quiet}
    results = (
        pipe.variations(
            [_fit(open_image(path), pipe, args) for path in args.images[rows]], **part, **given
        )
        for rows, part in parts_of(args, len(args.images))
    )
    names = [path.stem for path in args.images for _ in range(args.num_images)]
    _write_all(results, args, names)


def complete(args: Namespace) -> None:
    from unclip.image_io import open_image

    image = open_image(args.image)
    check_output(args, args.num_images)
    pipe = load_dalle(args)
    given = _given(negative_prompt=args.negative_prompt, num_candidates=args.num_candidates)
    given |= _given(keep=args.keep)
    given |= {"options": flags.sampling_options(pipe, args), "progress": not args.quiet}
    image = _fit(image, pipe, args)
    parts = parts_of(args, candidates=args.num_candidates)
    results = (pipe.complete(image, args.caption, **part, **given) for _, part in parts)
    _write_all(results, args, [args.image.stem] * args.num_images)


def _fit(image: Image.Image, pipe: AnyPipeline, args: Namespace) -> Image.Image:
    from unclip.image_io import fit
    from unclip.pipelines.dalle.pipeline import DallePipeline

    if not args.fit or not isinstance(pipe, DallePipeline):  # other kinds accept every size
        return image
    return fit(image, pipe.codec.image_size)


def _write_all(
    results: Iterable[GenerationResult], args: Namespace, sources: Sequence[str] = ()
) -> None:
    """Write images to files that are named after the prompt, or else the source, and the seed.

    sources: the name of each image's source, if there is one.
    """
    from unclip.image_io import image_name

    names = chain(sources, repeat(""))

    def write(result: GenerationResult) -> None:
        files = []
        for i, (entry, source) in enumerate(zip(result.metadata, names, strict=False)):
            prompt = entry.get("prompt") or source
            words = prompt if isinstance(prompt, str) else " and ".join(prompt)
            files.append(image_name(words, i if entry["seed"] is None else entry["seed"]))
        write_images(result.images, result.metadata, files, args)

    write_as_they_come(results, write, args)

"""`unclip evaluate` and `evaluate-...`: metrics of models, codecs, priors and manipulations."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.folders import locate
from unclip.cli import arguments as flags
from unclip.cli.loading import load_model, load_named, load_unclip
from unclip.cli.output import check_result, write_json
from unclip.config import to_dict
from unclip.evaluation import MANIPULATION_PARTS, PARTS
from unclip.extras import import_extra
from unclip.files import check_folder, read_json

if TYPE_CHECKING:
    import torch

    from unclip.evaluation.base import Evaluation
    from unclip.evaluation.features import Extractor
    from unclip.evaluation.judge import Judge
    from unclip.evaluation.pairs import Pairs
    from unclip.evaluation.reference import Statistics

RECONSTRUCTED = 12  # images on the sheet of `evaluate-codec`


def add_commands(commands: Any) -> None:
    _add_evaluate(commands)
    _add_evaluate_codec(commands)
    _add_evaluate_priors(commands)
    _add_evaluate_manipulations(commands)
    _add_evaluate_approximations(commands)


def _add_data(
    parser: ArgumentParser,
    limit: int | None,
    batch_size: int,
    about: str = "held-out pairs: tars, or a folder",
) -> None:
    parser.add_argument("--data", nargs="+", required=True, metavar="DATA", help=about)
    about = f"use N evenly spaced pairs (default: {limit or 'all'})"
    parser.add_argument("--limit", default=limit, help=about, **flags.COUNT)
    about = f"images per batch (default: {batch_size})"
    parser.add_argument("--batch-size", default=batch_size, help=about, **flags.COUNT)


def _add_results(parser: ArgumentParser, about: str = "write the results to this file") -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    flags.add_quiet(parser)


def _named(parse: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """Return the type of an argument NAME=VALUE."""

    def parse_pair(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
        return name, parse(value)

    return parse_pair


# -- evaluate


def _add_evaluate(commands: Any) -> None:
    about = "evaluate a model on pairs that it was not trained on"
    parser = flags.add_command(commands, evaluate, about)
    _add_data(parser, None, 32)
    about = "training pairs, for styles and nearest images"
    parser.add_argument("--train-data", nargs="+", metavar="DATA", help=about)
    about = "another model, sampled with the same captions and seeds"
    parser.add_argument("--baseline", metavar="NAME", help=about)
    flags.add_renamed(parser, "--beside", "--baseline")
    about = "judge that names concept and style of the images (needs torchmetrics)"
    parser.add_argument("--judge", type=Path, metavar="FILE", help=about)
    about = "train a judge on the training and held-out images first, and write it to this file"
    parser.add_argument("--train-judge", type=Path, metavar="FILE", help=about)
    about = "training updates of the judge (default: 3500, half an hour on a CPU core)"
    parser.add_argument("--judge-steps", default=3500, help=about, **flags.COUNT)
    about = (
        "report Fréchet distance (FID), kernel distance, precision, recall and CLIP score of the "
        "final images in these features: clip (the model's own), a CLIP folder, a TorchScript file "
        "or MODULE:NAME, a program that you trust (needs torchmetrics)"
    )
    parser.add_argument("--features", metavar="SPEC", help=about)
    about = (
        "with --features: measure the distances to these images (tars, or a folder) instead of "
        "those of --data, or to a .npz or .safetensors file of their mean and covariance"
    )
    parser.add_argument("--reference", nargs="+", metavar="DATA", help=about)
    known = dict.fromkeys(part for parts in PARTS.values() for part in parts)
    about = f"some of {', '.join(known)} (default: all)"
    parser.add_argument("--parts", nargs="+", type=_part, choices=known, metavar="PART", help=about)
    flags.add_seed(parser, 0)
    flags.add_pipeline(parser, *flags.SAMPLING, *flags.PRIOR, flags.LORA)
    about = "write sheets of generated images to this folder"
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help=about)
    flags.add_renamed(parser, "--pictures", "--sheets", type=Path)
    about = "prompts for the sheet of samples, one per line"
    parser.add_argument("--prompts-file", type=flags.prompts_file, metavar="FILE", help=about)
    about = "write the table to this file, in Markdown"
    parser.add_argument("--table", type=Path, metavar="FILE", help=about)
    _add_results(parser, "save each part to this file; the same command then resumes")


def _part(name: str) -> str:
    return {"pictures": "images"}.get(name, name)  # its name in development versions


def evaluate(args: Namespace) -> None:
    from unclip.evaluation import report
    from unclip.evaluation.sheets import PROMPTS, write_sheets

    for file in (args.json, args.table, args.train_judge):
        check_result(file)
    if args.sheets is not None:
        check_folder(args.sheets)
    if args.judge and args.train_judge:
        raise ValueError("got --judge and --train-judge; expected one of them")
    if args.judge and not args.judge.is_file():
        raise ValueError(f"there is no judge at {args.judge}; --train-judge trains one")
    if args.features is None and "features" in (args.parts or ()):
        raise ValueError("--parts features is given; expected --features SPEC with it")
    if args.features is None and args.reference is not None:
        raise ValueError("--reference is given; expected --features SPEC with it")
    evaluation = _make_evaluation(args)
    if args.sheets is not None and evaluation.clip is None:
        raise ValueError(f"--sheets needs a CLIP, which {evaluation.pipe.name} does not have")
    earlier = _resume(args.json, evaluation.settings(), report.EVALUATION_RESULTS)
    results = evaluation.run(
        args.parts, lambda partial: write_json(partial, args.json, show=False), earlier
    )
    rows = [report.HEAD, *report.evaluation_rows(results)]
    print(report.plain_table(rows))
    write_json(results, args.json)
    if args.table is not None:
        args.table.write_text(report.markdown_table(rows) + "\n", encoding="utf-8")
        print(args.table)
    if args.sheets is not None:
        for path in write_sheets(evaluation, args.sheets, args.prompts_file or PROMPTS):
            print(path)


def _make_evaluation(args: Namespace) -> Evaluation:
    if args.judge or args.train_judge:
        import_extra("torchmetrics", "eval", "judging")
    extractor = None if args.features is None else _load_extractor(args.features)
    judge = None if args.judge is None else _load_judge(args.judge)
    reference: Any = None if args.reference is None else _load_statistics(args.reference)
    pipe = load_model(args)
    baseline = None
    if args.baseline is not None:
        baseline = load_named(args.baseline, args.device, args.dtype, offload=args.offload)

    from unclip.evaluation.base import Evaluation
    from unclip.evaluation.dalle import DalleEvaluation, DalleGenerator
    from unclip.evaluation.glide import GLIDEGenerator
    from unclip.evaluation.pairs import load_pairs
    from unclip.evaluation.unclip import UnCLIPEvaluation, UnCLIPGenerator

    kinds = {
        "unclip": (UnCLIPGenerator, UnCLIPEvaluation),
        "dalle": (DalleGenerator, DalleEvaluation),
        "glide": (GLIDEGenerator, Evaluation),
    }
    batching = {"batch_size": args.batch_size, "progress": not args.quiet}
    make_generator, make_evaluation = kinds[pipe.kind]
    generator = make_generator(pipe, flags.sampling_options(pipe, args), **batching)
    held_out = load_pairs(args.data, generator.size, args.limit, not args.quiet)
    train = None
    if args.train_data:
        train = load_pairs(args.train_data, generator.size, None, not args.quiet)
    if args.reference is not None and reference is None:
        sizes = (generator.size, None, not args.quiet)
        reference = load_pairs(args.reference, *sizes, captions_needed=False)
    other = None if baseline is None else kinds[baseline.kind][0](baseline, **batching)
    if args.train_judge is not None:
        judge = _train_judge(args, [held_out] if train is None else [train, held_out])
    extra = {"baseline": other, "judge": judge, "extractor": extractor, "reference": reference}
    return make_evaluation(generator, held_out, train, **extra, seed=args.seed)


def _load_extractor(spec: str) -> Extractor:
    """Load the extractor before the model; MODULE may be in the current folder."""
    import_extra("torchmetrics", "eval", "--features")

    from unclip.evaluation.features import load_extractor

    if "" not in sys.path:
        sys.path.insert(0, "")
    return load_extractor(spec)


def _load_statistics(reference: list[str]) -> Statistics | None:
    """Load a --reference that is a file of statistics; None if it is images."""
    if len(reference) > 1 or Path(reference[0]).suffix not in (".npz", ".safetensors"):
        return None

    from unclip.evaluation.reference import load_statistics

    return load_statistics(reference[0])


def _load_judge(file: Path) -> Judge:
    from unclip.evaluation.judge import Judge

    return Judge.load(file)


def _train_judge(args: Namespace, pairs: list[Pairs]) -> Judge:
    from unclip.evaluation.judge import train_judge

    judge = train_judge(pairs, args.judge_steps, progress=not args.quiet)
    judge.save(args.train_judge)
    return judge


# -- evaluate-codec


def _add_evaluate_codec(commands: Any) -> None:
    about = "evaluate the reconstructions and the codebook of an image codec"
    parser = flags.add_command(commands, evaluate_codec, about)
    about = "folder or file of a codec, or a model that has one"
    parser.add_argument("codec", metavar="CODEC", help=about)
    _add_data(parser, None, 32, "images: tars, or a folder")
    about = "image size in pixels (default: that of training)"
    parser.add_argument("--size", help=about, **flags.COUNT)
    about = "cpu, cuda, mps (default: cpu)"
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help=about)
    about = "write a sheet of images above their reconstructions"
    parser.add_argument("--sheet", type=Path, metavar="PNG", help=about)
    flags.add_renamed(parser, "--picture", "--sheet", type=Path)
    _add_results(parser)


def evaluate_codec(args: Namespace) -> None:
    check_result(args.json)
    check_result(args.sheet)
    if args.sheet is not None and args.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet is {args.sheet}; expected a .png file")
    path = locate(args.codec)  # an unknown name is reported before torch is imported

    from unclip.checkpoints.registry import load_codec
    from unclip.evaluation import codec as evaluation
    from unclip.evaluation.pairs import load_pairs
    from unclip.image_io import save_png
    from unclip.pipelines.runtime import find_device

    folder = path / "codec" if (path / "codec").is_dir() else path
    codec = load_codec(folder, find_device(args.device))
    size = args.size or codec.image_size
    images = load_pairs(args.data, size, args.limit, not args.quiet, captions_needed=False).images
    results = evaluation.evaluate_codec(codec, images, args.batch_size)
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:{width}}  {value:.4g}")
    write_json(results, args.json)
    if args.sheet is not None:
        shown = images[:: max(1, len(images) // RECONSTRUCTED)][:RECONSTRUCTED]
        save_png(evaluation.reconstructions(codec, shown), args.sheet)
        print(args.sheet)


# -- evaluate-priors


def _add_evaluate_priors(commands: Any) -> None:
    about = "compare priors for one decoder on the same held-out captions, and the decoder alone"
    parser = flags.add_command(commands, evaluate_priors, about)
    repeated = {"action": "append", "default": []}
    about = "another prior to compare with the model's own (may be repeated)"
    prior = {"type": _named(str), "dest": "priors", "metavar": "NAME=FOLDER"}
    parser.add_argument("--prior", help=about, **prior, **repeated)
    about = "guidance of one prior (default: from the options; may be repeated)"
    scale = {"type": _named(flags.number), "dest": "scales", "metavar": "NAME=SCALE"}
    parser.add_argument("--prior-guidance", help=about, **scale, **repeated)
    _add_data(parser, 128, 32)
    flags.add_seed(parser, 0)
    flags.add_pipeline(parser, *flags.SAMPLING, flags.LORA)
    _add_results(parser)


def evaluate_priors(args: Namespace) -> None:
    check_result(args.json)
    pipe = load_unclip(args)

    from unclip.evaluation.pairs import load_pairs
    from unclip.evaluation.priors import PriorComparison
    from unclip.evaluation.report import prior_table
    from unclip.pipelines import load_prior

    comparison = PriorComparison(
        pipe,
        {name: load_prior(folder) for name, folder in args.priors},
        load_pairs(args.data, pipe.decoder.config.image_size, args.limit, not args.quiet),
        guidance=dict(args.scales),
        options=flags.sampling_options(pipe, args),
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    results = {**comparison.settings(), "rows": []}
    for row in comparison.rows():
        results["rows"].append(row)
        *head, cells = prior_table([row]).splitlines()
        print(*(head if len(results["rows"]) == 1 else ()), cells, sep="\n", flush=True)
        write_json(results, args.json, show=False)  # kept if the command is interrupted
    if args.json is not None:
        print(args.json)


# -- evaluate-manipulations and evaluate-approximations


def _resume(file: Path | None, settings: dict[str, Any], parts: Collection[str]) -> dict[str, Any]:
    """Return settings and results in `file`, or the settings alone if it does not exist.

    parts: keys of the results; all other keys are settings. ValueError if the settings differ.
    """
    settings = json.loads(json.dumps(settings))
    if file is None or not file.is_file():
        return settings
    stored = read_json(file)
    if {name: value for name, value in stored.items() if name not in parts} != settings:
        raise ValueError(f"{file} has results for other settings; choose another file")
    return stored


def _add_evaluate_manipulations(commands: Any) -> None:
    about = "evaluate inversion, variations, interpolation, text diffs, PCA and inpainting"
    parser = flags.add_command(commands, evaluate_manipulations, about)
    flags.add_model(parser)
    _add_data(parser, 32, 16)
    about = "images or embeddings to fit the PCA on (default: those of --data)"
    parser.add_argument("--train-data", nargs="+", metavar="DATA", help=about)
    about = f"some of {', '.join(MANIPULATION_PARTS)} (default: all)"
    parser.add_argument(
        "--parts", nargs="+", choices=MANIPULATION_PARTS, metavar="PART", help=about
    )
    about = "minimum steps of DDIM inversion (default: 50; at most 25 except in reconstruction)"
    parser.add_argument("--steps", default=50, help=about, **flags.COUNT)
    flags.add_seed(parser, 0)
    _add_results(parser, "save each part to this file; the same command then resumes")


def evaluate_manipulations(args: Namespace) -> None:
    from unclip.evaluation.report import HEAD, manipulation_rows, plain_table

    check_result(args.json)
    pipe = load_unclip(args)

    from unclip.data.loader import open_dataset
    from unclip.evaluation.manipulations import ManipulationEvaluation
    from unclip.evaluation.pairs import load_pairs
    from unclip.pipelines.unclip.probing import read_embeddings

    settings = {
        "model": args.model,
        "data": args.data,
        "train_data": args.train_data,
        "options": to_dict(pipe.options),
        "pairs": args.limit,
        "steps": args.steps,
        "seed": args.seed,
    }
    results = _resume(args.json, {"settings": settings}, MANIPULATION_PARTS)
    open_dataset(args.train_data or args.data)  # raises its errors now, not after the other parts
    progress = not args.quiet
    evaluation = ManipulationEvaluation(
        pipe,
        load_pairs(args.data, pipe.decoder.config.image_size, args.limit, progress),
        lambda: read_embeddings(pipe, args.train_data or args.data, progress=progress),
        steps=args.steps,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=progress,
    )
    for part in args.parts or MANIPULATION_PARTS:
        if part not in results:
            results[part] = evaluation.run(part)
            write_json(results, args.json, show=False)
    print(plain_table([HEAD, *manipulation_rows(results)]))


def _add_evaluate_approximations(commands: Any) -> None:
    about = "measure the error and the speed of approximate options against exact results"
    parser = flags.add_command(commands, evaluate_approximations, about)
    flags.add_model(parser)
    _add_data(parser, 128, 16, "captions: tars, or a folder")
    flags.add_seed(parser, 0)
    _add_results(parser, "save each row to this file; the same command then resumes")


def evaluate_approximations(args: Namespace) -> None:
    check_result(args.json)
    pipe = load_unclip(args)

    from unclip.evaluation.approximations import ApproximationError
    from unclip.evaluation.pairs import load_pairs
    from unclip.evaluation.report import approximation_cells, approximation_table
    from unclip.pipelines import load
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

    def reload(dtype: torch.dtype) -> UnCLIPPipeline:
        copy = load(args.model, args.device, dtype)
        assert isinstance(copy, UnCLIPPipeline)
        return copy

    pairs = load_pairs(args.data, pipe.decoder.config.image_size, args.limit, not args.quiet)
    measurement = ApproximationError(
        pipe,
        pairs.captions,
        reload,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    settings = {
        "model": args.model,
        "data": args.data,
        "seed": args.seed,
        "images": len(pairs),
        "options": to_dict(pipe.options),
        "machine": {"device": str(pipe.device), "dtype": str(pipe.dtype)},
    }
    results = _resume(args.json, {"settings": settings}, ("rows",))
    rows = results.setdefault("rows", [])
    try:
        for row in measurement.rows(done=[row["name"] for row in rows]):
            rows.append(row)
            print("  ".join(approximation_cells(row)), flush=True)
            write_json(results, args.json, show=False)  # kept if the command is interrupted
    finally:
        if rows:
            print(f"\n{approximation_table(rows)}")
            write_json(results, args.json)

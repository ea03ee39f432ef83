"""Arguments that several commands share, and the flags that set a model's sampling options."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.files import read_text
from unclip.pipelines.presets import PRESETS
from unclip.types import DTYPES, SAMPLERS, parse_setting, set_options

DEFAULT_MODEL = "emoji"
MAX_SEED = 2**62  # torch's is 2**63 - 1; the images after the first have larger seeds


# Types of arguments: they raise ArgumentTypeError, which argparse reports with the flag's name.


def at_least(minimum: int) -> Callable[[str], int]:
    """Return the type of an integer argument with a lower bound."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


def _seed(text: str) -> int:
    """Parse a seed."""
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**62")
    return int(text)


def number(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    if not 0.0 <= (value := number(text)) <= 1.0:
        raise ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def text(argument: str) -> str:
    """Return the text of an argument; its bytes are UTF-8, also in locales with fewer characters.

    Not for paths, which the operating system gets in the encoding of the locale.
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise ArgumentTypeError(f"{argument!r} is not valid Unicode; expected UTF-8") from None


def prompt(argument: str) -> str:
    """Return a prompt that is not empty."""
    if not argument.strip():
        raise ArgumentTypeError("the prompt is empty; expected a description of the image")
    return text(argument)


def prompts_file(text: str) -> list[str]:
    """Read the prompts in a UTF-8 file, or in standard input ("-"), one per line.

    A byte order mark is allowed.
    """
    try:
        lines = (_read_stdin() if text == "-" else read_text(text)).splitlines()
    except (ValueError, OSError) as error:
        raise ArgumentTypeError(f"{error}; expected one prompt per line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ArgumentTypeError(f"{text} has no prompts; expected one per line")
    return prompts


def _read_stdin() -> str:
    stream = None if sys.stdin is None else sys.stdin.buffer  # None if the shell has closed it
    try:
        return "" if stream is None else stream.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text") from None


def lora(text: str) -> tuple[str, float]:
    """Parse PATH or PATH:SCALE; a colon before anything but a number belongs to the path."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, number(scale)) if colon and path else (text, 1.0)
    except ArgumentTypeError:
        return text, 1.0


def lora_options(stored: Sequence[Any]) -> str:
    """Return the --lora options that give the adapters stored in metadata."""
    specs = [f"{one['path']}:{one['scale']:g}" for one in stored if isinstance(one, dict)]
    return "".join(f" --lora {shlex.quote(spec)}" for spec in specs)


COUNT = {"type": at_least(1), "metavar": "N"}
NUMBER = {"type": number, "metavar": "X"}


# Arguments of several commands.

Arguments = ArgumentParser | argparse._ArgumentGroup


def add_command(
    commands: Any, run: Callable[[Namespace], None], about: str, example: str = ""
) -> ArgumentParser:
    """Add a command that calls `run` and has its name, with hyphens."""
    parser = commands.add_parser(
        run.__name__.replace("_", "-"),
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=example and f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Defaults for `load_model` and `sampling_options` in commands without these flags.
    parser.set_defaults(offload=False, compile=False, quantize=None)
    parser.set_defaults(prior=None, preset=None, lora=None, set=None)
    parser.set_defaults(run=run, flags=())
    return parser


def add_model(parser: Arguments, default: str = DEFAULT_MODEL) -> None:
    """Add the arguments that name a model and its device; see `add_pipeline`."""
    about = f"bundled name, folder, checkpoint file or Hub id (default: {default})"
    parser.add_argument("--model", default=default, metavar="NAME", help=about)
    about = "cpu, cuda, cuda:1, mps (default: the fastest that is available)"
    parser.add_argument("--device", metavar="DEVICE", help=about)
    about = "data type of the networks (default: half precision on CUDA, else fp32)"
    add_dtype(parser, about)


def add_dtype(parser: Arguments, about: str) -> None:
    names = (*DTYPES, *DTYPES.values())
    parser.add_argument("--dtype", choices=names, metavar="|".join(DTYPES), help=about)


def add_runtime(parser: Arguments) -> None:
    memory = parser.add_mutually_exclusive_group()  # compiled networks cannot move
    about = "keep only one network in memory at a time"
    memory.add_argument("--offload", action="store_true", help=about)
    about = "optimise the networks first, which pays off for many images"
    memory.add_argument("--compile", action="store_true", help=about)
    about = "round the weights: half the memory of bf16, slightly different images"
    parser.add_argument("--quantize", choices=("int8",), help=about)


def add_num_images(parser: ArgumentParser, default: int = 1, of: str = "") -> None:
    about = f"number of images{of} (default: {default})"
    parser.add_argument("-n", "--num-images", default=default, help=about, **COUNT)


def add_seed(parser: ArgumentParser, default: int | None = None) -> None:
    random = "random" if default is None else default
    about = f"seed of the first image; the next ones use S + 1, ... (default: {random})"
    parser.add_argument("--seed", type=_seed, default=default, metavar="S", help=about)


def add_output(
    parser: ArgumentParser,
    about: str = "a .png, .jpg or .webp file, or a folder (default: the current one)",
) -> None:
    """Add the arguments that `check_output` and `write_images` read."""
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=about)
    parser.add_argument(
        "--grid", action="store_true", help="write one sheet with all images and captions"
    )
    add_quiet(parser)


def add_quiet(parser: ArgumentParser) -> None:
    about = "show no progress bars or file names"
    parser.add_argument("--quiet", action="store_true", help=about)


def add_renamed(parser: Arguments, old: str, new: str, **parse: Any) -> None:
    """Accept the old name of a flag, with a warning; `parse` are its arguments for argparse."""
    dest = new.removeprefix("--").replace("-", "_")
    parser.add_argument(old, dest=dest, action=_RenamedFlag, help=argparse.SUPPRESS, **parse)


class _RenamedFlag(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        # A DeprecationWarning would not be shown to users.
        warnings.warn(f"{option_string} is deprecated; use {new}", FutureWarning, stacklevel=2)
        setattr(namespace, self.dest, values)


# Flags of the sampling options.


@dataclass(frozen=True)
class SamplingFlag:
    """A flag that changes how a model samples.

    sets: for each kind of model that has the flag, the option it sets, such as "decoder.steps"
    or "upsamplers.*.steps" (of every upsampler); None where the command itself reads the value.
    """

    name: str
    parse: Mapping[str, Any]  # arguments for argparse
    about: str
    sets: Mapping[str, str | None]
    former: str | None = None  # its name in development versions

    @property
    def dest(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


def _diffusion(option: str | None) -> dict[str, str | None]:
    return {"unclip": option, "glide": option}


STEPS = SamplingFlag("--steps", COUNT, "steps of the decoder", _diffusion("decoder.steps"))
GUIDANCE = SamplingFlag(
    "--guidance",
    NUMBER,
    "guidance scale of the decoder or of DALL-E; 1 = no guidance",
    _diffusion("decoder.guidance") | {"dalle": "guidance"},
)
UPSAMPLER_STEPS = SamplingFlag(
    "--upsampler-steps", COUNT, "steps of each upsampler", _diffusion("upsamplers.*.steps")
)
SET = SamplingFlag(
    "--set",
    {"action": "append", "metavar": "KEY=VALUE"},
    "any sampling option by its name in Python, such as decoder.guidance_rescale=0.7 or "
    "upsamplers.0.steps=5; may be repeated; overrides the other flags",
    _diffusion(None) | {"dalle": None},
)
DETERMINISTIC = (STEPS, GUIDANCE, UPSAMPLER_STEPS)  # also for inversion, which requires DDIM
CODES = (
    SamplingFlag(
        "--temperature",
        NUMBER,
        "DALL-E and autoregressive priors: divides the logits; 0 = always the likeliest code",
        {"dalle": "temperature", "unclip": "prior.temperature"},
    ),
    SamplingFlag("--top-k", COUNT, "DALL-E: use only the N likeliest codes", {"dalle": "top_k"}),
    SamplingFlag(
        "--top-p", NUMBER, "DALL-E: use the fewest codes of this probability", {"dalle": "top_p"}
    ),
)
SAMPLING = (
    *DETERMINISTIC,
    SamplingFlag(
        "--sampler", {"choices": SAMPLERS}, "sampler of the decoder", _diffusion("decoder.sampler")
    ),
    SamplingFlag(
        "--preset",
        {"choices": PRESETS},
        "exact: the model's own options; fast: nearly the same images, several times faster",
        _diffusion(None),
    ),
    *CODES,
)
PRIOR = (
    SamplingFlag("--prior", {"metavar": "NAME"}, "folder or Hub id of a prior", {"unclip": None}),
    SamplingFlag("--prior-steps", COUNT, "steps of the prior", {"unclip": "prior.steps"}),
    SamplingFlag(
        "--prior-guidance", NUMBER, "guidance scale of the prior", {"unclip": "prior.guidance"}
    ),
    SamplingFlag(
        "--prior-candidates",
        COUNT,
        "number of embeddings sampled per image; only the best is decoded",
        {"unclip": "prior_candidates"},
    ),
)
LORA = SamplingFlag(
    "--lora",
    {"action": "append", "type": lora, "metavar": "PATH[:SCALE]"},
    "folder of a LoRA adapter; may be repeated",
    {"unclip": None},
)
NEGATIVE_PROMPT = SamplingFlag(
    "--negative-prompt",
    {"type": text, "metavar": "TEXT"},
    "what to avoid",
    _diffusion(None) | {"dalle": None},
)
FROM_TEXT = (
    *PRIOR,
    SamplingFlag(
        "--embedding",
        {"choices": ("prior", "text", "none")},
        "embedding to decode: from the prior, of the text itself, or none",
        {"unclip": "embedding"},
    ),
    NEGATIVE_PROMPT,
    SamplingFlag(
        "--mix",
        {"nargs": "+", "type": number, "metavar": "WEIGHT"},
        "generate from one mixture of all prompts with these weights",
        {"unclip": None},
    ),
)
CANDIDATES = SamplingFlag(
    "--num-candidates",
    COUNT,
    "number of images generated per prompt; those with the highest CLIP similarity are kept",
    {"unclip": None, "dalle": None},
    former="--candidates",
)
FROM_IMAGE = (
    SamplingFlag(
        "--prompt",
        {"type": prompt, "metavar": "TEXT"},
        "caption of the image",
        {"dalle": None, "unclip": None},
    ),
    NEGATIVE_PROMPT,
    SamplingFlag(
        "--keep", NUMBER, "DALL-E: fraction to keep, from the top (0.4375)", {"dalle": None}
    ),
)


def add_pipeline(parser: ArgumentParser, *flags: SamplingFlag, model: str = DEFAULT_MODEL) -> None:
    """Add the arguments of a command that samples: model, runtime and sampling flags."""
    group = parser.add_argument_group("model")
    add_model(group, model)
    add_runtime(group)
    add_sampling(parser.add_argument_group("sampling"), *flags)


def add_sampling(parser: Arguments, *flags: SamplingFlag) -> None:
    """Add the flags that `sampling_options` reads: some, and --set."""
    flags = (*flags, SET)
    for flag in flags:
        parser.add_argument(flag.name, help=flag.about, **flag.parse)
        if flag.former:
            add_renamed(parser, flag.former, flag.name, **flag.parse)
    parser.set_defaults(flags=flags)


def given_flags(args: Namespace) -> list[SamplingFlag]:
    """Return the sampling flags on the command line."""
    return [flag for flag in args.flags if getattr(args, flag.dest) is not None]


def check_prior(args: Namespace, prompt: object, flag: str) -> None:
    """Raise a ValueError for flags of the prior without a prompt to sample it for."""
    given = [one.name for one in given_flags(args) if one in PRIOR]
    if given and not prompt:
        raise ValueError(f"{given[0]} needs {flag}; without it, no prior is sampled")


def check_flags(pipe: Any, args: Namespace) -> None:
    """Raise a ValueError if a sampling flag does not exist for this kind of model."""
    for flag in given_flags(args):
        if pipe.kind not in flag.sets:
            known = ", ".join(flag.name for flag in args.flags if pipe.kind in flag.sets)
            raise ValueError(
                f"{pipe.name} is of kind {pipe.kind}, which has no {flag.name}; it has {known}"
            )


def given_options(args: Namespace, kind: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (as given, option, value) for flags that set options of this kind; --set comes last.

    ValueError if a --set is not KEY=VALUE.
    """
    for flag in given_flags(args):
        if (option := flag.sets.get(kind)) is not None:
            value = getattr(args, flag.dest)
            yield f"{flag.name} {value}", option, value
    yield from map(parse_setting, args.set or ())


def sampling_options(pipe: Any, args: Namespace, base: Any = None) -> Any:
    """Return `base` (default: the model's options), or --preset, changed by the sampling flags."""
    options = pipe.options if base is None else base
    if args.preset is not None:
        options = pipe.preset(args.preset)
    return set_options(options, given_options(args, pipe.kind))

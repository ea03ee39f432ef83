"""Arguments of the commands that draw: which kinds of models have them, and where each goes in the model's options."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from unclip.cli.common import whole_number
from unclip.pipelines.presets import PRESETS

if TYPE_CHECKING:  # torch must not be imported by `unclip --help`
    from unclip.pipelines.base import TextToImage

SAMPLERS = ("ancestral", "ddim", "dpm++", "unipc")
DIFFUSION, UNCLIP, DALLE = ("unclip", "glide"), ("unclip",), ("dalle",)


@dataclass(frozen=True)
class Argument:
    """One of them, left at None where the command line doesn't give it."""

    flag: str
    about: str
    places: Mapping[
        str, str | None
    ]  # by kind of model: in its options, "decoder.steps"; None: not among them
    how: Mapping[str, Any] = field(default_factory=dict)  # of argparse

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def _number(flag: str, about: str, places: Mapping[str, str | None], kind: type = int) -> Argument:
    return Argument(flag, about, places, {"type": kind, "metavar": "N" if kind is int else "X"})


def _in(kinds: Sequence[str], place: str | None) -> dict[str, str | None]:
    return dict.fromkeys(kinds, place)


SAMPLING = (
    _number("--steps", "sampling steps of the decoder", _in(DIFFUSION, "decoder.steps")),
    _number(
        "--guidance",
        "guidance of the decoder, or of DALL-E; 1 = none",
        {**_in(DIFFUSION, "decoder.guidance"), "dalle": "guidance"},
        float,
    ),
    Argument(
        "--sampler",
        "sampler of the decoder",
        _in(DIFFUSION, "decoder.sampler"),
        {"choices": SAMPLERS},
    ),
    _number(
        "--upsampler-steps",
        "sampling steps of each upsampler",
        _in(DIFFUSION, "upsamplers.*.steps"),
    ),
    Argument(
        "--preset",
        "options by name: exact, the model's own; or fast, for nearly the same picture several times sooner",
        _in(DIFFUSION, None),
        {"choices": PRESETS},
    ),
    _number(
        "--temperature",
        "DALL-E and autoregressive priors: that logits are divided by; 0 = the likeliest code",
        {**_in(DALLE, "temperature"), **_in(UNCLIP, "prior.temperature")},
        float,
    ),
    _number("--top-k", "DALL-E: draw among so many of the likeliest codes", _in(DALLE, "top_k")),
    _number(
        "--top-p",
        "DALL-E: draw among the fewest codes of this probability",
        _in(DALLE, "top_p"),
        float,
    ),
)
PRIOR = (
    Argument(
        "--prior", "folder or Hub id of another prior", _in(UNCLIP, None), {"metavar": "NAME"}
    ),
    _number("--prior-steps", "sampling steps of the prior", _in(UNCLIP, "prior.steps")),
    _number(
        "--prior-guidance", "guidance of the prior; 1 = none", _in(UNCLIP, "prior.guidance"), float
    ),
    _number(
        "--prior-candidates",
        "embeddings drawn for a picture; only the best is decoded",
        _in(UNCLIP, "prior_candidates"),
    ),
)
FROM_TEXT = (
    *PRIOR,
    Argument(
        "--embedding",
        "what is decoded: the prior's embedding, the caption's own (text), or none, the caption alone",
        _in(UNCLIP, "embedding"),
        {"choices": ("prior", "text", "none")},
    ),
    Argument("--negative", "what guidance leads away from", _in(UNCLIP, None), {"metavar": "TEXT"}),
    Argument(
        "--mix",
        "draw one mixture of all prompts, with these weights",
        _in(UNCLIP, None),
        {"nargs": "+", "type": float, "metavar": "WEIGHT"},
    ),
)
RERANKING = (
    Argument(
        "--candidates",
        "pictures drawn of each prompt; those that CLIP finds closest to it are kept",
        _in(("unclip", "dalle"), None),
        {"type": whole_number, "metavar": "N"},
    ),
)
FROM_PICTURE = (
    Argument(
        "--prompt",
        "DALL-E: the picture's caption (default: none)",
        _in(DALLE, None),
        {"metavar": "TEXT"},
    ),
    _number(
        "--keep",
        "DALL-E: how much of the picture stays, from the top; 0 = only what it suggests (default: 0.4375)",
        _in(DALLE, None),
        float,
    ),
)
ARGUMENTS = (*SAMPLING, *FROM_TEXT, *RERANKING, *FROM_PICTURE)


def add_arguments(parser: ArgumentParser, *groups: Sequence[Argument]) -> None:
    for argument in (argument for group in groups for argument in group):
        parser.add_argument(argument.flag, help=argument.about, **argument.how)


def given(args: Namespace) -> list[Argument]:
    """Those that the command line gives."""
    return [argument for argument in ARGUMENTS if getattr(args, argument.name, None) is not None]


def sampling_options(pipe: TextToImage, args: Namespace) -> Any:
    """The model's own options, or those of --preset, changed where the command line says so.

    ValueError if it gives an argument that is not for this kind of model.
    """
    options = pipe.options if getattr(args, "preset", None) is None else pipe.preset(args.preset)
    for argument in given(args):
        if pipe.kind not in argument.places:
            known = [
                other.flag
                for other in ARGUMENTS
                if hasattr(args, other.name) and pipe.kind in other.places
            ]
            raise ValueError(
                f"{pipe.name} is of kind {pipe.kind}, which has no {argument.flag}; it has {', '.join(known)}"
            )
        if (place := argument.places[pipe.kind]) is not None:
            options = _changed(options, place.split("."), getattr(args, argument.name))
    return options


def _changed(options: Any, place: Sequence[str], value: Any) -> Any:
    if not place:
        return value
    if place[0] == "*":
        return tuple(_changed(one, place[1:], value) for one in options)
    return replace(options, **{place[0]: _changed(getattr(options, place[0]), place[1:], value)})

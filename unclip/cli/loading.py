"""Load the model that the command line names."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.folders import (
    MODEL_FILE,
    OPTIONS_FILE,
    SCHEDULE_FILE,
    component_folders,
    locate,
    read_model_json,
)
from unclip.cli.arguments import check_flags, given_options, sampling_options
from unclip.config import parse
from unclip.files import read_json
from unclip.pipelines.presets import preset
from unclip.types import OPTIONS, stages_of

if TYPE_CHECKING:  # `unclip --help` must not import torch
    from unclip.pipelines.dalle.pipeline import DallePipeline
    from unclip.pipelines.glide import GLIDEPipeline
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

    AnyPipeline = UnCLIPPipeline | GLIDEPipeline | DallePipeline

UNCLIP = "unclip", "an unCLIP model"  # a kind of model, and its description
DALLE = "dalle", "a DALL-E model"
MANY = 9  # upsamplers of a model whose options are unknown until it is loaded


def load_model(
    args: Namespace,
    default_dtype: str | None = None,
    *kind: str,
    check: Callable[[Any], None] = lambda model: None,
) -> AnyPipeline:
    """Load --model with --prior and --lora; offload, quantize or compile it if requested.

    kind: see `check_before_loading`. check: raises the errors of a command for a model. It is
    called with a `Header` before loading if there is one, and else with the pipeline.
    """
    header = check_before_loading(args, *kind)
    if header is not None:
        check(header)
    offload_at_once = args.offload and not (args.quantize or args.lora)
    dtype = args.dtype or default_dtype
    pipe = load_named(args.model, args.device, dtype, offload=offload_at_once)
    check_flags(pipe, args)
    if header is None:
        check(pipe)
    if args.prior is not None:
        from unclip.pipelines import load_prior

        unclip: UnCLIPPipeline = _check_kind(pipe, "unclip", args, "an unCLIP model for --prior")
        unclip.prior = load_prior(args.prior)
    for path, scale in args.lora or ():
        adapted: UnCLIPPipeline = _check_kind(pipe, "unclip", args, "an unCLIP model for --lora")
        adapted.load_lora(path, scale, merge=True)
    if args.quantize:
        pipe.quantize(args.quantize)
    if args.compile:
        from unclip.pipelines.compilation import compile

        compile(pipe)
    if args.offload:
        pipe.offload()
    return pipe


@dataclass(frozen=True)
class Header:
    """Sampling settings in the JSON files of a model folder."""

    name: str
    kind: str
    options: Any
    num_timesteps: dict[str, int]  # of each stage that is sampled by diffusion

    def preset(self, name: str) -> Any:
        return preset(name, self.options)


def read_header(folder: Path) -> Header | None:
    """Read the header of one of our model folders; None for other formats."""
    if not (folder / MODEL_FILE).is_file():
        return None
    model, file = read_model_json(folder), folder / OPTIONS_FILE
    if model["kind"] not in OPTIONS:
        return None
    options = parse(OPTIONS[model["kind"]], read_json(file), str(file))
    schedules = {name: path / SCHEDULE_FILE for name, path in component_folders(folder).items()}
    timesteps = {
        name: read_json(path).get("num_timesteps", 1000)
        for name, path in schedules.items()
        if path.is_file()
    }
    return Header(model["name"], model["kind"], options, timesteps)


def check_before_loading(args: Namespace, *kind: str) -> Header | None:
    """Raise the errors of flags that can be found from the JSON files of a model alone.

    kind: the kind of model that the command needs, and its description. Returns None for formats
    other than ours.
    """
    _check_embedding(args)
    if (header := read_header(locate(args.model))) is None:
        _check_unknown(args, kind[:1] or tuple(OPTIONS))
        return None
    if kind:
        _check_kind(header, kind[0], args, kind[1])
    check_flags(header, args)
    options = sampling_options(header, args)
    stages = stages_of(options)
    if args.prior:
        stages.pop("prior", None)  # those of another prior
    for name, stage in stages.items():
        if stage.steps > (most := header.num_timesteps.get(name, math.inf)):
            raise ValueError(f"steps of the {name} are {stage.steps}; expected at most {most}")
        if stage.timesteps and stage.timesteps[0] >= most:
            first = f"timesteps of the {name} start at {stage.timesteps[0]}"
            raise ValueError(f"{first}; expected less than {most}")
    # A prior without a schedule is autoregressive; its steps are tokens.
    temperature = getattr(stages.get("prior"), "temperature", 1)
    if temperature != 1 and "prior" in header.num_timesteps:
        raise ValueError(f"temperature is {temperature}; expected 1 for a diffusion prior")
    return header


def _check_embedding(args: Namespace) -> None:
    """Raise a ValueError for flags without effect on an --embedding that is not the prior's."""
    given = [*given_options(args, "unclip")]
    embedding = {option: value for _, option, value in given}.get("embedding")
    if embedding not in ("text", "none"):
        return
    of_prior = [name for name, option, _ in given if option.startswith("prior")]
    if embedding == "none" and args.prior is not None:
        of_prior.append("--prior")
    if of_prior:
        raise ValueError(
            f"{of_prior[0]} cannot be given with --embedding {embedding}, which samples no prior"
        )


def _check_unknown(args: Namespace, kinds: Sequence[str]) -> None:
    """Raise the error of sampling flags that no kind of model accepts.

    For formats other than ours, whose kind and options are known once they are loaded.
    """
    errors = []
    for kind in kinds:
        options: Any = OPTIONS[kind]()
        if hasattr(options, "upsamplers"):
            options = replace(options, upsamplers=options.upsamplers * MANY)
        try:
            sampling_options(Header(args.model, kind, options, {}), args)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(kinds):
        raise errors[0]


def load_named(
    name: str, device: str | None, dtype: str | None, *, offload: bool = False
) -> AnyPipeline:
    """Call `unclip.load` with a dtype as spelled on the command line."""
    from unclip.pipelines import load

    locate(name)  # an unknown name is reported before torch is imported

    pipe: Any = load(name, device, dtype, offload=offload)
    return pipe


def load_unclip(
    args: Namespace, check: Callable[[Any], None] = lambda model: None
) -> UnCLIPPipeline:
    """Load --model; raise a ValueError if it is not an unCLIP model. check: see `load_model`."""
    return _check_kind(load_model(args, None, *UNCLIP, check=check), UNCLIP[0], args, UNCLIP[1])


def load_dalle(args: Namespace) -> DallePipeline:
    """Load --model; raise a ValueError if it is not a DALL-E."""
    return _check_kind(load_model(args, None, *DALLE), DALLE[0], args, DALLE[1])


def _check_kind(pipe: Any, kind: str, args: Namespace, expected: str) -> Any:
    if pipe.kind != kind:
        command = args.run.__name__.replace("_", "-")
        raise ValueError(f"{pipe.name} is of kind {pipe.kind}; {command} needs {expected}")
    return pipe

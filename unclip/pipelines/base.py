"""The base of all text-to-image pipelines: interface, files, metadata and device handling."""

from __future__ import annotations

import inspect
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from unclip import __version__, image_io
from unclip.checkpoints.card import model_card
from unclip.checkpoints.folders import CARD_FILE
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.hub import upload
from unclip.checkpoints.store import load_bundle, save_bundle
from unclip.config import OTHER_NAMES, check_keywords
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.cpu import int8
from unclip.pipelines.presets import preset
from unclip.pipelines.request import Batch, describe_prompt
from unclip.pipelines.runtime import Runtime, torch_defaults
from unclip.types import DTYPES, DType, GenerationResult, StageOptions, TextEncoding, stages_of
from unclip.weights import to_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

DIFFUSERS_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance"}

P = ParamSpec("P")
Output = TypeVar("Output", Tensor, TextEncoding)
Result = TypeVar("Result")


class Pipeline(ABC):
    """A named model with a runtime: the interface of all pipelines that `unclip.load` returns.

    In a call with seed s, image k (prompts in order, `num_images` for each) has the seed s + k.
    With a list of seeds, image k has its k-th seed. An image does not depend on the other images
    of the call, except for the rounding of batched arithmetic.
    """

    kind: str
    required: tuple[str, ...]  # components that a checkpoint must have
    options: Any  # the defaults of this model, a frozen dataclass

    def __init_subclass__(cls) -> None:
        """Check the names of arguments of sampling methods, and call them with torch's defaults."""
        super().__init_subclass__()
        for name, method in [*vars(cls).items()]:
            if inspect.isfunction(method) and "progress" in inspect.signature(method).parameters:
                setattr(cls, name, _sampling_method(method))

    def __init__(self, runtime: Runtime, name: str, licence: str, source: str | None) -> None:
        """source: the argument of `unclip.load`, for the metadata of images."""
        self.runtime = runtime
        self.name, self.licence, self.source = name, licence, source or name

    def __repr__(self) -> str:
        counts = {
            name: sum(weight.numel() for weight in int8.weights(network))
            for name, network in self.runtime.networks.items()
        }
        sizes = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{type(self).__name__} {self.name!r} on {self.device} in {dtype}: {sizes}>"

    @classmethod
    @abstractmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None) -> Self:
        """Make a pipeline from the components of a checkpoint."""

    @abstractmethod
    def __call__(self, prompt: Any, **arguments: Any) -> GenerationResult:
        """Generate images of prompts. All pipelines take the arguments of a `Request`."""

    @abstractmethod
    def variations(self, image: Any = None, **arguments: Any) -> GenerationResult:
        """Generate variations of images, if the model can."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: DType = torch.float32,
    ) -> Self:
        """Load a folder of `save_pretrained`; `unclip.load` also accepts names and Hub ids."""
        dtype = to_dtype(dtype) or torch.float32
        return cls.from_bundle(load_bundle(folder, dtype), source=str(folder)).to(device, dtype)

    @classmethod
    def check_bundle(cls, bundle: Bundle) -> None:
        """Raise ValueError unless the checkpoint is of this kind and complete."""
        if bundle.kind != cls.kind:
            raise ValueError(f"{bundle.name} is of kind {bundle.kind!r}; expected {cls.kind!r}")
        if missing := set(cls.required) - bundle.components.keys():
            raise ValueError(f"{bundle.name} has no {' and no '.join(sorted(missing))}")

    def save_pretrained(self, folder: str | Path, dtype: DType | None = None) -> None:
        """Write a model folder, with weights in `dtype` if given; it replaces an existing one."""
        self.runtime.check_saveable()
        for stage in stages_of(self.options).values():
            if not isinstance(stage.sampler, str):
                given = f"pipe.options have a {type(stage.sampler).__name__}"
                raise ValueError(f"{given}; expected sampler names, to save them")
        schedules = {name: schedule.config for name, schedule in self.schedules.items()}
        about = self.options, self.name, self.licence
        bundle = Bundle(self.kind, self.components(), schedules, *about)
        save_bundle(bundle, folder, to_dtype(dtype))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        prompts: Sequence[str] = (),
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        dtype: DType | None = None,
    ) -> str:
        """Upload the model with a model card to the Hub, as "org/name"; return its URL.

        prompts: of sample images for the card, generated with seed 0. revision: a branch.
        ValueError with the reason on failure.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, dtype)
            samples = []
            for i, prompt in enumerate(prompts):
                file = Path("images") / f"{i}.png"
                self(prompt, seed=0, progress=False).save(folder / file)
                samples.append((prompt, file))
            card = model_card(repo_id, self.kind, self.licence, samples)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            return upload(folder, repo_id, private, token, revision)

    def components(self) -> dict[str, Any]:
        """Return the parts of a checkpoint by name."""
        return dict(self.runtime.networks)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The noise schedule of each diffusion stage."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """Return every network but CLIP by the name of its stage."""
        return {name: net for name, net in self.runtime.networks.items() if name != "clip"}

    @property
    def device(self) -> torch.device:
        """The device on which the networks run."""
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runtime.dtype

    @property
    def offloaded(self) -> bool:
        """Whether one network is in memory at a time."""
        return self.runtime.offloaded

    @property
    def compiled(self) -> bool:
        """Whether `unclip.compile` has prepared the networks."""
        return self.runtime.compiled

    @property
    def quantized(self) -> str | None:
        """The kind of weights that `quantize` made; None if they are as they were trained."""
        return self.runtime.quantized

    def to(
        self, device: torch.device | torch.dtype | str | None = None, dtype: DType | None = None
    ) -> Self:
        """Move all networks; parameters are cast, but a small CLIP and statistics stay float32.

        As in torch, the first argument may be a dtype: `pipe.to(torch.bfloat16)`.
        """
        if isinstance(device, torch.dtype) or device in {*DTYPES, *DTYPES.values()}:
            if dtype is not None:
                raise ValueError(f"two dtypes are given, {device} and {dtype}; expected one")
            device, dtype = None, to_dtype(device)  # type: ignore[arg-type]
        self.runtime.to(device, to_dtype(dtype))  # type: ignore[arg-type]
        return self

    def offload(self, device: torch.device | str | None = None) -> Self:
        """Keep one network in memory at a time, in place; compute on `device`, or where they are.

        On an accelerator the others wait in main memory. On the CPU they wait in a temporary folder
        (in TMPDIR, which needs room for all weights) and are read when they are used. Images do not
        change. It cannot be undone: load the model again.
        """
        self.runtime.offload(device)
        return self

    def quantize(self, kind: str = "int8") -> Self:
        """Round weights to 8-bit integers in place: half of the memory of bfloat16, approximate.

        CLIP and codecs do not change. It cannot be undone; `save_pretrained` then raises an error.
        """
        self.runtime.quantize(kind)
        return self

    def preset(self, name: str) -> Any:
        """Return options by name: "exact", the model's own, or "fast", cheaper and approximate."""
        return preset(name, self.options)

    def describe(self, options: Any) -> dict[str, Any]:
        """Return the metadata about the model that every image gets; options: a dataclass."""
        quantized = {} if self.quantized is None else {"quantized": self.quantized}
        return {
            "model": self.source,
            "kind": self.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            **quantized,
            "version": __version__,
            "options": options_metadata(options),
        }

    def make_result(
        self,
        images: Tensor | list[Image.Image],
        batch: Batch,
        entries: Sequence[dict[str, Any]],
        options: Any,
        **tensors: Tensor | None,
    ) -> GenerationResult:
        """Make the result of a batch of images, (B, 3, S, S) in [-1, 1] or as they are.

        entries: metadata for the images of each prompt, `batch.num_images` of them. tensors:
        columns of the result with one row for each image.
        """
        about, n, seeds = self.describe(options), batch.num_images, batch.seeds
        metadata = [{**entries[k // n], "seed": seed, **about} for k, seed in enumerate(seeds)]
        prompts = [describe_prompt(m["prompt"]) if "prompt" in m else None for m in metadata]
        # Cloned outside of inference mode, so that the caller can compute with them.
        cloned: Any = {key: x if x is None else x.cpu().clone() for key, x in tensors.items()}
        if isinstance(images, Tensor):
            images = image_io.to_pil(images)
        return GenerationResult(images, [*seeds], prompts, metadata=metadata, **cloned)


def _sampling_method(method: Callable[P, Result]) -> Callable[P, Result]:
    """Call a method with torch's defaults; an error suggests the right name of an argument."""
    parameters = [*inspect.signature(method).parameters][1:]
    known = {*parameters}

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        pipe: Any = args[0]
        if not kwargs.keys() <= known:
            check_keywords(kwargs, parameters, suggest=lambda name: _suggest(name, pipe.options))
        with torch_defaults(), pipe.runtime.exclusive():
            return method(*args, **kwargs)

    return run


def _suggest(name: str, options: Any) -> str | None:
    """Return the argument to use for one of another library, or for the name of an option."""
    for theirs, ours in DIFFUSERS_NAMES.items():  # also prior_num_inference_steps
        name = name.replace(theirs, ours)
    known = vars(options)
    if name in known:
        return f"options=replace(pipe.options, {name}=...)"
    stage, _, option = name.partition("_")  # prior_steps
    if not isinstance(known.get(stage), StageOptions):
        stage, option = "decoder", name
    if stage in known and option in vars(known[stage]):
        changed = f"{stage}=replace(pipe.options.{stage}, {option}=...)"
        return f"options=replace(pipe.options, {changed})"
    return OTHER_NAMES.get(name)


def in_inference_mode(stage: Callable[P, Output]) -> Callable[P, Output]:
    """Run a stage in inference mode; a caller outside of it gets a copy to compute with."""

    @wraps(stage)
    def run(*args: P.args, **kwargs: P.kwargs) -> Output:
        pipe: Any = args[0]
        if torch.is_inference_mode_enabled():
            with torch_defaults(), pipe.runtime.exclusive():
                return stage(*args, **kwargs)
        with torch_defaults(), pipe.runtime.exclusive(), torch.inference_mode():
            output = stage(*args, **kwargs)
        return output.clone()

    return run


def make_schedules(
    configs: Mapping[str, ScheduleConfig] | None, stages: Sequence[str]
) -> dict[str, Schedule]:
    """Make the schedule of each stage, cosine if it is not given. ValueError for other names."""
    configs = dict(configs or {})
    if unknown := configs.keys() - set(stages):
        raise ValueError(f"schedules of {', '.join(unknown)}; the model has {', '.join(stages)}")
    return {stage: Schedule(configs.get(stage, ScheduleConfig())) for stage in stages}


def options_metadata(options: Any) -> dict[str, Any]:
    """Convert options to JSON types; a scheduler object becomes the name of its class."""
    return json.loads(json.dumps(asdict(options), default=lambda value: type(value).__name__))

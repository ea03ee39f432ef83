"""Values that pass between stages: text encodings, sampling options, progress and results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args

from annotated_types import Interval

from unclip._deprecated import renamed_fields
from unclip.config import (
    Fraction,
    PositiveFraction,
    PositiveInt,
    config,
    find_key,
    parse,
    parse_override,
    to_dict,
)
from unclip.files import check_image_folder, shorten

if TYPE_CHECKING:  # `import unclip` must not import torch
    import torch
    from PIL import Image
    from typing_extensions import Self

T = TypeVar("T")

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # short names -> torch's
DType = Union["torch.dtype", str]  # as torch has it, or by name
Sampler = Literal["ddim", "ancestral", "analytic", "dpm++", "unipc"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)

# B batch, L text tokens, W text width, D CLIP embedding width

# Limits of free numbers in options, to avoid overflow in the products they enter.
Scale = Annotated[float, Interval(ge=-1e6, le=1e6)]
Temperature = Annotated[float, Interval(ge=0, le=1e6)]


@dataclass(frozen=True)
class Rows:
    """Tensors with one row for each item of a batch.

    Fields are tensors, tuples of them, other `Rows`, or None.
    """

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply f to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(apply, value))
            if isinstance(value, Rows):
                return value._map(f)
            return None if value is None else f(value)

        return type(self)(*(apply(getattr(self, field.name)) for field in fields(self)))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of all parts."""
        import torch

        def join(values: list[Any]) -> Any:
            first = values[0]
            if isinstance(first, tuple):
                return tuple(join(list(items)) for items in zip(*values, strict=True))
            if isinstance(first, Rows):
                return type(first).cat(values)
            return None if first is None else torch.cat(values)

        return cls(*(join([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, rows: slice | torch.Tensor) -> Self:
        """Select rows by a slice, or by an index or mask tensor."""
        return self._map(lambda x: x[rows])

    def repeat_interleave(self, n: int) -> Self:
        """Repeat each row n times: (B, ...) -> (B * n, ...)."""
        return self._map(lambda x: x.repeat_interleave(n, dim=0))

    def clone(self) -> Self:
        """Copy every tensor."""
        return self._map(lambda x: x.clone())


def mix_rows(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum x (K * B, ...) under K conditions by weights (K, B) (2206.01714): (B, ...); None = x."""
    if weights is None:
        return x
    parts = x.unflatten(0, weights.shape)  # K B ...
    return (parts * weights.to(x).view(*weights.shape, *[1] * (x.ndim - 1))).sum(dim=0)


def full_precision(x: torch.Tensor) -> torch.autocast:
    """Context that disables autocast on the device of `x`."""
    import torch

    return torch.autocast(x.device.type, enabled=False)


@dataclass(frozen=True)
class TextEncoding(Rows):
    """Output of CLIP's text tower for B captions."""

    emb: torch.Tensor  # (B, D) projected, not normalised
    states: torch.Tensor  # (B, L, W) after the final LayerNorm
    mask: torch.Tensor  # (B, L) bool, True = a real token
    ids: torch.Tensor | None = None  # (B, L) tokens, for decoders with their own text transformer

    def trim(self) -> TextEncoding:
        """Remove the columns that are padding in every row.

        Outputs are unchanged for networks that use the mask, and cheaper to compute.
        """
        length = max([1, *(self.mask.any(0).nonzero().flatten() + 1).tolist()])
        return self._map(lambda x: x if x is self.emb else x[:, :length])

    def pad(self, length: int) -> TextEncoding:
        """Invert `trim`: append columns of padding, zeros, until there are `length`."""
        import torch.nn.functional as F

        def widen(x: torch.Tensor) -> torch.Tensor:
            sides = (0, 0) * (x.ndim - 2) + (0, length - x.shape[1])
            return x if x is self.emb else F.pad(x, sides)

        return self._map(widen)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> TextEncoding:
        """Move to `device` and cast the floating-point tensors to `dtype`."""
        return self._map(lambda x: x.to(device, dtype if x.is_floating_point() else None))


@renamed_fields(reuse="cache_interval")
@config
class StageOptions:
    """Sampling options of one diffusion stage."""

    steps: PositiveInt
    guidance: Scale = 1.0  # classifier-free guidance scale; 1 = no guidance, at half the cost
    # one of SAMPLERS, or a diffusers scheduler object
    sampler: Any = "ddim"
    eta: Fraction = 0.0  # DDIM only: 0 deterministic, 1 ancestral
    # Guide only where t / T is in this interval (2404.07724).
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    guidance_rescale: Fraction = 0.0  # 2305.08891
    # Percentile in (0, 1] of |x_0| (Imagen 2.3); None = static clipping
    dynamic_threshold: PositiveFraction | None = None
    # Autoregressive prior: divides the logits of the codes; 0 = always the likeliest code.
    # Diffusion of images: factor of the initial noise; below 1 = smoother (GLIDE)
    temperature: Temperature = 1.0
    # Compute the deep U-Net levels at every n-th step only (DeepCache, 2312.00858; approximate).
    cache_interval: PositiveInt = 1
    # "ancestral", "analytic", "ddim": the `steps` timesteps, decreasing; None = evenly spaced
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ts = self.timesteps
        if ts is not None and len(ts) != self.steps:
            given = f"got {len(ts)} timesteps, but steps is {self.steps}"
            raise ValueError(f"{given}; expected equal numbers, or timesteps=None")
        if ts is not None and (list(ts) != sorted({*ts}, reverse=True) or ts[-1] < 0):
            raise ValueError(f"timesteps are {ts}; expected decreasing numbers of at least 0")
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval is {self.guidance_interval}; expected low <= high")

    def with_steps(self, steps: int, **changes: Any) -> Self:
        """Return a copy of `steps` steps, evenly spaced if their number changes."""
        timesteps = self.timesteps if steps == self.steps else None
        return replace(self, steps=steps, timesteps=timesteps, **changes)


@config
class CodeOptions:
    """Sampling options of a model that generates image codes sequentially."""

    temperature: Temperature = 1.0  # divides the logits; 0 = always the likeliest code
    top_k: PositiveInt | None = None  # sample among the k likeliest codes; None = all
    top_p: PositiveFraction = 1.0  # sample among the fewest codes with this total probability
    guidance: Scale = 1.0  # classifier-free guidance scale; 1 = no guidance, at half the cost
    # DALL-E 2.6: sample this many images for each one that is returned, keep the one whose CLIP
    # embedding is most similar to the prompt's; 1 without a prompt
    candidates: PositiveInt = 1


@config
class UnCLIPOptions:
    """Sampling options of an unCLIP pipeline: one `StageOptions` for each stage."""

    prior: StageOptions = field(default_factory=lambda: StageOptions(steps=25, guidance=4.0))
    decoder: StageOptions = field(default_factory=lambda: StageOptions(steps=25, guidance=4.0))
    upsamplers: tuple[StageOptions, ...] = field(default_factory=lambda: (StageOptions(steps=7),))
    # unCLIP 2.2: sample this many image embeddings, keep the one most similar to the text embedding
    prior_candidates: PositiveInt = 2
    # The decoder's image embedding: the prior's, the caption's own (unCLIP 5.1), or none
    embedding: Literal["prior", "text", "none"] = "prior"


# The timesteps that GLIDE calls "fast27": denser towards the image.
FAST27 = (
    *(997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222, 200),
    *(199, 177, 155, 133, 111, 88, 66, 44, 22, 0),
)


@config
class GLIDEOptions:
    """Sampling options of GLIDE (2112.10741), whose own code guides the first stage only."""

    decoder: StageOptions = field(
        default_factory=lambda: StageOptions(steps=100, guidance=3.0, sampler="ancestral")
    )
    upsamplers: tuple[StageOptions, ...] = field(
        default_factory=lambda: (StageOptions(steps=27, timesteps=FAST27, temperature=0.997),)
    )


OPTIONS = {"unclip": UnCLIPOptions, "glide": GLIDEOptions, "dalle": CodeOptions}  # by kind of model


def update_options(options: T, changes: Any, where: str) -> T:
    """Change some sampling options, given as plain data: {"decoder": {"steps": 5}}.

    A list is changed item by item, by a list of the same length or by indices, where "*" stands
    for all: {"upsamplers": {"*": {"steps": 5}}}. Steps or timesteps that are changed alone
    determine the other: timesteps are evenly spaced, steps are their number. Raises ValueError with
    one line for each error, starting with `where`.
    """
    changed = parse(type(options), _merge(to_dict(options), changes, where), where)
    for stage in stages_of(changed).values():
        if stage.sampler not in SAMPLERS:
            expected = f"expected one of {', '.join(SAMPLERS)}"
            raise ValueError(f"{where}: sampler is {shorten(stage.sampler)}; {expected}")
    return changed


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Split a --set "decoder.steps=10" into (as given, option, value). Raises ValueError."""
    keys, value = parse_override(text, "decoder.steps=10")
    return f"--set {text}", ".".join(keys), value


def set_options(options: T, changes: Iterable[tuple[str, str, Any]]) -> T:
    """Apply changes (as given, option, value) in turn; an option may be "upsamplers.*.steps"."""
    for given, option, value in changes:
        for key in reversed(option.split(".")):
            value = {key: value}
        try:
            options = update_options(options, value, given)
        except ValueError as error:  # with one line for each upsampler
            raise ValueError(str(error).partition("\n")[0]) from None
    return options


def _merge(values: Any, changes: Any, where: str) -> Any:
    if isinstance(values, list) and isinstance(changes, list) and len(values) == len(changes):
        return [_merge(*pair, where) for pair in zip(values, changes, strict=True)]
    if not isinstance(values, dict | list) or not isinstance(changes, dict):
        return changes
    if isinstance(values, dict):
        changes = _matching_steps(values, changes)
        return values | {k: _merge(values.get(k), change, where) for k, change in changes.items()}
    merged: Any = [*values]
    for name, change in changes.items():
        for i in range(len(merged)) if name == "*" else [find_key(merged, str(name), where)]:
            merged[i] = _merge(merged[i], change, where)
    return merged


def _matching_steps(stage: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Add the change of a stage's timesteps to that of its steps, or the reverse."""
    if "timesteps" not in stage or "steps" in changes and "timesteps" in changes:
        return changes
    if changes.get("steps", stage["steps"]) != stage["steps"]:
        return changes | {"timesteps": None}
    if isinstance(ts := changes.get("timesteps"), list):
        return changes | {"steps": len(ts)}
    return changes


def stages_of(options: Any) -> dict[str, StageOptions]:
    """Return the options of each diffusion stage of a model, by the names of `Progress.stage`."""
    own = {name: vars(options)[name] for name in ("prior", "decoder") if name in vars(options)}
    upsamplers = enumerate(getattr(options, "upsamplers", ()))
    return own | {f"upsampler_{i}": stage for i, stage in upsamplers}


def image_steps(options: UnCLIPOptions | GLIDEOptions) -> list[int]:
    """Return the sampling steps of the decoder and of each upsampler."""
    return [stage.steps for stage in (options.decoder, *options.upsamplers)]


@dataclass(frozen=True)
class Progress:
    """State passed to `on_step` after every sampling step."""

    stage: str  # "prior", "decoder", "inpainter", "upsampler_0", ...; "dalle"
    step: int  # 1 .. num_steps
    num_steps: int
    # The preview, or a function that computes it on first access.
    source: torch.Tensor | Callable[[], torch.Tensor] | None = None
    # Indices of images of the batch that are no longer wanted. `on_step` may add some; to stop all,
    # raise an exception. Networks skip dropped images, and their pixels are undefined.
    dropped: set[int] = field(default_factory=set)

    @cached_property
    def preview(self) -> torch.Tensor | None:
        """The current estimate of x_0, (B, 3, s, s) in [-1, 1]; None in the prior."""
        return self.source() if callable(self.source) else self.source


@dataclass(frozen=True, repr=False)
class GenerationResult:
    """Generated images with everything needed to generate them again.

    `result[0]`, slices and iteration give results of one image or some; notebooks show the images.
    """

    images: list[Image.Image]
    seeds: list[int | None]  # one per image; None where nothing is random
    prompts: list[str | None]  # one per image; None for variations
    image_emb: torch.Tensor | None = None  # (N, D) CLIP image embeddings given to the decoder
    metadata: list[dict[str, Any]] = field(default_factory=list)  # one per image, for its PNG
    codes: torch.Tensor | None = None  # (N, h, w) image codes given to a codec's decoder
    # CLIP cosine similarity of image and prompt, where candidates were compared
    scores: list[float] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice) -> GenerationResult:
        rows = range(len(self))[index]
        return self.pick([rows] if isinstance(rows, int) else rows)

    def __iter__(self) -> Iterator[GenerationResult]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        sizes = " ".join(sorted({f"{image.width}x{image.height}" for image in self.images}))
        count = f"{len(self)} image{'s' * (len(self) != 1)}"
        return f"<GenerationResult: {count} {sizes}, seeds {self.seeds}, prompts {self._texts()}>"

    def _texts(self) -> list[str]:
        """Return the distinct prompts, shortened."""
        texts = dict.fromkeys(prompt for prompt in self.prompts if prompt is not None)
        return [text if len(text) <= 40 else f"{text[:39]}…" for text in texts][:8]

    def save(self, path: str | Path) -> list[Path]:
        """Write the images with their metadata and return the files.

        path: a .png, .jpg or .webp file for one image, or a folder, whose files are named after
        prompt and seed. A new folder cannot have a suffix of letters, as in "a.bmp". PIL's
        `result.images[0].save` writes no metadata.
        """
        from unclip.image_io import WRITTEN, image_name, save_image

        path, metadata = Path(path), self.metadata or [{}] * len(self)
        if path.suffix.lower() in WRITTEN:
            if len(self) != 1:
                raise ValueError(f"{path} is one file for {len(self)} images; give a folder")
            files = [path]
        else:
            check_image_folder(path)
            rows = enumerate(zip(self.prompts, self.seeds, strict=True))
            names = [
                image_name(prompt or "image", i if s is None else s) for i, (prompt, s) in rows
            ]
            numbered = [f"{name}-{i}" for i, name in enumerate(names)]
            mixed = [n if names.count(n) == 1 else numbered[i] for i, n in enumerate(names)]
            # A number may look like a seed: "a" with 1, twice, and "a 1" with 1.
            distinct = mixed if len({*mixed}) == len(mixed) else numbered
            files = [path / f"{name}.png" for name in distinct]
        for image, file, entry in zip(self.images, files, metadata, strict=True):
            save_image(image, file, entry or None)
        return files

    def _repr_png_(self) -> bytes | None:
        """Return one image, for notebooks."""
        from unclip.image_io import encode_image

        if len(self) != 1:
            return None
        return encode_image(self.images[0], metadata=self.metadata[0] if self.metadata else None)

    def _repr_html_(self) -> str:
        """Return the images with their prompts and seeds, for notebooks."""
        from unclip.image_io import figure

        captions = [
            " · ".join(str(part) for part in (prompt, seed) if part is not None)
            for prompt, seed in zip(self.prompts, self.seeds, strict=True)
        ]
        return "".join(map(figure, self.images, captions))

    def pick(self, rows: Sequence[int]) -> GenerationResult:
        """Select images, in the order of `rows`."""

        def some(column: Any) -> Any:
            if isinstance(column, list):
                return [column[row] for row in rows] if column else []  # metadata may be left out
            return None if column is None else column[list(rows)]

        return GenerationResult(**{f.name: some(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def cat(parts: Sequence[GenerationResult]) -> GenerationResult:
        """Concatenate results of the same kind. A column that one of them lacks is left out."""
        import torch

        def joined(name: str) -> Any:
            columns = [getattr(part, name) for part in parts]
            if any(column is None for column in columns):
                return None
            if not isinstance(columns[0], list):
                return torch.cat(columns)
            if any(len(part) and not column for part, column in zip(parts, columns, strict=True)):
                return []  # metadata may be left out
            return [entry for column in columns for entry in column]

        return GenerationResult(**{f.name: joined(f.name) for f in fields(GenerationResult)})


OnStep = Callable[[Progress], None]


class BatchReporter:
    """An `on_step` for all stages of one batch, which share the images that it drops."""

    def __init__(self, on_step: OnStep, num_images: int) -> None:
        self.on_step, self.num_images = on_step, num_images
        self.dropped: set[int] = set()

    def __call__(self, progress: Progress) -> None:
        self.on_step(replace(progress, dropped=self.dropped))

    def kept(self) -> list[int]:
        """Return the indices of the images that are still wanted."""
        return [i for i in range(self.num_images) if i not in self.dropped]


Prompt = str | Sequence[str]

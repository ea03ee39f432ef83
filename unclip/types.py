"""The values that pass between the stages: what was said, how to sample, what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:  # importing `unclip` must stay cheap
    import torch
    from PIL import Image

# B batch, L text tokens, W text width, D CLIP embedding width

LARGEST = 1e6  # number in options, lest what it is multiplied with overflow
R = TypeVar("R", bound="Rows")


class Rows:
    """Tensors that belong together, each with a row for each of a batch."""

    def _map(self: R, f: Callable[[torch.Tensor], torch.Tensor]) -> R:
        """The same of all tensors changed by f."""
        raise NotImplementedError

    def __getitem__(self: R, rows: slice | torch.Tensor) -> R:
        """Some of the rows; `rows` is a slice or an index or mask tensor."""
        return self._map(lambda x: x[rows])

    def repeat_interleave(self: R, n: int) -> R:
        """Each row n times in a row: (B, ...) -> (B * n, ...)."""
        return self._map(lambda x: x.repeat_interleave(n, dim=0))

    def clone(self: R) -> R:
        """A copy of every part."""
        return self._map(lambda x: x.clone())


@dataclass(frozen=True)
class TextEncoding(Rows):
    """What CLIP's text tower says about B captions."""

    emb: torch.Tensor  # (B, D) projected, not normalised
    states: torch.Tensor  # (B, L, W) after the final LayerNorm
    mask: torch.Tensor  # (B, L) bool, True = a real token
    ids: torch.Tensor | None = (
        None  # (B, L) token ids, for a decoder with a text transformer of its own
    )

    def __len__(self) -> int:
        return self.emb.shape[0]

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> TextEncoding:
        return TextEncoding(
            f(self.emb), f(self.states), f(self.mask), None if self.ids is None else f(self.ids)
        )

    def trim(self) -> TextEncoding:
        """Without the columns that are padding in every row; networks that heed the mask answer the same, sooner."""
        length = max([1, *(self.mask.any(0).nonzero().flatten() + 1).tolist()])
        return self._map(lambda x: x if x is self.emb else x[:, :length])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> TextEncoding:
        """Moved to `device`; floating-point parts cast to `dtype`, mask and ids kept."""
        return self._map(
            lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
        )


@dataclass(frozen=True)
class StageOptions:
    """How one diffusion stage is sampled."""

    steps: int
    guidance: float = (
        1.0  # scale of classifier-free guidance; 1 = none, and no second half is computed
    )
    sampler: Any = (
        "ddim"  # "ancestral" | "ddim" | "dpm++" | "unipc", or a diffusers scheduler object
    )
    eta: float = 0.0  # DDIM only: 0 deterministic, 1 ancestral
    guidance_interval: tuple[float, float] = (
        0.0,
        1.0,
    )  # guide only where t / T lies in it (2404.07724)
    guidance_rescale: float = 0.0  # 2305.08891
    dynamic_threshold: float | None = (
        None  # percentile in (0, 1] for x_0 (Imagen 2.3); None = static clipping
    )
    temperature: float = (
        1.0  # autoregressive prior only: of the codes' logits; 0 = always the likeliest code
    )
    reuse: int = 1  # compute deep levels at every n-th step only (DeepCache, 2312.00858; approximate); 1 = all

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; a stage needs at least 1")
        _check_numbers(self, "guidance", "eta", "guidance_rescale", "temperature")
        low, high = self.guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"guidance_interval is {self.guidance_interval}; expected 0 <= low <= high <= 1"
            )
        if self.dynamic_threshold is not None and not 0.0 < self.dynamic_threshold <= 1.0:
            raise ValueError(
                f"dynamic_threshold is {self.dynamic_threshold}; expected a fraction in (0, 1]"
            )
        if self.temperature < 0:
            raise ValueError(
                f"temperature is {self.temperature}; expected 0 (the likeliest code) or more"
            )
        if self.reuse < 1:
            raise ValueError(
                f"reuse is {self.reuse}; expected 1 (compute everything at every step) or more"
            )


@dataclass(frozen=True)
class CodeOptions:
    """How an autoregressive model draws one image code after the other."""

    temperature: float = 1.0  # that the logits are divided by; 0 = always the likeliest code
    top_k: int | None = None  # draw among this many of the likeliest codes; None = all
    top_p: float = 1.0  # draw among the fewest codes that together have this probability
    guidance: float = (
        1.0  # scale of classifier-free guidance; 1 = none, and no second half is computed
    )

    def __post_init__(self) -> None:
        _check_numbers(self, "guidance", "temperature")
        if self.temperature < 0:
            raise ValueError(
                f"temperature is {self.temperature}; expected 0 (the likeliest code) or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected a number of codes, at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; expected a probability in (0, 1]")


@dataclass(frozen=True)
class UnCLIPOptions:
    """How the whole stack is sampled: one `StageOptions` for each stage, never one flag for all."""

    prior: StageOptions = field(default_factory=lambda: StageOptions(steps=25, guidance=4.0))
    decoder: StageOptions = field(default_factory=lambda: StageOptions(steps=25, guidance=4.0))
    upsamplers: tuple[StageOptions, ...] = field(default_factory=lambda: (StageOptions(steps=7),))
    prior_candidates: int = (
        2  # unCLIP 2.2: draw 2, keep the one with the higher dot product with the text embedding
    )
    # What the decoder gets as image embedding: the prior's, or (unCLIP 5.1) the caption's own one, or none.
    embedding: Literal["prior", "text", "none"] = "prior"

    def __post_init__(self) -> None:
        if self.embedding not in ("prior", "text", "none"):
            raise ValueError(f"embedding is {self.embedding!r}; expected 'prior', 'text' or 'none'")


@dataclass(frozen=True)
class GLIDEOptions:
    """How GLIDE is sampled (2112.10741); only the first stage is guided in its own code."""

    decoder: StageOptions = field(
        default_factory=lambda: StageOptions(steps=100, guidance=3.0, sampler="ancestral")
    )
    upsamplers: tuple[StageOptions, ...] = field(default_factory=lambda: (StageOptions(steps=27),))


@dataclass(frozen=True)
class Progress:
    """Given to `on_step` after every sampling step."""

    stage: str  # "prior", "decoder", "inpainter", "upsampler_0", ...; "dalle"
    step: int  # 1 .. num_steps
    num_steps: int
    preview: torch.Tensor | None = (
        None  # (B, 3, s, s) in [-1, 1]: the current estimate of x_0; None in the prior
    )


@dataclass(frozen=True)
class GenerationResult:
    """Pictures and all that it takes to draw them again."""

    images: list[Image.Image]
    seeds: list[int | None]  # seed of each picture; None where nothing was left to chance
    prompts: list[str | None]  # prompt of each picture; None for variations
    image_emb: torch.Tensor | None = None  # (N, D) CLIP image embeddings the decoder was given
    metadata: list[dict[str, Any]] = field(
        default_factory=list
    )  # one for each picture; goes into its PNG
    codes: torch.Tensor | None = None  # (N, h, w) that a codec's decoder was given
    scores: list[float] | None = (
        None  # cosine of picture and prompt in CLIP, where candidates were compared
    )

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, rows: Sequence[int]) -> GenerationResult:
        """Some of the pictures, in the order of `rows`."""

        def some(column: Any) -> Any:
            if isinstance(column, list):
                return [column[row] for row in rows] if column else []  # metadata may be left out
            return None if column is None else column[list(rows)]

        return GenerationResult(
            **{part.name: some(getattr(self, part.name)) for part in fields(self)}
        )

    @staticmethod
    def cat(parts: Sequence[GenerationResult]) -> GenerationResult:
        """The pictures of several results of one kind, one after the other."""
        import torch

        def joined(columns: list[Any]) -> Any:
            if isinstance(columns[0], list):
                return [entry for column in columns for entry in column]
            return None if columns[0] is None else torch.cat(columns)

        names = [part.name for part in fields(GenerationResult)]
        return GenerationResult(
            **{name: joined([getattr(result, name) for result in parts]) for name in names}
        )


def _check_numbers(options: StageOptions | CodeOptions, *names: str) -> None:
    """ValueError if one of them is not finite, or so large that sampling would overflow."""
    for name in names:
        if not abs(value := getattr(options, name)) <= LARGEST:
            raise ValueError(f"{name} is {value}; expected a number of at most {LARGEST:g} in size")


OnStep = Callable[[Progress], None]
Prompt = str | Sequence[str]

"""The two-part latent of an image (unCLIP 3): its CLIP embedding, and the noise for the rest."""

# B images, D CLIP embedding width, s side of the decoder's images, S of an upsampler's

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.config import parse, to_dict
from unclip.embeddings import slerp
from unclip.files import open_safetensors, parse_json
from unclip.pipelines.request import check_count
from unclip.types import StageOptions, UnCLIPOptions
from unclip.weights import read_tensors, save_tensors

METADATA_KEY = "unclip_latent"  # of the safetensors file


@dataclass(frozen=True, repr=False)
class Latent:
    """The latents of B images, on the CPU in float32."""

    image_emb: Tensor  # (B, D) z_i
    noise: tuple[Tensor, ...]  # x_T of the decoder (B, 3, s, s), then of each upsampler
    options: UnCLIPOptions  # of the inversion
    sources: tuple[dict[str, Any], ...] = ()  # the source of each image, as JSON types

    def __post_init__(self) -> None:
        parts = [self.image_emb, *self.noise, *([self.sources] if self.sources else [])]
        if len(lengths := {len(part) for part in parts}) != 1:
            raise ValueError(
                f"parts of a latent have {sorted(lengths)} images; expected equal numbers"
            )

    def __len__(self) -> int:
        return len(self.image_emb)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{x.shape[-1]}x{x.shape[-2]}" for x in self.noise)
        count = f"{len(self)} image{'s' * (len(self) != 1)}"
        return f"<Latent: {count}, embedding of {self.image_emb.shape[-1]}, noise {sizes}>"

    def __getitem__(self, rows: int | np.integer | slice | Sequence[int]) -> Latent:
        """Select images, also repeatedly."""
        if isinstance(rows, int | np.integer):
            rows = [int(rows)]
        rows = list(range(len(self))[rows] if isinstance(rows, slice) else rows)
        return replace(
            self,
            image_emb=self.image_emb[rows],
            noise=tuple(x[rows] for x in self.noise),
            sources=tuple(self.sources[row] for row in rows) if self.sources else (),
        )

    def repeat_interleave(self, n: int) -> Latent:
        """Repeat each image n times."""
        return self[[row for row in range(len(self)) for _ in range(n)]]

    @classmethod
    def cat(cls, parts: Sequence[Latent]) -> Latent:
        """Concatenate latents. ValueError if their options differ."""
        options = parts[0].options
        if any(part.options != options for part in parts):
            raise ValueError("latents have different options; invert all images with the same ones")
        stages = zip(*(part.noise for part in parts), strict=True)
        return cls(
            torch.cat([part.image_emb for part in parts]),
            tuple(torch.cat(noise) for noise in stages),
            options,
            tuple(source for part in parts for source in part.sources),
        )

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, and its folder if it does not exist."""
        noise = {f"noise_{i}": x for i, x in enumerate(self.noise)}
        header = {"options": to_dict(self.options), "sources": list(self.sources)}
        tensors = {"image_emb": self.image_emb, **noise}
        save_tensors(tensors, file, {METADATA_KEY: json.dumps(header)})

    @classmethod
    def load(cls, file: str | Path) -> Latent:
        """Read a file written by `save`. ValueError if it contains anything else."""
        tensors = read_tensors(file)
        header = (open_safetensors(file).metadata() or {}).get(METADATA_KEY)
        names = [f"noise_{i}" for i in range(len(tensors) - 1)]
        if header is None or tensors.keys() != {"image_emb", *names}:
            expected = "a file of Latent.save or `unclip reconstruct --save-latent`"
            raise ValueError(f"{file} is not a saved latent; expected {expected}")
        try:
            header = parse_json(header)
            options, sources = header["options"], tuple(header["sources"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file}: damaged metadata; save the latent again") from None
        options = parse(UnCLIPOptions, options, f"options in {file}")
        return cls(tensors["image_emb"], tuple(tensors[name] for name in names), options, sources)


def deterministic(options: UnCLIPOptions, steps: int = 50) -> UnCLIPOptions:
    """Return invertible options: DDIM without noise, at least `steps` steps in the decoder."""

    def invertible(stage: StageOptions, steps: int) -> StageOptions:
        steps = max(steps, stage.steps)
        return stage.with_steps(steps, sampler="ddim", eta=0.0, cache_interval=1)

    upsamplers = tuple(invertible(stage, 1) for stage in options.upsamplers)
    return replace(options, decoder=invertible(options.decoder, steps), upsamplers=upsamplers)


def check_invertible(options: UnCLIPOptions) -> None:
    """Raise ValueError unless decoder and upsamplers use DDIM without noise and caching."""
    stages = {"decoder": options.decoder}
    stages |= {f"upsampler {i}": stage for i, stage in enumerate(options.upsamplers)}
    for name, stage in stages.items():
        if stage.sampler != "ddim" or stage.eta != 0 or stage.cache_interval != 1:
            kind = stage.sampler if isinstance(stage.sampler, str) else type(stage.sampler).__name__
            raise ValueError(
                f"the {name} has sampler {kind!r}, eta {stage.eta} and cache_interval "
                f"{stage.cache_interval}; expected 'ddim', 0 and 1 for inversion; set these, or "
                f"call without options"
            )


def as_floats(values: Any) -> np.ndarray:
    """Convert numbers to an array of float64; NaN, of shape (), for anything else."""
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return np.array(np.nan)


def path_positions(frames: int | Sequence[float] | np.ndarray) -> list[float]:
    """Return positions in [0, 1]: the given ones, or a number of them, evenly from 0 to 1."""
    if isinstance(frames, Sequence | np.ndarray):
        positions = as_floats(frames)
        valid = positions.ndim == 1 and positions.size > 0
        if not valid or not all(0.0 <= position <= 1.0 for position in positions):
            raise ValueError(
                f"frames is {frames!r}; expected positions on the path, each in [0, 1]"
            )
        return positions.tolist()
    check_count("frames", frames)
    if frames < 2:
        raise ValueError("frames is 1; expected at least 2, for the ends of the path")
    return [k / (frames - 1) for k in range(frames)]


def check_path(count: int) -> None:
    """Raise ValueError for a path of fewer than two images or prompts."""
    if count < 2:
        raise ValueError(f"a path needs at least 2 images or prompts; got {count}")


def along(path: Latent, positions: Sequence[float]) -> Latent:
    """Return points on the path through the images of a latent: 0 is the first, 1 the last.

    Each segment is a great circle (unCLIP 3.2); at an image, the point is exactly its latent.
    """
    segments = max(1, len(path) - 1)
    before = [min(int(position * segments), segments - 1) for position in positions]
    after = [min(i + 1, len(path) - 1) for i in before]
    t = torch.tensor(
        [position * segments - i for position, i in zip(positions, before, strict=True)]
    )

    def between(x: Tensor) -> Tensor:
        a, b = x[before].flatten(1), x[after].flatten(1)
        arc, ends = slerp(a, b, t), t[:, None]
        return torch.where(ends <= 0, a, torch.where(ends >= 1, b, arc)).view(-1, *x.shape[1:])

    noise = tuple(map(between, path.noise))
    return replace(path, image_emb=between(path.image_emb), noise=noise, sources=())

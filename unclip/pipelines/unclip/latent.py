"""The two-part latent of a picture (unCLIP 3): what CLIP sees in it, and the noise that all the rest comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unclip.config import parse, to_dict
from unclip.embeddings import slerp
from unclip.pipelines.base import check_count, with_named_sampler
from unclip.types import StageOptions, UnCLIPOptions
from unclip.weights import read_tensors, save_tensors

# B pictures, D CLIP embedding width, s side of the decoder's pictures, S of an upsampler's

METADATA_KEY = "unclip_latent"  # of the safetensors file


@dataclass(frozen=True)
class Latent:
    """The latents of B pictures, on the CPU in float32."""

    image_emb: Tensor  # (B, D) z_i
    noise: tuple[
        Tensor, ...
    ]  # x_T of the decoder (B, 3, s, s), then of each upsampler (B, 3, S, S)
    options: UnCLIPOptions  # under which the noise belongs to the pictures
    sources: tuple[dict[str, Any], ...] = field(
        default=()
    )  # of each picture: what it was made of, as JSON types

    def __post_init__(self) -> None:
        lengths = {
            len(x) for x in (self.image_emb, *self.noise, *([self.sources] if self.sources else []))
        }
        if len(lengths) != 1:
            raise ValueError(
                f"the parts of a latent are of {sorted(lengths)} pictures; expected one number"
            )

    def __len__(self) -> int:
        return len(self.image_emb)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Latent:
        """One of the pictures, some of them, or the same one several times."""
        rows = (
            [rows]
            if isinstance(rows, int)
            else list(range(len(self))[rows] if isinstance(rows, slice) else rows)
        )
        sources = tuple(self.sources[row] for row in rows) if self.sources else ()
        return replace(
            self,
            image_emb=self.image_emb[rows],
            noise=tuple(x[rows] for x in self.noise),
            sources=sources,
        )

    def repeat_interleave(self, n: int) -> Latent:
        """Each picture n times in a row."""
        return self[[row for row in range(len(self)) for _ in range(n)]]

    @classmethod
    def cat(cls, parts: Sequence[Latent]) -> Latent:
        """The pictures of several latents, one after the other; ValueError if their options differ."""
        if any(part.options != parts[0].options for part in parts):
            raise ValueError(
                "the latents were made under different options; invert all pictures under the same ones"
            )
        sources = tuple(source for part in parts for source in part.sources)
        noise = tuple(
            torch.cat(of_stage) for of_stage in zip(*(part.noise for part in parts), strict=True)
        )
        return cls(torch.cat([part.image_emb for part in parts]), noise, parts[0].options, sources)

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file; the folder it goes into is made."""
        tensors = {
            "image_emb": self.image_emb,
            **{f"noise_{i}": x for i, x in enumerate(self.noise)},
        }
        told = {"options": to_dict(self.options), "sources": list(self.sources)}
        save_tensors(tensors, file, {METADATA_KEY: json.dumps(told)})

    @classmethod
    def load(cls, file: str | Path) -> Latent:
        """What `save` wrote; ValueError if the file holds anything else."""
        tensors = read_tensors(file)
        with safe_open(file, "pt") as opened:
            told = (opened.metadata() or {}).get(METADATA_KEY)
        if told is None or tensors.keys() != {
            "image_emb",
            *(f"noise_{i}" for i in range(len(tensors) - 1)),
        }:
            raise ValueError(
                f"{file} is no saved latent; expected what `unclip reconstruct --save-latent` writes"
            )
        told = json.loads(told)
        options = parse(UnCLIPOptions, told["options"], f"options in {file}")
        noise = tuple(tensors[f"noise_{i}"] for i in range(len(tensors) - 1))
        return cls(tensors["image_emb"], noise, options, tuple(told["sources"]))


def deterministic(options: UnCLIPOptions, steps: int = 50) -> UnCLIPOptions:
    """`options` with what can be inverted: DDIM without noise, at least `steps` steps in the decoder."""

    def plain(stage: StageOptions, steps: int) -> StageOptions:
        return replace(stage, sampler="ddim", eta=0.0, cache_interval=1, steps=max(steps, stage.steps))

    upsamplers = tuple(plain(stage, 1) for stage in options.upsamplers)
    return replace(options, decoder=plain(options.decoder, steps), upsamplers=upsamplers)


def check_invertible(options: UnCLIPOptions) -> None:
    """ValueError unless decoder and upsamplers are sampled by DDIM, without noise and whole."""
    for name, stage in (
        ("decoder", options.decoder),
        *((f"upsampler {i}", o) for i, o in enumerate(options.upsamplers)),
    ):
        if stage.sampler != "ddim" or stage.eta != 0 or stage.cache_interval != 1:
            sampler = with_named_sampler(stage).sampler
            raise ValueError(
                f"the {name} is sampled with {sampler!r}, eta {stage.eta} and cache_interval {stage.cache_interval}; only 'ddim', "
                f"0 and 1 can be inverted: deterministic(options) in unclip.pipelines.unclip.latent sets them"
            )


def places_on_path(frames: int | Sequence[float]) -> list[float]:
    """So many places, evenly from 0 to 1, or those that are given; ValueError if these are others."""
    if isinstance(frames, Sequence):
        if not frames or not all(0.0 <= place <= 1.0 for place in frames):
            raise ValueError(f"frames is {frames}; expected places on the path, each from 0 to 1")
        return [float(place) for place in frames]
    check_count("frames", frames)
    if frames < 2:
        raise ValueError("frames is 1; a path shows at least its two ends")
    return [k / (frames - 1) for k in range(frames)]


def check_path(count: int) -> None:
    """ValueError unless a path leads through so many pictures or prompts."""
    if count < 2:
        raise ValueError(f"a path leads through at least 2 pictures or prompts; got {count}")


def along(path: Latent, fractions: Sequence[float]) -> Latent:
    """Points on the path through all pictures of a latent: 0 is the first, 1 the last, evenly between.

    Each part runs along great circles (unCLIP 3.2); where a fraction meets a picture, the point is its latent.
    """
    segments = max(1, len(path) - 1)
    places = [min(int(fraction * segments), segments - 1) for fraction in fractions]
    within = torch.tensor(
        [fraction * segments - place for fraction, place in zip(fractions, places, strict=True)]
    )
    after = [min(place + 1, len(path) - 1) for place in places]

    def between(x: Tensor) -> Tensor:
        a, b = x[places].flatten(1), x[after].flatten(1)
        arc = slerp(a, b, within)
        ends = within[:, None]
        return torch.where(ends <= 0, a, torch.where(ends >= 1, b, arc)).view(-1, *x.shape[1:])

    return replace(
        path, image_emb=between(path.image_emb), noise=tuple(map(between, path.noise)), sources=()
    )

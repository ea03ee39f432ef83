"""Text or image -> pictures (unCLIP, 2204.06125)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip import __version__
from unclip.checkpoints.store import Bundle, load_bundle, save_bundle
from unclip.clip import CLIP
from unclip.config import to_dict
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.pipelines.base import (
    Picture,
    check_count,
    check_prompts,
    encode_array,
    generators_from,
    progress_bar,
    seeds_from,
    to_pil,
)
from unclip.pipelines.stages import UnCLIPStages
from unclip.types import GenerationResult, OnStep, Prompt, StageOptions, UnCLIPOptions

# P prompts, N images of each, D embedding width


class UnCLIPPipeline(UnCLIPStages):
    """The whole stack as one `TextToImage`; its stages stay callable alone."""

    kind = "unclip"

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
        options: UnCLIPOptions | None = None,
        *,
        schedules: Mapping[str, ScheduleConfig] | None = None,
        name: str = "unnamed",
        licence: str = "",
        source: str | None = None,
    ) -> None:
        """schedules: see `UnCLIPStages`. source: what `unclip.load` was given, for the pictures' metadata."""
        super().__init__(clip, prior, decoder, upsamplers, options, schedules=schedules)
        self.name, self.licence, self.source = name, licence, source or name
        self._check_upsampling(self.options.upsamplers)

    @classmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None) -> UnCLIPPipeline:
        """A pipeline of what a checkpoint holds."""
        if bundle.kind != cls.kind:
            raise ValueError(f"{bundle.name} is a model of kind {bundle.kind!r}; expected {cls.kind!r}")
        if missing := {"clip", "decoder"} - bundle.components.keys():
            raise ValueError(f"{bundle.name} has no {' and no '.join(sorted(missing))}")
        ups = sorted((name for name in bundle.components if name.startswith("upsampler_")), key=lambda n: int(n[10:]))
        return cls(
            bundle.components["clip"],
            bundle.components.get("prior"),
            bundle.components["decoder"],
            [bundle.components[name] for name in ups],
            bundle.options,
            schedules=bundle.schedules,
            name=bundle.name,
            licence=bundle.licence,
            source=source,
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> UnCLIPPipeline:
        """A folder that `save_pretrained` wrote; `unclip.load` also knows names and Hub ids."""
        return cls.from_bundle(load_bundle(folder, dtype), source=str(folder)).to(device, dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder, weights in `dtype` if given; the folder that was there is replaced only at the end."""
        for stage in (self.options.prior, self.options.decoder, *self.options.upsamplers):
            if not isinstance(stage.sampler, str):
                raise ValueError(f"options hold a {type(stage.sampler).__name__}; only samplers with a name are saved")
        bundle = Bundle(
            kind=self.kind,
            components={"clip": self.clip, **self.networks()},
            schedules={stage: schedule.config for stage, schedule in self.schedules.items()},
            options=self.options,
            name=self.name,
            licence=self.licence,
        )
        save_bundle(bundle, folder, dtype)

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws `num_images` pictures of each prompt; picture k has the seed `seed` + k (random if None).

        on_step is called after every step of every batch of at most `batch_size` pictures.
        """
        prompts = check_prompts(prompt)
        self._need_prior()
        return self._draw(prompts, None, num_images, seed, options, on_step, batch_size, progress)

    def variations(
        self,
        image: Picture | Sequence[Picture] | None = None,
        *,
        image_emb: Tensor | None = None,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws pictures that mean what an image (or several, or CLIP embeddings (N, D)) means, without a text."""
        if (image is None) == (image_emb is None):
            raise ValueError("give either an image or image_emb, one of the two")
        if image_emb is None:
            image_emb = self.encode_image(image)
        if image_emb.ndim != 2 or image_emb.shape[1] != self.clip.emb_dim or not len(image_emb):
            raise ValueError(f"image_emb is of shape {tuple(image_emb.shape)}; expected (N, {self.clip.emb_dim})")
        given = image_emb.to(self.device, torch.float32)
        return self._draw([None] * len(given), given, num_images, seed, options, on_step, batch_size, progress)

    def _draw(
        self,
        prompts: Sequence[str | None],
        given: Tensor | None,
        num_images: int,
        seed: int | None,
        options: UnCLIPOptions | None,
        on_step: OnStep | None,
        batch_size: int,
        progress: bool,
    ) -> GenerationResult:
        """Pictures of prompts through the prior, or of the embeddings `given` (one for each prompt, which is None)."""
        check_count("num_images", num_images)
        check_count("batch_size", batch_size)
        options = options or self.options
        if not isinstance(options, UnCLIPOptions):
            raise ValueError(f"options is a {type(options).__name__}; expected UnCLIPOptions, such as pipe.options")
        self._check_upsampling(options.upsamplers)
        check_count("prior_candidates", options.prior_candidates)
        seeds = seeds_from(seed, len(prompts) * num_images)
        batches = list(_batches(len(prompts), num_images, batch_size))
        stages = [options.decoder, *options.upsamplers, *([options.prior] if given is None else [])]
        images, embs = [], []
        with (
            torch.inference_mode(),
            progress_bar(len(batches) * sum(stage.steps for stage in stages), progress, on_step) as report,
        ):
            for rows, n in batches:
                done = len(images)
                generators = generators_from(seeds[done : done + n * len(prompts[rows])])
                drawing = {"generators": generators, "on_step": report}
                if given is None:
                    text = self.encode_text(prompts[rows])
                    candidates = options.prior_candidates
                    emb = self.sample_prior(text, num_images=n, options=options.prior, candidates=candidates, **drawing)
                    text = text.repeat_interleave(n)
                else:
                    emb, text = given[rows].repeat_interleave(n, dim=0), None
                x = self.decode(emb, text, options=options.decoder, **drawing)
                images += to_pil(self.upsample(x, options=options.upsamplers, **drawing))
                embs.append(emb.cpu())
        image_emb = torch.cat(embs)  # outside of inference mode: the caller may compute with it
        told = [prompt for prompt in prompts for _ in range(num_images)]
        return GenerationResult(images, seeds, told, image_emb, self._metadata(told, seeds, image_emb, options))

    def _metadata(
        self, prompts: Sequence[str | None], seeds: Sequence[int], image_emb: Tensor, options: UnCLIPOptions
    ) -> list[dict[str, Any]]:
        shared = {
            "model": self.source,
            "dtype": str(self.dtype).removeprefix("torch."),
            "version": __version__,
            "options": _plain(options),
        }
        what = [
            {"image_emb": encode_array(emb)} if prompt is None else {"prompt": prompt}
            for prompt, emb in zip(prompts, image_emb, strict=True)
        ]
        return [{**made_of, "seed": seed, **shared} for made_of, seed in zip(what, seeds, strict=True)]


def _plain(options: UnCLIPOptions) -> dict[str, Any]:
    """Options as JSON types; a scheduler object is told by its class, from which it can't be made again."""

    def plain(stage: StageOptions) -> StageOptions:
        return stage if isinstance(stage.sampler, str) else replace(stage, sampler=type(stage.sampler).__name__)

    upsamplers = tuple(map(plain, options.upsamplers))
    return to_dict(replace(options, prior=plain(options.prior), decoder=plain(options.decoder), upsamplers=upsamplers))


def _batches(num_prompts: int, num_images: int, batch_size: int) -> Iterator[tuple[slice, int]]:
    """(some prompts, pictures for each) of at most batch_size pictures, in the order of their seeds."""
    if num_images <= batch_size:
        at_once = batch_size // num_images
        yield from ((slice(i, i + at_once), num_images) for i in range(0, num_prompts, at_once))
    else:
        for i in range(num_prompts):
            yield from ((slice(i, i + 1), min(batch_size, num_images - k)) for k in range(0, num_images, batch_size))

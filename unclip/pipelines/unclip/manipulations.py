"""What unCLIP's section 3 does with latents: inversion, reconstruction, variations, interpolation, text diffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unclip.config import to_dict
from unclip.diffusion.inversion import InversionOptions, invert
from unclip.diffusion.samplers import randn, sample
from unclip.embeddings import normalise, text_diff, text_direction
from unclip.image_io import open_image
from unclip.pipelines.base import (
    ImageInput,
    check_count,
    check_prompts,
    generators_from,
    progress_bar,
    seeds_from,
    to_pil,
)
from unclip.pipelines.provenance import image_source, random_source
from unclip.pipelines.unclip.bound_stage import (
    UnCLIPRuns,
    batches_of,
    fit,
    to_tensor,
    unopened,
    with_named_samplers,
)
from unclip.pipelines.unclip.latent import (
    Latent,
    along,
    check_invertible,
    check_path,
    deterministic,
    places_on_path,
)
from unclip.types import GenerationResult, OnStep, Prompt, UnCLIPOptions

# B pictures, D CLIP embedding width, S size of a stage's pictures

EVEN_ROUNDS = 3  # of drawing frames where their steps seem to be even


class UnCLIPManipulations(UnCLIPRuns):
    """Takes pictures, or their latents where they have been inverted already.

    Unless options are given, those of the latent hold: for a picture, the model's own with at least 50 steps of DDIM in
    the decoder. on_step, batch_size and progress are as in a call of the pipeline.
    """

    def invert(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        options: UnCLIPOptions | None = None,
        inversion: InversionOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Latent:
        """The latents of pictures: CLIP's embeddings, and the noise by DDIM inversion under them.

        A picture is fitted to the square that the model draws, its middle kept. Each upsampler is inverted on the small
        picture that `reconstruct` will give it, so that it makes good what the stage before has lost.
        """
        options, inversion = options or deterministic(self.options), inversion or InversionOptions()
        self._check_inversion(options, batch_size)
        sizes = self._sizes(options)
        squares = [fit(open_image(image), sizes[-1]) for image in unopened(images)]  # one at a time
        batches = list(batches_of(len(squares), batch_size))
        steps = [stage.steps for stage in (options.decoder, *options.upsamplers)]
        embs: list[Tensor] = []
        noises: list[list[Tensor]] = []  # of each batch, for each stage
        with (
            torch.inference_mode(),
            self._keeping(),
            progress_bar(len(batches) * (2 * sum(steps) - steps[-1]), progress, on_step) as report,
        ):
            for rows in batches:
                image_emb, low_res, noise = self.encode_image(squares[rows]), None, []
                for i, size in enumerate(sizes):
                    run = self._run(i, options, image_emb, low_res)
                    pictures = to_tensor([fit(square, size) for square in squares[rows]]).to(
                        self.device
                    )
                    on_sample = run.reporter(report)
                    x_T = invert(
                        run.estimate, pictures, run.schedule, run.timesteps, inversion, on_sample
                    )
                    if i + 1 < len(sizes):
                        drawn = sample(
                            run.estimate,
                            x_T,
                            run.schedule,
                            run.options,
                            timesteps=run.timesteps,
                            on_step=on_sample,
                        )
                        low_res = drawn.clamp(-1, 1)
                    noise.append(x_T.cpu())
                embs.append(image_emb.cpu())
                noises.append(noise)
        sources = tuple(image_source(square, inversion) for square in squares)
        return Latent(
            torch.cat(embs), tuple(map(torch.cat, zip(*noises, strict=True))), options, sources
        )

    def random_latent(
        self, image_emb: Tensor, *, seed: int | None = None, options: UnCLIPOptions | None = None
    ) -> Latent:
        """Latents of embeddings (B, D), with the noise that `variations` draws from seeds `seed`, `seed` + 1, ..."""
        options = options or deterministic(self.options)
        self._check_inversion(options)
        if image_emb.ndim != 2 or image_emb.shape[1] != self.clip.emb_dim or not len(image_emb):
            raise ValueError(
                f"image_emb is of shape {tuple(image_emb.shape)}; expected (N, {self.clip.emb_dim})"
            )
        image_emb, seeds = (
            image_emb.detach().float().cpu().clone(),
            seeds_from(seed, len(image_emb)),
        )
        generators = generators_from(seeds)
        noise = tuple(
            randn((len(seeds), 3, size, size), generators) for size in self._sizes(options)
        )
        sources = tuple(random_source(*one) for one in zip(image_emb, seeds, strict=True))
        return Latent(image_emb, noise, options, sources)

    def imagine(
        self,
        prompts: Prompt,
        *,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        progress: bool = True,
    ) -> Latent:
        """Latents of pictures that were never there: the prior's embeddings of prompts, and random noise."""
        options, prompts = options or deterministic(self.options), check_prompts(prompts)
        seeds = seeds_from(seed, len(prompts))
        with progress_bar(self.prior_steps(options.prior), progress, on_step) as report:
            image_emb = self.sample_prior(
                self.encode_text(prompts),
                generators=generators_from(seeds),
                options=options.prior,
                candidates=options.prior_candidates,
                on_step=report,
            )
        return self.random_latent(image_emb, seed=seeds[0], options=options)

    def reconstruct(
        self,
        source: ImageInput | Sequence[ImageInput] | Latent,
        *,
        options: UnCLIPOptions | None = None,
        inversion: InversionOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """The pictures that latents are of, as nearly as they hold them."""
        how = {"on_step": on_step, "batch_size": batch_size, "progress": progress}
        latent = self._latent(source, options, inversion, how)
        recipes = [{"sources": [made_of]} for made_of in latent.sources]
        return self._draw_latent("reconstruct", latent, options, recipes, **how)

    def vary(
        self,
        source: ImageInput | Sequence[ImageInput] | Latent,
        *,
        eta: float = 0.5,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        inversion: InversionOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Variations of pictures, `num_images` of each: more of them the larger eta is (unCLIP 3.1).

        eta: share of fresh noise in DDIM's steps, from 0 (reconstructions) to 1. Picture k has the seed `seed` + k.
        """
        _check_eta(eta)
        check_count("num_images", num_images)
        how = {"on_step": on_step, "batch_size": batch_size, "progress": progress}
        seeds = seeds_from(seed, _count(source) * num_images)
        latent = self._latent(source, options, inversion, how).repeat_interleave(num_images)
        recipes = [{"sources": [made_of], "arguments": {"eta": eta}} for made_of in latent.sources]
        return self._draw_latent("vary", latent, options, recipes, eta=eta, seeds=seeds, **how)

    def interpolate(
        self,
        path: Sequence[ImageInput] | Latent | None = None,
        *,
        prompts: Sequence[str] | None = None,
        frames: int | Sequence[float] = 9,
        even: bool = False,
        noise: Literal["slerp", "first", "random"] = "slerp",
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        inversion: InversionOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Pictures on the path through two pictures or more, or two prompts or more (unCLIP 3.2).

        frames: how many, evenly from end to end, which are the reconstructions; or their places in [0, 1]. Embeddings
        run along great circles; so does the noise, or it is throughout the first picture's, or drawn from `seed`.
        even: so many frames are put where CLIP sees equal steps between them, which takes drawing small ones first.
        """
        if (path is None) == (prompts is None):
            raise ValueError("give either pictures (or their latents) or prompts, one of the two")
        if noise not in ("slerp", "first", "random"):
            raise ValueError(f"noise is {noise!r}; expected 'slerp', 'first' or 'random'")
        if even and isinstance(frames, Sequence):
            raise ValueError(
                f"frames is {frames} with even=True, which finds the places; expected how many"
            )
        places = places_on_path(frames)
        check_path(_count(path) if prompts is None else len(check_prompts(prompts)))
        how = {"on_step": on_step, "batch_size": batch_size, "progress": progress}
        seed = seeds_from(seed, 1)[0]
        if prompts is not None:
            latent = self.imagine(
                prompts, seed=seed, options=options, on_step=on_step, progress=progress
            )
        else:
            latent = self._latent(path, options, inversion, how)
        if noise != "slerp":
            random = self.random_latent(latent.image_emb[:1], seed=seed, options=latent.options)
            throughout = latent[:1] if noise == "first" else random
            latent = replace(latent, noise=throughout.repeat_interleave(len(latent)).noise)
        if even:
            places = self._evenly_seen(latent, len(places), options, how)
        made_of = {"sources": list(latent.sources)} if latent.sources else {}
        recipes = [
            {**made_of, "arguments": {"frames": [place], "noise": noise}} for place in places
        ]
        seeds = [seed] * len(places) if noise == "random" else None
        return self._draw_latent(
            "interpolate", latent, options, recipes, places=places, seeds=seeds, **how
        )

    def text_diff(
        self,
        source: ImageInput | Sequence[ImageInput] | Latent,
        base: str,
        target: str,
        theta: float | Sequence[float] = 0.3,
        *,
        eta: float = 0.5,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        inversion: InversionOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Pictures turned from what `base` says, which may be "", to what `target` says; noise is kept (unCLIP 3.3).

        theta: how far, from 0 (the picture) to 1 (the text alone); the paper goes to 0.25 - 0.5. With several, each
        picture is drawn at each. eta: as in `vary`. At 0, as in the paper, theta 0 is the reconstruction, but the noise
        of a picture that is no longer asked for soon shows as shreds of it. The larger eta is, the more of them give
        way, and the less is theta 0 the picture itself. Picture k has the seed `seed` + k at each theta.
        """
        _check_eta(eta)
        thetas = np.asarray(theta, dtype=float).ravel().tolist()
        if not thetas or not all(0.0 <= one <= 1.0 for one in thetas):
            raise ValueError(
                f"theta is {theta}; expected a fraction of the arc from 0 to 1, or several"
            )
        base_emb, text_emb = self.encode_text([base, target]).emb.cpu()  # (D,) each
        text_direction(
            text_emb, base_emb
        )  # if there is none, that is told before anything is inverted
        seeds = (
            [one for one in seeds_from(seed, _count(source)) for _ in thetas] if eta > 0 else None
        )
        how = {"on_step": on_step, "batch_size": batch_size, "progress": progress}
        latent = self._latent(source, options, inversion, how)
        of_each = thetas * len(latent)
        latent = latent.repeat_interleave(len(thetas))
        turned = text_diff(latent.image_emb, text_emb, base_emb, torch.tensor(of_each))
        recipes = [
            {
                "sources": [made_of],
                "arguments": {"base": base, "target": target, "theta": one, "eta": eta},
            }
            for made_of, one in zip(latent.sources, of_each, strict=False)
        ]
        turned = replace(latent, image_emb=turned)
        return self._draw_latent("text_diff", turned, options, recipes, eta=eta, seeds=seeds, **how)

    def _evenly_seen(
        self, path: Latent, frames: int, options: UnCLIPOptions | None, how: dict[str, Any]
    ) -> list[float]:
        """Places on the path from 0 to 1 with equal steps between them for CLIP, as far as EVEN_ROUNDS can tell."""
        options, places = replace(options or path.options, upsamplers=()), places_on_path(frames)
        seen: dict[float, Tensor] = {}
        for _ in range(EVEN_ROUNDS):
            new = [place for place in dict.fromkeys(places) if place not in seen]
            if not new:
                break
            drawn = self._draw_latent("interpolate", path, options, [], places=new, **how)
            seen.update(zip(new, normalise(self.encode_image(drawn.images).cpu()), strict=True))
            known = sorted(seen)
            steps = torch.stack([seen[place] for place in known]).diff(dim=0).norm(dim=1)
            walked = np.concatenate([[0.0], steps.double().cumsum(dim=0).numpy()])
            if walked[-1] > 1e-4:  # else they differ by rounding alone
                places = np.interp(np.linspace(0, walked[-1], frames), walked, known).tolist()
        return places

    def _latent(
        self,
        source: ImageInput | Sequence[ImageInput] | Latent,
        options: UnCLIPOptions | None,
        inversion: InversionOptions | None,
        how: dict[str, Any],
    ) -> Latent:
        if not isinstance(source, Latent):
            return self.invert(source, options=options, inversion=inversion, **how)
        self.check_latent(source, options)
        return source

    def check_latent(self, latent: Latent, options: UnCLIPOptions | None = None) -> None:
        """ValueError unless this model can draw it under `options`, or else its own."""
        options = options or latent.options
        self._check_inversion(options)
        width, sizes = latent.image_emb.shape[-1], self._sizes(options)
        if width != self.clip.emb_dim:
            raise ValueError(
                f"the latent holds embeddings of width {width}, but the model's are {self.clip.emb_dim} wide; "
                f"give it to the model that it was made with"
            )
        if [x.shape[-1] for x in latent.noise[: len(sizes)]] != sizes:
            given = ", ".join(str(x.shape[-1]) for x in latent.noise)
            raise ValueError(
                f"the latent holds noise of {given} px, but the model draws {', '.join(map(str, sizes))} px"
            )

    def _draw_latent(
        self,
        operation: str,
        latent: Latent,
        options: UnCLIPOptions | None,
        recipes: Sequence[dict[str, Any]],
        *,
        places: Sequence[float] | None = None,
        eta: float = 0.0,
        seeds: Sequence[int] | None = None,
        on_step: OnStep | None,
        batch_size: int,
        progress: bool,
    ) -> GenerationResult:
        """Pictures of latents, or of those at some places along them. recipes: what their metadata is to tell."""
        options = options or latent.options
        self._check_inversion(options, batch_size)
        sizes = self._sizes(options)
        latent = replace(latent, noise=latent.noise[: len(sizes)])
        count = len(latent if places is None else places)
        batches = list(batches_of(count, batch_size))
        steps = sum(stage.steps for stage in (options.decoder, *options.upsamplers))
        images, embs = [], []
        with (
            torch.inference_mode(),
            self._keeping(),
            progress_bar(len(batches) * steps, progress, on_step) as report,
        ):
            for rows in batches:
                part, x = latent[rows] if places is None else along(latent, places[rows]), None
                generators = generators_from(seeds[rows]) if eta > 0 and seeds is not None else []
                for i in range(len(sizes)):
                    run, x_T = (
                        self._run(i, options, part.image_emb, x),
                        part.noise[i].to(self.device),
                    )
                    x = sample(
                        run.estimate,
                        x_T,
                        run.schedule,
                        replace(run.options, eta=eta),
                        timesteps=run.timesteps,
                        generators=generators,
                        on_step=run.reporter(report),
                    )
                    x = x.clamp(-1, 1)
                images += to_pil(x)
                embs.append(part.image_emb)
        told = seeds or [None] * count
        recipes = recipes or [{}] * count  # a latent need not know what it was made of
        if options != latent.options:
            recipes = [_told_under(latent.options, recipe) for recipe in recipes]
        metadata = [
            {"operation": operation, **recipe, "seed": seed, **self._about(options)}
            for recipe, seed in zip(recipes, told, strict=True)
        ]
        return GenerationResult(images, list(told), [None] * count, torch.cat(embs), metadata)

    def _check_inversion(self, options: UnCLIPOptions, batch_size: int = 1) -> None:
        check_count("batch_size", batch_size)
        self._check_options(options)
        check_invertible(options)


def _told_under(options: UnCLIPOptions, recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose sources tell the options of their latents, which those of the drawing are not."""
    under = to_dict(with_named_samplers(options))
    sources = [{**source, "options": under} for source in recipe.get("sources", ())]
    return {**recipe, **({"sources": sources} if sources else {})}


def _check_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; expected 0 (the picture again) to 1 (the most variation)")


def _count(source: ImageInput | Sequence[ImageInput] | Latent) -> int:
    return len(source if isinstance(source, Latent) else unopened(source))

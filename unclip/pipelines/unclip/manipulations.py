"""Manipulations of latents (unCLIP 3): inversion, variations, interpolation, text diffs.

The public functions are methods of `UnCLIPPipeline`. A source is an image, several, or latents.
Without options, those of the latent are used; for an image, the model's own with at least 50 steps
of DDIM in the decoder. on_step, batch_size and progress are as in a call of the pipeline.
"""

# B images, D CLIP embedding width, S size of a stage's images

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unclip import embeddings
from unclip.diffusion.inversion import InversionOptions
from unclip.diffusion.samplers import randn
from unclip.embeddings import normalise, text_direction
from unclip.image_io import fit, open_image, to_pil, to_tensor
from unclip.pipelines.base import options_metadata
from unclip.pipelines.provenance import image_source, random_source
from unclip.pipelines.request import (
    ImageInput,
    Images,
    Request,
    Seed,
    check_prompts,
    generators_from,
    list_images,
    progress_bar,
    seeds_from,
)
from unclip.pipelines.unclip.latent import (
    Latent,
    along,
    as_floats,
    check_invertible,
    check_path,
    deterministic,
    path_positions,
)
from unclip.pipelines.unclip.stages import StagedPipeline, bind_stage, check_stages, stage_sizes
from unclip.types import GenerationResult, OnStep, Prompt, UnCLIPOptions, image_steps

Source = Images | Latent | Sequence[Latent]

EVEN_ROUNDS = 3  # of sampling frames to find positions with even steps


def invert(
    pipe: StagedPipeline,
    images: Images,
    *,
    options: UnCLIPOptions | None = None,
    inversion: InversionOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Latent:
    """Compute latents: CLIP's embedding, and the noise by DDIM inversion with it.

    Images are cropped to the central square that the model generates. Each upsampler is inverted
    with the small image that `reconstruct` will pass to it, so that errors of that image are
    corrected.
    """
    request = Request(1, None, on_step, batch_size, progress, options)
    return _invert(pipe, images, inversion, request)


def _invert(
    pipe: StagedPipeline, images: Images, inversion: InversionOptions | None, request: Request
) -> Latent:
    options = request.options or deterministic(pipe.options)
    inversion = inversion or InversionOptions()
    _check(pipe, options)
    sizes, steps = stage_sizes(pipe, options), image_steps(options)
    squares = [fit(open_image(image), sizes[-1]) for image in list_images(images)]  # one at a time
    batches, embs = request.rows(len(squares)), []
    noises: list[list[Tensor]] = []  # of each batch, for each stage
    num_steps = len(batches) * (2 * sum(steps) - steps[-1])
    with torch.inference_mode(), request.track(num_steps) as on_step:
        for rows in batches:
            image_emb, x, noise = pipe.encode_image(squares[rows]), None, []
            for i, size in enumerate(sizes):
                stage = bind_stage(pipe, i, options, image_emb, x)
                small = [fit(square, size) for square in squares[rows]]
                x_T = stage.invert(to_tensor(small).to(pipe.runtime.device), inversion, on_step)
                if i + 1 < len(sizes):
                    x = stage.sample(x_T, on_step=on_step).clamp(-1, 1)
                noise.append(x_T.cpu())
            embs.append(image_emb.cpu())
            noises.append(noise)
    sources = tuple(image_source(square, inversion) for square in squares)
    noise = tuple(map(torch.cat, zip(*noises, strict=True)))
    return Latent(torch.cat(embs), noise, options, sources)


def random_latent(
    pipe: StagedPipeline,
    image_emb: Tensor,
    *,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
) -> Latent:
    """Combine embeddings (B, D) with the noise of seeds `seed`, `seed` + 1, ...

    Without a layout prior, it is the noise that `variations` uses for `seed`.
    """
    options = options or deterministic(pipe.options)
    _check(pipe, options)
    check_embeddings(pipe, image_emb)
    image_emb = image_emb.detach().float().cpu().clone()
    seeds = seeds_from(seed, len(image_emb))
    generators, B, sizes = generators_from(seeds), len(seeds), stage_sizes(pipe, options)
    noise = tuple(randn((B, 3, size, size), generators) for size in sizes)
    sources = tuple(random_source(*one) for one in zip(image_emb, seeds, strict=True))
    return Latent(image_emb, noise, options, sources)


def imagine(
    pipe: StagedPipeline,
    prompts: Prompt,
    *,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Latent:
    """Combine the prior's embeddings of prompts with random noise."""
    options, prompts = options or deterministic(pipe.options), check_prompts(prompts)
    seeds, stage = seeds_from(seed, len(prompts)), pipe.prior_stage
    num_steps = 0 if stage is None else stage.steps(options.prior)
    with progress_bar(num_steps, progress, on_step) as report:
        image_emb = pipe.sample_prior(
            pipe.encode_text(prompts),
            generators=generators_from(seeds),
            options=options.prior,
            candidates=options.prior_candidates,
            on_step=report,
        )
    return random_latent(pipe, image_emb, seed=seeds, options=options)


def reconstruct(
    pipe: StagedPipeline,
    source: Source,
    *,
    options: UnCLIPOptions | None = None,
    inversion: InversionOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Decode the latents of images, or given ones."""
    request = Request(1, None, on_step, batch_size, progress, options)
    latent = _latent(pipe, source, inversion, request)
    entries = [{"sources": [made_of]} for made_of in latent.sources]
    return _decode(pipe, "reconstruct", latent, entries, request)


def vary(
    pipe: StagedPipeline,
    source: Source,
    *,
    eta: float = 0.5,
    num_images: int = 1,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    inversion: InversionOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Generate `num_images` variations of each image; a larger eta changes more (unCLIP 3.1).

    eta: amount of fresh noise in DDIM's steps, from 0 (reconstructions) to 1. Image k has the seed
    `seed` + k.
    """
    request = Request(num_images, seed, on_step, batch_size, progress, options)
    _check_eta(eta)
    seeds = request.seeds(_count(source))
    latent = _latent(pipe, source, inversion, request).repeat_interleave(num_images)
    entries = [{"sources": [made_of], "arguments": {"eta": eta}} for made_of in latent.sources]
    return _decode(pipe, "vary", latent, entries, request, eta=eta, seeds=seeds)


def interpolate(
    pipe: StagedPipeline,
    path: Sequence[ImageInput] | Sequence[Latent] | Latent | None = None,
    *,
    prompts: Sequence[str] | None = None,
    frames: int | Sequence[float] | np.ndarray = 9,
    even: bool = False,
    noise: Literal["slerp", "first", "random"] = "slerp",
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    inversion: InversionOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Decode points on the path through two or more images, latents or prompts (unCLIP 3.2).

    frames: number of evenly spaced points, of which the ends are the reconstructions; or positions
    in [0, 1]. Embeddings follow great circles. noise: "slerp" = great circles too, "first" = that
    of the first image for all frames, "random" = sampled from the seed. even: choose positions with
    equal distances in CLIP's space, for which small frames are sampled first.
    """
    if (path is None) == (prompts is None):
        raise ValueError("expected either images (or their latents) or prompts, one of the two")
    if noise not in ("slerp", "first", "random"):
        raise ValueError(f"noise is {noise!r}; expected 'slerp', 'first' or 'random'")
    if even and isinstance(frames, Sequence | np.ndarray):
        raise ValueError(f"frames is {frames} with even=True; expected a number of frames")
    positions = path_positions(frames)
    (seed,) = seeds_from(seed, 1)
    request = Request(1, seed, on_step, batch_size, progress, options)
    if prompts is not None:
        check_path(len(check_prompts(prompts)))
        latent = imagine(
            pipe, prompts, seed=seed, options=options, on_step=on_step, progress=progress
        )
    else:
        assert path is not None
        check_path(_count(path))
        latent = _latent(pipe, path, inversion, request)
    if noise != "slerp":
        random = random_latent(pipe, latent.image_emb[:1], seed=seed, options=latent.options)
        constant = latent[:1] if noise == "first" else random
        latent = replace(latent, noise=constant.repeat_interleave(len(latent)).noise)
    if even:
        positions = _even_positions(pipe, latent, len(positions), request)
    sources = {"sources": list(latent.sources)} if latent.sources else {}
    entries = [{**sources, "arguments": {"frames": [one], "noise": noise}} for one in positions]
    seeds = [seed] * len(positions) if noise == "random" else None
    return _decode(pipe, "interpolate", latent, entries, request, positions=positions, seeds=seeds)


def text_diff(
    pipe: StagedPipeline,
    source: Source,
    base: str,
    target: str,
    theta: float | Sequence[float] = 0.3,
    *,
    eta: float = 0.5,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    inversion: InversionOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Rotate embeddings towards the difference of the texts `target` and `base` (unCLIP 3.3).

    base: may be "". theta: from 0 (the image) to 1 (only the difference); the paper uses 0.25 to
    0.5. With several values, each image is decoded for each of them. The noise is kept. eta: as in
    `vary`. At eta 0, as in the paper, theta 0 is the reconstruction, but remnants of the old image
    become visible as theta grows. A larger eta removes them, and makes theta 0 less exact. Image k
    has the seed `seed` + k at each theta.
    """
    request = Request(1, seed, on_step, batch_size, progress, options)
    _check_eta(eta)
    thetas = as_floats(theta).ravel().tolist()
    if not thetas or not all(0.0 <= one <= 1.0 for one in thetas):
        raise ValueError(f"theta is {theta!r}; expected fractions of the arc, each from 0 to 1")
    base_emb, text_emb = pipe.encode_text([base, target]).emb.cpu()  # (D,) each
    text_direction(text_emb, base_emb)  # ValueError if there is none, before the slow inversion
    seeds = None
    if eta > 0:
        seeds = [seed for seed in request.seeds(_count(source)) for _ in thetas]
    latent = _latent(pipe, source, inversion, request)
    each = thetas * len(latent)
    latent = latent.repeat_interleave(len(thetas))
    rotated = embeddings.text_diff(latent.image_emb, text_emb, base_emb, torch.tensor(each))
    texts = {"base": base, "target": target}
    entries = [
        {"sources": [made_of], "arguments": {**texts, "theta": one, "eta": eta}}
        for made_of, one in zip(latent.sources, each, strict=False)
    ]
    latent = replace(latent, image_emb=rotated)
    return _decode(pipe, "text_diff", latent, entries, request, eta=eta, seeds=seeds)


def check_latent(
    pipe: StagedPipeline, latent: Latent, options: UnCLIPOptions | None = None
) -> None:
    """Raise ValueError unless this model can decode the latent with options (or its own)."""
    options = options or latent.options
    _check(pipe, options)
    width, sizes = latent.image_emb.shape[-1], stage_sizes(pipe, options)
    if width != pipe.clip.emb_dim:
        expected = f"expected {pipe.clip.emb_dim}; use the model that it was made with"
        raise ValueError(f"the latent has embeddings of width {width}; {expected}")
    if [x.shape[-1] for x in latent.noise[: len(sizes)]] != sizes:
        given = ", ".join(str(x.shape[-1]) for x in latent.noise)
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"the latent has noise of {given} px; expected {expected} px")


def _even_positions(
    pipe: StagedPipeline, path: Latent, frames: int, request: Request
) -> list[float]:
    """Return positions from 0 to 1 with equal distances in CLIP's space, after EVEN_ROUNDS."""
    options, positions = request.options or path.options, path_positions(frames)
    request = replace(request, options=replace(options, upsamplers=()))
    embs: dict[float, Tensor] = {}
    for _ in range(EVEN_ROUNDS):
        new = [position for position in dict.fromkeys(positions) if position not in embs]
        if not new:
            break
        result = _decode(pipe, "interpolate", path, [], request, positions=new)
        embs |= zip(new, normalise(pipe.encode_image(result.images).cpu()), strict=True)
        known = sorted(embs)
        steps = torch.stack([embs[position] for position in known]).diff(dim=0).norm(dim=1)
        length = np.concatenate([[0.0], steps.double().cumsum(dim=0).numpy()])
        if length[-1] > 1e-4:  # otherwise the frames differ by rounding only
            positions = np.interp(np.linspace(0, length[-1], frames), length, known).tolist()
    return positions


def _latent(
    pipe: StagedPipeline,
    source: Source,
    inversion: InversionOptions | None,
    request: Request,
) -> Latent:
    latent = _joined(source)
    if not isinstance(latent, Latent):
        return _invert(pipe, latent, inversion, request)
    check_latent(pipe, latent, request.options)
    return latent


def _decode(
    pipe: StagedPipeline,
    operation: str,
    latent: Latent,
    entries: Sequence[dict[str, Any]],
    request: Request,
    *,
    positions: Sequence[float] | None = None,
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> GenerationResult:
    """Decode latents, or points at positions along them. entries: of the metadata."""
    options = request.options or latent.options
    _check(pipe, options)
    sizes = stage_sizes(pipe, options)
    latent = replace(latent, noise=latent.noise[: len(sizes)])
    count = len(latent if positions is None else positions)
    batches, images, embs = request.rows(count), [], []
    with torch.inference_mode(), request.track(len(batches) * sum(image_steps(options))) as on_step:
        for rows in batches:
            part = latent[rows] if positions is None else along(latent, positions[rows])
            generators = generators_from(seeds[rows]) if eta > 0 and seeds is not None else []
            x = None
            for i in range(len(sizes)):
                stage = bind_stage(pipe, i, options, part.image_emb, x)
                stage = replace(stage, options=replace(stage.options, eta=eta))
                x_T = part.noise[i].to(pipe.runtime.device)
                x = stage.sample(x_T, generators, on_step).clamp(-1, 1)
            assert x is not None
            images += to_pil(x)
            embs.append(part.image_emb)
    all_seeds: list[int | None] = [*seeds] if seeds else [None] * count
    entries = entries or [{}] * count  # a latent may have no sources
    if options != latent.options:
        entries = [_with_source_options(entry, latent.options) for entry in entries]
    about = pipe.describe(options)
    metadata = [
        {"operation": operation, **entry, "seed": seed, **about}
        for entry, seed in zip(entries, all_seeds, strict=True)
    ]
    return GenerationResult(images, all_seeds, [None] * count, torch.cat(embs), metadata)


def _with_source_options(entry: dict[str, Any], options: UnCLIPOptions) -> dict[str, Any]:
    """Add the options of the latents to their sources, if they differ from those of decoding."""
    if "sources" not in entry:
        return entry
    extra = {"options": options_metadata(options)}
    return {**entry, "sources": [{**source, **extra} for source in entry["sources"]]}


def _joined(source: Source) -> Any:
    """Concatenate a sequence of latents; return images or one latent as given."""
    if not isinstance(source, Sequence):
        return source
    latents = [one for one in source if isinstance(one, Latent)]
    if latents and len(latents) < len(source):
        raise ValueError("got images and latents; expected one of the two: invert the images")
    return Latent.cat(latents) if latents else source


def _count(source: Source) -> int:
    joined = _joined(source)
    return len(joined if isinstance(joined, Latent) else list_images(joined))


def check_embeddings(pipe: StagedPipeline, image_emb: Tensor) -> None:
    """Raise ValueError unless embeddings are a tensor (N, D)."""
    width = pipe.clip.emb_dim
    if not isinstance(image_emb, Tensor):
        kind = type(image_emb).__name__
        raise ValueError(f"image_emb is a {kind}; expected a tensor of shape (N, {width})")
    if image_emb.ndim != 2 or image_emb.shape[1] != width or not len(image_emb):
        raise ValueError(f"image_emb is of shape {tuple(image_emb.shape)}; expected (N, {width})")


def check_layout(pipe: StagedPipeline, layout: Tensor, count: int) -> Tensor:
    """Return `count` layouts as (N, 3, h, h); ValueError if they are not the model's."""
    stage = pipe.decoder_stage.layout_stage
    if stage is None:
        raise ValueError("layout was given, but the model samples no layouts")
    shape = count, 3, stage.network.config.size, stage.network.config.size
    if len(layout) != count or layout.numel() != math.prod(shape):
        raise ValueError(f"layout is of shape {tuple(layout.shape)}; expected {shape}")
    if not layout.isfinite().all():
        raise ValueError("layout contains infinity or nan; expected numbers from -1 to 1")
    return layout.reshape(shape).float()


def _check(pipe: StagedPipeline, options: UnCLIPOptions) -> None:
    check_stages(pipe, options)
    check_invertible(options)


def _check_eta(eta: float) -> None:
    if isinstance(eta, str) or eta is None or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta!r}; expected 0 (the image itself) to 1 (the most variation)")

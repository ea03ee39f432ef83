"""Text or image -> pictures (unCLIP, 2204.06125)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.store import load_bundle, save_bundle
from unclip.clip import CLIP
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.prior import DiffusionPrior, DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.base import (
    ImageInput,
    check_count,
    encode_array,
    in_batches,
    to_pil,
)
from unclip.pipelines.offload import Offloader, parts
from unclip.pipelines.rerank import best_of
from unclip.pipelines.unclip.editing import UnCLIPEditing
from unclip.pipelines.unclip.manipulations import UnCLIPManipulations
from unclip.pipelines.unclip.prompts import Mixture, PromptBatch, describe_prompt
from unclip.pipelines.unclip.stages import mixed
from unclip.types import GenerationResult, OnStep, Prompt, UnCLIPOptions

# P prompts, N images of each, D embedding width


class UnCLIPPipeline(UnCLIPManipulations, UnCLIPEditing):
    """The whole stack as one `TextToImage`; its stages stay callable alone."""

    kind = "unclip"

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | DirectPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
        options: UnCLIPOptions | None = None,
        *,
        inpainter: Decoder | None = None,
        schedules: Mapping[str, ScheduleConfig] | None = None,
        residency: Offloader | None = None,
        name: str = "unnamed",
        licence: str = "",
        source: str | None = None,
    ) -> None:
        """source: what `unclip.load` was given, for pictures' metadata. For the rest see `UnCLIPNetworks`."""
        fitted = {"inpainter": inpainter, "schedules": schedules, "residency": residency}
        super().__init__(clip, prior, decoder, upsamplers, options, **fitted)
        self.name, self.licence, self.source = name, licence, source or name
        self._check_upsampling(self.options.upsamplers)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        source: str | None = None,
        residency: Offloader | None = None,
    ) -> UnCLIPPipeline:
        """A pipeline of what a checkpoint holds; offloaded if a residency is given."""
        if bundle.kind != cls.kind:
            raise ValueError(
                f"{bundle.name} is a model of kind {bundle.kind!r}; expected {cls.kind!r}"
            )
        if missing := {"clip", "decoder"} - bundle.components.keys():
            raise ValueError(f"{bundle.name} has no {' and no '.join(sorted(missing))}")
        ups = sorted(
            (name for name in bundle.components if name.startswith("upsampler_")),
            key=lambda n: int(n[10:]),
        )

        def component(name: str) -> Any:
            module = bundle.components[name]
            if residency is not None:  # before the next one is read
                for part in parts([module]):
                    residency.add(part)
            return module

        return cls(
            component("clip"),
            component("prior") if "prior" in bundle.components else None,
            component("decoder"),
            [component(name) for name in ups],
            bundle.options,
            inpainter=component("inpainter") if "inpainter" in bundle.components else None,
            schedules=bundle.schedules,
            residency=residency,
            name=bundle.name,
            licence=bundle.licence,
            source=source,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> UnCLIPPipeline:
        """A folder that `save_pretrained` wrote; `unclip.load` also knows names and Hub ids."""
        return cls.from_bundle(load_bundle(folder, dtype), source=str(folder)).to(device, dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder, weights in `dtype` if given; the folder that was there is replaced only at the end."""
        for stage in (self.options.prior, self.options.decoder, *self.options.upsamplers):
            if not isinstance(stage.sampler, str):
                raise ValueError(
                    f"options hold a {type(stage.sampler).__name__}; only samplers with a name are saved"
                )
        self._check_whole()
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
        prompt: Prompt | Mixture | Sequence[str | Mixture],
        *,
        negative_prompt: Prompt | None = None,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws `num_images` pictures of each prompt; picture k has the seed `seed` + k (random if None).

        With num_candidates, so many are drawn of each, and those are kept that CLIP finds closest to the prompt, the
        best first: see their seeds and scores.

        A prompt may be a mixture, {"an apple": 2, "a lemon": 1}: prior and decoder follow all its texts at once, by
        their weights. negative_prompt, one for all or one for each, says what guidance leads away from. on_step is
        called after every step of every batch of at most `batch_size` pictures.
        """
        wording = PromptBatch.of(prompt, negative_prompt)

        def draw(num_images: int) -> Iterator[GenerationResult]:
            return self._draw(
                wording, None, num_images, seed, options, on_step, batch_size, progress
            )

        if num_candidates is None:
            return GenerationResult.cat(list(draw(num_images)))
        return best_of(
            draw, self.encode_image, partial(self._meaning, wording), num_images, num_candidates
        )

    def variations(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
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
            raise ValueError(
                f"image_emb is of shape {tuple(image_emb.shape)}; expected (N, {self.clip.emb_dim})"
            )
        if not image_emb.isfinite().all():
            raise ValueError(
                "image_emb holds infinite numbers or nan; expected CLIP embeddings, which are finite"
            )
        given = image_emb.to(self.device, torch.float32)
        drawn = self._draw(None, given, num_images, seed, options, on_step, batch_size, progress)
        return GenerationResult.cat(list(drawn))

    def _draw(
        self,
        wording: PromptBatch | None,
        given: Tensor | None,
        num_images: int,
        seed: int | None,
        options: UnCLIPOptions | None,
        on_step: OnStep | None,
        batch_size: int,
        progress: bool,
    ) -> Iterator[GenerationResult]:
        """Batches of pictures of prompts through the prior, or of the embeddings `given`."""
        options = options or self.options
        self._check_options(options, of_prompts=wording is not None)
        check_count("prior_candidates", options.prior_candidates)
        if wording is not None:
            wording.check(options)
            if options.embedding != "none":
                self._need_prior()
        count = len(given) if wording is None else len(wording)
        steps, about = (
            sum(stage.steps for stage in (options.decoder, *options.upsamplers)),
            self._about(options),
        )
        if wording is not None and options.embedding == "prior":
            steps += self.prior_steps(options.prior)
        for batch in in_batches(count, num_images, seed, batch_size, steps, progress, on_step):
            rows, n = batch.prompts, batch.num_images
            drawing = {"generators": batch.generators, "on_step": batch.on_step}
            with torch.inference_mode():
                if wording is None:
                    emb, told = given[rows].repeat_interleave(n, dim=0), {}
                else:
                    emb, told = self._imagine(wording[rows], n, options, drawing)
                x = self.decode(emb, options=options.decoder, **told, **drawing)
                images = to_pil(self.upsample(x, options=options.upsamplers, **drawing))
            # Cloned outside of inference mode: the caller may compute with it.
            emb = None if emb is None else emb.cpu().clone()
            if wording is None:
                prompts, made_of = (
                    [None] * len(images),
                    [{"image_emb": encode_array(one)} for one in emb],
                )
            else:
                prompts = [
                    describe_prompt(prompt) for prompt in wording[rows].prompts for _ in range(n)
                ]
                made_of = [entry for entry in wording[rows].metadata() for _ in range(n)]
            metadata = [
                {**entry, "seed": seed, **about}
                for entry, seed in zip(made_of, batch.seeds, strict=True)
            ]
            yield GenerationResult(images, batch.seeds, prompts, emb, metadata)

    def _meaning(self, wording: PromptBatch) -> Tensor:
        """CLIP's embeddings of the prompts (P, D); of a mixture, the weighted sum."""
        return mixed(self.encode_text(wording.texts).emb, wording.weights)

    def _imagine(
        self, wording: PromptBatch, num_images: int, options: UnCLIPOptions, drawing: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Embeddings (B, D) of the pictures of some prompts, or None, and what else the decoder is to be told."""
        text, weights = self.encode_text(wording.texts), wording.weights
        negative = None if wording.negative is None else self.encode_text(wording.negative)
        emb = None
        if options.embedding == "text":
            emb = self.as_image(mixed(text.emb, weights)).repeat_interleave(num_images, dim=0)
        elif options.embedding == "prior":
            emb = self.sample_prior(
                text,
                num_images=num_images,
                options=options.prior,
                candidates=options.prior_candidates,
                negative=negative,
                weights=weights,
                **drawing,
            )
        return emb, {
            "text": text.repeat_interleave(num_images),
            "negative": negative and negative.repeat_interleave(num_images),
            "weights": None if weights is None else weights.repeat_interleave(num_images, dim=1),
        }

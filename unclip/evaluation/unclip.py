"""Evaluation of an unCLIP model: images, and its prior, decoder and upsamplers alone."""

# N held-out pairs, B batch, D CLIP embedding width, s decoder's image size, S model's image size

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.diffusion.samplers import randn
from unclip.embeddings import cosine_gap
from unclip.evaluation.base import Evaluation
from unclip.evaluation.generator import ImageGenerator, Samples
from unclip.evaluation.metrics import mean_and_interval, psnr
from unclip.image_io import to_pil, to_tensor
from unclip.pipelines.request import generators_from, progress_bar
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.losses import resize_square
from unclip.types import OnStep, TextEncoding, UnCLIPOptions

NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)  # t / T at which the decoder alone is evaluated
UPSAMPLED = 64  # images on which the upsampler alone is evaluated
UPSAMPLER_BATCH = 8  # its images have 16 times as many pixels


@dataclass(frozen=True)
class PredictedEmbeddings:
    """Image embeddings of N captions."""

    captions: list[str]
    text: TextEncoding
    image_emb: Tensor | None  # (N, D); None: the decoder is conditioned on text only
    generators: list[torch.Generator]  # state after the prior, for the decoder


class UnCLIPGenerator(ImageGenerator):
    """An unCLIP pipeline, stage by stage; images are measured before the upsamplers."""

    pipe: UnCLIPPipeline
    options: UnCLIPOptions

    @property
    def size(self) -> int:
        return self.pipe.decoder.config.image_size

    @property
    def full_size(self) -> int:
        count = len(self.options.upsamplers)
        return self.pipe.upsamplers[count - 1].config.high_size if count else self.size

    def predict_embeddings(self, captions: Sequence[str], seed: int) -> PredictedEmbeddings:
        """Return embeddings of the kind that `options.embedding` asks for."""
        text = self.encode_text(captions)
        generators = generators_from(range(seed, seed + len(captions)))
        if self.options.embedding != "prior":
            of_text = self.options.embedding == "text"
            image_emb = self.pipe.as_image(text.emb).cpu() if of_text else None
            return PredictedEmbeddings(list(captions), text, image_emb, generators)
        options, candidates = self.options.prior, self.options.prior_candidates
        with self._progress(len(captions), self.pipe.prior_steps(options)) as on_step:
            image_emb = [
                self.pipe.sample_prior(
                    text[part],
                    generators=generators[part],
                    options=options,
                    candidates=candidates,
                    on_step=on_step,
                ).cpu()
                for part in self.batches(len(captions))
            ]
        return PredictedEmbeddings(list(captions), text, torch.cat(image_emb), generators)

    def decode(self, predicted: PredictedEmbeddings) -> Samples:
        """Sample the decoder. The generators of `predicted` are copied, not advanced."""
        generators = _copies(predicted.generators)
        images = self._decode(predicted.image_emb, predicted.text, generators)
        return Samples(predicted.captions, images, generators)

    def vary(self, images: Tensor, image_emb: Tensor, seed: int) -> Tensor:
        """Return variations (N, 3, s, s) of images with CLIP embeddings (N, D), without text."""
        generators = generators_from(range(seed, seed + len(image_emb)))
        return self._decode(image_emb, None, generators, self.pipe.encode_layout(images))

    def _decode(
        self,
        image_emb: Tensor | None,
        text: TextEncoding | None,
        generators: list[torch.Generator],
        layout: Tensor | None = None,
    ) -> Tensor:
        options, count = self.options.decoder, len(generators)
        with self._progress(count, options.steps) as on_step:
            images = [
                self.pipe.decode(
                    None if image_emb is None else image_emb[part],
                    None if text is None else text[part],
                    generators=generators[part],
                    options=options,
                    on_step=on_step,
                    like=None if layout is None else layout[part],
                ).cpu()
                for part in self.batches(count)
            ]
        return torch.cat(images)

    def generate(self, captions: Sequence[str], seed: int) -> Samples:
        return self.decode(self.predict_embeddings(captions, seed))

    def upsample(self, samples: Samples, rows: Sequence[int] | None = None) -> list[Image.Image]:
        rows = range(len(samples.captions)) if rows is None else rows
        generators = _copies([samples.generators[row] for row in rows])
        images: list[Image.Image] = []
        for part in self.batches(len(rows), "upsampler", UPSAMPLER_BATCH):
            low_res = samples.images[list(rows[part])]
            options = self.options.upsamplers
            images += to_pil(
                self.pipe.upsample(low_res, generators=generators[part], options=options)
            )
        return images

    def _progress(self, count: int, steps: int) -> AbstractContextManager[OnStep]:
        return progress_bar(-(-count // self.batch_size) * steps, self.progress, None)


class UnCLIPEvaluation(Evaluation):
    """The evaluation of an unCLIP model. Images are measured before the upsamplers."""

    pipe: UnCLIPPipeline
    generator: UnCLIPGenerator

    @cached_property
    def predicted(self) -> PredictedEmbeddings:
        """The prior's embeddings of the held-out captions."""
        return self.generator.predict_embeddings(self.held_out.captions, self.seed)

    @cached_property
    def samples(self) -> Samples:
        return self.generator.decode(self.predicted)

    def images(self) -> dict[str, Any]:
        """Evaluate the generated images, and with a judge also variations of the true ones."""
        results = super().images()
        return results if self.judge is None else {**results, "variations": self.variations()}

    def variations(self) -> dict[str, Any]:
        """Return how often the judge names the same concept for variations of the true images.

        Variations have no text. Only true images that the judge classifies correctly are counted.
        """
        assert self.judge is not None
        true, entries = self.held_out.floats(), self.held_out.entries
        right = self.judge.judge(true, entries).concept
        rows = right.nonzero().flatten().tolist()
        if not rows:
            return {"images": 0}
        images = self.generator.vary(true[rows], self.true_emb[rows], self.seed)
        kept = self.judge.judge(images, [entries[row] for row in rows])
        return {"images": len(rows), **mean_and_interval(kept.concept, self.seed)}

    def prior(self) -> dict[str, Any]:
        """Compare predicted embeddings to those of the images; text embeddings are a reference."""
        if self.generator.options.embedding != "prior":
            return {}
        emb, true_emb, prior = self.predicted.image_emb, self.true_emb, self.pipe.prior
        assert emb is not None and prior is not None
        self._use(prior)
        normalised, target = (
            prior.normalize(x.to(self.pipe.device)).float() for x in (emb, true_emb)
        )
        return {
            "cosine": cosine_gap(emb, true_emb, self.held_out.captions),
            "text_cosine": cosine_gap(self.text_emb, true_emb, self.held_out.captions),
            "normalised_mse": F.mse_loss(normalised, target).item(),
        }

    def decoder(self) -> dict[str, Any]:
        """Return the mean squared error of one-step estimates of x_0, clipped to [-1, 1].

        The decoder is conditioned on the caption, the embedding of the true image, and the mean
        layout of that embedding if the network has layouts.
        """
        pipe, decoder, schedule = self.pipe, self.pipe.decoder, self.pipe.schedules["decoder"]
        generators = generators_from(range(self.seed, self.seed + len(self.held_out)))
        true_emb = self.true_emb
        errors: dict[str, list[Tensor]] = {str(level): [] for level in NOISE_LEVELS}
        for part in self.generator.batches(len(self.held_out), "decoder alone"):
            x_0 = self.held_out.floats(part).to(pipe.device)  # (B, 3, s, s)
            text = self.generator.encode_text(self.held_out.captions[part]).to(dtype=pipe.dtype)
            self._use(decoder)
            with torch.inference_mode():
                emb = true_emb[part].to(pipe.device, pipe.dtype)
                context: Any = decoder.condition(emb, text)
                for level in NOISE_LEVELS:
                    step = round(level * schedule.num_timesteps)
                    t = torch.full((len(x_0),), step, device=pipe.device)  # (B,)
                    noise = randn(x_0.shape, generators[part], pipe.device)
                    x_t = schedule.add_noise(x_0, noise, t)
                    output = decoder.denoise(x_t.to(pipe.dtype), t, context)[:, :3]  # no variance
                    estimate = schedule.predict_x0(output, x_t, t, decoder.config.prediction)
                    error = (estimate.clamp(-1, 1) - x_0).square().mean(dim=(1, 2, 3))  # (B,)
                    errors[str(level)].append(error.cpu())
        x0_mse = {level: torch.cat(values).mean().item() for level, values in errors.items()}
        return {"x0_mse": x0_mse, "mean_x0_mse": float(np.mean(list(x0_mse.values())))}

    def upsampler(self) -> dict[str, Any]:
        """Return the PSNR of true images downsampled and upsampled, and of bicubic resizing."""
        pipe, options = self.pipe, self.generator.options.upsamplers
        if not options:
            return {}
        small = pipe.decoder.config.image_size
        large = self.generator.full_size
        count = min(UPSAMPLED, len(self.held_out))
        generators = generators_from(range(self.seed, self.seed + count))
        values: dict[str, list[Tensor]] = {"upsampled": [], "bicubic": []}
        for part in self.generator.batches(count, "upsampler alone", UPSAMPLER_BATCH):
            truth = to_tensor([self.held_out.image(row, large) for row in range(count)[part]])
            low_res = resize_square(truth, small)
            bicubic = F.interpolate(low_res, (large, large), mode="bicubic").clamp(-1, 1)
            upsampled = pipe.upsample(low_res, generators=generators[part], options=options)
            values["upsampled"].append(psnr(upsampled.cpu(), truth))  # (B,)
            values["bicubic"].append(psnr(bicubic, truth))
        means = {name: torch.cat(x).mean().item() for name, x in values.items()}
        return {"images": count, "from": small, "to": large, "psnr": means}


def _copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Copy generators with their state, so that a stage can be sampled again."""
    copies = [torch.Generator() for _ in generators]
    for copy, generator in zip(copies, generators, strict=True):
        copy.set_state(generator.get_state())
    return copies

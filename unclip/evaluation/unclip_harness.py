"""What is asked of an unCLIP model beyond its pictures: of its prior, its decoder and its upsamplers alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.samplers import randn
from unclip.evaluation.drawing import Drawn, Imagined, UnCLIPDrawer
from unclip.evaluation.harness import Evaluation
from unclip.evaluation.metrics import agreement, psnr
from unclip.pipelines.base import generators_from
from unclip.pipelines.unclip.bound_stage import to_tensor
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.losses import resize_square

# N held-out pairs, B batch, D CLIP embedding width, s decoder's and S model's picture side

NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)  # t / T at which the decoder alone is measured
UPSAMPLED = 64  # pictures that the upsampler alone is measured on


class UnCLIPEvaluation(Evaluation):
    """Pictures are measured as the decoder draws them, before the upsamplers."""

    pipe: UnCLIPPipeline
    drawer: UnCLIPDrawer

    def _measure(self, part: str) -> dict[str, Any]:
        if part == "pictures":
            return self._pictures()
        if part == "upsampler" and not self.drawer.options.upsamplers:
            return {}
        return {part: getattr(self, part)()}

    @cached_property
    def imagined(self) -> Imagined:
        """The prior's embeddings for the held-out captions."""
        return self.drawer.imagine(self.held_out.captions, self.seed)

    @cached_property
    def drawn(self) -> Drawn:
        """What the decoder makes of them."""
        return self.drawer.decode(self.imagined)

    def prior(self) -> dict[str, Any]:
        """The prior's embeddings against those of the true pictures, and the same of the captions' own embeddings."""
        emb, network = self.imagined.image_emb, self.pipe.prior
        normalised = [
            network.normalize(x.to(self.pipe.device)).float() for x in (emb, self.true_emb)
        ]
        return {
            "cosine": agreement(emb, self.true_emb),
            "cosine_of_text": agreement(self.text_emb, self.true_emb),
            "normalised_mse": F.mse_loss(*normalised).item(),
        }

    def decoder(self) -> dict[str, Any]:
        """Mean squared error of the decoder's one-step estimate of x_0, given caption and true picture's embedding.

        The estimate is clipped to [-1, 1], as samplers do.
        """
        pipe, decoder, schedule = self.pipe, self.pipe.decoder, self.pipe.schedules["decoder"]
        generators = generators_from(range(self.seed, self.seed + len(self.held_out)))
        errors: dict[str, list[Tensor]] = {str(level): [] for level in NOISE_LEVELS}
        for part in self.drawer.batches(len(self.held_out), "decoder alone"):
            x_0 = self.held_out.floats(part).to(pipe.device)  # (B, 3, s, s)
            text = self.drawer.encode_text(self.held_out.captions[part]).to(dtype=pipe.dtype)
            with torch.inference_mode():
                context = decoder.condition(self.true_emb[part].to(pipe.device, pipe.dtype), text)
                for level, found in zip(NOISE_LEVELS, errors.values(), strict=True):
                    t = torch.full(
                        (len(x_0),), round(level * schedule.num_timesteps), device=pipe.device
                    )  # (B,)
                    x_t = schedule.add_noise(
                        x_0, randn(x_0.shape, generators[part], pipe.device), t
                    )
                    output = decoder.denoise(x_t.to(pipe.dtype), t, context)[
                        :, :3
                    ]  # without the learned variance
                    estimate = schedule.predict_x0(output, x_t, t, decoder.config.prediction)
                    found.append((estimate.clamp(-1, 1) - x_0).square().mean(dim=(1, 2, 3)).cpu())
        of_level = {level: torch.cat(found).mean().item() for level, found in errors.items()}
        return {"x0_mse": of_level, "mean_x0_mse": float(np.mean(list(of_level.values())))}

    def upsampler(self) -> dict[str, Any]:
        """True pictures made small, then large again, against the true large ones; beside bicubic interpolation."""
        pipe, options = self.pipe, self.drawer.options.upsamplers
        small, large = (
            pipe.decoder.config.image_size,
            pipe.upsamplers[len(options) - 1].config.high_size,
        )
        count = min(UPSAMPLED, len(self.held_out))
        generators = generators_from(range(self.seed, self.seed + count))
        found: dict[str, list[Tensor]] = {"upsampled": [], "bicubic": []}
        for part in self.drawer.batches(count, "upsampler alone", 8):
            rows = range(count)[part]
            truth = to_tensor([self.held_out.picture(row, large) for row in rows])
            low_res = resize_square(truth, small)
            bicubic = F.interpolate(low_res, (large, large), mode="bicubic").clamp(-1, 1)
            upsampled = pipe.upsample(
                low_res, generators=generators[part], options=options
            ).cpu()  # (B, 3, S, S)
            found["upsampled"].append(psnr(upsampled, truth))
            found["bicubic"].append(psnr(bicubic, truth))
        means = {name: torch.cat(values).mean().item() for name, values in found.items()}
        return {"pictures": count, "from": small, "to": large, "psnr": means}

"""The evaluation of an unCLIP model on pairs that it was never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip import __version__
from unclip.config import to_dict
from unclip.diffusion.samplers import randn
from unclip.evaluation import PARTS
from unclip.evaluation.drawing import Drawer, Drawn, Imagined, no_cut_warnings
from unclip.evaluation.metrics import agreement, diversity, nearest_by_cosine, nearest_by_pixels, psnr, recall
from unclip.evaluation.pairs import Pairs
from unclip.evaluation.style import train_classifier
from unclip.pipelines.base import generators_from, redraw
from unclip.pipelines.unclip import UnCLIPPipeline
from unclip.types import UnCLIPOptions

# N held-out pairs, M training pairs, B batch, D CLIP embedding width, s decoder's and S model's picture side

NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)  # t / T at which the decoder alone is measured
UPSAMPLED = 64  # pictures that the upsampler alone is measured on
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 8, 4


class Evaluation:
    """One model, its options and its data; what several parts need is computed once, when first asked for.

    Pictures are measured as the decoder draws them: CLIP and the style classifier see no more pixels than that.
    """

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        held_out: Pairs,
        train: Pairs | None = None,
        *,
        options: UnCLIPOptions | None = None,
        seed: int = 0,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        if len(held_out) < 2:
            raise ValueError("only one held-out pair; an evaluation compares at least 2")
        self.pipe, self.held_out, self.train, self.seed = pipe, held_out, train, seed
        self.drawer = Drawer(pipe, options or pipe.options, batch_size, progress)

    def run(self, parts: Sequence[str] = PARTS) -> dict[str, Any]:
        """Results of some parts, as JSON types; those that need training pairs only if there are any."""
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"unknown part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
        networks = {"clip": self.pipe.clip, **self.pipe.networks()}
        results: dict[str, Any] = {
            "model": self.pipe.name,
            "version": __version__,
            "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
            "options": to_dict(self.drawer.options),
            "seed": self.seed,
            "held_out": {"pairs": len(self.held_out), "broken": self.held_out.broken},
        }
        if self.train is not None:
            results["train"] = {"pairs": len(self.train), "broken": self.train.broken}
        if "prior" in parts:
            results["prior"] = self.prior()
        if "pictures" in parts:
            results["recall"] = self.recall()
            results["diversity"] = self.diversity()
            if self.train is not None:
                results["nearest"] = self.nearest(self.train)
                if len(self.train.styles) > 1:
                    results["style"] = self.style(self.train)
        if "decoder" in parts:
            results["decoder"] = self.decoder()
        if "upsampler" in parts and self.drawer.options.upsamplers:
            results["upsampler"] = self.upsampler()
        if "repeatable" in parts:
            results["repeatable"] = self.repeatable()
        return results

    @cached_property
    def text_emb(self) -> Tensor:
        """CLIP's embeddings of the held-out captions (N, D)."""
        return self.drawer.encode_text(self.held_out.captions).emb.cpu()

    @cached_property
    def true_emb(self) -> Tensor:
        """CLIP's embeddings of the held-out pictures (N, D)."""
        return self.drawer.embed(self.held_out.images)

    @cached_property
    def imagined(self) -> Imagined:
        """The prior's embeddings for the held-out captions."""
        return self.drawer.imagine(self.held_out.captions, self.seed)

    @cached_property
    def drawn(self) -> Drawn:
        """A picture of each held-out caption."""
        return self.drawer.decode(self.imagined)

    @cached_property
    def drawn_emb(self) -> Tensor:
        """CLIP's embeddings of the drawn pictures (N, D)."""
        return self.drawer.embed(self.drawn.images)

    @cached_property
    def train_emb(self) -> Tensor:
        """CLIP's embeddings of the training pictures (M, D)."""
        assert self.train is not None
        return self.drawer.embed(self.train.images)

    @cached_property
    def nearest_to_drawn(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By "clip" and by "pixels": rows (N,) of the training pairs nearest to the drawn ones, and distances (N,)."""
        assert self.train is not None
        return {
            "clip": nearest_by_cosine(self.drawn_emb, self.train_emb),
            "pixels": nearest_by_pixels(self.drawn.images, self.train.images),
        }

    def prior(self) -> dict[str, Any]:
        """The prior's embeddings against those of the true pictures, and the same of the captions' own embeddings."""
        emb, network = self.imagined.image_emb, self.pipe.prior
        normalised = [network.normalize(x.to(self.pipe.device)).float() for x in (emb, self.true_emb)]
        return {
            "cosine": agreement(emb, self.true_emb),
            "cosine_of_text": agreement(self.text_emb, self.true_emb),
            "normalised_mse": F.mse_loss(*normalised).item(),
        }

    def recall(self) -> dict[str, Any]:
        """Is the caption found from its picture, among all held-out captions? Also from the true pictures."""
        entries = self.held_out.entries
        everything = list(range(len(entries)))
        plain = [row for row in everything if not entries[row].toned]
        groups = {"all": (everything, everything)}  # rows of the pictures, rows of the captions
        for style in self.held_out.styles:
            groups[style] = ([row for row in everything if entries[row].style == style], everything)
        if 0 < len(plain) < len(entries):
            groups["without skin tones"] = (plain, plain)
        return {
            "groups": {name: self._recall(*rows) for name, rows in groups.items()},
            "caption_cosine": {
                "drawn": F.cosine_similarity(self.text_emb, self.drawn_emb).mean().item(),
                "true": F.cosine_similarity(self.text_emb, self.true_emb).mean().item(),
            },
        }

    def _recall(self, pictures: list[int], captions: list[int]) -> dict[str, Any]:
        row_of = {self.held_out.captions[row]: row for row in captions}  # a caption that two share is right for both
        position = {caption: i for i, caption in enumerate(row_of)}
        right = torch.tensor([position[self.held_out.captions[row]] for row in pictures])
        candidates = self.text_emb[list(row_of.values())]
        return {
            "pictures": len(pictures),
            "captions": len(candidates),
            "drawn": recall(self.drawn_emb[pictures], candidates, right),
            "true": recall(self.true_emb[pictures], candidates, right),
        }

    def diversity(self) -> dict[str, Any]:
        """How far apart in CLIP's space pictures of one prompt are, and pictures of different prompts."""
        rows = self.held_out.spread(DIVERSITY_PROMPTS)
        prompts = [self.held_out.captions[row] for row in rows for _ in range(DIVERSITY_SEEDS)]
        emb = self.drawer.embed(self.drawer.draw(prompts, self.seed).images).unflatten(0, (len(rows), DIVERSITY_SEEDS))
        return {
            "prompts": len(rows),
            "seeds": DIVERSITY_SEEDS,
            "of_one_prompt": diversity(emb),
            "of_different_prompts": diversity(emb.transpose(0, 1)),
        }

    def nearest(self, train: Pairs) -> dict[str, Any]:
        """How near drawn pictures are to training pictures, and how near the true held-out ones are: is it copied?"""
        truth = self.held_out.floats()
        nearest = {
            "drawn": self.nearest_to_drawn,
            "true": {
                "clip": nearest_by_cosine(self.true_emb, self.train_emb),
                "pixels": nearest_by_pixels(truth, train.images),
            },
        }

        def same_concept(rows: Tensor) -> float:
            pairs = zip(self.held_out.entries, rows.tolist(), strict=True)
            return float(np.mean([pair.concept == train.entries[row].concept for pair, row in pairs]))

        results: dict[str, Any] = {
            kind: {
                "median_distance": {of: found[kind][1].median().item() for of, found in nearest.items()},
                "same_concept": {of: same_concept(found[kind][0]) for of, found in nearest.items()},
            }
            for kind in ("clip", "pixels")
        }
        to_truth = (self.drawn.images - truth).square().mean(dim=(1, 2, 3)).sqrt()  # (N,)
        return {**results, "nearer_to_truth": _fraction(to_truth < self.nearest_to_drawn["pixels"][1])}

    def style(self, train: Pairs) -> dict[str, Any]:
        """Is the style drawn that was asked for? Told by a classifier of the true training pictures.

        Styles may share designs, so the classifier errs on true pictures too: the figures are also given for the
        pairs whose true picture it is right about.
        """
        classifier = train_classifier(train, self.seed, progress=self.drawer.progress)
        rows = [row for row, pair in enumerate(self.held_out.entries) if pair.style in classifier.styles]
        styles = [self.held_out.entries[row].style for row in rows]
        drawn = classifier.right(self.drawn.images[rows], styles)
        true = classifier.right(self.held_out.floats(rows), styles)
        of_style = {style: torch.tensor([other == style for other in styles]) for style in sorted(set(styles))}
        groups = {"all": torch.ones_like(true), **of_style, "where the true picture is told right": true}
        return {
            name: {"pictures": int(chosen.sum()), "drawn": _fraction(drawn[chosen]), "true": _fraction(true[chosen])}
            for name, chosen in groups.items()
            if chosen.any()
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
                    t = torch.full((len(x_0),), round(level * schedule.num_timesteps), device=pipe.device)  # (B,)
                    x_t = schedule.add_noise(x_0, randn(x_0.shape, generators[part], pipe.device), t)
                    output = decoder.denoise(x_t.to(pipe.dtype), t, context)[:, :3]  # without the learned variance
                    estimate = schedule.predict_x0(output, x_t, t, decoder.config.prediction)
                    found.append((estimate.clamp(-1, 1) - x_0).square().mean(dim=(1, 2, 3)).cpu())
        of_level = {level: torch.cat(found).mean().item() for level, found in errors.items()}
        return {"x0_mse": of_level, "mean_x0_mse": float(np.mean(list(of_level.values())))}

    def upsampler(self) -> dict[str, Any]:
        """True pictures made small, then large again, against the true large ones; beside bicubic interpolation."""
        pipe, options = self.pipe, self.drawer.options.upsamplers
        small, large = pipe.decoder.config.image_size, pipe.upsamplers[len(options) - 1].config.high_size
        count = min(UPSAMPLED, len(self.held_out))
        generators = generators_from(range(self.seed, self.seed + count))
        found: dict[str, list[Tensor]] = {"upsampled": [], "bicubic": []}
        for part in self.drawer.batches(count, "upsampler alone", 8):
            rows = range(count)[part]
            truth = torch.stack([_pixels(self.held_out.picture(row, large)) for row in rows]).div(127.5).sub(1)
            low_res = F.interpolate(truth, (small, small), mode="bicubic", antialias=True).clamp(-1, 1)
            bicubic = F.interpolate(low_res, (large, large), mode="bicubic").clamp(-1, 1)
            upsampled = pipe.upsample(low_res, generators=generators[part], options=options).cpu()  # (B, 3, S, S)
            found["upsampled"].append(psnr(upsampled, truth))
            found["bicubic"].append(psnr(bicubic, truth))
        means = {name: torch.cat(values).mean().item() for name, values in found.items()}
        return {"pictures": count, "from": small, "to": large, "psnr": means}

    def repeatable(self) -> dict[str, Any]:
        """Is a seed's picture the same again, alone as in a batch, and redrawn from its metadata?"""
        prompts = self.held_out.captions[:3]
        draw = partial(self.pipe, options=self.drawer.options, progress=False)
        with no_cut_warnings():
            batch, again = draw(prompts, seed=self.seed), draw(prompts, seed=self.seed)
            alone = [draw(prompt, seed=seed) for prompt, seed in zip(prompts, batch.seeds, strict=True)]
            redrawn = redraw(self.pipe, alone[0].metadata[0], progress=False)
        differences = [
            (_pixels(one.images[0]) - _pixels(picture)).abs().max().item()
            for one, picture in zip(alone, batch.images, strict=True)
        ]
        return {
            "same_seed_same_bytes": all(
                one.tobytes() == other.tobytes() for one, other in zip(batch.images, again.images, strict=True)
            ),
            "batch_and_alone_differ_by": int(max(differences)),  # of 255
            "redrawn_same_bytes": redrawn.images[0].tobytes() == alone[0].images[0].tobytes(),
        }


def _fraction(which: Tensor) -> float:
    return which.float().mean().item()


def _pixels(picture: Image.Image) -> Tensor:
    """(3, S, S) float in [0, 255]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()

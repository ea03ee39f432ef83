"""Evaluation of inversion, variations, interpolation, text diffs, PCA and inpainting.

`unclip evaluate-manipulations` runs it.
"""

# N images, D CLIP embedding width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.diffusion.inversion import InversionOptions
from unclip.diffusion.repaint import PaintOptions
from unclip.embeddings import PCA, caption_targets, normalise
from unclip.evaluation import MANIPULATION_PARTS
from unclip.evaluation.generator import ignore_cut_warnings
from unclip.evaluation.metrics import psnr, recall
from unclip.evaluation.pairs import Pairs
from unclip.image_io import fit, to_tensor
from unclip.models.unclip.decoder import Decoder
from unclip.pipelines.unclip.latent import Latent, deterministic
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.pipelines.unclip.probing import shown_components
from unclip.types import GenerationResult

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
THETAS = (0.0, 0.25, 0.5)  # the paper ends between the last two
TEXT_DIFF_ETAS = (0.5, 0.0)  # the default, and the paper's
FRAMES = 9
RECONSTRUCTED = 16  # images
UPSAMPLED = 4  # of them at full size
MAX_STEPS = 25  # of the decoder in parts other than reconstruction, which depend little on it
HOLE = 0.75  # side of the inpainted square in the middle, as a share of the image side


class ManipulationEvaluation:
    """The evaluation of one model on N held-out pairs, at the decoder's image size."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        pairs: Pairs,
        pca_embeddings: Callable[[], Tensor],
        *,
        steps: int = 50,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        """pca_embeddings: returns the embeddings (M, D) to fit the PCA on; called if needed."""
        pairs.check_captions()
        self.pipe, self.pairs, self.pca_embeddings, self.seed = pipe, pairs, pca_embeddings, seed
        self.progress, self.batching = progress, {"batch_size": batch_size, "progress": progress}
        size = pipe.decoder.config.image_size
        self.images = [pairs.image(row, size) for row in range(len(pairs))]
        self.targets = [_target(pairs.captions, row) for row in range(len(pairs))]
        self.options, self.short_options = (
            replace(deterministic(pipe.options, count), upsamplers=())
            for count in (steps, min(steps, MAX_STEPS))
        )
        with ignore_cut_warnings():
            self.text_emb = pipe.encode_text(pairs.captions).emb.cpu()  # (N, D)

    @cached_property
    def latent(self) -> Latent:
        """The inverted images, under the model's own guidance."""
        return self.pipe.invert(self.images, options=self.short_options, **self.batching)

    def run(self, part: str) -> dict[str, Any]:
        """Return the results of one of MANIPULATION_PARTS as JSON types."""
        assert part in MANIPULATION_PARTS
        with ignore_cut_warnings():
            return getattr(self, part)()

    def reconstruction(self) -> dict[str, Any]:
        """Return the PSNR in dB of reconstructions, by inversion method and guidance."""
        images = self.images[:RECONSTRUCTED]
        decoder = self.options.decoder
        values = {}
        for guidance in (1.0, decoder.guidance):
            options = replace(self.options, decoder=replace(decoder, guidance=guidance))
            suffix = "no guidance" if guidance == 1.0 else f"guidance {guidance:g}"
            methods = {"fixed_point": InversionOptions(), "plain": InversionOptions(iterations=0)}
            for method, inversion in methods.items():
                result = self.pipe.reconstruct(
                    images, options=options, inversion=inversion, **self.batching
                )
                decibels = psnr(to_tensor(result.images), to_tensor(images))
                values[f"{method}, {suffix}"] = {
                    "mean": decibels.mean().item(),
                    "minimum": decibels.min().item(),
                }
        large = [self.pairs.dataset[index].image for index in self.pairs.indices[:UPSAMPLED]]
        options = replace(self.options, upsamplers=deterministic(self.pipe.options).upsamplers)
        result = self.pipe.reconstruct(large, options=options, **self.batching)
        size = result.images[0].width
        truth = to_tensor([fit(image, size) for image in large])
        decibels = psnr(to_tensor(result.images), truth)
        return {
            "images": len(images),
            "steps": decoder.steps,
            "psnr": values,
            "upsampled": {"size": size, "images": len(large), "psnr": decibels.mean().item()},
        }

    def variations(self) -> dict[str, Any]:
        """Return the distance of variations to their sources, by eta."""
        source, pixels = normalise(self.latent.image_emb), to_tensor(self.images)
        off_diagonal = ~torch.eye(len(source), dtype=torch.bool)
        results: dict[str, Any] = {
            "images": len(source),
            "random_pairs": _mean((source @ source.T)[off_diagonal]),
        }
        for eta in ETAS:
            result = self.pipe.vary(self.latent, eta=eta, seed=self.seed, **self.batching)
            rms = (to_tensor(result.images) - pixels).square().mean(dim=(1, 2, 3)).sqrt()
            cosine = (self._embed(result) * source).sum(dim=1)
            results[str(eta)] = {"pixel_rms": _mean(rms), "cosine": _mean(cosine)}
        return results

    def interpolation(self) -> dict[str, Any]:
        """Compare the ends of paths to reconstructions, and the largest step to the mean step."""
        reconstructed = self.pipe.reconstruct(self.latent, **self.batching).images
        end_differences, embedding_steps = [], []
        steps: dict[str, list[float]] = {"plain": [], "even": []}
        for row in self._progress(range(0, len(self.images) - 1, 2)):
            for name in steps:
                result = self.pipe.interpolate(
                    self.latent[row : row + 2],
                    frames=FRAMES,
                    even=name == "even",
                    **{**self.batching, "progress": False},
                )
                for k, end in ((0, 0), (-1, 1)):
                    difference = _max_difference(result.images[k], reconstructed[row + end])
                    end_differences.append(difference)
                steps[name].append(_largest_step(self._embed(result)))
                if name == "plain":
                    embedding_steps.append(_largest_step(_given_emb(result)))
        return {
            "paths": len(embedding_steps),
            "frames": FRAMES,
            "ends_differ_by": max(end_differences),  # of 255
            "largest_step_of_embeddings": max(embedding_steps),  # relative to the mean, as below
            "largest_step": {
                name: {
                    "mean": float(np.mean(values)),
                    "maximum": max(values),
                    "within_twice": float(np.mean([value <= 2 for value in values])),
                }
                for name, values in steps.items()
            },
        }

    def text_diff(self) -> dict[str, Any]:
        """Compare text diffs to the caption of another image (target) and to their source."""
        results = {str(eta): self._text_diff(eta) for eta in TEXT_DIFF_ETAS}
        return {"cases": len(self.images), **results}

    def _text_diff(self, eta: float) -> dict[str, Any]:
        to_target, to_source, embedding_to_target = [], [], []
        for row in self._progress(range(len(self.images))):
            target = self.targets[row]
            result = self.pipe.text_diff(
                self.latent[[row]],
                self.pairs.captions[row],
                self.pairs.captions[target],
                THETAS,
                eta=eta,
                seed=self.seed + row,
                **{**self.batching, "progress": False},
            )
            emb = self._embed(result)  # (thetas, D)
            target_emb = normalise(self.text_emb[target])
            to_target.append(emb @ target_emb)
            to_source.append(emb @ normalise(self.latent.image_emb[row]))
            embedding_to_target.append(_given_emb(result) @ target_emb)
        target, source = torch.stack(to_target), torch.stack(to_source)  # (N, thetas)
        rising = target.diff(dim=1) > 0
        rising_embeddings = torch.stack(embedding_to_target).diff(dim=1) > 0
        names = [str(theta) for theta in THETAS]
        return {
            "monotone": _mean(rising.all(dim=1)),
            "rising_steps": _mean(rising),
            "monotone_embeddings": _mean(rising_embeddings.all(dim=1)),
            "cosine_to_target": dict(zip(names, target.mean(dim=0).tolist(), strict=True)),
            "cosine_to_source": dict(zip(names, source.mean(dim=0).tolist(), strict=True)),
        }

    def pca(self) -> dict[str, Any]:
        """Return cosine and recall of embeddings truncated to k components."""
        pca = PCA.fit(self.pca_embeddings())
        full = self.pipe.encode_image(self.images).cpu()
        rows, targets = caption_targets(self.pairs.captions)
        results: dict[str, Any] = {"images": len(full), "captions": len(rows), "by_count": {}}
        for k in shown_components(pca):
            emb = pca.truncate(full, k)
            results["by_count"][str(k)] = {
                "explained": pca.explained[k - 1].item(),
                "cosine": _mean((normalise(emb) * normalise(full)).sum(dim=1)),
                **recall(emb, self.text_emb[rows], targets, ks=(1,)),
            }
        results["full"] = recall(full, self.text_emb[rows], targets, ks=(1,))
        return results

    def inpainting(self) -> dict[str, Any]:
        """Inpaint the middle of each image with the caption of another.

        Measures recall of that caption in the middle and the seam at its border, by the inpainter
        if the model has one, by the plain decoder, and for a whole image pasted in. The seam is
        also measured with the image's own caption, since prompts should describe the whole image.
        """
        size = self.images[0].width
        margin = max(2, round(size * (1 - HOLE) / 2))
        box = (margin, margin, size - margin, size - margin)
        mask = Image.new("L", (size, size))
        mask.paste(255, box)
        methods = self._inpainting_methods()
        by_target: dict[str, list[Image.Image]] = {name: [] for name in (*methods, "pasted")}
        by_own: dict[str, list[Image.Image]] = {name: [] for name in methods}
        for row in self._progress(range(len(self.images))):
            sampling = {
                "seed": self.seed + row,
                "options": replace(self.pipe.options, upsamplers=()),
                "progress": False,
            }
            target, own = self.pairs.captions[self.targets[row]], self.pairs.captions[row]
            image = self.images[row]
            for name, painting in methods.items():
                for prompt, images in ((target, by_target), (own, by_own)):
                    images[name] += self.pipe.inpaint(
                        image, mask, prompt, painting=painting, **sampling
                    ).images
            whole = self.pipe(target, **sampling).images[0]
            by_target["pasted"].append(Image.composite(whole, image, mask))
        outside = np.asarray(mask) == 0
        rows, own_targets = caption_targets(self.pairs.captions)
        results: dict[str, Any] = {
            "images": len(self.images),
            "captions": len(rows),
            "random": 1 / len(rows),
        }
        for name, images in by_target.items():
            emb = self.pipe.encode_image([image.crop(box) for image in images]).cpu()
            results[name] = {
                "kept_differs_by": max(
                    _max_difference(*pair, outside)
                    for pair in zip(images, self.images, strict=True)
                ),
                "seam": _mean_seam(images, box),
                **recall(emb, self.text_emb[rows], own_targets[self.targets], ks=(1, 5)),
            }
        for name, images in by_own.items():
            results[name]["seam_of_own_caption"] = _mean_seam(images, box)
        results["seam_of_true_images"] = _mean_seam(self.images, box)
        return results

    def _inpainting_methods(self) -> dict[str, PaintOptions]:
        methods = {"training-free": PaintOptions(trained=False)}
        inpainter = self.pipe.inpainter
        if inpainter is not None:
            methods["fine-tuned"] = PaintOptions(trained=True)
        if isinstance(inpainter, Decoder) and inpainter.layout is not None:
            methods["fine-tuned, unguided"] = PaintOptions(trained=True, agreement=0.0)
        return methods

    def _embed(self, result: GenerationResult) -> Tensor:
        """Return normalised CLIP embeddings (N, D)."""
        return normalise(self.pipe.encode_image(result.images).cpu())

    def _progress(self, rows: Sequence[int]) -> Iterator[int]:
        return iter(tqdm(rows, disable=not self.progress, leave=False))


def _target(captions: Sequence[str], row: int) -> int:
    """Return a row with another caption: the first one from half of all rows after `row`."""
    count = len(captions)
    rows = ((row + count // 2 + k) % count for k in range(count))
    return next(other for other in rows if captions[other] != captions[row])


def _mean(values: Tensor) -> float:
    return values.float().mean().item()


def _given_emb(result: GenerationResult) -> Tensor:
    """Return the normalised embeddings (N, D) that the images were decoded from."""
    assert result.image_emb is not None
    return normalise(result.image_emb)


def _largest_step(emb: Tensor) -> float:
    """Return the largest step of a path (frames, D) of unit vectors, relative to the mean step."""
    steps = 1 - (emb[1:] * emb[:-1]).sum(dim=1)  # cosine distances
    return (steps.max() / steps.mean().clamp(min=1e-6)).item()


def _max_difference(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> int:
    difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
    return int((difference if where is None else difference[where]).max())


def _mean_seam(images: Sequence[Image.Image], box: tuple[int, int, int, int]) -> float:
    return float(np.mean([seam(image, box) for image in images]))


def seam(image: Image.Image, box: tuple[int, int, int, int]) -> float:
    """Return the colour step across the border of a box, of 255; 0: no visible seam.

    It is the mean absolute difference across the border minus that one pixel outside and inside.
    """
    left, top, right, bottom = box
    pixels, excess = np.asarray(image, dtype=float), []
    for rows, edges, (start, end) in (
        (pixels, (top, bottom), (left, right)),
        (pixels.swapaxes(0, 1), (left, right), (top, bottom)),
    ):
        for edge in edges:
            difference = np.abs(np.diff(rows[edge - 2 : edge + 2, start:end], axis=0))
            outside, across, inside = difference.mean(axis=(1, 2))
            excess.append(across - (outside + inside) / 2)
    return float(np.mean(excess))

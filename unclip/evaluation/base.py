"""The evaluation shared by all kinds of models, on pairs that the model was never trained on."""

# N held-out pairs, M training pairs, D CLIP embedding width, s size at which images are measured

from __future__ import annotations

import hashlib
import warnings
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip import __version__
from unclip.clip import CLIP
from unclip.config import to_dict
from unclip.data.shapes import read_scene
from unclip.embeddings import caption_targets
from unclip.evaluation import CLIP_PARTS, PARTS
from unclip.evaluation.colours import Combination, combinations, judge_colours, true_images
from unclip.evaluation.features import Extractor, as_uint8, extract
from unclip.evaluation.generator import ImageGenerator, Samples, ignore_cut_warnings
from unclip.evaluation.judge import Judge
from unclip.evaluation.metrics import (
    FEATURE_KID_SUBSET,
    NEIGHBOURS,
    clip_score,
    distribution_distances,
    diversity,
    mean_and_interval,
    nearest_by_cosine,
    nearest_by_pixels,
    recall,
)
from unclip.evaluation.pairs import Pairs
from unclip.evaluation.reference import Statistics
from unclip.evaluation.report import FEW_IMAGES
from unclip.evaluation.shapes import is_correct
from unclip.evaluation.style import train_classifier
from unclip.image_io import RESIZE_RULE, to_pil
from unclip.pipelines.offload import parts
from unclip.pipelines.provenance import regenerate

DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 8, 4


class Evaluation(ABC):
    """The evaluation of one model. Results that several parts need are computed once, on demand."""

    pipe: Any
    generator: ImageGenerator

    def __init__(
        self,
        generator: ImageGenerator,
        held_out: Pairs,
        train: Pairs | None = None,
        *,
        baseline: ImageGenerator | None = None,
        judge: Judge | None = None,
        extractor: Extractor | None = None,
        reference: Pairs | Statistics | None = None,
        seed: int = 0,
    ) -> None:
        """baseline: another model with images of the same size, embedded by the same CLIP.

        judge: classifies what the images show; see judge.py. extractor: computes the features in
        which the final images are compared; see features.py. reference: the distances of
        the final images are measured to it (default: to the held-out images).
        """
        pipe = generator.pipe
        held_out.check_captions()
        self.clip = pipe.components().get("clip")
        if judge is not None:
            judge.check(held_out.entries)
        if extractor is not None:
            if len(held_out) <= NEIGHBOURS:
                raise ValueError(f"{len(held_out)} pairs; --features needs more than {NEIGHBOURS}")
            extractor = extractor.bind(self.clip, pipe.device)
        if baseline is not None:
            sizes = [
                (one.size, one.full_size if extractor else None) for one in (baseline, generator)
            ]
            if sizes[0] != sizes[1]:
                own, other = (" to ".join(f"{size} px" for size in both if size) for both in sizes)
                given = f"{baseline.pipe.name} generates {own} and {pipe.name} {other}"
                raise ValueError(f"{given}; expected the same size")
        self.pipe, self.generator, self.baseline = pipe, generator, baseline
        self._use: Callable[[nn.Module], None] = pipe.runtime.use
        self.held_out, self.train, self.judge, self.seed = held_out, train, judge, seed
        self.extractor, self.reference = extractor, reference
        if extractor is not None and reference is not None:
            self._check_reference(extractor, reference)
        self.results: dict[str, Any] = {}  # of the last `run`

    def _check_reference(self, extractor: Extractor, reference: Pairs | Statistics) -> None:
        if not isinstance(reference, Statistics):
            if len(reference) <= NEIGHBOURS:
                given = f"the reference has {len(reference)} images"
                raise ValueError(f"{given}; --features needs more than {NEIGHBOURS}")
            return
        black = torch.zeros(1, 3, *2 * [self.generator.full_size], dtype=torch.uint8)
        width = extract(extractor, None, [black], self.pipe.device, self._use)[0].shape[1]
        if len(reference.mean) != width:
            given = f"{reference.file} has statistics of {len(reference.mean)} features"
            raise ValueError(f"{given}; {extractor.name} gives {width}; use the same extractor")

    def run(
        self,
        parts: Sequence[str] | None = None,
        save: Callable[[dict[str, Any]], None] = lambda results: None,
        earlier: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate some parts (default: all) and return the results as JSON types.

        save: called with all results so far after each part, since a part may take minutes.
        earlier: results of the same `settings()`, whose parts are not evaluated again.
        """
        known = self._known_parts()
        has_clip = "" if self.clip is not None else f" of {self.pipe.name}, which has no CLIP"
        if unknown := [part for part in parts or () if part not in known]:
            expected = f"expected some of {', '.join(known)}"
            raise ValueError(f"unknown part {unknown[0]!r}{has_clip}; {expected}")
        left_out = [part for part in PARTS[self.pipe.kind] if part in CLIP_PARTS]
        if parts is None and self.clip is None and left_out:
            warnings.warn(f"left out {', '.join(left_out)}{has_clip}", stacklevel=2)
        results = self.settings() if earlier is None else dict(earlier)
        for part in known:
            name = "recall" if part == "images" else part  # which has results of several names
            if name not in results and (parts is None or part in parts):
                found = getattr(self, part)()
                # A model without the stage gives no results.
                results |= found if part == "images" or not found else {part: found}
                save(results)
        self.results = results
        return results

    def settings(self) -> dict[str, Any]:
        """Return what the results depend on, as JSON types."""
        networks = {"clip": self.clip} if self.clip is not None else {}
        networks |= self.pipe.networks()
        settings: dict[str, Any] = {
            "model": self.pipe.name,
            "version": __version__,
            "parameters": {
                name: sum(p.numel() for p in network.parameters())
                for name, network in networks.items()
            },
            "options": to_dict(self.generator.options),
            "seed": self.seed,
            "sha256": {
                name: hash_weights(network, self._use) for name, network in networks.items()
            },
            "held_out": _describe(self.held_out),
        }
        if self.train is not None:
            settings["train"] = _describe(self.train)
        if self.baseline is not None:
            settings["baseline"] = self.baseline.pipe.name
        if self.pipe.quantized is not None:
            settings["quantized"] = self.pipe.quantized
        if self.judge is not None:
            settings["sha256"]["judge"] = hash_weights(self.judge)
        if self.extractor is not None:
            settings["extractor"] = self.extractor.name
            if isinstance(self.extractor.network, nn.Module):
                settings["sha256"]["extractor"] = hash_weights(self.extractor.network, self._use)
        if isinstance(self.reference, Statistics):
            settings["reference"] = {"file": self.reference.file, "sha256": self.reference.sha256}
        elif self.reference is not None:
            settings["reference"] = _describe(self.reference)
        return settings

    def _known_parts(self) -> tuple[str, ...]:
        """Return the parts that can be run with this model and these arguments."""
        left_out = CLIP_PARTS if self.clip is None else ()
        left_out += () if self.extractor is not None else ("features",)
        return tuple(part for part in PARTS[self.pipe.kind] if part not in left_out)

    def images(self) -> dict[str, Any]:
        """Evaluate the generated images: recall, judge, diversity, nearest images and style."""
        results = {"recall": self.recall(), "diversity": self.diversity()}
        if any(pair.scene for pair in self.held_out.entries):
            results["axes"] = self.axes()
        if self.judge is not None:
            results["judge"] = self.judged(self.judge)
            if len(self.held_out) > NEIGHBOURS:
                results["realism"] = self.realism(self.judge)
            if wanted := combinations(self.held_out):
                results["colours"] = self.colours(self.judge, wanted)
        if self.train is not None:
            results["nearest"] = self.nearest(self.train)
            if len(self.train.styles) > 1:
                results["style"] = self.style(self.train)
        return results

    @cached_property
    def text_emb(self) -> Tensor:
        """CLIP embeddings of the held-out captions (N, D)."""
        return self.generator.encode_text(self.held_out.captions).emb.cpu()

    @cached_property
    def true_emb(self) -> Tensor:
        """CLIP embeddings of the held-out images (N, D)."""
        return self.generator.embed(self.held_out.images)

    @cached_property
    def samples(self) -> Samples:
        """A generated image of each held-out caption."""
        return self.generator.generate(self.held_out.captions, self.seed)

    @cached_property
    def generated_emb(self) -> Tensor:
        """CLIP embeddings of the generated images (N, D)."""
        return self.generator.embed(self.samples.images)

    @cached_property
    def baseline_samples(self) -> Samples:
        """The images of the baseline, from the same captions and seeds."""
        assert self.baseline is not None
        return self.baseline.generate(self.held_out.captions, self.seed)

    @cached_property
    def image_embeddings(self) -> dict[str, Tensor]:
        """CLIP embeddings (N, D) of the generated, baseline and true images."""
        embeddings = {"generated": self.generated_emb}
        if self.baseline is not None:
            embeddings["baseline"] = self.generator.embed(self.baseline_samples.images)
        return {**embeddings, "true": self.true_emb}

    @cached_property
    def train_emb(self) -> Tensor:
        """CLIP embeddings of the training images (M, D)."""
        assert self.train is not None
        return self.generator.embed(self.train.images)

    @cached_property
    def nearest_to_generated(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows (N,) and distances (N,) of the nearest training pairs, by "clip" and "pixels"."""
        assert self.train is not None
        return {
            "clip": nearest_by_cosine(self.generated_emb, self.train_emb),
            "pixels": nearest_by_pixels(self.samples.images, self.train.images),
        }

    @cached_property
    def measured_images(self) -> dict[str, Tensor]:
        """The generated, baseline and true images, (N, 3, s, s) in [-1, 1] each."""
        images = {"generated": self.samples.images}
        if self.baseline is not None:
            images["baseline"] = self.baseline_samples.images
        return {**images, "true": self.held_out.floats()}

    def axes(self) -> dict[str, Any]:
        """Score images of shapes by an exact program; means with 95 % intervals, by axis."""
        rows = [row for row, pair in enumerate(self.held_out.entries) if pair.scene]
        entries = [self.held_out.entries[row] for row in rows]
        scenes = [read_scene(pair.scene, pair.caption) for pair in entries if pair.scene]
        results: dict[str, Any] = {}
        for name, images in self.measured_images.items():
            pairs = zip(to_pil(images[rows]), scenes, strict=True)
            hits = [is_correct(np.asarray(image), scene) for image, scene in pairs]
            by_axis: dict[str, list[bool]] = {}
            for hit, scene in zip(hits, scenes, strict=True):
                by_axis.setdefault(scene.axis, []).append(hit)
            results[name] = {
                axis: {"images": len(own), **mean_and_interval(torch.tensor(own), self.seed)}
                for axis, own in sorted(by_axis.items())
            }
        return results

    def judged(self, judge: Judge) -> dict[str, Any]:
        """Let the judge name concept and style of each image; means with 95 % intervals."""
        entries = self.held_out.entries
        return {
            name: self._means(judge.judge(images, entries).figures())
            for name, images in self.measured_images.items()
        }

    def colours(self, judge: Judge, wanted: Sequence[Combination]) -> dict[str, Any]:
        """Generate held-out combinations of colour and concept; means with 95 % intervals."""
        captions = [combination.pair.caption for combination in wanted]
        images = {"generated": self.generator.generate(captions, self.seed).images}
        if self.baseline is not None:
            images["baseline"] = self.baseline.generate(captions, self.seed).images
        images["true"] = true_images(self.held_out, wanted)
        means = {n: self._means(judge_colours(part, wanted, judge)) for n, part in images.items()}
        return {"images": len(wanted), **means}

    def _means(self, figures: dict[str, Tensor]) -> dict[str, Any]:
        return {name: mean_and_interval(hits, self.seed) for name, hits in figures.items()}

    def realism(self, judge: Judge) -> dict[str, Any]:
        """Compare the distributions of generated and true images in the judge's features."""
        images = self.measured_images
        features = {name: judge.embed(part) for name, part in images.items()}
        true = features.pop("true")
        distances = {name: distribution_distances(own, true) for name, own in features.items()}
        return {"images": len(true), **distances}

    def features(self) -> dict[str, Any]:
        """Compare final and true images, at full size, by the extractor and by CLIP.

        The CLIP score is 100 max(cosine, 0), by the extractor if it is a CLIP, else by the model's
        own CLIP if that encodes images.
        """
        extractor, size = self.extractor, self.generator.full_size
        assert extractor is not None and extractor.network is not None
        clip = extractor.network if isinstance(extractor.network, CLIP) else self.clip
        clip = None if clip is None or clip.model.visual is None else clip
        samples = {"generated": (self.generator, self.samples)}
        if self.baseline is not None:
            samples["baseline"] = (self.baseline, self.baseline_samples)

        def true_images(pairs: Pairs) -> Iterator[Tensor]:
            for part in self.generator.batches(len(pairs), "true images"):
                yield as_uint8([pairs.image(row, size) for row in range(len(pairs))[part]])

        measure = partial(extract, extractor, device=self.pipe.device, use=self._use)
        true, true_emb = measure(clip, true_images(self.held_out))
        results: dict[str, Any] = {"extractor": extractor.name, "size": size}
        if isinstance(extractor.network, nn.Module):
            results["sha256"] = hash_weights(extractor.network, self._use)
        rule, reference = f"{size} px, {RESIZE_RULE}", self.reference
        results["resize"] = {"true": rule, "features": extractor.resize}
        images: dict[str, int | None] = {"generated": len(self.held_out), "true": len(true)}
        results["images"] = images
        if isinstance(reference, Statistics):
            results["resize"]["reference"] = f"as for {reference.file}"
            images["reference"] = reference.images
        elif reference is not None:
            results["resize"]["reference"] = rule
            images["reference"] = len(reference)
            reference, _ = measure(None, true_images(reference))
        if len(true) < FEW_IMAGES:
            given = f"{len(true)} images; the Fréchet distance is too large below {FEW_IMAGES:,}"
            warnings.warn(f"{given}: compare only results of equal numbers", stacklevel=2)
        text_emb = None
        if clip is not None:
            self._use(clip)
            with torch.inference_mode(), ignore_cut_warnings():
                text_emb = clip.encode_captions(self.held_out.captions).emb.float().cpu()
        if text_emb is not None and true_emb is not None:
            results["true"] = {"clip_score": clip_score(true_emb, text_emb)}
        if reference is None:
            reference = true
        else:
            distances = distribution_distances(true, reference, FEATURE_KID_SUBSET)
            results["true"] = {**distances, **results.get("true", {})}
        for name, (generator, own) in samples.items():
            features, emb = measure(clip, generator.final_images(own))
            results[name] = distribution_distances(features, reference, FEATURE_KID_SUBSET)
            if text_emb is not None and emb is not None:
                results[name]["clip_score"] = clip_score(emb, text_emb)
        return results

    def recall(self) -> dict[str, Any]:
        """Retrieve the caption of each image among all held-out captions."""
        entries = self.held_out.entries
        all_rows = list(range(len(entries)))
        untoned = [row for row in all_rows if not entries[row].toned]
        groups = {"all": self._recall(all_rows, all_rows)}
        for style in self.held_out.styles:
            rows = [row for row in all_rows if entries[row].style == style]
            groups[style] = self._recall(all_rows, rows)
        if 0 < len(untoned) < len(entries):
            groups["without skin tones"] = self._recall(untoned, untoned)
        return {
            "groups": groups,
            "caption_cosine": {
                name: F.cosine_similarity(self.text_emb, emb).mean().item()
                for name, emb in self.image_embeddings.items()
            },
        }

    def _recall(self, caption_rows: list[int], image_rows: list[int]) -> dict[str, Any]:
        candidates, targets = self._candidates(caption_rows, image_rows)
        return {
            "images": len(image_rows),
            "captions": len(candidates),
            **{
                name: recall(emb[image_rows], candidates, targets)
                for name, emb in self.image_embeddings.items()
            },
        }

    def _candidates(
        self, caption_rows: Sequence[int], image_rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings of the distinct captions of some rows, and the target of each image."""
        first, targets = caption_targets([self.held_out.captions[row] for row in caption_rows])
        position = {row: i for i, row in enumerate(caption_rows)}
        return self.text_emb[caption_rows][first], targets[[position[row] for row in image_rows]]

    def diversity(self) -> dict[str, Any]:
        """Compare CLIP distances between images of one prompt and of different prompts."""
        rows = self.held_out.spread(DIVERSITY_PROMPTS)
        prompts = [self.held_out.captions[row] for row in rows for _ in range(DIVERSITY_SEEDS)]
        images = self.generator.generate(prompts, self.seed).images
        emb = self.generator.embed(images).unflatten(0, (len(rows), DIVERSITY_SEEDS))
        return {
            "prompts": len(rows),
            "seeds": DIVERSITY_SEEDS,
            "of_one_prompt": diversity(emb),
            "of_different_prompts": diversity(emb.transpose(0, 1)),
        }

    def nearest(self, train: Pairs) -> dict[str, Any]:
        """Compare the nearest training images of generated and of true images, to detect copies."""
        truth = self.held_out.floats()
        nearest = {
            "generated": self.nearest_to_generated,
            "true": {
                "clip": nearest_by_cosine(self.true_emb, self.train_emb),
                "pixels": nearest_by_pixels(truth, train.images),
            },
        }

        def same_concept(rows: Tensor) -> float:
            pairs = zip(self.held_out.entries, rows.tolist(), strict=True)
            return float(np.mean([pair.concept == train.entries[i].concept for pair, i in pairs]))

        results: dict[str, Any] = {}
        for kind in ("clip", "pixels"):
            found = {name: rows[kind] for name, rows in nearest.items()}
            results[kind] = {
                "median_distance": {name: x.median().item() for name, (_, x) in found.items()},
                "same_concept": {name: same_concept(rows) for name, (rows, _) in found.items()},
            }
        to_truth = (self.samples.images - truth).square().mean(dim=(1, 2, 3)).sqrt()  # (N,)
        nearer = to_truth < self.nearest_to_generated["pixels"][1]
        return {**results, "nearer_to_truth": nearer.float().mean().item()}

    def style(self, train: Pairs) -> dict[str, Any]:
        """Compare the style of each image, as classified after training on `train`, to its caption.

        Some images are equal in several styles, so the classifier also makes errors on true images;
        the last group has only the pairs whose true image is classified correctly.
        """
        classifier = train_classifier(train, self.seed, progress=self.generator.progress)
        entries = self.held_out.entries
        rows = [row for row, pair in enumerate(entries) if pair.style in classifier.styles]
        styles = [str(entries[row].style) for row in rows]
        correct = {"generated": classifier.is_style(self.samples.images[rows], styles)}
        if self.baseline is not None:
            correct["baseline"] = classifier.is_style(self.baseline_samples.images[rows], styles)
        correct["true"] = classifier.is_style(self.held_out.floats(rows), styles)
        groups = {"all": torch.ones_like(correct["true"])}
        for style in sorted(set(styles)):
            groups[style] = torch.tensor([other == style for other in styles])
        groups["true image classified correctly"] = correct["true"]
        return {
            group: {
                "images": int(mask.sum()),
                **{name: hits[mask].float().mean().item() for name, hits in correct.items()},
            }
            for group, mask in groups.items()
            if mask.any()
        }

    def repeatable(self) -> dict[str, Any]:
        """Compare the same seeds twice, alone and in a batch, and regenerated from metadata."""
        prompts = self.held_out.captions[:3]
        generate = partial(self.pipe, options=self.generator.options, progress=False)
        with ignore_cut_warnings():
            batch, again = generate(prompts, seed=self.seed), generate(prompts, seed=self.seed)
            pairs = zip(prompts, batch.seeds, strict=True)
            alone = [generate(prompt, seed=seed) for prompt, seed in pairs]
            regenerated = regenerate(self.pipe, alone[0].metadata[0], progress=False)
        differences = [
            np.abs(np.asarray(result.images[0], int) - np.asarray(image, int)).max()
            for result, image in zip(alone, batch.images, strict=True)
        ]
        return {
            "same_seed_same_bytes": _same_bytes(batch.images, again.images),
            "batch_and_alone_differ_by": int(max(differences)),  # of 255
            "from_metadata_same_bytes": _same_bytes(regenerated.images, alone[0].images),
        }


def hash_weights(network: nn.Module, use: Callable[[nn.Module], None] = lambda module: None) -> str:
    """Return the SHA-256 of names and values of a network's parameters and buffers, as loaded.

    use: called with the network, or with a U-Net of an upsampler, before its tensors are read.
    """
    total, is_whole = hashlib.sha256(), parts([network]) == [network]
    for name in sorted(dict(network.named_parameters()) | dict(network.named_buffers())):
        use(network if is_whole else getattr(network, name.partition(".")[0]))
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(network.get_submodule(owner), leaf)
        total.update(name.encode())
        total.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _describe(pairs: Pairs) -> dict[str, Any]:
    """Return the numbers of pairs and of broken images, and the SHA-256 of captions and images."""
    total = hashlib.sha256("\n".join(pairs.captions).encode())
    total.update(pairs.images.numpy().tobytes())
    return {"pairs": len(pairs), "broken": pairs.broken, "sha256": total.hexdigest()}


def _same_bytes(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> bool:
    return [image.tobytes() for image in images] == [image.tobytes() for image in others]

"""What inversion, variations, interpolation, text diffs, PCA and inpainting are worth on held-out pictures.

python -m unclip.evaluation.manipulation --data data/emoji/heldout-*.tar --json manipulation.json

Each part is written to the file as soon as it is done; started again, the command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.cli.common import add_model, load_model, whole_number, write_figures
from unclip.config import to_dict
from unclip.diffusion.inversion import InversionOptions
from unclip.diffusion.repaint import PaintOptions
from unclip.embeddings import PCA, normalise
from unclip.evaluation.drawing import no_cut_warnings
from unclip.evaluation.metrics import psnr, recall
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.report import Row, plain
from unclip.pipelines.unclip.bound_stage import fit, to_tensor
from unclip.pipelines.unclip.latent import Latent, deterministic
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.pipelines.unclip.probing import read_embeddings, shown_components
from unclip.types import GenerationResult

# N pictures, D CLIP embedding width

PARTS = ("reconstruction", "variations", "interpolation", "text_diff", "pca", "inpainting")
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
THETAS = (0.0, 0.25, 0.5)  # the paper ends between the last two
TEXT_DIFF_ETAS = (0.5, 0.0)  # the default, the paper's
FRAMES = 9
RECONSTRUCTED = 16  # pictures, of those that are given
UPSAMPLED = 4  # of them at full size
STEPS = (
    25  # of the decoder in all parts but reconstruction, at most: what they show hardly hangs on it
)
HOLE = (
    0.75  # side of the square that is painted, in the middle of the picture, as a share of its side
)
UNBENT = "fine-tuned, agreement 0"  # asked for just what the prompt says


class Manipulations:
    """One model on N held-out pairs; drawn at the decoder's size, which is all that a small CLIP sees."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        pairs: Pairs,
        fitted_on: Callable[[], Tensor],
        *,
        steps: int = 50,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        """fitted_on: gives the embeddings (M, D) of the PCA, if that part is asked for."""
        if len(pairs) < 2:
            raise ValueError(f"{len(pairs)} held-out pair; expected at least 2")
        self.pipe, self.pairs, self.fitted_on, self.seed = pipe, pairs, fitted_on, seed
        self.how = {"batch_size": batch_size, "progress": progress}
        size = pipe.decoder.config.image_size
        self.pictures = [pairs.picture(row, size) for row in range(len(pairs))]
        self.options, self.fewer = (
            replace(deterministic(pipe.options, most), upsamplers=())
            for most in (steps, min(steps, STEPS))
        )
        self._latent: Latent | None = None
        with no_cut_warnings():
            self.text_emb = pipe.encode_text(pairs.captions).emb.cpu()  # (N, D)

    @property
    def latent(self) -> Latent:
        """Of all pictures, under the model's own guidance."""
        if self._latent is None:
            self._latent = self.pipe.invert(self.pictures, options=self.fewer, **self.how)
        return self._latent

    def run(self, part: str) -> dict[str, Any]:
        """Results of one of PARTS, as JSON types."""
        with no_cut_warnings():
            return getattr(self, part)()

    def reconstruction(self) -> dict[str, Any]:
        """PSNR in dB of what is drawn from the inverted latents."""
        pictures = self.pictures[:RECONSTRUCTED]
        found: dict[str, Any] = {
            "pictures": len(pictures),
            "steps": self.options.decoder.steps,
            "psnr": {},
        }
        for name, guidance in (("none", 1.0), ("own", self.options.decoder.guidance)):
            options = replace(
                self.options, decoder=replace(self.options.decoder, guidance=guidance)
            )
            for kind, inversion in (
                ("fixed_point", InversionOptions()),
                ("plain", InversionOptions(iterations=0)),
            ):
                drawn = self.pipe.reconstruct(
                    pictures, options=options, inversion=inversion, **self.how
                )
                decibels = psnr(to_tensor(drawn.images), to_tensor(pictures))
                told = {"mean": decibels.mean().item(), "least": decibels.min().item()}
                found["psnr"][
                    f"{kind}, guidance {guidance:g}" if name == "own" else f"{kind}, no guidance"
                ] = told
        few = [self.pairs.dataset[index].image for index in self.pairs.indices[:UPSAMPLED]]
        options = replace(self.options, upsamplers=deterministic(self.pipe.options).upsamplers)
        drawn = self.pipe.reconstruct(few, options=options, **self.how)
        size = drawn.images[0].width
        decibels = psnr(to_tensor(drawn.images), to_tensor([fit(image, size) for image in few]))
        return {
            **found,
            "upsampled": {"size": size, "pictures": len(few), "psnr": decibels.mean().item()},
        }

    def variations(self) -> dict[str, Any]:
        """Distance of variations to their pictures, by eta."""
        source, pixels = normalise(self.latent.image_emb), to_tensor(self.pictures)
        off_diagonal = ~torch.eye(len(source), dtype=torch.bool)
        found: dict[str, Any] = {
            "pictures": len(source),
            "random_pairs": _mean((source @ source.T)[off_diagonal]),
        }
        for eta in ETAS:
            drawn = self.pipe.vary(self.latent, eta=eta, seed=self.seed, **self.how)
            rms = (to_tensor(drawn.images) - pixels).square().mean(dim=(1, 2, 3)).sqrt()
            found[str(eta)] = {
                "pixel_rms": _mean(rms),
                "cosine": _mean((self._embed(drawn) * source).sum(dim=1)),
            }
        return found

    def interpolation(self) -> dict[str, Any]:
        """Paths between neighbouring pictures: do they end at the reconstructions, and how even are their steps?"""
        again = self.pipe.reconstruct(self.latent, **self.how).images
        ends, given = [], []
        worst: dict[str, list[float]] = {"plain": [], "even": []}
        for row in self._bar(range(0, len(self.pictures) - 1, 2)):
            for name, largest in worst.items():
                how = {**self.how, "progress": False, "even": name == "even"}
                drawn = self.pipe.interpolate(self.latent[row : row + 2], frames=FRAMES, **how)
                ends += [
                    _difference(drawn.images[k], again[row + end]) for k, end in ((0, 0), (-1, 1))
                ]
                largest.append(_largest_step(self._embed(drawn)))
                if name == "plain":
                    given.append(_largest_step(normalise(drawn.image_emb)))
        return {
            "paths": len(given),
            "frames": FRAMES,
            "ends_differ_by": max(ends),  # of 255
            "largest_step_of_embeddings": max(given),  # over the mean one, as below
            "largest_step": {
                name: {
                    "mean": float(np.mean(largest)),
                    "most": max(largest),
                    "within_twice": float(np.mean([one <= 2 for one in largest])),
                }
                for name, largest in worst.items()
            },
        }

    def text_diff(self) -> dict[str, Any]:
        """From each picture's caption to another's: does CLIP see the target come nearer, and the source stay?"""
        return {
            "cases": len(self.pictures),
            **{str(eta): self._text_diff(eta) for eta in TEXT_DIFF_ETAS},
        }

    def _text_diff(self, eta: float) -> dict[str, Any]:
        similar, kept, given = [], [], []
        for row in self._bar(range(len(self.pictures))):
            target = (row + len(self.pictures) // 2) % len(self.pictures)
            captions = self.pairs.captions[row], self.pairs.captions[target]
            how = {**self.how, "progress": False, "eta": eta, "seed": self.seed + row}
            drawn = self.pipe.text_diff(self.latent[[row]], *captions, THETAS, **how)
            emb = self._embed(drawn)  # (thetas, D)
            similar.append(emb @ normalise(self.text_emb[target]))
            kept.append(emb @ normalise(self.latent.image_emb[row]))
            given.append(normalise(drawn.image_emb) @ normalise(self.text_emb[target]))
        table = torch.stack(similar)  # (N, thetas)
        return {
            "monotone": _mean((table.diff(dim=1) > 0).all(dim=1)),
            "rising_steps": _mean(table.diff(dim=1) > 0),
            "monotone_embeddings": _mean((torch.stack(given).diff(dim=1) > 0).all(dim=1)),
            "cosine_to_target": dict(
                zip(map(str, THETAS), table.mean(dim=0).tolist(), strict=True)
            ),
            "cosine_to_source": dict(
                zip(map(str, THETAS), torch.stack(kept).mean(dim=0).tolist(), strict=True)
            ),
        }

    def pca(self) -> dict[str, Any]:
        """What the first k components keep: cosine to the whole embedding, and the caption that is nearest."""
        fitted = PCA.fit(self.fitted_on())
        whole = self.pipe.encode_image(self.pictures).cpu()
        rows, right = _captions(self.pairs.captions)
        found: dict[str, Any] = {"pictures": len(whole), "captions": len(rows), "of": {}}
        for k in shown_components(fitted):
            emb = fitted.truncate(whole, k)
            found["of"][str(k)] = {
                "explained": fitted.explained[k - 1].item(),
                "cosine": _mean((normalise(emb) * normalise(whole)).sum(dim=1)),
                **recall(emb, self.text_emb[rows], right, ks=(1,)),
            }
        found["whole"] = recall(whole, self.text_emb[rows], right, ks=(1,))
        return found

    def inpainting(self) -> dict[str, Any]:
        """Each picture's middle painted after another's caption: does CLIP see it there, and is there a seam?

        By the inpainter, if the model has one, and by the plain decoder; and a whole picture's middle pasted in. The
        seam also after the picture's own caption, which tells what the whole picture shows, as prompts should.
        """
        size = self.pictures[0].width
        margin = max(2, round(size * (1 - HOLE) / 2))
        middle = (margin, margin, size - margin, size - margin)
        mask = Image.new("L", (size, size))
        mask.paste(255, middle)
        targets = [
            (row + len(self.pictures) // 2) % len(self.pictures)
            for row in range(len(self.pictures))
        ]
        ways, inpainter = {"training-free": PaintOptions(trained=False)}, self.pipe.inpainter
        if inpainter is not None:
            ways["fine-tuned"] = PaintOptions(trained=True)
        if getattr(inpainter, "layout", None) is not None:
            ways[UNBENT] = PaintOptions(trained=True, agreement=0.0)
        options, drawn = (
            replace(self.pipe.options, upsamplers=()),
            {name: [] for name in (*ways, "pasted")},
        )
        suited: dict[str, list[Image.Image]] = {name: [] for name in ways}
        for row in self._bar(range(len(self.pictures))):
            chosen = {"seed": self.seed + row, "options": options, "progress": False}
            prompt, picture = self.pairs.captions[targets[row]], self.pictures[row]
            for name, painting in ways.items():
                for told, images in ((prompt, drawn), (self.pairs.captions[row], suited)):
                    images[name] += self.pipe.inpaint(
                        picture, mask, told, painting=painting, **chosen
                    ).images
            whole = self.pipe(prompt, **chosen).images[0]
            drawn["pasted"].append(Image.composite(whole, picture, mask))
        outside = np.asarray(mask) == 0
        rows, right = _captions(self.pairs.captions)
        right = right[targets]
        found: dict[str, Any] = {
            "pictures": len(targets),
            "captions": len(rows),
            "random": 1 / len(rows),
        }
        for name, images in drawn.items():
            emb = self.pipe.encode_image([image.crop(middle) for image in images]).cpu()
            found[name] = {
                "kept_differs_by": max(
                    _difference(*pair, outside) for pair in zip(images, self.pictures, strict=True)
                ),
                "seam": float(np.mean([_seam(image, middle) for image in images])),
                **recall(emb, self.text_emb[rows], right, ks=(1, 5)),
            }
        for name, images in suited.items():
            found[name]["seam_of_own_caption"] = float(
                np.mean([_seam(image, middle) for image in images])
            )
        found["seam_of_true_pictures"] = float(
            np.mean([_seam(image, middle) for image in self.pictures])
        )
        return found

    def _embed(self, drawn: GenerationResult) -> Tensor:
        """(N, D), of unit length."""
        return normalise(self.pipe.encode_image(drawn.images).cpu())

    def _bar(self, rows: Sequence[int]) -> Iterator[int]:
        return iter(tqdm(rows, disable=not self.how["progress"], leave=False))


def _largest_step(emb: Tensor) -> float:
    """Of a path (frames, D) of unit vectors, by cosine distance, over the mean step."""
    steps = 1 - (emb[1:] * emb[:-1]).sum(dim=1)
    return (steps.max() / steps.mean().clamp(min=1e-6)).item()


def _mean(values: Tensor) -> float:
    return values.float().mean().item()


def _captions(captions: Sequence[str]) -> tuple[list[int], Tensor]:
    """Rows of the different captions, and for each caption which of them it is."""
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
    place = {caption: i for i, caption in enumerate(first)}
    return list(first.values()), torch.tensor([place[caption] for caption in captions])


def _difference(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> int:
    difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
    return int((difference if where is None else difference[where]).max())


def _seam(image: Image.Image, box: tuple[int, int, int, int]) -> float:
    """By how much the colours step from the last pixels outside a box to the first inside, of 255; 0 = no seam.

    That is, more than they do on the mean a pixel farther out and farther in.
    """
    left, top, right, bottom = box
    excess = []
    for pixels, edges, (start, end) in (
        (np.asarray(image, dtype=float), (top, bottom), (left, right)),
        (np.asarray(image, dtype=float).swapaxes(0, 1), (left, right), (top, bottom)),
    ):
        for edge in edges:
            out, across, within = np.abs(
                np.diff(pixels[edge - 2 : edge + 2, start:end], axis=0)
            ).mean(axis=(1, 2))
            excess.append(across - (out + within) / 2)
    return float(np.mean(excess))


def rows(results: dict[str, Any]) -> Iterator[Row]:
    """The parts that have been run, as a table."""
    if part := results.get("reconstruction"):
        for name, value in part["psnr"].items():
            what = f"reconstruction, {name} ({part['pictures']} pictures, {part['steps']} steps)"
            yield Row(what, f"{value['mean']:.1f} dB", f"least {value['least']:.1f} dB")
        large = part["upsampled"]
        yield Row(
            f"... with upsamplers, {large['size']} px ({large['pictures']} pictures)",
            f"{large['psnr']:.1f} dB",
        )
    if part := results.get("variations"):
        for eta in map(str, ETAS):
            beside = f"cosine to the source {part[eta]['cosine']:.3f}"
            yield Row(
                f"variations, eta {eta}: pixel RMS, of 2", f"{part[eta]['pixel_rms']:.3f}", beside
            )
        yield Row("cosine of random pairs of pictures", f"{part['random_pairs']:.3f}")
    if part := results.get("interpolation"):
        yield Row(
            "interpolation: ends and reconstructions differ by", f"{part['ends_differ_by']}/255"
        )
        value = part["largest_step_of_embeddings"]
        yield Row(
            "... largest step over mean step, by cosine of the embeddings given", f"{value:.2f}"
        )
        for name, how in (
            ("plain", "of the frames"),
            ("even", "of frames put where steps are even"),
        ):
            step = part["largest_step"][name]
            beside = f"most {step['most']:.2f}; {step['within_twice']:.0%} of {part['paths']} paths within twice"
            yield Row(f"... the same, {how}", f"{step['mean']:.2f}", beside)
    if part := results.get("text_diff"):
        for eta in map(str, TEXT_DIFF_ETAS):
            of, what = part[eta], f"text diff, eta {eta}"
            beside = f"steps that rise {of['rising_steps']:.0%}; embeddings given {of['monotone_embeddings']:.0%}"
            yield Row(
                f"{what}: monotone towards the target ({part['cases']} cases)",
                f"{of['monotone']:.0%}",
                beside,
            )
            for theta in map(str, THETAS):
                target, source = of["cosine_to_target"][theta], of["cosine_to_source"][theta]
                yield Row(
                    f"... theta {theta}: cosine to the target",
                    f"{target:.3f}",
                    f"to the source {source:.3f}",
                )
    if part := results.get("pca"):
        for k, of in part["of"].items():
            what = f"{k} components, {of['explained']:.0%} of the variance: recall@1 of {part['captions']} captions"
            yield Row(what, f"{of['recall@1']:.1%}", f"cosine to the whole {of['cosine']:.3f}")
        yield Row("the whole embedding", f"{part['whole']['recall@1']:.1%}")
    if part := results.get("inpainting"):
        for name in [
            name for name in ("fine-tuned", UNBENT, "training-free", "pasted") if name in part
        ]:
            of, what = (
                part[name],
                f"inpainting, {name}" if name != "pasted" else "a whole picture's part pasted in",
            )
            yield Row(
                f"{what}: recall@1 of the prompt in the hole",
                f"{of['recall@1']:.1%}",
                f"random {part['random']:.1%}",
            )
            beside = f"true pictures {part['seam_of_true_pictures']:.1f}"
            yield Row(f"{what}: seam, of 255", f"{of['seam']:.1f}", beside)
            if "seam_of_own_caption" in of:
                yield Row(
                    "... the same, after the picture's own caption",
                    f"{of['seam_of_own_caption']:.1f}",
                    beside,
                )
            yield Row(f"{what}: what is kept differs by", f"{of['kept_differs_by']}/255")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.evaluation.manipulation", description=__doc__.split("\n")[0]
    )
    add_model(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DATA", help="held-out pairs: tars, or a folder"
    )
    about = "pictures or embeddings that the PCA is fitted on (default: those of --data)"
    parser.add_argument("--train-data", nargs="+", metavar="DATA", help=about)
    parser.add_argument(
        "--limit", type=whole_number, default=32, metavar="N", help="pairs (default: 32)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)"
    )
    about = "of inverted DDIM, at least (default: 50); parts other than reconstruction need no more than 25"
    parser.add_argument("--steps", type=int, default=50, metavar="N", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=16,
        metavar="N",
        help="pictures at once (default: 16)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures of each part here"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        print(plain([Row("figure", "model", "beside it"), *rows(measure(args))]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command goes on with the parts that are missing"
        ) from None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts that are asked for: those in the file as they are, the others measured and added to it."""
    pipe = load_model(args)
    if not isinstance(pipe, UnCLIPPipeline):
        raise ValueError(f"{args.model} is of kind {pipe.kind}; only unCLIP models have latents")
    progress = not args.quiet
    settings = {
        "model": args.model,
        "options": to_dict(pipe.options),
        "pairs": args.limit,
        "steps": args.steps,
        "seed": args.seed,
    }
    settings = json.loads(json.dumps(settings))  # as they come out of a file
    results: dict[str, Any] = {"settings": settings}
    if args.json is not None and args.json.is_file():
        results = json.loads(args.json.read_text(encoding="utf-8"))
        if results.get("settings") != settings:
            raise ValueError(
                f"{args.json} holds figures under other settings; choose another file or the same settings"
            )
    pairs = load_pairs(args.data, pipe.decoder.config.image_size, args.limit, progress)
    manipulations = Manipulations(
        pipe,
        pairs,
        lambda: read_embeddings(pipe, args.train_data or args.data, progress=progress),
        steps=args.steps,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=progress,
    )
    for part in args.parts:
        if part not in results:
            results[part] = manipulations.run(part)
            write_figures(results, args.json, tell=False)
    return results


if __name__ == "__main__":
    main()

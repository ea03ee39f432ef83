"""Images of concepts that a style lacks, predicted from those of other styles.

python -m unclip.data.complete 'data/emoji_styles/train-*.tar' data/completed --styles noto blob

A dataset of several styles has most concepts in some of them only. A small U-Net learns to predict
the image of a concept in one style from its images in others, where there are both, and then
predicts the missing ones. They have the size of a layout: a layout prior that is also trained on
them does not have to combine concept and style for the first time when it generates.

Samples need "style" and "hexcode" in their metadata, as `unclip.data.emoji` writes them.
"""

# B batch, S styles, C concepts, K = S + 1 sources of a prediction, s side of the images

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from unclip.data.colours import main_colour
from unclip.data.loader import open_dataset
from unclip.data.precompute import start
from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Dataset, Sample
from unclip.data.shards import ShardWriter
from unclip.files import atomic_file, check_new_folder, exit_on_error
from unclip.image_io import small_images, to_pil

SIZE = 16  # side of the images, as of a layout
SAVED_SIZE = 64  # side of the saved images
WIDTHS = (48, 96, 192)
STYLE_WIDTH = 64
BATCH, STEPS, LR, EMA = 64, 2400, 1.5e-3, 0.99
SAVE_EVERY = 100  # updates
SETTINGS, STATE = "settings.json", "training.pt"  # files in the output folder until all is done
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
NEAR = 0.1  # a source at less than this root mean square distance is nearly the target
NEAR_DROP, VARIANT_DROP, DROP = 0.9, 0.7, 0.15  # probabilities of hiding sources in training

Cell = tuple[int, int]  # style and concept


@dataclass(frozen=True)
class Table:
    """The images of a dataset by style and concept."""

    styles: list[str]
    concepts: list[str]  # hexcodes
    samples: dict[Cell, Sample]
    images: Tensor  # (S, C, 3, s, s) in [-1, 1]; 0 where there is none
    present: Tensor  # (S, C) bool

    @cached_property
    def families(self) -> dict[tuple[int, str], list[int]]:
        """The concepts that differ in skin tone only, by style and hexcode without tones."""
        found = defaultdict(list)
        for style, concept in sorted(self.samples):
            found[style, _without_tone(self.concepts[concept])].append(concept)
        return found

    def missing(self, styles: Sequence[str]) -> Tensor:
        """Return the cells (N, 2) of some styles that only other styles have."""
        wanted = torch.tensor([style in styles for style in self.styles])
        return (wanted[:, None] & ~self.present & self.present.any(dim=0)).nonzero()

    def sources(self, cells: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images (B, K, 3, s, s) that cells (B, 2) can be predicted from, and a mask (B, K).

        They are the concept in all other styles and, last, a variant in the same style that differs
        in skin tone.
        """
        styles, concepts = cells.T
        images = F.pad(self.images[:, concepts].transpose(0, 1), (0, 0, 0, 0, 0, 0, 0, 1))
        mask = F.pad(self.present[:, concepts].T.float(), (0, 1))
        mask[torch.arange(len(cells)), styles] = 0
        for row, (style, concept) in enumerate(cells.tolist()):
            family = self.families[style, _without_tone(self.concepts[concept])]
            if others := [other for other in family if other != concept]:
                other = others[int(torch.randint(len(others), (), generator=generator))]
                images[row, -1], mask[row, -1] = self.images[style, other], 1
        return images, mask


class StyleBlock(nn.Module):
    """A residual block of two convolutions, modulated by the style."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(STYLE_WIDTH, 2 * width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.modulation(style)[:, :, None, None].chunk(2, dim=1)
        return x + self.conv2(F.silu(self.conv1(F.silu(x)) * (1 + scale) + shift))


class StyleTranslator(nn.Module):
    """A U-Net that predicts an image in one style from the same concept in others.

    The output is a mean of the sources, weighted for each pixel, plus a correction.
    """

    def __init__(self, num_styles: int) -> None:
        super().__init__()
        a, b, c = WIDTHS
        K = num_styles + 1
        self.style = nn.Embedding(num_styles, STYLE_WIDTH)
        self.stem = nn.Conv2d(4 * K, a, 3, padding=1)
        self.down1, self.to_2 = StyleBlock(a), nn.Conv2d(a, b, 2, stride=2)
        self.down2, self.to_3 = StyleBlock(b), nn.Conv2d(b, c, 2, stride=2)
        self.middle1, self.middle2 = StyleBlock(c), StyleBlock(c)
        self.from_3, self.up2 = nn.Conv2d(c, b, 1), StyleBlock(b)
        self.from_2, self.up1, self.up0 = nn.Conv2d(b, a, 1), StyleBlock(a), StyleBlock(a)
        self.head = nn.Conv2d(a, 3 + K, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor, mask: Tensor, style: Tensor) -> Tensor:
        """Images (B, K, 3, s, s), mask (B, K), indices of styles (B,) -> (B, 3, s, s)."""
        emb, shown = self.style(style), mask[:, :, None, None, None]
        images = images * shown
        planes = shown.expand(-1, -1, 1, *images.shape[-2:])
        x = torch.cat([images, planes], dim=2).flatten(1, 2)
        x1 = self.down1(self.stem(x.contiguous(memory_format=torch.channels_last)), emb)
        x2 = self.down2(self.to_2(x1), emb)
        x3 = self.middle2(self.middle1(self.to_3(x2), emb), emb)
        x = self.up2(x2 + F.interpolate(self.from_3(x3), scale_factor=2), emb)
        x = self.up0(self.up1(x1 + F.interpolate(self.from_2(x), scale_factor=2), emb), emb)
        change, scores = self.head(F.silu(x)).split([3, mask.shape[1]], dim=1)
        weights = scores.masked_fill(mask[:, :, None, None] == 0, -1e4).softmax(dim=1)
        return change + (weights[:, :, None] * images).sum(dim=1)


def read_table(dataset: Dataset, progress: bool = True) -> Table:
    """Read all images of a dataset. Raises ValueError for samples without style or hexcode."""
    samples: dict[tuple[str, str], Sample] = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        style, hexcode = sample.meta.get("style"), sample.meta.get("hexcode")
        if not isinstance(style, str) or not isinstance(hexcode, str):
            expected = 'expected "style" and "hexcode" in its metadata, as unclip.data.emoji writes'
            raise ValueError(f"{sample.where or sample.key}: {expected}")
        samples[style, hexcode] = sample
    styles, concepts = (sorted({key[i] for key in samples}) for i in (0, 1))
    cells = {
        (styles.index(style), row): sample
        for row, hexcode in enumerate(concepts)
        for style in styles
        if (sample := samples.get((style, hexcode)))
    }
    images = torch.zeros(len(styles), len(concepts), 3, SIZE, SIZE)
    for cell, sample in tqdm(cells.items(), "reading", disable=not progress, leave=False):
        images[cell] = small_images([sample.image], SIZE)[0]
    present = torch.zeros(len(styles), len(concepts), dtype=torch.bool)
    present[tuple(torch.tensor(list(cells)).T)] = True
    return Table(styles, concepts, cells, images, present)


class TranslatorTraining:
    """Trains on all images whose concept exists in another style; exact when resumed.

    Raises ValueError if there are none.
    """

    def __init__(self, table: Table, steps: int = STEPS, seed: int = 0) -> None:
        self.table, self.steps, self.seed, self.step = table, steps, seed, 0
        self.cells = (table.present & (table.present.sum(dim=0) > 1)).nonzero()
        if not len(self.cells):
            names = ", ".join(table.styles)
            raise ValueError(f"no concept exists in two of the styles {names}; nothing to learn")
        weights = [table.samples[style, concept].weight for style, concept in self.cells.tolist()]
        self.weights = torch.tensor(weights)
        if not self.weights.any():
            raise ValueError("the weights of all images are 0; nothing to learn")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = StyleTranslator(len(table.styles))
        self.average = copy.deepcopy(self.network)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.AdamW(parameters, LR, (0.9, 0.98), weight_decay=0.02)

    def run(self, file: Path | None = None, progress: bool = True) -> StyleTranslator:
        """Train to the end and return the averaged network; resume from `file` and save to it."""
        if file is not None and file.is_file():
            self.load(file)
        steps = range(self.step, self.steps)
        bar = tqdm(steps, "learning styles", self.steps, initial=self.step, disable=not progress)
        for _ in bar:
            self.update()
            if file is not None and (self.step % SAVE_EVERY == 0 or self.step == self.steps):
                self.save(file)
        return self.average.eval()

    def update(self) -> None:
        warmup = min(1, (self.step + 1) / 100)
        decayed = 0.5 + 0.5 * math.cos(math.pi * self.step / self.steps)
        self.optimizer.param_groups[0]["lr"] = LR * warmup * decayed
        with torch.random.fork_rng(devices=[]):  # random numbers depend on the step alone
            torch.manual_seed(self.seed + (self.step << 32))
            batch = self.cells[torch.multinomial(self.weights, BATCH, replacement=True)]
            images, mask, target = _augment(self.table, batch)
        output = self.network(images, mask, batch[:, 0])
        loss = F.l1_loss(output, target) + 0.5 * F.mse_loss(output, target)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        weight = 1 - min(EMA, self.step / (9 + self.step))
        pairs = zip(self.average.parameters(), self.network.parameters(), strict=True)
        for mean, parameter in pairs:
            mean.data.lerp_(parameter.detach(), weight)

    def save(self, file: Path) -> None:
        """Write the state of the training atomically."""
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(file) as part:
            torch.save(state, part)

    def load(self, file: Path) -> None:
        """Load the state of a training with the same data and settings."""
        try:
            state = torch.load(file, weights_only=True)
        except Exception:  # torch has no specific type
            raise ValueError(f"{file} is damaged; delete it to start again") from None
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def _augment(table: Table, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sources, mask and targets: mirrored, shifted, and with some sources hidden."""
    images, mask = table.sources(cells, torch.default_generator)
    target = table.images[cells[:, 0], cells[:, 1]]
    distance = (images - target[:, None]).square().mean(dim=(2, 3, 4)).sqrt()
    drop = torch.where(distance < NEAR, NEAR_DROP, DROP)
    drop[:, -1] = VARIANT_DROP
    mask = mask * (torch.rand(mask.shape) >= drop)
    if torch.rand(()) < 0.5:
        images, target = images.flip(-1), target.flip(-1)
    shift = torch.randint(-1, 2, (2,)).tolist()
    return images.roll(shift, (-1, -2)), mask, target.roll(shift, (-1, -2))


@torch.inference_mode()
def predict(table: Table, network: StyleTranslator, cells: Tensor, seed: int = 0) -> Tensor:
    """Predict the images (N, 3, s, s) in [-1, 1] of cells (N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    parts = [network(*table.sources(part, generator), part[:, 0]) for part in cells.split(256)]
    return torch.cat(parts).clamp(-1, 1)


def complete(
    dataset: Dataset,
    out: str | Path,
    styles: Sequence[str] | None = None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Write the missing images of some styles (default: all) as `out/train-*.tar`.

    Returns their number; resumes what was interrupted. Raises ValueError for unknown styles, other
    settings than those of the interrupted run, and if nothing is missing.
    """
    table = read_table(dataset, progress)
    if unknown := sorted({*(styles or ())} - {*table.styles}):
        raise ValueError(f"no style {unknown[0]!r}; expected some of {', '.join(table.styles)}")
    cells = table.missing(styles or table.styles)
    if not len(cells):
        raise ValueError("every concept exists in these styles; nothing is missing")
    settings = {
        "data": hashlib.sha256(table.images.numpy().tobytes()).hexdigest()[:16],
        "styles": sorted(styles or table.styles),
        "steps": steps,
        "seed": seed,
    }
    training = TranslatorTraining(table, steps, seed)
    folder = start(out, SETTINGS, settings).folder
    network = training.run(folder / STATE, progress)
    images = to_pil(F.interpolate(predict(table, network, cells, seed), SAVED_SIZE, mode="bicubic"))
    with ShardWriter(folder, "train") as writer:
        for (style, concept), image in zip(cells.tolist(), images, strict=True):
            file = io.BytesIO()
            image.save(file, "PNG")
            meta = _with_colour(_describe(table, style, concept), image)
            files = {"png": file.getvalue(), "json": meta}
            key = f"{table.styles[style]}-{table.concepts[concept]}"
            writer.write(key.replace(".", "_"), files)  # shards end a key at a dot
    (folder / STATE).unlink()
    (folder / SETTINGS).unlink()
    return len(cells)


def _describe(table: Table, style: int, concept: int) -> dict[str, Any]:
    """Return metadata like those of the concept in the style with the most captions."""
    found = [
        (len(sample.captions), -other, sample)
        for other in range(len(table.styles))
        if (sample := table.samples.get((other, concept)))
    ]
    sample = max(found, key=lambda entry: entry[:2])[2]
    old, new = sample.meta["style"], table.styles[style]
    captions = [caption.replace(old, new) for caption in sample.captions]
    return {**sample.meta, "captions": captions, "style": new}


def _with_colour(meta: dict[str, Any], image: Image.Image) -> dict[str, Any]:
    """Return metadata with the image's main colour, without captions that name the source's."""
    if meta.get("tone") is not None:  # the captions name the colour of the skin
        return meta
    old, new = meta.get("colour"), main_colour(np.asarray(image))
    if old is None or old == new or old in _words(meta["captions"][0]):
        return {**meta, "colour": new}
    captions = [caption for caption in meta["captions"] if old not in _words(caption)]
    return {**meta, "colour": new, "captions": captions}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _without_tone(hexcode: str) -> str:
    return "-".join(part for part in hexcode.split("-") if part not in SKIN_TONES)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.complete",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="tar shards (quote a pattern)")
    parser.add_argument("out", metavar="OUT", help="new folder for train-*.tar")
    about = "styles to complete (default: all)"
    parser.add_argument("--styles", nargs="+", metavar="STYLE", help=about)
    about = "updates of the U-Net (default: %(default)s, about half an hour of one core)"
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    options = parser.parse_args(arguments)
    with exit_on_error("interrupted; the same command resumes"):
        out = Path(options.out)
        if not (out / SETTINGS).is_file():
            check_new_folder(out)
        if not 0 <= options.seed < 2**31:
            raise ValueError(f"--seed is {options.seed}; expected 0 to {2**31 - 1}")
        if options.steps < 1:
            raise ValueError(f"--steps is {options.steps}; expected 1 or more")
        dataset = open_dataset(options.data)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(f"{options.data} contains precomputed data; expected images")
        count = complete(dataset, out, options.styles, steps=options.steps, seed=options.seed)
    print(f"{options.out}: {count} predicted images")


if __name__ == "__main__":
    main()

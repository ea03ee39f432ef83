"""A small U-Net that predicts the image of a concept in one style from its images in others."""

# B batch, S styles, C concepts, K = S + 1 sources of a prediction, s side of the images

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from unclip.data.samples import Dataset, Sample
from unclip.files import atomic_file
from unclip.image_io import small_images

SIZE = 16  # side of the images, as of a layout
WIDTHS = (48, 96, 192)
STYLE_WIDTH = 64
BATCH, STEPS, LR, EMA = 64, 2400, 1.5e-3, 0.99
SAVE_EVERY = 100  # updates
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


def _without_tone(hexcode: str) -> str:
    return "-".join(part for part in hexcode.split("-") if part not in SKIN_TONES)

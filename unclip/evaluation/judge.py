"""A judge: a classifier of concepts and styles that is independent of the evaluated model.

The decoder is trained on embeddings of the model's own CLIP, which therefore overestimates its
images. The judge is trained on true images only, with augmentations that no other training uses
(rotation, shear, colour shift, blur, noise). They include the held-out images, because the judge
must recognise concepts that the model was not trained on.
"""

# N images, B batch, S image size, F features

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from unclip.config import NonNegativeInt, PositiveInt, config, parse
from unclip.evaluation.pairs import Pair, Pairs
from unclip.image_io import from_uint8
from unclip.training.ema import EMA
from unclip.weights import load_strictly, read_tensors, save_tensors

METADATA_KEY = "judge"
WIDTHS = (32, 64, 128, 256)
BATCH, LR, WEIGHT_DECAY = 128, 3e-3, 0.02
STEPS = 3500
_TONE = re.compile(r"(: |, )?(medium-light|medium-dark|light|medium|dark) skin tone")


def judged_concept(pair: Pair) -> str:
    """Return the concept that the judge should name: without skin tones."""
    return _TONE.sub("", pair.concept).rstrip(":, ")


@config
class JudgeConfig:
    concepts: list[str]
    styles: list[str]  # empty: only concepts are judged
    image_size: PositiveInt = 40  # images are resized to it
    steps: PositiveInt = STEPS  # of training
    seed: NonNegativeInt = 0


class ResidualBlock(nn.Module):
    """Two convolutions; the first halves the size."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(F.avg_pool2d(x, 2, ceil_mode=True)) + h)


class Judge(nn.Module):
    """A residual CNN; the mean and the maxima of the four quarters are classified."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        stem = nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2, bias=False)
        blocks = (ResidualBlock(*widths) for widths in pairwise(WIDTHS))
        self.body = nn.Sequential(stem, nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(), *blocks)
        self.concept = nn.Linear(5 * WIDTHS[-1], len(config.concepts))
        self.style = nn.Linear(5 * WIDTHS[-1], len(config.styles)) if config.styles else None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, F)."""
        size = self.config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        x = self.body(images.contiguous(memory_format=torch.channels_last))
        return torch.cat([x.mean(dim=(2, 3)), F.adaptive_max_pool2d(x, 2).flatten(1)], dim=1)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Return mean-pooled features (N, F / 5) of images (N, 3, S, S) in [-1, 1], to compare."""
        return torch.cat([self.features(part)[:, : WIDTHS[-1]] for part in images.split(128)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits of concepts (B, concepts) and of styles (B, styles)."""
        features = F.dropout(self.features(images), 0.2, self.training)
        return self.concept(features), None if self.style is None else self.style(features)

    @torch.inference_mode()
    def judge(self, images: Tensor, pairs: list[Pair]) -> Verdict:
        """Compare images (N, 3, S, S) in [-1, 1] with what their pairs say."""
        concepts, styles = zip(*(self(part) for part in images.split(128)), strict=True)
        wanted = torch.tensor([self._index(judged_concept(pair)) for pair in pairs])
        ranked = torch.cat(concepts).topk(min(5, len(self.config.concepts))).indices  # (N, 5)
        hits = ranked == wanted[:, None]
        of_style = None
        if self.style is not None and all(pair.style in self.config.styles for pair in pairs):
            index = torch.tensor([self.config.styles.index(str(pair.style)) for pair in pairs])
            of_style = torch.cat(styles).argmax(dim=1) == index
        return Verdict(hits[:, 0], hits.any(dim=1), of_style, ranked[:, 0])

    def check(self, pairs: list[Pair]) -> None:
        """Raise ValueError unless the judge was trained on the concepts of all pairs."""
        for pair in pairs:
            self._index(judged_concept(pair))

    def save(self, file: str | Path) -> None:
        """Write one safetensors file; its metadata has the names of the classes."""
        metadata = {METADATA_KEY: json.dumps(asdict(self.config))}
        save_tensors(self.state_dict(), file, metadata)

    @classmethod
    def load(cls, file: str | Path) -> Judge:
        """Load a judge. Raises FileNotFoundError, or ValueError if the file is not a judge."""
        tensors = read_tensors(file)
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise ValueError(f"{file} is not a judge; expected a file that --train-judge wrote")
        judge = cls(parse(JudgeConfig, json.loads(text), str(file)))
        load_strictly(judge, tensors, file)
        return judge.eval()

    def _index(self, concept: str) -> int:
        try:
            return self.config.concepts.index(concept)
        except ValueError:
            raise ValueError(
                f"this judge does not know {concept!r}; train one with these pairs (--train-judge)"
            ) from None


@dataclass(frozen=True)
class Verdict:
    """The judgement of N images: correctness of concept and style, and the predicted concepts."""

    concept: Tensor  # (N,) bool: the predicted concept is correct
    concept_of_5: Tensor  # (N,) bool: one of the five most likely concepts is correct
    style: Tensor | None  # (N,) bool
    named: Tensor  # (N,) index of the predicted concept

    def figures(self) -> dict[str, Tensor]:
        figures = {"concept@1": self.concept, "concept@5": self.concept_of_5}
        return figures if self.style is None else {**figures, "style": self.style}


def train_judge(
    pairs: list[Pairs],
    steps: int = STEPS,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: bool = True,
) -> Judge:
    """Train a judge on all images of several sets; deterministic for the same data and seed.

    Every concept is equally frequent.
    """
    entries = [entry for part in pairs for entry in part.entries]
    concepts = [judged_concept(entry) for entry in entries]
    names = sorted(set(concepts))
    styles = sorted({entry.style for entry in entries if entry.style})
    if len(names) < 2:
        raise ValueError(f"all images show {names[0]!r}; a judge needs at least two concepts")
    judge = Judge(JudgeConfig(names, styles if len(styles) > 1 else [], steps=steps, seed=seed))
    images = torch.cat([_small(part, judge.config.image_size) for part in pairs])  # uint8
    index = {name: i for i, name in enumerate(names)}
    concept = torch.tensor([index[name] for name in concepts])
    style = torch.tensor([styles.index(e.style) if e.style else -100 for e in entries])
    weights = 1 / torch.bincount(concept)[concept]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge.apply(_reset).train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        ema = EMA(judge, 0.99)
        for step in tqdm(range(steps), "training the judge", disable=not progress, leave=False):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / 100) * (1 - step / steps)
            rows = torch.multinomial(weights, batch_size, replacement=True)
            logits, of_style = judge(augment(from_uint8(images[rows])))
            loss = F.cross_entropy(logits, concept[rows], label_smoothing=0.02)
            if of_style is not None:
                loss = loss + 0.5 * F.cross_entropy(of_style, style[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update()
    with ema.swapped_in():
        averages = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    judge.load_state_dict(averages)
    return judge.eval()


def augment(images: Tensor) -> Tensor:
    """Rotate, scale, shear, shift, shift the colours, blur and add noise: (B, 3, S, S)."""
    B, S = len(images), images.shape[-1]

    def uniform(limit: float, *shape: int) -> Tensor:
        return (2 * torch.rand(B, *shape) - 1) * limit

    angle, scale, aspect = uniform(0.17), uniform(0.17).exp(), uniform(0.08).exp()
    rows = torch.stack([angle.cos() * aspect, -angle.sin(), angle.sin(), angle.cos() / aspect], 1)
    matrix = torch.cat([rows.unflatten(1, (2, 2)) / scale[:, None, None], uniform(0.12, 2, 1)], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    x = F.grid_sample(images - 1, grid, align_corners=False) + 1  # white outside
    x = x * (1 + uniform(0.15, 1, 1, 1)) + uniform(0.15, 3, 1, 1)
    small = F.interpolate(x, math.ceil(0.6 * S), mode="bilinear", antialias=True)
    blurred = F.interpolate(small, S, mode="bilinear")
    kind = torch.rand(B, 1, 1, 1)
    x = torch.where(kind < 0.3, blurred, x)
    noise = 0.12 * torch.rand(B, 1, 1, 1) * torch.randn_like(x)
    return (x + noise * (kind > 0.6)).clamp(-1, 1)


def _small(pairs: Pairs, size: int) -> Tensor:
    parts = (
        F.interpolate(part.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255)
        for part in pairs.images.split(512)
    )
    return torch.cat([part.to(torch.uint8) for part in parts])


def _reset(module: nn.Module) -> None:
    """Draw the initial weights from the seed."""
    if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
        module.reset_parameters()

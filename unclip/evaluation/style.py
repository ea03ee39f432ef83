"""A small classifier of drawing styles: was the style drawn that was asked for?"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from unclip.evaluation.pairs import Pairs

# B batch, N pictures, S image size

WIDTHS = (24, 48, 96, 192)
STEPS, BATCH, LR = 600, 64, 4e-3  # 20 seconds on 2 cores at 64 px; more steps tell styles no better


class StyleClassifier(nn.Module):
    """Four strided convolutions, then the mean and the maximum over the picture."""

    def __init__(self, styles: list[str]) -> None:
        super().__init__()
        self.styles = styles
        layers = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()
            )
            for before, after in pairwise((3, *WIDTHS))
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * WIDTHS[-1], len(styles))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> logits (B, styles)."""
        x = self.features(
            images.contiguous(memory_format=torch.channels_last)
        )  # (B, C, S / 16, S / 16)
        return self.head(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1))

    @torch.no_grad()
    def right(self, images: Tensor, styles: list[str]) -> Tensor:
        """Which pictures (N, 3, S, S) in [-1, 1] are taken for their style: (N,) bool."""
        told = torch.cat([self(part).argmax(dim=1) for part in images.split(256)])
        return told == torch.tensor([self.styles.index(style) for style in styles])


def train_classifier(
    pairs: Pairs, seed: int = 0, steps: int = STEPS, progress: bool = True
) -> StyleClassifier:
    """Trained on the pairs that have a style; the same pairs and seed give the same classifier.

    Half of each batch is blurred by halving its size, so that sharpness alone tells no style.
    """
    known = torch.tensor([row for row, pair in enumerate(pairs.entries) if pair.style])
    labels = torch.tensor(
        [pairs.styles.index(pair.style) if pair.style else -1 for pair in pairs.entries]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = StyleClassifier(pairs.styles).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
        for _ in tqdm(
            range(steps), "training the style classifier", disable=not progress, leave=False
        ):
            rows = known[torch.randint(len(known), (BATCH,))]
            sharp, other = pairs.floats(rows).chunk(2)  # (B / 2, 3, S, S) each
            blurred = F.interpolate(F.avg_pool2d(other, 2), other.shape[-2:], mode="bilinear")
            logits = classifier(torch.cat([sharp, blurred]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()

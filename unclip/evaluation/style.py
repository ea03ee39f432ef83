"""A small classifier of drawing styles, to check that an image has the style of its prompt."""

# B batch, N images, S image size

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from unclip.evaluation.pairs import Pairs

WIDTHS = (24, 48, 96, 192)
STEPS, BATCH, LR = 600, 64, 4e-3  # 20 s on 2 cores at 64 px; more steps gain no accuracy


class StyleClassifier(nn.Module):
    """Four strided convolutions, then mean and max pooling."""

    def __init__(self, styles: list[str]) -> None:
        super().__init__()
        self.styles = styles
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()
                )
                for c_in, c_out in pairwise((3, *WIDTHS))
            )
        )
        self.head = nn.Linear(2 * WIDTHS[-1], len(styles))
        for parameter in self.features.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> logits (B, styles)."""
        x = self.features(images.contiguous(memory_format=torch.channels_last))  # (B, C, S/16, ..)
        return self.head(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1))

    @torch.no_grad()
    def is_style(self, images: Tensor, styles: list[str]) -> Tensor:
        """Return which images (N, 3, S, S) in [-1, 1] are classified as their style: (N,) bool."""
        predicted = torch.cat([self(part).argmax(dim=1) for part in images.split(256)])
        return predicted == torch.tensor([self.styles.index(style) for style in styles])


def train_classifier(
    pairs: Pairs, seed: int = 0, steps: int = STEPS, progress: bool = True
) -> StyleClassifier:
    """Train on the pairs that have a style; deterministic for the same pairs and seed.

    Half of each batch is downsampled and resized back, so that sharpness does not reveal a style.
    """
    rows_with_style = torch.tensor([row for row, pair in enumerate(pairs.entries) if pair.style])
    labels = torch.tensor(
        [pairs.styles.index(pair.style) if pair.style else -1 for pair in pairs.entries]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = StyleClassifier(pairs.styles)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
        name = "training the style classifier"
        for _ in tqdm(range(steps), name, disable=not progress, leave=False):
            rows = rows_with_style[torch.randint(len(rows_with_style), (BATCH,))]
            sharp, other = pairs.floats(rows).chunk(2)  # (B / 2, 3, S, S) each
            blurred = F.interpolate(F.avg_pool2d(other, 2), other.shape[-2:], mode="bilinear")
            logits = classifier(torch.cat([sharp, blurred]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()

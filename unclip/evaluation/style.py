"""A small classifier of drawing styles: was the style drawn that was asked for?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .pairs import Pairs

# B batch, S image size

STEPS, BATCH = 600, 64


class StyleClassifier(nn.Module):
    """Three strided convolutions and a mean over what they see."""

    def __init__(self, styles: list[str]) -> None:
        super().__init__()
        self.styles = styles
        widths = (3, 24, 48, 96)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], len(styles))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> logits (B, styles)."""
        return self.head(self.features(images).mean(dim=(2, 3)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, styles: list[str]) -> dict[str, float]:
        """Fraction of pictures (N, 3, S, S) in [-1, 1] that are taken for their style: of all, and of each style."""
        told = torch.cat([self(part).argmax(dim=1) for part in images.float().cpu().split(256)])
        right = told == torch.tensor([self.styles.index(style) for style in styles])
        of_each = {style: right[[asked == style for asked in styles]] for style in self.styles}
        return {"all": right.float().mean().item()} | {
            style: rows.float().mean().item() for style, rows in of_each.items() if len(rows)
        }


def train_classifier(pairs: Pairs, seed: int = 0, steps: int = STEPS, progress: bool = True) -> StyleClassifier:
    """Trained on pairs that all have a style; the same pairs and seed give the same classifier.

    Half of each batch is blurred by halving its size, so that sharpness alone tells no style.
    """
    styles = pairs.styles
    labels = torch.tensor([styles.index(pair.style) for pair in pairs.entries])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = StyleClassifier(styles)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for _ in tqdm(range(steps), "training the style classifier", disable=not progress, leave=False):
            rows = torch.randint(len(pairs), (min(BATCH, len(pairs)),))
            images = pairs.floats(rows)  # (B, 3, S, S)
            half = len(images) // 2
            blurred = F.interpolate(F.avg_pool2d(images[:half], 2), images.shape[-2:], mode="bilinear")
            loss = F.cross_entropy(classifier(torch.cat([blurred, images[half:]])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()

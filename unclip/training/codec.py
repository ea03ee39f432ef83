"""What image codecs are trained on: their own loss, with values that change over time; a feature network; a judge."""

# B batch, H W picture

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unclip.models.codecs.codec import Autoencoder, LossTerms
from unclip.models.codecs.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_loss

Features = Callable[
    [Tensor], Sequence[Tensor]
]  # pictures (B, 3, H, W) in [-1, 1] -> maps (B, C, h, w)


@dataclass(frozen=True)
class Annealing:
    """A value that goes from `start` to `end` within `steps` updates along half a cosine (2102.12092, A.2)."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1")

    def at(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class PerceptualConfig:
    """The distance of features, added to the codec's loss."""

    network: str = "emoji"  # a model, or a folder of a CLIP, whose image tower gives the features
    weight: float = 1.0


@dataclass(frozen=True)
class AdversarialConfig:
    """VQ-GAN's judge (2012.09841, 3.1)."""

    weight: float = 0.8  # times the adaptive weight
    start: int = 0  # updates before it counts
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


class JudgedCodec(nn.Module):
    """A codec and its discriminator as one model, of one optimiser.

    Neither loss has a gradient in the other's parameters, so a step of AdamW on their sum is a step of each on its own,
    unless their common gradient is clipped (optim.clip_norm).
    """

    def __init__(self, codec: Autoencoder, config: AdversarialConfig) -> None:
        super().__init__()
        self.codec, self.discriminator = codec, PatchDiscriminator(config.discriminator)

    def forward(self, images: Tensor, **annealed: float) -> tuple[LossTerms, Tensor, Tensor]:
        """What the codec says, the score of its reconstructions (-> codec), and the hinge loss (-> discriminator)."""
        terms = self.codec(images, **annealed)
        frozen = {
            name: parameter.detach() for name, parameter in self.discriminator.named_parameters()
        }
        score = functional_call(self.discriminator, frozen, terms.reconstruction).mean()
        fake = self.discriminator(terms.reconstruction.detach())
        return terms, score, hinge_loss(self.discriminator(images), fake)


class CodecLoss:
    """For `fit`: trains a codec, or with `adversarial` a JudgedCodec; `before_step` tells it the time."""

    def __init__(
        self,
        codec: Autoencoder,
        anneal: Mapping[str, Annealing],
        features: Features | None = None,
        perceptual: PerceptualConfig | None = None,
        adversarial: AdversarialConfig | None = None,
    ) -> None:
        if unknown := set(anneal) - set(codec.annealed):
            known = ", ".join(codec.annealed) or "nothing"
            raise ValueError(f"anneal.{min(unknown)} is unknown; this codec anneals {known}")
        self.codec, self.anneal, self.features = codec, anneal, features
        self.perceptual, self.adversarial = perceptual, adversarial
        self.step = 0

    def before_step(self, step: int) -> None:
        self.step = step

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = batch["image"].to(self.codec.last_layer.device)
        annealed = {name: value.at(self.step) for name, value in self.anneal.items()}
        if self.adversarial is None:
            terms = model(images, **annealed)
        else:
            terms, score, judge_loss = model(images, **annealed)
        loss, logged = (
            terms.loss,
            {**terms.logged, **{name: torch.tensor(x) for name, x in annealed.items()}},
        )
        if self.features is not None and self.perceptual is not None:
            distance = perceptual_distance(self.features, terms.reconstruction, images)
            loss = loss + self.perceptual.weight * distance
            logged["perceptual"] = distance.detach()
        if self.adversarial is not None:
            weight = (
                adaptive_weight(loss, -score, self.codec.last_layer)
                if torch.is_grad_enabled()
                else 0.0
            )
            counts = float(self.step >= self.adversarial.start)
            loss = loss + counts * (judge_loss - self.adversarial.weight * weight * score)
            logged |= {"score": score.detach(), "judge": judge_loss.detach()}
        return {"loss": loss, **logged}


def perceptual_distance(features: Features, images: Tensor, truth: Tensor) -> Tensor:
    """Squared distance of unit feature vectors, averaged over places, summed over maps (1801.03924, not weighted)."""
    with torch.no_grad():
        wanted = features(truth)
    distances = [
        (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(dim=1).mean()
        for x, y in zip(features(images), wanted, strict=True)
    ]
    return torch.stack(distances).sum()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The factor that gives both losses equal gradients in the last layer (2012.09841, equation 7)."""
    wanted, given = (
        torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (loss, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(max=1e4).detach()

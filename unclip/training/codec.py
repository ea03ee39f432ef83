"""Training of image codecs: reconstruction, annealed weights, perceptual and adversarial terms."""

# B batch, C channels, H W image, h w feature map

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unclip.checkpoints.folders import locate
from unclip.clip import CLIP
from unclip.config import PositiveInt, config
from unclip.data.loader import open_data
from unclip.models.codecs.codec import LossTerms, Reconstructor
from unclip.models.codecs.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_loss
from unclip.training import sharding
from unclip.training.fit import fit
from unclip.training.launch import Run
from unclip.training.preview import codec_preview
from unclip.training.saving import Export

# images (B, 3, H, W) in [-1, 1] -> feature maps (B, C, h, w)
Features = Callable[[Tensor], Sequence[Tensor]]


@config
class Annealing:
    """A value that moves from `start` to `end` in `steps` updates on a half cosine.

    2102.12092, A.2.
    """

    start: float
    end: float
    steps: PositiveInt

    def at(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


@config
class PerceptualConfig:
    """A feature distance, added to the codec's loss."""

    network: str = "emoji"  # a model, or the folder of a CLIP; its image tower gives the features
    weight: float = 1.0

    def features(self, device: torch.device) -> Features:
        """Load the network, frozen, and return its features of images."""
        name = self.network
        is_clip = (Path(name) / "open_clip_config.json").is_file()
        folder = Path(name) if is_clip else locate(name) / "clip"
        return CLIP.from_pretrained(folder).requires_grad_(False).to(device).image_features


@config
class AdversarialConfig:
    """VQ-GAN's discriminator (2012.09841, 3.1)."""

    weight: float = 0.8  # factor of the adaptive weight
    start: int = 0  # updates before the adversarial loss is used
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


class AdversarialCodec(nn.Module):
    """A codec and its discriminator as one model with one optimizer.

    Neither loss has a gradient in the other's parameters, so that an AdamW step on their sum equals
    a step on each, unless their joint gradient is clipped (optim.clip_norm). Raises ValueError if
    accelerate is to shard the codec: the adaptive weight needs the gradient of a whole layer.
    """

    def __init__(self, codec: Reconstructor, config: AdversarialConfig) -> None:
        super().__init__()
        if sharding.requested():
            raise ValueError("adversarial needs the gradient of a whole layer; use DDP, not FSDP")
        self.codec, self.discriminator = codec, PatchDiscriminator(config.discriminator)

    def forward(self, images: Tensor, **annealed: float) -> tuple[LossTerms, Tensor, Tensor]:
        """Return the codec's loss terms, the score of its output, and the hinge loss.

        The score has a gradient in the codec only, the hinge loss in the discriminator only.
        """
        terms = self.codec(images, **annealed)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        score = functional_call(self.discriminator, frozen, terms.reconstruction).mean()
        fake = self.discriminator(terms.reconstruction.detach())
        return terms, score, hinge_loss(self.discriminator(images), fake)


class CodecLoss:
    """The loss of a codec, or with `adversarial` of an AdversarialCodec.

    `fit` calls `before_step`, which sets the annealed values.
    """

    def __init__(
        self,
        codec: Reconstructor,
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
        output = model(images, **annealed)
        terms = output if self.adversarial is None else output[0]
        loss, logged = terms.loss, dict(terms.logged)
        logged |= {name: torch.tensor(x) for name, x in annealed.items()}
        if self.features is not None and self.perceptual is not None:
            distance = perceptual_distance(self.features, terms.reconstruction, images)
            loss = loss + self.perceptual.weight * distance
            logged["perceptual"] = distance.detach()
        if self.adversarial is not None:
            _, score, hinge = output
            started = float(self.step >= self.adversarial.start)
            weight = 0.0  # validation has no gradients to balance
            if torch.is_grad_enabled():
                weight = adaptive_weight(loss, -score, self.codec.last_layer)
            loss = loss + started * (hinge - self.adversarial.weight * weight * score)
            logged |= {"score": score.detach(), "hinge": hinge.detach()}
        return {"loss": loss, **logged}


def fit_codec(
    codec: Reconstructor,
    run: Run[Any],
    export: Export,
    perceptual: PerceptualConfig | None,
    adversarial: AdversarialConfig | None,
    anneal: Mapping[str, Annealing] | None = None,
) -> None:
    """Train a codec on the data of a run; export: writes the codec, without its discriminator."""
    config = run.config
    features = perceptual and perceptual.features(run.device)
    loss = CodecLoss(codec, anneal or {}, features, perceptual, adversarial)
    model = AdversarialCodec(codec, adversarial).to(run.device) if adversarial else codec

    def trained(model: Any) -> Any:
        return model.codec if adversarial else model

    val_loader = open_data(config.val_data, captions_needed=False) if config.val_data else None
    fit(
        model,
        loss,
        open_data(config.data, captions_needed=False),
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        preview=codec_preview(trained, val_loader) if val_loader else None,
        export=lambda model, folder: export(trained(model), folder),
        before_step=loss.before_step,
    )


def perceptual_distance(features: Features, images: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of normalised features, as in LPIPS without weights.

    Averaged over positions and summed over maps (1801.03924).
    """
    with torch.no_grad():
        expected = features(target)
    distances = [
        (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(dim=1).mean()
        for x, y in zip(features(images), expected, strict=True)
    ]
    return torch.stack(distances).sum()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return the weight that equalises the gradients in the last layer (2012.09841, equation 7)."""
    reference, norm = (
        torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (loss, adversarial)
    )
    return (reference / (norm + 1e-4)).clamp(max=1e4).detach()

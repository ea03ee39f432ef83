"""Trains an image codec, stage one of DALL-E: dVAE, VQ-VAE, VQ-GAN, or as a baseline a Gaussian VAE.

accelerate launch train/codec.py --config configs/emoji/codec.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from unclip.checkpoints.registry import locate
from unclip.checkpoints.store import save_component
from unclip.clip import CLIP
from unclip.data.loader import DataConfig, open_data
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.codecs.vqvae import VQVAE, VQVAEConfig
from unclip.training.codec import (
    AdversarialConfig,
    Annealing,
    CodecLoss,
    JudgedCodec,
    PerceptualConfig,
)
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.optim import OptimConfig
from unclip.training.preview import codec_preview
from unclip.training.run_state import load_weights

CODECS = {DVAEConfig: DVAE, VQVAEConfig: VQVAE, VQGANConfig: VQGAN, GaussianVAEConfig: GaussianVAE}


@dataclass(frozen=True)
class CodecTraining:
    model: DVAEConfig | VQVAEConfig | VQGANConfig | GaussianVAEConfig  # told by its `kind`
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    anneal: dict[str, Annealing] = field(
        default_factory=dict
    )  # temperature, kl_weight: what the codec's loss takes
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None

    def __post_init__(self) -> None:
        for name, data in (("data", self.data), ("val_data", self.val_data)):
            if data and (size := data.crop or data.image_size) != self.model.image_size:
                raise ValueError(
                    f"{name} gives pictures of {size} pixels; this model has {self.model.image_size}"
                )


def main(run: Run[CodecTraining]) -> None:
    config = run.config
    codec = CODECS[type(config.model)](config.model).to(run.device)
    features = (
        clip_of(config.perceptual.network).to(run.device).image_features
        if config.perceptual
        else None
    )
    loss = CodecLoss(codec, config.anneal, features, config.perceptual, config.adversarial)
    model = codec
    if config.adversarial:
        model = JudgedCodec(codec, config.adversarial).to(run.device)
        if run.init:  # weights to start from are those of a codec
            load_weights(codec, run.init)
            run = replace(run, init=None)
    val_loader = open_data(config.val_data) if config.val_data else None
    fit(
        model,
        loss,
        open_data(config.data),
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        preview=codec_preview(codec, val_loader) if val_loader else None,
        export=lambda _, folder: save_component(codec, folder),
        before_step=loss.before_step,
    )


def clip_of(name: str) -> CLIP:
    """The frozen CLIP in a folder, or that of a model."""
    folder = (
        Path(name) if (Path(name) / "open_clip_config.json").is_file() else locate(name) / "clip"
    )
    return CLIP.from_pretrained(folder).requires_grad_(False)


if __name__ == "__main__":
    launch(main, CodecTraining, __doc__)

"""Train an image codec, DALL-E's stage one: dVAE, VQ-VAE, VQ-GAN, or a Gaussian VAE as a baseline.

accelerate launch train/codec.py --config configs/emoji/codec.yaml
"""

from __future__ import annotations

from dataclasses import field, replace

from unclip.checkpoints.store import save_component
from unclip.config import config
from unclip.data.loader import DataConfig
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.quantizers import NearestConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.codecs.vqvae import VQVAE, VQVAEConfig
from unclip.training import sharding
from unclip.training.codec import AdversarialConfig, Annealing, PerceptualConfig, fit_codec
from unclip.training.fit import FitConfig
from unclip.training.initialization import load_weights
from unclip.training.launch import Run, launch
from unclip.training.optim import OptimConfig

CODECS = {DVAEConfig: DVAE, VQVAEConfig: VQVAE, VQGANConfig: VQGAN, GaussianVAEConfig: GaussianVAE}


@config
class CodecTraining:
    model: DVAEConfig | VQVAEConfig | VQGANConfig | GaussianVAEConfig  # selected by its `kind`
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    # temperature, kl_weight: arguments of the codec's loss
    anneal: dict[str, Annealing] = field(default_factory=dict)
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None

    def __post_init__(self) -> None:
        for name, data in (("data", self.data), ("val_data", self.val_data)):
            if data and (size := data.crop or data.image_size) != self.model.image_size:
                raise ValueError(
                    f"{name} has images of {size} pixels; expected {self.model.image_size}, "
                    "as model.image_size"
                )


def main(run: Run[CodecTraining]) -> None:
    config = run.config
    quantizer = getattr(config.model, "quantizer", None)
    revives = isinstance(quantizer, NearestConfig) and quantizer.revive is not None
    if revives and quantizer.ema is None and sharding.requested():
        # It would write to the gathered weights, from which nothing is copied back.
        raise ValueError("quantizer.revive without quantizer.ema needs DDP; FSDP would undo it")
    codec = CODECS[type(config.model)](config.model).to(run.device)
    if config.adversarial and run.init:  # weights of a codec, without a discriminator
        load_weights(codec, run.init)
        run = replace(run, init=None)
    fit_codec(codec, run, save_component, config.perceptual, config.adversarial, config.anneal)


if __name__ == "__main__":
    launch(main, CodecTraining, __doc__)

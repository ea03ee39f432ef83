"""Train the diffusion prior on captions and CLIP image embeddings (unCLIP 2.2).

accelerate launch train/prior.py --config configs/emoji/prior.yaml
"""

from __future__ import annotations

from dataclasses import field
from functools import partial

from unclip.checkpoints.store import save_component, with_base
from unclip.config import NonNegative, PositiveInt, config
from unclip.data.loader import DataConfig
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.lora import LoRAConfig, save_lora
from unclip.models.unclip.mlp_prior import MLPPrior, MLPPriorConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.training.embedded import data_notes, measure_stats, open_loaders
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import initialize, load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import ConditionDropout, PriorLoss
from unclip.training.measures import SampledCosines
from unclip.training.optim import OptimConfig


@config
class PriorTraining:
    clip: str  # folder of a trained CLIP
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    model: PriorConfig | MLPPriorConfig | None = None  # `kind: mlp` selects the second
    base: str | None = None  # instead of model: folder of a prior to fine-tune, with its schedule
    val_data: DataConfig | None = None
    lora: LoRAConfig | None = None  # train only an adapter of `base` or --init; needs peft
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    drop: ConditionDropout = field(default_factory=ConditionDropout)  # only `text` is used
    noises: PositiveInt = 1  # noised copies of each embedding in a batch; its caption is read once
    emb_noise: NonNegative = 0.0  # std of noise on the normalised embeddings that are predicted
    # largest noise on text embeddings, in their std; captions then generalise to similar ones
    text_noise: NonNegative = 0.0
    embed_once: bool = False  # embed all images before the training; for small datasets
    stats_batches: PositiveInt = 100  # batches for the mean and std of the image embeddings


def main(run: Run[PriorTraining]) -> None:
    config = with_base(run.config, (DiffusionPrior, MLPPrior))
    clip = load_clip(config.clip, config.model, run.device)
    loader, val_loader = open_loaders(run, clip)
    is_mlp = isinstance(config.model, MLPPriorConfig)
    prior = (MLPPrior if is_mlp else DiffusionPrior)(config.model).to(run.device)
    if not (run.resume or run.init or run.config.base):  # else they are loaded with the weights
        measure_stats(prior, clip, loader, config.stats_batches)
    run = initialize(prior, run)
    schedule = Schedule(config.schedule)
    loss = PriorLoss(
        prior,
        clip,
        schedule,
        config.drop,
        config.loss,
        noises=config.noises,
        emb_noise=config.emb_noise,
        text_noise=config.text_noise,
    )
    export = partial(save_component, schedule=config.schedule, notes=data_notes(loader))
    fit(
        prior,
        loss,
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        export=save_lora if config.lora else export,
        measure=SampledCosines(prior, clip, schedule),
    )


if __name__ == "__main__":
    launch(main, PriorTraining, __doc__)

"""Trains the diffusion prior on captions and CLIP image embeddings (unCLIP 2.2).

accelerate launch train/prior.py --config configs/emoji/prior.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from unclip.checkpoints.store import save_component
from unclip.data.loader import DataConfig
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.training.embedded import measure_stats, open_loader
from unclip.training.fit import FitConfig, fit
from unclip.training.frozen import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import DropConfig, PriorLoss
from unclip.training.optim import OptimConfig


@dataclass(frozen=True)
class PriorTraining:
    clip: str  # folder of a trained CLIP
    model: PriorConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    drop: DropConfig = field(default_factory=DropConfig)  # only `text` applies
    embed_once: bool = False  # CLIP sees each picture once, before the training; for data that it gets through quickly
    stats_batches: int = (
        100  # batches that the embeddings' mean and standard deviation are measured on
    )


def main(run: Run[PriorTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    loader = open_loader(config.data, clip, config.embed_once and not run.dry_run)
    prior = DiffusionPrior(config.model).to(run.device)
    if not (run.resume or run.init):  # else they come with the weights
        measure_stats(prior, clip, loader, config.stats_batches)
    fit(
        prior,
        PriorLoss(prior, clip, Schedule(config.schedule), config.drop, config.loss),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=open_loader(config.val_data, clip, config.embed_once)
        if config.val_data
        else None,
        export=partial(save_component, schedule=config.schedule),
    )


if __name__ == "__main__":
    launch(main, PriorTraining, __doc__)

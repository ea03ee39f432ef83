"""Train the layout prior: small images, sampled for a CLIP image embedding and a caption.

accelerate launch train/layout_prior.py --config configs/emoji/layout_prior.yaml
"""

from __future__ import annotations

from dataclasses import field, replace
from functools import partial

from unclip.checkpoints.store import save_component, with_base
from unclip.config import NonNegative, PositiveInt, config
from unclip.data.loader import DataConfig
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.layout_prior import LayoutPrior, LayoutPriorConfig
from unclip.training.embedded import measure_components, measure_stats, open_loaders
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import ConditionDropout, LayoutPriorLoss
from unclip.training.optim import OptimConfig


@config
class LayoutPriorTraining:
    clip: str  # folder of a trained CLIP
    data: DataConfig  # images, or embeddings with layouts
    optim: OptimConfig
    fit: FitConfig
    model: LayoutPriorConfig | None = None
    base: str | None = None  # instead of model: a layout prior to fine-tune, with its schedule
    val_data: DataConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    drop: ConditionDropout = field(default_factory=lambda: ConditionDropout(text=0.2, image=0.4))
    emb_noise: NonNegative = 1.0  # largest noise on image embeddings, in standard deviations
    text_noise: NonNegative = 0.2  # largest noise on text embeddings, in their std
    embed_once: bool = False  # embed all images before the training; for small datasets
    stats_batches: PositiveInt = 100  # batches for the statistics of embeddings and layouts


def main(run: Run[LayoutPriorTraining]) -> None:
    config = with_base(run.config, LayoutPrior)
    if run.config.base and not (run.init or run.resume):
        run = replace(run, init=run.config.base)
    clip = load_clip(config.clip, config.model, run.device)
    loader, val_loader = open_loaders(run, clip)
    network = LayoutPrior(config.model).to(run.device)
    if not (run.resume or run.init):  # else they are loaded with the weights
        measure_stats(network, clip, loader, config.stats_batches)
        measure_components(network, loader, config.stats_batches)
    loss = LayoutPriorLoss(
        network,
        clip,
        Schedule(config.schedule),
        config.drop,
        config.loss,
        emb_noise=config.emb_noise,
        text_noise=config.text_noise,
    )
    fit(
        network,
        loss,
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        export=partial(save_component, schedule=config.schedule),
    )


if __name__ == "__main__":
    launch(main, LayoutPriorTraining, __doc__)

"""Train a prior that predicts the image embedding in one pass (ECLIPSE, 2312.04655).

accelerate launch train/one_shot_prior.py --config configs/emoji/one_shot_prior.yaml
"""

from __future__ import annotations

from dataclasses import field
from functools import partial

from unclip.checkpoints.store import save_component
from unclip.config import PositiveInt, config
from unclip.data.loader import DataConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.training.embedded import data_notes, measure_stats, open_loaders
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import ConditionDropout, OneShotLossConfig, OneShotPriorLoss
from unclip.training.measures import SampledCosines
from unclip.training.optim import OptimConfig


@config
class OneShotPriorTraining:
    clip: str  # folder of a trained CLIP
    model: OneShotPriorConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    loss: OneShotLossConfig = field(default_factory=OneShotLossConfig)
    drop: ConditionDropout = field(default_factory=ConditionDropout)  # only `text` is used
    embed_once: bool = False  # embed all images before the training; for small datasets
    stats_batches: PositiveInt = 100  # batches for the mean and std of the image embeddings


def main(run: Run[OneShotPriorTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    loader, val_loader = open_loaders(run, clip)
    prior = OneShotPrior(config.model).to(run.device)
    if not (run.resume or run.init):  # else the statistics are loaded with the weights
        measure_stats(prior, clip, loader, config.stats_batches)
    fit(
        prior,
        OneShotPriorLoss(prior, clip, config.drop, config.loss),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        export=partial(save_component, notes=data_notes(loader)),
        measure=SampledCosines(prior, clip),
    )


if __name__ == "__main__":
    launch(main, OneShotPriorTraining, __doc__)

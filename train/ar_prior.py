"""Trains the autoregressive prior on captions and CLIP image embeddings (unCLIP 2.2).

accelerate launch train/ar_prior.py --config configs/emoji/ar_prior.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from accelerate.utils import broadcast_object_list

from unclip.checkpoints.store import save_component
from unclip.data.loader import DataConfig
from unclip.embeddings import PCA
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.training.embedded import embedding_pairs, open_loader
from unclip.training.fit import FitConfig, fit
from unclip.training.frozen import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import ARPriorLoss, DropConfig
from unclip.training.optim import OptimConfig


@dataclass(frozen=True)
class ARPriorTraining:
    clip: str  # folder of a trained CLIP
    model: ARPriorConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    drop: DropConfig = field(default_factory=DropConfig)  # only `text` applies
    embed_once: bool = False  # CLIP sees each picture once, before the training; for data that it gets through quickly
    stats_batches: int = 100  # batches that principal components and buckets are learned from
    explained: float | None = (
        None  # as many components as explain so much of the variance, rather than the model's
    )


def main(run: Run[ARPriorTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    loader = open_loader(config.data, clip, config.embed_once and not run.dry_run)
    pairs = embedding_pairs(clip, loader, config.stats_batches)
    model = config.model
    if config.explained is not None:
        components = [len(PCA.fit(pairs[0], config.explained))]
        broadcast_object_list(components)  # each process has other pairs
        model = replace(model, components=components[0])
    prior = ARPrior(model).to(run.device)
    prior.fit(*pairs)  # with the weights of another run come its own
    fit(
        prior,
        ARPriorLoss(prior, clip, config.drop),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=open_loader(config.val_data, clip, config.embed_once)
        if config.val_data
        else None,
        export=save_component,
    )


if __name__ == "__main__":
    launch(main, ARPriorTraining, __doc__)

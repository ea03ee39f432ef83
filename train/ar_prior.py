"""Train the autoregressive prior on captions and CLIP image embeddings (unCLIP 2.2).

accelerate launch train/ar_prior.py --config configs/emoji/ar_prior.yaml
"""

from __future__ import annotations

from dataclasses import field, replace
from functools import partial

from accelerate.utils import broadcast_object_list

from unclip._deprecated import renamed_fields
from unclip.checkpoints.store import save_component
from unclip.config import PositiveFraction, PositiveInt, config
from unclip.data.loader import DataConfig
from unclip.embeddings import PCA
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.training.embedded import data_notes, embedding_pairs, open_loaders
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import ARPriorLoss, ConditionDropout
from unclip.training.measures import SampledCosines
from unclip.training.optim import OptimConfig


@renamed_fields(explained="explained_variance")
@config
class ARPriorTraining:
    clip: str  # folder of a trained CLIP
    model: ARPriorConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    drop: ConditionDropout = field(default_factory=ConditionDropout)  # only `text` is used
    embed_once: bool = False  # embed all images before the training; for small datasets
    stats_batches: PositiveInt = 100  # batches for the principal components and the buckets
    explained_variance: PositiveFraction | None = None  # determines model.components, if given


def main(run: Run[ARPriorTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    loader, val_loader = open_loaders(run, clip)
    pairs = embedding_pairs(clip, loader, config.stats_batches)
    model = config.model
    if config.explained_variance is not None:
        components = [len(PCA.fit(pairs[0], config.explained_variance))]
        broadcast_object_list(components)  # each process has other pairs
        model = replace(model, components=components[0])
    prior = ARPrior(model).to(run.device)
    prior.fit(*pairs)  # replaced if weights are loaded
    fit(
        prior,
        ARPriorLoss(prior, clip, config.drop),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        export=partial(save_component, notes=data_notes(loader)),
        measure=SampledCosines(prior, clip),
    )


if __name__ == "__main__":
    launch(main, ARPriorTraining, __doc__)

"""Trains the layout that a decoder is shown: a small blurred picture from a CLIP image embedding.

accelerate launch train/layout.py --config configs/emoji/layout.yaml
"""

from __future__ import annotations

from dataclasses import dataclass

from unclip.checkpoints.store import save_component
from unclip.data.loader import DataConfig
from unclip.models.unclip.layout import Layout, LayoutConfig
from unclip.training.embedded import measure_stats, open_loader
from unclip.training.fit import FitConfig, fit
from unclip.training.frozen import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import LayoutLoss
from unclip.training.optim import OptimConfig


@dataclass(frozen=True)
class LayoutTraining:
    clip: str  # folder of a trained CLIP
    model: LayoutConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    emb_noise: float = 1.0  # standard deviations of noise on embeddings, at most
    embed_once: bool = False  # CLIP sees each picture once, before the training; for data that it gets through quickly
    stats_batches: int = (
        100  # batches that the embeddings' mean and standard deviation are measured on
    )


def main(run: Run[LayoutTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    loader = open_loader(
        config.data, clip, config.embed_once and not run.dry_run, pictures_only=True
    )
    val_loader = (
        open_loader(config.val_data, clip, config.embed_once, pictures_only=True)
        if config.val_data
        else None
    )
    layout = Layout(config.model).to(run.device)
    if not (run.resume or run.init):  # else they come with the weights
        measure_stats(layout, clip, loader, config.stats_batches)
    fit(
        layout,
        LayoutLoss(layout, clip, config.emb_noise),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        export=save_component,
    )


if __name__ == "__main__":
    launch(main, LayoutTraining, __doc__)

"""Train the layout network: a small, blurred image from a CLIP image embedding.

accelerate launch train/layout.py --config configs/emoji/layout.yaml
"""

from __future__ import annotations

from unclip.checkpoints.store import save_component
from unclip.config import NonNegative, PositiveInt, config
from unclip.data.loader import DataConfig
from unclip.models.unclip.decoder import Layout, LayoutConfig
from unclip.training.embedded import measure_stats, open_loaders
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import load_clip
from unclip.training.launch import Run, launch
from unclip.training.losses import LayoutLoss
from unclip.training.optim import OptimConfig


@config
class LayoutTraining:
    clip: str  # folder of a trained CLIP
    model: LayoutConfig
    data: DataConfig  # images, or embeddings with layouts
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    emb_noise: NonNegative = 1.0  # largest noise on embeddings, in standard deviations
    embed_once: bool = False  # embed all images before the training; for small datasets
    stats_batches: PositiveInt = 100  # batches for the mean and std of the image embeddings


def main(run: Run[LayoutTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    loader, val_loader = open_loaders(run, clip, reads_captions=False)
    layout = Layout(config.model).to(run.device)
    if not (run.resume or run.init):  # else the statistics are loaded with the weights
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

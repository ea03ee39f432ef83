"""Trains the diffusion prior on captions and CLIP image embeddings (unCLIP 2.2).

accelerate launch train/prior.py --config configs/emoji/prior.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from unclip.checkpoints.store import save_component
from unclip.clip import CLIP
from unclip.data.loader import DataConfig, Loader
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.training.fit import FitConfig, fit
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
    stats_batches: int = 100  # batches that the embeddings' mean and standard deviation are measured on


def main(run: Run[PriorTraining]) -> None:
    config = run.config
    clip = CLIP.from_pretrained(config.clip).to(run.device).requires_grad_(False)
    prior = DiffusionPrior(config.model).to(run.device)
    loader = Loader(config.data)
    if not (run.resume or run.init):  # else they come with the weights
        prior.set_stats(*embedding_stats(clip, loader, config.stats_batches))
    fit(
        prior,
        PriorLoss(prior, clip, Schedule(config.schedule), config.drop, config.loss),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=Loader(config.val_data) if config.val_data else None,
        export=partial(save_component, schedule=config.schedule),
    )


@torch.no_grad()
def embedding_stats(clip: CLIP, loader: Loader, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D,) of the image embeddings of the first `batches` batches."""
    state, embs = loader.state_dict(), []
    for batch, _ in zip(loader, tqdm(range(batches), desc="embedding statistics", leave=False), strict=False):
        embs.append(batch["image_emb"] if "image_emb" in batch else clip.encode_image(batch["image"]))
    loader.load_state_dict(state)
    embs = torch.cat(embs).float()  # (N, D)
    return embs.mean(0), embs.std(0)


if __name__ == "__main__":
    launch(main, PriorTraining, __doc__)

"""Train a diffusion upsampler on crops: from a low- to a high-resolution image (unCLIP 2.1).

accelerate launch train/upsampler.py --config configs/emoji/upsampler.yaml
"""

from __future__ import annotations

from dataclasses import field
from functools import partial

from unclip.checkpoints.store import save_component
from unclip.config import config
from unclip.data.corruption import CorruptionConfig
from unclip.data.loader import DataConfig, open_data
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.losses import UpsamplerLoss
from unclip.training.optim import OptimConfig
from unclip.training.preview import upsampler_preview


@config
class UpsamplerTraining:
    model: UpsamplerConfig
    data: DataConfig  # `crop` is the side of the crops, 1/4 of the image's in the paper
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)


def main(run: Run[UpsamplerTraining]) -> None:
    config = run.config
    upsampler = Upsampler(config.model).to(run.device)
    if upsampler.last_unet is not None:  # Karlo trained it with an adversarial loss
        if not (run.init or run.resume):
            raise ValueError(
                "model.last_unet is not trained here; start from weights that contain it (--init), "
                "or remove it"
            )
        upsampler.last_unet.requires_grad_(False)
    schedule = Schedule(config.schedule)
    val_loader = open_data(config.val_data, captions_needed=False) if config.val_data else None
    fit(
        upsampler,
        UpsamplerLoss(upsampler, schedule, config.corruption, config.loss),
        open_data(config.data, captions_needed=False),
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        preview=upsampler_preview(schedule, val_loader) if val_loader else None,
        export=partial(save_component, schedule=config.schedule),
    )


if __name__ == "__main__":
    launch(main, UpsamplerTraining, __doc__)

"""Train a diffusion upsampler on crops: from a low- to a high-resolution image (unCLIP 2.1).

accelerate launch train/upsampler.py --config configs/emoji/upsampler.yaml
accelerate launch train/upsampler.py --config configs/karlo/upsampler_last.yaml --init FOLDER
"""

from __future__ import annotations

from dataclasses import field, replace
from functools import partial
from pathlib import Path

from unclip.checkpoints.store import save_component
from unclip.config import config
from unclip.data.corruption import CorruptionConfig
from unclip.data.loader import DataConfig, open_data
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.training.codec import fit_codec
from unclip.training.fit import FitConfig, fit
from unclip.training.last_step import LastStep, LastStepConfig, load_upsampler
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
    last: LastStepConfig | None = None  # train model.last_unet instead of model.unet; needs --init

    def __post_init__(self) -> None:
        if self.last and self.model.last_unet is None:
            raise ValueError(
                "last trains model.last_unet, which is null; set it to the values of model.unet"
            )
        if self.last and self.loss != LossConfig():
            raise ValueError("loss has no effect on model.last_unet; remove it, or remove last")


def main(run: Run[UpsamplerTraining]) -> None:
    config = run.config
    upsampler = Upsampler(config.model).to(run.device)
    if config.last is not None:
        return fit_last_step(upsampler, config.last, run)
    if upsampler.last_unet is not None:
        if not (run.init or run.resume):
            raise ValueError(
                "model.last_unet is trained after model.unet, with `last`; remove it, or start "
                "from weights that contain it (--init)"
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


def fit_last_step(upsampler: Upsampler, last: LastStepConfig, run: Run[UpsamplerTraining]) -> None:
    """Train the U-Net of the last step, which starts as a copy of the first one."""
    if run.init:
        load_upsampler(upsampler, run.init)
        run = replace(run, init=None)
    elif not (run.resume or run.dry_run):
        raise ValueError("last starts from a trained upsampler; give --init")
    schedule = run.config.schedule
    step = LastStep(upsampler, Schedule(schedule), run.config.corruption, last.steps)

    def export(step: LastStep, folder: Path) -> None:
        save_component(step.upsampler, folder, schedule=schedule)

    fit_codec(step, run, export, last.perceptual, last.adversarial)


if __name__ == "__main__":
    launch(main, UpsamplerTraining, __doc__)

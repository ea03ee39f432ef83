"""Trains the diffusion decoder: from a CLIP image embedding and a caption to a picture (unCLIP 2.1).

accelerate launch train/decoder.py --config configs/emoji/decoder.yaml
accelerate launch train/decoder.py --config configs/tiny/inpaint.yaml --init runs/tiny/decoder/model
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from unclip.checkpoints.store import save_component
from unclip.data.loader import DataConfig, open_data
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.training.fit import FitConfig, fit
from unclip.training.frozen import load_clip
from unclip.training.inpainting import HoleConfig
from unclip.training.launch import Run, launch
from unclip.training.losses import DecoderLoss, DropConfig
from unclip.training.optim import OptimConfig
from unclip.training.preview import decoder_preview
from unclip.training.run_state import load_weights
from unclip.training.warm_start import warm_start


@dataclass(frozen=True)
class DecoderTraining:
    clip: str  # folder of a trained CLIP
    model: DecoderConfig
    data: DataConfig  # at the size that CLIP wants, if that is larger than the decoder's
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    drop: DropConfig = field(default_factory=lambda: DropConfig(text=0.5, image=0.1))
    task: Literal["draw", "inpaint"] = (
        "draw"  # inpaint: around random holes, best from a trained decoder's weights
    )
    holes: HoleConfig = field(default_factory=HoleConfig)  # of the task "inpaint"
    copy_paste: float = 0.0  # share of pictures with holes that another one's thing is pasted into; for plain grounds
    emb_mix: float = 0.0  # of another picture's in embeddings of pictures with holes, as a share of the arc, at most
    layout: str | None = (
        None  # folder of a trained one, for a model that is shown it; None = the one in --init
    )
    agreement: float = 0.0  # of embeddings with what is known around holes, at most, as in painting; needs a layout
    emb_noise: float = 0.0  # standard deviations of noise on embeddings, at most; for a model that is shown a layout

    def __post_init__(self) -> None:
        if self.model.inpaints != (self.task == "inpaint"):
            expected = str(self.task == "inpaint").lower()
            raise ValueError(f"task is {self.task!r}; expected a model with inpaints: {expected}")
        for name in ("copy_paste", "emb_mix"):
            if not 0 <= (share := getattr(self, name)) <= 1 or (share and self.task == "draw"):
                raise ValueError(f"{name} is {share}; expected 0 to 1, and 0 for task: draw")
        if self.layout and not self.model.layout:
            raise ValueError(
                f"layout is {self.layout}; expected its shape in model.layout, which is missing"
            )
        for name in ("agreement", "emb_noise"):
            if (value := getattr(self, name)) < 0 or (value and not self.model.layout):
                raise ValueError(
                    f"{name} is {value}; expected 0 or more, and 0 without model.layout"
                )
        if self.agreement and self.task == "draw":
            raise ValueError(
                f"agreement is {self.agreement}; expected 0 for task: draw, which has no holes"
            )
        for name, data in (("data", self.data), ("val_data", self.val_data)):
            if data and data.image_size < self.model.image_size:
                raise ValueError(
                    f"{name}.image_size is {data.image_size}; this model draws {self.model.image_size}"
                )


def main(run: Run[DecoderTraining]) -> None:
    config = run.config
    clip = load_clip(config.clip, config.model, run.device)
    decoder = Decoder(config.model).to(run.device)
    if decoder.layout is not None:
        decoder.layout.requires_grad_(False)
        if config.layout:
            load_weights(decoder.layout, config.layout)
        elif not (run.init or run.resume):
            raise ValueError(
                "model.layout is not trained here: set layout to a trained one's folder, or give --init"
            )
    if run.init:
        warm_start(decoder, run.init, keep_layout=config.layout is not None)
        run = replace(run, init=None)
    schedule = Schedule(config.schedule)
    val_loader = open_data(config.val_data) if config.val_data else None
    holes = config.holes if config.task == "inpaint" else None
    given = {
        name: getattr(config, name) for name in ("emb_noise", "emb_mix", "copy_paste", "agreement")
    }
    fit(
        decoder,
        DecoderLoss(decoder, clip, schedule, config.drop, config.loss, holes, **given),
        open_data(config.data),
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        preview=decoder_preview(clip, schedule, val_loader, holes=holes) if val_loader else None,
        export=partial(save_component, schedule=config.schedule),
    )


if __name__ == "__main__":
    launch(main, DecoderTraining, __doc__)

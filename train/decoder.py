"""Train the diffusion decoder: from a CLIP image embedding and a caption to an image (unCLIP 2.1).

accelerate launch train/decoder.py --config configs/emoji/decoder.yaml
accelerate launch train/decoder.py --config configs/tiny/inpaint.yaml --init runs/tiny/decoder/model
"""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import Literal

from unclip.checkpoints.store import load_as, save_component, with_base
from unclip.config import Fraction, NonNegative, PositiveInt, config
from unclip.data.loader import DataConfig, open_data
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.lora import LoRAConfig, save_lora
from unclip.models.unclip.decoder import Decoder, DecoderConfig
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.models.unclip.prior import EmbeddingStats
from unclip.training.embedded import measure_stats
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import (
    initialize,
    load_clip,
    load_weights,
    report_long_captions,
    warm_start,
)
from unclip.training.inpainting import HoleConfig
from unclip.training.launch import Run, launch
from unclip.training.losses import ConditionDropout, DecoderLoss
from unclip.training.optim import OptimConfig
from unclip.training.preview import decoder_preview


@config
class DecoderTraining:
    clip: str  # folder of a trained CLIP
    data: DataConfig  # at CLIP's image size, if that is larger than the decoder's
    optim: OptimConfig
    fit: FitConfig
    model: DecoderConfig | None = None
    base: str | None = None  # instead of model: folder of a decoder to fine-tune, with its schedule
    val_data: DataConfig | None = None
    lora: LoRAConfig | None = None  # train only an adapter of `base` or --init; needs peft
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    drop: ConditionDropout = field(default_factory=lambda: ConditionDropout(text=0.5, image=0.1))
    # "inpaint" trains on random holes, best from a trained decoder; "draw" is an old name
    task: Literal["generate", "inpaint", "draw"] = "generate"
    holes: HoleConfig = field(default_factory=HoleConfig)  # inpaint: frequencies of kinds of holes
    copy_paste: Fraction = 0.0  # inpaint: fraction of images with an object pasted into the hole
    emb_mix: Fraction = 0.0  # inpaint: largest interpolation to another image's embedding
    layout: str | None = None  # folder of a trained layout network; null: the one in --init
    # folder of a layout prior; half of the layouts are then those of the images, with noise
    layout_prior: str | None = None
    layout_noise: NonNegative = (
        0.5  # largest noise on these layouts, on scaled principal components
    )
    agreement: NonNegative = 0.0  # inpaint with a layout: largest weight of embedding guidance
    emb_noise: NonNegative = 0.0  # largest noise on image embeddings, in their std
    stats_batches: PositiveInt = 100  # batches for that std; with a layout, its own is used

    def __post_init__(self) -> None:
        if self.task == "draw":
            object.__setattr__(self, "task", "generate")
        if self.model is None:  # these checks follow in `with_base`
            return
        inpaint = self.task == "inpaint"
        if self.model.inpaints != inpaint:
            raise ValueError(
                f"task is {self.task!r}, model.inpaints is {str(self.model.inpaints).lower()}; "
                f"expected {str(inpaint).lower()}"
            )
        for name in ("copy_paste", "emb_mix", "agreement"):
            if (value := getattr(self, name)) and not inpaint:
                raise ValueError(f"{name} is {value}; expected 0, unless task is 'inpaint'")
        if self.agreement and not self.model.layout:
            raise ValueError(f"agreement is {self.agreement}; expected 0 without model.layout")
        if self.layout and not self.model.layout:
            raise ValueError(f"layout is {self.layout}, but model.layout, its config, is missing")
        if self.layout_prior and not self.model.layout:
            raise ValueError(f"layout_prior is {self.layout_prior}; expected null without layouts")
        for name, data in (("data", self.data), ("val_data", self.val_data)):
            if data and data.image_size < self.model.image_size:
                raise ValueError(
                    f"{name}.image_size is {data.image_size}; "
                    f"expected at least {self.model.image_size}, as model.image_size"
                )


def main(run: Run[DecoderTraining]) -> None:
    config = with_base(run.config, Decoder)
    clip = load_clip(config.clip, config.model, run.device)
    decoder = Decoder(config.model).to(run.device)
    if decoder.layout is not None:
        decoder.layout.requires_grad_(False)
        if config.layout:
            load_weights(decoder.layout, config.layout)
        elif not (run.init or run.resume or run.config.base):
            raise ValueError("model.layout is not trained here; set layout, or give --init")
    warm = partial(warm_start, keep_layout=config.layout is not None)
    run = initialize(decoder, run, warm)
    schedule = Schedule(config.schedule)
    holes = config.holes if config.task == "inpaint" else None
    layout_prior = None
    if config.layout_prior:
        layout_prior = load_as(config.layout_prior, LayoutPrior, "a layout prior")
        layout_prior = layout_prior.to(run.device).requires_grad_(False)
    loader, stats = open_data(config.data), None
    if config.emb_noise and decoder.layout is None:
        stats = EmbeddingStats(config.model.emb_dim).to(run.device)
        if not (run.resume or run.dry_run):  # a checkpoint has them
            measure_stats(stats, clip, loader, config.stats_batches)
    loss = DecoderLoss(
        decoder,
        clip,
        schedule,
        config.drop,
        config.loss,
        holes,
        emb_noise=config.emb_noise,
        emb_mix=config.emb_mix,
        copy_paste=config.copy_paste,
        agreement=config.agreement,
        layout_prior=layout_prior,
        layout_noise=config.layout_noise,
        stats=stats,
    )
    report_long_captions(clip.tokenizer, loader)
    val_loader = open_data(config.val_data) if config.val_data else None
    fit(
        decoder,
        loss,
        loader,
        config.fit,
        config.optim,
        run=run,
        statistics=stats,
        val_loader=val_loader,
        preview=decoder_preview(clip, schedule, val_loader, holes=holes) if val_loader else None,
        export=save_lora if config.lora else partial(save_component, schedule=config.schedule),
    )


if __name__ == "__main__":
    launch(main, DecoderTraining, __doc__)

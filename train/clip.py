"""Train a CLIP contrastively on images and captions (2103.00020).

accelerate launch train/clip.py --config configs/emoji/clip.yaml
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unclip.clip import CLIP, WEIGHTS_FILE, CLIPConfig
from unclip.config import config
from unclip.data.loader import DataConfig, open_data
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import load_weights, make_tokenizer, report_long_captions
from unclip.training.launch import Run, launch
from unclip.training.losses import CLIPLoss
from unclip.training.optim import OptimConfig
from unclip.training.reconstruction import (
    ReconstructingCLIP,
    ReconstructingCLIPLoss,
    ReconstructionConfig,
)


@config
class CLIPTraining:
    model: CLIPConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    reconstruction: ReconstructionConfig | None = None  # a head that predicts a small image
    tokenizer: str | None = None  # a tokenizer.json; null: train one on the captions


def main(run: Run[CLIPTraining]) -> None:
    config = run.config
    loader = open_data(config.data)
    vocab_size = config.model.model_cfg["text_cfg"]["vocab_size"]
    if loader.samples_per_step < 2:
        given = f"a batch has {loader.samples_per_step} image"
        raise ValueError(f"{given}; CLIP compares images, so that it needs at least 2")
    tokenizer = make_tokenizer(run, loader.captions(), vocab_size, config.model.context_length)
    report_long_captions(tokenizer, loader, config.model.context_length)
    clip = CLIP(config.model, tokenizer)
    if run.init and (weights := Path(run.init) / WEIGHTS_FILE).is_file():  # a saved CLIP
        load_weights(clip.model, weights)
        run = replace(run, init=None)
    if config.reconstruction is None:
        network, loss, export = clip, CLIPLoss(clip), CLIP.save_pretrained
    else:
        network = ReconstructingCLIP(clip, config.reconstruction)
        loss, export = ReconstructingCLIPLoss(network), ReconstructingCLIP.save
    fit(
        network,
        loss,
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=open_data(config.val_data) if config.val_data else None,
        export=export,
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    launch(main, CLIPTraining, __doc__)

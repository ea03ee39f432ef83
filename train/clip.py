"""Train a CLIP contrastively on images and captions (2103.00020).

accelerate launch train/clip.py --config configs/emoji/clip.yaml
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unclip.clip import CLIP, WEIGHTS_FILE, CLIPConfig
from unclip.config import config
from unclip.data.loader import DataConfig, open_data
from unclip.tokenizer import BPETokenizer
from unclip.training.embedded import open_loader
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import (
    load_clip,
    load_weights,
    make_tokenizer,
    report_long_captions,
)
from unclip.training.launch import Run, launch
from unclip.training.losses import CLIPLoss
from unclip.training.measures import Retrieval
from unclip.training.optim import OptimConfig
from unclip.training.reconstruction import (
    ReconstructingCLIP,
    ReconstructingCLIPLoss,
    ReconstructionConfig,
)
from unclip.training.text_tower import TextTower, TextTowerConfig, TextTowerLoss


@config
class CLIPTraining:
    model: CLIPConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    reconstruction: ReconstructionConfig | None = None  # a head that predicts a small image
    text_tower: TextTowerConfig | None = None  # train the text tower of another CLIP only
    tokenizer: str | None = None  # a tokenizer.json; null: train one on the captions

    def __post_init__(self) -> None:
        if self.text_tower and (self.reconstruction or self.tokenizer):
            raise ValueError("text_tower is set; expected neither reconstruction nor tokenizer")


def main(run: Run[CLIPTraining]) -> None:
    if run.config.text_tower is not None:
        return train_text_tower(run, run.config.text_tower)
    config = run.config
    loader = open_data(config.data)
    vocab_size = config.model.model_cfg["text_cfg"].get("vocab_size")
    if vocab_size is None:
        expected = "expected the size of the vocabulary to learn"
        raise ValueError(f"model.model_cfg.text_cfg.vocab_size is missing; {expected}")
    if loader.samples_per_step < 2:
        given = f"a batch has {loader.samples_per_step} image"
        raise ValueError(f"{given}; the contrastive loss needs at least 2, set data.batch_size")
    tokenizer = make_tokenizer(run, loader.captions(), vocab_size, config.model.context_length)
    report_long_captions(tokenizer, loader)
    clip = CLIP(config.model, tokenizer)
    if run.init:
        init = Path(run.init)
        weights = init if init.name == WEIGHTS_FILE else init / WEIGHTS_FILE
        if weights.is_file():  # a saved CLIP
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
        measure=Retrieval(clip),
    )


def train_text_tower(run: Run[CLIPTraining], tower: TextTowerConfig) -> None:
    config = run.config
    base = load_clip(tower.base, None, run.device)
    network = TextTower(CLIP(config.model, base.tokenizer).to(run.device))
    load_weights(network.clip.model, Path(tower.base) / WEIGHTS_FILE)
    loader = open_loader(config.data, base, embed_once=False)
    val_data = config.val_data
    fit(
        network,
        TextTowerLoss(network, base, tower),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=open_loader(val_data, base, embed_once=False) if val_data else None,
        export=TextTower.save,
        tokenizer=base.tokenizer if isinstance(base.tokenizer, BPETokenizer) else None,
        measure=Retrieval(network.clip),
    )


if __name__ == "__main__":
    launch(main, CLIPTraining, __doc__)

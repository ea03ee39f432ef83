"""Trains a CLIP contrastively on pictures and captions (2103.00020).

accelerate launch train/clip.py --config configs/emoji/clip.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from unclip.clip import CLIP, WEIGHTS_FILE, CLIPConfig
from unclip.data.loader import DataConfig, open_data
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.losses import CLIPLoss
from unclip.training.optim import OptimConfig
from unclip.training.run_state import load_weights
from unclip.training.vocabulary import make_tokenizer


@dataclass(frozen=True)
class CLIPTraining:
    model: CLIPConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    tokenizer: str | None = (
        None  # a tokenizer.json; None trains one with the text tower's vocabulary on the captions
    )


def main(run: Run[CLIPTraining]) -> None:
    config = run.config
    loader, text_cfg = open_data(config.data), config.model.model_cfg["text_cfg"]
    tokenizer = make_tokenizer(
        run, loader.captions(), text_cfg["vocab_size"], config.model.context_length
    )
    clip = CLIP(config.model, tokenizer)
    if run.init and (saved := Path(run.init) / WEIGHTS_FILE).is_file():
        load_weights(clip.model, saved)
        run = replace(run, init=None)
    fit(
        clip,
        CLIPLoss(clip),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=open_data(config.val_data) if config.val_data else None,
        export=lambda model, folder: model.save_pretrained(folder),
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    launch(main, CLIPTraining, __doc__)

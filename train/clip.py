"""Trains a CLIP contrastively on pictures and captions (2103.00020).

accelerate launch train/clip.py --config configs/emoji/clip.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from unclip.clip import CLIP, TOKENIZER_FILE, WEIGHTS_FILE, CLIPConfig
from unclip.data.loader import DataConfig, Loader
from unclip.tokenizer import BPETokenizer
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.losses import CLIPLoss
from unclip.training.optim import OptimConfig
from unclip.training.run_state import load_weights


@dataclass(frozen=True)
class CLIPTraining:
    model: CLIPConfig
    data: DataConfig
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    tokenizer: str | None = None  # a tokenizer.json; None trains one with the text tower's vocabulary on the captions


def main(run: Run[CLIPTraining]) -> None:
    config = run.config
    loader = Loader(config.data)
    saved = Path(run.init) if run.init and (Path(run.init) / WEIGHTS_FILE).is_file() else None
    clip = CLIP(config.model, make_tokenizer(config, loader, saved))
    if saved:
        load_weights(clip.model, saved / WEIGHTS_FILE)
        run = replace(run, init=None)
    fit(
        clip,
        CLIPLoss(clip),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=Loader(config.val_data) if config.val_data else None,
        export=lambda model, folder: model.save_pretrained(folder),
    )


def make_tokenizer(config: CLIPTraining, loader: Loader, saved: Path | None = None) -> BPETokenizer:
    """The given tokenizer, or that of a saved CLIP, or one learnt from all training captions.

    The last is of the size of the text tower's vocabulary.
    """
    text_cfg = config.model.model_cfg["text_cfg"]
    if given := config.tokenizer or (saved and saved / TOKENIZER_FILE):
        return BPETokenizer.load(given, text_cfg["context_length"])
    return BPETokenizer.train(loader.captions(), text_cfg["vocab_size"], text_cfg["context_length"])


if __name__ == "__main__":
    launch(main, CLIPTraining, __doc__)

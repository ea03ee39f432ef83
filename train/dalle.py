"""Trains DALL-E's transformer on captions and image codes, stage two (2102.12092, 2.2).

accelerate launch train/dalle.py --config configs/emoji/dalle.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from unclip.checkpoints.store import load_kind, save_component
from unclip.data.codes import CodeDataset
from unclip.data.loader import DataConfig, Loader, open_data
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.streams import Kernel
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.training.dalle import DALLELoss, DALLELossConfig
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.optim import OptimConfig
from unclip.training.preview import dalle_preview
from unclip.training.vocabulary import make_tokenizer


@dataclass(frozen=True)
class DALLETraining:
    codec: str  # folder of a trained codec
    model: DALLEConfig
    data: (
        DataConfig  # pictures, encoded at each step after augmentation, or codes of train/encode.py
    )
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    tokenizer: str | None = (
        None  # a tokenizer.json; None trains one with `text_vocab` tokens on the captions
    )
    loss: DALLELossConfig = field(default_factory=DALLELossConfig)
    attention_kernel: Kernel = (
        "sdpa"  # or flex, which skips what a layer doesn't see: for CUDA and long streams
    )


def main(run: Run[DALLETraining]) -> None:
    config = run.config
    told = "a codec, as train/codec.py makes it"
    codec = load_kind(config.codec, ImageCodec, told, device=run.device).requires_grad_(False)
    config.model.check_codec(codec.vocab_size, codec.grid)
    loader = open_loader(config.data, codec)
    val_loader = open_loader(config.val_data, codec) if config.val_data else None
    model = config.model
    tokenizer = make_tokenizer(
        run, loader.captions(), model.text_vocab, model.context_length, marked=False
    )
    dalle = DALLE(config.model).to(run.device)
    dalle.attention_kernel = config.attention_kernel

    def export(model: nn.Module, folder: Path) -> None:
        save_component(model, folder)
        tokenizer.save(folder / "tokenizer.json")

    fit(
        dalle,
        DALLELoss(dalle, tokenizer, codec, config.loss),
        loader,
        config.fit,
        config.optim,
        run=run,
        val_loader=val_loader,
        preview=dalle_preview(tokenizer, codec, val_loader) if val_loader else None,
        export=export,
        tokenizer=tokenizer,
    )


def open_loader(config: DataConfig, codec: ImageCodec) -> Loader:
    """Pictures at the codec's size, or codes of a codec like it."""
    loader = open_data(config, CodeDataset)
    if not isinstance(loader.dataset, CodeDataset):
        if (config.crop or config.image_size) != codec.image_size:
            size = config.crop or config.image_size
            raise ValueError(
                f"{config.path} is read at {size} pixels; this codec takes {codec.image_size}"
            )
    elif (loader.dataset.vocab_size, loader.dataset.grid) != (codec.vocab_size, codec.grid):
        raise ValueError(
            f"{config.path} holds codes of another codec: encode it again with train/encode.py"
        )
    return loader


if __name__ == "__main__":
    launch(main, DALLETraining, __doc__)

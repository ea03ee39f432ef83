"""Train DALL-E's transformer on captions and image codes, stage two (2102.12092, 2.2).

accelerate launch train/dalle.py --config configs/emoji/dalle.yaml
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from torch import nn

from unclip.checkpoints.store import load_as, save_component
from unclip.config import config
from unclip.data.loader import DataConfig, Loader, open_data
from unclip.data.precomputed import CodeDataset
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.spans import Kernel
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.tokenizer import TOKENIZER_FILE
from unclip.training.dalle import DALLELoss, DALLELossConfig
from unclip.training.fit import FitConfig, fit
from unclip.training.initialization import make_tokenizer, report_long_captions
from unclip.training.launch import Run, launch
from unclip.training.optim import OptimConfig
from unclip.training.preview import dalle_preview


@config
class DALLETraining:
    codec: str  # folder of a trained codec
    model: DALLEConfig
    data: DataConfig  # images, encoded after augmentation, or codes of train/encode.py
    optim: OptimConfig
    fit: FitConfig
    val_data: DataConfig | None = None
    tokenizer: str | None = None  # a tokenizer.json; null: train one on the captions
    loss: DALLELossConfig = field(default_factory=DALLELossConfig)
    attention_kernel: Kernel = "sdpa"  # "flex" skips masked blocks: for CUDA and long sequences


def main(run: Run[DALLETraining]) -> None:
    config, model = run.config, run.config.model
    codec = load_as(config.codec, ImageCodec, "a codec of train/codec.py", device=run.device)
    codec.requires_grad_(False)
    model.check_codec(codec.vocab_size, codec.grid)
    loader = open_loader(config.data, codec)
    val_loader = open_loader(config.val_data, codec) if config.val_data else None
    captions = loader.captions()
    tokenizer = make_tokenizer(run, captions, model.text_vocab, model.context_length, marked=False)
    report_long_captions(tokenizer, loader)
    dalle = DALLE(model).to(run.device)
    dalle.attention_kernel = config.attention_kernel

    def export(model: nn.Module, folder: Path) -> None:
        save_component(model, folder)
        tokenizer.save(folder / TOKENIZER_FILE)

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


def open_loader(data: DataConfig, codec: ImageCodec) -> Loader:
    """Return a loader of images at the codec's size, or of codes with its vocabulary and grid."""
    loader = open_data(data, CodeDataset)
    dataset, size = loader.dataset, data.crop or data.image_size
    if not isinstance(dataset, CodeDataset):
        if size != codec.image_size:
            raise ValueError(
                f"{data.path} is read at {size} pixels; expected {codec.image_size}, as the codec"
            )
    elif (dataset.vocab_size, dataset.grid) != (codec.vocab_size, codec.grid):
        raise ValueError(f"{data.path} has codes of another codec; run train/encode.py again")
    return loader


if __name__ == "__main__":
    launch(main, DALLETraining, __doc__)

"""Image codecs by themselves: our own component folders, OpenAI's dVAE, VQ-GANs of taming-transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from unclip.checkpoints import taming
from unclip.checkpoints.openai import dvae as openai_dvae
from unclip.checkpoints.registry import CONFIG_FILE
from unclip.checkpoints.store import load_component
from unclip.models.codecs.codec import Autoencoder


def load_codec(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The codec at a path, in eval mode: a folder of ours, one with encoder.pkl and decoder.pkl, or a taming .ckpt.

    ValueError for what is none of these or does not fit, FileNotFoundError if there is nothing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no codec at {path}")
    if openai_dvae.recognise(path):
        codec = openai_dvae.load(path, dtype)
    elif taming.recognise(path):
        codec = taming.load(path, dtype)
    elif (path / CONFIG_FILE).is_file():
        codec = load_component(path, dtype)
    else:
        raise ValueError(
            f"{path} holds no codec; expected {CONFIG_FILE}, encoder.pkl and decoder.pkl, or a .ckpt file"
        )
    if not isinstance(codec, Autoencoder):
        raise ValueError(f"{path} holds a {type(codec).__name__}; expected an image codec")
    return codec.to(device)

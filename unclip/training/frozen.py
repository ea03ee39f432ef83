"""The frozen CLIP that a network is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unclip.clip import CLIP


def load_clip(folder: str | Path, config: Any, device: torch.device) -> CLIP:
    """The CLIP in a folder, for a network of the config `config`; ValueError if the network can't take what it gives.

    Widths must be the same; there may be room for more tokens than CLIP has.
    """
    clip = CLIP.from_pretrained(folder)
    text_cfg, reader = (
        clip.config.model_cfg["text_cfg"],
        getattr(config, "text", None),
    )  # a decoder's own transformer
    widths = {"emb_dim": clip.emb_dim, "text_width": clip.text_width}
    rooms = {
        "context_length": clip.context_length,
        "vocab_size": text_cfg.get("vocab_size", 0),
    }  # 0: not told
    for name, size in widths.items():
        if (given := getattr(config, name, size)) != size:
            raise ValueError(
                f"model.{name} is {given}; expected {size}, as the CLIP in {folder} has"
            )
    for place, part in (("model", config), ("model.text", reader)):
        for name, size in rooms.items():
            if (given := getattr(part, name, size)) < size:
                raise ValueError(
                    f"{place}.{name} is {given}; expected at least {size}, as the CLIP in {folder} has"
                )
    return clip.to(device).requires_grad_(False)

"""OpenAI's CLIP as published: a TorchScript archive such as ViT-L-14.pt, or its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from unclip.checkpoints.adm import transformer_depth
from unclip.checkpoints.renaming import expecting
from unclip.checkpoints.states import read_state

if TYPE_CHECKING:
    from unclip.clip import CLIP, CLIPConfig

HEAD_DIM = 64  # of both towers, in every model that OpenAI published
SIZES = ("input_resolution", "context_length", "vocab_size")  # stored as tensors with the weights


def read_clip(file: Path, **preprocess_cfg: Any) -> CLIP:
    """Load both towers in float32. Raises ValueError if the image tower is not a ViT.

    preprocess_cfg: see `CLIPConfig`; by default OpenAI's, which crops the central square of images.
    """
    from unclip.clip import CLIP  # late: open_clip is slow to import

    state = {name: tensor for name, tensor in read_state(file).items() if name not in SIZES}
    config = replace(clip_config(state, file), preprocess_cfg=preprocess_cfg)
    return CLIP.from_tensors(config, state, file)


def clip_config(state: Mapping[str, Tensor], source: Path) -> CLIPConfig:
    """Infer the sizes of a CLIP from its tensors; all of OpenAI's use QuickGELU."""
    from unclip.clip import CLIPConfig

    with expecting("a CLIP of OpenAI with a ViT", source):
        context_length, text_width = state["positional_embedding"].shape
        vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
        grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        text_cfg = {
            "context_length": context_length,
            "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width,
            "heads": text_width // HEAD_DIM,
            "layers": transformer_depth(state),
        }
        vision_cfg = {
            "image_size": grid * patch_size,
            "layers": transformer_depth(state, "visual.transformer."),
            "width": vision_width,
            "head_width": HEAD_DIM,
            "patch_size": patch_size,
        }
        embed_dim = state["text_projection"].shape[1]
    return CLIPConfig(
        {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg, "quick_gelu": True}
    )

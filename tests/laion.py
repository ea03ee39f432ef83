"""Files in the formats of DALLE2-pytorch, with the weights of the recordings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import CONTEXT
from packaging.version import Version
from recorded import recording, weights
from torch import Tensor

from unclip.clip import CLIP, CLIPConfig
from unclip.tokenizer import BPETokenizer

RECORDED = recording("dalle2_pytorch")
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
T = torch.tensor([7, 93])
D = 16  # of CLIP's embeddings and text states in the decoders' recordings
CLIP_NAMED = {"make": "openai", "model": "ViT-L/14", "base_model_kwargs": None}


def state_of(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all tensors of a file: weights and constants."""
    state = weights(record["shapes"])
    for name in list(state):
        if name.endswith("relative_attention_bias.weight"):
            state[name] /= record["bias_scale"]
        elif name.endswith(".gamma"):
            state[name.replace("gamma", "beta")] = torch.zeros_like(state[name])
        elif name.endswith(".to_q.weight") and "net" in record:
            state[name.replace("to_q.weight", "rotary_emb.freqs")] = torch.ones(8)
    return state


def prior_section(net: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    fields = {
        "image_embed_dim": net["dim"],
        "image_size": 224,
        "timesteps": 100,
        "cond_drop_prob": 0.1,
    }
    return {"clip": CLIP_NAMED, "net": dict(net), **fields, **changes}


def decoder_section(*unets: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    each = {
        "image_sizes": [8, 16][: len(unets)],
        "beta_schedule": ["cosine", "linear"][: len(unets)],
    }
    return {
        "clip": CLIP_NAMED,
        "unets": list(unets),
        "timesteps": 100,
        "learned_variance": True,
        **each,
        **changes,
    }


def write(file: Path, state: Mapping[str, Tensor], release: str | None, **config: Any) -> Path:
    """Write a file as since release 0.26.2, or with release=None bare weights and a JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if release is None:
        torch.save(dict(state), file)
        (file.parent / f"{next(iter(config))}_config.json").write_text(json.dumps(config))
    else:
        torch.save(
            {"version": Version(release), "config": {**config, "train": {}}, "model": dict(state)},
            file,
        )
    return file


def write_clip(folder: Path) -> Path:
    """Save a CLIP whose embeddings are as wide as its text states, as the prior requires."""
    tokenizer = BPETokenizer.train(
        ["a red apple", "a blue fish"], vocab_size=270, context_length=CONTEXT
    )
    text_cfg = {
        "context_length": CONTEXT,
        "vocab_size": tokenizer.vocab_size,
        "width": D,
        "heads": 2,
        "layers": 1,
    }
    model_cfg = {
        "embed_dim": D,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {**text_cfg, "eos_id": tokenizer.end_id, "pool_type": "eos"},
    }
    torch.manual_seed(0)
    CLIP(CLIPConfig(model_cfg), tokenizer).save_pretrained(folder)
    return folder

"""Training that goes on from a decoder which was shown less: no layout, or not what is known around a hole."""

from __future__ import annotations

from pathlib import Path

import torch

from unclip.models.unclip.decoder import Decoder
from unclip.training.run_state import read_weights
from unclip.weights import load_strictly

STEM = "unet.stem.weight"


@torch.no_grad()
def warm_start(decoder: Decoder, source: str | Path, keep_layout: bool = False) -> None:
    """Gives a decoder the weights in `source`, of one that is alike but for what it is shown beside x_t.

    What is shown for the first time weighs nothing yet, so that it draws what the other one draws. keep_layout: its
    layout stays as it is, and the other one needs none. ValueError if the two differ in more.
    """
    file, state = read_weights(source)
    has_layout = any(name.startswith("layout.") for name in state)
    own = 3 * decoder.config.unet.patch**2  # channels of x_t; a layout has as many
    if STEM in state and (others := state[STEM].shape[1] - own * (1 + has_layout)) >= 0:
        x_t, layout, known = state[STEM].split([own, own * has_layout, others], dim=1)
        shown = {
            name: part for name, part in (("layout", layout), ("known", known)) if part.shape[1]
        }
        wanted = decoder.weights_beside()
        if shown.keys() <= wanted.keys():  # else it is told below that they do not fit
            beside = [shown.get(name, torch.zeros_like(weight)) for name, weight in wanted.items()]
            state[STEM] = torch.cat([x_t, *beside], dim=1)
    if keep_layout and decoder.layout is not None:
        state |= {f"layout.{name}": tensor for name, tensor in decoder.layout.state_dict().items()}
    load_strictly(decoder, state, file)

"""OpenAI's published dVAE: a folder with encoder.pkl and decoder.pkl, each a pickled module of which no code is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.checkpoints.pickles import Stub, module_state, read_checkpoint
from unclip.checkpoints.renaming import Rule, move, to_here
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.weights import load_strictly

PARTS = ("encoder", "decoder")


def recognise(path: Path) -> bool:
    return all((path / f"{part}.pkl").is_file() for part in PARTS)


def load(path: Path, dtype: torch.dtype = torch.float32) -> DVAE:
    """The dVAE in a folder, in eval mode; its sizes are read from the tensors. ValueError for any other content."""
    state = read(path)
    with torch.device("meta"):
        dvae = DVAE(sizes(state, path)).to(dtype)
    shapes = {name: tensor.shape for name, tensor in dvae.state_dict().items()}
    load_strictly(dvae, to_here(state, rules(shapes), shapes, path), path)
    return dvae.eval()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of both files."""
    state = {}
    for part in PARTS:
        content = read_checkpoint(path / f"{part}.pkl")
        tensors = module_state(content) if isinstance(content, Stub) else content
        state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    return state


def rules(names: Mapping[str, torch.Size]) -> list[Rule]:
    """For the tensors that a dVAE has here; there, `blocks.` stands before all of them."""
    return [move(name.replace(".", ".blocks.", 1), name) for name in names]


def sizes(state: Mapping[str, Tensor], source: str | Path) -> DVAEConfig:
    """What the shapes and names of OpenAI's tensors tell; ValueError if they are of something else."""
    blocks = [
        found.groups()
        for name in state
        if (found := re.match(r"encoder\.blocks\.(group_\d+)\.(block_\d+)\.", name))
    ]
    try:
        return DVAEConfig(
            vocab_size=len(state["encoder.blocks.output.conv.w"]),
            width=len(state["encoder.blocks.input.w"]),
            groups=len({group for group, _ in blocks}),
            blocks=len({block for _, block in blocks}),
            code_width=len(state["decoder.blocks.input.w"]),
        )
    except KeyError as error:
        raise ValueError(f"{source} is no dVAE of OpenAI's: {error.args[0]} is missing") from None

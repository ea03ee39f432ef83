"""OpenAI's dVAE: a folder with encoder.pkl and decoder.pkl, pickled modules that are not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.checkpoints.formats import Format
from unclip.checkpoints.pickles import Stub, read_checkpoint
from unclip.checkpoints.renaming import Part, Rule, build, count, expecting, move
from unclip.checkpoints.states import module_state
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.weights import meta_device

PARTS = ("encoder", "decoder")


def recognise(path: Path) -> bool:
    return all((path / f"{part}.pkl").is_file() for part in PARTS)


def load(path: Path, dtype: torch.dtype = torch.float32) -> DVAE:
    """Load the dVAE in a folder, in eval mode; sizes are inferred from the tensors."""
    return build_dvae(read(path), path, dtype)


def build_dvae(state: Mapping[str, Tensor], source: str | Path, dtype: torch.dtype) -> DVAE:
    """Build a dVAE from OpenAI's tensors."""
    config = infer_config(state, source)
    with meta_device():
        names = DVAE(config).state_dict()
    return build(DVAE, config, [Part(state, rules(names), source)], dtype)


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of both files."""
    state = {}
    for part in PARTS:
        content = read_checkpoint(path / f"{part}.pkl")
        tensors = module_state(content) if isinstance(content, Stub) else content
        state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    return state


def rules(names: Iterable[str]) -> list[Rule]:
    """Return the rules for our `names`; OpenAI's have `blocks.` after encoder or decoder."""
    return [move(name.replace(".", ".blocks.", 1), name) for name in names]


def infer_config(state: Mapping[str, Tensor], source: str | Path) -> DVAEConfig:
    """Infer the sizes from OpenAI's tensors. Raises ValueError if they are not of a dVAE."""
    with expecting("a dVAE of OpenAI", source):
        return DVAEConfig(
            vocab_size=len(state["encoder.blocks.output.conv.w"]),
            width=len(state["encoder.blocks.input.w"]),
            groups=count(state, r"encoder\.blocks\.(group_\d+)\."),
            blocks=count(state, r"encoder\.blocks\.group_\d+\.(block_\d+)\."),
            code_width=len(state["decoder.blocks.input.w"]),
        )


FORMAT = Format("OpenAI's dVAE", "codec", recognise, load, lambda path: {"codec": read(path)})

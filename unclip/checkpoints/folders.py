"""Weights in the folders of a foreign layout, for networks that stand on the meta device."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from unclip.checkpoints.diffusers.layout import weight_files, weights_of
from unclip.checkpoints.pickles import read_state
from unclip.checkpoints.renaming import LEAVES, Rule, to_here
from unclip.weights import TensorFile, write_safetensors

M = TypeVar("M", bound=nn.Module)
Parts = Mapping[
    Path, Sequence[Rule]
]  # the folder of each part of a network, and the rules that its names follow


def fill(module: M, parts: Parts, dtype: torch.dtype) -> M:
    """Gives a module the weights of all its parts, parameters in `dtype` and buffers (statistics) in float32.

    Tensors are read and cast one by one, so that no more than the wanted weights are in memory.
    """
    parameters = {name for name, _ in module.named_parameters()}
    own = module.state_dict()
    dtypes = {name: dtype if name in parameters else torch.float32 for name in own}
    module.load_state_dict(read_parts(own, parts, dtypes), assign=True)
    return module.eval()


def read_parts(
    own: Mapping[str, Tensor],
    parts: Parts,
    dtypes: Mapping[str, torch.dtype],
    ignored: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The tensors of all parts under our names; own: a state dict of ours, for the shapes that are wanted."""
    tensors = {}
    for folder, rules in parts.items():
        places = {name + leaf for rule in rules for name in rule.here for leaf in LEAVES}
        shapes = {name: tensor.shape for name, tensor in own.items() if name in places}
        tensors |= to_here(read_weights(folder), rules, shapes, weights_of(folder), ignored, dtypes)
    return tensors


def read_weights(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a component, whole or in shards, safetensors or .bin; each is read when it is asked for."""
    return ChainMap(
        *(
            TensorFile(file) if file.suffix == ".safetensors" else read_state(file)
            for file in weight_files(folder)
        )
    )


def write_weights(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    """Writes tensors as diffusers and transformers do; floating-point ones in `dtype` if it is given."""
    wanted = {
        name: x.to("cpu", dtype if x.is_floating_point() else None) for name, x in tensors.items()
    }
    # safetensors wants no two tensors in one storage, and the parts of a Linear that was split are in one.
    wanted = {
        name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in wanted.items()
    }
    write_safetensors(wanted, file, metadata={"format": "pt"})

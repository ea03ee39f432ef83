"""Reference networks of diffusers with the same weights as ours."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from unclip.checkpoints.renaming import Rule, import_state


def load_from_diffusers(
    module: nn.Module, reference: nn.Module, rules: Iterable[Rule], except_for: str | None = None
) -> None:
    """Copy the weights of `reference` to `module`, except for its submodule `except_for`."""
    shapes = {
        name: x.shape for name, x in module.state_dict().items() if name.split(".")[0] != except_for
    }
    state = import_state(reference.state_dict(), rules, shapes, type(reference).__name__)
    module.load_state_dict(state, strict=except_for is None)


def randomize(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Add noise to every parameter, so that none keeps its initial 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * std)
    return module

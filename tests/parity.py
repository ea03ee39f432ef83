"""Reference networks of diffusers beside ours: the same weights in both."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from unclip.checkpoints.renaming import Rule, import_state


def load_from_diffusers(
    module: nn.Module, reference: nn.Module, rules: Iterable[Rule], but_for: str | None = None
) -> None:
    """Gives `module` the weights of `reference`: all that it has, but for those of the submodule `but_for`."""
    shapes = {
        name: x.shape for name, x in module.state_dict().items() if name.split(".")[0] != but_for
    }
    state = import_state(reference.state_dict(), rules, shapes, type(reference).__name__)
    module.load_state_dict(state, strict=but_for is None)


def randomize(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Noise on every parameter, so that none is left at the 0 or 1 of its initialisation."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * std)
    return module

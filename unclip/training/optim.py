"""AdamW, and the learning rate as a function of the step: it has no state, so there is none to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

TABLES = (
    "positions",
    "positional_embedding",
    "padding",
    "no_token",
    "codebook",
)  # of embeddings, by parameters' names


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with decoupled weight decay, linear warm-up, then a constant or a cosine schedule."""

    lr: float = 1e-4  # the peak
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # on matrices and convolutions; never on gains, biases, embeddings
    warmup: int = 500  # steps from 0 to lr
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr: float = 0.0  # where the cosine ends, as a fraction of lr
    decay_steps: int | None = None  # when it ends there, to stay; None = with the training
    clip_norm: float | None = 1.0  # the gradient is scaled down to this norm; None = only measured

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; expected a positive number")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; expected 0 steps or more")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is {self.final_lr}; expected a fraction of lr in [0, 1]")
        if self.decay_steps is not None and self.decay_steps <= self.warmup:
            raise ValueError(
                f"decay_steps is {self.decay_steps}; expected more than warmup = {self.warmup}, or null"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"clip_norm is {self.clip_norm}; expected a positive number, or null for no clipping"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of update `step` (from 0) out of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, (self.decay_steps or steps) - self.warmup)
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, fused where the device has a fused kernel."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {
        id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in TABLES
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    spared = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda") for p in trained),
    )

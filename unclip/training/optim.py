"""AdamW, and the learning rate as a function of the step, without state to resume."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from unclip.config import Fraction, NonNegativeInt, Positive, config
from unclip.extras import import_extra

# Names of parameters that are embedding tables.
TABLES = ("positions", "positional_embedding", "padding", "no_token", "codebook")


@config
class OptimConfig:
    """AdamW with decoupled weight decay, linear warm-up, then a constant or cosine schedule."""

    # "adamw8bit" keeps its state in 8 bits: 2 bytes a parameter instead of 8; needs bitsandbytes
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    lr: Positive = 1e-4  # the peak
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # for matrices and convolutions; not for gains, biases, embeddings
    warmup: NonNegativeInt = 500  # steps from 0 to lr
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr: Fraction = 0.0  # at the end of the cosine, as a fraction of lr
    decay_steps: int | None = None  # end of the cosine, constant after it; null: the last step
    clip_norm: Positive | None = 1.0  # largest gradient norm; null: no clipping

    def __post_init__(self) -> None:
        if self.decay_steps is not None and self.decay_steps <= self.warmup:
            raise ValueError(
                f"decay_steps is {self.decay_steps}; expected more than warmup = {self.warmup}"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of update `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, (self.decay_steps or steps) - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Create AdamW over the trainable parameters, fused where the device supports it.

    ValueError if there are none, or if an 8-bit optimizer is not installed.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in TABLES}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    others = [p for p in trained if p.ndim < 2 or id(p) in tables]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.kind == "adamw8bit":
        bitsandbytes = import_extra("bitsandbytes", "finetune", 'optim.kind "adamw8bit"')
        return bitsandbytes.optim.AdamW8bit(groups, **options)
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, **options, fused=fused)

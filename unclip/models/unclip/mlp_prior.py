"""A diffusion prior that reads the caption once: a transformer for the text, an MLP for denoising.

`DiffusionPrior` (unCLIP 2.2) attends to the caption at every step. Here a transformer reduces the
caption to one vector, and a residual MLP denoises the embedding. A step is cheap, and in training
one reading of a caption serves several noised copies of its embedding. The blocks of the MLP are
modulated by timestep and caption, as in DiT (2212.09748).
"""

# B batch, L text tokens, D CLIP embedding width, C width of the transformer, M width of the MLP

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import Positive, PositiveInt, config
from unclip.models.layers import KeyValues, ModuleList, TimeMLP, zeroed
from unclip.models.unclip.prior import DenoisingPrior, TextPriorConfig
from unclip.types import TextEncoding


@config
class MLPPriorConfig(TextPriorConfig):
    """Width, depth, heads and mlp_ratio are those of the transformer."""

    _: KW_ONLY
    kind: Literal["mlp"]
    mlp_width: PositiveInt = 512
    mlp_depth: PositiveInt = 4  # residual blocks
    text_states: bool = True  # False: read only CLIP's text embedding of a caption
    x0_limit: Positive | None = 5.0  # as in PriorConfig


def embedding_only(emb: Tensor, text_width: int) -> TextEncoding:
    """Return text encodings with CLIP's embeddings (B, D) only, without text states."""
    states = emb.new_zeros(len(emb), 0, text_width)
    return TextEncoding(emb, states, states.new_zeros(len(emb), 0, dtype=torch.bool))


class ModulatedBlock(nn.Module):
    """A residual MLP block, modulated by a condition (B, M)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.modulation = zeroed(nn.Linear(width, 3 * width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return x + gate * self.fc2(self.dropout(F.silu(self.fc1(h))))


class MLPPrior(DenoisingPrior):
    """Predicts x_0 from x_t, t and a summary of the caption: the transformer's last output."""

    def __init__(self, config: MLPPriorConfig) -> None:
        super().__init__(config, own_tokens=0)
        D, C, M = config.emb_dim, config.width, config.mlp_width
        self.summary = nn.Linear(C, M)
        self.time = TimeMLP(M, M)
        self.x_proj = nn.Linear(D, M)
        self.mlp = ModuleList[ModulatedBlock](
            ModulatedBlock(M, config.dropout) for _ in range(config.mlp_depth)
        )
        self.out_norm = nn.LayerNorm(M)
        self.head = zeroed(nn.Linear(M, D))
        if not config.text_states:
            self.state_proj.requires_grad_(False)
            if config.null_text == "learned":
                self.null_state.requires_grad_(False)

    def condition(self, text: TextEncoding, drop: Tensor | None = None) -> KeyValues:
        """Summarise each text as one key without a value, (B, 1, 1, M).

        The null replaces the text where `drop` (B,) bool is True.
        """
        if not self.config.text_states:
            text = embedding_only(text.emb, self.config.text_width)
        x, mask = self.text_tokens(text, drop)
        for block in self.blocks:
            x, _, _ = self.run(block.read, x, mask[:, None, None])  # B L+1 C
        summary = self.summary(self.norm(x[:, -1]))  # B M
        return KeyValues((summary[:, None, None],), (), mask.new_ones(len(x), 1))

    def predict(self, x_t: Tensor, time: Tensor, context: KeyValues) -> Tensor:
        summary = context.k[0][:, 0, 0]  # B or fewer rows, M
        condition = F.silu(time + summary.repeat_interleave(len(x_t) // len(summary), dim=0))
        x = self.x_proj(x_t.to(summary.dtype))  # B M
        for block in self.mlp:
            x = block(x, condition)
        return self.head(self.out_norm(x))

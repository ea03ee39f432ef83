"""The diffusion prior (unCLIP 2.2), and the base classes of all priors.

The priors of the paper are causal transformers from a caption's encoding to a CLIP image embedding.
Their tokens are [text states, text embedding | their own tokens]; the keys and values of the text
are computed once. `MLPPrior` uses the transformer for the caption alone.
"""

# B batch, L text tokens, D CLIP embedding width, W text width, C width, H heads, d width of a head

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import DropRate, Positive, PositiveInt, check_multiple, config
from unclip.models.layers import (
    DenoiserCache,
    KeyValues,
    ModuleList,
    TimeMLP,
    Timestep,
    TransformerBlock,
    embed_time,
    normal_parameter,
    replace_rows,
    run_part,
    zeroed,
)
from unclip.types import TextEncoding

Combine = Callable[[Tensor], Tensor]  # predictions under R conditions (R * B, ...) -> (B, ...)
OnPrediction = Callable[[int], None]  # called with 1 .. `DirectPrior.steps`


class EmbeddingStats(nn.Module):
    """Mean and standard deviation of CLIP image embeddings, saved with a network trained on them.

    The buffers stay in float32 whatever the dtype of the parameters.
    """

    emb_mean: Tensor
    emb_std: Tensor

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.register_buffer("emb_mean", torch.zeros(emb_dim))
        self.register_buffer("emb_std", torch.full((emb_dim,), emb_dim**-0.5))

    def set_stats(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and the standard deviation, (D,) each.

        ValueError if the width differs, a value is not finite, or a deviation is not positive.
        """
        D = len(self.emb_mean)
        if mean.numel() != D or std.numel() != D:
            raise ValueError(
                f"mean has {mean.numel()} numbers and std {std.numel()}; expected {D} each"
            )
        if invalid := int((~mean.isfinite()).sum()):
            raise ValueError(f"mean has {invalid} dimensions that are not finite")
        if invalid := int((~(std.isfinite() & (std > 0))).sum()):
            raise ValueError(
                f"std has {invalid} dimensions that are not positive and finite; "
                f"expected at least two different embeddings"
            )
        self.emb_mean.copy_(mean.reshape(D))
        self.emb_std.copy_(std.reshape(D))

    @property
    def emb_norm(self) -> Tensor:
        """Root mean square length of an image embedding, ()."""
        return (self.emb_mean.square() + self.emb_std.square()).sum().sqrt()

    def normalize(self, emb: Tensor) -> Tensor:
        """Scale CLIP image embeddings (..., D) to about unit variance."""
        return (emb - self.emb_mean) / self.emb_std

    def denormalize(self, x_0: Tensor) -> Tensor:
        """Invert `normalize`."""
        return x_0 * self.emb_std + self.emb_mean


@config
class TextPriorConfig:
    emb_dim: PositiveInt  # D, of CLIP's embeddings
    text_width: PositiveInt  # W, of CLIP's text states
    context_length: PositiveInt  # slots for text tokens; a text may use fewer
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveInt = 4
    dropout: DropRate = 0.0
    null_text: Literal["learned", "empty_prompt"] = "learned"

    def __post_init__(self) -> None:
        check_multiple("width", self.width, heads=self.heads, sin_and_cos=2)


class TextPrior(EmbeddingStats):
    """Transformer over [text states, text embedding | own tokens]; own tokens come last."""

    gradient_checkpointing = False

    def __init__(self, config: TextPriorConfig, own_tokens: int) -> None:
        super().__init__(config.emb_dim)
        self.config: Any = config  # of the subclass's own config class
        D, C, positions = config.emb_dim, config.width, config.context_length + 1 + own_tokens
        self.state_proj = nn.Linear(config.text_width, C)
        self.emb_proj = nn.Linear(D, C)
        self.positions = normal_parameter(positions, C, std=0.02)
        self.blocks = ModuleList[TransformerBlock](
            TransformerBlock(C, config.heads, config.mlp_ratio, config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(C)
        if config.null_text == "learned":
            self.null_emb = normal_parameter(D, std=D**-0.5)
            self.null_state = normal_parameter(config.text_width)

    def null_text(self, batch: int) -> TextEncoding:
        """Return the learned null: one token and an embedding. ValueError if there is none."""
        if self.config.null_text != "learned":
            raise ValueError(
                'this prior has no learned null (null_text is "empty_prompt"); '
                'pass the encoding of ""'
            )
        emb = self.null_emb.expand(batch, -1)
        mask = emb.new_ones(batch, 1, dtype=torch.bool)
        return TextEncoding(emb, self.null_state.expand(batch, 1, -1), mask)

    def text_tokens(self, text: TextEncoding, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of the text, (B, L + 1, C), the embedding last, and their mask.

        The null replaces the text where `drop` (B,) bool is True.
        """
        L, slots = text.states.shape[1], self.config.context_length
        if L > slots:
            raise ValueError(f"the text has {L} tokens; this prior takes at most {slots}")
        text = text.to(dtype=self.positions.dtype)
        if drop is not None:
            text = self._replace_by_null(text, drop)
        tokens = [self.state_proj(text.states), self.emb_proj(text.emb)[:, None]]
        # The embedding keeps its position whatever the length of the text.
        positions = torch.cat([self.positions[:L], self.positions[slots : slots + 1]])
        x = torch.cat(tokens, dim=1) + positions  # B L+1 C
        return x, F.pad(text.mask, (0, 1), value=True)  # B L+1

    def condition(self, text: TextEncoding, drop: Tensor | None = None) -> KeyValues:
        """Compute keys and values of the L + 1 text positions in every block.

        The null replaces the text where `drop` (B,) bool is True.
        """
        x, mask = self.text_tokens(text, drop)
        N = mask.shape[1]  # L + 1
        visible = torch.ones(N, N, dtype=torch.bool, device=mask.device)
        # Padding attends to itself, or its softmax would be 0 / 0; no other token sees it.
        visible = visible.tril() & (mask[:, None, None] | visible.triu())  # B 1 N N
        ks, vs = [], []
        *blocks, last = self.blocks
        for block in blocks:
            x, k, v = self.run(block.read, x, visible)  # k, v: B H L+1 d
            ks.append(k)
            vs.append(v)
        _, k, v = last.project(x)  # its output is not needed
        return KeyValues((*ks, k), (*vs, v), mask)

    def transform(self, x: Tensor, text: KeyValues) -> Tensor:
        """Apply all blocks to the first n own tokens: (B, n, C) -> (B, n, C).

        Each token attends to the text, to earlier tokens and to itself. Each row of `text` is used
        for an equal share of B.
        """
        for block, (k, v, mask) in zip(self.blocks, text.layers(), strict=True):
            x = self.run(block.extend, x, k, v, mask)
        return x

    def run(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        return run_part(function, *tensors, recompute=self.gradient_checkpointing)

    def _replace_by_null(self, text: TextEncoding, drop: Tensor) -> TextEncoding:
        null = self.null_text(len(text))
        null_mask = F.pad(null.mask, (0, text.mask.shape[1] - 1), value=False)
        pairs = ((text.emb, null.emb), (text.states, null.states), (text.mask, null_mask))
        return TextEncoding(*(replace_rows(x, drop, x_null) for x, x_null in pairs))


class DenoisingPrior(TextPrior, ABC):
    """A prior that predicts the normalised embedding x_0 from x_t, t and the text."""

    time: TimeMLP

    @property
    def x0_limit(self) -> float | None:
        """Bound of |x_0| in sampling."""
        return self.config.x0_limit

    @abstractmethod
    def predict(self, x_t: Tensor, time: Tensor, context: KeyValues) -> Tensor:
        """Predict as `denoise` does, from a time embedding (B or 1, width of `self.time`)."""

    def denoise(
        self, x_t: Tensor, t: Timestep, context: KeyValues, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict the normalised embedding from x_t (B, D) at t, (B,) or one number -> (B, D).

        Each row of `context`, from `condition`, is used for an equal share of B.
        """
        return self.predict(x_t, embed_time(self.time, t, x_t, cache), context)

    def forward(
        self, x_t: Tensor, t: Tensor, text: TextEncoding, drop: Tensor | None = None
    ) -> Tensor:
        return self.denoise(x_t, t, self.condition(text, drop))


@config
class PriorConfig(TextPriorConfig):
    # clip x_0 to ± this, in standard deviations (Karlo); None = no clipping
    x0_limit: Positive | None = 5.0


class DiffusionPrior(DenoisingPrior):
    """Own tokens [t, x_t, query]; the prediction of x_0 is read from the query."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config, own_tokens=3)
        D, C = config.emb_dim, config.width
        self.time = TimeMLP(C, C)
        self.x_proj = nn.Linear(D, C)
        self.query = normal_parameter(C, std=0.02)
        self.head = zeroed(nn.Linear(C, D))

    def predict(self, x_t: Tensor, time: Tensor, context: KeyValues) -> Tensor:
        B = len(x_t)
        x = self.x_proj(x_t.to(self.query.dtype))  # B C
        tokens = torch.stack([time.expand(B, -1), x, self.query.expand(B, -1)], dim=1)  # B 3 C
        return self.head(self.norm(self.transform(tokens + self.positions[-3:], context)[:, -1]))


class DirectPrior(TextPrior, ABC):
    """A prior that predicts image embeddings without diffusion, and so has no noise schedule."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of consecutive predictions that `sample` makes."""

    @abstractmethod
    def sample(
        self,
        text: KeyValues,
        generators: Sequence[torch.Generator],
        combine: Combine,
        *,
        temperature: float = 1.0,
        on_prediction: OnPrediction | None = None,
    ) -> Tensor:
        """Sample CLIP image embeddings (B, D), one for each generator, independent of the batch.

        text: R * B rows, the first condition of all B, then the second, ... `combine` reduces
        the predictions under the R conditions to one each (guidance, mixtures). temperature 0
        takes the most likely value.
        """

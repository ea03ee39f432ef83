"""Sampling of image codes (2102.12092, 2.6): temperature, top-k, top-p, guidance."""

# B images, N codes of each, K codes of the codec

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.models.dalle.code_transformer import CodeTransformer, Prefix
from unclip.models.layers import random_rows
from unclip.types import CodeOptions

Step = Callable[[Tensor, Tensor, Any], Tensor]
OnCode = Callable[[int, Tensor], "list[int] | None"]
"""Called with the number of codes so far, n, and those codes (B, n).

It may return the images that are still wanted; codes of the others stay 0 from then on.
"""

# Lower temperatures could overflow the logits, and select the most likely code anyway.
MIN_TEMPERATURE = 1e-6


@torch.inference_mode()
def sample_codes(
    dalle: CodeTransformer,
    prefix: Prefix,
    generators: Sequence[torch.Generator],
    options: CodeOptions,
    *,
    known: Tensor | None = None,
    null: Prefix | None = None,
    on_code: OnCode | None = None,
    compiled_step: Step | None = None,
) -> Tensor:
    """Sample the codes (B, h, w) of B images, one for each row of the prefix.

    generators: one for each image, which always generates N numbers, so that no image depends on
    its batch. known: the codes (B, N) to keep, and -1 where one is sampled, given the known and the
    sampled codes before it; None = all are sampled. null: the prefix for guidance, of one row or B,
    if already computed; by default of `dalle.null_tokens(1)`. on_code: called after every code from
    the first to the last that is sampled. compiled_step: a compiled `dalle.step`.
    """
    B, N = len(prefix), dalle.config.num_codes
    known = torch.full((B, N), -1) if known is None else _checked(dalle, known, B)
    first, end = sampled_span(known)
    if len(generators) != B:
        raise ValueError(f"{len(generators)} generators were given for {B} images; expected {B}")
    uniform = random_rows(torch.rand, N, generators, prefix.logits)  # B N
    codes = known.clamp(min=0).to(prefix.logits.device)
    if first == end:
        return codes.unflatten(1, dalle.config.grid)
    to_sample = (known < 0).any(dim=0).tolist()
    known = known.to(codes.device)

    guided = options.guidance != 1.0
    if guided:
        if null is None:
            null = dalle.condition(dalle.null_tokens(1))
        prefix = prefix.cat([prefix, null.repeat_interleave(B // len(null))])

    def for_both(rows: Tensor) -> Tensor:  # with text, and without
        return torch.cat([rows, rows]) if guided else rows

    cache, logits = dalle.start_cache(prefix), prefix.logits
    del prefix  # the cache has its own copy
    if first:
        logits = dalle.extend(for_both(codes[:, :first]), cache)
    positions, wanted = torch.arange(N, device=codes.device), torch.arange(B, device=codes.device)
    for n in range(first, end):
        if n > first:
            last = for_both(codes[wanted, n - 1])
            if compiled_step is None:
                logits = dalle.step(last, n - 1, cache)
            else:
                logits = compiled_step(last, positions[n - 1], cache)
        if to_sample[n]:
            if guided:
                logits = guide(logits, options.guidance)
            sampled = sample_code(logits, uniform[wanted, n], options)
            codes[wanted, n] = torch.where(known[wanted, n] < 0, sampled, codes[wanted, n])
        still = None if on_code is None else on_code(n + 1, codes[:, : n + 1])
        if still is not None and not still:
            break
        if still is not None and len(still) < len(wanted) and compiled_step is None:
            left = torch.tensor([i for i, k in enumerate(wanted.tolist()) if k in still])
            left = left.to(codes.device)
            cache = cache.select(torch.cat([left, left + len(wanted)]) if guided else left)
            wanted = wanted[left]
    return codes.unflatten(1, dalle.config.grid)


def sampled_span(known: Tensor) -> tuple[int, int]:
    """Return the span of the positions where a code of known (B, N) is -1; (N, N) if none is."""
    positions = (known < 0).any(dim=0).nonzero()
    if not len(positions):
        return known.shape[1], known.shape[1]
    return int(positions[0]), int(positions[-1]) + 1


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of logits (2 B, K), conditioned ones first -> (B, K) float32."""
    cond, null = logits.float().chunk(2)
    return torch.lerp(null, cond, scale)


def sample_code(logits: Tensor, uniform: Tensor, options: CodeOptions) -> Tensor:
    """Sample codes (B,) from logits (B, K) and uniform numbers (B,), by inverse transform."""
    if options.temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / options.temperature, None
    if options.top_k is not None or options.top_p < 1:
        K = logits.shape[-1]
        logits, ids = logits.topk(min(options.top_k or K, K))  # B k, in descending order
    p = logits.softmax(dim=-1)
    if options.top_p < 1:
        p = p * (p.cumsum(dim=-1) - p < options.top_p)  # always keeps the most likely code
    cdf = p.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    # right=True never selects a code of probability 0; rounding up must not go past the last one
    choice = torch.searchsorted(cdf, uniform[:, None] * total, right=True)  # B 1
    choice = choice.minimum(torch.searchsorted(cdf, total))
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def _checked(dalle: CodeTransformer, known: Tensor, batch: int) -> Tensor:
    """Return the known codes (batch, N) on the CPU. Raises ValueError if they are not valid."""
    config = dalle.config
    if known.shape != (batch, config.num_codes):
        expected = f"({batch}, {config.num_codes})"
        raise ValueError(f"known is of shape {tuple(known.shape)}; expected {expected}")
    low, high = int(known.min()), int(known.max())
    if low < -1 or high >= config.image_vocab:
        expected = f"0 to {config.image_vocab - 1}, or -1 to sample a code"
        raise ValueError(f"known has codes from {low} to {high}; expected {expected}")
    return known.cpu()

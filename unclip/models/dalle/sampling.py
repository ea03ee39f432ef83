"""Drawing pictures from DALL-E's transformer, code by code (2102.12092, 2.6): temperature, top-k, top-p, guidance."""

# B pictures, N codes of each, m given ones, K codes of the codec

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip.models.dalle.cache import CodeCache
from unclip.models.dalle.transformer import DALLE, TextPrefix
from unclip.models.published.bart_dalle import BartCache, BartDALLE, BartPrefix
from unclip.types import CodeOptions

AnyDALLE = DALLE | BartDALLE
Prefix = TextPrefix | BartPrefix
Step = Callable[[Tensor, Tensor, CodeCache | BartCache], Tensor]
OnCode = Callable[[int, Tensor], None]  # codes drawn or given so far, n; those codes (B, n)

COLDEST = 1e-6  # temperature; below it logits might overflow, and the likeliest code has all the probability anyway


@torch.inference_mode()
def sample_codes(
    dalle: AnyDALLE,
    prefix: Prefix,
    generators: Sequence[torch.Generator],
    options: CodeOptions,
    *,
    prime: Tensor | None = None,
    null: Prefix | None = None,
    on_code: OnCode | None = None,
    compiled_step: Step | None = None,
) -> Tensor:
    """Codes (B, h, w) of B pictures, one for each row of the prefix.

    generators: one for each picture, which draws N numbers whatever else is given: no picture depends on its batch.
    prime: the first m codes of every picture, (B, m) or (1, m), kept as they are. null: the prefix of
    `dalle.null_tokens(1)`, if it is at hand and guidance wants it. on_code: called after every code.
    compiled_step: torch.compile(dalle.step), or one like it.
    """
    B, N = len(prefix), dalle.config.num_codes
    given = torch.empty(B, 0, dtype=torch.long) if prime is None else _checked(dalle, prime, B)
    if len(generators) != B:
        raise ValueError(f"{len(generators)} generators for {B} pictures; give one for each")
    uniform = torch.stack(
        [torch.rand(N, generator=g, device=g.device).cpu() for g in generators]
    )  # B N
    codes = torch.empty(B, N, dtype=torch.long)
    codes[:, : given.shape[1]] = given
    codes, uniform = codes.to(prefix.logits.device), uniform.to(prefix.logits.device)

    guided = options.guidance != 1.0
    if guided:
        null = dalle.condition(dalle.null_tokens(1)) if null is None else null
        prefix = prefix.cat([prefix, null.repeat_interleave(B)])

    def both(given: Tensor) -> Tensor:
        return given.repeat(2, *[1] * (given.ndim - 1)) if guided else given

    cache, logits, first = dalle.start_cache(prefix), prefix.logits, given.shape[1]
    del prefix  # the cache has its own copy
    if first:
        logits = dalle.extend(both(codes[:, :first]), cache)
    positions = torch.arange(N, device=codes.device)
    for n in range(first, N):
        if n > first:
            last = both(codes[:, n - 1])
            if compiled_step is None:
                logits = dalle.step(last, n - 1, cache)
            else:
                logits = compiled_step(last, positions[n - 1], cache)
        codes[:, n] = draw_code(
            guide(logits, options.guidance) if guided else logits, uniform[:, n], options
        )
        if on_code is not None:
            on_code(n + 1, codes[:, : n + 1])
    return codes.unflatten(1, dalle.config.grid)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: logits (2 B, K), those with text first -> (B, K) float32."""
    cond, null = logits.float().chunk(2)
    return torch.lerp(null, cond, scale)


def draw_code(logits: Tensor, uniform: Tensor, options: CodeOptions) -> Tensor:
    """Logits (B, K) and a number in [0, 1) for each row -> a code for each, (B,), by inverting the distribution."""
    if options.temperature < COLDEST:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / options.temperature, None
    if options.top_k is not None or options.top_p < 1:
        most = logits.shape[-1]
        logits, ids = logits.topk(min(options.top_k or most, most))  # B k, the likeliest first
    p = logits.softmax(dim=-1)
    if options.top_p < 1:
        p = p * (p.cumsum(dim=-1) - p < options.top_p)  # the likeliest one always stays
    below = p.cumsum(dim=-1)
    total = below[:, -1:].contiguous()
    choice = torch.searchsorted(
        below, uniform[:, None] * total, right=True
    )  # B 1: never one of probability 0
    choice = choice.minimum(
        torch.searchsorted(below, total)
    )  # nor beyond the last, where the product is rounded up
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def _checked(dalle: AnyDALLE, prime: Tensor, batch: int) -> Tensor:
    """The given codes (batch, m); ValueError if they can't begin a picture."""
    config = dalle.config
    if prime.ndim != 2 or len(prime) not in (1, batch) or prime.shape[1] >= config.num_codes:
        raise ValueError(
            f"the first codes are of shape {tuple(prime.shape)}; expected 1 or {batch} rows of fewer than "
            f"{config.num_codes} codes"
        )
    if prime.numel() and not 0 <= int(prime.min()) <= int(prime.max()) < config.image_vocab:
        raise ValueError(
            f"the first codes run from {int(prime.min())} to {int(prime.max())}; "
            f"this transformer knows 0 to {config.image_vocab - 1}"
        )
    return prime.expand(batch, -1).cpu()

"""DALL-E's transformers drawing codes, beside DALLE-pytorch's, or beside a decoder with the usual cache."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from statistics import mean

import torch
from torch import Tensor, nn

import unclip
from unclip.evaluation.bench import DALLE, MEGA, BenchConfig
from unclip.evaluation.bench.clock import Stage, timed
from unclip.evaluation.bench.codes_reference import DallePytorch, PlainMega, import_dalle_pytorch
from unclip.evaluation.bench.dalle import build, build_mega
from unclip.evaluation.bench.stages import where
from unclip.evaluation.bench.turns import (
    OURS,
    THEIRS,
    Comparison,
    Contender,
    Turns,
    images,
    take_turns,
    wholes,
)
from unclip.models.dalle.sampling import Step, sample_codes
from unclip.models.published.bart_dalle import BartDALLE
from unclip.pipelines.base import generators_from
from unclip.types import CodeOptions, OnStep

# B pictures, L text tokens, N codes of a picture

PLACES = 8  # spread over a picture, where the reference draws a code
MEGA_OPTIONS = CodeOptions(top_k=256, guidance=16.0)  # min-dalle's
CHECKED = 4  # codes after which both sides' logits are compared
SEVERAL = 4  # times as many pictures, in the second row of a decoder
TOKENS = "image tokens"


def compare(config: BenchConfig, against: str, progress: bool) -> tuple[str, Iterator[Comparison]]:
    """The reference's name and version, and the rows."""
    if config.model not in (DALLE if against == "dalle-pytorch" else MEGA):
        fitting = DALLE[0] if against == "dalle-pytorch" else MEGA[0]
        raise ValueError(f"{config.model} cannot be compared with {against}; {fitting} can")
    if against == "plain":
        return "a plain cached decoder", compare_plain(config, progress)
    import_dalle_pytorch()
    return f"DALLE-pytorch {version('dalle-pytorch')}", compare_dalle_pytorch(config, progress)


def compare_dalle_pytorch(config: BenchConfig, progress: bool = True) -> Iterator[Comparison]:
    """All codes of pictures of one text, from its tokens on.

    DALLE-pytorch computes the whole stream for each code, so it draws codes at a few places that stand for all.
    """
    device, dtype = where(config)
    pipe = build(config.model, dtype, device)
    theirs, dalle = DallePytorch(pipe.dalle), pipe.dalle
    N, L, B = dalle.config.num_codes, dalle.config.context_length, config.batch
    tokens = (torch.arange(L, device=device) % (dalle.config.text_vocab - 1) + 1)[
        None
    ]  # 0 would be padding there
    codes = torch.randint(
        dalle.config.image_vocab, (B, N), generator=torch.Generator().manual_seed(0)
    ).to(device)
    places = [(2 * i + 1) * N // (2 * PLACES) for i in range(PLACES)]

    @torch.inference_mode()
    def draw(on_step: OnStep) -> None:
        for m in places:
            theirs.draw(tokens.expand(B, -1), codes[:, :m])
            on_step(None)

    with torch.inference_mode():
        m = places[PLACES // 2]
        cache = dalle.start_cache(dalle.condition(tokens))
        apart = _apart(theirs.logits(tokens, codes[:1, :m]), dalle.extend(codes[:1, :m], cache))
    if config.compile:
        unclip.compile(pipe)
    contenders = {
        THEIRS: Contender(draw),
        OURS: Contender(_ours(pipe.dalle, tokens, B, pipe.options, pipe.step)),
    }
    turns = _turns(contenders, config, device, progress)
    seconds = [N * mean(turn.each) for turn in turns[THEIRS]]
    yield Comparison(
        _what(N, B), seconds, wholes(turns[OURS], N), True, difference=apart, made=(B * N, TOKENS)
    )


def compare_plain(config: BenchConfig, progress: bool = True) -> Iterator[Comparison]:
    """All codes of pictures of one text, which an encoder reads, with guidance; then of several times as many."""
    device, dtype = where(config)
    mega = build_mega(config.model, dtype, device)
    plain, N = PlainMega(mega), mega.config.num_codes
    tokens = (torch.arange(mega.config.context_length, device=device) % 50 + 3)[
        None
    ]  # none of them padding
    apart = _mega_apart(plain, mega, tokens)
    step = (
        torch.compile(mega.step, dynamic=False) if config.compile and device.type != "cpu" else None
    )
    for B in (config.batch, SEVERAL * config.batch):

        def draw(on_step: OnStep, B: int = B) -> Tensor:
            return plain.draw(tokens, generators_from(range(B)), MEGA_OPTIONS, on_step)

        contenders = {
            THEIRS: Contender(draw),
            OURS: Contender(_ours(mega, tokens, B, MEGA_OPTIONS, step)),
        }
        seconds = [
            wholes(turns, N) for turns in _turns(contenders, config, device, progress).values()
        ]
        yield Comparison(f"{_what(N, B)}, guided", *seconds, difference=apart, made=(B * N, TOKENS))


def _ours(
    dalle: nn.Module, tokens: Tensor, batch: int, options: CodeOptions, step: Step | None
) -> Stage[Tensor]:
    @torch.inference_mode()
    def draw(on_step: OnStep) -> Tensor:
        return sample_codes(
            dalle,
            dalle.condition(tokens).repeat_interleave(batch),
            generators_from(range(batch)),
            options,
            on_code=lambda n, codes: on_step(None),
            compiled_step=step,
        )

    return draw


@torch.inference_mode()
def _mega_apart(plain: PlainMega, mega: BartDALLE, tokens: Tensor) -> float:
    """After the first codes, between the logits of the next."""
    states, mask = plain.read(tokens)
    cache, prefix = plain.start(states), mega.condition(tokens)
    own, theirs, ours = (
        mega.start_cache(prefix),
        plain.step(None, 0, cache, states, mask),
        prefix.logits,
    )
    for n in range(CHECKED):
        code = torch.tensor([n], device=tokens.device)
        theirs, ours = plain.step(code, n + 1, cache, states, mask), mega.step(code, n, own)
    return _apart(theirs, ours)


def _turns(
    contenders: dict[str, Contender], config: BenchConfig, device: torch.device, progress: bool
) -> Turns:
    if config.compile or device.type == "cuda":
        for contender in contenders.values():
            timed(contender.call, device)
    return take_turns(contenders, device, config.repeat, TOKENS, progress)


def _what(num_codes: int, batch: int) -> str:
    return f"{num_codes:,} {TOKENS}, {images(batch)}"


def _apart(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference, in standard deviations."""
    return ((theirs.float() - ours.float()).abs().max() / theirs.float().std()).item()

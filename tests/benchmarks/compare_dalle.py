"""Compare the speed at which DALL-E samples image codes, on the same weights.

    python tests/benchmarks/compare_dalle.py --reference dalle-pytorch
    python tests/benchmarks/compare_dalle.py --reference plain --model mega-random

"dalle-pytorch" is the DALLE-pytorch package, "plain" a decoder with the usual cache of min-dalle.
"""

# B images, L text tokens, N codes of an image

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from statistics import mean

import torch
from comparison import (
    OURS,
    REFERENCE,
    Candidate,
    Comparison,
    Timings,
    add_arguments,
    bench_config,
    count_images,
    run,
    time_interleaved,
    totals,
)
from dalle_reference import DallePytorch, PlainMega, import_dalle_pytorch
from torch import Tensor, nn

import unclip
from unclip.evaluation.bench import DALLE, BenchConfig
from unclip.evaluation.bench.random_models import build_dalle, random_network
from unclip.evaluation.bench.timing import Stage, time_stage
from unclip.evaluation.bench.worker import placement
from unclip.models.dalle.sampling import Step, sample_codes
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.pipelines.request import generators_from
from unclip.types import CodeOptions, OnStep

MEGA_SIZES = {  # "mega-random" is DALL-E mega with fewer layers, "mega-tiny" is for tests
    "mega-random": BartDALLEConfig(encoder_depth=2, decoder_depth=2),
    "mega-tiny": BartDALLEConfig(
        300, 8, 32, (4, 4), 24, encoder_depth=2, decoder_depth=2, heads=2, mlp_width=48
    ),
}
POSITIONS = 8  # positions of an image, evenly spread, at which DALLE-pytorch samples a code
MEGA_OPTIONS = CodeOptions(top_k=256, guidance=16.0)  # those of min-dalle
CHECKED_CODES = 4  # before the logits of both sides are compared
SEVERAL = 4  # factor of the number of images in the second row of the plain decoder
TOKENS = "image tokens"


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--reference", choices=("dalle-pytorch", "plain"), required=True)
    add_arguments(parser, "")
    args = parser.parse_args(argv)
    args.model = args.model or (DALLE if args.reference == "dalle-pytorch" else list(MEGA_SIZES))[0]
    config = bench_config(args)
    run(config, lambda: compare(config, args.reference, not args.quiet), args.json)


def compare(
    config: BenchConfig, reference: str, progress: bool
) -> tuple[str, Iterator[Comparison]]:
    """Return name and version of the reference, and the rows."""
    models = DALLE if reference == "dalle-pytorch" else list(MEGA_SIZES)
    if config.model not in models:
        raise ValueError(f"{config.model} cannot be compared with {reference}; {models[0]} can")
    if reference == "plain":
        return "a plain cached decoder", compare_plain(config, progress)
    import_dalle_pytorch()
    return f"DALLE-pytorch {version('dalle-pytorch')}", compare_dalle_pytorch(config, progress)


def compare_dalle_pytorch(config: BenchConfig, progress: bool = True) -> Iterator[Comparison]:
    """Compare all codes of images of one text.

    DALLE-pytorch recomputes the whole stream for each code, so a few positions stand for all.
    """
    device, dtype = placement(config)
    pipe = build_dalle(config.model, dtype, device)
    theirs, dalle = DallePytorch(pipe.dalle), pipe.dalle
    N, L, B = dalle.config.num_codes, dalle.config.context_length, config.batch
    tokens = torch.arange(L, device=device) % (dalle.config.text_vocab - 1) + 1  # no padding, 0
    tokens = tokens[None]  # (1, L)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(dalle.config.image_vocab, (B, N), generator=generator).to(device)
    positions = [(2 * i + 1) * N // (2 * POSITIONS) for i in range(POSITIONS)]

    @torch.inference_mode()
    def sample(on_step: OnStep) -> None:
        for m in positions:
            theirs.sample(tokens.expand(B, -1), codes[:, :m])
            on_step(None)

    with torch.inference_mode():
        known = codes[:1, : positions[POSITIONS // 2]]
        cache = dalle.start_cache(dalle.condition(tokens))
        difference = _difference(theirs.logits(tokens, known), dalle.extend(known, cache))
    if config.compile:
        unclip.compile(pipe)
    candidates = {
        REFERENCE: Candidate(sample),
        OURS: Candidate(_sample_ours(pipe.dalle, tokens, B, pipe.options, pipe.step)),
    }
    timings = _time(candidates, config, device, progress)
    yield Comparison(
        _name(N, B),
        [N * mean(costs.steps) for costs in timings[REFERENCE]],
        totals(timings[OURS], N),
        extrapolated=True,
        difference=difference,
        produced=(B * N, TOKENS),
    )


def compare_plain(config: BenchConfig, progress: bool = True) -> Iterator[Comparison]:
    """Compare all codes of images of one text with guidance, then with several times as many."""
    device, dtype = placement(config)
    mega = build_mega(config.model, dtype, device)
    plain, N = PlainMega(mega), mega.config.num_codes
    tokens = (torch.arange(mega.config.context_length, device=device) % 50 + 3)[None]  # no padding
    difference = _mega_difference(plain, mega, tokens)
    compiled = config.compile and device.type != "cpu"
    step = torch.compile(mega.step, dynamic=False) if compiled else None
    for B in (config.batch, SEVERAL * config.batch):

        def sample(on_step: OnStep, B: int = B) -> Tensor:
            return plain.sample(tokens, generators_from(range(B)), MEGA_OPTIONS, on_step)

        candidates = {
            REFERENCE: Candidate(sample),
            OURS: Candidate(_sample_ours(mega, tokens, B, MEGA_OPTIONS, step)),
        }
        timings = _time(candidates, config, device, progress)
        yield Comparison(
            f"{_name(N, B)}, guided",
            totals(timings[REFERENCE], N),
            totals(timings[OURS], N),
            difference=difference,
            produced=(B * N, TOKENS),
        )


def build_mega(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> BartDALLE:
    """Build the transformer of DALL-E mega with random weights."""
    return random_network(BartDALLE, MEGA_SIZES[name], dtype, device).eval().requires_grad_(False)


def _sample_ours(
    dalle: nn.Module, tokens: Tensor, batch: int, options: CodeOptions, step: Step | None
) -> Stage[Tensor]:
    @torch.inference_mode()
    def sample(on_step: OnStep) -> Tensor:
        return sample_codes(
            dalle,
            dalle.condition(tokens).repeat_interleave(batch),
            generators_from(range(batch)),
            options,
            on_code=lambda n, codes: on_step(None),
            compiled_step=step,
        )

    return sample


@torch.inference_mode()
def _mega_difference(plain: PlainMega, mega: BartDALLE, tokens: Tensor) -> float:
    """Compare the logits after the first codes."""
    states, mask = plain.encode(tokens)
    cache, prefix = plain.start_cache(states), mega.condition(tokens)
    our_cache = mega.start_cache(prefix)
    theirs, ours = plain.step(None, 0, cache, states, mask), prefix.logits
    for n in range(CHECKED_CODES):
        code = torch.tensor([n], device=tokens.device)
        theirs = plain.step(code, n + 1, cache, states, mask)
        ours = mega.step(code, n, our_cache)
    return _difference(theirs, ours)


def _time(
    candidates: dict[str, Candidate], config: BenchConfig, device: torch.device, progress: bool
) -> Timings:
    if config.compile or device.type == "cuda":
        for candidate in candidates.values():
            time_stage(candidate.call, device)
    return time_interleaved(candidates, device, config.repeat, TOKENS, progress)


def _name(num_codes: int, batch: int) -> str:
    return f"{num_codes:,} {TOKENS}, {count_images(batch)}"


def _difference(theirs: Tensor, ours: Tensor) -> float:
    """Return the largest difference in standard deviations."""
    return ((theirs.float() - ours.float()).abs().max() / theirs.float().std()).item()


if __name__ == "__main__":
    main()

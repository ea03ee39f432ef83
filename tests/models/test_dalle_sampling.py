"""Sampling of codes: distribution, given codes, guidance and independence of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_dalle import CONFIG, GRID, KINDS, B, K, L, N, V, make, uniform_config

from unclip.models.dalle.sampling import guide, sample_code, sample_codes
from unclip.models.dalle.transformer import DALLE
from unclip.types import CodeOptions

PLAIN = CodeOptions()


@pytest.fixture(scope="module")
def dalle() -> DALLE:
    return make()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample_frequencies(logits: torch.Tensor, options: CodeOptions, n: int = 20_000) -> torch.Tensor:
    """Frequencies (K,) of the codes in n samples."""
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    return (
        sample_code(logits.expand(n, -1), uniform, options).bincount(minlength=logits.shape[-1]) / n
    )


def chi_squared(frequencies: torch.Tensor, p: torch.Tensor, n: int = 20_000) -> float:
    likely = p > 0
    return float(n * ((frequencies - p)[likely].square() / p[likely]).sum())


LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, 1.1, -3.0, 0.9, 2.0])
CHI_SQUARED_LIMIT = 24.3  # 99.9th percentile with 7 degrees of freedom


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_equal_probabilities(temperature):
    frequencies = sample_frequencies(LOGITS, CodeOptions(temperature=temperature))
    assert chi_squared(frequencies, (LOGITS / temperature).softmax(0)) < CHI_SQUARED_LIMIT


def test_temperature_near_zero_selects_the_most_likely_code():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50)
    for temperature in (0.0, 5e-324, 1e-40, 1e-6):
        options = CodeOptions(temperature=temperature)
        assert torch.equal(sample_code(logits, uniform, options), logits.argmax(-1))


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_top_k_samples_from_k_codes(k):
    frequencies = sample_frequencies(LOGITS, CodeOptions(top_k=k))
    assert (frequencies > 0).sum() == min(k, 8)  # also if two codes have equal probability
    kept = torch.zeros(8)
    kept[frequencies > 0] = LOGITS.softmax(0)[frequencies > 0]
    assert chi_squared(frequencies, kept / kept.sum()) < CHI_SQUARED_LIMIT


def test_top_p_samples_from_the_smallest_set_with_probability_p():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, support in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.99, 4), (1.0, 4)):
        frequencies = sample_frequencies(p.log()[[3, 1, 0, 2]], CodeOptions(top_p=top_p))[
            [2, 1, 3, 0]
        ]
        assert (frequencies > 0).tolist() == [i < support for i in range(4)]
        expected = p * (torch.arange(4) < support)
        assert chi_squared(frequencies, expected / expected.sum()) < CHI_SQUARED_LIMIT
    both = sample_frequencies(p.log(), CodeOptions(top_p=0.99, top_k=2))
    assert (both > 0).tolist() == [True, True, False, False]


def test_ends_of_the_unit_interval_select_possible_codes():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sample_code(logits, ends, PLAIN).tolist() == [1, 3]
    # top-k sorts in descending order
    assert sample_code(logits, ends, CodeOptions(top_k=4)).tolist() == [3, 1]


def test_guidance_extrapolates_from_the_null_logits():
    cond, null = torch.randn(2, 3, K).double()
    both = torch.cat([cond, null])
    torch.testing.assert_close(guide(both, 3.0), (null + 3 * (cond - null)).float())
    torch.testing.assert_close(guide(both, 1.0), cond.float())
    torch.testing.assert_close(guide(both, 0.0), null.float())


def sample_uncached(
    dalle: DALLE, tokens: torch.Tensor, seed: int, options: CodeOptions, known: torch.Tensor
) -> torch.Tensor:
    """Sample the codes of one image that are -1 in `known`, which may have only the first ones.

    Each code takes a full pass, with separate guidance branches.
    """
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(seed))
    known = torch.cat([known, torch.full((N - len(known),), -1)])
    codes = known.clamp(min=0)[None]
    with torch.no_grad():
        for n in (known < 0).nonzero()[:, 0].tolist():
            cond, null = (
                dalle(given, codes).codes[:, n].float() for given in (tokens, dalle.null_tokens(1))
            )
            logits = null + options.guidance * (cond - null)
            codes[:, n] = sample_code(logits, uniform[n : n + 1], options)
    return codes.view(*GRID)


def primed(prime: torch.Tensor) -> torch.Tensor:
    """Return known codes (B, N) that start with `prime`, (m,) or (B, m)."""
    known = torch.full((B, N), -1)
    known[:, : prime.shape[-1]] = prime
    return known


@pytest.mark.parametrize("kind", KINDS)
def test_cached_sampling_equals_uncached(kind, tokens):
    dalle, options = (
        make(uniform_config(kind, depth=2)),
        CodeOptions(temperature=0.8, top_k=7, guidance=2.5),
    )
    prime = torch.tensor([3, 1, 4, 1, 5, 9])
    sampled = sample_codes(
        dalle, dalle.condition(tokens), generators(5, 6, 7), options, known=primed(prime)
    )
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(
            sampled[row], sample_uncached(dalle, tokens[row : row + 1], seed, options, prime)
        )


def test_images_do_not_depend_on_their_batch(dalle, tokens):
    prefix = dalle.condition(tokens)
    together = sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN)
    alone = sample_codes(dalle, prefix[1:2], generators(6), PLAIN)
    assert torch.equal(together[1:2], alone)
    several = sample_codes(dalle, prefix[1:2].repeat_interleave(3), generators(9, 6, 9), PLAIN)
    assert torch.equal(several[1:2], alone) and torch.equal(several[0], several[2])
    assert not torch.equal(several[0], several[1])


@pytest.mark.parametrize("given", [1, 5, 9, N - 1])
def test_given_codes_are_kept_and_continued(dalle, tokens, given):
    prefix = dalle.condition(tokens)
    full = sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN)
    again = sample_codes(
        dalle, prefix, generators(5, 6, 7), PLAIN, known=primed(full.flatten(1)[:, :given])
    )
    assert torch.equal(again, full)  # each position keeps its random number
    other = sample_codes(
        dalle, prefix, generators(1, 2, 3), PLAIN, known=primed(full.flatten(1)[:, :given])
    )
    assert torch.equal(other.flatten(1)[:, :given], full.flatten(1)[:, :given])


def test_precomputed_null_gives_the_same_codes(dalle, tokens):
    options, prefix = CodeOptions(guidance=3.0), dalle.condition(tokens)
    computed = sample_codes(dalle, prefix, generators(5, 6, 7), options)
    with torch.no_grad():
        null = dalle.condition(dalle.null_tokens(1))
    assert torch.equal(
        sample_codes(dalle, prefix, generators(5, 6, 7), options, null=null), computed
    )
    assert not torch.equal(sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN), computed)


def test_no_null_is_computed_without_guidance(dalle, tokens, monkeypatch):
    prefix = dalle.condition(tokens)
    monkeypatch.setattr(DALLE, "null_tokens", lambda *_: pytest.fail("null_tokens was called"))
    assert sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN).shape == (B, *GRID)


def test_on_code_gets_all_codes_so_far(dalle, tokens):
    calls: list[tuple[int, torch.Tensor]] = []
    prime = torch.zeros(1, 4, dtype=torch.long)
    sampled = sample_codes(
        dalle,
        dalle.condition(tokens),
        generators(5, 6, 7),
        PLAIN,
        known=primed(prime),
        on_code=lambda n, codes: calls.append((n, codes.clone())),
    )
    assert [n for n, _ in calls] == list(range(5, N + 1))
    assert all(torch.equal(codes, sampled.flatten(1)[:, :n]) for n, codes in calls)


def test_compiled_step_gets_static_shapes(dalle, tokens):
    seen: list[tuple[torch.Size, ...]] = []

    def step(codes, position, cache):
        seen.append((codes.shape, position.shape))
        return dalle.step(codes, position, cache)

    prefix = dalle.condition(tokens)
    expected = sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN)
    assert torch.equal(
        sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN, compiled_step=step), expected
    )
    assert set(seen) == {(torch.Size([B]), torch.Size([]))} and len(seen) == N - 1


@pytest.mark.parametrize("kind", KINDS)
def test_known_codes_are_forced_at_any_position(kind, tokens):
    """Also at different positions of each image of a batch."""
    dalle, options = make(uniform_config(kind, depth=2)), CodeOptions(0.8, guidance=2.5)
    known = torch.randint(0, K, (B, N), generator=torch.Generator().manual_seed(0))
    holes = ([2, 3, N - 4], [5], [])
    for row, hole in enumerate(holes):
        known[row, hole] = -1
    seen = []
    sampled = sample_codes(
        dalle,
        dalle.condition(tokens),
        generators(5, 6, 7),
        options,
        known=known,
        on_code=lambda n, codes: seen.append(n),
    ).flatten(1)
    assert seen == [*range(3, N - 2)]
    assert torch.equal(sampled[known >= 0], known[known >= 0])
    for row, seed in enumerate((5, 6, 7)):
        alone = sample_uncached(dalle, tokens[row : row + 1], seed, options, known[row])
        assert torch.equal(sampled[row], alone.flatten())


def test_invalid_input_raises(dalle, tokens):
    prefix = dalle.condition(tokens)
    with pytest.raises(ValueError, match="1 generators were given for 3 images"):
        sample_codes(dalle, prefix, generators(1), PLAIN)
    for shape in ((2, N), (3, N - 1), (3,)):
        with pytest.raises(ValueError, match=r"known is of shape .*; expected \(3, 20\)"):
            known = torch.zeros(shape).long()
            sample_codes(dalle, prefix, generators(1, 2, 3), PLAIN, known=known)
    with pytest.raises(ValueError, match="codes from -1 to 11; expected 0 to 10, or -1"):
        known = primed(torch.tensor([0, K]))
        sample_codes(dalle, prefix, generators(1, 2, 3), PLAIN, known=known)
    for wrong, message in (
        ({"temperature": -1.0}, "temperature is -1.0; expected at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CodeOptions(**wrong)


@pytest.mark.slow
def test_compiled_step_gives_the_same_codes(tokens):
    dalle = make(replace(CONFIG, depth=3))
    prefix = dalle.condition(tokens)
    expected = sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN)
    torch.compiler.reset()
    compiled = torch.compile(dalle.step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sampled = sample_codes(dalle, prefix, generators(5, 6, 7), PLAIN, compiled_step=compiled)
    assert torch.equal(sampled, expected)

"""The autoregressive prior: codes of embeddings, cached sampling, and training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import randomize

from unclip.embeddings import PCA
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig, EmbeddingCodes
from unclip.models.unclip.prior import KeyValues
from unclip.types import TextEncoding

D, K, V, L, B = 16, 6, 12, 9, 3
CONFIG = ARPriorConfig(D, 24, L, width=32, depth=3, heads=4, components=K, buckets=V)


@pytest.fixture
def prior() -> ARPrior:
    torch.manual_seed(0)
    return randomize(ARPrior(CONFIG)).eval()


def pairs(count: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings with components of different variance, and texts at different distances."""
    generator = torch.Generator().manual_seed(0)
    image_emb = torch.randn(count, D, generator=generator) * torch.logspace(0, -2, D) + 0.5
    return image_emb, image_emb + 0.5 * torch.randn(count, D, generator=generator)


def make_text(dtype: torch.dtype = torch.float32) -> TextEncoding:
    generator = torch.Generator().manual_seed(1)
    emb, states = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((B, D), (B, L, 24))
    )
    return TextEncoding(emb, states, torch.arange(L) < torch.tensor([9, 4, 1])[:, None])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def alone(predicted: torch.Tensor) -> torch.Tensor:
    return predicted


# -- codes


def test_codes_are_principal_components_by_decreasing_variance():
    image_emb, text_emb = pairs()
    codes = EmbeddingCodes(D, K, V)
    codes.fit(image_emb, text_emb)
    pca = PCA.fit(image_emb, K)
    torch.testing.assert_close(codes.components, pca.components)
    coefficients = (image_emb - codes.mean) @ codes.components.T
    assert (coefficients.var(dim=0).diff() < 0).all()


@pytest.mark.parametrize("buckets", [2, 64, 1024])
def test_decoding_error_is_at_most_half_a_bucket(buckets):
    image_emb, text_emb = pairs()
    codes = EmbeddingCodes(D, D, buckets)  # all components, so that only rounding remains
    codes.fit(image_emb, text_emb)
    found = codes.encode(image_emb)
    assert found.dtype == torch.long and found.min() == 0 and found.max() == buckets - 1
    errors = (codes.decode(found) - image_emb) @ codes.components.T
    assert (errors.abs() <= codes.bucket_width / 2 + 1e-5).all()
    assert torch.equal(codes.encode(codes.decode(found)), found)


def test_codes_are_the_same_under_autocast():
    image_emb, text_emb = pairs()
    codes = EmbeddingCodes(D, D, 1024)
    codes.fit(image_emb, text_emb)
    with torch.autocast("cpu", torch.bfloat16):
        low = codes.encode(image_emb)
        assert codes.decode(low).dtype == torch.float32
    assert torch.equal(low, codes.encode(image_emb))


def test_outliers_go_to_the_outer_buckets():
    codes = EmbeddingCodes(D, K, V)
    codes.fit(*pairs())
    far = codes.mean + 1e3 * codes.components[0]
    assert codes.encode(far)[0] == V - 1 and codes.encode(2 * codes.mean - far)[0] == 0


def test_dot_product_buckets_are_equally_full():
    image_emb, text_emb = pairs(480)
    codes = EmbeddingCodes(D, K, V)
    codes.fit(image_emb, text_emb)
    found = codes.encode_dot(3 * image_emb, text_emb)  # lengths have no effect
    assert (torch.bincount(found, minlength=V) - 480 // V).abs().max() <= 2
    cosines = F.cosine_similarity(image_emb, text_emb)
    assert cosines[found >= V // 2].min() >= cosines[found < V // 2].max()


# -- the transformer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_cached_logits_equal_uncached(prior, dtype, tolerance):
    prior, text = prior.to(dtype), make_text(dtype)
    codes, dot = torch.randint(V, (B, K)), torch.randint(V, (B,))
    with torch.no_grad():
        whole = prior(codes, dot, text)  # B K V
        cache = prior.start_cache(prior.condition(text))
        stepwise = [prior.step(dot if n == 0 else codes[:, n - 1], n, cache) for n in range(K)]
    torch.testing.assert_close(torch.stack(stepwise, dim=1), whole, rtol=0, atol=tolerance)
    assert whole.std() > 0.1


def test_codes_are_causal(prior):
    codes, dot, text = torch.randint(V, (B, K)), torch.randint(V, (B,)), make_text()
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 1) % V
    with torch.no_grad():
        before, after = prior(codes, dot, text), prior(changed, dot, text)
        other_dot = prior(codes, (dot + 1) % V, text)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after).abs().amax(dim=(0, 2))[3:] > 1e-4).all()
    assert ((before - other_dot).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_padding_is_masked_and_dropped_texts_equal_the_null(prior):
    codes, dot, text = torch.randint(V, (B, K)), torch.randint(V, (B,)), make_text()
    other = TextEncoding(text.emb, torch.where(text.mask[..., None], text.states, 7.0), text.mask)
    with torch.no_grad():
        torch.testing.assert_close(
            prior(codes, dot, other), prior(codes, dot, text), rtol=0, atol=1e-5
        )
        dropped = prior(codes, dot, text, torch.ones(B, dtype=torch.bool))
        null = prior(codes, dot, prior.null_text(B))
    torch.testing.assert_close(dropped, null, rtol=0, atol=1e-5)


# -- sampling


def test_embeddings_do_not_depend_on_their_batch(prior):
    prefix = prior.condition(make_text())
    together = prior.sample(prefix, generators(1, 2, 3), alone)
    for row in range(B):
        one = prior.sample(prefix[row : row + 1], generators(row + 1), alone)
        torch.testing.assert_close(one[0], together[row], rtol=0, atol=1e-5)
    assert not torch.equal(together, prior.sample(prefix, generators(4, 5, 6), alone))


def test_sampling_equals_uncached_sampling(prior):
    prefix, reported = prior.condition(make_text()[:1]), []
    emb = prior.sample(prefix, generators(7), alone, temperature=0, on_prediction=reported.append)
    dot = V // 2 + int(torch.rand(K + 1, generator=generators(7)[0])[0] * (V - V // 2))
    codes = torch.zeros(1, K, dtype=torch.long)
    with torch.no_grad():
        for n in range(K):
            codes[:, n] = prior(codes, torch.tensor([dot]), make_text()[:1])[:, n].argmax(dim=-1)
    torch.testing.assert_close(emb, prior.codes.decode(codes))
    assert reported == [1, 2, 3, 4, 5, 6] and prior.steps == K


def test_dot_product_is_sampled_from_the_upper_half(prior):
    sampled = []
    step = prior.step
    prior.step = lambda token, n, cache: (
        sampled.append(token) if n == 0 else None,
        step(token, n, cache),
    )[1]
    prefix = prior.condition(make_text()[:1])
    prior.sample(prefix.expand(200), generators(*range(200)), alone)
    assert sorted(set(sampled[0].tolist())) == list(range(V // 2, V))


def test_conditions_are_combined_before_each_code(prior):
    text = make_text()
    prefix = prior.condition(text[:2])
    first = prior.sample(prefix[:1], generators(0), alone, temperature=0)
    mixed = prior.sample(prefix, generators(0), lambda x: x[:1] + 0 * x[1:], temperature=0)
    torch.testing.assert_close(mixed, first)
    repelled = prior.sample(prefix, generators(0), lambda x: 5 * x[:1] - 4 * x[1:], temperature=0)
    assert not torch.allclose(repelled, first)
    assert isinstance(prefix, KeyValues)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": 17}, "components is 17; expected 1 to emb_dim = 16"),
        ({"buckets": 1}, "buckets is 1; expected at least 2"),
        ({"width": 30}, "width is 30; expected a multiple of heads = 4"),
    ],
)
def test_invalid_configs_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)

"""Attention masks over [text | codes], and key-value caches that hold what they need."""

from __future__ import annotations

import pytest
import torch

from unclip.models.dalle.attention import Pattern, flex_attend, stream_mask
from unclip.models.dalle.cache import CodeCache, cache_layout
from unclip.models.layers import DotProductAttention

KINDS = ("full", "row", "column", "conv", "own_row", "corner")
GRID, TEXT = (4, 5), 3


def visible(pattern: Pattern, q: int) -> set[int]:
    """The codes that code q attends to."""
    return set(stream_mask(pattern, 0)[q].nonzero()[:, 0].tolist())


def test_patterns_match_figure_11_of_the_paper():
    row, column, conv = (Pattern(kind, (4, 4), kernel=3) for kind in ("row", "column", "conv"))
    # "Each image token attends to the previous 5 image tokens in raster order", with itself
    assert visible(row, 10) == {6, 7, 8, 9, 10}
    assert visible(row, 4) == {0, 1, 2, 3, 4}
    assert visible(row, 2) == {0, 1, 2}
    assert visible(column, 10) == {2, 6, 10} and visible(column, 3) == {3}
    # 3 x 3 kernel: up-left, up, up-right, left, itself; wraps around at the border
    assert visible(conv, 10) == {5, 6, 7, 9, 10}
    assert visible(conv, 8) == {3, 4, 5, 7, 8}
    assert visible(conv, 7) == {2, 3, 4, 6, 7}


def test_kernel_of_the_paper_covers_61_codes():
    conv = Pattern("conv", (32, 32), kernel=11)
    q = 20 * 32 + 16
    window = {(20 + r) * 32 + 16 + c for r in range(-5, 1) for c in range(-5, 6) if r < 0 or c <= 0}
    assert visible(conv, q) == window and len(window) == 61


def test_kernel_larger_than_the_image_sees_all_previous_codes():
    conv = Pattern("conv", (4, 5), kernel=11)
    assert all(visible(conv, q) == set(range(q + 1)) for q in range(20))


def test_dalle_pytorch_patterns_do_not_wrap_around():
    assert visible(Pattern("own_row", GRID), 12) == {10, 11, 12}
    assert visible(Pattern("corner", GRID, kernel=3), 11) == {
        0,
        1,
        5,
        6,
        10,
        11,
    }  # rows 0 .. 2, columns 0 .. 1


@pytest.mark.parametrize("kind", KINDS)
def test_stream_mask_combines_text_and_image_masks(kind):
    pattern = Pattern(kind, GRID, kernel=3)
    mask, codes = stream_mask(pattern, TEXT), GRID[0] * GRID[1]
    causal = torch.ones(TEXT, TEXT, dtype=torch.bool).tril()
    assert torch.equal(mask[:TEXT, :TEXT], causal)  # text to text
    assert mask[TEXT:, :TEXT].all()  # image to text: full
    assert torch.equal(mask[TEXT:, TEXT:], stream_mask(pattern, 0))  # image to image: the pattern
    assert not mask[:TEXT, TEXT:].any()
    assert not mask.triu(1).any()
    assert mask.diagonal().all()
    assert mask.shape == (TEXT + codes, TEXT + codes)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_attention_equals_its_parts_normalised_together(kind):
    torch.manual_seed(0)
    pattern, n = Pattern(kind, GRID, kernel=3), TEXT + 20
    q, k, v = torch.randn(3, 2, 2, n, 8).double()
    merged = DotProductAttention()(q, k, v, stream_mask(pattern, TEXT)[None, None])
    weights = (q @ k.mT * 8**-0.5).exp()
    parts = []  # numerator and denominator of each kind of attention
    for rows, columns, mask in (
        (slice(TEXT), slice(TEXT), torch.ones(TEXT, TEXT).tril()),
        (slice(TEXT, n), slice(TEXT), torch.ones(20, TEXT)),
        (slice(TEXT, n), slice(TEXT, n), stream_mask(pattern, 0)),
    ):
        w = weights[:, :, rows, columns] * mask
        parts.append((w @ v[:, :, columns], w.sum(-1, keepdim=True)))
    text = parts[0][0] / parts[0][1]
    codes = (parts[1][0] + parts[2][0]) / (parts[1][1] + parts[2][1])
    torch.testing.assert_close(merged, torch.cat([text, codes], dim=2), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [TEXT + 20, TEXT + 19])
def test_flex_attention_equals_sdpa(kind, n):
    torch.manual_seed(0)
    pattern = Pattern(kind, GRID, kernel=3)
    q, k, v = torch.randn(3, 2, 2, n, 16)
    expected = DotProductAttention()(q, k, v, stream_mask(pattern, TEXT)[None, None, :n, :n])
    torch.testing.assert_close(flex_attend(q, k, v, pattern, TEXT), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("given", [0, 1, 7, 19])
def test_cache_returns_exactly_the_visible_keys(kind, static_shapes, given):
    """Each key is the number of its position."""
    pattern = Pattern(kind, GRID, kernel=3)
    numbers = torch.arange(TEXT + 20.0)
    cache = CodeCache(numbers[:TEXT].expand(1, 1, 2, 1, TEXT)[..., None], (pattern,))
    (layer,) = cache.layers
    layer.fill(numbers[TEXT : TEXT + given].expand(1, 2, 1, given)[..., None])
    for n in range(given, 20):
        slot = cache.slots(torch.tensor(n) if static_shapes else n)[kind]
        kv = layer.append(numbers[TEXT + n].expand(1, 2, 1, 1, 1), slot)
        read = kv[0, 0, 0, :, 0] if slot.mask is None else kv[0, 0, 0, :, 0][slot.mask[0, 0, 0]]
        expected = [*range(TEXT), *(TEXT + k for k in sorted(visible(pattern, n)))]
        assert sorted(read.tolist()) == expected
        if static_shapes:
            assert kv.shape[3] == TEXT + cache_layout(pattern).max_visible


def test_cache_sizes_of_sparse_patterns():
    layouts = {
        kind: cache_layout(Pattern(kind, (32, 32), kernel=11))
        for kind in ("full", "row", "column", "conv")
    }
    assert {kind: layout.slots for kind, layout in layouts.items()} == {
        "full": 1024,
        "row": 33,
        "column": 993,
        "conv": 166,
    }
    assert {kind: layout.max_visible for kind, layout in layouts.items()} == {
        "full": 1024,
        "row": 33,
        "column": 32,
        "conv": 61,
    }

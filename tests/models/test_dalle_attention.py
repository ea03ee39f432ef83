"""The masks of [text | codes]: the paper's figure, DALLE-pytorch's variants, and caches that hold what is seen."""

from __future__ import annotations

import pytest
import torch

from unclip.models.dalle.attention import Pattern, flex_attend, stream_mask
from unclip.models.dalle.cache import CodeCache, cache_layout
from unclip.models.layers import DotProductAttention

KINDS = ("full", "row", "column", "conv", "own_row", "corner")
GRID, TEXT = (4, 5), 3


def seen(pattern: Pattern, q: int) -> set[int]:
    """The codes that code q sees."""
    return set(stream_mask(pattern, 0)[q].nonzero()[:, 0].tolist())


def test_the_paper_s_figure_11():
    row, column, conv = (Pattern(kind, (4, 4), kernel=3) for kind in ("row", "column", "conv"))
    # "Each image token attends to the previous 5 image tokens in raster order", itself among them: it wraps.
    assert (
        seen(row, 10) == {6, 7, 8, 9, 10}
        and seen(row, 4) == {0, 1, 2, 3, 4}
        and seen(row, 2) == {0, 1, 2}
    )
    assert seen(column, 10) == {2, 6, 10} and seen(column, 3) == {3}
    # A 3 x 3 kernel: up-left, up, up-right, left, itself; at an edge it wraps around.
    assert (
        seen(conv, 10) == {5, 6, 7, 9, 10}
        and seen(conv, 8) == {3, 4, 5, 7, 8}
        and seen(conv, 7) == {2, 3, 4, 6, 7}
    )


def test_the_paper_s_kernel_covers_61_codes():
    conv = Pattern("conv", (32, 32), kernel=11)
    q = 20 * 32 + 16
    window = {(20 + r) * 32 + 16 + c for r in range(-5, 1) for c in range(-5, 6) if r < 0 or c <= 0}
    assert seen(conv, q) == window and len(window) == 61


def test_a_kernel_larger_than_the_picture_sees_what_is_before():
    conv = Pattern("conv", (4, 5), kernel=11)
    assert all(seen(conv, q) == set(range(q + 1)) for q in range(20))


def test_dalle_pytorch_s_kinds_stay_inside_the_picture():
    assert seen(Pattern("own_row", GRID), 12) == {10, 11, 12}
    assert seen(Pattern("corner", GRID, kernel=3), 11) == {
        0,
        1,
        5,
        6,
        10,
        11,
    }  # rows 0 .. 2, columns 0 .. 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_mask_is_the_union_of_the_three(kind):
    pattern = Pattern(kind, GRID, kernel=3)
    mask, codes = stream_mask(pattern, TEXT), GRID[0] * GRID[1]
    assert torch.equal(
        mask[:TEXT, :TEXT], torch.ones(TEXT, TEXT, dtype=torch.bool).tril()
    )  # text to text: causal
    assert mask[TEXT:, :TEXT].all()  # image to text: full
    assert torch.equal(mask[TEXT:, TEXT:], stream_mask(pattern, 0))  # image to image: the pattern's
    assert not mask[:TEXT, TEXT:].any()
    assert (
        not mask.triu(1).any()
        and mask.diagonal().all()
        and mask.shape == (TEXT + codes, TEXT + codes)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_attention_is_that_of_the_three_parts_normalised_together(kind):
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
def test_flex_attention_computes_the_same(kind, n):
    torch.manual_seed(0)
    pattern = Pattern(kind, GRID, kernel=3)
    q, k, v = torch.randn(3, 2, 2, n, 16)
    expected = DotProductAttention()(q, k, v, stream_mask(pattern, TEXT)[None, None, :n, :n])
    torch.testing.assert_close(flex_attend(q, k, v, pattern, TEXT), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("given", [0, 1, 7, 19])
def test_a_cache_gives_exactly_the_keys_that_are_seen(kind, fixed_shapes, given):
    """Keys hold the number of their position."""
    pattern = Pattern(kind, GRID, kernel=3)
    numbers = torch.arange(TEXT + 20.0)
    cache = CodeCache(numbers[:TEXT].expand(1, 1, 2, 1, TEXT)[..., None], (pattern,))
    (layer,) = cache.layers
    layer.fill(numbers[TEXT : TEXT + given].expand(1, 2, 1, given)[..., None])
    for n in range(given, 20):
        place = cache.slots(torch.tensor(n) if fixed_shapes else n)[kind]
        kv = layer.append(numbers[TEXT + n].expand(1, 2, 1, 1, 1), place)
        read = kv[0, 0, 0, :, 0] if place.mask is None else kv[0, 0, 0, :, 0][place.mask[0, 0, 0]]
        expected = [*range(TEXT), *(TEXT + k for k in sorted(seen(pattern, n)))]
        assert sorted(read.tolist()) == expected
        if fixed_shapes:
            assert kv.shape[3] == TEXT + cache_layout(pattern).max_seen


def test_sparse_layers_keep_and_read_little():
    sizes = {
        kind: cache_layout(Pattern(kind, (32, 32), kernel=11))
        for kind in ("full", "row", "column", "conv")
    }
    assert {kind: how.slots for kind, how in sizes.items()} == {
        "full": 1024,
        "row": 33,
        "column": 993,
        "conv": 166,
    }
    assert {kind: how.max_seen for kind, how in sizes.items()} == {
        "full": 1024,
        "row": 33,
        "column": 32,
        "conv": 61,
    }

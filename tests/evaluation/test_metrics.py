"""Metrics of known values, evaluation pairs, and the style classifier."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from styled import HELD_OUT, STYLES, png, write_pairs

from unclip.embeddings import caption_targets, cosine_gap
from unclip.evaluation.metrics import (
    diversity,
    high_frequency_energy,
    nearest_by_cosine,
    nearest_by_pixels,
    psnr,
    recall,
    ssim,
)
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.style import train_classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data / "heldout-*.tar", 8, progress=False)


@pytest.fixture(scope="module")
def train(data) -> Pairs:
    return load_pairs(sorted(data.glob("train-*.tar")), 8, progress=False)


# -- embeddings


def test_recall_counts_ties_as_misses():
    candidates, targets = torch.eye(4), torch.tensor([0, 1, 2])
    emb = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [0.9, 0.8, 0.7, 0]])
    expected = {"recall@1": 2 / 3, "recall@2": 2 / 3, "recall@3": 1.0}
    assert recall(emb, candidates, targets, ks=(1, 2, 3)) == pytest.approx(expected)
    assert recall(torch.ones(3, 4), candidates, targets, ks=(1,)) == {"recall@1": 0.0}


def test_equal_captions_share_a_target():
    first, targets = caption_targets(["a", "b", "a", "c"])
    assert first == [0, 1, 3] and targets.tolist() == [0, 1, 0, 2]


def test_cosine_gap_compares_the_diagonal_to_the_rest():
    true = torch.eye(3) * torch.tensor([1.0, 2.0, 3.0])  # lengths have no effect
    matching = cosine_gap(true, true, "abc")
    assert matching == pytest.approx({"matching": 1.0, "mismatched": 0.0, "gap": 1.0})
    shifted = cosine_gap(true.roll(1, 0), true, "abc")
    assert shifted == pytest.approx({"matching": 0.0, "mismatched": 0.5, "gap": -0.5})
    twice = true[[0, 0, 1]]  # rows with the same caption are not mismatched
    assert cosine_gap(twice, twice, "aab")["mismatched"] == 0


def test_recall_without_a_choice_is_left_out():
    emb, targets = torch.eye(5), torch.arange(5)
    assert recall(emb, emb, targets) == {"recall@1": 1.0}
    assert recall(torch.eye(6), torch.eye(6), torch.arange(6)).keys() == {"recall@1", "recall@5"}


def test_diversity_is_0_for_copies_and_1_for_orthogonal_embeddings():
    assert diversity(torch.ones(2, 3, 4)) == pytest.approx(0.0, abs=1e-6)
    assert diversity(torch.eye(3)[None]) == pytest.approx(1.0)


# -- images


def test_psnr_of_known_errors():
    truth, error = torch.zeros(2, 3, 4, 4), torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert psnr(truth + error, truth).tolist() == pytest.approx([20.0, 40.0])
    assert psnr(truth, truth).tolist() == [100.0, 100.0]


@pytest.mark.parametrize("chunk", [2, 512])
def test_nearest_images_do_not_depend_on_the_chunk_size(chunk):
    torch.manual_seed(0)
    candidates = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
    expected = torch.tensor([5, 0, 3])
    images = candidates[expected].float() / 127.5 - 1 + 0.01
    row, distance = nearest_by_pixels(images, candidates, chunk)
    assert row.tolist() == expected.tolist()
    assert distance.tolist() == pytest.approx([0.01] * 3, rel=0.05)
    row, distance = nearest_by_cosine(torch.eye(4)[[2, 1]] * 5, torch.eye(4))
    assert (row.tolist(), distance.tolist()) == ([2, 1], [0.0, 0.0])


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel in [0, 1], window by window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            cov = (w * (a - ma) * (b - mb)).sum()
            numerator = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(numerator / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


def test_ssim_follows_the_paper():
    x = torch.rand(1, 3, 14, 13, generator=torch.Generator().manual_seed(0))
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    channels = [[z[0, c].double().numpy() for z in (x, y)] for c in range(3)]
    expected = np.mean([naive_ssim(*pair) for pair in channels])
    assert ssim(2 * x - 1, 2 * y - 1).item() == pytest.approx(expected, abs=1e-4)
    assert ssim(x, x).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="SSIM needs at least 11"):
        ssim(x[..., :8], x[..., :8])


def test_high_frequencies_are_finer_than_four_pixels():
    x = torch.arange(16.0)
    fine, coarse = (torch.cos(2 * math.pi * k * x / 16).expand(1, 1, 16, 16) for k in (5, 3))
    for image in (fine, fine.mT):
        energy = image.square().sum().item()
        assert high_frequency_energy(image).item() == pytest.approx(energy, rel=1e-5)
    for image in (coarse, torch.ones(1, 3, 16, 16)):
        assert high_frequency_energy(image).item() == pytest.approx(0, abs=1e-4)


# -- pairs


def test_pairs_have_style_concept_and_skin_tone(held_out, train):
    assert {(pair.concept, pair.style) for pair in held_out.entries} == HELD_OUT
    assert (len(train), train.styles) == (8, ["dark", "pale"])
    assert {pair.concept for pair in held_out.entries if pair.toned} == {"moon"}
    apple = held_out.captions.index("apple, dark emoji")
    truth = np.asarray(Image.open(io.BytesIO(png("apple", "dark"))))
    assert (np.asarray(held_out.image(apple, 32)) == truth).all()
    assert held_out.floats([apple]).shape == (1, 3, 8, 8)
    assert held_out.floats().min() >= -1 and held_out.floats().max() == 1


def test_spread_balances_styles_and_puts_skin_tones_last(held_out, train):
    rows = held_out.spread(4)
    assert sorted(rows) == [0, 1, 2, 3] and held_out.entries[rows[-1]].toned
    assert {held_out.entries[row].style for row in rows[:2]} == set(STYLES)
    assert len({train.entries[row].concept for row in train.spread(6)}) == 6
    repeated = replace(held_out, entries=held_out.entries[:1] * 3 + held_out.entries[1:2])
    assert repeated.spread(4) == [0, 3]


def test_pairs_of_a_folder_without_metadata(tmp_path):
    captions = {"a": "red apple, noto emoji", "b": "something else", "c": "x, y emoji"}
    for name, caption in captions.items():
        (tmp_path / f"{name}.png").write_bytes(png("apple", "dark"))
        (tmp_path / f"{name}.txt").write_text(caption)
    entries = load_pairs(tmp_path, 8, progress=False).entries
    expected = [("red apple", "noto"), ("something else", None), ("x", "y")]
    assert [(pair.concept, pair.style) for pair in entries] == expected
    limited = load_pairs(tmp_path, 8, limit=2, progress=False)
    assert limited.captions == ["red apple, noto emoji", "something else"]
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="skipped 1 unreadable images"):
        assert load_pairs(tmp_path, 8, progress=False).broken == 1


def test_pairs_need_captions_unless_only_images_are_used(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png("apple", "dark"))
    with pytest.raises(ValueError, match="2 images, no captions"):
        load_pairs(tmp_path, 8, progress=False)
    (tmp_path / "c.svg").write_text("<svg/>")
    with pytest.warns(UserWarning, match=r"left out 1 \.svg files"):
        pairs = load_pairs(tmp_path, 8, progress=False, captions_needed=False)
    assert pairs.captions == ["", ""] and pairs.images.shape == (2, 3, 8, 8)


# -- styles


def test_the_style_classifier_is_accurate_and_deterministic(train, held_out):
    classifier = train_classifier(train, 1, 100, False)
    styles = [pair.style for pair in held_out.entries]
    others = ["pale" if style == "dark" else "dark" for style in styles]
    assert classifier.is_style(held_out.floats(), styles).all()
    assert not classifier.is_style(held_out.floats(), others).any()
    again = train_classifier(train, 1, 100, False)
    for first, second in zip(classifier.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)

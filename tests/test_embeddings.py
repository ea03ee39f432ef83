"""Embedding arithmetic and PCA against textbook formulas."""

import math

import pytest
import torch

from unclip.embeddings import (
    PCA,
    mix,
    nearest_captions,
    normalise,
    slerp,
    text_diff,
    text_direction,
    weighted_sum,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_normalise_gives_unit_length_in_the_input_dtype():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert normalise(x).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert normalise(x.half()).dtype == torch.float16
    small = torch.full((1, 768), 1e-4).half()
    assert normalise(small).float().norm() == pytest.approx(1.0, abs=1e-2)


def test_slerp_equals_the_textbook_formula():
    a, b = normalise(randn(5, 16)), normalise(randn(5, 16, seed=1))
    angle = (a * b).sum(-1, keepdim=True).arccos()
    for fraction in (0.0, 0.3, 1.0):
        expected = (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / angle.sin()
        torch.testing.assert_close(slerp(a, b, fraction), expected)


def test_slerp_fractions_are_fractions_of_the_angle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    fractions = torch.linspace(0, 1, 7)
    path = slerp(a.expand(7, 2), b.expand(7, 2), fractions)
    angles = fractions * math.pi / 2
    torch.testing.assert_close(path, torch.stack([angles.cos(), angles.sin()], -1))


def test_slerp_interpolates_lengths_linearly():
    a, b = normalise(randn(3, 8)) * 2, normalise(randn(3, 8, seed=1)) * 6
    torch.testing.assert_close(
        slerp(a, b, 0.25).norm(dim=-1), torch.full((3,), 3.0, dtype=torch.float64)
    )
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-7, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_of_nearly_parallel_and_antipodal_vectors(sign, gap, dtype):
    a = normalise(randn(4, 32, dtype=dtype))
    b = normalise(sign * a + gap * normalise(randn(4, 32, seed=1, dtype=dtype)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    path = torch.stack([slerp(a, b, k / 8) for k in range(9)])
    torch.testing.assert_close(
        path.norm(dim=-1), torch.ones(9, 4, dtype=dtype), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(path[0], a, rtol=0, atol=tolerance)
    torch.testing.assert_close(path[-1], b, rtol=0, atol=tolerance)
    steps = path.diff(dim=0).norm(dim=-1)  # equal chords: constant speed
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=0, atol=tolerance)
    if sign < 0:
        assert (path[4] * a).sum(-1).abs().max() < 0.02  # around the sphere, not through the origin


def test_slerp_keeps_half_precision():
    a, b = randn(2, 64, dtype=torch.float32), randn(2, 64, seed=1, dtype=torch.float32)
    out = slerp(a.half(), b.half(), 0.5)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), slerp(a, b, 0.5), rtol=0, atol=5e-3)


# -- arithmetic


def test_weighted_sum():
    parts, weights = randn(5, 3, 8), torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        weighted_sum(parts, weights), torch.einsum("nkd,k->nd", parts, weights)
    )
    with pytest.raises(ValueError, match="2 weights for 3 embeddings"):
        weighted_sum(parts, [1.0, 1.0])


def test_a_mixture_has_the_direction_of_the_weighted_sum_and_the_mean_length():
    a, b = normalise(randn(8)) * 3, normalise(randn(8, seed=1)) * 5
    mixed = mix(torch.stack([a, b]), [3.0, 1.0])
    assert mixed.norm() == pytest.approx(4.0)
    torch.testing.assert_close(normalise(mixed), normalise(3 * a / 3 + b / 5))
    torch.testing.assert_close(mix(torch.stack([a, b])), mix(torch.stack([a, b]), [1.0, 1.0]))
    torch.testing.assert_close(mix(torch.stack([a, b]), [1.0, 0.0]), a * 4 / 3)
    with pytest.raises(ValueError, match="cancel out"):
        mix(torch.stack([a, a]), [1.0, -1.0])


def test_text_diff_rotates_by_a_fraction_of_the_arc_and_keeps_the_length():
    image, text, base = randn(4, 16) * 7, randn(4, 16, seed=1), randn(4, 16, seed=2)
    direction = text_direction(text, base)
    torch.testing.assert_close(direction, normalise(normalise(text) - normalise(base)))

    def angle(x, y):
        return (normalise(x) * normalise(y)).sum(-1).arccos()

    rotated = text_diff(image, text, base, 0.3)
    torch.testing.assert_close(angle(rotated, image), 0.3 * angle(direction, image))
    torch.testing.assert_close(angle(rotated, direction), 0.7 * angle(direction, image))
    torch.testing.assert_close(rotated.norm(dim=-1), image.norm(dim=-1))
    torch.testing.assert_close(text_diff(image, text, base, 0.0), image)
    thetas = torch.tensor([0.0, 0.1, 0.5, 1.0])
    each = torch.stack(
        [text_diff(image[i], text[i], base[i], theta) for i, theta in enumerate(thetas.tolist())]
    )
    torch.testing.assert_close(text_diff(image, text, base, thetas), each)
    with pytest.raises(ValueError, match="same embedding"):
        text_diff(image, text, text, 0.3)


def test_nearest_captions_are_ordered_by_cosine_similarity():
    captions = ["x", "y", "z"]
    text_emb = torch.eye(3) * torch.tensor([1.0, 5.0, 2.0])  # lengths do not matter
    found = nearest_captions(
        torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 9.0]]), text_emb, captions, k=2
    )
    assert [[caption for caption, _ in row] for row in found] == [["x", "y"], ["z", "x"]]
    assert found[1][0][1] == pytest.approx(1.0) and found[0][0][1] == pytest.approx(3 / 14**0.5)
    with pytest.raises(ValueError, match="2 captions for 3 embeddings"):
        nearest_captions(torch.ones(1, 3), text_emb, ["x", "y"])


# -- PCA


def test_pca_equals_the_singular_value_decomposition():
    emb = randn(50, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64) + 4
    pca = PCA.fit(emb)
    centred = emb - emb.mean(dim=0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(pca.variance.double(), values**2 / 49, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        (pca.components.double() @ vectors.T).abs(),
        torch.eye(6, dtype=torch.float64),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(pca.restore(pca.project(emb)), emb, rtol=0, atol=1e-5)
    assert pca.explained[-1] == pytest.approx(1.0)
    errors = [(pca.truncate(emb, k) - emb).square().sum().item() for k in range(7)]
    assert errors == sorted(errors, reverse=True)
    lost = (values**2)[3:].sum().item()
    assert errors[3] == pytest.approx(lost, rel=1e-4)
    torch.testing.assert_close(
        pca.truncate(emb, 0), emb.mean(dim=0).expand_as(emb), rtol=0, atol=1e-5
    )


def test_the_number_of_components():
    emb = randn(40, 4) * torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    assert len(PCA.fit(emb, 2)) == 2
    few = PCA.fit(emb, 0.95)
    assert len(few) == 2 and few.explained[0] < 0.95 <= few.explained[1]
    assert len(PCA.fit(emb[:3])) == 2  # three points span a plane
    for components in (0, 5, 1.5):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            PCA.fit(emb, components)
    with pytest.raises(ValueError, match="at least 2"):
        PCA.fit(emb[:1])
    with pytest.raises(ValueError, match="k is 3; expected 0 to 2"):
        PCA.fit(emb, 2).truncate(emb, 3)


def test_a_saved_pca_loads_unchanged(tmp_path):
    pca = PCA.fit(randn(20, 5), 3)
    pca.save(tmp_path / "new" / "pca.safetensors")
    again = PCA.load(tmp_path / "new" / "pca.safetensors")
    assert all(
        torch.equal(getattr(pca, name), getattr(again, name)) for name in pca.__dataclass_fields__
    )
    from safetensors.torch import save_file

    save_file({"mean": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has mean; expected a saved PCA"):
        PCA.load(tmp_path / "other.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*folder\.safetensors: "):
        pca.save(tmp_path / "folder.safetensors")
    assert not list(tmp_path.glob(".*"))

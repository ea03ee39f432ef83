import math

import pytest
import torch

from unclip.config import parse
from unclip.data.corruption import CorruptionConfig, corrupt, gaussian_blur, gaussian_kernels, jpeg


@pytest.fixture
def images():
    """Return smooth waves with some noise, similar to photographs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0, 6, 32)
    waves = torch.sin(x)[None, None, :, None] * torch.cos(x) * 0.7
    return (waves + 0.03 * torch.randn(4, 3, 32, 32, generator=generator)).clamp(-1, 1)


def run(images, seed=0, **settings):
    return corrupt(images, CorruptionConfig(**settings), torch.Generator().manual_seed(seed))


def test_blurring_a_point_gives_the_gaussian():
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 1
    blurred = gaussian_blur(point, kernel=3, sigma=0.6)[0, 0]
    side = math.exp(-0.5 / 0.6**2)
    expected = torch.tensor([side, 1, side]) / (1 + 2 * side)
    torch.testing.assert_close(blurred[2:5, 2:5], expected[:, None] * expected)
    assert blurred[:2].abs().max() == 0


def test_blur_preserves_constants_and_accepts_a_sigma_per_image(images):
    flat = torch.full((2, 3, 5, 5), 0.25)
    torch.testing.assert_close(gaussian_blur(flat, 5, 2.0), flat)
    several = gaussian_blur(images, 5, torch.tensor([0.3, 0.6, 1.0, 2.0]))
    torch.testing.assert_close(several[2:3], gaussian_blur(images[2:3], 5, 1.0))


def test_kernels_rotate_and_are_normalised():
    angles = torch.tensor([0.0, math.pi / 2])
    wide, tall = gaussian_kernels(7, torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5]), angles)
    torch.testing.assert_close(wide, tall.T)
    assert wide[3, 0] > 10 * wide[0, 3] and abs(float(wide.sum()) - 1) < 1e-6


@pytest.mark.parametrize("kind", ["blur", "bsr"])
def test_results_depend_on_the_seed_and_the_input_is_unchanged(images, kind):
    before = images.clone()
    once = run(images, kind=kind)
    assert torch.equal(once, run(images, kind=kind)) and torch.equal(images, before)
    assert once.shape == images.shape and once.dtype == images.dtype and once.abs().max() <= 1
    assert not torch.equal(once, images)
    if kind == "bsr":
        assert not torch.equal(once, run(images, seed=1, kind=kind))


def test_none_returns_the_input_and_uses_no_randomness(images):
    generator = torch.Generator().manual_seed(0)
    assert corrupt(images, CorruptionConfig(kind="none"), generator) is images
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_without_a_generator_the_global_one_is_used(images):
    torch.manual_seed(5)
    once = corrupt(images, CorruptionConfig(kind="bsr"))
    torch.manual_seed(5)
    assert torch.equal(corrupt(images, CorruptionConfig(kind="bsr")), once)


@pytest.mark.parametrize("kind", ["blur", "bsr"])
def test_probability_is_the_fraction_of_corrupted_images(kind):
    images = torch.rand(200 if kind == "blur" else 60, 3, 8, 8) * 2 - 1
    changed = (run(images, kind=kind, probability=0.3) != images).flatten(1).any(1).float().mean()
    assert 0.15 < changed < 0.45
    assert torch.equal(run(images, kind=kind, probability=0.0), images)


def test_noise_has_the_given_standard_deviation():
    gray = torch.zeros(8, 3, 32, 32)
    settings = {"sigma": (0.01, 0.01), "resize": (1.0, 1.0), "jpeg": (100, 100)}
    assert run(gray, kind="bsr", noise=(0.0, 0.0), **settings).abs().max() < 0.02
    noisy = run(gray, kind="bsr", noise=(0.2, 0.2), **settings)
    assert 0.1 < noisy.std() < 0.22  # JPEG averages the colors of some


def test_stronger_settings_have_larger_errors(images):
    settings = {"kind": "bsr", "noise": (0.0, 0.0), "resize": (1.0, 1.0)}
    mild = (run(images, sigma=(0.2, 0.2), jpeg=(95, 95), **settings) - images).abs().mean()
    strong = (run(images, sigma=(2.0, 2.0), jpeg=(10, 10), **settings) - images).abs().mean()
    assert mild < 0.6 * strong


def test_the_order_of_operations_varies():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fixed = {"sigma": (1.0, 1.0), "resize": (0.5, 0.5), "noise": (0.0, 0.0), "jpeg": (50, 50)}
    results = run(image.expand(24, -1, -1, -1), kind="bsr", **fixed)
    different = {tuple(result.flatten()[:50].tolist()) for result in results}
    assert len(different) > 15  # with one order there are 9, from the resize modes


def test_jpeg_error_grows_as_quality_falls(images):
    fine, coarse = ((jpeg(images[:1], quality) - images[:1]).abs().mean() for quality in (98, 5))
    assert fine < 0.06 and coarse > 1.5 * fine


def test_small_images_and_bfloat16_work():
    tiny = torch.rand(2, 3, 2, 2).to(torch.bfloat16)
    for kind in ("blur", "bsr"):
        out = run(tiny, kind=kind)
        assert out.shape == tiny.shape and out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("kind", ["blur", "bsr"])
def test_autocast_does_not_change_the_corruption(images, kind):
    expected = run(images, kind=kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(images, kind=kind), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 1.5}, "probability is 1.5"),
        ({"kernel": 4}, "kernel is 4; expected an odd"),
        ({"sigma": (2.0, 1.0)}, "sigma is"),
        ({"jpeg": (0, 50)}, "jpeg is"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        CorruptionConfig(**settings)


def test_a_config_is_parsed():
    config = parse(CorruptionConfig, {"kind": "bsr", "sigma": [0.1, 1.0]})
    assert config.sigma_range == (0.1, 1.0)
    assert CorruptionConfig(kind="bsr").sigma_range == (0.2, 1.5)

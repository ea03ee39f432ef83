"""What a codec loses, against plain arithmetic; and the command that tells it."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import write_shape_images

from unclip.checkpoints.store import save_component
from unclip.cli.main import main
from unclip.evaluation.codec import evaluate_codec, high_band, reconstructions, ssim
from unclip.evaluation.metrics import psnr
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqvae import ConvNetConfig


def dvae() -> DVAE:
    torch.manual_seed(0)
    return DVAE(
        DVAEConfig(image_size=16, vocab_size=8, width=8, groups=3, blocks=1, code_width=8)
    ).eval()


def pictures(count: int = 5, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of one channel in [0, 1], window by window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (
                (w * (a - ma) ** 2).sum(),
                (w * (b - mb) ** 2).sum(),
                (w * (a - ma) * (b - mb)).sum(),
            )
            top, bottom = (
                (2 * ma * mb + 1e-4) * (2 * cov + 9e-4),
                (ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4),
            )
            values.append(top / bottom)
    return float(np.mean(values))


def test_ssim_is_that_of_the_paper():
    x = torch.rand(1, 3, 14, 13, generator=torch.Generator().manual_seed(0))
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    wanted = np.mean([naive_ssim(*(z[0, c].double().numpy() for z in (x, y))) for c in range(3)])
    assert ssim(2 * x - 1, 2 * y - 1).item() == pytest.approx(wanted, abs=1e-4)
    assert ssim(x, x).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="SSIM needs at least 11"):
        ssim(x[..., :8], x[..., :8])


def test_the_high_band_holds_what_is_finer_than_four_pixels():
    x = torch.arange(16.0)
    fine, coarse = (torch.cos(2 * math.pi * k * x / 16).expand(1, 1, 16, 16) for k in (5, 3))
    assert high_band(fine).item() == pytest.approx(fine.square().sum().item(), rel=1e-5)
    assert high_band(fine.mT).item() == pytest.approx(fine.square().sum().item(), rel=1e-5)
    assert high_band(coarse).item() == pytest.approx(0, abs=1e-4)
    assert high_band(torch.ones(1, 3, 16, 16)).item() == pytest.approx(0, abs=1e-6)


def test_a_codec_s_figures_are_those_of_its_pictures():
    codec, images = dvae(), pictures()
    found = evaluate_codec(codec, images, batch_size=2)
    truth = images.float() / 127.5 - 1
    rebuilt, codes = codec.reconstruct(truth), codec.encode(truth)
    p = torch.bincount(codes.flatten(), minlength=8).float() / codes.numel()
    wanted = {
        "psnr": psnr(rebuilt, truth).mean().item(),
        "ssim": ssim(rebuilt, truth).mean().item(),
        "high_band_error": (high_band(rebuilt - truth).sum() / high_band(truth).sum()).item(),
        "high_band_energy": (high_band(rebuilt).sum() / high_band(truth).sum()).item(),
        "usage": (p > 0).float().mean().item(),
        "perplexity": torch.special.entr(p).sum().exp().item(),
        "bits": 16 * 3,
    }
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_blurred_picture_has_lost_its_high_band():
    class Blurred(GaussianVAE):
        def reconstruct(self, images):
            return (
                torch.nn.functional.avg_pool2d(images, 4)
                .repeat_interleave(4, 2)
                .repeat_interleave(4, 3)
            )

    net = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
    blurred = evaluate_codec(Blurred(GaussianVAEConfig(image_size=16, net=net)), pictures())
    assert blurred["high_band_energy"] < 0.2 and blurred["high_band_error"] > 0.8
    assert set(blurred) == {"psnr", "ssim", "high_band_error", "high_band_energy"}


def test_pictures_stand_above_their_reconstructions():
    codec, images = dvae(), pictures(3)
    sheet = reconstructions(codec, images)
    assert sheet.size == (3 * 16 + 2 * 4, 2 * 16 + 4)
    assert np.array_equal(np.asarray(sheet)[:16, 20:36], images[1].permute(1, 2, 0).numpy())
    truth = codec.reconstruct(images.float() / 127.5 - 1)[1].add(1).mul(127.5).round().byte()
    assert np.array_equal(np.asarray(sheet)[20:, 20:36], truth.permute(1, 2, 0).numpy())


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shape_images(tmp_path / "data")
    save_component(dvae(), tmp_path / "model" / "codec")
    arguments = [
        "--data",
        "data",
        "--limit",
        "4",
        "--json",
        "out.json",
        "--picture",
        "out.png",
        "--quiet",
    ]
    assert main(["evaluate-codec", "model", *arguments]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    told = dict(line.split() for line in capsys.readouterr().out.splitlines() if "out." not in line)
    assert {name: f"{value:.4g}" for name, value in figures.items()} == told
    assert Image.open("out.png").size == (4 * 16 + 3 * 4, 36)
    assert main(["evaluate-codec", "model/codec", "--data", "data", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["nothing", "--data", "data"], "unknown model 'nothing'"),
        (["data", "--data", "data"], "data holds no codec; expected config.json"),
        (["model", "--data", "data", "--batch-size", "0"], "'0' is not a whole number"),
        (["model", "--data", "data", "--size", "17"], r"pictures are \(12, 3, 17, 17\)"),
    ],
)
def test_faults_are_told_in_one_line(arguments, fault, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shape_images(tmp_path / "data")
    save_component(dvae(), tmp_path / "model" / "codec")
    assert main(["evaluate-codec", *arguments, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert re.search(fault, err) and err.count("\n") == 1

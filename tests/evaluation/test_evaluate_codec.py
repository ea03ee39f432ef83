"""`unclip evaluate-codec`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import write_shape_images

from unclip.checkpoints.store import save_component
from unclip.cli.main import main
from unclip.evaluation.codec import evaluate_codec, reconstructions
from unclip.evaluation.metrics import high_frequency_energy, psnr, ssim
from unclip.evaluation.report import evaluation_rows
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqvae import ConvNetConfig


def dvae() -> DVAE:
    torch.manual_seed(0)
    config = DVAEConfig(image_size=16, vocab_size=8, width=8, groups=3, blocks=1, code_width=8)
    return DVAE(config).eval()


def random_images(count: int = 5, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_results_are_means_over_the_images():
    codec, images = dvae(), random_images()
    results = evaluate_codec(codec, images, batch_size=2)
    truth = images.float() / 127.5 - 1
    output, codes = codec.reconstruct(truth), codec.encode(truth)
    p = torch.bincount(codes.flatten(), minlength=8).float() / codes.numel()
    true_energy = high_frequency_energy(truth).sum()
    expected = {
        "psnr": psnr(output, truth).mean().item(),
        "ssim": ssim(output, truth).mean().item(),
        "high_band_error": (high_frequency_energy(output - truth).sum() / true_energy).item(),
        "high_band_energy": (high_frequency_energy(output).sum() / true_energy).item(),
        "usage": (p > 0).float().mean().item(),
        "perplexity": torch.special.entr(p).sum().exp().item(),
        "bits": 16 * 3,
    }
    assert results == pytest.approx(expected, rel=1e-4)


def test_images_of_one_colour_have_no_details_to_compare():
    results = evaluate_codec(dvae(), torch.full((2, 3, 16, 16), 200, dtype=torch.uint8))
    assert results["psnr"] > 0 and "high_band_error" not in results
    assert not any("details" in row.figure for row in evaluation_rows({"codec": results}))


def test_blurred_reconstructions_lose_high_frequencies():
    class Blurred(GaussianVAE):
        def reconstruct(self, images):
            pooled = torch.nn.functional.avg_pool2d(images, 4)
            return pooled.repeat_interleave(4, 2).repeat_interleave(4, 3)

    net = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
    codec = Blurred(GaussianVAEConfig(image_size=16, net=net))
    results = evaluate_codec(codec, random_images())
    assert results["high_band_energy"] < 0.2 and results["high_band_error"] > 0.8
    assert set(results) == {"psnr", "ssim", "high_band_error", "high_band_energy"}


def test_the_sheet_shows_images_above_their_reconstructions():
    codec, images = dvae(), random_images(3)
    sheet = reconstructions(codec, images)
    assert sheet.size == (3 * 16 + 2 * 4, 2 * 16 + 4)
    assert np.array_equal(np.asarray(sheet)[:16, 20:36], images[1].permute(1, 2, 0).numpy())
    output = codec.reconstruct(images.float() / 127.5 - 1)[1].add(1).mul(127.5).round().byte()
    assert np.array_equal(np.asarray(sheet)[20:, 20:36], output.permute(1, 2, 0).numpy())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shape_images(tmp_path / "data")
    save_component(dvae(), tmp_path / "model" / "codec")
    return tmp_path


def test_the_command_prints_and_writes_results(folder, capsys):
    arguments = "--data data --limit 4 --json out.json --sheet out.png --quiet"
    assert main(["evaluate-codec", "model", *arguments.split()]) == 0
    results = json.loads((folder / "out.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    printed = dict(line.split() for line in lines if "out." not in line)
    assert printed == {name: f"{value:.4g}" for name, value in results.items()}
    assert Image.open("out.png").size == (4 * 16 + 3 * 4, 36)
    assert main(["evaluate-codec", "model/codec", "--data", "data", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing --data data", "nothing"),
        ("data --data data", "data is not an image codec"),
        ("model --data data --batch-size 0", "'0' is not a whole number"),
        ("model --data data --size 17", r"\(12, 3, 17, 17\)"),
        ("model --data data --device abacus", "unknown device 'abacus'"),
        ("model --data data --sheet sheet.bmp", "sheet.bmp; expected a .png file"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(arguments, message, folder, capsys):
    assert main(["evaluate-codec", *arguments.split(), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1

"""Reconstruction quality and codebook use of an image codec (`unclip evaluate-codec`)."""

# B batch, N images, S image size

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from unclip.evaluation.metrics import high_frequency_energy, psnr, ssim
from unclip.image_io import from_uint8
from unclip.models.codecs.codec import Autoencoder, ImageCodec, code_statistics
from unclip.training.preview import sheet


@torch.no_grad()
def evaluate_codec(codec: Autoencoder, images: Tensor, batch_size: int = 32) -> dict[str, float]:
    """Evaluate a codec on images (N, 3, S, S) uint8.

    psnr (dB) and ssim: means over the images. high_band_error, high_band_energy: energy above
    HIGH_FREQUENCY of the error and of the reconstructions, relative to the images (< 1: blurred),
    unless all have one colour.
    Discrete codecs also give usage and perplexity of the codebook, and bits per image.
    """
    device, codes = codec.last_layer.device, []
    sums: dict[str, float] = {}
    for part in images.split(batch_size):
        truth = from_uint8(part.to(device))
        if isinstance(codec, ImageCodec):
            codes.append(codec.encode(truth))
            output = codec.decode(codes[-1])
        else:
            output = codec.reconstruct(truth)
        values = {
            "psnr": psnr(output, truth),
            "ssim": ssim(output, truth),
            "error_energy": high_frequency_energy(output - truth),
            "output_energy": high_frequency_energy(output),
            "true_energy": high_frequency_energy(truth),
        }
        sums = {name: sums.get(name, 0.0) + x.sum().item() for name, x in values.items()}
    results = {
        "psnr": sums["psnr"] / len(images),
        "ssim": sums["ssim"] / len(images),
    }
    if sums["true_energy"] > 0:  # else all images have one colour
        results["high_band_error"] = sums["error_energy"] / sums["true_energy"]
        results["high_band_energy"] = sums["output_energy"] / sums["true_energy"]
    if isinstance(codec, ImageCodec):
        statistics = code_statistics(torch.cat([x.flatten() for x in codes]), codec.vocab_size)
        results |= {name: value.item() for name, value in statistics.items()}
        results["bits"] = codes[0][0].numel() * math.log2(codec.vocab_size)
    return results


def reconstructions(codec: Autoencoder, images: Tensor) -> Image.Image:
    """Return a sheet of images (N, 3, S, S) uint8 above their reconstructions."""
    truth = from_uint8(images.to(codec.last_layer.device))
    return sheet([truth, codec.reconstruct(truth)])

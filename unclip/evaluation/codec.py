"""What a codec loses: pictures against their reconstructions, and how it uses its codebook."""

# B batch, N pictures, S their side, K vocabulary

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.evaluation.metrics import psnr
from unclip.models.codecs.codec import Autoencoder, ImageCodec, code_statistics
from unclip.training.preview import sheet

HIGH_BAND = 0.5  # of the highest frequency along an axis: details of less than 4 pixels
SSIM_SIDE, SSIM_SIGMA = 11, 1.5


@torch.no_grad()
def evaluate_codec(codec: Autoencoder, images: Tensor, batch_size: int = 32) -> dict[str, float]:
    """Means over pictures (N, 3, S, S) uint8; of a discrete codec also what it says of all N together.

    psnr in dB; ssim in [-1, 1]; high_band_error: energy of the error above HIGH_BAND / that of the pictures there;
    high_band_energy: of the reconstructions / of the pictures (below 1 = blurred); usage, perplexity: of the codebook;
    bits: for a picture, a code costing log2 K.
    """
    device, codes = codec.last_layer.device, []
    sums: dict[str, float] = {}
    for part in images.split(batch_size):
        truth = part.to(device).float() / 127.5 - 1
        if isinstance(codec, ImageCodec):
            codes.append(codec.encode(truth))
            rebuilt = codec.decode(codes[-1])
        else:
            rebuilt = codec.reconstruct(truth)
        difference, true, drawn = (high_band(x) for x in (rebuilt - truth, truth, rebuilt))  # B
        found = {
            "psnr": psnr(rebuilt, truth).sum(),
            "ssim": ssim(rebuilt, truth).sum(),
            "error": difference.sum(),
            "true": true.sum(),
            "drawn": drawn.sum(),
        }
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in found.items()}
    results = {
        "psnr": sums["psnr"] / len(images),
        "ssim": sums["ssim"] / len(images),
        "high_band_error": sums["error"] / sums["true"],
        "high_band_energy": sums["drawn"] / sums["true"],
    }
    if isinstance(codec, ImageCodec):
        found = code_statistics(torch.cat([part.flatten() for part in codes]), codec.vocab_size)
        results |= {name: value.item() for name, value in found.items()}
        results["bits"] = codes[0][0].numel() * math.log2(codec.vocab_size)
    return results


def reconstructions(codec: Autoencoder, images: Tensor) -> Image.Image:
    """Pictures (N, 3, S, S) uint8 in a row, and below each what the codec makes of it."""
    truth = images.to(codec.last_layer.device).float() / 127.5 - 1
    return sheet([truth, codec.reconstruct(truth)])


def high_band(images: Tensor) -> Tensor:
    """Energy of (B, C, H, W) at frequencies above HIGH_BAND of the highest, in either direction: (B,)."""
    spectrum = torch.fft.fft2(images.float(), norm="ortho").abs().square()  # B C H W
    rows, columns = (
        torch.fft.fftfreq(n, device=images.device).abs() for n in images.shape[-2:]
    )  # up to 1/2
    high = torch.maximum(rows[:, None], columns[None]) > HIGH_BAND / 2  # H W
    return (spectrum * high).sum(dim=(1, 2, 3))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of (B, C, H, W) in [-1, 1], averaged over channels and places: (B,)."""
    x, y = ((picture.float() + 1) / 2 for picture in (images, truth))
    if min(x.shape[-2:]) < SSIM_SIDE:
        raise ValueError(
            f"pictures are {tuple(x.shape[-2:])}; SSIM needs at least {SSIM_SIDE} pixels a side"
        )
    offsets = torch.arange(SSIM_SIDE, device=x.device) - SSIM_SIDE // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, -1, -1)  # C 1 11 11

    def local(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=z.shape[1])

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(dim=(1, 2, 3))

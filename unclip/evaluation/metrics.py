"""Metrics of embeddings and images."""

# B batch, N queries, M candidates, D embedding width, S image size

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.embeddings import normalise
from unclip.evaluation.reference import Statistics
from unclip.extras import import_extra
from unclip.image_io import from_uint8

HIGH_FREQUENCY = 0.5  # of the Nyquist frequency: details finer than 4 pixels
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
KID_SUBSET, FEATURE_KID_SUBSET = 100, 1000  # images; 1000 is what published KIDs use
PART = 4096  # images whose distances to all others are in memory at a time
NEIGHBOURS = 3  # k of precision and recall, which need more images than that


def recall(
    emb: Tensor, candidates: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Return the fraction of emb (N, D) with targets (N,) among its k nearest candidates (M, D).

    A tie counts as a miss, so identical embeddings have a recall of zero. A k > 1 that is not below
    M is left out.
    """
    cosines = normalise(emb) @ normalise(candidates).T  # (N, M)
    rank = (cosines >= cosines.gather(1, targets[:, None])).sum(dim=1)  # (N,), from 1
    return {
        f"recall@{k}": (rank <= k).float().mean().item()
        for k in ks
        if k == 1 or k < len(candidates)
    }


def diversity(emb: Tensor) -> float:
    """Return the mean cosine distance between embeddings of one prompt: (prompts, n > 1, D)."""
    unit = normalise(emb)
    cosines = unit @ unit.mT  # (prompts, n, n)
    n = emb.shape[1]
    first, second = torch.triu_indices(n, n, offset=1)
    return (1 - cosines[:, first, second]).mean().item()


def nearest_by_cosine(emb: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (N,) of candidates (M, D) nearest to emb (N, D), and cosine distances (N,)."""
    cosine, row = (normalise(emb) @ normalise(candidates).T).max(dim=1)
    return row, 1 - cosine


def nearest_by_pixels(
    images: Tensor, candidates: Tensor, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Return rows (N,) of the candidates nearest to the images, and RMS differences (N,) in [0, 2].

    images: (N, 3, S, S) in [-1, 1]; candidates: (M, 3, S, S) uint8, converted chunk by chunk.
    """
    queries = rearrange(images.float().cpu(), "n c h w -> n (c h w)")
    best = torch.full((len(queries),), torch.inf)
    row = torch.zeros(len(queries), dtype=torch.long)
    for start in range(0, len(candidates), chunk):
        part = from_uint8(candidates[start : start + chunk])
        keys = rearrange(part, "m c h w -> m (c h w)")
        distance, nearest = torch.cdist(queries, keys).min(dim=1)  # (N,)
        row = torch.where(distance < best, nearest + start, row)
        best = torch.minimum(distance, best)
    return row, best / queries.shape[1] ** 0.5


def interval(values: Tensor, seed: int = 0, draws: int = 2000) -> list[float]:
    """Return the 95 % bootstrap interval of the mean of values (N,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    return values.float()[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()


def mean_and_interval(hits: Tensor, seed: int) -> dict[str, Any]:
    """Return the fraction of hits (N,) bool and its 95 % interval, as JSON types."""
    return {"mean": hits.float().mean().item(), "interval": interval(hits, seed)}


def precision_and_recall(
    features: Tensor, true: Tensor, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return the improved precision and recall of 1904.06991; features (N, D) and (M, D).

    Precision is the fraction of generated images within the manifold of the true ones, the union of
    balls that reach to the k-th nearest neighbour; recall swaps the two sets.
    """

    def covered(queries: Tensor, centres: Tensor) -> float:
        # The first neighbour is the image itself. Parts bound the memory.
        radii = [torch.cdist(x, centres).kthvalue(k + 1, dim=1).values for x in centres.split(PART)]
        hits = [
            (torch.cdist(x, centres) <= torch.cat(radii)).any(dim=1) for x in queries.split(PART)
        ]
        return torch.cat(hits).float().mean().item()

    if min(len(features), len(true)) <= k:
        raise ValueError(f"got {len(features)} and {len(true)} images; expected more than k = {k}")
    return covered(features, true), covered(true, features)


def clip_score(emb: Tensor, text_emb: Tensor) -> float:
    """Return the mean of 100 max(cosine, 0) over images and their captions, (N, D) each."""
    return 100 * F.cosine_similarity(emb, text_emb).clamp(min=0).mean().item()


class Given(nn.Identity):
    """Features that are given; torchmetrics would extract them from images."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]


def frechet_distance(features: Tensor, true: Tensor | Statistics) -> float:
    """Return the Fréchet distance of features (N, D) to others (M, D), or to their statistics."""
    import_extra("torchmetrics", "eval", "the Fréchet distance")
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(Given(features))
    if isinstance(true, Statistics):  # the sums of two images that have these statistics
        fid.real_features_num_samples = torch.tensor(2)
        fid.real_features_sum = 2 * true.mean
        fid.real_features_cov_sum = true.covariance + 2 * true.mean.outer(true.mean)
    else:
        fid.update(true, real=True)
    fid.update(features, real=False)
    return fid.compute().item()


def distribution_distances(
    features: Tensor, true: Tensor | Statistics, kid_subset: int = KID_SUBSET
) -> dict[str, float]:
    """Return Fréchet and kernel distance, precision and recall; features (N, D) and (M, D).

    The kernel distance is the mean over 100 subsets of at most `kid_subset` images. Statistics
    give only the Fréchet distance.
    """
    distance = {"fd": frechet_distance(features, true)}
    if isinstance(true, Statistics):
        return distance
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(features), len(true), kid_subset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it keeps the features, as we do
        kid = KernelInceptionDistance(Given(features), subset_size=size)
    kid.update(true, real=True)
    kid.update(features, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        kernel = kid.compute()[0].item()
    precision, covered = precision_and_recall(features, true)
    return {**distance, "kd": kernel, "precision": precision, "recall": covered}


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the PSNR in dB of each image, at most 100; both (B, 3, S, S) in [-1, 1]."""
    mse = (images.float() - truth.float()).square().mean(dim=(1, 2, 3))  # (B,)
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean structural similarity (Wang et al. 2004) of each image in [-1, 1]: (B,)."""
    x, y = ((image.float() + 1) / 2 for image in (images, truth))  # (B, C, H, W)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        size = tuple(x.shape[-2:])
        raise ValueError(f"images are {size}; SSIM needs at least {SSIM_WINDOW} pixels a side")
    offsets = torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, -1, -1)  # (C, 1, w, w)

    def local_mean(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=z.shape[1])

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3))


def high_frequency_energy(images: Tensor) -> Tensor:
    """Return the energy of (B, C, H, W) above HIGH_FREQUENCY along either axis: (B,)."""
    spectrum = torch.fft.fft2(images.float(), norm="ortho").abs().square()  # (B, C, H, W)
    rows, columns = (torch.fft.fftfreq(n, device=images.device).abs() for n in images.shape[-2:])
    high = torch.maximum(rows[:, None], columns[None]) > HIGH_FREQUENCY / 2  # (H, W)
    return (spectrum * high).sum(dim=(1, 2, 3))

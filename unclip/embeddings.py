"""Arithmetic on CLIP embeddings: slerp, mixtures, text diffs, nearest captions and PCA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unclip.weights import read_tensors, save_tensors

# N embeddings, M candidates, K mixture parts or principal components, D embedding width


def normalise(x: Tensor) -> Tensor:
    """Scale vectors (..., D) to unit length, in their dtype; zero vectors stay zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.norm(dim=-1, keepdim=True)
    return (wide / norm.where(norm > 0, 1.0)).to(x.dtype)


def cosine_gap(emb: Tensor, true_emb: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Return the mean cosine of matching rows, of rows with other captions, and their gap.

    emb and true_emb are (N, D); at least two of the N captions differ.
    """
    cosines = normalise(emb) @ normalise(true_emb).T  # (N, N)
    matching = cosines.diagonal().mean().item()
    labels = caption_targets(captions)[1].to(emb.device)
    mismatched = cosines[labels[:, None] != labels].mean().item()
    return {"matching": matching, "mismatched": mismatched, "gap": matching - mismatched}


def caption_targets(captions: Sequence[str]) -> tuple[list[int], Tensor]:
    """Return the first row of each distinct caption, and the index (N,) of each among them."""
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
    index = {caption: i for i, caption in enumerate(first)}
    return list(first.values()), torch.tensor([index[caption] for caption in captions])


def slerp(a: Tensor, b: Tensor, fraction: float | Tensor) -> Tensor:
    """Interpolate spherically from a (..., D) at fraction 0 to b (..., D) at fraction 1.

    Directions follow the great circle and lengths are interpolated linearly. fraction is a number
    or (...). Antipodal vectors, which have no unique shortest arc, follow a fixed one.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    fraction = torch.as_tensor(fraction, dtype=dtype, device=a.device).unsqueeze(-1)
    length_a, length_b = (x.norm(dim=-1, keepdim=True) for x in (wide_a, wide_b))
    length = torch.lerp(length_a, length_b, fraction)
    u, v = normalise(wide_a), normalise(wide_b)
    # Unlike arccos of the dot product, 2 atan2 is precise near 0 and π.
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    tangent = _unit_orthogonal(v, u)
    out = length * ((fraction * angle).cos() * u + (fraction * angle).sin() * tangent)
    return out.to(a.dtype)


def _unit_orthogonal(v: Tensor, u: Tensor) -> Tensor:
    """Return the unit vector orthogonal to u in the direction of v.

    Where v is parallel to u, the coordinate axis farthest from u takes its place.
    """
    rest = v - (v * u).sum(-1, keepdim=True) * u
    axis = torch.zeros_like(u).scatter(-1, u.abs().argmin(-1, keepdim=True), 1.0)
    parallel = rest.norm(dim=-1, keepdim=True) <= 8 * torch.finfo(u.dtype).eps
    rest = torch.where(parallel, axis, normalise(rest))
    # Project again: normalising a short vector amplifies its rounding errors along u.
    return normalise(rest - (rest * u).sum(-1, keepdim=True) * u)


def weighted_sum(parts: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Sum (..., K, D) with weights (K,) or (..., K) of any sign: -> (..., D), in parts' dtype."""
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
    weights = torch.as_tensor(weights, dtype=wide.dtype, device=parts.device)
    if weights.shape[-1] != parts.shape[-2]:
        raise ValueError(f"{weights.shape[-1]} weights for {parts.shape[-2]} embeddings")
    return (weights.unsqueeze(-1) * wide).sum(dim=-2).to(parts.dtype)


def mix(parts: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Mix embeddings (..., K, D) into one (..., D).

    The direction is that of the weighted sum of the unit vectors, the length their mean length.
    weights: (K,) of any sign; None = equal. Raises ValueError if the parts cancel out.
    """
    weights = torch.ones(parts.shape[-2]) if weights is None else weights
    total = weighted_sum(normalise(parts), weights)
    if not (total.float().norm(dim=-1) > 1e-6).all():
        raise ValueError("the embeddings cancel out under these weights; change the weights")
    return normalise(total) * parts.norm(dim=-1).mean(dim=-1, keepdim=True)


def text_direction(text_emb: Tensor, base_emb: Tensor) -> Tensor:
    """Return the unit vectors (..., D) from a base caption's embedding to another's (unCLIP 3.3).

    Raises ValueError if CLIP gives both captions the same embedding.
    """
    difference = normalise(text_emb) - normalise(base_emb)
    if not (difference.float().norm(dim=-1) > 1e-6).all():
        raise ValueError("the two captions have the same embedding; change one of them")
    return normalise(difference)


def text_diff(
    image_emb: Tensor, text_emb: Tensor, base_emb: Tensor, theta: float | Tensor
) -> Tensor:
    """Rotate image_emb (..., D) towards the difference of two captions (unCLIP 3.3).

    theta is the fraction of the arc, a number or (...): 0 returns the image embedding, and the
    paper uses up to 0.25 - 0.5. The length of image_emb is kept.
    """
    direction = text_direction(text_emb, base_emb).to(image_emb.dtype)
    return slerp(image_emb, direction * image_emb.norm(dim=-1, keepdim=True), theta)


def nearest_captions(
    emb: Tensor, text_emb: Tensor, captions: Sequence[str], k: int = 5
) -> list[list[tuple[str, float]]]:
    """Find the k captions nearest to each of N embeddings, with their cosine similarities.

    emb is (N, D); text_emb (M, D) has one row for each caption.
    """
    if len(captions) != len(text_emb):
        raise ValueError(f"{len(captions)} captions for {len(text_emb)} embeddings")
    similarity = normalise(emb) @ normalise(text_emb).T  # (N, M)
    cosines, rows = similarity.topk(min(k, len(captions)), dim=1)  # (N, k)
    return [
        [(captions[int(i)], float(cosine)) for i, cosine in zip(*pair, strict=True)]
        for pair in zip(rows.tolist(), cosines.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class PCA:
    """Principal components of a set of embeddings, in order of decreasing variance."""

    mean: Tensor  # (D,)
    components: Tensor  # (K, D), orthonormal rows
    variance: Tensor  # (K,) variance of each coefficient
    total_variance: Tensor  # () summed over all D components

    @classmethod
    def fit(cls, emb: Tensor, components: int | float | None = None) -> PCA:
        """Fit a PCA to emb (N, D), in float64.

        components: the number to keep, or the fraction of the variance to explain (below 1);
        None = all with non-zero variance.
        """
        if emb.ndim != 2 or len(emb) < 2:
            raise ValueError(f"emb has shape {tuple(emb.shape)}; expected (N, D), N at least 2")
        wide = emb.double()
        mean = wide.mean(dim=0)
        centred = wide - mean
        variance, vectors = torch.linalg.eigh(centred.T @ centred / (len(emb) - 1))  # ascending
        variance, vectors = variance.flip(0).clamp(min=0), vectors.flip(1).T
        most = min(len(emb) - 1, emb.shape[1])
        if components is None:
            components = most
        elif isinstance(components, float) and 0 < components < 1:
            components = int((variance.cumsum(0) / variance.sum() < components).sum()) + 1
        if not 1 <= components <= most or int(components) != components:
            limits = f"expected 1 to {most} for {len(emb)} embeddings, or a fraction"
            raise ValueError(f"components is {components}; {limits}")
        selected = slice(int(components))
        vectors = vectors[selected]
        # Eigenvectors have an arbitrary sign; a positive largest entry makes the fit repeatable.
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        parts = mean, vectors.contiguous(), variance[selected].clone(), variance.sum()
        return cls(*(x.float() for x in parts))

    def __len__(self) -> int:
        return len(self.components)

    @property
    def explained(self) -> Tensor:
        """Fraction of the variance that the first 1, 2, ... K components explain: (K,)."""
        return self.variance.cumsum(0) / self.total_variance

    def project(self, emb: Tensor) -> Tensor:
        """Compute coefficients: (..., D) -> (..., K)."""
        return (emb - self.mean.to(emb)) @ self.components.to(emb).T

    def restore(self, coefficients: Tensor) -> Tensor:
        """Reconstruct embeddings from their first k <= K coefficients: (..., k) -> (..., D)."""
        components = self.components[: coefficients.shape[-1]]
        return coefficients @ components.to(coefficients) + self.mean.to(coefficients)

    def truncate(self, emb: Tensor, k: int) -> Tensor:
        """Reconstruct embeddings (..., D) from their first k components (unCLIP 4.2)."""
        if not 0 <= k <= len(self):
            raise ValueError(f"k is {k}; expected 0 to {len(self)}, the number of components")
        return self.restore(self.project(emb)[..., :k])

    def save(self, file: str | Path) -> None:
        """Write a safetensors file; create its folder."""
        save_tensors({name: getattr(self, name) for name in self.__dataclass_fields__}, file)

    @classmethod
    def load(cls, file: str | Path) -> PCA:
        """Load a file that `save` wrote."""
        tensors = read_tensors(file)
        if tensors.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"{file} has {', '.join(sorted(tensors))}; expected a saved PCA")
        return cls(**tensors)

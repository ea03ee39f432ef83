"""Arithmetic of CLIP embeddings: lengths, arcs, mixtures, differences of texts, nearest captions, PCA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unclip.weights import read_tensors, save_tensors

# N embeddings, M candidates, K parts of a mixture or principal components, D embedding width


def normalise(x: Tensor) -> Tensor:
    """(..., D) at unit length, in x's dtype; a zero vector stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.norm(dim=-1, keepdim=True)
    return (wide / norm.where(norm > 0, 1.0)).to(x.dtype)


def slerp(a: Tensor, b: Tensor, fraction: float | Tensor) -> Tensor:
    """From a (..., D) at fraction 0 to b at 1: directions along the great circle, lengths linearly.

    fraction is a number or (...). The arc stays on the sphere for all pairs: parallel ones do not move, and antipodal
    ones, which have no shortest arc, take a fixed one of them.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    fraction = torch.as_tensor(fraction, dtype=dtype, device=a.device).unsqueeze(-1)
    length = torch.lerp(
        wide_a.norm(dim=-1, keepdim=True), wide_b.norm(dim=-1, keepdim=True), fraction
    )
    u, v = normalise(wide_a), normalise(wide_b)
    # 2 atan2 keeps its precision near 0 and π, where arccos of the dot product has none
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sideways = _unit_orthogonal(v, u)
    return (length * ((fraction * angle).cos() * u + (fraction * angle).sin() * sideways)).to(
        a.dtype
    )


def _unit_orthogonal(v: Tensor, u: Tensor) -> Tensor:
    """The direction in which v leaves the unit vector u; where it does not, that of the axis farthest from u."""
    rest = v - (v * u).sum(-1, keepdim=True) * u
    axis = torch.zeros_like(u).scatter(-1, u.abs().argmin(-1, keepdim=True), 1.0)
    rest = torch.where(
        rest.norm(dim=-1, keepdim=True) > 8 * torch.finfo(u.dtype).eps, normalise(rest), axis
    )
    return normalise(
        rest - (rest * u).sum(-1, keepdim=True) * u
    )  # again: a short rest keeps rounding errors along u


def weighted_sum(parts: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """parts (..., K, D), weights (K,) or (..., K) of any sign -> (..., D), in the dtype of parts."""
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
    weights = torch.as_tensor(weights, dtype=wide.dtype, device=parts.device)
    if weights.shape[-1] != parts.shape[-2]:
        raise ValueError(
            f"{weights.shape[-1]} weights for {parts.shape[-2]} embeddings; expected one for each"
        )
    return (weights.unsqueeze(-1) * wide).sum(dim=-2).to(parts.dtype)


def mix(parts: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Several embeddings (..., K, D) as one (..., D): the direction of their weighted sum, with their mean length.

    weights: (K,) of any sign, equal ones if None; ValueError if the parts cancel out.
    """
    weights = torch.ones(parts.shape[-2]) if weights is None else weights
    total = weighted_sum(normalise(parts), weights)
    if not (total.float().norm(dim=-1) > 1e-6).all():
        raise ValueError(
            "the embeddings cancel out under these weights; a mixture of length 0 has no direction"
        )
    return normalise(total) * parts.norm(dim=-1).mean(dim=-1, keepdim=True)


def text_direction(text_emb: Tensor, base_emb: Tensor) -> Tensor:
    """From a base caption to another: embeddings (..., D) -> unit vectors (..., D) (unCLIP 3.3).

    ValueError if the two captions are the same to CLIP.
    """
    difference = normalise(text_emb) - normalise(base_emb)
    if not (difference.float().norm(dim=-1) > 1e-6).all():
        raise ValueError(
            "the two captions have the same embedding; their difference has no direction"
        )
    return normalise(difference)


def text_diff(
    image_emb: Tensor, text_emb: Tensor, base_emb: Tensor, theta: float | Tensor
) -> Tensor:
    """image_emb (..., D) turned towards what sets a caption apart from the base caption (unCLIP 3.3).

    theta is the fraction of the arc, a number or (...): 0 is the image itself, the paper goes to 0.25 - 0.5. The length
    of image_emb is kept.
    """
    direction = text_direction(text_emb, base_emb).to(image_emb.dtype)
    return slerp(image_emb, direction * image_emb.norm(dim=-1, keepdim=True), theta)


def nearest_captions(
    emb: Tensor, text_emb: Tensor, captions: Sequence[str], k: int = 5
) -> list[list[tuple[str, float]]]:
    """For each of emb (N, D), the k captions whose embeddings, of text_emb (M, D), are nearest, with their cosines."""
    if len(captions) != len(text_emb):
        raise ValueError(
            f"{len(captions)} captions for {len(text_emb)} embeddings; expected one for each"
        )
    cosines, rows = (normalise(emb) @ normalise(text_emb).T).topk(
        min(k, len(captions)), dim=1
    )  # (N, k)
    return [
        [(captions[row], cosine) for row, cosine in zip(found, closeness, strict=True)]
        for found, closeness in zip(rows.tolist(), cosines.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class PCA:
    """Principal components of a set of embeddings, by decreasing variance."""

    mean: Tensor  # (D,)
    components: Tensor  # (K, D), orthonormal rows
    variance: Tensor  # (K,), of the coefficients
    total_variance: Tensor  # (), of all D components

    @classmethod
    def fit(cls, emb: Tensor, components: int | float | None = None) -> PCA:
        """PCA of emb (N, D), computed in float64.

        components: how many to keep; or, as a fraction below 1, as few as explain that much of the variance; None = all
        that have any.
        """
        if emb.ndim != 2 or len(emb) < 2:
            raise ValueError(
                f"emb is of shape {tuple(emb.shape)}; PCA needs (N, D) with at least 2 embeddings"
            )
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
            raise ValueError(
                f"components is {components}; expected 1 to {most}, or a fraction of the variance below 1"
            )
        kept = slice(int(components))
        vectors = vectors[kept]
        # The sign of an eigenvector is arbitrary: its largest entry is made positive, so that a fit can be repeated.
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        return cls(
            *(
                x.float()
                for x in (mean, vectors.contiguous(), variance[kept].clone(), variance.sum())
            )
        )

    def __len__(self) -> int:
        return len(self.components)

    @property
    def explained(self) -> Tensor:
        """(K,): the fraction of the variance that the first 1, 2, ... K components explain."""
        return self.variance.cumsum(0) / self.total_variance

    def project(self, emb: Tensor) -> Tensor:
        """(..., D) -> coefficients (..., K)."""
        return (emb - self.mean.to(emb)) @ self.components.to(emb).T

    def restore(self, coefficients: Tensor) -> Tensor:
        """The first k <= K coefficients (..., k) -> (..., D)."""
        return coefficients @ self.components[: coefficients.shape[-1]].to(
            coefficients
        ) + self.mean.to(coefficients)

    def truncate(self, emb: Tensor, k: int) -> Tensor:
        """(..., D) -> (..., D): what the first k components tell of it (unCLIP 4.2)."""
        if not 0 <= k <= len(self):
            raise ValueError(f"k is {k}; this PCA has {len(self)} components")
        return self.restore(self.project(emb)[..., :k])

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file; the folder it goes into is made."""
        save_tensors({name: getattr(self, name) for name in self.__dataclass_fields__}, file)

    @classmethod
    def load(cls, file: str | Path) -> PCA:
        """What `save` wrote; ValueError if the file holds anything else."""
        tensors = read_tensors(file)
        if tensors.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(
                f"{file} holds {', '.join(sorted(tensors)) or 'nothing'}; expected a PCA that was saved here"
            )
        return cls(**tensors)

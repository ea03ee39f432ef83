"""Geometry of CLIP embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

# D embedding width


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
    length = torch.lerp(wide_a.norm(dim=-1, keepdim=True), wide_b.norm(dim=-1, keepdim=True), fraction)
    u, v = normalise(wide_a), normalise(wide_b)
    # 2 atan2 keeps its precision near 0 and π, where arccos of the dot product has none
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sideways = _unit_orthogonal(v, u)
    return (length * ((fraction * angle).cos() * u + (fraction * angle).sin() * sideways)).to(a.dtype)


def _unit_orthogonal(v: Tensor, u: Tensor) -> Tensor:
    """The direction in which v leaves the unit vector u; where it does not, that of the axis farthest from u."""
    rest = v - (v * u).sum(-1, keepdim=True) * u
    axis = torch.zeros_like(u).scatter(-1, u.abs().argmin(-1, keepdim=True), 1.0)
    rest = torch.where(rest.norm(dim=-1, keepdim=True) > 8 * torch.finfo(u.dtype).eps, normalise(rest), axis)
    return normalise(rest - (rest * u).sum(-1, keepdim=True) * u)  # again: a short rest keeps rounding errors along u

"""DALLE-pytorch's rotary positions: of the text, of a code's row, and of its column, in a third of a head each."""

# T text positions with the start, S stream, d width of a head, r rotated channels

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

FAR_FROM_TEXT = 8192.0  # where on the text's axis all codes are
OUTSIDE = -10.0  # where on the picture's axes, which go from -1 to 1, all text is


@cache
def rotary_angles(
    text: int, grid: tuple[int, int], head_dim: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles of all positions of the stream, (S, r): pairs of channels turn together, r <= d."""
    pairs = head_dim // 3 // 2
    of_text = 10_000.0 ** (-torch.arange(0, head_dim // 3, 2)[:pairs] / (head_dim // 3))
    of_picture = torch.linspace(1.0, 5.0, pairs) * math.pi
    codes = grid[0] * grid[1]
    place = torch.cat([torch.arange(text), torch.full((codes,), FAR_FROM_TEXT)])  # S
    rows, columns = (torch.linspace(-1, 1, size) for size in grid)
    outside = torch.full((text,), OUTSIDE)
    row = torch.cat([outside, rows.repeat_interleave(grid[1])])  # S
    column = torch.cat([outside, columns.repeat(grid[0])])  # S
    angles = [place[:, None] * of_text, row[:, None] * of_picture, column[:, None] * of_picture]
    return torch.cat(angles, dim=1).repeat_interleave(2, dim=1).to(device)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the first r channels of queries, keys or values (..., n, d) by angles (n, r)."""
    turned, kept = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([(turned * angles.cos() + across * angles.sin()).to(x.dtype), kept], dim=-1)

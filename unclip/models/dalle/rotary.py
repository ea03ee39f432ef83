"""Rotary positions of DALLE-pytorch: text position, row and column, a third of a head each."""

# T text positions with the start, S stream, d width of a head, r rotated channels

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

CODES_ON_TEXT_AXIS = 8192.0  # position of all codes on the text axis
TEXT_ON_IMAGE_AXES = -10.0  # position of all text on the image axes, which run from -1 to 1


@cache
def rotary_angles(
    text: int, grid: tuple[int, int], head_dim: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles of all positions of the stream, (S, r), equal in pairs of channels; r <= d."""
    pairs = head_dim // 3 // 2
    text_frequencies = 10_000.0 ** (-torch.arange(0, head_dim // 3, 2)[:pairs] / (head_dim // 3))
    image_frequencies = torch.linspace(1.0, 5.0, pairs) * math.pi
    codes_on_text_axis = torch.full((grid[0] * grid[1],), CODES_ON_TEXT_AXIS)
    text_on_image_axes = torch.full((text,), TEXT_ON_IMAGE_AXES)
    rows, columns = (torch.linspace(-1, 1, size) for size in grid)
    position = torch.cat([torch.arange(text), codes_on_text_axis])  # S
    row = torch.cat([text_on_image_axes, rows.repeat_interleave(grid[1])])  # S
    column = torch.cat([text_on_image_axes, columns.repeat(grid[0])])  # S
    angles = [
        position[:, None] * text_frequencies,
        row[:, None] * image_frequencies,
        column[:, None] * image_frequencies,
    ]
    return torch.cat(angles, dim=1).repeat_interleave(2, dim=1).to(device)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first r channels of queries, keys or values (..., n, d) by angles (n, r)."""
    rotated, kept = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([(rotated * angles.cos() + across * angles.sin()).to(x.dtype), kept], dim=-1)

"""Faster forward passes for the CPU, installed by changing the class of a layer.

Parameters, state dict and module tree stay the same, and the kernels can be removed again. In-place
kernels give the same bits as the layers they replace; the others differ by rounding.
"""

# B batch, C channels, G groups, H heads, S tokens, N tokens they attend to, d width of a head

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.dalle.transformer import DALLE
from unclip.models.layers import DotProductAttention, GroupNorm, LayerKeyValues
from unclip.models.published.bart_dalle import BartDALLE
from unclip.models.unet import Attention, ResBlock


def use_kernels(network: nn.Module, device: torch.device) -> None:
    """Install the CPU kernels in `network` if `device` is a CPU, else remove them."""
    if device.type != "cpu":
        remove_kernels(network)
        return
    _swap(network, KERNELS)
    for module in network.modules():
        if isinstance(module, DALLE | BartDALLE):  # these decode token by token
            _swap(module, {nn.Linear: FewRowsLinear})


def remove_kernels(network: nn.Module) -> None:
    """Restore the plain layers."""
    _swap(network, {FewRowsLinear: nn.Linear, **{cpu: plain for plain, cpu in KERNELS.items()}})


def _swap(network: nn.Module, classes: dict[type, type]) -> None:
    for module in network.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


class FewRowsLinear(nn.Linear):
    """Linear layer that uses the weight as the left factor for 2 to 4 rows in float32.

    In this order MKL's matrix product is up to three times as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        few = 1 < x.shape[:-1].numel() <= 4 and x.dtype == torch.float32
        if not few or torch.is_grad_enabled():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).T  # I B
        if self.bias is None:
            out = self.weight @ rows
        else:
            out = torch.addmm(self.bias[:, None], self.weight, rows)  # O B
        return out.T.contiguous().view(*x.shape[:-1], -1)


class InPlaceResBlock(ResBlock):
    """Residual block that reuses memory without gradients: new memory costs more than the sums."""

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, modulation)
        x, h = self.resample(x, F.silu(self.norm1(x), inplace=True))
        h = self.conv1(h)
        if self.scale_shift:
            h = self.norm2(h, *modulation.chunk(2, dim=1))
        else:
            h = self.norm2(h.add_(modulation[:, :, None, None]))
        h = self.conv2(self.dropout(F.silu(h, inplace=True)))
        return h.add_(self.skip(x))


class InPlaceAttention(Attention):
    """Attention of the U-Net that adds its input in place if no gradient is needed."""

    def forward(self, x: Tensor, context: LayerKeyValues | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, context)
        return self.branch(x, context).add_(x)


class BFloat16Attention(DotProductAttention):
    """Attention as two matrix products in bfloat16.

    PyTorch's fused kernel takes twice as long forward and seven times as long backward.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.dtype != torch.bfloat16:
            return super().forward(q, k, v, mask)
        if mask is None:
            bias = q.new_zeros(1, 1, 1, 1)
        else:
            bias = torch.where(mask, 0.0, -torch.inf).to(q.dtype)
        bias = bias.expand(*q.shape[:2], -1, k.shape[2]).flatten(0, 1)  # B*H 1|S N
        q, k, v, shape = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q.shape
        with torch.autocast("cpu", enabled=False):  # autocast would run the softmax in float32
            scores = torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5)  # B*H S N
            return torch.bmm(scores.softmax(dim=-1), v).view(shape)


class CPUGroupNorm(GroupNorm):
    """Group norm, modulated in place without gradients, and trained in bfloat16 by plain sums."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        if torch.is_grad_enabled():
            if x.dtype != torch.bfloat16:
                return super().forward(x, scale, shift)
            weight = self.weight.float().expand(x.shape[:2])  # B C
            bias = self.bias.float().expand(x.shape[:2])
            if scale is not None and shift is not None:
                weight, bias = weight * (1 + scale), torch.addcmul(shift.float(), bias, 1 + scale)
            return _GroupNormBySums.apply(x, weight, bias, self.num_groups, self.eps)
        h = super().forward(x)
        if scale is None or shift is None:
            return h
        return torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None], out=h)


class _GroupNormBySums(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias, with weight and bias (B, C) float32.

    PyTorch's backward kernel is slow for channels-last bfloat16. Here statistics and gradients
    come from sums over each channel's pixels. A rough mean is subtracted first: rounding errors
    of x would exceed a variance that is small relative to the mean.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        n = x[0].numel() // groups
        sample = x[:, :, ::4, ::4]
        rough_mean = _group_sums(_pixel_sums(sample), groups) / (sample[0].numel() // groups)  # B C
        x = x - _per_pixel(rough_mean, x)
        first, second = _pixel_sums(x), _pixel_sums(x * x)  # B C
        mean, square = (_group_sums(s, groups) / n for s in (first, second))  # B C
        rstd = (square - mean * mean).clamp_min(0).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups, ctx.n = groups, n
        gain = rstd * weight
        return torch.addcmul(_per_pixel(bias - mean * gain, x), x, _per_pixel(gain, x))

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        d_bias, dyx = _pixel_sums(dy), _pixel_sums(dy * x)  # B C
        d_weight = rstd * (dyx - mean * d_bias)
        # dx = rstd * (g - mean(g) - z * mean(g z)), z the normalised x and g = dy * weight
        g = _group_sums(weight * d_bias, ctx.groups) / ctx.n
        gz = _group_sums(weight * d_weight, ctx.groups) / ctx.n
        slope = -rstd * rstd * gz
        dx = torch.addcmul(_per_pixel(-rstd * g - slope * mean, x), x, _per_pixel(slope, x))
        return dx.addcmul_(dy, _per_pixel(rstd * weight, x)), d_weight, d_bias, None, None


def _pixel_sums(x: Tensor) -> Tensor:
    # Summing each image row first needs no float32 copy of x; its rounding errors average out.
    return x.permute(0, 2, 3, 1).sum(2).sum(1, dtype=torch.float32)


def _group_sums(x: Tensor, groups: int) -> Tensor:
    grouped = x.unflatten(1, (groups, -1))
    return grouped.sum(2, keepdim=True).expand_as(grouped).flatten(1)


def _per_pixel(x: Tensor, like: Tensor) -> Tensor:
    return x[:, :, None, None].to(like.dtype)


KERNELS: dict[type, type] = {
    ResBlock: InPlaceResBlock,
    Attention: InPlaceAttention,
    DotProductAttention: BFloat16Attention,
    GroupNorm: CPUGroupNorm,
}

"""OpenAI's discrete VAE (2102.12092, 2.1 and A): Gumbel-softmax codes, logit-Laplace pixels.

Tensors have OpenAI's names without `blocks.`: encoder.group_1.block_1.res_path.conv_1.w.
"""

# B batch, H W image, h w grid of codes, K vocabulary, C width of a code

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import MultipleOf
from einops import rearrange
from torch import Tensor, nn

from unclip.config import NonNegative, PositiveInt, check_multiple, config
from unclip.models.codecs.codec import ConvKind, ImageCodec, LossTerms, code_statistics, convolution
from unclip.models.codecs.quantizers import kl_to_uniform
from unclip.types import full_precision

EPS = 0.1  # pixels are mapped to [EPS, 1 - EPS], where their logit is finite


@config
class DVAEConfig:
    """The defaults are OpenAI's."""

    kind: Literal["dvae"] = "dvae"
    image_size: PositiveInt = 256
    vocab_size: PositiveInt = 8192
    # of the first group; each group doubles it, and blocks have a quarter of it inside
    width: Annotated[PositiveInt, MultipleOf(4)] = 256
    groups: PositiveInt = 4  # the resolution is halved between groups
    blocks: PositiveInt = 2  # in a group
    code_width: PositiveInt = 128  # of the decoder's input
    conv: ConvKind = "plain"  # in the residual branches; OpenAI's are plain
    # added to the Laplace scale, which would approach 0 for images of flat colours
    min_scale: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, factor=self.factor)

    @property
    def factor(self) -> int:
        return 2 ** (self.groups - 1)


class Conv2d(nn.Module):
    """Convolution that keeps the size, initialised with N(0, 1 / fan-in)."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        weight = torch.empty(c_out, c_in, kernel, kernel)
        self.w = nn.Parameter(weight.normal_(std=(c_in * kernel**2) ** -0.5))
        self.b = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """id_path(x) + gain * res_path(x), with gain = 1 / (number of blocks)**2."""

    def __init__(self, c_in: int, c_out: int, kernels: Sequence[int], config: DVAEConfig) -> None:
        super().__init__()
        self.gain = (config.groups * config.blocks) ** -2
        widths = [c_in, *[c_out // 4] * (len(kernels) - 1), c_out]
        branch: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            shape = widths[i - 1], widths[i], kernel
            branch[f"relu_{i}"] = nn.ReLU()
            branch[f"conv_{i}"] = convolution(config.conv, lambda shape=shape: Conv2d(*shape))
        self.id_path = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.res_path = nn.Sequential(branch)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class Output(nn.Sequential):
    conv: Conv2d

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(OrderedDict(relu=nn.ReLU(), conv=Conv2d(c_in, c_out, 1)))


class Stack(nn.Sequential):
    """First convolution, groups of blocks, and output convolution."""

    input: Conv2d
    output: Output


def make_encoder(config: DVAEConfig) -> Stack:
    """Images (B, 3, H, W) -> logits of codes (B, K, h, w)."""
    widths = [config.width * 2**i for i in range(config.groups)]
    pool = ("pool", nn.MaxPool2d(2))
    layers = [
        ("input", Conv2d(3, config.width, 7)),
        *_groups([config.width, *widths], (3, 3, 3, 1), pool, config),
        ("output", Output(widths[-1], config.vocab_size)),
    ]
    return Stack(OrderedDict(layers))


def make_decoder(config: DVAEConfig) -> Stack:
    """(Soft) one-hot codes (B, K, h, w) -> mean and ln scale of pixel logits (B, 6, H, W)."""
    widths = [config.width * 2**i for i in reversed(range(config.groups))]
    upsample = ("upsample", nn.Upsample(scale_factor=2))
    layers = [
        ("input", Conv2d(config.vocab_size, config.code_width, 1)),
        *_groups([config.code_width, *widths], (1, 3, 3, 3), upsample, config),
        ("output", Output(widths[-1], 6)),
    ]
    return Stack(OrderedDict(layers))


def _groups(
    widths: Sequence[int], kernels: Sequence[int], resize: tuple[str, nn.Module], config: DVAEConfig
) -> list[tuple[str, nn.Module]]:
    """Groups from widths[0] to widths[1] and so on, each but the last ending with `resize`."""
    groups = []
    for i, (c_in, c_out) in enumerate(pairwise(widths), start=1):
        inputs = [c_in, *[c_out] * (config.blocks - 1)]
        parts = [
            (f"block_{j}", Block(c, c_out, kernels, config)) for j, c in enumerate(inputs, start=1)
        ]
        parts += [resize] if i < config.groups else []
        groups.append((f"group_{i}", nn.Sequential(OrderedDict(parts))))
    return groups


class DVAE(ImageCodec):
    """Discrete VAE trained on an ELBO with relaxed codes: weights over the codebook, annealed."""

    annealed = ("temperature", "kl_weight")
    encoder: Stack
    decoder: Stack

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.output.conv.w

    def logits(self, images: Tensor) -> Tensor:
        x = to_logit_range(self.checked(images)).to(self.encoder.input.w.dtype)
        h = self.encoder[:-1](x)  # B C h w
        with full_precision(h):  # a rounding error must not decide which code is the most likely
            logits = self.encoder.output(h.to(self.encoder.output.conv.w.dtype))  # B K h w
        return rearrange(logits.float(), "b k h w -> b h w k")

    def _decode(self, codes: Tensor) -> Tensor:
        return logits_to_pixels(self._pixel_distribution(self._embed(codes))[0])

    def _embed(self, codes: Tensor) -> Tensor:
        """Embed codes (B, h, w), or weights over the codebook (B, h, w, K) -> (B, C, h, w).

        Equal to the decoder's first 1x1 convolution of one-hot codes.
        """
        table, bias = self.decoder.input.w[:, :, 0, 0].T, self.decoder.input.b  # K C, C
        if codes.ndim == 3:
            return rearrange(F.embedding(codes, table) + bias, "b h w c -> b c h w")
        with full_precision(codes):
            return rearrange(codes @ table + bias, "b h w c -> b c h w")

    def _pixel_distribution(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> mean and scale of pixel logits, (B, 3, H, W) each, float32."""
        mean, ln_scale = self.decoder[1:](embedded).float().chunk(2, dim=1)
        return mean, ln_scale.exp() + self.config.min_scale

    def loss(self, images: Tensor, temperature: float = 1.0, kl_weight: float = 1.0) -> LossTerms:
        """Mean NLL of a colour value + kl_weight / (3 factor**2) * mean KL of a position, in nats.

        The paper uses beta / 192 (A.2). In eval mode the codes are hard, as in the second stage.
        """
        logits = self.logits(images)  # B h w K
        codes = logits.argmax(dim=-1)  # B h w
        soft = F.gumbel_softmax(logits, tau=temperature, dim=-1) if self.training else codes
        mean, scale = self._pixel_distribution(self._embed(soft))  # B 3 H W
        nll = logit_laplace_nll(images, mean, scale).mean()
        kl = kl_to_uniform(logits).mean()
        loss, reconstruction = nll + kl_weight * kl / (3 * self.factor**2), logits_to_pixels(mean)
        mse = F.mse_loss(reconstruction.detach(), images)
        logged = {"nll": nll.detach(), "kl_bits": kl.detach() / math.log(2), "mse": mse}
        logged |= code_statistics(codes, self.vocab_size)
        return LossTerms(loss, reconstruction, logged)

    def log_likelihood(self, images: Tensor, codes: Tensor) -> Tensor:
        mean, scale = self._pixel_distribution(self._embed(codes))
        per_value = math.log(1 - 2 * EPS) - logit_laplace_nll(images, mean, scale)  # B 3 H W
        return per_value.sum(dim=(1, 2, 3))


def to_logit_range(images: Tensor) -> Tensor:
    """Map values in [-1, 1] to [EPS, 1 - EPS]."""
    return (1 - 2 * EPS) * (images + 1) / 2 + EPS


def logits_to_pixels(mean: Tensor) -> Tensor:
    """Convert a decoder's pixel logits to pixels in about [-1, 1]."""
    return 2 * (torch.sigmoid(mean) - EPS) / (1 - 2 * EPS) - 1


def logit_laplace_nll(images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """-ln p of every value of images (B, 3, H, W) in [-1, 1] (2102.12092, A.3).

    A density over [EPS, 1 - EPS], the range to which pixels are mapped.
    """
    x = to_logit_range(images.float())
    return torch.log(2 * scale * x * (1 - x)) + (torch.logit(x) - mean).abs() / scale

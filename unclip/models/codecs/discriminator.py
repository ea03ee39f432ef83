"""Discriminator of VQ-GAN (2012.09841): classifies image patches as real or reconstructed."""

# B batch, H W image, p q patches

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from unclip.config import PositiveInt, config


@config
class DiscriminatorConfig:
    """The defaults are pix2pix's (1611.07004), with a receptive field of 70 pixels."""

    width: PositiveInt = 64
    # convolutions of stride 2; each except the first doubles the width, up to a factor of 8
    layers: PositiveInt = 3


class PatchDiscriminator(nn.Sequential):
    """Images (B, 3, H, W) -> a score of each patch (B, 1, p, q), higher = more real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1)]
        for i, (c_in, c_out) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < config.layers else 1
            conv = nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False)
            layers += [nn.LeakyReLU(0.2), conv, nn.BatchNorm2d(c_out)]
        layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss: pushes real scores above 1 and fake ones below -1."""
    return 0.5 * (nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean())

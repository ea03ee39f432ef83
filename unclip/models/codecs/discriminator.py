"""The judge of VQ-GAN (2012.09841): a convolutional net that tells patches of pictures from reconstructed ones."""

# B batch, H W picture, p q patches

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from unclip.models.codecs.codec import check_positive


@dataclass(frozen=True)
class DiscriminatorConfig:
    """pix2pix's (1611.07004) with a field of view of 70 pixels, unless told otherwise."""

    width: int = 64
    layers: int = 3  # convolutions of stride 2; each but the first doubles the width, up to 8 times

    def __post_init__(self) -> None:
        check_positive(self, "width", "layers")


class PatchDiscriminator(nn.Sequential):
    """Pictures (B, 3, H, W) -> a score of each patch (B, 1, p, q), higher = more real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 2 if i < config.layers else 1
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
            ]
            layers += [nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: real scores above 1, fake ones below -1."""
    return 0.5 * (nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean())

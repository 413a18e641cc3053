"""A patch discriminator (Isola et al., arXiv 1611.07004, section 3.2.2)."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Score overlapping patches of a stack as real or reconstructed.

    Args:
        in_channels: channels of what is judged (3 for a stack).
        channels: width of the first layer; doubled at each further layer.
        layers: strided layers; the patch grows with each.
    """

    def __init__(self, in_channels: int = 3, channels: int = 32, layers: int = 3) -> None:
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, layers):
            width = channels * 2**level
            blocks += [nn.Conv2d(width // 2, width, 4, 2, 1), nn.GroupNorm(min(8, width), width), nn.LeakyReLU(0.2)]
        blocks.append(nn.Conv2d(channels * 2 ** (layers - 1), 1, 4, 1, 1))
        super().__init__(*blocks)

    def forward(self, stack: Tensor) -> Tensor:
        """``(batch, in_channels, views, bins)`` to one score per patch, ``(batch, 1, rows, columns)``."""
        return super().forward(stack)

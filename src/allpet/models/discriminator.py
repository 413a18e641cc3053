"""Discriminators: of patches of a stack (stage 1), and of whole sinograms and their prompts (the GAN baseline)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allpet.models.layers import moebius_pad
from allpet.prompts import REGIONS, TRACERS, Prompt


class PatchDiscriminator(nn.Sequential):
    """Score overlapping patches of a stack as real or reconstructed (Isola et al., arXiv 1611.07004, section 3.2.2).

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


class PromptDiscriminator(nn.Module):
    """Score whole sinograms, given their prompts: a projection discriminator (arXiv 1802.05637, eq. 3).

    The score is a linear function of the features plus their inner product with the prompt's embedding. Residual
    blocks, and a channel with the standard deviation over the batch, as in StyleGAN2 (arXiv 1912.04958).

    Args:
        n_views: of the sinograms.
        n_bins: of the sinograms.
        channels: width of each level, finest first; each level halves rows and columns but the last.
        features: length of the feature vector.
        patch: sinograms are folded into ``patch x patch`` blocks before the first convolution.
        seam: views of the flipped continuation p(theta + pi, s) = p(theta, -s) that are shown at both ends, so that
            a break at the seam is seen.
    """

    def __init__(
        self,
        n_views: int,
        n_bins: int,
        channels: tuple[int, ...] = (64, 96, 128, 192),
        features: int = 192,
        patch: int = 2,
        seam: int = 8,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "n_views": n_views,
            "n_bins": n_bins,
            "channels": tuple(channels),
            "features": features,
            "patch": patch,
            "seam": seam,
        }
        self.patch, self.seam, self.multiple = patch, seam, patch * 2 ** (len(channels) - 1)
        rows, columns = -(-(n_views + 2 * seam) // self.multiple), -(-n_bins // self.multiple)
        self.conv_in = nn.Conv2d(patch**2, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(_Halving(a, b) for a, b in pairwise(channels))
        self.last = nn.Sequential(
            nn.Conv2d(channels[-1] + 1, channels[-1], 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(channels[-1] * rows * columns, features),
            nn.LeakyReLU(0.2),
        )
        self.score = nn.Linear(features, 1)
        self.tracer = nn.Embedding(len(TRACERS), features)
        self.region = nn.Embedding(len(REGIONS), features)

    def forward(self, sinogram: Tensor, prompt: Prompt) -> Tensor:
        """``(batch, 1, views, bins)`` in network range to ``(batch,)``, more for what looks real."""
        sinogram = moebius_pad(sinogram, self.seam)
        rows, columns = sinogram.shape[-2:]
        sinogram = F.pad(sinogram, (0, -columns % self.multiple, 0, -rows % self.multiple))
        hidden = F.leaky_relu(self.conv_in(F.pixel_unshuffle(sinogram, self.patch)), 0.2)
        for block in self.blocks:
            hidden = block(hidden)
        whole = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        spread = (whole.var(0, unbiased=False) + 1e-8).sqrt().mean()
        hidden = torch.cat([hidden, spread.to(hidden.dtype).expand(len(hidden), 1, *hidden.shape[-2:])], dim=1)
        features = self.last(hidden)
        words = self.tracer(prompt.tracer) + self.region(prompt.region)
        # float32 embeddings promote features that are shorter
        return self.score(features)[:, 0] + (words * features).sum(1) / math.sqrt(features.shape[1])


class _Halving(nn.Module):
    """A residual block that halves rows and columns."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.second = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        changed = F.leaky_relu(self.first(hidden), 0.2)
        # averaging first costs the second convolution a quarter
        changed = F.leaky_relu(self.second(F.avg_pool2d(changed, 2)), 0.2)
        return (changed + self.skip(F.avg_pool2d(hidden, 2))) / math.sqrt(2)

"""The generator of the GAN baseline: noise and a prompt become a sinogram in one pass.

After StyleGAN (Karras et al., arXiv 1812.04948 and 1912.04958), small: a style vector shifts and scales normalised
features at every level, fresh noise enters at every level, and every level adds to the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allpet.prompts import REGIONS, TRACERS, Prompt


class StyledBlock(nn.Module):
    """Convolution, noise, normalisation, shift and scale by a style.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        style_size: length of the style vector.
        noise_channels: noise maps that enter, each weighted per output channel.
    """

    def __init__(self, in_channels: int, out_channels: int, style_size: int, noise_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.noise = nn.Conv2d(noise_channels, out_channels, 1, bias=False)
        nn.init.zeros_(self.noise.weight)
        groups = next(n for n in (8, 4, 2, 1) if out_channels % n == 0)
        self.norm = nn.GroupNorm(groups, out_channels, affine=False)
        self.style = nn.Linear(style_size, 2 * out_channels)

    def forward(self, features: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        """``(batch, in_channels, rows, columns)`` to ``(batch, out_channels, rows, columns)``."""
        scale, shift = self.style(style)[:, :, None, None].chunk(2, dim=1)
        features = self.norm(self.conv(features) + self.noise(noise))
        return F.leaky_relu(features * (1 + scale) + shift, 0.2)


class Generator(nn.Module):
    """Make sinograms in network range from standard normal noise and prompts.

    Args:
        n_views: of the sinograms.
        n_bins: of the sinograms.
        channels: width of each level, coarsest first; each level but the first doubles rows and columns.
        latent_size: how many of the noise's numbers decide what is shown; the rest is texture.
        style_size: length of the style vector.
        patch: the last level's features are unfolded into ``patch x patch`` bins each.
    """

    def __init__(
        self,
        n_views: int,
        n_bins: int,
        channels: tuple[int, ...] = (192, 128, 96, 64),
        latent_size: int = 64,
        style_size: int = 128,
        patch: int = 2,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "n_views": n_views,
            "n_bins": n_bins,
            "channels": tuple(channels),
            "latent_size": latent_size,
            "style_size": style_size,
            "patch": patch,
        }
        self.shape, self.latent_size, self.patch = (n_views, n_bins), latent_size, patch
        factor = patch * 2 ** (len(channels) - 1)
        start = (-(-n_views // factor), -(-n_bins // factor))
        # As many maps as bins in a patch at the last level, where texture is independent from bin to bin.
        maps = [1] * (len(channels) - 1) + [patch**2]
        # (noise maps, rows, columns) for each of the two blocks of each level
        self.noise_shapes = [
            (count, start[0] * 2**level, start[1] * 2**level) for level, count in enumerate(maps) for _ in range(2)
        ]
        self.noise_size = latent_size + sum(count * rows * columns for count, rows, columns in self.noise_shapes)
        self.tracer = nn.Embedding(len(TRACERS), style_size)
        self.region = nn.Embedding(len(REGIONS), style_size)
        self.mapping = nn.Sequential(
            nn.Linear(latent_size + style_size, style_size),
            nn.LeakyReLU(0.2),
            nn.Linear(style_size, style_size),
            nn.LeakyReLU(0.2),
        )
        self.start = nn.Sequential(nn.Linear(style_size, channels[0] * start[0] * start[1]))
        self.start.append(nn.Unflatten(1, (channels[0], *start)))
        self.blocks, self.outputs = nn.ModuleList(), nn.ModuleList()
        before = channels[0]
        for level, width in enumerate(channels):
            self.blocks.append(StyledBlock(before, width, style_size, maps[level]))
            self.blocks.append(StyledBlock(width, width, style_size, maps[level]))
            self.outputs.append(nn.Conv2d(width, patch**2, 3, padding=1))
            before = width

    def forward(self, noise: Tensor, prompt: Prompt) -> Tensor:
        """Generate.

        Args:
            noise: standard normal, ``(batch, noise_size)``.
            prompt: tracer and region of each; index 0 leaves a half open.

        Returns:
            ``(batch, 1, views, bins)``, network range; like measured sinograms, slightly negative in places.
        """
        sizes = [count * rows * columns for count, rows, columns in self.noise_shapes]
        latent, *textures = noise.split([self.latent_size, *sizes], dim=1)
        words = self.tracer(prompt.tracer) + self.region(prompt.region)
        style = self.mapping(torch.cat([latent, words.to(latent.dtype)], dim=1))
        features = self.start(style)
        output: Tensor | None = None
        for level, to_output in enumerate(self.outputs):
            if level:
                features = F.interpolate(features, scale_factor=2.0, mode="nearest")
            for block in (2 * level, 2 * level + 1):
                texture = textures[block].view(len(noise), *self.noise_shapes[block])
                features = self.blocks[block](features, style, texture)
            added = to_output(features).float()
            # what coarser levels have drawn, twice as large
            output = added if output is None else added + F.interpolate(output, scale_factor=2.0, mode="bilinear")
        assert output is not None
        return F.pixel_shuffle(output, self.patch)[..., : self.shape[0], : self.shape[1]]

"""Features of sinograms for distances between sets, without any downloaded network.

Two kinds that fail differently: the project's own frozen encoder, which knows what the training slices look like, and
random convolutions, which know nothing and so cannot favour a model that was trained through that encoder. Feature
maps are pooled to the mean and the standard deviation over the blocks of a small grid. Both are deterministic.

Distances want features of comparable size: ``standardise`` takes mean and standard deviation from the real set.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from allpet.batches import unmasked_stack
from allpet.models.autoencoder import Autoencoder
from allpet.models.layers import moebius_pad
from allpet.randomness import keyed_generator


class Features(Protocol):
    """Maps sinograms ``(n, 1, views, bins)`` to features ``(n, d)``, sample by sample."""

    def __call__(self, sinogram: Tensor) -> Tensor:
        """Return the features."""
        ...


class EncoderFeatures:
    """Latents of a frozen encoder, pooled.

    The sinogram is encoded as the full and the negative channel of a stack without masks, in network range; rows of
    the latent that repeat the seam are cropped.

    Args:
        autoencoder: trained, best on training slices only; it is used in evaluation mode and comes back as it was.
        grid: blocks along views and along bins.
        batch_size: sinograms encoded at once.
    """

    def __init__(self, autoencoder: Autoencoder, grid: int = 4, batch_size: int = 64) -> None:
        self.autoencoder, self.grid, self.batch_size = autoencoder, grid, batch_size

    @torch.no_grad()
    def __call__(self, sinogram: Tensor) -> Tensor:
        """Return ``(n, 2 * latent channels * grid ** 2)``."""
        training = self.autoencoder.training
        self.autoencoder.eval()
        seam = self.autoencoder.seam // self.autoencoder.factor
        parts = []
        for batch in sinogram.split(self.batch_size):
            latent = self.autoencoder.encode_mean(unmasked_stack(self.autoencoder.scaling(batch)))
            parts.append(pool(latent[:, :, seam : latent.shape[2] - seam].float(), self.grid))
        self.autoencoder.train(training)
        return torch.cat(parts)


class RandomConvolutions:
    """Two layers of fixed random convolutions at several scales, pooled.

    The sinogram is continued past both ends of its half turn once, p(theta + pi, s) = p(theta, -s), and convolved
    without padding along the views: the maps of random kernels have no symmetry by which they could be continued.

    Args:
        scale: units of the data per unit of the features: one fixed number, so that totals count (``of``).
        seed: of the kernels.
        scales: views and bins are averaged over blocks of these sizes first.
        channels: kernels of the second layer at each scale.
        grid: blocks along views and along bins.
        batch_size: sinograms convolved at once.
    """

    def __init__(
        self,
        scale: float,
        seed: int = 0,
        scales: tuple[int, ...] = (1, 2, 4),
        channels: int = 8,
        grid: int = 4,
        batch_size: int = 64,
    ) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"The scale of the features is {scale}, but must be positive: are all sinograms zero?")
        self.scale, self.scales, self.grid, self.batch_size = scale, scales, grid, batch_size
        self.kernels = []
        for block in scales:
            generator = keyed_generator(seed, block, "random convolutions")
            # He's initialisation keeps the size of the signal through the rectifiers.
            self.kernels.append(
                (
                    torch.randn(2 * channels, 1, 5, 5, generator=generator) * math.sqrt(2 / 25),
                    torch.randn(channels, 2 * channels, 3, 3, generator=generator) * math.sqrt(2 / (9 * 2 * channels)),
                )
            )

    @classmethod
    def of(cls, real: Tensor, seed: int = 0) -> RandomConvolutions:
        """Take the scale from a real set, ``(n, 1, views, bins)``: its root mean square."""
        return cls(float(real.square().mean().sqrt()), seed)

    @torch.no_grad()
    def __call__(self, sinogram: Tensor) -> Tensor:
        """Return ``(n, 2 * scales * channels * grid ** 2)``."""
        return torch.cat([self._features(batch / self.scale) for batch in sinogram.split(self.batch_size)])

    def _features(self, sinogram: Tensor) -> Tensor:
        views, bins = sinogram.shape[-2:]
        parts = []
        for block, (first, second) in zip(self.scales, self.kernels, strict=True):
            # At least four views, so that three can be added at either end.
            size = (max(4, views // block), max(4, bins // block))
            coarse = moebius_pad(F.adaptive_avg_pool2d(sinogram, size), 3)
            maps = F.conv2d(coarse, first.to(coarse), padding=(0, 2)).relu()
            parts.append(pool(F.conv2d(maps, second.to(coarse), padding=(0, 1)).relu(), self.grid))
        return torch.cat(parts, dim=1)


def pool(maps: Tensor, grid: int) -> Tensor:
    """Return mean and standard deviation over the blocks of a grid, ``(n, c, rows, columns) -> (n, 2 c grid ** 2)``."""
    mean = F.adaptive_avg_pool2d(maps, grid)
    # About the block's own mean, which the difference of two large numbers would lose.
    centred = maps - F.interpolate(mean, maps.shape[-2:], mode="nearest")
    variance = F.adaptive_avg_pool2d(centred.square(), grid) - F.adaptive_avg_pool2d(centred, grid).square()
    return torch.cat([mean.flatten(1), variance.clamp_min(0).sqrt().flatten(1)], dim=1)


def standardise(real: Tensor, *others: Tensor) -> list[Tensor]:
    """Subtract the real set's mean and divide by its standard deviation, feature by feature.

    Features that hardly vary are divided by a tenth of the usual deviation instead: a kernel that fires on one slice in
    a hundred would otherwise speak louder than all others. Then asinh, which is invertible, tames the few slices forty
    times as bright as the rest (a full bladder), which would otherwise decide every distance.

    Args:
        real: features of the reference, ``(n, d)``, n >= 2.
        others: features of other sets, ``(m, d)``, treated the same.

    Returns:
        ``real`` and the others, ``(n, d)`` float32.

    Raises:
        ValueError: if there are fewer than 2 real samples or all of them are the same.
    """
    if len(real) < 2:
        raise ValueError(f"Features are standardised on at least 2 real samples; got {len(real)}.")
    mean, std = real.mean(0), real.std(0)
    usual = float(std.square().mean().sqrt())
    if not usual > 1e-6 * float(real.abs().max()):
        raise ValueError("All real samples have the same features; give slices that differ.")
    return [torch.asinh((x - mean) / std.clamp_min(0.1 * usual)).float() for x in (real, *others)]

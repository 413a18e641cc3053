"""Differentiable augmentation for GANs (Zhao et al., arXiv 2006.10738), with what keeps a sinogram a sinogram.

The discriminator sees real and generated sinograms through the same kind of random change, and the generator learns
through it. Image operations (shifts, stretches, colours) would make what no scanner measures; here the changes are the
exact symmetries of ``allpet.symmetry``, and rectangles that are cut out.

So that nothing of it leaks into what is generated, the unchanged sinogram must stay the most frequent one (Karras et
al., arXiv 2006.06676, section 2.2): rotations are small and each operation is left out at times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from allpet.augmentation import SymmetryAugmentation, SymmetryParameters
from allpet.geometry import ParallelBeam


class DiffAugmentParameters(NamedTuple):
    """What was done to the sinograms of a batch, in this order.

    Attributes:
        symmetry: gain, reflection, rotation by whole views, and movement.
        cutout: first view, first bin, views and bins of the rectangle set to zero, ``(batch, 4)`` int64.
    """

    symmetry: SymmetryParameters
    cutout: Tensor


class SinogramDiffAugment(nn.Module):
    """Random symmetries and cut-outs, differentiable in the sinogram.

    Args:
        rotation_deg: largest rotation to either side, in whole views.
        reflection: probability that left and right are exchanged; below one half, so that the side of the liver is
            still learned.
        translation_mm: largest movement in x and in y.
        gain: smallest and largest factor of the activity.
        cutout: largest share of the views, and of the bins, of a rectangle.
        probability: of each operation but the reflection, drawn independently for each sample.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        rotation_deg: float = 12.0,
        reflection: float = 0.2,
        translation_mm: float = 20.0,
        gain: tuple[float, float] = (0.7, 1.4),
        cutout: float = 0.3,
        probability: float = 0.7,
    ) -> None:
        super().__init__()
        for name, value, top in (
            ("rotation_deg", rotation_deg, 90.0),
            ("reflection", reflection, 0.5),
            ("cutout", cutout, 1.0),
            ("probability", probability, 1.0),
        ):
            if not 0 <= value <= top:
                raise ValueError(f"{name} is {value}, but must lie between 0 and {top:g}.")
        if not 0 < gain[0] <= gain[1]:
            raise ValueError(f"gain is {tuple(gain)}, but must be (smallest, largest) with 0 < smallest <= largest.")
        if translation_mm < 0:
            raise ValueError(f"translation_mm is {translation_mm}, but must not be negative.")
        self.rotation_deg, self.reflection, self.translation_mm = rotation_deg, reflection, translation_mm
        self.gain, self.cutout, self.probability = (float(gain[0]), float(gain[1])), cutout, probability

    def draw(self, geometry: ParallelBeam, generators: Sequence[torch.Generator]) -> DiffAugmentParameters:
        """Draw parameters, those of sample i from generator i, on the CPU."""
        u = torch.stack([torch.rand(13, generator=generator) for generator in generators])
        done = (u[:, 8:] < self.probability).float()
        low, high = map(math.log, self.gain)
        views = ((2 * u[:, 1] - 1) * (self.rotation_deg / 180 * geometry.n_views) * done[:, 1]).trunc()
        symmetry = SymmetryParameters(
            gain=((low + (high - low) * u[:, 0]) * done[:, 0]).exp(),
            dilation=torch.ones(len(u)),
            mirrored=u[:, 12] < self.reflection,
            angle_rad=views * (math.pi / geometry.n_views),
            translation_mm=(2 * u[:, 2:4] - 1) * (done[:, 2:3] * self.translation_mm),
            blur_mm=torch.zeros(len(u)),
        )
        whole = torch.tensor(geometry.sinogram_shape)
        size = (u[:, 4:6] * (self.cutout * done[:, 3:4]) * whole).round()
        first = (u[:, 6:8] * (whole - size + 1)).floor()
        return DiffAugmentParameters(symmetry, torch.cat([first, size], dim=1).long())

    def apply(  # type: ignore[override]
        self, sinogram: Tensor, geometry: ParallelBeam | None = None, parameters: DiffAugmentParameters | None = None
    ) -> Tensor:
        """Apply drawn parameters to ``(batch, 1, views, bins)``.

        With a function alone it does what ``nn.Module.apply`` does, so that models can hold augmentations.
        """
        if geometry is None or parameters is None:
            return super().apply(sinogram)  # type: ignore[arg-type, return-value]
        sinogram = SymmetryAugmentation(geometry).apply(sinogram, parameters.symmetry)
        view, bin_, views, bins = parameters.cutout.to(sinogram.device).unbind(1)
        row = torch.arange(geometry.n_views, device=sinogram.device) - view[:, None]
        column = torch.arange(geometry.n_bins, device=sinogram.device) - bin_[:, None]
        rows, columns = (row >= 0) & (row < views[:, None]), (column >= 0) & (column < bins[:, None])
        return sinogram.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def forward(self, sinogram: Tensor, geometry: ParallelBeam, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw and apply."""
        return self.apply(sinogram, geometry, self.draw(geometry, generators))

"""What any trained method has to beat: the input itself, and the best Gaussian that somebody who knows the truth picks.

Both have the face of ``LatentBridge.restore``. They are told what they know by ``fit``: one number per kind of target,
and one pair of widths for a whole set of slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allpet import symmetry
from allpet.conditions import Condition
from allpet.geometry import ParallelBeam
from allpet.metrics import psnr
from allpet.systems.paired import Restored

WIDTHS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Full widths at half maximum that the oracle chooses from, in bins and in views."""


class Identity:
    """The input itself, times the number that gives each kind of target its total.

    Attributes:
        gain: of each target, ``(targets,)``; 1 until ``fit``.
    """

    def __init__(self) -> None:
        self.gain = torch.ones(1)

    def fit(self, given: Tensor, truth: Tensor) -> Identity:
        """Take the gains of a set.

        Args:
            given: inputs, ``(slices, 1, views, bins)``.
            truth: expected targets, ``(slices, targets, views, bins)``.

        Raises:
            ValueError: if inputs and targets do not fit, or the inputs sum to nothing.
        """
        if given.shape[0] != truth.shape[0] or given.shape[2:] != truth.shape[2:] or given.shape[1] != 1:
            raise ValueError(
                f"Inputs have shape {tuple(given.shape)} and targets {tuple(truth.shape)}; expected (slices, 1, views, "
                "bins) and (slices, targets, views, bins)."
            )
        total = float(given.double().sum())
        if total <= 0:
            raise ValueError(f"The inputs sum to {total}, but must hold activity.")
        self.gain = (truth.double().sum((0, 2, 3)) / total).to(truth)
        return self

    def restore(
        self,
        given: Tensor,
        condition: Condition | None = None,
        seeds: Sequence[int] = (),
        sampling: Any = None,
        n_targets: int = 1,
    ) -> Restored:
        """Return the input as the only sample; condition, seeds and sampling change nothing."""
        return Restored.of(
            (self._cleaned(given) * self.gain.to(given)[:, None, None]).expand(-1, n_targets, -1, -1)[None]
        )

    def _cleaned(self, given: Tensor) -> Tensor:
        return given


class GaussOracle(Identity):
    """A Gaussian over bins and views, of the widths that give a set the highest mean PSNR against its own truth.

    No honest method may know the truth; one that does not beat this has learned nothing worth having.

    Args:
        geometry: of the sinograms.
        widths: to choose from, see ``WIDTHS``.

    Attributes:
        fwhm: the widths chosen, in bins and in views; 0 until ``fit``.
    """

    def __init__(self, geometry: ParallelBeam, widths: Sequence[float] = WIDTHS) -> None:
        super().__init__()
        self.geometry, self.widths = geometry, tuple(widths)
        self.fwhm = (0.0, 0.0)

    def fit(self, given: Tensor, truth: Tensor) -> GaussOracle:
        """Take the gains and choose the widths of a set; arguments as of ``Identity.fit``."""
        super().fit(given, truth)
        best = -math.inf
        gain, shown = self.gain[:, None, None], truth.flatten(1).any(1)
        for along_bins in self.widths:
            narrow = _blur_bins(given[shown], self.geometry, along_bins)
            for along_views in self.widths:
                result = (_blur_views(narrow, along_views) * gain).expand_as(truth[shown])
                score = float(psnr(result, truth[shown]).mean())
                if score > best:
                    best, self.fwhm = score, (along_bins, along_views)
        return self

    def _cleaned(self, given: Tensor) -> Tensor:
        return _blur_views(_blur_bins(given, self.geometry, self.fwhm[0]), self.fwhm[1])


def _blur_bins(sinogram: Tensor, geometry: ParallelBeam, fwhm: float) -> Tensor:
    return symmetry.blur(sinogram, geometry, fwhm * geometry.bin_mm) if fwhm else sinogram


def _blur_views(sinogram: Tensor, fwhm: float) -> Tensor:
    """Blur along the views, which go on over half a turn with the bins reversed."""
    if not fwhm:
        return sinogram
    cover = symmetry.extend(sinogram)
    frequency = torch.fft.rfftfreq(cover.shape[-2], device=cover.device)[:, None]  # cycles per view
    transfer = torch.exp(-2 * (math.pi * frequency * fwhm / math.sqrt(8 * math.log(2))).square())
    blurred = torch.fft.irfft(torch.fft.rfft(cover, dim=-2) * transfer, n=cover.shape[-2], dim=-2)
    return blurred[..., : sinogram.shape[-2], :]

"""What any trained method has to beat: the input, and the best filters that somebody who knows the truth picks.

All have the face of ``LatentBridge.restore``. They are told what they know by ``fit``: one number per kind of target,
and for a whole set of slices one pair of widths, or one reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from allpet import symmetry
from allpet.conditions import Condition
from allpet.consistency import quick_image
from allpet.geometry import ParallelBeam
from allpet.metrics import blur_image, psnr
from allpet.projector import Radon
from allpet.systems.paired import Restored

Choice = TypeVar("Choice")
WIDTHS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Full widths at half maximum that the oracle chooses from, in bins and in views."""
WIDTHS_MM = (0.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Full widths at half maximum of the filter after reconstruction that the oracle chooses from."""
ITERATIONS = (1, 2, 4)
"""Iterations of OSEM, 8 subsets each, that the oracle chooses from."""


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

    def _best(self, tried: Iterator[tuple[Choice, Tensor]], truth: Tensor) -> Choice:
        """Return the choice that, times the gains, has the highest mean PSNR."""
        gain = self.gain[:, None, None]
        return max(tried, key=lambda one: float(psnr((one[1] * gain).expand_as(truth), truth).mean()))[0]


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
        shown = truth.flatten(1).any(1)
        self.fwhm = self._best(self._tried(given[shown]), truth[shown])
        return self

    def _tried(self, given: Tensor) -> Iterator[tuple[tuple[float, float], Tensor]]:
        for along_bins in self.widths:
            narrow = _blur_bins(given, self.geometry, along_bins)
            for along_views in self.widths:
                yield (along_bins, along_views), _blur_views(narrow, along_views)

    def _cleaned(self, given: Tensor) -> Tensor:
        return _blur_views(_blur_bins(given, self.geometry, self.fwhm[0]), self.fwhm[1])


class OsemOracle(Identity):
    """The projection of an OSEM image after a Gaussian: of the iterations and width that give the highest mean PSNR.

    No honest method may know the truth. It is the bar for methods that begin at such a projection (``reproject``).

    Args:
        radon: the projector of the sinograms.
        iterations: to choose from, of 8 subsets, see ``allpet.consistency.reproject``.
        widths_mm: of the Gaussian, to choose from.

    Attributes:
        chosen: iterations and FWHM in mm; (1, 0) until ``fit``.
    """

    def __init__(
        self, radon: Radon, iterations: Sequence[int] = ITERATIONS, widths_mm: Sequence[float] = WIDTHS_MM
    ) -> None:
        super().__init__()
        self.radon, self.iterations, self.widths_mm = radon, tuple(iterations), tuple(widths_mm)
        self.chosen = (1, 0.0)

    def fit(self, given: Tensor, truth: Tensor) -> OsemOracle:
        """Take the gains and choose the reconstruction of a set; arguments as of ``Identity.fit``."""
        super().fit(given, truth)
        shown = truth.flatten(1).any(1)
        self.chosen = self._best(self._tried(given[shown]), truth[shown])
        return self

    def _tried(self, given: Tensor) -> Iterator[tuple[tuple[int, float], Tensor]]:
        for iterations in self.iterations:
            image = quick_image(given, self.radon, iterations)
            for width in self.widths_mm:
                yield (iterations, width), self.radon.project(blur_image(image, self.radon.geometry, width))

    def _cleaned(self, given: Tensor) -> Tensor:
        iterations, width = self.chosen
        image = quick_image(given, self.radon, iterations)
        return self.radon.project(blur_image(image, self.radon.geometry, width))


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

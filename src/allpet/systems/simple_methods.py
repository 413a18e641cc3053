"""What any trained method has to beat: the input, and the best filters that somebody who knows the truth picks.

All have the face of ``LatentBridge.restore``. They are told what they know by ``fit``: one number per kind of target,
and for each slice a pair of widths, or a reconstruction.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from allpet import symmetry
from allpet.conditions import Condition
from allpet.consistency import quick_image, reproject
from allpet.geometry import ParallelBeam
from allpet.metrics import blur_image, psnr
from allpet.projector import Radon
from allpet.systems.paired import Restored

Self = TypeVar("Self", bound="Identity")
Told = TypeVar("Told", bound="_Oracle")
WIDTHS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Full widths at half maximum that the oracle chooses from, in bins and in views."""
WIDTHS_MM = (0.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Full widths at half maximum of the filter after reconstruction that the oracle chooses from."""
ITERATIONS = (1, 2, 4)
"""Iterations of OSEM, 8 subsets each, that the oracle chooses from."""


class Identity:
    """The input itself, times the number that gives each target its total.

    Attributes:
        gain: of each target, ``(targets,)``; 1 until ``fit``.
        gains: the same for the tracers of input and targets, where ``fit`` was told them.
    """

    def __init__(self) -> None:
        self.gain = torch.ones(1)
        self.gains: dict[tuple[int, ...], Tensor] = {}

    def fit(self: Self, given: Tensor, truth: Tensor, condition: Condition | None = None) -> Self:
        """Take the gains of a set.

        Args:
            given: inputs, ``(slices, 1, views, bins)``.
            truth: expected targets, ``(slices, targets, views, bins)``.
            condition: of every target; None for one number whatever the tracers.

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
        self.gains = {}
        if condition is not None:
            kinds = _tracers(condition, truth.shape[1])
            for kind in set(kinds):
                rows = [row for row, its in enumerate(kinds) if its == kind]
                total = float(given[rows].double().sum())
                self.gains[kind] = (truth[rows].double().sum((0, 2, 3)) / max(total, 1e-12)).to(truth)
        return self

    def restore(
        self,
        given: Tensor,
        condition: Condition | None = None,
        seeds: Sequence[int] = (),
        sampling: Any = None,
        n_targets: int = 1,
    ) -> Restored:
        """Return the input as the only sample; seeds and sampling change nothing."""
        gain = self.gain.expand(len(given), -1)
        if self.gains and condition is not None:
            gain = torch.stack([self.gains.get(kind, self.gain) for kind in _tracers(condition, n_targets)])
        result = self._cleaned(given) * gain.to(given)[:, :, None, None]
        return Restored.of(result.expand(-1, n_targets, -1, -1)[None])

    def _cleaned(self, given: Tensor) -> Tensor:
        return given


class ReprojectedIdentity(Identity):
    """The projection of the input's image, where trained methods begin, times the number for its total.

    Args:
        radon: the projector of the sinograms.
        iterations: of OSEM, see ``allpet.consistency.reproject``; as many as trained methods take.
    """

    def __init__(self, radon: Radon, iterations: int = 2) -> None:
        super().__init__()
        self.radon, self.iterations = radon, iterations

    def _cleaned(self, given: Tensor) -> Tensor:
        return reproject(given, self.radon, self.iterations)


class _Oracle(Identity):
    """Cleans each slice of a set in the way that gives it the highest PSNR against its own truth.

    No honest method may know the truth; one that does not beat this has learned nothing worth having.

    Attributes:
        chosen: the way of each slice; empty until ``fit``.
    """

    def __init__(self, ways: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.ways = tuple(ways)
        self.chosen: list[tuple[float, float]] = []

    def fit(self: Told, given: Tensor, truth: Tensor, condition: Condition | None = None) -> Told:
        """Take the gains of a set and choose for each of its slices; arguments as of ``Identity.fit``."""
        super().fit(given, truth, condition)
        gain = self.gain[:, None, None]
        found = [psnr((self._clean(given, way) * gain).expand_as(truth), truth).nan_to_num(0.0) for way in self.ways]
        self.chosen = [self.ways[best] for best in torch.stack(found).argmax(0).tolist()]
        return self

    @abstractmethod
    def _clean(self, given: Tensor, way: tuple[float, float]) -> Tensor:
        """Return inputs, ``(slices, 1, views, bins)``, cleaned in one way."""

    def _cleaned(self, given: Tensor) -> Tensor:
        if len(given) != len(self.chosen):
            raise ValueError(f"There are {len(given)} slices, but the oracle was told the truth of {len(self.chosen)}.")
        result = torch.empty_like(given)
        for way in set(self.chosen):
            rows = [row for row, chosen in enumerate(self.chosen) if chosen == way]
            result[rows] = self._clean(given[rows], way)
        return result


class GaussOracle(_Oracle):
    """A Gaussian over bins and views, of the widths that give each slice the highest PSNR against its own truth.

    Args:
        geometry: of the sinograms.
        widths: full widths at half maximum to choose from, in bins and in views, see ``WIDTHS``.
    """

    def __init__(self, geometry: ParallelBeam, widths: Sequence[float] = WIDTHS) -> None:
        super().__init__(list(product(widths, widths)))
        self.geometry = geometry

    def _clean(self, given: Tensor, way: tuple[float, float]) -> Tensor:
        return _blur_views(_blur_bins(given, self.geometry, way[0]), way[1])


class OsemOracle(_Oracle):
    """The projection of an OSEM image after a Gaussian, of iterations and width as suit each slice best.

    It is the bar for methods that begin at such a projection (``reproject``).

    Args:
        radon: the projector of the sinograms.
        iterations: to choose from, of 8 subsets, see ``allpet.consistency.reproject``.
        widths_mm: of the Gaussian, to choose from.
    """

    def __init__(
        self, radon: Radon, iterations: Sequence[int] = ITERATIONS, widths_mm: Sequence[float] = WIDTHS_MM
    ) -> None:
        super().__init__(list(product(iterations, widths_mm)))
        self.radon = radon

    def _clean(self, given: Tensor, way: tuple[float, float]) -> Tensor:
        image = quick_image(given, self.radon, int(way[0]))
        return self.radon.project(blur_image(image, self.radon.geometry, way[1]))


def _tracers(condition: Condition, n_targets: int) -> list[tuple[int, ...]]:
    """Return the tracers of input and targets of each slice."""
    given, wanted = condition.prompt.tracer[::n_targets].tolist(), condition.target_tracer.view(-1, n_targets).tolist()
    return [(first, *others) for first, others in zip(given, wanted, strict=True)]


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

"""Is this a sinogram? Residuals of the conditions that every parallel-beam sinogram fulfils, and a filter.

The numbers are fractions, 0 for a perfect sinogram, one per sample. They hold for sinograms in linear,
attenuation-corrected units with the object inside the field of view; attenuation, logarithms and roots break them.
Poisson noise raises them (Helgason-Ludwig roughly as counts^-1/2: .012 at 1e7 counts, .037 at 1e6), so noisy
sinograms are to be compared with noisy ones. Small numbers alone mean little: any linear mixture of sinograms, blurred
or not, is consistent.

Functions take ``(batch, 1, views, bins)`` over half a turn unless they say otherwise, and are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from allpet.geometry import ParallelBeam
from allpet.neighbours import AlikeNeighbours
from allpet.projector import Radon
from allpet.reconstruction import osem
from allpet.symmetry import extend

Correction = Literal["bow_tie", "helgason_ludwig", "reproject"]
NEIGHBOURHOOD_MM = 24.0
"""Of the neighbours among which ``fit_measured`` shares what the counts say: chosen, with the number of updates, on
validation patients of the low-dose study (experiments/README.md)."""
_STEEPEST = 1.5  # power of an update; from 2 on they do not converge
_EMPTY = 1e-3  # of the largest value; where less is expected, the measured value is not heeded


def helgason_ludwig_residual(sinogram: Tensor, geometry: ParallelBeam, n_max: int = 20) -> Tensor:
    """Return the share of the radial moments that no image could have caused, ``(batch,)``.

    The n-th moment of the views, g_n(theta) = integral p(theta, s) U_n(s / R) ds with a polynomial U_n of degree n,
    contains only the harmonics cos(m theta), sin(m theta) with m <= n (Helgason 1965, Ludwig 1966). With P_n the
    projection onto them, the residual is sqrt(sum_n |g_n - P_n g_n|^2 / sum_n |g_n|^2). Chebyshev polynomials of the
    second kind keep the moments well conditioned; R is half the width of all bins.

    Args:
        sinogram: ``(batch, 1, views, bins)``.
        geometry: of the sinogram.
        n_max: highest moment; orders from the number of views on have no forbidden harmonics.
    """
    p = _single(sinogram, geometry)
    n_views, n_bins = p.shape[-2:]
    moments, _ = _chebyshev(n_bins, n_max)
    spectrum, forbidden = _moment_spectrum(p @ torch.from_numpy(moments).to(p))
    power = spectrum.real.square() + spectrum.imag.square()
    # Every harmonic but the first and the last stands for two.
    harmonic = torch.arange(n_views + 1, device=p.device)
    power = power * torch.where((harmonic == 0) | (harmonic == n_views), 1.0, 2.0)[:, None]
    return _ratio((power * forbidden).sum((1, 2)), power.sum((1, 2))).sqrt()


def helgason_ludwig_correction(sinogram: Tensor, n_max: int = 20) -> Tensor:
    """Remove from the first radial moments what no image could have caused.

    Afterwards every moment g_n, n <= n_max, of ``helgason_ludwig_residual`` has its allowed harmonics only: each view
    has the same sum and the centres of mass lie on a sinusoid. What is subtracted is the combination of
    sqrt(1 - (s / R)^2) U_k(s / R), k <= n_max, with the forbidden parts of the moments, which vanishes at the edge of
    the field of view and is of second order in the smoothness of the error. It is linear, a projection, and costs two
    small matrix products and an FFT along the views, so it serves as a layer of a network, too.

    Args:
        sinogram: ``(batch, channel, views, bins)`` over half a turn, linear units; channels are treated alike.
        n_max: highest moment, at most a quarter of the bins: polynomials of higher degree only see the edge.

    Returns:
        the same shape and units; faint sinograms may turn slightly negative.

    Raises:
        ValueError: if there are too few bins or views for ``n_max``.
    """
    n_views, n_bins = sinogram.shape[-2:]
    limit = min(n_bins // 4, n_views - 1)
    if not 0 <= n_max <= limit:
        raise ValueError(f"n_max is {n_max}, but must lie in 0..{limit} for {n_views} views of {n_bins} bins.")
    weights, dual = (torch.from_numpy(m).to(sinogram.device, torch.float32) for m in _chebyshev(n_bins, n_max))
    with torch.autocast(sinogram.device.type, enabled=False):
        p = sinogram.float().flatten(0, 1)
        spectrum, forbidden = _moment_spectrum(p @ weights)
        excess = torch.fft.irfft(spectrum * forbidden, n=2 * n_views, dim=1)[:, :n_views]
        return (p - excess @ dual.T).view_as(sinogram).to(sinogram.dtype)


@lru_cache(maxsize=16)
def _chebyshev(n_bins: int, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights that give the moments of order 0..n_max, and their dual, both ``(bins, n_max + 1)``, float64.

    The dual's k-th column has the k-th moment 1 and the others 0.
    """
    # NumPy: made under torch's fake tensors, the cache would keep matrices without contents.
    orders = np.arange(n_max + 1)
    # The integral of U_n over a bin is the difference of T_{n+1} / (n + 1) at its edges.
    edges = np.linspace(-1, 1, n_bins + 1)
    weights = np.diff(np.cos((orders + 1) * np.arccos(edges)[:, None]) / (orders + 1), axis=0)
    # sqrt(1 - s^2) U_n(s) = sin((n + 1) arccos(s)), orthogonal to U_m for m != n
    shapes = np.sin((orders + 1) * np.arccos((edges[1:] + edges[:-1]) / 2)[:, None])
    return weights, shapes @ np.linalg.inv(weights.T @ shapes)


def _moment_spectrum(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Angular spectrum of moments ``(batch, views, orders)`` over a full turn, and which harmonics are forbidden."""
    n_views, n_orders = moments.shape[1:]
    orders = torch.arange(n_orders, device=moments.device)
    # U_n has the parity of n, so the moments continue over the second half turn with the sign (-1)^n.
    sign = (1 - 2 * (orders % 2)).to(moments)
    spectrum = torch.fft.rfft(torch.cat([moments, sign * moments], dim=1), dim=1)
    return spectrum, torch.arange(n_views + 1, device=moments.device)[:, None] > orders


def half_turn_residual(sinogram: Tensor, geometry: ParallelBeam | None = None) -> Tensor:
    """Return how far p(theta + pi, s) = p(theta, -s) is violated, ``(batch,)``.

    Args:
        sinogram: ``(batch, 1, 2 * views, bins)`` over a full turn, where the relation is tested directly: the relative
            L2 distance |first half - flipped second half| / |both|. Or ``(batch, 1, views, bins)`` over half a turn,
            where it is tested at the seam: the last view and the flipped first one are predicted from their four
            neighbours on the continued sinogram (cubic interpolation), and the relative L2 error is returned.
        geometry: of the half turn; without it the sinogram is taken to cover half a turn.

    Raises:
        ValueError: if the shape is neither.
    """
    n_views = sinogram.shape[-2] if geometry is None else geometry.n_views
    if geometry is not None and sinogram.shape[1:] == (1, 2 * n_views, geometry.n_bins):
        first, second = sinogram[:, 0, :n_views], sinogram[:, 0, n_views:].flip(-1)
        return _ratio((first - second).square().sum((1, 2)), sinogram.square().sum((1, 2, 3))).sqrt()
    p = _single(sinogram, geometry)
    if n_views < 4:
        raise ValueError(f"The seam of a sinogram needs at least 4 views; got {n_views}.")
    # Three views on either side of the seam.
    rows = torch.cat([p[:, -3:], p[:, :3].flip(-1)], dim=1)
    predicted = (4 * (rows[:, 1:3] + rows[:, 3:5]) - rows[:, 0:2] - rows[:, 4:6]) / 6
    measured = rows[:, 2:4]
    return _ratio((measured - predicted).square().sum((1, 2)), measured.square().sum((1, 2))).sqrt()


def seam_jump(sinogram: Tensor) -> Tensor:
    """Return the step from the last view to the flipped first one over the typical step between views, ``(batch,)``.

    Steps are L2 norms, the typical one is their mean; about 1 for a sinogram that closes on itself. In contrast to the
    other numbers this is a ratio, not a fraction.
    """
    p = _single(sinogram)
    seam = (p[:, -1] - p[:, 0].flip(-1)).norm(dim=-1)
    return _ratio(seam, p.diff(dim=1).norm(dim=-1).mean(dim=1))


def row_sum_variation(sinogram: Tensor) -> Tensor:
    """Return the coefficient of variation of the views' sums, ``(batch,)``: every view sees the whole activity."""
    sums = _single(sinogram).sum(dim=-1)
    return _ratio(sums.std(dim=1, correction=0), sums.mean(dim=1).abs())


def centre_residual(sinogram: Tensor, geometry: ParallelBeam) -> Tensor:
    """Return how far the views' centres of mass lie from a sinusoid, ``(batch,)``.

    The centre of mass of an image at (x, y) projects to x cos(theta) + y sin(theta). The root mean square distance to
    the best such curve is given as a fraction of the number of bins.
    """
    p = _single(sinogram, geometry)
    bins = (geometry.bin_centers / geometry.bin_mm).to(p)
    centre = _ratio(p @ bins, p.sum(dim=-1))
    angles = geometry.angles.to(p)
    # Over half a turn cos and sin are orthogonal with norm sqrt(views / 2).
    basis = torch.stack([angles.cos(), angles.sin()]) * math.sqrt(2 / geometry.n_views)
    residual = centre - (centre @ basis.T) @ basis
    return residual.square().mean(dim=1).sqrt() / geometry.n_bins


def bow_tie_filter(
    sinogram: Tensor, geometry: ParallelBeam, radius_mm: float | None = None, margin: float = 4.0
) -> Tensor:
    """Remove what no object within a radius can contribute to a sinogram.

    The two-dimensional spectrum of a sinogram over a full turn is confined to |k| <= R |w|, with k the angular harmonic
    and w the radial frequency in rad/mm (Rattey and Lindgren 1981). Everything outside is noise or inconsistency: from
    a quarter (64 x 80) to nearly half (180 x 128) of the power of white noise. It removes noise that belongs to a
    measurement; apply it to sinograms that are meant to be expected ones.

    Args:
        sinogram: ``(batch, 1, views, bins)``.
        geometry: of the sinogram.
        radius_mm: R, radius about the axis of rotation that holds the object; by default half the width of all bins.
        margin: harmonics kept beyond the bow tie, whose edge is not sharp. 4 leaves all but 1e-3 of a point at 0.85 R
            and all but 3e-4 of a body; 0 costs 8 % and 1 %.

    Returns:
        The filtered sinogram, same shape and units; its negative values are kept.
    """
    p = _single(sinogram, geometry)
    n_views, n_bins = p.shape[-2:]
    radius = n_bins * geometry.bin_mm / 2 if radius_mm is None else radius_mm
    harmonic = torch.fft.fftfreq(2 * n_views, 1 / (2 * n_views), dtype=torch.float64).abs()[:, None]
    frequency = 2 * math.pi * torch.fft.rfftfreq(2 * n_bins, geometry.bin_mm, dtype=torch.float64)
    inside = (harmonic <= radius * frequency + margin).to(p)
    # The bins are padded with as many zeros, so that nothing wraps around.
    shape = (2 * n_views, 2 * n_bins)
    filtered = torch.fft.irfft2(torch.fft.rfft2(extend(p), s=shape) * inside, s=shape)
    return filtered[:, None, :n_views, :n_bins]


def reproject(sinogram: Tensor, radon: Radon, iterations: int = 4, subsets: int = 8) -> Tensor:
    """Replace sinograms by the projections of their images: wholly consistent, and never negative.

    The image is that of a few iterations of OSEM, which keep the total and do not fit what no image can cause. What the
    image grid and so few iterations cannot hold, the finest detail, is lost.

    Args:
        sinogram: ``(batch, 1, views, bins)``; negative values count as zero.
        radon: the projector of its geometry.
        iterations: of OSEM.
        subsets: of OSEM; the next smaller number that divides the views is taken, with as many more iterations.

    Returns:
        the same shape and units.
    """
    return radon.project(quick_image(sinogram, radon, iterations, subsets))


def quick_image(sinogram: Tensor, radon: Radon, iterations: int = 4, subsets: int = 8) -> Tensor:
    """Return the image that ``reproject`` projects; arguments as there.

    Returns:
        ``(batch, 1, rows, columns)``, in the sinogram's units per mm.
    """
    n_views = radon.geometry.n_views
    dividing = next(n for n in range(min(subsets, n_views), 0, -1) if n_views % n == 0)
    updates = iterations * min(subsets, n_views)
    return osem(radon, sinogram.clamp(min=0), math.ceil(updates / dividing), dividing)


class MeasuredFit:
    """Expected sinograms on their way to what was measured of their sum, update by update; see ``fit_measured``.

    Kernelised expectation maximisation (Wang and Qi 2015, whose ``x_k`` is 1). Images are ``x_k K_k a_k``: those of the
    results (``quick_image``, which keep no finer detail than few iterations of OSEM do) times the means of coefficients
    over neighbours that look alike in them (``AlikeNeighbours``). The coefficients begin at 1:
    ``a_k <- a_k max(K_k' (x_k R' (m y / (m sum_j R (x_j K_j a_j) + b))), 0) / K_k' (x_k R' m)``, m and b the
    *multiplicative* and *additive* terms, the factor to the power of the attention (over-relaxed EM, Lewitt and
    Muehllehner 1986; from 2 on it no longer converges, so that powers above 1.5 are taken in several steps, each with
    factors of its own).

    Args:
        result: of each sinogram its targets, ``(batch, targets, views, bins)``; negative values count as zero.
        measured: m times their sum and b, with noise, in the same units, ``(batch, 1, views, bins)``.
        radon: the projector of their geometry.
        attention: of each pixel, ``(batch or 1, 1, rows, columns)``, finite and not negative; where it is 2, an update
            counts double, and pixels of half or twice the attention do not look alike. None for 1.
        neighbourhood_mm: full width at half maximum of the neighbourhood; 0 for every pixel alone.

    Attributes:
        sinogram: the projections of the images, same shape and units as *result*, never negative.

    Raises:
        ValueError: if the shapes do not fit or the neighbourhood is negative.
    """

    def __init__(
        self,
        result: Tensor,
        measured: Tensor,
        radon: Radon,
        attention: Tensor | None = None,
        neighbourhood_mm: float = NEIGHBOURHOOD_MM,
    ) -> None:
        if not 0 <= neighbourhood_mm < math.inf:
            raise ValueError(f"neighbourhood_mm is {neighbourhood_mm}, but must be finite and not negative.")
        batch, n_targets = result.shape[:2]
        if measured.shape != (batch, 1, *radon.sinogram_shape) or result.shape[2:] != measured.shape[2:]:
            raise ValueError(
                f"The shapes are {tuple(result.shape)} and {tuple(measured.shape)}; expected "
                f"(batch, targets, *{radon.sinogram_shape}) and (batch, 1, *{radon.sinogram_shape})."
            )
        self.measured, self.radon, self._shape = measured, radon, result.shape
        self._start = quick_image(result.flatten(0, 1)[:, None], radon)
        self._mean, self._spread = _among_alike(self._start, attention, neighbourhood_mm, radon.geometry.pixel_mm)
        self._coefficient = torch.ones_like(self._start)
        # Bins that are all but empty say nothing: a ratio to next to nothing is noise.
        self._empty = _EMPTY * result.sum(1, keepdim=True).amax((2, 3), keepdim=True)
        self._powers: list[Tensor | None] = [None]
        if attention is not None:
            parts = max(1, math.ceil(float(attention.amax()) / _STEEPEST))
            whole = attention.expand(batch, -1, -1, -1).repeat_interleave(n_targets, 0)
            self._powers = [(whole - _STEEPEST * part).clamp(0, _STEEPEST) for part in range(parts)]
        self._ones = torch.ones_like(measured)
        self.sinogram = radon.project(self._start).view(result.shape)

    @cached_property
    def _usual(self) -> Tensor:
        return self._spread(self._start * self.radon.backproject(self._ones[:1]))  # the same for all

    def update(self, multiplicative: Tensor | None = None, additive: Tensor | None = None) -> None:
        """Bring the sinograms nearer, with all views at once.

        Args:
            multiplicative: what was measured of a sinogram's 1, as attenuation factors, not negative, in the shape of
                what was measured; None for 1, where it was corrected.
            additive: what was measured besides, as scatter, not negative, likewise; None for 0.
        """
        weight = self._ones if multiplicative is None else multiplicative
        besides = torch.zeros_like(self._ones) if additive is None else additive
        seen = self._usual if multiplicative is None else self._explaining(weight)
        for power in self._powers:
            total = self.sinogram.sum(1, keepdim=True)
            expected = weight * total + besides
            shown = (total > self._empty) & (expected > 0)
            ratio = torch.where(shown, self.measured / torch.where(shown, expected, 1), 1)
            factor = self._explaining(weight * ratio).clamp(min=0) / torch.where(seen > 0, seen, 1)
            self._coefficient = self._coefficient * (factor if power is None else factor**power)
            image = self._start * self._mean(self._coefficient)
            self.sinogram = self.radon.project(image).view(self._shape)

    @property
    def gain(self) -> Tensor:
        """What the images have been multiplied by, ``(batch * targets, 1, rows, columns)``; 1 where they are empty."""
        return torch.where(self._start > 0, self._mean(self._coefficient), 1)

    def updated(self, updates: int) -> MeasuredFit:
        """Update towards what needs no further terms, and return itself.

        Args:
            updates: how many.

        Raises:
            ValueError: if it is less than 1.
        """
        if updates < 1:
            raise ValueError(f"updates is {updates}, but must be at least 1.")
        for _ in range(updates):
            self.update()
        return self

    def _explaining(self, bins: Tensor) -> Tensor:
        return self._spread(self._start * self.radon.backproject(bins).repeat_interleave(self._shape[1], 0))


def fit_measured(
    result: Tensor,
    measured: Tensor,
    radon: Radon,
    updates: int,
    attention: Tensor | None = None,
    neighbourhood_mm: float = NEIGHBOURHOOD_MM,
) -> Tensor:
    """Bring expected sinograms nearer to what was measured of their sum, and make them wholly consistent.

    By updates of ``MeasuredFit``. Few correct what many counts agree on, as the uptake of a lesion that a network has
    drawn too faint, and leave to the network what the counts do not say; many fit the noise, the later the wider the
    neighbourhood. Without one this is the EM of Shepp and Vardi (1982). What was measured is corrected, so that this is
    no longer the likelihood of counts: bins weigh as if their variance went with the corrected activity, and negative
    values, which corrections for randoms and scatter leave, count as they are, for cut they would add activity where
    there is little. Sinograms that are not corrected for attenuation are no projections: for them there is
    ``allpet.attenuation.fit_uncorrected``.

    Args:
        result: of each sinogram its targets, ``(batch, targets, views, bins)``; negative values count as zero.
        measured: their sum, with noise, corrected and in the same units, ``(batch, 1, views, bins)``.
        radon: the projector of their geometry.
        updates: how many, each with all views.
        attention: see ``MeasuredFit``.
        neighbourhood_mm: see there.

    Returns:
        the projections of the images, same shape and units as *result*, never negative.

    Raises:
        ValueError: if the shapes do not fit, ``updates`` is less than 1 or the neighbourhood negative.
    """
    return MeasuredFit(result, measured, radon, attention, neighbourhood_mm).updated(updates).sinogram


def carry_over(
    result: Tensor,
    reference: Tensor,
    measured: Tensor,
    radon: Radon,
    updates: int,
    attention: Tensor | None = None,
    neighbourhood_mm: float = NEIGHBOURHOOD_MM,
) -> Tensor:
    """Correct expected sinograms as a fit to another scan of the same patient corrects what a model holds of that scan.

    What latents and few iterations of OSEM cannot hold, results lack as the *reference* does, and what that lacks the
    measurement says. So ``fit_measured`` brings the reference nearer to it, and what its image is multiplied by, the
    result's image is, too. Where the two scans differ, as by movement, that is as wrong as they are apart.

    Args:
        result: ``(batch, 1, views, bins)``; negative values count as zero.
        reference: what the model that gave the result makes of the measured scan itself, the same shape.
        measured: the scan, with noise, corrected and in the units of the reference, likewise.
        radon: the projector of their geometry.
        updates: see ``fit_measured``.
        attention: see ``MeasuredFit``.
        neighbourhood_mm: see there; likeness is that of the reference.

    Returns:
        the projections of the images, same shape and units as *result*, never negative.

    Raises:
        ValueError: if the shapes do not fit, ``updates`` is less than 1 or the neighbourhood negative.
    """
    if result.shape != reference.shape:
        raise ValueError(
            f"The result's shape is {tuple(result.shape)} and the reference's {tuple(reference.shape)}; they must be "
            "the same."
        )
    fit = MeasuredFit(reference, measured, radon, attention, neighbourhood_mm).updated(updates)
    return radon.project(quick_image(result, radon) * fit.gain)


def _among_alike(
    image: Tensor, attention: Tensor | None, fwhm_mm: float, pixel_mm: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the mean over neighbours that look alike in image and attention, and its adjoint."""
    if not fwhm_mm:
        return (lambda values: values), (lambda values: values)
    looks = [image]
    if attention is not None:
        looks.append(attention.to(image).repeat_interleave(len(image) // len(attention), 0))
    alike = AlikeNeighbours(torch.cat(looks, dim=1), fwhm_mm, pixel_mm)
    return alike.mean, alike.spread


def make_consistent(sinogram: Tensor, radon: Radon, method: Correction) -> Tensor:
    """Correct sinograms that are meant to be expected ones.

    Args:
        sinogram: ``(batch, 1, views, bins)``.
        radon: the projector of its geometry.
        method: "bow_tie" (``bow_tie_filter``), "helgason_ludwig" (``helgason_ludwig_correction``) or "reproject"; what
            turns negative is set to zero.

    Raises:
        ValueError: if the method is unknown.
    """
    if method == "bow_tie":
        return bow_tie_filter(sinogram, radon.geometry).clamp(min=0)
    if method == "helgason_ludwig":
        n_max = min(20, radon.geometry.n_bins // 4, radon.geometry.n_views - 1)
        return helgason_ludwig_correction(sinogram, n_max).clamp(min=0)
    if method == "reproject":
        return reproject(sinogram, radon)
    raise ValueError(f"consistency is {method!r}, but must be one of {', '.join(get_args(Correction))}.")


def consistency_numbers(sinogram: Tensor, geometry: ParallelBeam) -> dict[str, Tensor]:
    """Return every consistency number of a batch over half a turn, each ``(batch,)``.

    Keys: ``row_sum_cv``, ``centre_residual``, ``hl_residual``, ``seam_jump``.
    """
    return {
        "row_sum_cv": row_sum_variation(sinogram),
        "centre_residual": centre_residual(sinogram, geometry),
        "hl_residual": helgason_ludwig_residual(sinogram, geometry),
        "seam_jump": seam_jump(sinogram),
    }


def _single(sinogram: Tensor, geometry: ParallelBeam | None = None) -> Tensor:
    """Return ``(batch, views, bins)`` after a check of the shape."""
    expected = ("views", "bins") if geometry is None else geometry.sinogram_shape
    wrong = sinogram.ndim != 4 or sinogram.shape[1] != 1
    if wrong or (geometry is not None and tuple(sinogram.shape[2:]) != expected):
        raise ValueError(
            f"The sinogram's shape is {tuple(sinogram.shape)}, but must be (batch, 1, {expected[0]}, {expected[1]})."
        )
    return sinogram[:, 0]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 / 0 = 0: an empty sinogram is consistent."""
    return numerator / torch.where(denominator == 0, torch.ones_like(denominator), denominator)

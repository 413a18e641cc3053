"""Exact symmetries of parallel-beam sinograms.

Moving, turning, mirroring, scaling or blurring an image does something just as simple to its sinogram, so sinograms can
be augmented without reconstructing them. With p(theta, s) the sinogram of f:

===========================  ============================================================
image                        sinogram
===========================  ============================================================
turned by phi                p(theta - phi, s), continued by p(theta + pi, s) = p(theta, -s)
turned by pi                 p(theta, -s)
mirrored, x -> -x            p(pi - theta, s)
mirrored, y -> -y            p(-theta, s)
moved by (tx, ty)            p(theta, s - tx cos(theta) - ty sin(theta))
dilated by c, f(x / c)       c p(theta, s / c)
blurred by a round Gaussian  every view blurred by the same Gaussian
===========================  ============================================================

The continuation makes a sinogram over half a turn a function on a Moebius strip; ``extend`` gives its *double cover*,
which is periodic over a full turn. Angles are treated there, by Fourier series. Along the bins a sinogram is taken to
be zero beyond its ends and band-limited; an object must stay inside the field of view for that to hold.

Operations that permute bins keep independent Poisson counts what they are, and so does mixing two patients by thinning
their counts (``PRESERVES_POISSON``). A gain, the factor of the activity, multiplies the variance of noise by its
square, that of counts goes with the factor itself. The others mix neighbouring bins. Apply these to expected sinograms,
or before noise is added.

All functions take ``(batch, channel, views, bins)``, keep its shape and units, and are differentiable, but for the
random ``thinning_mixup``. A parameter is one number for the whole batch or a tensor ``(batch,)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from allpet.geometry import ParallelBeam

PRESERVES_POISSON = {
    "roll_views": True,
    "half_turn": True,
    "reflect_x": True,
    "reflect_y": True,
    "rotate": False,
    "translate": False,
    "dilate": False,
    "blur": False,
    "gain": False,
    "resample": False,
    "thinning_mixup": True,
}
"""Whether Poisson counts are still independent Poisson counts after a function of this module, or a plain factor."""


def extend(sinogram: Tensor) -> Tensor:
    """Continue a sinogram to a full turn, its double cover: ``(..., views, bins) -> (..., 2 * views, bins)``."""
    return torch.cat([sinogram, sinogram.flip(-1)], dim=-2)


def half_turn(sinogram: Tensor) -> Tensor:
    """Turn the image by pi: flip the bins."""
    return sinogram.flip(-1)


def reflect_x(sinogram: Tensor) -> Tensor:
    """Mirror the image left to right, x -> -x: p(pi - theta, s)."""
    return torch.cat([sinogram[..., :1, :].flip(-1), sinogram[..., 1:, :].flip(-2)], dim=-2)


def reflect_y(sinogram: Tensor) -> Tensor:
    """Mirror the image top to bottom, y -> -y: p(-theta, s)."""
    return reflect_x(sinogram).flip(-1)


def roll_views(sinogram: Tensor, views: Tensor | int) -> Tensor:
    """Turn the image counter-clockwise by a whole number of views: a permutation.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        views: whole number, or ``(batch,)`` int64; one view is ``pi / n_views``.
    """
    return strip(sinogram, -torch.as_tensor(views), sinogram.shape[-2])


def strip(sinogram: Tensor, start: Tensor | int, views: int) -> Tensor:
    """Cut out neighbouring views, all bins of each: a strip of the Moebius strip, which may lie across its seam.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        start: first view, any whole number, or ``(batch,)`` int64; view n_views + k is view k with its bins flipped.
        views: how many.

    Returns:
        ``(batch, channel, views asked for, bins)``.
    """
    first = torch.as_tensor(start, device=sinogram.device).expand(len(sinogram))
    source = (first[:, None] + torch.arange(views, device=sinogram.device)) % (2 * sinogram.shape[-2])
    sample = torch.arange(len(sinogram), device=sinogram.device)[:, None]
    return extend(sinogram).transpose(1, 2)[sample, source].transpose(1, 2)


def rotate(sinogram: Tensor, angle_rad: Tensor | float) -> Tensor:
    """Turn the image counter-clockwise by any angle: p(theta - phi, s), by Fourier series over the double cover.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        angle_rad: angle in radians, a number or ``(batch,)``.
    """
    n_views = sinogram.shape[-2]
    angle = _per_sample(angle_rad, sinogram)
    harmonic = torch.arange(n_views + 1, device=sinogram.device, dtype=sinogram.dtype)[:, None]
    phase = torch.polar(torch.ones_like(harmonic * angle), -harmonic * angle)
    spectrum = torch.fft.rfft(extend(sinogram), dim=-2)
    return torch.fft.irfft(spectrum * phase, n=2 * n_views, dim=-2)[..., :n_views, :]


def translate(sinogram: Tensor, geometry: ParallelBeam, tx_mm: Tensor | float, ty_mm: Tensor | float) -> Tensor:
    """Move the image: each view moves by tx cos(theta) + ty sin(theta), by a phase in Fourier space.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        geometry: of the sinogram.
        tx_mm: distance to the right in mm, a number or ``(batch,)``.
        ty_mm: distance upwards in mm, a number or ``(batch,)``.
    """
    _check(sinogram, geometry)
    angles = geometry.angles.to(sinogram)[:, None]
    shift = _per_sample(tx_mm, sinogram) * angles.cos() + _per_sample(ty_mm, sinogram) * angles.sin()
    cycles = _radial_frequencies(geometry).to(sinogram) * shift
    return _filter_bins(sinogram, torch.polar(torch.ones_like(cycles), -2 * math.pi * cycles))


def dilate(sinogram: Tensor, geometry: ParallelBeam, factor: Tensor | float) -> Tensor:
    """Dilate the image about the axis of rotation: c p(theta, s / c), by band-limited interpolation.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        geometry: of the sinogram.
        factor: c > 0, a number or ``(batch,)``; more than 1 enlarges.
    """
    _check(sinogram, geometry)
    c = _per_sample(factor, sinogram)[:, 0]
    bins = (geometry.bin_centers / geometry.bin_mm).to(sinogram)
    # Shrinking raises every frequency; what would pass the Nyquist frequency is left out.
    band = c.clamp(max=1)
    weights = c * band * torch.sinc(band * (bins[:, None] / c - bins))
    return torch.einsum("bcvk,bjk->bcvj", sinogram, weights)


def blur(sinogram: Tensor, geometry: ParallelBeam, fwhm_mm: Tensor | float) -> Tensor:
    """Blur the image by a round Gaussian.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        geometry: of the sinogram.
        fwhm_mm: full width at half maximum in mm, a number or ``(batch,)``.
    """
    _check(sinogram, geometry)
    sigma = _per_sample(fwhm_mm, sinogram) / math.sqrt(8 * math.log(2))
    return _filter_bins(
        sinogram, torch.exp(-2 * (math.pi * sigma * _radial_frequencies(geometry).to(sinogram)).square())
    )


def thinning_mixup(
    first: Tensor, second: Tensor, share: Tensor | float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Mix counts of two patients so that Poisson noise stays Poisson noise: Bin(first, a) + Bin(second, 1 - a).

    Of Poisson counts with means l1 and l2 it is Poisson with mean a l1 + (1 - a) l2; the plain mean of counts, with
    weights a and 1 - a, would have less noise than that. It is exact for counts that nothing was subtracted from.

    Args:
        first: counts, ``(batch, channel, views, bins)``.
        second: counts, same shape.
        share: a in [0, 1], a number or ``(batch,)``.
        generators: one CPU generator per sample.

    Returns:
        counts of the mixed patients, same shape.

    Raises:
        ValueError: if the values are no counts, or a share or the shapes are impossible.
    """
    if first.shape != second.shape or len(generators) != len(first):
        raise ValueError(
            f"The shapes are {tuple(first.shape)} and {tuple(second.shape)}, with {len(generators)} generators: give "
            "two of one shape, and a generator per sample."
        )
    a = _per_sample(share, first).cpu()
    if not bool(((a >= 0) & (a <= 1)).all()):
        raise ValueError(f"share is {share}, but must lie in [0, 1].")
    for counts in (first, second):
        if not bool(((counts >= 0) & (counts == counts.round())).all()):
            raise ValueError(
                "Thinning needs counts, whole numbers from 0 on: mix what is corrected plainly (kind: plain)."
            )
    mixed = [
        torch.binomial(x, part.expand_as(x), generator) + torch.binomial(y, (1 - part).expand_as(y), generator)
        for x, y, part, generator in zip(first.cpu(), second.cpu(), a, generators, strict=True)
    ]
    return torch.stack(mixed).to(first)


def resample(sinogram: Tensor, source: ParallelBeam, target: ParallelBeam) -> Tensor:
    """Resample a sinogram to the views and bins of another geometry.

    The angle is interpolated by the Fourier series over the double cover; that is exact as long as the source has
    enough views. Along the bins the sinogram is band-limited to what both geometries can carry, and averages over the
    source's bins become averages over the target's. Line integrals stay line integrals: the sum of a view times the
    bin's width is kept if the target covers the object.

    Args:
        sinogram: ``(batch, channel, views, bins)`` of ``source``.
        source: geometry of the sinogram.
        target: geometry wanted.

    Returns:
        ``(batch, channel, views, bins)`` of ``target``.
    """
    _check(sinogram, source)
    if source.n_views != target.n_views:
        sinogram = _angular_weights(source.n_views, target.n_views).to(sinogram) @ extend(sinogram)
    if (source.n_bins, source.bin_mm) != (target.n_bins, target.bin_mm):
        sinogram = sinogram @ _radial_weights(source.n_bins, source.bin_mm, target.n_bins, target.bin_mm).to(sinogram)
    return sinogram


@lru_cache(maxsize=16)
def _angular_weights(n_source: int, n_target: int) -> Tensor:
    """Trigonometric interpolation from the double cover to other views, ``(target views, 2 * source views)``.

    The interpolation kernel of N = 2 n equally spaced samples is sin(N x / 2) / (N tan(x / 2)).
    """
    n = 2 * n_source
    x = torch.arange(n_target, dtype=torch.float64)[:, None] * (math.pi / n_target) - torch.arange(
        n, dtype=torch.float64
    ) * (math.pi / n_source)
    kernel = torch.sin(n * x / 2) / (n * torch.tan(x / 2))
    return torch.where(torch.sin(x / 2).abs() < 1e-9, 1.0, kernel)


@lru_cache(maxsize=16)
def _radial_weights(n_source: int, source_mm: float, n_target: int, target_mm: float) -> Tensor:
    """Band-limited interpolation between bins, ``(source bins, target bins)``.

    weight(j, k) = integral over |f| < 1 / (2 max width) of H(f) cos(2 pi f (s_j - s_k)) df * source width, with
    H(f) = sinc(f target width) / sinc(f source width) replacing one bin's average by the other's.
    """
    source = (torch.arange(n_source, dtype=torch.float64) - (n_source - 1) / 2) * source_mm
    target = (torch.arange(n_target, dtype=torch.float64) - (n_target - 1) / 2) * target_mm
    limit = 0.5 / max(source_mm, target_mm)
    # Midpoint rule; its period 1 / step exceeds the distance of any two bins four times.
    reach = 4 * (n_source * source_mm + n_target * target_mm)
    n = math.ceil(limit * reach)
    frequency = (torch.arange(n, dtype=torch.float64) + 0.5) * (limit / n)
    transfer = torch.sinc(frequency * target_mm) / torch.sinc(frequency * source_mm) * (2 * limit / n * source_mm)
    a, b = (2 * math.pi * s[:, None] * frequency for s in (source, target))
    return (a.cos() * transfer) @ b.cos().T + (a.sin() * transfer) @ b.sin().T


def _radial_frequencies(geometry: ParallelBeam) -> Tensor:
    """Frequencies along the zero-padded bins in cycles per mm."""
    return torch.fft.rfftfreq(2 * geometry.n_bins, geometry.bin_mm, dtype=torch.float64)


def _filter_bins(sinogram: Tensor, transfer: Tensor) -> Tensor:
    """Multiply the spectrum of every view, zero-padded to twice its bins so that nothing wraps around."""
    n_bins = sinogram.shape[-1]
    spectrum = torch.fft.rfft(sinogram, n=2 * n_bins, dim=-1)
    return torch.fft.irfft(spectrum * transfer, n=2 * n_bins, dim=-1)[..., :n_bins]


def _per_sample(value: Tensor | float, sinogram: Tensor) -> Tensor:
    """Shape a number or ``(batch,)`` to multiply ``(batch, channel, views, bins)``."""
    value = torch.as_tensor(value, dtype=sinogram.dtype, device=sinogram.device)
    if value.ndim and value.shape != (len(sinogram),):
        raise ValueError(f"A parameter has shape {tuple(value.shape)}, but must be one number or ({len(sinogram)},).")
    return value.expand(len(sinogram))[:, None, None, None]


def _check(sinogram: Tensor, geometry: ParallelBeam) -> None:
    if sinogram.ndim != 4 or tuple(sinogram.shape[-2:]) != geometry.sinogram_shape:
        raise ValueError(
            f"The sinogram's shape is {tuple(sinogram.shape)}, but {geometry} needs (batch, channel, "
            f"{geometry.n_views}, {geometry.n_bins})."
        )

"""Power spectra and histograms of two sets: how sharp are samples, how much activity do they hold?

A blurred set keeps every consistency condition and loses power at short periods. Spectra are geometric means over a
set (``typical``): of images by filtered backprojection over rings of frequencies, of sinograms along the bins and along
the angle. A period is one cycle of a wave, mm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allpet.geometry import ParallelBeam


def bin_spectrum(sinogram: Tensor, geometry: ParallelBeam) -> tuple[Tensor, Tensor]:
    """Return the power along the bins, averaged over views.

    Args:
        sinogram: ``(batch, 1, views, bins)``.
        geometry: of the sinogram.

    Returns:
        Frequencies in cycles per mm from one period per view upwards, ``(bins // 2,)``, and the power of each sample,
        ``(batch, bins // 2)``, as |FFT|^2 / bins.
    """
    power = torch.fft.rfft(sinogram[:, 0]).abs().square().mean(1) / geometry.n_bins
    frequency = torch.fft.rfftfreq(geometry.n_bins, geometry.bin_mm)
    return frequency[1:].to(power), power[:, 1:]


def angular_spectrum(sinogram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the power of the angular harmonics over a full turn, averaged over bins.

    The half turn is continued by p(theta + pi, s) = p(theta, -s); a seam that does not fit shows as power at high
    harmonics.

    Args:
        sinogram: ``(batch, 1, views, bins)``.

    Returns:
        Harmonics in cycles per turn, ``(views,)`` from 1 on, and the power of each sample, ``(batch, views)``, as
        |FFT|^2 / (2 views).
    """
    p = sinogram[:, 0]
    turn = torch.cat([p, p.flip(-1)], dim=1)
    power = torch.fft.rfft(turn, dim=1).abs().square().mean(-1) / turn.shape[1]
    return torch.arange(1, power.shape[1]).to(power), power[:, 1:]


def typical(power: Tensor) -> Tensor:
    """Return the geometric mean of the samples' spectra, ``(batch, f) -> (f,)``.

    Every slice counts once; in an arithmetic mean a full bladder, a thousand times as strong, would speak for the set.
    """
    tiny = power.max().double().clamp_min(1e-30) * 1e-20
    return power.double().clamp_min(float(tiny)).log().mean(0).exp()


def ratio_at(frequency: Tensor, real: Tensor, fake: Tensor, wanted: float) -> float:
    """Return the power of one set over another's at a frequency, its logarithm interpolated linearly.

    Args:
        frequency: ascending, ``(f,)``.
        real: mean power at each, ``(f,)``.
        fake: the same of the other set.
        wanted: a frequency within the range.

    Raises:
        ValueError: if it lies outside.
    """
    low, high = float(frequency[0]), float(frequency[-1])
    if not low <= wanted <= high * (1 + 1e-6):
        raise ValueError(f"The frequency is {wanted:g}, but the spectrum reaches from {low:g} to {high:g}.")
    ratio = _log_ratio(real, fake)
    right = int(torch.searchsorted(frequency, wanted).clamp(1, len(frequency) - 1))
    share = (wanted - float(frequency[right - 1])) / float(frequency[right] - frequency[right - 1])
    return math.exp(float(ratio[right - 1] + min(share, 1.0) * (ratio[right] - ratio[right - 1])))


def worst_factor(frequency: Tensor, real: Tensor, fake: Tensor, highest: float) -> float:
    """Return the largest factor between two spectra up to a frequency, at least 1: 1.2 is 20 % more or as much less."""
    return math.exp(float(_log_ratio(real, fake)[frequency <= highest * (1 + 1e-6)].abs().max()))


def band_ratio(harmonic: Tensor, real: Tensor, fake: Tensor, centre: float) -> float:
    """Return the power of one set over another's in the octave about a harmonic."""
    inside = (harmonic >= centre / math.sqrt(2)) & (harmonic < centre * math.sqrt(2))
    return float(fake[inside].sum() / real[inside].sum())


def total_activity(sinogram: Tensor, geometry: ParallelBeam) -> Tensor:
    """Return the activity that a sinogram holds, the mean over views of the sum over bins x bin width, ``(batch,)``.

    For SUV x mm this is SUV x mm^2: what every view of a slice sees.
    """
    return sinogram[:, 0].sum(-1).mean(-1) * geometry.bin_mm


def activity_histogram(image: Tensor, peak: float, n_bins: int = 400) -> Tensor:
    """Return the share of each image's pixels at every level, ``(batch, n_bins)``.

    Levels go evenly from 0 to ``peak``; what lies below or above counts as the first or last.

    Args:
        image: ``(batch, 1, rows, columns)``.
        peak: upper end.
        n_bins: number of levels.
    """
    if not peak > 0:
        raise ValueError(f"The peak of the histogram is {peak:g}, but must be positive: are all images zero?")
    level = (image.flatten(1) / peak * n_bins).long().clamp(0, n_bins - 1)
    count = torch.zeros(len(image), n_bins, device=image.device)
    return count.scatter_add_(1, level, torch.ones_like(level, dtype=count.dtype)) / level.shape[1]


def histogram_distance(first: Tensor, second: Tensor, peak: float) -> float:
    """Return the 1-Wasserstein distance between two histograms over the same levels, in units of the peak's.

    Args:
        first: shares, ``(n_bins,)``, that add up to 1.
        second: the same.
        peak: upper end of the levels.
    """
    return float((first - second).double().cumsum(0).abs().sum()) * peak / len(first)


def _log_ratio(real: Tensor, fake: Tensor) -> Tensor:
    tiny = 1e-20 * float(real.max())
    return (fake.double().clamp_min(tiny) / real.double().clamp_min(tiny)).log()

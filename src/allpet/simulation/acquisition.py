"""What a scanner counts of a phantom: resolution, attenuation, scatter, randoms and Poisson noise.

Per bin, with the system's blur P, attenuation factors ``a = exp(-R mu)`` and a scale ``c`` in counts per SUV mm,

    prompts ~ Poisson(e * (dose * (c * a * R(P x) + scatter) + randoms))
    corrected = (prompts - e * (randoms + scatter)) / (e * a * c * dose)

with detector efficiencies ``e`` that are 1 unless given. Counts belong to a slice, not to a bin: sampling it with more
views or bins spreads the same counts. They are those of a scanner without time of flight; one with it reaches the same
image noise with a half to a quarter of them. Scatter is attenuated trues blurred widely and scaled to a drawn scatter
fraction: enough to learn from, not a single-scatter simulation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor

from allpet.geometry import ParallelBeam
from allpet.projector import Radon

PSF_MM = 4.5
"""FWHM of a typical scanner's resolution, mm (NEMA at 1 cm: 4.0 to 4.7)."""
DOSE_MODES = ("dose", "time", "thinning")
FWHM = math.sqrt(8 * math.log(2))  # of a Gaussian with standard deviation 1
SCATTER_BLUR_MM, SCATTER_BLUR_RAD = 45.0, math.radians(5.0)


class CountLevel(NamedTuple):
    """Counts of a region: net trues per slice at normal dose (centre, low, high) and ranges of the fractions.

    Attributes:
        trues: typical net trues of a slice; sets the noise of a liver to a coefficient of variation near 10 %.
        spread: lowest and highest net trues that are drawn.
        scatter: range of scatter / (scatter + trues).
        randoms: range of randoms / prompts at normal dose.
    """

    trues: float
    spread: tuple[float, float]
    scatter: tuple[float, float]
    randoms: tuple[float, float]


BODY_COUNTS = CountLevel(8e5, (4e5, 1.6e6), (0.30, 0.45), (0.15, 0.45))
BRAIN_COUNTS = CountLevel(1.5e6, (5e5, 3e6), (0.15, 0.25), (0.15, 0.45))


class Levels(NamedTuple):
    """What is drawn for an acquisition, each ``(batch,)``.

    Attributes:
        trues: net trues of the slice at normal dose.
        scatter: scatter / (scatter + trues).
        randoms: randoms / prompts at normal dose.
        bow: relative change of randoms from the middle to the edge.
    """

    trues: Tensor
    scatter: Tensor
    randoms: Tensor
    bow: Tensor


class CorrectionState(NamedTuple):
    """What has been done to a sinogram; data carry it, so that nothing is corrected twice.

    Attributes:
        randoms_subtracted: the expected randoms were subtracted; values may be negative.
        scatter_subtracted: the expected scatter was subtracted; values may be negative.
        normalised: divided by detector efficiencies.
        attenuation_corrected: divided by attenuation factors.
        decay_corrected: activity refers to the time of injection.
        reprojected: projected from an image, not measured.
    """

    randoms_subtracted: bool = False
    scatter_subtracted: bool = False
    normalised: bool = False
    attenuation_corrected: bool = False
    decay_corrected: bool = False
    reprojected: bool = False


RAW = CorrectionState()
CORRECTED = CorrectionState(True, True, True, True, True)


class Acquisition(NamedTuple):
    """A batch of acquired slices; sinograms are ``(batch, 1, views, bins)``, float32.

    Attributes:
        prompts: counts; their state is ``RAW``.
        expected_trues: mean number of true counts, attenuated.
        attenuation_factor: exp(-R mu), the share of photon pairs that leaves the body.
        scatter: mean number of scattered counts.
        randoms: mean number of random counts.
        expected: noise-free, attenuation-corrected: R(P x), SUV mm.
        corrected: noisy, SUV mm; its state is ``CORRECTED``. Where no detector counts (``efficiency`` 0) it is 0.
        scale: counts per SUV mm without attenuation, dose included, ``(batch, 1, 1, 1)``.
    """

    prompts: Tensor
    expected_trues: Tensor
    attenuation_factor: Tensor
    scatter: Tensor
    randoms: Tensor
    expected: Tensor
    corrected: Tensor
    scale: Tensor


def draw_levels(regions: Sequence[str], generator: torch.Generator, spread: bool = True) -> Levels:
    """Draw the counts and the shares of scatter and randoms of each slice.

    Args:
        regions: region of each slice; ``brain`` has its own levels.
        generator: source of randomness.
        spread: draw the trues log-uniformly; otherwise use the typical value.
    """
    counts = [BRAIN_COUNTS if region == "brain" else BODY_COUNTS for region in regions]
    u = torch.rand(len(counts), 4, generator=generator, dtype=torch.float64)
    low, high = (torch.tensor([level.spread[i] for level in counts], dtype=torch.float64) for i in (0, 1))
    typical = torch.tensor([level.trues for level in counts], dtype=torch.float64)

    def between(name: str, column: int) -> Tensor:
        ends = torch.tensor([getattr(level, name) for level in counts], dtype=torch.float64)
        return ends[:, 0] + (ends[:, 1] - ends[:, 0]) * u[:, column]

    return Levels(
        trues=low * (high / low) ** u[:, 0] if spread else typical,
        scatter=between("scatter", 1),
        randoms=between("randoms", 2),
        bow=0.1 * u[:, 3] - 0.05,
    )


def acquire(
    radon: Radon,
    activity: Tensor,
    attenuation: Tensor,
    region: str | Sequence[str],
    generator: torch.Generator,
    dose: float = 1.0,
    *,
    mode: str = "dose",
    psf_mm: float = PSF_MM,
    levels: Levels | None = None,
    efficiency: Tensor | None = None,
) -> Acquisition:
    """Acquire a batch of slices.

    Args:
        radon: the projector.
        activity: SUV, ``(batch, rows, columns)`` or ``(batch, 1, rows, columns)``.
        attenuation: linear attenuation coefficient, 1/mm, in the shape of ``activity``.
        region: region of all slices or of each; sets counts, scatter and randoms.
        generator: source of the levels and of the counts.
        dose: share of the normal dose, 0 < dose <= 1.
        mode: what a lower dose means. ``dose``: less activity, so randoms fall with its square; ``time``: a shorter
            scan, so all falls alike; ``thinning``: as ``time``, by keeping a random share of the normal scan's counts.
        psf_mm: FWHM of the system's resolution, mm (``Tracer.resolution_mm`` adds the positron's range).
        levels: counts and fractions; drawn with ``draw_levels`` if not given.
        efficiency: of each bin, ``(views, bins)``, 0 in gaps, from ``draw_efficiency``; ideal if not given.

    Raises:
        ValueError: if the dose or the mode is impossible or the number of regions is wrong.
    """
    if not 0 < dose <= 1:
        raise ValueError(f"dose is {dose}, but must be a share of the normal dose between 0 and 1.")
    if mode not in DOSE_MODES:
        raise ValueError(f"Unknown dose mode {mode!r}; choose one of {', '.join(DOSE_MODES)}.")
    g = radon.geometry
    activity, attenuation = (image.reshape(-1, 1, *g.image_shape) for image in (activity, attenuation))
    regions = [region] * len(activity) if isinstance(region, str) else list(region)
    if len(regions) != len(activity):
        raise ValueError(f"Got {len(regions)} regions for {len(activity)} slices; give one, or one for each.")
    if levels is None:
        levels = draw_levels(regions, generator)
    trues_per_slice, scatter_share, randoms_share, bow = (
        level.to(activity.device, torch.float32).view(-1, 1, 1, 1) for level in levels
    )
    blur = gaussian_blur(g.image_size, psf_mm / g.pixel_mm).to(activity)
    seen = torch.ones(g.sinogram_shape) if efficiency is None else efficiency
    seen = seen.to(activity)
    lines = radon.project(torch.cat([blur @ activity @ blur, attenuation]))
    expected = lines[: len(activity)]
    factor = torch.exp(-lines[len(activity) :])
    trues = factor * expected
    scale = trues_per_slice / trues.sum((2, 3), keepdim=True).clamp_min(1e-12)
    trues = scale * trues
    scatter = scatter_shape(g, trues)
    scatter = scatter * (scatter_share / (1 - scatter_share) * trues_per_slice / _total(scatter))
    s = (g.bin_centers / g.bin_centers.abs().max().clamp_min(g.bin_mm)).to(trues)
    randoms = (1 + bow * (2 * s**2 - 1)).expand_as(trues)
    detected = trues_per_slice / (1 - scatter_share)
    randoms = randoms * (randoms_share / (1 - randoms_share) * detected / _total(randoms))
    share = dose**2 if mode == "dose" else dose  # of the randoms
    if mode == "thinning":
        full = poisson(seen * (trues + scatter + randoms), generator).to(generator.device)
        prompts = torch.binomial(full, torch.full_like(full, dose), generator=generator).to(trues.device)
    else:
        prompts = poisson(seen * (dose * (trues + scatter) + share * randoms), generator)
    randoms, trues, scatter, scale = share * seen * randoms, dose * seen * trues, dose * seen * scatter, dose * scale
    corrected = (prompts - randoms - scatter) / (seen * factor * scale)
    corrected = torch.where(seen > 0, corrected, 0.0)
    return Acquisition(prompts, trues, factor, scatter, randoms, expected, corrected, scale)


def draw_efficiency(
    geometry: ParallelBeam,
    generator: torch.Generator,
    sd: float = 0.04,
    gap_every: int = 0,
    ring_mm: float = 420.0,
) -> Tensor:
    """Draw detector efficiencies: products of those of the two crystals on each line of response.

    Crystals with their own efficiencies on a ring make diamond patterns in a sinogram; missing ones make stripes.

    Args:
        geometry: of the sinogram; the ring has two crystals per view, half a bin's turn apart.
        generator: source of randomness.
        sd: relative spread of the crystals' efficiencies.
        gap_every: every so-manieth crystal is missing; 0 for none.
        ring_mm: radius of the ring, mm; must be larger than the field of view.

    Returns:
        Efficiency of each bin relative to the mean crystal, ``(views, bins)``, float32; 0 in gaps.

    Raises:
        ValueError: if the bins reach beyond the ring.
    """
    reach = geometry.bin_centers.abs().max().item()
    if reach >= ring_mm:
        raise ValueError(f"The bins reach {reach:.0f} mm from the axis, beyond the ring's radius ring_mm={ring_mm}.")
    n = 2 * geometry.n_views
    crystal = (1 + sd * torch.randn(n, generator=generator)).clamp_min(0.2)
    if gap_every:
        crystal[::gap_every] = 0
    # A line at angle theta and distance s meets the ring at theta +- acos(s / radius).
    half = torch.acos(geometry.bin_centers / ring_mm)
    ends = (geometry.angles[:, None] + sign * half for sign in (1, -1))
    first, second = (crystal[(end * (n / (2 * math.pi))).round().long() % n] for end in ends)
    return first * second


def poisson(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Draw Poisson counts on the generator's device, so that they do not depend on where ``mean`` lies."""
    return torch.poisson(mean.to(generator.device), generator=generator).to(mean.device)


@functools.lru_cache(maxsize=16)
def gaussian_blur(n: int, fwhm: float) -> Tensor:
    """Return the symmetric ``(n, n)`` matrix that blurs an axis with a Gaussian of a width given in samples.

    The kernel is the discrete Gaussian ``exp(-t) I_k(t)`` (Lindeberg 1990): its sum is one and its variance ``t`` is
    exact however narrow it is, which a sampled Gaussian's is not; sums and moments stay what they should be.
    """
    index = torch.arange(n)
    kernel = torch.from_numpy(special.ive(index.numpy(), (fwhm / FWHM) ** 2)).to(torch.float32)
    return kernel[(index[:, None] - index).abs()]


def scatter_shape(geometry: ParallelBeam, trues: Tensor) -> Tensor:
    """Return trues blurred widely along bins and views, in their shape, float32; the scale means nothing."""
    along_views, along_bins = _scatter_kernels(geometry)
    # Half a turn on, a sinogram goes on with its bins reversed.
    around = torch.cat([trues, trues.flip(-1)], dim=2)
    return along_views.to(trues) @ around @ along_bins.to(trues)


@functools.lru_cache(maxsize=8)
def _scatter_kernels(geometry: ParallelBeam) -> tuple[Tensor, Tensor]:
    """Return matrices ``(views, 2 views)`` and ``(bins, bins)``."""
    bins = gaussian_blur(geometry.n_bins, SCATTER_BLUR_MM * FWHM / geometry.bin_mm)
    turn = torch.cat([geometry.angles, geometry.angles + math.pi])
    apart = (turn[: geometry.n_views, None] - turn + math.pi).remainder(2 * math.pi) - math.pi
    views = torch.exp(-0.5 * (apart / SCATTER_BLUR_RAD) ** 2)
    return (views / views.sum(1, keepdim=True)).to(torch.float32), bins


def _total(sinogram: Tensor) -> Tensor:
    return sinogram.sum((2, 3), keepdim=True).clamp_min(1e-12)

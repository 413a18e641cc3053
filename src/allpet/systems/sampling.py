"""How to sample, what comes out, and what is done to decoded sinograms before they are handed over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from allpet.consistency import Correction, make_consistent
from allpet.diffusion.samplers import SAMPLERS, SamplerName, check_eta
from allpet.geometry import ParallelBeam
from allpet.power import restore_power
from allpet.projector import Radon
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.symmetry import resample


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Args:
        sampler: "ddpm" (ancestral), "ddim", "dpm++2m" or "unipc". Guided, the last two, of second order, and DDIM reach
            in 20 steps what DDPM needs hundreds for (``experiments/README.md``, sampling steps); without guidance
            DDPM's fresh noise at every step mends errors of short trainings.
        steps: of the sampler, 1..1000; with guidance two denoiser calls each.
        guidance: weight of the prompt; 1 is the plain conditional model, 0 ignores the prompt, above 1 exaggerates it.
            Distances of samples to slices of validation patients were least by 1.75 to 2 (``experiments/README.md``,
            how strongly samples are guided).
        region_guidance: weight of the region, where it is to differ; ``guidance`` is then that of the tracer alone
            (three denoiser calls per step).
        guidance_interval: smallest and largest time at which guidance acts, as shares of the last time; guidance in
            the middle alone, such as (0.2, 0.8), costs less variety and fewer calls.
        fill_open: whether what a prompt leaves open is drawn, seed by seed, from the prompts of the training slices
            that answer it, so that guidance has something to act on. False leaves it to the network, as do models of
            earlier versions, which do not know those prompts.
        eta: DDIM's share of fresh noise per step, 0..1.
        n_views: views of the sinogram to return; None keeps the training geometry's.
        n_bins: bins of the sinogram to return, over the same field of view; None keeps the training geometry's.
        counts: expected total counts per sinogram of Poisson noise to add; None returns the expected sinogram.
        batch_size: samples per denoiser call.
        restore_power: whether to give samples the power at short periods that the decoder loses in every slice
            (``allpet.power``).
        consistency: how to correct what comes out, see ``consistency.make_consistent``; None leaves it raw.

    Raises:
        ValueError: if an argument is impossible.
    """

    sampler: SamplerName = "dpm++2m"
    steps: int = 20
    guidance: float = 1.75
    region_guidance: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    fill_open: bool = True
    eta: float = 0.0
    n_views: int | None = None
    n_bins: int | None = None
    counts: float | None = None
    batch_size: int = 64
    restore_power: bool = True
    consistency: Correction | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}, but must be one of {', '.join(SAMPLERS)}.")
        for name in ("steps", "batch_size", "n_views", "n_bins"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        check_eta(self.eta)
        for name in ("guidance", "region_guidance"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, but must be a finite number: 1 is the plain conditional model.")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval is {(low, high)}, but must be (smallest, largest) share of the last time, 0..1."
            )
        if self.consistency is not None and self.consistency not in get_args(Correction):
            raise ValueError(
                f"consistency is {self.consistency!r}, but must be one of {', '.join(get_args(Correction))}, or null."
            )
        if self.counts is not None and not 0 < self.counts < math.inf:
            raise ValueError(
                f"counts is {self.counts}, but must be positive and finite: leave it out for noise-free sinograms."
            )

    def geometry(self, trained: ParallelBeam) -> ParallelBeam:
        """Return the geometry of the samples: the trained one with other numbers of views and bins, if asked for."""
        n_bins = self.n_bins or trained.n_bins
        return replace(
            trained,
            n_views=self.n_views or trained.n_views,
            n_bins=n_bins,
            bin_mm=trained.bin_mm * trained.n_bins / n_bins,
        )


class Samples(NamedTuple):
    """Generated sinograms.

    Attributes:
        sinogram: ``(batch, 1, views, bins)`` in the data set's units, on ``geometry``.
        stack: [positive, full, negative] as decoded, on the training geometry, before power is restored and all that
            follows.
        prompt: what was asked for; of ``LatentDiffusion`` with open halves as they were drawn.
        seed: seed of each sample, ``(batch,)``.
        geometry: where the views and bins of ``sinogram`` lie.
    """

    sinogram: Tensor
    stack: Tensor
    prompt: Prompt
    seed: Tensor
    geometry: ParallelBeam


def finish(
    sinogram: Tensor, trained: ParallelBeam, sampling: Sampling, power_gain: Tensor, seeds: Sequence[int]
) -> Tensor:
    """Restore power, correct, resample and add noise, as far as asked for, in this order.

    Args:
        sinogram: as decoded, in data units, ``(batch, 1, views, bins)``.
        trained: its geometry.
        sampling: what is asked for.
        power_gain: what ``power.measure_gain`` found.
        seeds: of the noise, one per sinogram.
    """
    if sampling.restore_power:
        sinogram = restore_power(sinogram, power_gain)
    if sampling.consistency is not None:
        sinogram = make_consistent(sinogram, Radon(trained), sampling.consistency)
    wanted = sampling.geometry(trained)
    if wanted != trained:
        sinogram = resample(sinogram, trained, wanted)
    if sampling.counts is not None:
        sinogram = add_counting_noise(sinogram, sampling.counts, [keyed_generator(s, "counts") for s in seeds])
    return sinogram


def add_counting_noise(sinogram: Tensor, counts: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Replace expected sinograms by Poisson realisations with a given expected total, kept in their own units.

    Args:
        sinogram: ``(batch, 1, views, bins)``; negative values, which resampling leaves at sharp edges, count as zero.
        counts: expected total counts of each sinogram.
        generators: one CPU generator per sinogram.

    Returns:
        the same shape; its expectation is the non-negative part of the input.
    """
    noisy = []
    for expected, generator in zip(sinogram.clamp(min=0).cpu(), generators, strict=True):
        per_count = expected.sum().clamp(min=1e-12) / counts
        noisy.append(torch.poisson(expected / per_count, generator=generator) * per_count)
    return torch.stack(noisy).to(sinogram)

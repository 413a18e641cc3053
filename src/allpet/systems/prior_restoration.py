"""Low-dose restoration by stage 2 alone: no pairs, nothing trained for it.

To the encoder a noisy sinogram is a clean latent with an error on it, and latents with errors are what the denoiser of
stage 2 was trained on. So the latent of the input is taken for z_0 + s n, and s, measured on the input itself, says at
which time of the diffusion it belongs: there sigma / alpha = s, and alpha z is what the denoiser knows. One call then
returns the mean of all clean latents that fit (Tweedie); more calls follow the probability flow down to one of them, as
SDEdit does (Meng et al., arXiv 2108.01073), but from a time that is measured instead of chosen.

How much noise there is follows from the range conditions: in every view the moment m_n(theta) of a sinogram without
noise is a trigonometric polynomial of degree n (Helgason 1965, Ludwig 1966), so what is left of the first moments after
its best fit is noise alone. Noise is taken for independent between bins, with a variance in proportion to the activity,
and for white in the latents; neither is exact, for attenuation and randoms make it uneven and the encoder colours it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allpet import symmetry
from allpet.batches import unmasked_stack
from allpet.conditions import Condition
from allpet.geometry import ParallelBeam
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.systems.latent_diffusion import LatentDiffusion
from allpet.systems.paired import PairedSampling, Restored

ORDERS = 4
"""Moments that the noise is measured by."""
_TRIALS = 4  # noise realisations that are encoded to see what noise does to a latent
_SMOOTH_BINS = 4.0  # full width at half maximum of the Gaussian over the activity that the variance goes with


def noise_variance(sinogram: Tensor, geometry: ParallelBeam, orders: int = ORDERS) -> Tensor:
    """Return the variance of the noise per unit of activity, ``(batch,)``, in the sinogram's units.

    The variance of m_n in a view is sum_s s^2n var(s); with var = c p it is c sum_s s^2n p. The estimate is the mean
    over the orders of what is left of m_n over that, corrected for the n + 1 parameters of the fit.

    Args:
        sinogram: corrected for attenuation, ``(batch, 1, views, bins)``.
        geometry: of the sinogram.
        orders: number of moments, from 0 on.

    Raises:
        ValueError: if there are too few views to tell noise from signal.
    """
    if orders < 1 or geometry.n_views <= orders:
        raise ValueError(f"{orders} moments need at least one, and more than {orders} views; got {geometry.n_views}.")
    s = (geometry.bin_centers / geometry.bin_centers.abs().max()).to(sinogram).double()
    cos, sin = geometry.angles.cos(), geometry.angles.sin()
    p, found = sinogram[:, 0].double(), []
    for n in range(orders):
        moment = (p * s**n).sum(-1)
        basis = torch.linalg.qr(torch.stack([cos**k * sin ** (n - k) for k in range(n + 1)], dim=1).double()).Q.to(p)
        left = moment - (moment @ basis) @ basis.T
        variance = left.square().sum(1) / (geometry.n_views - n - 1)
        found.append(variance / (p * s ** (2 * n)).sum(-1).mean(1).clamp_min(1e-12))
    return torch.stack(found).mean(0).to(sinogram)


class PriorRestoration:
    """Low-dose restoration by a trained stage 2; it has the face of ``LatentBridge.restore``.

    Args:
        model: the stage 2.
        sampling: number of calls, of samples and of latents per call; None for 1 call, which gives the mean.
    """

    def __init__(self, model: LatentDiffusion, sampling: PairedSampling | None = None) -> None:
        if model.geometry is None:
            raise ValueError("The training geometry of stage 2 is unknown: load it with from_pretrained.")
        self.model, self.geometry = model.eval(), model.geometry
        self.sampling = sampling or PairedSampling(nfe=1)

    @torch.no_grad()
    def restore(
        self,
        given: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        sampling: Any = None,
        n_targets: int = 1,
    ) -> Restored:
        """Take the noise out of low-dose sinograms.

        Args:
            given: ``(batch, 1, views, bins)`` in the units of stage 2's data, corrected for attenuation.
            condition: of which tracer and region are heeded, and the task by ``data_consistency``. The dose is
                measured.
            seeds: one per input.
            sampling: how to; None takes the method's own. Samples differ by noise that is added before the denoiser is
                called, half as much again as the input has.
            n_targets: must be 1.

        Raises:
            ValueError: if more than one target is wanted.
        """
        if n_targets != 1:
            raise ValueError(f"n_targets is {n_targets}, but restoring a low dose has one target per input.")
        sampling = sampling or self.sampling
        model, shape = self.model, self.geometry.sinogram_shape
        given = given.to(model.device)
        prompt = Prompt(*(index.to(model.device) for index in condition.prompt))
        latent = self._encode(given)
        size = self.latent_noise(given, latent, seeds)
        results = []
        for draw in range(sampling.samples):
            pieces = []
            for start in range(0, len(given), sampling.batch_size):
                rows = slice(start, start + sampling.batch_size)
                noisy, spread = latent[rows], size[rows]
                if sampling.samples > 1:
                    generators = [keyed_generator(seed, draw, "prior") for seed in seeds[rows]]
                    fresh = torch.stack([torch.randn(noisy.shape[1:], generator=generator) for generator in generators])
                    noisy = noisy + 0.5**0.5 * spread[:, None, None, None] * fresh.to(noisy)
                    spread = 1.5**0.5 * spread
                part = Prompt(prompt.tracer[rows], prompt.region[rows])
                pieces.append(self._denoise(noisy, spread, part, sampling.nfe))
            full = model.autoencoder.decode(torch.cat(pieces), shape).full
            results.append(model.autoencoder.scaling.inverse(full))
        return Restored.of(sampling.fit(torch.stack(results), given, condition.task, self.geometry, seeds))

    def latent_noise(self, given: Tensor, latent: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the standard deviation of the noise in the latent of each input, ``(batch,)``.

        As much noise as the input has is added to it once more, and the latents are compared.

        Args:
            given: inputs, ``(batch, 1, views, bins)``.
            latent: theirs.
            seeds: one per input.
        """
        level = noise_variance(given, self.geometry)[:, None, None, None]
        smooth = symmetry.blur(given, self.geometry, _SMOOTH_BINS * self.geometry.bin_mm).clamp_min(0)
        square = torch.zeros(len(given), device=given.device)
        for trial in range(_TRIALS):
            generators = [keyed_generator(seed, trial, "prior noise") for seed in seeds]
            fresh = torch.stack([torch.randn(given.shape[1:], generator=generator) for generator in generators])
            again = self._encode(given + (level * smooth).sqrt() * fresh.to(given))
            square += (again - latent).square().mean((1, 2, 3)) / _TRIALS
        return square.sqrt()

    def _denoise(self, latent: Tensor, size: Tensor, prompt: Prompt, steps: int) -> Tensor:
        """Follow the probability flow (DDIM without fresh noise) from each latent's own time down."""
        diffusion = self.model.diffusion
        known = diffusion.sampling_times(diffusion.n_steps).flip(0)
        alpha, sigma = diffusion.coefficients(known)
        place = torch.searchsorted((sigma / alpha).contiguous(), size.double().cpu()).clamp_max(len(known) - 1)
        clean, noise = latent, torch.zeros_like(latent)
        for step in range(steps):
            time = known[(place * (steps - step) / steps).round().long()]
            alpha, sigma = (values[:, None, None, None].to(latent) for values in diffusion.coefficients(time))
            x = alpha * clean + sigma * noise  # the first is alpha times the input's latent: its noise is in it
            prediction = self.model(x, time.to(latent.device), prompt).float()
            clean = diffusion.to_clean(x, prediction, time)
            noise = (x - alpha * clean) / sigma
        return clean

    def _encode(self, sinogram: Tensor) -> Tensor:
        network = self.model.autoencoder
        return network.encode_mean(network.scaling(unmasked_stack(sinogram))).float()

"""Low-dose restoration by stage 2 alone: no pairs, nothing trained for it.

To the encoder a noisy sinogram is a clean latent with an error on it, and latents with errors are what the denoiser of
stage 2 was trained on. So the latent of the input is taken for z_0 + s n, and s, measured on the input itself, says at
which time of the diffusion it belongs: there sigma / alpha = s, and alpha z is what the denoiser knows. One call then
returns the mean of all clean latents that fit (Tweedie); more calls follow the probability flow down to one of them, as
SDEdit does (Meng et al., arXiv 2108.01073), but from a time that is measured instead of chosen.

How much noise there is follows from the simplest of the range conditions: without noise, the sums of all views are the
same (Helgason 1965, Ludwig 1966), so what they vary by is noise, however attenuation spreads it over the bins. (Higher
moments weight the rim, where attenuation leaves less of it: with four of them 74 % of the noise of simulated scans is
found, with the sums 99 %.) Noise is taken for independent between bins, and where it is added again, for in proportion
to the activity and white in the latents; neither is exact, for attenuation and randoms make it uneven and the encoder
colours it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from allpet import symmetry
from allpet.attention import TransparentMedicalAttention
from allpet.batches import unmasked_stack
from allpet.conditions import Condition, RestorationBatch
from allpet.models.autoencoder import Autoencoder
from allpet.models.pixel_space import PixelSpace
from allpet.projector import Radon
from allpet.prompts import REGIONS, TRACERS, Prompt, unseen
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS
from allpet.systems.knowledge import Knowledge, TaskKnowledge, warn_of_doubts
from allpet.systems.latent_diffusion import LatentDiffusion
from allpet.systems.paired import PairedSampling, Restored, nothing_attends

ONE_CALL = PairedSampling(nfe=1)
_TRIALS = 4  # noise realisations that are encoded to see what noise does to a latent
_SMOOTH_BINS = 4.0  # full width at half maximum of the Gaussian over the activity that the variance goes with


def noise_variance(sinogram: Tensor) -> Tensor:
    """Return the variance of the noise of all bins over their activity, ``(batch,)``, in the sinogram's units.

    Args:
        sinogram: corrected for attenuation, ``(batch, 1, views, bins)``.

    Raises:
        ValueError: if there are too few views to tell noise from signal.
    """
    if sinogram.shape[-2] < 2:
        raise ValueError(f"Noise is what the sums of views vary by, but there is only {sinogram.shape[-2]} view.")
    sums = sinogram[:, 0].double().sum(-1)
    return (sums.var(1) / sums.mean(1).clamp_min(1e-12)).to(sinogram)


class PriorRestoration(LightningModule):
    """Low-dose restoration by a trained stage 2; it has the face of ``LatentBridge.restore``.

    Args:
        model: the stage 2.
        sampling: number of calls, of samples and of latents per call; one call gives the mean. All samples are drawn as
            the input lies: stage 2 has seen no slice turned.

    Raises:
        ValueError: if the geometry of stage 2 is not known.
    """

    def __init__(self, model: LatentDiffusion, sampling: PairedSampling = ONE_CALL) -> None:
        super().__init__()
        if model.geometry is None:
            raise ValueError("The training geometry of stage 2 is unknown: load it with from_pretrained.")
        self.model, self.geometry = model.eval(), model.geometry
        self.sampling = sampling

    @classmethod
    def from_pretrained(cls, folder: str | Path, sampling: PairedSampling = ONE_CALL) -> PriorRestoration:
        """Use the folder of a stage 2; raises as ``LatentDiffusion.from_pretrained`` does."""
        return cls(LatentDiffusion.from_pretrained(folder), sampling)

    @property
    def autoencoder(self) -> Autoencoder | PixelSpace:
        """Of stage 2."""
        return self.model.autoencoder

    @property
    def knowledge(self) -> Knowledge | None:
        """How strong the slices were that stage 2 was trained on; None where it does not say."""
        levels, counts = self.model.levels, self.model.prompt_counts
        if levels is None:
            return None
        every = [f"{tracer}:{region}" for tracer in TRACERS[1:] for region in REGIONS[1:]]
        shown = [] if counts is None else [name for name in every if not unseen(Prompt.of([name]), counts)]
        return Knowledge({"low_dose": TaskKnowledge((), levels, tuple(shown))})

    @property
    def input_ratio(self) -> Tensor:
        """Scale of each task's inputs over that of the data: the same."""
        return torch.ones(len(TASKS))

    def attention_to(self, roi: Tensor | None) -> TransparentMedicalAttention | None:
        """Return what the fit to the input heeds a ROI by; None without one."""
        return None if roi is None else TransparentMedicalAttention(Radon(self.geometry))

    def check(self, condition: Condition, sampling: PairedSampling | None = None, n_targets: int = 1) -> None:
        """Refuse what stage 2 cannot do alone.

        Raises:
            ValueError: if anything but a low dose is to be restored.
        """
        others = sorted({TASKS[number] for number in condition.task.tolist()} - {"low_dose"})
        if others or n_targets != 1:
            raise ValueError(
                f"Stage 2 alone restores low doses, but is asked for {', '.join(others) or 'two targets'}: use a model "
                "that was trained for it."
            )

    def predict_step(self, batch: RestorationBatch, batch_idx: int) -> Restored:
        """Restore a user's scans."""
        self.check(batch.condition, None, batch.n_targets)  # the data have told what is doubtful
        return self._restored(batch.input, batch.condition, batch.seed.tolist(), self.sampling, batch.roi)

    @torch.no_grad()
    def restore(
        self,
        given: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        sampling: Any = None,
        n_targets: int = 1,
        roi: Tensor | None = None,
        attention_strength: float | None = None,
    ) -> Restored:
        """Take the noise out of low-dose sinograms; warn of prompts that training never showed.

        Args:
            given: ``(batch, 1, views, bins)`` in the units of stage 2's data, corrected for attenuation.
            condition: of which tracer and region are heeded. The dose is measured.
            seeds: one per input.
            sampling: how to; None takes the method's own. Samples differ by noise that is added before the denoiser is
                called, half as much again as the input has.
            n_targets: must be 1.
            roi: where the fit to the input is to look, ``(batch or 1, 1, rows, columns)``, bool.
            attention_strength: how strongly; None for the sampling's.

        Raises:
            ValueError: if ``check`` refuses, there is a ROI and no fit to heed it, or a strength and no ROI.
        """
        self.check(condition, sampling, n_targets)
        sampling = sampling or self.sampling
        if attention_strength is not None:
            sampling = replace(sampling, attention_strength=attention_strength)
        warn_of_doubts(self.knowledge, condition)
        return self._restored(given, condition, seeds, sampling, roi)

    @torch.no_grad()
    def _restored(
        self,
        given: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        sampling: PairedSampling,
        roi: Tensor | None,
    ) -> Restored:
        if roi is not None and not sampling.updates("low_dose"):
            raise ValueError(
                "Stage 2 alone heeds a region of interest in the fit to the input: leave it out, or fit "
                "(data_consistency)."
            )
        if sampling.attention_strength not in (None, 1.0) and roi is None:
            raise ValueError(nothing_attends(sampling.strength))
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
        areas, emphasis = None, None
        if (attention := self.attention_to(roi)) is not None:
            areas = attention.areas(given, roi)
            emphasis = attention.emphasise(areas, sampling.strength)
        fitted = sampling.fit(torch.stack(results), given, condition.task, self.geometry, seeds, emphasis)
        return Restored.of(fitted.samples, areas)

    def latent_noise(self, given: Tensor, latent: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the standard deviation of the noise in the latent of each input, ``(batch,)``.

        As much noise as the input has is added to it once more, and the latents are compared.

        Args:
            given: inputs, ``(batch, 1, views, bins)``.
            latent: theirs.
            seeds: one per input.
        """
        level = noise_variance(given)[:, None, None, None]
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

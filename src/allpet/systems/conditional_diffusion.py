"""Downstream tasks by conditional latent diffusion: noise to the wanted latent, the given one beside it.

The alternative to a bridge (README of ALL-PET: "incorporating DDPM/DDIM/DDBM"), in the manner of Palette (Saharia et
al., arXiv 2111.05826) over latents: the network sees the noisy latent and, concatenated, that of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from allpet.conditions import Condition
from allpet.diffusion.preconditioning import PairStatistics
from allpet.diffusion.samplers import check_eta, sample_ddim, sample_ddpm
from allpet.diffusion.schedule import Diffusion
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.models.pixel_space import PixelSpace
from allpet.systems.base import OptimizerName
from allpet.systems.focus import AttentionUse, Focus
from allpet.systems.paired import Errors, PairedSampling, PairedSystem


@dataclass(frozen=True, kw_only=True)
class ConditionalSampling(PairedSampling):
    """How to sample; see ``sample_ddim``.

    Args:
        nfe: denoiser calls per sample, that is steps.
        samples: see ``PairedSampling``, as the next five.
        batch_size: latents per denoiser call.
        attention_strength: of a model that attends.
        data_consistency: updates towards what was measured.
        neighbourhood_mm: of pixels that share them.
        turned: whether several samples are drawn in several orientations.
        sampler: "ddim" or "ddpm".
        eta: of "ddim": share of fresh noise per step.
    """

    nfe: int = 20
    sampler: Literal["ddim", "ddpm"] = "ddim"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in ("ddim", "ddpm"):
            raise ValueError(f"sampler is {self.sampler!r}, but must be 'ddim' or 'ddpm'.")
        check_eta(self.eta)


class ConditionalDiffusion(PairedSystem):
    """Diffusion of the wanted latent with that of the input as condition.

    Both are standardised per channel by moments measured when training starts.

    Args:
        autoencoder: the trained stage-1 network, or a folder that holds it, of stage 1 or 2; or ``PixelSpace``.
        denoiser: the network to train, with as many condition as latent channels (twice as many with ``reproject``, and
            one more where attention is a channel) and ``label_size`` LABEL_SIZE.
        diffusion: noise schedule and training target.
        initialise: whether to start from the denoiser in the folder of a stage 2, last layer included: it learned the
            same with nothing beside.
        target: "noisy": what a scanner would give, as a user's pairs are; "expected": without noise (simulator).
        loss: "l2" or "l1".
        sinogram_weight: of the error of what the prediction decodes to, see ``PairedSystem``.
        decode_batch: sinograms that are decoded at once for that, see there.
        attention: what is made of transparent medical attention; None for nothing.
        reproject: iterations of OSEM after which the input's image is projected again, see ``PairedSystem``.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        optimizer: "adamw" or "muon", see ``CosineSystem``.
        others_factor: see ``CosineSystem``.
        sampling: how ``restore``, ``test`` and ``predict`` draw.
        seed: keys training times and noise.

    Raises:
        ValueError: if networks or folder do not fit.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | PixelSpace | str,
        denoiser: Denoiser,
        diffusion: Diffusion = Diffusion(),  # noqa: B008 - frozen
        initialise: bool = True,
        target: Literal["noisy", "expected"] = "noisy",
        loss: Literal["l2", "l1"] = "l2",
        sinogram_weight: float = 0.0,
        decode_batch: int | None = None,
        attention: AttentionUse | None = None,
        reproject: int = 0,
        learning_rate: float = 1e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
        sampling: ConditionalSampling = ConditionalSampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(
            autoencoder,
            denoiser,
            initialise,
            True,
            target,
            loss,
            sinogram_weight,
            decode_batch,
            attention,
            reproject,
            learning_rate,
            warmup_steps,
            weight_decay,
            optimizer,
            others_factor,
            sampling,
            seed,
        )
        self.diffusion = diffusion

    def forward(self, noisy: Tensor, time: Tensor, condition: Condition, focus: Focus) -> Tensor:
        """Predict the training target of noisy standardised latents ``(batch, channels, rows, columns)``."""
        moments = PairStatistics(*self.moments.to(noisy))
        given = _standardise(focus.source, moments.source_mean, moments.source_variance)
        if focus.further is not None:
            given = torch.cat([given, focus.further], dim=1)
        return self.denoiser(noisy, time, condition.prompt, given, condition.label().to(noisy))

    def errors(
        self,
        target: Tensor,
        source: Tensor,
        focus: Focus,
        condition: Condition,
        generators: Sequence[torch.Generator],
    ) -> Errors:
        """Return the error of the velocity, or of the noise."""
        moments = PairStatistics(*self.moments.to(target))
        clean = _standardise(target, moments.target_mean, moments.target_variance)
        time = torch.cat([self.diffusion.draw_times(1, generator) for generator in generators]).to(self.device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators]).to(clean)
        noisy = self.diffusion.add_noise(clean, noise, time)
        prediction = self(noisy, time, condition, focus).float()
        found = self._in_latents(self.diffusion.to_clean(noisy, prediction, time))
        return Errors(prediction - self.diffusion.target(clean, noise, time), found)

    def draw(
        self,
        source: Tensor,
        focus: Focus,
        condition: Condition,
        generators: Sequence[torch.Generator],
        sampling: ConditionalSampling,
        progress: bool = False,
    ) -> Tensor:
        """Denoise from noise."""

        def denoise(x: Tensor, time: Tensor) -> Tensor:
            return self(x, time, condition, focus)

        given: dict[str, Any] = {"steps": sampling.nfe, "device": source.device, "progress": progress}
        if sampling.sampler == "ddim":
            drawn = sample_ddim(denoise, source.shape[1:], generators, self.diffusion, eta=sampling.eta, **given)
        else:
            drawn = sample_ddpm(denoise, source.shape[1:], generators, self.diffusion, **given)
        return self._in_latents(drawn)

    def quick_sampling(self) -> ConditionalSampling:
        """Return ten steps of DDIM."""
        return ConditionalSampling(nfe=10)

    def exported(self) -> dict[str, Any]:
        """Return the process."""
        return {"diffusion": self.diffusion.to_dict()}

    def _in_latents(self, standardised: Tensor) -> Tensor:
        moments = PairStatistics(*self.moments.to(standardised))
        return standardised * moments.target_variance.sqrt()[:, None, None] + moments.target_mean[:, None, None]

    @classmethod
    def exported_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the process."""
        return {"diffusion": Diffusion(**config["diffusion"])}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, sampling: ConditionalSampling = ConditionalSampling()
    ) -> ConditionalDiffusion:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        return cls._load(folder, sampling)


def _standardise(latent: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (latent - mean[:, None, None]) / variance.sqrt()[:, None, None]

"""Sampling the stage-1 autoencoder as a VAE: its decoder fed with Gaussian latents, without any second stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from allpet.batches import SinogramBatch
from allpet.diffusion.samplers import draw_noise
from allpet.geometry import ParallelBeam
from allpet.models.autoencoder import Autoencoder
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.systems.autoencoder import AutoencoderSystem
from allpet.systems.baselines.base import SinogramGenerator
from allpet.systems.baselines.gaussian import PromptGaussian


class VAEPrior(SinogramGenerator, nn.Module):
    """Decode latents drawn from N(0, I), the prior of a VAE, or from Gaussians fitted to the training latents.

    The prior is that of standardised latents, so that each channel has the right mean and variance. It knows no
    prompt: all prompts give the same samples. ``fit`` returns the generator that draws from a Gaussian per prompt.

    Args:
        autoencoder: the trained stage-1 network.
        geometry: of the sinograms.
        gaussian: over standardised latents; None for the prior.
    """

    def __init__(
        self, autoencoder: Autoencoder, geometry: ParallelBeam, gaussian: PromptGaussian | None = None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.geometry, self.gaussian = geometry, gaussian

    @classmethod
    def from_stage1(cls, folder: str | Path) -> VAEPrior:
        """Take the autoencoder from the folder that stage 1 was exported to.

        Raises:
            ValueError: if the folder does not say what geometry stage 1 was trained on.
        """
        stage1 = AutoencoderSystem.from_pretrained(folder)
        if stage1.geometry is None:
            raise ValueError(f"{folder} does not name its geometry: train and export stage 1 with a data module.")
        return cls(stage1.autoencoder, stage1.geometry)

    @torch.no_grad()
    def fit(self, batches: Iterable[SinogramBatch], rank: int | None = None, diagonal: bool = False) -> VAEPrior:
        """Return a generator that draws latents from a Gaussian per prompt, fitted to those of training slices.

        Args:
            batches: training slices, with masks as stage 1 has seen them, such as ``data.augment(slices)``.
            rank: principal axes to keep; None for the full covariance.
            diagonal: whether the variance of the axes left out is added as independent noise.
        """
        latents, tracers, regions = [], [], []
        device = self.autoencoder.latent_mean.device
        for batch in batches:
            stack = self.autoencoder.scaling(batch.as_stack().to(device))
            latents.append(self.autoencoder.encode_mean(stack).float().cpu())
            tracers.append(batch.prompt.tracer.cpu())
            regions.append(batch.prompt.region.cpu())
        if not latents:
            raise ValueError("There are no batches to fit a Gaussian to: give at least one.")
        prompt = Prompt(torch.cat(tracers), torch.cat(regions))
        gaussian = PromptGaussian.fit(torch.cat(latents), prompt, rank, diagonal)
        assert self.geometry is not None
        return VAEPrior(self.autoencoder, self.geometry, gaussian.to(device))

    def generate(self, prompt: Prompt, seeds: Sequence[int]) -> Tensor:
        """Draw and decode latents: stacks in data units, ``(batch, 3, views, bins)``."""
        assert self.geometry is not None
        shape = self.geometry.sinogram_shape
        generators = [keyed_generator(seed, "latent") for seed in seeds]
        if self.gaussian is None:
            device = self.autoencoder.latent_mean.device
            latent = draw_noise(self.autoencoder.latent_shape(*shape), generators, device)
        else:
            latent = self.gaussian.draw(prompt, generators)
        return self.autoencoder.scaling.inverse(self.autoencoder.decode(latent, shape).stack)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors and README.md."""
        assert self.geometry is not None
        config = {
            "class": "VAEPrior",
            "geometry": self.geometry.to_dict(),
            "autoencoder": self.autoencoder.config,
            "gaussian": None if self.gaussian is None else self.gaussian.config,
        }
        save_pretrained(folder, config, self.state_dict(), card)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VAEPrior:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        config, weights = load_pretrained(folder, "VAEPrior")
        with building(folder):
            gaussian = None if config["gaussian"] is None else PromptGaussian(**config["gaussian"])
            system = cls(Autoencoder(**config["autoencoder"]), ParallelBeam(**config["geometry"]), gaussian)
            system.load_state_dict(weights)
        return system

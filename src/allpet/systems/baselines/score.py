"""A score-based model directly on sinograms: no autoencoder, no masks, one U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from allpet.batches import SinogramBatch
from allpet.diffusion.edm import VarianceExploding, sample_heun
from allpet.diffusion.guidance import drop_prompt, guide
from allpet.diffusion.samplers import draw_noise
from allpet.geometry import ParallelBeam
from allpet.models.denoiser import Denoiser
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.systems.base import OptimizerName, log_mean
from allpet.systems.baselines.base import SinogramSystem

# Slices that the mean and standard deviation are measured on, evenly spread.
_MEASURED = 512


@dataclass(frozen=True)
class ScoreSampling:
    """How to sample.

    Args:
        steps: noise levels; the network is called twice for each but the last.
        churn: noise added and removed again, see ``sample_heun``.
        guidance: weight of the prompt; 1 is the plain conditional model.

    Raises:
        ValueError: if a number is impossible.
    """

    steps: int = 30
    churn: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.churn < 0:
            raise ValueError(f"steps is {self.steps} and churn {self.churn}, but at least 1 and 0 are needed.")


class ScoreModel(SinogramSystem):
    """Learn to remove noise of any strength from sinograms, and follow the score from pure noise to a sinogram.

    Mean and standard deviation of the training slices, in network range, are measured when training starts and are
    kept with the weights.

    Args:
        denoiser: the network, over one channel.
        process: noise levels.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        optimizer: "adamw" or "muon", see ``CosineSystem``.
        others_factor: see ``CosineSystem``.
        prompt_dropout: probability of leaving open the tracer, the region, and both, each, in training.
        sampling: how ``sample`` and ``predict`` draw.
        seed: keys training noise, noise levels and prompt dropout.

    Raises:
        ValueError: if the network takes another number of channels.
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        process: VarianceExploding = VarianceExploding(),  # noqa: B008 - frozen
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
        prompt_dropout: float = 0.1,
        sampling: ScoreSampling = ScoreSampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, optimizer, others_factor)
        if denoiser.latent_channels != 1 or denoiser.condition_channels:
            raise ValueError(
                f"The denoiser has {denoiser.latent_channels} channels and {denoiser.condition_channels} of "
                "conditions, but works on sinograms here: set latent_channels to 1 and condition_channels to 0."
            )
        if not 0 <= prompt_dropout <= 1 / 3:
            raise ValueError(f"prompt_dropout is {prompt_dropout}, but each of three cases can have at most 1/3.")
        self.denoiser, self.process, self.sampling = denoiser, process, sampling
        self.prompt_dropout, self.seed = prompt_dropout, seed
        self.register_buffer("data_mean", torch.zeros(()))
        self.register_buffer("data_std", torch.zeros(()))

    def forward(self, noisy: Tensor, sigma: Tensor, prompt: Prompt, label: Tensor | None = None) -> Tensor:
        """Estimate the noise-free sinograms D(x; sigma).

        Args:
            noisy: ``(batch, 1, views, bins)``, network range plus noise.
            sigma: standard deviation of the noise of each, ``(batch,)``.
            prompt: tracer and region of each.
            label: of what was done to the slices in training, see ``Denoiser``.
        """
        skip, out, into, noise = self.process.scalings(sigma, self.data_std)
        skip, out, into = (c[:, None, None, None] for c in (skip, out, into))
        centred = noisy - self.data_mean
        estimate = skip * centred + out * self.denoiser(into * centred, noise, prompt, label=label).float()
        return estimate + self.data_mean

    @property
    def label_size(self) -> int:
        """That of the denoiser."""
        return int(self.denoiser.config["label_size"])

    @property
    def backbone(self) -> nn.Module:
        """The denoiser."""
        return self.denoiser

    def setup(self, stage: str) -> None:
        """Take geometry and scale from the data and measure the training slices; what came with weights stays."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and data is not None and not self.data_std:
            total = len(data.train_set)
            rows = list(range(0, total, -(-total // _MEASURED)))
            values = self.scaling(data.train_set[rows].sinogram.to(self.scaling.scale.device))
            self.data_mean.copy_(values.mean())
            self.data_std.copy_(values.std())

    def training_step(self, batch: SinogramBatch, batch_idx: int) -> Tensor:
        """Denoising score matching at keyed random noise levels."""
        generators = [
            keyed_generator(self.seed, self.current_epoch, sample, "score") for sample in batch.sample_id.tolist()
        ]
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(self.device)
        prompt = drop_prompt(batch.prompt, self.prompt_dropout, draws)
        loss = self._loss(batch, generators, prompt)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: SinogramBatch, batch_idx: int) -> None:
        """Log the same error at noise that is fixed for each slice."""
        generators = [keyed_generator("validation", sample, "score") for sample in batch.sample_id.tolist()]
        loss = self._loss(batch, generators, batch.prompt)
        log_mean(self, {"val/loss": loss}, len(batch.sinogram), prog_bar=True)

    def generate(self, prompt: Prompt, seeds: Sequence[int]) -> Tensor:
        """Generate sinograms in data units, ``(batch, 1, views, bins)``."""
        assert self.geometry is not None
        made = sample_heun(
            guide(self, self.on_device(prompt), self.sampling.guidance),
            (1, *self.geometry.sinogram_shape),
            [keyed_generator(seed, "sample") for seed in seeds],
            self.process,
            self.sampling.steps,
            self.sampling.churn,
            self.device,
        )
        return self.scaling.inverse(made)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors and README.md, the folder to share."""
        config = {
            "class": "ScoreModel",
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "denoiser": self.denoiser.config,
            "process": self.process.to_dict(),
        }
        save_pretrained(folder, config, self.state_dict(), card)

    @classmethod
    def from_pretrained(cls, folder: str | Path, sampling: ScoreSampling = ScoreSampling()) -> ScoreModel:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        config, weights = load_pretrained(folder, "ScoreModel")
        with building(folder):
            system = cls(Denoiser(**config["denoiser"]), VarianceExploding(**config["process"]), sampling=sampling)
            system.load_state_dict(weights)
            system.geometry = ParallelBeam(**config["geometry"]) if config["geometry"] else None
        return system.eval()

    def _loss(self, batch: SinogramBatch, generators: list[torch.Generator], prompt: Prompt) -> Tensor:
        clean = self.scaling(batch.sinogram)
        sigma = torch.cat([self.process.draw_sigma(1, generator) for generator in generators]).to(self.device)
        noise = draw_noise(clean.shape[1:], generators, self.device)
        estimate = self(clean + sigma[:, None, None, None] * noise, sigma, prompt, batch.symmetry)
        # (D - x_0)^2 / c_out^2: the network's own error, equal at all noise levels when training starts
        weight = self.process.scalings(sigma, self.data_std).out.square().reciprocal()
        return (weight * (estimate - clean).square().mean((1, 2, 3))).mean()

"""A GAN over sinograms, as good as 500 slices allow: style generator, projection discriminator, DiffAugment, R1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allpet.batches import SinogramBatch
from allpet.diff_augment import SinogramDiffAugment
from allpet.diffusion.guidance import drop_prompt
from allpet.diffusion.samplers import draw_noise
from allpet.geometry import ParallelBeam
from allpet.models.discriminator import PromptDiscriminator
from allpet.models.generator import Generator
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.systems.base import log_mean
from allpet.systems.baselines.base import SinogramSystem


class SinogramGAN(SinogramSystem):
    """Train generator and discriminator with the non-saturating loss (Goodfellow et al., arXiv 1406.2661).

    Both are updated in the same step by one optimiser, so that optimisation stays automatic and accumulation, weight
    averaging and resuming work as for every other system. Real and generated sinograms reach the discriminator through
    ``SinogramDiffAugment``; its slope at real ones is penalised (R1; Mescheder et al., arXiv 1801.04406, eq. 9), at
    some of the steps only and then more (arXiv 1912.04958, section 3.1).

    Args:
        generator: the network that is sampled.
        discriminator: the network that judges; None for a generator that is only sampled.
        learning_rate: of the generator, the peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        discriminator_factor: learning rate of the discriminator, in units of ``learning_rate``.
        betas: of AdamW; averages of past gradients are of little use when the other player moves.
        augmentation: what both kinds of sinograms are seen through.
        penalty: weight of R1.
        penalty_every: steps between penalties.
        prompt_dropout: probability of leaving open the tracer, the region, and both, each, in training.
        seed: keys training noise, augmentation and prompt dropout.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: PromptDiscriminator | None = None,
        learning_rate: float = 6e-4,
        warmup_steps: int = 50,
        discriminator_factor: float = 0.5,
        betas: tuple[float, float] = (0.0, 0.99),
        augmentation: SinogramDiffAugment | None = None,
        penalty: float = 2.0,
        penalty_every: int = 4,
        prompt_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay=0.0)
        if penalty_every < 1:
            raise ValueError(f"penalty_every is {penalty_every}, but must be at least 1.")
        if not 0 <= prompt_dropout <= 1 / 3:
            raise ValueError(f"prompt_dropout is {prompt_dropout}, but each of three cases can have at most 1/3.")
        self.generator, self.discriminator = generator, discriminator
        self.augmentation = augmentation if augmentation is not None else SinogramDiffAugment()
        self.discriminator_factor, self.betas = discriminator_factor, (float(betas[0]), float(betas[1]))
        self.penalty, self.penalty_every = penalty, penalty_every
        self.prompt_dropout, self.seed = prompt_dropout, seed

    def forward(self, noise: Tensor, prompt: Prompt) -> Tensor:
        """Generate in network range; shapes as in ``Generator``."""
        return self.generator(noise, prompt)

    @property
    def backbone(self) -> nn.Module:
        """The generator."""
        return self.generator

    def setup(self, stage: str) -> None:
        """Take geometry and scale from the data module.

        Raises:
            ValueError: if the generator makes sinograms of another shape.
        """
        super().setup(stage)
        if self.geometry is not None and self.geometry.sinogram_shape != self.generator.shape:
            raise ValueError(
                f"The generator makes {self.generator.shape} views and bins, the data have "
                f"{self.geometry.sinogram_shape}: set n_views and n_bins of generator and discriminator."
            )

    def training_step(self, batch: SinogramBatch, batch_idx: int) -> Tensor:
        """One step of both players: the sum of their losses, whose gradients do not mix."""
        assert self.discriminator is not None
        generators = [
            keyed_generator(self.seed, self.current_epoch, sample, "gan") for sample in batch.sample_id.tolist()
        ]
        noise = draw_noise((self.generator.noise_size,), generators, self.device)
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(self.device)
        prompt = drop_prompt(batch.prompt, self.prompt_dropout, draws)
        fake = self(noise, prompt)
        losses = self.losses(self.scaling(batch.sinogram), fake, prompt, generators)
        self.log("train/loss", losses["generator"], prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        total = losses["generator"] + losses["discriminator"]
        return total + losses["penalty"] if "penalty" in losses else total

    def losses(
        self, real: Tensor, fake: Tensor, prompt: Prompt, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Losses of both players.

        Args:
            real: ``(batch, 1, views, bins)``, network range.
            fake: the same shape, of the generator; ``generator`` alone sends gradients into it.
            prompt: of both.
            generators: draw the augmentations, those of sample i from generator i.

        Returns:
            ``generator``, which sends none into the discriminator, ``discriminator``, and, where it is due,
            ``penalty``.
        """
        assert self.discriminator is not None
        assert self.geometry is not None
        real = self.augmentation(real, self.geometry, generators)
        fake = self.augmentation(fake, self.geometry, generators)
        # The verdict on the generated must move the generator only, so it is asked of detached weights.
        weights = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        verdict = torch.func.functional_call(self.discriminator, weights, (fake, prompt))
        on_fake = self.discriminator(fake.detach(), prompt)
        due = torch.is_grad_enabled() and self.penalty > 0 and self.global_step % self.penalty_every == 0
        real = real.detach().requires_grad_(due)
        on_real = self.discriminator(real, prompt)
        losses = {
            "generator": F.softplus(-verdict).mean(),
            "discriminator": F.softplus(-on_real).mean() + F.softplus(on_fake).mean(),
            "real_score": on_real.detach().mean(),
            "fake_score": on_fake.detach().mean(),
        }
        if due:
            (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            # once in n steps, n times as much
            losses["penalty"] = 0.5 * self.penalty * self.penalty_every * slope.square().sum((1, 2, 3)).mean()
        return losses

    def validation_step(self, batch: SinogramBatch, batch_idx: int) -> None:
        """Log the scores of held-out and generated sinograms: far apart, the discriminator knows its slices by heart.

        ``val/activity`` is the mean total activity of generated sinograms over that of held-out ones, minus 1.
        """
        assert self.discriminator is not None
        generators = [keyed_generator("validation", sample, "gan") for sample in batch.sample_id.tolist()]
        fake = self(draw_noise((self.generator.noise_size,), generators, self.device), batch.prompt)
        real = self.scaling(batch.sinogram)
        values = {
            "val/real_score": self.discriminator(real, batch.prompt).mean(),
            "val/fake_score": self.discriminator(fake, batch.prompt).mean(),
            "val/activity": fake.mean() / real.mean().clamp(min=1e-6) - 1,
        }
        log_mean(self, values, len(real))

    def generate(self, prompt: Prompt, seeds: Sequence[int]) -> Tensor:
        """Generate sinograms in data units, ``(batch, 1, views, bins)``."""
        generators = [keyed_generator(seed, "sample") for seed in seeds]
        noise = draw_noise((self.generator.noise_size,), generators, self.device)
        return self.scaling.inverse(self(noise, self.on_device(prompt)))

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors (scale and generator; no discriminator) and README.md."""
        config = {
            "class": "SinogramGAN",
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "generator": self.generator.config,
        }
        weights = {f"generator.{name}": value for name, value in self.generator.state_dict().items()}
        save_pretrained(folder, config, {**weights, "scaling.scale": self.scaling.scale}, card)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SinogramGAN:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        config, weights = load_pretrained(folder, "SinogramGAN")
        with building(folder):
            system = cls(Generator(**config["generator"]))
            system.load_state_dict(weights)
            system.geometry = ParallelBeam(**config["geometry"]) if config["geometry"] else None
        return system.eval()

    def _adamw(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(self.generator.parameters())}]
        if self.discriminator is not None:
            rate = self.discriminator_factor * self.learning_rate
            groups.append({"params": list(self.discriminator.parameters()), "lr": rate})
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, weight_decay=0.0)

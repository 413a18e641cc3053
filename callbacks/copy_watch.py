"""Watching for copies: a diffusion model of few slices first learns what they have in common, then the slices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional

from allpet import LatentDiffusion, Prompt
from allpet.diffusion.samplers import SamplerName
from allpet.metrics import nearest_distance
from callbacks.panels import spread


class CopyNumbers(NamedTuple):
    """How near samples come to the training slices, measured by held-out slices of other patients.

    Attributes:
        copy_rate: share of the samples that are nearer to a training slice than 99 % of the held-out slices are; about
            0.01 where nothing is copied.
        nearest_ratio: median distance of samples over that of held-out slices; about 1 where nothing is copied.
    """

    copy_rate: float
    nearest_ratio: float


class CopyWatch(Callback):
    """Sample a few slices at validation and log how near they come to the training slices.

    Logs ``val/copy_rate`` and ``val/nearest_ratio``, see ``CopyNumbers``. Samples, held-out and training slices are
    compared as the decoder draws them, so that neither the noise of measured slices nor the decoder's blur counts as a
    difference; large ones at 64 x 64. Placed after weight averaging in the list of callbacks, it watches the averaged
    weights. The training slices are encoded once, when first needed.

    Args:
        n_samples: slices to sample, from fixed seeds, with the prompts of as many held-out slices.
        steps: denoiser calls per sample; few, because it is done often.
        sampler: one that needs few steps.
        every_n_validations: how often.
        limit: training stops when the copy rate is above; None never stops it. Of n samples the rate is known to about
            sqrt(rate / n), and the held-out slices, too, must be many for a hundredth of them to mean anything.

    Raises:
        ValueError: if a number is impossible.
    """

    def __init__(
        self,
        n_samples: int = 64,
        steps: int = 10,
        sampler: SamplerName = "dpm++2m",
        every_n_validations: int = 1,
        limit: float | None = None,
    ) -> None:
        for name, value in (("n_samples", n_samples), ("steps", steps), ("every_n_validations", every_n_validations)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        if limit is not None and not 0 <= limit <= 1:
            raise ValueError(f"limit is {limit}, but is a share of the samples, from 0 to 1.")
        self.n_samples, self.steps, self.sampler, self.limit = n_samples, steps, sampler, limit
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._training: Tensor | None = None
        self._held_out: Tensor | None = None
        self._prompt: Prompt | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return how often has been validated, so that a resumed training measures when it would have."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, measure and log, unless this is the sanity check; stop the training if there are too many copies.

        Every process does the same, so that all have the same answer.

        Raises:
            TypeError: if the system is not one of stage 2.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not isinstance(pl_module, LatentDiffusion):
            raise TypeError(f"Copies are watched for in stage 2, not in {type(pl_module).__name__}: remove CopyWatch.")
        if self._validations % self.every_n_validations == 0:
            numbers = self._measure(trainer, pl_module)
            for name, value in numbers._asdict().items():
                pl_module.log(f"val/{name}", value, on_epoch=True, batch_size=1)
            above = self.limit is not None and numbers.copy_rate > self.limit
            if trainer.strategy.reduce_boolean_decision(above, all=False):
                rank_zero_info(
                    "Stopping: %.0f %% of the samples are copies of training slices; the limit is %s.",
                    100 * numbers.copy_rate,
                    self.limit,
                )
                trainer.should_stop = True
        self._validations += 1

    @torch.no_grad()
    def _measure(self, trainer: Trainer, system: LatentDiffusion) -> CopyNumbers:
        training = system.training
        system.eval()
        with trainer.precision_plugin.val_step_context():
            if self._training is None:
                data: Any = trainer.datamodule  # type: ignore[attr-defined]
                chosen = spread(data.val_set.prompt.names(), self.n_samples)
                rows = [chosen[i % len(chosen)] for i in range(self.n_samples)]
                self._held_out = _decoded(trainer, system, data.val_set, chosen)
                self._training = _decoded(trainer, system, data.train_set, list(range(len(data.train_set))))
                prompt = data.val_set.prompt
                self._prompt = Prompt(prompt.tracer[rows], prompt.region[rows])
            assert self._prompt is not None
            assert self._held_out is not None
            # as the decoder draws them, like the slices that they are compared with
            raw: dict[str, Any] = {"n_views": None, "n_bins": None, "counts": None, "consistency": None}
            sampling = replace(system.sampling, sampler=self.sampler, steps=self.steps, restore_power=False, **raw)
            stack = system.sample(self._prompt, list(range(self.n_samples)), sampling).stack
            samples = small(stack[:, 1:2].float().cpu())
        system.train(training)
        return copy_numbers(samples, self._held_out, self._training)


def copy_numbers(samples: Tensor, held_out: Tensor, training: Tensor) -> CopyNumbers:
    """Compare the distances of samples and of held-out slices to their nearest training slices.

    Args:
        samples: ``(samples, ...)``.
        held_out: ``(slices, ...)``, of patients that are not in the training set.
        training: ``(slices, ...)``.
    """
    ours, theirs = nearest_distance(samples, training), nearest_distance(held_out, training)
    copies = ours < theirs.quantile(0.01)
    return CopyNumbers(float(copies.float().mean()), float(ours.median() / theirs.median()))


def small(sinogram: Tensor, largest: int = 64) -> Tensor:
    """Average neighbouring views and bins of ``(slices, 1, views, bins)`` until there are at most 64 of each."""
    views, bins = sinogram.shape[-2:]
    return functional.adaptive_avg_pool2d(sinogram, (min(views, largest), min(bins, largest)))


def _decoded(trainer: Trainer, system: LatentDiffusion, slices: Any, rows: list[int]) -> Tensor:
    """Slices as the decoder draws them, ``(rows, 1, views, bins)``, small, on the CPU."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    size, pieces = system.sampling.batch_size, []
    for start in range(0, len(rows), size):
        batch = trainer.strategy.batch_to_device(slices[rows[start : start + size]], dataloader_idx=0)
        latent, shape = system.encode(data.augment(batch)), tuple(batch.sinogram.shape[-2:])
        full = system.autoencoder.decode(latent, shape).full
        pieces.append(small(system.autoencoder.scaling.inverse(full).float().cpu()))
    return torch.cat(pieces)

"""Latent statistics: what stage 2 needs to know about stage 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from allpet import AutoencoderSystem
from allpet.power import POINTS
from callbacks.export import not_finite


class LatentStatistics(Callback):
    """When stage 1 ends, measure the latents' mean and standard deviation per channel and store them with the weights.

    So are the gain that gives back the power that reconstructions lack (of several processes the mean) and, where the
    network's constraint is ``weighted``, the weight of the full channel.

    Full passes over the training set; then a pass over the validation set tells whether the standardised latents have
    a standard deviation of 1 there too. Must stand after weight averaging and before ``ExportPretrained``.

    Args:
        tolerance: how far a channel's standard deviation on the validation set may lie from 1 before a warning.
    """

    def __init__(self, tolerance: float = 0.1) -> None:
        self.tolerance = tolerance

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other systems.

        Raises:
            TypeError: if the system has no latents to measure.
        """
        if not isinstance(pl_module, AutoencoderSystem):
            raise TypeError(
                f"Latent statistics belong to stage 1, not to {type(pl_module).__name__}: remove "
                "callbacks.LatentStatistics."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, store, check and log; weights that are not finite have no latents, and the export says so."""
        assert isinstance(pl_module, AutoencoderSystem)
        if not_finite(pl_module):
            return
        training = pl_module.training
        pl_module.eval()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with data.unmixed():  # what stage 2 is to generate; mixtures vary less
            mean, std = self._measure(trainer, pl_module, data.train_dataloader())
        pl_module.autoencoder.set_latent_statistics(mean, std)

        def batches() -> Iterator[Any]:
            for batch in data.train_dataloader():
                yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        with data.unmixed():
            if pl_module.autoencoder.constraint == "weighted":
                weight = torch.tensor(pl_module.measure_full_weight(batches()), device=pl_module.device)
                pl_module.autoencoder.set_full_weight(float(trainer.strategy.reduce(weight, reduce_op="mean")))
        with data.unmixed(moved=False):  # dilation and blur would colour the noise
            gain = pl_module.measure_power_gain(batches()).to(pl_module.device)
        gain = trainer.strategy.reduce(gain, reduce_op="mean")
        pl_module.autoencoder.set_power_gain(gain)
        trainer.validating = True  # so that the data module draws as it does in validation
        raw_mean, raw_std = self._measure(trainer, pl_module, data.val_dataloader())
        trainer.training = True
        pl_module.train(training)
        scaled_mean, scaled_std = (raw_mean - mean) / std, raw_std / std
        values = {f"latent/mean_{i}": float(value) for i, value in enumerate(scaled_mean)}
        values |= {f"latent/std_{i}": float(value) for i, value in enumerate(scaled_std)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            print(f"Latents, standardised, on the validation set: std {_text(scaled_std)}, mean {_text(scaled_mean)}")
            if gain.max() > 1:
                period = 2 * data.geometry.bin_mm * (POINTS - 1) / int(gain.argmax())
                print(f"Power that samples get back: at most {gain.max() ** 2:.2f} times their own, at {period:.0f} mm")
            if not ((scaled_std - 1).abs() <= self.tolerance).all():
                print(
                    f"WARNING: a channel's standard deviation is not 1 +- {self.tolerance:g}: training and validation "
                    "data differ, or stage 1 has hardly been trained."
                )

    @staticmethod
    def _measure(trainer: Trainer, system: AutoencoderSystem, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
        seen = 0

        def batches() -> Iterator[Any]:
            nonlocal seen
            for batch in loader:
                seen += len(batch.sample_id)
                yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        mean, std = system.measure_latents(batches())
        mean, std = mean.to(system.device), std.to(system.device)
        if trainer.world_size == 1:
            return mean, std
        # each process saw its share, which may be a slice more or less than another's: combine the moments
        weighted = seen * torch.stack([torch.ones_like(mean), mean, std.square() + mean.square()])
        count, total, squares = trainer.strategy.reduce(weighted, reduce_op="sum")
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def _text(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())

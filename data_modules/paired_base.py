"""What the data modules of the downstream tasks share: pairs that are augmented alike, on the batch's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from allpet.geometry import ParallelBeam
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import PairedBatch
from data_modules.base import SinogramDataModule
from data_modules.loading import collate


class PairedDataModule(SinogramDataModule):
    """Batches of pairs, ``PairedBatch``; masks are not drawn.

    Args:
        batch_size: see ``SinogramDataModule``, as all that follows.
        num_workers: loader processes.
        num_scans: number of training pairs; None for all.
        seed: keys order and draws.
        symmetry: makes the symmetry augmentation: the same for input and targets. The images of augmented pairs
            would no longer lie where their sinograms say, so they are left out.
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int = 0,
        num_scans: int | None = None,
        seed: int = 0,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, num_scans, seed, None, symmetry, 0.0)

    @property
    def stage1_data_hash(self) -> None:
        """Stages 1 and 2 come from single slices, whose hash is another than that of pairs."""
        return None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches on the batch's device."""
        if not isinstance(batch, PairedBatch):
            return batch
        training = self.trainer is not None and self.trainer.training
        return self.augment_pairs(batch, self.trainer.current_epoch) if training else batch  # type: ignore[union-attr]

    @torch.no_grad()
    def augment_pairs(self, batch: PairedBatch, epoch: int) -> PairedBatch:
        """Draw symmetries by (seed, epoch, sample id) and apply each pair's to its input and its targets."""
        self._require_setup()
        if self.symmetry is None:
            return batch
        ids = batch.sample_id.tolist()
        drawn = collate([self.symmetry.draw(1, keyed_generator(self.seed, epoch, i, "symmetry")) for i in ids])
        given, expected, noisy = (self.symmetry.apply(x, drawn) for x in (batch.input, batch.expected, batch.noisy))
        return batch._replace(input=given, expected=expected, noisy=noisy, activity=None, labels=None, attenuation=None)

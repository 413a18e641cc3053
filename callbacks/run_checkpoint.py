"""Checkpoints to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keep the last few checkpoints of a run in its ``checkpoints/``, and ``last.ckpt``, a link to the newest.

    It also saves after the last step that is planned, from within the epoch: a run whose budget is raised later goes
    on with the next batch, as if it had never stopped. Names end in ``step=NUMBER``.

    Args:
        every_n_steps: optimiser steps between checkpoints.
        keep: how many to keep; with two, one that is damaged costs no more than ``every_n_steps``.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        super().__init__(
            filename="{step:08d}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=True,  # otherwise a save that falls on the end of an epoch waits for validation
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the run's folder from the trainer."""
        if self.dirpath is None:
            # as Lightning spells it, so that its state is recognised on resuming
            self.dirpath = str((Path(trainer.default_root_dir) / "checkpoints").resolve())
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every few steps, and after the last planned one."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        last = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
        if last and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: by now weight averaging has replaced the weights to continue from."""

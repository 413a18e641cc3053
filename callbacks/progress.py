"""Progress over the whole training."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgress(TQDMProgressBar):
    """One bar over all planned steps, with the time left; Lightning's own counts the batches of each short epoch.

    Args:
        refresh_rate: steps between updates.
    """

    def __init__(self, refresh_rate: int = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, *arguments: Any) -> None:
        """Begin at the step that is continued from."""
        steps = self.trainer.estimated_stepping_batches
        self.train_progress_bar = Tqdm(
            desc="Training",
            total=int(steps) if steps != float("inf") else None,
            initial=self.trainer.global_step,
            unit="step",
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Go on: epochs do not matter."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        bar = self.train_progress_bar
        if not bar.disable and (trainer.global_step - bar.n >= self.refresh_rate or trainer.global_step == bar.total):
            bar.update(trainer.global_step - bar.n)
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar: the losses, without the logger's name."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

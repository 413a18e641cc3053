"""Checkpoints to continue from."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from allpet.systems.base import Diverged


class RunCheckpoint(ModelCheckpoint):
    """Keep the last few checkpoints of a run in its ``checkpoints/``, and ``last.ckpt``, a link to the newest.

    It also saves after the last step that is planned, from within the epoch: a run whose budget is raised later goes
    on with the next batch, as if it had never stopped. Names end in ``step=NUMBER``.

    Signals to stop (SIGTERM, and the one by which SLURM announces the end of a job) wait for the end of the step: then
    SIGTERM leaves a checkpoint, and Lightning, which answers both, finds weights, position and optimiser in agreement.
    Ctrl+C does so, too; pressed again it stops at once, without.

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
            enable_version_counter=False,  # a resumed run would leave the link as it is and make another
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=True,  # otherwise a save that falls on the end of an epoch waits for validation
        )
        self._steps = 0
        self._handlers: dict[int, Any] = {}
        self._waiting: dict[int, FrameType | None] = {}
        self._speaks: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the run's folder from the trainer."""
        if self.dirpath is None:
            # as Lightning spells it, so that its state is recognised on resuming
            self.dirpath = str((Path(trainer.default_root_dir) / "checkpoints").resolve())
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count epochs as an undisturbed run does, and let the signals that Lightning answers wait for a step's end."""
        super().on_train_start(trainer, pl_module)
        loop = trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.processed == epochs.ready:
            # The checkpoint was of an epoch's last step, whose end Lightning has counted by now. It would not count the
            # beginning of the next, and resume in the wrong epoch from the next checkpoint of this kind.
            loop.reset_restart_stage()
        self._steps = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        self._speaks = os.getpid() if trainer.is_global_zero else None
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            # SIGTERM and, under SLURM, the one to requeue; Ctrl+C, unless somebody else answers it
            if type(handler).__module__.startswith("lightning.") or handler is signal.default_int_handler:
                self._handlers[number] = handler
                signal.signal(number, self._wait)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every few steps, after the last planned one, and before the process is stopped."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._steps:  # gradients are being accumulated, which a checkpoint does not hold
            return
        self._steps = trainer.global_step
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        last = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
        stopped = self._signals(trainer)
        wanted = last or signal.SIGTERM in stopped or signal.SIGINT in stopped
        if wanted and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        for number in stopped:
            self._handlers[number](number, self._waiting.pop(number, None))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: by now weight averaging has replaced the weights to continue from."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save nothing: within a step, weights, position and optimiser are not in agreement."""
        stopping = signal.SIGINT in self._waiting
        self._release()
        if stopping and not isinstance(exception, KeyboardInterrupt):  # as of loaders, which Ctrl+C has stopped, too
            raise KeyboardInterrupt from exception

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save, unless the weights are spoilt; then remove what earlier processes left behind.

        Raises:
            Diverged: if weights are not finite.
        """
        weights = trainer.lightning_module.named_parameters()
        broken = [name for name, weight in weights if not torch.isfinite(weight).all()]
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            raise Diverged(
                f"Weights are no longer finite at step {trainer.global_step} ({len(broken)} of this process"
                f"{', such as ' + broken[0] if broken else ''}), so nothing is saved: lower --model.learning_rate or "
                "check the data (make validate-data)."
            )
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and self.dirpath is not None:
            kept = sorted(path for path in Path(self.dirpath).glob("*step=*.ckpt") if not path.is_symlink())
            known = {Path(path).name for path in self.best_k_models}
            for path in kept[: -self.save_top_k]:
                if path.name not in known:  # its process was killed, or requeued, before it could be removed
                    with contextlib.suppress(OSError):
                        path.unlink()

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in self._waiting:
                raise KeyboardInterrupt
            # not by loaders, which are forks of this; unbuffered: this may come in the middle of another message
            if os.getpid() == self._speaks:
                os.write(2, b"\nStopping after this step; press Ctrl+C again to stop at once, without a checkpoint.\n")
        self._waiting[number] = frame

    def _signals(self, trainer: Trainer) -> list[int]:
        """Return the signals that any process of the training has got."""
        if trainer.world_size == 1:
            return list(self._waiting)
        return [
            number
            for number in self._handlers
            if trainer.strategy.reduce_boolean_decision(number in self._waiting, all=False)
        ]

    def _release(self) -> None:
        """Give the signals back, and those that were waiting, too."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._wait:
                signal.signal(number, handler)
        handlers, waiting = self._handlers, self._waiting
        self._handlers, self._waiting = {}, {}
        for number, frame in waiting.items():
            if number != signal.SIGINT:  # nothing is left to stop
                handlers[number](number, frame)

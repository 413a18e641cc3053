"""Panels: what the network makes of the same few slices, again and again while it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from allpet import AutoencoderSystem, LatentDiffusion, Prompt, Radon, SinogramBatch, fbp
from allpet.systems.baselines.base import SinogramGenerator
from callbacks.figures import DIFFERENCE, Tile, draw_grid, pixels, save_figure, top


class Panels(Callback):
    """Draw fixed validation slices at every validation, as sinograms and as FBP images, with a fixed colour range.

    Stage 1: input, expected, reconstruction, difference. Stage 2 and baselines: a real slice beside generated ones of
    its prompt, from fixed seeds. PNGs go to the run's ``panels/`` and to every logger that takes images. Placed after
    weight averaging in the list of callbacks, it shows the averaged weights.

    Args:
        n_slices: validation slices, one per prompt first.
        n_generated: generated sinograms per slice (stage 2).
        every_n_validations: how often.
        steps: sampling steps (stage 2); few, because it is drawn often.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, n_slices: int = 6, n_generated: int = 3, every_n_validations: int = 1, steps: int = 20) -> None:
        for name, value in (("n_slices", n_slices), ("n_generated", n_generated), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations is {every_n_validations}: to draw no panels, remove the callback.")
        self.n_slices, self.n_generated, self.steps = n_slices, n_generated, steps
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._drawn_at = -1
        self._batch: SinogramBatch | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, unless this is the sanity check."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        if self._batch is None:
            self._batch = self._choose(trainer)
        if self._validations % self.every_n_validations == 0:
            self._draw(trainer, pl_module)
        self._validations += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the final weights."""
        if self._batch is not None and self._drawn_at != trainer.global_step and trainer.is_global_zero:
            self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._batch is not None
        self._drawn_at = trainer.global_step
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.val_step_context():
            figure = self.figure(pl_module, self._batch, trainer.datamodule.radon, f"step {trainer.global_step}")  # type: ignore[attr-defined]
        pl_module.train(training)
        if not getattr(trainer, "fast_dev_run", False):
            folder = Path(trainer.default_root_dir) / "panels"
            save_figure(figure, folder / f"step-{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("panels", [pixels(figure)], step=trainer.global_step)

    def figure(self, system: LightningModule, batch: SinogramBatch, radon: Radon, title: str) -> Figure:
        """Draw one panel.

        Args:
            system: of stage 1 or 2 or a baseline, on the batch's device.
            batch: the slices.
            radon: the projector they belong to.
            title: what stands above.

        Raises:
            TypeError: if the system is of neither stage and no baseline.
        """
        if isinstance(system, AutoencoderSystem):
            return reconstruction_figure(batch, system.reconstruct(batch), radon, title)
        if isinstance(system, (LatentDiffusion, SinogramGenerator)):
            n = len(batch.sinogram)
            seeds = list(range(n * self.n_generated))
            prompt = Prompt(*(index.repeat_interleave(self.n_generated) for index in batch.prompt))
            if isinstance(system, LatentDiffusion):
                # as the network makes them: on the training grid, without the noise that sampling may add
                sampling = replace(system.sampling, steps=self.steps, n_views=None, n_bins=None, counts=None)
                generated = system.sample(prompt, seeds, sampling)
            else:
                generated = system.sample(prompt, seeds)
            return generation_figure(batch, generated.sinogram.unflatten(0, (n, self.n_generated)), radon, title)
        raise TypeError(
            f"Panels are drawn of stage 1 or 2 or a baseline, not of {type(system).__name__}: remove callbacks.Panels."
        )

    def _choose(self, trainer: Trainer) -> SinogramBatch:
        slices = trainer.datamodule.val_set  # type: ignore[attr-defined]
        batch = slices[spread(slices.prompt.names(), self.n_slices)]
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def reconstruction_figure(batch: SinogramBatch, reconstruction: Tensor, radon: Radon, title: str = "") -> Figure:
    """Draw input, expected, reconstruction and difference to expected, as sinograms and as FBP images.

    Args:
        batch: ``n`` slices.
        reconstruction: ``(n, 1, views, bins)``, data units.
        radon: the projector.
        title: what stands above.
    """
    kinds = {"input": batch.sinogram, "expected": batch.expected, "reconstruction": reconstruction}
    images = {name: fbp(radon, sinogram.float()) for name, sinogram in kinds.items()}
    rows = []
    for i in range(len(reconstruction)):
        row = []
        for parts in (kinds, images):
            suffix = ", FBP" if parts is images else ""
            limit = top(parts["expected"][i])
            row += [Tile(values[i, 0], (0, limit), "" if i else name + suffix) for name, values in parts.items()]
            difference = parts["reconstruction"][i, 0] - parts["expected"][i, 0]
            row.append(Tile(difference, (-limit / 4, limit / 4), "" if i else "difference" + suffix, DIFFERENCE))
        rows.append(row)
    return draw_grid(rows, batch.prompt.names(), title)


def generation_figure(batch: SinogramBatch, generated: Tensor, radon: Radon, title: str = "") -> Figure:
    """Draw real slices beside generated ones of the same prompt, as sinograms and as FBP images.

    Args:
        batch: ``n`` real slices.
        generated: ``(n, k, 1, views, bins)``, data units.
        radon: the projector.
        title: what stands above.
    """
    real = fbp(radon, batch.sinogram.float())
    images = fbp(radon, generated.float().flatten(0, 1)).unflatten(0, generated.shape[:2])
    rows = []
    for i in range(len(generated)):
        row = []
        for mine, others, suffix in ((batch.sinogram, generated, ""), (real, images, ", FBP")):
            limits = (0.0, top(mine[i]))
            row.append(Tile(mine[i, 0], limits, "" if i else "real" + suffix))
            row += [Tile(other[0], limits, "" if i else "generated" + suffix) for other in others[i]]
        rows.append(row)
    return draw_grid(rows, batch.prompt.names(), title)


def spread(names: list[str], n: int) -> list[int]:
    """Choose up to ``n`` indices: one of each name first, then more, spread evenly over those of a name."""
    groups = [[i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]
    rounds = -(-n // max(len(groups), 1))
    order = []
    for turn in range(rounds):
        for group in groups:
            wanted = min(rounds, len(group))
            if turn < wanted:
                order.append(group[turn * len(group) // wanted])
    return order[:n]

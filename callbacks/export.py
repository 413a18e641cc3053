"""Export: the folder to share."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

import allpet

_STAGES = {
    "AutoencoderSystem": "Stage 1 of ALL-PET: a KL autoencoder of PET sinograms.",
    "LatentDiffusion": "Stage 2 of ALL-PET: latent diffusion of PET sinograms, steered by tracer and region.",
    "LatentBridge": "A downstream task of ALL-PET: a diffusion bridge between latents of PET sinograms.",
    "SinogramGAN": "A baseline for ALL-PET: a GAN over PET sinograms, steered by tracer and region.",
    "ScoreModel": "A baseline for ALL-PET: score-based diffusion over PET sinograms, steered by tracer and region.",
    "ConditionalDiffusion": "A downstream task of ALL-PET: latent diffusion conditioned on a given PET sinogram.",
}
# What a card tells of the data. It is shared: whatever else a data module has to say of a user's data stays out.
_TOLD = (
    *("data", "data_hash", "geometry", "scale", "reprojected", "num_scans", "train", "val", "test"),
    *("split", "target", "dose", "task", "gain"),
)


class ExportPretrained(Callback):
    """When training ends, write ``pretrained/`` in the run's folder: config.json, model.safetensors and a card.

    Placed after weight averaging and ``LatentStatistics`` in the list of callbacks, it exports averaged weights with
    their statistics. Weights and statistics that are not finite are not exported.

    Args:
        folder: where to; None means ``pretrained/`` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what could not be exported in the end.

        Raises:
            ValueError: if the weights will be split over devices.
        """
        if stage == "fit" and isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(
                "The strategy splits the weights over devices, and callbacks.ExportPretrained needs them whole: use "
                "--trainer.strategy=ddp, or leave that callback out and keep the checkpoints."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, on the first process."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        if broken := not_finite(pl_module):
            print(
                f"WARNING: {broken[0]} and {len(broken) - 1} other weights are not finite, so nothing is exported: "
                "lower the learning rate and train again."
            )
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "pretrained")
        pl_module.save_pretrained(folder, card=card(trainer, pl_module))  # type: ignore[operator]
        print(f"Exported to {folder}")


def not_finite(system: nn.Module) -> list[str]:
    """Return the names of the parameters and stored buffers that hold NaN or infinity."""
    return [name for name, value in system.state_dict().items() if not torch.isfinite(value).all()]


def card(trainer: Trainer, system: LightningModule) -> str:
    """Write the model card: what the weights are, what they were trained on, what they are good for."""
    kind = type(system).__name__
    data = trainer.datamodule  # type: ignore[attr-defined]
    summary = {name: value for name, value in data.summary().items() if name in _TOLD}
    weights = sum(value.numel() for value in system.parameters())
    geometry = getattr(system, "geometry", None)
    metrics = {
        name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("val/")
    }
    usage = f"from allpet import {kind}\n\nsystem = {kind}.from_pretrained(FOLDER)"
    return "\n".join(
        [
            "---",
            "license: gpl-3.0",
            "library_name: allpet",
            "tags: [pet, sinogram, synthetic-data]",
            "---",
            f"# {kind}",
            "",
            _STAGES.get(kind, "A model of PET sinograms."),
            f"{weights:,} parameters, {trainer.global_step:,} optimiser steps, {geometry!r}.",
            f"Trained with allpet {allpet.__version__} and torch {torch.__version__}, {date.today().isoformat()}.",
            "",
            "```python",
            usage,
            "```",
            "",
            "## Trained on",
            *_table(summary),
            "",
            "## Scores on the validation set when training ended",
            *(_table(metrics) if metrics else ["None was measured."]),
            "",
            "## Use",
            "Research only; not a medical device and not for diagnosis. What the model makes is synthetic: say so.",
            "It knows the tracers, regions and patients it was trained on and nothing else: check what it makes",
            "against held-out data before you rely on it.",
            "",
        ]
    )


def _table(values: dict[str, Any]) -> list[str]:
    rows = ["| | |", "| --- | --- |"]
    for name, value in values.items():
        if not isinstance(value, str):
            value = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str)
        rows.append(f"| {name} | {value.replace('|', '/')} |")
    return rows

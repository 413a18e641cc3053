"""What share of a training step of stage 1 the data module takes: waiting for a batch, moving and augmenting it."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import SimpleProfiler

from allpet import Autoencoder, AutoencoderSystem, ParallelBeam, RadonMaskAugmentation, SymmetryAugmentation
from allpet.precision import fast_precision
from data_modules import SimulatedPET

# The networks and batches of experiments/scale/laptop.yaml; at 256 the same network on what a research scanner gives.
SCALES: dict[str, dict[str, Any]] = {
    "laptop": {"preset": "laptop", "batch_size": 8, "channels": (64, 128), "patch": 2, "seam": 4, "steps": 12},
    "256": {"preset": "research", "batch_size": 8, "channels": (64, 128), "patch": 2, "seam": 4, "steps": 4},
}


def step_shares(quick: bool = False) -> list[dict[str, Any]]:
    """Train a few steps at each scale, on the GPU if there is one, and return a row for each.

    Args:
        quick: the laptop's scale only.
    """
    return [_share(name, **settings) for name, settings in list(SCALES.items())[: 1 if quick else None]]


def _share(
    name: str, preset: str, batch_size: int, channels: tuple[int, ...], patch: int, seam: int, steps: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning advises about such a short training does not matter here
        data = SimulatedPET(
            ParallelBeam.preset(preset),
            prompts=("FDG:brain", "FDG:abdomen"),
            num_scans=batch_size,
            val_patients=2,
            test_patients=2,
            cache=None,
            batch_size=batch_size,
            augmentation=RadonMaskAugmentation,
            symmetry=SymmetryAugmentation,
        )
        system = AutoencoderSystem(Autoencoder(channels=channels, latent_channels=4, patch=patch, seam=seam))
        profiler = SimpleProfiler(folder, "profile")  # into a file, not onto the screen
        trainer = Trainer(
            max_steps=steps,
            precision=fast_precision(),
            profiler=profiler,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(system, data)
    # The first step also makes tables and warms up.
    spent = {key: sum(times[1:]) for key, times in profiler.recorded_durations.items()}

    def total(*parts: str) -> float:
        return sum(value for key, value in spent.items() if key.endswith(parts))

    # Moving a batch includes augmenting it.
    data_module, training = total("train_dataloader_next", "batch_to_device"), total("run_training_batch")
    return {
        "scale": name,
        "batch": batch_size,
        "threads": torch.get_num_threads(),
        "device": str(trainer.strategy.root_device),
        "precision": trainer.precision,
        "step_seconds": statistics.median(profiler.recorded_durations["run_training_batch"][1:]),
        "data_share": data_module / (data_module + training),
    }

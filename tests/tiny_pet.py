"""A data set of a few discs, made in milliseconds: for tests of everything around a training."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from allpet import Autoencoder, AutoencoderSystem, ParallelBeam, Prompt, Radon
from allpet.randomness import keyed_generator
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet
from data_modules.slice_cache import SliceCache, StoredArray

GEOMETRY = ParallelBeam(n_views=16, n_bins=16, bin_mm=20.0, image_size=16, pixel_mm=20.0)
PROMPTS = ("FDG:brain", "PSMA:abdomen")


class TinyPET(SinogramDataModule):
    """Discs at random places."""

    def __init__(
        self, n_slices: int = 24, disc_mm: float = 60.0, batch_size: int = 4, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.n_slices, self.disc_mm = n_slices, disc_mm

    def load(self) -> LoadedData:
        x, y = GEOMETRY.pixel_centers
        discs = []
        for i in range(self.n_slices):
            a, b = (torch.rand(2, generator=keyed_generator(i, "centre")) * 100 - 50).tolist()
            discs.append(((x - a) ** 2 + (y - b) ** 2 < self.disc_mm**2).float())
        sinogram = Radon(GEOMETRY).project(torch.stack(discs).unsqueeze(1))[:, 0]
        ids = torch.arange(self.n_slices)
        prompt = Prompt.of([PROMPTS[i % len(PROMPTS)] for i in range(self.n_slices)])
        whole = SinogramSet(sinogram, None, prompt, ids, ids // 2)
        train, val = list(range(8, self.n_slices)), list(range(4, 8))
        data_hash = f"discs-{self.n_slices}-{self.disc_mm:g}"
        return LoadedData(GEOMETRY, whole.subset(train), whole.subset(val), whole.subset([0, 1, 2, 3]), data_hash)


class StoredPET(TinyPET):
    """The same discs, those to train on read from a cache when asked for."""

    def __init__(self, folder: str, num_workers: int = 0) -> None:
        super().__init__(num_workers=num_workers)
        self.folder = folder

    def load(self) -> LoadedData:
        loaded = super().load()
        train = loaded.train
        cache = SliceCache(self.folder, lambda patient: {"sinogram": train.sinogram[4 * patient :][:4].numpy()}, 4)
        cache.fill(len(train) // 4, workers=0)
        stored = StoredArray(cache, "sinogram", len(train))
        kept = SinogramSet(stored, None, train.prompt, train.sample_id, train.patient_id)
        return dataclasses.replace(loaded, train=kept)


class KilledAt(Callback):
    """End this process by SIGKILL after the step that the environment variable KILL_AT names, if it does."""

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)


class Remembering(AutoencoderSystem):
    """A system whose hyper-parameters go into its checkpoints."""

    def __init__(self, autoencoder: Autoencoder, learning_rate: float = 1e-3) -> None:
        super().__init__(autoencoder, learning_rate)
        self.save_hyperparameters()

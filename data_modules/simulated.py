"""Simulated PET slices, made on first use: no download, any number of virtual patients, none in two splits."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from tqdm.auto import tqdm

import allpet.simulation
from allpet.augmentation import RadonMaskAugmentation
from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.prompts import OPEN, TRUNK_REGIONS, Prompt
from allpet.randomness import keyed_generator
from allpet.simulation import acquire, patient_slices, tracer_table
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet

PAPER_PROMPTS = ("FDG:brain", "FDG:trunk", "FDG:chest", "FDG:abdomen", "DOPA:brain", "PSMA:chest", "PSMA:abdomen")
"""The seven pairs of the paper's figure 2."""
# Patients are numbered through; each split has its own million.
_FIRST_PATIENT = {"train": 0, "val": 1_000_000, "test": 2_000_000}
_POPULATION = 10_000_000


class SimulatedPET(SinogramDataModule):
    """Slices of virtual patients, in SUV x mm.

    Each slice has its expected (noise-free, attenuation-corrected) sinogram and its normal-dose corrected one, which
    is noisy. Training patients are numbered in a fixed order in which the prompts take turns, so that ``num_scans``
    slices are always the first of one endless, balanced sequence; validation and test patients have numbers of their
    own. A patient prompted as trunk shows chest, abdomen or pelvis.

    Args:
        geometry: of the sinograms; None for the preset ``laptop``.
        prompts: what is simulated, as tracer:region.
        num_scans: number of training slices; the last patient is cut.
        slices_per_patient: slices of each patient, evenly spread over the region.
        val_patients: number of validation patients.
        test_patients: number of test patients.
        target: whether ``sinogram``, which is trained on, is the ``noisy`` or the ``expected`` one.
        dose: share of the normal dose.
        population: another number gives other patients throughout.
        cache: folder that keeps what was simulated; None to simulate anew each time.
        batch_size: see ``SinogramDataModule``, as all that follows.
        num_workers: loader processes.
        seed: keys order and draws, not the patients.
        augmentation: makes the mask augmentation.
        symmetry: makes the symmetry augmentation.
        trunk_probability: how often a part of the trunk is prompted as trunk in training.

    Raises:
        ValueError: if a number is out of range or a prompt unknown or open.
    """

    def __init__(
        self,
        geometry: ParallelBeam | None = None,
        prompts: Sequence[str] = (*PAPER_PROMPTS, "FDG:pelvis", "PSMA:pelvis"),
        num_scans: int = 500,
        slices_per_patient: int = 5,
        val_patients: int = 20,
        test_patients: int = 20,
        target: Literal["noisy", "expected"] = "noisy",
        dose: float = 1.0,
        population: int = 0,
        cache: str | None = "outputs/cache",
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        augmentation: Callable[[Radon], nn.Module] | None = RadonMaskAugmentation,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
        trunk_probability: float = 0.2,
    ) -> None:
        super().__init__(batch_size, num_workers, num_scans, seed, augmentation, symmetry, trunk_probability)
        self.save_hyperparameters(logger=False, ignore=["geometry", "augmentation", "symmetry"])
        counts = {"num_scans": num_scans, "slices_per_patient": slices_per_patient, "val_patients": val_patients}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}, but must be at least 1.")
        if target not in ("noisy", "expected"):
            raise ValueError(f"target is {target!r}, but must be 'noisy' or 'expected'.")
        self.prompts = Prompt.of(prompts).names()
        if any(OPEN in name.split(":") for name in self.prompts) or not self.prompts:
            raise ValueError(f"prompts are {list(prompts)}, but simulating needs at least one tracer:region, not open.")
        # Optional as in SinogramFiles: one type in both lets a command line replace one class by the other.
        self.geometry = geometry if geometry is not None else ParallelBeam.preset("laptop")
        self.slices_per_patient, self.target = slices_per_patient, target
        self.patients = {
            "train": math.ceil(num_scans / slices_per_patient),
            "val": val_patients,
            "test": test_patients,
        }
        self.dose, self.population, self.cache = dose, population, cache

    def prepare_data(self) -> None:
        """Fill the cache, on one process only."""
        if self.cache is not None:
            for split in self.patients:
                self._slices(split)

    def load(self) -> LoadedData:
        """Simulate, or read from the cache."""
        train, val, test = (self._set(split) for split in self.patients)
        chosen = train.subset(range(self.num_scans or len(train)))
        identity = {**self._recipe(), "num_scans": self.num_scans, "patients": self.patients, "target": self.target}
        notes = {"target": self.target, "dose": self.dose, "train_patients": chosen.patient_id.unique().tolist()}
        return LoadedData(self.geometry, chosen, val, test, _digest(identity), notes=notes)

    def _set(self, split: str) -> SinogramSet:
        slices = self._slices(split)
        expected, noisy = (torch.from_numpy(slices[name]) for name in ("expected", "noisy"))
        patient_id = self._numbers(split).repeat_interleave(self.slices_per_patient)
        index = torch.arange(len(patient_id)) % self.slices_per_patient
        names = [self.prompts[i // self.slices_per_patient % len(self.prompts)] for i in range(len(patient_id))]
        return SinogramSet(
            noisy if self.target == "noisy" else expected,
            expected,
            Prompt.of(names),
            patient_id * self.slices_per_patient + index,
            patient_id,
        )

    def _numbers(self, split: str) -> torch.Tensor:
        """Number the patients of a split, ``(patients,)`` int64."""
        return self.population * _POPULATION + _FIRST_PATIENT[split] + torch.arange(self.patients[split])

    def _recipe(self) -> dict[str, Any]:
        """Return all that decides how each slice looks."""
        return {
            "simulator": _simulator_digest(),
            "geometry": self.geometry.to_dict(),
            "prompts": self.prompts,
            "slices_per_patient": self.slices_per_patient,
            "dose": self.dose,
            "population": self.population,
        }

    def _slices(self, split: str) -> dict[str, np.ndarray]:
        """Return ``expected`` and ``noisy``, each ``(slices, views, bins)`` float32, from the cache as far as it goes.

        What is cached does not depend on the number of patients, so a larger set continues a smaller one.
        """
        n_slices = self.patients[split] * self.slices_per_patient
        path = Path(self.cache, f"simulated-{_digest(self._recipe())}-{split}.npz") if self.cache is not None else None
        shape = (0, *self.geometry.sinogram_shape)
        slices = {name: np.empty(shape, np.float32) for name in ("expected", "noisy")}
        if path is not None and path.exists():
            try:
                with np.load(path, allow_pickle=False) as stored:
                    slices = {name: stored[name] for name in slices}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                rank_zero_warn(f"{path} cannot be read ({error}); its slices are simulated anew.")
        cached = len(slices["expected"]) // self.slices_per_patient
        if cached < self.patients[split]:
            radon = Radon(self.geometry)
            numbers = self._numbers(split).tolist()
            made = [
                self._patient(radon, numbers[i], self.prompts[i % len(self.prompts)])
                for i in tqdm(range(cached, len(numbers)), desc=f"Simulating {split} patients", unit="patient")
            ]
            slices = {name: np.concatenate([slices[name], *(new[name] for new in made)]) for name in slices}
            if path is not None:
                _save(path, slices)
        return {name: array[:n_slices] for name, array in slices.items()}

    def _patient(self, radon: Radon, number: int, prompt: str) -> dict[str, np.ndarray]:
        """Simulate and scan one patient."""
        tracer, region = prompt.split(":")
        if region == "trunk":
            part = torch.randint(len(TRUNK_REGIONS), (), generator=keyed_generator(number, "part of the trunk"))
            region = TRUNK_REGIONS[part]
        body = patient_slices(number, region, tracer, self.slices_per_patient, self.geometry)
        scan = acquire(
            radon,
            body.activity,
            body.attenuation,
            region,
            keyed_generator(number, prompt, "scan"),
            self.dose,
            psf_mm=tracer_table(tracer).resolution_mm(),
        )
        return {"expected": scan.expected.squeeze(1).numpy(), "noisy": scan.corrected.squeeze(1).numpy()}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file that is whole or not there, also when two processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


@functools.cache
def _simulator_digest() -> str:
    """Identify the simulator by its source and tables: whoever changes it changes the data."""
    folder = Path(allpet.simulation.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".py", ".txt", ".npz"):
            content = path.read_bytes()
            digest.update(content if path.suffix == ".npz" else content.replace(b"\r\n", b"\n"))
    return digest.hexdigest()

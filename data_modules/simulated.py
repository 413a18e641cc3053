"""Simulated PET slices, made on first use: no download, any number of virtual patients, none in two splits."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

import allpet.simulation
from allpet.augmentation import RadonMaskAugmentation
from allpet.geometry import ParallelBeam
from allpet.mixup import MixupAugmentation
from allpet.projector import Radon
from allpet.prompts import OPEN, TRUNK_REGIONS, Prompt
from allpet.randomness import keyed_generator
from allpet.simulation import acquire, brain, patient_slices, tracer_table
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet
from data_modules.slice_cache import Arrays, SliceCache, StoredArray, one_thread

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
        cache: folder that keeps what was simulated; None to simulate anew each time, in memory.
        workers: processes that simulate; None for one per core where that pays.
        memory_gb: most memory for the slices of a split; more are read from the cache when they are needed.
        batch_size: see ``SinogramDataModule``, as all that follows.
        num_workers: loader processes.
        seed: keys order and draws, not the patients.
        augmentation: makes the mask augmentation.
        symmetry: makes the symmetry augmentation.
        trunk_probability: how often a part of the trunk is prompted as trunk in training.
        mixup: mixes training slices with others of the same tracer and region.

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
        workers: int | None = None,
        memory_gb: float = 2.0,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        augmentation: Callable[[Radon], nn.Module] | None = RadonMaskAugmentation,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
        trunk_probability: float = 0.2,
        mixup: MixupAugmentation | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, num_scans, seed, augmentation, symmetry, trunk_probability, mixup)
        self.save_hyperparameters(logger=False, ignore=["geometry", "augmentation", "symmetry", "mixup"])
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
        self.workers, self.memory_gb = workers, memory_gb

    def prepare_data(self) -> None:
        """Fill the cache, on one process only."""
        if self.cache is not None:
            for split in self.patients:
                self._stored(split)

    def load(self) -> LoadedData:
        """Simulate, or read from the cache."""
        train, val, test = (self._set(split) for split in self.patients)
        identity = {**self._recipe(), "num_scans": self.num_scans, "patients": self.patients, "target": self.target}
        patients = train.patient_id.unique().tolist()
        notes = {"target": self.target, "dose": self.dose, "train_patients": patients}
        return LoadedData(self.geometry, train, val, test, digest(identity), notes=notes)

    def _set(self, split: str) -> SinogramSet:
        n_slices = self.patients[split] * self.slices_per_patient
        if split == "train":
            n_slices = self.num_scans or n_slices
        arrays = self._arrays(split, n_slices)
        row = torch.arange(n_slices)
        patient = row // self.slices_per_patient
        patient_id = first_number(split, self.population) + patient
        return SinogramSet(
            arrays[self.target],
            arrays["expected"],
            Prompt.of([self.prompts[i % len(self.prompts)] for i in patient.tolist()]),
            patient_id * self.slices_per_patient + row % self.slices_per_patient,
            patient_id,
        )

    def _recipe(self) -> dict[str, Any]:
        """Return all that decides how each slice looks."""
        return {
            "simulator": simulator_digest(),
            "geometry": self.geometry.to_dict(),
            "prompts": self.prompts,
            "slices_per_patient": self.slices_per_patient,
            "dose": self.dose,
            "population": self.population,
        }

    def _arrays(self, split: str, n_slices: int) -> Mapping[str, torch.Tensor | StoredArray]:
        """Return ``expected`` and ``noisy``, each ``(slices, views, bins)`` float32."""
        n_patients = self.patients[split]
        if self.cache is None:
            return in_memory(self._simulation(split), n_patients, n_slices, f"{split} patients")
        stored = self._stored(split)
        return from_cache(stored, ("expected", "noisy"), n_patients, n_slices, self.memory_gb)

    def _stored(self, split: str) -> SliceCache:
        """Return a split's cache, filled.

        What is cached does not depend on the number of patients, so a larger set continues a smaller one.
        """
        recipe, simulation = self._recipe(), self._simulation(split)
        folder = Path(self.cache or ".", f"simulated-{digest(recipe)}-{split}")
        what = f"{split} patients"
        cache = SliceCache(folder, simulation, self.slices_per_patient, recipe, (), what, simulation.warm_up)
        cache.fill(self.patients[split], self.workers)
        return cache

    def _simulation(self, split: str) -> Simulation:
        first = first_number(split, self.population)
        return Simulation(Radon(self.geometry), first, tuple(self.prompts), self.slices_per_patient, self.dose)


@dataclass(frozen=True)
class Simulation:
    """Simulates and scans the patients of a split.

    Attributes:
        radon: the projector.
        first: number of the first patient.
        prompts: take turns.
        slices_per_patient: slices of each.
        dose: share of the normal dose.
    """

    radon: Radon
    first: int
    prompts: tuple[str, ...]
    slices_per_patient: int
    dose: float

    def __call__(self, index: int) -> Arrays:
        """Return ``expected`` and ``noisy`` of a patient, ``(slices_per_patient, views, bins)`` float32."""
        number, prompt = self.first + index, self.prompts[index % len(self.prompts)]
        tracer, region = prompt.split(":")
        region = shown_region(number, region)
        body = patient_slices(number, region, tracer, self.slices_per_patient, self.radon.geometry)
        scan = acquire(
            self.radon,
            body.activity,
            body.attenuation,
            region,
            keyed_generator(number, prompt, "scan"),
            self.dose,
            psf_mm=tracer_table(tracer).resolution_mm(),
        )
        return {"expected": scan.expected.squeeze(1).numpy(), "noisy": scan.corrected.squeeze(1).numpy()}

    def warm_up(self) -> None:
        """Load what processes share."""
        warm_up(self.radon)


def warm_up(radon: Radon) -> None:
    """Load a projector's matrix and the average brain, which processes started after it share."""
    brain.template()
    radon.project(torch.zeros(1, 1, *radon.geometry.image_shape))


def first_number(split: str, population: int) -> int:
    """Return the number of the first patient of a split; no number is in two splits."""
    return population * _POPULATION + _FIRST_PATIENT[split]


def shown_region(number: int, region: str) -> str:
    """Return the region that a patient shows: one prompted as trunk shows a part of it."""
    if region != "trunk":
        return region
    part = torch.randint(len(TRUNK_REGIONS), (), generator=keyed_generator(number, "part of the trunk"))
    return TRUNK_REGIONS[part]


def in_memory(
    make: Callable[[int], Arrays], n_patients: int, n_slices: int, what: str
) -> dict[str, torch.Tensor | StoredArray]:
    """Make patients and return the first slices of each array."""
    with one_thread():
        made = [make(i) for i in tqdm(range(n_patients), desc=f"Simulating {what}", unit="patient")]
    if not made:
        made = [{name: array[:0] for name, array in make(0).items()}]
    return {name: torch.from_numpy(np.concatenate([new[name] for new in made])[:n_slices]) for name in made[0]}


def from_cache(
    cache: SliceCache, names: Sequence[str], n_patients: int, n_slices: int, memory_gb: float
) -> dict[str, torch.Tensor | StoredArray]:
    """Return the first slices of each array: in memory if all together fit, else read when asked for."""
    if not n_patients:
        nothing = {name: array[:0] for name, array in cache.make(0).items()}
        return {name: torch.from_numpy(nothing[name]) for name in names}
    arrays = {name: StoredArray(cache, name, n_slices) for name in names}
    if sum(array.nbytes for array in arrays.values()) > memory_gb * 1e9:
        return dict(arrays)
    return {name: array[torch.arange(n_slices)] for name, array in arrays.items()}


def digest(identity: dict[str, Any]) -> str:
    """Return a short name for what JSON can hold."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


@functools.cache
def simulator_digest(pairs: bool = False) -> str:
    """Identify the simulator by its source and tables: whoever changes it changes the data.

    Args:
        pairs: whether the paired tasks count; single slices do not depend on them.
    """
    folder = Path(allpet.simulation.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".py", ".txt", ".npz") and (pairs or path.name != "tasks.py"):
            content = path.read_bytes()
            digest.update(content if path.suffix == ".npz" else content.replace(b"\r\n", b"\n"))
    return digest.hexdigest()

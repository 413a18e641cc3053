"""Pairs of simulated slices for the downstream tasks, made on first use and kept in a cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.prompts import OPEN, TRACERS, Prompt, prompt_index
from allpet.simulation.tasks import TASKS, TWO_TRACERS, PairOptions, make_pairs
from data_modules.base import LoadedData
from data_modules.paired_base import PairedDataModule
from data_modules.paired_set import IMAGES, NUMBERS, PairedSet, ReversedPairs, read_pairs
from data_modules.simulated import digest, first_number, from_cache, in_memory, shown_region, simulator_digest, warm_up
from data_modules.slice_cache import Arrays, SliceCache

DEFAULT_PROMPTS = {
    "low_dose": ("FDG:brain", "FDG:chest", "FDG:abdomen", "FDG:pelvis", "DOPA:brain", "PSMA:abdomen"),
    "attenuation": ("FDG:brain", "DOPA:brain", "FDG:chest", "FDG:abdomen"),
    "delayed": ("FDG:chest", "FDG:abdomen", "FDG:pelvis", "PSMA:abdomen", "PSMA:pelvis"),
    "separation": ("FDG+DOPA:brain", "FDG+PSMA:chest", "FDG+PSMA:abdomen", "FDG+PSMA:pelvis"),
    "conversion": ("FDG+DOPA:brain", "FDG+PSMA:chest", "FDG+PSMA:abdomen", "FDG+PSMA:pelvis"),
}
"""What is simulated for each task where nothing else is asked for."""
_ARRAYS = ("input", "expected", "noisy", *IMAGES, *NUMBERS)


class PairedTask(PairedDataModule):
    """Pairs of slices of virtual patients for one of the five tasks, in SUV x mm; see ``allpet.simulation.tasks``.

    Patients are numbered as in ``SimulatedPET``: one that a model was pre-trained on is in no test set here, and
    ``num_scans`` pairs are always the first of one endless sequence in which the prompts take turns. Batches are
    ``PairedBatch``; masks are not drawn.

    Args:
        task: ``low_dose``, ``attenuation``, ``delayed``, ``separation`` or ``conversion``.
        geometry: of the sinograms; None for the preset ``laptop``.
        prompts: what is simulated, as tracer:region; of two tracers as FDG+PSMA:abdomen, in *conversion* from the first
            to the second. None for a mix that suits the task.
        options: ranges that doses, delays, ratios and movements are drawn from.
        num_scans: number of training pairs; the last patient is cut.
        slices_per_patient: slices of each patient, evenly spread over the region.
        val_patients: number of validation patients.
        test_patients: number of test patients.
        population: another number gives other patients throughout.
        cache: folder that keeps what was simulated; None to simulate anew each time, in memory.
        workers: processes that simulate; None for one per core where that pays.
        memory_gb: most memory for the pairs of a split; more are read from the cache when they are needed.
        batch_size: see ``SinogramDataModule``, as all that follows.
        num_workers: loader processes.
        seed: keys order and draws, not the patients.
        symmetry: makes the symmetry augmentation: the same for input and targets. The images of augmented pairs
            would no longer lie where their sinograms say, so they are left out.
        reverse: whether inputs are learned from targets, see ``allpet.conditions.reverse_pairs``.
        generated: file of generated pairs (``write_pairs``) that are trained on besides the simulated ones.

    Raises:
        ValueError: if a number is out of range, the task unknown, or a prompt unknown, open or unfit for the task.
    """

    def __init__(
        self,
        task: str = "low_dose",
        geometry: ParallelBeam | None = None,
        prompts: Sequence[str] | None = None,
        options: PairOptions | None = None,
        num_scans: int = 500,
        slices_per_patient: int = 5,
        val_patients: int = 20,
        test_patients: int = 20,
        population: int = 0,
        cache: str | None = "outputs/cache",
        workers: int | None = None,
        memory_gb: float = 2.0,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
        reverse: bool = False,
        generated: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, num_scans, seed, symmetry)
        self.save_hyperparameters(logger=False, ignore=["geometry", "options", "symmetry"])
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
        counts = {"num_scans": num_scans, "slices_per_patient": slices_per_patient, "val_patients": val_patients}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}, but must be at least 1.")
        if test_patients < 0:
            raise ValueError(f"test_patients is {test_patients}, but must not be negative; 0 is for none.")
        if reverse and generated:
            raise ValueError("Generated pairs are for the task itself: leave out either reverse or generated.")
        self.task, self.options, self.reverse, self.generated = task, options or PairOptions(), reverse, generated
        self.prompts = [read_prompt(prompt, task) for prompt in (DEFAULT_PROMPTS[task] if prompts is None else prompts)]
        if not self.prompts:
            raise ValueError("prompts are empty, but simulating needs at least one tracer:region.")
        self.geometry = geometry if geometry is not None else ParallelBeam.preset("laptop")
        self.slices_per_patient, self.population = slices_per_patient, population
        self.patients = {
            "train": math.ceil(num_scans / slices_per_patient),
            "val": val_patients,
            "test": test_patients,
        }
        self.cache, self.workers, self.memory_gb = cache, workers, memory_gb

    def prepare_data(self) -> None:
        """Fill the cache, on one process only."""
        if self.cache is not None:
            for split in self.patients:
                self._stored(split)

    def load(self) -> LoadedData:
        """Simulate, or read from the cache."""
        train, val, test = (self._set(split) for split in self.patients)
        identity = {**self._recipe(), "num_scans": self.num_scans, "patients": self.patients}
        if self.reverse:
            identity["reverse"] = True
        if self.generated is not None:
            more = read_pairs(self.generated, self.task, self.geometry)
            train = train.joined(more)
            identity["generated"] = [len(more), float(more.arrays["input"].sum())]  # type: ignore[union-attr]
        notes = {"task": self.task, "train_patients": train.patient_id.unique().tolist()}
        return LoadedData(self.geometry, train, val, test, digest(identity), notes=notes)

    def _set(self, split: str) -> PairedSet:
        n_patients = self.patients[split]
        n_slices = self.num_scans if split == "train" else n_patients * self.slices_per_patient
        assert n_slices is not None
        if self.cache is None:
            arrays = in_memory(self._simulation(split), n_patients, n_slices, f"{split} patients")
        else:
            arrays = from_cache(self._stored(split), _ARRAYS, n_patients, n_slices, self.memory_gb)
        row = torch.arange(n_slices)
        patient = row // self.slices_per_patient
        patient_id = first_number(split, self.population) + patient
        chosen = [self.prompts[i % len(self.prompts)] for i in patient.tolist()]
        targets = [
            [prompt_index(name, TRACERS, "tracer") for name in target_names(self.task, names)] for names, _ in chosen
        ]
        kind = ReversedPairs if self.reverse else PairedSet
        return kind(
            arrays,
            self.task,
            torch.tensor(targets, dtype=torch.int64).view(n_slices, len(target_names(self.task, self.prompts[0][0]))),
            Prompt.of([(names[0], region) for names, region in chosen]),
            patient_id * self.slices_per_patient + row % self.slices_per_patient,
            patient_id,
        )

    def _recipe(self) -> dict[str, Any]:
        """Return all that decides how each pair looks."""
        return {
            "simulator": simulator_digest(pairs=True),
            "task": self.task,
            "geometry": self.geometry.to_dict(),
            "prompts": [f"{'+'.join(names)}:{region}" for names, region in self.prompts],
            "options": dataclasses.asdict(self.options),
            "slices_per_patient": self.slices_per_patient,
            "population": self.population,
        }

    def _stored(self, split: str) -> SliceCache:
        """Return a split's cache, filled."""
        recipe, simulation = self._recipe(), self._simulation(split)
        folder = Path(self.cache or ".", f"{self.task}-{digest(recipe)}-{split}")
        what = f"{self.task} pairs of {split} patients"
        cache = SliceCache(folder, simulation, self.slices_per_patient, recipe, IMAGES, what, simulation.warm_up)
        cache.fill(self.patients[split], self.workers)
        return cache

    def _simulation(self, split: str) -> PairSimulation:
        first = first_number(split, self.population)
        radon = Radon(self.geometry)
        return PairSimulation(radon, first, self.task, tuple(self.prompts), self.slices_per_patient, self.options)


@dataclass(frozen=True)
class PairSimulation:
    """Simulates the pairs of the patients of a split.

    Attributes:
        radon: the projector.
        first: number of the first patient.
        task: one of ``TASKS``.
        prompts: tracers and region, taking turns.
        slices_per_patient: slices of each.
        options: ranges of the settings.
    """

    radon: Radon
    first: int
    task: str
    prompts: tuple[tuple[tuple[str, ...], str], ...]
    slices_per_patient: int
    options: PairOptions

    def __call__(self, index: int) -> Arrays:
        """Return a patient's pairs, as the fields of ``PairedBatch`` that differ from slice to slice."""
        number = self.first + index
        names, region = self.prompts[index % len(self.prompts)]
        region = shown_region(number, region)
        pairs = make_pairs(self.task, self.radon, number, region, names, self.slices_per_patient, self.options)
        return {name: getattr(pairs, name).numpy() for name in _ARRAYS}

    def warm_up(self) -> None:
        """Load what processes share."""
        warm_up(self.radon)


def read_prompt(prompt: str, task: str) -> tuple[tuple[str, ...], str]:
    """Return the tracers and the region of a prompt such as FDG:brain or FDG+PSMA:abdomen.

    Raises:
        ValueError: if a name is unknown or open, or the number of tracers does not fit the task.
    """
    tracers, _, region = prompt.partition(":")
    pairs = [name.split(":") for name in Prompt.of([f"{tracer}:{region}" for tracer in tracers.split("+")]).names()]
    names = tuple(name for name, _ in pairs)
    if OPEN in (*names, pairs[0][1]):
        raise ValueError(f"The prompt is {prompt!r}, but simulating needs a tracer and a region, not open.")
    wanted = 2 if task in TWO_TRACERS else 1
    if len(names) != wanted or len(set(names)) != wanted:
        shape = "FDG+PSMA:abdomen" if wanted == 2 else "FDG:abdomen"
        raise ValueError(f"The prompt is {prompt!r}, but {task} takes {wanted} tracer(s), such as {shape}.")
    return names, pairs[0][1]


def target_names(task: str, tracers: Sequence[str]) -> Sequence[str]:
    """Return the tracers of a task's targets."""
    return tracers[1:] if task == "conversion" else tracers

"""Pairs of several downstream tasks in one data set, for one model that is told which task it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allpet.geometry import ParallelBeam
from allpet.prompts import Prompt
from allpet.simulation.tasks import TASKS, PairedBatch
from data_modules.base import LoadedData, SinogramSet
from data_modules.loading import collate
from data_modules.paired import PairedSet, PairedTask
from data_modules.simulated import digest


class MixedPairs(SinogramSet):
    """Pairs of several tasks, one target each, the tasks taking turns.

    A pair of two targets is two pairs of one input. Sample ids are told apart by task and target, so that each pair
    has draws of its own.

    Args:
        parts: the pairs of each task.
    """

    def __init__(self, parts: Sequence[PairedSet]) -> None:
        self.parts = list(parts)
        counts = [(len(part), part.target_tracer.shape[1]) for part in parts]
        entries = [
            (row, number, target)
            for number, (rows, targets) in enumerate(counts)
            for row in range(rows)
            for target in range(targets)
        ]
        # Row by row: whatever is measured on the first slices is measured on all tasks.
        self.entries = torch.tensor(sorted(entries), dtype=torch.int64)
        chosen = [self._ids(*entry) for entry in self.entries.tolist()]
        prompts = [self.parts[number].prompt for number in self.entries[:, 1].tolist()]
        rows = self.entries[:, 0].tolist()
        wanted = [part.arrays["noisy"][torch.arange(len(part))] for part in parts]
        super().__init__(
            torch.stack([wanted[number][row, target] for row, number, target in self.entries.tolist()]),
            None,
            Prompt(
                torch.stack([prompt.tracer[row] for prompt, row in zip(prompts, rows, strict=True)]),
                torch.stack([prompt.region[row] for prompt, row in zip(prompts, rows, strict=True)]),
            ),
            torch.tensor([sample for sample, _ in chosen], dtype=torch.int64),
            torch.tensor([patient for _, patient in chosen], dtype=torch.int64),
        )

    def __getitem__(self, index: int | Sequence[int]) -> PairedBatch:  # type: ignore[override]
        rows = torch.as_tensor([index] if isinstance(index, int) else index, dtype=torch.int64)
        entries = self.entries[rows]
        numbers = entries[:, 1].unique().tolist()
        places = [(entries[:, 1] == number).nonzero()[:, 0] for number in numbers]
        batches = [self._part(number, entries[place]) for number, place in zip(numbers, places, strict=True)]
        order = torch.cat(places).argsort()
        return _reordered(collate(batches), order)._replace(sample_id=self.sample_id[rows])

    def subset(self, indices: Sequence[int]) -> MixedPairs:
        """Return the chosen pairs, in the given order, as a set of their own."""
        rows, other = torch.as_tensor(indices, dtype=torch.int64), copy.copy(self)
        for name in ("entries", "sinogram", "sample_id", "patient_id"):
            setattr(other, name, getattr(self, name)[rows])
        other.prompt = Prompt(self.prompt.tracer[rows], self.prompt.region[rows])
        return other

    def _part(self, number: int, entries: Tensor) -> PairedBatch:
        batch = self.parts[number][entries[:, 0].tolist()]
        place, target = torch.arange(len(entries)), entries[:, 2]

        def one(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[place, target].unsqueeze(1)

        names = ("expected", "noisy", "activity", "target_tracer", "share")
        parts: dict[str, Any] = {name: one(getattr(batch, name)) for name in names}
        return batch._replace(**parts)

    def _ids(self, row: int, number: int, target: int) -> tuple[int, int]:
        part = self.parts[number]
        task, sample = TASKS.index(part.task), int(part.sample_id[row])
        return (sample * len(TASKS) + task) * 2 + target, int(part.patient_id[row])


class PairedMix(PairedTask):
    """Pairs of several tasks of ``PairedTask``, each with its own prompts and options' defaults.

    Args:
        tasks: which.
        geometry: of the sinograms; None for the preset ``laptop``.
        num_scans: number of training pairs of each task; the last patient is cut.
        slices_per_patient: slices of each patient.
        val_patients: number of validation patients of each task.
        test_patients: number of test patients of each task.
        population: another number gives other patients throughout.
        cache: see ``PairedTask``, as all that follows.
        workers: processes that simulate.
        memory_gb: most memory for the pairs of a split.
        batch_size: see ``SinogramDataModule``.
        num_workers: loader processes.
        seed: keys order and draws, not the patients.
        symmetry: makes the symmetry augmentation.

    Raises:
        ValueError: as ``PairedTask``, or if a task is named twice or none is.
    """

    def __init__(
        self,
        tasks: Sequence[str] = TASKS,
        geometry: ParallelBeam | None = None,
        num_scans: int = 500,
        slices_per_patient: int = 5,
        val_patients: int = 4,
        test_patients: int = 4,
        population: int = 0,
        cache: str | None = "outputs/cache",
        workers: int | None = None,
        memory_gb: float = 2.0,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
    ) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks are {list(tasks)}; name one or more of {', '.join(TASKS)}, each once.")
        counts: dict[str, Any] = {
            "num_scans": num_scans,
            "slices_per_patient": slices_per_patient,
            "val_patients": val_patients,
            "test_patients": test_patients,
            "population": population,
            "cache": cache,
            "workers": workers,
            "memory_gb": memory_gb,
        }
        loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "seed": seed}
        super().__init__(tasks[0], geometry, **counts, **loading, symmetry=symmetry)
        self.modules_of = [PairedTask(task, self.geometry, **counts) for task in tasks]
        self.tasks = list(tasks)

    def prepare_data(self) -> None:
        """Fill the cache, on one process only."""
        for one in self.modules_of:
            one.prepare_data()

    def load(self) -> LoadedData:
        """Simulate, or read from the cache."""
        loaded = [one.load() for one in self.modules_of]
        sets = [MixedPairs([getattr(one, name) for one in loaded]) for name in ("train", "val", "test")]
        notes = {"task": "+".join(self.tasks), "train_patients": sets[0].patient_id.unique().tolist()}
        train, val, test = sets
        identity = digest({"parts": [one.data_hash for one in loaded]})
        return LoadedData(self.geometry, train, val, test, identity, notes=notes)


def _reordered(batch: PairedBatch, order: Tensor) -> PairedBatch:
    prompt = Prompt(batch.prompt.tracer[order], batch.prompt.region[order])
    parts = {name: value[order] for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**parts, prompt=prompt)

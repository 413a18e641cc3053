"""Sets of pairs of slices: as simulated, the wrong way round, or joined with pairs that a model has generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from allpet.conditions import reverse_pairs
from allpet.geometry import ParallelBeam
from allpet.io import DataError
from allpet.io.atomic import replacing
from allpet.prompts import Prompt
from allpet.simulation.tasks import TASKS, PairedBatch
from data_modules.base import SinogramSet
from data_modules.slice_cache import StoredArray


class GeometryError(DataError):
    """Pairs are of another geometry than asked for."""


IMAGES = ("activity", "labels", "attenuation")
NUMBERS = ("delay_min", "dose", "share")
_KEPT = ("input", "expected", "noisy", *NUMBERS, "target_tracer", "sample_id", "patient_id")


class PairedSet(SinogramSet):
    """Pairs of slices; ``set[i]`` is a batch of one and ``set[[i, j, ...]]`` one of several.

    Args:
        arrays: the fields of ``PairedBatch`` that are stored, ``(slices, ...)`` each; images may be missing.
        task: of all pairs.
        target_tracer: ``(slices, targets)``.
        prompt: tracer and region of each input.
        sample_id: identity of each slice in the whole data set, ``(slices,)`` int64.
        patient_id: of each slice's patient, ``(slices,)`` int64.
    """

    def __init__(
        self,
        arrays: Mapping[str, Tensor | StoredArray],
        task: str,
        target_tracer: Tensor,
        prompt: Prompt,
        sample_id: Tensor,
        patient_id: Tensor,
    ) -> None:
        # The scale of the data is that of their targets: inputs without attenuation correction are several times less.
        super().__init__(arrays["noisy"], arrays["expected"], prompt, sample_id, patient_id)
        self.arrays, self.task, self.target_tracer = dict(arrays), task, target_tracer

    def __getitem__(self, index: int | Sequence[int]) -> PairedBatch:  # type: ignore[override]
        rows = torch.as_tensor([index] if isinstance(index, int) else index, dtype=torch.int64)
        missing: dict[str, Any] = {name: None for name in IMAGES if name not in self.arrays}
        return PairedBatch(
            **{name: array[rows] for name, array in self.arrays.items()},
            **missing,
            task=torch.full((len(rows),), TASKS.index(self.task)),
            prompt=Prompt(self.prompt.tracer[rows], self.prompt.region[rows]),
            target_tracer=self.target_tracer[rows],
            sample_id=self.sample_id[rows],
            patient_id=self.patient_id[rows],
        )

    def subset(self, indices: Sequence[int]) -> PairedSet:
        """Return the chosen slices, in the given order, in memory, as a set of their own."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        prompt = Prompt(self.prompt.tracer[rows], self.prompt.region[rows])
        ids = self.sample_id[rows], self.patient_id[rows]
        return type(self)(arrays, self.task, self.target_tracer[rows], prompt, *ids)

    def times(self, gain: float) -> PairedSet:
        """Return the same pairs with their sinograms multiplied by a number, in memory."""
        rows = torch.arange(len(self))
        sinograms = ("input", "expected", "noisy")
        arrays = {name: array[rows] * gain if name in sinograms else array[rows] for name, array in self.arrays.items()}
        about = self.target_tracer, self.prompt, self.sample_id, self.patient_id
        return type(self)(arrays, self.task, *about)

    def joined(self, more: PairedSet) -> PairedSet:
        """Return these pairs and then others of the same task, in memory, without images."""
        rows = torch.arange(len(self)), torch.arange(len(more))
        names = ("input", "expected", "noisy", *NUMBERS)
        arrays = {name: torch.cat([self.arrays[name][rows[0]], more.arrays[name][rows[1]]]) for name in names}
        prompt = Prompt(*(torch.cat(pair) for pair in zip(self.prompt, more.prompt, strict=True)))
        tracer, sample, patient = (
            torch.cat([getattr(self, name), getattr(more, name)])
            for name in ("target_tracer", "sample_id", "patient_id")
        )
        return type(self)(arrays, self.task, tracer, prompt, sample, patient)


class ReversedPairs(PairedSet):
    """The same pairs the wrong way round, see ``allpet.conditions.reverse_pairs``; arguments as of ``PairedSet``."""

    def __init__(self, arrays: Mapping[str, Tensor | StoredArray], task: str, *about: Tensor | Prompt) -> None:
        super().__init__(arrays, task, *about)  # type: ignore[arg-type]
        if task != "separation":
            self.sinogram = self.expected = arrays["input"]

    def __getitem__(self, index: int | Sequence[int]) -> PairedBatch:  # type: ignore[override]
        return reverse_pairs(super().__getitem__(index))


def write_pairs(path: str | Path, pairs: PairedBatch, gain: float = 1.0) -> Path:
    """Write pairs of one task to a .safetensors file, without their images, whole or not at all.

    Args:
        path: of the file.
        pairs: of one task.
        gain: what real pairs in their own units are multiplied by to be in those of these.
    """
    tensors = {name: getattr(pairs, name).clone() for name in _KEPT}
    tensors |= {"tracer": pairs.prompt.tracer, "region": pairs.prompt.region}
    with replacing(Path(path)) as scratch:
        save_file(tensors, scratch, {"task": TASKS[int(pairs.task[0])], "gain": repr(float(gain))})
    return Path(path)


def read_pairs(path: str | Path, task: str, geometry: ParallelBeam, gain: float = 1.0) -> PairedSet:
    """Read what ``write_pairs`` wrote.

    Args:
        path: of the file.
        task: of the pairs.
        geometry: of their sinograms.
        gain: what real pairs are multiplied by here; generated ones are brought to the same units.

    Raises:
        DataError: if the file cannot be read or is of another task.
        GeometryError: if its sinograms do not fit the geometry.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
        tensors = load_file(path)
        arrays = {name: tensors[name] for name in ("input", "expected", "noisy", *NUMBERS)}
        about = tensors["target_tracer"], Prompt(tensors["tracer"], tensors["region"])
        ids = tensors["sample_id"], tensors["patient_id"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(path, f"it holds no pairs ({error})", "name a file of generated pairs") from error
    if said.get("task") != task:
        finding = f"it holds pairs for {said.get('task')}, the task is {task}"
        raise DataError(path, finding, "generate pairs for that")
    found, wanted = tuple(arrays["input"].shape[-2:]), geometry.sinogram_shape
    if found != wanted:
        finding = f"its sinograms are {found}, the data {wanted}"
        raise GeometryError(path, finding, "generate pairs of the same geometry")
    pairs, theirs = PairedSet(arrays, task, *about, *ids), float(said.get("gain", 1.0))
    return pairs if gain == theirs else pairs.times(gain / theirs)

"""Your own pairs of sinograms, for the downstream tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from allpet.conditions import Condition
from allpet.geometry import ParallelBeam
from allpet.io import DataError
from allpet.models.pixel_space import PixelSpace
from allpet.prompts import OPEN, TRACERS, Prompt, prompt_index
from allpet.reconstruction import fbp
from allpet.runs import file_hash
from allpet.simulation.tasks import TASKS
from allpet.symmetry import resample
from data_modules.base import LoadedData, fixed_scale
from data_modules.few_shot import Split, nested_subset, split_as_known
from data_modules.files import prompts_of, say, sinogram_geometry
from data_modules.folder import patients_of, splits_of
from data_modules.layouts import AUTO
from data_modules.pair_folder import SEPARATE, FoundPairs, find_pairs
from data_modules.paired_base import PairedDataModule
from data_modules.paired_set import GeometryError, PairedSet, read_pairs


class PairedFiles(PairedDataModule):
    """Pairs of a user's sinograms: folders ``input/`` and ``target/`` with the same names, or a file with ``acf``.

    ``data_modules.pair_folder`` says what is read. Everything is checked before anything else happens; errors refuse
    it in one sentence, warnings are printed. No patient is in two splits; where nothing tells patients apart, or there
    is only one, the first slices are for training and the last for validation and test, with a gap between them.

    In *separation* ``target/first/`` and ``target/second/`` hold the two tracers that are together in ``input/``. As in
    ``PairedTask`` the tracer of such an input is the first of them; ``share`` is that of a target in the activity of
    its patient's slices.

    A target's expectation is not known, so ``expected`` is ``noisy``: what was measured. Batches hold no images; see
    ``attenuation``. Pairs are brought to the views and bins of the model that they are given to, and their values to
    the scale that it was trained on; either is said.

    Args:
        folder: the folder, or one file.
        task: ``low_dose``, ``attenuation``, ``delayed``, ``separation`` or ``conversion``.
        geometry: what sinograms are resampled to; None: the geometry of the model, where it has one, else their own.
        tracer: tracer of all inputs, or ``open``: as the files say; in *separation* the first of the two, or ``open``.
        region: region of all slices, or ``open``: as the files say.
        target_tracer: the tracer of the targets; needed by *conversion*. In *separation* two, first and second, with
            a comma between them (``FDG,PSMA``); None: as the targets' tables say.
        dose: share of the normal dose that the inputs have; needed by *low_dose*.
        delay_min: minutes from the inputs' scans to the targets'; needed by *delayed*.
        gain: what the values are multiplied by. None: 1 where the files say SUV, else what brings the 99.9th
            percentile of the training targets (of two, that of their sum) to that of the model's own training data; 1
            where there is no such model.
        bin_mm: bin width of sinograms that do not say; None: see ``SinogramFiles``.
        key: name of the array in each file, where files hold several.
        slices: axis that counts slices in three-dimensional arrays.
        full_turn: sinograms cover 360 degrees and are folded to 180.
        patient: pattern that finds the patient in a file's name, see ``SinogramFiles``.
        layout: name of a public data set's layout; ``auto`` looks for one, ``none`` not.
        val_share: share of the patients (or slices) to validate on.
        test_share: share of the patients (or slices) to test on; as for single slices, so that patients whom stages 1
            and 2 were tested on are those of the pairs, where the names of patients are the same.
        gap: slices left out between blocks of slices of one patient.
        num_scans: number of training pairs (few-shot); None for all.
        batch_size: see ``SinogramDataModule``, as all that follows.
        num_workers: loader processes.
        seed: keys order and draws, not the split.
        symmetry: makes the symmetry augmentation, see ``PairedDataModule``.
        generated: file of generated pairs (``experiments/synthesise.py``) that are trained on besides.

    Raises:
        ValueError: if an argument is impossible; from ``setup``: if the pairs cannot be used, or are too few.
    """

    def __init__(
        self,
        folder: str,
        task: str = "attenuation",
        geometry: ParallelBeam | None = None,
        tracer: str = OPEN,
        region: str = OPEN,
        target_tracer: str | None = None,
        dose: float | None = None,
        delay_min: float | None = None,
        gain: float | None = None,
        bin_mm: float | None = None,
        key: str | None = None,
        slices: Literal["auto", "first", "last"] = "auto",
        full_turn: bool = False,
        patient: str | None = None,
        layout: str = AUTO,
        val_share: float = 0.1,
        test_share: float = 0.1,
        gap: int = 2,
        num_scans: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        symmetry: Callable[[ParallelBeam], nn.Module] | None = None,
        generated: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, num_scans, seed, symmetry)
        self.save_hyperparameters(logger=False, ignore=["geometry", "symmetry"])
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
        for name, argument, value, said in (
            ("low_dose", "dose", dose, "DOSE=0.05"),
            ("delayed", "delay_min", delay_min, "DELAY=60"),
            ("conversion", "target_tracer", target_tracer, "TARGETS=PSMA"),
        ):
            if task == name and value is None:
                raise ValueError(f"{task} needs {argument}, which files do not say: give {said} (--data.{argument}).")
            if task != name and value is not None and (task, argument) != ("separation", "target_tracer"):
                raise ValueError(f"{argument} is {value}, but the task is {task}: leave it out.")
        for name, length in {"gain": gain, "bin_mm": bin_mm}.items():
            if length is not None and not 0 < length < float("inf"):
                raise ValueError(f"{name} is {length}, but must be a positive number.")
        if gap < 0:
            raise ValueError(f"gap is {gap}, but must not be negative.")
        self.prompt, self.dose, self.delay_min = Prompt.of([(tracer, region)]), dose or 1.0, delay_min or 0.0
        if dose is not None or delay_min is not None:
            Condition.of(task, self.prompt.names(), None, self.delay_min, self.dose if dose is None else dose)
        names = [] if target_tracer is None else [name.strip() for name in target_tracer.split(",")]
        if names and len(names) != (wanted := 2 if task == "separation" else 1):
            remedy = f"name those: TARGETS={'FDG,PSMA' if wanted == 2 else 'PSMA'} (--data.target_tracer)"
            raise ValueError(f"{task} takes {wanted} target tracer(s), but got {len(names)}; {remedy}.")
        self.targets = [prompt_index(name, TRACERS, "tracer") for name in names]
        self.folder, self.task, self.asked_geometry, self.asked_gain = str(folder), task, geometry, gain
        self.bin_mm, self.patient, self.gap = bin_mm, patient, gap
        self.reading: dict[str, Any] = {"key": key, "slices": slices, "full_turn": full_turn, "layout": layout}
        self.val_share, self.test_share, self.generated = val_share, test_share, generated
        self._found: FoundPairs | None = None
        self._suits: tuple[ParallelBeam | None, float | None] = (None, None)
        self._waiting = False

    def setup(self, stage: str | None = None) -> None:
        """Load the pairs; again where a model has come along that wants them otherwise."""
        suits = self._wanted()
        if (suits != self._suits and suits != (None, None)) or (self._waiting and self.trainer is not None):
            # The command line loads data before there is a model.
            self._suits, self._loaded = suits, None
        super().setup(stage)

    def load(self) -> LoadedData:
        """Check and read the pairs, and bring them to the model's geometry and scale."""
        first = self._found is None
        if self._found is None:
            self._found = find_pairs(self.folder, self.task, patient=self.patient, **self.reading)
        found = self._found
        inputs = np.concatenate([one.slices for one in found.files])[found.order]
        own, lengths = sinogram_geometry(None, inputs.shape[1:], self.bin_mm)
        if found.report.geometry is not None and self.bin_mm is None:
            own, lengths = found.report.geometry, f"bins of {found.report.geometry.bin_mm:g} mm as the files say"
        geometry = self.asked_geometry or self._suits[0] or own
        patients = patients_of(found.files, self.patient)
        patients = patients._replace(names=[patients.names[i] for i in found.order])
        uses = splits_of(found.files)
        split, by_patient, how = split_as_known(
            patients, [uses[i] for i in found.order], self.val_share, self.test_share, self.gap
        )
        owner, prompt = patients.names, prompts_of(found.files, self.prompt)
        prompt = Prompt(*(column[found.order] for column in prompt))
        if self.task == "separation":
            tracers = self._two_tracers(found)
            prompt = prompt._replace(tracer=tracers[:, 0])
        else:
            tracers = torch.full((len(inputs), 1), self.targets[0]) if self.targets else prompt.tracer[:, None]
        whole = self._pairs(inputs, own, geometry, prompt, tracers, owner)
        prompts = prompt.names()
        chosen = nested_subset([owner[i] for i in split.train], [prompts[i] for i in split.train], self.num_scans)
        split = Split([split.train[i] for i in chosen], split.val, split.test)
        gain = self._gain(whole.subset(split.train))
        if first:
            say(f"{self.folder}: {len(inputs)} pairs for {self.task}, {_in_words(own)} ({lengths}); {how}.")
        if not _alike(geometry, own):
            say(f"{self.folder}: resampled to {_in_words(geometry)}.")
        if gain != 1:
            say(f"{self.folder}: values are multiplied by {gain:.4g} for the model; say another with --data.gain.")
        train, val, test = (whole.subset(rows).times(gain) for rows in split)
        notes = {
            "task": self.task,
            "gain": gain,
            "own_geometry": own.to_dict(),
            "split": "by patient" if by_patient else "by position, patients unknown or only one",
        }
        local = {"folder": self.folder, "split_rule": how}
        about: list[Any] = [own.to_dict(), prompts]
        if self.task == "separation":
            about.append(tracers.tolist())
        if self.generated is not None:
            if (more := self._generated(geometry, gain)) is not None:
                train = train.joined(more)
            about.append(file_hash(self.generated))
        identity = self._digest(inputs, found, split, about)
        return LoadedData(geometry, train, val, test, identity, notes=notes, local=local)

    @property
    def own_geometry(self) -> ParallelBeam:
        """Geometry of the sinograms as they lie in their files, once they are loaded."""
        return ParallelBeam(**self._require_setup().notes["own_geometry"])

    @property
    def in_suv(self) -> bool:
        """Whether the files say that their values are SUV, once they are loaded."""
        files = self._found.files if self._found is not None else []
        return bool(files) and all(one.scan is not None and "suv" in one.scan.units.lower() for one in files)

    def attenuation(self, sample_id: Tensor) -> Tensor:
        """Reconstruct the attenuation that the correction factors of some pairs speak of.

        Args:
            sample_id: of the pairs, ``(batch,)``.

        Returns:
            1/mm, ``(batch, 1, rows, columns)``, on the images' grid.

        Raises:
            ValueError: if the files hold no correction factors.
        """
        self._require_setup()
        found = self._found
        if found is None or found.acf is None:
            raise ValueError(
                f"{self.folder} holds no attenuation-correction factors (acf): make pairs that do with allpet-data "
                "attenuation-pairs."
            )
        factors = found.acf[found.order][sample_id.cpu().numpy()]
        # acf = exp(R mu)
        return fbp(self.radon, _fitted(np.log(factors)[:, None], self.own_geometry, self.geometry)).clamp_min(0)

    def _two_tracers(self, found: FoundPairs) -> Tensor:
        """Return the tracers to separate, ``(slices, 2)``, as asked for, else as the targets' tables say.

        Raises:
            ValueError: if they are not known, are one and the same, or are not those that are said elsewhere.
        """
        asked = torch.tensor(self.targets or [0, 0])
        said = torch.tensor([[prompt_index(name, TRACERS, "tracer") for name in column] for column in found.tracers])
        said = said.T[found.order]
        tracers = torch.where(asked > 0, asked, said)
        for k, side in enumerate(SEPARATE[1:]):
            if not tracers[:, k].all():
                finding = f"the tracer of {side} is not known"
                remedy = "name both as TARGETS=FDG,PSMA (--data.target_tracer), or in a column tracer of the files"
                raise DataError(self.folder, finding, remedy)
            if (wrong := (said[:, k] > 0) & (said[:, k] != tracers[:, k])).any():
                finding = f"{TRACERS[asked[k]]} is asked for as {side}, whose files say {TRACERS[said[wrong, k][0]]}"
                raise DataError(self.folder, finding, "name the tracers in the order of the folders")
        if (same := tracers[:, 0] == tracers[:, 1]).any():
            finding = f"the tracers to separate are both {TRACERS[tracers[same, 0][0]]}"
            raise DataError(self.folder, finding, "name two that differ")
        first, prompt = tracers[:, 0], int(self.prompt.tracer)
        if prompt and (first != prompt).any():
            finding = f"the inputs' tracer is {TRACERS[prompt]}, but that of two is the first of them"
            raise DataError(self.folder, finding, f"say {TRACERS[first[first != prompt][0]]}, or open")
        return tracers

    def _pairs(
        self,
        inputs: np.ndarray,
        own: ParallelBeam,
        geometry: ParallelBeam,
        prompt: Prompt,
        tracers: Tensor,
        owner: list[str],
    ) -> PairedSet:
        """Return all pairs, resampled, in their own units."""
        assert self._found is not None
        found, n = self._found, len(inputs)
        names = sorted(set(owner))
        patient = torch.tensor([names.index(name) for name in owner])

        given, target = (_fitted(values, own, geometry) for values in (inputs[:, None], found.target[found.order]))
        kept = float(target.double().sum() * geometry.bin_mm / geometry.n_views)
        lost = 1 - kept / max(float(found.target.sum(dtype=np.float64)) * own.bin_mm / own.n_views, 1e-30)
        if lost > 0.01:
            say(f"WARN  {lost:.0%} of the targets' activity lies outside {_in_words(geometry)}: choose a wider one.")
        arrays = {
            "input": given,
            "expected": target,
            "noisy": target,
            "delay_min": torch.full((n,), float(self.delay_min)),
            "dose": torch.full((n,), float(self.dose)),
            "share": _shares(target, patient),
        }
        return PairedSet(arrays, self.task, tracers, prompt, torch.arange(n), patient)

    def _wanted(self) -> tuple[ParallelBeam | None, float | None]:
        """Return geometry and scale of the model that the pairs are given to; None for what is asked for otherwise."""
        system: Any = getattr(self.trainer, "lightning_module", None)
        autoencoder = getattr(system, "autoencoder", None)
        if autoencoder is None or isinstance(autoencoder, PixelSpace):
            return None, None
        scale = float(autoencoder.scaling.scale) if self.asked_gain is None else None
        return (system.geometry if self.asked_geometry is None else None), scale

    def _generated(self, geometry: ParallelBeam, gain: float) -> PairedSet | None:
        """Return the generated pairs; None while they wait for a model that pairs are brought to the geometry of."""
        assert self.generated is not None
        self._waiting = False
        try:
            return read_pairs(self.generated, self.task, geometry, gain)
        except GeometryError:
            if self.trainer is not None or self.asked_geometry is not None:
                raise
            self._waiting = True
            return None

    def _gain(self, train: PairedSet) -> float:
        """Return what values are multiplied by."""
        if self.asked_gain is not None:
            return self.asked_gain
        if self.in_suv or self._suits[1] is None:
            return 1.0
        # Two tracers share the activity: it is their sum that is as strong as a scan of one.
        return self._suits[1] / fixed_scale(train.sinogram[torch.arange(len(train))].sum(1))

    def _digest(self, inputs: np.ndarray, found: FoundPairs, split: Split, more: list[Any]) -> str:
        """Identify the pairs by what was read; what a model wants of them does not matter, nor where they lie."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (inputs, *found.target[found.order].swapaxes(0, 1)):
            digest.update(f"{array.shape}\x1f".encode())
            digest.update(array.astype("<f4", copy=False).tobytes())
        asked = None if self.asked_geometry is None else self.asked_geometry.to_dict()
        # the tracers of two targets are among what else there is
        target = self.targets[0] if len(self.targets) == 1 else None
        settings = [self.task, asked, self.asked_gain, self.dose, self.delay_min, target, *split, *more]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()


def _alike(one: ParallelBeam, other: ParallelBeam) -> bool:
    """Whether sinograms of both are the same; image grids do not matter."""
    return (one.sinogram_shape, one.bin_mm) == (other.sinogram_shape, other.bin_mm)


def _fitted(values: np.ndarray, own: ParallelBeam, geometry: ParallelBeam) -> Tensor:
    """Bring ``(slices, channels, views, bins)`` to a geometry."""
    sinograms = torch.from_numpy(values)
    return sinograms if _alike(own, geometry) else resample(sinograms, own, geometry)


def _shares(target: Tensor, patient: Tensor) -> Tensor:
    """Return the share of each target in the activity of its patient's slices, ``(slices, targets)``.

    Args:
        target: ``(slices, targets, views, bins)``.
        patient: number of each slice's patient, ``(slices,)``.
    """
    each = target.sum((2, 3), dtype=torch.float64)
    if each.shape[1] == 1:
        return torch.ones(len(each), 1)
    total = torch.zeros(int(patient.max()) + 1, each.shape[1], dtype=torch.float64).index_add_(0, patient, each)
    total = total.clamp_min(1e-30)  # noise may sum to less than nothing
    return (total / total.sum(1, keepdim=True))[patient].float()


def _in_words(geometry: ParallelBeam) -> str:
    return f"{geometry.n_views} views x {geometry.n_bins} bins of {geometry.bin_mm:g} mm"

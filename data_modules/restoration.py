"""What to restore: a user's folder of sinograms, for ``allpet predict`` with a finished downstream task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from allpet.conditions import Condition, RestorationBatch
from allpet.geometry import ParallelBeam
from allpet.io import Scan
from allpet.prompts import OPEN, Prompt
from allpet.regions import roi_from_file
from allpet.simulation.tasks import TASKS, TWO_TRACERS
from data_modules.base import fixed_scale
from data_modules.checks import by
from data_modules.files import prompts_of
from data_modules.folder import FoundFile
from data_modules.layouts import AUTO
from data_modules.validate import inspect_folder


class SinogramsToRestore(LightningDataModule):
    """Sinograms of a folder as inputs, without targets; see ``SinogramFiles`` for what a folder may hold.

    The folder is checked before anything else happens; errors refuse it in one sentence, warnings are printed. Every
    slice is restored, whatever split its file belongs to.

    Args:
        folder: the folder, with its subfolders, or one file.
        task: what was trained: ``low_dose``, ``attenuation``, ``delayed``, ``separation`` or ``conversion``.
        tracer: tracer of all slices, or ``open``: as the files say.
        region: region of all slices, or ``open``: as the files say.
        dose: share of the normal dose that the slices have; needed by *low_dose*.
        delay_min: minutes from this scan to the wanted one; needed by *delayed*.
        target_tracers: the tracer wanted (*conversion*) or the two to separate (*separation*).
        gain: what the values are multiplied by to be in the units of the model's training data, SUV x mm for the
            simulator; results are divided by it. None: 1 where the files say SUV, else one number for the folder that
            brings its 99.9th percentile to that of the training data, which is said.
        roi: file with a mask to look at (``allpet.roi_from_file``), of one slice or of as many as the folder has.
        roi_pixel_mm: its pixel width, where the file does not say.
        key: name of the array in each file, where files hold several.
        slices: axis that counts slices in three-dimensional arrays.
        full_turn: sinograms cover 360 degrees and are folded to 180.
        layout: name of a public data set's layout; ``auto`` looks for one, ``none`` not.
        role: which files of the layout are read; None: the layout's default.
        seed: of the first slice; the next has one more. A result depends on its seed and input alone.
        batch_size: slices restored at once.

    Raises:
        ValueError: if an argument is impossible.
    """

    def __init__(
        self,
        folder: str,
        task: str = "low_dose",
        tracer: str = OPEN,
        region: str = OPEN,
        dose: float | None = None,
        delay_min: float | None = None,
        target_tracers: Sequence[str] | None = None,
        gain: float | None = None,
        roi: str | None = None,
        roi_pixel_mm: float | None = None,
        key: str | None = None,
        slices: Literal["auto", "first", "last"] = "auto",
        full_turn: bool = False,
        layout: str = AUTO,
        role: str | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
        if gain is not None and not 0 < gain < float("inf"):
            raise ValueError(f"gain is {gain}, but must be a positive number.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")
        self.prompt = Prompt.of([(tracer, region)])
        self.task, self.targets, self.dose, self.delay_min = task, tuple(target_tracers or ()), dose, delay_min
        self.folder, self.key, self.slices, self.full_turn = str(folder), key, slices, full_turn
        self.asked_gain, self.roi_file, self.roi_pixel_mm = gain, roi, roi_pixel_mm
        self.layout, self.role, self.seed, self.batch_size = layout, role, seed, batch_size
        self.files: list[FoundFile] = []
        self.geometry: ParallelBeam | None = None
        self.gain = 1.0
        self.roi: torch.Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Check and read the folder; where a model is known, bring values and region to what it knows.

        Raises:
            ValueError: if the folder or the region cannot be used, or what the task needs was not said.
        """
        if not self.files:
            self._check_task()
            self._read()
        system: Any = getattr(self.trainer, "lightning_module", None)
        if system is None or getattr(system, "geometry", None) is None:
            return
        shape, wanted = self.files[0].slices.shape[1:], system.geometry.sinogram_shape
        if shape != wanted:
            raise ValueError(
                f"{self.folder} holds {by(shape)} sinograms (views x bins), but the model was trained on {by(wanted)}: "
                "use a model trained on the scanner's own geometry."
            )
        said = self.geometry
        if said is not None and abs(said.bin_mm - system.geometry.bin_mm) > 1e-3 * said.bin_mm:
            raise ValueError(
                f"{self.folder} has bins of {said.bin_mm:g} mm, but the model was trained on bins of "
                f"{system.geometry.bin_mm:g} mm: use a model trained on the scanner's own geometry."
            )
        self.geometry = system.geometry
        self.gain = self._choose_gain(system)
        if self.roi_file is not None:
            self.roi = self._read_roi(system.geometry)

    @property
    def n_slices(self) -> int:
        """How many slices the folder holds."""
        return sum(len(found.slices) for found in self.files)

    def source(self, name: str) -> Scan:
        """Return a file as it was read: its slices and what it says of them."""
        found = next(found for found in self.files if found.name == name)
        if found.scan is not None:
            return replace(found.scan, values=found.slices, additive=None, acf=None)
        return Scan(found.slices, "sinogram")

    def predict_dataloader(self) -> DataLoader[int]:
        """Batches of slices in the order of the files' names."""
        # range is a sequence of numbers, all that a DataLoader asks of a data set
        return DataLoader(range(self.n_slices), batch_size=self.batch_size, collate_fn=self.batch)  # type: ignore[arg-type]

    def batch(self, rows: Sequence[int]) -> RestorationBatch:
        """Return the slices of the given numbers, counted over all files."""
        origin = [(found.name, i) for found in self.files for i in range(len(found.slices))]
        slices = {found.name: found.slices for found in self.files}
        chosen = [origin[row] for row in rows]
        values = torch.from_numpy(np.stack([slices[name][i] for name, i in chosen]))[:, None]
        prompts = [prompt for row in rows for prompt in [self._prompts[row]] * max(len(self.targets), 1)]
        tracers = list(self.targets) * len(rows) if self.task in TWO_TRACERS else None
        if self.roi is None:
            roi = None
        else:
            roi = self.roi[list(rows)] if len(self.roi) > 1 else self.roi.expand(len(rows), -1, -1, -1)
        return RestorationBatch(
            values * self.gain,
            Condition.of(self.task, prompts, tracers, self.delay_min or 0.0, 1.0 if self.dose is None else self.dose),
            self.seed + torch.tensor(list(rows)),
            self.gain,
            roi,
            chosen,
        )

    def _check_task(self) -> None:
        """Refuse settings that lack what the task needs."""
        if self.task == "low_dose" and self.dose is None:
            raise ValueError(
                "low_dose needs the share of the normal dose that the scans have: DOSE=0.05 (--data.dose)."
            )
        if self.task == "delayed" and self.delay_min is None:
            raise ValueError("delayed needs the minutes until the wanted scan: DELAY=60 (--data.delay_min).")
        wanted = {"separation": 2, "conversion": 1}.get(self.task, 0)
        if len(self.targets) != wanted:
            remedy = "name those: TARGETS=FDG,PSMA (--data.target_tracers)" if wanted else "leave them out"
            raise ValueError(f"{self.task} takes {wanted} target tracer(s), but got {len(self.targets)}; {remedy}.")
        tracers = list(self.targets) or None
        prompts = [f"{OPEN}:{OPEN}"] * max(wanted, 1)
        dose = 1.0 if self.dose is None else self.dose
        Condition.of(self.task, prompts, tracers, self.delay_min or 0.0, dose)  # refuses names and ranges

    def _read(self) -> None:
        report, files = inspect_folder(
            self.folder, "sinogram", self.key, None, self.slices, self.full_turn, None, self.layout, self.role
        )
        report.raise_errors()
        images = [found.name for found in files if found.scan is not None and found.scan.kind == "image"]
        if images:
            raise ValueError(f"{self.folder} holds images ({images[0]}), but models restore sinograms: give it those.")
        for row in report.warnings:
            # what is to be corrected is no fault here
            if self.task != "attenuation" or "not corrected for attenuation" not in row.finding:
                rank_zero_info(f"WARN  {self.folder}, {row.file}: {row.finding}; {row.remedy}.")
        self.files, self.geometry = files, report.geometry
        self._prompts = prompts_of(files, self.prompt).names()

    def _choose_gain(self, system: Any) -> float:
        if self.asked_gain is not None:
            return self.asked_gain
        if all(found.scan is not None and "suv" in found.scan.units.lower() for found in self.files):
            return 1.0
        ours = fixed_scale(torch.from_numpy(np.concatenate([found.slices for found in self.files])))
        theirs = float(system.autoencoder.scaling.scale) * float(system.input_ratio[TASKS.index(self.task)])
        rank_zero_info(
            f"{self.folder}: the files do not say that they are SUV, so their values are multiplied by "
            f"{theirs / ours:.4g} for the model, and its results divided by it; say another number with --data.gain."
        )
        return theirs / ours

    def _read_roi(self, geometry: ParallelBeam) -> torch.Tensor:
        try:
            roi = roi_from_file(str(self.roi_file), geometry, self.roi_pixel_mm)
        except (OSError, ValueError) as error:
            raise ValueError(str(error)) from error
        if len(roi) not in (1, self.n_slices):
            raise ValueError(
                f"{self.roi_file} holds {len(roi)} masks for the {self.n_slices} slices of {self.folder}; "
                "give one for all, or one for each."
            )
        return roi

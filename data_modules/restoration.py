"""What to restore: a user's folder of sinograms, for ``allpet predict`` with a finished downstream task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from allpet.conditions import Condition, RestorationBatch
from allpet.geometry import ParallelBeam
from allpet.io import DataError, Scan
from allpet.prompts import OPEN, Prompt
from allpet.randomness import keyed_generator
from allpet.regions import roi_box, roi_from_file
from allpet.simulation.tasks import TASKS, TWO_TRACERS
from allpet.systems.knowledge import Knowledge, level
from data_modules.base import fixed_scale
from data_modules.checks import by, decide_kind
from data_modules.files import prompts_of
from data_modules.folder import FoundFile
from data_modules.layouts import AUTO
from data_modules.pair_folder import check_factors
from data_modules.validate import inspect_folder

_APART = 5.0  # of the gains of two files in one unit: of single slices of patients they differ by three


class SinogramsToRestore(LightningDataModule):
    """Sinograms of a folder as inputs, without targets; see ``SinogramFiles`` for what a folder may hold.

    The folder is checked before anything else happens; errors refuse it in one sentence, warnings are printed. Every
    slice is restored, whatever split its file belongs to.

    Args:
        folder: the folder, with its subfolders, or one file.
        task: what was trained: ``low_dose``, ``attenuation``, ``delayed``, ``separation`` or ``conversion``.
        tracer: tracer of all slices, or ``open``: as the files say.
        region: region of all slices, or ``open``: as the files say.
        dose: share of the normal dose that the slices have; needed by *low_dose*, and by nothing else.
        delay_min: minutes from this scan to the wanted one; needed by *delayed*, and by nothing else.
        target_tracers: the tracer wanted (*conversion*) or the two to separate (*separation*).
        gain: what the values are multiplied by to be in the units of the model's training data, SUV x mm for the
            simulator; results are divided by it. None: 1 where the files say SUV, else one number for the folder that
            makes its slices as strong as those of the same tracer and region that the model was trained on
            (``allpet.systems.knowledge.level``), which is said. A patient's own SUV differ from theirs by some 20 %.
        roi: file with a mask to look at (``allpet.roi_from_file``), of one slice or of as many as the folder has.
        roi_pixel_mm: its pixel width, where the file does not say.
        roi_label: which values of the mask count, numbers or names of the simulator's tissues; None: all but zero.
        roi_box: a box to look at in all slices instead, left, right, lower and upper edge in mm from the axis of
            rotation, x to the right, y up.
        key: name of the array in each file, where files hold several.
        slices: axis that counts slices in three-dimensional arrays.
        full_turn: sinograms cover 360 degrees and are folded to 180.
        layout: name of a public data set's layout; ``auto`` looks for one, ``none`` not.
        role: which files of the layout are read; None: the layout's default.
        seed: keys the draws. Those of a slice depend on it, the name of its file within the folder and its number
            there alone; so does the result where ``gain`` is given, else it depends on the folder's gain, too.
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
        roi_label: int | str | list[int | str] | None = None,
        roi_box: tuple[float, float, float, float] | None = None,
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
        if roi is not None and roi_box is not None:
            raise ValueError("Both a mask (roi) and a box (roi_box) are given: give one region of interest.")
        if roi is None and (roi_label is not None or roi_pixel_mm is not None):
            raise ValueError("roi_label and roi_pixel_mm speak of a mask, but there is none: name its file with roi.")
        if roi_box is not None and not (roi_box[0] < roi_box[1] and roi_box[2] < roi_box[3]):
            raise ValueError(
                f"roi_box is {list(roi_box)}, but must be left, right, lower and upper edge in mm, left below right "
                "and lower below upper."
            )
        self.prompt = Prompt.of([(tracer, region)])
        self.task, self.targets, self.dose, self.delay_min = task, tuple(target_tracers or ()), dose, delay_min
        self.folder, self.key, self.slices, self.full_turn = str(folder), key, slices, full_turn
        self.asked_gain, self.roi_file, self.roi_pixel_mm, self.roi_box = gain, roi, roi_pixel_mm, roi_box
        self.roi_labels = [roi_label] if isinstance(roi_label, (int, str)) else roi_label
        self.layout, self.role, self.seed, self.batch_size = layout, role, seed, batch_size
        self.files: list[FoundFile] = []
        self.geometry: ParallelBeam | None = None
        self.gain = 1.0
        self.roi: torch.Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Check and read the folder; where a model is known, bring values and region to what it knows.

        Raises:
            ValueError: if the folder or the region cannot be used, what the task needs was not said, or the model was
                not trained for it.
        """
        if not self.files:
            self._check_task()
            self._read()
        system: Any = getattr(self.trainer, "lightning_module", None)
        if system is None or getattr(system, "geometry", None) is None:
            return
        system.check(self._condition([self.prompt.names()[0]]), None, self._n_targets)
        shape, wanted = self.files[0].slices.shape[1:], system.geometry.sinogram_shape
        if shape != wanted:
            remedy = "use a model trained on the scanner's own geometry."
            if decide_kind(self.files)[0] == "image":
                remedy = "these look like images, and models restore sinograms: give it those."
            raise ValueError(
                f"{self.folder} holds {by(shape)} sinograms (views x bins), but the model was trained on {by(wanted)}: "
                f"{remedy}"
            )
        said = self.geometry
        if said is not None and abs(said.bin_mm - system.geometry.bin_mm) > 1e-3 * said.bin_mm:
            raise ValueError(
                f"{self.folder} has bins of {said.bin_mm:g} mm, but the model was trained on bins of "
                f"{system.geometry.bin_mm:g} mm: use a model trained on the scanner's own geometry."
            )
        if said is None:
            rank_zero_info(
                f"WARN  {self.folder}: the files do not say how wide their bins are, so {system.geometry.bin_mm:g} mm "
                "are assumed, the model's: check that they are, or the results are wrong."
            )
        self.geometry = system.geometry
        if system.knowledge is not None:
            for doubt in system.knowledge.doubts(self._condition(self._prompts)):
                rank_zero_info(f"WARN  {self.folder}: {doubt}.")
        self.gain = self._choose_gain(system)
        if self.roi_box is not None:
            self.roi = roi_box(system.geometry, self.roi_box[:2], self.roi_box[2:])
        elif self.roi_file is not None:
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
        if self.roi is None:
            roi = None
        else:
            roi = self.roi[list(rows)] if len(self.roi) > 1 else self.roi.expand(len(rows), -1, -1, -1)
        return RestorationBatch(
            values * self.gain,
            self._condition([self._prompts[row] for row in rows]),
            torch.tensor([self._seed(name, i) for name, i in chosen]),
            self.gain,
            roi,
            chosen,
        )

    @property
    def _n_targets(self) -> int:
        return max(len(self.targets), 1)

    def _condition(self, prompts: Sequence[str]) -> Condition:
        """Return what is asked of slices of these prompts, one entry per target."""
        tracers = list(self.targets) * len(prompts) if self.task in TWO_TRACERS else None
        each = [prompt for prompt in prompts for _ in range(self._n_targets)]
        return Condition.of(self.task, each, tracers, self.delay_min or 0.0, 1.0 if self.dose is None else self.dose)

    def _seed(self, name: str, number: int) -> int:
        return int(torch.randint(2**62, (), generator=keyed_generator(self.seed, name, number, "restored")))

    def _check_task(self) -> None:
        """Refuse settings that lack what the task needs, or have what it does not."""
        if self.task == "low_dose" and self.dose is None:
            raise ValueError(
                "low_dose needs the share of the normal dose that the scans have: DOSE=0.05 (--data.dose)."
            )
        if self.task == "delayed" and self.delay_min is None:
            raise ValueError("delayed needs the minutes until the wanted scan: DELAY=60 (--data.delay_min).")
        for task, name, value in (("low_dose", "dose", self.dose), ("delayed", "delay_min", self.delay_min)):
            if self.task != task and value is not None:
                raise ValueError(f"{name} is {value}, but the task is {self.task}: leave it out.")
        wanted = {"separation": 2, "conversion": 1}.get(self.task, 0)
        if len(self.targets) != wanted:
            remedy = "name those: TARGETS=FDG,PSMA (--data.target_tracers)" if wanted else "leave them out"
            raise ValueError(f"{self.task} takes {wanted} target tracer(s), but got {len(self.targets)}; {remedy}.")
        asked = self._condition(self.prompt.names()).target_tracer.tolist()  # refuses names and ranges
        if len(set(asked)) < wanted:
            raise ValueError(f"The target tracers are {', '.join(self.targets)}, but must be two that differ.")

    def _read(self) -> None:
        report, files = inspect_folder(
            self.folder, "sinogram", self.key, None, self.slices, self.full_turn, None, self.layout, self.role
        )
        report.raise_errors()
        images = [found.name for found in files if found.scan is not None and found.scan.kind == "image"]
        if images:
            raise ValueError(f"{self.folder} holds images ({images[0]}), but models restore sinograms: give it those.")
        kind, why = decide_kind(files)
        if kind == "image" and not any(found.scan is not None and found.scan.kind for found in files):
            raise ValueError(
                f"{self.folder} seems to hold images ({why}), but models restore sinograms: give it those."
            )
        for row in report.warnings:
            # what is to be corrected is no fault here, and nothing is split
            if "two splits" in row.finding:
                continue
            if self.task != "attenuation" or "not corrected for attenuation" not in row.finding:
                rank_zero_info(f"WARN  {self.folder}, {row.file}: {row.finding}; {row.remedy}.")
        self.files, self.geometry = [self._before_correction(found) for found in files], report.geometry
        self._prompts = prompts_of(files, self.prompt).names()
        halves = [prompt.split(":") for prompt in self._prompts]
        missing = [name for k, name in enumerate(("tracer", "region")) if any(one[k] == OPEN for one in halves)]
        if missing:
            n = sum(OPEN in one for one in halves)
            rank_zero_info(
                f"WARN  {self.folder}: {n} of {len(halves)} slices do not say their {' and '.join(missing)}, without "
                "which a model restores worse and a gain is a guess; give PROMPT=FDG:brain or what they are "
                "(--data.tracer, --data.region)."
            )

    def _before_correction(self, found: FoundFile) -> FoundFile:
        """Return a file as the task takes it, as ``find_pairs`` would.

        Raises:
            ValueError: if its state is one that the task does not take.
        """
        if (scan := found.scan) is None:
            return found
        where = self.folder if Path(self.folder).is_file() else Path(self.folder, found.name)
        if scan.additive is not None and "scatter_corrected" not in scan.state:
            finding = "scatter and randoms come with it (additive), which the model would take for activity"
            raise DataError(where, finding, "subtract them first, and store what is left")
        if "prompts" in scan.state:
            rank_zero_info(f"WARN  {where}: its state is prompts, with randoms in them; subtract those first.")
        if self.task != "attenuation" or "attenuation_corrected" not in scan.state:
            return found
        if scan.acf is None:
            finding = "its state is attenuation_corrected, and a second correction would be wrong"
            raise DataError(where, finding, "give it before correction, or with its correction factors (acf)")
        check_factors(where, found.slices, scan.acf)
        rank_zero_info(f"{where}: its attenuation correction is undone by its own factors (acf) first.")
        return found._replace(slices=found.slices / scan.acf)

    def _choose_gain(self, system: Any) -> float:
        if self.asked_gain is not None:
            return self.asked_gain
        if all(found.scan is not None and "suv" in found.scan.units.lower() for found in self.files):
            return 1.0
        values = torch.from_numpy(np.concatenate([found.slices for found in self.files]))
        gain, how = self._by_level(values, system.knowledge), "which makes them as strong as what it was trained on"
        if gain is None:
            theirs = float(system.autoencoder.scaling.scale) * float(system.input_ratio[TASKS.index(self.task)])
            gain, how = theirs / fixed_scale(values), "a guess"
            rank_zero_info(
                f"WARN  {self.folder}: the model does not say how strong its training data were, so the gain may be "
                "wrong by a factor of several: give it with --data.gain, 1 for values in SUV x mm."
            )
        rank_zero_info(
            f"{self.folder}: the files do not say that they are SUV, so their values are multiplied by {gain:.4g} for "
            f"the model, {how}, and its results divided by it; say another number with --data.gain."
        )
        return gain

    def _by_level(self, values: torch.Tensor, knowledge: Knowledge | None) -> float | None:
        """Return the median over slices of what brings each to the level of its prompt; None where none is known."""
        known = None if knowledge is None else knowledge.tasks.get(self.task)
        if known is None or not known.levels:
            return None
        ours = level(values).tolist()
        theirs = [known.level_of(prompt) for prompt in self._prompts]
        strange = sorted({prompt for prompt in self._prompts if known.lacks_level(prompt)})
        if strange:
            rank_zero_info(
                f"WARN  {self.folder}: the model does not know how strong scans of {', '.join(strange)} are, so the "
                "level of all that it was trained on stands in, which may be off by a factor of three: give the gain "
                "with --data.gain, 1 for values in SUV x mm."
            )
        ratios = [wanted / found if wanted and found > 0 else None for wanted, found in zip(theirs, ours, strict=True)]
        each, first = [], 0
        for file in self.files:
            known_of_it = [ratio for ratio in ratios[first : first + len(file.slices)] if ratio]
            each += [(statistics.median(known_of_it), file.name)] if known_of_it else []
            first += len(file.slices)
        if each and max(each)[0] > _APART * min(each)[0]:
            rank_zero_info(
                f"WARN  {self.folder}: {max(each)[1]} would need {max(each)[0] / min(each)[0]:.3g} times the gain of "
                f"{min(each)[1]}, where patients differ by a factor of two, but one gain serves the folder: bring all "
                "files to one unit, or restore them folder by folder."
            )
        every = [ratio for ratio in ratios if ratio]
        return statistics.median(every) if every else None

    def _read_roi(self, geometry: ParallelBeam) -> torch.Tensor:
        try:
            roi = roi_from_file(str(self.roi_file), geometry, self.roi_pixel_mm, labels=self.roi_labels)
        except (OSError, ValueError) as error:
            raise ValueError(str(error)) from error
        if len(roi) not in (1, self.n_slices):
            raise ValueError(
                f"{self.roi_file} holds {len(roi)} masks for the {self.n_slices} slices of {self.folder}; "
                "give one for all, or one for each."
            )
        return roi

"""Is a folder of slices fit for training? One row per finding: file, what was found, what to do.

ERROR rows make a folder unusable, WARN rows say what will go wrong later, INFO rows say what was seen. From a
terminal::

    python -m data_modules.validate FOLDER [--kind auto|sinogram|image] [--key K]

exits with 1 if there are errors. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm.auto import tqdm

from allpet.io import DataError
from data_modules.checks import ALL, Row, by, check_slices, decide_kind, rows_for
from data_modules.folder import FoundFile, find_files, identify_patients, read_files

if TYPE_CHECKING:  # checking a folder starts in half a second without torch
    from allpet.geometry import ParallelBeam

Kind = Literal["auto", "sinogram", "image"]


@dataclass
class Report:
    """What was found in a folder.

    Attributes:
        folder: the folder.
        kind: ``sinogram`` or ``image``, as said or as decided.
        shape: ``(views, bins)`` or ``(rows, columns)`` of the slices; None if no file could be read.
        rows: the findings, errors first.
    """

    folder: str
    kind: str = "sinogram"
    shape: tuple[int, int] | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def errors(self) -> list[Row]:
        """The rows that make the folder unusable."""
        return [row for row in self.rows if row.level == "ERROR"]

    @property
    def warnings(self) -> list[Row]:
        """The rows that say what will go wrong later."""
        return [row for row in self.rows if row.level == "WARN"]

    def raise_errors(self) -> None:
        """Refuse the folder in one sentence that names every file at fault.

        Raises:
            ValueError: if there are errors.
        """
        if self.errors:
            faults = [row.finding if row.file == ALL else f"{row.file} ({row.finding})" for row in self.errors]
            listed = faults[0] if len(faults) == 1 else f"{', '.join(faults[:-1])} and {faults[-1]}"
            remedies = list(dict.fromkeys(row.remedy for row in self.errors))
            remedy = remedies[0] if len(remedies) == 1 else "remove or repair these files"
            raise ValueError(f"{self.folder} cannot be used: {listed}; {remedy}.")

    def __str__(self) -> str:
        width = max((len(row.file) for row in self.rows), default=0)
        lines = [
            f"{row.level:5}  {row.file:{width}}  {row.finding}{'; ' if row.remedy else ''}{row.remedy}"
            for row in self.rows
        ]
        verdict = "cannot be used" if self.errors else "can be used"
        counts = f"{len(self.errors)} error(s), {len(self.warnings)} warning(s)"
        return "\n".join([*lines, f"{self.folder} {verdict}: {counts}"])


def validate_folder(
    folder: str | Path,
    kind: Kind = "auto",
    key: str | None = None,
    geometry: ParallelBeam | None = None,
    slices: Literal["auto", "first", "last"] = "auto",
    full_turn: bool = False,
    patient: str | None = None,
) -> Report:
    """Check a folder; see ``inspect_folder``, which also returns the slices."""
    return inspect_folder(folder, kind, key, geometry, slices, full_turn, patient)[0]


def inspect_folder(
    folder: str | Path,
    kind: Kind = "auto",
    key: str | None = None,
    geometry: ParallelBeam | None = None,
    slices: Literal["auto", "first", "last"] = "auto",
    full_turn: bool = False,
    patient: str | None = None,
) -> tuple[Report, list[FoundFile]]:
    """Read and check all files below a folder.

    Args:
        folder: the folder; subfolders count, links to folders and hidden files do not.
        kind: what the slices are; ``auto``: images if most are square and zero outside the inscribed circle.
        key: name of the array in each file, where a file holds several.
        geometry: what sinograms must fit; None: whatever most files hold.
        slices: axis that counts slices in three-dimensional arrays (``allpet.io.read_array``).
        full_turn: sinograms cover 360 degrees and are folded to 180.
        patient: pattern that finds the patient in a file's name.

    Returns:
        The report, and the readable files in the order of their names (sinograms folded).
    """
    report = Report(str(folder))
    rows = report.rows
    if not Path(folder).is_dir():
        rows.append(Row("ERROR", ALL, "there is no such folder", "check the path"))
        return report, []
    names, others = find_files(folder)
    if not names:
        beside = f" ({len(others)} files of other kinds)" if others else ""
        rows.append(Row("ERROR", ALL, f"it holds no .mat, .npy, .npz or .h5 files{beside}", "check the path"))
        return report, []
    files: list[FoundFile] = []
    reading = read_files(folder, names, key, slices)
    for name, found in zip(names, tqdm(reading, "Reading", len(names), leave=False, unit="file"), strict=True):
        if isinstance(found, FoundFile):
            files.append(found)
        elif isinstance(found, DataError):
            rows.append(Row("ERROR", name, found.finding, found.remedy))
        else:
            raise found
    if files:
        report.kind, why = decide_kind(files) if kind == "auto" else (kind, "as said")
        if full_turn and report.kind == "sinogram":
            files = _fold(files, rows)
        _check_shapes(report, files, geometry)
        rows.append(Row("INFO", ALL, f"{report.kind}s: {why}"))
        usual = [found for found in files if found.slices.shape[1:] == report.shape]
        rows += check_slices(report.kind, usual) if usual else []
        _check_patients(report, files, patient)
    if others:
        rows.append(Row("INFO", ALL, f"{len(others)} other file(s) are not looked at, the first is {others[0]}"))
    rows.sort(key=lambda row: (("ERROR", "WARN", "INFO").index(row.level), row.file))
    return report, files


def _fold(files: list[FoundFile], rows: list[Row]) -> list[FoundFile]:
    """Average opposite views: p(theta + pi, s) = p(theta, -s)."""
    folded = []
    for name, slices in files:
        half = slices.shape[1] // 2
        if slices.shape[1] % 2:
            finding = f"{slices.shape[1]} views over 360 degrees, an odd number"
            rows.append(Row("ERROR", name, finding, "store an even number of views, or 180 degrees"))
        else:
            folded.append(FoundFile(name, (slices[:, :half] + slices[:, half:, ::-1]) / 2))
    return folded


def _check_shapes(report: Report, files: list[FoundFile], geometry: ParallelBeam | None) -> None:
    """Find the folder's shape, and the files that differ from it or from the geometry."""
    counts = Counter(found.slices.shape[1:] for found in files)
    if not counts:
        return
    usual, n_usual = counts.most_common(1)[0]
    report.shape = (usual[0], usual[1])
    wanted = report.shape
    if geometry is not None and report.kind == "sinogram":
        wanted = geometry.sinogram_shape
        if wanted != report.shape:
            swapped = ", the axes seem to be swapped" if wanted == report.shape[::-1] else ""
            finding = f"{n_usual} file(s) with {by(usual)} sinograms where the geometry has {by(wanted)}{swapped}"
            remedy = "leave the geometry out (--data.geometry null) to take the files' own, or give one that fits"
            report.rows.append(Row("ERROR", ALL, finding, remedy))
    for shape in counts:
        odd = [name for name, slices in files if slices.shape[1:] == shape != usual]
        finding = f"slices of {by(shape)} where {n_usual} other file(s) have {by(usual)}"
        remedy = "remove them, or keep each shape in a folder of its own"
        report.rows += rows_for("ERROR", odd, finding, remedy)


def _check_patients(report: Report, files: list[FoundFile], pattern: str | None) -> None:
    """Say how patients are told apart."""
    try:
        patients = identify_patients([f.name for f in files], [len(f.slices) for f in files], pattern)
    except ValueError as error:
        finding, _, remedy = str(error).rstrip(".").partition("; ")
        report.rows.append(Row("ERROR", ALL, finding, remedy))
        return
    if patients.known:
        report.rows.append(Row("INFO", ALL, f"{len(set(patients.names))} patient(s), told apart {patients.how}"))
    else:
        finding = "nothing in the files' names tells patients apart, so one patient may be in two splits"
        remedy = "use a subfolder per patient, names such as PATIENT_001, or a pattern (patient)"
        report.rows.append(Row("WARN", ALL, finding, remedy))


def main(arguments: list[str] | None = None) -> int:
    """Check a folder from the command line; return the exit code, 1 if there are errors."""
    parser = argparse.ArgumentParser(prog="python -m data_modules.validate", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder of .mat, .npy, .npz or .h5 files")
    parser.add_argument("--kind", choices=["auto", "sinogram", "image"], default="auto", help="what the slices are")
    parser.add_argument("--key", help="name of the array, where files hold several")
    parser.add_argument("--slices", choices=["auto", "first", "last"], default="auto", help="axis that counts slices")
    parser.add_argument("--full-turn", action="store_true", help="sinograms cover 360 degrees: fold them")
    parser.add_argument("--patient", help="pattern that finds the patient in a file's name")
    given = parser.parse_args(arguments)
    report = validate_folder(given.folder, given.kind, given.key, None, given.slices, given.full_turn, given.patient)
    print(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())

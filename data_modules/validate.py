"""Is a folder of slices fit for training? One row per finding: file, what was found, what to do.

ERROR rows make a folder unusable, WARN rows say what will go wrong later, INFO rows say what was seen. From a
terminal::

    allpet-data check FOLDER [--kind auto|sinogram|image] [--key K] [--json FILE] [--sheet FILE.png]

exits with 1 if there are errors. Nothing is written but what is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from allpet.io import DataError
from allpet.io.atomic import replacing
from data_modules.checks import ALL, Row, by, check_leakage, check_slices, check_tables, decide_kind, rows_for
from data_modules.folder import FoundFile, find_files, patients_of, read_files
from data_modules.layouts import ALL_ROLES, AUTO, LAYOUTS, NONE, choose_layout

if TYPE_CHECKING:  # checking a folder starts in half a second without torch
    from allpet.geometry import ParallelBeam

_KNOWN = ".mat, .npy, .npz, .h5, .hs, .nii or DICOM"
Kind = Literal["auto", "sinogram", "image"]


@dataclass
class Report:
    """What was found in a folder.

    Attributes:
        folder: the folder.
        kind: ``sinogram`` or ``image``, as said or as decided.
        shape: ``(views, bins)`` or ``(rows, columns)`` of the slices; None if no file could be read.
        rows: the findings, errors first.
        geometry: what the files say of their sinograms; None if nothing, or where they were folded.
        pixel_mm: what the files say of their images; None if nothing.
    """

    folder: str
    kind: str = "sinogram"
    shape: tuple[int, int] | None = None
    rows: list[Row] = field(default_factory=list)
    geometry: ParallelBeam | None = None
    pixel_mm: float | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """Return the report for machines, JSON-able."""
        return {
            "folder": self.folder,
            "usable": not self.errors,
            "kind": self.kind,
            "shape": self.shape,
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "pixel_mm": self.pixel_mm,
            "rows": [row._asdict() for row in self.rows],
        }

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
    layout: str = AUTO,
    role: str | None = None,
) -> Report:
    """Check a folder; see ``inspect_folder``, which also returns the slices."""
    return inspect_folder(folder, kind, key, geometry, slices, full_turn, patient, layout, role)[0]


def inspect_folder(
    folder: str | Path,
    kind: Kind = "auto",
    key: str | None = None,
    geometry: ParallelBeam | None = None,
    slices: Literal["auto", "first", "last"] = "auto",
    full_turn: bool = False,
    patient: str | None = None,
    layout: str = AUTO,
    role: str | None = None,
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
        layout: name of a public data set's layout; ``auto`` looks for one, ``none`` does not.
        role: which files of the layout are read; None: its default.

    Returns:
        The report, and the readable files in the order of their names (sinograms folded).
    """
    report = Report(str(folder))
    rows = report.rows
    if not Path(folder).exists():
        rows.append(Row("ERROR", ALL, "there is no such folder", "check the path"))
        return report, []
    names, others = find_files(folder)
    try:
        chosen = choose_layout(folder, names, others, layout, role)
    except DataError as error:
        rows.append(Row("ERROR", ALL, error.finding, error.remedy))
        return report, []
    if chosen.layout is not None:
        names, others = chosen.names, []
        rows.append(Row("INFO", ALL, chosen.said))
    if not names:
        beside = f" ({len(others)} files of other kinds)" if others else ""
        rows.append(Row("ERROR", ALL, f"it holds no {_KNOWN} files{beside}", "check the path"))
        return report, []
    files: list[FoundFile] = []
    reading = read_files(folder, names, key, slices, chosen)
    for name, found in zip(names, tqdm(reading, "Reading", len(names), leave=False, unit="file"), strict=True):
        if isinstance(found, FoundFile):
            files.append(found)
        elif isinstance(found, DataError):
            within = found.file.removeprefix(f"{Path(folder, name)}{os.sep}")  # of a series: the file at fault
            where = f"{name}/{within}" if within != found.file else name
            rows.append(Row("ERROR", where, found.finding, found.remedy))
        else:
            raise found
    if files:
        said = {found.scan.kind if found.scan is not None else "" for found in files}
        if kind != "auto":
            report.kind, why = kind, "as said"
        elif len(said) == 1 and said != {""}:
            report.kind, why = said.pop(), "as the files say"
        else:
            report.kind, why = decide_kind(files)
        if full_turn and report.kind == "sinogram":
            files = _fold(files, rows)
        _check_shapes(report, files, geometry)
        rows.append(Row("INFO", ALL, f"{report.kind}s: {why}"))
        usual = [found for found in files if found.slices.shape[1:] == report.shape]
        rows += check_slices(report.kind, usual) if usual else []
        _check_patients(report, files, patient)
        _check_lengths(report, files, geometry)
        rows += check_tables(files)
        rows += check_leakage(files, patient)
    if others:
        rows.append(Row("INFO", ALL, f"{len(others)} other file(s) are not looked at, the first is {others[0]}"))
    rows.sort(key=lambda row: (("ERROR", "WARN", "INFO").index(row.level), row.file))
    return report, files


def _fold(files: list[FoundFile], rows: list[Row]) -> list[FoundFile]:
    """Average opposite views: p(theta + pi, s) = p(theta, -s)."""
    folded = []
    for found in files:
        slices = found.slices
        half = slices.shape[1] // 2
        if slices.shape[1] % 2:
            finding = f"{slices.shape[1]} views over 360 degrees, an odd number"
            rows.append(Row("ERROR", found.name, finding, "store an even number of views, or 180 degrees"))
        else:
            folded.append(found._replace(slices=(slices[:, :half] + slices[:, half:, ::-1]) / 2))
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
        odd = [found.name for found in files if found.slices.shape[1:] == shape != usual]
        finding = f"slices of {by(shape)} where {n_usual} other file(s) have {by(usual)}"
        remedy = "remove them, or keep each shape in a folder of its own"
        report.rows += rows_for("ERROR", odd, finding, remedy)


def _check_lengths(report: Report, files: list[FoundFile], asked: ParallelBeam | None) -> None:
    """Find what the files say of their geometry, and whether they agree with each other and with what is asked for."""
    said = [(found, found.scan) for found in files if found.scan is not None]
    for name, values in (
        ("geometry", [scan.geometry for _, scan in said]),
        ("pixel_mm", [s.pixel_mm for _, s in said]),
    ):
        counts: Counter[Any] = Counter(value for value in values if value is not None)
        if not counts:
            continue
        usual = counts.most_common(1)[0][0]
        odd = [found.name for (found, _), value in zip(said, values, strict=True) if value not in (None, usual)]
        what = "another geometry than" if name == "geometry" else "other pixels than"
        remedy = "keep each geometry in a folder of its own"
        report.rows += rows_for("ERROR", odd, f"{what} {counts[usual]} other file(s)", remedy)
        if name == "pixel_mm":
            report.pixel_mm = usual
        elif report.kind == "sinogram" and usual.sinogram_shape == report.shape:
            report.geometry = usual
    if asked is not None and report.geometry is not None and asked.sinogram_shape == report.geometry.sinogram_shape:
        ours, theirs = asked.bin_mm, report.geometry.bin_mm
        if abs(ours - theirs) > 1e-3 * theirs:
            finding = f"bins of {theirs:g} mm by the files where the geometry has {ours:g} mm"
            remedy = "leave the geometry out (--data.geometry null) to take the files' own"
            report.rows.append(Row("ERROR", ALL, finding, remedy))
    units = Counter(scan.units for _, scan in said if scan.units)
    if len(units) > 1:
        usual = units.most_common(1)[0][0]
        odd = [found.name for found, scan in said if scan.units not in ("", usual)]
        finding = f"other units than the {usual} of {units[usual]} other file(s)"
        report.rows += rows_for("ERROR", odd, finding, "keep each kind of units in a folder of its own")
    for found, scan in said:
        report.rows += [Row("WARN", found.name, note, "check that this is meant") for note in scan.notes]


def _check_patients(report: Report, files: list[FoundFile], pattern: str | None) -> None:
    """Say how patients are told apart."""
    try:
        patients = patients_of(files, pattern)
    except ValueError as error:
        finding, _, remedy = str(error).rstrip(".").partition("; ")
        report.rows.append(Row("ERROR", ALL, finding, remedy))
        return
    if pattern is None and {"input", "target"} <= {Path(found.name).parts[0] for found in files}:
        finding = "it holds pairs, input/ and target/, so each patient would be taken for two"
        report.rows.append(Row("ERROR", ALL, finding, "name one of the two folders, or make finetune DATA= for pairs"))
    elif patients.known:
        report.rows.append(Row("INFO", ALL, f"{len(set(patients.names))} patient(s), told apart {patients.how}"))
    else:
        finding = "nothing in the files' names tells patients apart, so one patient may be in two splits"
        remedy = "use a subfolder per patient, names such as PATIENT_001, or a pattern (patient)"
        report.rows.append(Row("WARN", ALL, finding, remedy))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the check takes."""
    parser.add_argument("folder", help=f"folder of {_KNOWN} files, or one file")
    parser.add_argument("--kind", choices=["auto", "sinogram", "image"], default="auto", help="what the slices are")
    parser.add_argument("--key", help="name of the array, where files hold several")
    parser.add_argument("--slices", choices=["auto", "first", "last"], default="auto", help="axis that counts slices")
    parser.add_argument("--full-turn", action="store_true", help="sinograms cover 360 degrees: fold them")
    parser.add_argument("--patient", help="pattern that finds the patient in a file's name")
    parser.add_argument(
        "--layout", choices=[AUTO, NONE, *LAYOUTS], default=AUTO, help="layout of a public data set; auto looks for one"
    )
    parser.add_argument("--role", help=f"which files of the layout: input, target, {ALL_ROLES} or another it has")
    parser.add_argument("--json", metavar="FILE", help="also write the report for machines; - prints it instead")
    parser.add_argument("--sheet", metavar="FILE.png", help="also draw a contact sheet to look at")


def run(given: argparse.Namespace) -> int:
    """Check a folder as the arguments say; return the exit code, 1 if there are errors."""
    report, files = inspect_folder(
        given.folder,
        given.kind,
        given.key,
        None,
        given.slices,
        given.full_turn,
        given.patient,
        given.layout,
        given.role,
    )
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
    print(text if given.json == "-" else report)
    if given.json not in (None, "-"):
        with replacing(given.json) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
    if given.sheet and files:
        from data_modules.contact_sheet import draw_sheet

        draw_sheet(report, files, given.sheet)
    return 1 if report.errors else 0


def main(arguments: list[str] | None = None) -> int:
    """Check a folder from the command line; return the exit code, 1 if there are errors."""
    parser = argparse.ArgumentParser(prog="python -m data_modules.validate", description=__doc__.split("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())

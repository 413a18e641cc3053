"""Is a folder of slices fit for training? One row per finding: file, what was found, what to do.

ERROR rows make a folder unusable, WARN rows say what will go wrong later, INFO rows say what was seen. From a
terminal::

    python -m data_modules.validate FOLDER [--kind auto|sinogram|image] [--key K]

exits with 1 if there are errors. Nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from allpet.geometry import ParallelBeam
from allpet.io import DataError
from data_modules.folder import FoundFile, find_files, identify_patients, read_files

Kind = Literal["auto", "sinogram", "image"]
ALL = "(all)"


class Row(NamedTuple):
    """One finding.

    Attributes:
        level: ``ERROR``, ``WARN`` or ``INFO``.
        file: file relative to the folder, or ``(all)``.
        finding: what was found, half a sentence.
        remedy: what to do, half a sentence; empty for INFO.
    """

    level: str
    file: str
    finding: str
    remedy: str = ""


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
        _check_slices(report, files, why)
        _check_patients(report, files, patient)
    if others:
        rows.append(Row("INFO", ALL, f"{len(others)} other file(s) are not looked at, the first is {others[0]}"))
    rows.sort(key=lambda row: (("ERROR", "WARN", "INFO").index(row.level), row.file))
    return report, files


def decide_kind(files: list[FoundFile]) -> tuple[str, str]:
    """Tell images from sinograms, and say why.

    An image lies in the circle that every view covers; a sinogram does not: its first and last views, at the top and
    bottom of the array, meet the circle in a single bin.
    """
    alike = [_is_disc(image) for found in files for image in found.slices]
    share = f"{sum(alike)} of {len(alike)} slices are square and zero outside the inscribed circle"
    return ("image" if 2 * sum(alike) > len(alike) else "sinogram"), share


def _is_disc(image: np.ndarray) -> bool:
    n = len(image)
    if image.shape != (n, n):
        return False
    axis = np.arange(n) - (n - 1) / 2
    outside = np.hypot(axis, axis[:, None]) > n / 2
    top = np.abs(image).max()
    return bool(top > 0 and np.abs(image[outside]).max(initial=0) <= 1e-3 * top)


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
            finding = f"{n_usual} file(s) with {_by(usual)} sinograms where the geometry has {_by(wanted)}{swapped}"
            remedy = "leave the geometry out (--data.geometry null) to take the files' own, or give one that fits"
            report.rows.append(Row("ERROR", ALL, finding, remedy))
    for shape in counts:
        odd = [name for name, slices in files if slices.shape[1:] == shape != usual]
        finding = f"slices of {_by(shape)} where {n_usual} other file(s) have {_by(usual)}"
        remedy = "remove them, or keep each shape in a folder of its own"
        if len(odd) > 10:
            report.rows.append(Row("ERROR", f"{odd[0]} and {len(odd) - 1} more", finding, remedy))
        else:
            report.rows.extend(Row("ERROR", name, finding, remedy) for name in odd)


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


def _check_slices(report: Report, files: list[FoundFile], why: str) -> None:
    """Look at the slices that have the folder's shape."""
    files = [found for found in files if found.slices.shape[1:] == report.shape]
    if not files or report.shape is None:
        return
    owner = [found.name for found in files for _ in found.slices]
    values = np.concatenate([found.slices for found in files])
    rows, n = report.rows, len(values)
    flat = values.reshape(n, -1)
    low, top = flat.min(1), flat.max(1)

    empty = [owner[i] for i in np.flatnonzero(low == top)]
    if empty:
        level = "ERROR" if len(empty) > 0.05 * n else "WARN"
        rows.append(Row(level, ", ".join(sorted(set(empty))[:5]), f"{len(empty)} empty slice(s)", "remove them"))
    seen: dict[bytes, str] = {}
    pairs = []
    for name, row, blank in zip(owner, flat, low == top, strict=True):
        first = seen.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), name)
        if not blank and first is not name:
            pairs.append(f"{first} = {name}")
    if pairs:
        remedy = "remove copies, or training and validation may share slices"
        rows.append(Row("WARN", ALL, f"{len(pairs)} slice(s) occur twice ({', '.join(pairs[:3])})", remedy))
    if n > 1 and top.max() > 0 and np.ptp(top) <= 1e-6 * top.max():
        finding = f"every slice has the maximum {top[0]:g}: normalised one by one, so counts and SUV are lost"
        rows.append(Row("WARN", ALL, finding, "scale all slices of a patient alike if their ratios matter"))
    if report.kind == "sinogram":
        _check_sinograms(values[low < top], rows)
    else:
        finding = "images are projected: their sinograms' noise is not that of a scanner"
        rows.append(Row("WARN", ALL, finding, "use measured sinograms where there are any"))
    negative = float((values < 0).mean())
    rows.append(Row("INFO", ALL, f"{report.kind}s: {why}"))
    rows.append(Row("INFO", ALL, f"{n} slice(s) of {_by(report.shape)} in {len(files)} file(s)"))
    rows.append(Row("INFO", ALL, f"values from {low.min():.4g} to {top.max():.4g}, {negative:.1%} negative"))


def _check_sinograms(values: np.ndarray, rows: list[Row]) -> None:
    """Look for what the Radon transform of an image cannot be. Medians, since single slices may be odd.

    Args:
        values: ``(slices, views, bins)``, none of them empty.
        rows: is appended to.
    """
    if not len(values):
        return
    n_views, n_bins = values.shape[1:]
    sums, across = values.sum(2, dtype=np.float64), values.sum(1, dtype=np.float64)
    variation, across_variation = (
        float(np.median(s.std(1) / np.maximum(np.abs(s.mean(1)), 1e-30))) for s in (sums, across)
    )
    if across_variation < 0.5 * variation:
        finding = f"columns sum alike (+-{across_variation:.0%}) and rows do not (+-{variation:.0%}): axes are swapped?"
        rows.append(Row("WARN", ALL, finding, "store slices as (views, bins)"))
        return
    if variation > 0.05:
        finding = f"views sum to values that vary by {variation:.0%}: not corrected for attenuation, or no sinograms"
        rows.append(Row("WARN", ALL, finding, "correct them, or say kind=image"))
    edge = np.abs(values[:, :, [0, -1]]).mean((1, 2)) / np.maximum(values.max((1, 2)), 1e-30)
    if (edge := float(np.median(edge))) > 0.05:
        finding = f"the outermost bins hold {edge:.0%} of the maximum: the object is cut off, or noise is not zero-mean"
        rows.append(Row("WARN", ALL, finding, "store all bins that see activity"))
    if n_views % 2 == 0 and (misfit := _full_turn_misfit(values)) is not None:
        finding = f"the second half of the views repeats the first, mirrored (to {misfit:.0%}): 360 degrees?"
        rows.append(Row("WARN", ALL, finding, "say full_turn=true to fold them to 180"))
        return
    # Centre of mass of a centred acquisition: x cos(theta) + y sin(theta), without a constant.
    angles = np.arange(n_views) * (np.pi / n_views)
    harmonics = np.stack([np.cos(angles), np.sin(angles), np.ones(n_views)], 1)
    bins = np.arange(n_bins) - (n_bins - 1) / 2
    whole = np.abs(sums).min(1) > 0.1 * np.abs(sums).max(1)  # a view that sums to nearly zero has no centre
    if whole.any():
        centre = (values[whole] @ bins) / sums[whole]
        offset = float(np.median(np.linalg.lstsq(harmonics, centre.T, rcond=None)[0][2]))
        if abs(offset) > 1:
            finding = f"the axis of rotation lies {offset:+.1f} bins off the middle"
            rows.append(Row("WARN", ALL, finding, "shift the bins so that it lies in the middle"))


def _full_turn_misfit(values: np.ndarray) -> float | None:
    """Return how well the second half of the views mirrors the first; None if not convincingly.

    An object that is round and centred looks alike in all views; it is not taken for a full turn.
    """
    half = values.shape[1] // 2
    first, second = values[:, :half], values[:, half:]

    def misfit(other: np.ndarray) -> float:
        norm = np.linalg.norm(first, axis=(1, 2))
        return float(np.median(np.linalg.norm(first - other, axis=(1, 2)) / np.maximum(norm, 1e-30)))

    mirrored = misfit(second[:, :, ::-1])
    return mirrored if mirrored < 0.3 and mirrored < 0.5 * misfit(second) else None


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


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

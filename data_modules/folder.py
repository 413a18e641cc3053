"""Folders of slices: which files, what is in them, whose slices they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from allpet.io import SUFFIXES, Scan, read_scan
from allpet.io.dicom import DICOM_SUFFIXES, is_dicom, may_be_dicom
from allpet.io.formats import suffix_of
from data_modules.layouts import Chosen

SPLIT_FOLDERS = {
    "train": ("train", "training", "data_for_training"),
    "val": ("val", "valid", "validation", "data_for_validation"),
    "test": ("test", "testing", "data_for_test"),
}
"""Names of folders that say what their files are used for."""


class FoundFile(NamedTuple):
    """One file of a folder.

    Attributes:
        name: path relative to the folder, with forward slashes.
        slices: ``(slices, a, b)`` float32.
        scan: what the file says of itself (its values are ``slices`` as stored); None if nothing.
    """

    name: str
    slices: np.ndarray
    scan: Scan | None = None

    def column(self, name: str) -> list[str]:
        """Return a column of the file's table as texts, one per slice; empty if there is none."""
        return [str(entry) for entry in self.scan.table.get(name, ())] if self.scan is not None else []


def find_files(folder: str | Path) -> tuple[list[str], list[str]]:
    """List the files below a folder by name, relative to it: those that can be read, and all others.

    Links to folders are not followed (they may form a loop); hidden files do not count, nor does what belongs to a
    header. A folder with DICOM files counts as one file of that name, ``.`` for the folder itself. A file in place of
    the folder is the only one found.
    """
    arrays: list[str] = []
    series: set[str] = set()
    others: list[str] = []
    if Path(folder).is_file():
        return [Path(folder).name], []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                path = Path(place, name)
                if path.exists() and not path.is_file():  # opening a pipe would wait forever
                    others.append(path.relative_to(folder).as_posix())
                    continue
                if suffix_of(path) in DICOM_SUFFIXES or (may_be_dicom(name) and is_dicom(path)):
                    series.add(path.parent.relative_to(folder).as_posix())
                    continue
                known = suffix_of(path) in SUFFIXES
                (arrays if known else others).append(path.relative_to(folder).as_posix())
    read_along = {name.removesuffix(".hs") + end for name in arrays if name.endswith(".hs") for end in _ALONG}
    arrays = [name for name in arrays if name not in read_along]
    return sorted([*arrays, *series]), sorted(name for name in others if name not in read_along)


_ALONG = (".s", "_additive.hs", "_additive.s", "_acf.hs", "_acf.s")


def read_files(
    folder: str | Path,
    names: list[str],
    key: str | None = None,
    slices: Literal["auto", "first", "last"] = "auto",
    chosen: Chosen | None = None,
) -> Iterator[FoundFile | ValueError]:
    """Read files one after another, as their layout says; what cannot be read comes as the error that says why."""
    place = Path(folder).parent if Path(folder).is_file() else Path(folder)
    for name in names:
        try:
            scan = chosen.read(place, name, key, slices) if chosen else read_scan(place / name, key, slices)
            yield FoundFile(name, scan.values, scan if scan.kind or scan.table else None)
        except ValueError as error:
            yield error


def split_of(name: str) -> tuple[str, str]:
    """Return what a file is used for by its first folder (train, val, test, or empty), and the rest of its name."""
    first, mark, rest = name.partition("/")
    for split, names in SPLIT_FOLDERS.items():
        if mark and first.lower() in names:
            return split, rest
    return "", name


class Patients(NamedTuple):
    """Whose slices the files hold.

    Attributes:
        names: patient of each file; all equal if nothing tells patients apart.
        known: whether the names can be trusted; otherwise one patient may have several files or one file several
            patients.
        how: how patients were told apart, for the user; empty where not.
    """

    names: list[str]
    known: bool
    how: str


def identify_patients(files: list[str], n_slices: list[int], pattern: str | None = None) -> Patients:
    """Tell patients apart by the files' names.

    The first rule that applies: a pattern; subfolders; files with several slices are a patient each; the name up to
    its last underscore, where all names have one.

    Args:
        files: names relative to the folder.
        n_slices: number of slices of each file.
        pattern: regular expression searched in each name; its first group, or the whole match, is the patient.

    Raises:
        ValueError: if the pattern is invalid or fits only some of the files.
    """
    if pattern is not None:
        try:
            matches = [re.search(pattern, name) for name in files]
        except re.error as error:
            raise ValueError(f"patient is {pattern!r}, no regular expression ({error}); correct it.") from error
        missing = [name for name, match in zip(files, matches, strict=True) if match is None]
        if missing:
            raise ValueError(
                f"The pattern {pattern!r} for patients does not fit {len(missing)} file(s), the first is {missing[0]}; "
                "change it so that it fits every name."
            )
        names = [match[1] if match.re.groups else match[0] for match in matches if match is not None]
        return Patients(names, True, f"by the pattern {pattern!r}")
    parents = [Path(name).parent.as_posix() for name in files]
    if any(parent != "." for parent in parents):
        return Patients(parents, True, "by subfolder")
    stems = [name[: -len(suffix_of(name))] if suffix_of(name) in SUFFIXES else name for name in files]
    if all(n > 1 for n in n_slices):
        return Patients(stems, True, "one per file")
    if all("_" in stem.strip("_") for stem in stems):
        return Patients([stem.rpartition("_")[0] for stem in stems], True, "by the names up to the last underscore")
    return Patients(["unknown"] * len(files), False, "")


def patients_of(files: list[FoundFile], pattern: str | None = None) -> Patients:
    """Tell whose each slice is: by the files' own tables where all have the column ``patient``, else by their names.

    Returns:
        Patients of slices, not of files: ``names`` has one entry per slice.

    Raises:
        ValueError: as ``identify_patients``.
    """
    if pattern is None and files and all(found.column("patient") for found in files):
        names = [name for found in files for name in found.column("patient")]
        known = set(names) != {"unknown"}
        return Patients(names, known, "by the files' own tables" if known else "")
    counts = [len(found.slices) for found in files]
    patients = identify_patients([split_of(found.name)[1] for found in files], counts, pattern)
    names = [name for name, n in zip(patients.names, counts, strict=True) for _ in range(n)]
    return Patients(names, patients.known, patients.how)


def splits_of(files: list[FoundFile]) -> list[str]:
    """Return what each slice is used for (train, val, test), by the files' tables or first folders; empty if unsaid."""
    uses = []
    for found in files:
        uses += found.column("split") or [split_of(found.name)[0]] * len(found.slices)
    return uses

"""Folders of slices: which files, what is in them, whose slices they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from allpet.io import ARRAY_SUFFIXES, read_array


class FoundFile(NamedTuple):
    """One file of a folder.

    Attributes:
        name: path relative to the folder, with forward slashes.
        slices: ``(slices, a, b)`` float32.
    """

    name: str
    slices: np.ndarray


def find_files(folder: str | Path) -> tuple[list[str], list[str]]:
    """List the files below a folder by name, relative to it: those with arrays, and all others.

    Links to folders are not followed (they may form a loop); hidden files do not count.
    """
    arrays: list[str] = []
    others: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                path = Path(place, name)
                known = path.suffix.lower() in ARRAY_SUFFIXES
                (arrays if known else others).append(path.relative_to(folder).as_posix())
    return sorted(arrays), sorted(others)


def read_files(
    folder: str | Path, names: list[str], key: str | None = None, slices: Literal["auto", "first", "last"] = "auto"
) -> Iterator[FoundFile | ValueError]:
    """Read files one after another; what cannot be read comes as the error that says why."""
    for name in names:
        try:
            yield FoundFile(name, read_array(Path(folder, name), key, slices))
        except ValueError as error:
            yield error


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
    stems = [Path(name).stem for name in files]
    if all(n > 1 for n in n_slices):
        return Patients(stems, True, "one per file")
    if all("_" in stem.strip("_") for stem in stems):
        return Patients([stem.rpartition("_")[0] for stem in stems], True, "by the names up to the last underscore")
    return Patients(["unknown"] * len(files), False, "")

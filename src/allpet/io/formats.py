"""One reader and one writer for all formats, chosen by the suffix."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from allpet.io.arrays import ARRAY_SUFFIXES, check_angles, read_array
from allpet.io.containers import read_about, read_container, write_hdf5, write_mat, write_npz
from allpet.io.interfile import read_interfile, write_interfile
from allpet.io.scans import DataError, Scan

SUFFIXES = (*ARRAY_SUFFIXES, ".hs")
WRITERS = {".h5": write_hdf5, ".hdf5": write_hdf5, ".npz": write_npz, ".mat": write_mat, ".hs": write_interfile}


def suffix_of(path: str | Path) -> str:
    """Return the suffix that tells the format, in lower case."""
    return Path(path).suffix.lower()


def read_scan(path: str | Path, key: str | None = None, slices: Literal["auto", "first", "last"] = "auto") -> Scan:
    """Read the slices of one file, with whatever the file says about them.

    Args:
        path: a file of one of ``SUFFIXES``.
        key: name of the array in .mat, .npz and .h5 files that do not say themselves.
        slices: axis that counts slices in such files (``read_array``).

    Raises:
        DataError: if the file cannot be used, in one sentence.
    """
    suffix = suffix_of(path)
    if suffix == ".hs":
        return read_interfile(path)
    if suffix in ARRAY_SUFFIXES and key is None and read_about(path) is not None:
        return read_container(path)
    values = read_array(path, key, slices)
    check_angles(path, values.shape[1])
    return Scan(values, "")


def write_scan(path: str | Path, scan: Scan) -> None:
    """Write a scan; the suffix tells the format.

    Raises:
        DataError: if the suffix is unknown or the file cannot be written; nothing is left half-written.
    """
    suffix = suffix_of(path)
    if suffix not in WRITERS:
        raise DataError(path, f"{suffix or 'no suffix'} is not a format to write", f"choose of {', '.join(WRITERS)}")
    WRITERS[suffix](path, scan)

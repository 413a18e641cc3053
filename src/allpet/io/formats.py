"""One reader and one writer for all formats, chosen by the suffix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from allpet.io.arrays import ARRAY_SUFFIXES, check_angles, read_array
from allpet.io.containers import read_about, read_container, write_hdf5, write_mat, write_npz
from allpet.io.dicom import DICOM_SUFFIXES, is_dicom, may_be_dicom, read_dicom
from allpet.io.dicom_writer import write_dicom
from allpet.io.interfile import read_interfile, write_interfile
from allpet.io.nifti import NIFTI_SUFFIXES, read_nifti, write_nifti
from allpet.io.scans import DataError, Scan

SUFFIXES = (*ARRAY_SUFFIXES, ".hs", *NIFTI_SUFFIXES)
"""Of files that hold slices by themselves; a DICOM series is a folder."""
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, "")
"""Of formats that take images alone; a name without suffix is the folder of a DICOM series."""
WRITERS: dict[str, Callable[[str | Path, Scan], object]] = {
    ".h5": write_hdf5,
    ".hdf5": write_hdf5,
    ".npz": write_npz,
    ".mat": write_mat,
    ".hs": write_interfile,
    ".nii": write_nifti,
    ".nii.gz": write_nifti,
    "": write_dicom,
}


def suffix_of(path: str | Path) -> str:
    """Return the suffix that tells the format, in lower case; of .nii.gz both parts."""
    path = Path(path)
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def read_scan(path: str | Path, key: str | None = None, slices: Literal["auto", "first", "last"] = "auto") -> Scan:
    """Read the slices of one file or DICOM series, with whatever is said about them.

    Args:
        path: a file of one of ``SUFFIXES``, or the folder of a DICOM series.
        key: name of the array in .mat, .npz and .h5 files that do not say themselves; number or description of a
            DICOM series where a folder holds several; frame of a dynamic NIfTI file, from 0.
        slices: axis that counts slices in such files (``read_array``).

    Raises:
        DataError: if the file cannot be used, in one sentence.
    """
    suffix = suffix_of(path)
    if suffix == ".hs":
        return read_interfile(path)
    if suffix in DICOM_SUFFIXES or Path(path).is_dir() or (may_be_dicom(Path(path).name) and is_dicom(path)):
        return read_dicom(path, key)
    if suffix in NIFTI_SUFFIXES:
        if key is not None and not key.isdigit():
            raise DataError(path, f"key is {key!r}", "of a NIfTI file it is the number of the frame, from 0")
        return read_nifti(path, None if key is None else int(key))
    if suffix in ARRAY_SUFFIXES and key is None and read_about(path) is not None:
        return read_container(path)
    values = read_array(path, key, slices)
    check_angles(path, values.shape[1])
    return Scan(values, "")


def write_scan(path: str | Path, scan: Scan) -> None:
    """Write a scan; the suffix tells the format. A name without suffix becomes the folder of a DICOM series.

    Raises:
        DataError: if the suffix is unknown or the file cannot be written; nothing is left half-written.
    """
    suffix = suffix_of(path)
    if suffix not in WRITERS:
        raise DataError(path, f"{suffix or 'no suffix'} is not a format to write", _of_writers())
    WRITERS[suffix](path, scan)


def _of_writers() -> str:
    return f"choose of {', '.join(suffix for suffix in WRITERS if suffix)}, or leave it out for a DICOM folder"

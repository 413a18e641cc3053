"""Scans in .h5, .npz and .mat (v5): the arrays under their names, and all that is known about them beside.

The arrays are ``sinogram`` or ``image``, and where they are known ``additive`` and ``acf``; HDF5 and NumPy count
slices on the first axis, MATLAB on the last. What the numbers mean is the JSON text ``about`` (``Scan.about``), an
array of one text, in MATLAB of characters. An .npz may also hold ``lor_start`` and ``lor_end``, (x, y) in mm where the
line of response of each bin begins and ends, for list-style reconstruction.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from allpet.io.arrays import damaged
from allpet.io.atomic import replacing
from allpet.io.scans import AXES, COMPANIONS, DataError, Scan, lor_endpoints, scan_from, to_json

MAIN = tuple(AXES)


def write_hdf5(path: str | Path, scan: Scan) -> None:
    """Write a scan as HDF5, one chunk per slice, uncompressed."""
    with replacing(path) as unfinished, h5py.File(unfinished, "w") as file:
        for name, array in _arrays(scan).items():
            file.create_dataset(name, data=array, chunks=(1, *array.shape[1:]))
            file[name].attrs["axes"] = scan.about()["axes"]
        file[_main(scan)].attrs["units"] = scan.units
        about = scan.about()
        for name, column in about.pop("table").items():
            file[f"table/{name}"] = column_array(column)
        file["about"] = to_json(about)  # no attribute: those end at 64 kB


def write_npz(path: str | Path, scan: Scan, lors: bool = False) -> None:
    """Write a scan as .npz; with ``lors`` also the lines of response of its bins.

    Raises:
        ValueError: if lines of response are asked for and the geometry is not known.
    """
    arrays = _arrays(scan)
    if lors:
        if scan.geometry is None:
            raise ValueError("Lines of response need a geometry; give the scan one.")
        arrays["lor_start"], arrays["lor_end"] = lor_endpoints(scan.geometry)
    with replacing(path) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, allow_pickle=False, about=np.array(to_json(scan.about())), **arrays)


def write_mat(path: str | Path, scan: Scan) -> None:
    """Write a scan as MATLAB v5, slices on the third axis.

    Raises:
        DataError: if an array is beyond the 2 GB that the format holds.
    """
    arrays = {name: np.moveaxis(array, 0, -1) for name, array in _arrays(scan).items()}
    if max(array.nbytes for array in arrays.values()) >= 2**31:
        raise DataError(path, "MATLAB v5 files hold less than 2 GB per array", "write .h5 instead")
    with replacing(path) as unfinished, unfinished.open("wb") as stream:
        scipy.io.savemat(stream, {**arrays, "about": to_json(scan.about())}, do_compression=True)


def read_about(path: str | Path) -> dict[str, Any] | None:
    """Return what a .h5, .npz or .mat file says of itself; None if it is not one of ours."""
    path = Path(path)
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                return _hdf5_about(file)
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                if "about.npy" not in archive.namelist():
                    return None
                with archive.open("about.npy") as stream:
                    text = str(np.lib.format.read_array(stream, allow_pickle=False))
        elif path.suffix.lower() == ".mat":
            found = scipy.io.loadmat(path, variable_names=["about"])
            if "about" not in found or not found["about"].size:
                return None
            text = str(found["about"].flat[0])
        else:
            return None
        about = json.loads(text)
        return about if "schema" in about else None
    except Exception:  # a damaged file, or somebody else's "about"; reading its arrays says what is wrong
        return None


def read_container(path: str | Path) -> Scan:
    """Read a scan that one of these writers, or ``allpet predict``, has written.

    Raises:
        DataError: if the file is none of ours, or damaged.
    """
    path = Path(path)
    about = read_about(path)
    if about is None:
        raise DataError(path, "it does not say what it holds", "name the array with key")
    arrays: dict[str, np.ndarray] = {}
    with damaged(path, "a scan"):
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                arrays = {name: file[name][()] for name in (*MAIN, *COMPANIONS) if name in file}
        elif path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in (*MAIN, *COMPANIONS) if name in archive}
        else:
            found = scipy.io.loadmat(path, variable_names=[*MAIN, *COMPANIONS])
            for name in (*MAIN, *COMPANIONS):
                if name in found:
                    array = found[name]  # one slice has lost its third axis
                    arrays[name] = np.moveaxis(array[..., None] if array.ndim == 2 else array, -1, 0)
    main = about.get("kind") if about.get("kind") in arrays else next((name for name in MAIN if name in arrays), None)
    if main is None:
        raise DataError(path, "it holds neither a sinogram nor an image", "write it again")
    kept = {name: array for name, array in arrays.items() if name in COMPANIONS}
    return scan_from({**about, "kind": main}, {"values": arrays[main], **kept}, path)


def column_array(column: list[Any]) -> np.ndarray:
    """Turn a column into what HDF5 takes: numbers as they are, anything else as text."""
    array = np.asarray(column)
    if array.dtype.kind in "biuf":
        return array
    return np.asarray([str(item) for item in column], dtype=h5py.string_dtype())


def column_list(item: Any) -> list[Any]:
    """Return a column of a file as plain numbers or texts."""
    return [entry.decode() if isinstance(entry, bytes) else entry for entry in item[()].tolist()]


def _main(scan: Scan) -> str:
    return scan.kind or "sinogram"


def _arrays(scan: Scan) -> dict[str, np.ndarray]:
    arrays = {_main(scan): np.asarray(scan.values, dtype=np.float32)}
    for name in COMPANIONS:
        if getattr(scan, name) is not None:
            arrays[name] = np.asarray(getattr(scan, name), dtype=np.float32)
    return arrays


def _hdf5_about(file: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what an HDF5 file says of itself, whether written here or by ``allpet predict``."""
    attributes = file.attrs  # type: ignore[attr-defined]
    if "about" in file:
        about = json.loads(file["about"][()])
        if "schema" not in about:
            return None
        return {**about, "table": {name: column_list(item) for name, item in file.get("table", {}).items()}}
    if "geometry" not in attributes or "sinogram" not in file:
        return None
    table = {name: column_list(file[name]) for name in ("seed", "prompt") if name in file}
    said = {name: str(attributes[name]) for name in ("provenance", "generator", "sampling") if name in attributes}
    return {
        "kind": "sinogram",
        "geometry": json.loads(attributes["geometry"]),
        "units": str(file["sinogram"].attrs.get("units", "")),
        "state": ["synthetic"] if said.get("provenance") == "synthetic" else [],
        "table": table,
        "provenance": {**said, "synthetic": said.get("provenance") == "synthetic"},
    }

"""Reading arrays of slices from .mat (v4, v5 and v7.3), .npy, .npz and .h5 files.

Every file is answered with a float32 array ``(slices, a, b)`` or with one sentence that names the file, what was found
and what to do. Nothing is ever unpickled. MATLAB counts slices on the third axis, ``A(:, :, k)``, everybody else on the
first; MATLAB v7.3 files are HDF5 with the axes stored in reverse, which is undone here, so that v5 and v7.3 files of
one array read the same.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import h5py
import numpy as np
import scipy.io

from allpet.io.scans import DataError

ARRAY_SUFFIXES = (".mat", ".npy", ".npz", ".h5", ".hdf5")


_FORMATS = f"convert it to one of {', '.join(ARRAY_SUFFIXES)}"
_DAMAGED = "copy it again or remove it"


def read_array(
    path: str | Path, key: str | None = None, slices: Literal["auto", "first", "last"] = "auto"
) -> np.ndarray:
    """Read the slices of one file.

    Args:
        path: a .mat, .npy, .npz, .h5 or .hdf5 file.
        key: name of the array in the file (HDF5: its path); not needed where the file holds a single array. Numbers,
            vectors and texts beside it do not count.
        slices: the axis that counts slices in a three-dimensional array; ``auto`` is ``last`` in .mat files and
            ``first`` in all others.

    Returns:
        ``(slices, a, b)`` float32, contiguous; a two-dimensional array is one slice.

    Raises:
        DataError: if the file is missing, damaged, empty, ambiguous, or holds no finite real array of two or three
            dimensions.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(path, f"{suffix or 'a file without suffix'} is not a known format", _FORMATS)
    if not path.is_file():
        raise DataError(path, "there is no such file", "check the path")
    if path.stat().st_size == 0:
        raise DataError(path, "the file is empty", "copy it again")
    name, array = _READERS[suffix](path, key)
    return _check(path, name, array, suffix == ".mat" if slices == "auto" else slices == "last")


ANGLE_NAMES = ("angles", "angles_rad", "angles_deg", "theta", "thetas", "phi")
"""Vectors beside the slices that say where the views lie."""


def check_angles(path: str | Path, n_views: int) -> None:
    """Check the angles that a .mat, .npz or .h5 file holds beside its slices, where it holds any.

    Args:
        path: the file.
        n_views: number of views of its slices.

    Raises:
        DataError: if they are not as many as the views, or do not rise evenly over 180 or 360 degrees.
    """
    path = Path(path)
    for name in ANGLE_NAMES if path.suffix.lower() != ".npy" else ():
        try:
            angles = np.asarray(_READERS[path.suffix.lower()](path, name)[1], dtype=np.float64).squeeze()
        except (DataError, ValueError, TypeError):
            continue
        if angles.ndim != 1 or len(angles) < 2:
            continue
        if len(angles) != n_views:
            finding = f"{len(angles)} angles ({name}) for {n_views} views"
            raise DataError(path, finding, "store slices as (views, bins) with one angle per view")
        step = np.diff(angles)
        if (step <= 0).any():
            raise DataError(path, f"its angles ({name}) do not rise", "sort the views by angle")
        turns = len(angles) * step.mean() / (180.0 if angles.max() > 7 else np.pi)
        if np.ptp(step) > 0.05 * step.mean() or min(abs(turns - 1), abs(turns - 2)) > 0.02:
            finding = f"its angles ({name}) do not lie evenly over 180 or 360 degrees"
            raise DataError(path, finding, "interpolate the views to k * 180 / n degrees")


def _check(path: Path, name: str, array: np.ndarray, slices_last: bool) -> np.ndarray:
    """Turn an array as stored into finite float32 ``(slices, a, b)``."""
    what = f"array {name!r}" if name else "the array"
    if array.dtype.names and {"real", "imag"} <= set(array.dtype.names):  # how MATLAB v7.3 stores complex numbers
        raise DataError(path, f"{what} is complex", "save its real part or its magnitude")
    if array.dtype.kind == "c":
        raise DataError(path, f"{what} is complex", "save its real part or its magnitude")
    if array.dtype.kind not in "biuf":
        raise DataError(path, f"{what} holds {_kind(array.dtype)}, not numbers", "save a plain numeric array")
    if array.size == 0:
        raise DataError(path, f"{what} is empty, its shape is {array.shape}", "save it again or remove the file")
    shape = array.shape
    while array.ndim > 3 and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    if array.ndim == 2:
        array = array[..., None] if slices_last else array[None]
    if array.ndim != 3:
        raise DataError(path, f"{what} has the shape {shape}", "save slices of two dimensions, or a stack of them")
    if slices_last:
        array = np.moveaxis(array, -1, 0)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2)))
    if len(bad):
        which = "the slice" if len(array) == 1 else f"{len(bad)} of {len(array)} slices (first: slice {bad[0]})"
        raise DataError(path, f"{which} of {what} holds NaN or infinite values", "remove or repair them")
    return array


def _kind(dtype: np.dtype) -> str:
    """Name what an array that is not numeric holds."""
    return {"O": "Python objects or cells", "V": "structures", "U": "text", "S": "text", "M": "dates"}.get(
        dtype.kind, str(dtype)
    )


@contextmanager
def damaged(path: Path, format_name: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one sentence.

    Raises:
        DataError: for whatever was raised.
    """
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(path, "it declares more data than fit into memory", _DAMAGED) from error
    except Exception as error:  # scipy, NumPy, zipfile and HDF5 raise anything at all on damaged input
        reason = " ".join(str(error).split())[:120].rstrip(".;") or type(error).__name__
        raise DataError(path, f"it cannot be read as {format_name} ({reason})", _DAMAGED) from error


def refuse_bomb(path: Path, n_bytes: int) -> None:
    """Refuse to unpack what is vastly larger than its file: no measured data compress like that."""
    if n_bytes > 2**30 and n_bytes > 300 * path.stat().st_size:
        finding = f"its {path.stat().st_size / 1000:.0f} kB would unpack to {n_bytes / 1e9:.1f} GB"
        raise DataError(path, finding, "remove it, no measured data compress like that")


def _choose(path: Path, key: str | None, shapes: dict[str, tuple[int, ...]]) -> str:
    """Pick the array that was asked for, or the only one with at least two axes longer than 1.

    Args:
        path: for the sentence.
        key: the name that was asked for.
        shapes: shape of every array in the file.
    """
    if key is not None:
        if key in shapes:
            return key
        held = f"it holds {', '.join(map(repr, shapes))}" if shapes else "it holds no arrays"
        raise DataError(path, f"there is no array {key!r}", f"choose another key: {held}")
    candidates = [name for name, shape in shapes.items() if sum(n != 1 for n in shape) >= 2]
    candidates = [name for name in candidates if 0 not in shapes[name]] or candidates
    if not candidates and len(shapes) == 1:
        return next(iter(shapes))  # the only array; _check says what is wrong with it
    if not candidates:
        raise DataError(path, "it holds no array of two or three dimensions", "save the slices as one numeric array")
    if len(candidates) > 1:
        raise DataError(path, f"it holds several arrays ({', '.join(candidates)})", "say which one is meant with key")
    return candidates[0]


def _read_npy(path: Path, key: str | None) -> tuple[str, np.ndarray]:
    with damaged(path, "a .npy file"), path.open("rb") as stream:
        return "", _unpack(path, stream)


def _read_npz(path: Path, key: str | None) -> tuple[str, np.ndarray]:
    with damaged(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        shapes = {}
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    shapes[member.removesuffix(".npy")] = _header(stream)[0]
        name = _choose(path, key, shapes)
        refuse_bomb(path, archive.getinfo(f"{name}.npy").file_size)
        with archive.open(f"{name}.npy") as stream:
            return name, _unpack(path, stream)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and type from the head of a .npy stream."""
    if np.lib.format.read_magic(stream) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype


def _unpack(path: Path, stream: IO[bytes]) -> np.ndarray:
    """Read the array of a .npy stream, never unpickling."""
    if _header(stream)[1].hasobject:
        raise DataError(path, "it holds Python objects, which are never unpickled", "save a plain numeric array")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def _read_mat(path: Path, key: str | None) -> tuple[str, np.ndarray]:
    if h5py.is_hdf5(path):
        name, array = _read_hdf5(path, key)
        return name, array.T  # MATLAB stores the first axis fastest, HDF5 the last
    with damaged(path, "a MATLAB file"):
        shapes = {name: shape for name, shape, kind in scipy.io.whosmat(path) if kind not in ("char", "function")}
        name = _choose(path, key, shapes)
        refuse_bomb(path, math.prod(shapes[name]))  # at least one byte each
        return name, np.asarray(scipy.io.loadmat(path, variable_names=[name])[name])


def _read_hdf5(path: Path, key: str | None) -> tuple[str, np.ndarray]:
    with damaged(path, "an HDF5 file"), h5py.File(path, "r") as file:
        found: dict[str, h5py.Dataset] = {}

        def visit(name: str, item: Any) -> None:
            # MATLAB keeps the contents of cells under #refs#, texts as numbers, and marks empty arrays.
            if isinstance(item, h5py.Dataset) and not name.startswith("#"):
                text = item.attrs.get("MATLAB_class") == b"char"
                if item.shape is not None and not text:
                    found[name] = item

        file.visititems(visit)
        key = key.strip("/") if key is not None else None
        name = _choose(path, key, {name: item.shape for name, item in found.items()})
        if found[name].attrs.get("MATLAB_empty"):
            return name, np.empty((0, 0))
        refuse_bomb(path, found[name].size * found[name].dtype.itemsize)
        return name, found[name][()]


_READERS: dict[str, Callable[[Path, str | None], tuple[str, np.ndarray]]] = {
    ".mat": _read_mat,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}

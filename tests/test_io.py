"""Readers: one array through every format reads the same, and every bad file gets one sentence."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from allpet.io import DataError, read_array

SLICES = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)  # (slices, views, bins)


def write_v73(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what MATLAB writes with -v7.3: a 512-byte text block, then HDF5 with all axes in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            item = file.create_dataset(name, data=array.T)
            item.attrs["MATLAB_class"] = np.bytes_("double")
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))


def write(path: Path, name: str, array: np.ndarray) -> Path:
    """Write slices as a user of each format would: slices last in MATLAB, first elsewhere."""
    last = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if path.name.endswith("v5.mat"):
        scipy.io.savemat(path, {name: last, "comment": "made by a test", "dose": 1.0}, do_compression=True)
    elif path.suffix == ".mat":
        write_v73(path, {name: last})
    elif path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{name: array}, angles=np.arange(4.0))
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset(f"scan/{name}", data=array)
            file["dose"] = 1.0
    return path


FILES = ["v5.mat", "v73.mat", "a.npy", "a.npz", "a.h5"]


@pytest.mark.parametrize("file", FILES)
def test_every_format_gives_the_same_slices(tmp_path: Path, file: str) -> None:
    read = read_array(write(tmp_path / file, "data", SLICES))
    assert read.dtype == np.float32
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, SLICES)


@pytest.mark.parametrize("file", FILES)
def test_one_slice_keeps_its_axes(tmp_path: Path, file: str) -> None:
    np.testing.assert_array_equal(read_array(write(tmp_path / file, "x", SLICES[0])), SLICES[:1])


@pytest.mark.parametrize("dtype", [">f8", "<i4", "u2", "?", "f2"])
def test_number_types(tmp_path: Path, dtype: str) -> None:
    array = (SLICES * 4).astype(dtype)
    np.testing.assert_array_equal(read_array(write(tmp_path / "a.npy", "", array)), array.astype(np.float32))


def test_the_slice_axis_can_be_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.moveaxis(SLICES, 0, -1))
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy", slices="last"), SLICES)
    scipy.io.savemat(tmp_path / "a.mat", {"x": SLICES})
    np.testing.assert_array_equal(read_array(tmp_path / "a.mat", slices="first"), SLICES)


@pytest.mark.parametrize("axis", [1, 3])
def test_axes_of_length_one_are_dropped(tmp_path: Path, axis: int) -> None:
    np.save(tmp_path / "a.npy", np.expand_dims(SLICES, axis))
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), SLICES)


def test_key_chooses_among_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", first=SLICES, second=SLICES + 1)
    scipy.io.savemat(tmp_path / "v5.mat", {"first": SLICES[0], "second": SLICES[0] + 1})
    write_v73(tmp_path / "v73.mat", {"first": SLICES[0], "second": SLICES[0] + 1})
    for file in ("a.npz", "v5.mat", "v73.mat"):
        np.testing.assert_array_equal(read_array(tmp_path / file, key="second")[0], SLICES[0] + 1)
        with pytest.raises(DataError, match=rf"{file}: it holds several arrays \(first, second\); say which"):
            read_array(tmp_path / file)
        with pytest.raises(DataError, match=r"there is no array 'third'.*'first', 'second'"):
            read_array(tmp_path / file, key="third")


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("file", FILES)
def test_damaged_files(tmp_path: Path, file: str) -> None:
    big = np.random.default_rng(1).random((3, 40, 50))
    for damage in (truncate, lambda path: path.write_bytes(b"\x00garbage" * 99) and path):
        with pytest.raises(DataError, match=rf"{file}: it cannot be read as .*; copy it again or remove it\.$"):
            read_array(damage(write(tmp_path / file, "x", big)))
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        read_array(tmp_path / file)


@pytest.mark.parametrize("file", FILES)
def test_bad_values(tmp_path: Path, file: str) -> None:
    holed = SLICES.copy()
    holed[1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"1 of 3 slices \(first: slice 1\) of .* NaN or infinite"):
        read_array(write(tmp_path / file, "x", holed))
    with pytest.raises(DataError, match="is complex; save its real part"):
        read_array(write(tmp_path / file, "x", SLICES * 1j))
    with pytest.raises(DataError, match="is empty, its shape is"):
        read_array(write(tmp_path / file, "x", np.empty((0, 4))))
    with pytest.raises(DataError, match="NaN or infinite"):  # beyond float32
        read_array(write(tmp_path / file, "x", SLICES.astype(np.float64) * 1e300))


class Unpickled:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("file", ["a.npy", "a.npz"])
def test_nothing_is_unpickled(tmp_path: Path, file: str) -> None:
    trace = tmp_path / "trace"
    array = np.array([[Unpickled(trace), 1], [2, 3]], dtype=object)
    (np.save if file == "a.npy" else np.savez)(tmp_path / file, array)
    with pytest.raises(DataError, match="Python objects, which are never unpickled; save a plain numeric array"):
        read_array(tmp_path / file)
    (tmp_path / file).write_bytes(pickle.dumps(array))
    with pytest.raises(DataError, match="cannot be read"):
        read_array(tmp_path / file)
    assert not trace.exists()


def test_things_that_are_no_slices(tmp_path: Path) -> None:
    np.save(tmp_path / "line.npy", np.arange(4.0))
    np.save(tmp_path / "five.npy", np.zeros((2, 2, 2, 2, 2)))
    np.save(tmp_path / "text.npy", np.array([["a", "b"], ["c", "d"]]))
    scipy.io.savemat(tmp_path / "cell.mat", {"c": np.array([[SLICES, 1], [2, 3]], dtype=object)})
    scipy.io.savemat(tmp_path / "struct.mat", {"s": {"a": SLICES}})
    scipy.io.savemat(tmp_path / "scalars.mat", {"a": 1.0, "b": 2.0})
    (tmp_path / "picture.png").write_bytes(b"png")
    for file, finding in {
        "line.npy": "has the shape (4,)",
        "five.npy": "has the shape (2, 2, 2, 2, 2)",
        "text.npy": "holds text, not numbers",
        "cell.mat": "not numbers",
        "struct.mat": "not numbers",
        "scalars.mat": "holds no array of two or three dimensions",
        "picture.png": ".png is not a known format; convert it to one of .mat",
        "missing.npy": "there is no such file",
    }.items():
        with pytest.raises(DataError, match=re.escape(finding)) as caught:
            read_array(tmp_path / file)
        sentence = str(caught.value)
        assert sentence.startswith(f"{tmp_path / file}: ")
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_names_with_spaces_and_accents(tmp_path: Path) -> None:
    for file in FILES:
        path = write(tmp_path / f"Köpfe 1 {file}", "x", SLICES)
        np.testing.assert_array_equal(read_array(path), SLICES)

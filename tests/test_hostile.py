"""Hostile inputs: each is answered with one sentence that names file, finding and remedy; nothing is left behind."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
from dicom_files import UID, save_series

import data_modules.native
from allpet.geometry import ParallelBeam
from allpet.io import Scan, write_scan
from data_modules import SinogramFiles
from data_modules.checks import ALL
from data_modules.command import main

GEOMETRY = ParallelBeam(n_views=24, n_bins=31, bin_mm=4.0, image_size=31, pixel_mm=4.0)


def sinograms(n: int = 12) -> np.ndarray:
    """Closed-form transforms of Gaussian blobs at changing places, ``(n, views, bins)``, corrected and centred."""
    theta, s = GEOMETRY.angles[:, None].numpy(), GEOMETRY.bin_centers.numpy()
    places = [(12 * np.cos(i), 12 * np.sin(2 * i)) for i in range(n)]
    blobs = [np.exp(-((s - x * np.cos(theta) - y * np.sin(theta)) ** 2) / 300) for x, y in places]
    return np.stack([(2 + i % 3) * blob for i, blob in enumerate(blobs)]).astype(np.float32)


SINOGRAMS = sinograms()


class Case(NamedTuple):
    """A hostile folder.

    Attributes:
        make: puts the fault into a folder.
        file: what the row names.
        finding: what it says, a pattern.
        level: ERROR, or WARN where training is possible but will disappoint.
        converts: whether ``convert`` takes it: where single files are fine and the fault lies between them.
    """

    make: Callable[[Path], Any]
    file: str
    finding: str
    level: str = "ERROR"
    converts: bool = False


class Trap:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def slices(folder: Path, values: np.ndarray) -> None:
    for i, one in enumerate(values):
        np.save(folder / f"p{i % 4}_{i:03}.npy", one)


def beside_good(name: str, write: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return what puts one bad file among good ones."""

    def make(folder: Path) -> None:
        slices(folder, SINOGRAMS[:8])
        write(folder / name)

    return make


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def truncated_hdf5(path: Path) -> None:
    write_scan(path, Scan(SINOGRAMS, "sinogram", GEOMETRY))
    cut(path)


def truncated_npz(path: Path) -> None:
    np.savez_compressed(path, np.random.default_rng(0).random((8, 24, 31)))
    cut(path)


def bombed(path: Path) -> None:
    """Write an archive of 4 kB that declares 4 GB: nothing is unpacked to find that out."""
    np.savez(path, x=SINOGRAMS[0])
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("x.npy").file_size.to_bytes(4, "little")
    assert size in data
    path.write_bytes(bytes(data).replace(size, (2**32 - 2).to_bytes(4, "little")))


def mat73(path: Path, stored: np.ndarray) -> None:
    """Write as MATLAB v7.3 does: HDF5 behind 512 bytes of text, axes in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["sino"] = stored
        file["sino"].attrs["MATLAB_class"] = np.bytes_("double")
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.parent / "trace")))


def objects(path: Path) -> None:
    array = np.array([[Trap(path.parent / "trace"), 1], [2, 3]], dtype=object)
    (np.save if path.suffix == ".npy" else np.savez)(path, array, allow_pickle=True)


def with_value(value: complex) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        one = SINOGRAMS[0].astype(complex if isinstance(value, complex) else float)
        one[3, 4] = value
        np.save(path, one)

    return write


def splits(train: str, test: str, n: int) -> Callable[[Path], None]:
    """Return what makes a training and a test folder of one patient each, which share 12 - 2 n slices."""

    def make(folder: Path) -> None:
        for use, name, values in (("train", train, SINOGRAMS[: 12 - n]), ("test", test, SINOGRAMS[n:])):
            (folder / use / name).mkdir(parents=True)
            np.save(folder / use / name / "a.npy", values)

    return make


def scan(name: str = "a.h5", values: np.ndarray = SINOGRAMS, **given: Any) -> Callable[[Path], None]:
    return lambda folder: write_scan(folder / name, Scan(values, "sinogram", GEOMETRY, **given))


def holed() -> np.ndarray:
    values = SINOGRAMS.copy()
    values[2, 3, 4] = np.nan
    return values


def no_slices(folder: Path) -> None:
    scan()(folder)
    with h5py.File(folder / "a.h5", "r+") as file:
        del file["sinogram"]


def other_schema(folder: Path) -> None:
    scan()(folder)
    with h5py.File(folder / "a.h5", "r+") as file:
        about = json.loads(file["about"][()])
        del file["about"]
        file["about"] = json.dumps({**about, "schema": "allpet-scan 9"})


def angles(theta: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "a.npz", sinogram=SINOGRAMS, theta=theta)


def interfile(edit: Callable[[str], str] = str, data: bytes | None = None) -> Callable[[Path], None]:
    """Return what writes an Interfile, edits its header, and replaces its data (b"": removes them)."""

    def make(folder: Path) -> None:
        write_scan(folder / "a.hs", Scan(SINOGRAMS, "sinogram", GEOMETRY))
        header = folder / "a.hs"
        header.write_text(edit(header.read_text()))
        if data is not None:
            (folder / "a.s").write_bytes(data) if data else (folder / "a.s").unlink()

    return make


def dicom(spoil: Callable[[Path], Any], **given: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        stored = np.random.default_rng(0).integers(1, 900, (6, 24, 24))
        save_series(folder / "series", stored, **given)
        spoil(folder / "series")

    return make


def second_series(folder: Path) -> None:
    stored = np.random.default_rng(1).integers(1, 900, (6, 24, 24))
    save_series(folder, stored, "late{}.dcm", SeriesInstanceUID=f"{UID}.2", SeriesNumber=4, SeriesDescription="late")


def nifti_bomb(folder: Path) -> None:
    head = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes())
    head[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
    (folder / "a.nii.gz").write_bytes(gzip.compress(bytes(head)))


def oblique(folder: Path) -> None:
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, 4), np.float32), turn), folder / "a.nii")


FULL = np.concatenate([SINOGRAMS, SINOGRAMS[:, :, ::-1]], 1)
EVEN = np.arange(24) * 180 / 24
DAMAGED = "it cannot be read as"
HOSTILE = {
    "truncated HDF5": Case(beside_good("p9_1.h5", truncated_hdf5), "p9_1.h5", DAMAGED),
    "noise called HDF5": Case(beside_good("p9_1.h5", lambda p: p.write_bytes(b"\0noise" * 99)), "p9_1.h5", DAMAGED),
    "truncated archive": Case(beside_good("p9_1.npz", truncated_npz), "p9_1.npz", DAMAGED),
    "zip bomb": Case(beside_good("p9_1.npz", bombed), "p9_1.npz", "would unpack to 4.3 GB"),
    "NIfTI bomb": Case(nifti_bomb, "a.nii.gz", "would unpack to"),
    "pickle called .npy": Case(beside_good("p9_1.npy", pickled), "p9_1.npy", DAMAGED),
    "objects in .npy": Case(beside_good("p9_1.npy", objects), "p9_1.npy", "Python objects, which are never unpickled"),
    "objects in .npz": Case(beside_good("p9_1.npz", objects), "p9_1.npz", "Python objects, which are never unpickled"),
    "empty file": Case(beside_good("p9_1.npy", lambda p: p.touch()), "p9_1.npy", "the file is empty"),
    "text": Case(beside_good("p9_1.npy", lambda p: np.save(p, [["a"], ["b"]])), "p9_1.npy", "holds text, not numbers"),
    "one line": Case(beside_good("p9_1.npy", lambda p: np.save(p, np.ones(9))), "p9_1.npy", r"has the shape \(9,\)"),
    "five axes": Case(
        beside_good("p9_1.npy", lambda p: np.save(p, np.ones((2,) * 5))), "p9_1.npy", r"has the shape \(2, 2, 2, 2, 2\)"
    ),
    "cells": Case(
        beside_good("p9_1.mat", lambda p: scipy.io.savemat(p, {"c": np.array([[SINOGRAMS, 1], [2, 3]], dtype=object)})),
        "p9_1.mat",
        "not numbers",
    ),
    "several arrays": Case(
        beside_good("p9_1.mat", lambda p: scipy.io.savemat(p, {"low": SINOGRAMS, "full": SINOGRAMS})),
        "p9_1.mat",
        r"several arrays \(low, full\); say which one is meant with key",
    ),
    "complex": Case(beside_good("p9_1.npy", with_value(1j)), "p9_1.npy", "is complex; save its real part"),
    "NaN": Case(beside_good("p9_1.npy", with_value(np.nan)), "p9_1.npy", "NaN or infinite values; remove or repair"),
    "infinite": Case(beside_good("p9_1.npy", with_value(-np.inf)), "p9_1.npy", "NaN or infinite values"),
    "beyond float32": Case(beside_good("p9_1.npy", with_value(1e300)), "p9_1.npy", "NaN or infinite values"),
    "mixed shapes": Case(
        beside_good("p9_1.npy", lambda p: np.save(p, SINOGRAMS[0][:, :20])), "p9_1.npy", "24 x 20|shape is .24, 20."
    ),
    "link to itself": Case(
        beside_good("p9_1.npy", lambda p: p.symlink_to(p.name)), "p9_1.npy", "no such file; check the path"
    ),
    "dangling link": Case(
        beside_good("p9_1.npy", lambda p: p.symlink_to("gone.npy")), "p9_1.npy", "no such file; check the path"
    ),
    "folder called .npy": Case(
        beside_good("p9.npy", lambda p: (p.mkdir(), (p / "ä b.npy").write_bytes(b"x"))), "p9.npy/ä b.npy", DAMAGED
    ),
    "empty folder": Case(lambda folder: None, ALL, "it holds no .*files.*; check the path"),
    "only pictures": Case(lambda folder: (folder / "a.png").touch(), ALL, "it holds no .*files"),
    "too few angles": Case(angles(EVEN[1:]), "a.npz", "23 angles .theta. for 24 views"),
    "unsorted angles": Case(angles(np.roll(EVEN, 3)), "a.npz", "do not rise; sort the views by angle"),
    "limited angles": Case(angles(EVEN * 2 / 3), "a.npz", "do not lie evenly over 180 or 360 degrees"),
    "missing DICOM slice": Case(dicom(lambda p: (p / "3.dcm").unlink()), "series", "about 1 missing"),
    "two series": Case(dicom(second_series), "series", "2 PET series"),
    "cut DICOM slice": Case(dicom(lambda p: cut(p / "2.dcm", 0.9)), "series/2.dcm", "its pixels cannot be read"),
    "CT": Case(dicom(lambda p: None, Modality="CT"), "series", "no PET but the modality CT"),
    "missing .s": Case(interfile(data=b""), "a.hs", "its data file a.s is missing; copy it beside"),
    "wrong header length": Case(interfile(data=b"\0" * 99), "a.hs", "a.s has 99 bytes where the header says 35712"),
    "big-endian of odd size": Case(
        interfile(lambda text: re.sub(r"LITTLEENDIAN", "BIGENDIAN", text), b"\0" * 35711), "a.hs", "a.s has 35711 bytes"
    ),
    "not arc-corrected": Case(
        interfile(lambda text: re.sub(r"(?m)applied corrections.*|^;.*", "applied corrections := {None}", text)),
        "a.hs",
        "not arc-corrected",
    ),
    "tilted NIfTI": Case(oblique, "a.nii", "tilted by 17 degrees"),
    "NaN in a data set": Case(scan(values=holed()), "a.h5", "its sinogram holds NaN or infinite values"),
    "NaN in our .npz": Case(scan("a.npz", holed()), "a.npz", "its sinogram holds NaN or infinite values"),
    "NaN in our .mat": Case(scan("a.mat", holed()), "a.mat", "its sinogram holds NaN or infinite values"),
    "NaN in the correction": Case(scan(acf=holed()), "a.h5", "its acf holds NaN or infinite values"),
    "data set without slices": Case(no_slices, "a.h5", "it holds neither a sinogram nor an image"),
    "another schema": Case(other_schema, "a.h5", "its layout is 'allpet-scan 9'"),
    "negative prompts": Case(
        scan(values=SINOGRAMS - 1, state=("prompts",)), "a.h5", "its state is prompts, which are counts", converts=True
    ),
    "unknown tracer": Case(
        scan(table={"tracer": ["FDG"] * 11 + ["FGD"]}), "a.h5", "unknown tracer 'FGD'; choose one of", converts=True
    ),
    "patient in two splits": Case(splits("p1", "p1", 6), ALL, "1 patient.s. in two splits", converts=True),
    "slice in two splits": Case(splits("p1", "p2", 5), ALL, "slice.s. in two splits", converts=True),
    "many empty slices": Case(
        lambda folder: slices(folder, SINOGRAMS * (np.arange(12) != 4)[:, None, None]),
        "p0_004.npy",
        "1 of all 12 slices are empty; remove",
        converts=True,
    ),
    "swapped axes": Case(lambda f: slices(f, SINOGRAMS.transpose(0, 2, 1)), ALL, "axes are swapped", "WARN"),
    "transposed v7.3": Case(
        lambda folder: [mat73(folder / f"p{i}.mat", SINOGRAMS[i::4]) for i in range(4)], ALL, "axes are swapped", "WARN"
    ),
    "360 degrees": Case(lambda folder: slices(folder, FULL), ALL, "360 degrees", "WARN"),
    "normalised per slice": Case(
        lambda folder: slices(folder, SINOGRAMS / SINOGRAMS.max((1, 2), keepdims=True)), ALL, "normalised", "WARN"
    ),
    "duplicates": Case(
        lambda folder: slices(folder, np.concatenate([SINOGRAMS, SINOGRAMS[3:4]])), ALL, "occur twice", "WARN"
    ),
    "off-centre": Case(
        lambda f: slices(f, np.pad(SINOGRAMS, ((0, 0), (0, 0), (0, 6)))), ALL, "the axis of rotation lies", "WARN"
    ),
}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    case, folder = HOSTILE[name], tmp_path / "Köpfe und Rümpfe"
    folder.mkdir()
    case.make(folder)
    before = contents(tmp_path)
    kind = [] if case.file.endswith((".nii", ".nii.gz", "series")) else ["--kind", "sinogram"]
    assert main(["check", str(folder), *kind]) == (case.level == "ERROR")
    out = capsys.readouterr()
    said = out.out + out.err
    rows = [row for row in said.splitlines() if row.startswith(case.level)]
    wanted = rf"{case.level} +{re.escape(case.file)} .*({case.finding})"
    assert any(re.search(wanted, row) and "; " in row for row in rows), said
    if case.level == "ERROR":
        assert len(rows) == 1, said
        with pytest.raises(ValueError, match=case.finding.split("; ")[0]) as caught:
            SinogramFiles(str(folder), kind="sinogram" if kind else "auto").load()
        assert re.fullmatch(r"[^\n]+ cannot be used: [^\n]+; [^\n]+\.", str(caught.value))
        capsys.readouterr()
        if not case.converts:
            assert main(["convert", str(folder), str(tmp_path / "set.h5")]) == 1
            answer = capsys.readouterr().err
            assert re.fullmatch(r"ERROR  [^\n]+: [^\n]+; [^\n]+\.\n", answer), answer
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["NaN in a data set", "data set without slices", "another schema", "truncated HDF5"])
@pytest.mark.parametrize("command", ["info", "export"])
def test_one_damaged_file_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    HOSTILE[name].make(tmp_path)
    (path,) = tmp_path.glob("*.h5")
    before = contents(tmp_path)
    out = [str(tmp_path / "out.hs")] if command == "export" else []
    assert main([command, str(path), *out]) == 1
    assert re.fullmatch(rf"ERROR  {re.escape(str(path))}: [^\n]+; [^\n]+\.\n", capsys.readouterr().err)
    assert contents(tmp_path) == before


def test_there_are_forty() -> None:
    assert len(HOSTILE) >= 40


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Opening a pipe that nobody writes to would wait forever."""
    slices(tmp_path, SINOGRAMS)
    for name in ("a.npy", "b.h5", "IM0001", "c.hs"):
        os.mkfifo(tmp_path / name)
    assert main(["check", str(tmp_path)]) == 0
    assert "4 other file(s) are not looked at" in capsys.readouterr().out


def denied(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_file_that_may_not_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slices(tmp_path, SINOGRAMS[:1])
    monkeypatch.setattr(Path, "open", denied)
    assert main(["check", str(tmp_path)]) == 1
    assert re.search(r"ERROR  p0_000\.npy  it cannot be read .*Permission denied.*; ", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["convert", "export", "split", "check"])
def test_a_read_only_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Root writes where nobody else may, so that the refusal is injected."""
    slices(tmp_path, SINOGRAMS)
    data_modules.native.convert(tmp_path, tmp_path / "set" / "set.h5", bin_mm=4.0)
    before = contents(tmp_path)
    monkeypatch.setattr(h5py, "File", _reading_only(h5py.File))
    for name in ("mkdir", "write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, denied)
    there, data_set = str(tmp_path / "out"), str(tmp_path / "set" / "set.h5")
    if command == "split":
        monkeypatch.setattr("data_modules.native.shutil.copyfile", denied)
    given = {
        "convert": ["convert", str(tmp_path), f"{there}.h5"],
        "export": ["export", data_set, f"{there}.h5"],
        "split": ["split", data_set],
        "check": ["check", data_set, "--json", f"{there}.json"],
    }
    assert main(given[command]) == 1
    answer = capsys.readouterr().err.split("\r")[-1]  # after the progress
    assert re.fullmatch(r"ERROR  [^\n]+: it cannot be written \([^\n]*denied[^\n]*\); [^\n]+\.\n", answer), answer
    assert contents(tmp_path) == before


def _reading_only(file: Any) -> Callable[..., Any]:
    return lambda path, mode="r", **given: file(path, mode, **given) if mode == "r" else denied()


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, generator = tmp_path / "many", np.random.default_rng(0)
    for patient in range(100):
        (folder / f"p{patient}").mkdir(parents=True)
        for i, one in enumerate(generator.random((1000, 6, 7), np.float32)):
            np.save(folder / f"p{patient}" / f"{i}.npy", one)
    (folder / "p5" / "7.npy").write_bytes(b"x")
    assert main(["check", str(folder), "--kind", "sinogram"]) == 1
    said = capsys.readouterr().out
    assert "99999 slice(s) of 6 x 7" in said
    assert [row.split()[1] for row in said.splitlines() if row.startswith("ERROR")] == ["p5/7.npy"]
    assert len(said.splitlines()) < 30
    (folder / "p5" / "7.npy").unlink()
    assert main(["convert", str(folder), str(tmp_path / "set.h5"), "--kind", "sinogram"]) == 0
    assert "99999 slices of 100 patient(s)" in capsys.readouterr().out

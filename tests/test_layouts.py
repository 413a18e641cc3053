"""Layouts: look-alikes of public sets are recognised, read by role, and paired; nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.io
from dicom_files import UID, save_series

from allpet.io import DataError, write_scan
from allpet.io.scans import Scan
from data_modules.command import main
from data_modules.files import SinogramFiles
from data_modules.folder import FoundFile, find_files, patients_of
from data_modules.layouts import DTM_HEADER, LAYOUTS, choose_layout
from data_modules.native import NativeFile
from data_modules.validate import inspect_folder

N = 16
AXIS = np.arange(N) - (N - 1) / 2
INSIDE = np.hypot(AXIS, AXIS[:, None]) < N / 2 - 1


def draw(seed: int, width: int = N) -> np.ndarray:
    """Return an image that is zero outside the field of view."""
    image = np.random.default_rng(seed).integers(1, 999, (N, N)) * INSIDE
    return np.pad(image, (width - N) // 2).astype(np.float64)


def save_mat(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays)


def make_raysolution_attenuation(root: Path) -> None:
    for i, patient in enumerate(("20220523002", "20220524001")):
        for j, name in enumerate(("dicom_TOF_250_gpu_attn_scat_gauss_1.0", "dicom_TOF_250_gpu_gauss_1.0")):
            stored = np.stack([draw(100 * i + 10 * j + k) for k in range(3)])
            folder = root / "self-attenuation correction data" / patient / name
            save_series(folder, stored, PatientID="X", SeriesInstanceUID=f"{UID}.{i}.{j}", PatientWeight=None)


def make_raysolution_tracers(root: Path) -> None:
    for isotope in ("F18", "G68"):
        for patient in (1, 2):
            for k in range(3):
                name = f"{isotope}_{patient:02}_{k:03}.mat"
                place = root / "Double Tracer Separation Dataset" / "chest_coronal" / isotope
                save_mat(place / name, data=draw(k + patient * 10 + (isotope == "F18") * 50))


def make_petac(root: Path) -> None:
    for use, first in (("training", 1), ("test", 41)):
        for k in range(first, first + 3):
            save_mat(root / f"data_for_{use}" / "pet_mat" / f"{k:04}.mat", data=draw(k))
            save_mat(root / f"data_for_{use}" / "ct_mat" / f"{k:04}.mat", data=draw(k, 32))


def make_red(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for i in range(6):
        both = np.stack([draw(i)[:, :12], draw(i + 50)[:, :12]])
        np.savez(root / f"{i:04}.npz", sino_image=both, dcm_path=np.array(f"D:\\UDPET\\P{i // 3}\\D10\\{i}.dcm"))


def make_dream(root: Path) -> None:
    for i in range(6):
        flat = np.arange(256 * 192.0).reshape(-1, 1) + i
        save_mat(root / f"p{i // 3}" / f"{i}.mat", gt=flat, lq=flat / 2)


def make_folders(root: Path) -> None:
    for i in range(6):
        save_mat(root / "gt" / f"p{i // 3}_{i}.mat", data=draw(i)[:, :12])
        save_mat(root / "lq" / f"p{i // 3}_{i}.mat", data=draw(i + 50)[:, :12])


def make_mscdt(root: Path) -> None:
    for i in range(6):
        save_mat(root / "fuse" / f"{i}.mat", data=draw(i))
        save_mat(root / "FDG" / f"{i}.mat", data=draw(i + 50))


def make_dtm(root: Path) -> None:
    for role in ("low", "full"):
        (root / role).mkdir(parents=True)
        for i in range(2):
            volume = np.zeros((2, 250, 250), "<f4")
            volume[:, 100:150, 100:150] = np.random.default_rng(i).random((2, 50, 50))
            (root / role / f"p{i}.raw").write_bytes(b"h" * DTM_HEADER + volume.tobytes())


def make_dtpm(root: Path) -> None:
    for i in range(2):
        for j, scan in enumerate(("CBM", "Delay")):
            stored = np.stack([draw(100 * i + 10 * j + k) for k in range(3)])
            folder = root / f"patient {i}" / f"PET WB Corrected_{scan}"
            save_series(folder, stored, "{}", SeriesInstanceUID=f"{UID}.{i}.{j}")


class Expected(NamedTuple):
    """What a look-alike holds: its default role, slices read then, patients, and slices of each role."""

    make: Callable[[Path], None]
    kind: str
    n: int
    n_patients: int
    roles: dict[str, int]


SETS = {
    "raysolution-attenuation": Expected(make_raysolution_attenuation, "image", 6, 2, {"target": 6, "input": 6}),
    "raysolution-tracers": Expected(make_raysolution_tracers, "image", 12, 2, {"target": 12}),
    "pet-ac-sct": Expected(make_petac, "image", 6, 2, {"input": 6, "ct": 6}),
    "red": Expected(make_red, "sinogram", 6, 2, {"input": 6, "target": 6}),
    "dream": Expected(make_dream, "sinogram", 6, 2, {"input": 6, "target": 6}),
    "dream-folders": Expected(make_folders, "sinogram", 6, 2, {"input": 6, "target": 6}),
    "ms-cdt": Expected(make_mscdt, "image", 6, 1, {"input": 6, "target": 6}),
    "dtm": Expected(make_dtm, "image", 8, 2, {"input": 4, "target": 4}),
    "st-dtpm": Expected(make_dtpm, "image", 12, 2, {"input": 6, "target": 6}),
}


def test_every_layout_has_a_look_alike() -> None:
    assert set(SETS) == set(LAYOUTS)


def read(root: Path, role: str | None = None) -> list[FoundFile]:
    report, files = inspect_folder(root, role=role)
    assert report.errors == [], str(report)
    return files


@pytest.mark.parametrize("name", SETS)
def test_a_download_is_recognised_read_by_role_and_converted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, root = SETS[name], tmp_path / "my download"
    expected.make(root)
    report, files = inspect_folder(root)
    assert report.errors == [], str(report)
    assert report.kind == expected.kind
    assert sum(len(found.slices) for found in files) == expected.n
    (said,) = [row.finding for row in report.rows if "laid out as" in row.finding]
    assert said.startswith(f"laid out as {name}, ")
    for role, n in expected.roles.items():
        chosen = read(root, role)
        assert sum(len(found.slices) for found in chosen) == n
        assert {one for found in chosen for one in found.column("role")} == {role}

    assert main(["convert", str(root), str(tmp_path / "set.h5"), "--layout", name]) == 0
    assert f"{expected.n} slices of {expected.n_patients} patient(s)" in capsys.readouterr().out
    native = NativeFile(tmp_path / "set.h5")
    assert native.about["kind"] == expected.kind
    stored = np.concatenate([found.slices for found in files])
    np.testing.assert_array_equal(native.read(range(expected.n)), stored)


@pytest.mark.parametrize("name", [name for name, one in SETS.items() if {"input", "target"} <= set(one.roles)])
def test_every_input_has_its_target(name: str, tmp_path: Path) -> None:
    SETS[name].make(tmp_path / "data")
    pairs, owners = {}, {}
    for role in ("input", "target"):
        files = read(tmp_path / "data", role)
        pairs[role] = [entry for found in files for entry in found.column("pair")]
        owners[role] = set(zip(pairs[role], patients_of(files).names, strict=True))
    assert sorted(pairs["input"]) == sorted(pairs["target"])
    assert "" not in pairs["input"]
    assert owners["input"] == owners["target"]  # otherwise a patient could be in two splits


def test_the_two_tracers_are_paired_by_slice(tmp_path: Path) -> None:
    make_raysolution_tracers(tmp_path)
    by_isotope: dict[str, list[str]] = {}
    for found in read(tmp_path):
        by_isotope.setdefault(found.column("isotope")[0], []).extend(found.column("pair"))
    assert sorted(by_isotope["F18"]) == sorted(by_isotope["G68"])
    assert len(set(by_isotope["F18"])) == 6


def test_petac_is_split_as_its_folders_say_and_trains(tmp_path: Path) -> None:
    make_petac(tmp_path)
    loaded = SinogramFiles(str(tmp_path), augmentation=None).load()
    assert loaded.reprojected
    assert len(loaded.test) == 3
    assert len(loaded.train) + len(loaded.val) == 3
    patients = {entry for found in read(tmp_path) for entry in found.column("patient")}
    assert patients == {"patient01", "patient02"}


def test_red_is_low_then_full_and_not_folded(tmp_path: Path) -> None:
    make_red(tmp_path)
    for role, seed in (("input", 0), ("target", 50)):
        found = read(tmp_path, role)
        np.testing.assert_array_equal(found[0].slices[0], draw(seed)[:, :12])
        assert found[0].column("patient") == ["P0"]
        assert found[5].column("patient") == ["P1"]


def test_a_dream_column_is_in_matlabs_order(tmp_path: Path) -> None:
    make_dream(tmp_path)
    slice_ = read(tmp_path, "target")[0].slices[0]
    assert slice_.shape == (256, 192)
    assert slice_[1, 0] - slice_[0, 0] == 1
    assert slice_[0, 1] - slice_[0, 0] == 256


def test_dtm_skips_the_header_and_a_repeated_slice(tmp_path: Path) -> None:
    make_dtm(tmp_path)
    values = read(tmp_path, "target")[0].slices
    np.testing.assert_array_equal(
        values[0, 100:150, 100:150], np.random.default_rng(0).random((2, 50, 50))[0].astype("f4")
    )
    one = np.zeros((256, 256), "<f4")
    one[100:150, 100:150] = 3
    for i, stack in enumerate((np.stack([one] * 3), np.stack([one, one * 2, one * 3]))):
        place = tmp_path / f"train{i}"
        place.mkdir()
        (place / "a.bin").write_bytes(stack.tobytes())
        chosen = choose_layout(place, *find_files(place), "dtm")
        assert len(chosen.read(place, "a.bin", None, "auto").values) == (1, 3)[i]


def test_dtm_of_a_wrong_length_gets_one_sentence(tmp_path: Path) -> None:
    make_dtm(tmp_path)
    with (tmp_path / "low" / "p0.raw").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match="bytes are neither") as caught:
        LAYOUTS["dtm"].read(tmp_path / "low" / "p0.raw")  # type: ignore[misc]
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+\.", str(caught.value))


def test_other_folders_have_no_layout(tmp_path: Path) -> None:
    for i in range(4):
        write_scan(tmp_path / f"p{i}_1.npz", Scan(draw(i)[None], "image", pixel_mm=2.0))
        save_mat(tmp_path / "more" / f"p{i}_1.mat", data=draw(i + 9))
    (tmp_path / "README.txt").write_text("nothing")
    chosen = choose_layout(tmp_path, *find_files(tmp_path))
    assert chosen.layout is None
    assert len(chosen.names) == 8


@pytest.mark.parametrize(
    ("layout", "role", "match"),
    [
        ("reds", None, r"'reds' is no known layout; choose of raysolution-attenuation, "),
        ("st-dtpm", None, "none of its 1 files is all of st-dtpm"),
        ("red", "late", r"red has no role 'late'; choose of input, target, all"),
        ("auto", "input", "has no layout that tells which files are 'input'"),
    ],
)
def test_a_wrong_choice_gets_one_sentence(tmp_path: Path, layout: str, role: str | None, match: str) -> None:
    np.save(tmp_path / "a.npy", draw(0))
    with pytest.raises(DataError, match=match) as caught:
        choose_layout(tmp_path, *find_files(tmp_path), layout, role)
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+\.", str(caught.value))
    report, _ = inspect_folder(tmp_path, layout=layout, role=role)
    assert re.search(match, f"{report.errors[0].finding}; {report.errors[0].remedy}")


def test_files_can_be_read_without_their_layout(tmp_path: Path) -> None:
    make_folders(tmp_path)
    report, files = inspect_folder(tmp_path, layout="none")
    assert report.errors == []
    assert len(files) == 12

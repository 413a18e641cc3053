"""The native data set: what goes in comes out, whole or not at all, and the command that makes it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import data_modules.native
from allpet.geometry import ParallelBeam
from allpet.io import DataError, Scan, content_hash, read_scan, write_scan
from data_modules import SinogramFiles
from data_modules.command import main
from data_modules.native import NativeFile, convert
from data_modules.validate import validate_folder

GEOMETRY = ParallelBeam(n_views=32, n_bins=40, bin_mm=4.0, image_size=40, pixel_mm=4.0)


def sinograms(n: int) -> np.ndarray:
    """Closed-form Radon transforms of shifting Gaussian blobs, ``(n, views, bins)``."""
    theta, s = GEOMETRY.angles[:, None], GEOMETRY.bin_centers
    return np.stack(
        [torch.exp(-((s - 2 * i * theta.cos() - 20 * theta.sin()) ** 2) / 300).numpy() * (i + 1) for i in range(n)]
    ).astype(np.float32)


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Ten patients of three sinograms each, in subfolders."""
    for i, slices in enumerate(sinograms(30).reshape(10, 3, 32, 40)):
        (tmp_path / "in" / f"p{i}").mkdir(parents=True)
        for j, one in enumerate(slices):
            np.save(tmp_path / "in" / f"p{i}" / f"{j}.npy", one)
    return tmp_path / "in"


def test_a_converted_folder_holds_the_same_slices(patients: Path, tmp_path: Path) -> None:
    path = convert(patients, tmp_path / "set.h5", bin_mm=4.0, licence="CC0", columns={"tracer": "FDG"})
    native = NativeFile(path)
    assert native.shape == (30, 32, 40)
    order = [29, 0, 7, 7]
    np.testing.assert_array_equal(native.read(order), sinograms(30)[order])
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.values, sinograms(30))
    assert scan.geometry == GEOMETRY
    assert scan.provenance == {"source": "in", "licence": "CC0"}
    assert scan.table["patient"][3] == "p1"
    assert scan.table["file"][3] == "p1/0.npy"
    assert scan.table["hash"][3] == content_hash(sinograms(30)[3])
    assert set(scan.table["tracer"]) == {"FDG"}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "set.h5"]


def test_training_is_the_same_from_folder_and_data_set(patients: Path, tmp_path: Path) -> None:
    path = convert(patients, tmp_path / "set.h5", bin_mm=4.0, columns={"tracer": "PSMA", "region": "chest"})
    folder = SinogramFiles(str(patients), bin_mm=4.0, tracer="PSMA", region="chest")
    native = SinogramFiles(str(path))
    for data in (folder, native):
        data.setup("fit")
    assert native.geometry == folder.geometry
    for name in ("train_set", "val_set", "test_set"):
        ours, theirs = (getattr(data, name)[range(len(getattr(data, name)))] for data in (native, folder))
        assert torch.equal(ours.sinogram, theirs.sinogram)
        assert ours.prompt.names() == theirs.prompt.names()


def test_images_keep_their_pixels(tmp_path: Path) -> None:
    axis = np.arange(24) - 11.5
    disc = (np.hypot(axis, axis[:, None]) < 9).astype(np.float32)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.stack([disc, 2 * disc, 3 * disc]))
    scan = read_scan(convert(tmp_path / "in", tmp_path / "set.h5", pixel_mm=3.0))
    assert (scan.kind, scan.pixel_mm, scan.geometry) == ("image", 3.0, None)


def test_scans_carry_their_tables_and_companions(tmp_path: Path) -> None:
    for i in range(2):
        values = sinograms(6)[3 * i : 3 * i + 3]
        scan = Scan(values, "sinogram", GEOMETRY, state=("prompts",), acf=1 + values, table={"seed": [i, i, i + 9]})
        write_scan(tmp_path / "in" / f"p{i}.hs", scan)
    native = NativeFile(convert(tmp_path / "in", tmp_path / "set.h5"))
    assert native.table["seed"] == [0, 0, 9, 1, 1, 10]
    scan = native.scan([5, 0])
    np.testing.assert_array_equal(scan.acf, 1 + sinograms(6)[[5, 0]])
    assert scan.state == ("prompts",)


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_an_interrupted_conversion_continues(patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(patients, tmp_path / "whole.h5").read_bytes()
    read = data_modules.native.read_files
    asked: list[str] = []

    def interrupted(folder: Any, names: list[str], *rest: Any) -> Any:
        asked.extend(names)
        for i, found in enumerate(read(folder, names, *rest)):
            if i == 13 and len(asked) == 30:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(data_modules.native, "read_files", interrupted)
    path = tmp_path / "set.h5"
    assert main(["convert", str(patients), str(path)]) == 130
    assert not path.exists()
    unfinished = tmp_path / ".set.h5.part"
    with (unfinished / "values").open("ab") as stream:  # killed in the middle of a write
        stream.write(b"half a slice")
    with (unfinished / "log.jsonl").open("a") as stream:
        stream.write('{"name": "p4/1.n')
    convert(patients, path)
    assert len(asked) == 30 + 17
    np.testing.assert_array_equal(read_scan(path).values, read_scan(tmp_path / "whole.h5").values)
    assert len(path.read_bytes()) == len(whole)
    assert not unfinished.exists()


def test_another_task_does_not_continue_an_interrupted_one(patients: Path, tmp_path: Path) -> None:
    from data_modules.native import _Journal

    _Journal(tmp_path / "set.h5", "another")
    assert (tmp_path / ".set.h5.part").is_dir()
    assert len(NativeFile(convert(patients, tmp_path / "set.h5"))) == 30


@pytest.mark.parametrize("fault", ["damaged", "shape"])
def test_a_bad_file_is_named_and_leaves_nothing(patients: Path, tmp_path: Path, fault: str) -> None:
    if fault == "damaged":
        (patients / "p7" / "1.npy").write_bytes(b"no array")
    else:
        np.save(patients / "p7" / "1.npy", np.ones((32, 41)))
    with pytest.raises(DataError, match=r"p7/1\.npy: (it cannot be read|its shape is \[32, 41\] where p0/0\.npy has)"):
        convert(patients, tmp_path / "set.h5")
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_the_same_command_keeps_a_data_set_with_its_split_and_another_one_leaves_it(
    patients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set.h5"
    words = ["convert", str(patients), str(path), "--bin-mm", "4.0"]
    assert main(words) == 0
    assert main(["split", str(path), "--val", "0.2", "--test", "0.2"]) == 0
    before = path.read_bytes()
    assert main(words) == 0
    assert "Kept, for it was converted before," in capsys.readouterr().out
    assert path.read_bytes() == before
    np.save(patients / "p0" / "2.npy", np.load(patients / "p0" / "0.npy"))
    for other in (words, [*words[:-1], "5.0"]):
        assert main(other) == 1
        assert "it exists, and was not made of these files in this way; choose another name" in capsys.readouterr().err
    path.write_bytes(b"no data set")
    assert main(words) == 1
    assert path.read_bytes() == b"no data set"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "set.h5"]


def test_a_width_that_nobody_said_is_not_made_up(
    patients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(patients), str(tmp_path / "set.h5")]) == 0
    assert "WARN  Nothing says how wide the bins are" in capsys.readouterr().out
    assert read_scan(tmp_path / "set.h5").geometry is None
    assert main(["convert", str(patients), str(tmp_path / "said.h5"), "--bin-mm", "4.0"]) == 0
    assert "WARN" not in capsys.readouterr().out
    assert read_scan(tmp_path / "said.h5").geometry.bin_mm == 4.0
    folder, native = SinogramFiles(str(patients)), SinogramFiles(str(tmp_path / "set.h5"))
    for data in (folder, native):
        data.setup("fit")
    assert native.geometry == folder.geometry, "what is assumed of the files is assumed of the data set"


@pytest.mark.parametrize("place", ["journal", "end"])
def test_a_full_disk_leaves_nothing(
    patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "journal":
        monkeypatch.setattr(data_modules.native._Journal, "add", full)
    else:
        monkeypatch.setattr(h5py.Group, "create_dataset", full)
    assert main(["convert", str(patients), str(tmp_path / "set.h5")]) == 1
    said = capsys.readouterr().err
    assert "set.h5: it cannot be written (No space left on device); free space" in said
    assert "Traceback" not in said
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_splits_are_by_patient_and_training_heeds_them(
    patients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "set.h5")
    assert main(["convert", str(patients), path, "--bin-mm", "4", "--tracer", "fdg"]) == 0
    assert main(["split", path, "--val", "0.2", "--test", "0.3"]) == 0
    table = NativeFile(path).table
    by_patient = {
        name: {u for p, u in zip(table["patient"], table["split"], strict=True) if p == name}
        for name in table["patient"]
    }
    assert all(len(uses) == 1 for uses in by_patient.values())
    assert [table["split"].count(use) for use in ("train", "val", "test")] == [15, 6, 9]
    data = SinogramFiles(path)
    data.setup("fit")
    rows = [i for i, use in enumerate(table["split"]) if use == "val"]
    np.testing.assert_array_equal(data.val_set.sinogram.numpy(), sinograms(30)[rows])
    assert NativeFile(path).verify() == []
    assert "train  15 slices of 5 patient(s)" in capsys.readouterr().out


def test_info_and_verify(patients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set.h5"
    assert main(["convert", str(patients), str(path), "--bin-mm", "4", "--licence", "CC0"]) == 0
    assert main(["info", str(path), "--verify"]) == 0
    said = capsys.readouterr().out
    for part in ("30 sinogram slice(s) of 32 x 40", "bin_mm=4.0", "licence: CC0", "column patient: 10", "30 hashes"):
        assert part in said
    with h5py.File(path, "r+") as file:
        file["sinogram"][4, 3, 2] += 1
    assert main(["info", str(path), "--verify"]) == 1
    assert "1 slice(s) are not those converted, the first is 4; convert it again." in capsys.readouterr().err


def test_export_takes_samples_to_interfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """samples.h5 as ``allpet predict`` writes it."""
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file["sinogram"], file["image"] = sinograms(5), np.zeros((5, 40, 40), np.float32)
        file["seed"], file["prompt"] = np.arange(5), np.array(["FDG:brain"] * 5, dtype=object)
        file["sinogram"].attrs["units"] = "SUV x mm"
        file.attrs.update(provenance="synthetic", generator="allpet", geometry=json.dumps(GEOMETRY.to_dict()))
    out = tmp_path / "out.hs"
    assert main(["export", str(tmp_path / "samples.h5"), str(out), "--rows", "1:3"]) == 0
    assert "half a bin off for an even number; add --odd-bins" in capsys.readouterr().out
    scan = read_scan(out)
    np.testing.assert_array_equal(scan.values, sinograms(5)[1:3])
    assert scan.table == {"seed": [1, 2], "prompt": ["FDG:brain"] * 2}
    assert scan.provenance["synthetic"] is True
    assert scan.state == ("synthetic",)
    assert scan.units == "SUV x mm"
    assert main(["export", str(out), str(tmp_path / "odd.npz"), "--odd-bins", "--lors"]) == 0
    assert read_scan(tmp_path / "odd.npz").geometry.n_bins == 41
    with np.load(tmp_path / "odd.npz") as archive:
        assert archive["lor_start"].shape == (32, 41, 2)
    assert main(["export", str(out), str(tmp_path / "x.npz"), "--rows", "7:9"]) == 1
    assert "it has 2 slices, none of them in 7:9" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_one_sentence_for_what_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", sinograms(2))
    for command in (
        ["split", str(tmp_path / "a.npy")],
        ["split", str(tmp_path / "nothing.h5")],
        ["info", str(tmp_path / "nothing.h5")],
        ["convert", str(tmp_path / "nowhere"), str(tmp_path / "a.h5")],
        ["convert", str(tmp_path), str(tmp_path / "a.txt")],
        ["convert", str(tmp_path), str(tmp_path / "a.h5"), "--tracer", "FGD"],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("ERROR  ")
        assert said.count("\n") == 1


def test_a_data_set_validates(patients: Path, tmp_path: Path) -> None:
    report = validate_folder(convert(patients, tmp_path / "set.h5", bin_mm=4.0))
    assert report.errors == []
    assert report.geometry == GEOMETRY
    assert any("10 patient(s), told apart by the files' own tables" in row.finding for row in report.rows)

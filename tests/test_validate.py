"""Validation: good folders pass without a word, each fault is found, and a refusal names every file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from allpet.geometry import ParallelBeam
from allpet.io import Scan, write_scan
from allpet.projector import Radon
from data_modules.validate import Report, inspect_folder, main, validate_folder

GEOMETRY = ParallelBeam(n_views=24, n_bins=24, bin_mm=4.0, image_size=24, pixel_mm=4.0)


def make_images(n: int) -> np.ndarray:
    """Return ellipses of different place, size and brightness, ``(n, rows, columns)``, inside the field of view."""
    generator = torch.Generator().manual_seed(0)
    x, y = GEOMETRY.pixel_centers
    images = []
    for _ in range(n):
        cx, cy, a, b, value = torch.rand(5, generator=generator).tolist()
        inside = ((x - 12 * cx + 14) / (8 + 8 * a)) ** 2 + ((y + 12 * cy - 4) / (12 + 12 * b)) ** 2 < 1
        images.append((1 + value) * inside.float())
    return torch.stack(images).numpy()


IMAGES = make_images(12)
SINOGRAMS = Radon(GEOMETRY).project(torch.from_numpy(IMAGES)[:, None])[:, 0].numpy()


def save(folder: Path, slices: np.ndarray) -> Path:
    """Write one .npy file per slice, of four patients."""
    folder.mkdir(exist_ok=True)
    for i, one in enumerate(slices):
        np.save(folder / f"patient{i % 4}_{i:03}.npy", one)
    return folder


def findings(report: Report, level: str) -> str:
    return "\n".join(f"{row.file}: {row.finding}; {row.remedy}" for row in report.rows if row.level == level)


def test_noise_of_low_doses_is_not_taken_for_attenuation(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noisy = SINOGRAMS + 0.04 * SINOGRAMS.max() * generator.standard_normal(SINOGRAMS.shape).astype(np.float32)
    sums = noisy.sum(2)
    assert np.median(sums.std(1) / sums.mean(1)) > 0.06
    report = validate_folder(save(tmp_path / "noisy", noisy), geometry=GEOMETRY)
    assert "not corrected for attenuation" not in findings(report, "WARN")
    report = validate_folder(save(tmp_path / "both", noisy * ATTENUATION**2), geometry=GEOMETRY)
    assert "not corrected for attenuation" in findings(report, "WARN")


def test_good_sinograms_pass_silently(tmp_path: Path) -> None:
    report = validate_folder(save(tmp_path, SINOGRAMS), geometry=GEOMETRY)
    assert report.errors == report.warnings == []
    report.raise_errors()
    assert report.kind == "sinogram"
    assert report.shape == GEOMETRY.sinogram_shape
    assert "12 slice(s) of 24 x 24 in 12 file(s)" in findings(report, "INFO")
    assert "4 patient(s), told apart by the names up to the last underscore" in findings(report, "INFO")


def spoil(folder: Path) -> None:
    """Damage one file, reshape another, and put a NaN into a third."""
    (folder / "patient0_000.npy").write_bytes((folder / "patient0_000.npy").read_bytes()[:300])
    np.save(folder / "patient1_001.npy", SINOGRAMS[1][:, :20])
    holed = SINOGRAMS[2].copy()
    holed[3, 4] = np.nan
    np.save(folder / "patient2_002.npy", holed)


def test_a_refusal_is_one_sentence_that_names_every_file(tmp_path: Path) -> None:
    spoil(save(tmp_path, SINOGRAMS))
    report = validate_folder(tmp_path)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        report.raise_errors()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert "patient0_000.npy (it cannot be read as a .npy file" in sentence
    assert "patient1_001.npy (slices of 24 x 20 where 9 other file(s) have 24 x 24)" in sentence
    assert "patient2_002.npy (the slice of the array holds NaN or infinite values)" in sentence
    assert len(report.errors) == 3


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "Gute Köpfe", SINOGRAMS)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main([str(folder)]) == 0
    assert f"{folder} can be used: 0 error(s), 0 warning(s)" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    spoil(folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "data_modules.validate", str(folder), "--kind", "sinogram"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("ERROR") == 3
    assert "cannot be used: 3 error(s)" in done.stdout
    assert "Traceback" not in done.stderr
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.parametrize("name", ["nowhere", "empty", "pictures"])
def test_folders_without_slices(tmp_path: Path, name: str) -> None:
    if name != "nowhere":
        (tmp_path / name).mkdir()
    if name == "pictures":
        (tmp_path / name / "a.png").touch()
    with pytest.raises(ValueError, match=f"{name} cannot be used: (there is no such folder|it holds no .mat)"):
        validate_folder(tmp_path / name).raise_errors()


def test_loops_hidden_and_other_files_do_not_matter(tmp_path: Path) -> None:
    save(tmp_path, SINOGRAMS)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".hidden.npy").touch()
    (tmp_path / "notes.txt").touch()
    report = validate_folder(tmp_path)
    assert report.errors == []
    assert "1 other file(s) are not looked at, the first is notes.txt" in findings(report, "INFO")


# ---- images or sinograms ---------------------------------------------------------------------------------------------


def test_square_sinograms_and_images_are_told_apart(tmp_path: Path) -> None:
    assert validate_folder(save(tmp_path / "s", SINOGRAMS)).kind == "sinogram"
    report = validate_folder(save(tmp_path / "i", IMAGES))
    assert report.kind == "image"
    assert "12 of 12 slices are square and zero outside the inscribed circle" in findings(report, "INFO")
    assert "images are projected" in findings(report, "WARN")
    assert validate_folder(tmp_path / "i", "sinogram").kind == "sinogram"
    assert validate_folder(save(tmp_path / "wide", np.pad(IMAGES, ((0, 0), (0, 0), (4, 4))))).kind == "sinogram"


def test_images_taken_for_sinograms_are_warned_of(tmp_path: Path) -> None:
    report = validate_folder(save(tmp_path, IMAGES), "sinogram")
    assert "no sinograms; correct them, or say kind=image" in findings(report, "WARN")


# ---- what warnings find ----------------------------------------------------------------------------------------------

NOISE = 0.01 * SINOGRAMS.max() * np.random.default_rng(0).standard_normal(SINOGRAMS.shape).astype(np.float32)
ATTENUATION = np.exp(
    -0.004 * Radon(GEOMETRY).project((torch.from_numpy(IMAGES)[:, None] > 0).float())[:, 0].numpy() * 4
)


FAULTS = {
    "noise": (SINOGRAMS + NOISE, []),
    "swapped": (SINOGRAMS.transpose(0, 2, 1), [r"axes are swapped\?; store slices as \(views, bins\)"]),
    "attenuated": (SINOGRAMS * ATTENUATION, ["not corrected for attenuation"]),
    "truncated": (SINOGRAMS[:, :, 8:16], ["the outermost bins hold", "not corrected"]),
    "full turn": (np.concatenate([SINOGRAMS, SINOGRAMS[:, :, ::-1]], 1) + np.tile(NOISE, (1, 2, 1)), ["360 degrees"]),
    "off-centre": (np.pad(SINOGRAMS, ((0, 0), (0, 0), (0, 6))), [r"the axis of rotation lies -3\.0 bins off"]),
    "normalised": (SINOGRAMS / SINOGRAMS.max((1, 2), keepdims=True), ["every slice has the maximum 1: normalised"]),
    "twice": (np.concatenate([SINOGRAMS, SINOGRAMS[3:4]]), [r"1 slice\(s\) occur twice \(patient0_012.npy = patient3"]),
    "empty": (
        np.concatenate([SINOGRAMS, SINOGRAMS + NOISE, 0 * SINOGRAMS[:1]]),
        [r"1 of all 25 slices are empty; remove"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_nothing_else(tmp_path: Path, fault: str) -> None:
    slices, warnings = FAULTS[fault]
    report = validate_folder(save(tmp_path, slices))
    assert report.errors == []
    assert len(report.warnings) == len(warnings), findings(report, "WARN")
    for warning in warnings:
        assert re.search(warning, findings(report, "WARN"))


def test_many_empty_slices_are_an_error(tmp_path: Path) -> None:
    slices = SINOGRAMS.copy()
    slices[4] = 0
    report = validate_folder(save(tmp_path, slices))
    assert "patient0_004.npy: 1 of all 12 slices are empty; remove them" in findings(report, "ERROR")


def test_a_full_turn_folds_to_half_a_turn(tmp_path: Path) -> None:
    save(tmp_path, np.concatenate([SINOGRAMS, SINOGRAMS[:, :, ::-1]], 1))
    report, files = inspect_folder(tmp_path, geometry=GEOMETRY, full_turn=True)
    assert report.errors == report.warnings == []
    folded = {found.name: found.slices[0] for found in files}
    for i, one in enumerate(SINOGRAMS):
        np.testing.assert_allclose(folded[f"patient{i % 4}_{i:03}.npy"], one, rtol=1e-6)
    save(tmp_path, SINOGRAMS[:, :23])
    assert "23 views over 360 degrees, an odd number" in findings(validate_folder(tmp_path, full_turn=True), "ERROR")


def test_sinograms_must_fit_the_geometry_asked_for(tmp_path: Path) -> None:
    save(tmp_path, SINOGRAMS[:, :16])
    with pytest.raises(ValueError, match=r"12 file\(s\) with 16 x 24 sinograms where the geometry has 24 x 24; leave"):
        validate_folder(tmp_path, geometry=GEOMETRY).raise_errors()
    swapped = ParallelBeam(24, 16, 4.0, 24, 4.0)
    assert "the axes seem to be swapped" in findings(validate_folder(tmp_path, geometry=swapped), "ERROR")


def test_a_minority_of_many_is_counted_not_listed(tmp_path: Path) -> None:
    save(tmp_path, np.concatenate([SINOGRAMS, SINOGRAMS])[:23])
    save(tmp_path / "more", SINOGRAMS[:11, :20])
    report = validate_folder(tmp_path)
    assert [row.file for row in report.errors] == ["more/patient0_000.npy and 10 more"]


def test_keys_and_slice_axes_are_passed_on(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"low": SINOGRAMS + 1, "full": np.moveaxis(SINOGRAMS, 0, -1)})
    assert "it holds several arrays (low, full)" in findings(validate_folder(tmp_path), "ERROR")
    assert validate_folder(tmp_path, key="full").warnings == []
    assert validate_folder(tmp_path, key="low", slices="first").shape == (24, 24)


# ---- patients --------------------------------------------------------------------------------------------------------


def patients_said(folder: Path, **kwargs: str) -> str:
    report = validate_folder(folder, **kwargs)
    return "\n".join(row.finding for row in report.rows if "patient" in row.finding)


def test_patients_are_told_apart(tmp_path: Path) -> None:
    assert "4 patient(s), told apart by the names" in patients_said(save(tmp_path / "named", SINOGRAMS))
    (tmp_path / "folders").mkdir()
    for i in range(2):
        save(tmp_path / "folders" / f"p{i}", SINOGRAMS[i::2])
    assert "2 patient(s), told apart by subfolder" in patients_said(tmp_path / "folders")
    (tmp_path / "stacks").mkdir()
    for i in range(3):
        np.save(tmp_path / "stacks" / f"scan_{i}.npy", SINOGRAMS[i::3])
    assert "3 patient(s), told apart one per file" in patients_said(tmp_path / "stacks")
    (tmp_path / "numbers").mkdir()
    for i, one in enumerate(SINOGRAMS):
        np.save(tmp_path / "numbers" / f"{i}.npy", one)
    assert "nothing in the files' names tells patients apart" in patients_said(tmp_path / "numbers")


def test_pairs_are_no_patients(tmp_path):
    """Input and target of one patient would lie in two splits."""
    sinograms = np.random.default_rng(0).random((2, 3, 24, 24))
    for folder, values in zip(("input", "target"), sinograms, strict=True):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
        np.save(tmp_path / "pairs" / folder / "p1.npy", values)
    report = validate_folder(tmp_path / "pairs")
    assert any("it holds pairs, input/ and target/" in row.finding for row in report.rows if row.level == "ERROR")
    for good in (validate_folder(tmp_path / "pairs" / "target"), validate_folder(tmp_path / "pairs", patient=r"p\d")):
        assert not any("it holds pairs" in row.finding for row in good.rows)


def test_patterns(tmp_path: Path) -> None:
    folder = save(tmp_path, SINOGRAMS)
    assert "4 patient(s), told apart by the pattern" in patients_said(folder, patient=r"^(patient\d)")
    report = validate_folder(folder, patient=r"_(00\d)")
    assert "does not fit 2 file(s), the first is patient2_010.npy; change it" in findings(report, "ERROR")
    assert "no regular expression" in findings(validate_folder(folder, patient="("), "ERROR")


# ---- what files say of themselves, splits, reports -------------------------------------------------------------------


def split_folder(folder: Path, train: np.ndarray, test: np.ndarray, patients: tuple[str, str]) -> Path:
    for use, name, slices in zip(("train", "test"), patients, (train, test), strict=True):
        (folder / use / name).mkdir(parents=True)
        np.save(folder / use / name / "a.npy", slices)
    return folder


def test_a_patient_in_two_splits_is_an_error(tmp_path: Path) -> None:
    clean = split_folder(tmp_path / "clean", SINOGRAMS[:6], SINOGRAMS[6:], ("p1", "p2"))
    assert validate_folder(clean).errors == []
    leaky = split_folder(tmp_path / "leaky", SINOGRAMS[:6], SINOGRAMS[6:], ("p1", "p1"))
    assert "1 patient(s) in two splits, the first is p1" in findings(validate_folder(leaky), "ERROR")


def test_a_slice_in_two_splits_is_found_by_its_content(tmp_path: Path) -> None:
    split_folder(tmp_path, SINOGRAMS[:6], SINOGRAMS[5:], ("p1", "p2"))
    found = findings(validate_folder(tmp_path), "ERROR")
    assert "1 slice(s) in two splits (test/p2/a.npy = train/p1/a.npy); remove the copies" in found


def test_prompts_below_zero_and_unknown_tracers_are_errors(tmp_path: Path) -> None:
    table = {"tracer": ["FDG"] * 11 + ["FGD"]}
    write_scan(tmp_path / "a.h5", Scan(SINOGRAMS - 1, "sinogram", GEOMETRY, state=("prompts",), table=table))
    found = findings(validate_folder(tmp_path), "ERROR")
    assert "where its state is prompts, which are counts" in found
    assert "unknown tracer 'FGD'; choose one of" in found


def test_lengths_must_agree(tmp_path: Path) -> None:
    for i, bin_mm in enumerate((GEOMETRY.bin_mm, GEOMETRY.bin_mm, 2 * GEOMETRY.bin_mm)):
        scan = Scan(SINOGRAMS[4 * i : 4 * i + 4], "sinogram", replace(GEOMETRY, bin_mm=bin_mm))
        write_scan(tmp_path / f"p{i}.h5", scan)
    found = findings(validate_folder(tmp_path), "ERROR")
    assert found == "p2.h5: another geometry than 2 other file(s); keep each geometry in a folder of its own"
    (tmp_path / "p2.h5").unlink()
    other = replace(GEOMETRY, bin_mm=9.0)
    assert "where the geometry has 9 mm" in findings(validate_folder(tmp_path, geometry=other), "ERROR")


ANGLES = {
    "too few": (np.arange(23) * 180 / 23, "23 angles .theta. for 24 views; store slices as .views, bins."),
    "unsorted": (np.roll(np.arange(24) * 180 / 24, 3), "its angles .theta. do not rise; sort the views by angle"),
    "uneven": (180 * (np.arange(24) / 24) ** 2, "do not lie evenly over 180 or 360 degrees; interpolate the views"),
    "limited": (np.arange(24) * 120 / 24, "do not lie evenly over 180 or 360 degrees"),
}


@pytest.mark.parametrize("fault", ANGLES)
def test_angles_beside_the_slices_must_fit(tmp_path: Path, fault: str) -> None:
    angles, sentence = ANGLES[fault]
    np.savez(tmp_path / "a.npz", sinogram=SINOGRAMS, theta=angles)
    assert re.search(sentence, findings(validate_folder(tmp_path), "ERROR"))
    for right in (np.arange(24) * 180 / 24, np.arange(24) * np.pi / 24):
        np.savez(tmp_path / "a.npz", sinogram=SINOGRAMS, theta=right)
        assert validate_folder(tmp_path).errors == []


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (1026, 1024, 1024)}
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as stream,
    ):
        np.lib.format.write_array_header_1_0(stream, header)
        for _ in range(513):
            stream.write(bytes(2**21))
    found = findings(validate_folder(tmp_path), "ERROR")
    assert re.search(r"its \d+ kB would unpack to 1\.1 GB; remove it, no measured data", found)


def test_reports_for_machines_and_eyes(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", SINOGRAMS)
    spoil(folder)
    sheet = tmp_path / "sheet.png"
    assert main([str(folder), "--json", str(tmp_path / "report.json"), "--sheet", str(sheet)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["usable"] is False
    assert sum(row["level"] == "ERROR" for row in report["rows"]) == 3
    assert report["shape"] == [24, 24]
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert np.ptp(np.asarray(image.convert("L"))) > 200

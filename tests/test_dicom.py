"""DICOM: values, places, units and SUV are those of the header, and what cannot be read gets one sentence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dicom_files import UID, make_drug, make_slice, save, save_series
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless

from allpet import ParallelBeam, Radon
from allpet.io import DataError, Scan, read_scan, write_scan
from allpet.io.dicom import read_dicom
from allpet.io.dicom_writer import write_dicom
from data_modules.command import main
from data_modules.files import SinogramFiles, project_images
from data_modules.folder import find_files
from data_modules.native import NativeFile
from data_modules.validate import validate_folder

GENERATOR = np.random.default_rng(5)
STORED = GENERATOR.integers(1, 60000, (5, 24, 24))


def sentence(error: pytest.ExceptionInfo[Any]) -> str:
    """Return an error's text, which is one sentence that names a file, a finding and a remedy."""
    text = str(error.value)
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+\.", text), text
    return text


def test_slices_come_by_place_with_their_own_slope(tmp_path: Path) -> None:
    for i in (3, 0, 4, 1, 2):
        head = make_slice(STORED[i], 3.0 * i, 9 - i, RescaleSlope=0.5 + i, RescaleIntercept=-i)
        save(head, tmp_path / f"IM{9 - i}")  # no suffix, and numbered from the head
    scan = read_dicom(tmp_path, values="stored")
    for i in range(5):
        np.testing.assert_allclose(scan.values[i], STORED[i] * (0.5 + i) - i, rtol=1e-6)
    assert (scan.kind, scan.units, scan.pixel_mm, scan.slice_mm) == ("image", "Bq/mL", 4, 3)
    assert scan.table["slice_z_mm"] == [0, 3, 6, 9, 12]
    assert set(scan.table["tracer"]) == {"FDG"}
    assert set(scan.state) == {
        "decay_corrected",
        "attenuation_corrected",
        "scatter_corrected",
        "normalised",
        "randoms_subtracted",
    }


def test_no_name_and_no_identifier_is_taken_over(tmp_path: Path) -> None:
    scan = read_dicom(save_series(tmp_path, STORED))
    assert len(set(scan.table["patient"])) == 1
    assert not re.search("ID-17|Doe|Jane|2024", str(scan.about()))
    other = read_dicom(save_series(tmp_path / "other", STORED, PatientID="ID-18"))
    assert other.table["patient"] != scan.table["patient"]
    assert "patient" not in read_dicom(save_series(tmp_path / "anonymous", STORED, PatientID="Anonymous")).table


HALF_LIFE = 6586.2
BEFORE_MIDNIGHT = {"RadiopharmaceuticalStartTime": "233000"}


@pytest.mark.parametrize(
    ("given", "decayed_s"),
    [
        ({}, 3600),  # an hour from injection to scan
        ({"DecayCorrection": "ADMIN"}, 0),
        ({"SeriesTime": "110000", "AcquisitionTime": "093000"}, 1800),  # a series made later from an earlier scan
        ({"SeriesTime": "100000", "AcquisitionTime": "103000"}, 3600),  # a later bed: the series' start counts
        (
            {"SeriesTime": "003000", "AcquisitionTime": "003000", "drug": {"RadiopharmaceuticalStartTime": "233000"}},
            3600,
        ),
        ({"drug": {"RadiopharmaceuticalStartDateTime": "20240229083000.0"}}, 5400),
        ({"drug": {"RadionuclideHalfLife": None}}, 3600),  # known of 18F
    ],
)
def test_suv_by_hand(tmp_path: Path, given: dict[str, Any], decayed_s: float) -> None:
    given = {**given, "RadiopharmaceuticalInformationSequence": [make_drug(**given.pop("drug", {}))]}
    scan = read_dicom(save_series(tmp_path, STORED[:2], **given))
    dose = 300e6 * 2 ** (-decayed_s / HALF_LIFE)
    assert scan.units == "SUV"
    np.testing.assert_allclose(scan.values, STORED[:2] * 75e3 / dose, rtol=1e-5)


def test_a_uniform_body_that_holds_the_dose_has_suv_1(tmp_path: Path) -> None:
    activity = 300e6 * 0.5 / 75e3  # after one half-life, spread over 75 kg at 1 g/mL
    stored = np.full((2, 8, 8), 2)
    drug = make_drug(RadionuclideHalfLife=3600)
    series = save_series(tmp_path, stored, RescaleSlope=activity / 2, RadiopharmaceuticalInformationSequence=[drug])
    np.testing.assert_allclose(read_dicom(series).values, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"PatientWeight": None}, "PatientWeight is missing"),
        ({"PatientWeight": 0}, "PatientWeight is missing"),
        ({"DecayCorrection": "NONE"}, "DecayCorrection is NONE"),
        ({"Units": "PROPCPS"}, "units are PROPCPS"),
        ({"Units": "CNTS"}, "units are CNTS without"),
        ({"RadiopharmaceuticalInformationSequence": [make_drug(RadionuclideTotalDose=None)]}, "TotalDose is missing"),
        ({"RadiopharmaceuticalInformationSequence": [make_drug(RadiopharmaceuticalStartTime="")]}, "the time of the"),
        ({"SeriesDate": None, "AcquisitionDate": None}, "the time of the"),
        (
            {"RadiopharmaceuticalInformationSequence": [make_drug(RadiopharmaceuticalStartDateTime="20240201090000")]},
            "before the scan",
        ),
    ],
)
def test_without_suv_the_units_stay_and_the_reason_is_said(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    series = save_series(tmp_path, STORED[:2], **given)
    scan = read_dicom(series)
    np.testing.assert_array_equal(scan.values, STORED[:2])
    assert scan.units != "SUV"
    assert reason in scan.notes[0]
    with pytest.raises(DataError, match="SUV cannot be computed") as caught:
        read_dicom(series, values="suv")
    assert reason in sentence(caught)


def test_philips_counts_and_stored_suv(tmp_path: Path) -> None:
    for i in range(2):
        head = make_slice(STORED[i], 3.0 * i, i + 1, Units="CNTS")
        block = head.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(0x00, "DS", "0.25")
        save(head, tmp_path / "philips" / f"{i}.dcm")
    np.testing.assert_allclose(read_dicom(tmp_path / "philips").values, STORED[:2] * 0.25)
    np.testing.assert_array_equal(read_dicom(save_series(tmp_path / "suv", STORED, Units="GML")).values, STORED)
    lean = read_dicom(save_series(tmp_path / "lean", STORED, Units="GML", SUVType="LBM"))
    assert "LBM" in lean.notes[0]


# x rises to the left and y to the front in ours; what each orientation does to the array as stored.
@pytest.mark.parametrize(
    ("cosines", "turn"),
    [
        ([1, 0, 0, 0, 1, 0], lambda a: a),
        ([-1, 0, 0, 0, -1, 0], lambda a: a[:, ::-1, ::-1]),  # prone
        ([-1, 0, 0, 0, 1, 0], lambda a: a[:, :, ::-1]),  # seen from the head
        ([0, 1, 0, 1, 0, 0], lambda a: a.transpose(0, 2, 1)),  # rows run to the back
        ([0, -1, 0, 1, 0, 0], lambda a: a.transpose(0, 2, 1)[:, ::-1]),
    ],
)
def test_every_axial_orientation_is_turned_to_ours(tmp_path: Path, cosines: list[float], turn: Any) -> None:
    stored = STORED[:3, :20]
    scan = read_dicom(save_series(tmp_path, stored, ImageOrientationPatient=cosines), values="stored")
    np.testing.assert_array_equal(scan.values, turn(stored))


GEOMETRY = ParallelBeam(n_views=36, n_bins=49, bin_mm=4.0, image_size=49, pixel_mm=4.0)


def point(x_mm: float, y_mm: float) -> np.ndarray:
    """Return an image with one bright pixel, x to the left and y to the front."""
    image = np.zeros(GEOMETRY.image_shape, np.float32)
    image[round(24 - y_mm / 4), round(24 + x_mm / 4)] = 1
    return image


def place_of(sinogram: torch.Tensor) -> tuple[float, float]:
    """Return where a point lies by the middle of its views: s = x cos(theta) + y sin(theta)."""
    s = (sinogram * GEOMETRY.bin_centers).sum(-1) / sinogram.sum(-1)
    basis = torch.stack([GEOMETRY.angles.cos(), GEOMETRY.angles.sin()], 1)
    x, y = torch.linalg.lstsq(basis, s.double()[:, None]).solution.flatten().tolist()
    return x, y


def test_a_point_to_the_left_and_front_is_projected_there(tmp_path: Path) -> None:
    """In DICOM's axes, +x left and +y back, the point lies at (+32, -48) mm."""
    stored = np.zeros((2, 49, 49))
    column, row = (32 + 96) // 4, (-48 + 96) // 4  # counted from ImagePositionPatient, (-96, -96) mm
    stored[:, row, column] = 1000
    scan = read_dicom(save_series(tmp_path, stored), values="stored")
    sinogram = project_images(torch.from_numpy(scan.values), scan.pixel_mm or 0, GEOMETRY)[0]
    np.testing.assert_allclose(place_of(sinogram), (32, 48), atol=0.2)


def refuse(tmp_path: Path, match: str) -> None:
    """Read a folder alone, and in the check of the folder above it."""
    with pytest.raises(DataError, match=match) as caught:
        read_dicom(tmp_path / "series")
    finding = sentence(caught)
    assert any(row.finding in finding for row in validate_folder(tmp_path).errors)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"Modality": "CT"}, "no PET but the modality CT"),
        ({"PixelSpacing": [4, 3]}, r"4 x 3 mm, not square"),
        ({"PixelData": None}, "no pixel data"),
        ({"ImageOrientationPatient": None}, "lacks ImageOrientationPatient"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "coronal, not axial"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "sagittal, not axial"),
        ({"ImageOrientationPatient": [0.966, 0.259, 0, -0.259, 0.966, 0]}, "tilted by 15 degrees"),
        ({"PixelSpacing": None}, "lacks PixelSpacing"),
        ({"NumberOfFrames": 7}, "enhanced file of 7 frames"),
        ({"PixelData": b"\0" * 100}, "pixels cannot be read"),
        ({"ImagePositionPatient": [0, 0, 6]}, "lie at the same place"),
    ],
)
def test_a_header_at_fault_gets_one_sentence(tmp_path: Path, given: dict[str, Any], match: str) -> None:
    save_series(tmp_path / "series", STORED, **given)
    refuse(tmp_path, match)


def test_a_missing_slice_is_found_between_its_neighbours(tmp_path: Path) -> None:
    save_series(tmp_path / "series", STORED)
    (tmp_path / "series" / "2.dcm").unlink()  # the fourth from the feet
    refuse(tmp_path, r"between 3.dcm and 1.dcm lie 6 mm, elsewhere 3 mm \(about 1 missing\)")


def test_two_series_are_named_and_one_can_be_picked(tmp_path: Path) -> None:
    save_series(tmp_path / "series", STORED)
    second = {"SeriesInstanceUID": f"{UID}.2", "SeriesNumber": 4, "SeriesDescription": "PET late"}
    save_series(tmp_path / "series", STORED[::-1], "late{}.dcm", **second)
    refuse(tmp_path, r"2 PET series, 3 'PET WB' \(5 files\) and 4 'PET late' \(5 files\)")
    for key in ("4", "PET late", f"{UID}.2"):
        np.testing.assert_array_equal(
            read_scan(tmp_path / "series", key).values, read_scan(tmp_path / "series", "3").values[::-1]
        )
    with pytest.raises(DataError, match="none of its series is called 'x'"):
        read_dicom(tmp_path / "series", "x")


def test_a_ct_beside_is_left_aside_and_said(tmp_path: Path) -> None:
    save_series(tmp_path, STORED)
    save_series(tmp_path, STORED, "ct{}.dcm", SeriesInstanceUID=f"{UID}.2", Modality="CT")
    scan = read_dicom(tmp_path, values="stored")
    np.testing.assert_array_equal(scan.values, STORED)
    assert scan.notes == ("1 other series in the folder left aside",)


def test_slices_of_two_sizes(tmp_path: Path) -> None:
    save_series(tmp_path / "series", STORED)
    save(make_slice(STORED[0, :20], 15, 6), tmp_path / "series" / "0.dcm")
    refuse(tmp_path, "0.dcm: its Rows is 20 where 5.dcm has 24")


def test_compressed_without_a_decoder(tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate

    for i in range(2):
        head = make_slice(STORED[i], 3.0 * i, i)
        head.file_meta.TransferSyntaxUID = JPEG2000Lossless
        head.PixelData = encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 40])
        head["PixelData"].is_undefined_length = True
        save(head, tmp_path / "series" / f"{i}.dcm")
    refuse(tmp_path, "compressed as JPEG 2000|pixels cannot be read")


@pytest.mark.parametrize("damage", [b"", b"no DICOM at all", b"\0" * 128 + b"DICM\x02\x00\xff\xff"])
def test_a_damaged_file(tmp_path: Path, damage: bytes) -> None:
    save_series(tmp_path / "series", STORED)
    (tmp_path / "series" / "9.dcm").write_bytes(damage)
    with pytest.raises(DataError, match=r"9\.dcm") as caught:
        read_dicom(tmp_path / "series")
    sentence(caught)
    assert validate_folder(tmp_path).errors


def test_a_truncated_slice(tmp_path: Path) -> None:
    save_series(tmp_path / "series", STORED)
    whole = (tmp_path / "series" / "2.dcm").read_bytes()
    (tmp_path / "series" / "2.dcm").write_bytes(whole[:-100])
    refuse(tmp_path, "2.dcm: ")


def test_no_series_at_all(tmp_path: Path) -> None:
    for path, match in ((tmp_path / "none", "no such file"), (tmp_path, "no DICOM files")):
        with pytest.raises(DataError, match=match) as caught:
            read_dicom(path)
        sentence(caught)


def test_a_folder_of_series_is_found_checked_converted_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        stored = STORED.copy()
        stored[:, :, :4] = stored[:, :, -4:] = stored[:, :4] = stored[:, -4:] = 0
        folder = tmp_path / "data" / f"1.2.{i}" / "PÉT wb"
        save_series(folder, stored + i, "1.2.3.{}", PatientID=f"ID-{i}", SeriesInstanceUID=f"{UID}.{i + 7}")
    assert find_files(tmp_path / "data") == ([f"1.2.{i}/PÉT wb" for i in range(3)], [])
    assert find_files(tmp_path / "data" / "1.2.1" / "PÉT wb")[0] == ["."]
    report = validate_folder(tmp_path / "data")
    assert report.errors == []
    assert (report.kind, report.shape, report.pixel_mm) == ("image", (24, 24), 4)

    assert main(["convert", str(tmp_path / "data"), str(tmp_path / "set.h5")]) == 0
    native = NativeFile(tmp_path / "set.h5")
    assert len(native) == 15
    assert len(set(native.table["patient"])) == 3
    assert native.about["units"] == "SUV"
    assert main(["info", str(tmp_path / "data" / "1.2.1" / "PÉT wb")]) == 0
    assert "pixel: 4 mm" in capsys.readouterr().out

    geometry = ParallelBeam(n_views=16, n_bins=24, bin_mm=4.0, image_size=24, pixel_mm=4.0)
    for source in (tmp_path / "data", tmp_path / "set.h5"):
        data = SinogramFiles(str(source), geometry=geometry, augmentation=None, val_share=0.3, test_share=0.3)
        loaded = data.load()
        assert loaded.reprojected
        assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [5, 5, 5]
        assert set(loaded.train.prompt.names()) == {"FDG:open"}
        first = NativeFile(tmp_path / "set.h5").read([0])
        assert any(
            torch.allclose(one, Radon(geometry).project(torch.from_numpy(first)[:, None])[0, 0], rtol=1e-4)
            for part in (loaded.train, loaded.val, loaded.test)
            for one in part.sinogram
        )


def test_mixed_units_are_refused(tmp_path: Path) -> None:
    save_series(tmp_path / "a", STORED)
    save_series(tmp_path / "b", STORED, PatientWeight=None)
    assert "other units than" in str(validate_folder(tmp_path))


IMAGES = (
    np.random.default_rng(0).random((3, 20, 24)).astype(np.float32) * np.array([1, 50, 0.01], np.float32)[:, None, None]
)
SCAN = Scan(
    IMAGES,
    "image",
    pixel_mm=2.5,
    slice_mm=3.27,
    units="SUV",
    state=("attenuation_corrected", "decay_corrected", "synthetic"),
    table={"tracer": ["FDG"] * 3, "seed": [1, 2, 3], "region": ["brain"] * 3},
    provenance={"synthetic": True, "model": "ldm-7", "seed": 4, "prompt": "FDG:brain"},
)


@pytest.mark.parametrize("shift", [0.0, 0.5])  # without and with negative values
def test_written_images_come_back(tmp_path: Path, shift: float) -> None:
    scan = replace(SCAN, values=IMAGES - np.float32(shift))
    write_scan(tmp_path / "series", scan)
    back = read_scan(tmp_path / "series")
    step = np.abs(scan.values).max(axis=(1, 2), keepdims=True) / (32767 if shift else 65535)
    assert (np.abs(back.values - scan.values) <= 0.51 * step).all()
    assert {**back.about(), "pixel_mm": None} == {**scan.about(), "pixel_mm": None}
    assert back.pixel_mm == pytest.approx(2.5)


def test_a_written_series_says_what_it_is(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a", SCAN)
    write_dicom(tmp_path / "b", SCAN)
    heads = [dcmread(path) for path in sorted((tmp_path / "a").iterdir())]
    for one in (tmp_path / "a").iterdir():
        assert one.read_bytes() == (tmp_path / "b" / one.name).read_bytes()
    assert len({head.SOPInstanceUID for head in heads}) == 3
    assert len({head.SeriesInstanceUID for head in heads}) == 1
    for i, head in enumerate(heads):
        assert head.SOPInstanceUID.is_valid
        assert "SYNTHETIC" in head.SeriesDescription
        assert "SYNTHETIC" in head.ImageType
        assert "ldm-7" in head.DerivationDescription
        assert "FDG:brain" in head.DerivationDescription
        assert (head.Modality, head.Units, head.ContentQualification) == ("PT", "GML", "RESEARCH")
        assert list(head.ImagePositionPatient) == pytest.approx([-11.5 * 2.5, -9.5 * 2.5, i * 3.27])
    write_dicom(tmp_path / "c", replace(SCAN, values=IMAGES + 1))
    assert dcmread(tmp_path / "c" / "0001.dcm").SeriesInstanceUID != heads[0].SeriesInstanceUID


def test_a_written_point_lies_where_it_did(tmp_path: Path) -> None:
    image = point(32, 48)
    write_dicom(tmp_path / "s", Scan(np.stack([image, image]), "image", pixel_mm=4.0))
    head = dcmread(tmp_path / "s" / "0001.dcm")
    row, column = np.argwhere(head.pixel_array)[0]
    x = float(head.ImagePositionPatient[0]) + column * float(head.PixelSpacing[1])
    y = float(head.ImagePositionPatient[1]) + row * float(head.PixelSpacing[0])
    assert (x, y) == (32, -48)  # DICOM: +x left, +y back
    back = read_dicom(tmp_path / "s")
    sinogram = project_images(torch.from_numpy(back.values), back.pixel_mm or 0, GEOMETRY)[0]
    np.testing.assert_allclose(place_of(sinogram), (32, 48), atol=0.2)


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path / "s", SCAN)
    with pytest.raises(DataError, match="there already") as caught:
        write_dicom(tmp_path / "s", SCAN)
    sentence(caught)
    with pytest.raises(ValueError, match="pixel width"):
        write_dicom(tmp_path / "t", Scan(IMAGES, "image"))

    from pydicom import Dataset

    original, calls = Dataset.save_as, []

    def full(self: Dataset, *arguments: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(self, *arguments, **named)

    monkeypatch.setattr(Dataset, "save_as", full)
    with pytest.raises(DataError, match="No space left") as caught:
        write_dicom(tmp_path / "t", SCAN)
    sentence(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_half_a_written_series_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "s", SCAN)
    (tmp_path / "s" / "0003.dcm").unlink()
    with pytest.raises(DataError, match="of a longer series"):
        read_dicom(tmp_path / "s")

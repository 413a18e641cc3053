"""NIfTI: what is written comes back, every order of the axes reads the same, and bad files get one sentence."""

from __future__ import annotations

import gzip
import itertools
import re
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff

from allpet import ParallelBeam, Radon
from allpet.io import DataError, Scan, read_scan, write_scan
from allpet.io.nifti import read_nifti, write_nifti
from data_modules.command import main
from data_modules.files import SinogramFiles
from data_modules.validate import validate_folder

IMAGES = np.random.default_rng(1).normal(size=(4, 10, 12)).astype(np.float32)
SCAN = Scan(
    IMAGES,
    "image",
    pixel_mm=2.5,
    slice_mm=3.27,
    units="SUV",
    state=("attenuation_corrected", "synthetic"),
    table={"tracer": ["FDG"] * 4, "patient": ["Zoë"] * 4, "slice_z_mm": [-3.0, 0.27, 3.54, 6.81]},
    provenance={"synthetic": True, "model": "ldm-7", "seed": 4, "prompt": "FDG:brain"},
)
SUFFIXES = (".nii", ".nii.gz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_scan(path, SCAN)
    back = read_scan(path)
    np.testing.assert_array_equal(back.values, IMAGES)
    assert back.about() == SCAN.about()
    first = path.read_bytes()
    write_scan(path, back)
    assert path.read_bytes() == first  # no clock in it
    assert b"synthetic" in bytes(nibabel.load(path).header["descrip"])


def test_the_header_alone_places_a_written_image(tmp_path: Path) -> None:
    """Other programs go by the affine: +x right, +y front, +z head, in mm."""
    write_nifti(tmp_path / "a.nii", SCAN)
    image = nibabel.load(tmp_path / "a.nii")
    assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
    values = image.get_fdata()
    for slice_, row, column in itertools.product((0, 3), (0, 9), (0, 11)):
        left, front = (column - 5.5) * 2.5, (4.5 - row) * 2.5  # ours
        world = np.array([-left, front, SCAN.table["slice_z_mm"][slice_], 1])
        i, j, k = np.rint(np.linalg.solve(image.affine, world)[:3]).astype(int)
        assert values[i, j, k] == pytest.approx(IMAGES[slice_, row, column])


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_every_order_and_direction_of_the_axes_reads_the_same(tmp_path: Path, axes: tuple[int, ...]) -> None:
    write_nifti(tmp_path / "a.nii", SCAN)
    straight = nibabel.load(tmp_path / "a.nii")
    for flips in itertools.product((1, -1), repeat=3):
        orientation = np.stack([axes, flips], 1)
        voxels = apply_orientation(straight.get_fdata(dtype=np.float32), orientation)
        affine = straight.affine @ inv_ornt_aff(orientation, straight.shape)
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(voxels), affine), tmp_path / "b.nii")
        back = read_nifti(tmp_path / "b.nii")
        np.testing.assert_array_equal(back.values, IMAGES)
        assert (back.pixel_mm, back.slice_mm) == pytest.approx((2.5, 3.27))


GEOMETRY = ParallelBeam(n_views=36, n_bins=61, bin_mm=4.0, image_size=61, pixel_mm=4.0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_point_at_30_left_and_50_front_is_projected_there(tmp_path: Path, suffix: str) -> None:
    """Foreign file of 10-mm voxels, stored to the right, front and head (RAS) as most are."""
    voxels = np.zeros((25, 25, 3), np.float32)
    voxels[12 - 3, 12 + 5, :] = 1  # x = -30 mm of the right, so 30 mm left; y = +50 mm front
    affine = np.diag([10, 10, 10, 1.0])
    affine[:2, 3] = -120
    (tmp_path / "data").mkdir()
    for i in range(3):
        nibabel.save(nibabel.Nifti1Image(voxels * (i + 1), affine), tmp_path / "data" / f"p{i}{suffix}")
    data = SinogramFiles(str(tmp_path / "data"), geometry=GEOMETRY, augmentation=None, val_share=0.3, test_share=0.3)
    loaded = data.load()
    assert loaded.reprojected
    views = loaded.train.sinogram.reshape(-1, 36, 61)[0].double()
    s = (views * GEOMETRY.bin_centers).sum(1) / views.sum(1)
    expected = 30 * GEOMETRY.angles.cos() + 50 * GEOMETRY.angles.sin()
    assert (s - expected).abs().max() < 0.2
    assert loaded.train.sinogram.shape[0] == 3  # one patient per file


def test_a_generated_image_survives_projection_through_a_file(tmp_path: Path) -> None:
    """Image -> NIfTI -> reader -> projector gives the sinogram of the image."""
    x, y = GEOMETRY.pixel_centers
    image = ((x - 30) ** 2 / 900 + (y - 50) ** 2 / 400 < 1).float()
    write_nifti(tmp_path / "a.nii.gz", Scan(image[None].numpy(), "image", pixel_mm=4.0))
    back = torch.from_numpy(read_nifti(tmp_path / "a.nii.gz").values)
    radon = Radon(GEOMETRY)
    torch.testing.assert_close(radon.project(back[:, None]), radon.project(image[None, None]))


def test_sinograms_are_reconstructed_on_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = GEOMETRY.pixel_centers
    disc = torch.exp(-((x - 30) ** 2 + (y - 50) ** 2) / (2 * 12.0**2))
    sinogram = Radon(GEOMETRY).project(disc[None, None])[0].numpy()
    write_scan(tmp_path / "s.h5", Scan(np.repeat(sinogram, 2, 0), "sinogram", GEOMETRY, provenance={"seed": 3}))
    for out in ("i.nii.gz", "series"):
        assert main(["export", str(tmp_path / "s.h5"), str(tmp_path / out)]) == 0
        assert "filtered backprojection" in capsys.readouterr().out
        back = read_scan(tmp_path / out)
        assert (back.kind, back.pixel_mm, back.provenance["seed"]) == ("image", 4.0, 3)
        image = torch.from_numpy(back.values[0])
        blob = (image - 0.2 * image.max()).clamp_min(0)  # without the streaks of few views
        weight = blob / blob.sum()
        assert float((weight * x).sum()) == pytest.approx(30, abs=1.5)
        assert float((weight * y).sum()) == pytest.approx(50, abs=1.5)
        assert float(image.sum() / disc.sum()) == pytest.approx(1, abs=0.02)


def test_a_frame_of_a_dynamic_file_has_to_be_named(tmp_path: Path) -> None:
    frames = np.stack([IMAGES.transpose(2, 1, 0) * (i + 1) for i in range(3)], -1)
    for suffix in SUFFIXES:
        path = tmp_path / f"dynamic{suffix}"
        nibabel.save(nibabel.Nifti1Image(frames, np.diag([-2, 2, 3, 1.0])), path)
        with pytest.raises(DataError, match=r"3 frames; name one, 0 to 2, with key"):
            read_nifti(path)
        np.testing.assert_array_equal(read_scan(path, "2").values, frames[..., 2].transpose(2, 1, 0)[:, ::-1])
        with pytest.raises(DataError, match="no frame 3"):
            read_scan(path, "3")
        with pytest.raises(DataError, match="number of the frame"):
            read_scan(path, "late")
    nibabel.save(nibabel.Nifti1Image(frames[..., :1], np.diag([-2, 2, 3, 1.0])), tmp_path / "one.nii")
    assert read_nifti(tmp_path / "one.nii").values.shape == IMAGES.shape


def test_slope_units_and_millimetres_of_the_header(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([0.002, 0.002, 0.003, 1]))
    image.header.set_slope_inter(0.5, 2)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    scan = read_nifti(tmp_path / "a.nii")
    stored = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)
    assert set(np.unique(scan.values)) == set(np.unique(stored).astype(np.float32))
    assert (scan.pixel_mm, scan.slice_mm) == pytest.approx((2, 3))


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def tilt(degrees: float) -> np.ndarray:
    a = np.radians(degrees)
    return np.array([[np.cos(a), -np.sin(a), 0, 0], [np.sin(a), np.cos(a), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def spoil(path: Path, what: str) -> None:
    """Write a file with one fault."""
    values = np.ones((4, 5, 6), np.float32)
    if what == "empty":
        path.write_bytes(b"")
    elif what == "noise":
        path.write_bytes(b"not an image" * 100)
    elif what == "nan":
        values[1, 2, 3] = np.nan
        save(path, values)
    elif what == "complex":
        save(path, values.astype(np.complex64))
    elif what == "colours":
        save(path, np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))
    elif what == "oblique":
        save(path, values, tilt(20))
    elif what == "oblong":
        save(path, values, np.diag([2, 3, 4, 1.0]))
    elif what == "flat":
        save(path, values[:, :, 0])
    elif what == "lost":
        image = nibabel.Nifti1Image(values, None)
        image.header["sform_code"] = image.header["qform_code"] = 0
        nibabel.save(image, path)
    elif what == "truncated":
        save(path, np.random.default_rng(0).random((4, 5, 600)).astype(np.float32))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif what == "bomb":
        image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
        head = bytearray(image.to_bytes())
        head[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(head)) if path.suffix == ".gz" else bytes(head))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("empty", "empty"),
        ("noise", "cannot be read as a NIfTI file"),
        ("truncated", "cannot be read as a NIfTI file"),
        ("nan", "NaN or infinite"),
        ("complex", "complex numbers"),
        ("colours", "colours"),
        ("oblique", "tilted by 20 degrees"),
        ("oblong", "not square"),
        ("flat", "without a third axis"),
        ("lost", "does not say how its axes lie"),
        ("bomb", "would unpack to"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, what: str, match: str, suffix: str) -> None:
    path = tmp_path / f"b ä{suffix}"
    spoil(path, what)
    with pytest.raises(DataError, match=match) as caught:
        read_nifti(path)
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+\.", str(caught.value)), str(caught.value)
    (row,) = validate_folder(tmp_path).errors
    assert row.file == path.name
    assert match in row.finding


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pixel width"):
        write_nifti(tmp_path / "a.nii", replace(SCAN, pixel_mm=None))
    with pytest.raises(ValueError, match="reconstruct sinograms first"):
        write_nifti(tmp_path / "a.nii", Scan(IMAGES))
    assert list(tmp_path.iterdir()) == []

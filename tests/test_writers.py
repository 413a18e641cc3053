"""Writers and readers: numbers, geometry and meaning come back, and others' tools reconstruct what is written."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import astra
import h5py
import numpy as np
import pytest
import scipy.io
import torch
from skimage.transform import iradon

from allpet import ParallelBeam, Radon, fbp
from allpet.io import DataError, Scan, content_hash, lor_endpoints, odd_bins, read_array, read_scan, write_scan
from allpet.io.containers import write_npz
from tests.analytic import ellipse_sinogram, gaussian_sinogram

GEOMETRY = ParallelBeam(n_views=24, n_bins=31, bin_mm=5.0, image_size=31, pixel_mm=5.0)
RANDOM = np.random.default_rng(0)
SCAN = Scan(
    RANDOM.random((3, 24, 31)).astype(np.float32),
    "sinogram",
    GEOMETRY,
    slice_mm=2.5,
    units="counts",
    state=("prompts", "synthetic"),
    additive=RANDOM.random((3, 24, 31)).astype(np.float32),
    acf=1 + RANDOM.random((3, 24, 31)).astype(np.float32),
    table={"seed": [5, 6, 7], "prompt": ["FDG:brain", "FDG:brain", "PSMA:abdomen"]},
    provenance={"synthetic": True, "model": "tiny", "text": "Köpfe\nzwei"},
)
FORMATS = ["a.h5", "a.npz", "a.mat", "a.hs"]


def assert_same(read: Scan, wrote: Scan) -> None:
    for name in ("values", "additive", "acf"):
        want = getattr(wrote, name)
        assert (getattr(read, name) is None) == (want is None)
        if want is not None:
            np.testing.assert_array_equal(getattr(read, name), want)
    assert read.about() == wrote.about()


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("bins", [31, 30])
def test_what_is_written_comes_back(tmp_path: Path, file: str, bins: int) -> None:
    scan = replace(
        SCAN,
        values=SCAN.values[..., :bins],
        additive=SCAN.additive[..., :bins],
        acf=SCAN.acf[..., :bins],
        geometry=replace(GEOMETRY, n_bins=bins),
    )
    write_scan(tmp_path / "new folder" / file, scan)
    assert_same(read_scan(tmp_path / "new folder" / file), scan)


@pytest.mark.parametrize("file", FORMATS)
def test_one_slice_without_companions(tmp_path: Path, file: str) -> None:
    scan = Scan(SCAN.values[:1], "sinogram", GEOMETRY, state=("attenuation_corrected",))
    write_scan(tmp_path / file, scan)
    assert_same(read_scan(tmp_path / file), scan)


@pytest.mark.parametrize("file", ["a.h5", "a.npz", "a.mat"])
def test_bare_readers_find_the_arrays_by_name(tmp_path: Path, file: str) -> None:
    write_scan(tmp_path / file, SCAN)
    for key, values in (("sinogram", SCAN.values), ("acf", SCAN.acf)):
        np.testing.assert_array_equal(read_array(tmp_path / file, key), values)
    bare = read_scan(tmp_path / file, key="additive")
    assert bare.kind == ""
    np.testing.assert_array_equal(bare.values, SCAN.additive)


def test_images_come_back(tmp_path: Path) -> None:
    image = Scan(SCAN.values, "image", pixel_mm=2.0, units="SUV", provenance={"synthetic": True})
    for file in ("a.h5", "a.npz", "a.mat"):
        write_scan(tmp_path / file, image)
        assert_same(read_scan(tmp_path / file), image)
    with pytest.raises(ValueError, match="Interfile takes sinograms with a geometry"):
        write_scan(tmp_path / "a.hs", image)


@pytest.mark.parametrize("file", FORMATS)
def test_a_point_source_stays_where_it_is(tmp_path: Path, file: str) -> None:
    """A small source at x = +30 mm (right), y = +50 mm (up): each format's own axes say so, and so does its image."""
    geometry = ParallelBeam(48, 65, 3.0, 65, 3.0)
    at = torch.tensor([[30.0, 50.0]], dtype=torch.float64)
    sinogram = gaussian_sinogram(geometry, at, torch.tensor([4.0]), torch.tensor([1.0]))[0].float().numpy()
    write_scan(tmp_path / file, Scan(sinogram, "sinogram", geometry))
    read = read_scan(tmp_path / file)
    for view, s in ((0, 30.0), (24, 50.0)):  # s = x cos(theta) + y sin(theta)
        centre = (read.values[0, view] * geometry.bin_centers.numpy()).sum() / read.values[0, view].sum()
        assert centre == pytest.approx(s, abs=0.05)
    image = fbp(Radon(read.geometry), torch.from_numpy(read.values)[:, None])[0, 0]
    row, column = divmod(int(image.argmax()), 65)
    x, y = (axis[row, column] for axis in geometry.pixel_centers)
    assert abs(x - 30) <= 1.5
    assert abs(y - 50) <= 1.5


def test_matlab_sees_views_bins_slices(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.mat", SCAN)
    found = scipy.io.loadmat(tmp_path / "a.mat")
    np.testing.assert_array_equal(found["sinogram"][..., 1], SCAN.values[1])
    assert json.loads(found["about"][0])["units"] == "counts"


# ---- what others reconstruct -----------------------------------------------------------------------------------------


def smooth(geometry: ParallelBeam) -> np.ndarray:
    return (ellipse_sinogram(geometry) + gaussian_sinogram(geometry)).float()[0].numpy()


def difference(image: np.ndarray, reference: np.ndarray, radius: float = 0.95) -> float:
    """Relative L2 within the circle that both reconstruct."""
    axis = np.linspace(-1, 1, len(image))
    inside = np.hypot(axis, axis[:, None]) < radius
    return float(np.linalg.norm((image - reference)[inside]) / np.linalg.norm(reference[inside]))


@pytest.mark.parametrize("file", FORMATS)
def test_scikit_image_reconstructs_the_same(tmp_path: Path, file: str) -> None:
    geometry = ParallelBeam(180, 128, 3.0, 129, 3.0)
    write_scan(tmp_path / file, odd_bins(Scan(smooth(geometry), "sinogram", geometry)))
    scan = read_scan(tmp_path / file)
    theta = np.arange(scan.geometry.n_views) * 180 / scan.geometry.n_views
    image = iradon(scan.values[0].T, theta, filter_name="hann") / scan.geometry.bin_mm
    ours = fbp(Radon(scan.geometry), torch.from_numpy(scan.values)[:, None])[0, 0].numpy()
    assert difference(image, ours) <= 0.05
    before = fbp(Radon(geometry), torch.from_numpy(smooth(geometry))[:, None])[0, 0].numpy()
    assert difference(image, before) <= 0.05  # the added bin blurs little
    assert difference(image[:, ::-1], ours) > 0.5


@pytest.mark.parametrize("bins", [128, 129])
def test_astra_reconstructs_the_same(tmp_path: Path, bins: int) -> None:
    geometry = ParallelBeam(180, bins, 3.0, bins, 3.0)
    write_scan(tmp_path / "a.npz", Scan(smooth(geometry), "sinogram", geometry))
    scan = read_scan(tmp_path / "a.npz")
    beam = astra.create_proj_geom("parallel", 1.0, bins, geometry.angles.numpy())
    handles = [
        astra.data2d.create("-sino", beam, scan.values[0]),
        astra.data2d.create("-vol", astra.create_vol_geom(bins, bins)),
    ]
    projector = astra.create_projector("linear", beam, astra.create_vol_geom(bins, bins))
    settings = astra.astra_dict("FBP")
    settings.update(ProjectionDataId=handles[0], ReconstructionDataId=handles[1], ProjectorId=projector)
    settings["option"] = {"FilterType": "hann"}
    algorithm = astra.algorithm.create(settings)
    astra.algorithm.run(algorithm)
    image = astra.data2d.get(handles[1]) / geometry.bin_mm
    astra.algorithm.delete(algorithm)
    astra.projector.delete(projector)
    astra.data2d.delete(handles)
    ours = fbp(Radon(geometry), torch.from_numpy(scan.values)[:, None])[0, 0].numpy()
    assert difference(image, ours) <= 0.05
    assert difference(image[::-1], ours) > 0.5


def test_lines_of_response_integrate_what_the_sinogram_holds(tmp_path: Path) -> None:
    geometry = ParallelBeam(30, 41, 4.0, 41, 4.0)
    sinogram = gaussian_sinogram(geometry)[0].float().numpy()
    write_npz(tmp_path / "a.npz", Scan(sinogram, "sinogram", geometry), lors=True)
    with np.load(tmp_path / "a.npz") as archive:
        start, end = archive["lor_start"].astype(float), archive["lor_end"].astype(float)
    from tests.analytic import CENTRES, HEIGHTS, SIGMAS

    along = np.linspace(0, 1, 4001)[:, None, None, None]
    points = start + along * (end - start)
    density = sum(
        h * np.exp(-((points - c) ** 2).sum(-1) / (2 * s**2))
        for c, s, h in zip(CENTRES.numpy(), SIGMAS.numpy(), HEIGHTS.numpy(), strict=True)
    )
    integral = density.mean(0) * np.linalg.norm(end - start, axis=-1)
    np.testing.assert_allclose(integral, sinogram[0], atol=0.02 * sinogram.max())  # bins average, lines do not
    with pytest.raises(ValueError, match="widen it"):
        lor_endpoints(geometry, 10.0)


def test_one_bin_more_keeps_sums_and_centres() -> None:
    geometry = ParallelBeam(24, 64, 4.0, 64, 4.0)
    sinogram = gaussian_sinogram(geometry)[0].float().numpy()
    wide = odd_bins(Scan(sinogram, "sinogram", geometry, acf=np.ones_like(sinogram)))
    assert wide.geometry.n_bins == 65
    np.testing.assert_allclose(wide.values.sum(-1), sinogram.sum(-1), rtol=1e-5)
    moment = (wide.values * wide.geometry.bin_centers.numpy()).sum(-1)
    np.testing.assert_allclose(moment, (sinogram * geometry.bin_centers.numpy()).sum(-1), rtol=1e-4, atol=1)
    assert (wide.acf == 1).all()
    assert wide.geometry.bin_centers[32] == 0
    assert odd_bins(wide) is wide


# ---- Interfile of other programs -------------------------------------------------------------------------------------


def foreign(folder: Path, values: np.ndarray, **changes: str | None) -> Path:
    """Write (axial, view, tangential) values as other programs do: by sinogram, big-endian, scaled."""
    keys: dict[str, str | None] = {
        "!INTERFILE ": "",
        "name of data file": "a.s",
        "!type of data": "PET",
        "imagedata byte order": "BIGENDIAN",
        "applied corrections": "{arc correction}",
        "!number format": "signed integer",
        "!number of bytes per pixel": "2",
        "number of dimensions": "4",
        "matrix axis label [4]": "segment",
        "!matrix size [4]": "1",
        "matrix axis label [3]": "axial coordinate",
        "!matrix size [3]": f"{{{len(values)}}}",
        "matrix axis label [2]": "view",
        "!matrix size [2]": str(values.shape[1]),
        "matrix axis label [1]": "tangential coordinate",
        "!matrix size [1]": str(values.shape[2]),
        "number of rings": str(len(values)),
        "distance between rings (cm)": "0.4",
        "default bin size (cm)": "0.3",
        "image scaling factor[1]": "0.5",
        **changes,
    }
    header = folder / "a.hs"
    header.write_text("".join(f"{key} := {value}\n" for key, value in keys.items() if value is not None))
    (folder / "a.s").write_bytes(values.astype(">i2").tobytes())
    return header


WHOLE = np.arange(2 * 6 * 5).reshape(2, 6, 5)


def test_big_endian_scaled_integers_by_sinogram(tmp_path: Path) -> None:
    scan = read_scan(foreign(tmp_path, WHOLE))
    np.testing.assert_array_equal(scan.values, 0.5 * WHOLE)
    assert scan.geometry == ParallelBeam(6, 5, 3.0, 5, 3.0)
    assert scan.slice_mm == pytest.approx(4.0)
    assert scan.notes == ()


def test_the_unpaired_bin_of_an_even_number_is_left_out_and_said(tmp_path: Path) -> None:
    """Bin n // 2 of another program lies on the axis: a source at the middle stays at the middle."""
    values = np.zeros((1, 6, 8))
    values[..., 4] = 10
    scan = read_scan(foreign(tmp_path, values))
    assert scan.values.shape == (1, 6, 7)
    assert scan.geometry.bin_centers[int(scan.values[0, 0].argmax())] == 0
    assert "the outermost has no partner" in scan.notes[0]


def test_direct_planes_are_found_among_segments(tmp_path: Path) -> None:
    values = np.arange(3 * 2 * 6 * 5).reshape(6, 6, 5)
    several = {
        "!matrix size [4]": "3",
        "!matrix size [3]": "{ 2, 2, 2 }",
        "minimum ring difference per segment": "{ -1, 0, 1 }",
        "maximum ring difference per segment": "{ -1, 0, 1 }",
    }
    np.testing.assert_array_equal(read_scan(foreign(tmp_path, values, **several)).values, 0.5 * values[2:4])
    several["minimum ring difference per segment"] = several["maximum ring difference per segment"] = "{ 1, 2, 3 }"
    with pytest.raises(DataError, match="none of its segments holds direct planes; export segment 0"):
        read_scan(foreign(tmp_path, values, **several))


BAD_HEADERS = {
    "not arc-corrected": ({"applied corrections": "{None}"}, "not arc-corrected, .*; arc-correct it first"),
    "no size": ({"!matrix size [2]": None}, r"the key 'matrix size\[2\]' is missing; correct the header"),
    "no bin size": ({"default bin size (cm)": None}, r"the key 'default bin size \(cm\)' is missing"),
    "negative bin size": ({"default bin size (cm)": "-1"}, "its bin size is -1 cm"),
    "zero views": ({"!matrix size [2]": "0"}, "is '0', not a count"),
    "more views than data": ({"!matrix size [2]": "7"}, "a.s has 120 bytes where the header says 140"),
    "too many bytes": ({"!number of bytes per pixel": "3"}, "3 bytes of 'signed integer' are no number format"),
    "scaled by a word": ({"image scaling factor[1]": "much"}, "is 'much', not a number"),
    "an image": ({"matrix axis label [4]": "z"}, "its axes are .*; order them as segment, view"),
    "time of flight": ({"number of dimensions": "5"}, "four dimensions without time of flight"),
    "turned views": ({"view offset (degrees)": "12"}, "its views begin at 12 degrees"),
    "no data named": ({"name of data file": None}, "the key 'name of data file' is missing"),
    "data missing": ({"name of data file": "gone.s"}, "its data file gone.s is missing; copy it beside"),
    "another file": ({"!INTERFILE ": None}, "its first key is not INTERFILE"),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_bad_headers_are_answered_in_one_sentence(tmp_path: Path, fault: str) -> None:
    changes, sentence = BAD_HEADERS[fault]
    header = foreign(tmp_path, WHOLE, **changes)
    with pytest.raises(DataError, match=sentence) as caught:
        read_scan(header)
    assert re.fullmatch(rf"{re.escape(str(header))}: [^\n]+; [^\n]+\.", str(caught.value))


def test_data_cannot_lie_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    header = foreign(tmp_path / "scan", WHOLE, **{"name of data file": "../../etc/secret.s"})
    with pytest.raises(DataError, match=r"its data file secret\.s is missing"):
        read_scan(header)


def test_a_header_that_contradicts_its_comment_is_refused(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.hs", SCAN)
    header = tmp_path / "a.hs"
    header.write_text(header.read_text().replace("default bin size (cm) := 0.5", "default bin size (cm) := 0.4"))
    with pytest.raises(DataError, match="its bin size contradicts its comment line"):
        read_scan(header)


# ---- nothing half-written --------------------------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scan(tmp_path / file, SCAN)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if file == "a.hs":
        for path in tmp_path.iterdir():
            path.unlink()
        before = {}
    monkeypatch.setattr(h5py.Group, "create_dataset", full_disk)
    monkeypatch.setattr(np, "savez", full_disk)
    monkeypatch.setattr(scipy.io, "savemat", full_disk)
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(DataError, match=r"No space left on device\); free space, or choose another folder"):
        write_scan(tmp_path / file, SCAN)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unknown_suffixes_and_unfit_scans(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.xyz is not a format to write; choose of \.h5"):
        write_scan(tmp_path / "a.xyz", SCAN)
    with pytest.raises(ValueError, match="but the geometry has"):
        Scan(SCAN.values, "sinogram", ParallelBeam.preset("laptop"))
    with pytest.raises(ValueError, match="state holds clean; choose of prompts"):
        Scan(SCAN.values, state=("clean",))
    with pytest.raises(ValueError, match="column 'seed' has 1 entries for 3 slices"):
        Scan(SCAN.values, table={"seed": [1]})
    with pytest.raises(ValueError, match="acf has the shape"):
        Scan(SCAN.values, acf=SCAN.values[:1])


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.h5", SCAN)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        about = json.loads(file["about"][()])
        del file["about"]
        file["about"] = json.dumps({**about, "schema": "allpet-scan 9"})
    with pytest.raises(DataError, match="its layout is 'allpet-scan 9'"):
        read_scan(tmp_path / "a.h5")


def test_content_is_identified_by_numbers_and_shape() -> None:
    one = SCAN.values[0]
    assert content_hash(one) == content_hash(one.astype(">f4")) == content_hash(np.asfortranarray(one))
    assert len({content_hash(one), content_hash(one.T), content_hash(one.reshape(31, 24)), content_hash(-one)}) == 4

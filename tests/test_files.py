"""Folders as data sets: nothing resampled in silence, images projected right, patients never split."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from allpet import Autoencoder, AutoencoderSystem
from allpet.geometry import ParallelBeam
from allpet.reconstruction import fbp
from callbacks import ExportPretrained
from data_modules import SinogramFiles
from data_modules.base import SinogramDataModule
from data_modules.files import image_geometry, project_images, regrid, sinogram_geometry

GEOMETRY = ParallelBeam(n_views=32, n_bins=40, bin_mm=4.0, image_size=40, pixel_mm=4.0)


def blobs(n: int, size: int, pixel_mm: float) -> np.ndarray:
    """Two Gaussian blobs in a disc, the same in mm for any pixels, ``(n, size, size)``, each slice brighter."""
    axis = (np.arange(size) - (size - 1) / 2) * pixel_mm
    x, y = axis[None, :], -axis[:, None]
    image = np.exp(-((x - 25) ** 2 + (y - 15) ** 2) / 200) + 0.5 * np.exp(-((x + 20) ** 2 + (y + 30) ** 2) / 400)
    image[np.hypot(x, y) > size * pixel_mm / 2] = 0
    return np.stack([(1 + i / 10) * image for i in range(n)]).astype(np.float32)


def sinograms(n: int) -> np.ndarray:
    """Closed-form Radon transforms of shifting Gaussian blobs, ``(n, views, bins)``."""
    theta, s = GEOMETRY.angles[:, None], GEOMETRY.bin_centers
    return np.stack(
        [torch.exp(-((s - 2 * i * theta.cos() - 20 * theta.sin()) ** 2) / 300).numpy() * (i + 1) for i in range(n)]
    ).astype(np.float32)


def ready(folder: Path, **kwargs: Any) -> SinogramFiles:
    data = SinogramFiles(str(folder), **kwargs)
    data.setup("fit")
    return data


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Ten patients of three sinograms each, in subfolders."""
    for i, slices in enumerate(sinograms(30).reshape(10, 3, 32, 40)):
        (tmp_path / f"p{i}").mkdir()
        for j, one in enumerate(slices):
            np.save(tmp_path / f"p{i}" / f"{j}.npy", one)
    return tmp_path


# ---- sinograms -------------------------------------------------------------------------------------------------------


def test_sinograms_come_as_they_are(patients: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ready(patients, bin_mm=4.0, tracer="18F-FDG", region="brain")
    assert data.geometry == GEOMETRY
    assert not data.reprojected
    everything = sinograms(30)
    for part in (data.train_set, data.val_set, data.test_set):
        np.testing.assert_array_equal(part.sinogram.numpy(), everything[part.sample_id.numpy()])
    batch = data.train_set[[0]]
    assert batch.expected is batch.sinogram
    assert batch.prompt.names() == ["FDG:brain"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "30 sinograms (kind=auto) of 30 files, with 32 views x 40 bins, bins of 4 mm as said; 10 patients" in said


def test_no_patient_is_in_two_splits_whatever_the_seed(patients: Path) -> None:
    data, other = ready(patients), ready(patients, seed=5)
    parts = [set(part.patient_id.tolist()) for part in (data.train_set, data.val_set, data.test_set)]
    assert [len(part) for part in parts] == [8, 1, 1]
    assert len(set.union(*parts)) == 10
    assert torch.equal(data.val_set.sample_id, other.val_set.sample_id)
    assert data.data_hash == other.data_hash


def test_few_shot_subsets_are_nested_and_leave_evaluation_alone(patients: Path) -> None:
    whole = ready(patients)
    for n in (1, 4, 24):
        few = ready(patients, num_scans=n)
        assert few.summary()["train_ids"] == whole.summary()["train_ids"][:n]
        assert len(few.train_set.patient_id.unique()) == math.ceil(n / 3)
        assert torch.equal(few.val_set.sinogram, whole.val_set.sinogram)
    assert ready(patients, num_scans=24).data_hash == whole.data_hash != ready(patients, num_scans=4).data_hash
    with pytest.raises(ValueError, match="num_scans is 25, but there are 24 training slices"):
        ready(patients, num_scans=25)


def test_identity_follows_content_not_place(patients: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = ready(patients).data_hash
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(patients, copy)
    assert ready(copy).data_hash == before
    one = np.load(copy / "p3" / "1.npy")
    np.save(copy / "p3" / "1.npy", one * np.float32(1.0001))
    assert ready(copy).data_hash != before
    assert ready(patients, bin_mm=2.0).data_hash != before
    assert ready(patients, tracer="FDG").data_hash != before


def test_a_refused_folder_names_each_file_and_nothing_is_written(
    patients: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("place")
    monkeypatch.chdir(place)
    (patients / "p0" / "0.npy").write_bytes(b"no array")
    np.save(patients / "p1" / "1.npy", np.ones((5, 5)))
    np.save(patients / "p2" / "2.npy", np.full((32, 40), np.nan))
    with pytest.raises(ValueError, match=r"p0/0.npy \(it cannot.*, p1/1.npy \(slices of 5 x 5.* and p2/2.npy \(the"):
        ready(patients)
    assert list(place.iterdir()) == []


def test_another_shape_than_asked_for_is_refused(patients: Path) -> None:
    with pytest.raises(ValueError, match="32 x 40 sinograms where the geometry has 64 x 80; leave the geometry out"):
        ready(patients, geometry=ParallelBeam.preset("laptop"))


def test_lengths_come_from_the_user_a_preset_or_are_assumed() -> None:
    mct = ParallelBeam.preset("mct")
    assert sinogram_geometry(None, mct.sinogram_shape, None)[0] == mct
    assert sinogram_geometry(None, mct.sinogram_shape, 3.0)[0].bin_mm == 3.0
    assert sinogram_geometry(mct, mct.sinogram_shape, None)[0] == mct
    geometry, said = sinogram_geometry(None, (7, 50), None)
    assert (geometry.sinogram_shape, geometry.bin_mm) == ((7, 50), 10.0)
    assert "assuming 500 mm across (say bin_mm)" in said


# ---- one patient, or nobody knows ------------------------------------------------------------------------------------


def test_one_patient_is_split_into_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scipy.io.savemat(tmp_path / "scan.mat", {"data": np.moveaxis(sinograms(20), 0, -1)})
    data = ready(tmp_path)
    assert data.train_set.sample_id.tolist() == list(range(14))
    assert data.val_set.sample_id.tolist() == [15, 16]
    assert data.test_set.sample_id.tolist() == [18, 19]
    said = capsys.readouterr().out
    assert "one patient, so slices 1 to 14 are for training, 16 to 17 for validation, 19 to 20 for the test" in said


def test_unknown_patients_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, one in enumerate(sinograms(20)):
        np.save(tmp_path / f"{i:04}.npy", one)
    data = ready(tmp_path)
    assert "so one patient may be in two splits; use a subfolder per patient" in capsys.readouterr().out
    assert data.summary()["split"].startswith("by position")


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "pixel_mm"), [(160, 1.0), (53, 3.0), (20, 8.0), (40, 4.0)])
def test_regridding_keeps_the_integral_and_the_place(size: int, pixel_mm: float) -> None:
    images = torch.from_numpy(blobs(2, size, pixel_mm))
    new = regrid(images, pixel_mm, GEOMETRY)
    x, y = GEOMETRY.pixel_centers
    total = new.double().sum((1, 2)) * GEOMETRY.pixel_mm**2
    torch.testing.assert_close(total, images.double().sum((1, 2)) * pixel_mm**2, rtol=1e-3, atol=0)
    axis = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * pixel_mm
    for new_axis, old_axis, dim in ((x, axis, 2), (y, -axis, 1)):
        centre = (new * new_axis).sum((1, 2)) / new.double().sum((1, 2))
        old = (images.double().sum(3 - dim) * old_axis).sum(1) / images.double().sum((1, 2))
        torch.testing.assert_close(centre, old, atol=0.1, rtol=0)
    if (size, pixel_mm) == (40, 4.0):
        torch.testing.assert_close(new, images)


def test_any_pixel_width_gives_the_same_sinogram_as_the_closed_form() -> None:
    theta, s = GEOMETRY.angles[:, None], GEOMETRY.bin_centers
    exact = sum(
        weight * math.sqrt(math.pi * spread) * torch.exp(-((s - x * theta.cos() - y * theta.sin()) ** 2) / spread)
        for weight, spread, x, y in ((1.0, 200.0, 25.0, 15.0), (0.5, 400.0, -20.0, -30.0))
    )
    for size, pixel_mm in ((160, 1.0), (80, 2.0), (54, 3.0)):
        made = project_images(torch.from_numpy(blobs(1, size, pixel_mm)), pixel_mm, GEOMETRY)[0]
        assert torch.linalg.norm(made - exact) / torch.linalg.norm(exact) < 0.03


def test_images_are_projected_and_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, one in enumerate(blobs(12, 80, 2.0)):
        scipy.io.savemat(tmp_path / f"{i:04}.mat", {"data": one})
    data = ready(tmp_path, geometry=GEOMETRY, pixel_mm=2.0)
    assert data.reprojected
    assert data.summary()["reprojected"] is True
    assert (
        "12 images (kind=auto) of 12 files, projected to 32 views x 40 bins, pixels of 2 mm" in capsys.readouterr().out
    )
    batch = data.train_set[[0, 5]]
    images = fbp(data.radon, batch.sinogram)
    expected = regrid(torch.from_numpy(blobs(6, 80, 2.0))[[0, 5]], 2.0, GEOMETRY)
    assert torch.linalg.norm(images[:, 0] - expected) / torch.linalg.norm(expected) < 0.2
    unknown = ready(tmp_path, geometry=GEOMETRY)
    assert "assuming pixels of 2 mm (say pixel_mm)" in capsys.readouterr().out
    torch.testing.assert_close(unknown.train_set.sinogram, data.train_set.sinogram)
    assert ready(tmp_path).geometry == ParallelBeam.preset("laptop")
    whole = image_geometry(None, (80, 80), 2.0).geometry
    assert whole.sinogram_shape == ParallelBeam.preset("laptop").sinogram_shape
    assert whole.field_of_view_mm == pytest.approx(80.0)


def test_a_geometry_for_images_leaves_sinograms_and_an_explicit_geometry_alone(tmp_path: Path, patients: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, one in enumerate(blobs(12, 80, 2.0)):
        np.save(images / f"{i:04}.npy", one)
    other = replace(GEOMETRY, n_views=16)
    assert ready(images, image_geometry=other).geometry == other
    assert ready(images, image_geometry=other, pixel_mm=2.0).geometry == other
    assert ready(images, image_geometry=other, geometry=GEOMETRY).geometry == GEOMETRY
    shutil.rmtree(images)
    assert ready(patients, image_geometry=other, bin_mm=4.0).geometry == GEOMETRY


def test_activity_outside_the_field_of_view_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    sinogram = project_images(torch.ones(1, 40, 40), 4.0, GEOMETRY)[0]
    said = r"WARN  21\.\d% of the images' activity lies outside the field of view of 160 mm and is left out"
    assert re.match(said, capsys.readouterr().out)
    sums = sinogram.sum(1)
    assert sums.std() / sums.mean() < 5e-3  # a full square would vary by its diagonals


# ---- what leaves this machine ----------------------------------------------------------------------------------------


class Sending(Logger):
    """Stands for a logger that sends away what it is given."""

    name, version = "sending", 0

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Any] = []

    def log_hyperparams(self, *given: Any, **named: Any) -> None:
        self.sent += [given, named]

    def log_metrics(self, *given: Any, **named: Any) -> None:
        self.sent += [given, named]


def test_neither_names_nor_paths_leave_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "hospital"
    for i, slices in enumerate(sinograms(30).reshape(10, 3, 32, 40)):
        (folder / f"Doe{i}_Jane").mkdir(parents=True)
        for j, one in enumerate(slices):
            np.save(folder / f"Doe{i}_Jane" / f"{j}.npy", one)
    data, sending = SinogramFiles(str(folder), patient="Doe[0-9]"), Sending()
    here = CSVLogger(tmp_path / "run", name="", version="")
    run = tmp_path / "run"
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=[sending, here], default_root_dir=run, limit_val_batches=1,
        callbacks=[ExportPretrained()], **quiet,
    )  # fmt: skip
    trainer.fit(AutoencoderSystem(Autoencoder((8, 16))), datamodule=data)
    shared = {path.name: path.read_bytes() for path in (run / "pretrained").iterdir()}
    assert f"| data_hash | {data.data_hash} |".encode() in shared["README.md"]
    assert b"| split | by patient |" in shared["README.md"]
    assert data.data_hash in repr(sending.sent)
    shared["sent"] = repr(sending.sent).encode()
    for name, content in shared.items():
        for word in ("Doe", "Jane", "hospital", str(tmp_path)):
            assert word.encode() not in content, (name, word)
    kept = (run / "hparams.yaml").read_text()
    assert "Doe" in kept
    assert str(folder) in kept


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_it_is_configured_like_any_other(patients: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SinogramDataModule, "data")
    arguments = {"folder": str(patients), "kind": "sinogram", "geometry": GEOMETRY.to_dict(), "region": "chest"}
    config = parser.parse_object({"data": {"class_path": "data_modules.SinogramFiles", "init_args": arguments}})
    data = parser.instantiate(config).data
    data.setup()
    assert data.geometry == GEOMETRY
    assert next(iter(data.train_dataloader())).prompt.names()[0] == "open:chest"


@pytest.mark.parametrize("given", [[], ["--data.geometry.n_bins", "90"], ["--data.geometry", "null"]])
def test_the_command_line_puts_it_in_the_simulators_place(tmp_path: Path, given: list[str]) -> None:
    config = tmp_path / "simulated.yaml"
    simulated = {"class_path": "data_modules.SimulatedPET", "init_args": {"geometry": GEOMETRY.to_dict()}}
    config.write_text(json.dumps({"data": simulated}))
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SinogramDataModule, "data")
    swap = ["--data", "data_modules.SinogramFiles", "--data.folder", "somewhere"]
    data = parser.instantiate(parser.parse_args(["--config", str(config), *swap, *given])).data
    assert isinstance(data, SinogramFiles)
    if "null" in given:
        assert data.asked_geometry is None
    else:
        assert data.asked_geometry == replace(GEOMETRY, n_bins=90 if given else 40)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "volume"}, "kind is 'volume', but must be"),
        ({"pixel_mm": 0.0}, "pixel_mm is 0.0, but must be a positive length"),
        ({"region": "knee"}, "Unknown region 'knee'"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SinogramFiles("somewhere", **change)

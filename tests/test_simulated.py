"""The simulated data set: the same slices on every machine, nested in number, no patient in two splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from allpet.geometry import ParallelBeam
from allpet.prompts import TRUNK_REGIONS
from data_modules import SimulatedPET
from data_modules.base import SinogramDataModule
from data_modules.slice_cache import StoredArray

GEOMETRY = ParallelBeam(n_views=24, n_bins=32, bin_mm=13.5, image_size=32, pixel_mm=13.5)


def simulated(cache: Path | None = None, **kwargs: Any) -> SimulatedPET:
    settings = {
        "geometry": GEOMETRY,
        "prompts": ["FDG:brain", "PSMA:abdomen"],
        "num_scans": 7,
        "slices_per_patient": 2,
        "val_patients": 2,
        "test_patients": 1,
        "cache": None if cache is None else str(cache),
    }
    data = SimulatedPET(**{**settings, **kwargs})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def data() -> SimulatedPET:
    return simulated()


def test_slices_are_noisy_positive_and_balanced(data: SimulatedPET) -> None:
    assert data.train_set.sinogram.shape == (7, *GEOMETRY.sinogram_shape)
    assert data.train_set.prompt.names() == ["FDG:brain"] * 2 + ["PSMA:abdomen"] * 2 + ["FDG:brain"] * 2 + [
        "PSMA:abdomen"
    ]
    noisy, expected = data.train_set.sinogram, data.train_set.expected
    assert expected.min() >= 0
    difference = (noisy - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert ((difference > 0.01) & (difference < 0.3)).all()
    # Corrected for everything, each slice keeps its total up to noise.
    torch.testing.assert_close(noisy.sum((1, 2)), expected.sum((1, 2)), rtol=0.05, atol=0)
    assert not data.reprojected


def test_no_patient_is_in_two_splits(data: SimulatedPET) -> None:
    parts = [set(part.patient_id.tolist()) for part in (data.train_set, data.val_set, data.test_set)]
    assert [len(part) for part in parts] == [4, 2, 1]
    assert len(set.union(*parts)) == 7
    ids = torch.cat([part.sample_id for part in (data.train_set, data.val_set, data.test_set)])
    assert len(ids.unique()) == len(ids) == 7 + 4 + 2


@pytest.mark.parametrize("n", [1, 3, 6])
def test_fewer_scans_are_the_first_of_more(data: SimulatedPET, n: int) -> None:
    few = simulated(num_scans=n, val_patients=1)
    for name in ("sinogram", "expected", "sample_id", "patient_id"):
        assert torch.equal(getattr(few.train_set, name), getattr(data.train_set, name)[:n])
    assert torch.equal(few.val_set.sinogram, data.val_set.sinogram[:2])
    assert few.summary()["train_ids"] == data.summary()["train_ids"][:n]
    assert few.data_hash != data.data_hash


def test_the_cache_gives_back_every_bit_and_grows(data: SimulatedPET, tmp_path: Path) -> None:
    simulated(tmp_path, num_scans=2)
    for _ in range(2):  # made in part, then read
        cached = simulated(tmp_path)
        assert torch.equal(cached.train_set.sinogram, data.train_set.sinogram)
        assert torch.equal(cached.train_set.expected, data.train_set.expected)
        assert cached.data_hash == data.data_hash
    files = list(tmp_path.glob("*/*.h5"))
    assert len(files) == 3
    times = {path: path.stat().st_mtime_ns for path in files}
    simulated(tmp_path, num_scans=3)
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_what_does_not_fit_in_memory_is_read_when_asked_for(data: SimulatedPET, tmp_path: Path) -> None:
    stored = simulated(tmp_path, memory_gb=0.0)
    assert isinstance(stored.train_set.sinogram, StoredArray)
    assert stored.scale == data.scale
    assert stored.data_hash == data.data_hash
    for rows in ([6, 0, 3], [2]):
        for there, here in zip(stored.train_set[rows][:2], data.train_set[rows][:2], strict=True):
            assert torch.equal(there, here)
    with pytest.raises(IndexError, match="there are 7"):
        stored.train_set[[7]]
    batches = list(stored.train_dataloader())
    assert sorted(torch.cat([batch.sample_id for batch in batches]).tolist()) == data.train_set.sample_id.tolist()


def test_a_damaged_cache_is_made_anew(data: SimulatedPET, tmp_path: Path) -> None:
    simulated(tmp_path)
    for path in tmp_path.glob("*/*.h5"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cannot be read .* simulated anew"):
        assert torch.equal(simulated(tmp_path).train_set.sinogram, data.train_set.sinogram)


def test_identity_follows_content(data: SimulatedPET) -> None:
    assert simulated(seed=3, batch_size=2, augmentation=None).data_hash == data.data_hash
    for change in ({"population": 1}, {"dose": 0.5}, {"target": "expected"}, {"slices_per_patient": 1}):
        assert simulated(**change).data_hash != data.data_hash


def test_expected_can_be_trained_on(data: SimulatedPET) -> None:
    clean = simulated(target="expected")
    assert torch.equal(clean.train_set.sinogram, data.train_set.expected)


def test_trunk_patients_show_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_modules import simulated as module

    shown = []
    original = module.patient_slices
    monkeypatch.setattr(module, "patient_slices", lambda *args: shown.append(args[1]) or original(*args))
    data = simulated(prompts=["FDG:trunk"], num_scans=20)
    assert data.train_set.prompt.names() == ["FDG:trunk"] * 20
    assert set(shown) == set(TRUNK_REGIONS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": ["FDG:open"]}, "needs at least one tracer:region, not open"),
        ({"prompts": []}, "needs at least one tracer:region"),
        ({"prompts": ["FDG:knee"]}, "Unknown region 'knee'"),
        ({"num_scans": 0}, "num_scans is 0, but must be at least 1"),
        ({"slices_per_patient": -1}, "slices_per_patient is -1, but must be at least 1"),
        ({"val_patients": 0}, "val_patients is 0, but must be at least 1"),
        ({"target": "clean"}, "target is 'clean', but must be"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SimulatedPET(**change)


def test_it_is_configured_like_any_other() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SinogramDataModule, "data")
    arguments = {"geometry": {**GEOMETRY.to_dict(), "n_views": 16}, "prompts": ["FDG:brain"]}
    config = parser.parse_object({"data": {"class_path": "data_modules.SimulatedPET", "init_args": arguments}})
    data = parser.instantiate(config).data
    assert isinstance(data, SimulatedPET)
    assert data.geometry.n_views == 16
    default = parser.instantiate(parser.parse_object({"data": {"class_path": "data_modules.SimulatedPET"}})).data
    assert default.geometry == ParallelBeam.preset("laptop")

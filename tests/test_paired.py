"""Paired data: the same pairs on every machine, nested in number, no patient in two splits, images that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from allpet.augmentation import SymmetryAugmentation
from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.prompts import TRACERS
from allpet.simulation.tasks import TASKS, PairedBatch, PairOptions, make_pairs
from data_modules import PairedTask, SimulatedPET
from data_modules.base import SinogramDataModule
from data_modules.slice_cache import StoredArray

GEOMETRY = ParallelBeam(n_views=24, n_bins=32, bin_mm=13.5, image_size=32, pixel_mm=13.5)


def paired(task: str = "separation", cache: Path | None = None, **kwargs: Any) -> PairedTask:
    settings = {
        "geometry": GEOMETRY,
        "num_scans": 3,
        "slices_per_patient": 2,
        "val_patients": 1,
        "test_patients": 1,
        "batch_size": 2,
        "cache": None if cache is None else str(cache),
    }
    if task in ("separation", "conversion"):
        settings["prompts"] = ["FDG+DOPA:brain", "FDG+PSMA:trunk"]
    data = PairedTask(task, **{**settings, **kwargs})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def data() -> PairedTask:
    return paired()


def test_pairs_are_those_of_the_simulator(data: PairedTask) -> None:
    batch = data.train_set[[1, 0]]
    assert isinstance(batch, PairedBatch)
    made = make_pairs("separation", Radon(GEOMETRY), 0, "brain", ("FDG", "DOPA"), 2)
    for name in ("input", "expected", "noisy", "activity", "labels", "attenuation", "share", "task", "target_tracer"):
        assert torch.equal(getattr(batch, name), getattr(made, name)[[1, 0]]), name
    assert batch.sample_id.tolist() == [1, 0]
    assert batch.prompt.names() == ["FDG:brain"] * 2
    assert [TRACERS[i] for i in data.train_set[2].target_tracer[0]] == ["FDG", "PSMA"]
    assert data.train_set[2].prompt.names() == ["FDG:trunk"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_batches_of_its_default_prompts(task: str) -> None:
    data = paired(task, prompts=None, num_scans=1, test_patients=0)
    (batch,) = data.train_dataloader()
    assert [TASKS[i] for i in batch.task] == [task]
    assert batch.expected.shape == (1, 2 if task == "separation" else 1, *GEOMETRY.sinogram_shape)
    assert len(data.test_set) == 0
    assert data.scale > 0
    assert data.summary()["task"] == task


def test_no_patient_is_in_two_splits_nor_elsewhere_tested(data: PairedTask) -> None:
    parts = [set(part.patient_id.tolist()) for part in (data.train_set, data.val_set, data.test_set)]
    assert [len(part) for part in parts] == [2, 1, 1]
    assert len(set.union(*parts)) == 4
    other = SimulatedPET(GEOMETRY, num_scans=9, slices_per_patient=1, val_patients=3, test_patients=3, cache=None)
    other.setup()
    elsewhere = [set(part.patient_id.tolist()) for part in (other.train_set, other.val_set, other.test_set)]
    for i, mine in enumerate(parts):
        assert mine <= elsewhere[i]
        assert not any(mine & theirs for k, theirs in enumerate(elsewhere) if k != i)


def test_fewer_pairs_are_the_first_of_more_and_the_cache_keeps_every_bit(data: PairedTask, tmp_path: Path) -> None:
    few = paired(cache=tmp_path, num_scans=1)
    more = paired(cache=tmp_path, memory_gb=0.0)
    assert isinstance(more.train_set.sinogram, StoredArray)
    assert more.scale == data.scale
    assert more.data_hash == data.data_hash != few.data_hash
    for rows in ([0], [2, 1]):
        for stored, made in zip(more.train_set[rows], data.train_set[rows], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(stored, made, strict=True))
    for name in ("input", "expected", "noisy", "labels"):
        assert torch.equal(getattr(few.train_set[[0]], name), getattr(data.train_set[[0]], name))
    assert few.summary()["train_ids"] == data.summary()["train_ids"][:1]


def test_identity_follows_content(data: PairedTask) -> None:
    assert paired(seed=3, batch_size=1).data_hash == data.data_hash
    for change in ({"population": 1}, {"options": PairOptions(discordance=0.0)}, {"slices_per_patient": 1}):
        assert paired(**change).data_hash != data.data_hash


def test_symmetries_turn_input_and_targets_alike() -> None:
    data = paired(symmetry=SymmetryAugmentation)
    batch = data.train_set[[0, 1, 2]]
    turned = data.augment_pairs(batch, epoch=1)
    assert not torch.equal(turned.input, batch.input)
    assert turned.activity is None
    assert turned.labels is None
    assert turned.attenuation is None
    # They permute bins, so they permute whatever the mix has more than its parts.
    before, after = (b.input - b.expected.sum(1, keepdim=True) for b in (batch, turned))
    torch.testing.assert_close(after.flatten(1).sort().values, before.flatten(1).sort().values)
    again = data.augment_pairs(data.train_set[[2]], epoch=1)
    assert torch.equal(again.input, turned.input[2:])
    assert not torch.equal(data.augment_pairs(batch, epoch=2).input, turned.input)
    assert data.on_after_batch_transfer(batch, 0) is batch  # no training goes on


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "denoise"}, "Unknown task 'denoise'"),
        ({"prompts": []}, "at least one tracer:region"),
        ({"prompts": ["FDG:open"]}, "not open"),
        ({"prompts": ["FDG:knee"]}, "Unknown region 'knee'"),
        ({"prompts": ["FDG+PSMA:abdomen"]}, r"low_dose takes 1 tracer\(s\), such as FDG:abdomen"),
        ({"task": "conversion", "prompts": ["FDG:abdomen"]}, r"conversion takes 2 tracer\(s\), such as FDG\+PSMA"),
        ({"num_scans": 0}, "num_scans is 0, but must be at least 1"),
        ({"test_patients": -1}, "test_patients is -1, but must not be negative"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PairedTask(**change)


def test_it_is_configured_like_any_other() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SinogramDataModule, "data")
    arguments = {"task": "delayed", "geometry": GEOMETRY.to_dict(), "options": {"delay_min": [45, 60]}}
    config = parser.parse_object({"data": {"class_path": "data_modules.PairedTask", "init_args": arguments}})
    data = parser.instantiate(config).data
    assert isinstance(data, PairedTask)
    assert data.options.delay_min == (45, 60)
    assert data.prompts[0] == (("FDG",), "chest")

"""Data modules: the same draws whoever makes them, every slice once, and a resumed run like an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from allpet.augmentation import RadonMaskAugmentation, SymmetryAugmentation
from allpet.batches import SinogramBatch
from allpet.geometry import ParallelBeam
from allpet.mixup import MixupAugmentation
from allpet.prompts import Prompt
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet, fixed_scale
from data_modules.few_shot import nested_subset
from data_modules.loading import KeyedBatches, ResumableLoader, collate

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")

GEOMETRY = ParallelBeam(n_views=8, n_bins=12, bin_mm=4.0, image_size=12, pixel_mm=4.0)


def make_set(n: int, first_id: int, known: bool = True) -> SinogramSet:
    """Random slices of patients with two slices each, brain and chest in turn."""
    generator = torch.Generator().manual_seed(first_id)
    expected = torch.rand(n, *GEOMETRY.sinogram_shape, generator=generator)
    ids = torch.arange(first_id, first_id + n)
    prompt = Prompt.of(["FDG:brain" if i // 2 % 2 else "PSMA:chest" for i in range(n)])
    return SinogramSet(expected + 0.1, expected if known else None, prompt, ids, ids // 2)


class Toy(SinogramDataModule):
    """Random sinograms; 22 to train on."""

    def __init__(self, known: bool = True, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 4, **kwargs})
        self.save_hyperparameters(logger=False, ignore=["augmentation", "symmetry", "mixup"])
        self.known = known

    def load(self) -> LoadedData:
        train = make_set(22, 0, self.known)
        train = train.subset(nested_subset(train.patient_id.tolist(), train.prompt.names(), self.num_scans))
        return LoadedData(GEOMETRY, train, make_set(6, 100), make_set(0, 200), data_hash="toy")


def ready(**kwargs: Any) -> Toy:
    data = Toy(**kwargs)
    data.setup()
    return data


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slices", [1, 4, 5, 33, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_slice_is_given_once_and_evenly(n_slices: int, world_size: int, seed: int | None) -> None:
    if n_slices < world_size:
        with pytest.raises(ValueError, match=r"1 slice\(s\) cannot be shared by"):
            KeyedBatches(n_slices, 4, seed, 0, world_size)
        return
    samplers = [KeyedBatches(n_slices, 4, seed, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {len(given) for given in batches}
    sizes = [len(batch) for given in batches for batch in given]
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1
    assert sorted(i for given in batches for batch in given for i in batch) == list(range(n_slices))
    if seed is None and world_size == 1:
        assert [i for batch in batches[0] for i in batch] == list(range(n_slices))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_no_batch_is_empty(batch_size: int, world_size: int) -> None:
    for n_slices in range(world_size, 40):
        batches = [list(KeyedBatches(n_slices, batch_size, 0, rank, world_size)) for rank in range(world_size)]
        sizes = [len(batch) for given in batches for batch in given]
        assert min(sizes) >= 1
        assert len({len(given) for given in batches}) == 1
        assert sum(sizes) == n_slices
        assert max(sizes) <= (2 if batch_size == 1 and n_slices % world_size else batch_size)


@pytest.mark.parametrize("n_slices", [16, 17, 33, 47])
@pytest.mark.parametrize("world_size", [2, 3])
def test_devices_train_together_on_what_one_would_with_a_larger_batch(n_slices: int, world_size: int) -> None:
    alone = list(KeyedBatches(n_slices, 4 * world_size, 0))
    shares = zip(*(KeyedBatches(n_slices, 4, 0, rank, world_size) for rank in range(world_size)), strict=True)
    assert [[i for share in step for i in share] for step in shares] == alone


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = KeyedBatches(40, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(0, 0)
    state = torch.get_rng_state()
    assert order(0, 0) == first
    assert order(1, 0) != first
    assert order(0, 1) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_collate_joins_nested_tuples_with_gaps() -> None:
    data = ready()
    rows = [data.train_set[i] for i in (3, 1, 2)]
    assert rows[0].stack is None
    together = collate(rows)
    expected = data.train_set[[3, 1, 2]]
    assert together.stack is None
    assert torch.equal(together.sinogram, expected.sinogram)
    assert torch.equal(together.prompt.region, expected.prompt.region)
    augmented = [data.augment(row) for row in rows]
    whole = data.augment(expected)
    for joined, made in zip(collate(augmented).stack, whole.stack, strict=True):
        torch.testing.assert_close(joined, made)
    loaded = next(iter(DataLoader(data.train_set, batch_size=5, collate_fn=collate)))
    assert torch.equal(loaded.sample_id, torch.arange(22)[data.train_set.sample_id[:5]])


def test_batches_move_with_their_gaps_and_types() -> None:
    batch = ready().augment(ready().train_set[[0, 1]])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, SinogramBatch)
    assert isinstance(moved.prompt, Prompt)
    assert moved.symmetry is None
    assert {tensor.device.type for tensor in (moved.sinogram, moved.prompt.tracer, *moved.stack)} == {"meta"}
    assert moved.expected is not moved.sinogram


def test_real_data_are_moved_and_transformed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(symmetry=SymmetryAugmentation, known=False)
    applied = []
    apply = data.symmetry.apply
    monkeypatch.setattr(data.symmetry, "apply", lambda *given: applied.append(given) or apply(*given))
    batch = move_data_to_device(data.train_set[[0, 1]], torch.device("meta"))
    assert batch.expected is batch.sinogram
    joined = data.augment(collate([data.train_set[0], data.train_set[1]]), epoch=0)
    assert joined.expected is joined.sinogram
    assert len(applied) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_batch_is_augmented_alike_on_its_gpu() -> None:
    data = ready(symmetry=SymmetryAugmentation, trunk_probability=0.5)
    here = data.augment(data.train_set[range(22)], epoch=1)
    there = data.augment(move_data_to_device(data.train_set[range(22)], torch.device("cuda")), epoch=1)
    assert {tensor.device.type for tensor in (there.sinogram, there.expected, there.symmetry, *there.stack)} == {"cuda"}
    assert torch.equal(here.prompt.region, there.prompt.region.cpu())
    assert torch.equal(here.stack.cells, there.stack.cells.cpu())
    torch.testing.assert_close(here.stack.stack, there.stack.stack.cpu())


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_draws_belong_to_slices_not_to_batches() -> None:
    data = ready(symmetry=SymmetryAugmentation, trunk_probability=0.5)
    both = data.augment(data.train_set[[5, 9]], epoch=3)
    alone = data.augment(data.train_set[[9]], epoch=3)
    assert torch.equal(both.stack.cells[1:], alone.stack.cells)
    assert torch.equal(both.symmetry[1:], alone.symmetry)
    assert torch.equal(both.prompt.region[1:], alone.prompt.region)
    torch.testing.assert_close(both.stack.stack[1:], alone.stack.stack)


def all_cells(data: Toy, epoch: int | None) -> torch.Tensor:
    return data.augment(data.train_set[range(22)], epoch).stack.cells


def test_training_draws_change_with_seed_and_epoch() -> None:
    data = ready()
    assert torch.equal(all_cells(data, 1), all_cells(ready(), 1))
    assert not torch.equal(all_cells(data, 1), all_cells(data, 2))
    assert not torch.equal(all_cells(data, 1), all_cells(ready(seed=1), 1))


def test_evaluation_draws_depend_on_the_slice_alone() -> None:
    data, other = ready(symmetry=SymmetryAugmentation), ready(seed=7, batch_size=3)
    assert torch.equal(all_cells(data, None), all_cells(other, None))
    batch = data.augment(data.val_set[[0, 1]])
    assert batch.symmetry is None
    assert torch.equal(batch.sinogram, data.val_set[[0, 1]].sinogram)
    assert torch.equal(batch.prompt.region, data.val_set[[0, 1]].prompt.region)


def test_symmetries_act_on_noisy_and_expected_alike_and_before_masks() -> None:
    data = ready(symmetry=SymmetryAugmentation)
    batch = data.augment(data.train_set[range(22)], epoch=0)
    # The toy's noisy sinogram is the expected one plus a constant, which whole-view symmetries keep.
    torch.testing.assert_close(batch.sinogram - batch.expected, torch.full_like(batch.sinogram, 0.1))
    assert not torch.equal(batch.sinogram, data.train_set[range(22)].sinogram)
    assert torch.equal(batch.stack.stack[:, 1:2], batch.sinogram)
    assert torch.equal(batch.stack.stack[:, :1] + batch.stack.stack[:, 2:], batch.sinogram)
    real = ready(symmetry=SymmetryAugmentation, known=False)
    batch = real.augment(real.train_set[[0]], epoch=0)
    assert batch.expected is batch.sinogram


def test_trunk_is_asked_for_as_often_as_said_and_only_where_true() -> None:
    data = ready(trunk_probability=0.2)
    batch = data.train_set[[0, 2, 3]]
    assert batch.prompt.names() == ["FDG:brain", "PSMA:chest", "PSMA:chest"]
    prompts = [name for epoch in range(300) for name in data.augment(batch, epoch).prompt.names()]
    share = prompts.count("PSMA:trunk") / (prompts.count("PSMA:trunk") + prompts.count("PSMA:chest"))
    assert share == pytest.approx(0.2, abs=0.05)
    assert prompts.count("FDG:brain") == 300
    assert set(prompts) == {"PSMA:trunk", "PSMA:chest", "FDG:brain"}


def test_global_randomness_is_left_alone() -> None:
    data = ready(symmetry=SymmetryAugmentation)
    state = torch.get_rng_state()
    data.augment(next(iter(data.train_dataloader())), epoch=0)
    assert torch.equal(torch.get_rng_state(), state)


# ---- what a data module says of itself -------------------------------------------------------------------------------


def test_few_shot_ids_are_reported_and_nested() -> None:
    everything = ready().summary()["train_ids"]
    few = ready(num_scans=7)
    assert few.summary()["train_ids"] == everything[:7]
    assert few.summary()["train"] == {"slices": 7, "patients": 4, "prompts": {"FDG:brain": 4, "PSMA:chest": 3}}
    assert few.state_dict()["train_ids"] == everything[:7]


def test_scale_is_one_high_percentile() -> None:
    values = torch.arange(10_000.0).view(1, 100, 100)
    assert fixed_scale(values) == pytest.approx(9990, rel=0.01)
    sparse = torch.zeros(1, 100, 100)
    sparse[0, 0, 0] = 5.0
    assert fixed_scale(sparse) == 5.0
    with pytest.raises(ValueError, match="zero or negative"):
        fixed_scale(-values)


def test_clear_errors() -> None:
    with pytest.raises(RuntimeError, match=r"Toy holds no data yet; call setup\(\) first"):
        Toy().train_dataloader()
    with pytest.raises(ValueError, match="There is no test set"):
        ready().test_dataloader()
    with pytest.raises(ValueError, match="batch_size is 0"):
        Toy(batch_size=0)
    with pytest.raises(ValueError, match="trunk_probability is 2"):
        Toy(trunk_probability=2)


def test_augmentations_are_configured_by_class_path() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SinogramDataModule, "data")
    config = parser.parse_object(
        {
            "data": {
                "class_path": f"{__name__}.Configured",
                "init_args": {
                    "augmentation": {"class_path": "allpet.RadonMaskAugmentation", "init_args": {"n_cells": [2, 3]}},
                    "symmetry": {"class_path": "allpet.SymmetryAugmentation", "init_args": {"reflection": False}},
                },
            }
        }
    )
    data = parser.instantiate(config).data
    data.setup()
    assert isinstance(data.augmentation, RadonMaskAugmentation)
    assert data.augmentation.n_cells == (2, 3)
    assert isinstance(data.symmetry, SymmetryAugmentation)
    assert data.symmetry.reflection is False
    default = parser.parse_object({"data": {"class_path": f"{__name__}.Configured"}})
    data = parser.instantiate(default).data
    data.setup()
    assert isinstance(data.augmentation, RadonMaskAugmentation)
    assert data.symmetry is None
    none = parser.parse_object({"data": {"class_path": f"{__name__}.Configured", "init_args": {"augmentation": None}}})
    data = parser.instantiate(none).data
    data.setup()
    assert data.augment(data.train_set[[0]]).stack is None


class Configured(SinogramDataModule):
    """Takes the shared arguments as a subclass in a configuration does."""

    def load(self) -> LoadedData:
        return LoadedData(GEOMETRY, make_set(4, 0), make_set(2, 10), make_set(2, 20), data_hash="configured")


# ---- with Lightning --------------------------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Learns nothing much, and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[tuple] = []
        self.validated: dict[int, list] = {}

    def training_step(self, batch: SinogramBatch, batch_idx: int) -> torch.Tensor:
        self.trained.append((self.current_epoch, batch_idx, batch.sample_id.tolist(), batch.stack.cells.tolist()))
        return (self.weight - batch.stack.stack.mean()).square()

    def validation_step(self, batch: SinogramBatch, batch_idx: int) -> None:
        cells = dict(zip(batch.sample_id.tolist(), batch.stack.cells.tolist(), strict=True))
        for sample_id, drawn in cells.items():
            assert self.validated.setdefault(sample_id, drawn) == drawn

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(RuntimeError):
    """Stands for a kill signal."""


class Kill(pl.Callback):
    """Kills training in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def fit(
    folder: Path, data: Toy, callbacks: list[pl.Callback] | None = None, ckpt: Path | None = None, **kwargs: Any
) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        **{"max_steps": 15, **kwargs},
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model


# 22 slices in batches of 4 are 6 batches an epoch.
@pytest.mark.parametrize("every", [1, 2, 4, 6])
@pytest.mark.parametrize(
    "how",
    [
        {"max_steps": 15},
        {"max_epochs": 3, "max_steps": -1},
        {"max_steps": 15, "val_check_interval": 2},
        {"max_steps": 15, "accumulate_grad_batches": 2},
        {"max_steps": 15, "limit_train_batches": 5},
        {"max_steps": 15, "check_val_every_n_epoch": None, "val_check_interval": 4},
    ],
    ids=lambda how: "-".join(f"{key}={value}" for key, value in how.items()),
)
def test_a_killed_run_continues_exactly(tmp_path: Path, every: int, how: dict[str, Any]) -> None:
    whole = fit(tmp_path, ready(), **how)
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=every)
    with pytest.raises(Killed):
        fit(tmp_path, ready(), [save, Kill(step=7)], **how)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    resumed = fit(tmp_path, ready(), ckpt=last, **how)
    done = int(last.stem.removeprefix("step=")) * how.get("accumulate_grad_batches", 1)
    assert resumed.trained == whole.trained[done:]
    assert len(resumed.trained) > 3
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("when", ["validation", "train_epoch"])
@pytest.mark.parametrize("how", [{"max_steps": 15}, {"max_epochs": 3, "max_steps": -1}])
def test_checkpoints_at_the_end_of_an_epoch_continue_exactly(tmp_path: Path, when: str, how: dict[str, Any]) -> None:
    whole = fit(tmp_path, ready(), **how)
    save = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=when == "train_epoch"
    )
    with pytest.raises(Killed):
        fit(tmp_path, ready(), [save, Kill(step=8)], **how)
    resumed = fit(tmp_path, ready(), ckpt=tmp_path / "step=6.ckpt", **how)
    assert resumed.trained == whole.trained[6:]
    assert torch.equal(resumed.weight, whole.weight)


def test_workers_prepare_ahead_without_moving_the_position(tmp_path: Path) -> None:
    whole = fit(tmp_path, ready(), max_steps=8)
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    with pytest.raises(Killed):
        fit(tmp_path, ready(num_workers=1), [save, Kill(step=3)], max_steps=8)
    resumed = fit(tmp_path, ready(num_workers=1), ckpt=tmp_path / "step=2.ckpt", max_steps=8)
    assert resumed.trained == whole.trained[2:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_killed_run_mixes_as_it_would_have(tmp_path: Path, num_workers: int) -> None:
    mixed: dict[str, Any] = {"mixup": MixupAugmentation("plain"), "symmetry": SymmetryAugmentation}
    whole = fit(tmp_path, ready(**mixed), max_steps=8)
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    with pytest.raises(Killed):
        fit(tmp_path, ready(num_workers=num_workers, **mixed), [save, Kill(step=3)], max_steps=8)
    resumed = fit(tmp_path, ready(num_workers=num_workers, **mixed), ckpt=tmp_path / "step=2.ckpt", max_steps=8)
    assert torch.equal(resumed.weight, whole.weight), "it follows the mean of what was trained on"
    plain = fit(tmp_path, ready(symmetry=SymmetryAugmentation), max_steps=8)
    assert not torch.equal(plain.weight, whole.weight)


def test_the_loader_alone_continues_where_it_was() -> None:
    def loader() -> ResumableLoader:
        loader = ready().train_dataloader()
        assert isinstance(loader, ResumableLoader)
        loader.sampler.set_epoch(2)
        return loader

    whole = [batch.sample_id.tolist() for batch in loader()]
    for stop in range(len(whole) + 1):
        first = loader()
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        second = loader()
        second.load_state_dict(first.state_dict())
        rest = [batch.sample_id.tolist() for batch in second]
        assert rest == (whole[stop:] if stop < len(whole) else whole)
        assert [batch.sample_id.tolist() for batch in second] == whole  # and begins anew after that


def test_validation_is_the_same_in_every_run_and_epoch(tmp_path: Path) -> None:
    first = fit(tmp_path, ready(), max_steps=12, num_sanity_val_steps=2)
    second = fit(tmp_path, ready(seed=5, batch_size=3), max_steps=8)
    assert first.validated == second.validated
    assert sorted(first.validated) == list(range(100, 106))


def test_other_data_are_refused_on_resuming(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, ready(), [ModelCheckpoint(tmp_path, "a", every_n_train_steps=2), Kill(step=3)])
    other = ready()
    other._loaded = LoadedData(GEOMETRY, other.train_set, other.val_set, other.test_set, data_hash="other")
    other.data_hash = "other"
    with pytest.raises(RuntimeError, match=r"trained on other data \(hash toy, here other\)"):
        fit(tmp_path, other, ckpt=tmp_path / "a.ckpt")


DISTRIBUTED = """
import json, sys
import test_data_modules as t

if __name__ == "__main__":
    model = t.fit(sys.argv[1], t.ready(), max_steps=-1, max_epochs=2, devices=2, strategy="ddp")
    with open(f"{sys.argv[1]}/{model.global_rank}.json", "w") as file:
        json.dump([model.trained, sorted(model.validated)], file)
"""


@pytest.mark.slow
def test_two_processes_share_every_slice_without_repeating_one(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=environment, timeout=120)
    (first, first_val), (second, second_val) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert sorted(first_val + second_val) == list(range(100, 106))
    drawn = {epoch: ready().augment(ready().train_set[range(22)], epoch) for epoch in (0, 1)}
    for epoch, batch in drawn.items():
        rows = [row for row in first + second if row[0] == epoch]
        cells = {i: c for _, _, ids, cells in rows for i, c in zip(ids, cells, strict=True)}
        assert sorted(i for row in rows for i in row[2]) == list(range(22))
        assert cells == dict(zip(batch.sample_id.tolist(), batch.stack.cells.tolist(), strict=True))
    assert len(first) == len(second)

"""Several processes do together what one does alone: the same losses, scores, subset and samples."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fault_tools import HERE, VAE, in_a_fork
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from test_callbacks import stage_1, stage_2
from tiny_pet import GEOMETRY, TinyPET

import callbacks
from allpet.batches import SinogramBatch
from data_modules.base import LoadedData
from data_modules.few_shot import nested_subset
from data_modules.prompt_list import PromptList

STEPS = 6
SAMPLES = 64


class FewDiscs(TinyPET):
    """The first 16 of 28 slices to train on, and five to validate on: two processes share them 3 + 2."""

    def load(self) -> LoadedData:
        loaded = super().load()
        train = loaded.train
        chosen = nested_subset(train.patient_id.tolist(), train.prompt.names(), 16)
        val = train.subset([20, 21, 22, 23, 24])
        return LoadedData(loaded.geometry, train.subset(chosen), val, loaded.test, loaded.data_hash)


class Ledger(Callback):
    """Writes down what this process trained on, with the loss, and what it validated on."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, float]] = []
        self.validated: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: SinogramBatch, batch_idx: int
    ) -> None:
        self.trained.append((len(batch.sample_id), float(outputs["loss"])))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *more: Any) -> None:
        self.validated += batch.sample_id.tolist()


def work(folder: Path, processes: int) -> None:
    """Train, validate, measure the latents and sample; write down what came of it."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": processes,
        "strategy": "ddp" if processes > 1 else "auto",
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    system, data = stage_1(), FewDiscs(n_slices=36, batch_size=8 // processes)
    ledger = Ledger()
    watching = [ledger, callbacks.LatentStatistics()]
    trainer = Trainer(**settings, max_steps=STEPS, num_sanity_val_steps=0, callbacks=watching)
    trainer.fit(system, data)
    found = {
        "trained": ledger.trained,
        "validated": ledger.validated,
        "subset": data.train_set.sample_id.tolist(),
        "scores": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        "latent_std": system.autoencoder.latent_std.tolist(),
        "weights": float(sum(weight.double().square().sum() for weight in system.parameters())),
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))
    sampler = stage_2()
    sampler.geometry = GEOMETRY
    sampler.sampling = type(sampler.sampling)("ddim", steps=2)
    writer = callbacks.SampleWriter(n_gallery=2, n_transition=1)
    asked = PromptList(["FDG:brain", "PSMA:abdomen"], n_samples=SAMPLES, seed=100, batch_size=16)
    Trainer(**settings, callbacks=[writer]).predict(sampler, asked, return_predictions=False)


def as_launched(rank: int, port: int, folder: Path) -> None:
    """Do a process's share of the work, in the environment that torchrun would give it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    rank_zero_only.rank = rank  # Lightning has read it from the environment when it was imported
    work(folder, 2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of one process with batches of eight and of two with batches of four."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("there is no fork server")
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    port = free_port()
    log = together / "log"
    children = [in_a_fork(log, as_launched, rank, port, together) for rank in (0, 1)]
    children.append(in_a_fork(alone / "log", work, alone, 1))
    for child in children:
        child.join(180)
    assert [child.exitcode for child in children] == [0, 0, 0], log.read_text() + (alone / "log").read_text()
    return alone, together


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_two_processes_have_the_loss_curve_of_one_with_twice_the_batch(both):
    (alone,), (first, second) = map(records, both)
    assert [size for size, _ in alone["trained"]] == [8] * STEPS
    assert [size for size, _ in first["trained"]] == [size for size, _ in second["trained"]] == [4] * STEPS
    curve = [(a + b) / 2 for (_, a), (_, b) in zip(first["trained"], second["trained"], strict=True)]
    assert curve == pytest.approx([loss for _, loss in alone["trained"]], rel=1e-4)
    assert first["weights"] == second["weights"] == pytest.approx(alone["weights"], rel=1e-5)
    assert curve[-1] < curve[0]


def test_few_shot_subset_and_scores_are_those_of_one_process(both):
    (alone,), (first, second) = map(records, both)
    assert first["subset"] == second["subset"] == alone["subset"]
    assert len(first["validated"]) == 3 * len(second["validated"]) / 2, "five slices, 3 + 2"
    assert sorted(first["validated"] + second["validated"]) == sorted(alone["validated"])
    assert set(first["scores"]) == set(alone["scores"]) >= {"val/loss", "val/relative_l2"}
    for name, value in alone["scores"].items():
        assert first["scores"][name] == second["scores"][name] == pytest.approx(value, rel=1e-4), name
    assert first["latent_std"] == second["latent_std"] == pytest.approx(alone["latent_std"], rel=1e-4)


def test_two_processes_give_the_same_64_samples_in_one_file(both):
    alone, together = (h5py.File(folder / "samples.h5") for folder in both)
    assert together["seed"][:].tolist() == list(range(100, 100 + SAMPLES))
    assert together["seed"][:].tolist() == alone["seed"][:].tolist()
    assert together["prompt"].asstr()[:].tolist() == alone["prompt"].asstr()[:].tolist()
    for name in ("sinogram", "image"):
        np.testing.assert_allclose(together[name][:], alone[name][:], rtol=1e-4, atol=1e-4 * np.abs(alone[name]).max())
        assert dict(together[name].attrs) == dict(alone[name].attrs)
    assert dict(together.attrs) == dict(alone.attrs)
    for folder in both:
        assert {path.name for path in folder.iterdir() if path.suffix != ".json"} == {
            *("log", "samples.h5", "gallery.png", "transition.gif")
        }


def test_where_a_launcher_started_all_the_samples_folder_is_named_and_made_by_the_first(tmp_path, monkeypatch):
    from allpet import cli, runs

    monkeypatch.setattr(cli, "_launched_from_outside", lambda: True)
    with pytest.raises(RuntimeError, match=r"name their common run with --run\.name"):
        cli._new_folder(runs.RunOptions(str(tmp_path)))
    named = runs.RunOptions(str(tmp_path), name="mine")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert cli._new_folder(named) == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert cli._new_folder(named) == tmp_path / "mine"
    assert (tmp_path / "mine" / "run.json").is_file()


def test_strategy_devices_and_cluster_are_options_like_any_other(monkeypatch):
    from test_sweeps import Parsed

    from allpet.cli import prepare

    prepare()
    monkeypatch.setattr("sys.argv", ["allpet"])
    slurm = "lightning.pytorch.plugins.environments.SLURMEnvironment"
    parser = Parsed(VAE)._parser("fit")
    for strategy in ("ddp", "fsdp", "ddp_find_unused_parameters_true"):
        words = [*VAE[1:], "--trainer.strategy", strategy, "--trainer.devices", "4", "--trainer.num_nodes", "2"]
        trainer = parser.parse_args(
            [*words, "--trainer.plugins", slurm, "--trainer.plugins.auto_requeue=false"]
        ).trainer
        assert (trainer.strategy, trainer.devices, trainer.num_nodes) == (strategy, "4", 2)
        assert trainer.plugins.class_path == slurm
        assert trainer.plugins.init_args.auto_requeue is False


@pytest.mark.slow
def test_torchrun_trains_continues_and_samples(tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def launched(*words: str) -> str:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        command = [*torchrun, str(free_port()), "-m", "allpet", *words, "--trainer.devices", "2"]
        done = subprocess.run(
            [*command, "--trainer.strategy", "ddp"], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    vae = [*VAE, "--run.root", str(tmp_path / "vae"), "--run.name", "mine"]
    launched(*vae, "--trainer.max_steps", "4")
    assert "continues at step 4" in launched(*vae, "--trainer.max_steps", "8")
    launched(*vae[:-1], "whole", "--trainer.max_steps", "8")
    mine, whole = (
        load_file(tmp_path / "vae" / name / "pretrained" / "model.safetensors") for name in ("mine", "whole")
    )
    assert mine.keys() == whole.keys()

    ldm = [*VAE, "-c", str(HERE / "tiny_ldm.yaml"), "--trainer.max_steps", "2"]
    ldm += ["--model.autoencoder", str(tmp_path / "vae" / "mine"), "--run.root", str(tmp_path / "ldm")]
    launched(*ldm, "--run.name", "mine")
    sample = [
        "predict",
        "-c",
        str(HERE.parent / "experiments/sample.yaml"),
        "--model.folder",
        str(tmp_path / "ldm/mine"),
    ]
    sample += ["--model.sampling.steps", "2", "--data.n_samples", "5", "--trainer.accelerator", "cpu"]
    launched(*sample, "--run.root", str(tmp_path / "samples"), "--run.name", "mine")
    with h5py.File(tmp_path / "samples" / "mine" / "samples.h5") as file:
        assert file["seed"][:].tolist() == [0, 1, 2, 3, 4]

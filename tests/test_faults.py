"""Faults in a training: each is answered with a sentence, and costs nothing but the steps since the last checkpoint.

``experiments/faults.py`` makes a table of what the tests record.
"""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_tools import VAE, assert_same, at, copy_of, fit, in_a_fork, stopped, train

from allpet import faults, runs
from allpet.cli import main
from allpet.disk_cache import store
from callbacks import RunCheckpoint
from data_modules.slice_cache import SliceCache


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """One thread, so that numbers repeat, and a command line of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["allpet"])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed."""
    root = tmp_path_factory.mktemp("whole")
    fit(root)
    return root / "001"


class Bug(Exception):
    """A fault of the program."""


def bug(_: Any) -> None:
    raise Bug("a bug")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The root of a run that a bug stopped after step 7, with checkpoints at steps 3 and 6."""
    root = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        at(patch, 7, bug)
        with pytest.raises(Bug):
            fit(root)
    return root


@pytest.fixture
def note(record_property):
    """Record a row of the table of faults."""

    def record(fault: str, happened: str, lost: str, message: str) -> None:
        for name, value in {"fault": fault, "happened": happened, "lost": lost, "message": message}.items():
            record_property(name, value)

    return record


def steps(run: Path) -> list[int]:
    return sorted(step for step, _ in runs._checkpoints(run / "checkpoints"))


def finished(run: Path) -> int | None:
    record = json.loads((run / "run.json").read_text())["finished"]
    return record and record["step"]


def leftovers(run: Path) -> list[Path]:
    return [path for path in run.rglob(".*") if path.name != ".lock"]


@pytest.fixture
def heard(capsys, caplog):
    """Return all that was said since the last time that this was asked."""

    def ask() -> str:
        said = "".join(capsys.readouterr()) + caplog.text
        caplog.clear()
        return said

    return ask


def continues(root: Path, whole: Path, step: int, heard: Callable[[], str]) -> str:
    """The same command goes on at a step and ends with the weights of a run that nothing disturbed."""
    heard()
    fit(root)
    said = heard()
    run = root / "001"
    assert [path.name for path in root.iterdir()] == ["001"]
    assert finished(run) == 8
    assert leftovers(run) == []
    assert_same(run, whole)
    assert f"continues at step {step}." in said or (step == 0 and " starts." in said), said
    return said


# ------------------------------------------------------------------------------------------------ the process is ended


def killed_while_it_saves(root: Path, step: int) -> None:
    """Write half of the checkpoint of a step, then be killed."""
    save = torch.save

    def half_of_it(checkpoint: Any, file: Any) -> None:
        save(checkpoint, file)
        if checkpoint["global_step"] == step:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half_of_it
    train(root, "--trainer.limit_val_batches", "0")


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork server")
def test_killed_in_the_middle_of_writing_a_checkpoint(tmp_path, whole, note, heard):
    child = in_a_fork(tmp_path / "log", killed_while_it_saves, tmp_path / "runs", 6)
    child.join(timeout=300)
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    run = tmp_path / "runs" / "001"
    assert steps(run) == [3]
    assert len(leftovers(run)) == 1
    continues(tmp_path / "runs", whole, 3, heard)
    note("SIGKILL while a checkpoint is written", "half a file beside its place, removed later", "3 steps", "none")


def test_sigterm_leaves_a_checkpoint_of_the_step(tmp_path, whole, note, heard, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        said = stopped(tmp_path)
    assert said == "Stopped from outside (SIGTERM). The same command continues at step 5."
    assert signal.getsignal(signal.SIGTERM) == handler
    continues(tmp_path, whole, 5, heard)
    note("SIGTERM", "the step is finished and saved", "nothing", said)


def test_slurm_requeues_from_the_step_it_announced_the_end_at(tmp_path, whole, note, heard, monkeypatch):
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    job = {"NTASKS": "1", "JOB_NAME": "tiny", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**job, "JOB_NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    root = tmp_path / "runs"

    def ends(_: Any) -> None:
        if not signalled:
            os.kill(os.getpid(), signal.SIGUSR1)  # after step 4; the job goes on until it is ended, in step 5
            signalled.append(True)

    signalled: list[bool] = []
    with monkeypatch.context() as patch:
        at(patch, 4, ends)
        patch.setattr("tiny_pet.KilledAt.on_train_batch_start", lambda *_: signalled and bug(None), raising=False)
        with pytest.raises(Bug):
            fit(root)
    assert calls.read_text() == "requeue 7\n"
    assert [path.name for path in (root / "001").glob("hpc_ckpt_*")] == ["hpc_ckpt_1.ckpt"]
    continues(root, whole, 4, heard)
    assert not list((root / "001").glob("hpc_ckpt_*"))
    assert steps(root / "001") == [6, 8]
    note("SLURM announces the end of the job", "Lightning saves after the step and requeues", "nothing", "none")


@pytest.fixture
def terminal():
    """Let Ctrl+C be answered as in a terminal: where tests run in the background, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("times", "step", "what", "lost"),
    [(1, 5, "the step is finished and saved", "nothing"), (2, 3, "the training stops at once", "2 steps")],
)
def test_ctrl_c(tmp_path, whole, note, heard, monkeypatch, times, step, what, lost):
    def press(_: Any) -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        at(patch, 5, press)
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert stop.value.code == 1
    said = f"Stopped. The same command continues at step {step}."
    assert said in heard()
    continues(tmp_path, whole, step, heard)
    note("Ctrl+C" if times == 1 else "Ctrl+C twice", what, lost, said)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_ends_a_training_whose_loaders_it_has_ended_first(tmp_path, whole, heard, monkeypatch):
    def press(_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    with monkeypatch.context() as patch:
        at(patch, 5, press)
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path)
    assert stop.value.code == 1
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert "Stopped. The same command continues at step 3." in heard()
    continues(tmp_path, whole, 3, heard)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_after_the_last_step_leaves_a_finished_run(tmp_path, whole, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at(patch, 8, lambda _: signal.raise_signal(signal.SIGINT))
        patch.setattr(RunCheckpoint, "_signals", lambda *_: [])  # it comes when the step has just ended
        fit(tmp_path)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert "Stopping after this step; press Ctrl+C again" in capfd.readouterr().err
    assert finished(tmp_path / "001") == 8
    assert_same(tmp_path / "001", whole)


def test_ctrl_c_before_there_is_a_training(monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("allpet.cli.AllpetCLI", interrupt)
    with pytest.raises(SystemExit, match="allpet: Stopped"):
        main([])


def test_a_bug_in_a_callback_keeps_its_traceback(half, tmp_path, whole, note, heard):
    copy_of(half, tmp_path / "runs")
    continues(tmp_path / "runs", whole, 6, heard)
    note("an exception in a callback", "the training stops with its traceback", "1 step", "its own")


def test_what_a_killed_export_left_is_removed(half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    (run / ".pretrained-abc").mkdir()
    (run / ".pretrained-abc" / "model.safetensors").write_bytes(b"half")
    (run / ".config.yaml.part").write_text("half")
    (run / "checkpoints" / ".step=00000008.ckpt.part").write_bytes(b"half")
    continues(tmp_path / "runs", whole, 6, heard)
    note("SIGKILL while the weights are exported", "half a folder beside its place, removed later", "1 step", "none")


def test_resuming_is_exact_with_accumulated_batches(tmp_path, note, heard, monkeypatch):
    """Three batches to a step, eight to an epoch; stopped between two steps, in the second epoch."""
    words, seen = ["--trainer.accumulate_grad_batches", "3", "--data.batch_size", "2"], []

    def stop_at_the_second_batch(_: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    fit(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        at(patch, 4, stop_at_the_second_batch)
        said = stopped(tmp_path / "runs", *words)
    assert said.endswith("The same command continues at step 5.")
    fit(tmp_path / "runs", *words)
    assert "continues at step 5" in heard()
    assert_same(tmp_path / "runs" / "001", tmp_path / "whole" / "001")
    note("SIGTERM while gradients are accumulated", "the step is finished and saved", "nothing", said)


def test_stopped_twice_after_the_end_of_an_epoch(tmp_path, note, monkeypatch):
    """Three batches to an epoch: every checkpoint is of an epoch's last step."""
    words = [*VAE, "--data.batch_size", "6", "--run.root"]
    main([*words, str(tmp_path / "whole")])
    for step in (4, 7):
        with monkeypatch.context() as patch:
            at(patch, step, bug)
            with pytest.raises(Bug):
                main([*words, str(tmp_path / "runs")])
    main([*words, str(tmp_path / "runs")])
    assert_same(tmp_path / "runs" / "001", tmp_path / "whole" / "001")
    for name in ("epoch", "val/loss"):
        values = [
            [row[name] for row in table(root / "001") if row[name]] for root in (tmp_path / "runs", tmp_path / "whole")
        ]
        assert values[0] == values[1], name
    note(
        "stopped twice just after the end of an epoch",
        "the training stops with its traceback",
        "1 step each",
        "its own",
    )


# ----------------------------------------------------------------------------------------------------- disk and memory


def test_a_disk_that_is_full_when_a_checkpoint_is_due(tmp_path, whole, note, heard, monkeypatch):
    def fill(_: Any) -> None:  # what is written there meets a full disk
        (tmp_path / "001" / "checkpoints" / ".step=00000006.ckpt.part").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        at(patch, 6, fill)
        said = stopped(tmp_path)
    assert re.search(r"step=00000006.ckpt could not be written \(the disk is full\): free space .* at step 3\.", said)
    assert steps(tmp_path / "001") == [3]
    assert leftovers(tmp_path / "001") == []
    continues(tmp_path, whole, 3, heard)
    note("disk full while a checkpoint is written", "the training stops, nothing half is left", "3 steps", said)


def test_a_disk_that_is_full_when_metrics_are_due(tmp_path, whole, note, heard, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "001" / "metrics.csv"))

    with monkeypatch.context() as patch:
        at(patch, 5, lambda trainer: patch.setattr(trainer.logger.experiment, "save", refuse))
        said = stopped(tmp_path)
    assert "metrics.csv could not be written (the disk is full)" in said
    continues(tmp_path, whole, 3, heard)
    note("disk full while metrics are written", "the training stops", "2 steps", said)


def test_a_read_only_folder_for_runs(tmp_path, note, monkeypatch):
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root writes where nobody else may, so that the refusal is injected
    said = stopped(tmp_path / "runs")
    assert re.search(r"runs could not be used \(the disk is read-only\): choose another folder", said)
    assert not (tmp_path / "runs").exists()
    note("read-only folder for runs", "refused before training", "nothing", said)


def test_no_space_for_cached_tables_costs_time_only(tmp_path, note, monkeypatch):
    def fill(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path))
    monkeypatch.setattr("allpet.disk_cache.np.save", fill)
    with pytest.warns(UserWarning, match="No space left .*; set ALLPET_CACHE to a writable folder") as said:
        store("table", {"of": "tests"}, [torch.zeros(3).numpy()])
    assert list(tmp_path.iterdir()) == []
    note("no space for cached tables", "they are made anew in every run", "nothing", str(said[0].message))


def test_no_space_for_simulated_slices(tmp_path, note):
    cache = SliceCache(tmp_path, lambda patient: {"sinogram": torch.zeros(1, 2, 2).numpy()}, 1)
    (tmp_path / "00000.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"00000.h5: it cannot be written .*; free space, or name another") as said:
        cache.fill(2, workers=0)
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.h5"))
    note("no space for simulated slices", "refused, no file is left", "the slices of one file", str(said.value))


def test_too_little_memory_names_the_batch_that_may_fit(tmp_path, whole, note, heard, monkeypatch):
    with monkeypatch.context() as patch:
        at(patch, 5, lambda _: torch.empty(2**60, dtype=torch.uint8))
        said = stopped(tmp_path)
    assert "try --data.batch_size=2 --trainer.accumulate_grad_batches=2, which learns the same" in said
    continues(tmp_path, whole, 3, heard)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "--data.batch_size=3 --trainer.accumulate_grad_batches=5" in faults.in_a_sentence(cuda, 7, 2)
    assert "batches of one" in faults.in_a_sentence(MemoryError(), 1)
    assert faults.in_a_sentence(RuntimeError("shapes differ"), 4) is None
    note("out of memory", "the training stops", "2 steps", said)


# ------------------------------------------------------------------------------------------------------------- the data


def test_a_loss_that_is_no_number(tmp_path, whole, note, heard, monkeypatch):
    def spoil(trainer: Any) -> None:
        next(trainer.lightning_module.parameters()).data.fill_(float("nan"))

    with monkeypatch.context() as patch:
        at(patch, 4, spoil)
        said = stopped(tmp_path)
    assert re.search(r"The loss is nan at step 4: lower --model.learning_rate or check the data .* at step 3\.", said)
    continues(tmp_path, whole, 3, heard)
    note("the loss is NaN", "the training stops", "1 step", said)


def test_weights_that_are_spoilt_are_not_saved(tmp_path, whole, note, heard, monkeypatch):
    def spoil(trainer: Any) -> None:  # by the last step before a checkpoint: no loss has seen it
        next(trainer.lightning_module.parameters()).data.flatten()[0] = float("inf")

    with monkeypatch.context() as patch:
        at(patch, 6, spoil)
        said = stopped(tmp_path)
    assert re.search(
        r"no longer finite at step 6 \(1 of .*\), so nothing is saved: lower .* continues at step 3\.", said
    )
    assert steps(tmp_path / "001") == [3]
    continues(tmp_path, whole, 3, heard)
    note("weights become infinite just before a checkpoint", "the training stops, nothing is saved", "3 steps", said)


def test_a_loader_process_dies(tmp_path, whole, note, heard, monkeypatch):
    def kill(_: Any) -> None:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(worker.pid)
        time.sleep(0.1)

    killed: list[int] = []
    with monkeypatch.context() as patch:
        at(patch, 5, kill)
        said = stopped(tmp_path, "--data.num_workers", "1")
    assert f"Loader process {killed[0]} died, most often for want of memory: use fewer with --data.num_workers" in said
    continues(tmp_path, whole, 3, heard)
    note("a loader process is killed", "the training stops", "2 steps", said.replace(str(killed[0]), "PID"))


STORED = ["--data", "tiny_pet.StoredPET", "--data.folder"]


def test_a_data_file_that_is_open_may_vanish(tmp_path, whole, note, monkeypatch):
    at(monkeypatch, 3, lambda _: (tmp_path / "data" / "00000.h5").unlink())
    fit(tmp_path / "runs", *STORED, str(tmp_path / "data"))
    assert_same(tmp_path / "runs" / "001", whole)
    note("a data file in use is deleted", "the training goes on", "nothing", "none")


def test_a_data_file_vanishes_before_it_is_read(tmp_path, whole, note, heard, monkeypatch):
    """Loader processes open their files anew in every epoch of four batches."""
    words = [*STORED, str(tmp_path / "data"), "--data.num_workers", "1"]
    with monkeypatch.context() as patch:
        at(patch, 4, lambda _: (tmp_path / "data" / "00000.h5").unlink())
        said = stopped(tmp_path / "runs", *words)
    assert re.search(r"00000.h5: it is gone or damaged .*; give the same command again, which makes it anew", said)
    fit(tmp_path / "runs", *words)
    assert "continues at step 3" in heard()
    assert_same(tmp_path / "runs" / "001", whole)
    note("a data file is deleted before it is read", "the training stops; the file is made anew", "1 step", said)


# -------------------------------------------------------------------------------------------------------- files at rest


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(("spoil", "fault"), [(cut, "truncated"), (flip, "changed by one bit")])
def test_a_checkpoint_is_damaged(spoil, fault, half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    spoil(run / "checkpoints" / "step=00000006.ckpt")
    said = continues(tmp_path / "runs", whole, 3, heard)
    (sentence,) = [line for line in said.splitlines() if "is damaged" in line]
    assert (run / "checkpoints" / "step=00000006.damaged").exists()
    note(f"the newest checkpoint is {fault}", "the one before it is used", "3 steps more", sentence)


def test_all_checkpoints_are_damaged(half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    for path in (run / "checkpoints").glob("step=*.ckpt"):
        cut(path)
    assert continues(tmp_path / "runs", whole, 0, heard).count("is damaged") == 2
    note("all checkpoints are truncated", "the training starts anew", "all steps", "a sentence for each")


def test_a_record_that_cannot_be_read(half, tmp_path, note, heard):
    run = copy_of(half, tmp_path / "runs")
    (run / "run.json").write_bytes(b"\0" * 40)
    fit(tmp_path / "runs", "--trainer.max_steps", "1")
    said = f"{run} has checkpoints but no readable run.json: its training is not continued."
    assert said in heard()
    assert finished(tmp_path / "runs" / "002") == 1
    assert steps(run) == [3, 6]
    note("run.json is damaged", "another run starts, the old one stays", "its steps, until it is repaired", said)


def test_a_run_whose_folder_was_only_made(tmp_path, whole, note, heard):
    (tmp_path / "runs" / "001").mkdir(parents=True)
    fit(tmp_path / "runs")
    assert_same(tmp_path / "runs" / "002", whole)
    note("SIGKILL while the run's folder is made", "the next number is taken", "nothing", "none")


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows(run: Path) -> list[int]:
    return [int(row["step"]) for row in table(run) if row.get("train/loss")]


def test_metrics_with_zeros_and_half_a_line(half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    with (run / "metrics.csv").open("ab") as file:
        file.write(b"\0" * 512 + b"1,2,\xff")
    continues(tmp_path / "runs", whole, 6, heard)
    assert rows(run) == list(range(8))
    note("metrics.csv ends in zeros and half a line", "they are dropped", "nothing", "none")


def test_metrics_that_are_no_table(half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    (run / "metrics.csv").write_bytes(b"\xfe\0\1noise" * 100)
    said = continues(tmp_path / "runs", whole, 6, heard)
    (sentence,) = [line for line in said.splitlines() if "metrics.csv is damaged" in line]
    assert rows(run) == [6, 7]
    note("metrics.csv is no table", "it is put aside", "the metrics so far", sentence)


def test_folders_of_the_run_are_missing(tmp_path, note, monkeypatch):
    words = [*VAE, "--run.root", str(tmp_path), "--trainer.max_steps", "6"]
    run = tmp_path / "001"
    with monkeypatch.context() as patch:
        at(patch, 5, bug)
        with pytest.raises(Bug):
            main(words)
    (run / "config.yaml").unlink()
    (run / "panels").rename(tmp_path / "panels")
    main(words)
    assert (run / "config.yaml").exists()
    assert (run / "panels" / "step-00000006.png").exists()
    note("panels/ and config.yaml are missing", "they are made anew", "the old pictures", "none")


# ------------------------------------------------------------------------------------------------- what does not belong


def test_two_processes_and_one_run(half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    held = runs.Run(run, {}).lock()
    said = stopped(tmp_path / "runs")
    assert re.search(r"001 is being trained by another process: wait for it, or add --run.resume=false", said)
    assert steps(run) == [3, 6]
    held.release()
    continues(tmp_path / "runs", whole, 6, heard)
    note("two processes train one run", "the second is refused", "nothing", said)


def test_the_configuration_changed(half, tmp_path, whole, note, heard):
    run = copy_of(half, tmp_path / "runs")
    fit(tmp_path / "runs", "--model.learning_rate", "0.01", "--trainer.max_steps", "1")
    assert finished(tmp_path / "runs" / "002") == 1
    assert finished(run) is None
    heard()
    fit(tmp_path / "runs")
    assert "001 continues at step 6." in heard()
    assert_same(run, whole)
    note(
        "the configuration changed", "another run starts, the old one continues when it is asked for", "nothing", "none"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "tiny_pet.Remembering"], "is of AutoencoderSystem, but Remembering is trained: name a"),
        (["--scale", "{widths: [8, 8]}"], r"holds other networks \(\d+ weights differ, such as \S+\): give the sizes"),
    ],
)
def test_a_checkpoint_of_something_else(words, expected, half, tmp_path, note):
    network = ["--model.autoencoder", '{"class_path": "allpet.Autoencoder", "init_args": {"channels": [8, 16]}}']
    more = network if "--model" in words else []
    checkpoint = str(half / "001" / "checkpoints" / "step=00000006.ckpt")
    said = stopped(tmp_path / "runs", *words, *more, "--ckpt_path", checkpoint)
    assert re.search(expected, said), said
    note(f"a checkpoint of {'another class' if more else 'other sizes'}", "refused", "nothing", said)


def test_weights_to_build_on_are_truncated(whole, tmp_path, note):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((whole / "pretrained" / name).read_bytes())
    cut(folder / "model.safetensors")
    said = stopped(
        tmp_path / "ldm", "-c", str(Path(__file__).parent / "tiny_ldm.yaml"), "--model.autoencoder", str(folder)
    )
    assert re.search(r"weights is damaged \(.*\): export the model again, or download it anew\.", said)
    note("the weights to build on are truncated", "refused before training", "nothing", said)


def test_clock_and_time_zone_do_not_matter(tmp_path, note, monkeypatch):
    first = runs.create_run(tmp_path, "key")
    first.update(created="2999-01-01T00:00:00.000000+00:00")  # the clock was wrong then, and is set back now
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    second = runs.create_run(tmp_path, "key")
    monkeypatch.undo()
    time.tzset()
    assert runs.find_run(tmp_path, "key") == second
    note("the clock is set back, the time zone changed", "the run made last is the newest", "nothing", "none")

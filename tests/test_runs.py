from __future__ import annotations

import csv

import pytest
import torch

from allpet import runs
from allpet.run_files import AtomicCheckpointIO, RunCSVLogger, trim_metrics

CONFIG = {
    "seed_everything": 0,
    "trainer": {"max_steps": 10, "max_time": None, "precision": "32", "logger": None, "callbacks": [{"decay": 0.9}]},
    "model": {"class_path": "M", "init_args": {"width": 8, "autoencoder": "outputs/vae"}},
    "data": {"class_path": "D", "init_args": {"folder": "/a", "batch_size": 4}},
    "run": {"root": "outputs/vae"},
}


def changed(path: str, value: object) -> dict:
    *parents, last = path.split(".")
    config = {key: dict(part) if isinstance(part, dict) else part for key, part in CONFIG.items()}
    part = config
    for parent in parents:
        part[parent] = dict(part[parent])
        part = part[parent]
    part[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainer.max_steps", 20),
        ("trainer.max_time", "00:01:00:00"),
        ("trainer.logger", {"class_path": "WandbLogger"}),
        ("data.init_args.folder", "/b"),
        ("run.root", "elsewhere"),
        ("model.init_args.sampling", {"steps": 20}),
    ],
)
def test_length_loggers_and_paths_do_not_make_another_run(path, value):
    assert runs.fingerprint(changed(path, value), "data") == runs.fingerprint(CONFIG, "data")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainer.precision", "bf16-mixed"),
        ("trainer.callbacks", []),
        ("model.init_args.width", 16),
        ("data.init_args.batch_size", 8),
        ("seed_everything", 1),
    ],
)
def test_what_is_trained_makes_another_run(path, value):
    assert runs.fingerprint(changed(path, value), "data") != runs.fingerprint(CONFIG, "data")


def test_data_and_weights_make_another_run():
    keys = {runs.fingerprint(CONFIG, data, weights) for data in ("a", "b") for weights in ("", "c", "d")}
    assert len(keys) == 6


def test_weights_count_and_not_the_folder_they_lie_in():
    moved = changed("model.init_args.autoencoder", "elsewhere")
    assert runs.fingerprint(moved, "data", "weights") == runs.fingerprint(CONFIG, "data", "weights")
    assert runs.fingerprint(moved, "data") != runs.fingerprint(CONFIG, "data")


def test_runs_are_numbered_and_the_newest_of_a_fingerprint_is_found(tmp_path):
    made = [runs.create_run(tmp_path, key) for key in ("a", "b", "a")]
    assert [run.folder.name for run in made] == ["001", "002", "003"]
    assert runs.find_run(tmp_path, "a") == made[2]
    assert runs.find_run(tmp_path, "b") == made[1]
    assert runs.find_run(tmp_path, "c") is None
    assert runs.list_runs(tmp_path) == made
    assert runs.list_runs(tmp_path / "nothing") == []


def test_a_name_is_taken_once(tmp_path):
    assert runs.create_run(tmp_path, name="mine").folder == tmp_path / "mine"
    with pytest.raises(FileExistsError, match="choose another"):
        runs.create_run(tmp_path, name="mine")


def test_a_folder_without_a_readable_record_is_no_run_and_keeps_its_number(tmp_path):
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "run.json").write_text("{")
    assert runs.create_run(tmp_path).folder.name == "002"
    assert len(runs.list_runs(tmp_path)) == 1


def test_a_run_is_held_by_one_process_at_a_time(tmp_path):
    run = runs.create_run(tmp_path)
    lock = run.lock()
    with pytest.raises(RuntimeError, match="another process"):
        runs.Run(run.folder, run.record).lock()
    lock.release()
    run.lock().release()


def finish(run: runs.Run) -> runs.Run:
    run.pretrained.mkdir()
    (run.pretrained / "config.json").write_text("{}")
    (run.pretrained / "model.safetensors").write_bytes(run.folder.name.encode())
    return run


def test_newest_pretrained_is_of_a_finished_run_of_the_same_data(tmp_path):
    mine, other = (
        finish(runs.create_run(tmp_path, data_hash="mine")),
        finish(runs.create_run(tmp_path, data_hash="other")),
    )
    runs.create_run(tmp_path, data_hash="mine")  # has not finished
    assert runs.newest_pretrained(tmp_path) == other.pretrained
    assert runs.newest_pretrained(tmp_path, "mine") == mine.pretrained
    assert runs.newest_pretrained(mine.folder, "other") == mine.pretrained  # a run that is named is meant
    assert runs.newest_pretrained(mine.pretrained, "other") == mine.pretrained
    with pytest.raises(FileNotFoundError, match="003 has not finished; 002 was trained on other data; 001 was trained"):
        runs.newest_pretrained(tmp_path, "third")
    with pytest.raises(FileNotFoundError, match="none at all"):
        runs.newest_pretrained(tmp_path / "nothing")
    assert runs.weights_hash(mine.pretrained) != runs.weights_hash(other.pretrained)


def save_checkpoints(folder, *steps: int) -> None:
    for step in steps:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), step)}, folder / f"step={step:08d}.ckpt")


def test_the_newest_whole_checkpoint_is_used(tmp_path, capsys):
    save_checkpoints(tmp_path, 5, 10, 15)
    (tmp_path / "last.ckpt").symlink_to("step=00000015.ckpt")
    newest, middle, oldest = (tmp_path / f"step={step:08d}.ckpt" for step in (15, 10, 5))
    assert runs.usable_checkpoint(tmp_path) == (newest, 15)
    assert runs.usable_checkpoint(tmp_path, before_step=15) == (middle, 10)
    with newest.open("r+b") as file:  # cut off, as by a full disk
        file.truncate(newest.stat().st_size - 100)
    assert runs.usable_checkpoint(tmp_path) == (middle, 10)
    data = bytearray(middle.read_bytes())  # one bit of the weights flipped
    data[data.find(torch.full((2,), 10).numpy().tobytes()) + 80] ^= 1
    middle.write_bytes(data)
    assert runs.usable_checkpoint(tmp_path) == (oldest, 5)
    assert capsys.readouterr().out.count("is damaged") == 2
    oldest.write_bytes(b"")
    assert runs.usable_checkpoint(tmp_path) is None


def test_a_checkpoint_that_could_not_be_written_leaves_the_old_one(tmp_path):
    save_checkpoints(tmp_path, 5)
    path = tmp_path / "step=00000005.ckpt"
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3), "bad": lambda: None}, path)
    assert path.read_bytes() == before
    assert runs.usable_checkpoint(tmp_path) == (path, 5)


def test_metrics_after_a_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step,val\n1.0,0,\n0.9,1,2.0\n0.8,2,\n0.7,,\n0.8,1")  # the last line was cut off
    trim_metrics(path, 2)
    assert path.read_text().split() == ["loss,step,val", "1.0,0,", "0.9,1,2.0"]
    trim_metrics(tmp_path / "nothing.csv", 2)


def test_metrics_are_added_to_those_there(tmp_path):
    for step, values in enumerate([{"a": 1.0}, {"b": 2.0}, {"a": 3.0, "c": 4.0}]):
        logger = RunCSVLogger(tmp_path)
        logger.log_metrics(values, step)
        logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == [{"a": "1.0", "step": "0"}, {"b": "2.0", "step": "1"}, {"a": "3.0", "c": "4.0", "step": "2"}]

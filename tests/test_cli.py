from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import allpet
from allpet import cli
from allpet.cli import main, with_nulls

HERE = Path(__file__).parent
SAMPLE = ["predict", "-c", str(HERE.parent / "experiments" / "sample.yaml")]
VAE = ["fit", "-c", str(HERE / "tiny_vae.yaml")]


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """One thread, so that numbers repeat, and a command line of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["allpet"])
        patch.setenv("WANDB_SILENT", "true")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def fit(root, *options: str) -> None:
    main([*VAE, "--run.root", str(root), "--trainer.enable_progress_bar", "false", *options])


def allpet_process(*words: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "allpet", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def scores(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        rows = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k.startswith(("val/", "train/", "step"))} for row in rows]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The root of one finished stage 1."""
    root = tmp_path_factory.mktemp("outputs") / "vae"
    fit(root)
    return root


def test_a_run_leaves_everything_in_its_folder(vae):
    run = vae / "001"
    left = {path.name for path in run.iterdir()}
    assert {"run.json", "config.yaml", "metrics.csv", "checkpoints", "panels", "pretrained"} <= left
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step=00000006.ckpt",
        "step=00000008.ckpt",
    ]
    assert [path.name for path in sorted((run / "panels").iterdir())] == [f"step-{step:08d}.png" for step in (3, 6, 8)]
    assert json.loads((run / "run.json").read_text())["finished"]["step"] == 8
    steps = {int(row["step"]) for row in scores(run) if row["train/loss"]}
    assert steps == set(range(8))


def test_the_snapshot_is_resolved_and_finds_its_own_run(vae, capsys):
    snapshot = vae / "001" / "config.yaml"
    config = yaml.safe_load(snapshot.read_text())
    assert config["model"]["init_args"]["autoencoder"]["init_args"]["channels"] == [8, 16]
    main(["fit", "-c", str(snapshot)])
    assert [path.name for path in vae.iterdir()] == ["001"]


def test_the_exported_weights_are_averaged_ones_with_their_statistics(vae):
    run = vae / "001"
    checkpoint = torch.load(run / "checkpoints" / "step=00000008.ckpt", weights_only=True)
    exported = load_file(run / "pretrained" / "model.safetensors")
    name = next(name for name in exported if name.endswith("conv_in.weight"))
    torch.testing.assert_close(exported[name], checkpoint["state_dict"][f"autoencoder.{name}"])
    assert not torch.equal(exported[name], checkpoint["current_model_state"][f"autoencoder.{name}"])
    assert (exported["latent_std"] != 1).all()


def test_the_same_command_again_does_nothing_more(vae, capsys):
    before = (vae / "001" / "run.json").stat().st_mtime_ns
    fit(vae)
    assert (vae / "001" / "run.json").stat().st_mtime_ns == before
    assert [path.name for path in vae.iterdir()] == ["001"]


def test_another_configuration_or_other_data_make_another_run(vae, tmp_path):
    fit(tmp_path, "--trainer.max_steps", "1")
    fit(tmp_path, "--trainer.max_steps", "1", "--model.learning_rate", "0.01")
    fit(tmp_path, "--trainer.max_steps", "1", "--data.disc_mm", "50")
    fit(tmp_path, "--trainer.max_steps", "1", "--run.resume", "false")
    fit(tmp_path, "--trainer.max_steps", "2")  # continues the newest of its kind
    finished = [json.loads((tmp_path / f"00{i}" / "run.json").read_text())["finished"]["step"] for i in (1, 2, 3, 4)]
    assert finished == [1, 1, 1, 2]
    assert not (tmp_path / "005").exists()


def test_a_killed_training_continues_as_if_it_had_not_been(vae, tmp_path):
    words = [*VAE, "--run.root", str(tmp_path)]
    killed = allpet_process(*words, KILL_AT="5")
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "001"
    assert not (run / "pretrained").exists()
    again = allpet_process(*words)
    assert again.returncode == 0, again.stderr
    assert "continues at step 3" in again.stderr + again.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["001"]
    mine, theirs = (load_file(folder / "pretrained" / "model.safetensors") for folder in (run, vae / "001"))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=0, msg=name)
    assert scores(run) == scores(vae / "001")


@pytest.mark.slow
def test_two_processes_share_one_run(tmp_path):
    words = [*VAE, "--run.root", str(tmp_path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for steps, said in ((4, "starts"), (6, "continues at step 4")):
        both = allpet_process(*words, "--trainer.max_steps", str(steps))
        assert both.returncode == 0, both.stderr
        assert said in both.stdout + both.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["001"]
    assert json.loads((tmp_path / "001" / "run.json").read_text())["finished"]["step"] == 6
    assert (tmp_path / "001" / "pretrained" / "model.safetensors").is_file()


def test_a_damaged_checkpoint_costs_one_interval(vae, tmp_path, capsys):
    fit(tmp_path, "--trainer.max_steps", "6")
    newest = tmp_path / "001" / "checkpoints" / "step=00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    fit(tmp_path)
    assert "is damaged" in capsys.readouterr().out
    assert json.loads((tmp_path / "001" / "run.json").read_text())["finished"]["step"] == 8


def test_a_run_killed_while_it_exported_exports_again(tmp_path):
    fit(tmp_path)
    run = tmp_path / "001"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": None}))
    before = load_file(run / "pretrained" / "model.safetensors")
    for path in (run / "pretrained").iterdir():
        path.unlink()
    (run / "pretrained").rmdir()
    fit(tmp_path)
    after = load_file(run / "pretrained" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_stage_2_builds_on_the_newest_stage_1_of_its_data_and_samples(vae, tmp_path, capsys):
    words = [
        "fit",
        "-c",
        str(HERE / "tiny_vae.yaml"),
        "-c",
        str(HERE / "tiny_ldm.yaml"),
        "--model.autoencoder",
        str(vae),
    ]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "3", "--run.root", str(tmp_path / "ldm")]
    with pytest.raises(SystemExit, match="001 was trained on other data"):
        main([*words, "--data.n_slices", "20"])
    assert not (tmp_path / "ldm").exists()
    main(words)
    config = yaml.safe_load((tmp_path / "ldm" / "001" / "config.yaml").read_text())
    assert config["model"]["init_args"]["autoencoder"] == str(vae / "001" / "pretrained")

    sample = [
        "predict",
        "-c",
        str(HERE.parent / "experiments" / "sample.yaml"),
        "--run.root",
        str(tmp_path / "samples"),
    ]
    sample += ["--model.folder", str(tmp_path / "ldm"), "--model.sampling.steps", "3", "--trainer.accelerator", "cpu"]
    main([*sample, "--data.n_samples", "5", "--data.batch_size", "2", "--data.prompts", '["FDG:brain", "PSMA:open"]'])
    main([*sample, "--data.n_samples", "1", "--data.seed", "1", "--data.prompts", '["PSMA:open"]'])
    with (
        h5py.File(tmp_path / "samples" / "001" / "samples.h5") as five,
        h5py.File(tmp_path / "samples" / "002" / "samples.h5") as one,
    ):
        assert five.attrs["provenance"] == "synthetic"
        assert five["sinogram"].shape == (5, 16, 16)
        assert five["image"].shape == (5, 16, 16)
        names = five["prompt"].asstr()[:].tolist()
        assert names[::2] == ["FDG:brain"] * 3
        assert set(names[1::2]) <= {"PSMA:abdomen", "PSMA:chest", "PSMA:pelvis"}, "what was left open was drawn"
        assert five["seed"][:].tolist() == [0, 1, 2, 3, 4]
        # alone or in a batch: rounding apart, the sample of seed 1
        in_batch, alone = (torch.tensor(file["sinogram"][index]) for file, index in ((five, 1), (one, 0)))
        torch.testing.assert_close(in_batch, alone, rtol=0, atol=1e-4 * float(alone.max()))
    with Image.open(tmp_path / "samples" / "001" / "transition.gif") as animation:
        assert animation.n_frames == 3
    assert (tmp_path / "samples" / "001" / "gallery.png").stat().st_size > 1000


def test_a_missing_stage_is_refused_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_pet.TinyPET.load", lambda _: pytest.fail("data were read"))
    words = ["fit", "-c", str(HERE / "tiny_vae.yaml"), "-c", str(HERE / "tiny_ldm.yaml")]
    with pytest.raises(SystemExit, match=r"none at all\): train that stage first"):
        main([*words, "--model.autoencoder", str(tmp_path / "vae"), "--run.root", str(tmp_path / "ldm")])
    assert not (tmp_path / "ldm").exists()


def test_sampling_before_stage_2_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="none at all"):
        main([*SAMPLE, "--run.root", str(tmp_path), "--model.folder", str(tmp_path / "ldm")])


def test_a_run_folder_can_be_tested(vae, capsys):
    run = vae / "001"
    weights = str(run / "checkpoints" / "last.ckpt")
    main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", weights, "--trainer.enable_progress_bar", "false"])
    assert "test/relative_l2" in capsys.readouterr().out
    assert [path.name for path in vae.iterdir()] == ["001"]
    system = allpet.AutoencoderSystem.from_pretrained(run / "pretrained")
    assert system.geometry is not None


def test_the_command_line_wins_over_a_checkpoint(tmp_path):
    """Lightning lets the hyper-parameters in a checkpoint win, silently."""
    network = '{"class_path": "allpet.Autoencoder", "init_args": {"channels": [8, 16]}}'
    options = ["--model", "tiny_pet.Remembering", "--model.autoencoder", network, "--trainer.max_steps"]
    fit(tmp_path, *options, "1", "--model.learning_rate", "0.25")
    checkpoint = tmp_path / "001" / "checkpoints" / "step=00000001.ckpt"
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["learning_rate"] == 0.25
    fit(tmp_path, *options, "2", "--model.learning_rate", "0.5", "--ckpt_path", str(checkpoint))
    newer = torch.load(tmp_path / "002" / "checkpoints" / "step=00000002.ckpt", weights_only=True)
    assert newer["hyper_parameters"]["learning_rate"] == 0.5


def test_a_continued_run_names_no_checkpoint_in_its_snapshot(tmp_path):
    fit(tmp_path, "--trainer.max_steps", "1")
    fit(tmp_path, "--trainer.max_steps", "2")
    assert yaml.safe_load((tmp_path / "001" / "config.yaml").read_text())["ckpt_path"] is None


def test_a_budget_below_what_was_trained_loses_nothing(tmp_path, capsys):
    killed = allpet_process(*VAE, "--run.root", str(tmp_path), KILL_AT="7")
    assert killed.returncode == -signal.SIGKILL
    before = (tmp_path / "001" / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit, match=r"already trained 6 steps, more than --trainer.max_steps=4: .*resume=false"):
        fit(tmp_path, "--trainer.max_steps", "4")
    assert (tmp_path / "001" / "metrics.csv").read_bytes() == before
    assert (tmp_path / "001" / "checkpoints" / "step=00000006.ckpt").exists()


def test_a_checkpoint_named_for_a_run_that_has_its_own_is_refused(tmp_path):
    fit(tmp_path, "--trainer.max_steps", "1")
    checkpoint = tmp_path / "001" / "checkpoints" / "step=00000001.ckpt"
    with pytest.raises(SystemExit, match="continues from its own checkpoint: leave out --ckpt_path"):
        fit(tmp_path, "--trainer.max_steps", "2", "--ckpt_path", str(checkpoint))


def test_a_loss_that_is_no_number_stops_the_run_and_spoils_no_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match=r"The loss is (nan|inf) at step \d+: lower --model.learning_rate"):
        fit(tmp_path, "--model.learning_rate", "1e30")
    run = tmp_path / "001"
    assert json.loads((run / "run.json").read_text())["finished"] is None
    assert not (run / "pretrained").exists()
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_training_without_loggers_runs(tmp_path):
    watch = "lightning.pytorch.callbacks.LearningRateMonitor"
    fit(tmp_path, "--trainer.max_steps", "1", "--trainer.logger", "false", f"--trainer.callbacks+={watch}")
    assert (tmp_path / "001" / "pretrained").exists()


def test_unusable_data_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", np.ones((16, 16), dtype=np.float32))
    np.save(folder / "broken.npy", np.full((16, 16), np.nan, dtype=np.float32))
    (folder / "cut.npy").write_bytes(b"no array")
    np.save(folder / "wide.npy", np.ones((16, 20), dtype=np.float32))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "vae", "--data", "data_modules.SinogramFiles", "--data.folder", str(folder))
    assert all(name in str(stop.value) for name in ("broken.npy", "cut.npy", "wide.npy"))
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "vae").exists()


def test_wandb_offline_keeps_every_run_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for rate in ("0.001", "0.002"):
        fit(tmp_path, "--trainer.max_steps", "1", "--trainer.logger", "WandbLogger", "--model.learning_rate", rate)
    for number, rate in (("001", 0.001), ("002", 0.002)):
        run = tmp_path / number
        assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["learning_rate"] == rate
        assert len(list((run / "wandb").glob("offline-run-*"))) == 1
        assert scores(run)


def test_loggers_that_leave_the_machine_get_no_path_and_no_name():
    config = {"data": {"class_path": "x", "init_args": {"folder": "/a/b", "patient": "p_*", "seed": 3}}, "model": {}}
    sent = cli._without_paths_and_names(config)
    assert sent["data"]["init_args"] == {"seed": 3}
    assert config["data"]["init_args"]["folder"] == "/a/b"
    assert cli._without_paths_and_names({"model": {}}) == {"model": {}}


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "vae", "--trainer.fast_dev_run", "true")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [["--model.learning_rat", "1"], ["--trainer.max_stepss", "1"], ["--data.n_slices", "many"]]
)
def test_a_wrong_option_is_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *wrong)
    assert stop.value.code == 2
    assert wrong[0].split(".")[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.n_slices", "many"], "--data.n_slices is many, but must be int."),
        (["--model.learning_rate", "fast"], "--model.learning_rate is fast, but must be float."),
        (["--trainer.max_steps", "x"], "--trainer.max_steps is x, but must be int."),
        (["--model.learning_rat", "1"], "has no option learning_rat; see --help"),
        (["--trainer.max_stepss", "1"], "unrecognized arguments: --trainer.max_stepss 1"),
        (["-c", "nowhere.yaml"], "File does not exist: "),
    ],
)
def test_what_is_wrong_with_an_option_is_said_in_one_line(words, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *words)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("allpet: ")
    assert said.count("\n") == 1
    assert sentence in said


def test_a_wrong_key_in_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("trainer: {max_stepss: 3}\n")
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, "-c", str(tmp_path / "wrong.yaml"))
    assert stop.value.code == 2
    assert "max_stepss" in capsys.readouterr().err


def test_print_config_prints_what_would_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*VAE, "--model.learning_rate", "0.5", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["learning_rate"] == 0.5


@pytest.mark.parametrize("null", ["null", "None", "~"])
def test_what_lies_deep_in_a_model_can_be_set_to_null(null, capsys):
    words = ["--model.autoencoder.channels=[4,8]", f"--model.autoencoder.range_order={null}"]
    words += ["--model.autoencoder.init_args.range_order", null, "--model.autoencoder.patch", "2", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main([*VAE, "--model.autoencoder.range_order=3", *words])
    assert stop.value.code == 0
    network = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["autoencoder"]["init_args"]
    assert network["range_order"] is None
    assert network["channels"] == [4, 8]
    assert network["patch"] == 2


def test_only_deep_nulls_are_spelled_anew():
    words = [
        "fit",
        "--data.symmetry=null",
        "--model.a.b=0",
        "--trainer.logger=null",
        "--model.a.b",
        "1",
        "--model.a.b.c",
    ]
    assert with_nulls(words) == words
    assert with_nulls(["--model.a.b", "--data.x.y", "null"]) == ["--model.a.b", "--data.x={y: null}"]
    assert with_nulls(["--data.x.y"]) == ["--data.x.y"]
    assert with_nulls(["--model.a.b.c=null", "--data.x.y", "null"]) == [
        "--model.a={b: {c: null}}",
        "--data.x={y: null}",
    ]


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["predict", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out

"""Sweeps: every point of every file is a training that parses, and the grid is walked the same with and without W&B."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from allpet.cli import AllpetCLI, prepare
from allpet.simulation.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import sweep as runner
import sweep_point
from studies.sweeps import FOLDER, changed, command_line, points, read_sweep
from sweep_point import read_point

ROOT = Path(__file__).parents[1]
SWEEPS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


class Parsed(AllpetCLI):
    """Parses, and builds nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def as_wandb_has_it(sweep: dict, point: dict) -> list[str]:
    """The words that W&B's agent runs: its own expansion, put together as it does."""
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    macros |= {"interpreter": ["python"], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    words = create_sweep_command(copy.deepcopy(sweep["command"]))
    return [one for word in words for one in (macros[word[2:-1]] if word.startswith("${") else [word])]


def test_there_is_a_sweep_for_the_curve_and_for_every_task():
    assert set(SWEEPS) == {"few_shot", *TASKS}
    with pytest.raises(ValueError, match="no sweep 'none': choose one of attenuation"):
        read_sweep("none")


@pytest.mark.parametrize("name", SWEEPS)
def test_the_grid_and_its_command_lines_are_those_of_wandb(name):
    sweep = read_sweep(name)
    grid = points(sweep)
    values = [given["values"] for given in sweep["parameters"].values()]
    assert sorted(tuple(point.values()) for point in grid) == sorted(itertools.product(*values))
    for point in grid:
        assert command_line(sweep, point) == as_wandb_has_it(sweep, point)
    assert [point["seed"] for point in grid] == sorted(point["seed"] for point in grid), "a curve is whole early"
    folders = {read_point(runner._options(command_line(sweep, point))).folder for point in grid}
    assert len(folders) == len(grid)


@pytest.fixture(scope="module")
def parser():
    """That of ``allpet fit``, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["allpet"])
        prepare()
        files = [
            word for name in ("defaults", "vae", "scale/laptop") for word in ("-c", f"{FOLDER.parent}/{name}.yaml")
        ]
        yield Parsed(["fit", *files])._parser("fit")


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize(
    "which", [pytest.param(0, id="first seed"), pytest.param(slice(1, None), id="other seeds", marks=pytest.mark.slow)]
)
def test_every_point_is_a_training_that_parses(name, which, parser):
    sweep = read_sweep(name)
    seeds = sweep["parameters"]["seed"]["values"]
    seeds = seeds[which] if isinstance(which, slice) else [seeds[which]]
    for point in (point for point in points(sweep) if point["seed"] in seeds):
        read = read_point(runner._options(command_line(sweep, point)))
        for stage in read.stages:
            config = parser.parse_args(read.words(stage)[1:])
            assert config.data.init_args.num_scans == point["data.num_scans"]
            assert (config.seed_everything, config.model.init_args.seed, config.data.init_args.seed) == (
                point["seed"],
            ) * 3
            if "model.bridge.gamma" in point:
                assert config.model.init_args.bridge.gamma == point["model.bridge.gamma"]
            if stage == "ldm":
                assert config.model.init_args.autoencoder == str(read.folder / "vae")
            if stage == "bridge":
                assert config.data.init_args.task == name


def test_options_fix_sweep_and_go_to_one_stage_alone():
    values = runner.read_values(["--sizes", "10", "20", "--seeds=3", "--vae-steps", "5", "--vae.model.kl_weight=1e-3"])
    assert values == {
        "data.num_scans": [10, 20],
        "seed": [3],
        "vae-steps": [5],
        "vae.model.kl_weight": [1e-3] if isinstance(values["vae.model.kl_weight"][0], float) else ["1e-3"],
    }
    sweep = changed(read_sweep("few_shot"), values)
    grid = points(sweep)
    assert [(point["data.num_scans"], point["seed"]) for point in grid] == [(10, 3), (20, 3)]
    point = read_point(runner._options(command_line(sweep, grid[0])))
    assert {"--trainer.max_steps=5", "--model.kl_weight=1e-3"} <= set(point.words("vae"))
    assert not [word for word in point.words("ldm") if "max_steps" in word or "kl_weight" in word]
    assert runner.swept(sweep) == ["data.num_scans", "seed"]
    swept_further = changed(read_sweep("delayed"), {"model.bridge.gamma": [0.1, 1.0]})
    assert len(points(swept_further)) == 18
    for wrong, said in (
        (["10"], "belongs to no option"),
        (["--sizes"], "has no value"),
        (["-c", "x"], "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            runner.read_values(wrong)


def test_an_account_is_a_key_or_a_login_and_nothing_else_asks_for_the_network(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not runner.has_account()
    (tmp_path / "netrc").write_text("machine elsewhere login user password x\n")
    assert not runner.has_account()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert runner.has_account()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not runner.has_account()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert runner.has_account()


def walk(tmp_path: Path, *words: str) -> None:
    where = ["--output", str(tmp_path / "sweeps"), "--reports", str(tmp_path / "reports")]
    runner.main(
        [
            "low_dose",
            "--offline",
            "--sizes",
            "10",
            "20",
            "--seeds",
            "0",
            "1",
            "--model.bridge.gamma",
            "0.1",
            *where,
            *words,
        ]
    )


def test_a_sweep_that_was_stopped_goes_on_and_draws_its_curve(tmp_path, monkeypatch):
    ran: list[list[str]] = []

    def run(command, **options):
        ran.append(command)
        point = read_point(runner._options(command))
        if len(ran) == 3:
            return subprocess.CompletedProcess(command, -9)
        size = int(next(word for word in command if word.startswith("--data.num_scans")).split("=")[1])
        point.folder.mkdir(parents=True)
        numbers = {"psnr": 20 + size + point.options.seed, "psnr_input": 15.0, "relative_l2": 1 / size, "val_loss": 0.1}
        (point.folder / "metrics.json").write_text(json.dumps(numbers))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"The point num_scans10-seed1-gamma0\.1 ended with -9"):
        walk(tmp_path)
    walk(tmp_path)
    assert len(ran) == 5, "two had finished, one was killed, two were left"
    assert ran[2] == ran[3]
    walk(tmp_path)
    assert len(ran) == 5
    report = json.loads((tmp_path / "reports" / "sweep_low_dose.json").read_text())
    assert [(row["data.num_scans"], row["seed"]) for row in report["rows"]] == [(10, 0), (20, 0), (10, 1), (20, 1)]
    assert [line["psnr"] for line in report["summary"]] == ["30.5 ± 0.71", "40.5 ± 0.71"]
    assert report["seeds"] == [0, 1]
    assert not report["not_run"]
    figure = runner.curves(report["rows"], ["model.bridge.gamma"], {"psnr": "PSNR"})
    line, points_drawn, dashed = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[10, 30.5], [20, 40.5]]
    assert sorted(map(tuple, points_drawn.get_xydata().tolist())) == [(10, 30), (10, 31), (20, 40), (20, 41)]
    assert set(dashed.get_ydata()) == {15.0}
    assert (tmp_path / "reports" / "sweep_low_dose.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="another bridge-steps"):
        walk(tmp_path, "--bridge-steps", "7")


def test_with_an_account_the_sweep_is_created_and_its_agent_walks_it(tmp_path, monkeypatch):
    created: list[dict] = []

    def run(command, **options):
        assert command == [sys.executable, "-m", "wandb", "agent", "--project", "mine", "abc"]
        assert options["env"]["PATH"].startswith(str(Path(sys.executable).parent)), "agents call for python"
        folder = read_point(runner._options(command_line(created[0], points(created[0])[0]))).folder
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"psnr": 20.0, "relative_l2": 0.1, "val_loss": 0.1}))

    monkeypatch.setattr(runner, "has_account", lambda: True)
    monkeypatch.setattr(runner.subprocess, "run", run)
    wandb = types.SimpleNamespace(sweep=lambda sweep, project: created.append(sweep) or "abc")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    where = ["--output", str(tmp_path / "sweeps"), "--reports", str(tmp_path), "--project", "mine"]
    runner.main(["delayed", "--sizes", "10", "20", "--seeds", "0", *where])
    assert created[0]["parameters"]["data.num_scans"] == {"values": [10, 20]}
    report = json.loads((tmp_path / "sweep_delayed.json").read_text())
    assert [row["data.num_scans"] for row in report["rows"]] == [10]
    assert report["not_run"] == ["num_scans20-seed0"]


@pytest.mark.parametrize("agent", [False, True])
def test_a_point_keeps_its_numbers_and_tells_the_agent_that_asked(agent, tmp_path, monkeypatch):
    said: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, float]) -> None:
            said.append(numbers)

        def finish(self) -> None:
            said.append("finished")

    trained: list[list[str]] = []
    monkeypatch.setattr(sweep_point, "allpet", trained.append)
    monkeypatch.setattr(sweep_point, "measure_few_shot", lambda point: {"kid_conv": 0.5})
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    (tmp_path / "few_shot" / "num_scans7-seed1").mkdir(parents=True)  # as the trainings leave it
    path = sweep_point.main(["few_shot", "--data.num_scans=7", "--seed=1", f"--output={tmp_path}"])
    assert path == tmp_path / "few_shot" / "num_scans7-seed1" / "metrics.json"
    assert json.loads(path.read_text()) == {"kid_conv": 0.5}
    assert [Path(words[4]).name for words in trained] == ["vae.yaml", "ldm.yaml"]
    assert said == ([{"kid_conv": 0.5}, "finished"] if agent else [])


TINY = (
    "--data.val_patients=2 --data.test_patients=3 --data.batch_size=4 --trainer.accelerator=cpu --model.warmup_steps=1"
)


@pytest.mark.slow
def test_the_curve_of_a_small_sweep(tmp_path):
    words = ["few_shot", "--offline", "--sizes", "8", "12", "--seeds", "0", "--vae-steps", "2", "--ldm-steps", "2"]
    words += ["--sampling-steps", "2", "--output", str(tmp_path / "sweeps"), "--reports", str(tmp_path), *TINY.split()]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "experiments/sweep.py", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    rows = json.loads((tmp_path / "sweep_few_shot.json").read_text())["rows"]
    assert [row["data.num_scans"] for row in rows] == [8, 12]
    assert all(row[name] == row[name] for row in rows for name in runner.SHOWN["few_shot"])

    tasks = ["delayed", "--offline", "--sizes", "8", "--seeds", "0", "--bridge-steps", "2", *TINY.split()]
    stage2 = next((tmp_path / "sweeps" / "few_shot").glob("num_scans12-*/ldm"))
    tasks += ["--model.autoencoder", str(stage2), "--output", str(tmp_path / "sweeps"), "--reports", str(tmp_path)]
    subprocess.run([*command[:2], *tasks], cwd=ROOT, env=environment, check=True, timeout=600)
    row = json.loads((tmp_path / "sweep_delayed.json").read_text())["rows"][0]
    assert row["relative_l2"] > 0
    assert row["psnr"] == row["psnr"]

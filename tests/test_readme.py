"""The README: every command in it is run, with budgets of a few steps, on look-alike data.

In this process and with small networks; ``pytest -m slow`` runs each in a process of its own, at its own size.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, project_copy, run, run_here

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
TINY = (
    "--trainer.max_steps=2 --data.num_scans=16 --data.val_patients=2 --data.test_patients=2 --data.batch_size=8 "
    "--trainer.accelerator=cpu --model.warmup_steps=1"
)
FILES = "-c experiments/defaults.yaml -c experiments/vae.yaml -c experiments/scale/laptop.yaml"
FOLDER = TINY.replace("--data.num_scans=16 --data.val_patients=2 --data.test_patients=2 ", "")
# What is appended to each command so that it ends within seconds; None: run elsewhere, as said.
COMMANDS: dict[str, str | None] = {
    "make demo": "--vae-steps=2 --ldm-steps=2 --sampling-steps=2 --samples=4 --data.num_scans=20 --data.val_patients=2",
    "make help": "",
    "make train-vae": TINY,
    "make train-ldm": TINY,
    "make finetune TASK=low_dose PAIRS=500": TINY.replace("--data.num_scans=16", "--data.num_scans=10"),
    'make finetune TASK=low_dose ARGS="-c experiments/finetune/methods/attention.yaml"': TINY.replace(
        "--data.num_scans=16", "--data.num_scans=10"
    ),
    "make restore TASK=low_dose DATA=my_scans DOSE=0.05 PROMPT=FDG:brain": "--model.sampling.samples=2",
    "make restore METHOD=prior TASK=low_dose DATA=my_scans DOSE=0.05 PROMPT=FDG:brain": "--model.sampling.samples=2",
    "make synthesise TASK=low_dose PAIRS=50 N=450": "--pairs=4 --count=3",
    'make finetune TASK=low_dose PAIRS=50 ARGS="--data.generated=outputs/pairs/low_dose.safetensors"': TINY.replace(
        "--data.num_scans=16", "--data.num_scans=4"
    ),
    "make sample N=16 PROMPT=FDG:brain": "--model.sampling.steps=2",
    "make sample N=16 PROMPT=PSMA:abdomen VIEWS=96 BINS=128 COUNTS=1e6": "--model.sampling.steps=2",
    'make train-vae ARGS="--trainer.max_steps=3000 --data.num_scans=100"': TINY,
    "make train-ldm SCALE=gpu24": None,  # test_experiments parses it; it needs the GPU it is for
    'make train-ldm SCALE=gpu24 ARGS="--trainer.devices 4 --trainer.strategy ddp"': None,  # test_distributed
    'make sweep SWEEP=few_shot ARGS="--sizes 100 500 2000 --seeds 0 1"': None,  # test_sweeps trains a smaller one
    'WANDB_MODE=offline make train-vae ARGS="--trainer.logger=WandbLogger"': TINY,
    f"allpet fit {FILES} --print_config": "",
    "make validate-data DATA=my_scans": "",
    "make train-vae DATA=my_scans KIND=sinogram": FOLDER,
    "make train-ldm DATA=my_scans KIND=sinogram": FOLDER,
    "make evaluate REAL=my_scans FAKE=outputs/samples/001/samples.h5 ENCODER=outputs/vae/001/pretrained": "",
    "make held-out": "--part=train --output=outputs/held_out/test.h5",
    "make test": None,  # this
    "make check": None,  # CI runs it
}
IN_A_PROCESS = (f"allpet fit {FILES} --print_config", "make validate-data DATA=my_scans")


def shell_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_is_known_here():
    assert set(shell_commands()) == set(COMMANDS)


def place_of(folder: Path, small: bool) -> Path:
    """A copy of the project to run in, with a folder of sinograms of three patients in it."""
    place = project_copy(folder, small)
    generator = np.random.default_rng(0)
    bins = np.arange(80) - 39.5
    for patient in range(3):
        (place / "my_scans" / f"patient{patient}").mkdir(parents=True)
        for part in range(4):
            half_width = generator.uniform(15, 30)
            view = 2 * np.sqrt(np.clip(half_width**2 - bins**2, 0, None))
            sinogram = generator.poisson(50 * np.tile(view, (64, 1))).astype(np.float32)
            np.save(place / "my_scans" / f"patient{patient}" / f"slice_{part}.npy", sinogram)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where commands run in this process, with small networks."""
    return place_of(tmp_path_factory.mktemp("readme"), small=True)


@pytest.fixture(scope="module")
def real_place(tmp_path_factory) -> Path:
    """Where commands run as they are given."""
    return place_of(tmp_path_factory.mktemp("readme"), small=False)


def check_commands(place: Path, runner: Callable[[Path, str, str], str]) -> None:
    for command in shell_commands():
        if COMMANDS[command] is not None and command != "make demo":
            runner(place, command, COMMANDS[command])
    assert (place / "outputs/vae/001/pretrained/model.safetensors").is_file()
    assert (place / "outputs/ldm/001/pretrained/model.safetensors").is_file()
    assert (place / "outputs/finetune/low_dose/001/pretrained/model.safetensors").is_file()
    for name in ("gallery.png", "sinograms/patient0/slice_0.h5", "images_std/patient2/slice_3.h5"):
        assert (place / "outputs/restored/001" / name).is_file()
    assert (place / "outputs/restored/002/gallery.png").is_file()
    for name in ("samples.h5", "gallery.png", "transition.gif"):
        assert (place / "outputs/samples/001" / name).is_file()
        assert (place / "outputs/samples/002" / name).is_file()
    assert (place / "outputs/reports/evaluate.html").is_file()


def test_the_commands_work_in_the_order_given(place):
    check_commands(place, run_here)


def test_the_python_example_works(place, monkeypatch):
    monkeypatch.chdir(place)
    exec(PYTHON.replace("steps=20", "steps=2"), {})


def check_demo(place: Path, output: str) -> None:
    report = json.loads((place / "outputs/reports/demo.json").read_text())
    for kind in ("expected", "noisy", "reconstructed", "generated"):
        for name in ("row_sum_cv", "centre_residual", "hl_residual"):
            values = [row[name] for row in report["rows"] if row["kind"] == kind]
            assert len(values) == 2
            assert report[kind][name] == pytest.approx(sum(values) / 2)
            # what is expected is consistent; after two steps, what is generated is not
            assert report["expected"][name] < report["noisy"][name] < report["generated"][name]
    assert report["seconds"] > 0
    assert not report["continued"]
    assert 0.02 < report["noisy"]["relative_l2"] < 0.15
    assert report["reconstructed"]["relative_l2"] > 0
    for name in ("gallery.png", "transition.gif"):
        assert (place / "outputs/demo/seed0" / name).is_file()
        assert name in output


def test_the_demo_leaves_pictures_and_numbers(place):
    check_demo(place, run_here(place, "make demo", COMMANDS["make demo"]))


@pytest.mark.parametrize("command", IN_A_PROCESS)
def test_programs_start_as_they_are_called(command, place):
    """One by its own name, one as a module; the rest in the slow test below."""
    run(place, command, COMMANDS[command])


@pytest.mark.slow
def test_everything_works_in_processes_of_its_own_at_its_own_size(real_place):
    check_commands(real_place, run)
    code = PYTHON.replace("steps=20", "steps=2")
    subprocess.run([sys.executable, "-c", code], cwd=real_place, check=True, timeout=300)
    check_demo(real_place, run(real_place, "make demo", COMMANDS["make demo"]))

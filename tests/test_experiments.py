from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from tiny_pet import TinyPET

import allpet
from allpet.cli import main
from allpet.conditions import LABEL_SIZE
from allpet.simulation.tasks import TASKS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCALES = sorted(path.relative_to(EXPERIMENTS).as_posix() for path in (EXPERIMENTS / "scale").glob("*.yaml"))
COMMANDS = [("fit", ("defaults.yaml", stage, scale)) for stage in ("vae.yaml", "ldm.yaml") for scale in SCALES]
COMMANDS += [("fit", ("defaults.yaml", stage, "scale/laptop.yaml", "demo.yaml")) for stage in ("vae.yaml", "ldm.yaml")]
COMMANDS += [
    ("fit", ("defaults.yaml", "ldm.yaml", scale, "symmetries.yaml", "early_stopping.yaml")) for scale in SCALES
]
COMMANDS += [("fit", ("defaults.yaml", "ldm.yaml", "scale/laptop.yaml", "linear_start.yaml"))]
COMMANDS += [("predict", ("sample.yaml",))]
METHODS = sorted(path.stem for path in (EXPERIMENTS / "finetune/methods").glob("*.yaml"))
COMMANDS += [
    (
        "fit",
        ("defaults.yaml", "finetune/bridge.yaml", "finetune/low_dose.yaml", scale, f"finetune/methods/{method}.yaml"),
    )
    for method in METHODS
    for scale in SCALES
]
COMMANDS += [
    ("fit", ("defaults.yaml", "finetune/bridge.yaml", f"finetune/{task}.yaml", scale))
    for task in (*TASKS, "multi_task")
    for scale in SCALES
]
OWN_PAIRS = ("defaults.yaml", "finetune/bridge.yaml", "finetune/own_pairs.yaml", "finetune/attenuation.yaml")
COMMANDS += [("fit", (*OWN_PAIRS, "scale/laptop.yaml", "finetune/methods/regression_pixels.yaml"))]
COMMANDS += [
    ("fit", ("defaults.yaml", f"baselines/{name}.yaml", scale)) for name in ("gan", "score") for scale in SCALES
]
COMMANDS += [
    ("fit", ("defaults.yaml", f"{stage}.yaml", f"baselines/{overlay}.yaml", scale))
    for stage, overlay in (("vae", "one_channel"), ("ldm", "one_channel_ldm"))
    for scale in SCALES
]


# What must be said of a folder of one's own, and has no sensible default.
RESTORE = ("predict", ("restore.yaml",), ("--data.dose", "0.05"))


def words(files: tuple[str, ...]) -> list[str]:
    return [word for file in files for word in ("-c", str(EXPERIMENTS / file))]


def resolved(capsys, *command: str) -> dict:
    """Return the configuration that a command would run."""
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["allpet"])


@pytest.mark.parametrize(
    ("command", "files"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_every_experiment_parses(command, files, capsys):
    config = resolved(capsys, command, *words(files))
    assert "${" not in yaml.safe_dump(config)


def test_restoring_parses(capsys):
    command, files, said = RESTORE
    config = resolved(capsys, command, *words(files), *said)
    assert config["data"]["init_args"]["dose"] == 0.05
    assert config["model"]["class_path"] == "allpet.LatentBridge.from_pretrained"


def test_every_file_is_in_an_experiment():
    found = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.yaml")}
    sweeps = {f"sweeps/{name}.yaml" for name in ("few_shot", *TASKS)}  # test_sweeps.py parses all their points
    assert found == {file for _, files in COMMANDS for file in files} | set(RESTORE[1]) | sweeps


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_file_opens_with_its_purpose_and_command(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("# ")
    assert any("make " in line or "allpet " in line for line in comments)


@pytest.mark.parametrize("scale", SCALES)
def test_networks_fit_one_another_and_the_scale_its_preset(scale, capsys):
    vae = resolved(capsys, "fit", *words(("defaults.yaml", "vae.yaml", scale)))
    ldm = resolved(capsys, "fit", *words(("defaults.yaml", "ldm.yaml", scale)))
    assert vae["data"]["init_args"]["geometry"] == ldm["data"]["init_args"]["geometry"]
    geometry = allpet.ParallelBeam(**vae["data"]["init_args"]["geometry"])
    assert geometry == allpet.ParallelBeam.preset(Path(scale).stem)
    with torch.device("meta"):
        denoiser = allpet.Denoiser(**ldm["model"]["init_args"]["denoiser"]["init_args"])
    autoencoder = allpet.Autoencoder(**vae["model"]["init_args"]["autoencoder"]["init_args"])
    assert autoencoder.latent_channels == denoiser.latent_channels


def test_the_denoiser_has_the_label_of_the_symmetries(capsys):
    config = resolved(capsys, "fit", *words(("defaults.yaml", "ldm.yaml", "scale/laptop.yaml", "symmetries.yaml")))
    denoiser = config["model"]["init_args"]["denoiser"]["init_args"]
    assert denoiser["label_size"] == allpet.SYMMETRY_LABEL_SIZE
    scale = yaml.safe_load((EXPERIMENTS / "scale/laptop.yaml").read_text())["scale"]
    assert denoiser["channels"] == scale["ldm"]["channels"], "whatever the other files say stays"
    data = config["data"]["init_args"]
    symmetry = allpet.SymmetryAugmentation(allpet.ParallelBeam(**data["geometry"]), **data["symmetry"]["init_args"])
    drawn = symmetry.draw(2000, torch.Generator().manual_seed(0)).label()
    assert drawn.shape[1] == allpet.SYMMETRY_LABEL_SIZE
    assert 0.1 < float((drawn[:, :3] == 0).all(dim=1).double().mean()) < 0.15


class Given(allpet.LatentDiffusion):
    """Stage 2 whose validations have given losses, the last one for ever."""

    losses: tuple[float, ...] = (1.0,)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.losses[min(self.global_step, len(self.losses)) - 1], batch_size=1)


@pytest.mark.parametrize("scale", SCALES)
def test_early_stopping_stops_a_stalled_training_and_no_other(scale, capsys, tmp_path):
    trainer = resolved(capsys, "fit", *words(("defaults.yaml", "ldm.yaml", scale, "early_stopping.yaml")))["trainer"]
    arguments = {
        callback["class_path"].rpartition(".")[2]: callback.get("init_args") for callback in trainer["callbacks"]
    }
    validations = trainer["max_steps"] // trainer["val_check_interval"]
    assert validations >= 4 * arguments["CopyWatch"]["every_n_validations"], "copies are looked for, too"
    patience = arguments["EarlyStopping"]["patience"]
    # one validation per step, and as many of both as the scale has validations, or 40
    most, best = min(validations, 40), 2
    for losses, last in (((1.0, 0.9), best + patience), (tuple(1 - step / 100 for step in range(most)), most)):
        denoiser = allpet.Denoiser(channels=(8,), layers_per_block=1, attention=(False,), head_channels=8)
        system = Given(allpet.Autoencoder((8, 16)), denoiser, warmup_steps=1)
        system.losses = losses
        run = Trainer(
            max_steps=most, max_epochs=-1, val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_model_summary=False,
            enable_progress_bar=False, enable_checkpointing=False,
            callbacks=EarlyStopping(**arguments["EarlyStopping"]),
        )  # fmt: skip
        run.fit(system, datamodule=TinyPET())
        assert run.global_step == last
        assert best + patience < most


@pytest.mark.parametrize("scale", SCALES)
def test_a_bridge_fits_and_starts_from_its_stage_2(scale, capsys):
    files = ("defaults.yaml", "finetune/bridge.yaml", "finetune/low_dose.yaml", scale)
    model = resolved(capsys, "fit", *words(files))["model"]["init_args"]
    given = model["denoiser"]["init_args"]
    assert model["decode_batch"] == yaml.safe_load((EXPERIMENTS / scale).read_text())["scale"]["bridge"]["decode_batch"]
    stage2 = resolved(capsys, "fit", *words(("defaults.yaml", "ldm.yaml", scale)))["model"]["init_args"]["denoiser"]
    assert given["label_size"] == LABEL_SIZE
    assert given["condition_channels"] == 2 * given["latent_channels"]  # source, and input as measured
    with torch.device("meta"):
        networks = allpet.Denoiser(**given), allpet.Denoiser(**stage2["init_args"])
    shapes = [{name: tuple(value.shape) for name, value in network.state_dict().items()} for network in networks]
    differ = {name for name in shapes[0] if shapes[0][name] != shapes[1].get(name)}
    assert differ == {"label.weight", "unet.conv_in.weight"}  # which gets room for the input


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_network_and_budget_and_their_own_runs(method, capsys):
    files = ("defaults.yaml", "finetune/bridge.yaml", "finetune/delayed.yaml", "scale/laptop.yaml")
    ours = resolved(capsys, "fit", *words(files))
    theirs = resolved(capsys, "fit", *words((*files, f"finetune/methods/{method}.yaml")))
    assert theirs["run"]["root"] == f"outputs/finetune/delayed-{method.replace('_', '-')}"
    assert theirs["data"] == ours["data"]
    for name in ("max_steps", "callbacks"):
        assert theirs["trainer"][name] == ours["trainer"][name]
    mine, other = (config["model"]["init_args"] for config in (ours, theirs))
    for name in ("optimizer", "learning_rate", "others_factor", "warmup_steps", "target", "seed"):
        assert other[name] == mine[name]
    for name in ("channels", "layers_per_block", "attention", "label_size"):
        assert other["denoiser"]["init_args"][name] == mine["denoiser"]["init_args"][name]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_data_of_ones_own_take_the_place_of_the_simulator(stage, scale, capsys):
    """As make has it: whatever the files say about batches and augmentation stays."""
    command = ["make", "-n", f"train-{stage}", "DATA=mine", f"SCALE={Path(scale).stem}", "ARGS=--data.num_scans 7"]
    shown = subprocess.run(command, cwd=EXPERIMENTS.parent, capture_output=True, text=True, check=True).stdout
    made = shlex.split(shown.replace("\\\n", " ").split("/allpet ")[1].replace(" experiments/", f" {EXPERIMENTS}/"))
    own = resolved(capsys, *made)["data"]
    simulated = resolved(capsys, "fit", *words(("defaults.yaml", f"{stage}.yaml", scale)))["data"]
    assert own["class_path"] == "data_modules.SinogramFiles"
    assert own["init_args"]["num_scans"] == 7
    assert own["init_args"]["geometry"] is None
    assert own["init_args"]["image_geometry"] == simulated["init_args"]["geometry"]
    for name in ("batch_size", "augmentation", "symmetry"):
        assert own["init_args"][name] == simulated["init_args"][name]


def test_pairs_of_ones_own_take_the_place_of_simulated_ones(capsys):
    """As make has it: the task and what it trains stay."""
    command = ["make", "-n", "finetune", "TASK=delayed", "DATA=mine", "DELAY=60", "PROMPT=FDG:chest", "PAIRS=7"]
    shown = subprocess.run(command, cwd=EXPERIMENTS.parent, capture_output=True, text=True, check=True).stdout
    made = shlex.split(shown.replace("\\\n", " ").split("/allpet ")[1].replace(" experiments/", f" {EXPERIMENTS}/"))
    own = resolved(capsys, *made)
    simulated = resolved(capsys, "fit", *words((*OWN_PAIRS[:2], "finetune/delayed.yaml", "scale/laptop.yaml")))
    assert own["data"]["class_path"] == "data_modules.PairedFiles"
    given = own["data"]["init_args"]
    said = {"folder": "mine", "task": "delayed", "delay_min": 60, "tracer": "FDG", "region": "chest", "num_scans": 7}
    assert {name: given[name] for name in said} == said
    assert given["geometry"] is None
    assert given["batch_size"] == simulated["data"]["init_args"]["batch_size"]
    assert own["run"] == simulated["run"]
    assert own["model"] == simulated["model"]


@pytest.mark.parametrize("stage", ["vae.yaml", "ldm.yaml"])
def test_averaging_comes_before_what_shows_and_exports_it(stage, capsys):
    callbacks = resolved(capsys, "fit", *words(("defaults.yaml", stage, SCALES[0])))["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    order = [name for name in names if name in ("EMAWeightAveraging", "Panels", "LatentStatistics", "ExportPretrained")]
    assert order[0] == "EMAWeightAveraging"
    assert order[-1] == "ExportPretrained"

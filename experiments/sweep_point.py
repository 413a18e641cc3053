"""Train and measure one point of a sweep.

    python experiments/sweep_point.py few_shot --data.num_scans=500 --seed=0
    python experiments/sweep_point.py low_dose --data.num_scans=500 --seed=0 --model.bridge.gamma=0.35

``few_shot`` trains stage 1 and then, on it, stage 2, generates a slice for every held-out one and compares the two
sets (``allpet.evaluation``). The name of a task trains a bridge for it and tests it. Other options go to every ``allpet
fit`` of the point; with the name of a stage before them, as in ``--vae.model.learning_rate=1e-3``, to that stage alone.
The same command continues a point that was stopped. It leaves its trainings and ``metrics.json`` in a folder of its own
under ``outputs/sweeps``; run by an agent of W&B, it also logs the numbers there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from studies.sweeps import point_folder
from studies.training import HERE, data_of_run

from allpet import LatentBridge, LatentDiffusion, Prompt, Sampling
from allpet.cli import main as allpet
from allpet.evaluation import evaluate
from allpet.run_files import on_the_disk
from allpet.runs import newest_pretrained
from allpet.simulation.tasks import TASKS
from data_modules import SinogramDataModule

STAGES = ("vae", "ldm", "bridge")


@dataclass(frozen=True)
class Point:
    """A point, as its command line says it.

    Attributes:
        sweep: "few_shot" or a task.
        options: of this program.
        others: of every ``allpet fit``.
        folder: the point's own.
    """

    sweep: str
    options: argparse.Namespace
    others: list[str]
    folder: Path

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained, in order."""
        return ("vae", "ldm") if self.sweep == "few_shot" else ("bridge",)

    def words(self, stage: str) -> list[str]:
        """Return the command line that trains a stage."""
        files = {
            "vae": ["defaults", "vae"],
            "ldm": ["defaults", "ldm"],
            "bridge": ["defaults", "finetune/bridge", f"finetune/{self.sweep}"],
        }[stage]
        files.append(f"scale/{self.options.scale}")
        seed, steps = self.options.seed, getattr(self.options, f"{stage}_steps")
        words = ["fit", *(word for name in files for word in ("-c", str(HERE / f"{name}.yaml")))]
        words += [f"--run.root={self.folder / stage}"]
        words += [f"--{part}={seed}" for part in ("seed_everything", "model.seed", "data.seed")]
        if steps is not None:  # and the last step is validated
            words += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        if stage == "ldm":
            words.append(f"--model.autoencoder={self.folder / 'vae'}")
        mine = [word.replace(f"--{stage}.", "--", 1) for word in self.others]
        return words + [word for word in mine if not word.startswith(tuple(f"--{other}." for other in STAGES))]


def read_point(words: Sequence[str] | None = None) -> Point:
    """Read a point's command line.

    Raises:
        ValueError: if an option has no value.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", choices=["few_shot", *TASKS])
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, draws and samples")
    parser.add_argument("--scale", default="laptop", help="name of the scale file")
    parser.add_argument("--vae-steps", type=int, help="steps of stage 1 (default: the scale file's)")
    parser.add_argument("--ldm-steps", type=int, help="steps of stage 2")
    parser.add_argument("--bridge-steps", type=int, help="steps of the bridge")
    parser.add_argument("--samples", type=int, default=245, help="generated slices, at most one for each held-out one")
    parser.add_argument("--sampler", default="dpm++2m")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--output", default="outputs/sweeps", help="folder of all sweeps")
    words = list(words) if words is not None else None
    options, others = parser.parse_known_args(words)
    wrong = [word for word in others if not (word.startswith("--") and "=" in word)]
    if wrong:
        raise ValueError(f"{' '.join(wrong)} cannot be read: write options that go to allpet fit as --NAME=VALUE.")
    given = {
        name.replace("_", "-"): value for name, value in vars(options).items() if value != parser.get_default(name)
    }
    given = {name: value for name, value in given.items() if name != "sweep"} | {"seed": options.seed}
    flags = given | dict(word[2:].split("=", 1) for word in others)
    return Point(options.sweep, options, others, point_folder(options.output, options.sweep, flags))


def measure_few_shot(point: Point) -> dict[str, float]:
    """Generate with stage 2 and compare with the held-out slices of the expected sinograms."""
    folder = newest_pretrained(point.folder / "ldm")
    options = point.options
    model = LatentDiffusion.from_pretrained(folder, Sampling(options.sampler, options.sampling_steps))
    if torch.cuda.is_available() and _trainer_of(folder)["accelerator"] != "cpu":
        model = model.cuda()
    data = data_of_run(folder.parent, SinogramDataModule)
    real = data.test_set[list(range(len(data.test_set)))]
    rows = torch.linspace(0, len(data.test_set) - 1, min(options.samples, len(data.test_set))).round().long()
    prompt = Prompt(real.prompt.tracer[rows], real.prompt.region[rows])
    first = 10_000 * options.seed
    fake = model.sample(prompt, range(first, first + len(rows)), progress=True).sinogram.float().cpu()
    asked = {"patients": real.patient_id, "fake_prompts": prompt, "real_prompts": real.prompt}
    found = evaluate(real.expected, fake, data.geometry, **asked).numbers
    vae = newest_pretrained(point.folder / "vae").parent
    return {
        **found,
        "vae_val_loss": last_value(vae / "metrics.csv", "val/loss"),
        "vae_relative_l2": last_value(vae / "metrics.csv", "val/relative_l2"),
        "ldm_val_loss": last_value(folder.parent / "metrics.csv", "val/loss"),
    }


def measure_task(point: Point) -> dict[str, float]:
    """Restore the test pairs and compare with their expected targets; ``*_input`` is what was given."""
    folder = newest_pretrained(point.folder / "bridge")
    data = data_of_run(folder.parent, SinogramDataModule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning would have more workers
        trainer = Trainer(
            accelerator=_trainer_of(folder)["accelerator"],
            devices=1,
            logger=False,
            enable_checkpointing=False,
            default_root_dir=point.folder,
        )
        scores = trainer.test(LatentBridge.from_pretrained(folder), data, verbose=False)[0]
    found = {name.removeprefix("test/"): value for name, value in scores.items()}
    return {**found, "val_loss": last_value(folder.parent / "metrics.csv", "val/loss")}


def last_value(table: Path, name: str) -> float:
    """Return the last value of a column of a metrics.csv; NaN where there is none."""
    with table.open(newline="", encoding="utf-8") as file:
        values = [row[name] for row in csv.DictReader(file) if row.get(name)]
    return float(values[-1]) if values else float("nan")


def _trainer_of(pretrained: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((pretrained.parent / "config.yaml").read_text(encoding="utf-8"))
    return settings["trainer"]


def main(words: Sequence[str] | None = None) -> Path:
    """Train, measure, write ``metrics.json`` and return its path."""
    point = read_point(words)
    logged = None
    if os.environ.get("WANDB_SWEEP_ID"):  # an agent runs this, and shows who has begun
        import wandb

        logged = wandb.init()
    for stage in point.stages:
        allpet(point.words(stage))
    measured = measure_few_shot(point) if point.sweep == "few_shot" else measure_task(point)
    path = point.folder / "metrics.json"
    with on_the_disk(path) as scratch:
        scratch.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if logged is not None:
        logged.log(measured)
        logged.finish()
    print(f"Numbers: {path}")
    return path


if __name__ == "__main__":
    main()

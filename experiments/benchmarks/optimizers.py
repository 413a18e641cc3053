"""Compare AdamW with Muon on stage 1: same data, seeds, network, schedule and number of steps.

    python experiments/benchmarks/optimizers.py --steps 200 --seeds 0 1 2

trains both with the laptop's recipe on the demo's data and writes outputs/reports/optimizers.json and .md: the relative
L2 error of held-out slices against the expected sinogram, and the seconds of each training. 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from allpet import AutoencoderSystem, ParallelBeam, SymmetryAugmentation
from allpet.cli import main as allpet
from allpet.metrics import relative_l2
from allpet.reports import FOLDER, table, write_report
from allpet.runs import newest_pretrained
from data_modules import SimulatedPET

PROMPTS = ("FDG:brain", "FDG:abdomen")


def measure(optimizer: str, seed: int, steps: int, folder: Path, data: SimulatedPET) -> dict[str, Any]:
    """Train stage 1 and return one row of the report; a finished training is not repeated."""
    root = folder / f"{optimizer}{seed}"
    words = ["fit"]
    for name in ("defaults", "vae", "scale/laptop", "demo"):
        words += ["-c", f"experiments/{name}.yaml"]
    settings = {
        "run.root": root,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.enable_progress_bar": "false",
        "model.optimizer": optimizer,
        "model.seed": seed,
        "data.seed": seed,
        "seed_everything": seed,
    }
    began = time.perf_counter()
    allpet(words + [f"--{name}={value}" for name, value in settings.items()])
    row: dict[str, Any] = {"optimizer": optimizer, "seed": seed, "steps": steps}
    row["seconds"] = time.perf_counter() - began
    system = AutoencoderSystem.from_pretrained(newest_pretrained(root))
    names = data.test_set.prompt.names()
    for prompt in PROMPTS:
        batch = data.augment(data.test_set[[index for index, name in enumerate(names) if name == prompt]])
        row[f"relative_l2 {prompt}"] = float(relative_l2(system.reconstruct(batch), batch.expected).median())
    return row


def main() -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, order, masks and noise")
    parser.add_argument("--output", type=Path, default=Path("outputs/optimizers"), help="folder of the runs")
    parser.add_argument("--reports", type=Path, default=FOLDER, help="folder of the numbers")
    arguments = parser.parse_args()
    data = SimulatedPET(
        ParallelBeam.preset("laptop"), PROMPTS, num_scans=1000, batch_size=8, symmetry=SymmetryAugmentation
    )
    data.setup()
    rows = [
        measure(optimizer, seed, arguments.steps, arguments.output, data)
        for seed in arguments.seeds
        for optimizer in ("adamw", "muon")
    ]
    print(table(rows))
    print(f"Numbers: {write_report('optimizers', rows, arguments.seeds, arguments.reports)}")


if __name__ == "__main__":
    main()

"""The estimated peak memory of a training (``allpet.memory``) beside what a process really took.

    python experiments/benchmarks/memory_check.py

trains the laptop's stage 1 and stage 2 for a few steps on the CPU, in batches of about a gigabyte, each in a process of
its own, and writes ``outputs/reports/memory_check.json`` and ``.md``. ``measured_gb`` is by how much the largest
resident size (VmHWM) exceeds the resident size before the networks were built, with the data in memory and a small
training behind it; ``ratio`` is the measured over the estimated peak. So that freed memory goes back to the system at
once, malloc has one arena and maps every block above 64 KB by itself; ``malloc`` says so. Linux only; a minute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from allpet.memory import GB, Training, estimate
from allpet.memory_report import plan
from allpet.reports import FOLDER, table, write_report

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BATCHES = {"vae": 64, "ldm": 192}


def words(stage: str, batch_size: int, precision: str) -> list[str]:
    """Return the options of ``allpet fit`` for a stage at the laptop's scale."""
    files = [word for name in ("defaults", stage, "scale/laptop") for word in ("-c", f"{ROOT}/experiments/{name}.yaml")]
    return [*files, f"--data.batch_size={batch_size}", f"--trainer.precision={precision}", "--trainer.accelerator=cpu"]


def measure(stage: str, batch_size: int, precision: str = "32-true", prompt: bool = True) -> dict[str, Any]:
    """Train a few steps in a process of its own and return a row.

    Args:
        stage: "vae" or "ldm".
        batch_size: slices per step.
        precision: Lightning's name.
        prompt: whether freed memory goes back to the system at once; with malloc's own settings some of it is kept.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(MALLOC if prompt else {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-W", "ignore", __file__, "--child", stage, str(batch_size), precision]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return {**json.loads(run.stdout.splitlines()[-1]), "malloc": "prompt" if prompt else "default"}


def _child(stage: str, batch_size: int, precision: str) -> None:
    import tempfile

    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from data_modules import SimulatedPET

    training, _ = plan(words(stage, batch_size, precision), "cpu")
    data = SimulatedPET(
        training.geometry,
        ("FDG:brain",),
        batch_size,
        val_patients=1,
        test_patients=1,
        cache=None,
        batch_size=batch_size,
    )
    data.setup()
    found = estimate(training)

    def fit(some: Training, steps: int, slices: SimulatedPET) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="cpu",
                max_steps=steps,
                precision=some.precision,  # type: ignore[arg-type]
                gradient_clip_val=1.0,
                callbacks=[EMAWeightAveraging()],
                limit_val_batches=0,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(some.make_system(), slices)

    # Libraries load what they need, and the table of masks is made.
    data.batch_size = 2
    fit(replace(training, batch_size=2), 1, data)
    data.batch_size = batch_size
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _kilobytes("VmRSS")
    fit(training, 3, data)
    measured = (_kilobytes("VmHWM") - before) * 1024
    peak = found.peak - found.tables
    row = {"stage": stage, "batch": batch_size, "precision": precision, "estimated_gb": peak / GB}
    print(json.dumps({**row, "measured_gb": measured / GB, "ratio": measured / peak}))


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"/proc/self/status tells no {name}: this needs Linux.")
    return int(found[1])


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "BATCH", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="32-true", help="Lightning's name")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments.child[0], int(arguments.child[1]), arguments.child[2])
        return
    rows = [
        measure(stage, batch, arguments.precision, prompt)
        for stage, batch in BATCHES.items()
        for prompt in (True, False)
    ]
    print(table(rows))
    print(f"written to {write_report('memory_check', rows, [], arguments.output)} (.md)")


if __name__ == "__main__":
    main()

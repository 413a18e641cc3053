"""Everything that needs a GPU, in one run: tests, benchmark, and a short training of both stages.

    PYTHON experiments/benchmarks/gpu_check.py [--steps 20] [--scale gpu24]      (make gpu-check PYTHON=...)

Installs nothing: it runs with whatever torch the interpreter has, and says what could not run and why. Writes
``outputs/reports/gpu_check.json`` and ``.md``; a copy of them in ``experiments/results`` is taken up by the results
table. Where ASTRA has no CUDA the file says "ASTRA on CUDA: not run" and the matrix is checked alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The interpreter need not have this project installed.
for folder in (ROOT, ROOT / "src", ROOT / "experiments" / "benchmarks"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

from allpet import astra_cuda, reports  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def run_tests(folder: Path) -> list[dict[str, Any]]:
    """Run what is marked ``gpu`` and return a row for each test."""
    record = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--junitxml", str(record), "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False)
    if not record.exists():
        return [{"part": "tests", "what": "pytest", "outcome": "not run: pytest failed to start"}]
    rows = []
    for case in ElementTree.parse(record).iter("testcase"):
        outcome = "passed"
        for bad in ("failure", "error", "skipped"):
            if (found := case.find(bad)) is not None:
                outcome = f"{bad}: {(found.get('message') or '').splitlines()[0][:160]}".strip()
        rows.append(
            {"part": "tests", "what": case.get("name"), "outcome": outcome, "seconds": float(case.get("time") or 0)}
        )
    return rows


def run_benchmark() -> list[dict[str, Any]]:
    """Run the benchmark's CUDA part and return its rows."""
    try:
        from benchmark import measure

        rows = measure(["cuda"], [torch.get_num_threads()], quick=False)
    except Exception as error:  # whatever goes wrong is a finding, and the rest shall still run
        return [{"part": "benchmark", "what": "all", "outcome": _not_run(error)}]
    return [{"part": "benchmark", "what": f"{row['operation']}, {row['geometry']}", **row} for row in rows]


def train_both_stages(folder: Path, scale: str, steps: int) -> list[dict[str, Any]]:
    """Train both stages for some steps in bf16 and return time and peak memory of each."""
    rows = []
    for stage in ("vae", "ldm"):
        command = [sys.executable, "-m", "allpet", "fit"]
        for name in ("defaults", stage, f"scale/{scale}"):
            command += ["-c", f"experiments/{name}.yaml"]
        command += [f"--run.root={folder / stage}", f"--trainer.max_steps={steps}", "--trainer.accelerator=gpu"]
        command += ["--trainer.precision=bf16-mixed"]
        command += [f"--trainer.val_check_interval={steps}", "--data.num_scans=20"]
        command += ["--data.val_patients=2", "--data.test_patients=2", f"--data.cache={folder / 'cache'}"]
        if stage == "ldm":
            command.append(f"--model.autoencoder={folder / 'vae'}")
        start = time.perf_counter()
        run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"part": "training", "what": f"{stage}, {scale}, {steps} steps, bf16"}
        if run.returncode == 0:
            row |= {"outcome": "passed", "seconds": time.perf_counter() - start, **_memory(folder / stage)}
        else:
            said = (run.stderr or run.stdout).strip().splitlines()
            row["outcome"] = f"failed: {said[-1] if said else run.returncode}"
        rows.append(row)
    return rows


def summarise(
    tests: list[dict[str, Any]], benchmark: list[dict[str, Any]], training: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Count the tests that passed, name the others, and keep what the benchmark's own summary keeps."""
    others = [row for row in tests if row["outcome"] != "passed"]
    passed = {"part": "tests", "what": "all others" if others else "all", "number": len(tests) - len(others)}
    ratios = benchmark
    if all("ratio" in row for row in benchmark):
        from benchmark import summarise as beside

        ratios = [{"part": "benchmark", "what": f"{e['operation']}, {e['geometry']}", **e} for e in beside(benchmark)]
        ratios = [{key: e[key] for key in e if key not in ("operation", "geometry")} for e in ratios]
    return [*others, {**passed, "outcome": "passed"}, *training, *ratios]


def _memory(root: Path) -> dict[str, float]:
    """Read the last memory numbers that a run has logged."""
    found = {}
    for path in root.glob("*/metrics.csv"):
        with path.open(encoding="utf-8") as file:
            for line in csv.DictReader(file):
                found |= {key.split("/")[1]: float(value) for key, value in line.items() if "memory/" in key and value}
    return found


def _not_run(error: Exception) -> str:
    return f"not run: {type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    """Run all parts, print a summary and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--scale", default="gpu24", help="of the trainings, a file of experiments/scale")
    parser.add_argument("--output", type=Path, default=ROOT / reports.FOLDER)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device, so there is nothing to check; run this on a GPU.")
    reason = astra_cuda.why_unavailable()
    astra = f"ASTRA on CUDA: not run, {reason}" if reason else "ASTRA on CUDA: run"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}. {astra}.", flush=True)
    with tempfile.TemporaryDirectory() as name:
        tests = run_tests(Path(name))
        benchmark = run_benchmark()
        training = train_both_stages(Path(name), arguments.scale, arguments.steps)
    rows, summary = [*tests, *benchmark, *training], summarise(tests, benchmark, training)
    path = reports.write_report(
        "gpu_check", rows, [0], arguments.output, title="GPU check", remarks=f"{astra}.", summary=summary
    )
    outcomes = Counter(str(row["outcome"]).split(":")[0] for row in rows if "outcome" in row)
    print(reports.table(summary))
    print(", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()) + f"; written to {path}")
    sys.exit(any(outcome in outcomes for outcome in ("failure", "error", "failed")))


if __name__ == "__main__":
    main()

"""How much memory a training would take, as a table: no GPU, no data and no trained stage are needed.

    python -m allpet.memory_report --config defaults.yaml vae.yaml scale/gpu24.yaml        (make memory CONFIG="...")

merges the files from left to right, as ``allpet fit`` does, and writes ``outputs/reports/memory.json`` and ``.md``: a
row for each batch with ``peak_gb`` and its parts, in GB of 1e9 bytes (``allpet.memory``). A configuration that leaves
the device open is estimated for a GPU. Options of ``allpet fit`` may follow: ``--data.batch_size=8``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from allpet import cli
from allpet.memory import GB, Training, estimate, training_of
from allpet.reports import FOLDER, table, write_report
from allpet.runs import RunOptions


class _Planned(cli.AllpetCLI):
    """Parses what ``allpet fit`` would run, and runs nothing."""

    device: Literal["cuda", "cpu"] = "cuda"
    training: Training
    budget_gb: float | None

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand]
        self.training = training_of(config, self._parser(subcommand), self.device)
        self.budget_gb = RunOptions(**config.run).memory_budget_gb


class _PlannedOnCPU(_Planned):
    device = "cpu"


def plan(words: list[str], device: Literal["cuda", "cpu"] = "cuda") -> tuple[Training, float | None]:
    """Return what ``allpet fit`` with these words would train, and its memory budget in GB.

    Args:
        words: options of ``allpet fit``.
        device: where they leave it open.
    """
    cli.prepare()
    planned = (_Planned if device == "cuda" else _PlannedOnCPU)(["fit", *words])
    return planned.training, planned.budget_gb


def row(training: Training) -> dict[str, Any]:
    """Return a row of the report."""
    found = estimate(training)
    parts = {f"{name}_gb": value / GB for name, value in asdict(found).items() if name != "stage"}
    return {
        "stage": found.stage,
        "views": training.geometry.n_views,
        "bins": training.geometry.n_bins,
        "batch": training.batch_size,
        "precision": training.precision,
        "device": training.device,
        "peak_gb": found.peak / GB,
        **parts,
    }


def main(arguments: list[str] | None = None) -> None:
    """Estimate, print, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, help="YAML files, merged from left to right")
    parser.add_argument("--batch", nargs="+", type=int, help="slices per step; by default the configuration's")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the configuration names none")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the report")
    known, rest = parser.parse_known_args(arguments)
    files = [word for file in known.config for word in ("-c", file)]
    try:
        training, budget = plan([*files, *rest], known.device)
        rows = [row(replace(training, batch_size=batch)) for batch in known.batch or [training.batch_size]]
    except (OSError, ValueError) as error:
        raise SystemExit(f"memory: {error}") from error
    print(table(rows))
    if budget is not None:
        fits = "within" if rows[0]["peak_gb"] <= budget else "more than"
        print(f"Batches of {rows[0]['batch']}: {rows[0]['peak_gb']:.2f} GB, {fits} the budget of {budget:g} GB.")
    path = write_report("memory", rows, [], known.output, configuration=known.config, budget_gb=budget)
    print(f"written to {path} (.md)")


if __name__ == "__main__":
    main()

"""What a training writes into its run, so that neither a kill nor a second start loses it: checkpoints and metrics."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it, so that a killed process leaves the old one or the new one.

    Lightning's own writes to the system's temporary folder, from where a move may be a copy, and keeps a second copy of
    the checkpoint in memory.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; on return it is on the disk."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.part")
        with scratch.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` in the run's folder; a run that is continued adds to it, where Lightning's own starts anew."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)

    @property
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._experiment = _ContinuedWriter(self.log_dir)
        return super().experiment


class _ContinuedWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                self.metrics_keys = [name for name in file.readline().strip().split(",") if name]


def trim_metrics(path: str | Path, step: int) -> None:
    """Drop the rows of a metrics.csv that lie at or after ``step``: they will be measured again."""
    path = Path(path)
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        # a process that was killed may have left half a line, which lacks values
        whole = [row for row in reader if None not in row.values()]
    rows = [row for row in whole if row.get("step", "").isdecimal() and int(row["step"]) < step]
    scratch = path.with_suffix(".part")
    with scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(scratch, path)

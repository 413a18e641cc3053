"""What a training writes into its run, so that neither a kill nor a second start loses it: checkpoints and metrics."""

from __future__ import annotations

import contextlib
import csv
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from allpet.privacy import without_secrets


@contextlib.contextmanager
def on_the_disk(path: str | Path) -> Iterator[Path]:
    """Give a path beside a file to write to; at the end it is on the disk, in the file's place. Errors leave nothing.

    The place holds the old file or the new one, whole, however the process or the machine ends.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.part")
    try:
        yield scratch
        _sync(scratch)
        os.replace(scratch, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it; read tensors and plain values only, never run what is read.

    Lightning's own writes to the system's temporary folder, from where a move may be a copy, keeps a second copy of
    the checkpoint in memory, and unpickles anything that comes from an address on the web.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; on return it is on the disk.

        Raises:
            OSError: if it cannot be written; the file that was there stays, and nothing else is left.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with on_the_disk(target) as scratch:
            try:
                with scratch.open("wb") as file:
                    torch.save(checkpoint, file)
            except (OSError, RuntimeError) as error:
                # torch reports the disk's error as one of its own, with the cause behind it
                cause = error if isinstance(error, OSError) else error.__context__
                if not isinstance(cause, OSError):
                    raise
                raise OSError(cause.errno, cause.strerror, str(target)) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if it is damaged, lies elsewhere than in a file, or holds more than tensors and plain values;
                or if ``weights_only`` is False.
        """
        if weights_only is False:
            raise ValueError("weights_only is False, but checkpoints that could run programs are never read: leave it.")
        if "://" in str(path):
            raise ValueError(f"{path} is no file: download it, look where it comes from, and name the file.")
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError as error:
            raise ValueError(f"There is no checkpoint {path}: name one of a run's checkpoints/.") from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"Checkpoint {path} is damaged, or holds more than tensors and plain values, which is never run: use "
                "another."
            ) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"Checkpoint {path} is damaged: use the one before it.") from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{path} is no checkpoint of a training: name one of a run's checkpoints/.")
        return checkpoint


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

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Keep what determines the training, without keys and home folder."""
        super().log_hyperparams(without_secrets(vars(params) if isinstance(params, Namespace) else params))


class _ContinuedWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                self.metrics_keys = [name for name in file.readline().strip().split(",") if name]


def trim_metrics(path: str | Path, step: int) -> None:
    """Drop the rows of a metrics.csv that lie at or after ``step``, which will be measured again, and damaged ones.

    A file that is no table any more is put aside with a sentence.
    """
    path = Path(path)
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        # a machine that lost power may have left zeros, a process that was killed half a line, which lacks values
        reader = csv.DictReader(line.replace("\0", "") for line in file)
        names = list(reader.fieldnames or [])
        whole = [row for row in reader if None not in row and None not in row.values()]
    if "step" not in names:
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        print(f"{path} is damaged and was renamed to {aside.name}: metrics are written anew from step {step} on.")
        return
    rows = [row for row in whole if row["step"].isdecimal() and int(row["step"]) < step]
    with on_the_disk(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)

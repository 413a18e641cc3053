"""Runs: one numbered folder per training, found again by what was asked for.

::

    outputs/vae/001/    run.json  config.yaml  metrics.csv  checkpoints/  panels/  pretrained/

A *root* such as ``outputs/vae`` holds the runs of one stage, the newest with the highest number. A run's *fingerprint*
is the hash of the resolved configuration and of the data; the same command finds the same fingerprint and continues.
``pretrained/`` appears when a run has finished, so a folder that has it can be shared or built upon.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from allpet.run_files import on_the_disk

# What says how long, where to and how visibly, but not what is trained.
_TRAINER_ASIDE = ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "profiler")
_ASIDE = ("config", "ckpt_path", "run", "scale", "subcommand", "weights_only")
# Where the data lie: their content is in the data's hash.
_DATA_ASIDE = ("folder", "cache", "num_workers")
# How one samples later on does not change what is trained.
_MODEL_ASIDE = ("sampling",)


@dataclass(frozen=True)
class RunOptions:
    """Where a run lands, whether it continues, and what it may take.

    Args:
        root: folder of the stage's runs, such as outputs/vae; None keeps no runs.
        resume: whether the newest run with the same configuration and data is continued; False starts a new one.
        name: name of the run's folder; None numbers it. Needed where a launcher starts all processes itself.
        memory_budget_gb: most memory on each device, GB of 1e9 bytes; a training whose estimated peak
            (``allpet.memory``) is larger is refused before it begins. None for no limit.
    """

    root: str | None = None
    resume: bool = True
    name: str | None = None
    memory_budget_gb: float | None = None


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        folder: where it lives.
        record: what run.json says: ``fingerprint``, ``data_hash``, ``created``, ``finished`` (None until then).
    """

    folder: Path
    record: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints to continue from."""
        return self.folder / "checkpoints"

    @property
    def pretrained(self) -> Path:
        """Folder to share, there once the run has finished."""
        return self.folder / "pretrained"

    def update(self, **values: Any) -> Run:
        """Return the run with values of its record replaced, on disk too."""
        run = Run(self.folder, {**self.record, **values})
        _write_json(self.folder / "run.json", run.record)
        return run

    def lock(self) -> FileLock:
        """Hold the run for this process; the system releases it however the process ends.

        Raises:
            RuntimeError: if another process holds it.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"Run {self.folder} is being trained by another process: wait for it, or add --run.resume=false to "
                "start another run."
            ) from None
        return lock


def fingerprint(config: dict[str, Any], data_hash: str, weights: str = "") -> str:
    """Hash what determines a training.

    Args:
        config: the resolved configuration of ``allpet fit``. ``trainer.max_*``, loggers, display, paths and
            ``model.sampling`` are aside.
        data_hash: content hash of the data.
        weights: hash of the pretrained weights it builds on, if any.

    Returns:
        16 hexadecimal digits.
    """
    kept = {key: value for key, value in config.items() if key not in _ASIDE}
    kept["trainer"] = {
        key: value
        for key, value in (kept.get("trainer") or {}).items()
        if not key.startswith("max_") and key not in _TRAINER_ASIDE
    }
    for stage, aside in (("data", _DATA_ASIDE), ("model", (*_MODEL_ASIDE, "autoencoder") if weights else _MODEL_ASIDE)):
        part = kept.get(stage)
        if isinstance(part, dict) and isinstance(part.get("init_args"), dict):
            arguments = {key: value for key, value in part["init_args"].items() if key not in aside}
            kept[stage] = {**part, "init_args": arguments}
    text = json.dumps([kept, data_hash, weights], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def list_runs(root: str | Path) -> list[Run]:
    """Return the runs under a root, oldest first; folders without a readable run.json are none (``lost_runs``)."""
    found = []
    for folder in Path(root).iterdir() if Path(root).is_dir() else []:
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            found.append(Run(folder, record))
    return sorted(found, key=lambda run: (run.record.get("created", ""), run.folder.name))


def lost_runs(root: str | Path) -> list[Path]:
    """Return the folders under a root that hold checkpoints but no readable run.json, so that no command finds them."""
    known = {run.folder for run in list_runs(root)}
    folders = Path(root).iterdir() if Path(root).is_dir() else []
    return sorted(folder for folder in folders if folder not in known and any(folder.glob("checkpoints/*.ckpt")))


def find_run(root: str | Path, key: str) -> Run | None:
    """Return the newest run with a fingerprint, or None."""
    return next((run for run in reversed(list_runs(root)) if run.record.get("fingerprint") == key), None)


def create_run(root: str | Path, key: str = "", data_hash: str = "", name: str | None = None) -> Run:
    """Make a new run's folder: ``name``, or the next number.

    Raises:
        FileExistsError: if there is a folder of that name.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    numbers = [int(folder.name) for folder in root.iterdir() if folder.name.isdecimal()]
    number = max(numbers, default=0) + 1
    while True:
        folder = root / (name or f"{number:03d}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if name is not None:
                raise FileExistsError(f"There is already a folder {folder}: choose another --run.name.") from None
            number += 1
    # never before those that are there, even where the clock was set back: the newest is the last made
    newest = max((run.record.get("created", "") for run in list_runs(root)), default="")
    created = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    if created <= newest:
        created = (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")
    return Run(folder, {}).update(fingerprint=key, data_hash=data_hash, created=created, finished=None)


def remove_if_empty(folder: Path) -> None:
    """Remove a run's folder in which there is no more than its record and configuration."""
    if {path.name for path in folder.iterdir()} <= {"run.json", "config.yaml"}:
        shutil.rmtree(folder)


def newest_pretrained(path: str | Path, data_hash: str | None = None) -> Path:
    """Return the pretrained folder meant by a path.

    Args:
        path: a pretrained folder, a run, or a root, which means its newest finished run.
        data_hash: if given, only runs of a root that were trained on these data count.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "pretrained" / "config.json").is_file():
        return path / "pretrained"
    rejected = []
    for run in reversed(list_runs(path)):
        if not (run.pretrained / "config.json").is_file():
            rejected.append(f"{run.folder.name} has not finished")
        elif data_hash is not None and run.record.get("data_hash") != data_hash:
            rejected.append(f"{run.folder.name} was trained on other data")
        else:
            return run.pretrained
    raise FileNotFoundError(
        f"{path} holds no finished run{'' if data_hash is None else ' trained on these data'} "
        f"({'; '.join(rejected) or 'there is none at all'}): train that stage first, with the same data "
        "(the autoencoder: make train-vae; the diffusion model: make train-ldm; a downstream task: make finetune "
        "TASK=), or name a pretrained folder."
    )


def weights_hash(folder: str | Path) -> str:
    """Hash of the weights in a pretrained folder, 16 hexadecimal digits."""
    return file_hash(Path(folder) / "model.safetensors")


def file_hash(path: str | Path) -> str:
    """Hash of a file, 16 hexadecimal digits."""
    with Path(path).open("rb") as file:
        digest = hashlib.blake2b(digest_size=8)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def usable_checkpoint(folder: str | Path, before_step: int | None = None) -> tuple[Path, int] | None:
    """Return the newest whole checkpoint of a folder and its step; damaged ones are put aside with a sentence.

    Args:
        folder: of checkpoints written by ``callbacks.RunCheckpoint``, whose names end in ``step=NUMBER``.
        before_step: if given, only checkpoints of earlier steps count.

    Returns:
        the file and the number of optimiser steps it holds, or None if there is no whole one.
    """
    for step, path in sorted(_checkpoints(folder), reverse=True):
        if before_step is not None and step >= before_step:
            continue
        if _is_whole(path):
            return path, step
        path.rename(path.with_suffix(".damaged"))
        print(f"Checkpoint {path} is damaged and was renamed to *.damaged: the one before it is used.")
    return None


def tidy(folder: str | Path) -> None:
    """Remove what a process that was killed while it wrote left in a run's folder; whoever calls holds the run."""
    folder = Path(folder)
    for rest in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        rest.unlink()
    for rest in folder.glob(".pretrained-*"):
        shutil.rmtree(rest)


def adopt_requeued(run: Run) -> None:
    """Put the checkpoints that Lightning leaves for SLURM (``hpc_ckpt_N.ckpt``) among the run's own, by their steps.

    Where they lie, Lightning would take the last of them even after the run had gone on from it.
    """
    for path in run.folder.glob("hpc_ckpt_*.ckpt"):
        try:
            step = int(torch.load(path, map_location="meta", weights_only=True)["global_step"])
        except Exception:  # whatever a damaged file makes the reader raise, it cannot be continued from
            path.rename(path.with_suffix(".damaged"))
            print(f"Checkpoint {path} is damaged and was renamed to *.damaged: the one before it is used.")
            continue
        run.checkpoints.mkdir(exist_ok=True)
        os.replace(path, run.checkpoints / f"step={step:08d}.ckpt")


def _checkpoints(folder: str | Path) -> Iterator[tuple[int, Path]]:
    for path in Path(folder).glob("*.ckpt"):
        match = re.search(r"step=(\d+)\.ckpt$", path.name)
        if match and not path.is_symlink():
            yield int(match.group(1)), path


def _is_whole(path: Path) -> bool:
    # torch writes zip archives: their directory is at the end and every entry has a checksum.
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with on_the_disk(path) as scratch:
        scratch.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

"""Trainings of the smallest stage 1, in this process or in forks of a warm one, and faults to put into them."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pet
import torch
from safetensors.torch import load_file

from allpet.cli import main

HERE = Path(__file__).parent
VAE = ["fit", "-c", str(HERE / "tiny_vae.yaml"), "--trainer.enable_progress_bar", "false"]
QUICK = ["--trainer.limit_val_batches", "0"]  # nothing to validate, so nothing to draw


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def fit(root: Path, *options: str) -> None:
    """Train until the end, or until a fault."""
    main([*VAE, *QUICK, "--run.root", str(root), *options])


def stopped(root: Path, *options: str) -> str:
    """Train into a fault that is answered with a sentence, and return the sentence."""
    with pytest.raises(SystemExit) as stop:
        fit(root, *options)
    said = str(stop.value)
    assert re.fullmatch(r"allpet: [^\n]+\.", said), said
    return said.removeprefix("allpet: ")


def at(patch: pytest.MonkeyPatch, step: int, act: Callable[[Any], None]) -> None:
    """Do something after a step, before its checkpoint if it has one."""

    def hook(self: Any, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == step:
            act(trainer)

    patch.setattr(tiny_pet.KilledAt, "on_train_batch_end", hook)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pretrained" / "model.safetensors")


def assert_same(run: Path, other: Path) -> None:
    """Both runs have ended with the same weights, to the bit."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def copy_of(root: Path, target: Path) -> Path:
    """Copy a root of runs and return the copy's first run."""
    shutil.copytree(root, target, symlinks=True)
    return target / "001"


def in_a_fork(log: Path, job: Callable[..., None], *arguments: Any) -> Any:
    """Start a job in a fork of a process that has everything imported; what it prints goes to ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_tools", "callbacks", "data_modules"])
    process = context.Process(target=_run, args=(log, job, *arguments))
    process.start()
    return process


def train(root: Path, *options: str) -> None:
    """Train as the command line does; a job for ``in_a_fork``."""
    sys.argv = ["allpet"]
    torch.set_num_threads(1)
    main([*VAE, "--run.root", str(root), *options])


def _run(log: Path, job: Callable[..., None], *arguments: Any) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        job(*arguments)

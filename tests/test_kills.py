"""A small training that is killed at a hundred random moments and ends as if it had not been."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_tools import assert_same, in_a_fork, train

from allpet import runs

KILLS = 100
LAST = 120
STEPS = ["--trainer.max_steps", str(LAST), "--trainer.val_check_interval", "50"]
BOUND = 300.0  # seconds in which a training that is left alone must have written another checkpoint


def start(log: Path, root: Path):
    return in_a_fork(log, train, root, *STEPS)


def at_some_moment(child: Any, moments: random.Random, run: Path, starting: float) -> None:
    """Wait until some moment: while the child starts, or when it has gone on for a while. It may end before."""
    if moments.random() < 0.3:
        child.join(moments.uniform(0, starting))
        return
    before, until = newest(run), time.monotonic() + BOUND
    while child.is_alive() and newest(run) <= before and time.monotonic() < until:
        child.join(0.02)
    child.join(moments.uniform(0, 0.2 * starting))


def newest(run: Path) -> int:
    return max((step for step, _ in runs._checkpoints(run / "checkpoints")), default=0)


def to_its_end(child: Any, run: Path) -> None:
    """Wait for a training, as long as it gets on."""
    before = -1
    while child.is_alive() and newest(run) > before:
        before = newest(run)
        child.join(BOUND)
    if child.is_alive():
        child.kill()
        pytest.fail("a training that was left alone does not get on")


def measured(run: Path) -> dict[int, str]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork server")
def test_a_hundred_kills_lose_nothing(tmp_path, record_property):
    log, moments = tmp_path / "log", random.Random(0)
    whole, began = start(log, tmp_path / "whole"), time.monotonic()
    while whole.is_alive() and not newest(tmp_path / "whole" / "001"):
        whole.join(0.02)
    starting = time.monotonic() - began  # seconds until the first checkpoint
    to_its_end(whole, tmp_path / "whole" / "001")
    assert whole.exitcode == 0, log.read_text()

    kills, starts, trainings, progress, missing, root = 0, 0, 0, 0, 0, tmp_path / "0"
    while kills < KILLS or progress:
        run = root / "001"
        child = start(log, root)
        starts += 1
        if kills < KILLS:
            at_some_moment(child, moments, run, starting)
        else:
            to_its_end(child, run)
        if child.is_alive():
            child.kill()
            child.join(BOUND)
        if child.exitcode == -signal.SIGKILL:  # else it had ended, or did so at that very moment
            kills += 1
            assert newest(run) >= progress, "a kill took a checkpoint away"
            progress = newest(run)
            continue
        assert child.exitcode == 0, log.read_text()
        assert json.loads((run / "run.json").read_text())["finished"]["step"] == LAST
        assert_same(run, tmp_path / "whole" / "001")
        mine, theirs = measured(run), measured(tmp_path / "whole" / "001")
        assert all(theirs[step] == value for step, value in mine.items())
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]
        missing += len(theirs) - len(mine)
        trainings, progress, root = trainings + 1, 0, tmp_path / str(trainings + 1)
    said = log.read_text()
    # Python's own tracker of resources (python -c ...) may be about to write to a process that has just been killed.
    said = re.sub(r'Traceback .*\n  File "<string>", line 1, in <module>\nBrokenPipeError: .*', "", said)
    assert "Traceback" not in said
    assert said.count("continues at step") > KILLS / 2
    print(f"{kills} kills, {starts} starts, {trainings} trainings, {missing} rows of metrics missing")
    record_property("fault", f"SIGKILL at {KILLS} random moments")
    record_property("happened", "every start continues; the final weights are those of an undisturbed run, to the bit")
    record_property("lost", f"steps since the last checkpoint, and {missing} of {trainings * LAST} rows of metrics.csv")
    record_property("message", "none")

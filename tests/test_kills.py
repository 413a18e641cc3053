"""A small training that is killed at a hundred random moments and ends as if it had not been."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from fault_tools import assert_same, in_a_fork, train

from allpet import runs

KILLS = 100
STEPS = ["--trainer.max_steps", "40"]
BOUND = 300.0  # seconds that one start may take; nothing waits longer


def start(log: Path, root: Path):
    return in_a_fork(log, train, root, *STEPS)


def newest(run: Path) -> int:
    return max((step for step, _ in runs._checkpoints(run / "checkpoints")), default=0)


def measured(run: Path) -> dict[int, str]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork server")
def test_a_hundred_kills_lose_nothing(tmp_path, record_property):
    log, moments = tmp_path / "log", random.Random(0)
    whole = start(log, tmp_path / "whole")
    began = time.monotonic()
    whole.join(BOUND)
    duration = time.monotonic() - began
    assert whole.exitcode == 0, log.read_text()

    kills, starts, roots, progress = 0, 0, [tmp_path / "0"], 0
    while kills < KILLS or progress:
        run = roots[-1] / "001"
        child = start(log, roots[-1])
        starts += 1
        # what a start and some steps take; after the last kill it may end
        child.join(moments.uniform(0, duration) if kills < KILLS else BOUND)
        if child.is_alive():
            child.kill()
            child.join(BOUND)
            kills += 1
            assert child.exitcode == -signal.SIGKILL
            assert kills <= KILLS, "the last start did not end in time"
            assert newest(run) >= progress, "a kill took a checkpoint away"
            progress = newest(run)
            continue
        assert child.exitcode == 0, log.read_text()
        assert json.loads((run / "run.json").read_text())["finished"]["step"] == 40
        assert_same(run, tmp_path / "whole" / "001")
        mine, theirs = measured(run), measured(tmp_path / "whole" / "001")
        assert all(theirs[step] == value for step, value in mine.items())
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]
        progress = 0
        if kills < KILLS:
            roots.append(tmp_path / str(len(roots)))
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("continues at step") > KILLS / 4
    missing = sum(40 - len(measured(root / "001")) for root in roots if (root / "001" / "pretrained").exists())
    print(f"{kills} kills, {starts} starts, {len(roots)} trainings, {missing} rows of metrics missing")
    record_property("fault", f"SIGKILL at {KILLS} random moments")
    record_property("happened", "every start continues; final weights are those of an undisturbed run, to the bit")
    record_property("lost", "the steps since the last checkpoint")
    record_property("message", "none")

"""Commands of README and docs, run as they are given or, for less, in this process.

In this process, make and the shell still do all they do, with recorders in the place of ``allpet`` and ``python``; what
these were asked for then runs here, without the seconds in which a new process imports everything.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from allpet import cli

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# The program's name and its words, each ended by a zero byte, in a file that is named by its turn.
RECORDER = '#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" > "$CALLS/$(ls "$CALLS" | wc -l)"\n'
# Networks that learn nothing worth while, quickly, in the place of the laptop's.
SMALL = {"vae": {"channels": [8, 16]}, "ldm": {"channels": [32, 64], "latent_views": 2}}


def project_copy(place: Path, small: bool) -> Path:
    """Copy to a folder what commands need of the project, with the laptop's networks or small ones."""
    shutil.copy(ROOT / "Makefile", place)
    shutil.copytree(ROOT / "experiments", place / "experiments")
    if small:
        laptop = place / "experiments" / "scale" / "laptop.yaml"
        scale = yaml.safe_load(laptop.read_text())["scale"]
        for stage, changes in SMALL.items():
            assert changes.keys() <= scale[stage].keys()
            scale[stage].update(changes)
        laptop.write_text(yaml.safe_dump({"scale": scale}))
    return place


def run(place: Path, command: str, extra: str, programs: Path = BIN, **variables: str) -> str:
    """Run a command as it is given, with ``extra`` appended to its ARGS; return what it says."""
    words = command.replace("make ", f"make BIN={programs} READY= ", 1)
    if command.startswith(("make", "WANDB")) and extra:
        given = re.search(r'ARGS="([^"]*)"', words)
        words = words.replace(given[0], "") if given else words
        words += f" ARGS={shlex.quote(' '.join(filter(None, [given and given[1], extra])))}"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(
        words, shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


def run_here(place: Path, command: str, extra: str) -> str:
    """Run a command as ``run`` does, but the programs that it starts in this process."""
    programs, calls = place / ".recorders", place / ".calls"
    shutil.rmtree(calls, ignore_errors=True)
    for folder in (programs, calls):
        folder.mkdir(exist_ok=True)
    for name in ("allpet", "python"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    said = run(place, command, extra, programs, CALLS=str(calls))
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, value in re.findall(r"(?:^| )([A-Z_]+)=(\S+)(?=.* make )", command):
            patch.setenv(name, value)
        for number in range(len(list(calls.iterdir()))):
            program, *words = (calls / str(number)).read_bytes().decode().split("\0")[:-1]
            _start(program, words, patch)
    return said + out.getvalue()


def _start(program: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Do what ``allpet`` or ``python`` does with some words."""
    patch.setattr(sys, "argv", [program, *words] if program == "allpet" else words[words[0] == "-m" :])
    try:
        if program == "allpet":
            cli.main()
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            # What a test has imported from the project's own experiments knows the files beside it, not the copies.
            for name, module in list(sys.modules.items()):
                if "experiments" in Path(getattr(module, "__file__", None) or "").parts:
                    patch.delitem(sys.modules, name)
            patch.syspath_prepend(Path(words[0]).parent.resolve())
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            pytest.fail(f"{program} {shlex.join(words)}: {stop.code}")

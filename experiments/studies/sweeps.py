"""Sweep files: the grid they span and the command line of every point.

A *sweep file*, ``experiments/sweeps/NAME.yaml``, is a configuration of W&B's: a program, a command and parameters, each
with a ``value`` or with ``values``. A *point* gives every parameter one value. What W&B's agent would run for a point
is what ``command_line`` returns, so that a grid can be walked with and without an account.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "sweeps"
SIZE, SEED = "data.num_scans", "seed"


def read_sweep(name: str) -> dict[str, Any]:
    """Read a sweep file by its name.

    Raises:
        ValueError: if there is none, or it is no grid.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"There is no sweep {name!r}: choose one of {', '.join(known)}.")
    sweep: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if sweep.get("method") != "grid":
        raise ValueError(f"The sweep {name} has the method {sweep.get('method')!r}, but only a grid can be walked.")
    return sweep


def changed(sweep: dict[str, Any], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return a sweep with values of its own for some parameters: one fixes the parameter, several span the grid."""
    sweep = copy.deepcopy(sweep)
    for name, given in values.items():
        swept = len(given) > 1 or "values" in sweep["parameters"].get(name, {})
        sweep["parameters"][name] = {"values": list(given)} if swept else {"value": given[0]}
    return sweep


def points(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every point, seed by seed, so that the whole curve is there for the first seed first."""
    parameters = sweep["parameters"]
    choices = {name: given["values"] if "values" in given else [given["value"]] for name, given in parameters.items()}
    slowest_first = sorted(choices, key=lambda name: name != SEED)
    found = [
        dict(zip(slowest_first, chosen, strict=True)) for chosen in itertools.product(*map(choices.get, slowest_first))
    ]
    return [{name: point[name] for name in choices} for point in found]


def swept(sweep: dict[str, Any]) -> list[str]:
    """Return the names of the parameters that differ from point to point."""
    return [name for name, given in sweep["parameters"].items() if "values" in given]


def command_line(sweep: dict[str, Any], point: Mapping[str, Any]) -> list[str]:
    """Return the command that W&B's agent runs for a point.

    Raises:
        ValueError: if the command has a macro other than interpreter, program, args and env.
    """
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": ["python"],
        "${program}": [sweep["program"]],
        "${args}": [f"--{name}={value}" for name, value in point.items()],
    }
    words: list[str] = []
    for word in map(str, sweep["command"]):
        if word.startswith("${") and word not in macros:
            raise ValueError(f"The sweep's command has {word}, but only {', '.join(macros)} are known.")
        words += macros.get(word, [word])
    return words


def point_key(point: Mapping[str, Any], names: Sequence[str]) -> str:
    """Name a point by some of its parameters, such as ``num_scans500-seed0``."""
    return "-".join(re.sub(r"[^\w.-]", "_", f"{name.rpartition('.')[2]}{point[name]}") for name in names)


def point_folder(output: str | Path, sweep: str, flags: Mapping[str, Any]) -> Path:
    """Return where a point's trainings lie: named by size and seed, and by a hash of whatever else was said.

    Args:
        output: of all sweeps.
        sweep: its name.
        flags: of the point, in any order; texts and numbers alike. The flag ``output`` does not count.
    """
    texts = {name: str(value) for name, value in flags.items() if name != "output"}
    shown = [name for name in (SIZE, SEED) if name in texts]
    rest = sorted((name, text) for name, text in texts.items() if name not in shown)
    digest = [hashlib.blake2b(json.dumps(rest).encode(), digest_size=4).hexdigest()] if rest else []
    return Path(output) / sweep / "-".join(filter(None, [point_key(texts, shown), *digest]))

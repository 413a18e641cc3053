"""Reports: the numbers a command measured, with what made them.

``outputs/reports/NAME.json`` holds ``command``, ``date``, ``versions``, ``hardware``, ``seeds``, ``rows`` (flat
dictionaries) and whatever else the command adds; ``NAME.md`` holds the rows as a table, to read.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("outputs/reports")
_PACKAGES = ("allpet", "torch", "lightning", "diffusers", "astra-toolbox", "numpy", "scipy")


def write_report(
    name: str, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], folder: str | Path = FOLDER, **more: Any
) -> Path:
    """Write NAME.json and NAME.md, each whole or not at all, and return the path of the first.

    Args:
        name: of the report.
        rows: flat dictionaries of numbers and texts.
        seeds: that the numbers depend on.
        folder: where to.
        more: further keys of the JSON file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "seeds": list(seeds),
        **more,
        "rows": [dict(row) for row in rows],
    }
    heading = f"# {name}\n\n`{report['command']}`, {report['date']}, {report['hardware']['processor']}\n\n"
    path = folder / f"{name}.json"
    _replace(path, json.dumps(report, indent=2) + "\n")
    _replace(folder / f"{name}.md", heading + table(rows) + "\n")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table that also reads well in a terminal; columns in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores, threads in use and GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)

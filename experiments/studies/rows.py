"""Rows of a study: each is a training or a measurement of minutes, kept as a file when it is done.

A study that is stopped goes on where it was: rows that have their file are read, a training that had begun continues
from its last checkpoint. Rows come in order of their worth, so that whatever time there is goes to the most telling;
those that were not run are listed as not run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.memory import forget_process_peak, peak_process_bytes


@dataclass(frozen=True)
class Row:
    """One row of a study.

    Attributes:
        key: names the row and its file, such as ``n500-both-seed0``; letters, digits, ``.``, ``-`` and ``_``.
        facts: columns that are known beforehand.
        measure: returns the other columns; takes the folder that is the row's own.
    """

    key: str
    facts: dict[str, Any]
    measure: Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What there is of a study.

    Attributes:
        done: finished rows, facts and measurements together, in the study's order.
        not_run: keys of those that were not run.
        seconds: of all finished rows together, whenever they ran.
    """

    done: list[dict[str, Any]]
    not_run: list[str]
    seconds: float


def run_rows(
    rows: Sequence[Row],
    folder: Path,
    minutes: float | None = None,
    after_each: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Run what is missing, in order, and return what there is.

    Beside its own columns each row has ``seconds`` and ``peak_mb``: what the process held at most, libraries and data
    included. A training that was there already is in neither. (Where the system does not let a process forget its peak,
    it is that of all rows so far.)

    Args:
        rows: in order of worth.
        folder: of the study; rows are kept in ``rows/KEY.json``, their trainings in ``KEY/``.
        minutes: no row is begun later than that; None for all, 0 for none.
        after_each: called after every row that was run, for example to write the report.

    Raises:
        ValueError: if two rows have the same key, or a kept row has other facts: the study has changed since.
    """
    if len({row.key for row in rows}) != len(rows):
        raise ValueError("Two rows of the study have the same key.")
    collect(rows, folder)  # a study that has changed is refused before anything runs
    began = time.monotonic()
    for row in rows:
        path = _path(folder, row)
        if path.exists() or (minutes is not None and time.monotonic() - began >= 60 * minutes):
            continue
        print(f"=== {row.key}", flush=True)
        start = time.perf_counter()
        forget_process_peak()
        measured = row.measure(folder / row.key)
        spent = {"seconds": round(time.perf_counter() - start, 1), "peak_mb": round(peak_process_bytes() / 1e6)}
        whole = {**row.facts, **measured, **spent}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        os.replace(part, path)
        if after_each is not None:
            after_each(collect(rows, folder))
    return collect(rows, folder)


def collect(rows: Sequence[Row], folder: Path) -> Outcome:
    """Read the finished rows.

    Raises:
        ValueError: if a kept row has other facts: the study has changed since.
    """
    done, not_run = [], []
    for row in rows:
        path = _path(folder, row)
        if not path.exists():
            not_run.append(row.key)
            continue
        kept = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name, value in row.facts.items() if kept.get(name) != value)
        if changed:
            raise ValueError(
                f"{path} was measured with another {', '.join(changed)}: remove {folder} to begin anew, or give the "
                "study another --output."
            )
        done.append({"row": row.key, **kept})
    return Outcome(done, not_run, sum(one["seconds"] for one in done))


def _path(folder: Path, row: Row) -> Path:
    return folder / "rows" / f"{row.key}.json"

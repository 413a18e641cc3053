"""Run a sweep: one training of both stages, or of a bridge, for every point of a grid, and draw the curve.

    python experiments/sweep.py few_shot [--offline] [--minutes 60]      (make sweep SWEEP=few_shot)
    python experiments/sweep.py few_shot --sizes 100 500 2000 --seeds 0 1 --vae-steps 100 --ldm-steps 100

The grid is that of ``experiments/sweeps/NAME.yaml``, a sweep file of W&B's. ``--sizes`` and ``--seeds`` take the place
of its numbers of slices and its seeds; any other ``--NAME VALUE ...`` fixes or sweeps an option of
``experiments/sweep_point.py`` or of ``allpet fit``.

With an account of W&B (``wandb login``, or WANDB_API_KEY) the sweep is created there, and an agent of it runs here;
more agents may join on other machines. Without, with ``--offline`` or with WANDB_MODE=offline, the same command lines
are run one after another. Either way finished points are kept in ``outputs/sweeps``, and a point that was stopped goes
on where it was when the command is given again. Leaves ``outputs/reports/sweep_NAME.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import urlsplit

import yaml
from matplotlib.figure import Figure
from studies.few_shot import spread
from studies.rows import Outcome, Row, collect, run_rows
from studies.sweeps import SEED, SIZE, changed, command_line, point_key, points, read_sweep, swept
from sweep_point import read_point

from allpet.reports import FOLDER, table, write_report
from callbacks.figures import save_figure

SHOWN: dict[str, dict[str, str]] = {
    "few_shot": {
        "kid_conv": "KID, random features",
        "energy_distance": "energy distance",
        "spectrum_image_30mm": "power at 30 mm over real",
        "hl_residual": "Helgason-Ludwig residual",
        "vae_val_loss": "validation loss of stage 1",
        "ldm_val_loss": "validation loss of stage 2",
    },
    "task": {
        "psnr": "PSNR in dB, test",
        "relative_l2": "relative L2 error, test",
    },
}
REMARKS = {
    "few_shot": "Both stages trained anew for every point, for the same numbers of steps; generated slices against the "
    "held-out slices without noise. Dashed: what one half of the held-out patients scores against the other.",
    "task": "A bridge trained anew for every point, for the same number of steps, from the same stage 2; restored test "
    "pairs against what is expected without noise. Dashed: the input as it was given.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the points there is time for and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", help="name of a file in experiments/sweeps")
    parser.add_argument("--offline", action="store_true", help="use no account even where there is one")
    parser.add_argument("--minutes", type=float, help="begin no point later than this, without W&B; 0: only the report")
    parser.add_argument("--project", default="allpet", help="project of W&B")
    parser.add_argument("--reports", type=Path, default=FOLDER)
    options, others = parser.parse_known_args(arguments)
    try:
        sweep = changed(read_sweep(options.sweep), read_values(others))
    except ValueError as error:
        raise SystemExit(f"sweep: {error}") from error
    rows = ready = rows_of(sweep)
    folder = home(sweep, rows)
    if not options.offline and options.minutes is None and has_account():
        run_agent(sweep, options.project)
        ready = [row for row in rows if (read_folder(sweep, row) / "metrics.json").exists()]  # others ran elsewhere

    def report(outcome: Outcome) -> Path:
        return write(options.sweep, sweep, outcome, options.reports)

    run_rows(ready, folder, options.minutes, report)
    outcome = collect(rows, folder)
    path = report(outcome)
    print(f"{len(outcome.done)} points, {len(outcome.not_run)} not run. Numbers: {path}")


def read_values(words: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``--NAME VALUE ...`` and ``--NAME=VALUE``.

    Raises:
        ValueError: if a word is neither name nor value, or a name has no value.
    """
    values: dict[str, list[Any]] = {}
    name = None
    for word in words:
        if word.startswith("-"):
            given, equals, value = word.partition("=")
            name = {"--sizes": SIZE, "--seeds": SEED}.get(given, given.removeprefix("--"))
            if name.startswith("-"):
                raise ValueError(f"{word} cannot be read: write --NAME VALUE.")
            values[name] = [yaml.safe_load(value)] if equals else []
        elif name is None:
            raise ValueError(f"{word} belongs to no option: write --NAME VALUE.")
        else:
            values[name].append(yaml.safe_load(word))
    empty = [name for name, given in values.items() if not given]
    if empty:
        raise ValueError(f"--{empty[0]} has no value: write --{empty[0]} VALUE.")
    return values


def has_account() -> bool:
    """Tell whether W&B has been asked for: a key in the environment, or a login, and no WANDB_MODE against it."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_agent(sweep: dict[str, Any], project: str) -> None:
    """Create the sweep at W&B and run an agent of it until the grid is walked."""
    import wandb

    name = wandb.sweep(sweep, project=project)
    command = [sys.executable, "-m", "wandb", "agent", "--project", project, name]
    subprocess.run(command, env=_environment(), check=True)


def rows_of(sweep: dict[str, Any]) -> list[Row]:
    """Return the points as rows of a study."""
    names = swept(sweep)
    return [
        Row(
            point_key(point, names) or "point",
            {name: value for name, value in point.items() if name != "output"},
            partial(run_point, command_line(sweep, point)),
        )
        for point in points(sweep)
    ]


def run_point(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a point's command, unless it has been run already, and return its numbers.

    Raises:
        SystemExit: if the command fails.
    """
    path = read_point(_options(command)).folder / "metrics.json"
    if not path.exists():
        print(" ".join(command), flush=True)
        ended = subprocess.run(command, env=_environment(), check=False)
        if ended.returncode:
            raise SystemExit(
                f"sweep: The point {folder.name} ended with {ended.returncode}: see its output above; the same command "
                "goes on from there."
            )
    return json.loads(path.read_text(encoding="utf-8"))


def read_folder(sweep: dict[str, Any], row: Row) -> Path:
    """Return the folder of a row's trainings."""
    output = {name: given["value"] for name, given in sweep["parameters"].items() if name == "output"}
    return read_point(_options(command_line(sweep, {**row.facts, **output}))).folder


def home(sweep: dict[str, Any], rows: Sequence[Row]) -> Path:
    """Return the folder of the sweep, which the finished rows are kept in."""
    return read_folder(sweep, rows[0]).parent


def _options(command: Sequence[str]) -> list[str]:
    """Return what a command says behind the name of the program."""
    program = next(i for i, word in enumerate(command) if word.endswith("sweep_point.py"))
    return list(command[program + 1 :])


def _environment() -> dict[str, str]:
    """Return the environment, in which ``python`` is this one: W&B's agents call it so."""
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", "")])}


def write(name: str, sweep: dict[str, Any], outcome: Outcome, reports: Path) -> Path:
    """Write the report of what there is so far."""
    kind = "few_shot" if name == "few_shot" else "task"
    lines = summary(outcome.done, _across(sweep), list(SHOWN[kind]))
    remarks = REMARKS[kind]
    if outcome.not_run:
        remarks += f" Not run: {', '.join(outcome.not_run)}."
    if outcome.done:
        save_figure(curves(outcome.done, _across(sweep), SHOWN[kind]), reports / f"sweep_{name}.png")
    print(table(lines))
    return write_report(
        f"sweep_{name}",
        outcome.done,
        sorted({int(row[SEED]) for row in outcome.done}),
        reports,
        title="Few-shot curve" if kind == "few_shot" else f"Pairs for {name.replace('_', ' ')}",
        remarks=remarks,
        sweep=sweep,
        summary=lines,
        not_run=outcome.not_run,
        row_seconds=outcome.seconds,
    )


def _across(sweep: dict[str, Any]) -> list[str]:
    """Return what is swept besides size and seed: each combination is a line of its own."""
    return [name for name in swept(sweep) if name not in (SIZE, SEED)]


def summary(done: Sequence[dict[str, Any]], across: Sequence[str], shown: Sequence[str]) -> list[dict[str, Any]]:
    """Return one line per size and setting: means and standard deviations over seeds."""
    keys = [SIZE, *across]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in done:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {**dict(zip(keys, values, strict=True)), "seeds": len(group), **spread(group, shown)}
        for values, group in sorted(groups.items())
    ]


def curves(done: Sequence[dict[str, Any]], across: Sequence[str], shown: dict[str, str]) -> Figure:
    """Draw numbers against the number of slices: seeds as points, their means as a line for every setting."""
    columns = min(3, len(shown))
    figure = Figure(figsize=(4.2 * columns, 3.6 * -(-len(shown) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        groups.setdefault(", ".join(f"{name.rpartition('.')[2]} {row[name]}" for name in across), []).append(row)
    for axis, (name, title) in zip(axes.flat, shown.items(), strict=False):
        for label, group in groups.items():
            found = sorted((row[SIZE], row[name]) for row in group if name in row)
            if not found:
                continue
            sizes = sorted({size for size, _ in found})
            means = [mean(value for size, value in found if size == one) for one in sizes]
            (line,) = axis.plot(sizes, means, label=label)
            axis.plot(*zip(*found, strict=True), "o", color=line.get_color(), markersize=4)
        beside = [row[key] for row in done for key in (f"{name}_floor", f"{name}_input") if key in row]
        if beside:
            axis.axhline(mean(beside), color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("training slices" if len(shown) > 3 else "training pairs")
        axis.set_title(title, fontsize=9)
    if across:
        axes.flat[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()

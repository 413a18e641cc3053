"""A contact sheet: slices of a folder to look at, with what the check found above them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.figure import Figure

from allpet.io.atomic import replacing
from data_modules.folder import FoundFile

if TYPE_CHECKING:
    from data_modules.validate import Report


def draw_sheet(report: Report, files: Sequence[FoundFile], path: str | Path, n_slices: int = 24) -> None:
    """Draw evenly spread slices in grey, each from 0 to its own 99.9th percentile.

    Args:
        report: of the check; its errors and warnings stand above the slices.
        files: at least one.
        path: of the PNG.
        n_slices: most slices shown.
    """
    every = [(found, i) for found in files for i in range(len(found.slices))]
    shown = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, min(n_slices, len(every))).astype(int))]
    n_columns = min(6, len(shown))
    n_rows = -(-len(shown) // n_columns)
    lines = [f"{row.level}  {row.file}: {row.finding}"[:150] for row in (*report.errors, *report.warnings)]
    lines = lines[:12] + ([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])
    title = f"{Path(report.folder).name}: {len(every)} {report.kind} slices, {len(report.errors)} error(s), "
    title += f"{len(report.warnings)} warning(s)"
    above = 0.5 + 0.2 * len(lines)
    figure = Figure(figsize=(2.1 * n_columns + 0.2, 2.3 * n_rows + above))
    figure.text(0.02, 1 - 0.25 / figure.get_figheight(), title, fontsize=11, weight="bold", va="center")
    for k, line in enumerate(lines):
        y = 1 - (0.55 + 0.2 * k) / figure.get_figheight()
        figure.text(0.02, y, line, fontsize=8, va="center", parse_math=False)
    top = 1 - above / figure.get_figheight()
    grid = figure.add_gridspec(
        n_rows, n_columns, left=0.02, right=0.98, bottom=0.01, top=top - 0.25 / figure.get_figheight(), hspace=0.2
    )
    aspect: Literal["equal", "auto"] = "equal" if report.kind == "image" else "auto"
    for k, (found, i) in enumerate(shown):
        axes = figure.add_subplot(grid[k // n_columns, k % n_columns])
        image = found.slices[i]
        axes.imshow(image, cmap="gray", vmin=0, vmax=max(float(np.quantile(image, 0.999)), 1e-30), aspect=aspect)
        name = found.name if len(found.name) <= 24 else f"...{found.name[-22:]}"
        axes.set_title(name if len(found.slices) == 1 else f"{name} [{i}]", fontsize=7, parse_math=False)
        axes.set_axis_off()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")

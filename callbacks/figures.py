"""Pictures of sinograms and images, drawn without global state so that they work in any process.

Colour ranges are always given, so that pictures of different moments can be compared. Activity is shown dark on light,
as clinical PET images are; differences are blue (too little) to red (too much).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from allpet.io.atomic import replacing

ACTIVITY = "gray_r"
DIFFERENCE = "RdBu_r"


class Tile(NamedTuple):
    """One picture in a grid.

    Attributes:
        values: ``(rows, columns)`` or ``(views, bins)``.
        limits: values of the two ends of the colour range.
        title: what stands above it.
        colours: name of a matplotlib colour map.
        box: first row, first column, rows and columns of a part to frame; None for none.
    """

    values: Tensor
    limits: tuple[float, float]
    title: str = ""
    colours: str = ACTIVITY
    box: tuple[int, int, int, int] | None = None


def draw_grid(
    rows: Sequence[Sequence[Tile]], labels: Sequence[str], title: str = "", tile_inches: float = 1.3
) -> Figure:
    """Draw rows of tiles.

    Args:
        rows: rows of tiles; no row is longer than the first.
        labels: what stands to the left of each row.
        title: what stands above all.
        tile_inches: width and height of a tile.
    """
    figure, axes = _grid(len(rows), len(rows[0]), title, tile_inches)
    for line, tiles, label in zip(axes, rows, labels, strict=True):
        for axis, tile in zip(line, tiles, strict=False):
            _show(axis, tile)
        for axis in line[len(tiles) :]:
            axis.set_axis_off()
        line[0].set_ylabel(label, fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, whole or not at all."""
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    return Path(path)


def save_animation(frames: Sequence[Sequence[Sequence[Tile]]], labels: Sequence[str], path: str | Path) -> Path:
    """Write an animated GIF.

    Args:
        frames: for each moment, rows of tiles as in ``draw_grid``; shapes and colour ranges are the first moment's.
        labels: what stands above all at each moment.
        path: where to; written whole or not at all.
    """
    figure, axes = _grid(len(frames[0]), len(frames[0][0]), " ", 1.3)
    tiles = [tile for row in frames[0] for tile in row]
    shown = [_show(axis, tile) for axis, tile in zip(axes.flat, tiles, strict=True)]
    pictures = []
    for rows, label in zip(frames, labels, strict=True):
        figure.suptitle(label, fontsize=9)
        for picture, tile in zip(shown, [tile for row in rows for tile in row], strict=True):
            picture.set_data(_array(tile.values))
        pictures.append(Image.fromarray(pixels(figure)))
    # the last moment stays: it is the result
    durations = [120] * (len(pictures) - 1) + [2000]
    with replacing(path) as scratch:
        pictures[0].save(scratch, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return Path(path)


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure, ``(rows, columns, 3)``, uint8: what loggers take as an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def top(values: Tensor) -> float:
    """Upper end of a colour range: the 99.8th percentile of positive activity, at least a little above zero."""
    return max(float(values.detach().float().flatten().quantile(0.998)), 1e-6)


def _grid(n_rows: int, n_columns: int, title: str, inches: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(inches * n_columns + 0.4, (inches + 0.25) * n_rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _show(axis: Axes, tile: Tile) -> AxesImage:
    low, high = tile.limits
    axis.set_title(tile.title, fontsize=7)
    if tile.box is not None:
        row, column, height, width = tile.box
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, fill=False, edgecolor="C3", linewidth=0.8))
    return axis.imshow(
        _array(tile.values), cmap=tile.colours, vmin=low, vmax=high, interpolation="nearest", aspect="auto"
    )


def _array(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()

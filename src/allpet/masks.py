"""Block masks and their projections (RMAS, DMM).

Vocabulary. The image is divided by a *grid* into grid x grid square *cells*, numbered row by row from the top left; an
image mask is a union of a few cells, and its projection is a sinogram mask. RMAS draws which cells (without
replacement, so that the sum of their projections is the projection of their union), DMM also draws how many.
Masks of several sizes take their cells from several grids, whose cells are then numbered one grid after the other.
Cells are drawn by pure functions of a ``torch.Generator``; -1 pads the samples that have fewer cells than others.

Masks are not projected one by one: the projection of every cell is made once (``CellTable``), and a mask is the sum of
a few rows of that table, which is as fast as memory allows. For rectangles of many cells ``RectangleTable`` holds
prefix sums instead, four rows of which make any rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from allpet.geometry import ParallelBeam

PADDING = -1


def cell_edges(image_size: int, grid: int) -> Tensor:
    """Return the pixel at which each row (and column) of cells begins, and the end, ``(grid + 1,)``, int64.

    Cells differ by one pixel in size where the grid does not divide the image.

    Raises:
        ValueError: if the grid has no cell, or more cells than the image has pixels.
    """
    if not 1 <= grid <= image_size:
        raise ValueError(f"grid is {grid}, but must lie between 1 and the image size, {image_size}.")
    return torch.linspace(0, image_size, grid + 1, dtype=torch.float64).round().long()


def cells_in_view(geometry: ParallelBeam, grid: int, criterion: Literal["centre", "whole", "all"] = "centre") -> Tensor:
    """Return the cells that are worth drawing, ``(cells,)``, int64.

    The corners of the image lie outside the field of view, where nothing is measured: of 8 x 8 cells, 52 have their
    centre in the field of view and 32 lie wholly in it.

    Args:
        geometry: gives the image grid and the field of view.
        grid: cells per side.
        criterion: ``centre`` (the cell's centre lies in the field of view), ``whole`` (all of the cell does), ``all``.
    """
    edges = (cell_edges(geometry.image_size, grid).double() - geometry.image_size / 2) * geometry.pixel_mm
    centre = (edges[1:] + edges[:-1]) / 2
    if criterion == "all":
        far = torch.zeros_like(centre)
    elif criterion == "centre":
        far = centre.abs()
    elif criterion == "whole":
        far = torch.maximum(edges[1:].abs(), edges[:-1].abs())
    else:
        raise ValueError(f"criterion is {criterion!r}, but must be 'centre', 'whole' or 'all'.")
    radius = torch.hypot(far[:, None], far[None, :]).flatten()
    return torch.nonzero(radius <= geometry.field_of_view_mm * (1 + 1e-9)).flatten()


def draw_cells(
    batch: int, grid: int, n_cells: tuple[int, int], generator: torch.Generator, allowed: Tensor | None = None
) -> Tensor:
    """Draw the cells of a batch of masks (RMAS); their number is drawn too (DMM).

    Args:
        batch: number of masks.
        grid: cells per side.
        n_cells: fewest and most cells of a mask, both included; every number is equally likely.
        generator: source of the draw.
        allowed: the cells to draw from, for example from ``cells_in_view``; by default all.

    Returns:
        ``(batch, n_cells[1])`` int64 on the generator's device: cells without repetition, then -1.

    Raises:
        ValueError: if the range of numbers is empty, or asks for more cells than there are.
    """
    low, high = n_cells
    count = grid * grid if allowed is None else len(allowed)
    if not 1 <= low <= high <= count:
        raise ValueError(
            f"n_cells is {tuple(n_cells)}, but must be (fewest, most) with 1 <= fewest <= most <= {count}."
        )
    device = generator.device
    cells = torch.rand(batch, count, generator=generator, device=device).topk(high, dim=1).indices
    if allowed is not None:
        cells = allowed.to(device)[cells]
    if low < high:
        number = torch.randint(low, high + 1, (batch, 1), generator=generator, device=device)
        cells = cells.masked_fill(torch.arange(high, device=device) >= number, PADDING)
    return cells


def draw_sizes(
    batch: int,
    grids: Sequence[int],
    n_cells: tuple[int, int],
    generator: torch.Generator,
    allowed: Sequence[Tensor | None],
) -> Tensor:
    """Draw masks of several sizes: each mask draws one of the grids, all equally likely, and then its cells from that.

    Args:
        batch: number of masks.
        grids: cells per side of each grid.
        n_cells: as for ``draw_cells``, for every grid.
        generator: source of the draw.
        allowed: the cells to draw from in each grid, numbered as if it were the only one; None for all.

    Returns:
        ``(batch, n_cells[1])`` int64 as ``draw_cells`` gives it.

    Raises:
        ValueError: as ``draw_cells``, for any of the grids.
    """
    if len(grids) == 1:
        return draw_cells(batch, grids[0], n_cells, generator, allowed[0])
    which = torch.randint(len(grids), (batch, 1), generator=generator, device=generator.device)
    chosen = torch.full((batch, n_cells[1]), PADDING, device=generator.device)
    for number, ((grid, first), own) in enumerate(zip(_with_first_cells(grids), allowed, strict=True)):
        cells = draw_cells(batch, grid, n_cells, generator, own)
        chosen = torch.where((which == number) & (cells >= 0), cells + first, chosen)
    return chosen


def _with_first_cells(grids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each grid and the number of its first cell."""
    first = 0
    for grid in grids:
        yield grid, first
        first += grid * grid


def image_mask(cells: Tensor, geometry: ParallelBeam, grid: int | Sequence[int]) -> Tensor:
    """Draw the masks in the image: 1 in their cells and 0 elsewhere.

    Args:
        cells: ``(batch, cells)`` int64, padded with -1.
        geometry: gives the image grid.
        grid: cells per side, of each grid if there are several.

    Returns:
        ``(batch, 1, rows, columns)`` float32.
    """
    if not isinstance(grid, int):
        parts = []
        for one, first in _with_first_cells(grid):
            own = (cells >= first) & (cells < first + one * one)
            parts.append(image_mask(torch.where(own, cells - first, PADDING), geometry, one))
        return torch.stack(parts).amax(dim=0)
    chosen = torch.zeros(len(cells), grid * grid + 1, device=cells.device)
    chosen.scatter_(1, torch.where(cells < 0, grid * grid, cells), 1.0)
    edges = cell_edges(geometry.image_size, grid)
    cell_of_pixel = torch.repeat_interleave(torch.arange(grid), edges.diff()).to(cells.device)
    blocks = chosen[:, :-1].view(-1, 1, grid, grid)
    return blocks[:, :, cell_of_pixel[:, None], cell_of_pixel[None, :]]


def project_cells(geometry: ParallelBeam, grid: int) -> Tensor:
    """Project every cell of the grid, exactly and averaged over each bin.

    A rectangle's projection is its area times the convolution of two boxes of unit area, of widths
    ``width |cos theta|`` and ``height |sin theta|``; averaging over a bin convolves with a third. A convolution of
    three boxes is a signed sum of eight truncated parabolas. The result is that of ASTRA's strip kernel.

    Returns:
        ``(grid * grid, views, bins)`` float32: length of the rays inside each cell, mm.
    """
    edges = (cell_edges(geometry.image_size, grid).double() - geometry.image_size / 2) * geometry.pixel_mm
    centre, size = (edges[1:] + edges[:-1]) / 2, edges.diff()
    cos, sin = geometry.angles.cos()[:, None], geometry.angles.sin()[:, None]
    # A box may not vanish; at this width the rounding errors of the sum and of the box both stay below 1e-6 of a pixel.
    thinnest = 1e-4 * geometry.pixel_mm
    rows = []
    for row in range(grid):
        for column in range(grid):
            widths = (
                torch.full_like(cos, geometry.bin_mm),
                (size[column] * cos.abs()).clamp_min(thinnest),
                (size[row] * sin.abs()).clamp_min(thinnest),
            )
            # Image rows count downwards and y upwards.
            distance = geometry.bin_centers - (centre[column] * cos - centre[row] * sin)
            total = torch.zeros_like(distance)
            for a in (1, -1):
                for b in (1, -1):
                    for c in (1, -1):
                        t = distance + (a * widths[0] + b * widths[1] + c * widths[2]) / 2
                        total += a * b * c * t.clamp_min(0).square() / 2
            length = total * (size[row] * size[column] / (widths[0] * widths[1] * widths[2]))
            rows.append(length.clamp_min(0).float())
    table = torch.stack(rows)
    table[table < 1e-5 * geometry.pixel_mm] = 0  # rounding errors, which a binary mask would take for rays
    return table


class CellTable:
    """The projections of a grid's cells, ready to be summed into masks on any device.

    A plain object: copies share the table, pickles leave it out (it is made anew in milliseconds), and module
    machinery (state dictionaries, weight averages) does not see it.

    Args:
        geometry: of the sinograms to be masked.
        grid: cells per side, of each grid if there are several.
        mask: ``soft``: the share of each ray's path through the field of view that lies in the mask, in [0, 1] and
            comparable between masks (unlike division by a mask's own maximum); ``binary``: 1 where a ray meets the
            mask.
        dtype: how the table is stored; float16 halves it at a precision of 5e-4 (on CPUs the conversion costs more
            time than the smaller table saves).

    Raises:
        ValueError: if the kind of mask is unknown.
    """

    def __init__(
        self,
        geometry: ParallelBeam,
        grid: int | Sequence[int] = 8,
        mask: Literal["soft", "binary"] = "soft",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if mask not in ("soft", "binary"):
            raise ValueError(f"mask is {mask!r}, but must be 'soft' or 'binary'.")
        self._grids = (grid,) if isinstance(grid, int) else tuple(grid)
        for one in self._grids:
            cell_edges(geometry.image_size, one)  # raises on a grid that does not fit
        self.geometry, self.grid, self.mask, self.dtype = geometry, grid, mask, dtype
        self._tables: dict[torch.device, Tensor] = {}

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the table on a device, ``(cells + 1, views * bins)``; its last row is zero and stands for padding."""
        device = torch.device(device)
        if device not in self._tables:
            if device.type != "cpu":
                self._tables[device] = self.rows().to(device)
            else:
                table = torch.cat([project_cells(self.geometry, grid) for grid in self._grids])
                table = table / _chord(self.geometry) if self.mask == "soft" else (table > 0).float()
                self._tables[device] = functional.pad(table.flatten(1), (0, 0, 0, 1)).to(self.dtype)
        return self._tables[device]

    def masks(self, cells: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Sum the projections of the drawn cells.

        Args:
            cells: ``(batch, cells)`` int64, without repetition, padded with -1.
            device: where the masks are wanted; by default where the cells are.

        Returns:
            ``(batch, 1, views, bins)`` float32 in [0, 1].
        """
        table = self.rows(cells.device if device is None else device)
        padding = len(table) - 1
        index = torch.where(cells < 0, padding, cells).to(table.device, non_blocking=True)
        total = functional.embedding_bag(index, table, mode="sum", padding_idx=padding)
        return total.float().clamp_(max=1.0).view(-1, 1, *self.geometry.sinogram_shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> CellTable:
        return self  # never changed after it is made

    def __repr__(self) -> str:
        return f"CellTable({self.geometry}, grid={self.grid}, mask={self.mask!r}, dtype={self.dtype})"


class RectangleTable:
    """Prefix sums of the projections of a grid's cells, from which any rectangle of cells is four rows.

    A rectangle from row a to b and column c to d is ``P(b, d) - P(a, d) - P(b, c) + P(a, c)``, where P(row, column) is
    the projection of everything above and to the left. The time does not depend on the rectangle's size; for masks of
    a few single cells ``CellTable`` is faster and more precise. A plain object, as ``CellTable``.

    Args:
        geometry: of the sinograms to be masked.
        grid: cells per side.
        mask: ``soft`` or ``binary``, as for ``CellTable``; binary masks leave out rays with less than a thousandth of a
            pixel in the mask.

    Raises:
        ValueError: if the kind of mask is unknown or the grid does not fit.
    """

    def __init__(self, geometry: ParallelBeam, grid: int = 8, mask: Literal["soft", "binary"] = "soft") -> None:
        if mask not in ("soft", "binary"):
            raise ValueError(f"mask is {mask!r}, but must be 'soft' or 'binary'.")
        cell_edges(geometry.image_size, grid)  # raises on a grid that does not fit
        self.geometry, self.grid, self.mask = geometry, grid, mask
        self._tables: dict[torch.device, Tensor] = {}

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the prefix sums on a device, mm, ``((grid + 1) ** 2, views * bins)`` float32, corners row by row."""
        device = torch.device(device)
        if device not in self._tables:
            if device.type != "cpu":
                self._tables[device] = self.rows().to(device)
            else:
                cells = project_cells(self.geometry, self.grid).double().view(self.grid, self.grid, -1)
                sums = cells.cumsum(dim=0).cumsum(dim=1).float()
                self._tables[device] = functional.pad(sums, (0, 0, 1, 0, 1, 0)).flatten(0, 1)
        return self._tables[device]

    def masks(self, rectangles: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Sum the projections of rectangles.

        Args:
            rectangles: ``(batch, rectangles, 4)`` int64: first row, first column, end row, end column, in cells, the
                ends excluded and no smaller than the beginnings; not overlapping. An empty one adds nothing.
            device: where the masks are wanted; by default where the rectangles are.

        Returns:
            ``(batch, 1, views, bins)`` float32 in [0, 1].

        Raises:
            ValueError: if a rectangle does not lie in the grid.
        """
        low, high = rectangles[..., :2], rectangles[..., 2:]
        if bool(((low < 0) | (high > self.grid) | (low > high)).any()):
            raise ValueError(
                f"A rectangle must be (first row, first column, end row, end column) in a grid of {self.grid} x "
                f"{self.grid} cells, with 0 <= first <= end <= {self.grid}."
            )
        table = self.rows(rectangles.device if device is None else device)
        top, left, bottom, right = rectangles.to(table.device, non_blocking=True).unbind(-1)
        corners = [row * (self.grid + 1) + column for row in (top, bottom) for column in (left, right)]
        index = torch.stack(corners, dim=-1).flatten(1)
        signs = table.new_tensor([1.0, -1.0, -1.0, 1.0]).repeat(index.shape[1] // 4).expand(index.shape)
        length = functional.embedding_bag(index, table, mode="sum", per_sample_weights=signs.contiguous())
        length = length.view(-1, 1, *self.geometry.sinogram_shape)
        if self.mask == "binary":
            return (length > 1e-3 * self.geometry.pixel_mm).float()
        return (length / _chord(self.geometry).to(length.device)).clamp_(0.0, 1.0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> RectangleTable:
        return self  # never changed after it is made

    def __repr__(self) -> str:
        return f"RectangleTable({self.geometry}, grid={self.grid}, mask={self.mask!r})"


def _chord(geometry: ParallelBeam) -> Tensor:
    """Each ray's path through the field of view, mm, ``(bins,)`` float32; one pixel at the rim, where it vanishes."""
    chord = 2 * (geometry.field_of_view_mm**2 - geometry.bin_centers**2).clamp_min(0).sqrt()
    return chord.clamp_min(geometry.pixel_mm).float()

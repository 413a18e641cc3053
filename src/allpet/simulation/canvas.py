"""The canvas: registered rasters of activity, attenuation and labels, painted in order of priority.

Shapes are painted on a finer grid with edges as wide as a sample, so that the share of a tissue in a pixel (partial
volume) does not depend on the grid, and are area-averaged at the end. Later paint covers earlier paint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from allpet.geometry import ParallelBeam
from allpet.simulation.fields import Array, Field
from allpet.simulation.solids import Solid, depth_inside
from allpet.simulation.tissues import TISSUES

FINEST_MM = 2.2  # samples of the painting grid are at most this wide
Box = tuple[slice, slice, slice]


class Pose(NamedTuple):
    """Where a body lies in the scanner: shift in mm, then a turn in radians, counter-clockwise."""

    x: float = 0.0
    y: float = 0.0
    turn: float = 0.0


class Patch(NamedTuple):
    """Coverage of part of the canvas.

    Attributes:
        box: slices along (slice, row, column) of the fine grid.
        cover: share of each sample that is covered, 0-1, in the shape of ``box``.
    """

    box: Box
    cover: Array


class Canvas:
    """Rasters of a stack of slices, on a grid some times finer than the geometry's.

    Args:
        geometry: gives the image grid.
        z: height of each slice, mm, ``(n,)``.
        uptakes: one table from rows of tracers to SUV for each scan to be painted.
        texture: field of unit variance that modulates activity inside tissues.
        pose: where the body lies; applies to solids.

    Attributes:
        activity: ``(scans, n, rows, columns)`` on the fine grid, SUV.
        mu: ``(n, rows, columns)`` on the fine grid, 1/mm.
        labels: ``(n, rows, columns)`` on the geometry's grid, uint8.
        stencils: named coverages that solids can be clipped by.
    """

    def __init__(
        self,
        geometry: ParallelBeam,
        z: Array,
        uptakes: Sequence[Mapping[str, float]],
        texture: Field,
        pose: Pose | None = None,
    ) -> None:
        self.z, self.uptakes, self.pose = z, uptakes, pose or Pose()
        self.factor = oversampling(geometry)
        n = geometry.image_size * self.factor
        self.pixel_mm = geometry.pixel_mm / self.factor
        self.x: Array = (np.arange(n) - (n - 1) / 2) * self.pixel_mm
        self.y: Array = -self.x
        self.edge_mm = max(1.5, self.pixel_mm)
        shape = (len(z), n, n)
        self.activity = np.zeros((len(uptakes), *shape), np.float32)
        self.mu = np.full(shape, TISSUES["air"].mu, np.float32)
        self.labels = np.zeros((len(z), geometry.image_size, geometry.image_size), np.uint8)
        self.texture = texture.on_grid(z, self.y, self.x)
        self.stencils: dict[str, Array] = {}

    def cover(self, solid: Solid) -> Patch | None:
        """Return what a solid covers, or None if that is nothing."""
        sections = solid.sections(self.z)
        present = np.flatnonzero((sections[2] > 0.5) & (sections[3] > 0.5))
        if not len(present):
            return None
        # A solid is one piece along z, so the slices it meets are neighbours.
        slices = slice(int(present[0]), int(present[-1]) + 1)
        x, y, a, b, angle, edge = sections[:, slices]
        a, b, edge = np.maximum(a, 0.25), np.maximum(b, 0.25), np.maximum(edge, self.edge_mm)
        cos, sin = math.cos(self.pose.turn), math.sin(self.pose.turn)
        x, y, angle = cos * x - sin * y + self.pose.x, sin * x + cos * y + self.pose.y, angle + self.pose.turn
        # Half-widths of the rotated bounding box; a superellipse lies in the rectangle of its semi-axes.
        cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
        if solid.power == 2 and not solid.lobes:
            half_x, half_y = np.hypot(a * cos, b * sin), np.hypot(a * sin, b * cos)
        else:
            swell = 1 + sum(abs(amplitude) for amplitude, _ in solid.lobes)
            half_x, half_y = (a * cos + b * sin) * swell, (a * sin + b * cos) * swell
        columns = self.span(np.min(x - half_x - edge / 2), np.max(x + half_x + edge / 2))
        rows = self.span(-np.max(y + half_y + edge / 2), -np.min(y - half_y - edge / 2))
        if columns.start >= columns.stop or rows.start >= rows.stop:
            return None
        x, y, a, b, cos, sin, edge = (
            values.astype(np.float32)[:, None, None] for values in (x, y, a, b, np.cos(angle), np.sin(angle), edge)
        )
        dx = self.x[columns].astype(np.float32) - x
        dy = self.y[rows].astype(np.float32)[:, None] - y
        inside = depth_inside(cos * dx + sin * dy, cos * dy - sin * dx, a, b, solid.power, solid.lobes)
        patch = self.soften((slices, rows, columns), inside, edge)
        if solid.within:
            np.multiply(patch.cover, self.stencils[solid.within][patch.box], out=patch.cover)
        return patch

    def soften(self, box: Box, inside_mm: Array, edge_mm: float | Array = 0.0) -> Patch:
        """Turn a depth below a surface (mm, positive inside) into a coverage with edges at least one sample wide."""
        cover = inside_mm / np.maximum(np.float32(self.edge_mm), edge_mm)
        cover += np.float32(0.5)
        return Patch(box, np.clip(cover, 0, 1, out=cover))

    def paint(self, patch: Patch, tissue: str, scale: float | Array = 1.0, suv: Sequence[float] | None = None) -> None:
        """Cover part of the canvas with a tissue.

        Args:
            patch: what to cover.
            tissue: its uptake, texture, attenuation and label are used.
            scale: factor on the uptake.
            suv: uptake in each scan, instead of the tissue's own.
        """
        kind = TISSUES[tissue]
        box, cover = patch
        pattern = np.float32(1) * scale
        if kind.texture:
            pattern = pattern * (1 + np.float32(kind.texture) * self.texture[box])
        if suv is None:
            suv = [uptake[kind.uptake] if kind.uptake else 0.0 for uptake in self.uptakes]
        for activity, level in zip(self.activity, suv, strict=True):
            part = activity[box]
            part += cover * (np.float32(level) * pattern - part)
        part = self.mu[box]
        part += cover * (np.float32(kind.mu) - part)
        self.label(patch, tissue)

    def multiply(self, patch: Patch, tissue: str, factors: Sequence[float]) -> None:
        """Multiply the activity of each scan below a patch and mark it with a tissue's label."""
        for activity, factor in zip(self.activity, factors, strict=True):
            activity[patch.box] *= 1 + patch.cover * np.float32(factor - 1)
        self.label(patch, tissue)

    def label(self, patch: Patch, tissue: str) -> None:
        """Mark the pixels that a patch covers by more than half."""
        (slices, rows, columns), cover = patch
        f = self.factor
        coarse = (slices, slice(rows.start // f, rows.stop // f), slice(columns.start // f, columns.stop // f))
        self.labels[coarse][_average(cover, f) > 0.5] = TISSUES[tissue].label

    def draw(self, solid: Solid) -> None:
        """Paint a solid."""
        if (patch := self.cover(solid)) is not None:
            self.paint(patch, solid.tissue, solid.scale)

    def add_stencil(self, name: str, solid: Solid) -> None:
        """Keep what a solid covers under a name, for clipping."""
        stencil = np.zeros_like(self.mu)
        if (patch := self.cover(solid)) is not None:
            stencil[patch.box] = patch.cover
        self.stencils[name] = stencil

    def averaged(self) -> tuple[Array, Array]:
        """Return activity ``(scans, n, rows, columns)`` and mu ``(n, rows, columns)`` on the geometry's grid."""
        return _average(self.activity, self.factor), _average(self.mu, self.factor)

    def span(self, low: float, high: float) -> slice:
        """Return the samples between two positions in mm, widened by an edge and to whole pixels of the geometry."""
        n, f = len(self.x), self.factor
        first = math.floor((low - self.edge_mm) / self.pixel_mm + (n - 1) / 2)
        last = math.ceil((high + self.edge_mm) / self.pixel_mm + (n - 1) / 2)
        return slice(max(0, first // f * f), max(0, min(n, (last // f + 1) * f)))


def oversampling(geometry: ParallelBeam) -> int:
    """Return how many samples of the painting grid make a pixel's width."""
    return max(1, math.ceil(geometry.pixel_mm / FINEST_MM))


def _average(values: Array, factor: int) -> Array:
    """Average blocks of ``factor x factor`` over the last two axes."""
    if factor == 1:
        return values
    total = sum(values[..., i::factor, j::factor] for i in range(factor) for j in range(factor))
    return np.asarray(total, dtype=np.float32) * np.float32(1 / factor**2)

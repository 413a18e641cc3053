"""The canvas: registered rasters of activity, attenuation and labels, painted in order of priority.

Shapes are painted on a finer grid with edges as wide as a sample, so that the share of a tissue in a pixel (partial
volume) does not depend on the grid, and are area-averaged at the end. Later paint covers earlier paint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allpet.geometry import ParallelBeam
from allpet.simulation.fields import Array, Curve, Field
from allpet.simulation.tissues import TISSUES

FINEST_MM = 2.2  # samples of the painting grid are at most this wide


class Patch(NamedTuple):
    """Coverage of part of the canvas.

    Attributes:
        box: slices along (slice, row, column) of the fine grid.
        cover: share of each sample that is covered, 0-1, in the shape of ``box``.
    """

    box: tuple[slice, slice, slice]
    cover: Array


class Solid(NamedTuple):
    """A soft-edged body whose axial cross-sections are modulated superellipses.

    Attributes:
        tissue: key of ``TISSUES``.
        x, y: centre, mm, along z.
        a, b: semi-axes before rotation, mm, along z.
        z: centre in z, mm.
        half: half of the extent in z, mm; sections shrink as ``(1 - |dz / half| ** taper) ** (1 / taper)``.
        angle: rotation, radians, counter-clockwise.
        power: 2 is an ellipse, larger is squarer.
        taper: 2 is an ellipsoid, larger is nearer a cylinder.
        lobes: relative amplitude and phase of the radius's harmonics k = 2, 3, ...
        scale: factor on the tissue's uptake; for ``multiply`` the factor on what lies below.
        within: name of a stencil that clips the solid; empty for none.
        multiply: multiply the activity by ``scale`` instead of replacing it, and keep the attenuation.
    """

    tissue: str
    x: Curve
    y: Curve
    a: Curve
    b: Curve
    z: float = 0.0
    half: float = math.inf
    angle: Curve = Curve((0.0,), (0.0,))
    power: float = 2.0
    taper: float = 2.0
    lobes: tuple[tuple[float, float], ...] = ()
    scale: float = 1.0
    within: str = ""
    multiply: bool = False

    def sections(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return x, y, a, b and angle of the sections at z, ``(5, len(z))``; a = 0 where there is none."""
        u = np.abs((z - self.z) / self.half)
        shrink = np.maximum(0.0, 1 - u**self.taper) ** (1 / self.taper)
        return np.stack([self.x(z), self.y(z), self.a(z) * shrink, self.b(z) * shrink, self.angle(z)])


class Canvas:
    """Rasters of a stack of slices, on a grid some times finer than the geometry's.

    Args:
        geometry: gives the image grid.
        z: height of each slice, mm, ``(n,)``.
        uptakes: one table tissue row -> SUV per scan to be painted.
        texture: field of unit variance that modulates activity inside tissues.

    Attributes:
        activity: ``(scan, n, rows, columns)`` on the fine grid, SUV.
        mu: ``(n, rows, columns)`` on the fine grid, 1/mm.
        labels: ``(n, rows, columns)`` on the geometry's grid, uint8.
        stencils: named coverages that solids can be clipped by.
    """

    def __init__(
        self,
        geometry: ParallelBeam,
        z: NDArray[np.float64],
        uptakes: Sequence[Mapping[str, float]],
        texture: Field,
    ) -> None:
        self.z, self.uptakes = z, uptakes
        self.factor = max(1, math.ceil(geometry.pixel_mm / FINEST_MM))
        n = geometry.image_size * self.factor
        self.pixel_mm = geometry.pixel_mm / self.factor
        self.x = (np.arange(n) - (n - 1) / 2) * self.pixel_mm
        self.y = -self.x
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
        x, y, a, b, angle = sections[:, slices]
        a, b = np.maximum(a, 0.25), np.maximum(b, 0.25)
        swell = 1 + sum(abs(amplitude) for amplitude, _ in solid.lobes)
        # Half-widths of the rotated bounding box; a superellipse lies in the rectangle of its semi-axes.
        cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
        if solid.power == 2 and not solid.lobes:
            half_x, half_y = np.hypot(a * cos, b * sin), np.hypot(a * sin, b * cos)
        else:
            half_x, half_y = (a * cos + b * sin) * swell, (a * sin + b * cos) * swell
        columns = self._span(np.min(x - half_x), np.max(x + half_x))
        rows = self._span(-np.max(y + half_y), -np.min(y - half_y))
        if columns.start >= columns.stop or rows.start >= rows.stop:
            return None
        box = (slices, rows, columns)
        as_column = lambda values: values.astype(np.float32)[:, None, None]  # noqa: E731
        dx = self.x[columns].astype(np.float32) - as_column(x)
        dy = self.y[rows].astype(np.float32)[:, None] - as_column(y)
        c, s = as_column(np.cos(angle)), as_column(np.sin(angle))
        distance = _inside(c * dx + s * dy, c * dy - s * dx, as_column(a), as_column(b), solid.power, solid.lobes)
        return self.soften(box, distance)

    def soften(self, box: tuple[slice, slice, slice], inside_mm: Array) -> Patch:
        """Turn a depth below a surface (mm, positive inside) into a coverage with edges one sample wide."""
        cover = inside_mm * np.float32(1 / self.edge_mm)
        cover += np.float32(0.5)
        return Patch(box, np.clip(cover, 0, 1, out=cover))

    def paint(self, patch: Patch, tissue: str, scale: float | Array = 1.0) -> None:
        """Cover part of the canvas with a tissue whose uptake is multiplied by ``scale``."""
        kind = TISSUES[tissue]
        box, cover = patch
        pattern = 1 + np.float32(kind.texture) * self.texture[box] if kind.texture else np.float32(1)
        for activity, uptake in zip(self.activity, self.uptakes, strict=True):
            part = activity[box]
            suv = uptake[kind.uptake] if kind.uptake else 0.0
            part += cover * (np.float32(suv) * scale * pattern - part)
        part = self.mu[box]
        part += cover * (np.float32(kind.mu) - part)
        self.label(patch, tissue)

    def multiply(self, patch: Patch, tissue: str, factor: float) -> None:
        """Multiply the activity below a patch by a factor and mark it with a tissue's label."""
        box, cover = patch
        change = 1 + cover * (np.float32(factor - 1) * (1 + np.float32(TISSUES[tissue].texture) * self.texture[box]))
        for activity in self.activity:
            activity[box] *= change
        self.label(patch, tissue)

    def label(self, patch: Patch, tissue: str) -> None:
        """Mark the pixels that a patch covers by more than half."""
        (slices, rows, columns), cover = patch
        f = self.factor
        coarse = (slices, slice(rows.start // f, rows.stop // f), slice(columns.start // f, columns.stop // f))
        self.labels[coarse][_average(cover, f) > 0.5] = TISSUES[tissue].label

    def draw(self, solid: Solid) -> None:
        """Paint a solid."""
        patch = self.cover(solid)
        if patch is None:
            return
        if solid.within:
            np.multiply(patch.cover, self.stencils[solid.within][patch.box], out=patch.cover)
        if solid.multiply:
            self.multiply(patch, solid.tissue, solid.scale)
        else:
            self.paint(patch, solid.tissue, solid.scale)

    def add_stencil(self, name: str, solid: Solid) -> None:
        """Keep what a solid covers under a name, for clipping."""
        stencil = np.zeros_like(self.mu)
        if (patch := self.cover(solid)) is not None:
            stencil[patch.box] = patch.cover
        self.stencils[name] = stencil

    def averaged(self) -> tuple[Array, Array]:
        """Return activity ``(scan, n, rows, columns)`` and mu ``(n, rows, columns)`` on the geometry's grid."""
        return _average(self.activity, self.factor), _average(self.mu, self.factor)

    def _span(self, low: float, high: float) -> slice:
        """Return the samples between two positions in mm, widened by an edge and to whole pixels of the geometry."""
        n, f = len(self.x), self.factor
        first = math.floor((low - self.edge_mm) / self.pixel_mm + (n - 1) / 2)
        last = math.ceil((high + self.edge_mm) / self.pixel_mm + (n - 1) / 2)
        return slice(max(0, first // f * f), max(0, min(n, (last // f + 1) * f)))


def _inside(u: Array, v: Array, a: Array, b: Array, power: float, lobes: Sequence[tuple[float, float]]) -> Array:
    """Return the depth (mm) below the surface of a superellipse, exact to first order near the surface."""
    p, q = u / a, v / b
    rho = np.sqrt(p * p + q * q)
    rho += np.float32(1e-6)
    # |gradient of rho| = hypot(p / a, q / b) / rho
    slope = np.sqrt((p / a) ** 2 + (q / b) ** 2) / rho
    slope += np.float32(1e-6)
    if lobes:
        # cos(k t + phase) by recursion on the unit vector (cos t, sin t)
        cos, sin = p / rho, q / rho
        ck, sk = cos, sin
        radius = np.ones_like(rho)
        for amplitude, phase in lobes:
            ck, sk = ck * cos - sk * sin, sk * cos + ck * sin
            radius += np.float32(amplitude * math.cos(phase)) * ck - np.float32(amplitude * math.sin(phase)) * sk
    if power != 2:
        rho = (np.abs(p) ** np.float32(power) + np.abs(q) ** np.float32(power)) ** np.float32(1 / power)
    return ((radius if lobes else np.float32(1)) - rho) / slope


def _average(values: Array, factor: int) -> Array:
    """Average blocks of ``factor x factor`` over the last two axes."""
    if factor == 1:
        return values
    total = sum(values[..., i::factor, j::factor] for i in range(factor) for j in range(factor))
    return np.asarray(total, dtype=np.float32) * np.float32(1 / factor**2)

"""The sculptor: makes individual solids from standard anatomy.

Standard anatomy is that of an adult of average size, in mm: x to the image's right (the patient's left), y anterior, z
up with 0 at the disc between T12 and L1. Vertebrae are about 33 mm (lumbar) and 24 mm (thoracic) high, so the dome of
the liver is near z = 95, the iliac crest near -140 and the femoral heads near -265.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from allpet.simulation.fields import Curve, Draw
from allpet.simulation.solids import Solid

Knots = float | Sequence[tuple[float, float]]
"""A value that is constant, or ``(z, value)`` pairs joined by straight lines."""


class Build(NamedTuple):
    """A patient's size.

    Attributes:
        female: sex of the anatomy.
        width, depth: stretch of everything inside the fat along x and y.
        fat_mm: thickness of the fat under the skin at the sides.
    """

    female: bool
    width: float
    depth: float
    fat_mm: float


class Sculptor:
    """Collects solids, stretching standard positions to a build and varying them.

    Args:
        draw: source of randomness.
        build: the patient's size.

    Attributes:
        solids: what was added, in order of painting.
    """

    def __init__(self, draw: Draw, build: Build) -> None:
        self.draw, self.build = draw, build
        self.solids: list[Solid] = []

    def make(
        self,
        tissue: str,
        at: tuple[Knots, Knots],
        axes: tuple[Knots, Knots],
        z: tuple[float, float] = (0.0, math.inf),
        angle: Knots = 0.0,
        *,
        vary: float = 0.05,
        move: float = 2.0,
        lobes: float = 0.0,
        power: float = 2.0,
        taper: float = 2.0,
        scale: float = 1.0,
        within: str = "",
        edge: Knots = 0.0,
    ) -> Solid:
        """Make a varied solid.

        Args:
            tissue: what it is made of.
            at: x and y of the centre, mm.
            axes: semi-axes before rotation, mm; with lobes they also vary smoothly along z.
            z: centre and half extent along z, mm.
            angle: rotation, radians, counter-clockwise.
            vary: relative spread of its size between patients.
            move: spread of its position between patients, mm.
            lobes: amplitude of the outline's harmonics.
            power: exponent of the superellipse.
            taper: exponent of the extent along z.
            scale: factor on the tissue's uptake.
            within: name of a stencil that clips the solid.
            edge: width of an edge that motion blurs, mm.
        """
        d, build = self.draw, self.build
        size, shift = d.normal(1.0, vary), d.normal(0.0, 2 * move)
        phases = [(lobes / k * d.uniform(0.3, 1.0), d.uniform(0, 2 * math.pi)) for k in (2, 3, 4)]
        x, y = d.curve(_stretch(at[0], build.width, shift), move), d.curve(_stretch(at[1], build.depth, shift), move)
        a, b = (
            d.curve(_stretch(axis, factor * size * d.normal(1.0, vary / 2), shift))
            for axis, factor in zip(axes, (build.width, build.depth), strict=True)
        )
        if lobes:
            a, b = (curve._replace(waves=d.curve(0.0, 0.03 * max(curve.levels), 30.0).waves) for curve in (a, b))
        return Solid(
            tissue,
            x,
            y,
            a,
            b,
            z=z[0] + shift,
            half=z[1] * size,
            angle=d.curve(_stretch(angle, 1.0, shift), 0.05 if lobes else 0.0),
            power=power,
            taper=taper,
            lobes=tuple(phases) if lobes else (),
            scale=scale,
            within=within,
            edge=d.curve(_stretch(edge, 1.0, shift)),
        )

    def add(
        self,
        tissue: str,
        at: tuple[Knots, Knots],
        axes: tuple[Knots, Knots],
        z: tuple[float, float] = (0.0, math.inf),
        angle: Knots = 0.0,
        **options: float | str | Knots,
    ) -> Solid:
        """Make a solid as ``make`` does and append it."""
        self.solids.append(self.make(tissue, at, axes, z, angle, **options))  # type: ignore[arg-type]
        return self.solids[-1]

    def fill(
        self,
        outer: Solid,
        tissue: str,
        part: float | tuple[float, float],
        shift: tuple[float, float] = (0.0, 0.0),
        scale: float = 1.0,
        tall: float | None = None,
    ) -> Solid:
        """Append what fills a solid.

        Args:
            outer: the solid to fill.
            tissue: with what.
            part: share of its size, or of its first and second axis.
            shift: of the centre, mm.
            scale: factor on the tissue's uptake.
            tall: share of its extent along z; by default that of its larger axis.
        """
        along, across = part if isinstance(part, tuple) else (part, part)
        inner = outer._replace(
            tissue=tissue,
            x=offset(outer.x, shift[0]),
            y=offset(outer.y, shift[1]),
            a=scaled(outer.a, along),
            b=scaled(outer.b, across),
            half=outer.half * (tall or max(along, across)),
            scale=scale,
        )
        self.solids.append(inner)
        return inner


def scaled(curve: Curve, factor: float) -> Curve:
    """Return a curve times a factor."""
    waves = tuple((amplitude * factor, frequency, phase) for amplitude, frequency, phase in curve.waves)
    return Curve(curve.knots, tuple(level * factor for level in curve.levels), waves)


def offset(curve: Curve, by: float) -> Curve:
    """Return a curve plus a constant."""
    return curve._replace(levels=tuple(level + by for level in curve.levels))


def _stretch(knots: Knots, factor: float, shift: float) -> Knots:
    """Multiply values by a factor and move them along z."""
    if isinstance(knots, (int, float)):
        return knots * factor
    return [(z + shift, value * factor) for z, value in knots]

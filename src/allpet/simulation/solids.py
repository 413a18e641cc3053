"""Solids: soft-edged bodies whose axial cross-sections are modulated superellipses that change smoothly with z."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allpet.simulation.fields import Array, Curve


class Solid(NamedTuple):
    """A body made of one tissue.

    Attributes:
        tissue: key of ``TISSUES``.
        x, y: centre, mm, along z.
        a, b: semi-axes before rotation, mm, along z.
        z: centre in z, mm.
        half: half of the extent in z, mm; sections shrink as ``(1 - |dz / half| ** taper) ** (1 / taper)``.
        angle: rotation, radians, counter-clockwise, along z.
        power: exponent of the superellipse: 2 is an ellipse, larger is squarer.
        taper: exponent along z: 2 is an ellipsoid, larger is nearer a cylinder.
        lobes: relative amplitude and phase of the radius's harmonics k = 2, 3, ...
        scale: factor on the tissue's uptake.
        within: name of a stencil that clips the solid; empty for none.
        edge: width of the edge in mm along z, where motion blurs it; 0 is sharp.
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
    edge: Curve = Curve((0.0,), (0.0,))

    def sections(self, z: Array) -> Array:
        """Return x, y, a, b, angle and edge of the sections at z, ``(6, len(z))``; a = 0 where there is none."""
        u = np.abs((z - self.z) / self.half)
        shrink = np.maximum(0.0, 1 - u**self.taper) ** (1 / self.taper)
        return np.stack([self.x(z), self.y(z), self.a(z) * shrink, self.b(z) * shrink, self.angle(z), self.edge(z)])

    def contains(self, x: float, y: float, z: float, part: float = 1.0) -> bool:
        """Return whether a point (mm) lies inside the solid shrunk to a part of its size, lobes and clipping aside."""
        cx, cy, a, b, angle, _ = self.sections(np.array([z]))[:, 0]
        if min(a, b) < 0.5:
            return False
        cos, sin = math.cos(angle), math.sin(angle)
        u, v = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)
        return abs(u / a) ** self.power + abs(v / b) ** self.power < part**self.power


def depth_inside(u: Array, v: Array, a: Array, b: Array, power: float, lobes: Sequence[tuple[float, float]]) -> Array:
    """Return the depth (mm) below the surface of a superellipse, exact to first order near the surface of an ellipse.

    Args:
        u: position along the first axis, mm.
        v: position along the second axis, mm.
        a: first semi-axis, mm.
        b: second semi-axis, mm.
        power: exponent of the superellipse.
        lobes: relative amplitude and phase of the radius's harmonics k = 2, 3, ...
    """
    p, q = u / a, v / b
    rho = np.sqrt(p * p + q * q)
    rho += np.float32(1e-6)
    # |gradient of rho| = hypot(p / a, q / b) / rho
    slope = np.sqrt((p / a) ** 2 + (q / b) ** 2) / rho
    slope += np.float32(1e-6)
    radius: Array = np.ones((), np.float32)
    if lobes:
        # cos(k t + phase) by recursion on the unit vector (cos t, sin t).
        cos, sin = p / rho, q / rho
        ck, sk = cos, sin
        for amplitude, phase in lobes:
            ck, sk = ck * cos - sk * sin, sk * cos + ck * sin
            radius = (
                radius + np.float32(amplitude * math.cos(phase)) * ck - np.float32(amplitude * math.sin(phase)) * sk
            )
    if power != 2:
        rho = (np.abs(p) ** np.float32(power) + np.abs(q) ** np.float32(power)) ** np.float32(1 / power)
    return np.asarray((radius - rho) / slope)

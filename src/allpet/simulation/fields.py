"""Smooth random things: draws, curves along the body axis and periodic fields in space.

Everything here is evaluated with plain numpy element by element, so that results are bit-identical whatever the number
of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from allpet.simulation.tracers import lognormal

Array = NDArray[np.floating]


class Draw:
    """Short names for draws from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw evenly between two values."""
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def normal(self, mean: float = 0.0, sd: float = 1.0) -> float:
        """Draw a normal value cut at 2.5 sd, so that anatomy stays possible."""
        z = torch.randn((), generator=self.generator, dtype=torch.float64).item()
        return mean + sd * max(-2.5, min(2.5, z))

    def lognormal(self, mean: float, sd: float) -> float:
        """Draw a lognormal value of given mean and sd, cut at 2.5 sd of its logarithm."""
        return lognormal(mean, sd, self.normal())

    def chance(self, probability: float) -> bool:
        """Draw a yes with a probability."""
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """Draw a whole number from ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator).item())

    def curve(self, values: float | Sequence[tuple[float, float]], sd: float = 0.0, length_mm: float = 60.0) -> Curve:
        """Draw a curve along z: given values (one, or ``(z, value)`` pairs) plus a smooth random deviation.

        Args:
            values: constant, or points joined by straight lines.
            sd: standard deviation of the random part.
            length_mm: distance over which the random part changes.
        """
        pairs = [(0.0, values)] if isinstance(values, (int, float)) else sorted(values)
        knots = tuple(float(z) for z, _ in pairs)
        levels = tuple(float(v) for _, v in pairs)
        if sd == 0.0:
            return Curve(knots, levels)
        # An offset of the whole and three waves, equal in power.
        waves = [
            (sd * math.sqrt(0.5), 1 / (length_mm * self.uniform(0.8, 3.0)), self.uniform(0, 2 * math.pi))
            for _ in range(3)
        ]
        offset = self.normal(0.0, sd / 2)
        return Curve(knots, tuple(level + offset for level in levels), tuple(waves))


class Curve(NamedTuple):
    """A smooth function of z: straight lines between knots plus cosine waves.

    Attributes:
        knots: z of the knots, mm, ascending.
        levels: values there.
        waves: ``(amplitude, radians per mm, phase)`` of each wave.
    """

    knots: tuple[float, ...]
    levels: tuple[float, ...]
    waves: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, z: Array) -> Array:
        """Return the values at z (mm), in the shape of z."""
        value = np.interp(z, self.knots, self.levels)
        for amplitude, frequency, phase in self.waves:
            value = value + amplitude * np.cos(frequency * z + phase)
        return value


class Field(NamedTuple):
    """A smooth, periodic, random field of unit variance in space.

    Attributes:
        nodes: cubic B-spline coefficients, ``(n, n, n)`` ordered z, y, x.
        pitch_mm: distance between nodes; features are about twice as wide.
    """

    nodes: Array
    pitch_mm: float

    @classmethod
    def draw(cls, generator: torch.Generator, n: int, pitch_mm: float) -> Field:
        """Draw a field with period ``n * pitch_mm``."""
        # A cubic B-spline's squared weights average 151/315 per axis; dividing by that gives unit variance.
        nodes = torch.randn(n, n, n, generator=generator).numpy() / np.float32((151 / 315) ** 1.5)
        return cls(nodes.astype(np.float32), pitch_mm)

    def on_grid(self, z: Array, y: Array, x: Array) -> Array:
        """Return the field on a grid of z, y and x (mm): ``(len(z), len(y), len(x))``."""
        values = self.nodes
        for axis, positions in enumerate((z, y, x)):
            values = _interpolate(values, positions / self.pitch_mm, axis)
        return values


def _interpolate(values: Array, positions: Array, axis: int) -> Array:
    """Evaluate periodic cubic B-splines along one axis at positions given in nodes."""
    n = values.shape[axis]
    base = np.floor(positions).astype(np.int64)
    t = positions - base
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    shape = [1] * values.ndim
    shape[axis] = -1
    total: Array | None = None
    for offset, weight in enumerate(weights):
        term = np.take(values, (base + offset - 1) % n, axis=axis) * (weight / 6).astype(np.float32).reshape(shape)
        total = term if total is None else total + term
    assert total is not None
    return total

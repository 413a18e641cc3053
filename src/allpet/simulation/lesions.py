"""Lesions with known truth: hot and cold, where each tracer finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from allpet.simulation.canvas import Canvas
from allpet.simulation.fields import Curve, Draw
from allpet.simulation.sculptor import scaled
from allpet.simulation.solids import Solid
from allpet.simulation.tracers import Tracer, lognormal
from allpet.simulation.trunk import Trunk, tissue_at

# Where lesions arise in each region: tissue -> (weight, site named in tracers' tables).
_SITES = {
    "chest": {"lung": (4, "visceral"), "mediastinum": (3, "node"), "marrow": (2, "bone"), "rib": (1, "bone")},
    "abdomen": {"liver": (4, "visceral"), "fat": (2, "node"), "marrow": (2, "bone"), "kidney": (1, "visceral")},
    "pelvis": {"fat": (3, "node"), "marrow": (3, "bone"), "prostate": (3, "local")},
}
_LESION_FREE, _MEAN_COUNT, _MOST = 0.2, 3.5, 8  # per region of a patient, some 15 cm long
_COLD, _INFLAMED = 0.35, 0.25  # shares of the lesions in liver and kidney, and of all others

_HOT = 1.5  # mean contrast above which lesions of a kind are always brighter than the tissue around


class Lesion(NamedTuple):
    """One lesion.

    Attributes:
        solid: its shape.
        host: the tissue it grew in.
        kinds: rows of a tracer's table that may describe it, the first that is there holds.
        deviation: standard normal deviates of its uptake and of its late factor.
        core: uptake of its dead core relative to the rim; 1 if it has none.
    """

    solid: Solid
    host: str
    kinds: tuple[str, ...]
    deviation: tuple[float, float]
    core: float


class HeadLesion(NamedTuple):
    """One lesion of a brain.

    Attributes:
        kind: ``glioma``, a mass; or ``hypometabolism``, a soft patch of cortex that works less.
        centre: x, y, z in the average brain, mm.
        size_mm: radius of a mass, standard deviation of a patch.
        deviation: as in ``Lesion``.
    """

    kind: str
    centre: tuple[float, float, float]
    size_mm: float
    deviation: tuple[float, float]


def draw_lesions(draw: Draw, trunk: Trunk, region: str, z_range_mm: tuple[float, float]) -> tuple[Lesion, ...]:
    """Draw the lesions of a region of a trunk; their places do not depend on the tracer.

    Args:
        draw: source of randomness.
        trunk: the anatomy they grow in.
        region: ``chest``, ``abdomen`` or ``pelvis``.
        z_range_mm: heights between which their centres lie.
    """
    if draw.chance(_LESION_FREE):
        return ()
    count = min(_MOST, 1 + int(torch.poisson(torch.tensor(_MEAN_COUNT), generator=draw.generator).item()))
    lesions = []
    for _ in range(count):
        if (lesion := _draw_lesion(draw, trunk, region, z_range_mm)) is not None:
            lesions.append(lesion)
    return tuple(lesions)


def _draw_lesion(draw: Draw, trunk: Trunk, region: str, z_range_mm: tuple[float, float]) -> Lesion | None:
    """Draw one lesion, or None if no place for it is found in a few tries."""
    sites = _SITES[region]
    pick = draw.uniform(0, sum(weight for weight, _ in sites.values()))
    for host, (weight, site) in sites.items():  # noqa: B007
        pick -= weight
        if pick < 0:
            break
    if (place := _find_place(draw, trunk, host, z_range_mm)) is None:
        return None
    diameter = min(60.0, max(6.0, 16.0 * math.exp(draw.normal(0, 0.45))))
    cold = host in ("liver", "kidney") and draw.chance(_COLD)
    core = draw.uniform(0.2, 0.5) if diameter > 25 and draw.chance(0.15) else 1.0
    kinds = ("cyst",) if cold else ("inflammatory",) if draw.chance(_INFLAMED) else (site, "malignant")
    axes = [diameter / 2 * draw.uniform(0.8, 1.2) for _ in range(3)]
    lobes = tuple((0.12 / k * draw.uniform(0.3, 1.0), draw.uniform(0, 2 * math.pi)) for k in (2, 3, 4))
    angle, deviation = draw.uniform(0, math.pi), (draw.normal(), draw.normal())
    x, y, z = place
    a, b, x_curve, y_curve, turn = (Curve((0.0,), (value,)) for value in (axes[0], axes[1], x, y, angle))
    tissue = "lesion_cold" if cold else "lesion_hot"
    solid = Solid(tissue, x_curve, y_curve, a, b, z, axes[2], turn, lobes=lobes, within="body")
    return Lesion(solid, host, kinds, deviation, core)


def _find_place(
    draw: Draw, trunk: Trunk, host: str, z_range_mm: tuple[float, float]
) -> tuple[float, float, float] | None:
    """Find a point in a tissue by trial; fat counts only inside the cavity, where nodes lie."""
    solids = [solid for solid in trunk.solids if solid.tissue == host]
    if not solids:
        return None
    for _ in range(12):
        solid, z = solids[draw.integer(0, len(solids) - 1)], draw.uniform(*z_range_mm)
        radius, bearing = 0.85 * math.sqrt(draw.uniform()), draw.uniform(0, 2 * math.pi)
        cx, cy, a, b, angle, _ = solid.sections(np.array([z]))[:, 0]
        u, v = a * radius * math.cos(bearing), b * radius * math.sin(bearing)
        x, y = cx + math.cos(angle) * u - math.sin(angle) * v, cy + math.sin(angle) * u + math.cos(angle) * v
        inside = host != "fat" or trunk.stencils["cavity"].contains(x, y, z)
        if min(a, b) > 2 and inside and tissue_at(trunk, x, y, z) == host:
            return float(x), float(y), z
    return None


def draw_head_lesions(draw: Draw) -> tuple[HeadLesion, ...]:
    """Draw the lesions of a brain: most have none, some a patch of low metabolism on one or both sides, few a mass."""
    lesions = []
    side = -1 if draw.chance(0.5) else 1
    both = draw.chance(0.6)
    deviation = (draw.normal(), draw.normal())
    size = draw.uniform(11.0, 20.0)
    if draw.chance(0.25):
        if both:  # temporo-parietal, as in Alzheimer's disease
            y, z = draw.uniform(-62, -42), draw.uniform(18, 42)
            lesions = [HeadLesion("hypometabolism", (x, y, z), size, deviation) for x in (-48.0 * side, 44.0 * side)]
        else:  # temporal, as in epilepsy
            where = (side * 44.0, draw.uniform(-30, 0), draw.uniform(-28, -12))
            lesions = [HeadLesion("hypometabolism", where, size, deviation)]
    if draw.chance(0.1):
        where = (-side * draw.uniform(16, 42), draw.uniform(-50, 38), draw.uniform(2, 42))
        lesions.append(HeadLesion("glioma", where, draw.uniform(7.0, 20.0), (draw.normal(), draw.normal())))
    return tuple(lesions)


def lesion_level(
    kinds: tuple[str, ...],
    deviation: tuple[float, float],
    tracer: Tracer,
    minutes: float | None,
    around: float,
    blood: float,
) -> float | None:
    """Return a lesion's SUV for a tracer; None where its table has no row for it and so does not show it.

    Args:
        kinds: rows that may describe the lesion; the first that is there holds.
        deviation: standard normal deviates of uptake and late factor.
        tracer: the table.
        minutes: time after injection; None is the table's.
        around: SUV of the tissue around, which contrasts refer to.
        blood: SUV of the blood; contrasts of hot lesions refer to it where the tissue around takes up less, so that a
            tumour in the lung or in fat is no fainter than others.
    """
    for kind in kinds:
        if (row := tracer.lesions.get(kind)) is None:
            continue
        if row.group == "suv":
            level = lognormal(row.mean, row.sd, deviation[0])
        elif row.mean > _HOT:
            # The excess over the tissue around is what is spread, so that a hot lesion is never cold.
            level = max(around, blood) * (1 + lognormal(row.mean - 1, row.sd, deviation[0]))
        else:
            level = around * lognormal(row.mean, row.sd, deviation[0])
        return level * tracer.late_factor(row, deviation[1], minutes)
    return None


def paint_lesion(canvas: Canvas, lesion: Lesion, levels: Sequence[float]) -> None:
    """Paint a lesion of a trunk with its SUV in each scan."""
    if (patch := canvas.cover(lesion.solid)) is None:
        return
    canvas.paint(patch, lesion.solid.tissue, suv=levels)
    if lesion.core < 1:
        rim = lesion.solid
        core = rim._replace(a=scaled(rim.a, 0.6), b=scaled(rim.b, 0.6), half=0.6 * rim.half)
        if (patch := canvas.cover(core)) is not None:
            canvas.paint(patch, rim.tissue, suv=[lesion.core * level for level in levels])

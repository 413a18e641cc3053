"""Trunks: chest, abdomen and pelvis of one patient: wall, bones and, from ``viscera``, organs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from allpet.simulation import viscera
from allpet.simulation.canvas import Canvas, Pose
from allpet.simulation.fields import Array, Curve, Draw
from allpet.simulation.sculptor import Build, Sculptor, offset, scaled
from allpet.simulation.solids import Solid

Z_RANGES_MM = {"chest": (70.0, 215.0), "abdomen": (-95.0, 60.0), "pelvis": (-295.0, -165.0)}

# Half-width and half-depth of the trunk inside the fat, and of the cavity inside muscles and bones; (z, mm).
_MUSCLE_Z = (-300, -250, -200, -140, -60, 20, 100, 170, 225)
_MUSCLE = (
    list(zip(_MUSCLE_Z, (150, 152, 146, 136, 136, 144, 151, 155, 158), strict=True)),
    list(zip(_MUSCLE_Z, (92, 96, 95, 91, 94, 103, 106, 100, 88), strict=True)),
)
_CAVITY_Z = (-310, -270, -230, -200, -150, -60, 20, 100, 170, 225)
_CAVITY = (
    list(zip(_CAVITY_Z, (36, 62, 80, 98, 113, 120, 130, 134, 124, 100), strict=True)),
    list(zip(_CAVITY_Z, (34, 54, 60, 64, 68, 76, 86, 92, 83, 62), strict=True)),
)
_WIDEST_MM = 160.0  # of the muscles
_WAVINESS = 1.07  # by which lobes and waves may widen the outline


class Trunk(NamedTuple):
    """A patient's trunk.

    Attributes:
        build: its size.
        pose: where it lies in the scanner.
        solids: what to paint, in order.
        stencils: named solids that others are clipped by.
    """

    build: Build
    pose: Pose
    solids: tuple[Solid, ...]
    stencils: dict[str, Solid]


def draw_trunk(draw: Draw, limit_mm: float, sex: str = "") -> Trunk:
    """Draw a patient's trunk that fits in a field of view of radius ``limit_mm``, of a given sex or any."""
    pose = Pose(draw.normal(0, 3.0), draw.normal(0, 3.0), draw.normal(0, 0.025))
    limit_mm -= math.hypot(pose.x, pose.y)
    build = draw_build(draw, limit_mm, sex)
    sculptor = Sculptor(draw, build)
    stencils = _add_wall(sculptor, limit_mm)
    viscera.add_lungs(sculptor)
    _add_spine(sculptor)
    _add_pelvic_bones(sculptor)
    viscera.add_organs(sculptor)
    return Trunk(build, pose, tuple(sculptor.solids), stencils)


def draw_build(draw: Draw, limit_mm: float, sex: str = "") -> Build:
    """Draw a patient's size; one too large for a field of view of radius ``limit_mm`` is shrunk to fit."""
    female = draw.chance(0.45)  # drawn in any case, so that a given sex changes nothing else
    if sex:
        female = sex == "female"
    size = draw.normal(0.93 if female else 1.0, 0.03)
    # A large abdomen attenuates about 28-fold along its longest line; normal tails would give 40-fold and more.
    weight = min(max(draw.normal(), -2.0), 1.5)
    build = Build(
        female,
        width=size * (1 + 0.02 * weight) * draw.normal(1.0, 0.015),
        depth=size * (1 + 0.07 * weight) * draw.normal(1.0, 0.035),
        fat_mm=max(5.0, 14.0 + 5.0 * weight + draw.normal(0, 2.0) + (4.0 if female else 0.0)),
    )
    shrink = min(1.0, limit_mm / (_WAVINESS * (_WIDEST_MM * build.width + build.fat_mm)))
    return build._replace(width=build.width * shrink, depth=build.depth * shrink, fat_mm=build.fat_mm * shrink)


def paint_trunk(canvas: Canvas, trunk: Trunk) -> None:
    """Paint a trunk on an empty canvas."""
    for name, solid in trunk.stencils.items():
        canvas.add_stencil(name, solid)
    for solid in trunk.solids:
        canvas.draw(solid)


def tissue_at(trunk: Trunk, x: float, y: float, z: float) -> str:
    """Return the tissue at a point of the body (mm, before its pose), or ``air``."""
    for solid in reversed(trunk.solids):
        if solid.contains(x, y, z) and (not solid.within or trunk.stencils[solid.within].contains(x, y, z)):
            return solid.tissue
    return "air"


def _add_wall(s: Sculptor, limit_mm: float) -> dict[str, Solid]:
    """Add arms, breasts, skin, fat, muscle, the fatty cavity and ribs; return the stencils ``body`` and ``cavity``."""
    d, build = s.draw, s.build
    power, fat = d.uniform(2.1, 2.5), build.fat_mm
    muscle = s.make("muscle", (0, 0), _MUSCLE, power=power, lobes=0.04, vary=0.0, move=0.0)
    # Fat is thicker on the belly than at the back.
    body = muscle._replace(
        tissue="fat", y=offset(muscle.y, 0.15 * fat), a=offset(muscle.a, fat), b=offset(muscle.b, 0.8 * fat)
    )
    skin = body._replace(tissue="skin", a=offset(body.a, 2.0), b=offset(body.b, 2.0))
    cavity = s.make("fat", (0, 10), _CAVITY, power=power, lobes=0.03, vary=0.0, move=0.0)
    arm = d.uniform(34.0, 46.0) * build.width
    reach = _WAVINESS * (_WIDEST_MM * build.width + fat) + arm
    if d.chance(0.3) and reach + 1.1 * arm < limit_mm:  # otherwise they are raised, out of the slices
        for side in (-1, 1):
            _add_arm(s, side * reach, arm)
    if build.female:
        height, apart = d.uniform(18, 36), d.uniform(66, 80)
        for side in (-1, 1):
            front = 92 + 0.9 * fat / build.depth
            s.add("breast", (side * apart, front), (56, height), (142, 60), side * -0.3, lobes=0.05)
    s.solids += [skin, body, muscle]
    for side in (-1, 1):  # fat between the layers of the back's muscles
        s.add("fat", (side * 62, -78), (10, 3.5), (20, 150), side * 0.5, move=4)
    s.solids.append(cavity)
    for k in range(12):
        _add_ribs(s, cavity, k)
    for side in (-1, 1):  # shoulder blades
        s.add("rib", (side * 104, -74), (34, 4.5), (192, 62), side * 0.55, taper=4, move=4)
    s.add("marrow", (0, [(90, 99), (140, 100), (215, 82)]), (17, 6), (160, 62), taper=8, lobes=0.05)  # breastbone
    return {"body": skin, "cavity": cavity}


def _add_arm(s: Sculptor, x_mm: float, radius_mm: float) -> None:
    """Add an arm that hangs down."""
    x, y = s.draw.curve(x_mm, 2.0), s.draw.curve([(-300, 10), (220, -25)], 5.0)
    for tissue, part in (
        ("fat", 1.0),
        ("muscle", s.draw.uniform(0.72, 0.88)),
        ("cortical_bone", 0.3),
        ("marrow", 0.17),
    ):
        s.solids.append(
            Solid(tissue, x, y, Curve((0.0,), (radius_mm * part,)), Curve((0.0,), (1.05 * radius_mm * part,)))
        )


def _add_ribs(s: Sculptor, cavity: Solid, k: int) -> None:
    """Add a pair of ribs: from its vertebra each goes down around the wall; an axial slice cuts it in one short arc."""
    top = 285 - 24.5 * k - (6 if k > 9 else 0)
    turn = 2.5 if k < 9 else 1.3  # floating ribs are short
    z = np.linspace(top - 38 * turn, top, 7)
    _, cy, a, b = cavity.sections(z)[:4]
    cx = cavity.x(z)
    bearing = (top - z) / 38 + 0.28  # 0 behind, pi in front
    for side in (-1, 1):
        x, y = cx + side * (a + 4) * np.sin(bearing), cy - (b + 4) * np.cos(bearing)
        along = np.arctan2((b + 4) * np.sin(bearing), side * (a + 4) * np.cos(bearing))
        s.solids.append(
            Solid(
                "rib",
                _through(z, x),
                _through(z, y),
                Curve((0.0,), (21.0,)),
                Curve((0.0,), (4.6,)),
                z=float(z.mean()),
                half=float(np.ptp(z) / 2 + 2),
                angle=_through(z, np.unwrap(along)),
                taper=6.0,
            )
        )


def _through(z: Array, values: Array) -> Curve:
    """Return the curve through points with ascending z."""
    return Curve(tuple(z.tolist()), tuple(values.tolist()))


def _add_spine(s: Sculptor) -> None:
    """Add psoas muscles and vertebrae: body, arch around the canal, transverse and spinous processes."""
    axis = [(-280, -64), (-170, -42), (-60, -34), (0, -36), (120, -56), (220, -46)]

    def behind(mm: float) -> list[tuple[float, float]]:
        return [(z, y - mm) for z, y in axis]

    thickness = ([(-260, 22), (-140, 21), (-20, 11)], [(-260, 20), (-140, 24), (-20, 13)])
    for side in (-1, 1):
        s.add("muscle", (side * 40, -30), thickness, (-130, 145), taper=4, lobes=0.05)
        s.add("marrow", (side * 26, behind(24)), (14, 5), (30, 200), side * -0.2, taper=8)
    size = ([(-170, 26), (0, 22), (220, 15)], [(-170, 18), (0, 17), (220, 13)])
    body = s.add("cortical_bone", (0, axis), size, (30, 205), power=2.3, taper=20, lobes=0.04, move=1)
    s.fill(body, "marrow", 0.88, tall=1.0)
    arch = s.add("rib", (0, behind(24)), (17, 12), (30, 205), taper=20, move=1)
    s.solids.append(arch._replace(tissue="csf", a=scaled(arch.a, 0.55), b=scaled(arch.b, 0.62)))
    s.add("rib", (0, behind(42)), (4, [(-170, 12), (220, 10)]), (30, 205), taper=20, move=1, within="body")


def _add_pelvic_bones(s: Sculptor) -> None:
    """Add ilia, hips and the sacrum."""
    blade = [(-250, 38), (-190, 54), (-140, 46)]
    for side in (-1, 1):
        s.add("fat", (side * 60, -80), (5, 24), (-230, 70), side * 0.5, within="body")  # between the gluteal muscles
        ilium = s.add(
            "cortical_bone",
            ([(-250, side * 86), (-150, side * 112)], -8),
            (9.5, blade),
            (-195, 66),
            [(-250, side * 0.1), (-150, side * -0.55)],
            taper=6,
            lobes=0.05,
        )
        s.fill(ilium, "marrow", (0.7, 0.9))
        head = s.add("cortical_bone", (side * 92, 2), (27, 28), (-266, 30), taper=3)
        s.fill(head, "marrow", 0.88)
        s.add("marrow", (side * 126, -6), (18, 20), (-288, 30), taper=3)  # trochanter
        s.add("rib", (side * 24, 42), (26, 7), (-287, 16), side * -0.5, taper=3)  # pubic bones
    where = (0, [(-175, -58), (-270, -76)])
    sacrum = s.add(
        "cortical_bone", where, ([(-175, 50), (-270, 22)], [(-175, 20), (-270, 10)]), (-220, 55), taper=5, lobes=0.06
    )
    s.fill(sacrum, "marrow", 0.88)

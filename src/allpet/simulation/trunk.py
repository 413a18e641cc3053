"""Trunks: chest, abdomen and pelvis of one patient, as a list of solids.

Coordinates in mm: x to the image's right (the patient's left), y anterior, z up with 0 at the disc between T12 and L1.
Positions are those of an adult of average size; ``Build`` stretches them to a patient. Vertebrae are about 33 mm
(lumbar) and 24 mm (thoracic) high: the dome of the liver is near z = 95, the iliac crest near -140, the femoral heads
near -265.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allpet.simulation.canvas import Canvas, Solid
from allpet.simulation.fields import Curve, Draw

Z_RANGES_MM = {"chest": (70.0, 215.0), "abdomen": (-95.0, 60.0), "pelvis": (-290.0, -150.0)}
Knots = float | Sequence[tuple[float, float]]


class Build(NamedTuple):
    """A patient's size.

    Attributes:
        female: sex of the anatomy.
        width, depth: stretch of everything inside the muscles along x and y.
        fat_mm: thickness of the fat under the skin at the sides.
    """

    female: bool
    width: float
    depth: float
    fat_mm: float


class Trunk(NamedTuple):
    """A patient's trunk.

    Attributes:
        build: its size.
        solids: what to paint, in order.
        stencils: named solids that others are clipped by.
    """

    build: Build
    solids: tuple[Solid, ...]
    stencils: dict[str, Solid]


def draw_build(draw: Draw, limit_mm: float) -> Build:
    """Draw a patient's size so that the trunk fits in a field of view of radius ``limit_mm``."""
    female = draw.chance(0.45)
    size = draw.normal(0.94 if female else 1.02, 0.05)
    weight = draw.normal(0.0, 1.0)
    build = Build(
        female,
        width=size * (1 + 0.05 * weight) * draw.normal(1.0, 0.025),
        depth=size * (1 + 0.08 * weight) * draw.normal(1.0, 0.035),
        fat_mm=max(5.0, 17.0 + 8.0 * weight + draw.normal(0, 3.0) + (4.0 if female else 0.0)),
    )
    # 160 mm is the widest part of the muscles, 7 % covers the waviness of the outline.
    widest = 1.07 * (160 * build.width + build.fat_mm)
    shrink = min(1.0, limit_mm / widest)
    return build._replace(width=build.width * shrink, depth=build.depth * shrink, fat_mm=build.fat_mm * shrink)


class _Painter:
    """Collects solids, stretching standard positions to a build."""

    def __init__(self, draw: Draw, build: Build) -> None:
        self.draw, self.build, self.solids = draw, build, list[Solid]()

    def solid(
        self,
        tissue: str,
        x: Knots,
        y: Knots,
        a: Knots,
        b: Knots,
        z: float = 0.0,
        half: float = math.inf,
        angle: Knots = 0.0,
        *,
        vary: float = 0.05,
        move: float = 2.0,
        lobes: float = 0.0,
        power: float = 2.0,
        taper: float = 2.0,
        scale: float = 1.0,
        within: str = "",
    ) -> Solid:
        """Make a solid of standard position and size, varied.

        Args:
            tissue: what it is made of.
            x, y, a, b, z, half, angle: as in ``Solid``, for an average adult; the angle in radians.
            vary: relative spread of its size.
            move: spread of its position, mm.
            lobes: amplitude of the outline's harmonics.
            power, taper, scale, within: as in ``Solid``.
        """
        d, build = self.draw, self.build
        size = d.normal(1.0, vary)
        shift_z = d.normal(0.0, 2 * move)
        stretch = lambda knots, factor: (  # noqa: E731
            knots * factor if isinstance(knots, (int, float)) else [(z + shift_z, v * factor) for z, v in knots]
        )
        harmonics = tuple((lobes / k * d.uniform(0.3, 1.0), d.uniform(0, 2 * math.pi)) for k in (2, 3, 4))
        a_curve = d.curve(stretch(a, build.width * size * d.normal(1.0, vary / 2)))
        b_curve = d.curve(stretch(b, build.depth * size * d.normal(1.0, vary / 2)))
        wave = 0.03 if lobes else 0.0
        if wave:
            a_curve = a_curve._replace(waves=d.curve(0.0, wave * max(a_curve.levels), 30.0).waves)
            b_curve = b_curve._replace(waves=d.curve(0.0, wave * max(b_curve.levels), 30.0).waves)
        return Solid(
            tissue,
            d.curve(stretch(x, build.width), move, 50.0),
            d.curve(stretch(y, build.depth), move, 50.0),
            a_curve,
            b_curve,
            z + shift_z,
            half * size,
            d.curve(stretch(angle, 1.0), 0.05 if lobes else 0.0, 50.0),
            power,
            taper,
            harmonics if lobes else (),
            scale,
            within,
        )

    def add(self, *args: object, **options: object) -> Solid:
        """Make a solid as ``solid`` does and append it."""
        self.solids.append(self.solid(*args, **options))  # type: ignore[arg-type]
        return self.solids[-1]

    def inner(
        self, tissue: str, outer: Solid, part: float, shift: tuple[float, float] = (0.0, 0.0), **change: object
    ) -> Solid:
        """Append a smaller copy of a solid: what fills it."""
        smaller: dict[str, object] = {
            "tissue": tissue,
            "x": _offset(outer.x, shift[0]),
            "y": _offset(outer.y, shift[1]),
            "a": _scaled(outer.a, part),
            "b": _scaled(outer.b, part),
            "half": outer.half * part,
        }
        inner = outer._replace(**(smaller | change))  # type: ignore[arg-type]
        self.solids.append(inner)
        return inner


def _scaled(curve: Curve, factor: float) -> Curve:
    waves = tuple((amplitude * factor, frequency, phase) for amplitude, frequency, phase in curve.waves)
    return Curve(curve.knots, tuple(level * factor for level in curve.levels), waves)


def _offset(curve: Curve, shift: float) -> Curve:
    return curve._replace(levels=tuple(level + shift for level in curve.levels))


# Half-width and half-depth of the trunk inside the fat, and of the cavity inside the muscles and bones.
_MUSCLE_A = [
    (-300, 158),
    (-250, 160),
    (-200, 150),
    (-140, 138),
    (-60, 138),
    (20, 146),
    (100, 152),
    (170, 156),
    (225, 160),
]
_MUSCLE_B = [(-300, 92), (-240, 96), (-180, 95), (-120, 90), (-40, 94), (60, 104), (120, 106), (180, 100), (225, 88)]
_CAVITY_A = [(-300, 62), (-250, 72), (-200, 96), (-150, 112), (-60, 120), (20, 130), (100, 134), (170, 124), (225, 100)]
_CAVITY_B = [(-300, 52), (-240, 60), (-180, 66), (-120, 70), (-40, 76), (60, 90), (120, 93), (180, 82), (225, 62)]


def draw_trunk(draw: Draw, limit_mm: float) -> Trunk:
    """Draw a patient's trunk that fits in a field of view of radius ``limit_mm``."""
    build = draw_build(draw, limit_mm)
    p = _Painter(draw, build)
    stencils = _draw_wall(p)
    _draw_lungs(p)
    _draw_spine(p)
    _draw_pelvis(p)
    _draw_bowel(p)
    _draw_upper_abdomen(p)
    _draw_kidneys(p)
    _draw_heart(p)
    return Trunk(build, tuple(p.solids), stencils)


def paint_trunk(canvas: Canvas, trunk: Trunk) -> None:
    """Paint a trunk on an empty canvas."""
    for name, solid in trunk.stencils.items():
        canvas.add_stencil(name, solid)
    for solid in trunk.solids:
        canvas.draw(solid)


def _draw_wall(p: _Painter) -> dict[str, Solid]:
    """Skin, fat, muscle, ribs and the fatty cavity; return the stencils ``body`` and ``cavity``."""
    d, build = p.draw, p.build
    power = d.uniform(2.1, 2.5)
    muscle = p.solid("muscle", 0, 0, _MUSCLE_A, _MUSCLE_B, power=power, lobes=0.04, vary=0.0, move=0.0)
    # Fat is thicker on the belly than at the back.
    fat = build.fat_mm
    body = muscle._replace(
        tissue="fat",
        y=_offset(muscle.y, 0.15 * fat),
        a=_offset(muscle.a, fat),
        b=_offset(muscle.b, 0.8 * fat),
    )
    skin = body._replace(tissue="skin", a=_offset(body.a, 2.0), b=_offset(body.b, 2.0))
    cavity = p.solid("fat", 0, 10, _CAVITY_A, _CAVITY_B, power=power, lobes=0.03, vary=0.0, move=0.0)
    if build.female:
        for side in (-1, 1):
            p.add("breast", side * 72, 100 + 0.9 * fat, 52, d.uniform(22, 40), 140, 62, side * -0.25, lobes=0.05)
    p.solids += [skin, body, muscle]
    # Muscle layers are parted by fat.
    for side in (-1, 1):
        p.add("fat", side * 62, -78, 10, 4, 20, 200, side * 0.5, move=4)
    p.solids.append(cavity)
    _draw_ribs(p, cavity)
    return {"body": body, "cavity": cavity}


def _draw_ribs(p: _Painter, cavity: Solid) -> None:
    """Ribs: each starts at its vertebra and descends around the wall; an axial slice cuts it in one short arc."""
    d = p.draw
    drop, turn = d.uniform(85, 105), 2.5
    for k in range(12):
        top = 285 - 24.5 * k - (6 if k > 9 else 0)
        last = turn if k < 9 else 1.3  # floating ribs are short
        z = np.linspace(top - drop * last / turn, top, 7)
        bearing = (top - z) / drop * turn  # 0 behind, pi in front
        _, cx, cy, a, b = 0, *cavity.sections(z)[:4]
        # Along the wall of the cavity, starting beside the spine.
        t = bearing + 0.28
        for side in (-1, 1):
            x, y = cx + side * (a + 4) * np.sin(t), cy - (b + 4) * np.cos(t)
            angle = np.arctan2((b + 4) * np.sin(t), side * (a + 4) * np.cos(t))
            angle = np.unwrap(angle, period=math.pi)
            p.solids.append(
                Solid(
                    "rib",
                    _through(z, x),
                    _through(z, y),
                    Curve((0.0,), (21.0,)),
                    Curve((0.0,), (4.6,)),
                    z=float(z.mean()),
                    half=float(np.ptp(z) / 2 + 2),
                    angle=_through(z, angle),
                    taper=6.0,
                )
            )


def _through(z: np.ndarray, values: np.ndarray) -> Curve:
    return Curve(tuple(z.tolist()), tuple(values.tolist()))


def _draw_spine(p: _Painter) -> None:
    """Vertebral bodies with arches and processes, psoas and paraspinal vessels."""
    d = p.draw
    half_width, half_depth = [(-170, 26), (0, 22), (220, 15)], [(-170, 18), (0, 17), (220, 13)]
    y = [(-280, -64), (-170, -42), (-60, -34), (0, -36), (120, -56), (220, -46)]
    behind = lambda mm: [(z, v - mm) for z, v in y]  # noqa: E731
    for side in (-1, 1):
        # Psoas grows downward from L1.
        p.add("muscle", side * 40, -30, [(-260, 22), (-140, 21), (-20, 11)], [(-260, 20), (-140, 24), (-20, 13)],
              -130, 145, taper=4, lobes=0.05)  # fmt: skip
        p.add("marrow", side * 26, behind(24), 14, 5, 30, 200, side * -0.2, taper=8)
    body = p.add("cortical_bone", 0, y, half_width, half_depth, 30, 205, power=2.3, taper=20, lobes=0.04, move=1)
    p.inner("marrow", body, 0.88)
    arch = p.add("rib", 0, behind(24), 17, 12, 30, 205, taper=20, move=1)
    p.solids.append(arch._replace(tissue="csf", a=_scaled(arch.a, 0.55), b=_scaled(arch.b, 0.62)))
    p.add("rib", 0, behind(43), 4, [(-170, 13), (0, 12), (220, 10)], 30, 205, taper=20, move=1)


def _draw_lungs(p: _Painter) -> None:
    """Lungs with the mediastinum between them and the diaphragm's domes below."""
    d = p.draw
    p.add("lung", -78, -2, [(60, 60), (140, 62), (230, 42)], [(30, 84), (140, 88), (230, 58)], 135, 135,
          taper=5, lobes=0.05, within="cavity", move=2)  # fmt: skip
    p.add("lung", 80, -4, [(60, 58), (140, 58), (230, 42)], [(30, 84), (140, 86), (230, 58)], 135, 135,
          taper=5, lobes=0.05, within="cavity", move=2)  # fmt: skip
    # Below the domes lies the abdomen; breathing blurs their edge, which the activity of a slice shows as a mean.
    p.add("fat", -66, 12, 74, 86, -30, 132, lobes=0.03, within="cavity", taper=3)
    p.add("fat", 66, 14, 72, 84, -40, 128, lobes=0.03, within="cavity", taper=3)
    p.add("fat", 0, 10, 60, 84, -40, 122, within="cavity", taper=4)
    mediastinum = p.add("mediastinum", 4, 4, [(80, 46), (150, 40), (225, 30)], [(80, 74), (150, 72), (225, 56)], 155, 95,
          taper=6, lobes=0.08, within="cavity")  # fmt: skip
    del mediastinum
    p.add("marrow", 0, [(90, 100), (140, 101), (215, 84)], 17, 6, 160, 62, taper=8, lobes=0.05)
    for side in (-1, 1):
        # Shoulder blades lie behind the ribs.
        p.add("rib", side * 104, -72, 34, 4.5, 190, 62, side * 0.55, taper=4, move=4)


def _draw_upper_abdomen(p: _Painter) -> None:
    """Great vessels, spleen, stomach, liver, pancreas, gallbladder."""
    d = p.draw
    p.add("blood", [(-140, 4), (0, 10), (110, 22), (215, 20)], [(-140, -14), (0, -12), (110, -36), (215, -26)],
          [(-140, 8.5), (215, 12)], [(-140, 8.5), (215, 12)], 35, 182, taper=20)  # fmt: skip
    p.add("blood", [(-140, -16), (0, -20), (80, -24)], [(-140, -12), (0, -8), (80, 8)], 12, 9, -30, 130, taper=20)
    p.add(
        "spleen", 102, -34, 26, 50, d.uniform(28, 44), d.uniform(50, 66), -0.35, lobes=0.12, within="cavity", vary=0.1
    )
    wall = p.add("stomach", [(-35, 22), (10, 54), (70, 56)], [(-35, 50), (10, 44), (70, 10)], [(-35, 46), (20, 36), (80, 34)],
                 [(-35, 20), (20, 32), (80, 34)], 25, 62, [(-35, -0.25), (60, 0.5)], lobes=0.12, vary=0.15, within="cavity")  # fmt: skip
    filled = d.uniform(0.55, 0.85)
    p.inner("lumen", wall, filled)
    if d.chance(0.6):
        p.inner("gas", wall, filled * d.uniform(0.3, 0.6), (0.0, 9.0))
    # The liver: a right lobe that fills the dome and tapers to the side, a left lobe across the middle.
    tip = d.uniform(-95, -45)
    p.add("liver", [(tip, -96), (-20, -84), (60, -66), (105, -56)], [(tip, -4), (0, -4), (60, 4), (100, 10)],
          [(tip, 40), (-20, 58), (40, 80), (100, 84)], [(tip, 52), (0, 84), (60, 86), (100, 80)],
          (tip + 102) / 2, (102 - tip) / 2, taper=3, lobes=0.10, within="cavity", move=2)  # fmt: skip
    p.add("liver", [(0, -18), (60, 6), (90, 12)], [(0, 58), (60, 46), (90, 36)], [(0, 50), (60, 76), (90, 62)],
          [(0, 24), (60, 40), (90, 36)], 46, d.uniform(42, 54), -0.22, taper=3, lobes=0.12, within="cavity", move=3)  # fmt: skip
    p.add("blood", -30, [(0, 20), (60, 8)], 9, 6, 20, 35, 0.5, move=4)  # portal vein
    if d.chance(0.85):
        p.add("gallbladder", -52, 44, 13, 20, -12, d.uniform(18, 30), 0.4, lobes=0.08, vary=0.2, move=5)
    p.add(
        "pancreas",
        [(-30, 10), (10, 62)],
        [(-30, 26), (10, 2)],
        46,
        10,
        -8,
        24,
        [(-30, -0.2), (10, -0.5)],
        lobes=0.2,
        move=4,
    )
    p.add("pancreas", -22, 20, 19, 16, -38, 24, lobes=0.15, move=4)
    p.add("duodenum", -44, 16, 12, 14, -42, 38, lobes=0.2, move=4)
    for side in (-1, 1):
        p.add("adrenal", side * 34, -18, 4, 12, 12, 15, side * 0.4)


def _draw_kidneys(p: _Painter) -> None:
    """Kidneys in their fat: cortex, sinus and the urine in the renal pelvis."""
    d = p.draw
    for side, z in ((-1, -48.0), (1, -36.0)):
        if d.chance(0.01):
            continue  # a solitary kidney
        x = [(z - 60, side * 74), (z + 60, side * 58)]
        p.add("fat", x, -42, 30, 35, z, 62, side * 0.45, within="cavity")
        cortex = p.add("kidney", x, -42, 26, 31, z, 58, side * 0.45, lobes=0.06, taper=2.5, vary=0.08, move=3)
        p.inner("fat", cortex, 0.36, (-side * 11.0, 7.0))
        p.inner("urine", cortex, 0.22, (-side * 12.0, 8.0), scale=d.lognormal(0.35, 0.25), half=26.0)


def _draw_bowel(p: _Painter) -> None:
    """Loops of small bowel and the frame of the colon."""
    d = p.draw
    for _ in range(d.integer(9, 14)):
        z = d.uniform(-190, -30)
        x, y = d.uniform(-72, 72), d.uniform(0, 62)
        loop = p.add("bowel", x, y, d.uniform(16, 32), d.uniform(11, 17), z, d.uniform(18, 42), d.uniform(-0.8, 0.8),
                     lobes=0.25, within="cavity", scale=d.lognormal(1.0, 0.35), move=4)  # fmt: skip
        p.inner("gas" if d.chance(0.12) else "lumen", loop, d.uniform(0.4, 0.65))
    frame: tuple[tuple[Knots, Knots, float, float, float, float], ...] = (
        (-98, 4, 21, 21, -95, 75),  # ascending
        ([(-160, 92), (0, 104)], -12, 16, 17, -70, 95),  # descending
        (0, 70, 92, 14, d.uniform(-75, -35), 20),  # transverse
    )
    for x, y, a, b, z, half in frame:
        loop = p.add(
            "bowel", x, y, a, b, z, half, lobes=0.15, within="cavity", scale=d.lognormal(0.9, 0.3), move=5, taper=4
        )
        p.inner("gas" if d.chance(0.3) else "lumen", loop, d.uniform(0.55, 0.75))


def _draw_heart(p: _Painter) -> None:
    """Great vessels, atria, right ventricle, left ventricle; airways and oesophagus."""
    p.add("blood", -10, 26, 16, 16, 195, 32, taper=6)  # ascending aorta
    p.add("blood", 16, 34, 14, 13, 195, 26, 0.3, taper=6)  # pulmonary trunk
    p.add("blood", -30, 14, 9, 10, 205, 45, taper=8)  # superior vena cava
    p.add("blood", [(205, 8), (225, 4)], [(205, 0), (225, 0)], 22, 12, 218, 12, -0.6)  # arch
    p.add("blood", 4, -4, 34, 20, 168, 26, lobes=0.08)  # left atrium
    p.add("blood", -34, 18, 24, 30, 152, 36, lobes=0.08)  # right atrium
    p.add("myocardium", [(100, 26), (170, 0)], 46, 40, 26, 135, 42, -0.35, lobes=0.08, scale=0.45)  # right ventricle
    p.inner("blood", p.solids[-1], 0.88)
    left = p.add(
        "myocardium",
        [(100, 56), (170, 34)],
        [(100, 26), (170, 12)],
        42,
        32,
        130,
        44,
        -0.75,
        lobes=0.06,
        vary=0.08,
        move=4,
    )
    p.inner("blood", left, 0.64, (-4.0, -3.0))
    p.add("air", 0, -6, 8, 8, 240, 45, taper=10)  # trachea
    p.add("oesophagus", [(40, 18), (110, 8), (220, 2)], [(40, -4), (110, -24), (220, -20)], 8, 6, 140, 110, taper=10)


def _draw_pelvis(p: _Painter) -> None:
    """Pelvic bones, hips, bladder, genital organs, rectum and iliac vessels."""
    d = p.draw
    for side in (-1, 1):
        p.add("blood", side * 34, [(-150, -8), (-260, 20)], 7, 7, -205, 60, taper=8)
        p.add("fat", side * 62, -88, 6, 30, -230, 70, side * 0.5)
        p.add("cortical_bone", [(-250, side * 86), (-150, side * 112)], [(-250, -8), (-150, -8)], 9, [(-250, 38), (-190, 54), (-140, 46)],
              -195, 66, [(-250, side * 0.1), (-150, side * -0.55)], taper=6, lobes=0.05)  # fmt: skip
        p.inner("marrow", p.solids[-1], 0.8)
        p.add("cortical_bone", side * 92, 2, 27, 28, -266, 30, taper=3)
        p.inner("marrow", p.solids[-1], 0.88)
        p.add("marrow", side * 126, -6, 18, 20, -288, 30, taper=3)
    p.add(
        "cortical_bone",
        0,
        [(-175, -58), (-270, -76)],
        [(-175, 50), (-270, 22)],
        [(-175, 20), (-270, 10)],
        -220,
        55,
        taper=5,
        lobes=0.06,
    )
    p.inner("marrow", p.solids[-1], 0.88)
    rectum = p.add("rectum", 0, -38, 19, 16, -255, 55, taper=5, lobes=0.1)
    p.inner("lumen", rectum, 0.55)
    if p.build.female:
        p.add("uterus", 0, -4, 34, 22, -222, 28, lobes=0.1, vary=0.12)
    else:
        p.add("prostate", 0, -4, 23, 18, -286, 20, lobes=0.05, vary=0.15)
    full = d.uniform(0.6, 1.3)
    bladder = p.add("muscle", 0, 26, 42 * full, 33 * full, -258, 32 * full, lobes=0.06)
    p.inner("urine", bladder, 0.88)

"""Viscera: the organs of chest, abdomen and pelvis, as additions to a sculptor's solids.

What is added later covers what was added before.
"""

from __future__ import annotations

from allpet.simulation.sculptor import Sculptor


def add_lungs(s: Sculptor) -> None:
    """Add the lungs, the diaphragm's domes below them and the mediastinum between them."""
    depth = [(30.0, 84.0), (140.0, 88.0), (230.0, 58.0)]
    for x, width in ((-78, 62.0), (80, 58.0)):
        s.add(
            "lung", (x, -3), ([(140.0, width), (230.0, 42.0)], depth), (135, 135), taper=5, lobes=0.05, within="cavity"
        )
    # Breathing moves the domes by some 10 mm: a slice through one sees the mean of what passes.
    for x, axes, height in ((-66, (74, 86), 132), (66, (72, 84), 126), (0, (60, 84), 118)):
        edge = [(40, 0.0), (90, 12.0)]
        s.add("fat", (x, 12), axes, (-35, height), taper=3, lobes=0.03, within="cavity", edge=edge)
    size = ([(80, 46), (150, 40), (225, 30)], [(80, 74), (150, 72), (225, 56)])
    s.add("mediastinum", (4, 4), size, (155, 95), taper=6, lobes=0.08, within="cavity")


def add_organs(s: Sculptor) -> None:
    """Add all organs but the lungs."""
    _add_bowel(s)
    _add_pelvic_organs(s)
    _add_vessels(s)
    _add_digestive_organs(s)
    _add_kidneys(s)
    _add_ureters(s)
    _add_heart(s)


def _add_vessels(s: Sculptor) -> None:
    """Add aorta and inferior vena cava."""
    where = ([(-140, 4), (0, 10), (110, 22), (215, 20)], [(-140, -14), (0, -12), (110, -36), (215, -26)])
    s.add("blood", where, ([(-140, 8.5), (215, 12)], [(-140, 8.5), (215, 12)]), (35, 182), taper=20)
    s.add("blood", ([(-140, -16), (0, -20), (80, -24)], [(-140, -12), (0, -8), (80, 8)]), (12, 9), (-30, 130), taper=20)


def _add_digestive_organs(s: Sculptor) -> None:
    """Add spleen, stomach, liver, gallbladder, pancreas, duodenum and adrenals."""
    d = s.draw
    thick, tall = d.uniform(20, 28), d.uniform(50, 66)
    s.add("spleen", (104, -36), (thick, d.uniform(42, 52)), (36, tall), -0.4, lobes=0.12, within="cavity", vary=0.1)
    stomach = s.add(
        "stomach",
        ([(-35, 18), (10, 52), (70, 56)], [(-35, 52), (10, 44), (70, 8)]),
        ([(-35, 48), (20, 38), (80, 34)], [(-35, 17), (20, 27), (80, 34)]),
        (25, 62),
        [(-35, -0.3), (60, 0.7)],
        lobes=0.2,
        vary=0.15,
        within="cavity",
    )
    filled = d.uniform(0.35, 0.85)
    s.fill(stomach, "lumen", filled)
    if d.chance(0.5):
        s.fill(stomach, "gas", filled * d.uniform(0.3, 0.55), (0.0, 8.0))
    # The liver: a right lobe that fills the dome and tapers to the side, in front of the kidney; a left lobe in front.
    tip = d.uniform(-90, -35)
    edge = [(50, 0.0), (95, 12.0)]
    s.add(
        "liver",
        ([(tip, -98), (-20, -90), (15, -82), (60, -66), (105, -56)], [(tip, 14), (0, 16), (40, 6), (100, 10)]),
        ([(tip, 36), (-20, 50), (40, 78), (100, 84)], [(tip, 40), (0, 62), (40, 80), (100, 80)]),
        ((tip + 102) / 2, (102 - tip) / 2),
        [(tip, 0.1), (0, 0.25), (50, 0.0)],
        taper=3,
        lobes=0.10,
        within="cavity",
        edge=edge,
    )
    s.add(
        "liver",
        ([(0, -18), (60, 6), (90, 12)], [(0, 58), (60, 46), (90, 36)]),
        ([(0, 50), (60, d.uniform(66, 84)), (90, 62)], [(0, 24), (60, 40), (90, 36)]),
        (46, d.uniform(42, 54)),
        -0.22,
        taper=3,
        lobes=0.12,
        within="cavity",
        move=3,
        edge=edge,
    )
    s.add("blood", (-30, [(0, 20), (60, 8)]), (9, 6), (20, 35), 0.5, move=4)  # portal vein
    if d.chance(0.85):
        s.add("gallbladder", (-54, 46), (12, 19), (-12, d.uniform(18, 30)), 0.4, lobes=0.08, vary=0.2, move=5)
    tail = ([(-30, 10), (10, 60)], [(-30, 28), (10, 4)])
    s.add("pancreas", tail, (36, d.uniform(9, 13)), (-8, 25), [(-30, -0.2), (10, -0.5)], lobes=0.25, move=3)
    s.add("pancreas", (2, 26), (26, 10), (-22, 22), 0.35, lobes=0.25, move=3)
    s.add("pancreas", (-22, 20), (18, 15), (-38, 24), lobes=0.15, move=3)
    s.add("duodenum", (-44, 16), (12, 14), (-42, 38), lobes=0.2, move=4)
    for side in (-1, 1):
        s.add("adrenal", (side * 34, -18), (4, 12), (12, 15), side * 0.4)


def _add_kidneys(s: Sculptor) -> None:
    """Add kidneys in their fat: cortex, sinus and the urine in the renal pelvis."""
    d = s.draw
    for side, z in ((-1, -48.0), (1, -36.0)):
        if d.chance(0.01):
            continue  # a solitary kidney
        x = [(z - 60, side * 74), (z + 60, side * 58)]
        s.add("fat", (x, -44), (31, 34), (z, 62), side * 0.45, within="cavity")
        cortex = s.add("kidney", (x, -46), (26, 30), (z, 57), side * 0.45, lobes=0.06, taper=2.5, vary=0.08)
        s.fill(cortex, "fat", 0.36, (-side * 11.0, 7.0), tall=0.55)
        part, urine = d.uniform(0.2, 0.34), d.lognormal(0.4, 0.3)
        s.fill(cortex, "urine", part, (-side * 12.0, 8.0), scale=urine, tall=0.45)


def _add_ureters(s: Sculptor) -> None:
    """Add the ureters where urine happens to pass: short hot spots on the psoas, down to the bladder."""
    d = s.draw
    path = ([(-90, 40), (-160, 36), (-235, 46)], [(-90, -20), (-160, 0), (-235, -8)])
    for side in (-1, 1):
        for _ in range(d.integer(0, 3)):
            x, radius = [(z, side * v) for z, v in path[0]], d.uniform(2.5, 4.0)
            extent = (d.uniform(-235, -95), d.uniform(10, 30))
            s.add("urine", (x, path[1]), (radius, radius), extent, scale=d.lognormal(0.4, 0.3), taper=4)


def _add_bowel(s: Sculptor) -> None:
    """Add loops of small bowel and the colon around them."""
    d = s.draw
    for _ in range(d.integer(14, 22)):
        at, axes = (d.uniform(-78, 78), d.uniform(-6, 62)), (d.uniform(15, 30), d.uniform(10, 16))
        extent = (d.uniform(-195, -30), d.uniform(20, 45))
        loops = d.lognormal(1.0, 0.25)
        loop = s.add("bowel", at, axes, extent, d.uniform(-0.9, 0.9), lobes=0.25, within="cavity", scale=loops, move=4)
        s.fill(loop, "gas" if d.chance(0.08) else "lumen", d.uniform(0.3, 0.6))
    # The colon as overlapping pouches: up on the right, across in front, down on the left, to the rectum. All walls
    # are painted before all contents, so that they join to a tube.
    sag, level = d.uniform(0, 55), d.uniform(-45, -15)
    across = [(x, 64 - x * x / 400, level - sag * (1 - (x / 90) ** 2)) for x in (-84, -56, -28, 0, 28, 56, 84)]
    up = [(-98, 2, z) for z in (-150, -115, -80, -45)]
    down = [(100, -10, z) for z in (-10, -45, -80, -115, -150)]
    sigmoid = [(70, 0, -185), (40, 20, -200), (15, 5, -215)]
    uptake, air, pouches = d.lognormal(0.7, 0.25), d.uniform(0.0, 0.5), []
    for x, y, height in (*up, *across, *down, *sigmoid):
        half, turn = (d.uniform(14, 24), d.uniform(11, 19)), d.uniform(-0.8, 0.8)
        scale = uptake * d.lognormal(1.0, 0.25)
        z = (height + d.normal(0, 6), d.uniform(18, 28))
        pouches.append(s.add("bowel", (x, y), half, z, turn, lobes=0.3, within="cavity", move=7, scale=scale))
    for pouch in pouches:
        s.fill(pouch, "gas" if d.chance(air) else "lumen", d.uniform(0.35, 0.75), scale=d.uniform(0.7, 2.2))


def _add_heart(s: Sculptor) -> None:
    """Add the great vessels, atria, right and left ventricle, airways and oesophagus."""
    d = s.draw
    s.add("blood", (-10, 26), (16, 16), (195, 32), taper=6)  # ascending aorta
    s.add("blood", (16, 34), (14, 13), (195, 26), 0.3, taper=6)  # pulmonary trunk
    s.add("blood", (-30, 14), (9, 10), (205, 45), taper=8)  # superior vena cava
    s.add("blood", ([(205, 8), (225, 4)], [(205, 0), (225, 0)]), (22, 12), (218, 12), -0.6)  # arch of the aorta
    s.add("blood", (4, -4), (34, 20), (168, 26), lobes=0.08)  # left atrium
    s.add("blood", (-34, 18), (24, 30), (152, 36), lobes=0.08)  # right atrium
    right = s.add("myocardium", ([(100, 22), (170, -4)], 44), (42, 27), (135, 42), 0.1, lobes=0.08, scale=0.3)
    s.fill(right, "blood", 0.86)
    # The left ventricle points to the front and the left; its cavity opens to the atrium behind.
    turn = d.normal(0.7, 0.15)
    where = ([(100, 58), (170, 32)], [(100, 28), (170, 10)])
    left = s.add("myocardium", where, (46, 33), (132, 44), turn, lobes=0.05, vary=0.08, move=4)
    s.fill(left, "blood", (0.82, 0.6), (-7.0, -6.0))
    s.add("air", (0, -6), (8, 8), (240, 45), taper=10)  # windpipe
    where = ([(40, 18), (110, 8), (220, 2)], [(40, -4), (110, -24), (220, -20)])
    s.add("oesophagus", where, (8, 6), (140, 110), taper=10)


def _add_pelvic_organs(s: Sculptor) -> None:
    """Add iliac vessels, rectum, uterus or prostate, and bladder."""
    d = s.draw
    for side in (-1, 1):
        s.add("blood", ([(-150, side * 32), (-260, side * 44)], [(-150, -8), (-260, 24)]), (7, 7), (-205, 60), taper=8)
    rectum = s.add("rectum", (0, -40), (18, 15), (-255, 55), taper=5, lobes=0.1)
    s.fill(rectum, "lumen", 0.5)
    if s.build.female:
        s.add("uterus", (d.normal(0, 6), -4), (32, 22), (-225, 28), d.normal(0, 0.2), lobes=0.1, vary=0.12)
    else:
        s.add("prostate", (0, -4), (23, 18), (-284, 20), lobes=0.05, vary=0.15)
    full = d.uniform(0.6, 1.25)
    bladder = s.add("muscle", (0, 24), (42 * full, 33 * full), (-256, 32 * full), lobes=0.08)
    s.fill(bladder, "urine", 0.9)

"""Heads: individual warps of the MNI152 average brain with skull, scalp and raised arms.

Coordinates are those of the MNI space (x, y, z in mm; y anterior, z up), except that x runs to the image's right, which
is the patient's left. The average is exactly symmetric and blurred; the warp makes it individual, sharpening makes its
ribbon as thin as one subject's.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from allpet.simulation.canvas import Canvas, Patch, Solid
from allpet.simulation.fields import Array, Curve, Draw, Field

Z_RANGE_MM = (-42.0, 66.0)
SHARPEN = 2.0  # exponent on the tissue probabilities

# Semi-axes and centres (mm, MNI) of deep nuclei, one side.
_NUCLEI = {
    "thalamus": ((11.0, -18.0, 8.0), (7.5, 11.0, 7.5), 0.25),
    "caudate": ((13.0, 13.0, 9.0), (5.0, 11.0, 11.0), 0.15),
    "putamen": ((26.0, 4.0, 1.0), (5.5, 15.0, 11.5), -0.25),
}


class Template(NamedTuple):
    """The average brain.

    Attributes:
        grey, white: probability of grey and white matter, ``(x, y, z)``.
        depth: distance in mm below the surface of the brain, negative outside.
        origin_mm: coordinates of the first voxel.
        pitch_mm: distance between voxels.
    """

    grey: Array
    white: Array
    depth: Array
    origin_mm: NDArray[np.float64]
    pitch_mm: float


class Head(NamedTuple):
    """What is individual about a head.

    Attributes:
        shift: translation, mm (x, y).
        scale: size relative to the average along x, y, z.
        turn: rotation in the slice's plane, radians.
        tilt: forward nod, radians.
        roll: lean to a side, radians.
        warp: displacement fields along x, y, z.
        folds: field that deepens sulci.
        warp_mm: standard deviation of the displacement.
        scalp_mm, skull_mm, fluid_mm: thickness of the shells around the brain.
        ventricle: widening of the ventricles, 0 is average.
        regional: factor on the uptake of (occipital, frontal, temporal) cortex.
        asymmetry: relative difference of the uptake of left and right cortex.
        putamen: factor on the putamen's uptake of (right, left); below 1 in Parkinson's disease.
        arms: cross-sections of raised arms.
    """

    shift: tuple[float, float]
    scale: tuple[float, float, float]
    turn: float
    tilt: float
    roll: float
    warp: tuple[Field, Field, Field]
    folds: Field
    warp_mm: float
    scalp_mm: float
    skull_mm: float
    fluid_mm: float
    ventricle: float
    regional: tuple[float, float, float]
    asymmetry: float
    putamen: tuple[float, float]
    arms: tuple[Solid, ...]


@functools.cache
def template() -> Template:
    """Return the average brain that ships with the package."""
    with np.load(Path(__file__).with_name("mni152_2mm.npz")) as data:
        shape = tuple(data["shape"])
        mask = np.unpackbits(data["mask"], count=math.prod(shape)).reshape(shape)
        halves = [data["grey"] / np.float32(63), data["white"] / np.float32(63), mask.astype(np.float32)]
        pitch = float(data["pitch_mm"])
        origin = data["origin_mm"] - np.array([(shape[0] - 1) * pitch, 0, 0])
    # One half is stored: mirror it at x = 0.
    grey, white, mask = (np.concatenate([half[:0:-1], half]) for half in halves)
    # Close the fissure and the sulci before measuring depth: the skull follows the hull of the brain.
    padded = np.pad(mask > 0, 12, mode="constant")
    hull = ndimage.binary_closing(padded, iterations=8)
    depth = ndimage.distance_transform_edt(hull) - ndimage.distance_transform_edt(~hull)
    depth = ndimage.gaussian_filter(depth * pitch, 1.0)
    return Template(np.pad(grey, 12), np.pad(white, 12), depth.astype(np.float32), origin - 12 * pitch, pitch)


def draw_head(draw: Draw, limit_mm: float) -> Head:
    """Draw an individual head, small enough with its arms for a field of view of radius ``limit_mm``."""
    size = draw.normal(1.0, 0.025)
    scale = tuple(size * draw.normal(1.0, 0.02) for _ in range(3))
    shift = (draw.normal(0, 4.0), draw.normal(0, 5.0))
    pose = draw.normal(0, 0.05), draw.normal(0, 0.07), draw.normal(0, 0.03)
    warp = tuple(Field.draw(draw.generator, 12, 24.0) for _ in range(3))
    folds = Field.draw(draw.generator, 32, 7.0)
    degenerate = draw.chance(0.2)
    putamen = (draw.uniform(0.45, 0.8), draw.uniform(0.6, 1.0)) if degenerate else (1.0, 1.0)
    if draw.chance(0.5):
        putamen = (putamen[1], putamen[0])
    return Head(
        shift=shift,
        scale=(scale[0], scale[1], scale[2]),
        turn=pose[0],
        tilt=pose[1],
        roll=pose[2],
        warp=(warp[0], warp[1], warp[2]),
        folds=folds,
        warp_mm=draw.uniform(2.0, 3.5),
        scalp_mm=draw.uniform(4.0, 7.0),
        skull_mm=draw.uniform(5.0, 8.0),
        fluid_mm=draw.uniform(1.5, 3.0),
        ventricle=draw.uniform(0.0, 1.0) ** 2,
        regional=(draw.normal(1.12, 0.04), draw.normal(1.0, 0.05), draw.normal(0.92, 0.04)),
        asymmetry=draw.normal(0.0, 0.03),
        putamen=putamen,
        arms=_draw_arms(draw, limit_mm) if draw.chance(0.6) else (),
    )


def _draw_arms(draw: Draw, limit_mm: float) -> tuple[Solid, ...]:
    """Draw arms raised beside the head: fat, muscle and bone of each."""
    arms: list[Solid] = []
    for side in (-1, 1):
        radius = draw.uniform(28.0, 39.0)
        # At the edge of the field of view, but clear of the head.
        reach = min(limit_mm - 1.25 * radius - 6.0, draw.uniform(145.0, 175.0))
        bearing = draw.uniform(-0.45, 0.25)
        x = draw.curve([(-60, side * reach * math.cos(bearing)), (80, side * (reach - 12) * math.cos(bearing))], 3.0)
        y = draw.curve(reach * math.sin(bearing), 4.0)
        angle = draw.curve(draw.uniform(-0.6, 0.6))
        oval = draw.uniform(0.8, 0.95)
        layers = (("fat", 1.0), ("muscle", draw.uniform(0.72, 0.88)), ("cortical_bone", 0.30), ("marrow", 0.17))
        for tissue, part in layers:
            a, b = Curve((0.0,), (radius * part,)), Curve((0.0,), (radius * oval * part,))
            arms.append(Solid(tissue, x, y, a, b, angle=angle))
    return tuple(arms)


def paint_head(canvas: Canvas, head: Head) -> None:
    """Paint a head and its raised arms on an empty canvas; slices lie at MNI heights."""
    for solid in head.arms:
        canvas.draw(solid)
    average = template()
    reach = 118.0
    columns = canvas._span(head.shift[0] - reach, head.shift[0] + reach)
    rows = canvas._span(-head.shift[1] - reach - 15, -head.shift[1] + reach - 5)
    box = (slice(0, len(canvas.z)), rows, columns)
    x, y, z = _to_average(canvas, head, rows, columns)
    index = [(c - o) / average.pitch_mm for c, o in zip((x, y, z), average.origin_mm, strict=True)]
    # Beyond the volume the nearest value holds for depth; tissue is zero there by its padding.
    grey, white, depth = (
        ndimage.map_coordinates(volume, index, order=1, mode="nearest", output=np.float32)
        for volume in (average.grey, average.white, average.depth)
    )
    shells = _outline(head, x, y, z, depth)
    for tissue, outer in shells:
        canvas.paint(canvas.soften(box, outer), tissue)
    _paint_brain(canvas, head, box, (x, y, z), grey, white, depth)


def _to_average(canvas: Canvas, head: Head, rows: slice, columns: slice) -> tuple[Array, Array, Array]:
    """Return where the samples of a part of the canvas lie in the average brain, three ``(n, rows, columns)``, mm."""
    xs, ys = canvas.x[columns], canvas.y[rows]
    wx, wy, wz = (field.on_grid(canvas.z, ys, xs) * np.float32(head.warp_mm) for field in head.warp)
    # The brain's centre (0, -18) in MNI space sits on the axis of the scanner, but for the shift.
    u, v = (xs - head.shift[0]).astype(np.float32), (ys - head.shift[1]).astype(np.float32)[:, None]
    cos, sin = math.cos(head.turn), math.sin(head.turn)
    z0 = canvas.z.astype(np.float32)[:, None, None]
    x = (cos * u + sin * v) / np.float32(head.scale[0]) + wx
    along = (cos * v - sin * u) / np.float32(head.scale[1])
    y = along - np.float32(18) + np.float32(math.tan(head.tilt)) * z0 + wy
    z = (
        z0 / np.float32(head.scale[2])
        - np.float32(math.tan(head.tilt)) * along
        + np.float32(math.tan(head.roll)) * x
        + wz
    )
    return x, y, z


def _outline(head: Head, x: Array, y: Array, z: Array, depth: Array) -> list[tuple[str, Array]]:
    """Return the shells around the brain, outermost first, as depths below their outer surfaces (mm)."""
    inner = depth + np.float32(head.fluid_mm)
    # Face and neck: below the brow the head is longer than the brain. An ellipsoid stands for them.
    face = 1 - np.sqrt((x / 62) ** 2 + ((y - 18) / 72) ** 2 + ((z + 52) / 62) ** 2)
    face *= np.float32(60)
    neck = 1 - np.sqrt((x / 64) ** 2 + ((y + 40) / 62) ** 2 + (np.minimum(z + 30, 0) / 90) ** 2)
    neck = np.where(z < -20, neck * np.float32(55), np.float32(-99))
    bone = inner + np.float32(head.skull_mm)
    soft = np.maximum(np.maximum(face, neck) + np.float32(head.scalp_mm), bone + np.float32(head.scalp_mm))
    return [("skin", soft), ("skull", bone), ("csf", inner)]


def _paint_brain(
    canvas: Canvas,
    head: Head,
    box: tuple[slice, slice, slice],
    where: tuple[Array, Array, Array],
    grey: Array,
    white: Array,
    depth: Array,
) -> None:
    """Paint white and grey matter, cerebellum, nuclei and ventricles."""
    x, y, z = where
    # Sharpen: the average of 152 subjects is blurrier than any of them.
    fluid = np.maximum(0, 1 - grey - white)
    powers = [np.square(share) for share in (grey, white, fluid)]
    total = powers[0] + powers[1] + powers[2] + np.float32(1e-6)
    grey, white = powers[0] / total, powers[1] / total
    # Sulci of this subject: fluid enters the outer ribbon where the field of folds is high.
    folds = head.folds.on_grid(canvas.z, canvas.y[box[1]], canvas.x[box[2]])
    grey = grey * (1 - np.clip(folds - 0.6, 0, 0.6) * np.clip(1 - depth / 12, 0, 1))
    occipital = np.clip((-y - 62) / 20, 0, 1)
    frontal = np.clip((y - 10) / 20, 0, 1)
    temporal = np.clip((-z - 5) / 10, 0, 1) * np.clip((y + 50) / 20, 0, 1)
    change = 1 + np.float32(head.asymmetry) * np.clip(x / 15, -1, 1)
    for factor, weight in zip(head.regional, (occipital, frontal, temporal), strict=True):
        change = change * (1 + np.float32(factor - 1) * weight)
    # Grey first, over fluid alone, then white: the shares in a sample stay those of the maps.
    ribbon = np.clip(grey / np.maximum(1 - white, grey + 1e-6), 0, 1)
    canvas.paint(Patch(box, ribbon), "grey_matter", change)
    # The cerebellum lies below the tentorium, which rises towards the middle and the front.
    tentorium = -14 - 0.32 * np.abs(x) + 0.25 * np.clip(y + 60, -30, 20)
    hind = np.clip((tentorium - z) / 4, 0, 1) * np.clip((-y - 36) / 6, 0, 1)
    canvas.paint(Patch(box, hind * ribbon), "cerebellum")
    canvas.paint(Patch(box, white), "white_matter")
    for tissue, ((cx, cy, cz), (a, b, c), angle) in _NUCLEI.items():
        for k, side in enumerate((-1, 1)):
            u, v, w = side * x - cx, y - cy, z - cz
            p, q = math.cos(angle) * u + math.sin(angle) * v, math.cos(angle) * v - math.sin(angle) * u
            inside = (1 - np.sqrt((p / a) ** 2 + (q / b) ** 2 + (w / c) ** 2)) * np.float32(min(a, b, c))
            patch = canvas.soften(box, inside)
            canvas.paint(patch, tissue, head.putamen[k] if tissue == "putamen" else 1.0)
    if head.ventricle > 0:
        u = np.abs(x) - (8 + 0.15 * np.clip(-y, 0, 40))
        inside = 1 - np.sqrt((u / (2 + 7 * head.ventricle)) ** 2 + ((y + 8) / 38) ** 2 + ((z - 20 + 0.1 * y) / 10) ** 2)
        canvas.paint(canvas.soften(box, inside * np.float32(5)), "csf")

"""Heads: individual warps of the MNI152 average brain with skull, scalp and raised arms.

Coordinates are those of the MNI space (x, y, z in mm; y anterior, z up), except that x runs to the image's right, which
is the patient's left. The average is exactly symmetric and blurred; the warp makes it individual, sharpening makes its
ribbon as thin as one subject's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from allpet.simulation.canvas import Box, Canvas, Patch
from allpet.simulation.fields import Array, Curve, Draw, Field
from allpet.simulation.lesions import HeadLesion
from allpet.simulation.solids import Solid

Z_RANGE_MM = (-34.0, 66.0)
Position = tuple[Array, Array, Array]
"""x, y and z of samples in the average brain, mm."""

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
    origin_mm: Array
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
        radius = draw.uniform(26.0, 35.0)
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


def paint_head(canvas: Canvas, head: Head, lesions: Sequence[tuple[HeadLesion, Sequence[float]]] = ()) -> None:
    """Paint a head and its raised arms on an empty canvas; slices lie at MNI heights.

    Args:
        canvas: what to paint on.
        head: the anatomy.
        lesions: each lesion with, for each scan, the SUV of a glioma or the factor of a patch of low metabolism.
    """
    for solid in head.arms:
        canvas.draw(solid)
    average = template()
    columns = canvas.span(head.shift[0] - 118, head.shift[0] + 118)
    rows = canvas.span(-head.shift[1] - 135, -head.shift[1] + 115)
    box = (slice(0, len(canvas.z)), rows, columns)
    stiff, warp = _to_average(canvas, head, rows, columns)
    # The skull follows the brain's own shape only in part.
    skull = (stiff[0] + warp[0] / 2, stiff[1] + warp[1] / 2, stiff[2] + warp[2] / 2)
    _paint_shells(canvas, head, box, skull, _sample(average, average.depth, skull))
    x, y, z = where = (stiff[0] + warp[0], stiff[1] + warp[1], stiff[2] + warp[2])
    grey, white, depth = (_sample(average, volume, where) for volume in (average.grey, average.white, average.depth))
    grey, white = _sharpened(grey, white)
    # Sulci of this subject: fluid enters the outer ribbon where the field of folds is high.
    folds = head.folds.on_grid(canvas.z, canvas.y[rows], canvas.x[columns])
    grey = grey * (1 - np.clip(folds - 0.6, 0, 0.6) * np.clip(1 - depth / 12, 0, 1))
    # Grey first, over fluid alone, then white: the shares in a sample stay those of the maps.
    ribbon = np.clip(grey / np.maximum(1 - white, grey + np.float32(1e-6)), 0, 1)
    canvas.paint(Patch(box, ribbon), "grey_matter", _regional(head, x, y, z))
    # The cerebellum lies below the tentorium, which rises towards the middle and the front.
    tentorium = -14 - 0.32 * np.abs(x) + 0.25 * np.clip(y + 60, -30, 20)
    hind = np.clip((tentorium - z) / 4, 0, 1) * np.clip((-y - 36) / 6, 0, 1)
    canvas.paint(Patch(box, hind * ribbon), "cerebellum")
    canvas.paint(Patch(box, white), "white_matter")
    for lesion, factors in lesions:
        if lesion.kind == "hypometabolism":
            distance = _distance(where, lesion.centre)
            patch = Patch(box, np.exp(-0.5 * (distance / lesion.size_mm) ** 2) * np.clip(depth / 3 + 0.5, 0, 1))
            canvas.multiply(patch, "lesion_cold", factors)
    _paint_nuclei(canvas, head, box, where)
    for lesion, levels in lesions:
        if lesion.kind == "glioma":
            inside = np.minimum(lesion.size_mm - _distance(where, lesion.centre), depth - 2)
            canvas.paint(canvas.soften(box, inside, 4.0), "lesion_hot", suv=levels)


def _to_average(canvas: Canvas, head: Head, rows: slice, columns: slice) -> tuple[Position, Position]:
    """Return where samples lie in the average brain and the warp to be added, three ``(n, rows, columns)`` each, mm."""
    xs, ys = canvas.x[columns], canvas.y[rows]
    wx, wy, wz = (field.on_grid(canvas.z, ys, xs) * np.float32(head.warp_mm) for field in head.warp)
    # The brain's centre (0, -18) in MNI space sits on the axis of the scanner, but for the shift.
    u, v = (xs - head.shift[0]).astype(np.float32), (ys - head.shift[1]).astype(np.float32)[:, None]
    cos, sin = math.cos(head.turn), math.sin(head.turn)
    tilt, roll = np.float32(math.tan(head.tilt)), np.float32(math.tan(head.roll))
    height = canvas.z.astype(np.float32)[:, None, None]
    across = (cos * u + sin * v) / np.float32(head.scale[0])
    along = (cos * v - sin * u) / np.float32(head.scale[1])
    stiff = (
        across - roll * height,
        along - np.float32(18) + tilt * height,
        height / np.float32(head.scale[2]) - tilt * along + roll * across,
    )
    return stiff, (wx, wy, wz)


def _sample(average: Template, volume: Array, where: Position) -> Array:
    """Interpolate a volume of the average brain; beyond its border the nearest value holds."""
    index = [(c - origin) / average.pitch_mm for c, origin in zip(where, average.origin_mm, strict=True)]
    return np.asarray(ndimage.map_coordinates(volume, index, order=1, mode="nearest", output=np.float32))


def _distance(where: Position, centre: tuple[float, float, float]) -> Array:
    """Return the distance from a point, mm."""
    x, y, z = (c - np.float32(at) for c, at in zip(where, centre, strict=True))
    return np.sqrt(x * x + y * y + z * z)


def _paint_shells(canvas: Canvas, head: Head, box: Box, where: Position, depth: Array) -> None:
    """Paint scalp, face, skull and fluid around the brain."""
    x, y, z = where
    inner = depth + np.float32(head.fluid_mm)
    # Face and neck: below the brow the head is longer than the brain. Ellipsoids stand for them.
    face = (1 - np.sqrt((x / 62) ** 2 + ((y - 18) / 72) ** 2 + ((z + 52) / 62) ** 2)) * 60
    neck = (1 - np.sqrt((x / 64) ** 2 + ((y + 40) / 62) ** 2 + (np.minimum(z + 30, 0) / 90) ** 2)) * 55
    front = np.where(z < -20, np.maximum(face, neck), face)
    bone = inner + np.float32(head.skull_mm)
    canvas.paint(canvas.soften(box, np.maximum(front, bone) + np.float32(head.scalp_mm)), "skin")
    nose = (1 - np.sqrt((np.abs(x) / 16) ** 2 + ((y - 54) / 24) ** 2 + ((z + 44) / 22) ** 2)) * 16
    canvas.paint(canvas.soften(box, nose), "gas")
    canvas.paint(canvas.soften(box, bone), "skull")
    canvas.paint(canvas.soften(box, inner), "csf")


def _sharpened(grey: Array, white: Array) -> tuple[Array, Array]:
    """Sharpen the shares of grey and white matter: the average of 152 subjects is blurrier than any of them."""
    fluid = np.maximum(0, 1 - grey - white)
    grey, white, fluid = (np.square(share) for share in (grey, white, fluid))
    total = grey + white + fluid + np.float32(1e-6)
    return grey / total, white / total


def _regional(head: Head, x: Array, y: Array, z: Array) -> Array:
    """Return the factor on the uptake of grey matter by lobe and side."""
    occipital = np.clip((-y - 62) / 20, 0, 1)
    frontal = np.clip((y - 10) / 20, 0, 1)
    temporal = np.clip((-z - 5) / 10, 0, 1) * np.clip((y + 50) / 20, 0, 1)
    change = 1 + np.float32(head.asymmetry) * np.clip(x / 15, -1, 1)
    for factor, weight in zip(head.regional, (occipital, frontal, temporal), strict=True):
        change = change * (1 + np.float32(factor - 1) * weight)
    return change


def _paint_nuclei(canvas: Canvas, head: Head, box: Box, where: Position) -> None:
    """Paint thalamus, caudate, putamen and what the ventricles are wider than average."""
    x, y, z = where
    for tissue, ((cx, cy, cz), (a, b, c), angle) in _NUCLEI.items():
        cos, sin = math.cos(angle), math.sin(angle)
        v, w = y - cy, (z - cz) / c
        for k, side in enumerate((-1, 1)):
            u = side * x - cx
            p, q = (cos * u + sin * v) / a, (cos * v - sin * u) / b
            inside = (1 - np.sqrt(p * p + q * q + w * w)) * np.float32(min(a, b, c))
            canvas.paint(canvas.soften(box, inside), tissue, head.putamen[k] if tissue == "putamen" else 1.0)
    # The bodies of the lateral ventricles, apart from each other by the septum and diverging towards the back.
    u = np.abs(x) - (8 + 0.15 * np.clip(-y, 0, 40))
    width = 2 + 7 * head.ventricle
    inside = (1 - np.sqrt((u / width) ** 2 + ((y + 8) / 38) ** 2 + ((z - 20 + 0.1 * y) / 10) ** 2)) * 5
    canvas.paint(canvas.soften(box, inside), "csf")

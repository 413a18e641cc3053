"""Virtual patients: one seed is one patient, whose organs vary smoothly from slice to slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allpet.geometry import ParallelBeam
from allpet.prompts import TRUNK_REGIONS
from allpet.randomness import keyed_generator
from allpet.simulation import brain, trunk
from allpet.simulation.canvas import Canvas, oversampling
from allpet.simulation.fields import Array, Draw, Field
from allpet.simulation.lesions import (
    HeadLesion,
    Lesion,
    draw_head_lesions,
    draw_lesions,
    lesion_level,
    paint_lesion,
)
from allpet.simulation.tissues import TISSUES
from allpet.simulation.tracers import Tracer, tracer_table

REGIONS = ("brain", *TRUNK_REGIONS)
MARGIN_MM = 8.0  # kept free at the edge of the field of view, for the blur of the scanner
_CHUNK = 1 << 20  # samples painted together: more is no faster and takes more memory


class Scan(NamedTuple):
    """What a patient was given and when they were scanned.

    Attributes:
        tracer: its table.
        minutes: time after injection; None is the table's.
    """

    tracer: Tracer
    minutes: float | None = None


class Patient(NamedTuple):
    """One region of one virtual patient.

    Attributes:
        seed: identity.
        region: ``brain``, ``chest``, ``abdomen`` or ``pelvis``.
        anatomy: head or trunk.
        lesions: what grew in it.
    """

    seed: int
    region: str
    anatomy: brain.Head | trunk.Trunk
    lesions: tuple[HeadLesion, ...] | tuple[Lesion, ...]


class SlicePhantom(NamedTuple):
    """Registered rasters of slices of one patient.

    Attributes:
        activity: SUV, ``(n_slices, rows, columns)``, float32.
        attenuation: linear attenuation coefficient at 511 keV, 1/mm, ``(n_slices, rows, columns)``, float32.
        labels: integers of ``tissues.LABELS``, ``(n_slices, rows, columns)``, uint8.
        z_mm: height of each slice in the patient, ``(n_slices,)``, float64.
        region: ``brain``, ``chest``, ``abdomen`` or ``pelvis``.
        tracer: name of the tracer.
        seed: the patient.
    """

    activity: Tensor
    attenuation: Tensor
    labels: Tensor
    z_mm: Tensor
    region: str
    tracer: str
    seed: int


def patient_slices(
    seed: int,
    region: str,
    tracer: str | Tracer,
    n_slices: int,
    geometry: ParallelBeam,
    minutes: float | None = None,
) -> SlicePhantom:
    """Return slices of one virtual patient, evenly spread over a region.

    The patient's body depends on the seed alone (it shrinks where it would not fit in the field of view, and a tracer
    given to one sex finds that sex); the region and the tracer choose what of it is seen. Equal arguments give
    bit-identical rasters.

    Args:
        seed: the patient.
        region: ``brain``, ``chest``, ``abdomen`` or ``pelvis``.
        tracer: a tracer's table or the name of a built-in one, ``FDG``, ``DOPA`` or ``PSMA``.
        n_slices: number of slices.
        geometry: gives the image grid and the field of view.
        minutes: time of the scan after injection; None is the time that the tracer's table holds for.

    Raises:
        ValueError: if the region or the tracer is unknown or ``n_slices`` is less than 1.
    """
    if n_slices < 1:
        raise ValueError(f"n_slices is {n_slices}, but a patient needs at least one slice.")
    table = tracer_table(tracer) if isinstance(tracer, str) else tracer
    patient = draw_patient(seed, region, geometry.field_of_view_mm, table.sex)
    z = slice_heights(seed, region, n_slices)
    activity, attenuation, labels = paint_patient(patient, z, geometry, [Scan(table, minutes)])
    return SlicePhantom(activity[0], attenuation, labels, torch.from_numpy(z), region, table.name, seed)


def draw_patient(seed: int, region: str, field_of_view_mm: float, sex: str = "") -> Patient:
    """Draw a region of a patient.

    Args:
        seed: the patient.
        region: ``brain``, ``chest``, ``abdomen`` or ``pelvis``.
        field_of_view_mm: radius of the disc that the body must lie in.
        sex: ``male`` or ``female``; drawn if empty.

    Raises:
        ValueError: if the region is unknown.
    """
    if region not in REGIONS:
        raise ValueError(f"Unknown region {region!r}; choose one of {', '.join(REGIONS)}.")
    limit = field_of_view_mm - MARGIN_MM
    lesions = Draw(keyed_generator(seed, region, "lesions"))
    if region == "brain":
        return Patient(
            seed, region, brain.draw_head(Draw(keyed_generator(seed, "head")), limit), draw_head_lesions(lesions)
        )
    body = trunk.draw_trunk(Draw(keyed_generator(seed, "trunk")), limit, sex)
    return Patient(seed, region, body, draw_lesions(lesions, body, region, trunk.Z_RANGES_MM[region]))


def slice_heights(seed: int, region: str, n_slices: int) -> Array:
    """Return heights (mm) evenly spread over a region, with an offset of up to half a step drawn per patient."""
    low, high = brain.Z_RANGE_MM if region == "brain" else trunk.Z_RANGES_MM[region]
    offset = Draw(keyed_generator(seed, region, "heights")).uniform(-0.5, 0.5)
    return low + (np.arange(n_slices) + 0.5 + offset) * ((high - low) / n_slices)


def paint_patient(
    patient: Patient, z_mm: Array, geometry: ParallelBeam, scans: Sequence[Scan]
) -> tuple[Tensor, Tensor, Tensor]:
    """Paint slices of a patient for one or more scans of the same anatomy.

    Args:
        patient: from ``draw_patient``.
        z_mm: height of each slice, ``(n,)``.
        geometry: gives the image grid.
        scans: tracer and time of each scan.

    Returns:
        Activity ``(scans, n, rows, columns)``, SUV; attenuation ``(n, rows, columns)``, 1/mm; labels, uint8.
    """
    uptakes = [
        scan.tracer.draw_suv(keyed_generator(patient.seed, scan.tracer.name, "uptake"), scan.minutes) for scan in scans
    ]
    texture = Field.draw(keyed_generator(patient.seed, patient.region, "texture"), 48, 6.0)
    chunk = max(1, _CHUNK // (geometry.image_size * oversampling(geometry)) ** 2)
    parts = []
    for start in range(0, len(z_mm), chunk):
        pose = patient.anatomy.pose if isinstance(patient.anatomy, trunk.Trunk) else None
        canvas = Canvas(geometry, z_mm[start : start + chunk], uptakes, texture, pose)
        _paint(canvas, patient, scans)
        activity, mu = canvas.averaged()
        parts.append((torch.from_numpy(activity), torch.from_numpy(mu), torch.from_numpy(canvas.labels)))
    activities, attenuations, labels = zip(*parts, strict=True)
    return torch.cat(activities, dim=1), torch.cat(attenuations), torch.cat(labels)


def _paint(canvas: Canvas, patient: Patient, scans: Sequence[Scan]) -> None:
    """Paint anatomy, then the lesions that at least one scan shows."""
    seen: list[tuple[HeadLesion | Lesion, list[float]]] = []
    for lesion in patient.lesions:
        kinds = lesion.kinds if isinstance(lesion, Lesion) else (lesion.kind,)
        levels, shown = [], False
        for scan, uptake in zip(scans, canvas.uptakes, strict=True):
            if isinstance(lesion, Lesion):
                around = uptake[TISSUES[lesion.host].uptake]
            else:
                around = 1.0 if lesion.kind == "hypometabolism" else uptake["grey_matter"]
            level = lesion_level(kinds, lesion.deviation, scan.tracer, scan.minutes, around, uptake["blood"])
            levels.append(around if level is None else level)
            shown |= level is not None
        if shown:
            seen.append((lesion, levels))
    if isinstance(patient.anatomy, brain.Head):
        brain.paint_head(canvas, patient.anatomy, [(x, levels) for x, levels in seen if isinstance(x, HeadLesion)])
        return
    trunk.paint_trunk(canvas, patient.anatomy)
    for lesion, levels in seen:
        if isinstance(lesion, Lesion):
            paint_lesion(canvas, lesion, levels)

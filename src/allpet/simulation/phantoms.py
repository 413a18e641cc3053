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
from allpet.simulation.canvas import Canvas
from allpet.simulation.fields import Draw, Field
from allpet.simulation.tracers import tracer_table

REGIONS = ("brain", *TRUNK_REGIONS)
MARGIN_MM = 8.0  # kept free at the edge of the field of view, for the blur of the scanner
_CHUNK = 1 << 20  # samples painted together: more is no faster and takes more memory


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


def patient_slices(seed: int, region: str, tracer: str, n_slices: int, geometry: ParallelBeam) -> SlicePhantom:
    """Return slices of one virtual patient, evenly spread over a region.

    The patient's body depends on the seed alone (and shrinks where it would not fit in the field of view); the region
    and the tracer choose what of it is seen. Equal arguments give bit-identical rasters.

    Args:
        seed: the patient.
        region: ``brain``, ``chest``, ``abdomen`` or ``pelvis``.
        tracer: name of a built-in tracer, ``FDG``, ``DOPA`` or ``PSMA``.
        n_slices: number of slices.
        geometry: gives the image grid and the field of view.

    Raises:
        ValueError: if the region or the tracer is unknown or ``n_slices`` is less than 1.
    """
    if region not in REGIONS:
        raise ValueError(f"Unknown region {region!r}; choose one of {', '.join(REGIONS)}.")
    if n_slices < 1:
        raise ValueError(f"n_slices is {n_slices}, but a patient needs at least one slice.")
    suv = tracer_table(tracer).draw_suv(keyed_generator(seed, tracer, "uptake"))
    z = slice_heights(seed, region, n_slices)
    texture = Field.draw(keyed_generator(seed, region, "texture"), 48, 6.0)
    limit = geometry.field_of_view_mm - MARGIN_MM
    anatomy = Draw(keyed_generator(seed, "head" if region == "brain" else "trunk"))
    if region == "brain":
        head = brain.draw_head(anatomy, limit)
    else:
        body = trunk.draw_trunk(anatomy, limit)
    chunk = max(1, _CHUNK // _samples(geometry))
    parts = []
    for start in range(0, n_slices, chunk):
        canvas = Canvas(geometry, z[start : start + chunk], [suv], texture)
        if region == "brain":
            brain.paint_head(canvas, head)
        else:
            trunk.paint_trunk(canvas, body)
        activity, mu = canvas.averaged()
        parts.append((activity[0], mu, canvas.labels))
    activity, attenuation, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return SlicePhantom(activity, attenuation, labels, torch.from_numpy(z), region, tracer, seed)


def slice_heights(seed: int, region: str, n_slices: int) -> np.ndarray:
    """Return heights (mm) evenly spread over a region, with an offset of up to half a step drawn per patient."""
    low, high = brain.Z_RANGE_MM if region == "brain" else trunk.Z_RANGES_MM[region]
    step = (high - low) / n_slices
    offset = Draw(keyed_generator(seed, region, "heights")).uniform(-0.5, 0.5)
    return low + (np.arange(n_slices) + 0.5 + offset) * step


def _samples(geometry: ParallelBeam) -> int:
    """Return the number of samples that one slice is painted with."""
    return len(Canvas(geometry, np.zeros(0), (), Field(np.zeros((1, 1, 1), np.float32), 1.0)).x) ** 2

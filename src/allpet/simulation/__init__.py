"""The PET simulator: tracers, virtual patients and acquisitions."""

from allpet.simulation.acquisition import Acquisition, CorrectionState, acquire, draw_efficiency, draw_levels
from allpet.simulation.phantoms import SlicePhantom, patient_slices
from allpet.simulation.tissues import LABELS
from allpet.simulation.tracers import Tracer, read_tracer, tracer_table

__all__ = [
    "LABELS",
    "Acquisition",
    "CorrectionState",
    "SlicePhantom",
    "Tracer",
    "acquire",
    "draw_efficiency",
    "draw_levels",
    "patient_slices",
    "read_tracer",
    "tracer_table",
]

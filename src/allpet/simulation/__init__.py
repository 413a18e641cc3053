"""The PET simulator: tracers, virtual patients and acquisitions."""

from allpet.simulation.acquisition import Acquisition, acquire
from allpet.simulation.phantoms import SlicePhantom, patient_slices
from allpet.simulation.tissues import LABELS
from allpet.simulation.tracers import Tracer, read_tracer, tracer_table

__all__ = [
    "LABELS",
    "Acquisition",
    "SlicePhantom",
    "Tracer",
    "acquire",
    "patient_slices",
    "read_tracer",
    "tracer_table",
]

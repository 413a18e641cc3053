"""What watches and steers a training: name these classes in the callbacks of a YAML file."""

from callbacks.copy_watch import CopyWatch
from callbacks.export import ExportPretrained
from callbacks.latent_statistics import LatentStatistics
from callbacks.memory import PeakMemory
from callbacks.panels import Panels
from callbacks.progress import StepProgress
from callbacks.restoration_writer import RestorationWriter
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.sample_writer import SampleWriter

__all__ = [
    "CopyWatch",
    "ExportPretrained",
    "LatentStatistics",
    "Panels",
    "PeakMemory",
    "RestorationWriter",
    "RunCheckpoint",
    "SampleWriter",
    "StepProgress",
]

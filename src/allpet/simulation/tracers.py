"""Tracers as tables: mean uptake of every tissue, its spread between patients and its change with time.

Each tracer is one text file beside this module; a new tracer is a new file, given to ``read_tracer``. Every row names
its source or says *design value*: chosen here to look right, not measured.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from allpet.simulation.tissues import TISSUES

HALF_LIFE_MIN = {"F18": 109.77, "Ga68": 67.71}
"""Half-lives in minutes (Decay Data Evaluation Project)."""
POSITRON_RANGE_MM = {"F18": 0.6, "Ga68": 2.6}
"""FWHM in mm of the blur by the positron's flight in water; adds to the scanner's in quadrature."""
GROUP_WEIGHT = 0.8  # correlation, in the log, of a tissue with its group


class Uptake(NamedTuple):
    """One row of a tracer's table: SUV mean and sd between patients, late factor and its sd, group, source."""

    mean: float
    sd: float
    late: float
    late_sd: float
    group: str
    source: str


class Tracer(NamedTuple):
    """A tracer's table.

    Attributes:
        name: as in ``allpet.prompts.TRACERS``.
        isotope: key of ``HALF_LIFE_MIN`` and ``POSITRON_RANGE_MM``.
        minutes: time after injection that the means hold for.
        late_minutes: time after injection that ``mean * late`` holds for.
        sex: ``male`` or ``female`` where only they are given the tracer; empty for both.
        uptake: tissue -> row.
        lesions: kind of lesion -> row, whose group is ``suv`` or ``contrast`` (a factor on the tissue around it).
    """

    name: str
    isotope: str
    minutes: float
    late_minutes: float
    sex: str
    uptake: dict[str, Uptake]
    lesions: dict[str, Uptake]

    @property
    def half_life_min(self) -> float:
        """Physical half-life in minutes."""
        return HALF_LIFE_MIN[self.isotope]

    @property
    def positron_range_mm(self) -> float:
        """FWHM in mm of the blur by the positron's flight."""
        return POSITRON_RANGE_MM[self.isotope]

    def resolution_mm(self, scanner_mm: float = 4.5) -> float:
        """Return the FWHM in mm of scanner and positron range together."""
        return math.hypot(scanner_mm, self.positron_range_mm)

    def draw_suv(self, generator: torch.Generator, minutes: float | None = None) -> dict[str, float]:
        """Draw one patient's SUV of every tissue.

        SUVs are lognormal with the table's mean and sd. Tissues of one group share part of their deviation, so a
        patient's brain is bright or faint as a whole. The late factor grows linearly with time after ``minutes``; it
        is drawn always, so early and late scans of a patient belong together.

        Args:
            generator: source of randomness.
            minutes: time after injection; default the table's.

        Returns:
            Tissue -> decay-corrected SUV.
        """
        groups = sorted({row.group for row in self.uptake.values()})
        shared = dict(zip(groups, torch.randn(len(groups), generator=generator).tolist(), strict=True))
        own, late = torch.randn(2, len(self.uptake), generator=generator).tolist()
        suv = {}
        for (tissue, row), own_z, late_z in zip(self.uptake.items(), own, late, strict=True):
            z = GROUP_WEIGHT * shared[row.group] + math.sqrt(1 - GROUP_WEIGHT**2) * own_z
            suv[tissue] = lognormal(row.mean, row.sd, max(-2.5, min(2.5, z))) * self.late_factor(row, late_z, minutes)
        return suv

    def late_factor(self, row: Uptake, z: float, minutes: float | None) -> float:
        """Return the change of uptake since the table's time for a standard normal deviate ``z``."""
        elapsed = 0.0 if minutes is None else (minutes - self.minutes) / (self.late_minutes - self.minutes)
        return max(0.05, 1 + (row.late + row.late_sd * z - 1) * elapsed)


def lognormal(mean: float, sd: float, z: float) -> float:
    """Map a standard normal value to a lognormal one of given mean and sd (moment matching)."""
    variance = math.log1p((sd / mean) ** 2)
    return mean * math.exp(math.sqrt(variance) * z - variance / 2)


def read_tracer(path: str | Path) -> Tracer:
    """Read a tracer's table from a text file: ``key value`` lines, then ``tissue mean sd late late_sd group source``.

    Rows of lesions are named ``lesion_KIND`` and have ``suv`` or ``contrast`` for a group.

    Raises:
        ValueError: if a line cannot be read, or a heading or a tissue is missing.
    """
    head: dict[str, str] = {}
    uptake: dict[str, Uptake] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split(None, 6)
        if not words or words[0].startswith("#"):
            continue
        try:
            if len(words) == 2:
                head[words[0]] = words[1]
            else:
                name, mean, sd, late, late_sd, group, source = words
                uptake[name] = Uptake(float(mean), float(sd), float(late), float(late_sd), group, source)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: {line!r} is not 'key value' or 'tissue mean sd late late_sd group source'."
            ) from None
    if missing := {"name", "isotope", "minutes", "late_minutes"} - head.keys():
        raise ValueError(f"{path} lacks the heading {', '.join(sorted(missing))}.")
    if head["isotope"] not in HALF_LIFE_MIN:
        raise ValueError(f"{path} names isotope {head['isotope']!r}; known are {', '.join(HALF_LIFE_MIN)}.")
    if lacking := {tissue.uptake for tissue in TISSUES.values()} - {""} - uptake.keys():
        raise ValueError(f"{path} lacks rows for {', '.join(sorted(lacking))}; every tissue needs one.")
    lesions = {name.removeprefix("lesion_"): uptake.pop(name) for name in list(uptake) if name.startswith("lesion_")}
    minutes, late_minutes = float(head["minutes"]), float(head["late_minutes"])
    return Tracer(head["name"], head["isotope"], minutes, late_minutes, head.get("sex", ""), uptake, lesions)


@functools.cache
def tracer_table(name: str) -> Tracer:
    """Return the built-in table of a tracer, ``FDG``, ``DOPA`` or ``PSMA``.

    Raises:
        ValueError: if there is no such table.
    """
    path = Path(__file__).with_name(f"tracer_{name.lower()}.txt")
    if not path.exists():
        known = sorted(p.stem.removeprefix("tracer_").upper() for p in path.parent.glob("tracer_*.txt"))
        raise ValueError(f"There is no table for tracer {name!r}; built in are {', '.join(known)}.")
    return read_tracer(path)

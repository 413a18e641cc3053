"""Units of DICOM PET images and the standardised uptake value, SUV = activity per mL x body weight / dose.

DICOM gives the dose at the time of injection and the activity at a time that ``DecayCorrection`` names (PS3.3
C.8.9.1.1.5): START, the start of the series, to which the dose must be decayed; ADMIN, the injection itself, so that
the dose is taken as it is. Images corrected to no time (NONE) have no SUV. The times are chosen as by the Quantitative
Imaging Biomarkers Alliance (*SUV Calculation*, QIBA FDG-PET/CT profile): the series' time, or the first acquisition
where the series' time is later, as in series that were made anew from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydicom import Dataset

UNITS = {
    "BQML": "Bq/mL",
    "CNTS": "counts",
    "CPS": "counts/s",
    "PROPCNTS": "proportional to counts",
    "PROPCPS": "proportional to counts/s",
    "GML": "SUV",
    "CM2ML": "SUV by body surface (cm2/mL)",
    "NONE": "",
    "BQCC": "Bq/mL",
}
"""DICOM's codes in words (PS3.3 C.8.9.1.1.3)."""
CORRECTIONS = {
    "DECY": "decay_corrected",
    "ATTN": "attenuation_corrected",
    "SCAT": "scatter_corrected",
    "NORM": "normalised",
    "RAN": "randoms_subtracted",
}
"""Values of CorrectedImage and the states they stand for."""
TRACERS = {
    "FDG": ("fdg", "fludeoxyglucose", "fluorodeoxyglucose"),
    "DOPA": ("dopa",),
    "PSMA": ("psma",),
}
"""Parts of a radiopharmaceutical's name, lower case without hyphens and blanks."""
_TRACER_CODES = {
    **{"35321007": "FDG", "C-B1031": "FDG", "5811000122108": "DOPA", "C-E0241": "DOPA"},
    **{"126758": "PSMA", "126759": "PSMA", "C118961": "PSMA"},
}  # PS3.16, context group 4021
_HALF_LIFE_S = {"18F": 6586.2, "68Ga": 4062.6, "11C": 1221.8, "89Zr": 282240.0}
_ISOTOPE_CODES = {
    **{"77004003": "18F", "C-111A1": "18F", "35337001": "68Ga", "C-131A3": "68Ga"},
    **{"40565003": "11C", "C-105A1": "11C", "63360001": "89Zr", "C-168A4": "89Zr"},
}  # PS3.16, context group 4020


class Factor(NamedTuple):
    """What turns stored values into SUV.

    Attributes:
        value: factor; 1 where they are SUV already; None where the header does not allow it.
        how: where it comes from, or what is missing.
    """

    value: float | None
    how: str


def suv_factor(series: Sequence[Dataset]) -> Factor:
    """Return the factor from a series' rescaled values to SUV by body weight.

    Args:
        series: headers of all its slices.
    """
    head = series[0]
    units = str(head.get("Units", "")).upper()
    if units == "GML":
        kind = str(head.get("SUVType", "BW")).upper() or "BW"
        return Factor(1.0, "SUV as stored") if kind == "BW" else Factor(None, f"stored as SUV of the kind {kind}")
    if units == "CNTS":
        return _philips(head)
    if units not in ("BQML", "BQCC"):
        return Factor(None, f"units are {units or 'not stated'}")
    if (weight := _positive(head, "PatientWeight")) is None:
        return Factor(None, "PatientWeight is missing")
    drug = head.get("RadiopharmaceuticalInformationSequence")
    drug = drug[0] if drug else None
    if drug is None or (dose := _positive(drug, "RadionuclideTotalDose")) is None:
        return Factor(None, "RadionuclideTotalDose is missing")
    correction = str(head.get("DecayCorrection", "")).upper()
    if correction == "ADMIN":
        return Factor(1000 * weight / dose, f"{weight:g} kg, {dose / 1e6:.4g} MBq, decay corrected to the injection")
    if correction != "START":
        return Factor(None, f"DecayCorrection is {correction or 'not stated'}")
    half_life = _positive(drug, "RadionuclideHalfLife") or _HALF_LIFE_S.get(isotope_of(head))
    if half_life is None:
        return Factor(None, "RadionuclideHalfLife is missing")
    scan = _scan_start(series)
    injection = _injection(drug, scan) if scan is not None else None
    if scan is None or injection is None:
        return Factor(None, "the time of the injection or of the scan is missing")
    elapsed = (scan - injection).total_seconds()
    if not 0 <= elapsed < 10 * half_life:
        return Factor(None, f"the injection lies {elapsed / 60:.0f} min before the scan")
    dose_at_scan = dose * 2 ** (-elapsed / half_life)
    how = f"{weight:g} kg, {dose / 1e6:.4g} MBq injected {elapsed / 60:.1f} min before the scan"
    return Factor(1000 * weight / dose_at_scan, how)  # 1 kg = 1000 g, 1 g of body = 1 mL


def tracer_of(head: Dataset) -> str | None:
    """Return the tracer (``allpet.prompts.TRACERS``) that a header names; None if it is none of them."""
    drugs = head.get("RadiopharmaceuticalInformationSequence")
    if not drugs:
        return None
    for code in drugs[0].get("RadiopharmaceuticalCodeSequence") or []:
        if str(code.get("CodeValue", "")) in _TRACER_CODES:
            return _TRACER_CODES[str(code.CodeValue)]
    names = [str(drugs[0].get("Radiopharmaceutical", ""))]
    names += [str(code.get("CodeMeaning", "")) for code in drugs[0].get("RadiopharmaceuticalCodeSequence") or []]
    text = " ".join(names).lower().replace("-", "").replace(" ", "")
    found = [tracer for tracer, parts in TRACERS.items() if any(part in text for part in parts)]
    return found[0] if len(found) == 1 else None


def isotope_of(head: Dataset) -> str:
    """Return the isotope that a header names, such as ``18F``; empty if none is recognised."""
    drugs = head.get("RadiopharmaceuticalInformationSequence")
    for code in (drugs[0].get("RadionuclideCodeSequence") or []) if drugs else []:
        if str(code.get("CodeValue", "")) in _ISOTOPE_CODES:
            return _ISOTOPE_CODES[str(code.CodeValue)]
    return ""


def _philips(head: Dataset) -> Factor:
    """Counts of Philips scanners carry their factor in a private element."""
    element = head.get((0x7053, 0x1000))
    try:
        value = float(element.value) if element is not None else 0.0
    except (TypeError, ValueError):
        value = 0.0
    if value > 0:
        return Factor(value, "by the scanner's own factor (7053,1000)")
    return Factor(None, "units are CNTS without the scanner's own factor (7053,1000)")


def _positive(dataset: Dataset, name: str) -> float | None:
    try:
        value = float(dataset.get(name) or 0)
    except (TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def _moment(date: object, time: object) -> datetime | None:
    """Put DICOM's date and time together; None if either is missing or cannot be read."""
    try:
        moment = datetime.strptime(str(date).strip()[:8], "%Y%m%d")
        text = str(time).strip()
        if len(text) < 2:
            return None
        clock = text.partition(".")[0].ljust(6, "0")
        fraction = float("0." + (text.partition(".")[2] or "0"))
        return moment + timedelta(hours=int(clock[:2]), minutes=int(clock[2:4]), seconds=int(clock[4:6]) + fraction)
    except ValueError:
        return None


def _scan_start(series: Sequence[Dataset]) -> datetime | None:
    """Return the moment that START stands for."""
    head = series[0]
    starts = [_moment(one.get("AcquisitionDate"), one.get("AcquisitionTime")) for one in series]
    first = min((start for start in starts if start is not None), default=None)
    whole = _moment(head.get("SeriesDate"), head.get("SeriesTime"))
    if whole is None or (first is not None and first < whole):
        return first
    return whole


def _injection(drug: Dataset, scan: datetime) -> datetime | None:
    """Return the moment of injection; a bare time belongs to the day of the scan, or to the day before."""
    stamp = str(drug.get("RadiopharmaceuticalStartDateTime") or "")
    if len(stamp) >= 10 and (moment := _moment(stamp[:8], stamp[8:].partition("+")[0].partition("-")[0])) is not None:
        return moment
    moment = _moment(scan.strftime("%Y%m%d"), drug.get("RadiopharmaceuticalStartTime") or "")
    return moment - timedelta(days=1) if moment is not None and moment > scan else moment

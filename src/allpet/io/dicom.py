"""DICOM PET series read as axial images.

A series is a folder with one file per slice. Slices are ordered from the feet to the head by ImagePositionPatient and
turned to the axes of this project: column +x is the patient's left and row 0 the front (y up), as an axial slice is
looked at. DICOM's own patient axes are +x left, +y back, +z head, so a patient lying on the back, head first, is stored
that way already; others are turned and flipped, never interpolated. The middle of the image is taken for the axis of
rotation. Values are ``stored * RescaleSlope + RescaleIntercept``, each slice with its own, and SUV by body weight where
the header allows it (``allpet.io.suv``).

Names, identifiers and dates of patients are not taken over: the column ``patient`` is a hash of PatientID.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from allpet.io.scans import DataError, Scan, scan_from
from allpet.io.suv import CORRECTIONS, UNITS, isotope_of, suv_factor, tracer_of

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
CREATOR = "ALL-PET"
"""Private creator of the element that holds ``Scan.about`` in files written here."""
PRIVATE_GROUP = 0x0009
_ANONYMOUS = {"", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "0"}
_UNDO = "export the series again from the scanner or the archive"


def is_dicom(path: str | Path) -> bool:
    """Tell whether a file is DICOM by its mark, ``DICM`` after 128 bytes; False if it cannot be read."""
    try:
        with Path(path).open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def may_be_dicom(name: str) -> bool:
    """Tell by a file's name whether it is worth looking for the mark: scanners often write no suffix, or an UID."""
    suffix = Path(name).suffix.lower()
    return suffix in DICOM_SUFFIXES or suffix[1:].isdigit() or not suffix


def read_dicom(path: str | Path, series: str | None = None, values: Literal["auto", "suv", "stored"] = "auto") -> Scan:
    """Read a PET series.

    Args:
        path: a folder (its subfolders do not count), or one file of one slice.
        series: number, description or UID of the series, where a folder holds several.
        values: ``suv``: SUV by body weight; ``stored``: the units of the file; ``auto``: SUV where the header allows.

    Returns:
        Images ``(slices, rows, columns)`` from the feet to the head; the table has ``slice_z_mm``, and ``patient`` and
        ``tracer`` where the header tells them.

    Raises:
        DataError: if there is no series that can be used, or ``suv`` is asked for and the header does not allow it.
    """
    path = Path(path)
    headers, notes = _choose(path, _headers(path), series)
    stack = _order(path, headers)
    turn = _Turn.of(path, stack[0].head)
    rows, columns = int(stack[0].head.Rows), int(stack[0].head.Columns)
    out = np.empty((len(stack), *((columns, rows) if turn.swap else (rows, columns))), np.float32)
    for i, one in enumerate(stack):  # slice by slice: memory holds the volume once
        out[i] = turn(_pixels(one))
    heads = [one.head for one in stack]
    if not np.isfinite(out).all():
        raise DataError(path, "its slices hold NaN or infinite values", _UNDO)
    scan = Scan(
        out,
        "image",
        pixel_mm=float(heads[0].PixelSpacing[0]),
        slice_mm=_distance(path, stack),
        units=UNITS.get(str(heads[0].get("Units", "")).upper(), str(heads[0].get("Units", ""))),
        state=_state(heads[0]),
        table=_table(stack),
        provenance=_provenance(path, heads[0]),
        notes=notes,
    )
    if (own := _own(heads[0])) is not None:
        return _as_written(scan, own, path)
    return _in_suv(scan, heads, values, path)


class _Slice(NamedTuple):
    """A file's header, and how far from the feet it lies in mm."""

    file: Path
    head: Dataset
    z_mm: float


class _Turn(NamedTuple):
    """How stored rows and columns become ours."""

    swap: bool
    flip_rows: bool
    flip_columns: bool

    @classmethod
    def of(cls, path: Path, head: Dataset) -> _Turn:
        cosines = np.array([float(value) for value in head.ImageOrientationPatient]).reshape(2, 3)
        along_row, along_column = cosines  # the directions in which column and row indices rise
        normal = np.cross(along_row, along_column)
        if abs(normal[2]) < 0.9:
            plane = {0: "sagittal", 1: "coronal"}.get(int(np.abs(normal).argmax()), "oblique")
            raise DataError(path, f"its slices are {plane}, not axial", "reformat the series to axial slices")
        swap = abs(along_row[0]) < abs(along_column[0])
        x, y = (along_column, along_row) if swap else (along_row, along_column)
        if min(abs(x[0]), abs(y[1])) < 0.99:
            degrees = np.degrees(np.arccos(min(abs(x[0]), abs(y[1]))))
            finding = f"its slices are tilted by {degrees:.0f} degrees to the patient's axes"
            raise DataError(path, finding, "reformat the series to axial slices")
        return cls(bool(swap), bool(y[1] < 0), bool(x[0] < 0))  # DICOM's y rises to the back, as our rows do

    def __call__(self, image: np.ndarray) -> np.ndarray:
        image = image.T if self.swap else image
        return image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def _headers(path: Path) -> list[tuple[Path, Dataset]]:
    """Read the headers of all DICOM files of a folder, without pixels."""
    from pydicom import dcmread

    if not path.exists():
        raise DataError(path, "there is no such file or folder", "check the path")
    try:
        files = [path] if path.is_file() else sorted(Path(item.path) for item in os.scandir(path) if item.is_file())
    except OSError as error:
        raise DataError(path, f"it cannot be read ({error.strerror})", "check its permissions") from error
    headers: list[tuple[Path, Dataset]] = []
    for file in files:
        if file.name.startswith(".") or file.name.upper() == "DICOMDIR":
            continue
        if not is_dicom(file):
            if path.is_file() or file.suffix.lower() in DICOM_SUFFIXES:
                raise DataError(file, "it is no DICOM file or is damaged (the mark DICM is missing)", _UNDO)
            continue
        try:
            head = dcmread(file, stop_before_pixels=True)
            modality = str(head.get("Modality", ""))
        except Exception as error:  # pydicom raises anything at all on damaged input
            raise DataError(file, f"it cannot be read as DICOM ({_short(error)})", _UNDO) from error
        if not modality:
            raise DataError(file, "its header does not say what it is (Modality is missing)", _UNDO)
        headers.append((file, head))
    if not headers:
        raise DataError(path, "it holds no DICOM files", "check the path")
    return headers


def _choose(
    path: Path, headers: list[tuple[Path, Dataset]], series: str | None
) -> tuple[list[tuple[Path, Dataset]], tuple[str, ...]]:
    """Pick the PET series, or the one asked for; and say what was left aside."""
    groups: dict[str, list[tuple[Path, Dataset]]] = defaultdict(list)
    for file, head in headers:
        groups[str(head.get("SeriesInstanceUID", ""))].append((file, head))
    heads = {uid: group[0][1] for uid, group in groups.items()}
    pet = [uid for uid in groups if str(heads[uid].get("Modality", "")).upper() == "PT"]
    if series is not None:
        wanted = [uid for uid in groups if series in (uid, *_labels(heads[uid]))]
        if len(wanted) != 1:
            listed = "; ".join(_name(heads[uid], len(groups[uid])) for uid in groups)
            raise DataError(path, f"{len(wanted) or 'none'} of its series is called {series!r}", f"it holds {listed}")
        pet = [uid for uid in wanted if uid in pet]
    if not pet:
        kinds = sorted({str(head.get("Modality", "")) or "unnamed" for head in heads.values()})
        raise DataError(path, f"it holds no PET but the modality {', '.join(kinds)}", "choose a PET series (PT)")
    if len(pet) > 1:
        listed = " and ".join(_name(heads[uid], len(groups[uid])) for uid in pet[:4])
        finding = f"it holds {len(pet)} PET series, {listed}"
        raise DataError(path, finding, "keep each in a folder of its own, or name one by number or description (key)")
    left = len(groups) - len(pet)
    notes = (f"{left} other series in the folder left aside",) if left and series is None else ()
    return groups[pet[0]], notes


def _labels(head: Dataset) -> tuple[str, str]:
    return str(head.get("SeriesNumber", "")), str(head.get("SeriesDescription", ""))


def _name(head: Dataset, n: int) -> str:
    number, text = _labels(head)
    return f"{number or '?'} {text!r} ({n} file{'s' * (n != 1)})"


def _order(path: Path, headers: list[tuple[Path, Dataset]]) -> list[_Slice]:
    """Order slices from feet to head, and refuse what is no volume."""
    stack = []
    for file, head in headers:
        if "NumberOfFrames" in head and int(head.NumberOfFrames or 1) > 1:
            finding = f"it is an enhanced file of {head.NumberOfFrames} frames"
            raise DataError(file, finding, "convert it to one file per slice, or to NIfTI (dcm2niix)")
        for name, n in {"ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2}.items():
            value = head.get(name)
            if value is None or len(value) != n:
                raise DataError(file, f"its header lacks {name}", _UNDO)
        for name in ("Rows", "Columns"):
            if not head.get(name):
                raise DataError(file, f"its header lacks {name}", _UNDO)
        # Tilted slices are refused later; until then z along the patient orders them.
        stack.append(_Slice(file, head, float(head.ImagePositionPatient[2])))
    stack.sort(key=lambda one: one.z_mm)
    first = stack[0].head
    rows_mm, columns_mm = (float(value) for value in first.PixelSpacing)
    if abs(rows_mm - columns_mm) > 1e-3 * rows_mm or rows_mm <= 0:
        finding = f"its pixels are {rows_mm:g} x {columns_mm:g} mm, not square"
        raise DataError(path, finding, "resample it to square pixels")
    for one in stack:
        for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "Units"):
            mine, others = one.head.get(name), first.get(name)
            same = (
                np.allclose(mine, others, atol=1e-3)
                if isinstance(mine, Sequence | np.ndarray) and not isinstance(mine, str)
                else mine == others
            )
            if not same:
                finding = f"its {name} is {mine} where {stack[0].file.name} has {others}"
                raise DataError(one.file, finding, "keep each kind of slice in a folder of its own")
    return stack


def _distance(path: Path, stack: list[_Slice]) -> float | None:
    """Return the distance between slices; refuse gaps and several images at one place."""
    if len(stack) == 1:
        thickness = stack[0].head.get("SliceThickness")
        return float(thickness) if thickness else None
    gaps = np.diff([one.z_mm for one in stack])
    usual = float(np.median(gaps))
    if (gaps < 0.01).any():
        first = int(np.argmax(gaps < 0.01))
        finding = f"{stack[first].file.name} and {stack[first + 1].file.name} lie at the same place"
        raise DataError(path, finding, "keep one frame, bed or copy per folder")
    if np.ptp(gaps) > 0.05 * usual + 0.02:
        widest = int(gaps.argmax())
        missing = round(float((gaps / gaps.min() - 1).sum()))
        finding = (
            f"slices are missing: between {stack[widest].file.name} and {stack[widest + 1].file.name} lie "
            f"{gaps[widest]:.4g} mm, elsewhere {gaps.min():.4g} mm (about {missing} missing)"
        )
        raise DataError(path, finding, "copy the whole series again")
    return float(np.mean(gaps))


def _pixels(one: _Slice) -> np.ndarray:
    """Read the values of a slice, ``(rows, columns)`` float64, in the file's units."""
    from pydicom import dcmread

    try:
        whole = dcmread(one.file)
    except Exception as error:
        raise DataError(one.file, f"it cannot be read as DICOM ({_short(error)})", _UNDO) from error
    if not any(name in whole for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(one.file, "it holds no pixel data", _UNDO)
    syntax = whole.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed and syntax.is_encapsulated:
        from pydicom.pixels import get_decoder

        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            remedy = "decompress it (gdcmconv --raw, dcmdjpeg), or install pylibjpeg with its plugins"
            raise DataError(one.file, f"it is compressed as {syntax.name}, for which no decoder is installed", remedy)
    try:
        stored = np.asarray(whole.pixel_array, dtype=np.float64)
    except Exception as error:
        raise DataError(one.file, f"its pixels cannot be read ({_short(error)})", _UNDO) from error
    if stored.shape != (int(whole.Rows), int(whole.Columns)):
        raise DataError(one.file, f"its pixels have the shape {stored.shape}", "export it as one grey image per file")
    slope, intercept = (float(whole.get(name) or default) for name, default in _RESCALE)
    return stored * slope + intercept


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _state(head: Dataset) -> tuple[str, ...]:
    """Translate CorrectedImage."""
    said = head.get("CorrectedImage") or []
    done = {str(value).upper() for value in ([said] if isinstance(said, str) else said)}
    if str(head.get("DecayCorrection", "")).upper() in ("START", "ADMIN"):
        done.add("DECY")
    return tuple(state for code, state in CORRECTIONS.items() if code in done)


def _table(stack: list[_Slice]) -> dict[str, list[Any]]:
    head, n = stack[0].head, len(stack)
    table: dict[str, list[Any]] = {"slice_z_mm": [one.z_mm for one in stack]}
    patient = str(head.get("PatientID", "")).strip()
    if patient.lower() not in _ANONYMOUS:
        table["patient"] = ["dicom-" + hashlib.blake2b(patient.encode(), digest_size=6).hexdigest()] * n
    if (tracer := tracer_of(head)) is not None:
        table["tracer"] = [tracer] * n
    return table


def _provenance(path: Path, head: Dataset) -> dict[str, Any]:
    named = {
        "file": path.name,
        "series": str(head.get("SeriesDescription", "")),
        "scanner": " ".join(str(head.get(name, "")) for name in ("Manufacturer", "ManufacturerModelName")).strip(),
        "reconstruction": str(head.get("ReconstructionMethod", "")),
        "isotope": isotope_of(head),
    }
    return {name: value for name, value in named.items() if value}


def _in_suv(scan: Scan, heads: list[Dataset], values: str, path: Path) -> Scan:
    """Turn stored units into SUV, if asked for or possible; and say why not."""
    factor = suv_factor(heads)
    if values == "stored" or factor.value is None:
        if values == "suv":
            raise DataError(path, f"SUV cannot be computed ({factor.how})", "read the values as stored")
        note = f"values are in {scan.units or 'unknown units'}, not SUV: {factor.how}"
        return scan if values == "stored" else replace(scan, notes=(*scan.notes, note))
    scaled = scan.values * np.float32(factor.value)
    return replace(scan, values=scaled, units="SUV", provenance={**scan.provenance, "suv": factor.how})


def _own(head: Dataset) -> dict[str, Any] | None:
    """Return ``Scan.about`` of a series written here; None of others."""
    try:
        about = json.loads(head.private_block(PRIVATE_GROUP, CREATOR)[0x01].value)
        return about if "schema" in about else None
    except (KeyError, ValueError, TypeError):
        return None


def _as_written(scan: Scan, about: dict[str, Any], path: Path) -> Scan:
    table = about.get("table", {})
    if any(len(column) != len(scan.values) for column in table.values()):
        raise DataError(path, f"it has {len(scan.values)} slices of a longer series", "copy the whole series again")
    about = {**about, "pixel_mm": scan.pixel_mm, "slice_mm": about.get("slice_mm"), "kind": "image", "geometry": None}
    return scan_from(about, {"values": scan.values}, path)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(".;") or type(error).__name__

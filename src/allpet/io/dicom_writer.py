"""Reconstructed images written as a DICOM PET series, said to be synthetic where they are.

One file per slice of PET Image Storage (PS3.3 A.21), 16 bits with a slope of its own per slice as that object demands,
so that values come back to half a step: 1/131070 of the slice's maximum, twice that where there are negative values.
Identifiers are derived from the content: the same images give the same series, and viewers notice a copy. There is no
patient, no scanner and no acquisition; the dates that may not be empty are 1 January 1900. All of ``Scan.about``
is kept as JSON in a private element and comes back with ``read_dicom``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from allpet.io.dicom import CREATOR, PRIVATE_GROUP
from allpet.io.scans import DataError, Scan, to_json
from allpet.io.suv import CORRECTIONS, UNITS

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_NO_DATE, _NO_TIME = "19000101", "000000"
_DRUGS = {
    "FDG": ("Fluorodeoxyglucose F^18^", "35321007", "SCT"),
    "DOPA": ("Fluoro-L-dopa F^18^", "5811000122108", "SCT"),
    "PSMA": ("Gallium Ga^68^ PSMA-11", "C118961", "NCIt"),
}


def write_dicom(path: str | Path, scan: Scan) -> Path:
    """Write images as a series: a folder of 0001.dcm, 0002.dcm, ... from the feet to the head.

    Args:
        path: of the folder; it must not exist, or be empty.
        scan: images with their pixel width. ``provenance`` says where they come from; images whose state holds
            ``synthetic``, or whose provenance says so, are marked as such in every file.

    Returns:
        ``path``.

    Raises:
        ValueError: if the scan holds no images, or their pixel width is not known.
        DataError: if the folder holds something already, or cannot be written; nothing is left then.
    """
    path = Path(path)
    if scan.kind != "image" or not scan.pixel_mm:
        raise ValueError("DICOM takes images with their pixel width; reconstruct sinograms first, or give pixel_mm.")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise DataError(path, "it is there already", "choose a new folder for the series")
    about = scan.about()
    identity = hashlib.blake2b(to_json(about).encode())
    identity.update(np.ascontiguousarray(scan.values, dtype="<f4").tobytes())
    root = identity.hexdigest()
    with _replacing_folder(path) as unfinished:
        for i, image in enumerate(scan.values):
            _slice(scan, about, root, i, image).save_as(unfinished / f"{i + 1:04}.dcm", enforce_file_format=True)
    return path


@contextlib.contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside the goal to fill, and move it there at the end; after any error nothing is left."""
    unfinished = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if path.is_dir():
            path.rmdir()
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:120]
        raise DataError(path, f"it cannot be written ({reason})", "free space, or choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _uid(root: str, what: str) -> UID:
    """Derive an identifier of the form that needs no registered root (PS3.5 B.2)."""
    from pydicom.uid import UID

    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{root}/{what}').int}")


def _slice(scan: Scan, about: dict[str, Any], root: str, i: int, image: np.ndarray) -> Dataset:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage

    head = Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = PositronEmissionTomographyImageStorage
    head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = _uid(root, f"slice {i}")
    head.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    head.SpecificCharacterSet = "ISO_IR 192"
    _identify(head, scan, about, root)
    _place(head, scan, i)
    _acquire(head, scan, i)
    _store(head, image)
    head.private_block(PRIVATE_GROUP, CREATOR, create=True).add_new(0x01, "UT", to_json(about))
    return head


def _identify(head: Dataset, scan: Scan, about: dict[str, Any], root: str) -> None:
    """Say what the series is and where it comes from."""
    from pydicom import Dataset

    synthetic = "synthetic" in scan.state or bool(scan.provenance.get("synthetic"))
    said = "; ".join(f"{name}: {value}" for name, value in scan.provenance.items())
    head.PatientName = "SYNTHETIC^ALL-PET" if synthetic else "ANONYMOUS"
    head.PatientID = "SYNTHETIC" if synthetic else "ANONYMOUS"
    head.PatientBirthDate = head.PatientSex = ""
    head.PatientIdentityRemoved = "YES"
    head.DeidentificationMethod = "No patient: synthetic images" if synthetic else "Header written anew by ALL-PET"
    head.StudyInstanceUID, head.SeriesInstanceUID = _uid(root, "study"), _uid(root, "series")
    head.FrameOfReferenceUID = _uid(root, "frame of reference")
    head.PositionReferenceIndicator = ""
    head.StudyDate = head.StudyTime = head.StudyID = head.AccessionNumber = head.ReferringPhysicianName = ""
    head.SeriesDate, head.SeriesTime = _NO_DATE, _NO_TIME
    head.Modality, head.SeriesNumber = "PT", 1
    head.SeriesDescription = "SYNTHETIC PET, NOT FOR DIAGNOSIS" if synthetic else "PET, NOT FOR DIAGNOSIS"
    head.Manufacturer = "ALL-PET"
    head.ImageType = ["DERIVED", "SECONDARY", "SYNTHETIC"] if synthetic else ["DERIVED", "SECONDARY"]
    head.ContentQualification = "RESEARCH"
    head.BurnedInAnnotation = "NO"
    head.DerivationDescription = (said or "not stated")[:1024]
    head.ImageComments = ("SYNTHETIC; " if synthetic else "") + f"units: {about['units'] or 'not stated'}"[:1000]
    tracers = set(map(str, scan.table.get("tracer", ())))
    drug = Dataset()
    if len(tracers) == 1 and (tracer := tracers.pop()) in _DRUGS:
        meaning, value, scheme = _DRUGS[tracer]
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
        drug.Radiopharmaceutical = meaning
        drug.RadiopharmaceuticalCodeSequence = [code]
    head.RadiopharmaceuticalInformationSequence = [drug] if len(drug) else []
    head.PatientOrientationCodeSequence = head.PatientGantryRelationshipCodeSequence = []


def _place(head: Dataset, scan: Scan, i: int) -> None:
    """Say where the slice lies: +x left, +y back, +z head, the middle of the image on the axis of rotation."""
    rows, columns = scan.values.shape[1:]
    pixel, slice_mm = float(scan.pixel_mm or 0), float(scan.slice_mm or scan.pixel_mm or 0)
    heights = scan.table.get("slice_z_mm")
    z = float(heights[i]) if heights is not None else i * slice_mm
    head.ImagePositionPatient = [
        _decimal(-(columns - 1) / 2 * pixel),
        _decimal(-(rows - 1) / 2 * pixel),
        _decimal(z),
    ]
    head.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    head.PixelSpacing = [_decimal(pixel), _decimal(pixel)]
    head.SliceThickness = _decimal(slice_mm)
    head.InstanceNumber = head.ImageIndex = i + 1
    head.NumberOfSlices = len(scan.values)


def _acquire(head: Dataset, scan: Scan, i: int) -> None:
    """Fill what the PET modules ask for."""
    codes = {words: code for code, words in UNITS.items() if code != "BQCC"}
    head.Units = codes.get(scan.units, "NONE")
    if head.Units == "GML":
        head.SUVType = "BW"
    head.CountsSource = "EMISSION"
    head.SeriesType = ["STATIC", "IMAGE"]
    head.CorrectedImage = [code for code, state in CORRECTIONS.items() if state in scan.state]
    head.DecayCorrection = "START" if "decay_corrected" in scan.state else "NONE"
    head.CollimatorType = "NONE"
    head.AcquisitionDate = head.AcquisitionTime = ""
    head.ActualFrameDuration = None
    head.FrameReferenceTime = 0
    if head.DecayCorrection != "NONE":
        head.DecayFactor = 1


def _store(head: Dataset, image: np.ndarray) -> None:
    """Store values in 16 bits, ``value = stored * slope`` with the slope as it is written."""
    low, high = float(image.min()), float(image.max())
    signed = low < 0
    steps = 32767 if signed else 65535
    slope = _decimal(max(high, -low) / steps) or "1"
    if not float(slope):
        slope = "1"
    kind = np.dtype("<i2" if signed else "<u2")
    stored = np.rint(image.astype(np.float64) / float(slope)).clip(-steps if signed else 0, steps).astype(kind)
    head.Rows, head.Columns = image.shape
    head.SamplesPerPixel, head.PhotometricInterpretation = 1, "MONOCHROME2"
    head.BitsAllocated = head.BitsStored = 16
    head.HighBit, head.PixelRepresentation = 15, int(signed)
    head.RescaleSlope, head.RescaleIntercept, head.RescaleType = slope, 0, head.Units
    head.WindowCenter, head.WindowWidth = _decimal((low + high) / 2), _decimal(max(high - low, float(slope)))
    head.LossyImageCompression = "00"
    head.PixelData = stored.tobytes()


def _decimal(value: float) -> str:
    """Write a number in the 16 characters that DICOM allows, as exactly as they permit."""
    for digits in range(12, 4, -1):
        if len(text := f"{value:.{digits}g}") <= 16:
            return text
    return f"{value:.5g}"

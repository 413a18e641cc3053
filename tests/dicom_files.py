"""DICOM PET series as scanners write them, small, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset

AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]  # lying on the back, head first
UID = "1.2.826.0.1.3680043.10.999"


def make_drug(**given: Any) -> Dataset:
    """Return 300 MBq of FDG injected an hour before the scan."""
    isotope, drug = Dataset(), Dataset()
    isotope.CodeValue, isotope.CodingSchemeDesignator, isotope.CodeMeaning = "C-111A1", "SRT", "^18^Fluorine"
    drug.Radiopharmaceutical = "Fluorodeoxyglucose"
    drug.RadionuclideTotalDose = 300e6
    drug.RadionuclideHalfLife = 6586.2
    drug.RadiopharmaceuticalStartTime = "090000.00"
    drug.RadionuclideCodeSequence = [isotope]
    for name, value in given.items():
        setattr(drug, name, value)
    return drug


def make_slice(stored: np.ndarray, z: float, number: int, **given: Any) -> Dataset:
    """Return one slice of 16-bit values with 4-mm pixels at height z; ``given`` replaces elements, None drops them."""
    head = Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    head.SOPClassUID = head.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.128"
    head.Modality, head.PatientID, head.PatientName, head.PatientWeight = "PT", "ID-17", "Doe^Jane", 75
    head.SeriesInstanceUID, head.SeriesNumber, head.SeriesDescription = f"{UID}.1", 3, "PET WB"
    head.SeriesDate = head.AcquisitionDate = "20240229"
    head.SeriesTime = head.AcquisitionTime = "100000.0"
    head.Units, head.DecayCorrection = "BQML", "START"
    head.CorrectedImage = ["NORM", "DTIM", "RAN", "ATTN", "SCAT", "DECY"]
    head.RadiopharmaceuticalInformationSequence = [make_drug()]
    head.ImageOrientationPatient, head.PixelSpacing, head.SliceThickness = AXIAL, [4, 4], 3
    rows, columns = stored.shape
    head.ImagePositionPatient = [-(columns - 1) * 2, -(rows - 1) * 2, z]
    head.InstanceNumber = number
    head.Rows, head.Columns, head.SamplesPerPixel, head.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    head.BitsAllocated = head.BitsStored = 16
    head.HighBit, head.PixelRepresentation = 15, 0
    head.RescaleSlope, head.RescaleIntercept = 1, 0
    head.PixelData = stored.astype("<u2").tobytes()
    for name, value in given.items():
        if value is None:
            delattr(head, name)
        else:
            setattr(head, name, value)
    head.SOPInstanceUID = head.file_meta.MediaStorageSOPInstanceUID = f"{head.SeriesInstanceUID}.{number}"
    return head


def save(head: Dataset, path: Path) -> Path:
    """Write one slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head.save_as(path, enforce_file_format=True)
    return path


def save_series(folder: Path, stored: np.ndarray, name: str = "{}.dcm", **given: Any) -> Path:
    """Write ``(slices, rows, columns)`` as a series with 3 mm between slices, file names in reverse order."""
    for i, image in enumerate(stored):
        save(make_slice(image, 3.0 * i, i + 1, **given), folder / name.format(len(stored) - i))
    return folder

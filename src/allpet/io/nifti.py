"""NIfTI images, read and written with nibabel.

NIfTI's patient axes are +x right, +y front, +z head; ours are +x left, +y front with row 0 at the front, slices from
the feet to the head. The affine says how stored axes lie; they are turned and flipped, never interpolated. The middle
of the image is taken for the axis of rotation; written affines put the origin of the world there.

What NIfTI has no field for (units, state, provenance, table) lies as JSON in a comment extension of the header, so that
the one file is complete, and comes back.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from allpet.io.arrays import damaged, refuse_bomb
from allpet.io.atomic import replacing
from allpet.io.scans import DataError, Scan, scan_from, to_json

if TYPE_CHECKING:
    from nibabel import Nifti1Image

NIFTI_SUFFIXES = (".nii", ".nii.gz")
_MARK = "allpet "
_COMMENT = 6  # extension code of plain text


def read_nifti(path: str | Path, frame: int | None = None) -> Scan:
    """Read the images of a NIfTI file.

    Args:
        path: a .nii or .nii.gz file, axial or in any other order of the axes.
        frame: which frame of a dynamic (four-dimensional) file, counted from 0.

    Returns:
        Images ``(slices, rows, columns)`` from the feet to the head.

    Raises:
        DataError: if the file cannot be used: damaged, oblique, several frames and none named, pixels not square.
    """
    import nibabel

    path = Path(path)
    if not path.is_file():
        raise DataError(path, "there is no such file", "check the path")
    if path.stat().st_size == 0:
        raise DataError(path, "the file is empty", "copy it again")
    with damaged(path, "a NIfTI file"):
        image: Nifti1Image = nibabel.load(path)  # type: ignore[assignment]
        header = image.header
        refuse_bomb(path, int(np.prod([float(n) for n in image.shape])) * header.get_data_dtype().itemsize)
        if header.get_data_dtype().kind not in "biuf":
            kind = "complex numbers" if header.get_data_dtype().kind == "c" else "colours"
            raise DataError(path, f"it holds {kind}", "save one real number per voxel")
        order, about = _orientation(path, image), _about(image)
        values = _values(path, image, frame)
    values = _turn(values, order)
    zooms = np.asarray(header.get_zooms()[:3], float)[_stored_axes(order)] * _millimetres(header)  # along x, y, z
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise DataError(path, f"its voxels are {_by(zooms)} mm", "correct the header")
    if abs(zooms[0] - zooms[1]) > 1e-3 * zooms[0]:
        finding = f"its pixels are {zooms[1]:g} x {zooms[0]:g} mm, not square"
        raise DataError(path, finding, "resample it to square pixels")
    if not np.isfinite(values).all():
        raise DataError(path, "it holds NaN or infinite values", "replace them, with zero outside the body")
    if about is not None:
        return scan_from({**about, "kind": "image", "geometry": None}, {"values": values}, path)
    return Scan(
        values,
        "image",
        pixel_mm=float(zooms[0]),
        slice_mm=float(zooms[2]),
        provenance={"file": path.name, "description": _text(header["descrip"])}
        if _text(header["descrip"])
        else {"file": path.name},
    )


def write_nifti(path: str | Path, scan: Scan) -> None:
    """Write images as NIfTI-1, 32-bit floats, world axes in mm with the origin in the middle of the first slice.

    Args:
        path: ending in .nii or .nii.gz.
        scan: images with their pixel width; the distance between slices, where unknown, is taken to be the same.

    Raises:
        ValueError: if the scan holds no images, or their pixel width is not known.
        DataError: if it cannot be written, or is too large for NIfTI-1; nothing is left then.
    """
    import nibabel

    path = Path(path)
    if scan.kind != "image" or not scan.pixel_mm:
        raise ValueError("NIfTI takes images with their pixel width; reconstruct sinograms first, or give pixel_mm.")
    rows, columns = scan.values.shape[1:]
    if max(scan.values.shape) > 32767:
        raise DataError(path, f"NIfTI-1 holds at most 32767 slices, not {max(scan.values.shape)}", "write fewer slices")
    pixel, slice_mm = scan.pixel_mm, scan.slice_mm or scan.pixel_mm
    # Voxel (i, j, k) is column i, row j from the back, slice k: its x in the world is minus ours, its y is ours.
    voxels = scan.values[:, ::-1].transpose(2, 1, 0)
    affine = np.diag([-pixel, pixel, slice_mm, 1.0])
    affine[:3, 3] = ((columns - 1) / 2 * pixel, -(rows - 1) / 2 * pixel, _first_z(scan))
    image = nibabel.Nifti1Image(np.asarray(voxels, dtype=np.float32), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    synthetic = "synthetic" in scan.state or bool(scan.provenance.get("synthetic"))
    image.header["descrip"] = b"synthetic PET, ALL-PET" if synthetic else b"PET, ALL-PET"
    text = (_MARK + to_json(scan.about())).encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(_COMMENT, text))
    with replacing(path) as unfinished, unfinished.open("wb") as stream:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as packed:  # the same bytes each time
                image.to_stream(packed)
        else:
            image.to_stream(stream)


def _first_z(scan: Scan) -> float:
    heights = scan.table.get("slice_z_mm")
    return float(heights[0]) if heights is not None and len(heights) else 0.0


def _orientation(path: Path, image: Nifti1Image) -> np.ndarray:
    """Return nibabel's orientation, ``(3, 2)``: world axis and direction of each stored axis."""
    import nibabel

    affine = np.asarray(image.affine, float)
    if image.header["qform_code"] == 0 and image.header["sform_code"] == 0:
        finding = "its header does not say how its axes lie (qform and sform are 0)"
        raise DataError(path, finding, "set the orientation with the program that wrote it")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(path, "its affine is singular", "correct the header")
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if (np.abs(directions).max(axis=0) < 0.99).any():
        degrees = np.degrees(np.arccos(np.abs(directions).max(axis=0).min()))
        finding = f"its axes are tilted by {degrees:.0f} degrees to the patient's"
        raise DataError(path, finding, "resample it to axial slices")
    return np.asarray(nibabel.io_orientation(affine))


def _values(path: Path, image: Nifti1Image, frame: int | None) -> np.ndarray:
    """Read ``(i, j, k)`` float32, scaled as the header says; of a plain .nii slice by slice."""
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3, 4):
        raise DataError(path, f"it has the shape {image.shape}", "save one volume, or one slice")
    if len(shape) == 2:
        raise DataError(path, f"it is one slice of {_by(shape)} without a third axis", "save it as a volume")
    index: tuple[Any, ...] = (0,) * (len(image.shape) - len(shape))
    if len(shape) == 4:
        if frame is None:
            finding = f"it holds {shape[3]} frames"
            raise DataError(path, finding, f"name one, 0 to {shape[3] - 1}, with key, or save the frame alone")
        if not 0 <= frame < shape[3]:
            raise DataError(path, f"it has no frame {frame}", f"choose 0 to {shape[3] - 1}")
        index = (frame, *index)
    out = np.empty(shape[:3], np.float32, order="F")
    if path.suffix.lower() == ".gz":  # going back in a packed file means unpacking it anew
        out[...] = np.asanyarray(image.dataobj).reshape(*shape[:3], -1)[..., frame or 0]
    else:
        for k in range(shape[2]):
            where = (slice(None), slice(None), k, *index)
            out[:, :, k] = image.dataobj[where].reshape(shape[:2])
    return out


def _turn(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Turn ``(i, j, k)`` with nibabel's orientation into ours: slices up, rows from the front, columns to the left."""
    world = _stored_axes(order)
    x, y, z = (order[axis, 1] for axis in world)
    turned = values.transpose(world[2], world[1], world[0])
    turned = turned[:: 1 if z > 0 else -1, :: -1 if y > 0 else 1, :: -1 if x > 0 else 1]
    return np.ascontiguousarray(turned)


def _stored_axes(order: np.ndarray) -> list[int]:
    """Return which stored axis lies along x, y and z of the world."""
    return [int(np.flatnonzero(order[:, 0] == axis)[0]) for axis in range(3)]


def _about(image: Nifti1Image) -> dict[str, Any] | None:
    """Return what ``write_nifti`` kept; None of other files."""
    for extension in image.header.extensions:
        content = extension.get_content()
        text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
        if text.startswith(_MARK):
            about = json.loads(text.removeprefix(_MARK).rstrip("\0 "))
            return about if "schema" in about else None
    return None


def _millimetres(header: Any) -> float:
    return {"meter": 1000.0, "micron": 1e-3}.get(header.get_xyzt_units()[0], 1.0)


def _text(field: Any) -> str:
    return bytes(field).split(b"\0")[0].decode(errors="replace").strip()


def _by(sizes: Any) -> str:
    return " x ".join(f"{size:g}" for size in sizes)

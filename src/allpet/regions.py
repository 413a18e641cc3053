"""Regions of interest for ``TransparentMedicalAttention``: from a mask file, a box in mm, or names of tissues.

A region is a mask ``(slices, 1, rows, columns)``, bool, on a geometry's image grid: row 0 at the top, x to the right,
y up, the axis of rotation in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from allpet.geometry import ParallelBeam
from allpet.io import DataError, read_scan
from allpet.simulation.tissues import LABELS


def roi_from_file(
    path: str | Path,
    geometry: ParallelBeam,
    pixel_mm: float | None = None,
    key: str | None = None,
    labels: Sequence[int | str] | None = None,
) -> Tensor:
    """Read a mask: whatever is not zero in a .npy, .npz, .mat, .h5 or NIfTI file, or a DICOM series.

    Args:
        path: of the file; its slices are those of the scan, or there is one for all.
        geometry: whose image grid is wanted.
        pixel_mm: pixel width of the mask where the file does not say; None: its pixels must be the geometry's.
        key: name of the array, where a file holds several.
        labels: which of its values count, numbers or names of ``LABELS``; None: all but zero.

    Returns:
        ``(slices, 1, rows, columns)``, bool; brought to the grid by its nearest pixels, the centres in one place.

    Raises:
        DataError: if the file cannot be read, its grid is unknown or its mask is empty.
        ValueError: if a name is unknown.
    """
    chosen = None if labels is None else [_label(label) for label in labels]
    scan = read_scan(path, key)
    if scan.kind == "sinogram":
        raise DataError(path, "it holds sinograms", "draw the region in the image")
    values = torch.from_numpy(scan.values).unsqueeze(1)
    mask = values != 0 if chosen is None else torch.isin(values, torch.tensor(chosen, dtype=values.dtype))
    if labels is not None and not mask.any():
        found = values.unique()
        some = ", ".join(f"{value:g}" for value in found[:8].tolist()) + (", ..." if len(found) > 8 else "")
        said = ", ".join(map(str, labels))
        raise DataError(path, f"it holds no label {said}, but {some}", "name a label that it holds")
    if not mask.any():
        raise DataError(path, "its mask is zero everywhere", "mark the region with numbers other than zero")
    width = pixel_mm or scan.pixel_mm
    if width is None and tuple(mask.shape[-2:]) != geometry.image_shape:
        found, wanted = (" x ".join(map(str, shape)) for shape in (mask.shape[-2:], geometry.image_shape))
        drawn = f"draw it on {wanted} pixels of {geometry.pixel_mm:g} mm"
        remedy = f"give its pixel width in mm (--data.roi_pixel_mm), or {drawn}"
        raise DataError(path, f"its mask has {found} pixels, the image {wanted}", remedy)
    roi = mask if width is None else _to_grid(mask, width, geometry)
    if not roi.any():
        raise DataError(path, "its region lies outside the field of view", "check its pixel width and its place")
    return roi


def roi_box(geometry: ParallelBeam, x_mm: tuple[float, float], y_mm: tuple[float, float]) -> Tensor:
    """Return the pixels whose centres lie in a box, ``(1, 1, rows, columns)``, bool.

    Args:
        geometry: whose image grid is wanted.
        x_mm: left and right edge, mm from the axis of rotation, x to the right.
        y_mm: lower and upper edge, y up.

    Raises:
        ValueError: if the box holds no pixel.
    """
    x, y = geometry.pixel_centers
    box = (x >= x_mm[0]) & (x <= x_mm[1]) & (y >= y_mm[0]) & (y <= y_mm[1])
    if not box.any():
        raise ValueError(
            f"The box {x_mm} x {y_mm} mm holds no pixel; give (left, right) and (lower, upper) edges within "
            f"+-{geometry.image_size * geometry.pixel_mm / 2:g} mm, at least {geometry.pixel_mm:g} mm apart."
        )
    return box[None, None]


def roi_from_labels(labels: Tensor, names: str | Sequence[str]) -> Tensor:
    """Return where the simulator's labels are one of the named tissues; a slice that shows none is empty.

    Args:
        labels: integers of ``LABELS``, ``(batch, 1, rows, columns)``, as ``PairedBatch.labels``.
        names: such as "lesion_hot" or ["liver", "spleen"].

    Returns:
        the same shape, bool.

    Raises:
        ValueError: if a name is unknown.
    """
    names = [names] if isinstance(names, str) else list(names)
    wanted = torch.tensor([_label(name) for name in names], device=labels.device)
    return torch.isin(labels.long(), wanted)


def _label(label: int | str) -> int:
    if isinstance(label, str) and label not in LABELS:
        raise ValueError(f"There is no tissue {label!r}; choose of {', '.join(LABELS)}.")
    return LABELS[label] if isinstance(label, str) else label


def _to_grid(mask: Tensor, pixel_mm: float, geometry: ParallelBeam) -> Tensor:
    x, y = geometry.pixel_centers
    rows, columns = mask.shape[-2:]
    # grid_sample's coordinates run from -1 to 1 between the outer edges of the mask
    grid = torch.stack([2 * x / (columns * pixel_mm), -2 * y / (rows * pixel_mm)], dim=-1)
    grid = grid.float().expand(len(mask), *grid.shape)
    return F.grid_sample(mask.float(), grid, mode="nearest", align_corners=False) > 0.5

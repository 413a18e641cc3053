"""A scan: slices together with what their numbers mean, as every reader gives and every writer takes them.

Vocabulary. *State* says which corrections the numbers have been through; it is data, because a negative value is legal
in one state and a fault in another. *Provenance* says where the numbers come from: the model, seed and prompt of
generated ones, the file of others. Axes are those of ``ParallelBeam``: a sinogram is ``(views, bins)`` with
``s = x cos(theta) + y sin(theta)``; an image is ``(rows, columns)`` with row 0 at the top, x towards the patient's left
and y towards the front, as an axial slice is looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # reading arrays starts in half a second without torch
    from allpet.geometry import ParallelBeam

SCHEMA = "allpet-scan 1"
STATES = (
    "prompts",
    "randoms_subtracted",
    "scatter_corrected",
    "normalised",
    "attenuation_corrected",
    "decay_corrected",
    "arc_corrected",
    "reprojected",
    "synthetic",
)
AXES = {"sinogram": "slice, view, bin", "image": "slice, row, column"}
COMPANIONS = ("additive", "acf")
"""What a sinogram may bring along: expected scatter and randoms, and attenuation-correction factors (>= 1)."""


class DataError(ValueError):
    """What is wrong with a file and what to do about it; its text is one sentence.

    Args:
        file: the file, as it should be named to the user.
        finding: what was found, continuing "FILE: ".
        remedy: what to do.
    """

    def __init__(self, file: str | Path, finding: str, remedy: str) -> None:
        super().__init__(f"{file}: {finding}; {remedy}.")
        self.file, self.finding, self.remedy = str(file), finding, remedy


@dataclass(frozen=True)
class Scan:
    """Slices of one kind and shape.

    Args:
        values: ``(slices, views, bins)`` or ``(slices, rows, columns)``, float32, finite.
        kind: ``sinogram``, ``image``, or empty where a file does not say.
        geometry: of sinograms; None where it is not known.
        pixel_mm: pixel width of images; None where it is not known.
        slice_mm: distance between slices; None where it is not known.
        units: of the values, in words.
        state: corrections applied, of ``STATES``.
        additive: expected scatter and randoms in the sinogram's own units, the shape of ``values``; None for none.
        acf: attenuation-correction factors, the shape of ``values``; None for none.
        table: columns of one entry per slice (patient, tracer, region, seed, ...).
        provenance: where the values come from, JSON-able.
        notes: what the reader has to say to the user, sentences without full stop.

    Raises:
        ValueError: if shapes, state or columns do not fit together.
    """

    values: np.ndarray
    kind: Literal["sinogram", "image", ""] = "sinogram"
    geometry: ParallelBeam | None = None
    pixel_mm: float | None = None
    slice_mm: float | None = None
    units: str = ""
    state: tuple[str, ...] = ()
    additive: np.ndarray | None = None
    acf: np.ndarray | None = None
    table: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise ValueError(f"values have the shape {self.values.shape}, but must be slices of two dimensions.")
        if self.geometry is not None and self.values.shape[1:] != self.geometry.sinogram_shape:
            raise ValueError(
                f"values are slices of {self.values.shape[1:]}, but the geometry has {self.geometry.sinogram_shape}; "
                "give the geometry of these sinograms."
            )
        for name in COMPANIONS:
            companion = getattr(self, name)
            if companion is not None and companion.shape != self.values.shape:
                raise ValueError(f"{name} has the shape {companion.shape}, but must have {self.values.shape}.")
        if unknown := sorted(set(self.state) - set(STATES)):
            raise ValueError(f"state holds {', '.join(unknown)}; choose of {', '.join(STATES)}.")
        for name, column in self.table.items():
            if len(column) != len(self.values):
                raise ValueError(f"column {name!r} has {len(column)} entries for {len(self.values)} slices.")

    def about(self) -> dict[str, Any]:
        """Return everything but the arrays, JSON-able; ``scan_from`` is the inverse."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "axes": AXES.get(self.kind, "slice, ?, ?"),
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "angles": "k * pi / n_views, s = x cos(theta) + y sin(theta), x right, y up, bins symmetric about s = 0",
            "pixel_mm": self.pixel_mm,
            "slice_mm": self.slice_mm,
            "units": self.units,
            "state": list(self.state),
            "table": {name: plain(column) for name, column in self.table.items()},
            "provenance": dict(self.provenance),
        }


def scan_from(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], file: str | Path) -> Scan:
    """Put a scan together from what ``Scan.about`` gave and its arrays.

    Args:
        about: may lack what it does not know.
        arrays: ``values``, and any of ``COMPANIONS``.
        file: for the sentence.

    Raises:
        DataError: if they do not fit together, are empty or not finite, or come from a newer version.
    """
    from allpet.geometry import ParallelBeam

    schema = about.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise DataError(file, f"its layout is {schema!r}, not {SCHEMA!r}", "read it with the version that wrote it")
    for name, array in arrays.items():
        what = about.get("kind") or "sinogram" if name == "values" else name
        if array.size == 0:
            raise DataError(file, f"its {what} is empty", "write it again")
        if not np.isfinite(array).all():
            raise DataError(file, f"its {what} holds NaN or infinite values", "remove or repair them")
    try:
        geometry = about.get("geometry")
        return Scan(
            np.ascontiguousarray(arrays["values"], dtype=np.float32),
            about.get("kind", ""),
            None if geometry is None else ParallelBeam(**geometry),
            about.get("pixel_mm"),
            about.get("slice_mm"),
            about.get("units", ""),
            tuple(about.get("state", ())),
            table=about.get("table", {}),
            provenance=about.get("provenance", {}),
            notes=tuple(about.get("notes", ())),
            **{name: np.asarray(arrays[name], dtype=np.float32) for name in COMPANIONS if name in arrays},
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            file, f"what it says of itself does not fit ({error})".replace(".)", ")"), "write it again"
        ) from error


def plain(column: Sequence[Any]) -> list[Any]:
    """Turn a column of any kind into a list of plain numbers and texts."""
    return np.asarray(column).tolist() if isinstance(column, np.ndarray) else list(column)


def to_json(value: Any) -> str:
    """Write as JSON, with NumPy's numbers as plain ones."""
    return json.dumps(value, ensure_ascii=False, default=lambda item: item.tolist())


def content_hash(slice_: np.ndarray) -> str:
    """Identify a slice by its numbers as little-endian float32, and its shape, ``(a, b)``."""
    digest = hashlib.blake2b(str(slice_.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(slice_, dtype="<f4").tobytes())
    return digest.hexdigest()


def odd_bins(scan: Scan) -> Scan:
    """Give sinograms of an even number of bins one bin more, so that the middle one lies on the axis of rotation.

    STIR and scikit-image put bin ``n // 2`` on the axis; ours lie symmetrically about it. Of an odd number the two
    agree. The new bins lie half a bin beside the old ones and hold the mean of their neighbours (zero outside), which
    keeps the sum of every view.
    """
    if scan.geometry is None or scan.geometry.n_bins % 2:
        return scan
    from dataclasses import replace

    def between(values: np.ndarray, mode: Literal["constant", "edge"] = "constant") -> np.ndarray:
        wide = np.pad(values, ((0, 0), (0, 0), (1, 1)), mode=mode)
        return ((wide[..., 1:] + wide[..., :-1]) / 2).astype(np.float32)

    old = scan.geometry
    return replace(
        scan,
        values=between(scan.values),
        additive=None if scan.additive is None else between(scan.additive),
        acf=None if scan.acf is None else between(scan.acf, "edge"),
        geometry=replace(old, n_bins=old.n_bins + 1, image_size=old.image_size + 1 - old.image_size % 2),
        provenance={**scan.provenance, "resampled": f"to {old.n_bins + 1} bins, halfway between the {old.n_bins}"},
    )


def lor_endpoints(geometry: ParallelBeam, radius_mm: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return where the line of response of every bin enters and leaves a circle.

    Args:
        geometry: of the sinogram.
        radius_mm: of the circle; None: 1.5 times the outermost bin's distance.

    Returns:
        Two ``(views, bins, 2)`` float32 arrays of (x, y) in mm: x right, y up.

    Raises:
        ValueError: if bins lie outside the circle.
    """
    angles, s = geometry.angles.numpy()[:, None], geometry.bin_centers.numpy()
    radius = 1.5 * float(np.abs(s).max() + geometry.bin_mm) if radius_mm is None else radius_mm
    if radius <= np.abs(s).max():
        raise ValueError(f"radius_mm is {radius:g}, but the outermost bin lies at {np.abs(s).max():g} mm; widen it.")
    half = np.sqrt(radius**2 - s**2)
    # s (cos, sin) is the foot of the line, (-sin, cos) its direction.
    ends = [
        np.stack([s * np.cos(angles) - t * np.sin(angles), s * np.sin(angles) + t * np.cos(angles)], -1)
        for t in (-half, half)
    ]
    return ends[0].astype(np.float32), ends[1].astype(np.float32)

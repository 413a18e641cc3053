"""Sinograms as Interfile, the header (.hs) and data (.s) that STIR, SIRF and GATE users have.

Written are direct planes of one segment, arc-corrected, ordered (segment, view, axial, tangential) as 32-bit floats;
read are also (segment, axial, view, tangential), any number format and both byte orders. What the format has no key for
(units, state, provenance, table) is a comment line of JSON, which others pass over.

STIR numbers the bins of a view from ``-(n // 2)``, so that of an even number the middle one lies on the axis of
rotation and the outermost has no partner. Ours lie symmetrically. Files written here say so and come back as they were;
of other files with an even number of bins the outermost, unpaired bin is left out, which moves no other. For a
reconstruction by STIR of an even number of bins write ``odd_bins(scan)``. STIR was not available to test against.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allpet.io.arrays import damaged
from allpet.io.atomic import replacing
from allpet.io.scans import COMPANIONS, DataError, Scan, scan_from, to_json

_COMMENT = "; allpet "
_TYPES = {"float": "f", "short float": "f", "long float": "f", "signed integer": "i", "unsigned integer": "u"}
_AXES = {
    ("view", "axial coordinate", "tangential coordinate"): (1, 0, 2),  # to (axial, view, tangential)
    ("axial coordinate", "view", "tangential coordinate"): (0, 1, 2),
}
_FIX = "correct the header"


def write_interfile(path: str | Path, scan: Scan) -> list[Path]:
    """Write a sinogram as NAME.hs and NAME.s, and its additive and acf terms as NAME_additive.hs and so on.

    Args:
        path: of the header, ending in .hs.
        scan: a sinogram with a geometry.

    Returns:
        The headers written.

    Raises:
        ValueError: if the scan has no geometry.
        DataError: if the files cannot be written; nothing is left then.
    """
    path = Path(path)
    if scan.kind != "sinogram" or scan.geometry is None:
        raise ValueError("Interfile takes sinograms with a geometry; project images first, or give the geometry.")
    parts = {path: scan.values}
    for name in COMPANIONS:
        if getattr(scan, name) is not None:
            parts[path.with_name(f"{path.stem}_{name}.hs")] = getattr(scan, name)
    written: list[Path] = []
    try:
        for header, values in parts.items():
            companion = header.stem.removeprefix(f"{path.stem}_") if header != path else ""
            data = header.with_suffix(".s")
            with replacing(data) as unfinished:
                np.ascontiguousarray(values.transpose(1, 0, 2), dtype="<f4").tofile(unfinished)
            written.append(data)
            with replacing(header) as unfinished:
                unfinished.write_text(_header(scan, data.name, companion), encoding="utf-8")
            written.append(header)
    except BaseException:
        for file in written:  # a header without its data would be worse than neither
            file.unlink(missing_ok=True)
        raise
    return list(parts)


def _header(scan: Scan, data: str, companion: str) -> str:
    geometry = scan.geometry
    assert geometry is not None
    n, plane_mm = len(scan.values), scan.slice_mm or geometry.bin_mm
    radius_cm = geometry.n_bins * geometry.bin_mm / 10
    lines = [
        "!INTERFILE :=",
        f"{_COMMENT}{to_json({**scan.about(), 'holds': companion or 'sinogram', 'bins': 'symmetric'})}",
        "!imaging modality := PT",
        f"name of data file := {data}",
        "!version of keys := STIR3.0",
        "!GENERAL DATA :=",
        "!GENERAL IMAGE DATA :=",
        "!type of data := PET",
        "imagedata byte order := LITTLEENDIAN",
        "!PET STUDY (General) :=",
        "!PET data type := Emission",
        "applied corrections := {arc correction}",
        "!number format := float",
        "!number of bytes per pixel := 4",
        "number of dimensions := 4",
        "matrix axis label [4] := segment",
        "!matrix size [4] := 1",
        "matrix axis label [3] := view",
        f"!matrix size [3] := {geometry.n_views}",
        "matrix axis label [2] := axial coordinate",
        f"!matrix size [2] := {{ {n} }}",
        "matrix axis label [1] := tangential coordinate",
        f"!matrix size [1] := {geometry.n_bins}",
        "minimum ring difference per segment := { 0 }",
        "maximum ring difference per segment := { 0 }",
        "Scanner parameters :=",
        "Scanner type := unknown",
        f"number of rings := {n}",
        f"number of detectors per ring := {2 * geometry.n_views}",
        f"inner ring diameter (cm) := {2 * radius_cm!r}",
        "average depth of interaction (cm) := 0",
        f"distance between rings (cm) := {plane_mm / 10!r}",
        f"default bin size (cm) := {geometry.bin_mm / 10!r}",
        "view offset (degrees) := 0",
        f"maximum number of non-arc-corrected bins := {geometry.n_bins}",
        f"default number of arc-corrected bins := {geometry.n_bins}",
        "end scanner parameters :=",
        "effective central bin size (cm) := " + repr(geometry.bin_mm / 10),
        "number of time frames := 1",
        "image scaling factor[1] := 1",
        "data offset in bytes[1] := 0",
        "!END OF INTERFILE :=",
    ]
    return "\n".join(lines) + "\n"


def read_header(path: str | Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Read the keys of an Interfile header, in lower case without marks, and what its comment of ours says.

    Raises:
        DataError: if it is no Interfile header.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "there is no such file", "check the path")
    keys: dict[str, str] = {}
    about = None
    with damaged(path, "an Interfile header"):
        with path.open("rb") as stream:
            text = stream.read(2**24).decode("utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith(_COMMENT):
                about = json.loads(line.removeprefix(_COMMENT))
            key, mark, value = line.partition(":=")
            if mark and not line.lstrip().startswith(";"):
                name = re.sub(r"\s*\[", "[", " ".join(key.replace("!", " ").split()).lower())
                keys.setdefault(name, value.strip())
    if "interfile" not in keys:
        raise DataError(path, "its first key is not INTERFILE", "name the .hs header of a sinogram")
    return keys, about


def read_interfile(path: str | Path) -> Scan:
    """Read the direct planes of a .hs header and its .s, with the additive and acf terms that lie beside it.

    Args:
        path: of the header, or of the data beside it.

    Raises:
        DataError: if the header is no sinogram's, contradicts its data, or the data are missing.
    """
    path = Path(path)
    if path.suffix.lower() == ".s":
        path = path.with_suffix(".hs")
    scan, ours = _read_one(path)
    if ours:
        for name in COMPANIONS:
            beside = path.with_name(f"{path.stem}_{name}.hs")
            if beside.is_file():
                values = _read_one(beside)[0].values
                if values.shape != scan.values.shape:
                    finding = f"its shape is {values.shape} where {path.name} has {scan.values.shape}"
                    raise DataError(beside, finding, "write both again")
                scan = replace(scan, **{name: values})  # type: ignore[arg-type]
    return scan


def _read_one(path: Path) -> tuple[Scan, bool]:
    """Read one header with its data, and say whether it was written here."""
    keys, about = read_header(path)

    def need(key: str) -> str:
        if not keys.get(key):
            raise DataError(path, f"the key '{key}' is missing", _FIX)
        return keys[key]

    def number(key: str, default: float | None = None) -> float:
        text = keys.get(key) or (need(key) if default is None else str(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(path, f"'{key}' is {text!r}, not a number", _FIX)
        return value

    def counts(key: str) -> list[int]:
        found = re.findall(r"-?\d+", need(key))
        if not found or min(map(int, found)) < 1:
            raise DataError(path, f"'{key}' is {keys[key]!r}, not a count", _FIX)
        return [int(item) for item in found]

    if keys.get("number of dimensions", "4") != "4" or "pet" not in keys.get("type of data", "pet").lower():
        finding = "it is not a PET sinogram of four dimensions without time of flight"
        raise DataError(path, finding, "export a non-TOF PET sinogram")
    labels = [keys.get(f"matrix axis label[{i}]", "").lower() for i in (4, 3, 2, 1)]
    order = _AXES.get((labels[1], labels[2], labels[3]))
    if labels[0] != "segment" or order is None:
        finding = f"its axes are ({', '.join(label or '?' for label in labels)})"
        raise DataError(path, finding, "order them as segment, view, axial coordinate, tangential coordinate")
    sizes = {label: counts(f"matrix size[{i}]") for label, i in zip(labels, (4, 3, 2, 1), strict=True)}
    n_segments, (n_views,), (n_bins,) = sizes["segment"][0], sizes["view"], sizes["tangential coordinate"]
    planes = sizes["axial coordinate"]
    if len(planes) != n_segments:
        raise DataError(path, f"{n_segments} segments, but axial sizes for {len(planes)}", _FIX)
    segment = _direct_segment(path, keys, n_segments)

    kind = _TYPES.get(need("number format").lower())
    width = counts("number of bytes per pixel")[0]
    if kind is None or width not in ((4, 8) if kind == "f" else (1, 2, 4, 8)):
        raise DataError(path, f"{width} bytes of {keys['number format']!r} are no number format", _FIX)
    big = keys.get("imagedata byte order", "LITTLEENDIAN").upper().startswith("BIG")
    dtype = np.dtype(f"{'>' if big else '<'}{kind}{width}")
    data = path.parent / Path(need("name of data file").replace("\\", "/")).name
    if not data.is_file():
        raise DataError(path, f"its data file {data.name} is missing", "copy it beside the header")
    offset = int(number("data offset in bytes[1]", 0))
    expected = offset + sum(planes) * n_views * n_bins * dtype.itemsize
    if (there := data.stat().st_size) != expected:
        finding = f"{data.name} has {there} bytes where the header says {expected}"
        raise DataError(path, finding, "copy the data again, or correct the header")
    with damaged(path, "Interfile data"):
        before = sum(planes[:segment]) * n_views * n_bins * dtype.itemsize
        count = planes[segment] * n_views * n_bins
        flat = np.fromfile(data, dtype, count, offset=offset + before)
        shape = (n_views, planes[segment], n_bins) if order[0] == 1 else (planes[segment], n_views, n_bins)
        values = flat.reshape(shape).transpose(order).astype(np.float32) * number("image scaling factor[1]", 1)
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise DataError(path, "its data hold NaN or infinite values", "remove or repair them")
    if about is not None and about.get("bins") == "symmetric":
        scan = scan_from(about, {"values": values}, path)
        if abs(scan.geometry.bin_mm / 10 - number("default bin size (cm)")) > 1e-6:  # type: ignore[union-attr]
            raise DataError(path, "its bin size contradicts its comment line", "remove the comment line '; allpet'")
        return scan, True
    return _foreign(path, keys, values, number), False


def _direct_segment(path: Path, keys: dict[str, str], n_segments: int) -> int:
    """Return the place of the segment with ring difference 0."""
    low = re.findall(r"-?\d+", keys.get("minimum ring difference per segment", "{0}" if n_segments == 1 else ""))
    high = re.findall(r"-?\d+", keys.get("maximum ring difference per segment", "{0}" if n_segments == 1 else ""))
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if int(a) <= 0 <= int(b):
            return i
    raise DataError(path, "none of its segments holds direct planes", "export segment 0")


def _foreign(path: Path, keys: dict[str, str], values: np.ndarray, number: Any) -> Scan:
    """Interpret a header that another program wrote."""
    from allpet.geometry import ParallelBeam

    if "arc correction" not in keys.get("applied corrections", "").lower():
        remedy = "arc-correct it first (STIR: correct_projdata)"
        raise DataError(path, "its bins are not arc-corrected, so their distances shrink outward", remedy)
    if abs(number("view offset (degrees)", 0)) > 1e-6:
        offset = number("view offset (degrees)", 0)
        raise DataError(path, f"its views begin at {offset:g} degrees", "export it with view offset 0")
    bin_mm = 10 * number("effective central bin size (cm)", number("default bin size (cm)"))
    if bin_mm <= 0:
        raise DataError(path, f"its bin size is {bin_mm / 10:g} cm", _FIX)
    notes: tuple[str, ...] = ()
    if values.shape[2] % 2 == 0:
        values = np.ascontiguousarray(values[:, :, 1:])
        n = values.shape[2]
        notes = (f"of {n + 1} bins the outermost has no partner on the other side of the axis; {n} are kept",)
    n_views, n_bins = values.shape[1:]
    state = ("arc_corrected",)
    slice_mm = 5 * number("distance between rings (cm)", 0) or None  # direct planes lie half a ring apart in span > 1
    if number("number of rings", 0) == len(values) and slice_mm:
        slice_mm *= 2
    return Scan(
        values,
        "sinogram",
        ParallelBeam(n_views, n_bins, bin_mm, n_bins, bin_mm),
        slice_mm=slice_mm,
        units=keys.get("quantification units", ""),
        state=state,
        provenance={"file": path.name, "system": keys.get("originating system", "")},
        notes=notes,
    )

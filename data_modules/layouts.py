"""Layouts of public data sets, so that a download can be used as it is.

A layout knows a set by the names of its folders and files: which files are the *input* of a task and which its
*target*, whose they are, which belong together (*pair*), and how to read them. It is recognised from the folder
(``auto``) or asked for by name. None of these sets comes with this project, and most state no licence: ask their
authors before you publish anything made with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from allpet.io import DataError, Scan, read_array, read_scan

AUTO, NONE, ALL_ROLES = "auto", "none", "all"
DTM_HEADER = 752
"""Bytes before the values in DTM's volumes."""


class Place(NamedTuple):
    """What a file's name says.

    Attributes:
        role: ``input``, ``target``, ``ct``, or empty where the file holds several.
        patient: whose it is; empty where the name does not say.
        pair: the same for the files that belong together.
        columns: further columns, one entry for the whole file.
    """

    role: str
    patient: str
    pair: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """How a set is laid out.

    Args:
        name: to ask for it.
        about: what it is, in half a sentence.
        rules: role -> pattern that a file's name (with forward slashes, relative to the folder) must match at its end.
            Its groups ``patient`` and ``pair`` are taken over, other named groups become columns. The role ``*``
            stands for files that hold several.
        default_role: what is read unless another role is asked for; ``all`` for everything.
        kind: what the slices are.
        read: reads one file as role -> scan; None: ``read_scan`` with ``key``.
        key: name of the array.
        patient_of: makes the patient's name from the groups; None: the group ``patient``.
        suits: looks into a file whose name matches; None: the names tell enough.
        raw: the files are of no known format; ``suits`` tells which they are.
        note: what the user should know.
    """

    name: str
    about: str
    rules: tuple[tuple[str, str], ...]
    default_role: str
    kind: Literal["auto", "sinogram", "image"] = "auto"
    read: Callable[[Path], dict[str, Scan]] | None = None
    key: str | None = None
    patient_of: Callable[[dict[str, str]], str] | None = None
    suits: Callable[[Path], bool] | None = None
    raw: bool = False
    note: str = ""

    def candidates(self, folder: Path, names: Sequence[str], others: Sequence[str]) -> list[str]:
        """Return the files that may belong to the layout."""
        if self.raw and self.suits is not None:
            return [name for name in others if self.suits(folder / name)]
        return list(names)

    def place(self, name: str) -> Place | None:
        """Return what a name says; None if it does not belong to the layout."""
        for role, pattern in self.rules:
            # A slash in front lets a pattern begin with a folder, wherever the download was unpacked.
            if match := re.search(f"/{pattern}$", "/" + name):
                groups = {key: value or "" for key, value in match.groupdict().items()}
                patient = self.patient_of(groups) if self.patient_of else groups.get("patient", "")
                above = ("/" + name)[: match.start()].strip("/")
                columns = {key: value for key, value in groups.items() if key not in ("patient", "pair", "n")}
                pair = "/".join(part for part in (above, groups.get("patient", ""), groups.get("pair", "")) if part)
                return Place("" if role == "*" else role, patient.strip("/"), pair, columns)
        return None

    @property
    def roles(self) -> list[str]:
        """What can be asked for."""
        return list(dict.fromkeys(one for role, _ in self.rules for one in _ROLES.get(role, (role,))))


_ROLES = {"*": ("input", "target"), "": ()}


class Chosen(NamedTuple):
    """A layout, the files that are read, and a line that says so.

    Attributes:
        layout: None where the folder has none; files are then read as they are.
        role: what is read of them.
        names: the files.
        said: for the user; empty without a layout.
    """

    layout: Layout | None
    role: str
    names: list[str]
    said: str

    def read(self, place: Path, name: str, key: str | None, slices: Literal["auto", "first", "last"]) -> Scan:
        """Read a file, as the layout says where there is one.

        Raises:
            DataError: if it cannot be used.
        """
        if self.layout is None:
            return read_scan(place / name, key, slices)
        where = self.layout.place(name) or Place("", "", "", {})
        if self.layout.read is not None:
            parts = self.layout.read(place / name)
            parts = {role or where.role: scan for role, scan in parts.items()}
        else:
            parts = {where.role: read_scan(place / name, key or self.layout.key, slices)}
        if self.role != ALL_ROLES:
            parts = {role: scan for role, scan in parts.items() if role in (self.role, "")}
        labelled = [_label(scan, role, where, self.layout) for role, scan in parts.items()]
        return labelled[0] if len(labelled) == 1 else _join(labelled)


def _label(scan: Scan, role: str, where: Place, layout: Layout) -> Scan:
    """Write role, patient and pair into a scan's table, and what is known of its kind."""
    n = len(scan.values)
    said = {"role": role, "pair": where.pair, **where.columns}
    if where.patient:
        said["patient"] = where.patient
    kind = scan.kind or (layout.kind if layout.kind != "auto" else "")
    return replace(scan, kind=kind, table={**scan.table, **{name: [value] * n for name, value in said.items()}})


def _join(scans: list[Scan]) -> Scan:
    columns = set.intersection(*(set(scan.table) for scan in scans))
    table = {name: [item for scan in scans for item in scan.table[name]] for name in scans[0].table if name in columns}
    return replace(scans[0], values=np.concatenate([scan.values for scan in scans]), table=table)


def choose_layout(
    folder: str | Path, names: Sequence[str], others: Sequence[str] = (), asked: str = AUTO, role: str | None = None
) -> Chosen:
    """Recognise a folder's layout, or take the one asked for, and choose its files.

    Args:
        folder: the folder.
        names: its files that can be read, relative to it.
        others: its other files.
        asked: name of a layout; ``auto`` looks for one; ``none``: files are read as they are.
        role: ``input``, ``target`` or another role of the layout, or ``all``; None for the layout's default.

    Raises:
        DataError: if there is no such layout or role, or the folder is not laid out so.
    """
    folder = Path(folder)
    if asked not in (AUTO, NONE) and asked not in LAYOUTS:
        raise DataError(folder, f"{asked!r} is no known layout", f"choose of {', '.join(LAYOUTS)}, auto and none")
    if folder.is_file() or asked == NONE:
        layout = None
    elif asked == AUTO:
        layout = next((one for one in LAYOUTS.values() if _fits(one, folder, names, others)), None)
    else:
        layout = LAYOUTS[asked]
    if layout is None:
        if role not in (None, ALL_ROLES):
            raise DataError(folder, f"it has no layout that tells which files are {role!r}", "name one with layout")
        return Chosen(None, ALL_ROLES, list(names), "")
    role = role or layout.default_role
    if role not in (*layout.roles, ALL_ROLES):
        known = ", ".join([*layout.roles, ALL_ROLES])
        raise DataError(folder, f"{layout.name} has no role {role!r}", f"choose of {known}")
    candidates = layout.candidates(folder, names, others)
    places = {name: place for name in candidates if (place := layout.place(name)) is not None}
    kept = [name for name, place in places.items() if role == ALL_ROLES or place.role in (role, "")]
    if not kept:
        finding = f"none of its {len(names)} files is {role} of {layout.name} ({layout.about})"
        raise DataError(folder, finding, "check the path, or leave the layout out")
    counts = Counter(place.role or "input and target" for place in places.values())
    listed = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    left = len(names) - len([name for name in names if name in places])
    said = (
        f"laid out as {layout.name}, {layout.about}: {listed}; read: {role}"
        f"{f'; {left} file(s) beside' if left else ''}{f'; {layout.note}' if layout.note else ''}"
    )
    return Chosen(layout, role, kept, said)


def _fits(layout: Layout, folder: Path, names: Sequence[str], others: Sequence[str]) -> bool:
    """Tell whether nearly all files match, with every required role there, and one of them looks right inside."""
    if layout.raw and names:
        return False
    names = layout.candidates(folder, names, others)
    matched: dict[str, str] = {}
    n = 0
    for name in names:
        if (place := layout.place(name)) is not None:
            matched.setdefault(place.role, name)
            n += 1
    needed = 1 if layout.suits else min(2, len({role for role, _ in layout.rules}))
    if n == 0 or n < 0.9 * len(names) or len(matched) < needed:
        return False
    return layout.suits is None or all(layout.suits(folder / name) for name in matched.values())


def _arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Return arrays of a .mat or .npz file by name; None if any is not there."""
    import scipy.io

    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in keys}
        found = scipy.io.loadmat(path, variable_names=list(keys))
        return {key: found[key] for key in keys}
    except Exception:  # damaged, or somebody else's file; reading it says what is wrong
        return None


def _suits_red(path: Path) -> bool:
    arrays = _arrays(path, ["sino_image"])
    return arrays is not None and arrays["sino_image"].ndim == 3 and arrays["sino_image"].shape[0] == 2


def _read_red(path: Path) -> dict[str, Scan]:
    both = read_array(path, "sino_image", "first")
    if len(both) != 2:
        raise DataError(path, f"sino_image holds {len(both)} sinograms, not a low and a full dose", "export it again")
    table: dict[str, list[Any]] = {}
    if (said := _arrays(path, ["dcm_path"])) is not None and said["dcm_path"].dtype.kind == "U":
        parts = re.split(r"[\\/]+", str(said["dcm_path"].flat[0]))  # PATIENT / dose / slice.dcm
        table = {"patient": [parts[-3]]} if len(parts) >= 3 else {}
    return {role: Scan(both[i : i + 1], "sinogram", table=table) for i, role in enumerate(("input", "target"))}


DREAM_SHAPE = (256, 192)
"""Of DREAM's sinograms, which some files hold as one column in MATLAB's order."""


def _suits_dream(path: Path) -> bool:
    return _arrays(path, ["gt", "lq"]) is not None


def _read_dream(path: Path) -> dict[str, Scan]:
    arrays = _arrays(path, ["lq", "gt"])
    if arrays is None:
        raise DataError(path, "it does not hold the arrays 'gt' and 'lq'", "check the layout, or copy the file again")
    scans = {}
    for role, key in (("input", "lq"), ("target", "gt")):
        array = arrays[key]
        if sum(n != 1 for n in array.shape) < 2 and array.size == DREAM_SHAPE[0] * DREAM_SHAPE[1]:
            if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
                raise DataError(path, f"array {key!r} is not finite and real", "copy the file again")
            values = np.asarray(array, np.float32).reshape(DREAM_SHAPE, order="F")[None]
        else:
            values = read_array(path, key)
        scans[role] = Scan(values, "sinogram")
    return scans


def _dtm_slices(size: int) -> tuple[int, int, int] | None:
    """Return offset, slices and image width by a file's size; None if it is no file of DTM."""
    if size == 4 * 3 * 256 * 256:
        return 0, 3, 256
    n, rest = divmod(size - DTM_HEADER, 4 * 250 * 250)
    return (DTM_HEADER, n, 250) if n > 0 and rest == 0 else None


def _suits_dtm(path: Path) -> bool:
    return path.is_file() and _dtm_slices(path.stat().st_size) is not None


def _read_dtm(path: Path) -> dict[str, Scan]:
    size = path.stat().st_size
    if (found := _dtm_slices(size)) is None:
        finding = f"its {size} bytes are neither {DTM_HEADER} and slices of 250 x 250 nor 3 x 256 x 256, in float32"
        raise DataError(path, finding, "copy the file again")
    offset, n, width = found
    values = np.fromfile(path, "<f4", offset=offset).reshape(n, width, width).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(path, "it holds NaN or infinite values", "copy the file again")
    if not offset and (values == values[0]).all():  # one slice, repeated for three colour channels
        values = values[:1]
    patient = path.stem if offset else _before_underscore(path.stem)  # a volume is one patient's
    return {"": Scan(values, "image", table={"patient": [patient] * len(values)})}


def _before_underscore(stem: str) -> str:
    """Return whose a slice is by its file's name, not by its folder, which is that of its role."""
    return stem.rpartition("_")[0] or "unknown"


_LOW = r"(?:low|ld|lq|lpet|input)[^/]*"
_FULL = r"(?:full|fd|gt|hq|spet|normal|target|label)[^/]*"
_FILE = r"(?P<pair>[^/]+)"

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "raysolution-attenuation",
            "Raysolution_PET_Data, the same PET before and after attenuation and scatter correction",
            (
                ("target", r"(?:(?P<patient>[^/]+)/)?dicom_[^/]*_attn_scat_gauss_[\d.]+"),
                ("input", r"(?:(?P<patient>[^/]+)/)?dicom_[^/]*_gauss_[\d.]+"),
            ),
            "target",
            "image",
        ),
        Layout(
            "raysolution-tracers",
            "Raysolution_PET_Data, two tracers in the same place",
            (
                ("target", r"(?P<isotope>F18)/F18_(?P<patient>\d+)_(?P<pair>\d+)\.mat"),
                ("target", r"(?P<isotope>G68)/G68_(?P<patient>\d+)_(?P<pair>\d+)\.mat"),
            ),
            "target",
            "image",
            note="folders called coronal hold coronal images, whose projections no scanner measures",
        ),
        Layout(
            "pet-ac-sct",
            "PET_AC_sCT, PET without attenuation correction and CT of the same slices, 40 per patient",
            (
                ("input", r"(?:pet_mat|nac_pet)/(?P<n>(?P<pair>\d+))\.mat"),
                ("ct", r"(?:ct_mat|ct)/(?P<n>(?P<pair>\d+))\.mat"),
            ),
            "input",
            "image",
            key="data",
            patient_of=lambda groups: f"patient{(int(groups['n']) + 39) // 40:02}",
        ),
        Layout(
            "red",
            "RED's files of UDPET, sinograms of a low and the full dose over 180 degrees",
            (("*", r"(?P<pair>[^/]+)\.npz"),),
            "target",
            "sinogram",
            _read_red,
            suits=_suits_red,
            note="they are projections of reconstructed images",
        ),
        Layout(
            "dream",
            "DREAM's files, sinograms of a low and the full dose",
            (("*", r"(?P<pair>[^/]+)\.mat"),),
            "target",
            "sinogram",
            _read_dream,
            suits=_suits_dream,
        ),
        Layout(
            "dream-folders",
            "slices in folders gt and lq, as DREAM's and MS-CDT's code reads them",
            (
                ("target", rf"(?:gt|GT)/{_FILE}\.mat"),
                ("input", rf"(?:lq|LQ)/{_FILE}\.mat"),
            ),
            "target",
            key="data",
            patient_of=lambda groups: _before_underscore(groups["pair"]),
        ),
        Layout(
            "ms-cdt",
            "MS-CDT's files, two tracers and their sum",
            (
                ("input", rf"(?:fuse|FUSE)/{_FILE}\.mat"),
                ("target", rf"(?P<tracer>FDG|DOPA)/{_FILE}\.mat"),
            ),
            "target",
            key="data",
            patient_of=lambda groups: _before_underscore(groups["pair"]),
        ),
        Layout(
            "dtm",
            f"DTM's raw float32 images, volumes after {DTM_HEADER} bytes of header",
            (
                ("input", rf"{_LOW}/(?:.*/)?(?P<pair>[^/]+)"),
                ("target", rf"{_FULL}/(?:.*/)?(?P<pair>[^/]+)"),
                ("", r"(?P<pair>[^/]+)"),
            ),
            ALL_ROLES,
            "image",
            _read_dtm,
            suits=_suits_dtm,
            raw=True,
        ),
        Layout(
            "st-dtpm",
            "st-DTPM's DICOM series, an early and a delayed scan",
            (
                ("input", r"(?:(?P<patient>[^/]+)/)?(?P<pair>[^/]*)_CBM"),
                ("target", r"(?:(?P<patient>[^/]+)/)?(?P<pair>[^/]*)_Delay"),
            ),
            ALL_ROLES,
            "image",
        ),
    )
}

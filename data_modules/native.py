"""The native data set: one HDF5 file with slices, a table with one row per slice, and what the numbers mean.

``sinogram`` (or ``image``) is ``(slices, views, bins)`` float32, uncompressed and in one piece, so that random slices
are read at once; ``additive`` and ``acf`` lie beside it where they are known. ``table`` holds a column each for
``patient``, ``file``, ``slice``, ``hash`` (of the content) and whatever the files' own tables say (``tracer``,
``region``, ``split``, ...). The JSON text ``about`` holds schema version, geometry, units, state, source and licence
(``allpet.io.scans``).

A conversion first fills a hidden folder beside its goal, file by file, with a log. Interrupted at any moment, the same
command continues there; only at the end does the data set appear, in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from tqdm.auto import tqdm

from allpet.io import DataError, Scan, content_hash
from allpet.io.arrays import damaged
from allpet.io.atomic import replacing
from allpet.io.containers import column_array, column_list, read_about
from allpet.io.scans import COMPANIONS, to_json
from data_modules.folder import FoundFile, find_files, identify_patients, read_files, split_of
from data_modules.layouts import AUTO, Chosen, choose_layout

_ROWS = 64  # copied at a time
_TASK = "converted"  # what was converted and how, by which the same command is known again


def convert(
    folder: str | Path,
    path: str | Path,
    kind: Literal["auto", "sinogram", "image"] = "auto",
    bin_mm: float | None = None,
    pixel_mm: float | None = None,
    full_turn: bool = False,
    key: str | None = None,
    slices: Literal["auto", "first", "last"] = "auto",
    patient: str | None = None,
    source: str = "",
    licence: str = "",
    columns: dict[str, str] | None = None,
    layout: str = AUTO,
    role: str | None = None,
) -> Path:
    """Convert a folder to a native data set; memory does not grow with the folder.

    One process does it: it is bound by reading, the file is written once, and what was interrupted is continued.

    Args:
        folder: of files that ``allpet.io.read_scan`` takes.
        path: of the data set, ending in .h5.
        kind: what the slices are, where the files do not say; ``auto`` looks at the first ten files.
        bin_mm: bin width of sinograms that do not say.
        pixel_mm: pixel width of images that do not say.
        full_turn: sinograms cover 360 degrees: opposite views are averaged.
        key: name of the array in files of several.
        slices: axis that counts slices.
        patient: pattern that finds the patient in a file's name.
        source: where the data come from.
        licence: what may be done with them.
        columns: further columns with one entry for all, such as ``{"tracer": "FDG"}``.
        layout: name of a public data set's layout; ``auto`` looks for one, ``none`` does not.
        role: which files of the layout are read; None: its default.

    Returns:
        ``path``. A file that the same conversion has made before is kept as it is, with its split.

    Raises:
        DataError: if a file cannot be used or differs from the others; nothing is left then. If there is another file
            of that name, which stays.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise DataError(path, "a data set is an HDF5 file", "let its name end in .h5")
    if not folder.exists():
        raise DataError(folder, "there is no such folder", "check the path")
    names, others = find_files(folder)
    names = [name for name in names if os.path.realpath(folder / name) != os.path.realpath(path)]
    chosen = choose_layout(folder, names, others, layout, role)
    names = chosen.names
    if not names:
        raise DataError(folder, "it holds no files that can be read", "check the path")
    place = folder.parent if folder.is_file() else folder
    asked = [kind, bin_mm, pixel_mm, full_turn, key, slices, patient, source, licence, columns or {}]
    asked += [layout, role]
    listing = [
        [name, os.stat(place / name).st_size, os.stat(place / name).st_mtime_ns]
        for name in names
        if (place / name).exists()
    ]
    task = hashlib.blake2b(json.dumps([asked, listing]).encode(), digest_size=16).hexdigest()
    if path.exists():
        if _task_of(path) == task:
            return path
        finding = "it exists, and was not made of these files in this way"
        raise DataError(path, finding, "choose another name, or remove it first")
    journal = _Journal(path, task)
    try:
        for found in tqdm(
            _read(folder, names[journal.n_files :], key, slices, chosen),
            "Converting",
            len(names),
            initial=journal.n_files,
            unit="file",
            disable=None,
        ):
            journal.add(_fold(found) if full_turn else found)
        journal.finish(folder, names, kind, bin_mm, pixel_mm, patient, source, licence, columns or {})
    except (DataError, ValueError):
        journal.remove()
        raise
    except OSError as error:
        journal.remove()
        reason = error.strerror or str(error)
        raise DataError(path, f"it cannot be written ({reason})", "free space, or choose another folder") from error
    journal.remove()
    return path


def _task_of(path: Path) -> str | None:
    """Return what a file says of how it was converted; None for a stranger."""
    try:
        with h5py.File(path) as file:
            return file.attrs.get(_TASK)
    except OSError:
        return None


def _read(folder: Path, names: list[str], key: str | None, slices: Any, chosen: Chosen) -> Iterator[FoundFile]:
    for found in read_files(folder, names, key, slices, chosen):
        if not isinstance(found, FoundFile):
            raise found
        yield found


def _fold(found: FoundFile) -> FoundFile:
    """Average opposite views of 360 degrees: p(theta + pi, s) = p(theta, -s)."""
    n = found.slices.shape[1]
    if n % 2:
        raise DataError(found.name, f"{n} views over 360 degrees, an odd number", "store an even number of views")
    return found._replace(slices=(found.slices[:, : n // 2] + found.slices[:, n // 2 :, ::-1]) / 2)


class _Journal:
    """Files read so far: raw float32 in one file per array, and one line of JSON per file.

    Args:
        path: of the data set to come.
        task: what is being converted and how; a journal of another task is begun anew.
    """

    def __init__(self, path: Path, task: str) -> None:
        self.path, self.folder, self.task = path, path.with_name(f".{path.name}.part"), task
        self.entries: list[dict[str, Any]] = []
        log = self.folder / "log.jsonl"
        try:
            if log.is_file():
                lines = [line for line in log.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
                if lines and json.loads(lines[0]) == task:
                    self.entries = [json.loads(line) for line in lines[1:]]
            if not self.entries:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                log.write_text(json.dumps(task) + "\n", encoding="utf-8")
            else:
                log.write_text("".join(json.dumps(item) + "\n" for item in (task, *self.entries)), encoding="utf-8")
                for name in ("values", *COMPANIONS):  # cut off what was written but not logged
                    if (self.folder / name).is_file():
                        os.truncate(self.folder / name, self.n_slices * 4 * int(np.prod(self.shape)))
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(path, f"it cannot be written ({reason})", "choose another folder") from error

    @property
    def n_files(self) -> int:
        return len(self.entries)

    @property
    def n_slices(self) -> int:
        return sum(entry["slices"] for entry in self.entries)

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self.entries[0]["shape"]
        return a, b

    def add(self, found: FoundFile) -> None:
        scan = found.scan
        about = {} if scan is None else {**scan.about(), "table": {k: list(v) for k, v in scan.table.items()}}
        arrays = {"values": found.slices}
        if scan is not None and found.slices.shape == scan.values.shape:
            arrays |= {name: getattr(scan, name) for name in COMPANIONS if getattr(scan, name) is not None}
        entry = {
            "name": found.name,
            "slices": len(found.slices),
            "shape": list(found.slices.shape[1:]),
            "arrays": sorted(arrays),
            "hashes": [content_hash(one) for one in found.slices],
            "disc": [bool(is_disc(one)) for one in found.slices[:1]],
            "notes": [] if scan is None else list(scan.notes),
            "about": about,
        }
        if self.entries:
            self._compare(entry)
        for name, array in arrays.items():
            with (self.folder / name).open("ab") as stream:
                stream.write(np.ascontiguousarray(array, dtype="<f4").tobytes())
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(to_json(entry) + "\n")
        self.entries.append(json.loads(to_json(entry)))

    def _compare(self, entry: dict[str, Any]) -> None:
        first = self.entries[0]
        for what, mine, others in (
            ("shape", entry["shape"], first["shape"]),
            ("arrays", entry["arrays"], first["arrays"]),
            *(
                (name, entry["about"].get(name), first["about"].get(name))
                for name in ("kind", "geometry", "units", "state", "pixel_mm")
            ),
        ):
            if mine != others:
                finding = f"its {what} is {mine} where {first['name']} has {others}"
                raise DataError(entry["name"], finding, "convert files that differ to data sets of their own")

    def finish(
        self,
        folder: Path,
        names: list[str],
        kind: str,
        bin_mm: float | None,
        pixel_mm: float | None,
        patient: str | None,
        source: str,
        licence: str,
        columns: dict[str, str],
    ) -> None:
        from data_modules.files import sinogram_geometry

        about = dict(self.entries[0]["about"])
        if not about.get("kind"):
            discs = [disc for entry in self.entries[:10] for disc in entry["disc"]]
            about["kind"] = kind if kind != "auto" else "image" if 2 * sum(discs) > len(discs) else "sinogram"
        if about["kind"] == "sinogram":
            old = about.get("geometry") or {}
            width = bin_mm or old.get("bin_mm")
            if width is not None and (bin_mm is not None or self._folded()):  # what nobody said is not made up
                about["geometry"] = sinogram_geometry(None, self.shape, width)[0].to_dict()
        else:
            about["pixel_mm"] = pixel_mm or about.get("pixel_mm")
        about["provenance"] = {
            **about.get("provenance", {}),
            "source": source or folder.resolve().name,
            "licence": licence or "not stated",
        }
        about["notes"] = list(dict.fromkeys(note for entry in self.entries for note in entry["notes"]))
        values = np.memmap(self.folder / "values", "<f4", "r", shape=(self.n_slices, *self.shape))
        scan = Scan(
            values,
            about["kind"],
            None,
            about.get("pixel_mm"),
            about.get("slice_mm"),
            about.get("units", ""),
            tuple(about.get("state", ())),
            provenance=about["provenance"],
        )
        head = {**scan.about(), "geometry": about.get("geometry"), "notes": about["notes"]}
        table = self._table(patient, columns)
        with replacing(self.path) as unfinished, h5py.File(unfinished, "w") as file:
            for name in self.entries[0]["arrays"]:
                stored = about["kind"] if name == "values" else name
                raw = np.memmap(self.folder / name, "<f4", "r", shape=values.shape)
                file.create_dataset(stored, values.shape, "<f4")
                file[stored].attrs["axes"] = head["axes"]
                for row in range(0, len(values), _ROWS):
                    file[stored][row : row + _ROWS] = raw[row : row + _ROWS]
            file[about["kind"]].attrs["units"] = head["units"]
            write_table(file, table)
            file["about"] = to_json({name: value for name, value in head.items() if name != "table"})
            file.attrs[_TASK] = self.task

    def _folded(self) -> bool:
        geometry = self.entries[0]["about"].get("geometry")
        return geometry is not None and geometry["n_views"] != self.shape[0]

    def _table(self, pattern: str | None, columns: dict[str, str]) -> dict[str, list[Any]]:
        counts = [entry["slices"] for entry in self.entries]
        splits, rest = zip(*(split_of(entry["name"]) for entry in self.entries), strict=True)
        patients = identify_patients(list(rest), counts, pattern)

        def spread(column: Sequence[Any]) -> list[Any]:
            return [item for item, n in zip(column, counts, strict=True) for _ in range(n)]

        own = [entry["about"].get("table", {}) for entry in self.entries]
        table: dict[str, list[Any]] = {
            "patient": spread(patients.names if patients.known else ["unknown"] * len(counts)),
            "file": spread([entry["name"] for entry in self.entries]),
            "slice": [i for n in counts for i in range(n)],
            "hash": [item for entry in self.entries for item in entry["hashes"]],
        }
        if any(splits):
            table["split"] = spread(splits)
        for name in own[0]:
            if all(name in one for one in own) and name not in ("hash", "file", "slice"):
                table[name] = [item for one in own for item in one[name]]
        return {**table, **{name: [value] * sum(counts) for name, value in columns.items()}}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def is_disc(image: np.ndarray) -> bool:
    """Tell whether a slice is zero outside the inscribed circle (``checks``), for files that say nothing."""
    from data_modules.checks import _is_disc

    return _is_disc(image)


def write_table(file: h5py.File, table: dict[str, list[Any]]) -> None:
    """Write the columns of a table, in place of what was there."""
    if "table" in file:
        del file["table"]
    for name, column in table.items():
        file[f"table/{name}"] = column_array(column)


class NativeFile:
    """A native data set, read slice by slice; each process opens the file for itself.

    Args:
        path: of the .h5 file.

    Raises:
        DataError: if it is no native data set, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        about = read_about(self.path) if self.path.is_file() else None
        if about is None:
            raise DataError(self.path, "it is no native data set", "make one with allpet-data convert")
        self.about: dict[str, Any] = about
        self._file: h5py.File | None = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self._dataset())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": 0}

    @property
    def shape(self) -> tuple[int, ...]:
        """``(slices, views, bins)``, or rows and columns."""
        return tuple(self._dataset().shape)

    @property
    def table(self) -> dict[str, list[Any]]:
        """One column per name, one entry per slice."""
        return dict(self.about["table"])

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read slices in any order, ``(rows, views, bins)`` float32.

        Raises:
            DataError: if the file is damaged.
        """
        dataset = self._dataset()
        out = np.empty((len(rows), *dataset.shape[1:]), np.float32)
        with damaged(self.path, "a data set"):
            for i, row in enumerate(rows):
                dataset.read_direct(out, np.s_[int(row)], np.s_[i])
        return out

    def verify(self) -> list[int]:
        """Return the rows whose numbers are no longer those that were converted."""
        if "hash" not in self.about["table"]:
            return []
        wrong = []
        for row, known in enumerate(self.about["table"]["hash"]):
            if content_hash(self.read([row])[0]) != known:
                wrong.append(row)
        return wrong

    def scan(self, rows: Sequence[int] | None = None) -> Scan:
        """Return some slices, or all, as a scan."""
        from allpet.io.scans import scan_from

        chosen = list(range(len(self))) if rows is None else list(rows)
        file = self._open()
        arrays = {"values": self.read(chosen)}
        for name in COMPANIONS:
            if name in file:
                with damaged(self.path, "a data set"):
                    arrays[name] = np.stack([file[name][row] for row in chosen])
        table = {name: [column[row] for row in chosen] for name, column in self.about["table"].items()}
        return scan_from({**self.about, "table": table}, arrays, self.path)

    def _open(self) -> h5py.File:
        if self._file is None or self._owner != os.getpid():
            self._file, self._owner = h5py.File(self.path, "r"), os.getpid()
            slices = self._file.get(self._name)
            if slices is None or slices.ndim != 3 or not slices.size:
                raise DataError(self.path, f"it holds no {self._name} slices", "convert or write it again")
        return self._file

    @property
    def _name(self) -> str:
        return self.about.get("kind") or "sinogram"

    def _dataset(self) -> h5py.Dataset:
        return self._open()[self._name]


def write_split(path: str | Path, split: dict[str, str]) -> None:
    """Give every patient of a data set its use, in one step.

    Args:
        path: of the data set.
        split: ``train``, ``val`` or ``test`` for each patient.
    """
    path = Path(path)
    with replacing(path) as unfinished:
        shutil.copyfile(path, unfinished)
        with h5py.File(unfinished, "r+") as file:
            patients = column_list(file["table/patient"])
            table = {name: column_list(item) for name, item in file["table"].items()}
            write_table(file, {**table, "split": [split[str(name)] for name in patients]})

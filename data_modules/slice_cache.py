"""Slices of numbered patients, made once and kept in HDF5 files: restartable, for several writers, in flat memory.

The patients of a set lie in files of some hundred slices each (``00000.h5``, ``00001.h5``, ...), an HDF5 chunk to a
slice. A file is written beside its place, patient by patient, and moved there when it is whole: a process that is
killed loses the file it was at, and the same command goes on from the files that are there. A lock for each file in the
making lets several processes, on one machine or on a shared folder, divide the work between them. Slices are made by
one thread each, so that they are the same bits whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from allpet.io.scans import DataError
from data_modules.loading import as_it_is

Arrays = dict[str, np.ndarray]
FILE_SLICES = 100  # per file: what a killed process may lose, some seconds of work
_LOCKS = 16  # files share locks, so that few are left behind
_OPEN_FILES = 128


class SliceCache(Dataset[int]):
    """The slices of patients 0, 1, 2, ... of one set.

    As a data set, item ``k`` makes the k-th file where it is missing; its value is the number of patients in it, 0
    where another process is making it.

    Args:
        folder: where the files lie; made when needed.
        make: patient's number in the set -> arrays by name, ``(slices_per_patient, ...)`` each.
        slices_per_patient: slices that ``make`` returns.
        about: what the slices are, kept in every file, JSON-able.
        compressed: names of arrays to be stored with lossless compression; sinograms of noise gain nothing by it.
        what: for the progress bar.
        warm_up: loads what processes can share, once, before they are started.
    """

    def __init__(
        self,
        folder: str | Path,
        make: Callable[[int], Arrays],
        slices_per_patient: int,
        about: Mapping[str, Any] | None = None,
        compressed: Sequence[str] = (),
        what: str = "patients",
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.make, self.slices_per_patient = Path(folder), make, slices_per_patient
        self.about, self.compressed, self.what = dict(about or {}), tuple(compressed), what
        self.warm_up = warm_up
        self.patients_per_file = max(1, round(FILE_SLICES / slices_per_patient))
        self._wanted, self._waiting = 0, False
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return -(-self._wanted // self.patients_per_file)

    def __getitem__(self, k: int) -> int:
        try:
            with FileLock(self._lock(k), timeout=-1 if self._waiting else 0):
                return self._make_file(k)
        except Timeout:
            return 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def fill(self, n_patients: int, workers: int | None = None) -> None:
        """Make what is missing of the first patients; a set that is larger already stays as it is.

        Args:
            n_patients: how many patients are wanted.
            workers: processes that make files; 0 for this one alone; None for one per core where that pays.
        """
        self._wanted = n_patients
        missing = [k for k in range(len(self)) if self._stored(k, warn=True) < self._wanted_in(k)]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if workers is None:
            workers = min(cores(), len(missing)) if len(missing) > 1 else 0
        if self.warm_up is not None:
            self.warm_up()
        there = n_patients - sum(self._wanted_in(k) for k in missing)
        with tqdm(desc=f"Simulating {self.what}", total=n_patients, initial=there, unit="patient") as bar:
            # First what nobody else is making, then, having waited for them, what others began and did not end.
            for self._waiting in (False, True):
                loader = DataLoader(
                    self,
                    batch_size=None,
                    sampler=missing,
                    num_workers=workers,
                    collate_fn=as_it_is,
                    generator=torch.Generator(),  # it would draw a seed for its workers from the global one
                )
                with one_thread(), _frozen():
                    for made in loader:
                        bar.update(made)
                missing = [k for k in missing if self._stored(k) < self._wanted_in(k)]
                if not missing:
                    break
                workers = 0

    def read(self, name: str, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Read slices by their numbers, ``(rows, ...)``; patient p has the numbers from p * slices_per_patient on."""
        index = np.asarray(rows, dtype=np.int64)
        per_file = self.patients_per_file * self.slices_per_patient
        slices = [self._file(int(row) // per_file)[name][int(row) % per_file] for row in index]
        return torch.from_numpy(np.stack(slices)) if slices else torch.empty(0, *self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one slice of an array."""
        return tuple(self._file(0)[name].shape[1:])

    def dtype(self, name: str) -> np.dtype:
        """Return the type of an array's numbers."""
        return self._file(0)[name].dtype

    def path(self, k: int) -> Path:
        """Return where the k-th file lies."""
        return self.folder / f"{k:05}.h5"

    def _lock(self, k: int) -> Path:
        return self.folder / f".lock{k % _LOCKS:02}"

    def _wanted_in(self, k: int) -> int:
        """Return how many patients the k-th file has to hold."""
        return min(self.patients_per_file, self._wanted - k * self.patients_per_file)

    def _stored(self, k: int, warn: bool = False) -> int:
        """Return how many patients the k-th file holds; 0 if it is not there or damaged."""
        path = self.path(k)
        if not path.exists():
            return 0
        try:
            with h5py.File(path, "r") as file:
                return int(file.attrs["patients"])
        except (OSError, KeyError) as error:
            if warn:
                rank_zero_warn(f"{path} cannot be read ({error}); its slices are simulated anew.")
            return 0

    def _make_file(self, k: int) -> int:
        """Write the k-th file unless it is whole; the caller holds its lock."""
        have, wanted = self._stored(k), self._wanted_in(k)
        if have >= wanted:
            return wanted
        self._close(k)
        unfinished = self.path(k).with_suffix(".part")
        per_patient = self.slices_per_patient
        try:
            with h5py.File(unfinished, "w") as file:
                if have:  # a smaller set is continued
                    with h5py.File(self.path(k), "r") as old:
                        for name in old:
                            self._dataset(file, name, old[name].shape[1:], old[name].dtype, wanted)
                            for row in range(have * per_patient):
                                file[name][row] = old[name][row]
                for patient in range(have, wanted):
                    made = self.make(k * self.patients_per_file + patient)
                    for name, array in made.items():
                        if name not in file:
                            self._dataset(file, name, array.shape[1:], array.dtype, wanted)
                        file[name][patient * per_patient : (patient + 1) * per_patient] = array
                file.attrs["patients"] = wanted
                file.attrs["about"] = json.dumps({**self.about, "first_patient": k * self.patients_per_file})
            unfinished.replace(self.path(k))
        except OSError as error:
            finding = f"it cannot be written ({_reason(error)})"
            raise DataError(self.path(k), finding, "free space, or name another folder with --data.cache") from error
        finally:
            unfinished.unlink(missing_ok=True)
        return wanted

    def _dataset(self, file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, n_patients: int) -> None:
        options = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if name in self.compressed else {}
        file.create_dataset(name, (n_patients * self.slices_per_patient, *shape), dtype, chunks=(1, *shape), **options)

    def _file(self, k: int) -> h5py.File:
        """Return the k-th file, open for reading; a process never uses what another has opened."""
        if self._owner != os.getpid():
            self._files, self._owner = OrderedDict(), os.getpid()
        if k not in self._files:
            try:
                self._files[k] = h5py.File(self.path(k), "r")
            except OSError as error:
                finding = f"it is gone or damaged ({_reason(error)})"
                raise DataError(self.path(k), finding, "give the same command again, which makes it anew") from error
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(k)
        return self._files[k]

    def _close(self, k: int) -> None:
        if self._owner == os.getpid() and k in self._files:
            self._files.pop(k).close()


def _reason(error: OSError) -> str:
    # the text of the HDF5 library is long
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())[:80]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums come out the same on every number of cores, and processes do not crowd them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Keep the collectors of forked processes from touching, and so copying, what they share with this one."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StoredArray:
    """One array of a cache, read slice by slice when asked for.

    Args:
        cache: filled.
        name: of the array.
        n_slices: length; slices beyond it are there but not shown.
    """

    def __init__(self, cache: SliceCache, name: str, n_slices: int) -> None:
        self.cache, self.name = cache, name
        self.shape = (n_slices, *cache.shape(name))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Return what all slices would take in memory."""
        return math.prod(self.shape) * self.cache.dtype(self.name).itemsize

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the slices of the given numbers, in memory."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"Slices {rows.tolist()} were asked for, but there are {len(self)}.")
        return self.cache.read(self.name, rows)

"""The cache of slices: whole files or none, nothing made twice, continued after a kill, the same bits from anybody."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from allpet.geometry import ParallelBeam
from allpet.io.scans import DataError
from allpet.projector import Radon
from data_modules.simulated import Simulation
from data_modules.slice_cache import Arrays, SliceCache, StoredArray

GEOMETRY = ParallelBeam(n_views=24, n_bins=32, bin_mm=13.5, image_size=32, pixel_mm=13.5)
PER_PATIENT = 20  # five patients to a file
forked = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")


class Patients:
    """Numbers that tell who made them; notes every patient made in a file."""

    def __init__(self, notes: Path | None = None) -> None:
        self.notes = notes

    def __call__(self, index: int) -> Arrays:
        if self.notes is not None:
            with self.notes.open("a") as stream:
                stream.write(f"{index}\n")
        sinogram = np.arange(PER_PATIENT, dtype=np.float32)[:, None, None] + 1000 * index + np.zeros((1, 3, 4))
        labels = np.full((PER_PATIENT, 2, 2), index % 256, np.uint8)
        return {"sinogram": sinogram.astype(np.float32), "labels": labels}


def cache(folder: Path, notes: Path | None = None) -> SliceCache:
    return SliceCache(folder, Patients(notes), PER_PATIENT, {"who": "test"}, ["labels"])


def expected_rows(rows: list[int]) -> torch.Tensor:
    values = torch.tensor([1000.0 * (row // PER_PATIENT) + row % PER_PATIENT for row in rows])
    return values[:, None, None].expand(-1, 3, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_slices_come_back_by_number(tmp_path: Path, workers: int) -> None:
    made = cache(tmp_path / "set")
    made.fill(12, workers)
    assert sorted(path.name for path in (tmp_path / "set").glob("*.h5")) == ["00000.h5", "00001.h5", "00002.h5"]
    assert not list((tmp_path / "set").glob("*.part"))
    rows = [239, 0, 100, 99, 7]
    assert torch.equal(made.read("sinogram", rows), expected_rows(rows))
    assert made.read("labels", rows)[:, 0, 0].tolist() == [11, 0, 5, 4, 0]
    array = StoredArray(made, "sinogram", 230)
    assert array.shape == (230, 3, 4)
    assert array.nbytes == 230 * 12 * 4
    assert torch.equal(array[torch.tensor(rows[1:])], expected_rows(rows[1:]))
    with pytest.raises(IndexError, match="there are 230"):
        array[torch.tensor(rows)]
    with h5py.File(made.path(1), "r") as file:
        assert file["sinogram"].chunks == (1, 3, 4)  # one slice
        assert file["labels"].compression == "gzip"
        assert "test" in file.attrs["about"]


def test_a_larger_set_continues_a_smaller_one(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    for n in (3, 7, 2, 7):
        cache(tmp_path / "set", notes).fill(n)
    assert sorted(map(int, notes.read_text().split())) == list(range(7))
    grown = cache(tmp_path / "set")
    grown.fill(7)
    rows = list(range(140))
    assert torch.equal(grown.read("sinogram", rows), expected_rows(rows))


def test_readers_see_the_grown_set(tmp_path: Path) -> None:
    growing = cache(tmp_path)
    growing.fill(2)
    assert len(growing.read("sinogram", [0])) == 1
    growing.fill(4)
    assert torch.equal(growing.read("sinogram", [79]), expected_rows([79]))


def test_a_failure_leaves_whole_files_only(tmp_path: Path) -> None:
    class Failing(Patients):
        def __call__(self, index: int) -> Arrays:
            if index == 8:
                raise OSError(28, "No space left on device")
            return super().__call__(index)

    failing = SliceCache(tmp_path, Failing(), PER_PATIENT)
    with pytest.raises(DataError, match=r"No space left.*free space"):
        failing.fill(12, workers=0)
    assert [path.name for path in sorted(tmp_path.glob("*.*")) if not path.name.startswith(".")] == ["00000.h5"]
    whole = cache(tmp_path)
    whole.fill(12, workers=0)
    assert torch.equal(whole.read("sinogram", [160]), expected_rows([160]))


def write(folder: Path, notes: Path, seconds: float) -> None:
    """Fill a set slowly, in a process of its own."""

    class Slow(Patients):
        def __call__(self, index: int) -> Arrays:
            time.sleep(seconds)
            return super().__call__(index)

    SliceCache(folder, Slow(notes), PER_PATIENT).fill(25, workers=0)


def start(*arguments: Any) -> multiprocessing.Process:
    # A fork starts at once; it computes with numpy alone, so threads that it has lost do not matter.
    process = multiprocessing.get_context("fork").Process(target=write, args=arguments)
    process.start()
    return process  # type: ignore[return-value]


@forked
def test_a_killed_generation_is_continued(tmp_path: Path) -> None:
    folder, notes = tmp_path / "set", tmp_path / "notes"
    killed = start(folder, notes, 0.05)
    for _ in range(5000):
        if (folder / "00001.part").exists():
            break
        time.sleep(0.01)
    killed.kill()
    killed.join()
    whole = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    assert 0 < len(whole) < 5
    before = len(notes.read_text().split())
    again = cache(folder, notes)
    again.fill(25, workers=0)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    made = list(map(int, notes.read_text().split()))[before:]
    assert sorted(made) == list(range(5 * len(whole), 25))
    assert not list(folder.glob("*.part"))
    rows = list(range(0, 500, 7))
    assert torch.equal(again.read("sinogram", rows), expected_rows(rows))


@forked
def test_several_writers_share_the_work(tmp_path: Path) -> None:
    folder, notes = tmp_path / "set", [tmp_path / "first", tmp_path / "second"]
    writers = [start(folder, note, 0.05) for note in notes]
    for writer in writers:
        writer.join(240)
        assert writer.exitcode == 0
    made = [list(map(int, note.read_text().split())) for note in notes]
    assert min(map(len, made)) > 0
    assert sorted(made[0] + made[1]) == list(range(25))  # nothing twice
    rows = list(range(0, 500, 11))
    assert torch.equal(cache(folder).read("sinogram", rows), expected_rows(rows))


def test_the_number_of_processes_and_threads_changes_no_bit(tmp_path: Path) -> None:
    simulation = Simulation(Radon(GEOMETRY), 0, ("FDG:brain", "PSMA:abdomen"), 2, 1.0)
    made = []
    threads = torch.get_num_threads()
    for workers, n_threads in ((0, 2), (1, 1), (2, 2)):
        torch.set_num_threads(n_threads)
        one = SliceCache(tmp_path / str(workers), simulation, 2, warm_up=simulation.warm_up)
        one.patients_per_file = 2
        one.fill(4, workers)
        assert torch.get_num_threads() == n_threads
        made.append([one.read(name, list(range(8))) for name in ("expected", "noisy")])
    torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))
    assert not torch.equal(made[0][1][0], made[0][1][4])  # neighbouring patients of one prompt

"""Random reads from a converted data set, and whether memory stays flat.

    python experiments/benchmarks/native_reads.py

A folder of 50 patients with 100 sinograms each is converted as a user's would be; then batches of random slices are
read, as a training does, on one core. The file fits into the machine's file cache, which is what a second epoch meets.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from allpet.reports import table, write_report
from data_modules.native import NativeFile, convert

_VIEWS, _BINS, _BATCH = 180, 128, 32


def main() -> None:
    """Convert, read, and write ``outputs/reports/native_reads.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=5000, help="slices in the data set, a multiple of 50")
    parser.add_argument("--rounds", type=int, default=5, help="how often as many slices are read")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.slices < 50 or given.slices % 50 or given.rounds < 2:
        parser.error("give a multiple of 50 slices and at least two rounds")
    generator = np.random.default_rng(given.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "folder")
        folder.mkdir()
        for patient in range(50):
            values = generator.poisson(20, (given.slices // 50, _VIEWS, _BINS)).astype(np.float32)
            np.save(folder / f"patient_{patient:02}.npy", values)
        started = time.perf_counter()
        native = NativeFile(convert(folder, Path(place, "set.h5"), "sinogram", bin_mm=4.0))
        converting = given.slices / (time.perf_counter() - started)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        rows, peaks = [], []
        for i in range(given.rounds):
            order = generator.permutation(given.slices)
            started, busy = time.perf_counter(), time.process_time()
            for first in range(0, given.slices, _BATCH):
                native.read(order[first : first + _BATCH])
            wall, busy = time.perf_counter() - started, time.process_time() - busy
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            rate = given.slices / wall
            rows.append({"round": i + 1, "slices_per_second": rate, "cpu_share": busy / wall, "peak_mb": peaks[-1]})
    path = write_report(
        "native_reads",
        rows,
        [given.seed],
        title="Random reads from a converted data set",
        remarks=f"{given.slices:,} slices of {_VIEWS} x {_BINS}, uncompressed, in batches of {_BATCH} on one core, "
        f"from the machine's file cache; peak memory grew by {peaks[-1] - peaks[0]:.1f} MB from the first round to the "
        f"last. Converting the folder took {converting:,.0f} slices per second.",
    )
    print(table(rows))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()

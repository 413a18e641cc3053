"""Write the slices that a run was not trained on to one file, to be compared with samples or handed on.

    python experiments/held_out.py [RUN] [--part test|val|train] [--noisy] [--output FILE]      (make held-out)

RUN is a run, its pretrained folder, or a root, which means its newest finished run; the data are those of its own
configuration, simulated or files. Simulated slices are written as expected, like samples without ``COUNTS``, or as
measured with ``--noisy``; files hold what was measured alone. ``--part train`` gives ``make evaluate`` its TRAIN.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from studies.training import data_of_run

from allpet.io.containers import write_hdf5
from allpet.io.scans import Scan
from allpet.runs import newest_pretrained
from data_modules import SinogramDataModule

PARTS = {"train": "train_set", "val": "val_set", "test": "test_set"}


def main(words: Sequence[str] | None = None) -> Path:
    """Write the file and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("outputs/ldm"), help="run or root (outputs/ldm)")
    parser.add_argument("--part", choices=PARTS, default="test", help="of the patients (test)")
    parser.add_argument("--noisy", action="store_true", help="as measured, where the expectation is known, too")
    parser.add_argument("--output", type=Path, help="default: outputs/held_out/PART.h5, with --noisy PART_noisy.h5")
    arguments = parser.parse_args(words)
    try:
        run = newest_pretrained(arguments.run).parent
    except FileNotFoundError as error:
        raise SystemExit(f"held_out: {error}") from error
    data = data_of_run(run, SinogramDataModule)
    slices = getattr(data, PARTS[arguments.part])
    if not len(slices):
        raise SystemExit(f"held_out: {run} has no {arguments.part} slices: name another --part.")
    batch = slices[list(range(len(slices)))]
    tracers, regions = zip(*(name.split(":") for name in slices.prompt.names()), strict=True)
    noisy = arguments.noisy or batch.noise_free is None
    scan = Scan(
        (batch.sinogram if noisy else batch.expected)[:, 0].float().numpy(),
        geometry=data.geometry,
        table={
            "patient": [f"patient {i}" for i in batch.patient_id.tolist()],
            "tracer": tracers,
            "region": regions,
        },
        provenance={"data": type(data).__name__, "data_hash": data.data_hash, "part": arguments.part, "noisy": noisy},
    )
    default = Path("outputs/held_out") / f"{arguments.part}{'_noisy' if arguments.noisy else ''}.h5"
    path: Path = arguments.output or default
    path.parent.mkdir(parents=True, exist_ok=True)
    done = "Replaced" if path.exists() else "Wrote"
    write_hdf5(path, scan)
    print(f"{done} {path}: {len(slices)} slices of {len(batch.patient_id.unique())} patient(s) of {run}, "
          f"{'with' if noisy else 'without'} noise.")  # fmt: skip
    return path


if __name__ == "__main__":
    main()

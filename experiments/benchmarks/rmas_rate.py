"""Measure how fast Radon mask augmentation makes training samples.

A sample is a whole stack [positive, full, negative]: cells drawn, projected, applied. Full sinograms come from a pool
of 500, the paper's few-shot size; nothing is kept or written to disk, as in training.

    python experiments/benchmarks/rmas_rate.py --stacks 200000 --threads 1

takes about 30 s and writes outputs/reports/rmas_rate.json and .md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import allpet
from allpet.reports import FOLDER, write_report

POOL = 500
SEED = 0


def measure(stacks: int, batch: int, geometry: allpet.ParallelBeam, mask: str, domain: str) -> dict[str, object]:
    """Make so many stacks and return one row of the report.

    Args:
        stacks: how many to make; the last batch may exceed it.
        batch: stacks made at once.
        geometry: of the sinograms.
        mask: ``soft`` or ``binary``.
        domain: ``sinogram`` or ``image``.
    """
    augmentation = allpet.RadonMaskAugmentation(allpet.Radon(geometry), mask=mask, domain=domain)
    generator = torch.Generator().manual_seed(SEED)
    pool = torch.rand(POOL, 1, *geometry.sinogram_shape, generator=generator)
    began = time.perf_counter()
    stack, _, _ = augmentation(pool[:batch], generator)
    first = time.perf_counter() - began  # makes the cell table
    error = (stack[:, 0] + stack[:, 2] - stack[:, 1]).abs().max() / stack[:, 1].max()

    began = time.perf_counter()
    done = 0
    with tqdm(total=stacks, desc=f"{mask}, {domain}", unit=" stacks", mininterval=1) as progress:
        while done < stacks:
            begin = done % POOL
            sinogram = pool[begin : begin + batch]
            augmentation(sinogram, generator)
            done += len(sinogram)
            progress.update(len(sinogram))
    seconds = time.perf_counter() - began
    return {
        "mask": mask,
        "domain": domain,
        "geometry": f"{geometry.image_size}/{geometry.n_views}/{geometry.n_bins}",
        "batch": batch,
        "threads": torch.get_num_threads(),
        "stacks": done,
        "seconds": seconds,
        "rate": done / seconds,
        "first_batch_seconds": first,
        "largest_error_of_the_sum": float(error),
    }


def main() -> None:
    """Run the benchmark, print its table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--geometry", default="desk", choices=allpet.ParallelBeam.presets())
    parser.add_argument("--mask", nargs="+", default=["soft"], choices=["soft", "binary"])
    parser.add_argument("--domain", nargs="+", default=["sinogram"], choices=["sinogram", "image"])
    parser.add_argument("--output", type=Path, default=FOLDER / "rmas_rate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    geometry = allpet.ParallelBeam.preset(arguments.geometry)
    rows = [
        measure(arguments.stacks, arguments.batch, geometry, mask, domain)
        for mask in arguments.mask
        for domain in arguments.domain
    ]
    path = write_report(arguments.output.stem, rows, [SEED], arguments.output.parent)
    for row in rows:
        print(
            f"{row['mask']:>6} {row['domain']:>8} {row['geometry']}: {row['stacks']} stacks in {row['seconds']:.1f} s, "
            f"{row['rate']:.0f} per second on {row['threads']} thread(s)"
        )
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()

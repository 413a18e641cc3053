"""How fast the projector, masks and reconstruction are, beside other ways to do the same and the memory's own speed.

    python experiments/benchmarks/benchmark.py [--device cpu cuda] [--quick]      (make benchmark)

takes at most 15 minutes on two cores and writes ``outputs/reports/benchmark.json``, ``.md`` and ``.png``. A row
compares one operation with one peer: ``rate`` and ``peer_rate`` in images per second, ``ratio`` of the two; ``summary``
holds those of one thread and two batches side by side, ``ready`` how soon and in how much memory the largest geometry
can be used, ``training_step`` what share of a training step the data module takes.

Peers: ``astra_cpu``, a loop over ASTRA's 2D calls (FBP: its own algorithm); ``scipy_csr``, ASTRA's matrix in SciPy, the
whole batch at once; ``skimage``, radon and iradon; ``grid_sample``, the image turned by torch view by view; and
``bandwidth``, the rate at which this machine's memory moves the bytes that have to move: matrix once per panel of the
batch, images and sinograms once; for a mask of K cells, K rows of the table and the mask. On a GPU also ``cusparse``,
our matrix times the batch, and ``astra_cuda``, a loop over ASTRA's 2D CUDA calls. Peers that are slow are timed on one
image, or on every 4th or 16th view, and scaled; where a peer would cost out of proportion the row is missing. Peers run
on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from peers import AstraCudaLoop, AstraLoop, GridSample, Peer, ScikitImage, ScipyCSR
from torch import Tensor
from tqdm import tqdm

from allpet import ParallelBeam, Radon, astra_cuda, fbp, osem, reports
from allpet.masks import CellTable, cells_in_view, draw_cells
from allpet.system_matrix import SystemMatrix

GEOMETRIES = {
    "128/180/128": ParallelBeam(180, 128, 4.0, 128, 4.0),
    "256/256/256": ParallelBeam(256, 256, 2.4, 256, 2.4),
    "512/512/512": ParallelBeam(512, 512, 1.4, 512, 1.4),
}
SUBSETS = {"128/180/128": 10, "256/256/256": 8, "512/512/512": 8}
BATCHES = {"cpu": (1, 4, 16, 32, 64), "cuda": (1, 4, 16, 64, 128, 256, 512)}
OPERATIONS = ("project", "backproject", "masks", "fbp", "osem")
ITERATIONS = 2  # of OSEM
CELLS = 8  # of a mask
SEED = 0
READY = """
import json, re, time, torch
from allpet import ParallelBeam, Radon
start = time.perf_counter()
radon = Radon(ParallelBeam(512, 512, 1.4, 512, 1.4))
radon.project(torch.ones(1, 1, 512, 512))
projected = time.perf_counter()
radon.backproject(torch.ones(1, 1, 512, 512))
end = time.perf_counter()
# Not getrusage, whose maximum a process inherits from the one that started it.
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20
print(json.dumps({"project_seconds": projected - start, "backproject_seconds": end - projected, "peak_gib": peak}))
"""


class Setting(NamedTuple):
    """Where and on what is measured."""

    device: str
    threads: int
    geometry: str
    batch: int


def seconds_of(run: Callable[[], object], enough: float) -> float:
    """Return the median time of a call, from as many calls as fit into the time that is enough."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    if first > enough:
        return first
    times = [once() for _ in range(max(3, min(30, int(enough / max(first, 1e-6)))))]
    return statistics.median(times)


def bandwidth(device: str) -> float:
    """Return bytes per second that a copy of 256 MiB reads and writes, with the current number of threads, at best."""
    source = torch.ones(2**26, device=device)
    target = torch.zeros_like(source)  # written once, so that its pages are there
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), 0.1) for _ in range(5))


def operations(
    projector: Radon | Peer, name: str, images: Tensor, cells: Tensor | None, table: CellTable | None
) -> dict[str, Callable[[], object]]:
    """Return the calls to time, on a batch."""
    sinograms = images.new_ones(len(images), 1, *projector.sinogram_shape)
    counts = sinograms  # any positive numbers take the same time
    calls: dict[str, Callable[[], object]] = {
        "project": lambda: projector.project(images),
        "backproject": lambda: projector.backproject(sinograms),
        "fbp": lambda: projector.fbp(sinograms) if isinstance(projector, Peer) else fbp(projector, sinograms),
        "osem": lambda: osem(projector, counts, ITERATIONS, SUBSETS[name]),  # type: ignore[arg-type]
    }
    if table is not None and cells is not None:
        calls["masks"] = lambda: table.masks(cells)
    return calls


def bytes_moved(radon: Radon, operation: str, batch: int, device: torch.device) -> float:
    """Return the bytes that one image of a batch has to move."""
    rays, pixels = (4 * a * b for a, b in (radon.geometry.sinogram_shape, radon.geometry.image_shape))
    if operation == "masks":
        return (CELLS + 1) * rays
    matrix = radon._matrix(device, torch.float32)
    assert isinstance(matrix, SystemMatrix)  # only subsets of views come in parts
    weights = 8 * matrix.forward.values().numel() * len(list(matrix._panels(torch.empty(batch, 0, device=device))))
    # FBP also reads the sinogram and writes it filtered.
    return {"project": 1, "backproject": 1, "fbp": 3}.get(operation, 0) * rays + pixels + weights / batch


def peer_rates(setting: Setting, enough: float) -> dict[tuple[str, str], float]:
    """Return images per second of each (peer, operation) that is worth its time, timed on a single thread or GPU."""
    geometry, large = GEOMETRIES[setting.geometry], setting.geometry.startswith("512")
    some = slice(None, None, 16 if large else 4)
    share = len(geometry.angles[some]) / geometry.n_views
    image = torch.ones(1, 1, *geometry.image_shape)
    batch = torch.ones(2 if large else 16, 1, *geometry.image_shape)
    # Peer, its images, the share of its views that is timed, what is worth timing.
    every, both = ("project", "backproject", "fbp", "osem"), ("project", "backproject")
    plans: list[tuple[str, Callable[[], Peer], Tensor, float, tuple[str, ...]]]
    if setting.device == "cuda":
        if astra_cuda.why_unavailable():
            return {}
        plans = [("astra_cuda", lambda: AstraCudaLoop(geometry), image.cuda(), 1, every)]
    else:
        views = some if large else slice(None)
        plans = [
            ("astra_cpu", lambda: AstraLoop(geometry), image, 1, every),
            ("scipy_csr", lambda: ScipyCSR(geometry, views), batch, share if large else 1, both if large else every),
            ("skimage", lambda: ScikitImage(geometry, some), image, share, ("project", "backproject", "fbp")),
            ("grid_sample", lambda: GridSample(geometry, some), batch, share, ("project", "backproject", "fbp")),
        ]
    rates = {}
    for peer, make, images, timed, wanted in plans:
        projector = make()
        calls = operations(projector, setting.geometry, images, None, None)
        for operation in wanted:
            rates[peer, operation] = timed * len(images) / seconds_of(calls[operation], enough)
        rates[peer, "masks"] = rates[peer, "project"]  # a mask is projected as any image is
    return rates


def rows_of(
    setting: Setting, peers: dict[tuple[str, str], float], moved: float, enough: float
) -> Iterator[dict[str, Any]]:
    """Time our operations in one setting and compare each with every peer."""
    geometry = GEOMETRIES[setting.geometry]
    radon = Radon(geometry)
    images = torch.ones(setting.batch, 1, *geometry.image_shape, device=setting.device)
    table, allowed = CellTable(geometry), cells_in_view(geometry, 8)
    cells = draw_cells(setting.batch, 8, (CELLS, CELLS), torch.Generator().manual_seed(SEED), allowed)
    cells = cells.to(setting.device)
    for call in operations(radon, setting.geometry, images[:1], cells[:1], table).values():
        call()  # makes matrices and tables
    for operation, call in operations(radon, setting.geometry, images, cells, table).items():
        rate = setting.batch / seconds_of(call, enough)
        known = {peer: value for (peer, name), value in peers.items() if name == operation}
        if operation != "osem":
            known["bandwidth"] = moved / bytes_moved(radon, operation, setting.batch, images.device)
        if setting.device == "cuda" and operation != "masks" and radon._runs_on_astra(images):
            sparse = operations(Radon(geometry, backend="matrix"), setting.geometry, images, None, None)
            known["cusparse"] = setting.batch / seconds_of(sparse[operation], enough)
        for peer, peer_rate in known.items():
            yield {"operation": operation, **setting._asdict(), "rate": rate, "peer": peer, "peer_rate": peer_rate} | {
                "ratio": rate / peer_rate
            }


def readiness() -> list[dict[str, Any]]:
    """Time the first projection and the first backprojection of a process at 512, its matrix built or read again."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled"):
            run = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", READY],
                env={**os.environ, "ALLPET_CACHE": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append({"geometry": "512/512/512", "cache": cache, **json.loads(run.stdout)})
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the ratios to all peers side by side, for the fewest threads and the batches 1 and 32 (or the largest)."""
    device, threads = rows[0]["device"], rows[0]["threads"]
    own = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
    batches = {row["batch"] for row in own}
    shown = {1, 32} & batches or {max(batches)}
    summary: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in own:
        if row["batch"] in shown:
            key = (row["operation"], row["geometry"], row["batch"])
            entry = summary.setdefault(key, {name: row[name] for name in ("operation", "geometry", "batch", "rate")})
            entry[f"over_{row['peer']}"] = row["ratio"]
    return sorted(summary.values(), key=lambda entry: OPERATIONS.index(entry["operation"]))


def remarks(rows: list[dict[str, Any]], ready: list[dict[str, Any]], shares: list[dict[str, Any]]) -> str:
    """Say in words what stands above the table."""
    parts = [
        f"Images per second on {rows[0]['threads']} thread(s), and how many times those of each peer "
        f"({len(rows)} rows for all batches and threads are in the JSON file); `bandwidth` is the rate at which memory "
        "moves the bytes that have to move."
    ]
    for row in ready:
        parts.append(
            f"At {row['geometry']} with the cache {row['cache']}: first projection after {row['project_seconds']:.1f} "
            f"s, first backprojection {row['backproject_seconds']:.1f} s later, peak memory {row['peak_gib']:.2f} GiB."
        )
    for row in shares:
        parts.append(
            f"Stage 1 at scale {row['scale']}: the data module takes {100 * row['data_share']:.1f} % of a step of "
            f"{row['step_seconds']:.2g} s."
        )
    return " ".join(parts)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how often faster than each peer every operation is, over the batch."""
    names = list(dict.fromkeys(row["geometry"] for row in rows))
    where = list(dict.fromkeys((row["device"], row["threads"]) for row in rows))
    device, threads = where[0]
    batches = sorted({row["batch"] for row in rows if row["device"] == device})
    figure, axes = plt.subplots(
        len(names), len(OPERATIONS), figsize=(15, 3.2 * len(names)), sharex=True, squeeze=False, layout="constrained"
    )
    colours = {peer: f"C{k}" for k, peer in enumerate(dict.fromkeys(row["peer"] for row in rows))}
    for axis_row, geometry in zip(axes, names, strict=True):
        for axis, operation in zip(axis_row, OPERATIONS, strict=True):
            for peer, colour in colours.items():
                shown = [
                    row
                    for row in rows
                    if (row["operation"], row["geometry"], row["peer"]) == (operation, geometry, peer)
                    and (row["device"], row["threads"]) == (device, threads)
                ]
                if shown:
                    axis.plot(
                        [row["batch"] for row in shown], [row["ratio"] for row in shown], "o-", color=colour, ms=3
                    )
            axis.set(xscale="log", yscale="log", title=f"{operation}, {geometry}")
            axis.set_xticks(batches, list(map(str, batches)))
            axis.minorticks_off()
            axis.axhline(1, color="0.7", lw=0.8)
    for axis in axes[-1]:
        axis.set_xlabel("batch")
    for axis in axes[:, 0]:
        axis.set_ylabel("times the peer's rate")
    handles = [plt.Line2D([], [], color=colour, marker="o", ms=3, label=peer) for peer, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.suptitle(f"allpet on {device}, {threads} thread(s): images per second over the peer's", y=-0.02, fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def measure(devices: list[str], threads: list[int], quick: bool) -> list[dict[str, Any]]:
    """Run every setting and return the rows."""
    enough = 0.1 if quick else 1.0
    names = list(GEOMETRIES)[: 1 if quick else None]
    counts = {"cpu": threads, "cuda": threads[-1:]}
    batches = {device: BATCHES[device][1:3] if quick else BATCHES[device] for device in devices}
    plan = [(d, t, n) for d in devices for n in names for t in counts[d]]
    rows: list[dict[str, Any]] = []
    peers: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    with tqdm(total=sum(len(batches[device]) for device, _, _ in plan), unit=" settings") as progress:
        for device, count, name in plan:
            torch.set_num_threads(1)
            if (device, name) not in peers:
                progress.set_description(f"peers at {name}")
                peers[device, name] = peer_rates(Setting(device, 1, name, 1), enough / 4)
            torch.set_num_threads(count)
            moved = bandwidth(device)
            for batch in batches[device]:
                progress.set_description(f"{name}, batch {batch}, {count} thread(s), {device}")
                rows += rows_of(Setting(device, count, name, batch), peers[device, name], moved, enough / 2)
                progress.update()
    return rows


def main() -> None:
    """Run the benchmark, print its table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", nargs="+", default=available, choices=["cpu", "cuda"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--quick", action="store_true", help="smallest geometry, two batches: to try the script")
    parser.add_argument("--output", type=Path, default=reports.FOLDER)
    arguments = parser.parse_args()
    if "cuda" in arguments.device and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu.")
    from step_share import step_shares  # needs all that a training needs; the rest needs torch alone

    start = time.perf_counter()
    rows = measure(arguments.device, arguments.threads, arguments.quick)
    torch.set_num_threads(arguments.threads[-1])
    ready = [] if arguments.quick else readiness()
    shares = step_shares(arguments.quick)
    summary = summarise(rows)
    path = reports.write_report(
        "benchmark",
        rows,
        [SEED],
        arguments.output,
        title="Projector, masks and reconstruction beside their peers",
        remarks=remarks(rows, ready, shares),
        summary=summary,
        ready=ready,
        training_step=shares,
    )
    draw(rows, path.with_suffix(".png"))
    for part in (summary, ready, shares):
        print(reports.table(part) + "\n" if part else "", end="")
    print(f"{time.perf_counter() - start:.0f} s; written to {path} (.md, .png)")


if __name__ == "__main__":
    main()

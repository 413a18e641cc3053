"""Hold the simulator against what is published: untrained OSEM baselines, noise, contrast recovery, consistency, speed.

    make simulator-report

takes at most a quarter of an hour on two cores and writes outputs/reports/simulator.json and .md and two pages of
pictures, to look at: simulator.png, a row to each tracer and region, and simulator_tasks.png, one to each paired task.
Geometry and reconstruction: 168 views, 200 bins of 2.7 mm, OSEM with a resolution model, 3 iterations of 14 subsets,
then a Gaussian of 4 mm (5 mm for the liver). Published: OSEM on uEXPLORER data at dose reduction 4/20/100 reaches
36.8/29.5/20.1 dB and .956/.896/.802 against full dose (RED, Med. Image Anal. 2025); an mCT Flow recovers .285 .423 .584
.717 .701 .783 of the contrast of spheres of 10 to 37 mm.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from allpet import ParallelBeam, Radon, osem
from allpet.consistency import row_sum_variation
from allpet.metrics import coefficient_of_variation, contrast_recovery, psnr, ssim, standard_image
from allpet.reports import FOLDER, table, write_report
from allpet.simulation import LABELS, Acquisition, acquire, draw_levels, patient_slices, tracer_table
from allpet.simulation.acquisition import PSF_MM, Levels, gaussian_blur
from allpet.simulation.canvas import Canvas
from allpet.simulation.fields import Curve, Field
from allpet.simulation.solids import Solid
from allpet.simulation.tasks import TASKS, make_pairs
from data_modules.simulated import warm_up
from data_modules.slice_cache import Arrays, SliceCache, cores

REMARKS = (
    "Means over patients with 95 % confidence intervals. Images: OSEM with a resolution model, 3 iterations of 14 "
    "subsets, 168 views of 200 bins of 2.7 mm, then a Gaussian of 4 mm (liver: 5 mm); low dose against normal dose, "
    "the peak is the maximum of the normal-dose slice. OSEM on uEXPLORER data reaches 36.8/29.5/20.1 dB and "
    ".956/.896/.802 at 1/4, 1/20, 1/100 (RED, Med. Image Anal. 2025): other anatomy and another peak, so agreement, "
    "not validation. Discs lack the axial partial volume of spheres. Counts are those of a scanner without time of "
    "flight."
)
GEOMETRY = ParallelBeam(n_views=168, n_bins=200, bin_mm=2.7, image_size=200, pixel_mm=2.7)
REGIONS = ("brain", "chest", "abdomen", "pelvis")
MIX = ("brain", "chest", "abdomen", "pelvis", "brain", "chest", "abdomen", "pelvis", "brain")
REDUCTIONS = (4, 20, 100)
SPHERES_MM = (10, 13, 17, 22, 28, 37)
PROMPTS = (
    "FDG:brain",
    "DOPA:brain",
    "FDG:chest",
    "PSMA:chest",
    "FDG:abdomen",
    "PSMA:abdomen",
    "FDG:pelvis",
    "PSMA:pelvis",
)
TASK_ROWS = {
    "low_dose": ("abdomen", "FDG"),
    "attenuation": ("brain", "FDG"),
    "delayed": ("pelvis", "FDG"),
    "separation": ("abdomen", ("FDG", "PSMA")),
    "conversion": ("brain", ("FDG", "DOPA")),
}
"""Region and tracers in the picture of each task."""
_TOGETHER = 16  # images reconstructed at once
_PEAKS = {"FDG:brain": 12.0, "DOPA:brain": 3.5, "PSMA:chest": 3.0, "PSMA:abdomen": 20.0, "PSMA:pelvis": 10.0}


def reconstruct(radon: Radon, scan: Acquisition, filter_mm: float) -> Tensor:
    """Return OSEM images, ``(batch, 1, rows, columns)``, SUV."""
    factors = scan.attenuation_factor * scan.scale
    image = osem(radon, scan.prompts, 3, 14, factors, scan.scatter + scan.randoms, psf_mm=PSF_MM)
    blur = gaussian_blur(radon.geometry.image_size, filter_mm / radon.geometry.pixel_mm)
    return blur @ image @ blur


def generator(*key: int) -> torch.Generator:
    """Return the generator of one scan."""
    return torch.Generator().manual_seed(sum(1000**i * k for i, k in enumerate(key)))


def join(scans: Sequence[Acquisition]) -> Acquisition:
    """Join scans along the batch."""
    return Acquisition(*(torch.cat(field) for field in zip(*scans, strict=True)))


def measure_baselines(radon: Radon, patients: int) -> list[dict[str, Any]]:
    """Compare low-dose images with normal-dose ones: a row for each patient and dose reduction."""
    rows = []
    doses = (1, *REDUCTIONS)
    step = _TOGETHER // len(doses)
    for begin in tqdm(range(0, patients, step), desc="baselines"):
        seeds, scans = range(begin, min(begin + step, patients)), []
        for seed in seeds:
            region = MIX[seed % len(MIX)]
            phantom = patient_slices(seed, region, "FDG", 1, radon.geometry)
            levels = draw_levels([region], generator(seed, 1), spread=False)
            for reduction in doses:
                noise = generator(seed, reduction)
                body = phantom.activity, phantom.attenuation
                scans.append(acquire(radon, *body, region, noise, 1 / reduction, levels=levels))
        images = reconstruct(radon, join(scans), 4.0).unflatten(0, (len(seeds), len(doses)))
        for seed, (full, *low) in zip(seeds, images.unsqueeze(2), strict=True):
            for reduction, image in zip(REDUCTIONS, low, strict=True):
                rows.append(
                    {
                        "patient": seed,
                        "region": MIX[seed % len(MIX)],
                        "reduction": reduction,
                        "psnr": psnr(image, full).item(),
                        "ssim": ssim(image, full).item(),
                    }
                )
    return rows


def measure_liver(radon: Radon, patients: int) -> list[float]:
    """Return the coefficient of variation in a disc of 30 mm in the liver of each patient at normal dose."""
    x, y = radon.geometry.pixel_centers
    discs: list[Tensor] = []
    scans: list[Acquisition] = []
    seed = 0
    while len(scans) < patients:
        seed += 1
        phantom = patient_slices(10_000 + seed, "abdomen", "FDG", 3, radon.geometry)
        liver = phantom.labels[2].numpy() == LABELS["liver"]
        depth = ndimage.distance_transform_edt(liver) * radon.geometry.pixel_mm
        if depth.max() < 18:
            continue
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        discs.append(torch.hypot(x - x[row, column], y - y[row, column]) < 15)
        levels = draw_levels(["abdomen"], generator(seed, 1), spread=False)
        body = phantom.activity[2:], phantom.attenuation[2:]
        scans.append(acquire(radon, *body, "abdomen", generator(seed, 2), levels=levels))
    variations: list[float] = []
    for begin in tqdm(range(0, patients, _TOGETHER), desc="livers"):
        images = reconstruct(radon, join(scans[begin : begin + _TOGETHER]), 5.0)
        regions = torch.stack(discs[begin : begin + _TOGETHER]).unsqueeze(1)
        variations += coefficient_of_variation(images, regions).tolist()
    return variations


def measure_contrast(radon: Radon, realisations: int) -> list[float]:
    """Return the contrast recovery of hot discs, 4:1 in a body of water with a lung insert, averaged over noise.

    Scatter and randoms lie high in their range: the NEMA test adds activity outside the field of view.
    """
    canvas = Canvas(
        radon.geometry,
        np.zeros(1),
        [{"muscle": 1.0, "liver": 4.0, "lung": 0.0}],
        Field(np.zeros((2, 2, 2), np.float32), 10.0),
    )

    def disc(tissue: str, x: float, y: float, a: float, b: float) -> None:
        canvas.draw(Solid(tissue, *(Curve((0.0,), (value,)) for value in (x, y, a, b))))

    disc("muscle", 0, 0, 150, 115)
    disc("lung", 0, 0, 25, 25)
    places = [(57.2 * math.cos(k * math.pi / 3), 57.2 * math.sin(k * math.pi / 3)) for k in range(6)]
    for (x, y), diameter in zip(places, SPHERES_MM, strict=True):
        disc("liver", x, y, diameter / 2, diameter / 2)
    activity, mu = canvas.averaged()
    levels = Levels(*(torch.full((realisations,), value, dtype=torch.float64) for value in (8e5, 0.40, 0.35, 0.0)))
    scan = acquire(
        radon,
        torch.from_numpy(activity[0]).expand(realisations, -1, -1),
        torch.from_numpy(mu).expand(realisations, -1, -1),
        "abdomen",
        generator(7),
        levels=levels,
    )
    image = reconstruct(radon, scan, 4.0).mean((0, 1))[None, None]
    x, y = radon.geometry.pixel_centers
    # The background is the body well away from its edge, the insert and the discs.
    background = ((x / 135) ** 2 + (y / 100) ** 2 < 1) & (torch.hypot(x, y) > 37)
    for (cx, cy), diameter in zip(places, SPHERES_MM, strict=True):
        background &= torch.hypot(x - cx, y - cy) > diameter / 2 + 12
    inside = [torch.hypot(x - cx, y - cy) < d / 2 for (cx, cy), d in zip(places, SPHERES_MM, strict=True)]
    return [contrast_recovery(image, region[None, None], background[None, None], 4.0).item() for region in inside]


def measure_consistency(radon: Radon, patients: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the medians of the moment-0 residual of clean corrected and of clean attenuated sinograms by region."""
    corrected, attenuated = {}, {}
    for region in REGIONS:
        scans = []
        for seed in range(patients):
            phantom = patient_slices(20_000 + seed, region, "FDG", 2, radon.geometry)
            scans.append(acquire(radon, phantom.activity, phantom.attenuation, region, generator(seed)))
        expected = torch.cat([scan.expected for scan in scans])
        factors = torch.cat([scan.attenuation_factor for scan in scans])
        corrected[region] = row_sum_variation(expected).median().item()
        attenuated[region] = row_sum_variation(factors * expected).median().item()
    return corrected, attenuated


def measure_attenuation(radon: Radon, patients: int) -> dict[str, float]:
    """Return attenuation correction factors: middle of the head from front to back, and the largest of abdomens."""
    g = radon.geometry
    middle = slice(g.n_bins // 2 - 4, g.n_bins // 2 + 4)
    heads, raised, down = [], [], []
    for seed in range(patients):
        mu = patient_slices(20_000 + seed, "brain", "FDG", 3, g).attenuation.unsqueeze(1)
        # At view 0 s is x: no raised arm lies before or behind the middle of the head.
        heads += torch.exp(radon.project(mu))[:, 0, 0, middle].mean(-1).tolist()
        phantom = patient_slices(20_000 + seed, "abdomen", "FDG", 3, g)
        longest = torch.exp(radon.project(phantom.attenuation.unsqueeze(1))).amax((1, 2, 3))
        for inside, factor in zip(phantom.attenuation > 0.005, longest.tolist(), strict=True):
            # Arms beside the trunk are bodies of their own: count those larger than a few pixels.
            pieces = np.bincount(ndimage.label(inside.numpy())[0].ravel())[1:]
            (down if (pieces > 500 / g.pixel_mm**2).sum() > 1 else raised).append(factor)
    found = {
        "head, front to back, median": statistics.median(heads),
        "abdomen, longest line, median": statistics.median(raised),
        "abdomen, longest line, 90th percentile": float(np.percentile(raised, 90)),
        "abdomen, longest line, maximum": max(raised),
    }
    return {**found, "abdomen and both arms, longest line, maximum": max(down)} if down else found


@dataclass(frozen=True)
class Everything:
    """All that the simulator makes of a patient: rasters, expected and noisy sinogram."""

    radon: Radon

    def __call__(self, index: int) -> Arrays:
        """Return the arrays of a patient of five slices."""
        region = REGIONS[index % len(REGIONS)]
        phantom = patient_slices(30_000 + index, region, "FDG", 5, self.radon.geometry)
        scan = acquire(self.radon, phantom.activity, phantom.attenuation, region, generator(index))
        arrays = {
            "activity": phantom.activity,
            "attenuation": phantom.attenuation,
            "labels": phantom.labels,
            "expected": scan.expected[:, 0],
            "noisy": scan.corrected[:, 0],
        }
        return {name: array.numpy() for name, array in arrays.items()}

    def warm_up(self) -> None:
        """Load the projector's matrix and the average brain."""
        warm_up(self.radon)


def write_slices(preset: str, slices: int, folder: str) -> None:
    """Write slices with one process per core; leave the seconds it took beside them."""
    multiprocessing.set_start_method(None, force=True)  # a spawned process would spawn, not share what it has loaded
    simulation = Everything(Radon(ParallelBeam.preset(preset)))
    simulation.warm_up()
    begin = time.perf_counter()
    SliceCache(Path(folder, "set"), simulation, 5, what=f"patients at {preset}").fill(slices // 5, cores())
    Path(folder, "seconds").write_text(str(time.perf_counter() - begin), encoding="utf-8")


def measure_writing(preset: str, slices: int) -> dict[str, float]:
    """Return speed and memory of writing rasters and both sinograms of many slices.

    Returns:
        ``slices_per_second``; ``cpu_seconds_per_slice`` over all processes; ``share`` of the cores that were free
        for it; ``peak_mb``, the most memory of all processes together (memory that they share counted once); and
        ``slope_mb``, its growth per 1,000 slices over the second half.
    """
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_slices, args=(preset, slices, folder))
        writer.start()
        process, cpu = psutil.Process(writer.pid), 0.0
        samples: list[tuple[int, float]] = []
        while writer.is_alive():
            files = len(list(Path(folder).glob("set/*.h5")))
            try:
                family = [process, *process.children(recursive=True)]
                samples.append((100 * files, sum(_memory_mb(member) for member in family)))
                times = [member.cpu_times() for member in family]
                cpu = max(cpu, sum(time.user + time.system for time in times))
            except psutil.Error:
                continue  # one of them has just ended
            writer.join(0.5)
        if writer.exitcode:
            raise RuntimeError(f"Writing {slices} slices at {preset} failed with exit code {writer.exitcode}.")
        seconds = float(Path(folder, "seconds").read_text(encoding="utf-8"))
    late = [(n, memory) for n, memory in samples if slices / 2 <= n]
    slope = np.polyfit(*zip(*late, strict=True), 1)[0] if len({n for n, _ in late}) > 1 else math.nan
    return {
        "slices": slices,
        "slices_per_second": slices / seconds,
        "cpu_seconds_per_slice": cpu / slices,
        "share": min(1.0, cpu / seconds / cores()),
        "peak_mb": max(memory for _, memory in samples),
        "slope_mb": float(slope) * 1000,
    }


def _memory_mb(process: psutil.Process) -> float:
    """Return a process's memory, what it shares with others divided between them where the system tells."""
    memory = process.memory_full_info()
    return float(getattr(memory, "pss", memory.rss)) / 1e6


def draw_page(radon: Radon, path: Path) -> None:
    """Draw a page: three patients for each prompt, and what the scanner makes of the first."""
    columns = ("activity", "a second patient", "a third patient", "attenuation", "expected", "corrected", "OSEM")
    figure, axes = plt.subplots(len(PROMPTS), len(columns), figsize=(2.2 * len(columns), 2.2 * len(PROMPTS)))
    for row, prompt in zip(axes, PROMPTS, strict=True):
        tracer, region = prompt.split(":")
        phantoms = [patient_slices(seed, region, tracer, 5, radon.geometry) for seed in (1, 2, 3)]
        first = phantoms[0]
        scan = acquire(
            radon,
            first.activity[2:3],
            first.attenuation[2:3],
            region,
            generator(5),
            psf_mm=tracer_table(tracer).resolution_mm(),
        )
        peak = _PEAKS.get(prompt, 6.0)
        top = scan.expected.max().item()
        pictures: list[tuple[Tensor, float, str]] = [(p.activity[2], peak, "gray_r") for p in phantoms]
        pictures += [
            (first.attenuation[2], 0.018, "gray"),
            (scan.expected[0, 0], top, "gray_r"),
            (scan.corrected[0, 0], top, "gray_r"),
            (reconstruct(radon, scan, 4.0)[0, 0], peak, "gray_r"),
        ]
        for axis, (picture, high, colours) in zip(row, pictures, strict=True):
            axis.imshow(picture.numpy(), cmap=colours, vmin=0, vmax=high, aspect="auto")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(prompt)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_tasks(radon: Radon, path: Path) -> None:
    """Draw a page: input and targets of each paired task, as sinograms and as images, and the truth."""
    columns = ("input", "expected target", "noisy target", "image of the input", "image of the noisy target", "truth")
    rows = [(task, k) for task in TASKS for k in range(2 if task == "separation" else 1)]
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(2.4 * len(columns), 2.4 * len(rows)))
    for line, (task, k) in zip(axes, rows, strict=True):
        region, tracers = TASK_ROWS[task]
        pair = make_pairs(task, radon, 4, region, tracers, 5)
        given, expected, noisy = (x[2:3] for x in (pair.input, pair.expected[:, k : k + 1], pair.noisy[:, k : k + 1]))
        assert pair.activity is not None
        images = [standard_image(radon, sinogram)[0, 0] for sinogram in (given, noisy)]
        truth = pair.activity[2, k]
        # Inputs of another tracer or without attenuation correction have a scale of their own.
        same = task in ("low_dose", "delayed", "separation")
        top, peak = expected.max().item(), truth.flatten().quantile(0.998).item()
        pictures = [
            (given[0, 0], top if same and task != "separation" else given.max().item()),
            (expected[0, 0], top),
            (noisy[0, 0], top),
            (images[0], peak if same else images[0].flatten().quantile(0.998).item()),
            (images[1], peak),
            (truth, peak),
        ]
        for axis, (picture, high) in zip(line, pictures, strict=True):
            axis.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=high, aspect="auto")
            axis.set_xticks([])
            axis.set_yticks([])
        names = [tracers] if isinstance(tracers, str) else list(tracers)
        note = {
            "low_dose": f"1/{1 / pair.dose[0].item():.0f}, {names[0]}",
            "attenuation": names[0],
            "delayed": f"{pair.delay_min[0].item():.0f} min later, {names[0]}",
            "separation": f"{names[0]}+{names[-1]}: {names[k]}",
            "conversion": f"{names[0]} to {names[-1]}",
        }[task]
        line[0].set_ylabel(f"{task.replace('_', ' ')}\n{note}, {region}", fontsize=8)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and its 95 % confidence interval."""
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    """Measure, print the table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=63, help="for the baselines; a third as many livers")
    parser.add_argument("--slices", type=int, default=5000, help="written at 128 x 128; a tenth as many at 256 x 256")
    parser.add_argument("--reports", type=Path, default=FOLDER, help="folder to write to")
    arguments = parser.parse_args()
    # First: later, this process would take memory and caches from those that write.
    writing = {
        "128": measure_writing("desk", arguments.slices),
        "256": measure_writing("research", max(100, arguments.slices // 10)),
    }
    speed = {size: found["slices_per_second"] for size, found in writing.items()}
    radon = Radon(GEOMETRY)
    patients = arguments.patients
    baselines = measure_baselines(radon, patients)
    scores = {
        name: {str(r): interval([row[name] for row in baselines if row["reduction"] == r]) for r in REDUCTIONS}
        for name in ("psnr", "ssim")
    }
    liver = interval(measure_liver(radon, max(2, patients // 3)))
    contrast = measure_contrast(radon, 12)
    corrected, attenuated = measure_consistency(radon, max(2, patients // 8))
    factors = measure_attenuation(radon, max(2, patients // 4))
    rows: list[dict[str, Any]] = []
    aims = {"psnr": (35.3, 29.1, 22.3), "ssim": (0.948, 0.893, 0.829)}
    for name, unit in (("psnr", "dB"), ("ssim", "")):
        for reduction, aim in zip(REDUCTIONS, aims[name], strict=True):
            what = f"OSEM {name.upper()} at 1/{reduction} dose {unit}".strip()
            rows.append({"what": what, **scores[name][str(reduction)], "aim": aim})
    rows.append({"what": "liver COV", **liver, "aim": ".08-.12"})
    for diameter, value, aim in zip(SPHERES_MM, contrast, (0.27, 0.41, 0.55, 0.65, 0.70, 0.80), strict=True):
        rows.append({"what": f"contrast recovery {diameter} mm", "mean": value, "aim": aim})
    for region in REGIONS:
        rows.append({"what": f"moment 0, {region}, corrected", "mean": corrected[region], "aim": "<= 1e-4"})
        rows.append({"what": f"moment 0, {region}, attenuated", "mean": attenuated[region], "aim": ".05-.4"})
    ranges = {"head, front to back, median": "6-8", "abdomen, longest line, 90th percentile": "about 28"}
    for where, value in factors.items():
        rows.append({"what": f"attenuation factor, {where}", "mean": value, "aim": ranges.get(where, "")})
    for size, aim in (("128", ">= 25"), ("256", ">= 6")):
        found = writing[size]
        rows.append({"what": f"slices per second at {size}", "mean": found["slices_per_second"], "aim": aim})
        rows.append({"what": f"share of the cores that it had at {size}", "mean": found["share"]})
        rows.append({"what": f"slices per CPU second at {size}", "mean": 1 / found["cpu_seconds_per_slice"]})
        rows.append({"what": f"peak memory at {size}, MB", "mean": found["peak_mb"], "aim": "< 1500"})
    flat = writing["128"]
    at_50000 = flat["peak_mb"] + max(0.0, flat["slope_mb"]) * max(0, 50_000 - arguments.slices) / 1000
    rows.append({"what": "memory's growth per 1,000 slices at 128, MB", "mean": flat["slope_mb"], "aim": "0"})
    rows.append({"what": "peak memory of 50,000 slices at 128, MB", "mean": at_50000, "aim": "< 1500"})
    path = write_report(
        "simulator",
        rows,
        range(patients),
        arguments.reports,
        osem_psnr=scores["psnr"],
        osem_ssim=scores["ssim"],
        liver_cov=liver["mean"],
        crc=contrast,
        hl0_ac=corrected,
        hl0_nac=attenuated,
        slices_per_second=speed,
        attenuation_factors=factors,
        writing=writing,
        title="The simulator beside what is published",
        remarks=REMARKS,
        baselines=baselines,
    )
    draw_page(radon, path.with_suffix(".png"))
    draw_tasks(radon, path.with_name("simulator_tasks.png"))
    print(table(rows))
    print(f"Written to {path}, with simulator.md, simulator.png and simulator_tasks.png beside it.")


if __name__ == "__main__":
    main()

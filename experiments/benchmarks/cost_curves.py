"""What a training step costs: against batch size, against views x bins, and against the size of the data set.

    python experiments/benchmarks/cost_curves.py [--steps 7] [--quick]      (make cost-curves)

Both stages, with the laptop's networks, precision and optimiser, trained by Lightning on discs that are read from a
cache of HDF5 files, as simulated slices are: the time of a step is that from one step's end to the next's, the wait for
the batch and its augmentation included; the curve takes medians. Stage 2 encodes every batch anew
(``latent_views: 0``). Each curve is fitted by a power law, time = c * x^e. A step should not depend on the size of the
data set, |e| <= 0.1, and should grow no faster than its work, e <= 1.1 against batch size and against views x bins.
Leaves ``outputs/reports/cost_curves.json``, ``.md`` and ``.png``. Three minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from allpet import ParallelBeam, Prompt, RadonMaskAugmentation, SymmetryAugmentation
from allpet.memory_report import plan
from allpet.reports import FOLDER, table, write_report
from callbacks.figures import save_figure
from data_modules.base import LoadedData, SinogramDataModule, SinogramSet
from data_modules.slice_cache import SliceCache, StoredArray

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
FIELD_MM = 432.0
PER_PATIENT = 50
WARM_UP = 2
FLAT, PROPORTIONAL = 0.1, 1.1


@dataclass(frozen=True)
class Curve:
    """One thing that is varied, the others held.

    Attributes:
        name: of what is varied.
        x: its values.
        settings: arguments of ``step_seconds`` for each value.
        limit: largest exponent that is as it should be.
    """

    name: str
    x: Sequence[int]
    settings: Sequence[dict[str, Any]]
    limit: float


def curves_to_measure(quick: bool) -> list[Curve]:
    """Return the three curves."""
    batches = (1, 2) if quick else (2, 4, 8, 16)
    shapes = ((16, 16), (16, 32)) if quick else ((32, 40), (64, 80), (96, 120), (128, 160))
    sizes = (100, 200) if quick else (500, 5_000, 50_000)
    middle, batch = shapes[0 if quick else 1], batches[0 if quick else 1]
    return [
        Curve(
            "batch size", batches, [{"shape": middle, "batch": x, "slices": sizes[0]} for x in batches], PROPORTIONAL
        ),
        Curve(
            "views x bins",
            [views * bins for views, bins in shapes],
            [{"shape": shape, "batch": batch, "slices": sizes[0]} for shape in shapes],
            PROPORTIONAL,
        ),
        Curve("slices", sizes, [{"shape": shapes[0], "batch": 2 * batch, "slices": x} for x in sizes], FLAT),
    ]


class Discs(SinogramDataModule):
    """Slices of random discs, made once, kept in a cache and read from it when they are needed.

    Args:
        folder: of the cache.
        shape: views and bins.
        n_slices: to train on.
        batch_size: slices of a step.
        symmetric: whether they are turned and mirrored.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], n_slices: int, batch_size: int, symmetric: bool) -> None:
        symmetry = SymmetryAugmentation if symmetric else None
        super().__init__(batch_size=batch_size, augmentation=RadonMaskAugmentation, symmetry=symmetry)
        views, bins = shape
        self.geometry = ParallelBeam(views, bins, FIELD_MM / bins, bins, FIELD_MM / bins)
        self.folder, self.n_slices = folder, n_slices

    def load(self) -> LoadedData:
        """Fill the cache where slices are missing."""
        patients = -(-self.n_slices // PER_PATIENT)
        cache = SliceCache(self.folder, self._patient, PER_PATIENT)
        cache.fill(patients, workers=0)
        stored = StoredArray(cache, "sinogram", self.n_slices)
        ids = torch.arange(self.n_slices)
        prompt = Prompt.of(["FDG:brain"])
        prompts = Prompt(prompt.tracer.expand(self.n_slices), prompt.region.expand(self.n_slices))
        train = SinogramSet(stored, None, prompts, ids, ids // PER_PATIENT)
        return LoadedData(self.geometry, train, train.subset([0]), train.subset([]), f"discs-{self.n_slices}")

    def _patient(self, number: int) -> dict[str, np.ndarray]:
        """Return the exact projections of discs: chords of a circle about a centre that moves with the view."""
        random = np.random.default_rng((SEED, number))
        x, y = random.uniform(-80, 80, (2, PER_PATIENT, 1, 1))
        radius = random.uniform(40, 100, (PER_PATIENT, 1, 1))
        angles, bins = self.geometry.angles.numpy()[:, None], self.geometry.bin_centers.numpy()
        distance = bins - x * np.cos(angles) - y * np.sin(angles)
        return {"sinogram": (2 * np.sqrt(np.clip(radius**2 - distance**2, 0, None))).astype(np.float32)}


class Clock(Callback):
    """Notes when every step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        """The step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def step_seconds(stage: str, shape: tuple[int, int], batch: int, slices: int, caches: Path, steps: int) -> list[float]:
    """Train a stage for a few steps and return the seconds of each.

    Args:
        stage: "vae" or "ldm".
        shape: views and bins.
        batch: slices of a step.
        slices: of the data set.
        caches: folder of the caches.
        steps: that count; ``WARM_UP`` come before.
    """
    files = [word for name in ("defaults", stage, "scale/laptop") for word in ("-c", f"{ROOT}/experiments/{name}.yaml")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, _ = plan([*files, *(["--model.latent_views=0"] if stage == "ldm" else [])], device)
    torch.manual_seed(SEED)
    system: Any = training.make_system()
    system.geometry = None  # the data's
    data = Discs(caches / f"{shape[0]}x{shape[1]}", shape, slices, batch, stage == "vae")
    data.setup()
    system.autoencoder.scaling.set_scale(data.scale)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning advises about such a short training does not matter here
        trainer = Trainer(
            max_steps=WARM_UP + steps,
            precision=training.precision,  # type: ignore[arg-type]
            gradient_clip_val=1.0,
            callbacks=[EMAWeightAveraging(), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(system, data)
    return [after - before for before, after in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)]


def exponent(x: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent of the power law through the points, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def conclude(name: str, stage: str, found: float, limit: float) -> str:
    """Say whether a curve is as it should be."""
    if limit == FLAT:
        verdict = "flat, as it should be" if abs(found) <= limit else "not flat, but should be"
    else:
        verdict = "no faster than the work" if found <= limit else "faster than the work, which it should not"
    return f"{stage} against {name}: exponent {found:.2f}, {verdict}"


def measure(quick: bool, steps: int) -> list[dict[str, Any]]:
    """Measure both stages along all curves and return a row for each point."""
    rows = []
    with tempfile.TemporaryDirectory() as caches:
        for stage in ("vae", "ldm"):
            for curve in curves_to_measure(quick):
                for x, settings in zip(curve.x, curve.settings, strict=True):
                    seconds = step_seconds(stage, **settings, caches=Path(caches), steps=steps)
                    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
                    views, bins = settings["shape"]
                    row = {"stage": stage, "curve": curve.name, "x": x, "views": views, "bins": bins}
                    row |= {"batch": settings["batch"], "slices": settings["slices"], "step_seconds": median}
                    rows.append({**row, "step_seconds_low": low, "step_seconds_high": high})
                    print(f"{stage}, {curve.name} {x}: {median:.3f} s", flush=True)
    return rows


def fits(rows: Sequence[dict[str, Any]], curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return exponent and verdict of every curve."""
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        for curve in curves:
            points = [row for row in rows if (row["stage"], row["curve"]) == (stage, curve.name)]
            e = exponent([row["x"] for row in points], [row["step_seconds"] for row in points])
            said = conclude(curve.name, stage, e, curve.limit)
            found.append({"stage": stage, "curve": curve.name, "exponent": e, "limit": curve.limit, "said": said})
    return found


def draw(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> Figure:
    """Draw the three curves, quartiles as bars, the exponents in the legend."""
    names = list(dict.fromkeys(one["curve"] for one in found))
    figure = Figure(figsize=(4.2 * len(names), 3.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for one in (one for one in found if one["curve"] == name):
            points = [row for row in rows if (row["stage"], row["curve"]) == (one["stage"], name)]
            middle = [row["step_seconds"] for row in points]
            spread = [
                [row["step_seconds"] - row["step_seconds_low"] for row in points],
                [row["step_seconds_high"] - row["step_seconds"] for row in points],
            ]
            label = f"{one['stage']}, exponent {one['exponent']:.2f}"
            axis.errorbar([row["x"] for row in points], middle, yerr=spread, marker="o", capsize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds per step")
        # the measured points alone: what a logarithmic axis labels by itself overlaps within a decade
        ticks = sorted({row["x"] for row in rows if row["curve"] == name})
        axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            set_formatter(StrMethodFormatter("{x:g}"))
        axis.legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, fit, draw, report; return the report's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed at every point")
    parser.add_argument("--quick", action="store_true", help="two tiny points per curve: to try the script")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    rows = measure(options.quick, options.steps)
    found = fits(rows, curves_to_measure(options.quick))
    save_figure(draw(rows, found), options.output / "cost_curves.png")
    said = ". ".join(one["said"] for one in found) + "."
    remarks = f"Median seconds per training step, waiting for data included. {said}"
    path = write_report(
        "cost_curves", rows, [SEED], options.output, title="What a training step costs", remarks=remarks, fits=found
    )
    print(
        table([{name: one[name] for name in ("stage", "curve", "exponent", "limit")} for one in found]), said, sep="\n"
    )
    print(f"written to {path} (.md, .png)")
    return path


if __name__ == "__main__":
    main()

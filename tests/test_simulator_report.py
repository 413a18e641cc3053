"""The simulator's report: what it measures is what it says, and the recorded result keeps what is promised."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from allpet.geometry import ParallelBeam
from allpet.projector import Radon

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "experiments/results/simulator.json"


# Found by name, as by the processes that it starts.
sys.path.insert(0, str(ROOT / "experiments/benchmarks"))


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return importlib.import_module("simulator_report")


def test_intervals_cover_the_mean(report: ModuleType) -> None:
    found = report.interval([1.0, 2.0, 3.0, 4.0])
    assert found["mean"] == pytest.approx(2.5)
    assert found["high"] - found["mean"] == pytest.approx(1.96 * math.sqrt(5 / 3) / 2)
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])


def test_more_dose_is_nearer_to_the_full_dose(report: ModuleType) -> None:
    geometry = ParallelBeam(n_views=42, n_bins=64, bin_mm=8.0, image_size=64, pixel_mm=8.0)
    rows = report.measure_baselines(Radon(geometry), 3)
    assert [(row["patient"], row["reduction"]) for row in rows] == [(p, r) for p in range(3) for r in (4, 20, 100)]
    for patient in range(3):
        for score in ("psnr", "ssim"):
            values = [row[score] for row in rows if row["patient"] == patient]
            assert values == sorted(values, reverse=True)


def test_pages_are_drawn(report: ModuleType, tmp_path: Path) -> None:
    geometry = ParallelBeam(n_views=42, n_bins=64, bin_mm=8.0, image_size=64, pixel_mm=8.0)
    report.draw_tasks(Radon(geometry), tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").stat().st_size > 50_000


@pytest.mark.slow
def test_noise_and_contrast_are_clinical(report: ModuleType) -> None:
    radon = Radon(report.GEOMETRY)
    expected = (0.27, 0.41, 0.55, 0.65, 0.70, 0.80)
    assert report.measure_contrast(radon, 6) == pytest.approx(expected, abs=0.08)
    livers = report.measure_liver(radon, 8)
    assert 0.07 < sum(livers) / 8 < 0.13


@pytest.mark.slow
def test_writing_is_measured(report: ModuleType) -> None:
    found = report.measure_writing("laptop", 400)
    assert found["slices"] == 400
    assert 0 < found["cpu_seconds_per_slice"] < 1
    assert 100 < found["peak_mb"] < 1500


def test_the_record_keeps_what_is_promised() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert len(record["seeds"]) >= 40
    aims = {"psnr": ((35.3, 29.1, 22.3), 1.5), "ssim": ((0.948, 0.893, 0.829), 0.03)}
    for name, (values, tolerance) in aims.items():
        found = record[f"osem_{name}"]
        assert list(found) == ["4", "20", "100"]
        for reduction, value in zip(found, values, strict=True):
            assert found[reduction]["low"] < found[reduction]["mean"] < found[reduction]["high"]
            assert found[reduction]["mean"] == pytest.approx(value, abs=tolerance)
    assert 0.08 <= record["liver_cov"] <= 0.12
    assert record["crc"] == pytest.approx((0.27, 0.41, 0.55, 0.65, 0.70, 0.80), abs=0.08)
    assert max(record["hl0_ac"].values()) <= 1e-4
    assert all(0.05 < value < 0.4 for value in record["hl0_nac"].values())

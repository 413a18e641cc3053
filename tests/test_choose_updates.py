"""The table that the number of updates was read from: measured on patients of its own, and what is said of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from allpet import ParallelBeam, Radon, attenuation
from allpet.systems.paired import Restored

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import choose_updates
from studies.downstream_plan import Plan

from data_modules import PairedTask

GEOMETRY = ParallelBeam(16, 16, 27.0, 16, 27.0)


class Faint:
    """Stands for a trained bridge: the slices' expected targets, too faint."""

    def __init__(self, held_out: torch.Tensor) -> None:
        self.result = 0.7 * held_out

    def restore(self, given, condition, seeds, sampling) -> Restored:
        assert not sampling.data_consistency
        return Restored(self.result, torch.zeros_like(self.result), self.result[None])


def test_the_table_is_of_validation_patients_and_says_what_the_updates_bring(monkeypatch, tmp_path):
    asked = []

    def pairs_of(self, **given):
        asked.append(given)
        data = PairedTask("low_dose", GEOMETRY, cache=str(tmp_path / "cache"), **given)
        data.setup()
        return data

    def finetune(self, folder, seed, pairs):
        assert folder == tmp_path / "studies/downstream_low_dose/bridge-n500-seed3/train"
        validation = pairs_of(
            self, num_scans=1, val_patients=2, test_patients=1, options=choose_updates.PairOptions((4,))
        )
        return Faint(validation.val_set[list(range(len(validation.val_set)))].expected)

    monkeypatch.setattr(Plan, "pairs_of", pairs_of)
    monkeypatch.setattr(Plan, "finetune", finetune)
    monkeypatch.setattr(choose_updates, "REDUCTIONS", (4,))
    monkeypatch.setitem(choose_updates.NUMBERS, "low_dose", (2, 16))
    monkeypatch.setitem(choose_updates.NEIGHBOURHOODS, "low_dose", (0.0, 24.0))
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports")]
    choose_updates.main(["--seed", "3", "--patients", "2", *places])
    assert all(given["val_patients"] == 2 for given in asked)
    report = json.loads((tmp_path / "reports/choose_updates.json").read_text())
    ways = [(row["neighbourhood_mm"], row["updates"]) for row in report["rows"]]
    assert ways == [(0.0, 0), (0.0, 2), (0.0, 16), (24.0, 2), (24.0, 16)]
    drawn, *fitted = (row["psnr"] for row in report["rows"])
    assert min(fitted) > drawn + 1, "what is too faint is mended"
    assert report["seeds"] == [3]


def test_of_delayed_scans_the_model_carries_over_what_is_tried(monkeypatch, tmp_path):
    asked = []

    class Model:
        def restore(self, given, condition, seeds, sampling) -> Restored:
            asked.append((sampling.neighbourhood_mm, sampling.data_consistency))
            return Restored(given, torch.zeros_like(given), given[None])

    def pairs_of(self, **given):
        data = PairedTask("delayed", GEOMETRY, cache=str(tmp_path / "cache"), **given)
        data.setup()
        return data

    monkeypatch.setattr(Plan, "pairs_of", pairs_of)
    monkeypatch.setattr(Plan, "finetune", lambda *arguments: Model())
    monkeypatch.setitem(choose_updates.NUMBERS, "delayed", (4, 16))
    monkeypatch.setitem(choose_updates.NEIGHBOURHOODS, "delayed", (0.0, 24.0))
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports")]
    choose_updates.main(["--task", "delayed", "--patients", "2", *places])
    ways = [(0.0, 0), (0.0, 4), (0.0, 16), (24.0, 4), (24.0, 16)]
    assert asked == [(None, 0), *ways], "once to begin with"
    report = json.loads((tmp_path / "reports/choose_updates_delayed.json").read_text())
    assert [(row["neighbourhood_mm"], row["updates"]) for row in report["rows"]] == ways
    assert report["title"].endswith("that share them: delayed")
    assert "and the defaults: 0 alone" in report["remarks"]
    assert "reduction" not in report["remarks"], "delayed scans have none"


def test_the_defaults_are_held_beside_what_is_best_alone():
    def row(width: float, number: int, psnr: float) -> dict[str, float]:
        return {"reduction": 20, "neighbourhood_mm": width, "updates": number, "psnr": psnr} | {
            "lesion_max_bias_%": -float(number),
            "tissue_bias_%": 3.0,
        }

    rows = [row(0.0, 0, 30.0), row(0.0, 4, 32.0), row(0.0, 16, 31.0), row(24.0, 4, 35.0), row(24.0, 16, 33.0)]
    text = choose_updates.said(rows)
    assert "reduction 20: 4 alone 32.00 dB, lesions -4.0 %, tissues 3.0 %; 16 alone 31.00 dB" in text
    assert "16 among neighbours 33.00 dB, lesions -16.0 %" in text


def test_attenuation_is_tried_with_the_defaults_and_in_other_ways():
    tried = choose_updates.ways("attenuation")
    assert tried[0]["updates"] == 0
    usual = {"before": attenuation.BEFORE, "smooth_mm": attenuation.SMOOTH_MM, "unit": 1.0}
    grid = [way for way in tried if {name: way[name] for name in usual} == usual]
    assert {"neighbourhood_mm": attenuation.NEIGHBOURHOOD_MM, "updates": 32, **usual} in grid
    assert len(grid) == 17
    others = [way for way in tried if way not in grid]
    assert {(way["neighbourhood_mm"], way["updates"]) for way in others} == {(attenuation.NEIGHBOURHOOD_MM, 32)}
    assert len({tuple(way[name] for name in usual) for way in others}) == len(others) == 13

    shown = {"psnr": 30.0, "lesion_max_bias_%": -30.0, "tissue_bias_%": 9.0}
    better = {"psnr": 32.0, "lesion_max_bias_%": -20.0, "tissue_bias_%": 7.0}
    rows = [{**way, **(better if way["updates"] == 32 else shown)} for way in tried]
    text = choose_updates.said(rows)
    assert text.startswith(
        "Not fitted: 30.00 dB, lesions -30.0 %, tissues 9.0 %. The defaults: 32.00 dB, lesions -20.0"
    )
    assert "unit is that of the targets times 0.8: 32.00 dB, lesions -20.0 %, tissues 7.0 %; 1.25: 32.00 dB" in text


def test_each_way_of_attenuation_fits_by_what_it_says():
    """Without updates of the attenuation the input is taken for corrected."""
    radon = Radon(GEOMETRY)
    x, y = GEOMETRY.pixel_centers
    truth = radon.project(((x**2 + y**2) < 120**2).float()[None, None])
    uncorrected = torch.exp(-0.0096 * truth) * truth
    ways = {
        "corrected": {"neighbourhood_mm": 0.0, "updates": 4},
        "usual": {"neighbourhood_mm": 0.0, "updates": 4, "before": 20, "smooth_mm": 24.0},
        "none": {"neighbourhood_mm": 0.0, "updates": 0, "before": 20, "smooth_mm": 24.0},
    }
    results = {name: choose_updates.fitted(truth, uncorrected, radon, **way) for name, way in ways.items()}
    assert torch.equal(results["none"], truth)
    assert results["corrected"].sum() < 0.5 * truth.sum()
    assert results["usual"].sum() > 0.95 * truth.sum()
    off = choose_updates.fitted(truth, uncorrected, radon, **ways["usual"], unit=0.5)
    assert (off - results["usual"]).norm() > 0.01 * truth.norm()

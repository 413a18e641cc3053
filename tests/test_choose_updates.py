"""The table that the number of updates was read from: measured on patients of its own, and what is said of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from allpet import ParallelBeam
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
    monkeypatch.setattr(choose_updates, "NUMBERS", (2, 16))
    monkeypatch.setattr(choose_updates, "NEIGHBOURHOODS", (0.0, 24.0))
    places = ["--output", str(tmp_path / "studies"), "--reports", str(tmp_path / "reports")]
    choose_updates.main(["--seed", "3", "--patients", "2", *places])
    assert all(given["val_patients"] == 2 for given in asked)
    report = json.loads((tmp_path / "reports/choose_updates.json").read_text())
    ways = [(row["neighbourhood_mm"], row["updates"]) for row in report["rows"]]
    assert ways == [(0.0, 0), (0.0, 2), (0.0, 16), (24.0, 2), (24.0, 16)]
    drawn, *fitted = (row["psnr"] for row in report["rows"])
    assert min(fitted) > drawn + 1, "what is too faint is mended"
    assert report["seeds"] == [3]


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

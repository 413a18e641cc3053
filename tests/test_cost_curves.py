"""Cost curves: exponents of power laws, verdicts, and a cached data set of exact projections."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "benchmarks"))
import cost_curves as cost


def made_up(exponents: dict[str, float], curves: list[cost.Curve]) -> list[dict]:
    """Rows of trainings whose steps take x to the power of an exponent."""
    return [
        {
            "stage": stage,
            "curve": curve.name,
            "x": x,
            **{name: 0.01 * x ** exponents[curve.name] for name in ("step_seconds", "step_seconds_low")},
            "step_seconds_high": 0.02 * x ** exponents[curve.name],
        }
        for stage in ("vae", "ldm")
        for curve in curves
        for x in curve.x
    ]


def test_exponents_are_found_and_judged():
    curves = cost.curves_to_measure(quick=False)
    assert [curve.name for curve in curves] == ["batch size", "views x bins", "slices"]
    assert list(curves[2].x) == [500, 5_000, 50_000]
    exponents = {"batch size": 0.9, "views x bins": 1.3, "slices": 0.02}
    found = cost.fits(made_up(exponents, curves), curves)
    assert [one["exponent"] for one in found] == pytest.approx(2 * list(exponents.values()))
    assert found[0]["said"] == "vae against batch size: exponent 0.90, no faster than the work"
    assert "faster than the work, which it should not" in found[1]["said"]
    assert found[5]["said"] == "ldm against slices: exponent 0.02, flat, as it should be"
    assert "not flat" in cost.conclude("slices", "vae", 0.4, cost.FLAT)
    figure = cost.draw(made_up(exponents, curves), found)
    assert [axis.get_xlabel() for axis in figure.axes] == list(exponents)


def test_the_discs_are_read_from_the_cache_and_have_the_area_of_their_circle(tmp_path):
    data = cost.Discs(tmp_path, (12, 96), 130, 4, symmetric=False)
    data.setup()
    assert len(data.train_set) == 130
    assert not isinstance(data.train_set.sinogram, torch.Tensor), "slices come from the cache"
    batch = data.train_set[[0, 129]]
    area = batch.sinogram.sum(-1) * data.geometry.bin_mm
    radius = batch.sinogram.amax((-1, -2)) / 2
    np.testing.assert_allclose(area, (torch.pi * radius.square())[..., None].expand_as(area), rtol=0.02)
    assert not torch.equal(batch.sinogram[0], batch.sinogram[1])


def test_the_report_says_what_was_found(tmp_path, monkeypatch):
    exponents = {"batch size": 1.0, "views x bins": 1.0, "slices": 0.0}
    monkeypatch.setattr(cost, "measure", lambda quick, steps: made_up(exponents, cost.curves_to_measure(quick)))
    path = cost.main(["--output", str(tmp_path)])
    report = json.loads(path.read_text())
    assert report["remarks"].count("as it should be") == 2
    assert report["remarks"].count("no faster than the work") == 4
    assert len(report["rows"]) == 22
    assert {found["curve"] for found in report["fits"]} == set(exponents)
    assert (tmp_path / "cost_curves.png").stat().st_size > 1000

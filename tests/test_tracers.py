"""Tracers' tables: complete, read faithfully, and drawn with the moments they state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from allpet.prompts import OPEN, TRACERS
from allpet.simulation import read_tracer, tracer_table
from allpet.simulation.tissues import TISSUES
from allpet.simulation.tracers import HALF_LIFE_MIN, lognormal

NAMES = [name for name in TRACERS if name != OPEN]


@pytest.mark.parametrize("name", NAMES)
def test_every_tissue_has_an_uptake_and_every_row_a_source(name: str) -> None:
    tracer = tracer_table(name)
    assert tracer.name == name
    assert {tissue.uptake for tissue in TISSUES.values()} - {""} == tracer.uptake.keys()
    assert all(row.source and row.mean > 0 and row.late > 0 for row in tracer.uptake.values())
    assert all(row.group in ("suv", "contrast") for row in tracer.lesions.values())


def test_labels_are_distinct() -> None:
    labels = [tissue.label for tissue in TISSUES.values()]
    assert len(set(labels)) == len(labels)
    assert 0 <= min(labels) <= max(labels) < 256


def test_draws_have_the_moments_of_the_table() -> None:
    tracer, generator = tracer_table("FDG"), torch.Generator().manual_seed(1)
    draws = [tracer.draw_suv(generator) for _ in range(3000)]
    for tissue in ("grey_matter", "liver", "muscle"):
        values, row = torch.tensor([draw[tissue] for draw in draws]), tracer.uptake[tissue]
        assert values.mean().item() == pytest.approx(row.mean, rel=0.02)
        assert values.std().item() == pytest.approx(row.sd, rel=0.08)
    grey, white, muscle = (
        torch.tensor([draw[t] for draw in draws]).log() for t in ("grey_matter", "white_matter", "muscle")
    )
    # Tissues of one group vary together, so that grey to white stays in its range; others do not.
    assert torch.corrcoef(torch.stack([grey, white]))[0, 1] > 0.5
    assert abs(torch.corrcoef(torch.stack([grey, muscle]))[0, 1]) < 0.1
    ratio = (grey - white).exp()
    assert 3.2 < ratio.quantile(0.16) < ratio.quantile(0.84) < 5.0


def test_lognormal_matches_moments() -> None:
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
    values = torch.tensor([lognormal(6.0, 4.0, v) for v in z.tolist()])
    assert values.mean().item() == pytest.approx(6.0, rel=0.01)
    assert values.std().item() == pytest.approx(4.0, rel=0.02)


def test_late_uptake_belongs_to_the_same_patient() -> None:
    tracer = tracer_table("FDG")
    early, same, late = (
        tracer.draw_suv(torch.Generator().manual_seed(3), minutes)
        for minutes in (None, tracer.minutes, tracer.late_minutes)
    )
    assert early == same
    assert late["blood"] < 0.95 * early["blood"]
    assert late["grey_matter"] > early["grey_matter"]
    half = tracer.draw_suv(torch.Generator().manual_seed(3), (tracer.minutes + tracer.late_minutes) / 2)
    for tissue in early:
        assert half[tissue] == pytest.approx((early[tissue] + late[tissue]) / 2)


def test_isotopes_differ_as_they_should() -> None:
    fdg, psma = tracer_table("FDG"), tracer_table("PSMA")
    assert fdg.half_life_min / psma.half_life_min == pytest.approx(1.62, abs=0.02)
    assert math.exp(-math.log(2) * 60 / HALF_LIFE_MIN["F18"]) == pytest.approx(0.685, abs=0.001)
    assert math.exp(-math.log(2) * 120 / HALF_LIFE_MIN["Ga68"]) == pytest.approx(0.293, abs=0.001)
    assert psma.resolution_mm(4.5) > fdg.resolution_mm(4.5) > 4.5
    assert psma.resolution_mm(4.5) == pytest.approx(math.hypot(4.5, psma.positron_range_mm))


def test_a_new_tracer_is_a_file(tmp_path: Path) -> None:
    text = Path(read_tracer.__code__.co_filename).with_name("tracer_fdg.txt").read_text(encoding="utf-8")
    path = tmp_path / "tracer.txt"
    path.write_text(text.replace("name FDG", "name FET"), encoding="utf-8")
    assert read_tracer(path).uptake == tracer_table("FDG").uptake
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("liver")), encoding="utf-8")
    with pytest.raises(ValueError, match="lacks rows for liver"):
        read_tracer(path)
    path.write_text(text + "\nliver much more", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line \d+: .liver much more"):
        read_tracer(path)
    path.write_text(text.replace("isotope F18", "isotope C11"), encoding="utf-8")
    with pytest.raises(ValueError, match="C11"):
        read_tracer(path)
    with pytest.raises(ValueError, match="built in are DOPA, FDG, PSMA"):
        tracer_table("water")

"""The five paired tasks: what physics says holds between input and target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.prompts import TRACERS
from allpet.simulation import LABELS, acquire, patient_slices, tracer_table
from allpet.simulation.acquisition import Levels
from allpet.simulation.lesions import Lesion, lesion_level
from allpet.simulation.phantoms import draw_patient
from allpet.simulation.tasks import (
    TASKS,
    TWO_TRACERS,
    PairedBatch,
    PairOptions,
    Setting,
    activity_shares,
    bladder_at,
    discordant,
    draw_setting,
    make_pairs,
)
from allpet.simulation.trunk import Trunk

GEOMETRY = ParallelBeam.preset("laptop")
RADON = Radon(GEOMETRY)
STILL = Setting(0.05, 0.0, 1.0, 0.0, (0.0, 0.0), 0.0, 1.0, 1.0)


def clean(n: int, trues: float = 8e5) -> Levels:
    """Levels without scatter and randoms."""
    return Levels(*(torch.full((n,), value, dtype=torch.float64) for value in (trues, 0.0, 0.0, 0.0)))


def pairs(
    task: str, region: str = "abdomen", tracers: Any = None, n: int = 2, seed: int = 3, **more: Any
) -> PairedBatch:
    tracers = tracers or (("FDG", "PSMA") if task in TWO_TRACERS else "FDG")
    return make_pairs(task, RADON, seed, region, tracers, n, **more)


def attenuated(batch: PairedBatch) -> torch.Tensor:
    return torch.exp(-RADON.project(batch.attenuation))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item()


@pytest.mark.parametrize("task", TASKS)
def test_pairs_are_registered_finite_and_repeatable(task: str) -> None:
    batch, again, other = (pairs(task, seed=seed) for seed in (3, 3, 4))
    targets = 2 if task == "separation" else 1
    assert batch.input.shape == (2, 1, *GEOMETRY.sinogram_shape)
    assert batch.expected.shape == batch.noisy.shape == (2, targets, *GEOMETRY.sinogram_shape)
    assert batch.activity.shape == (2, targets, *GEOMETRY.image_shape)
    assert batch.attenuation.shape == batch.labels.shape == (2, 1, *GEOMETRY.image_shape)
    assert batch.labels.dtype == torch.uint8
    assert batch.prompt.names() == ["FDG:abdomen"] * 2
    assert [TASKS[i] for i in batch.task] == [task] * 2
    for first, second, third in zip(batch[:6], again[:6], other[:6], strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    # The target's truth is the image of its expectation: the same activity in every view.
    total = batch.activity.sum((2, 3)) * GEOMETRY.pixel_mm**2 / GEOMETRY.bin_mm
    torch.testing.assert_close(batch.expected.sum(3).mean(2), total, rtol=5e-3, atol=0)
    error = (batch.noisy - batch.expected).norm() / batch.expected.norm()
    assert 0.01 < error < 0.4
    assert (batch.delay_min > 0).all() == (task == "delayed")
    assert (batch.dose < 1).all() == (task == "low_dose")
    assert (batch.share < 1).all() == (task == "separation")
    shown = {"separation": ["FDG", "PSMA"], "conversion": ["PSMA"]}.get(task, ["FDG"])
    assert [TRACERS[i] for i in batch.target_tracer[1]] == shown


# ---- low dose --------------------------------------------------------------------------------------------------------


def test_low_dose_shows_the_same_slice_with_fewer_counts() -> None:
    batch = pairs("low_dose", setting=STILL, levels=clean(2))
    phantom = patient_slices(3, "abdomen", "FDG", 2, GEOMETRY)
    scan = acquire(
        RADON,
        phantom.activity,
        phantom.attenuation,
        "abdomen",
        torch.Generator(),
        psf_mm=tracer_table("FDG").resolution_mm(),
    )
    assert torch.equal(batch.expected, scan.expected)
    assert torch.equal(batch.labels[:, 0], phantom.labels)
    # Per bin, corrected noise has the variance expected / (factor * counts per SUV), so 20 times as much.
    weight = (batch.expected / attenuated(batch)).clamp_min(1e-3)
    low, normal = (((x - batch.expected).square() / weight).mean() for x in (batch.input, batch.noisy))
    assert (low / normal).item() == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("mode", ["thinning", "time"])
def test_only_thinned_noise_is_part_of_the_targets(mode: str) -> None:
    options = PairOptions(reductions=(4,), dose_mode=mode)
    batch = pairs("low_dose", n=6, options=options)
    weight = (batch.expected / attenuated(batch)).clamp_min(1.0).sqrt()
    noise = [((x - batch.expected) / weight)[batch.expected > 1] for x in (batch.input, batch.noisy)]
    assert correlation(*noise) == pytest.approx(math.sqrt(1 / 4) if mode == "thinning" else 0.0, abs=0.03)


# ---- attenuation -----------------------------------------------------------------------------------------------------


def test_uncorrected_input_holds_attenuation_and_scatter_and_the_same_counts() -> None:
    batch = pairs("attenuation", "brain", n=3)
    scatter = batch.input - attenuated(batch) * batch.noisy
    trues = attenuated(batch) * batch.expected
    # What remains of the input after attenuating the target is smooth: no noise is left, only scatter.
    assert scatter.min() > -1e-3 * batch.input.max()
    share = scatter.sum((1, 2, 3)) / (scatter + trues).sum((1, 2, 3))
    assert ((share > 0.15) & (share < 0.25)).all()
    assert scatter.diff(dim=-1).abs().max() < 0.1 * scatter.max()
    middle = slice(GEOMETRY.n_bins // 2 - 4, GEOMETRY.n_bins // 2 + 4)
    assert (batch.input[..., 0, middle].mean() / batch.expected[..., 0, middle].mean()) < 0.4


# ---- delayed ---------------------------------------------------------------------------------------------------------


def test_a_later_scan_without_delay_or_movement_is_the_same_scan() -> None:
    batch = pairs("delayed", "brain", setting=STILL, levels=clean(2, 1e9))
    torch.testing.assert_close(batch.input, batch.expected, rtol=0, atol=0.01 * batch.expected.max().item())
    assert not torch.equal(batch.noisy, batch.input)  # noise of its own


def test_a_delayed_scan_has_the_noise_of_decayed_activity() -> None:
    table = tracer_table("FDG")
    variance = []
    for delay in (0.0, table.half_life_min):
        batch = pairs("delayed", "brain", n=4, setting=STILL._replace(delay_min=delay), levels=clean(4))
        seen = batch.expected > 0.05 * batch.expected.max()
        variance.append(((batch.noisy - batch.expected).square() * attenuated(batch) / batch.expected)[seen].mean())
        assert torch.equal(batch.delay_min, torch.full((4,), delay))
    assert (variance[1] / variance[0]).item() == pytest.approx(2.0, rel=0.05)


def test_tissues_change_by_their_late_factors() -> None:
    early, late = (pairs("delayed", "chest", n=4, setting=STILL._replace(delay_min=d)) for d in (0.0, 60.0))
    table = tracer_table("FDG")
    for tissue in ("blood", "lung"):
        where = early.labels == LABELS[tissue]
        change = (late.activity[where].mean() / early.activity[where].mean()).item()
        row = table.uptake[tissue]
        assert change == pytest.approx(row.late, abs=3 * row.late_sd + 0.02)


def test_the_patient_moves_as_a_whole() -> None:
    centre = []
    for movement in ((0.0, 0.0), (4.0, -3.0)):
        batch = pairs("delayed", "chest", n=3, setting=STILL._replace(movement_mm=movement))
        x, y = GEOMETRY.pixel_centers
        body = batch.attenuation
        centre.append([((c * body).sum() / body.sum()).item() for c in (x, y)])
    assert centre[1][0] - centre[0][0] == pytest.approx(4.0, abs=0.2)
    assert centre[1][1] - centre[0][1] == pytest.approx(-3.0, abs=0.2)


def test_the_bladder_fills_or_is_voided() -> None:
    for seed in range(20):
        anatomy = draw_patient(seed, "pelvis", GEOMETRY.field_of_view_mm).anatomy
        assert isinstance(anatomy, Trunk)
        assert bladder_at(anatomy.solids) is not None
    area, activity = [], []
    for bladder, urine in ((1.0, 1.0), (1.6, 1.0), (0.3, 0.3)):
        batch = pairs("delayed", "pelvis", n=12, setting=STILL._replace(bladder=bladder, urine=urine))
        inside = batch.labels == LABELS["urine"]
        area.append(inside.sum().item())
        activity.append(batch.activity[inside].quantile(0.9).item())
    assert area[2] < area[0] < area[1]
    assert activity[1] == pytest.approx(activity[0], rel=0.05)
    assert activity[2] == pytest.approx(0.3 * activity[0], rel=0.1)


# ---- separation and conversion ---------------------------------------------------------------------------------------


def test_the_targets_sum_to_the_mix() -> None:
    batch = pairs("separation", "chest", levels=clean(2, 1e10))
    torch.testing.assert_close(
        batch.input, batch.expected.sum(1, keepdim=True), rtol=0, atol=5e-3 * batch.input.max().item()
    )
    torch.testing.assert_close(batch.share.sum(1), torch.ones(2))
    # Without lesions of their own, a target over its share is the scan of that tracer alone.
    options = PairOptions(discordance=0.0)
    mix = pairs("separation", "chest", options=options, setting=STILL)
    alone = pairs("conversion", "chest", options=options, setting=STILL)
    assert torch.equal(mix.labels, alone.labels)
    torch.testing.assert_close(
        mix.expected[:, 1:] / mix.share[:, 1:, None, None],
        alone.expected,
        rtol=1e-3,
        atol=1e-3 * alone.expected.max().item(),
    )


def test_shares_follow_injection_and_decay() -> None:
    fdg, psma = tracer_table("FDG"), tracer_table("PSMA")
    even = activity_shares(fdg, fdg, STILL)
    assert even == pytest.approx((0.5, 0.5))
    first, second = activity_shares(fdg, psma, STILL._replace(activity_ratio=2.0, stagger_min=30.0))
    assert first + second == pytest.approx(1.0)
    expected = 2.0 * 2 ** (-60 / 67.71) / 2 ** (-90 / 109.77)
    assert second / first == pytest.approx(expected, rel=1e-4)
    assert activity_shares(fdg, psma, STILL)[1] > activity_shares(fdg, psma, STILL._replace(activity_ratio=0.5))[1]


def test_a_share_of_the_lesions_is_discordant() -> None:
    tracers = [tracer_table("FDG"), tracer_table("PSMA")]
    patients = [draw_patient(seed, "pelvis", GEOMETRY.field_of_view_mm, "male") for seed in range(45)]

    def seen(share: float) -> list[tuple[bool, bool]]:
        found = []
        for concordant in patients:
            patient, tables = discordant(concordant, tracers, share)
            for lesion in patient.lesions:
                assert isinstance(lesion, Lesion)
                if any("inflammatory" in kind or "cyst" in kind for kind in lesion.kinds):
                    continue  # discordant by the tables
                levels = [lesion_level(lesion.kinds, lesion.deviation, table, None, 1.0, 1.0) for table in tables]
                found.append((levels[0] is not None, levels[1] is not None))
        return found

    assert all(first and second for first, second in seen(0.0))
    all_alone = seen(1.0)
    assert all(first != second for first, second in all_alone)
    assert 0.35 < sum(first for first, _ in all_alone) / len(all_alone) < 0.65
    some = seen(0.3)
    assert 0.2 < sum(first != second for first, second in some) / len(some) < 0.4
    assert {"lesion_bone", "bone, only PSMA"}.isdisjoint(tracer_table("PSMA").lesions)  # the tables stay as they were


def test_conversion_keeps_the_anatomy_and_changes_the_uptake() -> None:
    there, back = (pairs("conversion", "abdomen", order) for order in (("FDG", "PSMA"), ("PSMA", "FDG")))
    assert torch.equal(there.attenuation, back.attenuation)
    kidney = there.labels == LABELS["kidney"]
    assert kidney.sum() > 20
    assert there.activity[kidney].mean() > 3 * back.activity[kidney].mean()
    torch.testing.assert_close(there.input.sum((1, 2, 3)), back.expected.sum((1, 2, 3)), rtol=0.1, atol=0)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_stay_in_their_ranges() -> None:
    options = PairOptions()
    drawn = [draw_setting(torch.Generator().manual_seed(i), options) for i in range(300)]
    assert {round(1 / s.dose) for s in drawn} == set(options.reductions)
    assert all(30 <= s.delay_min <= 120 and 0 <= s.stagger_min <= 30 and 0.3 <= s.activity_ratio <= 3 for s in drawn)
    assert sum(s.activity_ratio < math.sqrt(0.9) for s in drawn) / 300 == pytest.approx(0.5, abs=0.1)  # log-uniform
    assert all(2 <= math.hypot(*s.movement_mm) <= 5 for s in drawn)
    assert 0.3 < sum(s.bladder < 1 for s in drawn) / 300 < 0.5
    assert all((s.urine < 1) == (s.bladder < 1) for s in drawn)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "denoise"}, "Unknown task 'denoise'; choose one of low_dose"),
        ({"tracers": ("FDG", "PSMA")}, "low_dose takes 1 tracer"),
        ({"task": "separation", "tracers": "FDG"}, "separation takes 2 tracer"),
        ({"task": "conversion", "tracers": ("FDG", "FDG")}, "conversion takes 2 tracer"),
        ({"tracers": "FLT"}, "no table for tracer 'FLT'"),
        ({"region": "knee"}, "Unknown region 'knee'"),
        ({"n_slices": 0}, "n_slices is 0"),
    ],
)
def test_impossible_pairs_are_refused(change: dict[str, Any], sentence: str) -> None:
    given = {
        "task": "low_dose",
        "radon": RADON,
        "seed": 1,
        "region": "chest",
        "tracers": "FDG",
        "n_slices": 1,
        **change,
    }
    with pytest.raises(ValueError, match=sentence):
        make_pairs(**given)


@pytest.mark.parametrize(
    "change",
    [
        {"reductions": ()},
        {"reductions": (0,)},
        {"dose_mode": "half"},
        {"delay_min": (60.0, 30.0)},
        {"activity_ratio": (0.0, 1.0)},
        {"discordance": 1.5},
    ],
)
def test_impossible_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} (is|are)|Unknown dose mode"):
        PairOptions(**change)

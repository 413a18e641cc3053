"""Acquisitions: counts, noise, corrections and consistency with the physics that made them."""

from __future__ import annotations

import math

import pytest
import torch

from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.simulation import Acquisition, acquire, draw_efficiency, draw_levels, patient_slices
from allpet.simulation.acquisition import BODY_COUNTS, BRAIN_COUNTS, FWHM, Levels, gaussian_blur, scatter_shape

GEOMETRY = ParallelBeam.preset("laptop")
RADON = Radon(GEOMETRY)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan(region: str = "abdomen", n: int = 3, seed: int = 1, **options: object) -> Acquisition:
    phantom = patient_slices(seed, region, "FDG", n, GEOMETRY)
    options = {"generator": generator(), **options}
    return acquire(RADON, phantom.activity, phantom.attenuation, region, **options)  # type: ignore[arg-type]


def fixed(n: int = 3, trues: float = 8e5, randoms: float = 0.3) -> Levels:
    return Levels(*(torch.full((n,), value, dtype=torch.float64) for value in (trues, 0.35, randoms, 0.0)))


def test_counts_are_those_of_the_slice() -> None:
    result = scan(levels=fixed())
    trues, scatter, randoms = (x.sum((1, 2, 3)) for x in (result.expected_trues, result.scatter, result.randoms))
    torch.testing.assert_close(trues, torch.full((3,), 8e5), rtol=1e-4, atol=0)
    torch.testing.assert_close(scatter / (scatter + trues), torch.full((3,), 0.35), rtol=1e-4, atol=0)
    torch.testing.assert_close(randoms / (randoms + scatter + trues), torch.full((3,), 0.3), rtol=1e-4, atol=0)
    total = result.prompts.sum((1, 2, 3))
    mean = trues + scatter + randoms
    assert ((total - mean).abs() < 4 * mean.sqrt()).all()
    assert torch.equal(result.prompts, result.prompts.round())
    finer = ParallelBeam(n_views=128, n_bins=160, bin_mm=2.7, image_size=80, pixel_mm=5.4)
    phantom = patient_slices(1, "abdomen", "FDG", 3, GEOMETRY)
    spread = acquire(Radon(finer), phantom.activity, phantom.attenuation, "abdomen", generator(), levels=fixed())
    torch.testing.assert_close(spread.expected_trues.sum((1, 2, 3)), trues, rtol=1e-4, atol=0)


def test_noise_has_the_mean_and_variance_of_counting() -> None:
    level = fixed(400)
    phantom = patient_slices(1, "abdomen", "FDG", 1, GEOMETRY)
    many = (x.expand(400, -1, -1) for x in (phantom.activity, phantom.attenuation))
    result = acquire(RADON, *many, "abdomen", generator(), levels=level)
    mean = (result.expected_trues + result.scatter + result.randoms)[0]
    standard = (result.prompts - mean) / mean.sqrt()
    assert standard.mean().abs() < 0.005
    assert standard.var().item() == pytest.approx(1.0, abs=0.01)
    average = result.corrected.mean(0)
    noise = (mean / 400).sqrt() / (result.attenuation_factor * result.scale)[0]
    assert ((average - result.expected[0]) / noise).pow(2).mean().item() == pytest.approx(1.0, abs=0.06)


def test_thinned_counts_are_poisson_and_correlated_with_the_full_scan() -> None:
    phantom = patient_slices(1, "abdomen", "FDG", 1, GEOMETRY)
    many = [x.expand(400, -1, -1) for x in (phantom.activity, phantom.attenuation)]
    thinned = acquire(RADON, *many, "abdomen", generator(), 0.1, mode="thinning", levels=fixed(400))
    full = acquire(RADON, *many, "abdomen", generator(), levels=fixed(400))
    mean, variance = thinned.prompts.mean(0), thinned.prompts.var(0)
    assert (variance.sum() / mean.sum()).item() == pytest.approx(1.0, abs=0.02)
    assert (thinned.prompts <= full.prompts).all()
    a, b = (x.prompts - x.prompts.mean(0) for x in (thinned, full))
    # Keeping each count with probability d correlates the two by sqrt(d).
    assert ((a * b).mean() / (a.var() * b.var()).sqrt()).item() == pytest.approx(math.sqrt(0.1), abs=0.01)


@pytest.mark.parametrize("mode", ["dose", "time", "thinning"])
def test_dose_modes_scale_randoms_as_stated(mode: str) -> None:
    full, low = scan(levels=fixed()), scan(levels=fixed(), dose=0.05, mode=mode)
    torch.testing.assert_close(low.expected_trues, 0.05 * full.expected_trues)
    torch.testing.assert_close(low.scatter, 0.05 * full.scatter)
    torch.testing.assert_close(low.randoms, (0.05**2 if mode == "dose" else 0.05) * full.randoms)
    torch.testing.assert_close(low.expected, full.expected)
    mean = (low.expected_trues + low.scatter + low.randoms).sum()
    assert abs(low.prompts.sum() - mean) < 5 * mean.sqrt()
    for result in (full, low):
        assert (result.corrected.sum() / result.expected.sum()).item() == pytest.approx(1.0, abs=0.05)
    assert (low.corrected - low.expected).norm() > 3 * (full.corrected - full.expected).norm()


def test_expected_sinograms_are_consistent_and_attenuated_ones_are_not() -> None:
    fine = ParallelBeam(n_views=48, n_bins=200, bin_mm=2.7, image_size=200, pixel_mm=2.7)
    radon = Radon(fine)
    for region in ("brain", "abdomen"):
        phantom = patient_slices(3, region, "FDG", 2, fine)
        result = acquire(radon, phantom.activity, phantom.attenuation, region, generator())
        sums = result.expected.sum(-1)
        assert (sums.std(-1) / sums.mean(-1)).max() < 2e-4
        attenuated = (result.attenuation_factor * result.expected).sum(-1)
        assert 0.02 < (attenuated.std(-1) / attenuated.mean(-1)).min() < 0.5
        # What the scanner sees of the activity is all of it: nothing is lost by the blur.
        total = phantom.activity.sum((1, 2)) * fine.pixel_mm**2
        torch.testing.assert_close(sums.mean((1, 2)) * fine.bin_mm, total, rtol=1e-3, atol=0)


def test_attenuation_factors_are_those_of_heads_and_bodies() -> None:
    middle = slice(GEOMETRY.n_bins // 2 - 3, GEOMETRY.n_bins // 2 + 3)
    front_to_back = []  # a head seen from the front has no arm in the way; s is x at view 0
    for seed in range(6):
        factors = scan("brain", 4, seed).attenuation_factor
        front_to_back.append(1 / factors[:, 0, 0, middle].mean(-1))
    heads = torch.cat(front_to_back)
    assert 4.5 < heads.median() < 9.5
    bodies = torch.cat([1 / scan("abdomen", 3, seed).attenuation_factor.amin((1, 2, 3)) for seed in range(12)])
    assert bodies.min() > 8
    assert bodies.median() < 40


def test_draws_of_levels_stay_in_range_and_depend_on_the_region() -> None:
    levels = draw_levels(["brain", "chest"] * 200, generator())
    for start, counts in ((0, BRAIN_COUNTS), (1, BODY_COUNTS)):
        trues, scatter, randoms = (x[start::2] for x in levels[:3])
        for values, (low, high) in ((trues, counts.spread), (scatter, counts.scatter), (randoms, counts.randoms)):
            assert low <= values.min() < values.max() <= high
            assert values.max() - values.min() > 0.8 * (high - low)
    assert levels.trues[::2].mean() > levels.trues[1::2].mean()
    same = draw_levels(["brain"], generator(), spread=False)
    assert same.trues.item() == BRAIN_COUNTS.trues


def test_scatter_is_wide_and_closes_on_itself() -> None:
    point = torch.zeros(1, 1, *GEOMETRY.sinogram_shape)
    point[0, 0, 0, 50] = 1
    spread = scatter_shape(GEOMETRY, point)
    s, angle = GEOMETRY.bin_centers.float(), GEOMETRY.angles.float()
    profile = spread[0, 0, 0] / spread[0, 0, 0].sum()
    centre = (profile * s).sum()
    sigma = (profile * (s - centre) ** 2).sum().sqrt()
    assert sigma.item() == pytest.approx(45.0, rel=0.1)
    # The view before the first is the last one with its bins reversed.
    torch.testing.assert_close(spread[0, 0, -1].flip(-1), spread[0, 0, 1], rtol=1e-4, atol=1e-8)
    assert spread[0, 0, len(angle) // 2].max() < 1e-6 * spread.max()


@pytest.mark.parametrize("fwhm", [0.5, 0.9, 3.0])
def test_blur_has_unit_sum_and_exact_variance(fwhm: float) -> None:
    kernel = gaussian_blur(61, fwhm)[30].double()
    offset = torch.arange(61) - 30
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (kernel * offset**2).sum().item() == pytest.approx((fwhm / FWHM) ** 2, rel=1e-5)


def test_wider_resolution_blurs_more() -> None:
    sharp, blurred = scan(psf_mm=4.5).expected, scan(psf_mm=9.0).expected
    assert blurred.diff(dim=-1).norm() < 0.97 * sharp.diff(dim=-1).norm()
    torch.testing.assert_close(blurred.sum((2, 3)), sharp.sum((2, 3)), rtol=1e-3, atol=0)


def test_efficiencies_are_corrected_and_gaps_are_empty() -> None:
    efficiency = draw_efficiency(GEOMETRY, generator(), sd=0.05, gap_every=16)
    seen = efficiency > 0
    assert efficiency.shape == GEOMETRY.sinogram_shape
    assert 0.8 < seen.float().mean() < 0.95
    assert 0.03 < efficiency[seen].std() < 0.12
    result = scan(levels=fixed(), efficiency=efficiency)
    assert result.prompts[..., ~seen].sum() == 0
    assert result.corrected[..., ~seen].abs().sum() == 0
    totals = [x[..., seen].sum().item() for x in (result.corrected, result.expected)]
    assert totals[0] == pytest.approx(totals[1], rel=0.02)
    flat = draw_efficiency(GEOMETRY, generator(), sd=0.0)
    torch.testing.assert_close(flat, torch.ones_like(flat))
    with pytest.raises(ValueError, match="beyond the ring"):
        draw_efficiency(GEOMETRY, generator(), ring_mm=100.0)


def test_the_generator_decides_everything() -> None:
    first, again, other = scan(), scan(), scan(generator=generator(5))
    assert torch.equal(first.prompts, again.prompts)
    assert not torch.equal(first.prompts, other.prompts)
    assert torch.equal(first.expected, other.expected)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="dose is 0"):
        scan(dose=0.0)
    with pytest.raises(ValueError, match="choose one of dose, time, thinning"):
        scan(mode="half")
    phantom = patient_slices(1, "brain", "FDG", 3, GEOMETRY)
    with pytest.raises(ValueError, match="2 regions for 3 slices"):
        acquire(RADON, phantom.activity, phantom.attenuation, ["brain", "chest"], generator())

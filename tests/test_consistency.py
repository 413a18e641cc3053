from __future__ import annotations

import pytest
import torch
from analytic import CENTRES, ellipse_sinogram, gaussian_sinogram, relative_error

from allpet import ParallelBeam, Radon, consistency
from allpet.symmetry import extend, roll_views

GEOMETRY = ParallelBeam(180, 128, 1.0, 128, 1.0)
LAPTOP = ParallelBeam.preset("laptop")


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    return ellipse_sinogram(GEOMETRY).float()


def poisson(clean: torch.Tensor, counts: float, batch: int = 16) -> torch.Tensor:
    expected = (clean.clamp_min(0) * (counts / clean.sum())).expand(batch, -1, -1, -1)
    return torch.poisson(expected, generator=torch.Generator().manual_seed(1))


def test_helgason_ludwig_of_analytic_sinograms(clean: torch.Tensor) -> None:
    for n_max, limit in ((5, 2e-5), (20, 1e-4), (60, 4e-4)):
        residual = consistency.helgason_ludwig_residual(clean, GEOMETRY, n_max)
        assert residual.shape == (1,)
        assert residual < limit
    assert consistency.helgason_ludwig_residual(ellipse_sinogram(LAPTOP), LAPTOP) < 5e-4


def test_helgason_ludwig_is_its_definition(clean: torch.Tensor) -> None:
    """Project the moments onto the allowed harmonics by least squares, order by order."""
    p = poisson(clean, 1e5, 1)
    edges = torch.linspace(-1, 1, GEOMETRY.n_bins + 1, dtype=torch.float64)
    angles = GEOMETRY.angles
    forbidden = total = 0.0
    for n in range(8):
        integral = torch.special.chebyshev_polynomial_t(edges, n + 1).diff() / (n + 1)
        moment = p[0, 0].double() @ integral
        allowed = [f(m * angles) for m in range(n % 2, n + 1, 2) for f in (torch.cos, torch.sin) if m or f is torch.cos]
        basis = torch.stack(allowed, dim=1)
        fit = basis @ torch.linalg.lstsq(basis, moment[:, None]).solution[:, 0]
        forbidden += float((moment - fit).square().sum())
        total += float(moment.square().sum())
    residual = consistency.helgason_ludwig_residual(p, GEOMETRY, 7)
    assert residual.item() == pytest.approx((forbidden / total) ** 0.5, rel=1e-3)


def test_helgason_ludwig_sees_what_no_image_causes(clean: torch.Tensor) -> None:
    def residual(p: torch.Tensor) -> float:
        return consistency.helgason_ludwig_residual(p, GEOMETRY).mean().item()

    assert residual(clean.roll(1, -1)) == pytest.approx(1.3e-2, rel=0.1)
    assert residual(clean.roll(4, -1)) == pytest.approx(5.3e-2, rel=0.1)
    assert residual(poisson(clean, 1e6)) == pytest.approx(4e-2, rel=0.15)
    assert residual(poisson(clean, 1e6)) / residual(poisson(clean, 1e4)) == pytest.approx(0.1, rel=0.15)
    order = torch.randperm(GEOMETRY.n_views, generator=torch.Generator().manual_seed(0))
    assert residual(clean[:, :, order]) > 0.1
    assert residual(clean.sqrt()) > 0.02
    # Turned images are images.
    assert residual(roll_views(clean, 50)) == pytest.approx(residual(clean), rel=0.05)


@pytest.mark.parametrize("n_max", [0, 1, 8, 20])
def test_correction_removes_forbidden_moments_and_nothing_else(clean: torch.Tensor, n_max: int) -> None:
    noisy = poisson(clean, 1e5, 2)
    corrected = consistency.helgason_ludwig_correction(noisy, n_max)
    assert consistency.helgason_ludwig_residual(corrected, GEOMETRY, n_max).max() < 1e-5
    assert consistency.row_sum_variation(corrected).max() < 1e-5
    if n_max >= 1:
        assert consistency.centre_residual(corrected, GEOMETRY).max() < 1e-6
    twice = consistency.helgason_ludwig_correction(corrected, n_max)
    torch.testing.assert_close(twice, corrected, atol=1e-4 * float(noisy.max()), rtol=0)
    assert relative_error(consistency.helgason_ludwig_correction(clean, n_max), clean) < 1e-4
    turned = consistency.helgason_ludwig_correction(roll_views(noisy, 70), n_max)
    torch.testing.assert_close(turned, roll_views(corrected, 70), atol=1e-4 * float(noisy.max()), rtol=0)


def test_correction_brings_noisy_sinograms_nearer_to_the_truth(clean: torch.Tensor) -> None:
    noisy = poisson(clean, 1e5, 8)
    expected = (clean.clamp_min(0) * (1e5 / clean.sum())).expand_as(noisy)
    corrected = consistency.helgason_ludwig_correction(noisy)
    assert ((corrected - expected).flatten(1).norm(dim=1) < (noisy - expected).flatten(1).norm(dim=1)).all()


def test_correction_is_computed_in_float32_whatever_the_autocast(clean: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = consistency.helgason_ludwig_correction(clean)
    torch.testing.assert_close(mixed, consistency.helgason_ludwig_correction(clean))


def test_a_correction_beyond_what_the_bins_can_tell_is_refused(clean: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"n_max is 33, but must lie in 0..32 for 180 views of 128 bins"):
        consistency.helgason_ludwig_correction(clean, 33)


@pytest.mark.parametrize("method", ["bow_tie", "helgason_ludwig", "reproject"])
def test_corrected_sinograms_are_consistent_and_nearer_to_the_truth(method: str) -> None:
    radon = Radon(LAPTOP)
    x, y = LAPTOP.pixel_centers
    disc = ((x - 30) ** 2 + y**2 < 90**2).float() + ((x + 20) ** 2 + y**2 < 30**2).float()
    clean = radon.project(disc[None, None])
    noisy = poisson(clean, 2e5, 8)
    expected = (clean * (2e5 / clean.sum())).expand_as(noisy)
    corrected = consistency.make_consistent(noisy, radon, method)
    assert corrected.min() >= 0
    assert corrected.sum() == pytest.approx(noisy.sum().item(), rel=0.01)
    before, after = (consistency.helgason_ludwig_residual(p, LAPTOP).mean() for p in (noisy, corrected))
    assert after < {"bow_tie": 0.8, "helgason_ludwig": 0.2, "reproject": 0.1}[method] * before
    assert ((corrected - expected).flatten(1).norm(dim=1) < (noisy - expected).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("n_views", [64, 62, 61])
def test_reprojection_is_as_sharp_with_any_number_of_views(n_views: int) -> None:
    """61 views have no subsets: what these would have updated, more iterations do."""
    geometry = ParallelBeam(n_views, 80, 5.4, 80, 5.4)
    radon = Radon(geometry)
    x, y = geometry.pixel_centers
    image = (x**2 + y**2 < 150**2).float() + 5 * ((x - 60) ** 2 + y**2 < 20**2).float()
    clean = radon.project(image[None, None])
    result = consistency.reproject(clean, radon, 2)
    assert (result - clean).norm() < 0.05 * clean.norm()
    assert result.max() > 0.9 * clean.max()


def _faint_and_measured(n_targets: int = 1) -> tuple[torch.Tensor, ...]:
    """Discs with spots: the truth, a result whose spots are half as hot, and a measurement of the sum."""
    radon = Radon(LAPTOP)
    x, y = LAPTOP.pixel_centers
    disc = ((x - 20) ** 2 + y**2 < 130**2).float()
    spots = torch.stack([((x - a) ** 2 + (y - b) ** 2 < 18**2).float() for a, b in ((60, 20), (-30, -50), (0, 70))])
    truth = torch.stack([disc + 3 * spots, 0.5 * disc + 2 * spots.roll(1, 0)][:n_targets], dim=1)
    faint = torch.stack([disc + 1.5 * spots, 0.5 * disc + spots.roll(1, 0)][:n_targets], dim=1)

    def project(images: torch.Tensor) -> torch.Tensor:
        return radon.project(images.flatten(0, 1)[:, None]).view(len(images), n_targets, *LAPTOP.sinogram_shape)

    expected = project(truth).sum(1, keepdim=True)
    scale = 2e5 / expected.sum((2, 3), keepdim=True)
    randoms = 2.0  # subtracted: many bins are negative
    counts = torch.poisson(scale * expected + randoms, generator=torch.Generator().manual_seed(2))
    return project(truth), project(faint), (counts - randoms) / scale, spots


def test_fitting_what_was_measured_brings_back_what_is_too_faint() -> None:
    """Nearer to the truth than the result and the measurement are; every update explains the measurement better."""
    truth, faint, measured, spots = _faint_and_measured()
    radon = Radon(LAPTOP)

    def far(p: torch.Tensor) -> float:
        return float((p - truth).norm() / truth.norm())

    def heat(p: torch.Tensor) -> torch.Tensor:
        return (consistency.quick_image(p, radon)[:, 0] * spots).sum((1, 2)) / spots.sum((1, 2))

    results = [faint, *(consistency.fit_measured(faint, measured, radon, n) for n in (1, 2, 4))]
    assert far(results[3]) < 0.7 * min(far(faint), far(measured))
    heats = torch.stack([heat(p) / heat(truth) for p in results])
    assert (heats.diff(dim=0) > 0).all(), "hotter by every update"
    assert (heats[0] < 0.68).all()
    assert (heats[3] > 0.8).all()
    inside = truth > 0.1 * truth.max()
    misfits = [float(((measured - p)[inside].square() / truth[inside]).mean()) for p in results]
    assert misfits == sorted(misfits, reverse=True)
    assert results[3].min() >= 0
    assert consistency.helgason_ludwig_residual(results[3], LAPTOP).max() < 1e-3


def test_without_neighbours_the_fit_is_that_of_shepp_and_vardi() -> None:
    _, faint, measured, _ = _faint_and_measured()
    radon = Radon(LAPTOP)
    image, empty = consistency.quick_image(faint, radon), 1e-3 * faint.amax((2, 3), keepdim=True)
    for _ in range(3):
        ratio = torch.where(radon.project(image) > empty, measured / radon.project(image), 1)
        image = image * radon.backproject(ratio).clamp_min(0) / radon.backproject(torch.ones_like(ratio))
    fitted = consistency.fit_measured(faint, measured, radon, 3, neighbourhood_mm=0)
    torch.testing.assert_close(fitted, radon.project(image), rtol=1e-4, atol=1e-4 * float(fitted.amax()))


def test_the_likelihood_of_counts_rises_by_every_update_and_neighbours_keep_their_noise_out() -> None:
    """What is too faint is brought back as far, and what is right stays quieter than where every pixel is alone."""
    truth, faint, _, spots = _faint_and_measured()
    radon = Radon(LAPTOP)
    scale = 2e5 / truth.sum((2, 3), keepdim=True)
    counts = torch.poisson(scale * truth, generator=torch.Generator().manual_seed(4))
    fitted = {n: consistency.fit_measured(faint, counts / scale, radon, n) for n in (1, 2, 4, 8, 16)}
    likelihood = [
        float((torch.special.xlogy(counts, scale * p) - scale * p)[truth > 1e-2 * truth.amax()].sum())
        for p in (consistency.reproject(faint, radon), *fitted.values())
    ]
    assert likelihood == sorted(likelihood)
    alone = consistency.fit_measured(faint, counts / scale, radon, 16, neighbourhood_mm=0)
    ours, theirs, wanted = (consistency.quick_image(p, radon) for p in (fitted[16], alone, truth))
    x, y = LAPTOP.pixel_centers
    even = ((x - 20) ** 2 + y**2 < 110**2) & (consistency.quick_image(faint, radon) < 1.1)
    even &= consistency.quick_image(faint, radon) > 0.9
    noise = [float((image - wanted)[even].std()) for image in (ours, theirs)]
    assert noise[0] < 0.5 * noise[1]
    hot = spots[:, None] > 0
    assert ours[hot].mean() > 0.85 * wanted[hot].mean()
    assert ours[hot].mean() > 0.93 * theirs[hot].mean()
    errors = [float((p - truth).norm() / truth.norm()) for p in (fitted[16], alone, faint)]
    assert errors[0] < 0.7 * min(errors[1:])


def test_every_update_explains_as_many_counts_as_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As EM does where its sensitivity is right and means and what they are shared out by are adjoint."""
    monkeypatch.setattr(consistency, "_EMPTY", 0.0)
    radon = Radon(LAPTOP)
    for n_targets in (1, 2):
        truth, faint, _, _ = _faint_and_measured(n_targets)
        counts = torch.poisson(truth.sum(1, keepdim=True), generator=torch.Generator().manual_seed(5))
        seen = consistency.reproject(faint.sum(1, keepdim=True), radon) > 0
        fitted = consistency.fit_measured(faint, counts, radon, 2)
        torch.testing.assert_close(fitted.sum((1, 2, 3)), (counts * seen).sum((1, 2, 3)), rtol=2e-5, atol=0)


def test_a_region_of_interest_is_no_neighbour_of_what_is_outside() -> None:
    """So that a lesion that the network did not draw at all is found where a clinician saw one."""
    truth, _, measured, spots = _faint_and_measured()
    radon = Radon(LAPTOP)
    x, y = LAPTOP.pixel_centers
    flat = radon.project(((x - 20) ** 2 + y**2 < 130**2).float()[None, None]).expand_as(truth)
    roi = 1 + (spots[:, None] > 0).float()
    found = [consistency.fit_measured(flat, measured, radon, 8, attention) for attention in (None, roi)]
    hot = spots[:, None] > 0
    heats = [float(consistency.quick_image(p, radon)[hot].mean()) for p in (flat, *found, truth)]
    assert heats[2] - heats[0] > 2 * (heats[1] - heats[0])
    assert heats[2] > 0.8 * heats[3]


def test_attention_hastens_the_fit_where_it_lies_and_nowhere_else() -> None:
    _, faint, measured, spots = _faint_and_measured()
    radon = Radon(LAPTOP)
    x, y = LAPTOP.pixel_centers
    inside = ((x - 60) ** 2 + (y - 20) ** 2 < 30**2)[None, None]
    plain, same, attended = (
        consistency.quick_image(consistency.fit_measured(faint, measured, radon, 3, attention), radon)
        for attention in (None, torch.ones(1, 1, *LAPTOP.image_shape), 1 + inside.float())
    )
    torch.testing.assert_close(same, plain)
    before, after = ((image[0, 0] * spots[0]).sum() / spots[0].sum() for image in (plain, attended))
    assert after > 1.05 * before
    far = ~((x - 60) ** 2 + (y - 20) ** 2 < 45**2)
    assert ((attended - plain)[..., far].norm() < 0.02 * plain[..., far].norm()).all()


@pytest.mark.parametrize("attention", [1.5, 3.0, 6.0])
def test_strong_attention_to_everything_is_as_many_more_updates(attention: float) -> None:
    """Powers of an update from 2 on would multiply the total by its error and more, back and forth."""
    truth, faint, measured, _ = _faint_and_measured()
    radon = Radon(LAPTOP)
    everywhere = torch.full((1, 1, *LAPTOP.image_shape), attention)
    for start, updates in ((faint, 4), (1.3 * truth, 8)):
        attended = consistency.fit_measured(start, measured, radon, updates, everywhere)
        plain = consistency.fit_measured(start, measured, radon, round(attention * updates))
        assert (attended - plain).norm() < 0.05 * plain.norm()


def test_fitting_keeps_totals_and_adds_nothing_where_there_is_little() -> None:
    """In a body of little uptake beside a hot organ most bins at the rim are negative as often as not."""
    radon = Radon(LAPTOP)
    x, y = LAPTOP.pixel_centers
    cold = (x / 160) ** 2 + (y / 110) ** 2 < 1
    hot = (x - 20) ** 2 + y**2 < 40**2
    truth = radon.project((0.02 * cold + hot)[None, None].float()).expand(16, -1, -1, -1)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))
    measured = truth + 0.02 * truth.max() * noise
    assert (measured < 0).double().mean() > 0.2
    rim = cold & ((x / 120) ** 2 + (y / 80) ** 2 > 1)

    def uptake(p: torch.Tensor) -> float:
        return float(consistency.quick_image(p, radon)[:, 0, rim].mean())

    fitted, cut = (consistency.fit_measured(truth, given, radon, 4) for given in (measured, measured.clamp_min(0)))
    torch.testing.assert_close(fitted.sum((1, 2, 3)), measured.sum((1, 2, 3)), rtol=0.02, atol=0)
    excess = [uptake(p) / uptake(truth) - 1 for p in (fitted, cut)]
    assert abs(excess[0]) < 0.3 * excess[1]


def test_a_result_that_explains_what_was_measured_stays() -> None:
    truth, *_ = _faint_and_measured()
    radon = Radon(LAPTOP)
    same = consistency.reproject(truth, radon)
    torch.testing.assert_close(
        consistency.fit_measured(truth, same, radon, 3), same, rtol=1e-3, atol=1e-3 * float(same.max())
    )


def test_two_targets_share_what_was_measured_as_they_share_the_activity() -> None:
    truth, faint, measured, _ = _faint_and_measured(2)
    radon = Radon(LAPTOP)
    fitted = consistency.fit_measured(faint, measured, radon, 4)
    for k in range(2):
        assert (fitted - truth)[:, k].norm() < 0.9 * (faint - truth)[:, k].norm()
    one = consistency.fit_measured(faint * torch.tensor([1.0, 0.0])[:, None, None], measured, radon, 4)
    assert (one[:, 1] == 0).all(), "a tracer that is not there gets nothing"
    alone = consistency.fit_measured(faint[:, :1], measured, radon, 4)
    torch.testing.assert_close(one[:, :1], alone, rtol=1e-5, atol=1e-5 * float(alone.max()))
    assert (consistency.fit_measured(0 * faint, measured, radon, 2) == 0).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    radon, good = Radon(LAPTOP), torch.ones(2, 1, 64, 80)
    for result, measured in ((good, good[:1]), (good, good[..., 1:]), (good[..., 1:], good[..., 1:])):
        with pytest.raises(ValueError, match=r"The shapes are .*; expected \(batch, targets, \*"):
            consistency.fit_measured(result, measured, radon, 1)
    with pytest.raises(ValueError, match=r"updates is 0, but must be at least 1"):
        consistency.fit_measured(good, good, radon, 0)
    with pytest.raises(ValueError, match=r"neighbourhood_mm is -1\.0, but must be finite and not negative"):
        consistency.fit_measured(good, good, radon, 1, neighbourhood_mm=-1.0)


def test_what_a_fit_brings_to_one_scan_is_carried_over_to_another_of_the_same() -> None:
    """A model that blurs both, and draws spots too faint, is told by the one how hot they are in the other."""
    radon = Radon(LAPTOP)
    first, blurred, measured, spots = _faint_and_measured()
    x, y = LAPTOP.pixel_centers
    disc = ((x - 20) ** 2 + y**2 < 130**2).float()
    later, faint = (radon.project((0.8 * disc + heat * spots)[:, None]) for heat in (4.5, 2.25))

    def far(p: torch.Tensor) -> float:
        return float((p - later).norm() / later.norm())

    carried = consistency.carry_over(faint, blurred, measured, radon, 16)
    assert far(carried) < 0.7 * far(faint)
    assert far(carried) < 0.5 * far(first), "what it is measured by is another scan"
    assert carried.min() >= 0
    assert consistency.helgason_ludwig_residual(carried, LAPTOP).max() < 1e-3
    itself = consistency.carry_over(blurred, blurred, measured, radon, 3)
    fitted = consistency.fit_measured(blurred, measured, radon, 3)
    torch.testing.assert_close(itself, fitted, rtol=1e-4, atol=1e-4 * float(fitted.max()))
    right = consistency.carry_over(faint, first, consistency.reproject(first, radon), radon, 3)
    stays = consistency.reproject(faint, radon)
    torch.testing.assert_close(right, stays, rtol=1e-3, atol=1e-3 * float(stays.max()))
    units = consistency.carry_over(3 * faint, 7 * blurred, 7 * measured, radon, 3)
    once = 3 * consistency.carry_over(faint, blurred, measured, radon, 3)
    torch.testing.assert_close(units, once, rtol=1e-3, atol=1e-3 * float(once.max()))


@pytest.mark.parametrize("neighbourhood_mm", [0.0, 24.0])
def test_where_the_other_scan_shows_nothing_a_result_stays(neighbourhood_mm: float) -> None:
    _, faint, measured, _ = _faint_and_measured()
    radon = Radon(LAPTOP)
    nothing = consistency.carry_over(faint, 0 * faint, measured, radon, 2, neighbourhood_mm=neighbourhood_mm)
    torch.testing.assert_close(nothing, consistency.reproject(faint, radon))


def test_what_cannot_be_carried_over_is_refused() -> None:
    radon, good = Radon(LAPTOP), torch.ones(2, 1, 64, 80)
    with pytest.raises(
        ValueError, match=r"The result's shape is \(1, 1, 64, 80\) and the reference's \(2, 1, 64, 80\)"
    ):
        consistency.carry_over(good[:1], good, good, radon, 1)
    with pytest.raises(ValueError, match=r"updates is 0, but must be at least 1"):
        consistency.carry_over(good, good, good, radon, 0)


def test_an_unknown_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="consistency is 'magic', but must be one of bow_tie, helgason_ludwig"):
        consistency.make_consistent(torch.ones(1, 1, 64, 80), Radon(LAPTOP), "magic")


def test_half_turn_over_a_full_turn(clean: torch.Tensor) -> None:
    full = extend(clean)
    assert consistency.half_turn_residual(full, GEOMETRY) == 0
    assert consistency.half_turn_residual(full.roll(1, -1), GEOMETRY) > 0.02
    doubled = torch.cat([clean, clean], dim=2)  # continued without the flip
    assert consistency.half_turn_residual(doubled, GEOMETRY) > 0.1


def test_half_turn_at_the_seam(clean: torch.Tensor) -> None:
    assert consistency.half_turn_residual(clean) < 1e-3
    assert consistency.half_turn_residual(clean, GEOMETRY) < 1e-3
    for shift, least in ((1, 0.03), (4, 0.1)):
        assert consistency.half_turn_residual(clean.roll(shift, -1)) > least
    repeated = torch.cat([clean[:, :, :1].flip(-1), clean[:, :, :-1]], dim=2)  # the end of the half turn stored too
    assert consistency.half_turn_residual(repeated[:, :, 1:]) > 2 * consistency.half_turn_residual(clean)


def test_seam_jump(clean: torch.Tensor) -> None:
    assert 0.5 < consistency.seam_jump(clean) < 2
    assert consistency.seam_jump(clean.roll(2, -1)) > 3
    unflipped = extend(clean)[:, :, 90:270]  # starts elsewhere and closes all the same
    assert 0.5 < consistency.seam_jump(unflipped) < 2


def test_row_sums(clean: torch.Tensor) -> None:
    assert consistency.row_sum_variation(clean) < 1e-6
    counts = 1e6
    noisy = consistency.row_sum_variation(poisson(clean, counts)).mean().item()
    assert noisy == pytest.approx((GEOMETRY.n_views / counts) ** 0.5, rel=0.1)
    wave = 1 + 0.1 * torch.cos(4 * GEOMETRY.angles).float()[:, None]
    assert consistency.row_sum_variation(clean * wave).item() == pytest.approx(0.1 / 2**0.5, rel=1e-3)


def test_centre_of_mass(clean: torch.Tensor) -> None:
    assert consistency.centre_residual(clean, GEOMETRY) < 1e-6
    # A constant offset is no sinusoid: with one bin it leaves sqrt(1 - 8 / pi^2) of a bin.
    shifted = consistency.centre_residual(clean.roll(1, -1), GEOMETRY).item() * GEOMETRY.n_bins
    assert shifted == pytest.approx((1 - 8 / torch.pi**2) ** 0.5, rel=1e-2)
    # The number is a fraction of the bins, whatever their width.
    for geometry in (LAPTOP, ParallelBeam(64, 160, 2.7, 160, 2.7)):
        moved = gaussian_sinogram(geometry).roll(geometry.n_bins // 80, -1)
        assert consistency.centre_residual(moved, geometry).item() == pytest.approx(0.43 / 80, rel=0.03)


def test_the_bow_tie_keeps_sinograms_and_removes_noise(clean: torch.Tensor) -> None:
    for geometry, share in ((GEOMETRY, 0.4), (LAPTOP, 0.2)):
        p = ellipse_sinogram(geometry)
        assert relative_error(consistency.bow_tie_filter(p, geometry), p) < 5e-4
        noise = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        filtered = consistency.bow_tie_filter(p + noise, geometry) - consistency.bow_tie_filter(p, geometry)
        assert filtered.square().sum() < (1 - share) * noise.square().sum()
    noisy = poisson(clean, 1e5, 2)
    filtered = consistency.bow_tie_filter(noisy, GEOMETRY)
    truth = clean * (1e5 / clean.sum())
    assert relative_error(filtered, truth.expand_as(filtered)) < 0.85 * relative_error(noisy, truth.expand_as(noisy))


def test_a_smaller_radius_removes_what_lies_outside() -> None:
    far = torch.tensor([[0.0, 50.0]], dtype=torch.float64)
    p = gaussian_sinogram(GEOMETRY, far, torch.tensor([2.0]), torch.ones(1))
    errors = [relative_error(consistency.bow_tie_filter(p, GEOMETRY, radius_mm=r), p) for r in (64, 50, 20)]
    assert errors[0] < 1e-3 < errors[1] < 0.1
    assert errors[2] > 0.5


def test_numbers_are_per_sample_and_differentiable(clean: torch.Tensor) -> None:
    batch = torch.cat([clean, clean.roll(1, -1), poisson(clean, 1e5, 1)]).requires_grad_()
    numbers = consistency.consistency_numbers(batch, GEOMETRY)
    assert set(numbers) == {"row_sum_cv", "centre_residual", "hl_residual", "seam_jump"}
    for name, value in numbers.items():
        assert value.shape == (3,), name
        alone = consistency.consistency_numbers(batch[2:].detach(), GEOMETRY)[name]
        torch.testing.assert_close(value[2:], alone, rtol=1e-3, atol=1e-7)
    (gradient,) = torch.autograd.grad(numbers["hl_residual"][1:].sum() + numbers["seam_jump"].sum(), batch)
    assert torch.isfinite(gradient).all()
    assert gradient[1].abs().max() > 0


def test_scale_does_not_matter_and_emptiness_is_consistent(clean: torch.Tensor) -> None:
    noisy = poisson(clean, 1e5, 1)
    for name, value in consistency.consistency_numbers(noisy * 1e-3, GEOMETRY).items():
        torch.testing.assert_close(value, consistency.consistency_numbers(noisy, GEOMETRY)[name], rtol=1e-3, atol=0)
    for name, value in consistency.consistency_numbers(torch.zeros_like(clean), GEOMETRY).items():
        assert value.item() == 0, name


def test_gaussians_are_where_their_sinusoid_says() -> None:
    """The centre of mass of a single blob is the sinusoid of its position (the fixture's own check)."""
    p = gaussian_sinogram(GEOMETRY, CENTRES[:1] / 4, torch.tensor([4.0]), torch.ones(1))
    centre = (p[0, 0] @ GEOMETRY.bin_centers) / p[0, 0].sum(-1)
    x, y = (CENTRES[0] / 4).tolist()
    torch.testing.assert_close(centre, x * GEOMETRY.angles.cos() + y * GEOMETRY.angles.sin(), atol=1e-6, rtol=0)


def test_bad_input_is_named(clean: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be \\(batch, 1, 64, 80\\)"):
        consistency.helgason_ludwig_residual(clean, LAPTOP)
    with pytest.raises(ValueError, match="must be \\(batch, 1, views, bins\\)"):
        consistency.seam_jump(clean[0])
    with pytest.raises(ValueError, match="at least 4 views"):
        consistency.half_turn_residual(clean[:, :, :3])

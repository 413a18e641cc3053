"""What lies between a corrected and an uncorrected sinogram is found from the two."""

from functools import partial

import pytest
import torch
from torch import Tensor

from allpet import ParallelBeam, Radon
from allpet.attenuation import BONE, WATER, explain_uncorrected, fit_uncorrected
from allpet.consistency import MeasuredFit, fit_measured, quick_image
from allpet.randomness import keyed_generator
from allpet.simulation import acquire, patient_slices
from allpet.simulation.acquisition import gaussian_blur
from allpet.simulation.tasks import make_pairs

GEOMETRY = ParallelBeam.preset("laptop")
REGIONS = ("brain", "chest", "abdomen")


@pytest.fixture(scope="module")
def radon():
    return Radon(GEOMETRY)


@pytest.fixture(scope="module")
def scans(radon):
    """Slices of a head, a chest and an abdomen with their acquisition."""
    found = []
    for region in REGIONS:
        body = patient_slices(5, region, "FDG", 2, GEOMETRY)
        scan = acquire(radon, body.activity, body.attenuation, region, keyed_generator(5, region))
        found.append((body.attenuation.view(-1, 1, *GEOMETRY.image_shape), scan))
    attenuation = torch.cat([mu for mu, _ in found])
    parts = [[getattr(scan, name) for _, scan in found] for name in ("expected", "attenuation_factor", "scatter")]
    expected, factor, scatter = (torch.cat(part) for part in parts)
    scale = torch.cat([scan.scale for _, scan in found])
    noisy = torch.cat([(scan.prompts - scan.randoms) / scan.scale for _, scan in found])
    return attenuation, expected, factor, scatter / scale, noisy


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


def test_the_truth_is_explained_by_about_the_true_attenuation_and_scatter(radon, scans):
    attenuation, expected, factor, scatter, noisy = scans
    inside = expected > 0.05 * expected.amax((2, 3), keepdim=True)
    for uncorrected in (factor * expected + scatter, noisy):
        found = explain_uncorrected(expected, uncorrected, radon)
        first = explain_uncorrected(expected, uncorrected, radon, 1).attenuation
        assert (first[:2].amax((1, 2, 3)) > 0.7 * WATER).all(), "it starts at water"
        size = found.scatter.sum((1, 2, 3)) / scatter.sum((1, 2, 3))
        assert ((size - 1).abs() < 0.1).all(), size
        error, start = (radon.project(mu - attenuation) for mu in (found.attenuation, WATER * (attenuation > 0.001)))
        assert error[inside].square().mean().sqrt() < 0.15
        assert error[4:][inside[4:]].square().mean() < 0.3 * start[4:][inside[4:]].square().mean(), (
            "lungs are not water"
        )
        assert (relative(found.factor * expected + found.scatter, factor * expected + scatter) < 0.06).all()
        torch.testing.assert_close(found.factor, torch.exp(-radon.project(found.attenuation)))


def test_where_nothing_attenuates_nothing_is_found(radon, scans):
    expected = scans[1]
    found = explain_uncorrected(expected, expected, radon, 40)
    assert (found.scatter.sum((1, 2, 3)) < 0.01 * expected.sum((1, 2, 3))).all()
    inside = expected > 0.05 * expected.amax((2, 3), keepdim=True)
    assert (1 - found.factor)[inside].mean() < 0.03


def test_units_and_company_do_not_matter(radon, scans):
    _, expected, _, _, noisy = scans
    together, alone = (
        explain_uncorrected(expected, noisy, radon),
        explain_uncorrected(7 * expected[2:3], 7 * noisy[2:3], radon),
    )
    torch.testing.assert_close(alone.attenuation, together.attenuation[2:3], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(alone.scatter, 7 * together.scatter[2:3], rtol=1e-3, atol=1e-3)


def test_attenuation_lies_between_nothing_and_bone_and_most_of_it_in_the_body(radon, scans):
    _, expected, _, _, noisy = scans
    for measured in (noisy, 0.01 * noisy, 20 * noisy):  # of whatever units
        found = explain_uncorrected(expected, measured, radon).attenuation
        assert found.isfinite().all()
        assert (found >= 0).all()
        assert (found <= BONE).all()
    usual = explain_uncorrected(expected, noisy, radon)
    assert (usual.attenuation * usual.body).sum() > 0.85 * usual.attenuation.sum()
    empty = explain_uncorrected(torch.zeros_like(expected), noisy, radon)
    assert (empty.attenuation == 0).all()
    assert (empty.factor == 1).all()


def test_what_a_network_has_blurred_is_found_again(radon, scans):
    """And a lesion that it has drawn too faint, though less than by the true attenuation and scatter."""
    _, expected, factor, scatter, _ = scans
    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in GEOMETRY.image_shape), indexing="ij")
    lesion = ((x - 4).square() + (y - 3).square() < 2.5**2).float()[None, None]
    level = (quick_image(expected, radon) * lesion).sum((1, 2, 3), keepdim=True) / lesion.sum()
    faint, truth = (expected + radon.project(more * level * lesion) for more in (0.5, 2))
    blur = gaussian_blur(GEOMETRY.image_size, 20 / GEOMETRY.pixel_mm)
    drawn = radon.project(blur @ quick_image(faint, radon) @ blur)
    measured = factor * truth + scatter

    def missing(sinogram: Tensor) -> Tensor:
        """Share of the lesion's uptake."""
        ours, theirs = ((quick_image(s, radon) * lesion).sum((1, 2, 3)) for s in (sinogram, truth))
        return 1 - ours / theirs

    fitted, found = fit_uncorrected(drawn, measured, radon, 32)
    by_truth = MeasuredFit(drawn, measured, radon, neighbourhood_mm=0)
    for _ in range(32):
        by_truth.update(factor, scatter)
    assert (missing(by_truth.sinogram) < missing(fitted)).all()
    assert (missing(fitted) < 0.8 * missing(drawn)).all()
    assert (relative(fitted, truth) < 0.9 * relative(drawn, truth)).all()
    assert (relative(found.factor * fitted + found.scatter, measured) < 0.05).all()
    assert (relative(fit_measured(drawn, measured, radon, 8), truth) > 0.5).all(), "uncorrected, it is no projection"


def test_the_fit_heeds_all_that_it_is_told(radon, scans):
    """Attention, neighbours, where it starts, and how smooth attenuation is."""
    _, expected, _, _, noisy = (part[4:] for part in scans)
    fit = partial(fit_uncorrected, expected, noisy, radon, 4)
    usual, found = fit()
    start = explain_uncorrected(expected, noisy, radon)
    again = fit(start=start)
    assert torch.equal(again[0], usual), "it starts at what is explained"
    assert torch.equal(again[1].attenuation, found.attenuation)
    assert not torch.equal(fit(start=explain_uncorrected(expected, noisy, radon, 1))[0], usual)
    smooth = fit(smooth_mm=60.0)
    wanted = fit(start=explain_uncorrected(expected, noisy, radon, smooth_mm=60.0), smooth_mm=60.0)
    assert torch.equal(smooth[1].attenuation, wanted[1].attenuation)
    roughness = [mu.diff(dim=-1)[..., 30:50, 30:50].abs().mean() for mu in (smooth[1].attenuation, found.attenuation)]
    assert roughness[0] < 0.7 * roughness[1]
    change, shared = (
        relative(one, MeasuredFit(expected, noisy, radon).sinogram) for one in (usual, fit(None, 24.0)[0])
    )
    assert (shared < 0.9 * change).all(), "neighbours share, so there is less of the noise"
    images = [quick_image(one, radon) for one in (usual, fit(torch.ones(1, 1, 80, 80))[0], fit(1 + left(radon))[0])]
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4 * float(images[0].max()))
    moved = (images[2] - images[0]).abs()
    assert moved[..., :36].mean() > 2 * moved[..., 44:].mean(), "where it attends, an update counts double"


def left(radon: Radon) -> Tensor:
    """1 on the left of an image."""
    image = torch.zeros(1, 1, *radon.geometry.image_shape)
    image[..., :40] = 1
    return image


def test_a_body_that_its_organs_outshine_is_not_squeezed(radon):
    """Of PSMA in the abdomen, kidneys and liver are all that is easily seen: the rest attenuates, too."""
    pairs = [make_pairs("attenuation", radon, seed, "abdomen", "PSMA", 2) for seed in (40, 44, 48)]
    truth, given = (torch.cat([getattr(one, name) for one in pairs]) for name in ("expected", "input"))
    blur = gaussian_blur(GEOMETRY.image_size, 20 / GEOMETRY.pixel_mm)
    drawn = radon.project(blur @ quick_image(truth, radon) @ blur)
    fitted, _ = fit_uncorrected(drawn, given, radon, 32)
    assert (relative(fitted, truth) < relative(drawn, truth)).all()
    kept, _ = fit_uncorrected(truth, given, radon, 32)
    assert ((kept.sum((1, 2, 3)) / truth.sum((1, 2, 3)) - 1).abs() < 0.05).all()


def test_what_attenuates_beside_the_body_is_found_there(radon, scans):
    """A bed, which shows no activity, is not laid upon the body."""
    attenuation, expected, _, scatter, _ = scans
    bed = torch.zeros_like(attenuation)
    bed[..., 66:69, 15:65] = 0.006
    bed = bed * (attenuation < 0.001)
    beside = []
    for mu in (attenuation, attenuation + bed):
        measured = torch.exp(-radon.project(mu)) * expected + scatter
        fitted, found = fit_uncorrected(expected, measured, radon, 32)
        beside.append((found.attenuation * ~found.body).sum())
        assert ((fitted.sum((1, 2, 3)) / expected.sum((1, 2, 3)) - 1).abs() < 0.05).all()
    assert beside[1] > 1.5 * beside[0]


def test_bins_that_measure_nothing_say_nothing(radon, scans):
    """Of factors that are zero there is no ratio."""
    _, expected, factor, scatter, _ = scans
    gap = torch.ones_like(factor)
    gap[..., 30:34] = 0
    fit = MeasuredFit(expected, gap * (factor * expected + scatter), radon, neighbourhood_mm=0)
    for _ in range(4):
        fit.update(gap * factor, gap * scatter)
    assert fit.sinogram.isfinite().all()
    assert (relative(fit.sinogram, expected) < 0.1).all()


def test_true_terms_make_the_truth_a_fixed_point(radon, scans):
    _, expected, factor, scatter, _ = scans
    fit = MeasuredFit(expected, expected, radon)
    truth = fit.sinogram
    fit.measured = factor * truth + scatter
    for _ in range(3):
        fit.update(factor, scatter)
    assert (relative(fit.sinogram, truth) < 1e-5).all()
    fit.update()
    assert (relative(fit.sinogram, truth) > 0.05).all()


def test_shapes_that_do_not_fit_are_refused(radon, scans):
    expected = scans[1]
    for first, second, updates in (
        (expected, expected[:1], 3),
        (expected[..., 1:], expected, 3),
        (expected, expected, 0),
    ):
        with pytest.raises(ValueError, match=r"updates is \d and the shapes are .* expected at least 1 and twice"):
            explain_uncorrected(first, second, radon, updates)
    with pytest.raises(ValueError, match="updates is 0, but must be at least 1"):
        fit_uncorrected(expected, expected, radon, 0)

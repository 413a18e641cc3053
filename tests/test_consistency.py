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

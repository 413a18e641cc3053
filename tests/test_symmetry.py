from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from analytic import CENTRES, HEIGHTS, SIGMAS, ellipse_sinogram, gaussian_sinogram, relative_error, smooth_image
from torch import Tensor

from allpet import ParallelBeam, Radon, Sampling, SymmetryAugmentation, symmetry
from allpet.consistency import consistency_numbers, helgason_ludwig_residual
from allpet.simulation import patient_slices

GEOMETRY = ParallelBeam(64, 128, 4.0, 128, 4.0)
ODD = ParallelBeam(45, 101, 5.0, 101, 5.0)
TARGETS = [
    ParallelBeam(96, 168, 3.05, 168, 3.05),
    ParallelBeam(180, 128, 4.0, 128, 4.0),
    ParallelBeam(256, 400, 1.3, 400, 1.3),
    ParallelBeam(48, 80, 6.4, 80, 6.4),
    ParallelBeam(50, 91, 5.6, 91, 5.6),
]


def turned(angle: float) -> Tensor:
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return CENTRES @ turn.T


@pytest.mark.parametrize("geometry", [GEOMETRY, ODD])
def test_permutations_are_exact(geometry: ParallelBeam) -> None:
    p = gaussian_sinogram(geometry)
    step = math.pi / geometry.n_views
    cases = {
        "half turn": (symmetry.half_turn(p), -CENTRES),
        "reflect x": (symmetry.reflect_x(p), CENTRES * torch.tensor([-1, 1])),
        "reflect y": (symmetry.reflect_y(p), CENTRES * torch.tensor([1, -1])),
        "5 views": (symmetry.roll_views(p, 5), turned(5 * step)),
        "more than half a turn": (symmetry.roll_views(p, geometry.n_views + 7), turned(math.pi + 7 * step)),
        "backwards": (symmetry.roll_views(p, -3), turned(-3 * step)),
    }
    for name, (moved, centres) in cases.items():
        assert relative_error(moved, gaussian_sinogram(geometry, centres)) < 1e-13, name


def test_permutations_form_a_group() -> None:
    p = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(symmetry.half_turn(p), symmetry.roll_views(p, 16))
    assert torch.equal(symmetry.reflect_x(symmetry.reflect_x(p)), p)
    assert torch.equal(symmetry.reflect_x(symmetry.reflect_y(p)), symmetry.half_turn(p))
    assert torch.equal(symmetry.roll_views(p, 32), p)
    assert torch.equal(symmetry.roll_views(symmetry.roll_views(p, 5), 9), symmetry.roll_views(p, 14))


def test_the_double_cover_is_periodic() -> None:
    p = gaussian_sinogram(GEOMETRY)
    full = symmetry.extend(p)
    steps = (full - full.roll(1, dims=-2)).norm(dim=-1).flatten()
    assert steps.max() < 2 * steps.mean()


@pytest.mark.parametrize("geometry", [GEOMETRY, ODD])
def test_rotation_by_any_angle(geometry: ParallelBeam) -> None:
    p = gaussian_sinogram(geometry)
    for angle in (0.01, 0.7, -2.0, 3.5):
        assert relative_error(symmetry.rotate(p, angle), gaussian_sinogram(geometry, turned(angle))) < 1e-4
    step = math.pi / geometry.n_views
    assert relative_error(symmetry.rotate(p, 4 * step), symmetry.roll_views(p, 4)) < 1e-12


def test_translation() -> None:
    moved = symmetry.translate(gaussian_sinogram(GEOMETRY), GEOMETRY, 13.3, -20.1)
    expected = gaussian_sinogram(GEOMETRY, CENTRES + torch.tensor([13.3, -20.1], dtype=torch.float64))
    assert relative_error(moved, expected) < 1e-6


@pytest.mark.parametrize("factor", [0.8, 0.97, 1.2])
def test_dilation(factor: float) -> None:
    moved = symmetry.dilate(gaussian_sinogram(GEOMETRY), GEOMETRY, factor)
    expected = gaussian_sinogram(GEOMETRY, CENTRES * factor, SIGMAS * factor)
    assert relative_error(moved, expected) < 2e-3  # the averages over bins are not dilated with the object


def test_blur() -> None:
    fwhm = 8.0
    wider = (SIGMAS**2 + fwhm**2 / (8 * math.log(2))).sqrt()
    expected = gaussian_sinogram(GEOMETRY, CENTRES, wider, HEIGHTS * (SIGMAS / wider) ** 2)
    assert relative_error(symmetry.blur(gaussian_sinogram(GEOMETRY), GEOMETRY, fwhm), expected) < 1e-6


@pytest.mark.parametrize(
    "operation",
    [
        lambda p, v: symmetry.rotate(p, v),
        lambda p, v: symmetry.translate(p, GEOMETRY, 10 * v, -7 * v),
        lambda p, v: symmetry.dilate(p, GEOMETRY, 1 + v / 10),
        lambda p, v: symmetry.blur(p, GEOMETRY, 5 * v),
    ],
)
def test_parameters_are_per_sample_and_results_differentiable(operation) -> None:  # type: ignore[no-untyped-def]
    p = ellipse_sinogram(GEOMETRY).float().repeat(3, 2, 1, 1)
    values = torch.tensor([0.2, 0.9, 1.4])
    together = operation(p, values)
    for i, value in enumerate(values.tolist()):
        torch.testing.assert_close(together[i : i + 1], operation(p[i : i + 1], value), rtol=1e-4, atol=1e-3)
    assert together.dtype == torch.float32
    values.requires_grad_()
    p.requires_grad_()
    gradients = torch.autograd.grad(operation(p, values).square().sum(), (p, values))
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


def test_whole_views_may_differ_between_samples() -> None:
    p = torch.rand(3, 1, 16, 20, generator=torch.Generator().manual_seed(0))
    rolled = symmetry.roll_views(p, torch.tensor([0, 3, -5]))
    for i, views in enumerate((0, 3, -5)):
        assert torch.equal(rolled[i : i + 1], symmetry.roll_views(p[i : i + 1], views))


def stronger(counts: Tensor, factor: float) -> Tensor:
    augmentation = SymmetryAugmentation(GEOMETRY, rotation=False, reflection=False, gain=(factor, factor))
    return augmentation(counts, torch.Generator().manual_seed(0))[0]


def test_a_gain_makes_the_variance_of_counts_another_than_their_mean() -> None:
    counts = torch.poisson(torch.full((1, 1, 64, 128), 20.0), generator=torch.Generator().manual_seed(0))
    for factor in (0.8, 1.25):
        moved = stronger(counts, factor)
        assert float(moved.var() / moved.mean()) == pytest.approx(factor, rel=0.05)


def test_only_permutations_are_said_to_preserve_poisson_noise() -> None:
    public = {n for n, f in inspect.getmembers(symmetry, inspect.isfunction) if f.__module__ == symmetry.__name__}
    named = {n for n in public if not n.startswith("_")} - {"extend", "strip"}
    assert set(symmetry.PRESERVES_POISSON) == named | {"gain"}
    counts = torch.poisson(torch.full((1, 1, 64, 128), 5.0), generator=torch.Generator().manual_seed(0))
    moved = {
        "roll_views": symmetry.roll_views(counts, 9),
        "half_turn": symmetry.half_turn(counts),
        "reflect_x": symmetry.reflect_x(counts),
        "reflect_y": symmetry.reflect_y(counts),
        "rotate": symmetry.rotate(counts, 0.3),
        "translate": symmetry.translate(counts, GEOMETRY, 1.0, 1.0),
        "dilate": symmetry.dilate(counts, GEOMETRY, 1.1),
        "blur": symmetry.blur(counts, GEOMETRY, 4.0),
        "gain": stronger(counts, 1.25),
        "resample": symmetry.resample(counts, GEOMETRY, TARGETS[3]),
    }
    for name, value in moved.items():
        same_counts = torch.equal(value.flatten().sort().values, counts.flatten().sort().values)
        assert same_counts == symmetry.PRESERVES_POISSON[name], name
    assert set(symmetry.PRESERVES_POISSON) - set(moved) == {"thinning_mixup"}, "no permutation: tested below"


def test_thinned_mixtures_of_counts_are_poisson_and_plain_ones_are_not() -> None:
    n, low, high, share = 400, 4.0, 30.0, 0.3
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.poisson(torch.full((n, 1, 16, 20), mean), generator) for mean in (low, high))
    owned = [torch.Generator().manual_seed(i) for i in range(n)]
    mixed = symmetry.thinning_mixup(first, second, share, owned)
    mean = share * low + (1 - share) * high
    assert float(mixed.mean()) == pytest.approx(mean, rel=0.005)
    assert float(mixed.var()) == pytest.approx(mean, rel=0.02)
    exact = torch.distributions.Poisson(mean).log_prob(torch.arange(60.0)).exp()
    shares = mixed.long().flatten().bincount(minlength=60)[:60] / mixed.numel()
    assert float((shares - exact).abs().max()) < 0.002
    assert abs(float((mixed[..., 1:] * mixed[..., :-1]).mean()) / mean**2 - 1) < 0.002, "neighbours are independent"
    assert float((share * first + (1 - share) * second).var()) < 0.8 * mean


def test_thinning_is_per_sample_and_keeps_whole_patients_at_its_ends() -> None:
    counts = torch.poisson(torch.full((2, 3, 1, 8, 8), 9.0), torch.Generator().manual_seed(0))
    share = torch.tensor([1.0, 0.0, 0.4])
    mixed = symmetry.thinning_mixup(*counts, share, [torch.Generator().manual_seed(i) for i in range(3)])
    assert torch.equal(mixed[0], counts[0, 0])
    assert torch.equal(mixed[1], counts[1, 1])
    alone = symmetry.thinning_mixup(*counts[:, 2:], 0.4, [torch.Generator().manual_seed(2)])
    assert torch.equal(mixed[2:], alone)


@pytest.mark.parametrize("target", TARGETS)
def test_resampling_is_direct_projection(target: ParallelBeam) -> None:
    source = ParallelBeam(128, 128, 4.0, 128, 4.0)
    p = gaussian_sinogram(source)
    resampled = symmetry.resample(p, source, target)
    assert resampled.shape[-2:] == target.sinogram_shape
    assert relative_error(resampled, gaussian_sinogram(target)) < 1e-5
    # Objects with edges are not band-limited; what is lost is below the projector's own error.
    p = ellipse_sinogram(source)
    scaled = symmetry.resample(p, source, target)
    same_view = ParallelBeam(target.n_views, 128, 4.0, 128, 4.0)
    assert relative_error(symmetry.resample(scaled, target, same_view), ellipse_sinogram(same_view)) < 1.2e-2


@pytest.mark.parametrize("target", TARGETS)
def test_resampling_keeps_counts_and_consistency(target: ParallelBeam) -> None:
    source = ParallelBeam(128, 128, 4.0, 128, 4.0)
    p = ellipse_sinogram(source)
    resampled = symmetry.resample(p, source, target)
    before, after = p.sum(-1) * source.bin_mm, resampled.sum(-1) * target.bin_mm
    assert (after / before.mean() - 1).abs().max() < 1e-4
    assert helgason_ludwig_residual(resampled, target) < 1e-3


SOURCES = [ParallelBeam.preset("laptop"), ParallelBeam(128, 128, 3.375, 128, 3.375)]
WANTED = [(96, 168), (180, 128), pytest.param((256, 400), marks=pytest.mark.slow)]


@pytest.mark.parametrize("wanted", WANTED)
def test_views_and_bins_asked_for_are_those_of_a_projection_there(wanted: tuple[int, int]) -> None:
    """A sinogram made on one geometry and resampled is the projection of the image on the other."""
    for source in SOURCES:
        made = Radon(source).project(smooth_image(source))
        target = Sampling(n_views=wanted[0], n_bins=wanted[1]).geometry(source)
        fine = replace(target, image_size=wanted[1], pixel_mm=target.bin_mm)
        direct = Radon(fine).project(smooth_image(fine))
        assert relative_error(symmetry.resample(made, source, target), direct) < 5e-4


@pytest.mark.parametrize("wanted", [(96, 168), (180, 128), (256, 400)])
@pytest.mark.parametrize("source", SOURCES, ids=["64x80", "128x128"])
def test_any_views_and_bins_are_consistent(source: ParallelBeam, wanted: tuple[int, int]) -> None:
    """Objects with edges and simulated slices, at a fifth of what generated sinograms are allowed or less."""
    target = Sampling(n_views=wanted[0], n_bins=wanted[1]).geometry(source)
    body = patient_slices(3, "abdomen", "FDG", 1, source).activity[None]
    made = torch.cat([ellipse_sinogram(source).float(), Radon(source).project(body)])
    numbers = consistency_numbers(symmetry.resample(made, source, target), target)
    assert numbers["row_sum_cv"].max() < 1e-3
    assert numbers["centre_residual"].max() < 1.5e-4
    assert numbers["hl_residual"].max() < 2.4e-3


def test_resampling_to_the_same_geometry_changes_nothing() -> None:
    p = torch.rand(2, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(symmetry.resample(p, GEOMETRY, GEOMETRY), p)


def test_coarser_bins_do_not_alias() -> None:
    source, target = ParallelBeam(8, 256, 1.0, 256, 1.0), ParallelBeam(8, 64, 4.0, 64, 4.0)
    wave = torch.cos(2 * math.pi * source.bin_centers / 2.6)  # would alias to a period of 7.4 mm
    p = (wave * torch.exp(-((source.bin_centers / 50) ** 2))).expand(1, 1, 8, -1)
    assert symmetry.resample(p, source, target).norm() < 1e-4 * p.norm()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: symmetry.translate(p, ODD, 1.0, 1.0), "needs \\(batch, channel, 45, 101\\)"),
        (lambda p: symmetry.resample(p[0], GEOMETRY, ODD), "shape is \\(1, 64, 128\\)"),
        (lambda p: symmetry.rotate(p, torch.zeros(3)), "one number or \\(2,\\)"),
        (lambda p: symmetry.thinning_mixup(p + 0.5, p, 0.5, [torch.Generator()] * 2), "Thinning needs counts"),
        (lambda p: symmetry.thinning_mixup(p, p, 1.5, [torch.Generator()] * 2), "share is 1.5"),
        (lambda p: symmetry.thinning_mixup(p, p[:1], 0.5, [torch.Generator()] * 2), "give two of one shape"),
    ],
)
def test_bad_input_is_named(call, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(2, 1, 64, 128))

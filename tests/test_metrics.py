from __future__ import annotations

import math

import pytest
import torch

from allpet import ParallelBeam, Radon, metrics
from allpet.consistency import row_sum_variation


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_perfect_predictions() -> None:
    reference = random(3, 1, 32, 32)
    assert metrics.relative_l2(reference, reference).tolist() == [0, 0, 0]
    assert metrics.rmse_over_range(reference, reference).tolist() == [0, 0, 0]
    assert torch.isinf(metrics.psnr(reference, reference)).all()
    torch.testing.assert_close(metrics.ssim(reference, reference), torch.ones(3))


def test_fidelity_of_known_errors() -> None:
    reference = random(2, 1, 32, 32)
    reference[:, 0, 0, 0], reference[:, 0, 0, 1] = 2.0, -1.0
    prediction = reference + 0.1 * torch.tensor([1.0, 2.0])[:, None, None, None]
    assert metrics.rmse_over_range(prediction, reference).tolist() == pytest.approx([0.1 / 3, 0.2 / 3], rel=1e-4)
    # The peak is the reference's maximum, 2.
    expected = [20 * math.log10(2 / 0.1), 20 * math.log10(2 / 0.2)]
    assert metrics.psnr(prediction, reference).tolist() == pytest.approx(expected, rel=1e-4)
    twice = metrics.relative_l2(2 * reference, reference)
    assert twice.tolist() == pytest.approx([1, 1])


def test_relative_error_of_an_empty_reference() -> None:
    reference = torch.zeros(3, 1, 4, 4)
    reference[2] = 1.0
    prediction = reference.clone()
    prediction[1, 0, 0, 0] = 1e-3
    assert metrics.relative_l2(prediction, reference).tolist() == [0, math.inf, 0]
    assert metrics.relative_l2(torch.full_like(reference, math.nan), reference).isnan().all()


def test_units_cancel_but_scales_count() -> None:
    reference, prediction = random(2, 1, 32, 32), random(2, 1, 32, 32, seed=1)
    for metric in (metrics.relative_l2, metrics.rmse_over_range, metrics.psnr, metrics.ssim):
        torch.testing.assert_close(metric(7 * prediction, 7 * reference), metric(prediction, reference))
        assert not torch.allclose(metric(0.5 * reference, reference), metric(reference, reference))


def test_each_sample_has_its_own_peak() -> None:
    reference, prediction = random(3, 1, 32, 32), random(3, 1, 32, 32, seed=1)
    scale = torch.tensor([1.0, 10.0, 100.0])[:, None, None, None]
    for metric in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(metric(prediction * scale, reference * scale), metric(prediction, reference))


def test_ssim_agrees_with_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    smooth = torch.nn.functional.avg_pool2d(random(2, 1, 52, 52), 5, stride=1)
    noisy = smooth + 0.05 * random(2, 1, 48, 48, seed=1)
    inner = torch.zeros(2, 1, 48, 48, dtype=torch.bool)
    inner[..., 5:-5, 5:-5] = True  # borders are padded differently
    ours = metrics.ssim(noisy, smooth, inner)
    for i in range(2):
        theirs = skimage.structural_similarity(
            smooth[i, 0].numpy(),
            noisy[i, 0].numpy(),
            data_range=smooth[i].max().item(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ours[i].item() == pytest.approx(theirs, abs=2e-3)


def test_ssim_in_the_body_is_not_flattered_by_background() -> None:
    reference = torch.zeros(1, 1, 64, 64)
    reference[..., 20:44, 20:44] = 1 + random(1, 1, 24, 24)
    prediction = reference * (0.5 + random(1, 1, 64, 64, seed=1))
    assert metrics.ssim(prediction, reference, reference > 0) < metrics.ssim(prediction, reference) - 0.1


def test_nearest_distance_finds_copies() -> None:
    training, fresh = random(40, 1, 8, 8), random(5, 1, 8, 8, seed=1)
    samples = torch.cat([training[[7, 31]], 1.1 * training[[3]], fresh])
    distance = metrics.nearest_distance(samples, training, chunk=16)
    assert distance.shape == (8,)
    assert distance[:2].max() < 1e-3
    assert distance[2].item() == pytest.approx(0.1, rel=1e-3)
    assert distance[3:].min() > 0.2
    torch.testing.assert_close(distance, metrics.nearest_distance(samples, training, chunk=1000))
    brute = torch.stack([metrics.relative_l2(fresh[i].expand_as(training), training).min() for i in range(5)])
    torch.testing.assert_close(distance[3:], brute, rtol=1e-3, atol=1e-5)


def test_diversity() -> None:
    same = random(1, 1, 8, 8).repeat(5, 1, 1, 1)
    assert metrics.diversity(same) < 1e-3
    orthogonal = torch.eye(4).view(4, 1, 2, 2)
    assert metrics.diversity(orthogonal).item() == pytest.approx(2**0.5)
    assert metrics.diversity(5 * orthogonal).item() == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        metrics.diversity(same[:1])


def test_energy_distance_tells_distributions_apart() -> None:
    def normal(seed: int, shift: float = 0.0) -> torch.Tensor:
        return shift + torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(seed))

    same = [metrics.energy_distance(normal(i), normal(i + 50)).item() for i in range(8)]
    assert abs(sum(same) / 8) < 2e-3  # unbiased
    assert metrics.energy_distance(normal(0), normal(1, shift=0.5)) > 10 * max(map(abs, same))
    points = torch.zeros(3, 1, 1, 1), torch.full((3, 1, 1, 1), 2.0)
    assert metrics.energy_distance(*points).item() == pytest.approx(4.0)  # 2 |x - y|


def test_power_spectrum_of_white_noise_and_of_a_wave() -> None:
    noise = 3 * torch.randn(20, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    frequency, power = metrics.radial_power_spectrum(noise, pixel_mm=2.0)
    assert frequency.shape == (32,)
    assert power.shape == (20, 32)
    assert frequency[0].item() == pytest.approx(1 / 128)
    assert frequency[-1].item() == pytest.approx(1 / 4)  # Nyquist
    torch.testing.assert_close(power.mean(0)[3:], torch.full((29,), 9.0), rtol=0.15, atol=0)
    x = torch.arange(64) * 2.0
    wave = torch.cos(2 * math.pi * x / 16).expand(1, 1, 64, 64)  # a period of 16 mm
    frequency, power = metrics.radial_power_spectrum(wave, pixel_mm=2.0)
    assert frequency[power[0].argmax()].item() == pytest.approx(1 / 16)
    assert power[0].max() > 0.999 * power[0].sum()


def test_masks_and_peaks_of_psnr_and_relative_l2() -> None:
    reference = torch.zeros(2, 1, 20, 20)
    reference[..., 5:15, 5:15] = 2.0
    prediction = reference.clone()
    prediction[..., 5:15, 5:15] += 0.1
    body = reference > 0
    # A quarter of the pixels is body: the mean over all is 6 dB kinder.
    torch.testing.assert_close(metrics.psnr(prediction, reference, body), torch.full((2,), 20 * math.log10(20.0)))
    difference = metrics.psnr(prediction, reference) - metrics.psnr(prediction, reference, body)
    torch.testing.assert_close(difference, torch.full((2,), 10 * math.log10(4.0)))
    louder = metrics.psnr(prediction, reference, body, peak=torch.tensor([2.0, 20.0]))
    assert (louder[1] - louder[0]).item() == pytest.approx(20.0, abs=1e-4)
    outside = prediction + (~body) * 5.0
    torch.testing.assert_close(metrics.relative_l2(outside, reference, body), torch.full((2,), 0.05))
    assert (metrics.relative_l2(outside, reference) > 1).all()


def test_suv_bias_of_regions() -> None:
    reference = random(3, 1, 16, 16) + 1
    region = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    region[:2, :, 4:8, 4:8] = True  # the third slice does not show it
    prediction = torch.where(region, 1.1 * reference, 7.0)
    for statistic in ("mean", "max"):
        bias = metrics.suv_bias(prediction, reference, region, statistic)
        torch.testing.assert_close(bias[:2], torch.full((2,), 0.1), rtol=1e-4, atol=0)
        assert bias[2].isnan()
    spot = reference.clone()
    spot[0, 0, 5, 5] = 2 * reference[0][region[0]].max()
    assert metrics.suv_bias(spot, reference, region, "max")[0].item() == pytest.approx(1.0, rel=1e-4)
    assert metrics.suv_bias(spot, reference, region)[0] < 0.2
    with pytest.raises(ValueError, match="'mean' or 'max'"):
        metrics.suv_bias(spot, reference, region, "median")


def test_noise_and_contrast_of_known_images() -> None:
    noise = 5 + torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    torch.testing.assert_close(
        metrics.coefficient_of_variation(noise, everywhere), noise.flatten(1).std(1) / noise.flatten(1).mean(1)
    )
    image = torch.full((1, 1, 20, 20), 2.0)
    hot, cold = (torch.zeros(1, 1, 20, 20, dtype=torch.bool) for _ in range(2))
    hot[..., 2:6, 2:6] = cold[..., 10:14, 10:14] = True
    image[hot], image[cold] = 5.0, 0.5
    background = ~(hot | cold)
    # 5 where 8 would be true is half of the contrast of 4:1; 0.5 where 0 would be true is three quarters of all.
    assert metrics.contrast_recovery(image, hot, background, 4.0).item() == pytest.approx(0.5)
    assert metrics.contrast_recovery(image, cold, background, 0.0).item() == pytest.approx(0.75)
    with pytest.raises(ValueError, match="nothing to recover"):
        metrics.contrast_recovery(image, hot, background, 1.0)


def test_background_variability_falls_with_the_regions_size() -> None:
    noise = 10 + torch.randn(4, 1, 96, 96, generator=torch.Generator().manual_seed(0))

    def tiles(size: int) -> torch.Tensor:
        regions = torch.zeros((96 // size) ** 2, 96, 96, dtype=torch.bool)
        for i in range(96 // size):
            for j in range(96 // size):
                regions[i * (96 // size) + j, size * i : size * (i + 1), size * j : size * (j + 1)] = True
        return regions

    for size in (4, 8):  # the mean of n pixels of white noise has sd 1 / sqrt(n)
        expected = torch.full((4,), 1 / size / 10)
        torch.testing.assert_close(metrics.background_variability(noise, tiles(size)), expected, rtol=0.2, atol=0)
    with pytest.raises(ValueError, match="at least 2 regions; got 1"):
        metrics.background_variability(noise, tiles(96))


def test_bias_and_spread_over_realisations() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.full((1, 1, 8, 8), 4.0)
    region = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    region[..., 2:6, 2:6] = True
    noise = torch.randn(4000, 1, 8, 8, generator=generator)
    bias, spread = metrics.bias_and_spread(0.9 * truth + noise, truth, region)
    assert bias.item() == pytest.approx(-0.1, abs=0.005)
    assert spread.item() == pytest.approx(1 / 4 / 4, rel=0.05)  # of the mean of 16 pixels, over 4
    with pytest.raises(ValueError, match="at least 2 realisations"):
        metrics.bias_and_spread(truth, truth, region)


def test_moments_of_sinograms_and_of_attenuated_ones() -> None:
    geometry = ParallelBeam(n_views=48, n_bins=64, bin_mm=4.0, image_size=64, pixel_mm=4.0)
    radon = Radon(geometry, kernel="strip")
    x, y = geometry.pixel_centers
    image = (torch.hypot(x - 30, y + 20) < 40).float() + 2 * (torch.hypot(x + 50, y - 30) < 15).float()
    sinogram = radon.project(image[None, None])
    residuals = metrics.moment_residuals(sinogram, geometry)
    assert residuals.shape == (1, 4)
    assert residuals.max() < 3e-3
    body = 0.0096 * ((x / 110) ** 2 + (y / 60) ** 2 < 1).float()
    attenuated = sinogram * torch.exp(-radon.project(body[None, None]))
    assert (metrics.moment_residuals(attenuated, geometry) > 0.02).all()
    # One is relative to the root mean square of the views' sums, the other to their mean.
    variation = row_sum_variation(attenuated)
    expected = variation / (1 + variation.square()).sqrt()
    torch.testing.assert_close(metrics.moment_residuals(attenuated, geometry)[:, 0], expected, rtol=1e-4, atol=0)
    # Order 0 knows nothing of where activity lies, order 1 does.
    shifted = torch.cat([sinogram[..., :24, :], sinogram[..., 24:, :].roll(3, -1)], dim=2)
    first, second = metrics.moment_residuals(shifted, geometry)[0, :2]
    assert first < 1e-3
    assert second > 0.02


def test_the_standard_image_is_the_activity_up_to_blur() -> None:
    geometry = ParallelBeam(n_views=45, n_bins=48, bin_mm=5.0, image_size=48, pixel_mm=5.0)
    radon = Radon(geometry)
    x, y = geometry.pixel_centers
    image = 3 * ((x / 90) ** 2 + (y / 70) ** 2 < 1).float()[None, None]
    sharp, soft = (metrics.standard_image(radon, radon.project(image), mm) for mm in (4.0, 20.0))
    inner = ((x / 70) ** 2 + (y / 50) ** 2 < 1)[None, None]
    assert metrics.relative_l2(sharp, image, inner) < 0.1
    for result in (sharp, soft):
        torch.testing.assert_close(result.sum(), image.sum(), rtol=0.02, atol=0)
    assert soft.diff(dim=-1).abs().max() < 0.7 * sharp.diff(dim=-1).abs().max()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="\\(1, 1, 4, 4\\) and \\(1, 1, 4, 5\\)"):
        metrics.relative_l2(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="must be \\(batch, 1, size, size\\)"):
        metrics.radial_power_spectrum(torch.zeros(1, 1, 4, 5), 1.0)
    with pytest.raises(ValueError, match="got 1 and 3"):
        metrics.energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))

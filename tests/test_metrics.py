from __future__ import annotations

import math

import pytest
import torch

from allpet import metrics


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


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="\\(1, 1, 4, 4\\) and \\(1, 1, 4, 5\\)"):
        metrics.relative_l2(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="must be \\(batch, 1, size, size\\)"):
        metrics.radial_power_spectrum(torch.zeros(1, 1, 4, 5), 1.0)
    with pytest.raises(ValueError, match="got 1 and 3"):
        metrics.energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))

"""Losses against closed forms."""

import torch

from allpet import ParallelBeam, Radon, fbp
from allpet.losses import hinge_discriminator_loss, kl_divergence, stack_loss, weight_by_frequency


def test_kl_divergence_is_that_of_two_normals():
    mean, log_variance = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), exact.mean())
    assert kl_divergence(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)) == 0


def test_half_a_power_of_frequency_turns_a_sinogram_norm_into_an_image_norm():
    geometry = ParallelBeam(180, 128, 2.0, 128, 2.0)
    radon = Radon(geometry)
    x, y = (axis.float() for axis in geometry.pixel_centers)
    ratios = []
    for cx, cy, sigma in [(0, 0, 10), (30, -20, 10), (0, 40, 18), (-25, 10, 6)]:
        image = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))[None, None]
        weighted = weight_by_frequency(radon.project(image)).norm()
        ratios.append(float(weighted / image.norm()))
        assert (fbp(radon, radon.project(image), window="ramp") - image).norm() < 0.05 * image.norm()
    # one constant for every place and width
    assert max(ratios) / min(ratios) < 1.02


def test_weighting_by_frequency_removes_what_is_constant_and_keeps_the_nyquist_frequency():
    bins = torch.arange(64)
    fastest = torch.where(bins % 2 == 0, 1.0, -1.0).view(1, 1, 1, -1)
    inside = slice(16, 48)
    torch.testing.assert_close(weight_by_frequency(fastest, 1.0)[..., inside], fastest[..., inside], atol=0.02, rtol=0)
    assert weight_by_frequency(torch.ones(1, 1, 1, 64), 1.0)[..., inside].abs().max() < 0.02


def test_stack_loss_is_the_mean_absolute_error():
    assert stack_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)) == 0.5


def test_the_hinge_is_satisfied_by_scores_beyond_one():
    assert hinge_discriminator_loss(torch.full((4,), 1.5), torch.full((4,), -2.0)) == 0
    assert hinge_discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1

"""The power that decoders lose at short periods: found through the noise, given back without harm to consistency."""

import pytest
import torch
from analytic import gaussian_sinogram

from allpet import Autoencoder, ParallelBeam
from allpet.consistency import helgason_ludwig_residual
from allpet.power import POINTS, measure_gain, radial_power, restore_power

GEOMETRY = ParallelBeam(n_views=48, n_bins=64, bin_mm=5.0, image_size=64, pixel_mm=5.0)
FREQUENCY = torch.linspace(0, 0.5, POINTS)  # cycles per bin
LOST = 1 - 0.5 * torch.sigmoid((FREQUENCY - 0.15) / 0.02)  # a decoder that halves the amplitude of short periods


def blobs(count, seed, counts=2e5, smallest=3):
    """Expected and noisy sinograms of Gaussians, and the former as a decoder would leave them."""
    generator = torch.Generator().manual_seed(seed)
    expected = []
    for _ in range(count):
        centres = 120 * (torch.rand(5, 2, generator=generator, dtype=torch.float64) - 0.5)
        sigmas = smallest + 3 * torch.rand(5, generator=generator, dtype=torch.float64)
        expected.append(gaussian_sinogram(GEOMETRY, centres, sigmas, 1 / sigmas**2).float())
    expected = torch.cat(expected)
    expected = expected * counts / expected.sum((1, 2, 3), keepdim=True)
    return expected, torch.poisson(expected, generator=generator), filtered(expected, LOST)


def filtered(sinogram, gain):
    bins = sinogram.shape[-1]
    at = torch.nn.functional.interpolate(gain[None, None], bins + 1, mode="linear", align_corners=True)[0, 0]
    return torch.fft.irfft(torch.fft.rfft(sinogram, n=2 * bins) * at, n=2 * bins)[..., :bins]


@pytest.fixture(scope="module")
def gain():
    _, noisy, decoded = blobs(120, 0)
    return measure_gain([radial_power(noisy[:50]), radial_power(noisy[50:])], [radial_power(decoded)])


def test_what_a_decoder_loses_is_found_from_noisy_slices_alone(gain):
    trusted = (FREQUENCY > 0.02) & (FREQUENCY < 0.22)
    torch.testing.assert_close(gain[trusted], 1 / LOST[trusted], atol=0.08, rtol=0)


@pytest.mark.parametrize("counts", [1e4, 1e5])
def test_the_power_of_the_noise_is_not_taken_for_lost(counts):
    expected, noisy, decoded = blobs(120, 0, counts, smallest=5)
    power, left = radial_power(noisy), radial_power(decoded)
    noise = power[:, 56:].mean(1).median()
    seen = (FREQUENCY > 0.02) & (radial_power(expected).median(0).values > 0.5 * noise)

    def worst(found):
        return float((found * LOST - 1)[seen].abs().max())

    unsubtracted = (power.median(0).values / left.median(0).values).sqrt().clamp(1, 2.5)
    assert worst(measure_gain([power], [left])) < 0.07
    assert worst(unsubtracted) > 0.2


def test_where_noise_hides_everything_nothing_is_changed(gain):
    torch.testing.assert_close(gain[FREQUENCY > 0.45], torch.ones(int((FREQUENCY > 0.45).sum())))
    assert gain[0] == 1


def test_power_comes_back_to_that_of_slices_not_measured_on(gain):
    expected, _, decoded = blobs(60, 1)
    restored = restore_power(decoded, gain)
    band = (FREQUENCY > 0.17) & (FREQUENCY < 0.22)
    truth = radial_power(expected)[:, band].mean()
    assert radial_power(decoded)[:, band].mean() < 0.4 * truth
    assert 0.8 * truth < radial_power(restored)[:, band].mean() < 1.2 * truth


def test_more_slices_of_the_same_kind_change_little_and_none_change_nothing(gain):
    _, noisy, decoded = blobs(120, 2)
    torch.testing.assert_close(measure_gain([radial_power(noisy)], [radial_power(decoded)]), gain, atol=0.12, rtol=0)
    none = radial_power(noisy[:0])
    torch.testing.assert_close(measure_gain([none], [none]), torch.ones(POINTS))


def test_restored_sinograms_are_as_consistent_as_before(gain):
    body = gaussian_sinogram(GEOMETRY, torch.zeros(1, 2), torch.tensor([45.0]), torch.tensor([1.0])).float()
    sinogram = blobs(20, 4)[2]
    sinogram = sinogram + body * (0.3 * sinogram.amax() / body.amax())  # where nothing has to be cut off at 0
    sinogram = sinogram[sinogram.flatten(1).amin(1) >= 0]
    assert len(sinogram) > 3
    restored = restore_power(sinogram, gain)
    assert float(restored.min()) >= 0
    assert not torch.allclose(restored, sinogram, rtol=1e-3)
    before, after = (helgason_ludwig_residual(x, GEOMETRY).mean() for x in (sinogram, restored))
    assert after < before + 1e-3


def test_a_gain_of_one_changes_nothing():
    sinogram = torch.rand(1, 1, 48, 63)
    torch.testing.assert_close(restore_power(sinogram, torch.ones(POINTS)), sinogram)


def test_weights_of_earlier_versions_have_a_gain_of_one():
    settings = {"channels": (8, 16), "patch": 2}
    weights = Autoencoder(**settings).state_dict()
    del weights["power_gain"]
    network = Autoencoder(**settings)
    network.set_power_gain(torch.full((POINTS,), 2.0))
    network.load_state_dict(weights)
    torch.testing.assert_close(network.power_gain, torch.ones(POINTS))

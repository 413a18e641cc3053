"""The linear denoiser: exact for Gaussian latents, and a start that an untrained stage 2 does not spoil."""

import pytest
import torch

from allpet import Diffusion, Prompt
from allpet.diffusion.linear_denoiser import LinearDenoiser
from allpet.diffusion.samplers import SAMPLERS, draw_samples
from allpet.randomness import keyed_generator

SHAPE = (2, 3, 4)


@pytest.fixture(scope="module")
def gaussian():
    """Latents of one prompt, whose turned copies have the same distribution."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator) * torch.linspace(0.05, 1, 24)
    latents = (torch.randn(40_000, 24, generator=generator) @ mix + 0.5).view(-1, *SHAPE)
    prompt = Prompt.of(["FDG:brain"] * 20_000)
    return LinearDenoiser.fit(latents[:20_000], prompt, latents[20_000:]), latents[20_000:], mix.T @ mix


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
def test_it_is_the_conditional_mean_of_gaussian_latents(gaussian, prediction):
    fitted, latents, covariance = gaussian
    diffusion = Diffusion(prediction=prediction)
    time = torch.full((len(latents),), 500)
    alpha, sigma = diffusion.coefficients(time)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy = diffusion.add_noise(latents, noise, time)
    prompt = Prompt.of(["FDG:brain"] * len(latents))
    estimate = fitted(noisy, alpha, sigma, prompt)
    a, s = float(alpha[0]), float(sigma[0])
    gain = a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * torch.eye(24))
    exact = 0.5 + (noisy.flatten(1) - a * 0.5) @ gain.T
    assert (estimate.flatten(1) - exact).norm() < 0.03 * exact.norm()
    error = (latents - estimate).square().mean().sqrt()
    assert float(fitted.error(alpha[:1], sigma[:1])) == pytest.approx(float(error), rel=0.03)
    # and so in what the network predicts
    found = diffusion.from_clean(noisy, estimate, time)
    torch.testing.assert_close(diffusion.to_clean(noisy, found, time), estimate, atol=1e-4, rtol=1e-4)
    wrong = (found - diffusion.target(latents, noise, time)).square().mean().sqrt()
    factor = float(diffusion.error_factor(time)[0])
    assert float(wrong) == pytest.approx(factor * float(error), rel=1e-3)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_an_imperfect_start_have_the_moments_of_the_latents(gaussian, prediction, sampler):
    """What a network adds to the linear estimate is in units of what that leaves open, so is its error: 5 % here."""
    fitted, _, covariance = gaussian
    diffusion, generator = Diffusion(prediction=prediction), torch.Generator().manual_seed(2)
    prompt = Prompt.of(["FDG:brain"] * 400)

    def denoise(noisy, time):
        alpha, sigma = diffusion.coefficients(time)
        size = (fitted.error(alpha, sigma) * diffusion.error_factor(time).float()).view(-1, 1, 1, 1)
        estimate = fitted(noisy, alpha, sigma, prompt)
        return diffusion.from_clean(noisy, estimate, time) + 0.05 * size * torch.randn(noisy.shape, generator=generator)

    owned = [keyed_generator("linear", i) for i in range(400)]
    samples = draw_samples(sampler, denoise, SHAPE, owned, diffusion, 100 if sampler == "ddpm" else 40)
    assert abs(samples.mean() - 0.5) < 0.05
    assert float(samples.var(0).sum()) == pytest.approx(float(covariance.trace()), rel=0.15)


def test_the_limits_are_the_mean_and_the_latent_itself(gaussian):
    fitted, latents, _ = gaussian
    prompt = Prompt.of(["FDG:brain"] * 8)
    pure = fitted(torch.randn(8, *SHAPE), torch.zeros(8), torch.ones(8), prompt)
    torch.testing.assert_close(pure, fitted.mean[prompt.tracer, prompt.region].view(8, *SHAPE))
    clear = fitted(latents[:8], torch.ones(8), torch.full((8,), 1e-4), prompt)
    torch.testing.assert_close(clear, latents[:8], atol=1e-3, rtol=0)


def test_prompts_have_their_own_means_and_open_ones_the_mean_of_what_answers():
    latents = torch.cat([torch.randn(30, *SHAPE), torch.randn(10, *SHAPE) + 5, torch.randn(10, *SHAPE) - 5])
    known = Prompt.of(["FDG:brain"] * 30 + ["FDG:chest"] * 10 + ["PSMA:abdomen"] * 10)
    fitted = LinearDenoiser.fit(latents, known, latents)
    asked = Prompt.of(["FDG:brain", "open:chest", "PSMA:trunk", "open:trunk", "open:open", "DOPA:pelvis"])
    means = fitted.mean[asked.tracer, asked.region]
    x = latents.flatten(1)
    wanted = [x[:30].mean(0), x[30:40].mean(0), x[40:].mean(0), x[30:].mean(0), x.mean(0), x.mean(0)]
    torch.testing.assert_close(means, torch.stack(wanted))


def test_fewer_slices_than_elements_and_a_small_rank_share_the_rest():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 8, 4, 4, generator=generator)
    prompt = Prompt.of(["FDG:brain"] * 6)
    whole = LinearDenoiser.fit(latents, prompt, latents)
    few = LinearDenoiser.fit(latents, prompt, latents, rank=2)
    assert len(few.axes) == 2 < len(whole.axes) <= 10
    torch.testing.assert_close(few.axes @ few.axes.T, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(few.variance[:2], whole.variance[:2])

    def total(fitted: LinearDenoiser) -> float:
        kept = len(fitted.axes)
        return float(fitted.variance[:-1].sum() + (128 - kept) * fitted.variance[-1])

    assert total(few) == pytest.approx(total(whole), rel=1e-4)


def test_without_turned_slices_halves_tell_the_variance_beyond_the_axes():
    """Of white latents, fewer than they have elements, one half says nothing of the other's: the variance is 1."""
    latents = torch.randn(60, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    fitted = LinearDenoiser.fit(latents, Prompt.of(["FDG:brain"] * 60), None)
    assert float(fitted.variance[-1]) == pytest.approx(1.0, rel=0.15)


def test_latents_that_say_nothing_are_refused():
    prompt = Prompt.of(["FDG:brain"])
    with pytest.raises(ValueError, match="1 and 3 latents were given; a covariance needs at least two"):
        LinearDenoiser.fit(torch.randn(1, *SHAPE), prompt, torch.randn(3, *SHAPE))

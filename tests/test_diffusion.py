"""The diffusion process, its samplers and guidance, checked without any network."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from allpet.diffusion.guidance import drop_prompt, guide
from allpet.diffusion.samplers import draw_noise, sample_ddim, sample_ddpm
from allpet.diffusion.schedule import Diffusion
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator

MEAN, STD = 0.7, 0.4


def generators(n: int, key: str = "test") -> list[torch.Generator]:
    return [keyed_generator(key, index) for index in range(n)]


def exact_denoiser(diffusion: Diffusion):
    """The best prediction possible for x_0 ~ N(MEAN, STD^2), from the formula of the Gaussian posterior."""

    def denoise(latent, time):
        alpha, sigma = (table[time].float().view(-1, 1, 1, 1) for table in diffusion.alpha_sigma)
        clean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (latent - alpha * MEAN)
        noise = (latent - alpha * clean) / sigma
        return noise if diffusion.prediction == "epsilon" else alpha * noise - sigma * clean

    return denoise


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_noise_and_signal_share_unit_power(schedule):
    alpha, sigma = Diffusion(schedule=schedule).alpha_sigma
    assert alpha.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert (alpha.diff() < 0).all()


def test_the_cosine_schedule_ends_in_noise():
    assert Diffusion().alpha_sigma[0][-1] < 1e-4


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_a_perfect_prediction_gives_the_clean_latent_back(prediction):
    diffusion = Diffusion(prediction=prediction)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 16, 4, 3, 3, generator=generator)
    time = torch.randint(900, (16,), generator=generator)
    noisy = diffusion.add_noise(clean, noise, time)
    restored = diffusion.to_clean(noisy, diffusion.target(clean, noise, time), time)
    torch.testing.assert_close(restored, clean, atol=2e-4, rtol=1e-4)


def test_uniform_training_times_cover_the_process():
    drawn = Diffusion(times="uniform").draw_times(20_000, torch.Generator().manual_seed(0))
    assert (drawn.bincount(minlength=1000) - 20).abs().max() < 6 * 20**0.5


@pytest.mark.parametrize(("location", "spread"), [(0.0, 1.0), (0.3, 1.4)])
def test_logit_normal_training_times_have_their_moments(location, spread):
    process = Diffusion(times="logit_normal", location=location, spread=spread)
    share = (process.draw_times(20_000, torch.Generator().manual_seed(0)) + 0.5) / process.n_steps
    assert abs(share.logit().mean() - location) < 0.04
    assert abs(share.logit().std() - spread) < 0.03
    late = torch.distributions.Normal(location, spread).cdf(torch.tensor(0.95).logit())
    assert abs((share > 0.95).double().mean() - (1 - late)) < 0.005


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_ddpm_draws_the_distribution_of_an_exact_denoiser(prediction):
    diffusion = Diffusion(prediction=prediction)
    samples = sample_ddpm(exact_denoiser(diffusion), (1, 8, 8), generators(256), diffusion, steps=250)
    assert abs(samples.mean() - MEAN) < 0.01
    assert abs(samples.std() / STD - 1) < 0.03


def test_ddim_converges_to_the_distribution_of_an_exact_denoiser():
    diffusion = Diffusion()
    errors = []
    for steps in (5, 20, 80):
        samples = sample_ddim(exact_denoiser(diffusion), (1, 8, 8), generators(256), diffusion, steps=steps)
        errors.append(abs(float(samples.std()) / STD - 1))
    assert abs(samples.mean() - MEAN) < 0.01
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.03


def test_ddim_with_fresh_noise_keeps_the_moments():
    diffusion = Diffusion()
    samples = sample_ddim(exact_denoiser(diffusion), (1, 8, 8), generators(256), diffusion, steps=200, eta=1.0)
    assert abs(samples.mean() - MEAN) < 0.01
    assert abs(samples.std() / STD - 1) < 0.03


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_each_step_is_that_of_the_diffusers_library(prediction, eta):
    diffusion = Diffusion(prediction=prediction)
    seen = []

    def denoise(latent, time):
        seen.append((latent, int(time[0])))
        return torch.tanh(latent)

    sample_ddim(denoise, (1, 4, 4), generators(3), diffusion, steps=10, eta=eta)
    scheduler = DDIMScheduler(**diffusion.scheduler_config())
    scheduler.set_timesteps(10)
    assert [time for _, time in seen] == scheduler.timesteps.tolist()
    owned = generators(3)
    draw_noise((1, 4, 4), owned, "cpu")
    for (latent, time), (following, _) in pairwise(seen):
        noise = draw_noise((1, 4, 4), owned, "cpu") if eta else None
        theirs = scheduler.step(torch.tanh(latent), time, latent, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(following, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("sample", [sample_ddim, sample_ddpm])
def test_a_sample_depends_on_its_generator_alone(sample):
    diffusion = Diffusion()
    together = sample(exact_denoiser(diffusion), (2, 4, 4), generators(5), diffusion, steps=7)
    alone = sample(exact_denoiser(diffusion), (2, 4, 4), generators(5)[3:4], diffusion, steps=7)
    torch.testing.assert_close(together[3:4], alone)
    assert not torch.allclose(together[2], together[3])


def test_the_callback_sees_every_step_and_ends_at_the_sample():
    seen = []
    diffusion = Diffusion()
    result = sample_ddim(
        exact_denoiser(diffusion), (1, 2, 2), generators(2), diffusion, steps=6, callback=lambda *a: seen.append(a)
    )
    assert [(step, steps) for step, steps, _ in seen] == [(k, 6) for k in range(1, 7)]
    torch.testing.assert_close(seen[-1][2], result)


def test_sampling_refuses_an_impossible_number_of_steps():
    with pytest.raises(ValueError, match=r"steps is 0, but must lie in 1\.\.1000"):
        sample_ddim(exact_denoiser(Diffusion()), (1, 2, 2), generators(1), Diffusion(), steps=0)


def test_guidance_extrapolates_from_the_open_prompt():
    prompt = Prompt.of(["FDG:brain", "PSMA:abdomen"])

    def predict(latent, time, prompt):
        return latent + (prompt.tracer + 10 * prompt.region).view(-1, 1)

    latent, time = torch.zeros(2, 1), torch.zeros(2)
    answer = predict(latent, time, prompt)
    torch.testing.assert_close(guide(predict, prompt, 1)(latent, time), answer)
    torch.testing.assert_close(guide(predict, prompt, 0)(latent, time), torch.zeros(2, 1))
    torch.testing.assert_close(guide(predict, prompt, 2.5)(latent, time), 2.5 * answer)


def test_prompts_are_left_open_as_often_as_asked():
    n, share = 60_000, 0.1
    prompt = Prompt(torch.full((n,), 2), torch.full((n,), 3))
    dropped = drop_prompt(prompt, share, torch.rand(n, generator=torch.Generator().manual_seed(0)))
    no_tracer, no_region = dropped.tracer == 0, dropped.region == 0
    for case in (no_tracer & ~no_region, no_region & ~no_tracer, no_tracer & no_region):
        assert abs(case.double().mean() - share) < 0.005
    assert (drop_prompt(prompt, 0.0, torch.zeros(n)).tracer == 2).all()

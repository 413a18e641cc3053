"""The diffusion process, its samplers and guidance, checked without any network."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from allpet.diffusion.samplers import SAMPLERS, draw_noise, draw_samples, sample_ddim, sample_ddpm
from allpet.diffusion.schedule import LARGEST_RISE, Diffusion
from allpet.randomness import keyed_generator

MEAN, STD = 0.7, 0.4


def generators(n: int, key: str = "test") -> list[torch.Generator]:
    return [keyed_generator(key, index) for index in range(n)]


def exact_denoiser(diffusion: Diffusion, mean: float = MEAN, std: float = STD):
    """The best prediction possible for x_0 ~ N(mean, std^2), from the formula of the Gaussian posterior."""

    def denoise(latent, time):
        alpha, sigma = (values.float().view(-1, 1, 1, 1) for values in diffusion.coefficients(time))
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (latent - alpha * mean)
        noise = (latent - alpha * clean) / sigma
        return {"epsilon": noise, "flow": noise - clean, "v_prediction": alpha * noise - sigma * clean}[
            diffusion.prediction
        ]

    return denoise


def exact_end(diffusion: Diffusion, start: torch.Tensor) -> torch.Tensor:
    """Where the probability flow of the exact denoiser takes the first noise: the same quantile of x_0."""
    alpha, sigma = (float(values) for values in diffusion.coefficients(diffusion.sampling_times(1)[0]))
    return MEAN + STD * (start - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_noise_and_signal_share_unit_power(schedule):
    alpha, sigma = Diffusion(schedule=schedule).alpha_sigma
    assert alpha.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert (alpha.diff() < 0).all()


def test_the_cosine_schedule_ends_in_noise():
    assert Diffusion().alpha_sigma[0][-1] < 1e-4


PREDICTIONS = ("v_prediction", "epsilon", "flow")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_the_clean_latent_back(prediction):
    diffusion = Diffusion(prediction=prediction)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 16, 4, 3, 3, generator=generator)
    time = torch.randint(900, (16,), generator=generator)
    noisy = diffusion.add_noise(clean, noise, time)
    restored = diffusion.to_clean(noisy, diffusion.target(clean, noise, time), time)
    torch.testing.assert_close(restored, clean, atol=2e-4, rtol=1e-4)


def test_the_flow_is_the_straight_path_and_its_velocity():
    flow = Diffusion(prediction="flow")
    clean, noise = torch.randn(2, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.0, 250.0, 333.3, 999.9, 1000.0])
    share = (time / 1000).view(-1, 1, 1, 1)
    noisy = flow.add_noise(clean, noise, time)
    torch.testing.assert_close(noisy, (1 - share) * clean + share * noise)
    torch.testing.assert_close(flow.target(clean, noise, time), noise - clean)
    alpha, sigma = flow.coefficients(time)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    whole = torch.tensor([0, 250, 1000])
    torch.testing.assert_close(torch.stack(flow.coefficients(whole)), torch.stack(flow.alpha_sigma)[:, whole])


def test_x0_noise_velocity_and_flow_say_the_same_where_signal_to_noise_is_equal():
    """One x_t, scaled between the paths, and one x_0: each prediction of it leads back to the same x_0."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 9, 3, 2, 2, generator=generator)
    vp, epsilon, flow = (Diffusion(prediction=prediction) for prediction in PREDICTIONS)
    time = torch.arange(50, 950, 100)
    alpha, sigma = vp.coefficients(time)
    on_path = flow.n_steps * sigma / (alpha + sigma)
    scale = (alpha + sigma).float().view(-1, 1, 1, 1)
    noisy = vp.add_noise(clean, noise, time)
    torch.testing.assert_close(flow.add_noise(clean, noise, on_path) * scale, noisy)
    for process, x, t in ((vp, noisy, time), (epsilon, noisy, time), (flow, noisy / scale, on_path)):
        guessed = process.to_clean(x, process.target(clean, noise, t), t)
        torch.testing.assert_close(guessed, clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_times_of_a_flow_are_any_numbers_with_the_same_moments(times):
    flow, whole = (Diffusion(prediction=prediction, times=times) for prediction in ("flow", "v_prediction"))
    drawn = flow.draw_times(20_000, torch.Generator().manual_seed(0))
    other = whole.draw_times(20_000, torch.Generator().manual_seed(1)) + 0.5
    assert drawn.dtype == torch.float32
    assert float(drawn.min()) > 0
    assert float(drawn.max()) <= 1000
    assert len(drawn.unique()) > 19_000
    assert abs(drawn.mean() - other.mean()) < 6 * 300 / 20_000**0.5
    assert abs(drawn.std() / other.std() - 1) < 0.03


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"prediction": "score"}, "prediction is 'score', but must be 'v_prediction', 'epsilon' or 'flow'"),
        ({"times": "cosine"}, "times is 'cosine'"),
        ({"spread": 0.0}, "spread 0.0, but both must be positive"),
    ],
)
def test_impossible_processes_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Diffusion(**wrong)


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


@pytest.mark.parametrize("prediction", PREDICTIONS)
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


@pytest.mark.parametrize(
    ("prediction", "schedule"), [("v_prediction", "squaredcos_cap_v2"), ("epsilon", "linear")], ids=lambda value: value
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_each_step_is_that_of_the_diffusers_library(prediction, schedule, eta):
    diffusion = Diffusion(prediction=prediction, schedule=schedule)
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


def test_a_step_of_ddim_is_a_step_of_euler_along_the_flow():
    flow, seen = Diffusion(prediction="flow"), []

    def denoise(latent, time):
        seen.append((latent, float(time[0]) / flow.n_steps))
        return torch.tanh(latent)

    end = sample_ddim(denoise, (1, 4, 4), generators(3), flow, steps=7)
    for (x, t), (following, s) in pairwise([*seen, (end, 0.0)]):
        torch.testing.assert_close(following, x + (s - t) * torch.tanh(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++2m", 2), ("unipc", 2)])
def test_samplers_converge_to_the_exact_flow_in_their_order(prediction, sampler, order):
    diffusion = Diffusion(prediction=prediction)
    truth = exact_end(diffusion, draw_noise((1, 8, 8), generators(16), "cpu"))
    errors = {}
    for steps in (1, 5, 20, 160):
        samples = draw_samples(sampler, exact_denoiser(diffusion), (1, 8, 8), generators(16), diffusion, steps)
        errors[steps] = float((samples - truth).square().mean().sqrt())
    assert errors[5] / errors[20] > 4 ** (order - 0.5), "two halvings of the step"
    assert errors[160] < (6e-3 if order == 1 else 5e-4)
    assert errors[1] == pytest.approx(STD, rel=0.1), "one call returns the mean"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_mean_and_spread_of_the_data(prediction, sampler):
    diffusion, steps = Diffusion(prediction=prediction), 250 if sampler == "ddpm" else 80
    samples = draw_samples(sampler, exact_denoiser(diffusion), (1, 8, 8), generators(256), diffusion, steps)
    assert abs(samples.mean() - MEAN) < 0.01
    assert abs(samples.std() / STD - 1) < 0.03


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("error", ["random", 0.02, -0.02])
def test_an_error_of_the_prediction_of_two_percent_spoils_no_sample(prediction, sampler, error):
    """Neither one that differs from call to call nor one that is always the same."""
    diffusion, generator = Diffusion(prediction=prediction), torch.Generator().manual_seed(0)
    exact = exact_denoiser(diffusion, 0.0, 1.0)

    def denoise(latent, time):
        found = exact(latent, time)
        return found + 0.02 * (
            torch.randn(found.shape, generator=generator) if error == "random" else error * 50 * found
        )

    for steps in (10, 40) if sampler != "ddpm" else (100,):
        samples = draw_samples(sampler, denoise, (1, 8, 8), generators(16), diffusion, steps)
        assert abs(samples.std() - 1) < 0.2, steps
        assert abs(samples.mean()) < 0.1


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 20), ("dpm++2m", 5), ("dpm++2m", 20), ("unipc", 20)])
def test_predicting_noise_costs_little_of_the_distribution(sampler, steps):
    """Where it begins the mean is not 0, as is assumed."""
    drawn = {}
    for prediction in ("v_prediction", "epsilon"):
        diffusion = Diffusion(prediction=prediction)
        drawn[prediction] = draw_samples(
            sampler, exact_denoiser(diffusion), (1, 8, 8), generators(16), diffusion, steps
        )
    assert abs(drawn["epsilon"].mean() - drawn["v_prediction"].mean()) < 0.2 / steps * STD + 0.02 * STD
    assert drawn["epsilon"].std() / drawn["v_prediction"].std() == pytest.approx(1, abs=0.05)


def test_sampling_by_noise_begins_where_there_is_signal_and_other_sampling_at_the_end():
    for steps in (1, 2, 5, 20, 100, 998, 999):
        first, *others = Diffusion(prediction="epsilon").sampling_times(steps)
        alpha = Diffusion().alpha_sigma[0]
        after = alpha[others[0]] if others else torch.ones(1)
        assert after / alpha[first] <= LARGEST_RISE
        from_the_end = Diffusion().sampling_times(steps).tolist()
        assert from_the_end == [round(1000 * (1 - step / steps)) - 1 for step in range(steps)]
        assert first < from_the_end[0] == 999
        if steps > 1:  # and it begins no earlier than it must
            later = [round((float(first) + 2) * (1 - step / steps)) - 1 for step in range(2)]
            assert alpha[later[1]] / alpha[later[0]] > LARGEST_RISE
        flow = Diffusion(prediction="flow").sampling_times(steps)
        assert flow.tolist() == torch.tensor([1000 * (1 - step / steps) for step in range(steps)]).tolist()
    # these schedules keep some signal to their ends
    for schedule in ("linear", "scaled_linear"):
        assert Diffusion(schedule=schedule, prediction="epsilon").sampling_times(20)[0] == 999


def test_all_times_are_for_samplers_with_fresh_noise_where_noise_is_predicted():
    diffusion = Diffusion(prediction="epsilon")
    assert diffusion.sampling_times(1000).tolist() == list(range(999, -1, -1))
    for sampler in ("ddim", "dpm++2m", "unipc"):
        with pytest.raises(ValueError, match="take fewer steps or that sampler"):
            draw_samples(sampler, exact_denoiser(diffusion), (1, 2, 2), generators(1), diffusion, 1000)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_both_modes_of_a_mixture(prediction, sampler):
    diffusion, centre, width = Diffusion(prediction=prediction), 1.0, 0.2

    def denoise(latent, time):
        alpha, sigma = (values.float().view(-1, 1, 1, 1) for values in diffusion.coefficients(time))
        variance = alpha**2 * width**2 + sigma**2
        shares = torch.softmax(
            torch.stack([-((latent - alpha * m) ** 2) / (2 * variance) for m in (-centre, centre)]), dim=0
        )
        means = (m + alpha * width**2 / variance * (latent - alpha * m) for m in (-centre, centre))
        clean = sum(share * mean for share, mean in zip(shares, means, strict=True))
        noise = (latent - alpha * clean) / sigma
        return noise - clean if prediction == "flow" else alpha * noise - sigma * clean

    steps = 100 if sampler == "ddpm" else 40
    samples = draw_samples(sampler, denoise, (1, 8, 8), generators(64), diffusion, steps)
    right = samples[samples > 0]
    assert abs(len(right) / samples.numel() - 0.5) < 0.03
    assert abs(right.mean() - centre) < 0.02
    assert abs(right.std() / width - 1) < 0.1


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
@pytest.mark.parametrize(
    ("sampler", "kind"), [("dpm++2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_solvers_are_those_of_the_diffusers_library_on_the_same_times(prediction, sampler, kind):
    diffusion, steps = Diffusion(prediction=prediction), 20
    mine = draw_samples(sampler, exact_denoiser(diffusion), (1, 4, 4), generators(3), diffusion, steps)
    config = diffusion.scheduler_config()
    del config["clip_sample"]
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    latent = draw_noise((1, 4, 4), generators(3), "cpu")
    for step, time in enumerate(scheduler.timesteps):
        # a flow's time as the library has it, before it is rounded
        exact = scheduler.sigmas[step] * 1000 if prediction == "flow" else time
        predicted = exact_denoiser(diffusion)(latent, exact.expand(3))
        latent = scheduler.step(predicted, time, latent).prev_sample
    # the library begins a flow at 0.999 and ends it a thousandth later than evenly
    torch.testing.assert_close(mine, latent, atol=1e-4 if prediction == "v_prediction" else 5e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_number_of_steps_has_as_many_falling_times(prediction):
    """The library has one too many for some numbers, which would be called at a time before the first."""
    diffusion = Diffusion(prediction=prediction)
    for steps in (1, 2, 3, 61, 80, 103, 121, 999, 1000):
        times = diffusion.sampling_times(steps)
        assert len(times) == steps
        assert (times.diff() < 0).all()
        if prediction != "epsilon":
            assert float(diffusion.coefficients(times[:1])[0]) < 1e-4
        assert times[-1] > 0 or (steps >= 999 and times[-1] == 0)
    for sampler in ("dpm++2m", "unipc"):
        calls = []

        def denoise(latent, time, calls=calls):
            calls.append(float(time[0]))
            return latent / 2

        draw_samples(sampler, denoise, (1, 2, 2), generators(2), diffusion, 61)
        assert calls == diffusion.sampling_times(61).tolist()


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_its_generator_alone(sampler, prediction):
    diffusion = Diffusion(prediction=prediction)
    together = draw_samples(sampler, exact_denoiser(diffusion), (2, 4, 4), generators(5), diffusion, steps=7)
    alone = draw_samples(sampler, exact_denoiser(diffusion), (2, 4, 4), generators(5)[3:4], diffusion, steps=7)
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


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_sampling_refuses_an_impossible_share_of_fresh_noise(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}, but must lie between 0"):
        sample_ddim(exact_denoiser(Diffusion()), (1, 2, 2), generators(1), Diffusion(), steps=2, eta=eta)

"""Guidance by tracer and region, checked against products of densities."""

import pytest
import torch

from allpet import Autoencoder, Denoiser, LatentDiffusion, ParallelBeam, Sampling
from allpet.diffusion.guidance import drop_prompt, guide
from allpet.diffusion.samplers import draw_samples
from allpet.diffusion.schedule import Diffusion
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator

# x_0 of everything, of one tracer, and of one tracer in one region: means and variances
EVERYTHING, TRACER, BOTH = (0.0, 1.5), (0.5, 0.8), (0.9, 0.3)


def toy(diffusion: Diffusion):
    """The exact conditional model of three Gaussians, chosen by how much of the prompt is open."""

    def predict(latent, time, prompt):
        table = torch.tensor([EVERYTHING, TRACER, BOTH])[(prompt.tracer > 0).long() + (prompt.region > 0).long()]
        mean, variance = table.view(-1, 2, *(1,) * (latent.dim() - 1)).unbind(1)
        alpha, sigma = (values.float().view(mean.shape) for values in diffusion.coefficients(time))
        noise = sigma / (alpha**2 * variance + sigma**2) * (latent - alpha * mean)
        clean = (latent - sigma * noise) / alpha
        return {"epsilon": noise, "flow": noise - clean, "v_prediction": alpha * noise - sigma * clean}[
            diffusion.prediction
        ]

    return predict


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
@pytest.mark.parametrize(("tracer", "region"), [(1.0, 1.0), (2.0, None), (0.0, 0.0), (1.5, 2.5), (3.0, 1.0)])
def test_the_guided_score_is_that_of_the_product_of_densities(prediction, tracer, region):
    diffusion, prompt = Diffusion(prediction=prediction), Prompt.of(["FDG:brain"] * 6)
    time = torch.tensor([10, 200, 500, 700, 900, 980])
    latent = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alpha, sigma = (values.float().view(-1, 1, 1, 1) for values in diffusion.coefficients(time))
    log = {
        part: torch.distributions.Normal(alpha * part[0], (alpha**2 * part[1] + sigma**2).sqrt()).log_prob(latent)
        for part in (EVERYTHING, TRACER, BOTH)
    }
    last = tracer if region is None else region
    product = log[EVERYTHING] + tracer * (log[TRACER] - log[EVERYTHING]) + last * (log[BOTH] - log[TRACER])
    (score,) = torch.autograd.grad(product.sum(), latent)
    clean = diffusion.to_clean(latent, guide(toy(diffusion), prompt, tracer, region)(latent, time), time)
    torch.testing.assert_close((alpha * clean - latent) / sigma**2, score, atol=2e-3, rtol=2e-3)


def test_weights_of_one_are_the_plain_model_to_the_bit():
    diffusion, prompt = Diffusion(), Prompt.of(["FDG:brain", "open:brain", "PSMA:open"])
    latent, time = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 400, 999])
    plain = toy(diffusion)(latent, time, prompt)
    for weights in ((1, None), (1, 1)):
        assert torch.equal(guide(toy(diffusion), prompt, *weights)(latent, time), plain)


def test_what_is_left_open_is_not_guided():
    diffusion, prompt = Diffusion(), Prompt.of(["FDG:open"])
    latent, time = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    answers = [guide(toy(diffusion), prompt, 2.0, region)(latent, time) for region in (1.0, 5.0)]
    torch.testing.assert_close(*answers)


def test_outside_its_interval_guidance_does_nothing_and_costs_nothing():
    diffusion, prompt = Diffusion(prediction="flow"), Prompt.of(["FDG:brain"] * 3)
    latent, time = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 500, 900])
    predict = toy(diffusion)
    plain = predict(latent, time, prompt)
    guided = guide(predict, prompt, 2.0, 3.0)(latent, time)
    some = guide(predict, prompt, 2.0, 3.0, interval=(200, 800))(latent, time)
    assert torch.equal(some[[0, 2]], plain[[0, 2]])
    assert torch.equal(some[1], guided[1])
    assert not torch.allclose(guided, plain)
    calls = []

    def counted(latent, time, prompt):
        calls.append(float(time[0]))
        return predict(latent, time, prompt)

    for weights, each in (((2.0,), 2), ((2.0, 3.0), 3)):
        calls.clear()
        generators = [keyed_generator("x", i) for i in range(3)]
        draw_samples(
            "ddim", guide(counted, prompt, *weights, interval=(250, 750)), (1, 2, 2), generators, diffusion, 10
        )
        assert [calls.count(time) for time in diffusion.sampling_times(10).tolist()] == [1] * 3 + [each] * 5 + [1] * 2


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


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"guidance": float("nan")}, "guidance is nan, but must be a finite number"),
        ({"guidance": float("inf")}, "guidance is inf, but must be"),
        ({"region_guidance": float("nan")}, "region_guidance is nan, but must be"),
        ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval is"),
        ({"eta": 1.5}, "eta is 1.5, but must lie between 0"),
        ({"eta": -0.1}, "eta is -0.1, but must lie between 0"),
        ({"eta": float("nan")}, "eta is nan, but must lie between 0"),
        ({"counts": float("inf")}, "counts is inf, but must be positive and finite"),
        ({"counts": float("nan")}, "counts is nan, but must be positive and finite"),
    ],
)
def test_numbers_that_no_sample_can_be_drawn_with_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Sampling(**wrong)
    assert "\n" not in str(error.value)


def test_every_weight_and_share_in_its_range_is_taken():
    for given in ({"guidance": -1.0}, {"guidance": 0.0}, {"region_guidance": 3.0}, {"eta": 0.0}, {"eta": 1.0}):
        Sampling(**given)


def test_no_prompts_are_refused():
    denoiser = Denoiser(channels=(8,), layers_per_block=1, attention=(False,), head_channels=8)
    system = LatentDiffusion(Autoencoder((8, 16)), denoiser)
    system.geometry = ParallelBeam(16, 16, 20.0, 16, 20.0)
    with pytest.raises(ValueError, match="There are no prompts: give at least one, and a seed for each"):
        system.sample(Prompt.of([]), [])

"""Bridges without a network: exact marginals, exact denoisers, and samplers that converge to the exact answer."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from allpet import Bridge, sample_dbim
from allpet.diffusion.bridge_samplers import sample_bridge_heun, sample_maps, sample_mean
from allpet.diffusion.preconditioning import PairStatistics, Preconditioning, measure_pairs

VP = Bridge("vp")
BRIDGES = [VP, Bridge("ve"), Bridge("brownian"), Bridge.bbdm(), Bridge("i2sb")]
MEAN, DEVIATION, SOURCE = 0.65, 0.33993, 0.7
N = 20000


def time(value):
    return torch.tensor([value], dtype=torch.float64)


def interior(bridge, n=9):
    return bridge.end * torch.linspace(0.1, 0.9, n, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Exact:
    """E[x_0 | x_t, x_T] for a Gaussian x_0 given x_T, counting its calls."""

    def __init__(self, bridge, mean=MEAN, deviation=DEVIATION):
        self.bridge, self.mean, self.variance, self.calls = bridge, mean, deviation**2, 0

    def __call__(self, x, t):
        self.calls += 1
        a, b, c = (float(value[0]) for value in self.bridge.coefficients(t))
        gain = self.variance * b / (b**2 * self.variance + c**2) if c else 0.0
        return self.mean + gain * (x - a * SOURCE - b * self.mean)


def source(n=N):
    return torch.full((1, n), SOURCE, dtype=torch.float64)


def relative_deviation(samples):
    return float(samples.std()) / DEVIATION - 1


class Seen:
    """A denoiser that keeps what it was asked: (x_t, t) of each call."""

    def __init__(self, denoise):
        self.denoise, self.calls = denoise, []

    def __call__(self, x, t):
        self.calls.append((x.clone(), t[:1].clone()))
        return self.denoise(x, t)


def affine_deviation(bridge, **options):
    """Relative error of the standard deviation where x_0 is an affine function of the booting noise; no Monte Carlo."""
    samples = sample_dbim(Exact(bridge), source(2), [generator()], bridge, **options)[0]
    noise = torch.randn(2, generator=generator()).double()
    return float((samples[1] - samples[0]) / (noise[1] - noise[0])) / DEVIATION - 1


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.family)
def test_a_bridge_starts_at_the_target_and_ends_at_the_source(bridge):
    assert [float(v) for v in bridge.coefficients(time(0.0))] == [0, 1, 0]
    torch.testing.assert_close(torch.stack(bridge.coefficients(time(bridge.end))).flatten(), torch.eye(3).double()[0])


def test_constants_of_ddbm_vp():
    one = time(1.0)
    assert float(VP.alpha(one)) == pytest.approx(0.576950, abs=1e-6)
    assert float(VP.rho_squared(one).sqrt()) == pytest.approx(1.415686, abs=1e-6)
    assert float(1 / VP.rho_squared(one)) == pytest.approx(0.498961, abs=1e-6)
    fine = torch.linspace(0, 1, 10001, dtype=torch.float64)
    a, b, c = VP.coefficients(fine)
    assert float(c.max()) == pytest.approx(0.518, abs=1e-3)
    assert float(fine[c.argmax()]) == pytest.approx(0.693, abs=5e-3)
    assert 0.963 <= float((a + b).min()) <= 0.964
    assert float((a + b).max()) <= 1 + 1e-12


def test_largest_noise_of_the_other_families():
    for bridge, largest in [(Bridge("ve"), 40.0), (Bridge.bbdm(), 0.5**0.5), (Bridge("brownian", gamma=0.3), 0.3)]:
        fine = bridge.end * torch.linspace(0, 1, 20001, dtype=torch.float64)
        assert float(bridge.coefficients(fine).c.max()) == pytest.approx(largest, rel=1e-4)
    assert float(Bridge("i2sb").coefficients(time(0.5)).c) == pytest.approx(0.188, abs=5e-4)


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.family)
def test_the_marginal_is_the_product_of_forward_and_pinning_densities(bridge):
    """Bayes: q(x_t | x_0, x_T) ~ q(x_t | x_0) q(x_T | x_t), with alpha and rho alone."""
    t = interior(bridge)
    end = torch.full_like(t, bridge.end)
    alpha, alpha_end = bridge.alpha(t), bridge.alpha(end)
    variance = alpha**2 * bridge.rho_squared(t)
    step = alpha_end / alpha
    step_variance = alpha_end**2 * (bridge.rho_squared(end) - bridge.rho_squared(t))
    precision = 1 / variance + step**2 / step_variance
    a, b, c = bridge.coefficients(t)
    torch.testing.assert_close(c**2, 1 / precision)
    torch.testing.assert_close(a, step / step_variance / precision)
    torch.testing.assert_close(b, alpha / variance / precision)


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.family)
def test_drift_and_diffusion_are_the_derivatives(bridge):
    t = interior(bridge, 8).requires_grad_()
    alpha = bridge.alpha(t)
    log_slope = torch.autograd.grad(alpha.log().sum(), t)[0] if bridge.family == "vp" else torch.zeros_like(t)
    rho_slope = torch.autograd.grad(bridge.rho_squared(t).sum(), t)[0]
    f, g2 = bridge.drift_and_diffusion(t.detach())
    torch.testing.assert_close(f, log_slope)
    torch.testing.assert_close(g2, alpha.detach() ** 2 * rho_slope)


def test_published_aliases_equal_the_general_class():
    t = interior(VP)
    for bridge, scale in [(Bridge("brownian", gamma=0.25), 0.5), (Bridge.bbdm(0.5), 1.0)]:
        a, b, c = bridge.coefficients(t)
        torch.testing.assert_close((a, b, c), (t, 1 - t, scale * (t * (1 - t)).sqrt()))
    snr, last = 1 / VP.rho_squared(t), 1 / VP.rho_squared(time(1.0))
    sigma2 = VP.alpha(t) ** 2 * VP.rho_squared(t)
    ddbm = (last / snr * VP.alpha(t) / VP.alpha(time(1.0)), VP.alpha(t) * (1 - last / snr), (sigma2 * (1 - last / snr)))
    a, b, c = VP.coefficients(t)
    torch.testing.assert_close((a, b, c**2), ddbm)
    # I2SB as it is computed: a table of betas, linear in the root, mirrored, and its cumulative sum.
    half = torch.linspace(math.sqrt(0.1), (math.sqrt(0.1) + math.sqrt(0.3)) / 2, 20000, dtype=torch.float64) ** 2
    sums = torch.cat([half, half.flip(0)]).cumsum(0) / 40000
    share = sums / sums[-1]
    a, b, c = Bridge("i2sb").coefficients(torch.arange(1, 40001, dtype=torch.float64) / 40000)
    torch.testing.assert_close(a, share, atol=1e-4, rtol=0)
    torch.testing.assert_close(c, (sums * (1 - share).clamp_min(0)).sqrt(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.family)
def test_scores_are_gradients_of_log_densities(bridge):
    t = interior(bridge, 5)
    x = torch.linspace(-1, 2, 5, dtype=torch.float64)[:, None].requires_grad_()
    exact, end = torch.full_like(x, SOURCE), torch.full_like(t, bridge.end)
    a, b, c = (value[:, None] for value in bridge.coefficients(t))
    marginal = -((x - a * SOURCE - b * MEAN) ** 2) / (2 * (b**2 * DEVIATION**2 + c**2))
    gain = DEVIATION**2 * b / (b**2 * DEVIATION**2 + c**2)
    clean = MEAN + gain * (x - a * SOURCE - b * MEAN)
    gradient = torch.autograd.grad(marginal.sum(), x)[0]
    torch.testing.assert_close(bridge.score(x, exact, clean, t), gradient)
    step = bridge.alpha(end) / bridge.alpha(t)
    variance = bridge.alpha(end) ** 2 * (bridge.rho_squared(end) - bridge.rho_squared(t))
    pinning = -((exact - step[:, None] * x) ** 2) / (2 * variance[:, None])
    torch.testing.assert_close(bridge.pull(x, exact, t), torch.autograd.grad(pinning.sum(), x)[0])


def test_q_sample_has_the_stated_moments():
    t = torch.full((N,), 0.4)
    noise = torch.randn(N, 1, generator=generator(), dtype=torch.float64)
    x = VP.q_sample(torch.full((N, 1), 2.0).double(), torch.full((N, 1), -1.0).double(), t, noise)
    a, b, c = (float(value) for value in VP.coefficients(time(0.4)))
    assert float(x.mean()) == pytest.approx(2 * b - a, abs=4 * c / math.sqrt(N))
    assert float(x.std()) == pytest.approx(c, rel=0.02)


def test_training_times_have_mass_at_the_end():
    bridge = Bridge("ve", end_share=0.25)
    times = bridge.draw_times(N, generator())
    at_end = times == bridge.end
    assert float(at_end.double().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(times.min()) >= bridge.first * bridge.end
    assert float(times[~at_end].mean()) == pytest.approx(40, rel=0.02)
    assert torch.equal(times, bridge.draw_times(N, generator()))
    told = bridge.network_time(times.sort().values)
    assert (told.diff() >= 0).all()
    assert told[0] >= 0
    assert told[-1] == 1000


def gaussian_pairs(n=100000):
    """Two channels of Gaussian pairs with means and correlations of their own, float64."""
    first, second = torch.randn(2, n, 2, generator=generator(3), dtype=torch.float64)
    correlation = torch.tensor([0.9, -0.4]).double()
    x = torch.tensor([0.3, -1.0]) + torch.tensor([0.5, 2.0]) * first
    y = torch.tensor([1.0, 0.2]) + torch.tensor([0.6, 1.5]) * (
        correlation * first + (1 - correlation**2).sqrt() * second
    )
    return x, y


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.family)
@pytest.mark.parametrize("form", ["endpoint", "published"])
def test_preconditioning_is_the_best_linear_estimate(bridge, form):
    target, given = gaussian_pairs()
    preconditioning = Preconditioning(bridge, measure_pairs(target, given), form)
    for share in (0.3, 0.8):
        t = torch.full((len(target),), share * bridge.end, dtype=torch.float64)
        x = bridge.q_sample(target, given, t, torch.randn(target.shape, generator=generator(1)).double())
        scalings = preconditioning.scalings(t[:1])
        for channel in range(2):
            columns = [torch.ones(len(x)).double(), x[:, channel]]
            columns += [given[:, channel]] if form == "endpoint" else []
            fit = torch.linalg.lstsq(torch.stack(columns, 1), target[:, channel, None])
            slopes = fit.solution[1:, 0]
            assert float(slopes[0]) == pytest.approx(float(scalings.c_skip[0, channel]), abs=0.01, rel=0.02)
            if form == "endpoint":
                assert float(slopes[1]) == pytest.approx(float(scalings.c_source[0, channel]), abs=0.01, rel=0.02)
        residual = preconditioning.residual(x, given, t, target)
        torch.testing.assert_close(residual.square().mean(0), torch.ones(2).double(), atol=0.02, rtol=0)
        # For Gaussian pairs nothing is left that the inputs could predict: the best F is 0.
        inputs = preconditioning.inputs(x, given, t)
        assert float((residual * inputs.noisy).mean(0).abs().max()) < 0.015
        if form == "endpoint":
            assert float((residual * inputs.source).mean(0).abs().max()) < 0.015
        torch.testing.assert_close(inputs.noisy.std(0), torch.ones(2).double(), atol=0.02, rtol=0)
        torch.testing.assert_close(preconditioning.clean(x, given, t, residual), target)


@pytest.mark.parametrize(
    ("correlation", "form", "expected"),
    [
        (0.98, "published", (0.23, 0.43, 0.47, 0.24)),
        (0.98, "endpoint", (0.16, 0.19, 0.20, 0.20)),
        (0.9, "published", (0.24, 0.45, 0.53, 0.45)),
        (0.9, "endpoint", (0.22, 0.36, 0.42, 0.43)),
    ],
)
def test_what_is_left_to_predict_with_strongly_correlated_pairs(correlation, form, expected):
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    stats = PairStatistics(zero, zero, one, one, correlation * one)
    c_out = Preconditioning(VP, stats, form).scalings(torch.tensor([0.2, 0.5, 0.8, 0.99])).c_out
    assert c_out.flatten().tolist() == pytest.approx(expected, abs=0.006)


def test_the_end_is_regression_on_the_source():
    target, given = gaussian_pairs(1000)
    stats = measure_pairs(target, given)
    end = torch.ones(len(target)).double()
    for bridge in (VP, Bridge()):
        preconditioning = Preconditioning(bridge, stats)
        slope = stats.covariance / stats.source_variance
        clean = preconditioning.clean(given, given, end, torch.zeros_like(target))
        torch.testing.assert_close(clean, stats.target_mean + slope * (given - stats.source_mean))
        assert torch.isfinite(preconditioning.scalings(end).weight).all()


def test_perfectly_correlated_pairs_keep_a_finite_weight():
    target, _ = gaussian_pairs(100)
    for form in ("endpoint", "published"):
        scalings = Preconditioning(VP, measure_pairs(target, target), form).scalings(torch.ones(1))
        assert torch.isfinite(scalings.weight).all()


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.family)
def test_the_mean_is_exact_for_every_sampler(bridge):
    """At eta 0 a sample is an affine function of its booting noise, and at noise 0 it is the mean."""
    for nfe in (1, 2, 5, 20):
        for order in (1, 2, 3):
            denoise = Exact(bridge)
            two = sample_dbim(denoise, source(2), [generator()], bridge, nfe=nfe, order=order)[0]
            noise = torch.randn(2, generator=generator()).double()
            slope = (two[1] - two[0]) / (noise[1] - noise[0])
            assert float(two[0] - slope * noise[0]) == pytest.approx(MEAN, abs=1e-6)
            assert denoise.calls == nfe
    mean = sample_mean(Exact(bridge), source(3), bridge)
    torch.testing.assert_close(mean, torch.full_like(mean, MEAN))
    for eta in (0.5, 1.0):
        samples = sample_dbim(Exact(bridge), source(), [generator()], bridge, nfe=5, eta=eta)
        assert float(samples.mean()) == pytest.approx(MEAN, abs=4 * DEVIATION / math.sqrt(N))


@pytest.mark.parametrize(
    ("order", "errors"),
    [
        (1, {5: -0.337, 10: -0.167, 20: -0.085, 50: -0.035, 100: -0.018}),
        (2, {20: -0.024, 50: -0.006, 100: -0.003}),
        (3, {20: -0.036, 50: -0.012, 100: -0.005}),
    ],
)
def test_deviation_of_dbim_converges_as_tabulated(order, errors):
    for nfe, error in errors.items():
        found = affine_deviation(VP, nfe=nfe, order=order, grid="uniform")
        assert found == pytest.approx(error, abs=0.0017, rel=0.09), nfe


def test_deviation_of_markovian_dbim():
    for nfe, error in {5: -0.380, 10: -0.230, 20: -0.137, 50: -0.066}.items():
        samples = sample_dbim(Exact(VP), source(), [generator()], VP, nfe=nfe, eta=1.0, grid="uniform")
        assert relative_deviation(samples) == pytest.approx(error, abs=0.02), nfe


IDS = {"argvalues": BRIDGES, "ids": lambda bridge: f"{bridge.family}-{bridge.gamma:.2f}"}


def half_way_error(bridge, nfe, order):
    """Relative error of the spread half way, from that of the exact flow, which keeps every sample's quantile."""
    seen = Seen(Exact(bridge))
    sample_dbim(seen, source(2), [generator()], bridge, nfe=nfe, order=order)
    spreads = []
    for x, t in (seen.calls[1], seen.calls[1 + nfe // 2]):
        _, b, c = (float(value) for value in bridge.coefficients(t))
        spreads.append(float(x[0, 1] - x[0, 0]) / math.hypot(b * DEVIATION, c))
    return spreads[1] / spreads[0] - 1


@pytest.mark.parametrize("bridge", **IDS)
def test_orders_of_convergence(bridge):
    """Half way: towards the target ln(b / c) runs to infinity, which costs the last steps of order 3 one order."""
    for order, few, many, tolerance in ((1, 51, 101, 0.1), (2, 51, 101, 0.4), (3, 201, 401, 1.6)):
        ratio = half_way_error(bridge, few, order) / half_way_error(bridge, many, order)
        assert ratio == pytest.approx(2**order, abs=tolerance), order
    errors = [abs(half_way_error(bridge, 101, order)) for order in (1, 2, 3)]
    assert errors[0] > 10 * errors[1] > 50 * errors[2]


@pytest.mark.parametrize("bridge", **IDS)
@pytest.mark.parametrize("grid", ["cosine", "uniform"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_step_is_exact_where_the_estimate_of_x0_is_a_polynomial(bridge, grid, order):
    """In l = ln(b / c), of degree order - 1: d(x / c) = x_T d(a / c) + x_0 d(b / c), the integral of p(l) e^l in l."""

    def largest_error(degree):
        weights = [1.0, -0.3, 0.05][: degree + 1]

        def estimate(x, t):
            _, b, c = (float(value[0]) for value in bridge.coefficients(t))
            return torch.full_like(x, sum(w * math.log(b / c) ** k for k, w in enumerate(weights)) if c else 0.0)

        def integral(level):  # p - p' + p'' - ...
            p, parts = list(weights), 0.0
            for sign in (1, -1, 1):
                parts += sign * sum(w * level**k for k, w in enumerate(p))
                p = [k * w for k, w in enumerate(p)][1:]
            return parts * math.exp(level)

        seen, found = Seen(estimate), []
        sample_dbim(seen, source(2), [generator()], bridge, nfe=9, order=order, grid=grid)
        # the first call is at the source, and the order rises by one per step
        for (x, s), (after, t) in pairwise(seen.calls[order:]):
            (a_s, b_s, c_s), (a, b, c) = (map(float, bridge.coefficients(time)) for time in (s, t))
            exact = c * (
                x / c_s + SOURCE * (a / c - a_s / c_s) + integral(math.log(b / c)) - integral(math.log(b_s / c_s))
            )
            found.append(float((after - exact).abs().max() / exact.abs().max()))
        return max(found)

    for degree in range(order):
        assert largest_error(degree) < 1e-9
    if order < 3:
        assert largest_error(order) > 1e-4


@pytest.mark.parametrize("bridge", **IDS)
def test_a_markovian_step_is_the_posterior_of_the_markov_chain(bridge):
    """Eta 1: x_t given x_s and x_0 is Bayes' rule for the reference process, whatever x_T."""
    seen, clean, nfe = Seen(lambda x, t: torch.full_like(x, MEAN)), MEAN, 6
    sample_dbim(seen, source(4), [generator()], bridge, nfe=nfe, eta=1.0)
    drawn = generator()
    noise = [torch.randn(4, generator=drawn).double() for _ in range(nfe - 1)]
    for (x, s), (after, t), fresh in zip(seen.calls[1:], seen.calls[2:], noise[1:], strict=False):
        forward = bridge.alpha(s) / bridge.alpha(t)
        forward_variance = bridge.alpha(s) ** 2 * (bridge.rho_squared(s) - bridge.rho_squared(t))
        prior_variance = bridge.alpha(t) ** 2 * bridge.rho_squared(t)
        variance = 1 / (1 / prior_variance + forward**2 / forward_variance)
        mean = variance * (bridge.alpha(t) / prior_variance * clean + forward / forward_variance * x[0])
        torch.testing.assert_close(after[0], mean + variance.sqrt() * fresh, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_whatever_the_fresh_noise_each_step_keeps_the_marginal(eta):
    seen = Seen(lambda x, t: torch.full_like(x, MEAN))
    sample_dbim(seen, source(), [generator()], VP, nfe=6, eta=eta)
    for x, t in seen.calls[1:]:
        a, b, c = (float(value) for value in VP.coefficients(t))
        assert float(x.mean()) == pytest.approx(a * SOURCE + b * MEAN, abs=4 * c / math.sqrt(N))
        assert float(x.std()) == pytest.approx(c, rel=0.02)


def test_heun_of_ddbm():
    for steps, error, tolerance in [(2, 1.25, 0.08), (4, 0.53, 0.05), (40, 0.053, 0.03)]:
        denoise = Exact(VP)
        samples = sample_bridge_heun(denoise, source(), [generator()], VP, steps=steps)
        assert denoise.calls == 3 * steps - 1
        assert relative_deviation(samples) == pytest.approx(error, abs=tolerance)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.02)  # with fewer steps Euler's first ones bias it


def test_a_sample_depends_on_its_own_seed_alone():
    for sample in (
        lambda x, g: sample_dbim(Exact(VP), x, g, VP, nfe=4, eta=0.5),
        lambda x, g: sample_bridge_heun(Exact(VP), x, g, VP, steps=3),
    ):
        given = source(4).expand(3, -1)
        many = sample(given, [generator(seed) for seed in (1, 2, 3)])
        assert torch.equal(many[1:2], sample(given[:1], [generator(2)]))
        assert not torch.equal(many[0], many[1])


def test_two_modes_are_found():
    """Targets at -1 and 1: one call returns their mean, a few return either."""
    bridge, deviation = Bridge(), 0.15

    def denoise(x, t):
        a, b, c = (float(value[0]) for value in bridge.coefficients(t))
        if not c:
            return torch.zeros_like(x)
        variance = b**2 * deviation**2 + c**2
        rest = x - a * SOURCE
        weight = torch.sigmoid(2 * b * rest / variance)
        gain = deviation**2 * b / variance
        return sum(w * (m + gain * (rest - b * m)) for w, m in ((weight, 1), (1 - weight, -1)))

    assert float(sample_mean(denoise, source(1), bridge)) == 0
    exact = torch.cat([torch.randn(N // 2, generator=generator(7)) * deviation + m for m in (-1, 1)]).sort().values
    for nfe, order, largest in [(10, 1, 0.07), (20, 2, 0.04)]:
        samples = sample_dbim(denoise, source(), [generator()], bridge, nfe=nfe, order=order)[0].sort().values
        assert float((samples - exact).abs().mean()) < largest


def test_maps_of_many_samples():
    samples = torch.randn(7, 2, 3, generator=generator())
    maps = sample_maps(lambda index: samples[index], 7)
    torch.testing.assert_close(maps.mean, samples.mean(0))
    torch.testing.assert_close(maps.deviation, samples.std(0))
    with pytest.raises(ValueError, match="at least 2"):
        sample_maps(lambda index: samples[index], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bridge("edm"), "choose one of brownian"),
        (lambda: Bridge(gamma=0), "gamma is 0"),
        (lambda: Bridge(first=1.0), "fraction of the last time"),
        (lambda: Bridge(end_share=2), "a share"),
        (lambda: Bridge("i2sb", beta_max=0.05), "more than 0.1"),
        (lambda: sample_dbim(Exact(VP), source(1), [generator()], VP, nfe=0), "at least 1"),
        (lambda: sample_dbim(Exact(VP), source(1), [generator()], VP, eta=2), "between 0"),
        (lambda: sample_dbim(Exact(VP), source(1), [generator()], VP, eta=0.5, order=2), "with eta 0"),
        (lambda: sample_dbim(Exact(VP), source(1), [generator()], VP, grid="log"), "choose cosine or uniform"),
        (lambda: sample_dbim(Exact(VP), source(1), [], VP), "0 generators for 1 samples"),
        (lambda: sample_bridge_heun(Exact(VP), source(1), [generator()], VP, churn=0), "every seed gives the same"),
        (lambda: sample_bridge_heun(Exact(VP), source(1), [generator()], VP, churn=1.0), r"lie in \(0, 1\)"),
        (lambda: measure_pairs(torch.ones(5, 2), torch.ones(5, 3)), "expected the same"),
        (lambda: measure_pairs(torch.ones(5, 2), torch.ones(5, 2)), "constant or not finite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)

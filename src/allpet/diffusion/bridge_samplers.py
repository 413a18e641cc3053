"""Samplers of bridges: functions that turn a source x_T into a target with a denoiser ``(x_t, t) -> x_0``.

Every sample owns its generator, so a sample depends on its seed alone, not on the batch it is drawn in. The number of
denoiser calls (NFE) is an argument. With one call all that can be had is the mean of the targets, D(x_T, T), which is
what a regression would give: best in squared error, and the same for every seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from allpet.diffusion.bridge import Bridge, BridgeDenoise
from allpet.diffusion.samplers import StepCallback, draw_noise

BOOT = 1e-3
"""How far before the end, as a fraction of it, DBIM draws its first noise; at the end itself there is none."""
HEUN_START = 1e-4
"""How far before the end, as a fraction of it, DDBM's sampler starts."""


@torch.no_grad()
def sample_mean(denoise: BridgeDenoise, source: Tensor, bridge: Bridge) -> Tensor:
    """The mean of the targets of ``source`` ``(batch, ...)`` by one call at the end, ``(batch, ...)``."""
    return denoise(source, _times(bridge.end, source)).to(source)


@torch.no_grad()
def sample_dbim(
    denoise: BridgeDenoise,
    source: Tensor,
    generators: Sequence[torch.Generator],
    bridge: Bridge,
    nfe: int = 20,
    eta: float = 0.0,
    order: Literal[1, 2, 3] = 1,
    grid: Literal["cosine", "uniform"] = "cosine",
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Diffusion bridge implicit models (Zheng et al., arXiv 2405.15885).

    The first call, at the end, gives x_0 for the booting noise, which makes samples differ: from the source alone a
    deterministic sampler could return but one. Then each call at s steps to t < s,
    x_t = k x_s + (b_t - k b_s) x_0 + (a_t - k a_s) x_T + omega z with k = sqrt(c_t^2 - omega^2) / c_s and
    omega = eta alpha_t rho_t sqrt(1 - rho_t^2 / rho_s^2). Orders 2 and 3 extrapolate x_0 in ln(b / c) from earlier
    calls; the order rises from 1 by one per step, and the last step, to 0, is of order 1. Prefer order 1 below about 20
    calls, where extrapolation overshoots if the targets have several modes.

    Args:
        denoise: maps x_t ``(batch, ...)`` and times ``(batch,)`` to the mean of x_0.
        source: x_T, ``(batch, ...)``.
        generators: one CPU generator per sample.
        bridge: the bridge.
        nfe: number of denoiser calls; 1 returns the mean.
        eta: 0 is deterministic given the booting noise, 1 is Markovian, as random as the bridge.
        order: 1, 2 or 3; more than 1 needs eta 0.
        grid: "cosine" puts more times near both ends.
        callback: called after each call with (call, nfe, estimate of x_0).
        progress: whether to show a progress bar.

    Returns:
        ``(batch, ...)``.

    Raises:
        ValueError: if an argument is impossible.
    """
    if nfe < 1:
        raise ValueError(f"nfe is {nfe}, but must be at least 1, the call at the source.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must lie between 0 (deterministic) and 1 (as random as the bridge).")
    if order not in (1, 2, 3) or (order > 1 and eta > 0):
        raise ValueError(f"order is {order} and eta {eta}; choose order 1, or order 2 or 3 with eta 0.")
    _check_generators(source, generators)
    times = _grid(nfe, bridge.end * (1 - BOOT), grid)
    clean = sample_mean(denoise, source, bridge)
    if callback is not None:
        callback(1, nfe, clean)
    if nfe == 1:
        return clean
    a, b, c = (values.tolist() for values in bridge.coefficients(times))
    rho2, alpha = bridge.rho_squared(times).tolist(), bridge.alpha(times).tolist()
    shape = source.shape[1:]
    x = a[0] * source + b[0] * clean + c[0] * draw_noise(shape, generators, source.device).to(source)
    history: list[tuple[float, Tensor]] = []
    for i in tqdm(range(nfe - 1), desc="Sampling", disable=not progress, leave=False):
        clean = denoise(x, _times(float(times[i]), source)).to(source)
        if i + 2 == nfe:
            x = clean
        elif order == 1:
            omega = eta * alpha[i + 1] * math.sqrt(rho2[i + 1] * (1 - rho2[i + 1] / rho2[i]))
            k = math.sqrt(max(c[i + 1] ** 2 - omega**2, 0.0)) / c[i]
            x = k * x + (b[i + 1] - k * b[i]) * clean + (a[i + 1] - k * a[i]) * source
            if omega:
                x = x + omega * draw_noise(shape, generators, source.device).to(source)
        else:
            history = [(math.log(b[i] / c[i]), clean), *history][:order]
            k, h = c[i + 1] / c[i], math.log(b[i + 1] / c[i + 1]) - history[0][0]
            x = k * x + (a[i + 1] - k * a[i]) * source + b[i + 1] * _integral(history, h)
        if callback is not None:
            callback(i + 2, nfe, clean)
    return x


def _integral(history: list[tuple[float, Tensor]], h: float) -> Tensor:
    """Integral of exp(r - h) x_0(r) over r = 0..h, x_0 a polynomial through the calls at (ln(b / c), x_0), last first.

    r is ln(b / c) since the last call.
    """
    decay = math.exp(-h)
    total = (1 - decay) * history[0][1]
    if len(history) == 1:
        return total
    h1 = history[0][0] - history[1][0]
    slope = (history[0][1] - history[1][1]) / h1
    if len(history) == 2:
        return total + (decay + h - 1) * slope
    h2 = history[1][0] - history[2][0]
    curvature = 2 * (slope - (history[1][1] - history[2][1]) / h2) / (h1 + h2)
    return total + (decay + h - 1) * (slope + curvature * h1 / 2) + (h**2 / 2 - h + 1 - decay) * curvature


@torch.no_grad()
def sample_bridge_heun(
    denoise: BridgeDenoise,
    source: Tensor,
    generators: Sequence[torch.Generator],
    bridge: Bridge,
    steps: int = 40,
    churn: float = 0.33,
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """DDBM's hybrid sampler (Zhou et al., arXiv 2309.16948, algorithm 1), the method to compare with.

    Each step goes the share ``churn`` of its way by Euler-Maruyama on the reverse stochastic equation
    dx = (f x - g^2 (score - pull)) dt + g dw, and the rest by Heun on the probability flow
    dx = (f x - g^2 (score / 2 - pull)) dt; the last step, to 0, ends in Euler. It makes 3 steps - 1 denoiser calls, at
    times that are even in t^(1/7).

    Args:
        denoise: as in ``sample_dbim``.
        source: x_T, ``(batch, ...)``.
        generators: one CPU generator per sample.
        bridge: the bridge.
        steps: number of steps, at least 1.
        churn: share of each step that is stochastic, in (0, 1).
        callback: called after each step with (step, steps, estimate of x_0).
        progress: whether to show a progress bar.

    Returns:
        ``(batch, ...)``.

    Raises:
        ValueError: if an argument is impossible; without churn all samples would be one.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1.")
    if churn == 0:
        raise ValueError(
            "churn is 0, with which every seed gives the same sample, because the bridge starts at the source without "
            "noise; choose a churn in (0, 1) or sample_dbim, which draws a booting noise."
        )
    if not 0 < churn < 1:
        raise ValueError(f"churn is {churn}, but must lie in (0, 1), as a share of each step.")
    _check_generators(source, generators)

    def slope(x: Tensor, time: float, weight: float) -> tuple[Tensor, Tensor, float]:
        t = _times(time, source)
        clean = denoise(x, t).to(source)
        f, g2 = (float(value[0]) for value in bridge.drift_and_diffusion(t[:1]))
        gradient = weight * bridge.score(x, source, clean, t) - bridge.pull(x, source, t)
        return f * x - g2 * gradient, clean, g2

    low, high = (1e-4 * bridge.end) ** (1 / 7), (bridge.end * (1 - HEUN_START)) ** (1 / 7)
    times = [*((torch.linspace(high, low, steps, dtype=torch.float64)) ** 7).tolist(), 0.0]
    x = source
    for i in tqdm(range(steps), desc="Sampling", disable=not progress, leave=False):
        middle = times[i] + churn * (times[i + 1] - times[i])
        drift, clean, g2 = slope(x, times[i], 1.0)
        noise = draw_noise(source.shape[1:], generators, source.device).to(source)
        x = x + drift * (middle - times[i]) + math.sqrt(g2 * (times[i] - middle)) * noise
        drift, clean, _ = slope(x, middle, 0.5)
        after = x + drift * (times[i + 1] - middle)
        if times[i + 1] > 0:
            second, clean, _ = slope(after, times[i + 1], 0.5)
            after = x + (drift + second) / 2 * (times[i + 1] - middle)
        x = after
        if callback is not None:
            callback(i + 1, steps, clean)
    return x


class SampleMaps(NamedTuple):
    """Mean and standard deviation (K - 1 in the denominator) over K samples, both shaped like one sample."""

    mean: Tensor
    deviation: Tensor


def sample_maps(draw: Callable[[int], Tensor], n_samples: int) -> SampleMaps:
    """Mean and standard deviation maps of samples that need not fit in memory together (Welford's recurrence).

    Args:
        draw: maps the sample's index, 0 .. n_samples - 1, to a sample, for example one decoded to a sinogram.
        n_samples: K, at least 2.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    if n_samples < 2:
        raise ValueError(f"n_samples is {n_samples}, but a standard deviation needs at least 2.")
    first = draw(0)
    mean = first.double()
    squares = torch.zeros_like(mean)
    for index in range(1, n_samples):
        sample = draw(index).double()
        difference = sample - mean
        mean = mean + difference / (index + 1)
        squares = squares + difference * (sample - mean)
    return SampleMaps(mean.to(first), (squares / (n_samples - 1)).sqrt().to(first))


def _grid(nfe: int, start: float, grid: str) -> Tensor:
    """Times of the calls after the first, then 0: ``(nfe,)`` float64, from ``start`` down."""
    share = torch.linspace(0, 1, nfe, dtype=torch.float64)
    if grid == "cosine":
        return start * (1 + torch.cos(math.pi * share)) / 2
    if grid == "uniform":
        return start * (1 - share)
    raise ValueError(f"There is no grid {grid!r}; choose cosine or uniform.")


def _times(time: float, source: Tensor) -> Tensor:
    return torch.full((len(source),), time, dtype=torch.float64, device=source.device)


def _check_generators(source: Tensor, generators: Sequence[torch.Generator]) -> None:
    if len(generators) != len(source):
        raise ValueError(f"There are {len(generators)} generators for {len(source)} samples; give each its own.")

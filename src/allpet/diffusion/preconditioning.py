"""What the network of a bridge sees and predicts, so that its task has unit size at every time.

D = mean_0 + c_skip (x_t - mean_t) + c_source (x_T - mean_T) + c_out F(c_in (x_t - mean_t), (x_T - mean_T) / std_T)

"published": the best linear estimate of x_0 from x_t alone (DDBM, arXiv 2309.16948, section 4.2), c_source = 0.
"endpoint": the best one from x_t and x_T, both of which the network is given. With k = cov / var_T, the variance
v = var_0 - cov^2 / var_T that x_T leaves open, and n = v (1 - rho_t^2 / rho_T^2) + rho_t^2:
c_skip = v / (alpha_t n), c_source = k - c_skip (a + b k), c_out^2 = v rho_t^2 / n. For Gaussian pairs the best F is 0;
at t = T the network predicts the standardised residual of a regression on the source.
Statistics are per channel and measured on the training pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allpet.diffusion.bridge import Bridge, along

LARGEST_CORRELATION = 0.995
"""At 1 nothing would be left to predict and the loss weight would be infinite."""


class PairStatistics(NamedTuple):
    """First and second moments of pairs of latents, each ``(channels,)``, float64."""

    target_mean: Tensor
    source_mean: Tensor
    target_variance: Tensor
    source_variance: Tensor
    covariance: Tensor


def measure_pairs(target: Tensor, source: Tensor) -> PairStatistics:
    """Measure the moments over all but the channel axis of ``(samples, channels, ...)``.

    Raises:
        ValueError: if the shapes differ, or a channel is constant or not finite.
    """
    if target.shape != source.shape or target.dim() < 2:
        raise ValueError(
            f"Targets have shape {tuple(target.shape)} and sources {tuple(source.shape)}; "
            "expected the same (samples, channels, ...) for both."
        )
    x, y = (values.double().transpose(0, 1).flatten(1) for values in (target, source))
    x_mean, y_mean = x.mean(1), y.mean(1)
    x, y = x - x_mean[:, None], y - y_mean[:, None]
    x_variance, y_variance = x.square().mean(1), y.square().mean(1)
    if not ((x_variance > 0) & (y_variance > 0) & (x_variance + y_variance).isfinite()).all():
        raise ValueError(
            "A channel of the pairs is constant or not finite; a bridge needs finite latents that vary, "
            "so check the encoder and the data."
        )
    covariance = (x * y).mean(1)
    limit = LARGEST_CORRELATION * (x_variance * y_variance).sqrt()
    return PairStatistics(x_mean, y_mean, x_variance, y_variance, covariance.clamp(-limit, limit))


class Scalings(NamedTuple):
    """The module's coefficients, each ``(batch, channels)``, float64; ``weight`` = 1 / c_out^2 is the loss weight."""

    c_in: Tensor
    c_skip: Tensor
    c_source: Tensor
    c_out: Tensor
    weight: Tensor


class Inputs(NamedTuple):
    """What the network is given, both ``(batch, channels, ...)`` of unit size."""

    noisy: Tensor
    source: Tensor


@dataclass(frozen=True, eq=False)
class Preconditioning:
    """Scalings of a bridge's network.

    Args:
        bridge: the bridge.
        statistics: of the training pairs.
        form: see the module.
    """

    bridge: Bridge
    statistics: PairStatistics
    form: Literal["endpoint", "published"] = "endpoint"

    def scalings(self, time: Tensor) -> Scalings:
        """Coefficients at ``time`` ``(batch,)``, larger than 0."""
        t = time.double()[:, None]
        a, b, c = self.bridge.coefficients(t)
        stats = PairStatistics(*(value.to(t.device) for value in self.statistics))
        s0, s1, cov = stats.target_variance, stats.source_variance, stats.covariance
        c_in = (a**2 * s1 + b**2 * s0 + 2 * a * b * cov + c**2).rsqrt()
        if self.form == "published":
            c_skip = (b * s0 + a * cov) * c_in**2
            c_source = torch.zeros_like(c_skip)
            c_out = c_in * (a**2 * (s0 * s1 - cov**2) + s0 * c**2).sqrt()
        else:
            k, v = cov / s1, s0 - cov**2 / s1
            rho2 = self.bridge.rho_squared(t)
            left = 1 - rho2 / self.bridge.rho_squared(torch.full_like(t, self.bridge.end))
            n = v * left + rho2
            c_skip = v / (self.bridge.alpha(t) * n)
            c_source = k - c_skip * (a + b * k)
            c_out = (v * rho2 / n).sqrt()
        return Scalings(c_in, c_skip, c_source, c_out, c_out**-2)

    def inputs(self, x: Tensor, source: Tensor, time: Tensor) -> Inputs:
        """Scaled inputs for the network; ``x`` and ``source`` ``(batch, channels, ...)``."""
        centred, centred_source = self._centred(x, source, time)
        size = self.statistics.source_variance.rsqrt().expand(len(x), -1)
        return Inputs(along(self.scalings(time).c_in, x) * centred, along(size, x) * centred_source)

    def clean(self, x: Tensor, source: Tensor, time: Tensor, output: Tensor) -> Tensor:
        """D, the estimate of x_0, from the network's output F; all ``(batch, channels, ...)``."""
        centred, centred_source = self._centred(x, source, time)
        scalings = self.scalings(time)
        mean = self.statistics.target_mean.expand(len(x), -1)
        return (
            along(mean, x)
            + along(scalings.c_skip, x) * centred
            + along(scalings.c_source, x) * centred_source
            + along(scalings.c_out, x) * output
        )

    def residual(self, x: Tensor, source: Tensor, time: Tensor, target: Tensor) -> Tensor:
        """The output F that makes ``clean`` return ``target``: what the network is trained towards.

        |F - residual|^2 is |D - x_0|^2 times the loss weight.
        """
        linear = self.clean(x, source, time, torch.zeros_like(x))
        return (target - linear) / along(self.scalings(time).c_out, x)

    def _centred(self, x: Tensor, source: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        a, b, _ = self.bridge.coefficients(time.double()[:, None])
        means = self.statistics
        mean = a * means.source_mean.to(a.device) + b * means.target_mean.to(a.device)
        return x - along(mean, x), source - along(means.source_mean.expand(len(x), -1), x)

"""Diffusion bridges from a source x_T (the given scan) to a target x_0: x_t = a_t x_T + b_t x_0 + c_t noise.

A reference diffusion x_t = alpha_t x_0 + sigma_t noise that is pinned at x_T (Doob's h-transform) has these marginals
(DDBM, Zhou et al., arXiv 2309.16948; in the form of DBIM, Zheng et al., arXiv 2405.15885), so alpha_t and the
noise-to-signal ratio rho_t = sigma_t / alpha_t say all there is to say about a bridge. Four published families differ
in nothing else: DDBM-VP, DDBM-VE, the Brownian bridge (BBDM, CVPR 2023; ECSI, arXiv 2410.21553) and I2SB (Liu et al.,
arXiv 2302.05872). Coefficients are float64 throughout: c_t vanishes at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FAMILIES = ("brownian", "vp", "ve", "i2sb")


class Coefficients(NamedTuple):
    """Of x_T, x_0 and the noise in x_t; float64, shaped like the times."""

    a: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Bridge:
    """A bridge; times run from 0 (target) to ``end`` (source).

    Args:
        family: which alpha and rho.
        gamma: of "brownian": the largest standard deviation of the noise, half way, in units of the latents.
        beta_min: of "vp": rate of noise at t = 0.
        beta_slope: of "vp": by how much the rate grows until t = 1.
        sigma_max: of "ve": the last time, which is also the reference's last standard deviation.
        beta_max: of "i2sb": rate of noise half way if the square root of the rate grew from sqrt(0.1) for t = 0 to
            sqrt(beta_max) for t = 1; it is mirrored at 1/2.
        first: the smallest training time, as a fraction of ``end``; the loss weight is infinite at 0.
        end_share: share of the training times that are exactly ``end``, where one call gives the mean of the targets.

    Raises:
        ValueError: if a parameter is impossible.
    """

    family: Literal["brownian", "vp", "ve", "i2sb"] = "brownian"
    gamma: float = 0.35
    beta_min: float = 0.1
    beta_slope: float = 2.0
    sigma_max: float = 80.0
    beta_max: float = 0.3
    first: float = 1e-3
    end_share: float = 0.1

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"There is no bridge {self.family!r}; choose one of {', '.join(FAMILIES)}.")
        for name in ("gamma", "beta_min", "beta_slope", "sigma_max"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive and finite.")
        if not 0.1 < self.beta_max < math.inf:
            raise ValueError(f"beta_max is {self.beta_max}, but must be more than 0.1, where the rate begins.")
        if not 0 < self.first < 1:
            raise ValueError(f"first is {self.first}, but must lie between 0 and 1, as a fraction of the last time.")
        if not 0 <= self.end_share <= 1:
            raise ValueError(f"end_share is {self.end_share}, but is a share, from 0 to 1.")

    @classmethod
    def bbdm(cls, scale: float = 1.0) -> Bridge:
        """BBDM's bridge of variance 2 scale (m - m^2)."""
        return cls("brownian", gamma=math.sqrt(scale / 2))

    @property
    def end(self) -> float:
        """The time T of the source."""
        return self.sigma_max if self.family == "ve" else 1.0

    def alpha(self, time: Tensor) -> Tensor:
        """Signal of the reference diffusion at ``time``, float64."""
        t = time.double()
        if self.family == "vp":
            return torch.exp(-self.beta_min * t / 2 - self.beta_slope * t**2 / 4)
        return torch.ones_like(t)

    def rho_squared(self, time: Tensor) -> Tensor:
        """Squared noise-to-signal ratio of the reference diffusion at ``time``, float64."""
        t = time.double()
        if self.family == "vp":
            return torch.expm1(self.beta_min * t + self.beta_slope * t**2 / 2)
        if self.family == "ve":
            return t**2
        if self.family == "brownian":
            return 4 * self.gamma**2 * t
        half = self._i2sb_integral(torch.tensor(0.5, dtype=torch.float64))
        return torch.where(t <= 0.5, self._i2sb_integral(t), 2 * half - self._i2sb_integral(1 - t))

    def drift_and_diffusion(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """F and g^2 of the reference dx = f x dt + g dw: f = d ln alpha / dt, g^2 = alpha^2 d rho^2 / dt; float64."""
        t = time.double()
        if self.family == "vp":
            rate = self.beta_min + self.beta_slope * t
            return -rate / 2, rate
        if self.family == "ve":
            return torch.zeros_like(t), 2 * t
        if self.family == "brownian":
            return torch.zeros_like(t), torch.full_like(t, 4 * self.gamma**2)
        return torch.zeros_like(t), self._i2sb_root(torch.minimum(t, 1 - t)) ** 2

    def coefficients(self, time: Tensor) -> Coefficients:
        """a, b, c of x_t = a x_T + b x_0 + c noise; (0, 1, 0) at 0 and (1, 0, 0) at the end.

        a = alpha_t / alpha_T rho_t^2 / rho_T^2,  b = alpha_t (1 - rho_t^2 / rho_T^2),
        c = alpha_t rho_t sqrt(1 - rho_t^2 / rho_T^2).
        """
        alpha, rho2 = self.alpha(time), self.rho_squared(time)
        last = torch.full_like(alpha, self.end)
        share = rho2 / self.rho_squared(last)
        left = (1 - share).clamp_min(0)
        return Coefficients(alpha / self.alpha(last) * share, alpha * left, alpha * (rho2 * left).sqrt())

    def q_sample(self, target: Tensor, source: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """x_t of pairs; ``target``, ``source`` and ``noise`` ``(batch, ...)``, ``time`` ``(batch,)``."""
        a, b, c = (along(value, target) for value in self.coefficients(time))
        return a * source + b * target + c * noise

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw ``(batch,)`` training times, float64: uniform, but a share ``end_share`` of them is the end."""
        at_end = torch.rand(batch, generator=generator, dtype=torch.float64) < self.end_share
        uniform = torch.rand(batch, generator=generator, dtype=torch.float64)
        return torch.where(at_end, 1.0, self.first + (1 - self.first) * uniform) * self.end

    def network_time(self, time: Tensor) -> Tensor:
        """What a network is told of the time, 0..1000, float32; linear in time, but in its logarithm for "ve"."""
        share = time.double() / self.end
        if self.family == "ve":
            share = 1 + share.clamp_min(1e-8).log() / -math.log(1e-8)
        return (1000 * share).float()

    def score(self, x: Tensor, source: Tensor, clean: Tensor, time: Tensor) -> Tensor:
        """Gradient of log q(x_t | x_T) given the mean ``clean`` of x_0 at x_t: -(x - a x_T - b x_0) / c^2.

        Shapes as in ``q_sample``; times strictly between 0 and the end.
        """
        a, b, c = (along(value, x) for value in self.coefficients(time))
        return -(x - a * source - b * clean) / c**2

    def pull(self, x: Tensor, source: Tensor, time: Tensor) -> Tensor:
        """Gradient h of log p(x_T | x_t) under the reference, which pulls towards the source; shapes as in ``score``.

        h = (alpha_t / alpha_T x_T - x) / (alpha_t^2 (rho_T^2 - rho_t^2)).
        """
        alpha, rho2 = self.alpha(time), self.rho_squared(time)
        last = torch.full_like(alpha, self.end)
        ratio, variance = alpha / self.alpha(last), alpha**2 * (self.rho_squared(last) - rho2)
        return (along(ratio, x) * source - x) / along(variance, x)

    def _i2sb_root(self, t: Tensor) -> Tensor:
        return math.sqrt(0.1) + (math.sqrt(self.beta_max) - math.sqrt(0.1)) * t

    def _i2sb_integral(self, t: Tensor) -> Tensor:
        slope = math.sqrt(self.beta_max) - math.sqrt(0.1)
        return (self._i2sb_root(t) ** 3 - 0.1**1.5) / (3 * slope)


def along(values: Tensor, x: Tensor) -> Tensor:
    """Make ``(batch,)`` or ``(batch, channels)`` numbers multiply ``(batch, channels, ...)``, in the type of x."""
    return values.reshape(*values.shape, *(1,) * (x.dim() - values.dim())).to(x)


BridgeDenoise = Callable[[Tensor, Tensor], Tensor]
"""Maps x_t ``(batch, ...)`` and times ``(batch,)``, float64, to the mean of x_0 given x_t and x_T."""

"""Score-based generation by a variance-exploding process: x_sigma = x_0 + sigma noise.

The process and its score are Song et al.'s VE-SDE (arXiv 2011.13456, eq. 9 and 30); how the network is scaled, at which
noise it is trained and how its score is integrated is Karras et al.'s EDM (arXiv 2206.00364, table 1, algorithm 2).

Vocabulary. The *denoiser* D(x; sigma) estimates x_0; the score is (D(x; sigma) - x) / sigma^2. The *network* F is what
is trained: D = c_skip x + c_out F(c_in x; c_noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from allpet.diffusion.samplers import draw_noise

Denoiser = Callable[[Tensor, Tensor], Tensor]


class Scalings(NamedTuple):
    """Coefficients of D = c_skip x + c_out F(c_in x; c_noise), each of sigma's shape.

    Attributes:
        skip: of the noisy sample.
        out: of the network's output.
        into: of the network's input.
        noise: what the network is told of sigma.
    """

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


@dataclass(frozen=True)
class VarianceExploding:
    """The process, and at which noise it is learned.

    Args:
        sigma_min: least noise; what lies below it is removed by the last step, as noise of the measurement should be.
        sigma_max: most noise. It must hide the total activity, which all bins share: more than the standard deviation
            of a bin times the square root of the number of bins.
        location: mean of ln sigma in training. Sinograms are smooth, so that their content is decided at more noise
            than that of photographs, where it is -1.2.
        spread: standard deviation of ln sigma in training.
        rho: the sampler's steps are equal in sigma ** (1 / rho).

    Raises:
        ValueError: if the numbers are not in order.
    """

    sigma_min: float = 0.01
    sigma_max: float = 80.0
    location: float = 0.0
    spread: float = 1.6
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}: 0 < sigma_min < sigma_max must hold."
            )
        for name in ("spread", "rho"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive.")

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments."""
        return asdict(self)

    def scalings(self, sigma: Tensor, sigma_data: Tensor | float) -> Scalings:
        """Coefficients that keep the network's input and target at unit variance (arXiv 2206.00364, table 1).

        Args:
            sigma: of the noise, any shape.
            sigma_data: standard deviation of the data.
        """
        total = sigma.square() + sigma_data**2
        return Scalings(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), 250 * sigma.log())

    def draw_sigma(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw ``(batch,)`` noise levels for training: ln sigma is normal."""
        return (self.location + self.spread * torch.randn(batch, generator=generator)).exp()

    def grid(self, steps: int) -> list[float]:
        """Noise levels of a sampler, ``steps`` from the most to the least, then 0 (arXiv 2206.00364, eq. 5)."""
        top, bottom = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return [(top + i / max(steps - 1, 1) * (bottom - top)) ** self.rho for i in range(steps)] + [0.0]


@torch.no_grad()
def sample_heun(
    denoise: Denoiser,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    process: VarianceExploding,
    steps: int = 30,
    churn: float = 0.0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Heun's method on the probability-flow equation, with fresh noise if asked for (arXiv 2206.00364, algorithm 2).

    The denoiser is called 2 steps - 1 times.

    Args:
        denoise: D, maps x ``(batch, *shape)`` and sigma ``(batch,)`` to an estimate of x_0.
        shape: of one sample.
        generators: one CPU generator per sample.
        process: the noise levels.
        steps: number of noise levels.
        churn: noise added and removed again over the whole path; it mends errors of earlier steps. 0 is deterministic
            given the first noise.
        device: where to sample.
        progress: whether to show a progress bar.

    Returns:
        ``(batch, *shape)``.

    Raises:
        ValueError: if steps or churn are impossible.
    """
    if steps < 1 or churn < 0:
        raise ValueError(f"steps is {steps} and churn {churn}, but at least 1 and 0 are needed.")
    levels = process.grid(steps)
    gamma = min(churn / steps, math.sqrt(2) - 1)
    sample = levels[0] * draw_noise(shape, generators, device)

    def slope(value: Tensor, sigma: float) -> Tensor:
        # dx / dsigma = -sigma score = (x - D) / sigma
        return (value - denoise(value, torch.full((len(value),), sigma, device=value.device))) / sigma

    for step in tqdm(range(steps), desc="Sampling", disable=not progress, leave=False):
        sigma, following = levels[step], levels[step + 1]
        if gamma:
            more = sigma * (1 + gamma)
            sample = sample + math.sqrt(more**2 - sigma**2) * draw_noise(shape, generators, device)
            sigma = more
        first = slope(sample, sigma)
        euler = sample + (following - sigma) * first
        sample = sample + (following - sigma) * 0.5 * (first + slope(euler, following)) if following else euler
    return sample

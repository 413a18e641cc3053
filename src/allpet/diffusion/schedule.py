"""The diffusion process: x_t = alpha_t x_0 + sigma_t noise, and what a network is asked to predict.

DDPM (Ho et al., arXiv 2006.11239) with the cosine schedule (Nichol & Dhariwal, arXiv 2102.09672) and the velocity
v = alpha_t noise - sigma_t x_0 (Salimans & Ho, arXiv 2202.00512) by default. The cosine schedule ends in noise: at
t = T alpha is 5e-5, so the mean of a latent, which carries the total activity, does not leak into the start.

Flow matching (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003) is the same with the straight path
alpha = 1 - t, sigma = t and its velocity dx/dt = noise - x_0. A step of DDIM is then Euler's step along it.

A prediction of the noise says little of x_0 where there is nothing but noise: x_0 = (x_t - sigma noise) / alpha, so a
step to alpha_s makes an error of the prediction alpha_s / alpha times larger: 1580 times in the first of 20 steps from
the cosine schedule's end. Sampling by it begins a little below, see ``Diffusion.sampling_times``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

LARGEST_RISE = 4.0
"""How many times the first step may enlarge alpha where noise is predicted, and with it the prediction's error. With
less, sampling would begin lower, where the mean, which is taken for 0, is larger."""


@dataclass(frozen=True)
class Diffusion:
    """A diffusion process; larger times are noisier: whole ones 0 .. n_steps - 1, or any in 0 .. n_steps with "flow".

    Args:
        n_steps: number of times; with "flow", the time at which there is nothing but noise.
        schedule: name of the beta schedule, as in diffusers ("squaredcos_cap_v2" is the cosine schedule); "flow" has
            its own path and does not read it.
        prediction: what the network predicts; "flow" is the velocity of the straight path. "epsilon", the noise, is for
            comparison: sampling begins below the last time (``sampling_times``), and errors of the prediction weigh
            more.
        times: how training times are drawn; "logit_normal" puts more of them in the middle (arXiv 2403.03206).
        location: of the logit-normal; more is noisier.
        spread: of the logit-normal. At 0 and 1, as published for long trainings, 0.2 % of the times are beyond 0.95 T,
            where nothing but the prompt tells the total activity, and short trainings make sinograms too weak; at 0.3
            and 1.4 there are 3 %.
    """

    n_steps: int = 1000
    schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    prediction: Literal["v_prediction", "epsilon", "flow"] = "v_prediction"
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    location: float = 0.3
    spread: float = 1.4

    def __post_init__(self) -> None:
        if self.prediction not in ("v_prediction", "epsilon", "flow"):
            raise ValueError(
                f"prediction is {self.prediction!r}, but must be 'v_prediction', 'epsilon' or 'flow' (flow matching)."
            )
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"times is {self.times!r}, but must be 'uniform' or 'logit_normal'.")
        if self.n_steps < 1 or not self.spread > 0:
            raise ValueError(f"n_steps is {self.n_steps} and spread {self.spread}, but both must be positive.")

    def scheduler_config(self) -> dict[str, Any]:
        """Arguments for diffusers' schedulers. Latents are never clipped; sampling starts at the last time."""
        path = {"use_flow_sigmas": True} if self.prediction == "flow" else {"beta_schedule": self.schedule}
        return {
            "num_train_timesteps": self.n_steps,
            **path,
            "prediction_type": "flow_prediction" if self.prediction == "flow" else self.prediction,
            "clip_sample": False,
            "timestep_spacing": "trailing",
        }

    @cached_property
    def alpha_sigma(self) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at every whole time, two float64 tensors.

        Alpha^2 + sigma^2 = 1, ``(n_steps,)``; with "flow" alpha + sigma = 1, ``(n_steps + 1,)``.
        """
        if self.prediction == "flow":
            sigma = torch.arange(self.n_steps + 1, dtype=torch.float64) / self.n_steps
            return 1 - sigma, sigma
        betas = DDPMScheduler(**self.scheduler_config()).betas.double()
        alpha_squared = torch.cumprod(1 - betas, dim=0)
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at ``time`` of any shape: two float64 tensors of that shape."""
        if self.prediction == "flow":
            sigma = time.double() / self.n_steps
            return 1 - sigma, sigma
        alpha, sigma = (table[time.cpu()] for table in self.alpha_sigma)
        return alpha, sigma

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw ``(batch,)`` training times on the CPU: int64, or float32 in (0, n_steps] with "flow"."""
        flow = self.prediction == "flow"
        if self.times == "uniform":
            if flow:
                return (1 - torch.rand(batch, generator=generator)) * self.n_steps
            return torch.randint(self.n_steps, (batch,), generator=generator)
        # In the velocity's terms the middle of the path is where alpha = sigma; both paths have it at T / 2.
        share = torch.sigmoid(self.location + self.spread * torch.randn(batch, generator=generator))
        return share * self.n_steps if flow else (share * self.n_steps).long().clamp(max=self.n_steps - 1)

    def sampling_times(self, steps: int, fresh_noise: bool = True) -> Tensor:
        """Times of ``steps`` denoiser calls, ``(steps,)``, spread evenly from the last one down; 0 is not among them.

        With "epsilon" they are spread from the last time at which the first step enlarges alpha at most
        ``LARGEST_RISE`` times. The little signal there is left out of the start: with 20 steps of the cosine schedule
        alpha is 0.026, and as much, relatively, the mean of samples of unit variance comes out too small.

        Args:
            steps: number of times.
            fresh_noise: whether steps add noise, which mends errors of the first. Only then, with "epsilon", can all
                n_steps times be had.

        Raises:
            ValueError: if ``steps`` is impossible.
        """
        if not 1 <= steps <= self.n_steps:
            raise ValueError(f"steps is {steps}, but must lie in 1..{self.n_steps}, the times of this process.")
        if self.prediction == "flow":
            return torch.tensor([self.n_steps * (1 - step / steps) for step in range(steps)])
        if self.prediction == "epsilon":
            alpha = self.alpha_sigma[0].tolist()
            for first in range(self.n_steps - 1, steps - 2, -1):
                times = _spread(first, steps)
                following = alpha[times[1]] if steps > 1 else 1.0
                if following <= LARGEST_RISE * alpha[first]:
                    return torch.tensor(times)
            if not fresh_noise:
                raise ValueError(
                    f"steps is {steps}, but with prediction 'epsilon' no sampler but 'ddpm' can begin at time "
                    f"{self.n_steps - 1}, which has no signal: take fewer steps or that sampler."
                )
        return torch.tensor(_spread(self.n_steps - 1, steps))

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t of clean latents; ``clean`` and ``noise`` ``(batch, ...)``, ``time`` ``(batch,)``."""
        alpha, sigma = self._at(time, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the network should predict; shapes as in ``add_noise``."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - clean
        alpha, sigma = self._at(time, clean)
        return alpha * noise - sigma * clean

    def to_clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """x_0 as implied by a prediction at x_t; shapes as in ``add_noise``."""
        alpha, sigma = self._at(time, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha
        if self.prediction == "flow":
            return noisy - sigma * prediction
        return alpha * noisy - sigma * prediction

    def from_clean(self, noisy: Tensor, clean: Tensor, time: Tensor) -> Tensor:
        """What the network should predict at x_t if x_0 is ``clean``: the inverse of ``to_clean``."""
        alpha, sigma = self._at(time, noisy)
        return self.target(clean, (noisy - alpha * clean) / sigma, time)

    def error_factor(self, time: Tensor) -> Tensor:
        """How many times larger an error of the prediction is than the error of x_0 it implies; float64, like time."""
        alpha, sigma = self.coefficients(time)
        return alpha / sigma if self.prediction == "epsilon" else 1 / sigma

    def step_deviation(self, time: Tensor, earlier: Tensor) -> Tensor:
        """Standard deviation of x_s given x_t and x_0, s = ``earlier`` < t = ``time``: what DDPM adds; float64.

        sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2).
        """
        (alpha, sigma), (alpha_s, sigma_s) = self.coefficients(time), self.coefficients(earlier)
        if self.prediction == "flow":
            return sigma_s / sigma * (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).sqrt()
        return sigma_s / sigma * (1 - (alpha / alpha_s) ** 2).sqrt()

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return asdict(self)

    def _at(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = (values.to(like.device, like.dtype).view(shape) for values in self.coefficients(time))
        return alpha, sigma


def _spread(first: int, steps: int) -> list[int]:
    """Return ``steps`` whole times, evenly from ``first`` down to above -1."""
    return [round((first + 1) * (1 - step / steps)) - 1 for step in range(steps)]

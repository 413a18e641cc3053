"""The diffusion process: x_t = alpha_t x_0 + sigma_t noise, and what a network is asked to predict.

DDPM (Ho et al., arXiv 2006.11239) with the cosine schedule (Nichol & Dhariwal, arXiv 2102.09672) and the velocity
v = alpha_t noise - sigma_t x_0 (Salimans & Ho, arXiv 2202.00512) by default. The cosine schedule ends in noise: at
t = T alpha is 5e-5, so the mean of a latent, which carries the total activity, does not leak into the start.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class Diffusion:
    """A discrete diffusion process; times are 0 .. n_steps - 1, larger is noisier.

    Args:
        n_steps: number of times.
        schedule: name of the beta schedule, as in diffusers ("squaredcos_cap_v2" is the cosine schedule).
        prediction: what the network predicts.
        times: how training times are drawn; "logit_normal" puts more of them in the middle (arXiv 2403.03206).
        location: of the logit-normal; more is noisier.
        spread: of the logit-normal. At 0 and 1, as published for long trainings, 0.2 % of the times are beyond 0.95 T,
            where nothing but the prompt tells the total activity, and short trainings make sinograms too weak; at 0.3
            and 1.4 there are 3 %.
    """

    n_steps: int = 1000
    schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    prediction: Literal["v_prediction", "epsilon"] = "v_prediction"
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    location: float = 0.3
    spread: float = 1.4

    def scheduler_config(self) -> dict[str, Any]:
        """Arguments for diffusers' schedulers. Latents are never clipped; sampling starts at the last time."""
        return {
            "num_train_timesteps": self.n_steps,
            "beta_schedule": self.schedule,
            "prediction_type": self.prediction,
            "clip_sample": False,
            "timestep_spacing": "trailing",
        }

    @cached_property
    def alpha_sigma(self) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at every time, two ``(n_steps,)`` float64 tensors with alpha^2 + sigma^2 = 1."""
        betas = DDPMScheduler(**self.scheduler_config()).betas.double()
        alpha_squared = torch.cumprod(1 - betas, dim=0)
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw ``(batch,)`` training times, int64, on the CPU."""
        if self.times == "uniform":
            return torch.randint(self.n_steps, (batch,), generator=generator)
        # In the velocity's terms the middle of the path is where alpha = sigma; the cosine schedule has it at T / 2.
        share = torch.sigmoid(self.location + self.spread * torch.randn(batch, generator=generator))
        return (share * self.n_steps).long().clamp(max=self.n_steps - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t of clean latents; ``clean`` and ``noise`` ``(batch, ...)``, ``time`` ``(batch,)``."""
        alpha, sigma = self._at(time, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the network should predict; shapes as in ``add_noise``."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._at(time, clean)
        return alpha * noise - sigma * clean

    def to_clean(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """x_0 as implied by a prediction at x_t; shapes as in ``add_noise``."""
        alpha, sigma = self._at(time, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha
        return alpha * noisy - sigma * prediction

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return asdict(self)

    def _at(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = (table[time.cpu()].to(like.device, like.dtype).view(shape) for table in self.alpha_sigma)
        return alpha, sigma

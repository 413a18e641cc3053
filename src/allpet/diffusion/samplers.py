"""Samplers: functions that turn noise into latents with a denoiser ``(x_t, t) -> prediction``.

The update rules are diffusers' schedulers; what is ours is that every sample owns its generator, so that a sample
depends on its seed alone, not on the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from tqdm.auto import tqdm

from allpet.diffusion.schedule import Diffusion

Denoise = Callable[[Tensor, Tensor], Tensor]
StepCallback = Callable[[int, int, Tensor], None]


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """Standard normal noise ``(len(generators), *shape)``, sample i drawn from generator i, whatever the device."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(device)


@torch.no_grad()
def sample_ddpm(
    denoise: Denoise,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    diffusion: Diffusion,
    steps: int = 1000,
    device: torch.device | str = "cpu",
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2), on ``steps`` of the process's times.

    Args:
        denoise: maps x_t ``(batch, *shape)`` and times ``(batch,)`` to the prediction the process asks for.
        shape: shape of one sample, ``(channels, rows, columns)``.
        generators: one CPU generator per sample.
        diffusion: the process.
        steps: number of denoiser calls.
        device: where to sample.
        callback: called after each step with (step, steps, estimate of x_0).
        progress: whether to show a progress bar.

    Returns:
        ``(batch, *shape)``.
    """
    scheduler = DDPMScheduler(**diffusion.scheduler_config())
    return _run(scheduler, denoise, shape, generators, diffusion, steps, device, callback, progress, {})


@torch.no_grad()
def sample_ddim(
    denoise: Denoise,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    diffusion: Diffusion,
    steps: int = 50,
    eta: float = 0.0,
    device: torch.device | str = "cpu",
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502, eq. 12).

    Args:
        denoise: as for ``sample_ddpm``; so are all others but ``eta``.
        shape: see ``sample_ddpm``.
        generators: see ``sample_ddpm``.
        diffusion: see ``sample_ddpm``.
        steps: see ``sample_ddpm``.
        eta: 0 is deterministic given the first noise, 1 as random as DDPM.
        device: see ``sample_ddpm``.
        callback: see ``sample_ddpm``.
        progress: see ``sample_ddpm``.

    Returns:
        ``(batch, *shape)``.
    """
    scheduler = DDIMScheduler(**diffusion.scheduler_config(), set_alpha_to_one=True)
    return _run(scheduler, denoise, shape, generators, diffusion, steps, device, callback, progress, {"eta": eta})


def _run(
    scheduler: DDPMScheduler | DDIMScheduler,
    denoise: Denoise,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    diffusion: Diffusion,
    steps: int,
    device: torch.device | str,
    callback: StepCallback | None,
    progress: bool,
    step_arguments: dict[str, float],
) -> Tensor:
    if not 1 <= steps <= diffusion.n_steps:
        raise ValueError(f"steps is {steps}, but must lie in 1..{diffusion.n_steps}, the times of this process.")
    scheduler.set_timesteps(steps)
    latent = draw_noise(shape, generators, device)
    for step, time in enumerate(tqdm(scheduler.timesteps, desc="Sampling", disable=not progress, leave=False)):
        prediction = denoise(latent, time.to(latent.device).expand(len(latent)))
        # diffusers draws on the generators' device (CPU) and moves, one generator per sample
        result = scheduler.step(prediction.float(), int(time), latent, generator=list(generators), **step_arguments)
        latent = result.prev_sample
        if callback is not None:
            callback(step + 1, steps, result.pred_original_sample)
    return latent

"""Samplers: functions that turn noise into latents with a denoiser ``(x_t, t) -> prediction``.

Every sample owns its generator, so a sample depends on its seed alone, not on the batch it is drawn in.

DDIM's update is written out because diffusers' schedulers step by ``n_steps // steps`` while their times are spread by
``n_steps / steps``: with 80 of 1000 steps each jump is 4 % short, which biases the mean of a Gaussian by 3 % of its
standard deviation. Where the two agree, tests compare this update with theirs. The multistep solvers are diffusers',
but their times are ours: theirs are one too many for 62 of the numbers of steps from 1 to 1000 (61, 103, 121, ...),
and a flow's begin elsewhere and reach the network rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor
from tqdm.auto import tqdm

from allpet.diffusion.schedule import Diffusion

Denoise = Callable[[Tensor, Tensor], Tensor]
StepCallback = Callable[[int, int, Tensor], None]
Solver = Literal["dpm++2m", "unipc"]
SamplerName = Literal["ddpm", "ddim", "dpm++2m", "unipc"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """Standard normal noise ``(len(generators), *shape)``, sample i drawn from generator i, whatever the device."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(device)


def check_eta(eta: float) -> None:
    """Refuse shares of fresh noise beyond [0, 1], which would need steps of negative variance."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must lie between 0 (no fresh noise) and 1 (as much as DDPM).")


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

    The times are spread evenly from the last one down, whether or not ``steps`` divides their number; with "epsilon"
    from a little below it, see ``Diffusion.sampling_times``.

    Args:
        denoise: maps x_t ``(batch, *shape)`` and times ``(batch,)`` to the prediction the process asks for.
        shape: shape of one sample, ``(channels, rows, columns)``.
        generators: one CPU generator per sample.
        diffusion: the process.
        steps: number of denoiser calls, 1..n_steps.
        eta: 0 is deterministic given the first noise, 1 as random as DDPM.
        device: where to sample.
        callback: called after each step with (step, steps, estimate of x_0).
        progress: whether to show a progress bar.

    Returns:
        ``(batch, *shape)``.

    Raises:
        ValueError: if ``steps`` or ``eta`` is impossible.
    """
    check_eta(eta)
    times = diffusion.sampling_times(steps, fresh_noise=eta > 0)
    alphas, sigmas = (values.tolist() for values in diffusion.coefficients(times))
    latent = draw_noise(shape, generators, device)
    for step in tqdm(range(steps), desc="Sampling", disable=not progress, leave=False):
        batch_time = times[step].to(latent.device).expand(len(latent))
        clean = diffusion.to_clean(latent, denoise(latent, batch_time).float(), batch_time)
        if step + 1 < steps:
            fresh = eta * float(diffusion.step_deviation(times[step], times[step + 1]))
            noise = (latent - alphas[step] * clean) / sigmas[step]
            latent = alphas[step + 1] * clean + math.sqrt(sigmas[step + 1] ** 2 - fresh**2) * noise
            if fresh:
                latent = latent + fresh * draw_noise(shape, generators, device)
        else:
            latent = clean
        if callback is not None:
            callback(step + 1, steps, clean)
    return latent


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
    """Ancestral sampling with the posterior's variance (Ho et al., arXiv 2006.11239, algorithm 2 and eq. 7).

    It is DDIM with eta = 1, on all times or on ``steps`` of them; arguments are those of ``sample_ddim``.
    """
    return sample_ddim(denoise, shape, generators, diffusion, steps, 1.0, device, callback, progress)


@torch.no_grad()
def sample_multistep(
    denoise: Denoise,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    diffusion: Diffusion,
    steps: int = 20,
    solver: Solver = "dpm++2m",
    device: torch.device | str = "cpu",
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Second-order solvers of the probability flow that reuse earlier calls: as good as DDIM with far fewer steps.

    DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) or UniPC (Zhao et al., arXiv 2302.04867), from diffusers, on the
    times of ``sample_ddim``. The last step, to no noise at all, is of order 1: it returns the last estimate of x_0.

    Args:
        denoise: as in ``sample_ddim``.
        shape: shape of one sample.
        generators: one CPU generator per sample.
        diffusion: the process.
        steps: number of denoiser calls, 1..n_steps.
        solver: "dpm++2m" or "unipc".
        device: where to sample.
        callback: called after each step with (step, steps, estimate of x_0).
        progress: whether to show a progress bar.

    Returns:
        ``(batch, *shape)``.

    Raises:
        ValueError: if ``steps`` is impossible.
    """
    times = diffusion.sampling_times(steps, fresh_noise=False)
    scheduler = _scheduler(solver, diffusion, times)
    latent = draw_noise(shape, generators, device)
    for step in tqdm(range(steps), desc="Sampling", disable=not progress, leave=False):
        batch_time = times[step].to(latent.device).expand(len(latent))
        clean = diffusion.to_clean(latent, denoise(latent, batch_time).float(), batch_time)
        latent = scheduler.step(clean, scheduler.timesteps[step], latent, return_dict=False)[0]
        if callback is not None:
            callback(step + 1, steps, clean)
    return latent


def draw_samples(sampler: SamplerName, *arguments: Any, eta: float = 0.0, **options: Any) -> Tensor:
    """Sample by name: "ddpm", "ddim" (the only one that reads ``eta``), "dpm++2m" or "unipc".

    All other arguments, and the result, are those of ``sample_ddim``.
    """
    functions: dict[SamplerName, Callable[..., Tensor]] = {
        "ddpm": sample_ddpm,
        "ddim": partial(sample_ddim, eta=eta),
        "dpm++2m": partial(sample_multistep, solver="dpm++2m"),
        "unipc": partial(sample_multistep, solver="unipc"),
    }
    return functions[sampler](*arguments, **options)


def _scheduler(
    solver: Solver, diffusion: Diffusion, times: Tensor
) -> DPMSolverMultistepScheduler | UniPCMultistepScheduler:
    """The library's solver, of order 2, told of x_0, on the given times and then none."""
    kind = DPMSolverMultistepScheduler if solver == "dpm++2m" else UniPCMultistepScheduler
    config = {**diffusion.scheduler_config(), "prediction_type": "sample", "final_sigmas_type": "zero"}
    del config["clip_sample"]  # these clip only if told to
    scheduler = kind(**config, solver_order=2)
    scheduler.set_timesteps(len(times))
    alpha, sigma = diffusion.coefficients(times)
    # A flow counts noise in sigma, the others in sigma / alpha. At a flow's very beginning there is no signal, whose
    # logarithm the solvers take.
    noise = sigma.clamp(max=1 - 1e-5) if diffusion.prediction == "flow" else sigma / alpha
    scheduler.sigmas = torch.cat([noise, noise.new_zeros(1)]).float()
    scheduler.timesteps = times
    scheduler.set_begin_index(0)
    return scheduler

"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from allpet.diffusion.samplers import Denoise
from allpet.prompts import Prompt


def drop_prompt(prompt: Prompt, probability: float, draws: Tensor) -> Prompt:
    """Leave open the tracer, the region, or both, each with a probability, so that guidance has a null prompt.

    Args:
        prompt: what is known of each slice.
        probability: of each of the three cases.
        draws: uniform numbers in [0, 1), ``(batch,)``.
    """
    tracer_open = (draws < probability) | ((draws >= 2 * probability) & (draws < 3 * probability))
    region_open = (draws >= probability) & (draws < 3 * probability)
    return Prompt(prompt.tracer.masked_fill(tracer_open, 0), prompt.region.masked_fill(region_open, 0))


Predict = Callable[[Tensor, Tensor, Prompt], Tensor]


def guide(
    predict: Predict,
    prompt: Prompt,
    weight: float,
    region_weight: float | None = None,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoise:
    """Return the denoiser that answers a prompt with guidance, over both halves of the prompt at once or over each.

    With u for the open prompt, e_t for the tracer alone and e_tr for tracer and region, the prediction is
    u + w_t (e_t - u) + w_r (e_tr - e_t) (composed as in Liu et al., arXiv 2206.01714): the denoiser of a density
    proportional to p(x) p(tracer | x)^w_t p(region | x, tracer)^w_r. Equal weights need no e_t.

    Args:
        predict: maps x_t, times and prompts to a prediction.
        prompt: one prompt per sample; index 0 leaves a half open.
        weight: w_t; 1 is the plain conditional model, 0 ignores the prompt, above 1 exaggerates it (two calls per
            step; three if the weights differ).
        region_weight: w_r; None takes ``weight``.
        interval: smallest and largest time at which guidance acts (Kynkäänniemi et al., arXiv 2404.07724); at others
            the denoiser is the plain conditional one, with one call.
    """
    region_weight = weight if region_weight is None else region_weight
    if weight == region_weight == 1:
        return lambda latent, time: predict(latent, time, prompt)
    null = Prompt(torch.zeros_like(prompt.tracer), torch.zeros_like(prompt.region))
    tracer = Prompt(prompt.tracer, null.region)

    def denoise(latent: Tensor, time: Tensor) -> Tensor:
        guided = (time >= interval[0]) & (time <= interval[1])
        plain = predict(latent, time, prompt)
        if not bool(guided.any()):
            return plain
        without = predict(latent, time, null)
        if weight == region_weight:
            answer = without + weight * (plain - without)
        else:
            half = predict(latent, time, tracer)
            answer = without + weight * (half - without) + region_weight * (plain - half)
        return torch.where(guided.view(-1, *(1,) * (latent.dim() - 1)), answer, plain)

    return denoise

"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

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


def guide(predict: Callable[[Tensor, Tensor, Prompt], Tensor], prompt: Prompt, weight: float) -> Denoise:
    """Return the denoiser that answers a prompt with a guidance weight.

    Args:
        predict: maps x_t, times and prompts to a prediction.
        prompt: one prompt per sample; index 0 leaves a half open.
        weight: 1 is the plain conditional model, 0 ignores the prompt, above 1 exaggerates it (two calls per step).
    """
    if weight == 1:
        return lambda latent, time: predict(latent, time, prompt)
    null = Prompt(torch.zeros_like(prompt.tracer), torch.zeros_like(prompt.region))

    def denoise(latent: Tensor, time: Tensor) -> Tensor:
        without = predict(latent, time, null)
        return without + weight * (predict(latent, time, prompt) - without)

    return denoise

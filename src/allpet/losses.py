"""Losses of stage 1. All take network-range tensors and return a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) to N(0, 1), averaged over latent elements (Kingma & Welling, eq. 10).

    Args:
        mean: ``(batch, channels, rows, columns)``.
        log_variance: the same shape.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def weight_by_frequency(sinogram: Tensor, power: float = 0.5) -> Tensor:
    """Weight the radial frequencies of a sinogram by |frequency| ** power.

    With power 1/2 the squared norm of the result is, up to a constant, that of the reconstructed image
    (projection-slice theorem and Plancherel): errors that are small in a sinogram and large in its image become visible
    to a loss. Power 1 is the ramp filter of filtered backprojection.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        power: exponent of the weight.

    Returns:
        the same shape; weight 1 at the Nyquist frequency, 0 at frequency 0.
    """
    n_bins = sinogram.shape[-1]
    spectrum = torch.fft.rfft(sinogram.float(), n=2 * n_bins, dim=-1)
    weight = torch.linspace(0, 1, spectrum.shape[-1], device=sinogram.device) ** power
    return torch.fft.irfft(spectrum * weight, n=2 * n_bins, dim=-1)[..., :n_bins]


def stack_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over the stack [positive, full, negative], ``(batch, 3, views, bins)``."""
    return F.l1_loss(output.float(), target.float())


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a patch discriminator (Lim & Ye, arXiv 1705.02894), scores of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

"""The best linear denoiser of latents, in closed form: what a network need not learn.

If latents were Gaussian with mean mu and covariance C, the best estimate of x_0 from x_t = alpha x_0 + sigma noise were

    D(x_t) = mu + alpha C (alpha^2 C + sigma^2)^-1 (x_t - alpha mu),

and the mean square of what it leaves open, tr(C sigma^2 (alpha^2 C + sigma^2)^-1) / n. A few hundred slices give a
usable mu and C, and with them all that is linear in the structure of sinograms: that a point is a sinusoid, that views
have the same sum, what the anatomy of a prompt has in common. A network that predicts the rest, in units of its size,
begins where the linear denoiser ends; untrained, it draws from the Gaussian. (For bridges between latents the same is
done per channel, ``preconditioning``; here with all correlations over views and bins.)

mu is the mean of the slices that answer a prompt, or of all where few do. C is a mixture of the covariance within
prompts, which knows the anatomy but has no more axes than there are slices, and that of slices turned and mirrored at
random, which knows what all sinograms have in common. Without turned slices the variance beyond those axes is that of
one half of the slices beyond the axes of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from allpet.prompts import REGIONS, TRACERS, Prompt, answers

ANATOMY_SHARE = 0.6
"""Of the covariance within prompts. In one trial (one stage 1, 500 slices, eight channels) the error on validation
slices was .346, .324, .320 and .326 (mean square of the velocity) with 0, .3, .6 and .8."""
_RIDGE = 0.01
_FEWEST = 10
"""Slices that a prompt's own mean needs: the mean of fewer would show them, and it is shared with the weights."""


class LinearDenoiser(nn.Module):
    """The best linear estimate of clean latents, see the module.

    Args:
        shape: of a latent, ``(channels, rows, columns)``.
        rank: axes of the covariance that are kept; the others share their mean variance.
    """

    mean: Tensor
    axes: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, int, int], rank: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        elements = shape[0] * shape[1] * shape[2]
        self.register_buffer("mean", torch.zeros(len(TRACERS), len(REGIONS), elements))
        self.register_buffer("axes", torch.zeros(rank, elements))
        self.register_buffer("variance", torch.ones(rank + 1))

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments."""
        return {"shape": list(self.shape), "rank": len(self.axes)}

    @classmethod
    def fit(cls, latents: Tensor, prompt: Prompt, turned: Tensor | None, rank: int = 1024) -> LinearDenoiser:
        """Measure mean and covariance.

        Args:
            latents: of the training slices, ``(slices, channels, rows, columns)``.
            prompt: tracer and region of each.
            turned: latents of slices turned and mirrored at random, ``(m, channels, rows, columns)``; None: of none.
            rank: axes to keep, at most; fewer where there are not as many.

        Raises:
            ValueError: if there are too few latents or they are not finite.
        """
        given = [latents] if turned is None else [latents, turned]
        if min(map(len, given)) < 2 or not all(torch.isfinite(values).all() for values in given):
            raise ValueError(
                f"{' and '.join(str(len(values)) for values in given)} latents were given; a covariance needs at least "
                "two, and two turned ones, all finite: check the encoder and the data."
            )
        x = latents.flatten(1).float()
        mean = x.mean(0).repeat(len(TRACERS), len(REGIONS), 1)
        for tracer in range(len(TRACERS)):
            for region in range(len(REGIONS)):
                rows = _answering((tracer, region), prompt)
                if rows.sum() >= _FEWEST:
                    mean[tracer, region] = x[rows].mean(0)
        # C = Y^T Y of the weighted, centred samples Y
        within = (x - mean[prompt.tracer, prompt.region]) / len(x) ** 0.5
        samples = within
        if turned is not None:
            y = turned.flatten(1).float()
            y = (y - y.mean(0)) / len(y) ** 0.5
            samples = torch.cat([ANATOMY_SHARE**0.5 * within, (1 - ANATOMY_SHARE) ** 0.5 * y])
        variance, axes = _principal(samples, rank)
        beyond = samples.square().sum() - variance.sum()
        if turned is None:
            _, known = _principal(within[::2], len(within))
            other = within[1::2] - (within[1::2] @ known.T) @ known
            beyond = torch.maximum(beyond, 2 * other.square().sum())
        rest = beyond.clamp(min=0) / max(samples.shape[1] - len(variance), 1)
        fitted = cls((latents.shape[1], latents.shape[2], latents.shape[3]), len(variance))
        fitted.mean.copy_(mean)
        fitted.axes.copy_(axes)
        fitted.variance.copy_(torch.cat([variance, rest[None]]) + _RIDGE)
        return fitted

    def forward(self, noisy: Tensor, alpha: Tensor, sigma: Tensor, prompt: Prompt) -> Tensor:
        """Estimate x_0.

        Args:
            noisy: x_t, ``(batch, channels, rows, columns)``.
            alpha: ``(batch,)``.
            sigma: ``(batch,)``, positive.
            prompt: of each.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            a, s = alpha.float()[:, None], sigma.float()[:, None]
            mean = self.mean[prompt.tracer, prompt.region]
            gain = a * self.variance / (a**2 * self.variance + s**2)
            rest = gain[:, -1:]
            centred = noisy.float().flatten(1) - a * mean
            along = (centred @ self.axes.T) * (gain[:, :-1] - rest)
            return (mean + rest * centred + along @ self.axes).view(noisy.shape)

    def error(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Root mean square of x_0 - D(x_t) per element, were latents Gaussian: ``(batch,)``."""
        a, s = alpha.float()[:, None], sigma.float()[:, None]
        left = self.variance * s**2 / (a**2 * self.variance + s**2)
        elements = self.axes.shape[1]
        return ((left[:, :-1].sum(1) + (elements - len(self.axes)) * left[:, -1]) / elements).sqrt()


def _principal(samples: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of Y^T Y and their axes, ``(k,)`` and ``(k, elements)``, for Y ``(n, elements)``."""
    n, elements = samples.shape
    if elements <= n:
        variance, axes = torch.linalg.eigh(samples.T @ samples)
        axes = axes.T
    else:
        variance, factors = torch.linalg.eigh(samples @ samples.T)
        axes = (samples.T @ (factors / variance.clamp(min=1e-12).sqrt())).T
    kept = min(rank, int((variance > 1e-6 * variance[-1]).sum()))
    return variance.flip(0)[:kept], axes.flip(0)[:kept]


def _answering(asked: tuple[int, int], prompt: Prompt) -> Tensor:
    try:
        return answers(asked, prompt)
    except ValueError:  # no slice of that prompt: the mean of all stays
        return torch.zeros(len(prompt.tracer), dtype=torch.bool)

"""How much power a decoder loses at short periods, and how to give it back.

A decoder that is trained on noisy sinograms emits about their expectation given a latent, and what is finer than its
latents can hold is lost in every slice alike. How much, the training slices tell without knowing what is behind their
noise: counting noise is white along the bins, so their power at the highest frequencies, where hardly any PET image has
power, is the noise's at all frequencies, and the rest is the expected sinograms'. The square root of that rest over the
power of reconstructions is a gain for each radial frequency. Applied to every view alike it is the convolution of the
image with a radially symmetric kernel (projection-slice theorem): consistent sinograms stay consistent.

Noise is white as long as bins are independent, whatever their variances: corrections for attenuation or detectors do no
harm. Interpolated or smoothed sinograms have less noise at high frequencies than elsewhere, some of which then counts
as theirs; the gain gives samples at most the power of the noisy slices.

A gain is kept at ``POINTS`` frequencies from 0 to the Nyquist frequency of the bins, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = 65
_NOISE = 56  # from this point on, 7/8 of the Nyquist frequency, power is taken to be noise
_SMOOTH = 5  # points that are averaged
_TRUSTED = 0.2  # power below this share of the noise's cannot be told from it
_TAPER = 6  # points over which the gain returns to 1 after the last trusted one
_LARGEST = 2.5


def radial_power(sinogram: Tensor) -> Tensor:
    """Return the power along the bins, averaged over views, as a share of that at frequency 0.

    Args:
        sinogram: ``(batch, 1, views, bins)``, with activity.

    Returns:
        ``(batch, POINTS)``.
    """
    bins = sinogram.shape[-1]
    if not len(sinogram):  # which the FFT refuses
        return torch.ones(0, POINTS)
    power = torch.fft.rfft(sinogram[:, 0].float(), n=2 * bins).abs().square().mean(1)
    power = F.interpolate(power[:, None], POINTS, mode="linear", align_corners=True)[:, 0]
    return power / power[:, :1].clamp(min=1e-20)


def measure_gain(noisy: Sequence[Tensor], decoded: Sequence[Tensor]) -> Tensor:
    """Return the gain that gives reconstructions the power of expected sinograms, ``(POINTS,)``.

    Powers are medians over slices, so that a full bladder does not speak for all. Beyond the frequency at which the
    noise hides the rest the gain returns to 1, and everywhere it stays within 1 and 2.5. No slices have a gain of 1.

    Args:
        noisy: ``radial_power`` of slices, in batches.
        decoded: of their reconstructions.
    """
    given = torch.cat(list(noisy)).cpu()
    if not len(given):
        return torch.ones(POINTS)
    noise = given[:, _NOISE:].mean(1, keepdim=True)
    expected, left = (_smooth(power.median(0).values) for power in (given - noise, torch.cat(list(decoded)).cpu()))
    gain = (expected.clamp(min=0) / left.clamp(min=1e-20)).sqrt().clamp(1, _LARGEST)
    hidden = (expected < _TRUSTED * noise.median()).nonzero()
    last = int(hidden[0]) if len(hidden) else POINTS
    share = ((last + _TAPER - torch.arange(POINTS)) / _TAPER).clamp(0, 1)
    gain = 1 + (gain - 1) * share
    gain[0] = 1
    return gain


def restore_power(sinogram: Tensor, gain: Tensor) -> Tensor:
    """Apply a gain to sinograms, ``(batch, 1, views, bins)``; what turns negative is set to zero.

    Args:
        sinogram: as decoded.
        gain: ``(POINTS,)``.
    """
    bins = sinogram.shape[-1]
    at = F.interpolate(gain.float()[None, None], bins + 1, mode="linear", align_corners=True)[0, 0]
    sharp = torch.fft.irfft(torch.fft.rfft(sinogram.float(), n=2 * bins) * at, n=2 * bins)
    return sharp[..., :bins].clamp(min=0).to(sinogram)


def _smooth(values: Tensor) -> Tensor:
    padded = F.pad(values[None, None], (_SMOOTH // 2, _SMOOTH // 2), mode="replicate")
    return F.avg_pool1d(padded, _SMOOTH, 1)[0, 0]

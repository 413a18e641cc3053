"""How close is an image to its reference, and a set of samples to another set?

Fidelity metrics take a prediction and a reference, ``(batch, channel, rows, columns)`` (images or sinograms alike), and
return one number per sample, ``(batch,)``. Nothing is rescaled: both are in the same units, and where a metric needs a
*peak* it is the maximum of that sample's reference. Set metrics take samples in the first dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure


def relative_l2(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return |prediction - reference| / |reference|, ``(batch,)``.

    Of a reference that is zero everywhere it is 0 where the prediction is zero, too, and infinite otherwise.
    """
    _check(prediction, reference)
    error = (prediction - reference).flatten(1).norm(dim=1)
    return torch.where(error == 0, 0.0, error / reference.flatten(1).norm(dim=1))


def rmse_over_range(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the root mean square error over (maximum - minimum) of the reference, ``(batch,)``."""
    _check(prediction, reference)
    r = reference.flatten(1)
    return _mse(prediction, reference).sqrt() / (r.amax(1) - r.amin(1))


def psnr(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return 10 log10(peak^2 / mean squared error) in dB, ``(batch,)``; the peak is the reference's maximum."""
    _check(prediction, reference)
    return 10 * torch.log10(reference.flatten(1).amax(1).square() / _mse(prediction, reference))


def ssim(prediction: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the structural similarity, ``(batch,)``: Gaussian window of sigma 1.5, range = the reference's maximum.

    Args:
        prediction: ``(batch, channel, rows, columns)``, at least 11 x 11.
        reference: same shape.
        mask: where to average, ``(batch, 1, rows, columns)`` bool, for example the body: empty background agrees with
            itself and flatters. By default everywhere.
    """
    _check(prediction, reference)
    peak = reference.flatten(1).amax(1)[:, None, None, None]
    _, similarity = structural_similarity_index_measure(
        prediction / peak, reference / peak, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    if mask is None:
        return similarity.flatten(1).mean(1)
    weight = mask.to(similarity).expand_as(similarity).flatten(1)
    return (similarity.flatten(1) * weight).sum(1) / weight.sum(1)


def nearest_distance(samples: Tensor, training: Tensor, chunk: int = 256) -> Tensor:
    """Return each sample's relative L2 distance to the nearest training sample, ``(samples,)``.

    The distance is |sample - training| / |training|. Far smaller values than those of held-out slices mean copies.

    Args:
        samples: ``(samples, ...)``.
        training: ``(training, ...)``, same remaining shape.
        chunk: training samples compared at once.
    """
    x, t = samples.flatten(1), training.flatten(1)
    distance, index = [], []
    for begin in range(0, len(t), chunk):
        part = t[begin : begin + chunk]
        nearest = (torch.cdist(x, part) / part.norm(dim=1)).min(dim=1)
        distance.append(nearest.values)
        index.append(nearest.indices + begin)
    best = torch.stack(index).gather(0, torch.stack(distance).argmin(0)[None])[0]
    # cdist goes through inner products, which leaves copies at a distance of 1e-4.
    return (x - t[best]).norm(dim=1) / t[best].norm(dim=1)


def diversity(samples: Tensor) -> Tensor:
    """Return the mean over all pairs of |a - b| / ((|a| + |b|) / 2), a number; 0 where all samples are the same."""
    if len(samples) < 2:
        raise ValueError(f"Diversity needs at least 2 samples; got {len(samples)}.")
    x = samples.flatten(1)
    norm = x.norm(dim=1)
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return (2 * functional.pdist(x) / (norm[first] + norm[second])).mean()


def energy_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the squared energy distance between two sets, 2 E|x - y| - E|x - x'| - E|y - y'|, a number.

    Unbiased (pairs of a sample with itself are left out), so it scatters about 0 for two sets from one distribution;
    Szekely and Rizzo 2013. Distances are root mean square differences, so units are those of the data.

    Args:
        first: ``(samples, ...)``.
        second: ``(samples, ...)``, same remaining shape.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"Each set needs at least 2 samples; got {len(first)} and {len(second)}.")
    x, y = first.flatten(1), second.flatten(1)
    distance = 2 * torch.cdist(x, y).mean() - functional.pdist(x).mean() - functional.pdist(y).mean()
    return distance / x.shape[1] ** 0.5


def radial_power_spectrum(image: Tensor, pixel_mm: float) -> tuple[Tensor, Tensor]:
    """Average the power spectrum of images over directions.

    Args:
        image: ``(batch, 1, rows, columns)``, square.
        pixel_mm: pixel width, mm.

    Returns:
        The frequencies in cycles per mm, ``(rows // 2,)``, from one period per image upwards, and the mean power at
        each, ``(batch, rows // 2)``, as |FFT|^2 / pixels (white noise of
        variance v has power v).
    """
    size = image.shape[-1]
    if image.ndim != 4 or image.shape[1] != 1 or image.shape[2] != size:
        raise ValueError(f"The image's shape is {tuple(image.shape)}, but must be (batch, 1, size, size).")
    axis = torch.fft.fftfreq(size, 1 / size, device=image.device)
    ring = torch.hypot(axis[:, None], axis).round().long().flatten()
    kept = (ring >= 1) & (ring <= size // 2)
    power = torch.fft.fft2(image[:, 0]).abs().square().flatten(1)[:, kept] / size**2
    ring = ring[kept] - 1
    count = torch.bincount(ring, minlength=size // 2)
    mean = torch.zeros(len(image), size // 2, device=image.device, dtype=power.dtype).index_add_(1, ring, power) / count
    return torch.arange(1, size // 2 + 1, device=image.device) / (size * pixel_mm), mean


def _mse(prediction: Tensor, reference: Tensor) -> Tensor:
    return (prediction - reference).square().flatten(1).mean(1)


def _check(prediction: Tensor, reference: Tensor) -> None:
    if prediction.shape != reference.shape or prediction.ndim != 4:
        raise ValueError(
            f"Prediction and reference have shapes {tuple(prediction.shape)} and {tuple(reference.shape)}, but must "
            "both be (batch, channel, rows, columns)."
        )

"""How close is an image to its reference, and a set of samples to another set?

Fidelity metrics take a prediction and a reference, ``(batch, channel, rows, columns)`` (images or sinograms alike), and
return one number per sample, ``(batch,)``. Nothing is rescaled: both are in the same units, and where a metric needs a
*peak* it is the maximum of that sample's reference, unless another is given (that of the volume, for example). Set
metrics take samples in the first dimension.

A *region* is a boolean mask ``(batch, 1, rows, columns)``: an organ, a lesion, the body. Images of sinograms are
compared after one fixed reconstruction, ``standard_image``.
"""

from __future__ import annotations

import math

import torch
from scipy import special
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from allpet.geometry import ParallelBeam
from allpet.projector import Radon
from allpet.reconstruction import osem


def relative_l2(prediction: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return |prediction - reference| / |reference|, ``(batch,)``, in a region if one is given.

    Of a reference that is zero everywhere it is 0 where the prediction is zero, too, and infinite otherwise.
    """
    _check(prediction, reference)
    inside = 1.0 if mask is None else mask.to(reference)
    error = ((prediction - reference) * inside).flatten(1).norm(dim=1)
    return torch.where(error == 0, 0.0, error / (reference * inside).flatten(1).norm(dim=1))


def rmse_over_range(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the root mean square error over (maximum - minimum) of the reference, ``(batch,)``."""
    _check(prediction, reference)
    r = reference.flatten(1)
    return _mse(prediction, reference).sqrt() / (r.amax(1) - r.amin(1))


def psnr(
    prediction: Tensor, reference: Tensor, mask: Tensor | None = None, peak: Tensor | float | None = None
) -> Tensor:
    """Return 10 log10(peak^2 / mean squared error) in dB, ``(batch,)``.

    Args:
        prediction: ``(batch, channel, rows, columns)``.
        reference: same shape.
        mask: where the error is averaged, for example the body: empty background, which is easy, flatters.
        peak: a number or ``(batch,)``; by default the maximum of each sample's reference.
    """
    _check(prediction, reference)
    error = (prediction - reference).square()
    mse = error.flatten(1).mean(1) if mask is None else _masked_mean(error, mask)
    top = reference.flatten(1).amax(1) if peak is None else torch.as_tensor(peak).to(mse)
    return 10 * torch.log10(top.square() / mse)


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
    return _masked_mean(similarity, mask)


def suv_bias(prediction: Tensor, reference: Tensor, region: Tensor, statistic: str = "mean") -> Tensor:
    """Return the relative error of a region's uptake, prediction / reference - 1, ``(batch,)``.

    It is NaN for samples that do not show the region; average with ``nanmean``.

    Args:
        prediction: images, ``(batch, channel, rows, columns)``.
        reference: same shape.
        region: an organ or a lesion.
        statistic: ``mean`` (SUVmean) or ``max`` (SUVmax).

    Raises:
        ValueError: if the statistic is neither.
    """
    _check(prediction, reference)
    if statistic not in ("mean", "max"):
        raise ValueError(f"statistic is {statistic!r}, but must be 'mean' or 'max'.")
    if statistic == "mean":
        ours, theirs = _masked_mean(prediction, region), _masked_mean(reference, region)
    else:
        outside = ~region.expand_as(reference)
        ours, theirs = (x.masked_fill(outside, -math.inf).flatten(1).amax(1) for x in (prediction, reference))
        shown = region.flatten(1).any(1)
        ours = torch.where(shown, ours, math.nan)
    return ours / theirs - 1


def coefficient_of_variation(image: Tensor, region: Tensor) -> Tensor:
    """Return standard deviation / mean within a region, ``(batch,)``: the noise of a liver, for example."""
    mean = _masked_mean(image, region)
    variance = _masked_mean((image - mean[:, None, None, None]).square(), region)
    n = region.expand_as(image).flatten(1).sum(1)
    return (variance * n / (n - 1)).sqrt() / mean


def contrast_recovery(image: Tensor, region: Tensor, background: Tensor, contrast: float) -> Tensor:
    """Return the share of a true contrast that an image shows, ``(batch,)``; 1 is all of it (NEMA NU 2).

    Hot regions: (C_H / C_B - 1) / (contrast - 1). Cold regions, of contrast 0: 1 - C_C / C_B.

    Args:
        image: ``(batch, 1, rows, columns)``.
        region: the disc or sphere.
        background: region around.
        contrast: true activity of the region over that of the background.

    Raises:
        ValueError: if the contrast is 1, that is none.
    """
    if contrast == 1:
        raise ValueError("contrast is 1, so there is nothing to recover; it must differ from 1.")
    return (_masked_mean(image, region) / _masked_mean(image, background) - 1) / (contrast - 1)


def background_variability(image: Tensor, regions: Tensor) -> Tensor:
    """Return the standard deviation of the means of equal background regions over their mean, ``(batch,)`` (NEMA NU 2).

    Args:
        image: ``(batch, 1, rows, columns)``.
        regions: ``(n, rows, columns)`` bool, n >= 2, each as large as the region of interest.
    """
    if len(regions) < 2:
        raise ValueError(f"Background variability needs at least 2 regions; got {len(regions)}.")
    weight = regions.to(image).flatten(1)
    means = image.flatten(1) @ weight.T / weight.sum(1)
    return means.std(dim=1) / means.mean(dim=1)


def bias_and_spread(realisations: Tensor, truth: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Return bias and standard deviation of a region's mean over noise realisations, relative to the truth: numbers.

    Plotted against each other along the strength of a method they tell noise reduction from blur.

    Args:
        realisations: images of one slice, ``(n, 1, rows, columns)``; n of at least 20 gives sd to 16 %.
        truth: ``(1, 1, rows, columns)``.
        region: ``(1, 1, rows, columns)`` bool.
    """
    if len(realisations) < 2:
        raise ValueError(f"Bias and spread need at least 2 realisations; got {len(realisations)}.")
    means, true = _masked_mean(realisations, region.expand_as(realisations)), _masked_mean(truth, region)[0]
    return means.mean() / true - 1, means.std() / true.abs()


def moment_residuals(sinogram: Tensor, geometry: ParallelBeam, orders: int = 4) -> Tensor:
    """Return for each of the first moments the share that no image could have caused, ``(batch, orders)``.

    The moment m_n(theta) = sum_s s^n p(theta, s) of a sinogram is a sum of cos^k(theta) sin^(n - k)(theta), k = 0..n
    (Helgason 1965, Ludwig 1966); what is left after their best fit is given relative to m_n. Order 0 says that every
    view sees the same activity. Attenuation breaks these conditions.

    Args:
        sinogram: ``(batch, 1, views, bins)``.
        geometry: of the sinogram.
        orders: number of moments, from 0 on.
    """
    s = (geometry.bin_centers / geometry.bin_centers.abs().max().clamp_min(geometry.bin_mm)).to(sinogram)
    cos, sin = geometry.angles.cos(), geometry.angles.sin()
    residuals = []
    for n in range(orders):
        moment = (sinogram[:, 0] * s**n).sum(-1).double()
        basis = torch.linalg.qr(torch.stack([cos**k * sin ** (n - k) for k in range(n + 1)], dim=1)).Q.to(moment)
        left = moment - (moment @ basis) @ basis.T
        residuals.append(left.norm(dim=1) / moment.norm(dim=1).clamp_min(1e-30))
    return torch.stack(residuals, dim=1).to(sinogram)


def standard_image(radon: Radon, sinogram: Tensor, filter_mm: float = 4.0) -> Tensor:
    """Reconstruct corrected sinograms in the one way in which all methods' images are compared.

    OSEM, 3 iterations of 14 subsets (or the next smaller number that divides the views), then a Gaussian. Negative
    values, of which random and scatter correction leave some, are cut.

    Args:
        radon: the projector.
        sinogram: corrected, SUV x mm, ``(batch, 1, views, bins)``.
        filter_mm: FWHM of the Gaussian, mm.

    Returns:
        SUV, ``(batch, 1, rows, columns)``.
    """
    g = radon.geometry
    subsets = next(n for n in range(14, 0, -1) if g.n_views % n == 0)
    image = osem(radon, sinogram.clamp_min(0), 3, subsets)
    return blur_image(image, g, filter_mm)


def blur_image(image: Tensor, geometry: ParallelBeam, fwhm_mm: float) -> Tensor:
    """Blur by a discrete Gaussian, which keeps totals but at the edges.

    Args:
        image: ``(batch, 1, rows, columns)``.
        geometry: whose pixels it has.
        fwhm_mm: full width at half maximum; 0 changes nothing.
    """
    index = torch.arange(geometry.image_size)
    variance = (fwhm_mm / geometry.pixel_mm) ** 2 / (8 * math.log(2))
    blur = torch.from_numpy(special.ive(index.numpy(), variance))[(index[:, None] - index).abs()].to(image)
    return blur @ image @ blur


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


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average within a mask, ``(batch,)``; NaN where it is empty."""
    weight = mask.to(values).expand_as(values).flatten(1)
    return (values.flatten(1) * weight).sum(1) / weight.sum(1)


def _check(prediction: Tensor, reference: Tensor) -> None:
    if prediction.shape != reference.shape or prediction.ndim != 4:
        raise ValueError(
            f"Prediction and reference have shapes {tuple(prediction.shape)} and {tuple(reference.shape)}, but must "
            "both be (batch, channel, rows, columns)."
        )

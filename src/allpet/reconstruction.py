"""Images from sinograms: filtered backprojection, MLEM and OSEM, all matched to the projector they are given.

The acquisition model is ``counts ~ Poisson(multiplicative * R(G x) + additive)``: R the Radon transform (activity x
mm),
G an optional Gaussian resolution model, *multiplicative* what scales an ideal line integral to counts (attenuation
factors, normalisation, duration), *additive* the expected scatter and randoms, in counts.

Everything is batched and made of differentiable operations; no graph is kept unless an argument requires a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from allpet.projector import Radon

WINDOWS = ("ramp", "hann")


def fbp(radon: Radon, sinogram: Tensor, window: str = "hann", cutoff: float = 1.0) -> Tensor:
    """Filtered backprojection.

    The ramp is the band-limited kernel sampled in space (Kak & Slaney 1988, eq. 3.61), not ``|f|`` sampled in
    frequency, which would lose the mean; rows are zero-padded to twice their length so that the convolution is not
    circular. The backprojection is the projector's own transpose.

    Args:
        radon: the projector the sinogram belongs to, or a subset of its views.
        sinogram: attenuation-corrected line integrals, ``(batch, 1, views, bins)``, activity x mm.
        window: "hann" or "ramp" (none).
        cutoff: frequency where the window ends, as a fraction of the Nyquist frequency, in (0, 1].

    Returns:
        Activity, ``(batch, 1, rows, columns)``; negative values are kept, pixels that the bins do not cover in every
        view are 0.

    Raises:
        ValueError: if the window is unknown or the cut-off outside (0, 1].
    """
    geometry = radon.geometry
    length = 2 ** math.ceil(math.log2(2 * geometry.n_bins))
    response = ramp_filter(length, geometry.bin_mm, window, cutoff).to(sinogram)
    spectrum = torch.fft.rfft(sinogram, n=length) * response
    filtered = torch.fft.irfft(spectrum, n=length)[..., : geometry.n_bins]
    # Each bin's weights in one pixel add up to pixel area / bin width; the integral over views has step pi / views.
    scale = math.pi / len(radon.angles) * geometry.bin_mm / geometry.pixel_mm**2
    x, y = geometry.pixel_centers
    covered = x**2 + y**2 <= (geometry.n_bins * geometry.bin_mm / 2) ** 2
    return radon.backproject(filtered) * (scale * covered).to(sinogram)


def ramp_filter(length: int, bin_mm: float, window: str = "hann", cutoff: float = 1.0) -> Tensor:
    """Frequency response of the ramp filter for ``torch.fft.rfft`` of ``length`` samples.

    Args:
        length: number of samples after padding, even.
        bin_mm: sample distance, mm.
        window: "hann" or "ramp".
        cutoff: end of the window as a fraction of the Nyquist frequency, in (0, 1].

    Returns:
        Real response in 1/mm, ``(length // 2 + 1,)``, float64.

    Raises:
        ValueError: if the window is unknown or the cut-off outside (0, 1].
    """
    if window not in WINDOWS:
        raise ValueError(f"There is no window {window!r}; choose one of {', '.join(WINDOWS)}.")
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff is {cutoff}, but must lie in (0, 1], as a fraction of the Nyquist frequency.")
    n = torch.arange(length, dtype=torch.float64)
    n = torch.minimum(n, length - n)
    kernel = torch.where(n % 2 == 1, -1 / (math.pi * n.clamp_min(1) * bin_mm) ** 2, 0.0)
    kernel[0] = 1 / (2 * bin_mm) ** 2
    response = torch.fft.rfft(kernel).real * bin_mm
    relative = torch.linspace(0, 1, length // 2 + 1, dtype=torch.float64) / cutoff
    if window == "hann":
        response = response * (0.5 + 0.5 * torch.cos(math.pi * relative))
    return torch.where(relative <= 1, response, 0.0)


def mlem(
    radon: Radon,
    counts: Tensor,
    iterations: int,
    multiplicative: Tensor | float = 1.0,
    additive: Tensor | float = 0.0,
    psf_mm: float = 0.0,
) -> Tensor:
    """Maximum-likelihood expectation maximisation: ``osem`` with one subset.

    Without additive terms every iterate explains exactly the measured number of counts.

    Args and errors are those of ``osem``.

    Returns:
        Activity, ``(batch, 1, rows, columns)``.
    """
    return osem(radon, counts, iterations, 1, multiplicative, additive, psf_mm)


def osem(
    radon: Radon,
    counts: Tensor,
    iterations: int,
    subsets: int,
    multiplicative: Tensor | float = 1.0,
    additive: Tensor | float = 0.0,
    psf_mm: float = 0.0,
) -> Tensor:
    """Ordered-subsets expectation maximisation (Hudson & Larkin 1994), subsets of interleaved views.

    One update with subset k: ``x <- x / (G R_k' m) * G R_k' (m y / (m R_k G x + b))``. It starts from a uniform image
    whose scale is immaterial after one update.

    Args:
        radon: the projector.
        counts: measured prompts, ``(batch, 1, views, bins)``, not negative.
        iterations: passes over all views.
        subsets: number of subsets; it must divide the number of views.
        multiplicative: counts per activity x mm of every bin, broadcastable to ``counts``, not negative (0: not
            measured).
        additive: expected scatter and randoms in counts, broadcastable to ``counts``, not negative.
        psf_mm: full width at half maximum of the resolution model in mm; 0 for none.

    Returns:
        Activity, ``(batch, 1, rows, columns)``; 0 in pixels that no bin sees.

    Raises:
        ValueError: if a shape does not fit, a term is negative or the subsets do not divide the views.
    """
    n_views = radon.geometry.n_views
    if counts.dim() != 4 or tuple(counts.shape[-2:]) != radon.sinogram_shape:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; expected (batch, 1, *{radon.sinogram_shape}).")
    if subsets < 1 or n_views % subsets:
        raise ValueError(
            f"{n_views} views cannot be split into {subsets} equal subsets; choose a divisor of {n_views}."
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, but must be at least 1.")
    terms = {"counts": counts, "multiplicative": multiplicative, "additive": additive}
    for name, term in terms.items():
        if (torch.as_tensor(term) < 0).any():
            raise ValueError(f"{name} has negative values, but a Poisson model needs them >= 0; use fbp for such data.")
    counts = counts if counts.is_floating_point() else counts.float()
    m, b = (torch.as_tensor(term).to(counts).expand(counts.shape) for term in (multiplicative, additive))
    blur = _GaussianBlur(psf_mm / radon.geometry.pixel_mm)

    operators = [radon.subset(k, subsets) for k in range(subsets)]
    parts = [tuple(term[..., k::subsets, :] for term in (counts, m, b)) for k in range(subsets)]
    # Equal factors in every slice make one sensitivity serve the whole batch.
    shared = not isinstance(multiplicative, Tensor) or multiplicative.dim() < 3 or multiplicative.shape[0] == 1
    sensitivities = [
        blur(operator.backproject(part[1][:1] if shared else part[1]))
        for operator, part in zip(operators, parts, strict=True)
    ]
    seen = torch.stack(sensitivities).sum(0) > 0
    image = seen.to(counts).expand(*counts.shape[:-2], *radon.geometry.image_shape)
    for _ in range(iterations):
        for operator, (y, m_k, b_k), sensitivity in zip(operators, parts, sensitivities, strict=True):
            expected = m_k * operator.project(blur(image)) + b_k
            update = blur(operator.backproject(_ratio(m_k * y, expected, 0.0)))
            image = image * _ratio(update, sensitivity, 1.0)
    return image


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    """Divide where the denominator is positive: elsewhere no bin, or no pixel, has anything to say."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), otherwise)


class _GaussianBlur:
    """Convolution with a Gaussian, zero outside the image, hence its own transpose. ``fwhm`` in pixels."""

    def __init__(self, fwhm: float) -> None:
        if fwhm < 0:
            raise ValueError(f"The resolution model's width is {fwhm} pixels, but must not be negative.")
        self.kernel = None
        if fwhm > 0:
            sigma = fwhm / math.sqrt(8 * math.log(2))
            radius = math.ceil(4 * sigma)
            x = torch.arange(-radius, radius + 1, dtype=torch.float64)
            kernel = torch.exp(-0.5 * (x / sigma) ** 2)
            self.kernel = kernel / kernel.sum()

    def __call__(self, image: Tensor) -> Tensor:
        if self.kernel is None:
            return image
        kernel, radius = self.kernel.to(image), len(self.kernel) // 2
        flat = image.reshape(-1, 1, *image.shape[-2:])
        flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(radius, 0))
        return F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, radius)).view_as(image)
